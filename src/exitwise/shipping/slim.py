"""A checkpoint whose image encoder ends at an exit: fewer blocks, a config that says so, the adapter merged in.

What is written is an ordinary Hugging Face folder: any runtime that knows the family runs it and stops where the exit
is, without knowing what an exit is. How a family's config says how many blocks there are stands in families.py: LLaVA
has `vision_config.num_hidden_layers`, and `vision_feature_layer = -1` for the last one's state.

The folder is made beside its final name and renamed when it is whole, so a full disk or a kill leaves nothing under
that name. With `check` it is first loaded from there by transformers alone and held to the full model at the exit.
"""

import errno
import json
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from .. import __version__
from ..data.images import load_image
from ..errors import UserError
from ..model.costs import exit_costs
from ..model.exits import exit_at
from ..model.families import truncated_config
from ..model.quiet import quiet
from ..model.testbed import TESTBED_NOTICE, TESTBEDS
from ..model.vlm import Vlm
from ..run import directory
from ..run.progress import Progress, Silent
from ..run.provenance import fingerprint
from ..shipping.config import SlimConfig
from .card import audit_figures, card

CHECKS = (("coffee", "What is this?"), ("chelsea", "Is there an animal in the picture?"), ("rocket", "Say hello."))
CHECK_TOKENS = 16
TOLERANCE = 1e-4
"""Most that a logit may differ, relative to the largest: float32 rounding is a hundred times below it."""

LEGACY_TOWERS = ("clip_vision_model", "siglip_vision_model")
"""Towers whose weights published checkpoints name `vision_tower.vision_model.*`: vLLM looks for that name only,
transformers reads the shorter one too."""


class CheckAnswers(NamedTuple):
    """What a model says in the check, one entry a question: logits (T, V) of the prompt, greedy tokens."""

    logits: list[torch.Tensor]
    tokens: list[list[int]]


def slim(config: SlimConfig, out: Path, progress: Progress | None = None) -> Path:
    """Writes the model of `config`, cut at its exit, to the folder `out`; returns that folder.

    Raises:
        UserError: the exit is not there or cannot be had by cutting, `out` is taken, the adapter or the audit is of
            another model, there is no room to write, or the check failed. Nothing is left under `out` then.
    """
    from ..model.loading import load_vlm

    config.check_values()
    progress = progress or Silent()
    check_free(out)
    vlm = load_vlm(
        config.model,
        adapter=config.adapter,
        device=config.device,
        trust_remote_code=config.trust_remote_code,
        say=progress.say,
    )
    check_exit(vlm, config.exit)
    identity = fingerprint(vlm)
    figures = audit_figures(config.audit, identity, config.exit) if config.audit else None
    dtype = _dtype(config)
    _cast(vlm.model, dtype)
    note = {
        "made_by": f"exitwise {__version__}",
        "source": config.model,
        "adapter": config.adapter,
        "source_sha256": identity,
        "exit": config.exit,
        "source_blocks": vlm.n_blocks,
        "source_default_exit": vlm.default_exit,
        "dtype": str(dtype).removeprefix("torch."),
        "saves": savings(vlm, config.exit),
        "notice": TESTBED_NOTICE.get(config.model),
        "audit": figures,
        "check": None,
    }
    with _whole_or_nothing(out) as scratch:
        wanted = _reference(vlm, config.exit, dtype) if config.check else None
        save(vlm, config.exit, scratch)
        if wanted is not None:
            progress.say("loading the slim model with transformers to compare")
            note["check"] = compare(wanted, answers(*_reload(scratch, vlm.device, config.exit)))
        directory.write_json(scratch / "exitwise.json", note)
        (scratch / "README.md").write_text(card(note, vlm), encoding="utf-8")
    return out


def truncated(vlm: Vlm, exit: int) -> Any:
    """The model whose encoder really has `exit` blocks, to be saved: weights are shared, no buffer is filled.

    Raises:
        UserError: see `check_exit`.
    """
    check_exit(vlm, exit)
    with torch.device("meta"):
        shorter = type(vlm.model)(truncated_config(vlm.model.config, exit))
    weights = vlm.model.state_dict()
    shorter.load_state_dict({name: weights[name] for name in shorter.state_dict()}, assign=True)
    shorter.tie_weights()
    return shorter


