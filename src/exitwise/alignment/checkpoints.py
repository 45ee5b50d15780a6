"""Checkpoints of an alignment: whole or not at all, the newest two kept, nothing pickled.

    checkpoints/step-000010/trainable.safetensors   adapter and value head
                            optimizer.safetensors   AdamW's moments
                            state.json              step, kl_coef, exit weights, lines of the logs

Under FSDP2 they hold whole tensors all the same, so a run may go on with another number of processes. DeepSpeed has its
state written by accelerate, whose optimizer files are pickles.
"""

import json
import os
import shutil
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch.distributed.tensor import DTensor, distribute_tensor

from ..errors import UserError
from ..model.features import writing
from ..run import directory
from ..run.exit import Exit, encode_exit

KEPT = 2


def save(bench: Any, out: Path, state: Any) -> None:
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
        exit_weights = {str(exit): weight for exit, weight in state.weights.items()}
        directory.write_json(scratch / "state.json", asdict(state) | {"weights": exit_weights, "lines": lines})
        os.replace(scratch, folder)
        for old in sorted((out / "checkpoints").glob("step-??????"))[:-KEPT]:
            shutil.rmtree(old)
    bench.accelerator.wait_for_everyone()


def resume(bench: Any, out: Path, state: Any) -> tuple[Any, list[dict[str, Any]]]:
    """(state, metrics so far) of the newest checkpoint, its weights loaded; (`state`, []) where there is none.

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
            saved["weights"] = {Exit.of(exit): weight for exit, weight in saved["weights"].items()}
            state = type(state)(**saved)
        except (OSError, KeyError, TypeError, ValueError, RuntimeError, SafetensorError) as error:
            raise UserError(
                f"the checkpoint {folder} is broken ({error}); delete it to go on from the one before"
            ) from None
    if bench.accelerator.is_main_process:
        for name, n in lines.items():
            directory.truncate_to(out / name, n)
    bench.accelerator.wait_for_everyone()
    path = out / "metrics.jsonl"
    history = (
        [json.loads(line) for line in path.read_text().splitlines()[: lines["metrics.jsonl"]]] if path.exists() else []
    )
    return state, history


def log(out: Path, metrics: dict[str, Any], answers: list[dict[str, Any]]) -> None:
    """Appends a line of metrics, and answers, hostile text as it is, one JSON object a line."""
    for name, rows in (("metrics.jsonl", [metrics]), ("answers.jsonl", answers)):
        with open(out / name, "a", encoding="utf-8") as handle:
            handle.write("".join(json.dumps(row, ensure_ascii=False, default=encode_exit) + "\n" for row in rows))


def sharded(accelerator: Any) -> bool:
    """Whether weights, or what is kept of them, are spread over the processes."""
    return _kind(accelerator) in ("FSDP", "DEEPSPEED")


def whole(tensor: torch.Tensor) -> torch.Tensor:
    """The tensor on the CPU; one that FSDP2 sharded is gathered, which all processes must do together."""
    tensor = tensor.full_tensor() if isinstance(tensor, DTensor) else tensor
    return tensor.detach().cpu().contiguous()


def _kind(accelerator: Any) -> str:
    return str(accelerator.distributed_type).rsplit(".", 1)[-1]


def _trained(bench: Any) -> list[tuple[str, torch.Tensor]]:
    """(name, parameter) in the order of the optimizer, which knows the shards where the policy may hold stand-ins."""
    parameters = [p for group in bench.optimizer.param_groups for p in group["params"]]
    return list(zip(bench.policy.trainable(), parameters, strict=True))


def _moments(optimizer: Any) -> dict[str, torch.Tensor]:
    state = optimizer.state_dict()["state"]
    return {f"{i}.{key}": whole(value) for i, row in state.items() for key, value in row.items()}


def _load(bench: Any, folder: Path) -> None:
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
