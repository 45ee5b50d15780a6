"""A training step: requests, their answers or targets, advantages, updates, and the metrics of it.

Shapes: B rows, T response tokens.
"""

import random
from pathlib import Path
from typing import NamedTuple

import torch

from ..data.prompts import builtin_refusals
from ..engines.prefix import Decoding, ExitRequest
from ..errors import UserError
from . import batches, checkpoints, ppo
from .config import AlignConfig
from .losses import Loss, dpo_loss, grpo_loss, ppo_loss, sft_loss
from .monitor import audit_exits, measure_return, watch
from .records import AnswerLine, Metrics
from .rollout import Rollout, answer, evaluate, gather, pad_responses, roll_out, select
from .state import Bench, State
from .updates import set_lr, update


class Targets(NamedTuple):
    """Token ids that imitation trains on, for one request."""

    good: list[int]
    bad: list[int]  # DPO only


class Objective(NamedTuple):
    """What an update of a rollout raises."""

    advantages: torch.Tensor  # (B, T)
    kl: torch.Tensor  # (B, T) to the reference
    loss: Loss


def train_step(bench: Bench, state: State, out: Path) -> tuple[Metrics, list[AnswerLine]]:
    """One batch: its answers or targets, then its updates; returns (metrics, sample answers)."""
    config = bench.config
    set_lr(bench.optimizer, config, state.step)
    every = config.audited_every()
    small = audit_exits(bench) if every and state.step and state.step % every == 0 else {}
    weights = batches.next_weights(state.weights, small["asr"]) if small else state.weights
    evaluated = {f"eval/{name}@{exit}": value for name, row in small.items() for exit, value in row.items()}
    requests = batches.draw(config, bench.pools, bench.exits, state.step, weights)
    if config.method in ("sft", "dpo"):
        metrics, answers = imitate(bench, state, requests)
    else:
        metrics, answers = reinforce(bench, state, requests, out)
    state.weights = (
        weights  # only now: the checkpoint of a failed step must not hold weights that it will compute again
    )
    return {"step": state.step + 1, **evaluated, **metrics}, answers


# ------------------------------------------------------------------------------------------------ reinforcement


def reinforce(bench: Bench, state: State, requests: list[ExitRequest], out: Path) -> tuple[Metrics, list[AnswerLine]]:
    """A step of L-PPO, or of GRPO on the same rollout."""
    config = bench.config
    probed = config.probe and config.method == "l-ppo"
    if probed and state.measured is None:
        state.measured = measure_return(bench)
    rollout = collect(bench, requests, config.temperature, state, out)
    answers, mask, old = rollout.answers, rollout.answers.mask, rollout.old
    scores = shape_scores(config, rollout)
    goal = (ppo_objective if config.method == "l-ppo" else grpo_objective)(bench, state, rollout, scores)
    with bench.clock.phase("update"):
        learnt = update(bench, state.step, answers, len(answers.rows), goal.loss)
    with bench.clock.phase("theory"):
        half = list(range(0, len(requests), 2))  # every other answer: monitoring must not cost a forward pass of all
        after = evaluate(bench.wrapped, select(answers, half), bench.features, config.gradient_accumulation_steps)
        shift = ppo.shift(after.logprobs, old.logprobs[half], goal.advantages[half], mask[half])
    kl, score = float(goal.kl.sum(dim=1).mean()), float(scores.mean())
    metrics: Metrics = {
        "objective/kl": kl,
        "objective/entropy": float((-old.logprobs * mask).sum(dim=1).mean()),
        "objective/scores": score,
        "objective/non_score_reward": float(-state.kl_coef * goal.kl.sum(dim=1).mean()),
        "objective/rlhf_reward": score - state.kl_coef * kl,
        "kl_coef": state.kl_coef,
        "policy/entropy_avg": float(ppo.masked_mean(old.entropy, mask)),
        **learnt,
        **{f"theory/{name}": value for name, value in shift._asdict().items()},
        **watch(requests, rollout),
    }
    if probed:
        metrics |= _measure_return_again(bench, state)
    if config.kl_target is not None:
        state.kl_coef = ppo.adapt_kl_coef(state.kl_coef, kl, config.kl_target, len(requests), config.kl_horizon)
    return metrics, [
        {"step": state.step + 1, "sample": c.sample, "exit": c.exit.to_json(), "text": c.text, "label": label,
         "score": float(score)}
        for c, label, score in zip(rollout.completions, rollout.labels, scores, strict=True)
    ]  # fmt: skip


def ppo_objective(bench: Bench, state: State, rollout: Rollout, scores: torch.Tensor) -> Objective:
    """Rewards after KL, generalised advantages, and the loss of L-PPO."""
    config, old, mask = bench.config, rollout.old, rollout.answers.mask
    parts = ppo.token_rewards(scores, old.logprobs, rollout.ref_logprobs, mask, state.kl_coef)
    rewards = ppo.masked_whiten(parts.rewards, mask, shift_mean=False) if config.whiten_rewards else parts.rewards
    estimated = ppo.gae(rewards, old.values, mask, config.gamma, config.lam)
    advantages = ppo.masked_whiten(estimated.advantages, mask)
    return Objective(advantages, parts.kl, ppo_loss(bench, rollout, advantages, estimated.returns))


