"""Generates the answers of an audit, every sample at every exit; resumes from the answers that are on disk.

A resumed run makes the same plan from the same samples and skips the batches that are on disk. The batch size was
chosen for the free memory of the first start and is kept in plan.json, so the figures do not depend on the memory that
is free today.
"""

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import torch
from PIL.Image import Image

from ..data import images
from ..data.selection import Selection, report_skipped, write_thumbnails
from ..engines import prefix
from ..engines.plan import Decoding, ExitRequest, TokenRow, Wave, make_plan, make_rows, memory_limits
from ..errors import UserError
from ..model import loading
from ..model.costs import exit_costs
from ..model.exit_names import parse_exits
from ..model.exits import check
from ..model.features import FeatureCache
from ..model.vlm import Vlm
from ..run import directory
from ..run.clock import Clock
from ..run.exit import Exit
from ..run.progress import Progress
from ..run.provenance import environment, fingerprint
from ..run.records import Completion, Kind, Sample
from ..run.run import Plan, Run
from ..run.typed import to_json
from .config import AuditConfig


def generate(
    config: AuditConfig,
    found: Selection,
    out: Path,
    progress: Progress,
    clock: Clock,
    *,
    vlm: Vlm | None = None,
    costs: bool = True,
) -> Run:
    """Writes samples.jsonl, plan.json, env.json, costs.json, images/ and all completions that are not on disk yet.

    Args:
        vlm: the loaded model; without it, it is loaded as `config` says, unless nothing is left to do.
        costs: measure what an exit costs, unless costs.json exists.

    Raises:
        UserError: an exit or a prompt does not fit the model, or the files of `out` are of another model or plan.
    """
    begun, samples, plan = Run(out), found.samples, None
    if begun.read_object("plan.json") is not None:
        plan = begun.plan
        samples = [s for s in samples if s.id not in plan.skipped]
        directory.write_atomic(out / "samples.jsonl", directory.to_lines(samples))
        if len(begun.completions) == plan.n_requests:
            return begun
        _use_threads(plan.threads)  # before anything is computed
    write_thumbnails(samples, found.roots, out)
    vlm = vlm or _load(config, progress, clock)
    exits = parse_exits(config.exits, vlm.n_blocks, vlm.default_exit)
    for exit in exits:
        check(vlm, exit)  # before a plan is written: until then a typo may be corrected
    directory.write_json(out / "env.json", environment(vlm))
    features = FeatureCache(vlm, exits, lambda name: images.load_image(name, found.roots), clock)
    samples, skipped = _without_control_tokens(vlm, samples)
    report_skipped([f"{name}: {reason}" for name, reason in skipped.items()], progress)
    directory.write_atomic(out / "samples.jsonl", directory.to_lines(samples))
    rows = make_rows(vlm, [ExitRequest(sample, exit) for sample in samples for exit in exits], features.layout)
    plan = _checked(plan, vlm, out) if plan else _write_plan(config, vlm, exits, rows, skipped, out)
    if costs and not (out / "costs.json").exists():
        with clock.phase("costs"):
            _measure_costs(vlm, exits, rows, features.load, out / "costs.json")
    waves = make_plan(rows, plan.batch_size, plan.prefix_tokens)
    decoding = Decoding(config.max_new_tokens, config.temperature, config.top_p, config.seed)
    _fill(vlm, waves, features, decoding, begun, progress, clock)
    return Run(out)


def _load(config: AuditConfig, progress: Progress, clock: Clock) -> Vlm:
    with clock.phase("load"):
        return loading.load_vlm(
            config.model,
            adapter=config.adapter,
            dtype=config.dtype,
            device=config.device,
            trust_remote_code=config.trust_remote_code,
            say=progress.say,
        )


def _use_threads(n: int) -> None:
    """As many threads as on the first start: the order of a float32 sum depends on them."""
    if torch.get_num_threads() != n:
        torch.set_num_threads(n)


def _without_control_tokens(vlm: Vlm, samples: Sequence[Sample]) -> tuple[list[Sample], dict[str, str]]:
    """(samples to ask, {id: why it is skipped}): a control token in a prompt could forge a turn or an image.

    Which strings are control tokens is only known once the tokenizer is loaded.
    """
    tokens = {s.id: vlm.control_token(s.prompt) for s in samples}
    skipped = {name: f"the prompt has the control token {token!r}" for name, token in tokens.items() if token}
    if len(skipped) == len(samples):
        raise UserError(f"every prompt has a control token of the model ({next(iter(skipped))}); give it others")
    return [s for s in samples if s.id not in skipped], skipped


