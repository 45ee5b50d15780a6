"""Checkpoints of an alignment, written completely or not at all, and the adapter at its end.

    checkpoints/step-000010/trainable.safetensors   adapter and value head
                            optimizer.safetensors   AdamW's moments
                            state.json              step, kl_coef, exit weights, lines of the logs

The newest two are kept. Under FSDP2 they hold whole tensors too, so a run may resume with another number of processes.
Under DeepSpeed accelerate writes the state, and its optimizer files are pickles.
"""

import json
import os
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch.distributed.tensor import DTensor, distribute_tensor

from ..errors import UserError
from ..model.features import writing
from ..run import directory
from .records import AnswerLine, StepRecord
from .state import Bench, State

if TYPE_CHECKING:
    from accelerate import Accelerator

KEPT = 2


def save(bench: Bench, out: Path, state: State) -> None:
    """Writes the checkpoint of `state.step`; the old ones stay until it is on disk.

    Raises:
        UserError: the disk is full.
    """
    folder = out / "checkpoints" / f"step-{state.step:06d}"
    if folder.exists():
        return
    main = bench.accelerator.is_main_process
    scratch = folder.with_name(folder.name + ".tmp")
    if main:
        shutil.rmtree(scratch, ignore_errors=True)
        scratch.mkdir(parents=True)
    bench.accelerator.wait_for_everyone()
    if _kind(bench.accelerator) == "DEEPSPEED":
        bench.accelerator.save_state(str(scratch / "accelerate"))
    else:
        weights = {name: whole(p) for name, p in _trained(bench)}  # every process helps to gather
        moments = _moments(bench.optimizer)
        if main:
            with writing(scratch):
                save_file(weights, scratch / "trainable.safetensors")
                save_file(moments, scratch / "optimizer.safetensors")
    if main:
        lines = {name: _count(out / name) for name in ("metrics.jsonl", "answers.jsonl")}
        directory.write_json(scratch / "state.json", state.to_json() | {"lines": lines})
        os.replace(scratch, folder)
        for old in sorted((out / "checkpoints").glob("step-??????"))[:-KEPT]:
            shutil.rmtree(old)
    bench.accelerator.wait_for_everyone()


def resume(bench: Bench, out: Path, state: State) -> tuple[State, list[StepRecord]]:
    """(state, lines of metrics.jsonl) of the newest checkpoint, its weights loaded; (`state`, []) where there is none.

    Raises:
        UserError: a checkpoint is broken.
    """
    found = sorted((out / "checkpoints").glob("step-??????"))
    lines = {"metrics.jsonl": 0, "answers.jsonl": 0}
    if found:
        folder = found[-1]
        try:
            if _kind(bench.accelerator) == "DEEPSPEED":
                bench.accelerator.load_state(str(folder / "accelerate"))
            else:
                _load(bench, folder)
            saved = directory.read_json(folder / "state.json", "step", "kl_coef", "weights", "lines")
            lines = saved.pop("lines")
            state = State.from_json(saved)
        except (OSError, KeyError, TypeError, ValueError, RuntimeError, SafetensorError) as error:
            raise UserError(
                f"the checkpoint {folder} is broken ({error}); delete it to resume from the previous one"
            ) from None
    if bench.accelerator.is_main_process:
        for name, n in lines.items():
            directory.truncate_to(out / name, n)
    bench.accelerator.wait_for_everyone()
    path = out / "metrics.jsonl"
    written = path.read_text(encoding="utf-8").splitlines() if path.exists() else []
    return state, [StepRecord.from_json(line) for line in written[: lines["metrics.jsonl"]]]


def log(out: Path, record: StepRecord, answers: Sequence[AnswerLine]) -> None:
    """Appends a line to metrics.jsonl, and answers, hostile text as it is, to answers.jsonl."""
    with open(out / "metrics.jsonl", "a", encoding="utf-8") as handle:
        handle.write(record.to_json() + "\n")
    with open(out / "answers.jsonl", "a", encoding="utf-8") as handle:
        handle.write("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in answers))


def save_adapter(bench: Bench, out: Path) -> None:
    """Writes the adapter as plain PEFT files, and exitwise.json, which says what it was trained for.

    Every process must call it: sharded weights are gathered from all.
    """
    folder, model = out / "adapter", bench.policy.peft_model
    weights = {
        name: p.full_tensor() if isinstance(p, DTensor) else p
        for name, p in model.named_parameters()
        if "lora_" in name
    }
    if not bench.accelerator.is_main_process:
        return
    with writing(folder):
        model.save_pretrained(str(folder), selected_adapters=["default"], state_dict=weights)
    path = folder / "adapter_config.json"
    fields = json.loads(path.read_text()) | {"base_model_name_or_path": bench.config.model}
    directory.write_json(path, fields)
    config = bench.config
    (folder / "README.md").unlink(missing_ok=True)  # peft's template, not filled in
    directory.write_json(folder / "exitwise.json", {
        "method": config.method, "model": config.model, "exits": list(bench.exits.trained),
        "held_out": list(bench.exits.held_out), "default_exit": bench.exits.default, "steps": config.steps,
        "schedule": config.schedule, "kl_coef": config.kl_coef, "mix": list(config.mix), "seed": config.seed,
    })  # fmt: skip


def sharded(accelerator: "Accelerator") -> bool:
    """Whether the weights or the optimizer's state are sharded over the processes."""
    return _kind(accelerator) in ("FSDP", "DEEPSPEED")


def whole(tensor: torch.Tensor) -> torch.Tensor:
    """The tensor on the CPU; one that FSDP2 sharded is gathered, which all processes must do together."""
    tensor = tensor.full_tensor() if isinstance(tensor, DTensor) else tensor
    return tensor.detach().cpu().contiguous()


def _kind(accelerator: "Accelerator") -> str:
    return str(accelerator.distributed_type).rsplit(".", 1)[-1]


def _trained(bench: Bench) -> list[tuple[str, torch.Tensor]]:
    """(name, parameter) in the order of the optimizer, which knows the shards where the policy may hold stand-ins."""
    parameters = [p for group in bench.optimizer.param_groups for p in group["params"]]
    return list(zip(bench.policy.trainable(), parameters, strict=True))


def _moments(optimizer: torch.optim.Optimizer) -> dict[str, torch.Tensor]:
    state = optimizer.state_dict()["state"]
    return {f"{i}.{key}": whole(value) for i, row in state.items() for key, value in row.items()}


def _load(bench: Bench, folder: Path) -> None:
    weights = load_file(folder / "trainable.safetensors")
    trained = _trained(bench)
    with torch.no_grad():
        for name, parameter in trained:
            parameter.copy_(_spread(weights[name], parameter))
    state: dict[int, dict[str, torch.Tensor]] = {}
    for key, value in load_file(folder / "optimizer.safetensors").items():
        index, _, name = key.partition(".")
        value = _spread(value, trained[int(index)][1]) if value.dim() else value  # "step" is a number
        state.setdefault(int(index), {})[name] = value
    bench.optimizer.load_state_dict({"state": state, "param_groups": bench.optimizer.state_dict()["param_groups"]})


def _spread(value: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
    """A whole tensor, sharded as `like` is."""
    return distribute_tensor(value, like.device_mesh, like.placements) if isinstance(like, DTensor) else value


def _count(path: Path) -> int:
    return path.read_bytes().count(b"\n") if path.exists() else 0
