"""What an alignment stands on: model, features, policy, reward and optimizer; and the adapter it writes at the end."""

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch.distributed.fsdp import register_fsdp_forward_method
from torch.distributed.tensor import DTensor

from ..data.options import to_json
from ..engines.prefix import ExitRequest, make_rows
from ..errors import UserError
from ..model.features import FeatureFiles, writing
from ..model.testbed import TESTBED_NOTICE
from ..run import directory
from ..run.clock import Clock
from ..run.exit import Exit
from ..run.progress import Progress
from ..run.provenance import environment, fingerprint
from ..run.records import Sample
from . import batches, checkpoints
from .config import AlignConfig
from .policy import Policy, check_context, drop_encoder
from .rollout import MatcherReward, Scores


class Bench(NamedTuple):
    """What stays the same from step to step."""

    config: AlignConfig
    accelerator: Any
    policy: Policy
    wrapped: Any
    """The policy as accelerate wraps it: every forward that is trained goes through it."""
    optimizer: Any
    features: FeatureFiles
    reward: Scores
    """Not asked by SFT and DPO."""
    pools: batches.Pools
    exits: batches.Exits
    clock: Clock


@dataclass
class State:
    """What a checkpoint holds beside weights and optimizer."""

    step: int
    kl_coef: float
    weights: dict[Exit, float]
    """Of the trained exits, for --schedule worst."""
    measured: tuple[float, float] | None = None
    """Of the probe, after the last update: (mean score, mean KL)."""


def prepare(config: AlignConfig, out: Path, pools: batches.Pools, accelerator: Any, progress: Progress) -> Bench:
    """Loads the model, encodes the training images once, and builds policy, reward and optimizer.

    Raises:
        UserError: an exit is not there, a prompt exceeds the context, the reward does not fit, or a resumed run would
            not be the one that was begun.
    """
    clock = Clock(out / "timing.json" if accelerator.is_main_process else None)
    plan_path = out / "plan.json"
    plan = directory.read_json(plan_path, "threads", "model_sha256") if plan_path.exists() else None
    if plan and torch.get_num_threads() != plan["threads"]:
        torch.set_num_threads(plan["threads"])  # the order of a float32 sum depends on it
    device = str(accelerator.device) if config.device == "auto" else config.device
    with clock.phase("load"):
        from ..model.loading import load_vlm

        vlm = load_vlm(
            config.model,
            dtype=config.dtype,
            device=device,
            trust_remote_code=config.trust_remote_code,
            say=progress.say,
        )
    pools = batches.askable(pools, vlm.control_token)
    for line in pools.skipped:
        progress.say(f"skipped {line}")
    exits = batches.choose_exits(config, vlm.n_blocks, vlm.default_exit)
    batches.per_step(config, exits)  # these two before a plan is written: until then a mistake may be mended
    first_state(config, exits)
    identity = fingerprint(vlm)
    if plan and plan["model_sha256"] != identity:
        raise UserError(f"the weights of {config.model} changed since {out} was begun; give --out another directory")
    features = FeatureFiles(config.features or out / "features", identity, vlm.device)
    with clock.phase("encode"), accelerator.local_main_process_first():
        names = sorted({s.image for s in _asked(pools) if s.image} | set(pools.pictures))
        features.fill(vlm, batches.image_loaders(names, pools.roots), sorted({*exits.trained, exits.default}))
    drop_encoder(vlm)
    torch.manual_seed(config.seed)  # of the adapter's first weights
    policy = Policy(
        vlm, config.lora_rank, config.lora_alpha,
        critic=config.method == "l-ppo", gradient_checkpointing=config.gradient_checkpointing,
    )  # fmt: skip
    everything = [ExitRequest(s, exits.trained[0]) for s in _asked(pools)]
    check_context(vlm, make_rows(vlm, everything, features.layout), config.max_new_tokens)
    spec = config.reward if config.method in ("l-ppo", "grpo") else "matcher"
    reward = load_scores(spec, policy, config.reward_template)
    optimizer = torch.optim.AdamW(policy.trainable().values(), lr=config.lr, weight_decay=0.0)
    wrapped, optimizer = accelerator.prepare(policy, optimizer)
    register_fsdp_forward_method(policy, "gather_weights")
    policy.share_heads = policy.share_heads and not checkpoints.sharded(accelerator)  # it runs every layer twice
    if accelerator.is_main_process and not plan:
        directory.write_json(out / "env.json", environment(vlm))
        directory.write_json(plan_path, {
            "threads": torch.get_num_threads(), "model_sha256": identity, "exits": list(exits.trained),
            "held_out": list(exits.held_out), "default_exit": exits.default, "n_blocks": vlm.n_blocks,
            "trainable": sum(p.numel() for p in policy.trainable().values()),
        })  # fmt: skip
    return Bench(config, accelerator, policy, wrapped, optimizer, features, reward, pools, exits, clock)