def _checked(plan: Plan, vlm: Vlm, out: Path) -> Plan:
    """The plan of the first start; raises UserError where it was made for other weights."""
    if plan.model_sha256 != fingerprint(vlm):
        raise UserError(f"the weights of {vlm.name} changed since {out} was begun; give --out another directory")
    return plan


def _write_plan(
    config: AuditConfig,
    vlm: Vlm,
    exits: Sequence[Exit],
    rows: Sequence[TokenRow],
    skipped: dict[str, str],
    out: Path,
) -> Plan:
    """Writes plan.json: what the first start finds out, and what must not change on resume."""
    longest = max(len(row.head) + len(row.tail) for row in rows) + config.max_new_tokens
    context = getattr(vlm.model.config.text_config, "max_position_embeddings", None)
    if context and longest > context:
        raise UserError(
            f"the longest prompt takes {longest} tokens with image and answer, the model's context is {context}; "
            "shorten it or lower --max-new-tokens"
        )
    batch_size, prefix_tokens = memory_limits(vlm, longest)
    plan = Plan(
        exits=list(exits),
        default_exit=Exit.of(vlm.default_exit),
        n_blocks=vlm.n_blocks,
        n_requests=len(rows),
        batch_size=config.batch_size or batch_size,
        prefix_tokens=prefix_tokens,
        threads=torch.get_num_threads(),
        model_sha256=fingerprint(vlm),
        skipped=skipped,
    )
    directory.write_json(out / "plan.json", to_json(plan))
    return plan


def _measure_costs(
    vlm: Vlm, exits: Sequence[Exit], rows: Sequence[TokenRow], load: Callable[[str], Image], path: Path
) -> None:
    """costs.json, of the request of median length among those with an image; no file where none has one."""
    asked = {row.request.sample.id: row for row in rows if row.request.sample.image}
    by_length = sorted(asked.values(), key=lambda row: (len(row.head) + len(row.tail), row.request.sample.id))
    if by_length:
        sample = by_length[len(by_length) // 2].request.sample
        directory.write_json(path, exit_costs(vlm, exits, image=load(sample.image), prompt=sample.prompt))


def _fill(
    vlm: Vlm,
    waves: Sequence[Wave],
    features: FeatureCache,
    decoding: Decoding,
    begun: Run,
    progress: Progress,
    clock: Clock,
) -> None:
    """Answers the batches that are not on disk; a half-written batch is cut off and answered again."""
    path, written = begun.path / "completions.jsonl", begun.completions
    batches = [batch for wave in waves for batch in wave.batches]
    requests = [row.request for batch in batches for row in batch]
    if [(c.sample, c.exit) for c in written] != [(r.sample.id, r.exit) for r in requests[: len(written)]]:
        raise UserError(f"{path} does not follow its plan; restore it, or give --out another directory")
    n_batches, n_kept = 0, 0
    while n_batches < len(batches) and n_kept + len(batches[n_batches]) <= len(written):
        n_kept += len(batches[n_batches])
        n_batches += 1
    directory.truncate_to(path, n_kept)
    kinds = {request.sample.id: request.sample.kind for request in requests}
    known = {c.text: c.perplexity for c in written[:n_kept] if kinds[c.sample] != "vqa"}
    progress.start(len(requests))
    progress.advance(n_kept)
    sink, start = directory.Appender(path), 0
    try:
        for wave in waves:
            skip = frozenset(i for i in range(len(wave.batches)) if start + i < n_batches)
            start += len(wave.batches)
            if len(skip) == len(wave.batches):
                continue
            began = time.monotonic()
            for _, completions in prefix.answer_wave(vlm, wave, features, decoding, skip):
                clock.batch(completions, time.monotonic() - began)
                with clock.phase("reference perplexity"):
                    completions = _with_perplexity(vlm, completions, kinds, known)
                sink.append(completions)
                progress.advance(len(completions))
                clock.phases["generate"] = round(sum(clock.seconds.values()), 3)
                clock.save()
                began = time.monotonic()
    finally:
        sink.close()


def _with_perplexity(
    vlm: Vlm, completions: Sequence[Completion], kinds: Mapping[str, Kind], known: dict[str, float | None]
) -> list[Completion]:
    """Adds the reference perplexity of the answers that the coherence gate reads; equal texts are computed once."""
    texts = sorted({c.text for c in completions if kinds[c.sample] != "vqa"} - known.keys())
    known.update(zip(texts, prefix.perplexities(vlm, texts), strict=True))
    return [replace(c, perplexity=known[c.text]) if kinds[c.sample] != "vqa" else c for c in completions]
