"""What tests of alignment runs share: configs with everything on, rewards that stop a run, and comparisons of bytes."""

import json
import os

from exitwise.cli.main import entry
from tests.align_setup import VowelReward

SEED = int(os.environ.get("EXITWISE_KILL_SEED", "1"))


def rows_of(out, name="metrics.jsonl"):
    return [json.loads(line) for line in (out / name).read_text().splitlines()]


def bytes_of(out):
    """All that must not depend on when a run was stopped: everything but what is measured."""
    measured = {"timing.json", "env.json", ".lock"}
    return {
        str(path.relative_to(out)): path.read_bytes()
        for path in sorted(out.rglob("*"))
        if path.is_file() and path.name not in measured and not path.name.endswith(".tmp")
    }


def assert_same_bytes(out, other):
    found, wanted = bytes_of(out), bytes_of(other)
    assert found.keys() == wanted.keys()
    assert [name for name in wanted if found[name] != wanted[name]] == []


EVERYTHING = {
    "exits": "0,1,3", "schedule": "worst", "eval_every": 2, "mix": (0.5, 0.25, 0.25), "steps": 4, "probe": 3,
    "best_of": 2, "kl_target": 0.1, "num_mini_batches": 2, "gradient_accumulation_steps": 2, "checkpoint_every": 2,
    "samples_every": 2, "lr": 1e-2, "whiten_rewards": True, "missing_eos_penalty": 0.5, "entropy_coef": 0.01,
    "cliprange_high": 0.3,
}  # fmt: skip


class Watched(VowelReward):
    """Calls `event(number of the call)` before it scores."""

    def __init__(self, event=lambda number: None):
        self.calls, self.event = 0, event

    def scores(self, prompts, answers):
        self.calls += 1
        self.event(self.calls)
        return super().scores(prompts, answers)


class StopError(Exception):
    pass


def raiser(fatal, error=StopError):
    def event(number):
        if number == fatal:
            raise error

    return event


def code_of(words):
    """The exit code of the command."""
    try:
        entry(words)
    except SystemExit as stop:
        return stop.code
    return 0


def one_line(capsys):
    """The only line of stderr that is an error."""
    lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("exitwise: ")]
    assert len(lines) == 1
    return lines[0]


def command(model, material, out, *more):
    words = ["align", str(model), "--exits", "1", "--steps", "2", "--batch-size", "8", "--max-new-tokens", "4",
             "--mix", "1", "0", "0", "--reward", "matcher", "--probe", "0", "--best-of", "0", "--device", "cpu",
             "--prompts", str(material / "harmful.txt"), "--images", str(material / "images"),
             "--out", str(out)]  # fmt: skip
    return [*words, *more]


class Doing:
    """A progress that calls `deed` when the message of the given step comes."""

    def __init__(self, step, deed):
        self.wanted, self.deed = f"step {step}/", deed

    def say(self, text):
        if text.startswith(self.wanted):
            self.deed()

    def start(self, total, what=""): ...
    def advance(self, done): ...