def check_exit(vlm: Vlm, exit: int) -> None:
    """Raises UserError for an exit outside 1 .. L, and for one that the family's config cannot say."""
    none = 0 < exit <= vlm.n_blocks and truncated_config(vlm.model.config, exit) is None
    if exit == 0 or none:
        raise UserError(
            f"exit {exit} of {vlm.name} cannot be had by cutting: an encoder of {exit} blocks gives no features in "
            f"most families; expected 1 to {vlm.n_blocks} (`exit_at` runs it on the full model)"
        )
    if not 0 < exit <= vlm.n_blocks:
        raise UserError(
            f"exit {exit} is not there: {vlm.name} can be cut at exits 1 to {vlm.n_blocks} (default {vlm.default_exit})"
        )
    if vlm.takes_layers and exit > vlm.default_exit:
        raise UserError(
            f"exit {exit} of {vlm.name} is its default exit again: its connector takes no layer behind "
            f"{vlm.default_exit}; give --exit {vlm.default_exit} or less"
        )


def check_free(out: Path) -> None:
    """Raises UserError where `out` is a file or a folder with something in it."""
    if out.exists() and not out.is_dir():
        raise UserError(f"{out} is a file; give --out a new folder")
    if out.is_dir() and any(out.iterdir()):
        raise UserError(f"{out} is not empty; give --out a new folder")


def save(vlm: Vlm, exit: int, folder: Path) -> None:
    """Writes weights, config, generation config, processor and tokenizer of the model cut at `exit` into `folder`.

    The tokenizer is told to pad on the left, which it forgets otherwise.
    """
    save_model(vlm, exit, folder)
    with quiet():
        vlm.processor.save_pretrained(folder)
    path = folder / "tokenizer_config.json"
    directory.write_json(path, json.loads(path.read_text(encoding="utf-8")) | {"padding_side": "left"})


def save_model(vlm: Vlm, exit: int, folder: Path) -> None:
    """Weights, config and generation config; the last as it is, also one that transformers reads but will not save."""
    with quiet():
        truncated(vlm, exit).save_pretrained(folder)
        vlm.model.generation_config.to_json_file(folder / "generation_config.json", use_diff=True)
    if vlm.model.config.vision_config.model_type in LEGACY_TOWERS:
        _published_names(folder)


def _published_names(folder: Path) -> None:
    """Renames `vision_tower.*` to `vision_tower.vision_model.*` in every weight file and in the index."""

    def renamed(name: str) -> str:
        head, tower, rest = name.partition("vision_tower.")
        return name if not tower or rest.startswith("vision_model.") else f"{head}{tower}vision_model.{rest}"

    for path in sorted(folder.glob("*.safetensors")):
        tensors = load_file(path)
        if any(renamed(name) != name for name in tensors):
            scratch = path.with_suffix(".tmp")
            save_file({renamed(name): tensor for name, tensor in tensors.items()}, scratch, metadata={"format": "pt"})
            scratch.replace(path)
    index = folder / "model.safetensors.index.json"
    if index.exists():
        told = json.loads(index.read_text(encoding="utf-8"))
        told["weight_map"] = {renamed(name): file for name, file in told["weight_map"].items()}
        directory.write_json(index, told)


def savings(vlm: Vlm, exit: int) -> dict[str, Any]:
    """What the cut takes away, and out of how much: parameters, bytes, FLOPs of one request (costs.py)."""
    rows = exit_costs(vlm, [exit, vlm.n_blocks], repetitions=0)["exits"]
    cut, whole = (next(row for row in rows if row["exit"] == e) for e in (exit, vlm.n_blocks))
    found: dict[str, Any] = {"blocks_cut": vlm.n_blocks - exit}
    for key in ("parameters", "bytes", "flops"):
        found[key] = int(whole[key]["total"] - cut[key]["total"])
        found[f"whole_{key}"] = int(whole[key]["total"])
    found["encoder_flops"] = int(whole["flops"]["encoder"])
    return found


@torch.inference_mode()
def answers(model: Any, processor: Any, chat: Any) -> CheckAnswers:
    """What a model answers to the questions of the check, greedily.

    Args:
        chat: from a question to the prompt's text.
    """
    logits, tokens = [], []
    for photo, question in CHECKS:
        image = load_image(f"photo:{photo}", None)
        text, bos = chat(question), processor.tokenizer.bos_token
        special = not (bos and text.startswith(bos))
        inputs = processor(images=[image], text=[text], return_tensors="pt", add_special_tokens=special)
        inputs = inputs.to(model.device)
        logits.append(model(**inputs).logits[0].float().cpu())
        said = model.generate(**inputs, max_new_tokens=CHECK_TOKENS, do_sample=False)
        tokens.append(said[0, inputs["input_ids"].shape[1] :].tolist())
    return CheckAnswers(logits, tokens)


