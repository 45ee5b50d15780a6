"""Writes a checkpoint whose image encoder ends at an exit: fewer blocks, a config to match, the adapter merged in.

The result is an ordinary Hugging Face folder: any runtime that knows the family runs it and stops at the exit, without
knowing what an exit is. `Family.truncate` makes the config (model/families.py): for LLaVA it has fewer
`vision_config.num_hidden_layers`, and `vision_feature_layer = -1` for the state of the last one.

The folder is written under a temporary name and renamed when it is complete, so a full disk or a kill leaves nothing
under the final name. With `check` it is first loaded from there and compared with the full model (check.py).
"""

import copy
import errno
import json
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from os import PathLike
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import nn

from .. import __version__
from ..errors import UserError
from ..model.costs import exit_costs
from ..model.exits import exit_at
from ..model.families import truncated_config
from ..model.loading import adapter_folder, load_vlm, with_adapter
from ..model.quiet import quiet
from ..model.testbed import TESTBED_NOTICE, TESTBEDS
from ..model.vlm import Vlm, describe
from ..run import directory
from ..run.progress import Progress, Silent
from ..run.provenance import fingerprint
from ..run.typed import to_json
from .card import audit_figures, card
from .check import CheckAnswers, answers, compare, reload
from .config import SlimConfig
from .note import Note, Savings

if TYPE_CHECKING:
    from transformers import PreTrainedConfig

    from ..model.types import StockModel

LEGACY_TOWERS = ("clip_vision_model", "siglip_vision_model")
"""Towers whose weights published checkpoints name `vision_tower.vision_model.*`: vLLM looks for that name only,
transformers reads the shorter one too."""


def slim(
    model: SlimConfig | Vlm | str | PathLike[str],
    out: str | PathLike[str],
    progress: Progress | None = None,
    **options: object,
) -> Path:
    """Writes a model, cut at an exit, to the folder `out`; returns that folder.

        slim("testbed", exit=8, adapter="runs/aligned", out="slim/8")

    Args:
        model: a name, a folder, a hub id, or a loaded `Vlm`, which stays as it is.
        out: must be new or empty.
        options: the fields of `SlimConfig`; none where `model` is a `SlimConfig`.

    Raises:
        UserError: the exit does not exist or cannot be cut, `out` is taken, the adapter or the audit belongs to
            another model, there is no room to write, or the check failed. Nothing is left under `out` then.
    """
    if isinstance(model, SlimConfig) and options:
        raise UserError(f"slim got a SlimConfig and options beside it ({', '.join(options)}); put them into the config")
    source = model.name if isinstance(model, Vlm) else model
    config = source if isinstance(source, SlimConfig) else SlimConfig.of(source, **options)
    config.check_values()
    progress, out = progress or Silent(), Path(out)
    check_free(out)
    vlm = _own_copy(model, config) if isinstance(model, Vlm) else _load(config, progress)
    check_exit(vlm, config.exit)
    identity = fingerprint(vlm)
    figures = audit_figures(config.audit, identity, config.exit) if config.audit else None
    dtype = vlm.model.dtype if isinstance(model, Vlm) and config.dtype == "auto" else _dtype(config)
    _cast(vlm.model, dtype)
    saves = savings(vlm, config.exit)
    with _whole_or_nothing(out) as scratch:
        wanted = _reference(vlm, config.exit, dtype) if config.check else None
        save(vlm, config.exit, scratch)
        if wanted is not None:
            progress.say("loading the slim model with transformers to compare")
        note = Note(
            made_by=f"exitwise {__version__}",
            source=config.model,
            adapter=config.adapter,
            source_sha256=identity,
            exit=config.exit,
            source_blocks=vlm.n_blocks,
            source_default_exit=vlm.default_exit,
            dtype=str(dtype).removeprefix("torch."),
            saves=saves,
            notice=TESTBED_NOTICE.get(config.model),
            audit=figures,
            check=compare(wanted, answers(reload(scratch, vlm.device, config.exit))) if wanted is not None else None,
        )
        directory.write_json(scratch / "exitwise.json", to_json(note))
        (scratch / "README.md").write_text(card(note), encoding="utf-8")
    return out


def _load(config: SlimConfig, progress: Progress) -> Vlm:
    return load_vlm(
        config.model,
        adapter=config.adapter,
        device=config.device,
        trust_remote_code=config.trust_remote_code,
        say=progress.say,
    )


def _own_copy(vlm: Vlm, config: SlimConfig) -> Vlm:
    """A copy of a loaded model with the adapter merged: what is saved is cast, and the caller's model must not be."""
    model = copy.deepcopy(vlm.model)
    if config.adapter:
        model = with_adapter(model, adapter_folder(config.adapter)).eval().requires_grad_(False)
    return describe(vlm.name, model if config.device == "auto" else model.to(config.device), vlm.processor)


def truncated(vlm: Vlm, exit: int) -> "StockModel":
    """The model whose encoder has only `exit` blocks, to be saved: weights are shared, no buffer is filled.

    Raises:
        UserError: see `check_exit`.
    """
    config = check_exit(vlm, exit)
    with torch.device("meta"):
        shorter = type(vlm.model)(config)
    weights = vlm.model.state_dict()
    shorter.load_state_dict({name: weights[name] for name in shorter.state_dict()}, assign=True)
    shorter.tie_weights()
    return shorter


