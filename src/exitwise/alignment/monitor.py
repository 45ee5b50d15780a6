"""Measurements during an alignment: the sampled answers, the return, small audits of the exits, and the regret."""

import math
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import replace

from ..engines.prefix import Decoding, ExitRequest
from ..judges.refusal import judge_completion
from ..run.exit import Exit
from . import batches
from .records import Metrics
from .rollout import Rollout, answer, roll_out, score
from .state import Bench

SmallAudit = dict[str, dict[Exit, float]]
"""{measure: {trained exit: share}}"""


def watch(requests: Sequence[ExitRequest], rollout: Rollout) -> Metrics:
    """Shares of the sampled answers by the judge `refusal`; None where a batch has no request of the kind."""
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


def measure_return(bench: Bench) -> tuple[float, float]:
    """(mean score, mean KL in nats) of the policy's answers to fixed harmful requests.

    The return is the score minus the weighted KL. The answers before and after an update are sampled with the same
    random numbers, so that only the update makes a difference.
    """
    config = bench.config
    requests = batches.probe(config, bench.pools, bench.exits, config.probe)
    with bench.clock.phase("theory"):
        decoding = Decoding(config.max_new_tokens, 1.0, 1.0, config.seed)
        rollout = roll_out(bench.policy, requests, bench.features, decoding, bench.reward, 1)
    kl = ((rollout.old.logprobs - rollout.ref_logprobs) * rollout.answers.mask).sum(dim=1)
    return float(rollout.scores.mean()), float(kl.mean())


def audit_exits(bench: Bench) -> SmallAudit:
    """ASR of greedy answers at the trained exits, and over-refusal where --validation keeps harmless prompts."""
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


def estimate_regret(bench: Bench) -> dict[str, float]:
    """Regret at the trained exits, before and after training: the mean score of the best of n answers of the model
    before training (in place of the optimal policy's), minus the policy's own mean score."""
    config = bench.config
    n = config.best_of
    base = batches.probe(config, bench.pools, bench.exits, max(8, config.probe))
    requests = [ExitRequest(replace(r.sample, id=f"{r.sample.id}~{k}"), r.exit) for r in base for k in range(n)]
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