def compare(wanted: CheckAnswers, got: CheckAnswers) -> dict[str, Any]:
    """How far the slim model is from the full one at the exit.

    Raises:
        UserError: further than float32 rounding, or another token.
    """
    scale = max(float(each.abs().max()) for each in wanted.logits)
    if [each.shape for each in wanted.logits] != [each.shape for each in got.logits]:
        raise UserError("the slim model reads the check's prompts as other tokens than the full one; nothing is kept")
    apart = max(float((a - b).abs().max()) for a, b in zip(wanted.logits, got.logits, strict=True))
    if not apart <= TOLERANCE * scale or wanted.tokens != got.tokens:
        same = "the same" if wanted.tokens == got.tokens else "other"
        raise UserError(
            f"the slim model is not the full one at this exit: logits differ by {apart:.2g} (largest {scale:.3g}), "
            f"{same} greedy tokens; nothing is kept, please report it"
        )
    n_tokens = sum(len(row) for row in wanted.tokens)
    return {"questions": len(CHECKS), "tokens": n_tokens, "largest_logit": scale, "largest_difference": apart}


def _reference(vlm: Vlm, exit: int, dtype: torch.dtype) -> CheckAnswers:
    """The full model at the exit, in float32 and with the weights as they will be saved."""
    _cast(vlm.model, torch.float32)
    try:
        with quiet(), exit_at(vlm, exit):
            return answers(vlm.model, vlm.processor, vlm.chat)
    finally:
        _cast(vlm.model, dtype)


def _reload(folder: Path, device: torch.device, exit: int) -> tuple[Any, Any, Any]:
    """(model, processor, chat) of a folder, as a user of transformers has them."""
    from transformers import AutoModelForImageTextToText, AutoProcessor

    from ..model.vlm import describe

    with quiet():
        loader: Any = AutoModelForImageTextToText
        model = loader.from_pretrained(folder, dtype=torch.float32, use_safetensors=True).to(device).eval()
        processor = AutoProcessor.from_pretrained(folder)
    if processor.tokenizer.padding_side != "left":
        raise UserError("the saved tokenizer pads on the right; nothing is kept, please report it")
    again = describe(str(folder), model, processor)
    if (again.n_blocks, again.default_exit) != (exit, exit):
        raise UserError(
            f"the saved model has {again.n_blocks} blocks and exit {again.default_exit}, not {exit}; nothing is kept, "
            "please report it"
        )
    return model, processor, again.chat


def _dtype(config: SlimConfig) -> torch.dtype:
    """What to save in: what was asked, else what the source is saved in."""
    if config.dtype != "auto":
        return getattr(torch, config.dtype)
    if config.model in TESTBEDS:
        return torch.float32
    from transformers import AutoConfig

    with quiet():
        found = AutoConfig.from_pretrained(config.model, trust_remote_code=config.trust_remote_code)
    return found.dtype or torch.float32


def _cast(model: Any, dtype: torch.dtype) -> None:
    """Parameters only: buffers such as rotary frequencies are made in float32 and stay so."""
    for parameter in model.parameters():
        parameter.data = parameter.data.to(dtype)


@contextmanager
def _whole_or_nothing(out: Path) -> Iterator[Path]:
    """A scratch folder that gets the name `out` once all is written, and is removed otherwise."""
    scratch = None
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        scratch = Path(tempfile.mkdtemp(prefix=f".{out.name}.", dir=out.parent))
        yield scratch
        scratch.chmod(0o755)
        scratch.rename(out)  # onto an empty folder is allowed
    except (OSError, SafetensorError) as error:
        said = str(error)
        full = getattr(error, "errno", None) == errno.ENOSPC or "No space left" in said
        hint = "make room or give --out another place" if full else "give --out a place that can be written"
        raise UserError(f"cannot write {out} ({said[:200]}); nothing is kept, {hint}") from error
    finally:
        if scratch is not None and scratch.exists():
            shutil.rmtree(scratch, ignore_errors=True)
