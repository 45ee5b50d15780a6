"""What the tests of alignment share; run as a program, it is one process of a distributed alignment."""

import os
import sys
from collections.abc import Callable
from pathlib import Path

import torch
from accelerate.state import AcceleratorState
from PIL import Image

import exitwise.alignment.setup
from exitwise import UserError
from exitwise.alignment.config import AlignConfig
from exitwise.alignment.loop import align

CHEAP = {
    "exits": "1", "steps": 2, "batch_size": 8, "max_new_tokens": 4, "mix": (1.0, 0.0, 0.0), "reward": "matcher",
    "probe": 0, "best_of": 0, "eval_prompts": 4, "checkpoint_every": 1, "samples_every": 1, "lora_rank": 4,
    "device": "cpu",
}  # fmt: skip
HARMFUL = [f"Request {i}: {'x' * (3 * i % 7)} please" for i in range(12)]  # stand-ins: only their kind matters here
BENIGN = [f"Question {i}{'?' * (i % 3)}" for i in range(8)]


def write_material(folder: Path) -> None:
    """Prompts and two pictures; the built-in ones would only take longer."""
    (folder / "harmful.txt").write_text("\n".join(HARMFUL))
    (folder / "benign.txt").write_text("\n".join(BENIGN))
    (folder / "images").mkdir()
    for name, colour in (("red", (200, 30, 30)), ("blue", (20, 40, 220))):
        gradient = Image.linear_gradient("L").convert("RGB")
        picture = Image.blend(Image.new("RGB", gradient.size, colour), gradient, 0.4)
        picture.resize((40, 40)).save(folder / "images" / f"{name}.png")


def config_of(model: Path, material: Path, **changes) -> AlignConfig:
    """A small alignment of `model`, on `material`."""
    files = {
        "prompts": (material / "harmful.txt",),
        "benign": (material / "benign.txt",),
        "images": material / "images",
        "features": material / "features",
    }
    return AlignConfig.of(str(model), **(CHEAP | files | changes))


class VowelReward:
    """Differs from answer to answer, depends on nothing but the text, needs no model."""

    def scores(self, prompts, answers):
        return torch.tensor([sum(map(answer.count, "aeiouAEIOU")) - 0.1 * len(answer) for answer in answers])


def align_all(model: Path, material: Path, out: Path, meet: Callable[[], None] = lambda: None) -> None:
    """L-PPO, then SFT, in this process of however many.

    Args:
        meet: called before each, to say where the processes meet.
    """
    for method, changes in DISTRIBUTED.items():
        meet()
        align(config_of(model, material, method=method, **changes), out=out / method)
        AcceleratorState._reset_state(reset_partial_state=True)  # `align` ends the process group


DISTRIBUTED = {
    "l-ppo": {"mix": (0.5, 0.5, 0.0), "gradient_accumulation_steps": 2, "probe": 3, "exits": "0,1", "lr": 1e-3,
              "features": None, "best_of": 2},
    "sft": {"mix": (0.5, 0.5, 0.0), "num_ppo_epochs": 1, "lr": 1e-3, "features": None},
}  # fmt: skip


class NanElsewhere(VowelReward):
    """A score that is no number in every process but the first."""

    def scores(self, prompts, answers):
        return super().scores(prompts, answers) * (float("nan") if int(os.environ["RANK"]) else 1.0)


def align_with_nan(model: Path, material: Path, out: Path) -> None:
    """What this process said when another one had to stop, as OUT/said.RANK."""
    exitwise.alignment.setup.load_scores = lambda *_: NanElsewhere()  # type: ignore[assignment]
    try:
        align(config_of(model, material), out=out / "nan")
    except UserError as error:
        (out / f"said.{os.environ['RANK']}").write_text(str(error))


if __name__ == "__main__":
    places, ports = [Path(word) for word in sys.argv[1:4]], sys.argv[4:]
    meet = lambda: os.environ.__setitem__("MASTER_PORT", ports.pop())  # a port that was met at may not be free yet
    exitwise.alignment.setup.load_scores = lambda *_: VowelReward()  # type: ignore[assignment]
    align_all(*places, meet)  # type: ignore[call-arg]
    meet()
    align_with_nan(*places)