def check_exit(vlm: Vlm, exit: int) -> "PreTrainedConfig":
    """The config of the model cut at `exit`.

    Raises:
        UserError: the exit lies outside 1 .. L, or the family's config cannot express it.
    """
    config = truncated_config(vlm.model.config, exit) if 0 < exit <= vlm.n_blocks else None
    if exit == 0 or (config is None and exit <= vlm.n_blocks):
        raise UserError(
            f"exit {exit} of {vlm.name} cannot be cut: an encoder of {exit} blocks gives no features in "
            f"most families; expected 1 to {vlm.n_blocks} (`exit_at` runs it on the full model)"
        )
    if config is None:
        raise UserError(
            f"exit {exit} does not exist: {vlm.name} can be cut at exits 1 to {vlm.n_blocks} "
            f"(default {vlm.default_exit})"
        )
    if vlm.takes_layers and exit > vlm.default_exit:
        raise UserError(
            f"exit {exit} of {vlm.name} equals its default exit: its connector takes no layer after "
            f"{vlm.default_exit}; give --exit {vlm.default_exit} or less"
        )
    return config


def check_free(out: Path) -> None:
    """Raises UserError where `out` is a file or a folder with something in it."""
    if out.exists() and not out.is_dir():
        raise UserError(f"{out} is a file; give --out a new folder")
    if out.is_dir() and any(out.iterdir()):
        raise UserError(f"{out} is not empty; give --out a new folder")


def save(vlm: Vlm, exit: int, folder: Path) -> None:
    """Writes weights, config, generation config, processor and tokenizer of the model cut at `exit` into `folder`.

    Left padding is added to the tokenizer's config, since `save_pretrained` omits it.
    """
    save_model(vlm, exit, folder)
    with quiet():
        vlm.processor.save_pretrained(folder)
    path = folder / "tokenizer_config.json"
    directory.write_json(path, json.loads(path.read_text(encoding="utf-8")) | {"padding_side": "left"})


def save_model(vlm: Vlm, exit: int, folder: Path) -> None:
    """Writes weights, config and generation config; the last unchanged, even one that transformers refuses to save."""
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
        names = json.loads(index.read_text(encoding="utf-8"))
        names["weight_map"] = {renamed(name): file for name, file in names["weight_map"].items()}
        directory.write_json(index, names)


def savings(vlm: Vlm, exit: int) -> Savings:
    """Parameters, bytes and FLOPs that the cut saves, and those of the model with all its blocks (model/costs.py)."""
    rows = exit_costs(vlm, [exit, vlm.n_blocks], repetitions=0)["exits"]
    cut, whole = (next(row for row in rows if row["exit"] == e) for e in (exit, vlm.n_blocks))

    def saved(key: str) -> int:
        return int(whole[key]["total"] - cut[key]["total"])

    return Savings(
        blocks_cut=vlm.n_blocks - exit,
        parameters=saved("parameters"),
        whole_parameters=int(whole["parameters"]["total"]),
        bytes=saved("bytes"),
        whole_bytes=int(whole["bytes"]["total"]),
        flops=saved("flops"),
        whole_flops=int(whole["flops"]["total"]),
        encoder_flops=int(whole["flops"]["encoder"]),
    )


def _reference(vlm: Vlm, exit: int, dtype: torch.dtype) -> CheckAnswers:
    """The full model at the exit, in float32 and with the weights as they will be saved."""
    _cast(vlm.model, torch.float32)
    try:
        with quiet(), exit_at(vlm, exit):
            return answers(vlm)
    finally:
        _cast(vlm.model, dtype)


def _dtype(config: SlimConfig) -> torch.dtype:
    """The dtype to save in: that of the option, else the one the source is saved in."""
    if config.dtype != "auto":
        return getattr(torch, config.dtype)
    if config.model in TESTBEDS:
        return torch.float32
    from transformers import AutoConfig

    with quiet():
        found = AutoConfig.from_pretrained(config.model, trust_remote_code=config.trust_remote_code)
    return found.dtype or torch.float32


def _cast(model: nn.Module, dtype: torch.dtype) -> None:
    """Casts parameters only: buffers such as rotary frequencies are computed in float32 and stay in it."""
    for parameter in model.parameters():
        parameter.data = parameter.data.to(dtype)


@contextmanager
def _whole_or_nothing(out: Path) -> Iterator[Path]:
    """A temporary folder that is renamed to `out` once all is written, and removed otherwise."""
    scratch = None
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        scratch = Path(tempfile.mkdtemp(prefix=f".{out.name}.", dir=out.parent))
        yield scratch
        scratch.chmod(0o755)
        scratch.rename(out)  # onto an empty folder is allowed
    except (OSError, SafetensorError) as error:
        reason = str(error)
        full = getattr(error, "errno", None) == errno.ENOSPC or "No space left" in reason
        hint = "free space or give --out another place" if full else "give --out a place that can be written"
        raise UserError(f"cannot write {out} ({reason[:200]}); nothing is kept, {hint}") from error
    finally:
        if scratch is not None and scratch.exists():
            shutil.rmtree(scratch, ignore_errors=True)
