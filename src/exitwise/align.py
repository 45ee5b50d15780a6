"""Alignment at the exits a device will use: L-PPO (Bachu et al., 2025, section 4) and its baselines, one loop.

    requests at exits -> answers -> scores -> rewards after KL -> advantages -> clipped updates -> the next step

Encoder and projector are frozen, and gone from memory once the image features of the training images are on disk; LoRA
on the language model and a linear value head are trained. Everything drawn depends on the seed and the step alone, and
a checkpoint holds the rest, so a run that was killed goes on to the same weights, bit for bit on a CPU in float32.

Departures from the paper, which published no code: harmless prompts and VQA questions may be mixed in (--mix 1 0 0 is
without), and the return before and after each update is measured on fixed requests.

Several processes (`accelerate launch`) answer their share of a batch each, exchange the rollouts, and take their share
of every mini-batch, so that the update is that of one process.

Shapes: B rows, T response tokens.
"""

import hashlib
import json
import math
import random
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch.distributed.fsdp import register_fsdp_forward_method
from torch.distributed.tensor import DTensor

from . import batches, checkpoints, ppo, runs, signatures
from .align_config import AlignConfig
from .audit import Progress, Silent, environment, fingerprint, plain
from .data.prompts import builtin_refusals
from .engines.hf import Decoding, Request, make_rows
from .errors import UserError
from .exit_names import name_of
from .features import FeatureFiles, writing
from .judges.refusal import judge_completion
from .policy import Policy, check_context, drop_encoder
from .records import Sample
from .rollout import (
    Answers,
    MatcherReward,
    Rollout,
    Scores,
    answer,
    as_answers,
    by_length,
    evaluate,
    gather,
    roll_out,
    score,
    select,
)
from .timing import Clock
from .vlm import TESTBED_NOTICE

Loss = Callable[[list[int], float], tuple[torch.Tensor, dict[str, torch.Tensor]]]
"""(rows of a micro-batch, valid tokens of its whole mini-batch) -> (loss, sums to log)"""
SmallAudit = dict[str, dict[int, float]]
"""{measure: {trained exit: share}}"""


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
    weights: dict[int, float]
    """Of the trained exits, for --schedule worst."""
    measured_return: float | None = None
    """Of the probe, after the last update."""


# ------------------------------------------------------------------------------------------------ the loop


def align(config: AlignConfig, out: Path, progress: Progress | None = None) -> Path:
    """Runs or resumes an alignment in `out`; returns the folder of the adapter, plain PEFT.

    Raises:
        UserError: bad input, `out` belongs to another config, or a score, loss or gradient is not finite.
    """
    from accelerate import Accelerator

    config.check()
    _check_tracker(config.tracker)
    progress = progress or Silent()
    pools = batches.load_pools(config)
    accelerator = Accelerator(cpu=config.device == "cpu", log_with=config.tracker, project_dir=str(out))
    main = accelerator.is_main_process
    progress = progress if main else Silent()
    _check_share(config, accelerator.num_processes)
    with runs.open_run(out, _config_json(config, pools)) if main else nullcontext():
        accelerator.wait_for_everyone()
        if (out / "adapter/exitwise.json").exists():
            progress.say(f"{out} is finished")
            return out / "adapter"
        bench = prepare(config, out, pools, accelerator, progress)
        state, history = checkpoints.resume(bench, out, _first_state(bench))
        progress.start(config.steps, "steps")
        progress.advance(state.step)
        accelerator.init_trackers("exitwise", config=_for_tracker(config, pools)) if config.tracker else None
        raised: set[str] = {name for row in history for name in row.get("signatures", [])}
        while state.step < config.steps:
            metrics, answers = train_step(bench, state, out)
            state.step += 1
            found = signatures.find([*history, metrics])
            history.append(metrics | {"signatures": [s.name for s in found]})
            for signature in found:
                if signature.name not in raised:
                    progress.say(f"step {state.step}: {signature.name}: {signature.message}")
            raised |= {s.name for s in found}
            if main:
                checkpoints.log(out, history[-1], answers if (state.step - 1) % config.samples_every == 0 else [])
                accelerator.log(metrics, step=state.step)
            if state.step % config.checkpoint_every == 0 or state.step == config.steps:
                checkpoints.save(bench, out, state)
            progress.say(_line(state.step, config.steps, metrics))
            progress.advance(1)
        if config.best_of and config.method in ("l-ppo", "grpo"):
            regret = estimate_regret(bench)
            if main:
                runs.write_json(out / "regret.json", regret)
        save_adapter(bench, out)
        accelerator.wait_for_everyone()
        accelerator.end_training()  # ends the process group too
    return out / "adapter"


