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

import math
import random
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
from torch.distributed.tensor import DTensor

from ..data.prompts import builtin_refusals
from ..engines.prefix import Decoding, ExitRequest
from ..errors import UserError
from ..run import directory
from ..run.progress import Progress, Silent
from . import batches, checkpoints, ppo, signatures
from .config import AlignConfig
from .losses import Loss, dpo_loss, grpo_loss, ppo_loss, sft_loss
from .monitor import audit_exits, estimate_regret, measure_return, watch
from .rollout import Answers, Rollout, answer, as_answers, by_length, evaluate, gather, roll_out, select
from .setup import (
    Bench,
    State,
    check_share,
    check_tracker,
    config_json,
    first_state,
    for_tracker,
    prepare,
    save_adapter,
)

# ------------------------------------------------------------------------------------------------ the loop


def align(config: AlignConfig, out: Path, progress: Progress | None = None) -> Path:
    """Runs or resumes an alignment in `out`; returns the folder of the adapter, plain PEFT.

    Raises:
        UserError: bad input, `out` belongs to another config, or a score, loss or gradient is not finite.
    """
    from accelerate import Accelerator

    config.check()
    check_tracker(config.tracker)
    progress = progress or Silent()
    pools = batches.load_pools(config)
    accelerator = Accelerator(cpu=config.device == "cpu", log_with=config.tracker, project_dir=str(out))
    main = accelerator.is_main_process
    progress = progress if main else Silent()
    check_share(config, accelerator.num_processes)
    with directory.open_run(out, config_json(config, pools)) if main else nullcontext():
        accelerator.wait_for_everyone()
        if (out / "adapter/exitwise.json").exists():
            progress.say(f"{out} is finished")
            return out / "adapter"
        bench = prepare(config, out, pools, accelerator, progress)
        state, history = checkpoints.resume(bench, out, first_state(config, bench.exits))
        progress.start(config.steps, "steps")
        progress.advance(state.step)
        accelerator.init_trackers("exitwise", config=for_tracker(config, pools)) if config.tracker else None
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
                named = {key.replace("@", "/"): value for key, value in metrics.items()}  # mlflow allows no @
                accelerator.log(named, step=state.step)
            if state.step % config.checkpoint_every == 0 or state.step == config.steps:
                checkpoints.save(bench, out, state)
            progress.say(_line(state.step, config.steps, metrics))
            progress.advance(1)
        if config.best_of and config.method in ("l-ppo", "grpo"):
            regret = estimate_regret(bench)
            if main:
                directory.write_json(out / "regret.json", regret)
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


def reinforce(bench: Bench, state: State, requests: list[ExitRequest], out: Path) -> tuple[dict, list[dict]]:
    """L-PPO, or GRPO on the same rollout."""
    config = bench.config
    probed = bench.config.probe and config.method == "l-ppo"
    if probed and state.measured is None:
        state.measured = measure_return(bench)
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
        half = list(range(0, len(requests), 2))  # every other answer: watching should not cost a whole forward
        after = evaluate(bench.wrapped, select(answers, half), bench.features, config.gradient_accumulation_steps)
        shift = ppo.shift(after.logprobs, rollout.old.logprobs[half], advantages[half], mask[half])
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
        before, state.measured = state.measured, measure_return(bench)
        weighed = lambda measured: measured[0] - state.kl_coef * measured[1]  # both at this step's weight of the KL
        metrics |= {"theory/return_before": weighed(before), "theory/return_after": weighed(state.measured)}
    if config.kl_target is not None:
        state.kl_coef = ppo.adapt_kl_coef(state.kl_coef, kl, config.kl_target, len(requests), config.kl_horizon)
    return metrics, [
        {"step": state.step + 1, "sample": c.sample, "exit": c.exit, "text": c.text, "label": label, "score": float(s)}
        for c, label, s in zip(rollout.completions, rollout.labels, scores, strict=True)
    ]


def imitate(bench: Bench, state: State, requests: list[ExitRequest]) -> tuple[dict, list[dict]]:
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


def collect(bench: Bench, requests: list[ExitRequest], temperature: float, state: State, out: Path) -> Rollout:
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


def targets(bench: Bench, state: State, requests: list[ExitRequest]) -> list[tuple[list[int], list[int]]]:
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


def _line(step: int, steps: int, metrics: dict[str, Any]) -> str:
    shown = (
        ("score", "rollout/harmful_score", "{:+.2f}"), ("ASR", "rollout/asr", "{:.0%}"),
        ("refuses harmless", "rollout/over_refusal", "{:.0%}"), ("VQA", "rollout/vqa", "{:.0%}"),
        ("KL", "objective/kl", "{:.2f}"), ("loss", "loss/policy_avg", "{:.3f}"),
    )  # fmt: skip
    parts = [f"{name} {form.format(metrics[key])}" for name, key, form in shown if metrics.get(key) is not None]
    return f"step {step}/{steps}: " + ", ".join(parts)


def _set_lr(optimizer: Any, config: AlignConfig, step: int) -> None:
    """Warm-up, then down to a tenth; a function of the step alone, so that nothing has to be kept."""
    if step < config.warmup:
        factor = (step + 1) / config.warmup
    else:
        factor = 1 - 0.9 * (step - config.warmup) / max(1, config.steps - config.warmup)
    for group in optimizer.param_groups:
        group["lr"] = config.lr * factor