def grpo_objective(bench: Bench, state: State, rollout: Rollout, scores: torch.Tensor) -> Objective:
    """Advantages within the groups, and the loss of GRPO, which holds the KL."""
    mask = rollout.answers.mask
    kl = ppo.token_rewards(scores, rollout.old.logprobs, rollout.ref_logprobs, mask, 0.0).kl
    advantages = ppo.group_advantages(scores, bench.config.group_size)[:, None] * mask
    return Objective(advantages, kl, grpo_loss(bench, state, rollout, advantages))


def _measure_return_again(bench: Bench, state: State) -> Metrics:
    """The return before and after the update, both with this step's weight of the KL."""
    before, after = state.measured, measure_return(bench)
    assert before is not None  # `reinforce` measures it
    state.measured = after
    weighted = lambda measured: measured[0] - state.kl_coef * measured[1]
    return {"theory/return_before": weighted(before), "theory/return_after": weighted(after)}


def collect(bench: Bench, requests: list[ExitRequest], temperature: float, state: State, out: Path) -> Rollout:
    """The rollout of all processes, each of which answers its share of the requests.

    Raises:
        UserError: a score is not finite, in any process; the state before this step is on disk.
    """
    from accelerate.utils import gather_object

    config, accelerator = bench.config, bench.accelerator
    n, index = accelerator.num_processes, accelerator.process_index
    mine = requests[len(requests) * index // n : len(requests) * (index + 1) // n]
    decoding = Decoding(config.max_new_tokens, temperature, 1.0, config.seed * 1_000_003 + state.step)
    # A no-grad forward pass of the batch needs no more memory than one training mini-batch.
    pieces = config.gradient_accumulation_steps
    fault = None
    try:
        rollout = roll_out(bench.policy, mine, bench.features, decoding, bench.reward, pieces, bench.clock)
    except UserError as error:
        fault = str(error)
    faults = [text for text in gather_object([fault]) if text]  # one process that left would have the others wait
    if faults:
        checkpoints.save(bench, out, state)  # this step has not changed the weights yet
        raise UserError(f"{faults[0]}; the last good step is kept")
    return gather(rollout, accelerator)


def shape_scores(config: AlignConfig, rollout: Rollout) -> torch.Tensor:
    """(B,) scores: --refusal-cost for refused harmless requests, clipped, minus the penalty for answers cut short."""
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


# ------------------------------------------------------------------------------------------------ imitation


def imitate(bench: Bench, state: State, requests: list[ExitRequest]) -> tuple[Metrics, list[AnswerLine]]:
    """A step of SFT on targets, or of DPO that prefers them to other answers."""
    config = bench.config
    with bench.clock.phase("rollout"):
        found = targets(bench, state, requests)
    n = len(requests)
    if config.method == "sft":
        answers = pad_responses(bench.policy, requests, [t.good for t in found], bench.features)
        loss = sft_loss(bench, answers)
    else:
        tokens = [t.good for t in found] + [t.bad for t in found]
        answers = pad_responses(bench.policy, [*requests, *requests], tokens, bench.features)
        reference = evaluate(
            bench.wrapped, answers, bench.features, 2 * config.gradient_accumulation_steps, reference=True
        )
        loss = dpo_loss(bench, answers, n, (reference.logprobs * answers.mask).sum(dim=1))
    with bench.clock.phase("update"):
        learnt = update(bench, state.step, answers, n, loss)
    texts = [bench.policy.vlm.tokenizer.decode(t.good, skip_special_tokens=True) for t in found]
    return {**learnt}, [
        {"step": state.step + 1, "sample": r.sample.id, "exit": r.exit.to_json(), "target": text}
        for r, text in zip(requests, texts, strict=True)
    ]


def targets(bench: Bench, state: State, requests: list[ExitRequest]) -> list[Targets]:
    """Targets of each request, from the model before training and from the built-in refusals.

    Harmful prompts: a refusal is good, the model's own answer bad. Harmless prompts: the model's own answer at the
    default exit is good, a refusal bad. VQA questions: an accepted answer is good, the answer to another question bad.
    """
    config, tokenizer = bench.config, bench.policy.vlm.tokenizer
    rng = random.Random(f"{config.seed}/targets/{state.step}")
    refusals = builtin_refusals()
    ids = lambda text: [*tokenizer(text, add_special_tokens=False).input_ids, tokenizer.eos_token_id]
    own = _own_answers(bench, requests)
    found = []
    for request in requests:
        sample, refusal = request.sample, ids(rng.choice(refusals))[: config.max_new_tokens]
        if sample.kind == "harmful":
            found.append(Targets(refusal, own.get(sample.id, refusal)))
        elif sample.kind == "benign":
            found.append(Targets(own[sample.id], refusal))
        else:
            others = sorted(
                {s.answers[0] for s in bench.pools.vqa if s.category == sample.category} - {*sample.answers}
            )
            found.append(Targets(ids(sample.answers[0]), ids(rng.choice(others or ["nothing"]))))
    return found


def _own_answers(bench: Bench, requests: list[ExitRequest]) -> dict[str, list[int]]:
    """{sample id: token ids of the untrained model's greedy answer}, for the requests whose targets need it."""
    config = bench.config
    asked = [r for r in requests if r.sample.kind != "vqa" and (r.sample.kind == "benign" or config.method == "dpo")]
    at = lambda r: r if r.sample.kind == "harmful" else r._replace(exit=bench.exits.default)
    with bench.policy.peft_model.disable_adapter():
        found = answer(
            bench.policy, [at(r) for r in asked], bench.features, Decoding(config.max_new_tokens, 0.0, 1.0, config.seed)
        )
    return {c.sample: list(c.tokens) for c in found}