def train_step(bench: Bench, state: State, out: Path) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """One batch: its answers or targets, its updates; returns (metrics, sample answers)."""
    config = bench.config
    _set_lr(bench.optimizer, config, state.step)
    every = config.audited_every()
    small = audit_exits(bench) if every and state.step and state.step % every == 0 else {}
    weights = batches.next_weights(state.weights, small["asr"]) if small else state.weights
    evaluated = {f"eval/{name}@{exit}": value for name, row in small.items() for exit, value in row.items()}
    requests = batches.draw(config, bench.pools, bench.exits, state.step, weights)
    if config.method in ("sft", "dpo"):
        metrics, answers = imitate(bench, state, requests)
    else:
        metrics, answers = reinforce(bench, state, requests, out)
    state.weights = weights  # not before: a checkpoint of a step that failed must not hold what it will do again
    return {"step": state.step + 1, **evaluated, **metrics}, answers


def reinforce(bench: Bench, state: State, requests: list[Request], out: Path) -> tuple[dict, list[dict]]:
    """L-PPO, or GRPO on the same rollout."""
    config = bench.config
    probed = bench.config.probe and config.method == "l-ppo"
    if probed and state.measured_return is None:
        state.measured_return = measure_return(bench, state)
    rollout = collect(bench, requests, config.temperature, state, out)
    answers, mask = rollout.answers, rollout.answers.mask
    scores = shape_scores(config, rollout)
    if config.method == "l-ppo":
        parts = ppo.token_rewards(scores, rollout.old.logprobs, rollout.ref_logprobs, mask, state.kl_coef)
        rewards = ppo.masked_whiten(parts.rewards, mask, shift_mean=False) if config.whiten_rewards else parts.rewards
        estimated = ppo.gae(rewards, rollout.old.values, mask, config.gamma, config.lam)
        advantages = ppo.masked_whiten(estimated.advantages, mask)
        loss = ppo_loss(bench, rollout, advantages, estimated.returns)
    else:
        parts = ppo.token_rewards(scores, rollout.old.logprobs, rollout.ref_logprobs, mask, 0.0)
        advantages = ppo.group_advantages(scores, config.group_size)[:, None] * mask
        loss = grpo_loss(bench, state, rollout, advantages)
    with bench.clock.phase("update"):
        learnt = update(bench, state, answers, len(answers.rows), loss)
    with bench.clock.phase("theory"):
        after = evaluate(bench.wrapped, answers, bench.features, config.gradient_accumulation_steps)
        shift = ppo.shift(after.logprobs, rollout.old.logprobs, advantages, mask)
    kl = float(parts.kl.sum(dim=1).mean())
    metrics = {
        "objective/kl": kl,
        "objective/entropy": float((-rollout.old.logprobs * mask).sum(dim=1).mean()),
        "objective/scores": float(scores.mean()),
        "objective/non_score_reward": float(-state.kl_coef * parts.kl.sum(dim=1).mean()),
        "objective/rlhf_reward": float(scores.mean()) - state.kl_coef * kl,
        "kl_coef": state.kl_coef,
        "policy/entropy_avg": float(ppo.masked_mean(rollout.old.entropy, mask)),
        **learnt,
        **{f"theory/{name}": value for name, value in shift._asdict().items()},
        **watch(requests, rollout),
    }
    if probed:
        before, state.measured_return = state.measured_return, measure_return(bench, state)
        metrics |= {"theory/return_before": before, "theory/return_after": state.measured_return}
    if config.kl_target is not None:
        state.kl_coef = ppo.adapt_kl_coef(state.kl_coef, kl, config.kl_target, len(requests), config.kl_horizon)
    return metrics, [
        {"step": state.step + 1, "sample": c.sample, "exit": c.exit, "text": c.text, "label": label, "score": float(s)}
        for c, label, s in zip(rollout.completions, rollout.labels, scores, strict=True)
    ]


