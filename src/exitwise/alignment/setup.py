"""Preparation of an alignment: model, image features, policy, reward and optimizer; and the checks before it."""

import hashlib
import json
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch.distributed.fsdp import register_fsdp_forward_method

from ..data.options import to_json
from ..engines.prefix import ExitRequest, make_rows
from ..errors import UserError
from ..model.features import FeatureFiles
from ..model.loading import load_vlm
from ..model.testbed import TESTBED_NOTICE
from ..model.vlm import Vlm
from ..rewards.protocol import RewardModel
from ..run import directory
from ..run.clock import Clock
from ..run.exit import Exit
from ..run.progress import Progress
from ..run.provenance import environment, fingerprint
from ..run.records import Sample
from . import batches, checkpoints
from .config import AlignConfig
from .policy import Policy, check_context, without_encoder
from .rollout import MatcherReward
from .state import Bench, State

if TYPE_CHECKING:
    from accelerate import Accelerator


def prepare(
    config: AlignConfig,
    out: Path,
    pools: batches.Pools,
    accelerator: "Accelerator",
    progress: Progress,
    loaded: Vlm | None = None,
) -> Bench:
    """Loads the model, encodes the training images once, and builds policy, reward and optimizer.

    Args:
        loaded: the model of the config, where it is in memory already.

    Raises:
        UserError: an exit does not exist, a prompt exceeds the context, the reward does not fit, or the model differs
            from that of the run to resume.
    """
    main = accelerator.is_main_process
    clock = Clock(out / "timing.json" if main else None)
    plan_path = out / "plan.json"
    plan = directory.read_json(plan_path, "threads", "model_sha256") if plan_path.exists() else None
    if plan and torch.get_num_threads() != plan["threads"]:
        torch.set_num_threads(plan["threads"])  # the order of a float32 sum depends on it
    with clock.phase("load"):
        vlm = loaded or _load(config, accelerator, progress)
    pools = batches.askable(pools, vlm.control_token)
    for line in pools.skipped:
        progress.say(f"skipped {line}")
    exits = batches.choose_exits(config, vlm.n_blocks, vlm.default_exit)
    batches.per_step(config, exits)  # this and the next before a plan is written: until then a mistake can be corrected
    first_state(config, exits)
    identity = fingerprint(vlm)
    if plan and plan["model_sha256"] != identity:
        raise UserError(
            f"the weights of {config.model} changed since the run in {out} was started; give --out another directory"
        )
    features = FeatureFiles(config.features or out / "features", identity, vlm.device)
    with clock.phase("encode"), accelerator.local_main_process_first():
        names = sorted({s.image for s in _asked(pools) if s.image} | set(pools.pictures))
        features.fill(vlm, batches.image_loaders(names, pools.roots), sorted({*exits.trained, exits.default}))
    torch.manual_seed(config.seed)  # for the adapter's first weights
    policy = Policy(
        without_encoder(vlm), config.lora_rank, config.lora_alpha,
        critic=config.method == "l-ppo", gradient_checkpointing=config.gradient_checkpointing,
        share_heads=not checkpoints.sharded(accelerator),  # sharing runs every layer twice in a forward pass
    )  # fmt: skip
    n_blocks = vlm.n_blocks
    del vlm  # and with it encoder and projector
    everything = [ExitRequest(s, exits.trained[0]) for s in _asked(pools)]
    check_context(policy.vlm, make_rows(policy.vlm, everything, features.layout), config.max_new_tokens)
    spec = config.reward if config.method in ("l-ppo", "grpo") else "matcher"
    reward = load_scores(spec, policy, config.reward_template)
    optimizer = torch.optim.AdamW(policy.trainable().values(), lr=config.lr, weight_decay=0.0)
    wrapped, optimizer = accelerator.prepare(policy, optimizer)
    register_fsdp_forward_method(policy, "gather_weights")
    if main and not plan:
        directory.write_json(out / "env.json", environment(policy.vlm))
        directory.write_json(plan_path, {
            "threads": torch.get_num_threads(), "model_sha256": identity, "exits": list(exits.trained),
            "held_out": list(exits.held_out), "default_exit": exits.default, "n_blocks": n_blocks,
            "trainable": sum(p.numel() for p in policy.trainable().values()),
        })  # fmt: skip
    return Bench(config, accelerator, policy, wrapped, optimizer, features, reward, pools, exits, clock)