def _asked(pools: batches.Pools) -> list[Sample]:
    return [*pools.harmful, *pools.benign, *pools.vqa, *pools.validation]


def check_share(config: AlignConfig, processes: int) -> None:
    """Raises UserError where a process would have no row of a micro-batch."""
    pieces = config.num_mini_batches * config.gradient_accumulation_steps
    if config.batch_size // pieces < processes:
        raise UserError(
            f"--batch-size {config.batch_size} in {pieces} pieces leaves less than one row for each of {processes} "
            f"processes; give at least {pieces * processes}"
        )


def check_tracker(name: str | None) -> None:
    """Raises UserError where accelerate does not know the tracker, or would pass over it as not installed."""
    if name is None:
        return
    from accelerate.tracking import LOGGER_TYPE_TO_CLASS, get_available_trackers
    from accelerate.utils import LoggerType

    if name not in ("all", *LOGGER_TYPE_TO_CLASS):
        raise UserError(f"--tracker got {name!r}; expected all, or one of: {', '.join(LOGGER_TYPE_TO_CLASS)}")
    if name != "all" and name in LoggerType.list() and LoggerType(name) not in get_available_trackers():
        raise UserError(f"--tracker {name} is not installed here; install its package, or leave --tracker out")


def load_scores(spec: str, policy: Policy, template: str | None) -> Scores:
    """Who scores harmful requests."""
    if spec == "matcher":
        return MatcherReward()
    from ..rewards.loading import load_reward

    return load_reward(spec, policy.vlm, policy.peft_model, template=template)


def first_state(config: AlignConfig, exits: batches.Exits) -> State:
    """Raises UserError where the run of --audit is none, or has no ASR at a trained exit."""
    trained = exits.trained
    weights = dict.fromkeys(trained, 1 / len(trained))
    if config.audit is not None:
        metrics = directory.read_json(config.audit / "metrics.json", "exits")
        asr = {row["exit"]: row["asr"]["value"] for row in metrics["exits"] if row["asr"]["value"] is not None}
        missing = [exit for exit in trained if exit not in asr]
        if missing:
            raise UserError(f"the audit {config.audit} has no ASR at exit {missing[0]}; audit the exits of --exits")
        weights = batches.next_weights(weights, {exit: asr[exit] for exit in trained})
    return State(0, config.kl_coef, weights)


def config_json(config: AlignConfig, pools: batches.Pools) -> dict[str, Any]:
    """The config, with the counts and the checksum of the samples: a changed prompt file is another config."""
    text = directory.to_lines(_asked(pools))
    return to_json(config) | {
        "counts": {"harmful": len(pools.harmful), "benign": len(pools.benign), "vqa": len(pools.vqa)},
        "skipped": list(pools.skipped),
        "sources": list(pools.sources),
        "samples_sha256": hashlib.sha256(text.encode()).hexdigest(),
        "notice": TESTBED_NOTICE.get(config.model, ""),
    }


def for_tracker(config: AlignConfig, pools: batches.Pools) -> dict[str, Any]:
    """The config as trackers take it: numbers, texts, and lists and objects as JSON (TensorBoard refuses others)."""
    simple = lambda value: value is None or isinstance(value, str | int | float)
    return {k: v if simple(v) else json.dumps(v) for k, v in config_json(config, pools).items()}


def save_adapter(bench: Bench, out: Path) -> None:
    """The adapter as plain PEFT files, and beside them what it was trained for; every process takes part."""
    folder, model = out / "adapter", bench.policy.peft_model
    weights: dict[str, Any] = {
        name: p.full_tensor() if isinstance(p, DTensor) else p
        for name, p in model.named_parameters()
        if "lora_" in name
    }  # sharded ones are gathered from all processes
    if not bench.accelerator.is_main_process:
        return
    with writing(folder):
        model.save_pretrained(str(folder), selected_adapters=["default"], state_dict=weights)
    path = folder / "adapter_config.json"
    fields = json.loads(path.read_text()) | {"base_model_name_or_path": bench.config.model}
    directory.write_json(path, fields)
    config = bench.config
    (folder / "README.md").unlink(missing_ok=True)  # peft's template, all blanks
    directory.write_json(folder / "exitwise.json", {
        "method": config.method, "model": config.model, "exits": list(bench.exits.trained),
        "held_out": list(bench.exits.held_out), "default_exit": bench.exits.default, "steps": config.steps,
        "schedule": config.schedule, "kl_coef": config.kl_coef, "mix": list(config.mix), "seed": config.seed,
    })  # fmt: skip