def imitate(bench: Bench, state: State, requests: list[Request]) -> tuple[dict, list[dict]]:
    """SFT on targets, or DPO of targets against what the model itself would have said."""
    config = bench.config
    with bench.clock.phase("rollout"):
        pairs = targets(bench, state, requests)
    n = len(requests)
    if config.method == "sft":
        answers = as_answers(bench.policy, requests, [good for good, _ in pairs], bench.features)
        loss = sft_loss(bench, answers)
    else:
        tokens = [good for good, _ in pairs] + [bad for _, bad in pairs]
        answers = as_answers(bench.policy, [*requests, *requests], tokens, bench.features)
        reference = evaluate(
            bench.wrapped, answers, bench.features, 2 * config.gradient_accumulation_steps, reference=True
        )
        loss = dpo_loss(bench, answers, n, (reference.logprobs * answers.mask).sum(dim=1))
    with bench.clock.phase("update"):
        learnt = update(bench, state, answers, n, loss)
    said = [bench.policy.vlm.tokenizer.decode(good, skip_special_tokens=True) for good, _ in pairs]
    return learnt, [
        {"step": state.step + 1, "sample": r.sample.id, "exit": r.exit, "target": text}
        for r, text in zip(requests, said, strict=True)
    ]


# ------------------------------------------------------------------------------------------------ losses


def ppo_loss(bench: Bench, rollout: Rollout, advantages: torch.Tensor, returns: torch.Tensor) -> Loss:
    """L of method.md step 4, for micro-batches."""
    config = bench.config

    def loss(rows: list[int], n_tokens: float):
        piece = select(rollout.answers, rows)
        new = bench.wrapped(*piece, bench.features, entropy_gradient=config.entropy_coef > 0)
        old, mask = rollout.old.logprobs[rows], piece.mask
        policy = ppo.policy_loss(
            new.logprobs, old, advantages[rows], mask, n_tokens, config.cliprange, config.cliprange_high
        )
        value = ppo.value_loss(
            new.values, rollout.old.values[rows], returns[rows], mask, n_tokens, config.cliprange_value
        )
        total = policy.loss + config.vf_coef * value.loss
        if config.entropy_coef:
            total = total - config.entropy_coef * (new.entropy * mask).sum() / n_tokens
        return total, {
            "loss/policy_avg": policy.loss,
            "loss/value_avg": value.loss,
            "policy/approxkl_avg": 0.5 * ((new.logprobs - old) ** 2 * mask).sum() / n_tokens,
            "policy/clipfrac_avg": policy.clipped.sum() / n_tokens,
            "val/clipfrac_avg": value.clipped.sum() / n_tokens,
            "val/ratio": (policy.ratio * mask).sum() / n_tokens,
        }

    return loss


def grpo_loss(bench: Bench, state: State, rollout: Rollout, advantages: torch.Tensor) -> Loss:
    """Shao et al. (2024) equation 3, averaged over the tokens of the mini-batch, the KL (k3) in the loss."""
    config = bench.config

    def loss(rows: list[int], n_tokens: float):
        piece = select(rollout.answers, rows)
        new = bench.wrapped(*piece, bench.features)
        old, mask = rollout.old.logprobs[rows], piece.mask
        policy = ppo.policy_loss(
            new.logprobs, old, advantages[rows], mask, n_tokens, config.cliprange, config.cliprange_high
        )
        kl = (ppo.kl_k3(new.logprobs, rollout.ref_logprobs[rows], mask) * mask).sum() / n_tokens
        return policy.loss + state.kl_coef * kl, {
            "loss/policy_avg": policy.loss,
            "loss/kl_avg": kl,
            "policy/approxkl_avg": 0.5 * ((new.logprobs - old) ** 2 * mask).sum() / n_tokens,
            "policy/clipfrac_avg": policy.clipped.sum() / n_tokens,
            "val/ratio": (policy.ratio * mask).sum() / n_tokens,
        }

    return loss