def _load(config: AlignConfig, accelerator: "Accelerator", progress: Progress) -> Vlm:
    return load_vlm(
        config.model,
        dtype=config.dtype,
        device=str(accelerator.device) if config.device == "auto" else config.device,
        trust_remote_code=config.trust_remote_code,
        say=progress.say,
    )


def _asked(pools: batches.Pools) -> list[Sample]:
    return [*pools.harmful, *pools.benign, *pools.vqa, *pools.validation]


def check_share(config: AlignConfig, processes: int) -> None:
    """Raises UserError where a process would get no row of a micro-batch."""
    pieces = config.num_mini_batches * config.gradient_accumulation_steps
    if config.batch_size // pieces < processes:
        raise UserError(
            f"--batch-size {config.batch_size} in {pieces} micro-batches leaves less than one row for each of "
            f"{processes} processes; give at least {pieces * processes}"
        )


def check_tracker(name: str | None) -> None:
    """Raises UserError where accelerate does not know the tracker, or would skip it as not installed."""
    if name is None:
        return
    from accelerate.tracking import LOGGER_TYPE_TO_CLASS, get_available_trackers
    from accelerate.utils import LoggerType

    if name not in ("all", *LOGGER_TYPE_TO_CLASS):
        raise UserError(f"--tracker got {name!r}; expected all, or one of: {', '.join(LOGGER_TYPE_TO_CLASS)}")
    if name != "all" and name in LoggerType.list() and LoggerType(name) not in get_available_trackers():
        raise UserError(f"--tracker {name} is not installed; install its package, or leave --tracker out")


def load_scores(spec: str, policy: Policy, template: str | None) -> RewardModel:
    """The reward model of harmful requests."""
    if spec == "matcher":
        return MatcherReward()
    from ..rewards.loading import load_reward

    return load_reward(spec, policy.vlm, policy.peft_model, template=template)


def first_state(config: AlignConfig, exits: batches.Exits) -> State:
    """The state before the first step; raises UserError where --audit is no run, or has no ASR at a trained exit."""
    trained = exits.trained
    weights = dict.fromkeys(trained, 1 / len(trained))
    if config.audit is not None:
        metrics = directory.read_json(config.audit / "metrics.json", "exits")
        asr = {Exit.of(row["exit"]): row["asr"]["value"] for row in metrics["exits"] if row["asr"]["value"] is not None}
        missing = [exit for exit in trained if exit not in asr]
        if missing:
            raise UserError(f"the audit {config.audit} has no ASR at exit {missing[0]}; audit the exits of --exits")
        weights = batches.next_weights(weights, {exit: asr[exit] for exit in trained})
    return State(0, config.kl_coef, weights)


def config_json(config: AlignConfig, pools: batches.Pools) -> dict[str, object]:
    """The config, with the counts and the checksum of the samples: a changed prompt file is another config."""
    text = directory.to_lines(_asked(pools))
    return to_json(config) | {
        "counts": {"harmful": len(pools.harmful), "benign": len(pools.benign), "vqa": len(pools.vqa)},
        "skipped": list(pools.skipped),
        "sources": list(pools.sources),
        "samples_sha256": hashlib.sha256(text.encode()).hexdigest(),
        "notice": TESTBED_NOTICE.get(config.model, ""),
    }


def for_tracker(config: AlignConfig, pools: batches.Pools) -> dict[str, object]:
    """The config as trackers accept it: numbers and text; lists and objects as JSON, which TensorBoard would refuse."""
    simple = lambda value: value is None or isinstance(value, str | int | float)
    return {k: v if simple(v) else json.dumps(v) for k, v in config_json(config, pools).items()}