def sft_loss(bench: Bench, answers: Answers) -> Loss:
    """Negative log-likelihood, averaged over the tokens of the mini-batch."""

    def loss(rows: list[int], n_tokens: float):
        piece = select(answers, rows)
        total = -(bench.wrapped(*piece, bench.features).logprobs * piece.mask).sum() / n_tokens
        return total, {"loss/policy_avg": total}

    return loss


def dpo_loss(bench: Bench, answers: Answers, n: int, reference: torch.Tensor) -> Loss:
    """DPO over pairs i and n + i of the answers; `reference` (2n,) holds their summed log-probabilities."""
    per_batch = n // bench.config.num_mini_batches

    def loss(rows: list[int], n_tokens: float):
        bad = [i + n for i in rows]
        piece = select(answers, rows + bad)  # one forward for both
        summed = (bench.wrapped(*piece, bench.features).logprobs * piece.mask).sum(dim=1)
        chosen, rejected = summed[: len(rows)], summed[len(rows) :]
        each = ppo.dpo_loss(chosen, rejected, reference[rows], reference[bad], bench.config.dpo_beta)
        right = ((chosen - reference[rows]) > (rejected - reference[bad])).float()
        return each.sum() / per_batch, {
            "loss/policy_avg": each.sum() / per_batch,
            "dpo/accuracy": right.sum() / per_batch,
        }

    return loss


def update(bench: Bench, state: State, answers: Answers, n: int, loss_of: Loss) -> dict[str, float]:
    """Epochs of mini-batches of micro-batches over rows 0 .. n-1; returns what was logged, averaged over mini-batches.

    Raises:
        UserError: the loss or its gradient is not finite; the policy is left as it was before that mini-batch.
    """
    config, accelerator = bench.config, bench.accelerator
    # The optimizer's own: under FSDP2 the policy may hold gathered stand-ins, whose gradients go elsewhere.
    parameters = [p for group in bench.optimizer.param_groups for p in group["params"]]
    size, n_updates = n // config.num_mini_batches, 0
    logged: dict[str, float] = {}
    for epoch in range(config.num_ppo_epochs):
        order = list(range(n))
        random.Random(f"{config.seed}/order/{state.step}/{epoch}").shuffle(order)
        for start in range(0, size * config.num_mini_batches, size):
            whole = order[start : start + size]
            pieces = by_length(
                answers,
                whole[accelerator.process_index :: accelerator.num_processes],
                config.gradient_accumulation_steps,
            )
            n_tokens = float(answers.mask[whole].sum())
            sums: dict[str, torch.Tensor] = {}
            for piece in pieces:
                last = piece is pieces[-1]
                with nullcontext() if last else accelerator.no_sync(bench.wrapped):
                    loss, stats = loss_of(piece, n_tokens)
                    accelerator.backward(loss * accelerator.num_processes)  # the processes' gradients are averaged
                for name, value in stats.items():
                    sums[name] = sums.get(name, torch.zeros((), device=loss.device)) + value.detach()
            norm = accelerator.clip_grad_norm_(parameters, config.max_grad_norm)
            norm = norm.full_tensor() if isinstance(norm, DTensor) else norm
            if not math.isfinite(float(norm)):
                bench.optimizer.zero_grad()
                raise UserError(
                    f"step {state.step + 1}: the gradient is {float(norm)}; the last checkpoint is kept; lower "
                    "--lr, or see metrics.jsonl for what grew"
                )
            bench.optimizer.step()
            bench.optimizer.zero_grad()
            n_updates += 1
            sums = {name: accelerator.reduce(value, "sum") for name, value in sums.items()} | {"grad_norm": norm}
            for name, value in sums.items():
                logged[name] = logged.get(name, 0.0) + float(value)
            if config.target_kl is not None and float(sums.get("policy/approxkl_avg", 0.0)) > config.target_kl:
                return {name: value / n_updates for name, value in logged.items()} | {"updates": n_updates}
    return {name: value / n_updates for name, value in logged.items()} | {"updates": n_updates}


# ------------------------------------------------------------------------------------------------ rollouts and targets


def collect(bench: Bench, requests: list[Request], temperature: float, state: State, out: Path) -> Rollout:
    """The rollout of all processes, each having answered its share of the requests.

    Raises:
        UserError: a score is not finite, in any process; the state before this step is on disk.
    """
    from accelerate.utils import gather_object

    config, accelerator = bench.config, bench.accelerator
    n, index = accelerator.num_processes, accelerator.process_index
    mine = requests[len(requests) * index // n : len(requests) * (index + 1) // n]
    decoding = Decoding(config.max_new_tokens, temperature, 1.0, config.seed * 1_000_003 + state.step)
    pieces = config.gradient_accumulation_steps  # without gradient a whole batch fits where a mini-batch does with
    fault = None
    try:
        rollout = roll_out(bench.policy, mine, bench.features, decoding, bench.reward, pieces, bench.clock)
    except UserError as error:
        fault = str(error)
    faults = [text for text in gather_object([fault]) if text]  # one process that left would have the others wait
    if faults:
        checkpoints.save(bench, out, state)  # nothing of this step has touched the weights
        raise UserError(f"{faults[0]}; the last good step is kept")
    return gather(rollout, accelerator)


def shape_scores(config: AlignConfig, rollout: Rollout) -> torch.Tensor:
    """(B,) scores: refused harmless requests at their cost, clipped, less the penalty for answers that did not end."""
    over_refused = [
        row.request.sample.kind == "benign" and label == "refused"
        for row, label in zip(rollout.answers.rows, rollout.labels, strict=True)
    ]
    scores = rollout.scores.clone()
    scores[over_refused] = -config.refusal_cost
    if config.reward_clip is not None:
        scores = scores.clamp(-config.reward_clip, config.reward_clip)
    if config.missing_eos_penalty is not None:
        unended = torch.tensor([c.finish == "length" for c in rollout.completions], device=scores.device)
        scores = scores - config.missing_eos_penalty * unended
    return scores


def targets(bench: Bench, state: State, requests: list[Request]) -> list[tuple[list[int], list[int]]]:
    """(good, bad) token ids per request: a refusal and the model's own answer for harmful requests, the other way round
    for harmless ones, the accepted answer and another one for VQA. "The model" is the one before training."""
    rng = random.Random(f"{bench.config.seed}/targets/{state.step}")
    refusals = builtin_refusals()
    tokenizer = bench.policy.vlm.tokenizer
    ids = lambda text: [*tokenizer(text, add_special_tokens=False).input_ids, tokenizer.eos_token_id]
    asked = [
        r for r in requests if r.sample.kind != "vqa" and (r.sample.kind == "benign" or bench.config.method == "dpo")
    ]
    at = lambda r: r if r.sample.kind == "harmful" else r._replace(exit=bench.exits.default)
    decoding = Decoding(bench.config.max_new_tokens, 0.0, 1.0, bench.config.seed)
    with bench.policy.peft_model.disable_adapter():
        own = answer(bench.policy, [at(r) for r in asked], bench.features, decoding)
    said = {c.sample: list(c.tokens) for c in own}
    pairs = []
    for request in requests:
        sample, refusal = request.sample, ids(rng.choice(refusals))[: bench.config.max_new_tokens]
        if sample.kind == "harmful":
            pairs.append((refusal, said.get(sample.id, refusal)))
        elif sample.kind == "benign":
            pairs.append((said[sample.id], refusal))
        else:
            others = sorted(
                {s.answers[0] for s in bench.pools.vqa if s.category == sample.category} - {*sample.answers}
            )
            pairs.append((ids(sample.answers[0]), ids(rng.choice(others or ["nothing"]))))
    return pairs


# ------------------------------------------------------------------------------------------------ watching


def watch(requests: Sequence[Request], rollout: Rollout) -> dict[str, float | None]:
    """What the sampled answers are like, by the refusal judge; None where a batch has no such request."""
    pairs = list(zip(requests, rollout.labels, strict=True))
    share = lambda kind, labels: _mean([label in labels for r, label in pairs if r.sample.kind == kind])
    scores = [float(s) for r, s in zip(requests, rollout.scores, strict=True) if r.sample.kind == "harmful"]
    texts = [c.text for r, c in zip(requests, rollout.completions, strict=True) if r.sample.kind != "vqa"]
    return {
        "rollout/asr": share("harmful", ("answered",)),
        "rollout/over_refusal": share("benign", ("refused",)),
        "rollout/vqa": share("vqa", ("correct",)),
        "rollout/coherence": _mean([label != "incoherent" for r, label in pairs if r.sample.kind != "vqa"]),
        "rollout/harmful_score": _mean(scores),
        "rollout/distinct": len(set(texts)) / len(texts) if texts else None,
        "rollout/length": float(rollout.answers.mask.sum(dim=1).mean()),
    }


def measure_return(bench: Bench, state: State) -> float:
    """Mean return (score less weighted KL) of the policy on fixed harmful requests, drawn with the same random numbers
    before and after every update, so that their difference is the update's."""
    config = bench.config
    requests = batches.probe(config, bench.pools, bench.exits, config.probe)
    with bench.clock.phase("theory"):
        decoding = Decoding(config.max_new_tokens, 1.0, 1.0, config.seed)
        rollout = roll_out(bench.policy, requests, bench.features, decoding, bench.reward, 1)
    kl = ((rollout.old.logprobs - rollout.ref_logprobs) * rollout.answers.mask).sum(dim=1)
    return float((rollout.scores - state.kl_coef * kl).mean())


def audit_exits(bench: Bench) -> SmallAudit:
    """ASR at the trained exits, greedy, and over-refusal where harmless prompts are kept for it."""
    requests = batches.audited(bench.config, bench.pools, bench.exits)
    with bench.clock.phase("eval"):
        found = answer(bench.policy, requests, bench.features, Decoding(bench.config.max_new_tokens))
    judged = [(r, judge_completion(r.sample, c).label) for r, c in zip(requests, found, strict=True)]
    audit: SmallAudit = {}
    for name, kind, label in (("asr", "harmful", "answered"), ("over_refusal", "benign", "refused")):
        asked = [(r.exit, given == label) for r, given in judged if r.sample.kind == kind]
        if asked:
            audit[name] = {e: _mean([hit for exit, hit in asked if exit == e]) or 0.0 for e in bench.exits.trained}
    return audit


def estimate_regret(bench: Bench) -> dict[str, Any]:
    """Regret at the trained exits, before and after: the mean score of the best of n answers of the model before
    training, which stands in for the optimal policy, less the policy's own mean score."""
    config = bench.config
    n = config.best_of
    base = batches.probe(config, bench.pools, bench.exits, max(8, config.probe))
    requests = [Request(replace(r.sample, id=f"{r.sample.id}~{k}"), r.exit) for r in base for k in range(n)]
    scores = {}
    decoding = Decoding(config.max_new_tokens, 1.0, 1.0, config.seed + 1)
    samples = [r.sample for r in requests]
    with bench.clock.phase("theory"):
        for name, adapter in (("before", bench.policy.peft_model.disable_adapter()), ("after", nullcontext())):
            with adapter:
                found = answer(bench.policy, requests, bench.features, decoding)
            scores[name] = score(samples, found, ["unscored"] * len(found), bench.reward).double().view(-1, n)
    best = scores["before"].max(dim=1).values
    regrets = {name: best - scores[name].mean(dim=1) for name in scores}
    return {
        "best_of": n,
        "requests": len(base),
        "best_score": float(best.mean()),
        **{f"score_{name}": float(scores[name].mean()) for name in scores},
        **{f"regret_{name}": float(regrets[name].mean()) for name in scores},
        "standard_error_of_fall": float((regrets["before"] - regrets["after"]).std() / math.sqrt(len(base))),
    }


def _mean(values: Sequence[float]) -> float | None:
    return sum(values) / len(values) if values else None


def _line(step: int, steps: int, metrics: dict[str, Any]) -> str:
    shown = (
        ("score", "rollout/harmful_score", "{:+.2f}"), ("ASR", "rollout/asr", "{:.0%}"),
        ("refuses harmless", "rollout/over_refusal", "{:.0%}"), ("VQA", "rollout/vqa", "{:.0%}"),
        ("KL", "objective/kl", "{:.2f}"), ("loss", "loss/policy_avg", "{:.3f}"),
    )  # fmt: skip
    parts = [f"{name} {form.format(metrics[key])}" for name, key, form in shown if metrics.get(key) is not None]
    return f"step {step}/{steps}: " + ", ".join(parts)


# ------------------------------------------------------------------------------------------------ setting up


def prepare(config: AlignConfig, out: Path, pools: batches.Pools, accelerator: Any, progress: Progress) -> Bench:
    """Loads the model, encodes the training images once, and builds policy, reward and optimizer.

    Raises:
        UserError: an exit is not there, a prompt exceeds the context, the reward does not fit, or a resumed run would
            not be the one that was begun.
    """
    for line in pools.skipped:
        progress.say(f"skipped {line}")
    clock = Clock(out / "timing.json" if accelerator.is_main_process else None)
    plan_path = out / "plan.json"
    plan = runs.read_json(plan_path, "threads", "model_sha256") if plan_path.exists() else None
    if plan and torch.get_num_threads() != plan["threads"]:
        torch.set_num_threads(plan["threads"])  # the order of a float32 sum depends on it
    device = str(accelerator.device) if config.device == "auto" else config.device
    with clock.phase("load"):
        from .vlm import load_vlm

        vlm = load_vlm(
            config.model,
            dtype=config.dtype,
            device=device,
            trust_remote_code=config.trust_remote_code,
            say=progress.say,
        )
    exits = batches.choose_exits(config, vlm.n_blocks, vlm.default_exit)
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
    everything = [Request(s, exits.trained[0]) for s in _asked(pools)]
    check_context(vlm, make_rows(vlm, everything, features.layout), config.max_new_tokens)
    reward = load_scores(config.reward if config.method in ("l-ppo", "grpo") else "matcher", policy)
    optimizer = torch.optim.AdamW(policy.trainable().values(), lr=config.lr, weight_decay=0.0)
    wrapped, optimizer = accelerator.prepare(policy, optimizer)
    register_fsdp_forward_method(policy, "gather_weights")
    policy.share_heads = policy.share_heads and not checkpoints.sharded(accelerator)  # it runs every layer twice
    if accelerator.is_main_process and not plan:
        runs.write_json(out / "env.json", environment(vlm))
        runs.write_json(plan_path, {
            "threads": torch.get_num_threads(), "model_sha256": identity, "exits": list(exits.trained),
            "held_out": list(exits.held_out), "default_exit": exits.default, "n_blocks": vlm.n_blocks,
            "trainable": sum(p.numel() for p in policy.trainable().values()),
        })  # fmt: skip
    return Bench(config, accelerator, policy, wrapped, optimizer, features, reward, pools, exits, clock)


def _asked(pools: batches.Pools) -> list[Sample]:
    return [*pools.harmful, *pools.benign, *pools.vqa, *pools.validation]


def _check_share(config: AlignConfig, processes: int) -> None:
    """Raises UserError where a process would have no row of a micro-batch."""
    pieces = config.num_mini_batches * config.gradient_accumulation_steps
    if config.batch_size // pieces < processes:
        raise UserError(
            f"--batch-size {config.batch_size} in {pieces} pieces leaves less than one row for each of {processes} "
            f"processes; give at least {pieces * processes}"
        )


def _check_tracker(name: str | None) -> None:
    """Raises UserError where accelerate does not know the tracker, or would pass over it as not installed."""
    if name is None:
        return
    from accelerate.tracking import LOGGER_TYPE_TO_CLASS, get_available_trackers
    from accelerate.utils import LoggerType

    if name not in ("all", *LOGGER_TYPE_TO_CLASS):
        raise UserError(f"--tracker got {name!r}; expected all, or one of: {', '.join(LOGGER_TYPE_TO_CLASS)}")
    if name != "all" and name in LoggerType.list() and LoggerType(name) not in get_available_trackers():
        raise UserError(f"--tracker {name} is not installed here; install its package, or leave --tracker out")


def load_scores(spec: str, policy: Policy) -> Scores:
    """Who scores harmful requests."""
    if spec == "matcher":
        return MatcherReward()
    from .rewards import load_reward

    return load_reward(spec, policy.vlm, policy.peft_model)


def _first_state(bench: Bench) -> State:
    config, trained = bench.config, bench.exits.trained
    weights = dict.fromkeys(trained, 1 / len(trained))
    if config.audit is not None:
        metrics = runs.read_json(config.audit / "metrics.json", "exits")
        asr = {row["exit"]: row["asr"]["value"] for row in metrics["exits"] if row["asr"]["value"] is not None}
        missing = [exit for exit in trained if exit not in asr]
        if missing:
            raise UserError(
                f"the audit {config.audit} has no ASR at exit {name_of(missing[0])}; audit the exits of --exits"
            )
        weights = batches.next_weights(weights, {exit: asr[exit] for exit in trained})
    return State(0, config.kl_coef, weights)


def _set_lr(optimizer: Any, config: AlignConfig, step: int) -> None:
    """Warm-up, then down to a tenth; a function of the step alone, so that nothing has to be kept."""
    if step < config.warmup:
        factor = (step + 1) / config.warmup
    else:
        factor = 1 - 0.9 * (step - config.warmup) / max(1, config.steps - config.warmup)
    for group in optimizer.param_groups:
        group["lr"] = config.lr * factor


def _config_json(config: AlignConfig, pools: batches.Pools) -> dict[str, Any]:
    """The config, with the counts and the checksum of the samples: a changed prompt file is another config."""
    text = runs.to_lines(_asked(pools))
    return {k: plain(v) for k, v in asdict(config).items()} | {
        "counts": {"harmful": len(pools.harmful), "benign": len(pools.benign), "vqa": len(pools.vqa)},
        "skipped": list(pools.skipped),
        "sources": list(pools.sources),
        "samples_sha256": hashlib.sha256(text.encode()).hexdigest(),
        "notice": TESTBED_NOTICE.get(config.model, ""),
    }


def _for_tracker(config: AlignConfig, pools: batches.Pools) -> dict[str, Any]:
    """The config as trackers take it: numbers, texts, and lists and objects as JSON (TensorBoard refuses others)."""
    simple = lambda value: value is None or isinstance(value, str | int | float)
    return {k: v if simple(v) else json.dumps(v) for k, v in _config_json(config, pools).items()}


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
    runs.write_json(path, fields)
    config = bench.config
    (folder / "README.md").unlink(missing_ok=True)  # peft's template, all blanks
    runs.write_json(folder / "exitwise.json", {
        "method": config.method, "model": config.model, "exits": list(bench.exits.trained),
        "held_out": list(bench.exits.held_out), "default_exit": bench.exits.default, "steps": config.steps,
        "schedule": config.schedule, "kl_coef": config.kl_coef, "mix": list(config.mix), "seed": config.seed,
    })  # fmt: skip
