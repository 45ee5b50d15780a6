"""The audit: every sample at every exit, into a run directory that survives being killed.

    samples -> plan -> completions (batch by batch, on disk before the next starts) -> verdicts -> metrics -> report

A resumed run makes the same plan from the same samples and skips the batches that are on disk. The batch size was found
from the free memory of the first start and is kept in plan.json, so the figures do not depend on the day's memory.
"""

import hashlib
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..data import images
from ..data.controls import control_of
from ..data.selection import Selection, load_samples, write_thumbnails
from ..data.sets import count_reasons
from ..errors import UserError
from ..measure.bands import read_bands
from ..model.exit_names import parse_exits
from ..run import directory
from ..run.clock import Clock
from ..run.exit import Exit
from ..run.progress import Progress, Silent
from ..run.provenance import environment, fingerprint
from ..run.records import Completion, Sample
from .config import AuditConfig

if TYPE_CHECKING:
    from ..judges.config import Judging

TOLD = 20
"""Skipped rows that are told one by one."""


def audit(
    config: AuditConfig,
    out: Path,
    progress: Progress | None = None,
    judging: "Judging | None" = None,
    costs: bool = True,
) -> Path:
    """Runs or resumes an audit in `out`; returns the path of its report.

    Args:
        judging: where the judges that are models come from.
        costs: measure what an exit costs, where that is not on disk yet.

    Raises:
        UserError: bad input, or `out` belongs to another config or another process.
    """
    from ..measure.metrics import compute_metrics
    from ..report import write_report

    config.check()
    progress = progress or Silent()
    inputs = load_samples(config.inputs, config.selection, config.seed)
    _tell_skipped(inputs.skipped, progress)
    with directory.open_run(out, _config_json(config, inputs)):
        clock = Clock(out / "timing.json")
        generate(config, inputs.samples, inputs.roots, out, progress, clock, costs)
        with clock.phase("judge"):
            judge_and_measure(out, compute_metrics, judging=judging, progress=progress)
        with clock.phase("report"):
            return write_report(out)


def _tell_skipped(lines: Sequence[str], progress: Progress) -> None:
    """The first of them; config.json and plan.json hold all."""
    for line in lines[:TOLD]:
        progress.say(f"skipped {line}")
    if len(lines) > TOLD:
        progress.say(f"skipped {len(lines) - TOLD} more; config.json names them")
        for reason, n in count_reasons(lines).items():
            progress.say(f"    {n} x {reason}")


def judge_and_measure(
    out: Path,
    compute_metrics: Callable[..., dict],
    judges: str | None = None,
    judging: "Judging | None" = None,
    progress: Progress | None = None,
) -> None:
    """verdicts.<judge>.jsonl of each judge, and metrics.json by the first, from what is on disk.

    Args:
        judges: names separated by commas; without them, the run's own.
    """
    from ..judges import judge_run, parse_judges

    config, plan = directory.read_json(out / "config.json", "judge", "model", "seed"), read_plan(out / "plan.json")
    n_done = len(directory.read_records(out / "completions.jsonl", Completion))
    if n_done != plan["n_requests"]:
        raise UserError(
            f"{out} holds {n_done} of {plan['n_requests']} answers; finish it with the command that began it"
        )
    names = parse_judges(judges or config["judge"])
    verdicts = [judge_run(out, name, judging, _teller(name, progress or Silent())) for name in names]
    metrics = compute_metrics(
        directory.read_records(out / "samples.jsonl", Sample),
        directory.read_records(out / "completions.jsonl", Completion),
        verdicts[0],
        model=config["model"],
        default_exit=plan["default_exit"],
        n_blocks=plan["n_blocks"],
        seed=config["seed"],
        judge=names[0],
        bands=read_bands(out, plan["n_blocks"]),
    )
    directory.write_json(out / "metrics.json", metrics | {"notice": config.get("notice", "")})


def _teller(name: str, progress: Progress) -> Callable[[int, int], None]:
    """Says every tenth of a judging."""
    told = 0

    def tell(done: int, total: int) -> None:
        nonlocal told
        if done * 10 // total > told:
            told = done * 10 // total
            progress.say(f"{name}: {done}/{total} verdicts")

    return tell


def _config_json(config: AuditConfig, inputs: Selection) -> dict[str, Any]:
    """The config, the counts, the sources, and the checksum of the samples: a changed prompt file is another config."""
    from ..model.testbed import TESTBED_NOTICE

    samples = inputs.samples
    digest = hashlib.sha256(directory.to_lines(samples).encode()).hexdigest()
    names = sorted({s.image for s in samples if s.image})
    pictures = hashlib.sha256()
    for name in names:
        image = images.load_image(name, inputs.roots)
        pictures.update(f"{name} {image.size}".encode() + image.tobytes())
    asked = [s for s in samples if control_of(s) is None]
    kinds = {kind: sum(s.kind == kind for s in asked) for kind in ("harmful", "benign", "vqa")}
    extra = {
        "counts": kinds | ({"controls": len(samples) - len(asked)} if config.selection.controls else {}),
        "skipped": inputs.skipped,
        "sources": inputs.sources,
        "samples_sha256": digest,
        "images_sha256": pictures.hexdigest(),
        "image_folders": {name: str(folder.resolve()) for name, folder in inputs.roots.items()},
        "notice": TESTBED_NOTICE.get(config.model, ""),
    }
    return config.to_json() | extra | _adapter_info(config)


def _adapter_info(config: AuditConfig) -> dict[str, Any]:
    """What an adapter of ours says of its training, so that a comparison can tell trained exits from others."""
    if config.adapter is None:
        return {}
    for folder in (Path(config.adapter, "adapter"), Path(config.adapter)):
        if (folder / "exitwise.json").exists():
            return {"adapter_info": directory.read_json(folder / "exitwise.json", "method", "exits", "held_out")}
    return {}


def generate(
    config: AuditConfig,
    samples: list[Sample],
    roots: dict[str, Path],
    out: Path,
    progress: Progress,
    clock: Clock,
    costs: bool,
) -> None:
    """Writes samples.jsonl, plan.json, env.json, costs.json, images/ and all completions that are not on disk yet."""
    path, plan_path = out / "completions.jsonl", out / "plan.json"
    if plan_path.exists():
        plan = read_plan(plan_path)
        samples = [s for s in samples if s.id not in plan["skipped"]]
        directory.write_atomic(out / "samples.jsonl", directory.to_lines(samples))
        if len(directory.read_records(path, Completion)) == plan["n_requests"]:
            return
        _use_threads(plan["threads"])  # before anything is computed
    write_thumbnails(samples, roots, out)
    with clock.phase("load"):
        from ..model.loading import load_vlm

        vlm = load_vlm(
            config.model,
            adapter=config.adapter,
            dtype=config.dtype,
            device=config.device,
            trust_remote_code=config.trust_remote_code,
            say=progress.say,
        )
    from ..engines import prefix
    from ..model.exits import check
    from ..model.features import FeatureCache

    exits = parse_exits(config.exits, vlm.n_blocks, vlm.default_exit)
    for exit in exits:
        check(vlm, exit)  # before a plan is written: until then a typo may be corrected
    directory.write_json(out / "env.json", environment(vlm))
    features = FeatureCache(vlm, exits, lambda name: images.load_image(name, roots), clock)
    samples, unasked = _askable(vlm, samples)
    _tell_skipped([f"{name}: {reason}" for name, reason in unasked.items()], progress)
    directory.write_atomic(out / "samples.jsonl", directory.to_lines(samples))
    requests = [prefix.ExitRequest(sample, exit) for sample in samples for exit in exits]
    rows = prefix.make_rows(vlm, requests, features.layout)
    plan = _plan(plan_path, config, vlm, exits, rows, unasked)
    if costs and not (out / "costs.json").exists():
        with clock.phase("costs"):
            _measure_costs(vlm, exits, rows, features.load, out / "costs.json")
    waves = prefix.make_plan(rows, plan["batch_size"], plan["prefix_tokens"])
    decoding = prefix.Decoding(config.max_new_tokens, config.temperature, config.top_p, config.seed)
    _fill(vlm, waves, features, decoding, path, progress, clock)


def _measure_costs(vlm: Any, exits: tuple[Exit, ...], rows: list, load: Callable[[str], Any], path: Path) -> None:
    """costs.json, of the request of median length among those with an image; no file where none has one."""
    from ..model.costs import exit_costs

    asked = {row.request.sample.id: row for row in rows if row.request.sample.image}
    by_length = sorted(asked.values(), key=lambda row: (len(row.head) + len(row.tail), row.request.sample.id))
    if by_length:
        sample = by_length[len(by_length) // 2].request.sample
        directory.write_json(path, exit_costs(vlm, exits, image=load(sample.image), prompt=sample.prompt))


def _askable(vlm: Any, samples: list[Sample]) -> tuple[list[Sample], dict[str, str]]:
    """(samples, {id: why it is not asked}): a prompt with a control token of the model could forge a turn or an image.

    Which strings those are is only known once the tokenizer is there.
    """
    tokens = {s.id: vlm.control_token(s.prompt) for s in samples}
    unasked = {name: f"the prompt has the control token {token!r}" for name, token in tokens.items() if token}
    if len(unasked) == len(samples):
        raise UserError(f"every prompt has a control token of the model ({next(iter(unasked))}); give it others")
    return [s for s in samples if s.id not in unasked], unasked


def _plan(
    path: Path, config: AuditConfig, vlm: Any, exits: tuple[Exit, ...], rows: list, unasked: dict[str, str]
) -> dict[str, Any]:
    """What was found out on the first start: read from plan.json, or written there."""
    import torch

    from ..engines import prefix

    identity = fingerprint(vlm)
    if path.exists():
        plan = read_plan(path)
        if plan["model_sha256"] != identity:
            raise UserError(
                f"the weights of {config.model} changed since {path.parent} was begun; give --out another directory"
            )
        return plan
    longest = max(len(row.head) + len(row.tail) for row in rows) + config.max_new_tokens
    context = getattr(vlm.model.config.text_config, "max_position_embeddings", None)
    if context and longest > context:
        raise UserError(
            f"the longest prompt takes {longest} tokens with image and answer, the model's context is {context}; "
            "shorten it or lower --max-new-tokens"
        )
    batch_size, prefix_tokens = prefix.memory_limits(vlm, longest)
    plan = {
        "exits": list(exits),
        "default_exit": vlm.default_exit,
        "n_blocks": vlm.n_blocks,
        "n_requests": len(rows),
        "batch_size": config.batch_size or batch_size,
        "prefix_tokens": prefix_tokens,
        "threads": torch.get_num_threads(),
        "model_sha256": identity,
        "skipped": unasked,
    }
    directory.write_json(path, plan)
    return plan


def read_plan(path: Path) -> dict[str, Any]:
    """Raises UserError where the plan is not what `_plan` writes."""
    keys = ("n_requests", "batch_size", "prefix_tokens", "threads", "default_exit", "model_sha256", "skipped")
    return directory.read_json(path, *keys)


def _use_threads(n: int) -> None:
    """As many threads as on the first start: the order of a float32 sum depends on them."""
    import torch

    if torch.get_num_threads() != n:
        torch.set_num_threads(n)


def _fill(vlm: Any, waves: list, features: Any, decoding: Any, path: Path, progress: Progress, clock: Clock) -> None:
    """Answers the batches that are not on disk; a half-written batch is cut off and answered again."""
    from ..engines import prefix

    sizes = [len(batch) for wave in waves for batch in wave.batches]
    planned = [(row.request.sample.id, row.request.exit) for wave in waves for batch in wave.batches for row in batch]
    written = directory.read_records(path, Completion)
    if [(c.sample, c.exit) for c in written] != planned[: len(written)]:
        raise UserError(f"{path} does not follow its plan; restore it, or give --out another directory")
    n_batches, n_kept = 0, 0
    while n_batches < len(sizes) and n_kept + sizes[n_batches] <= len(written):
        n_kept += sizes[n_batches]
        n_batches += 1
    directory.truncate_to(path, n_kept)
    kinds = {
        row.request.sample.id: row.request.sample.kind for wave in waves for batch in wave.batches for row in batch
    }
    known = {c.text: c.perplexity for c in written[:n_kept] if kinds[c.sample] != "vqa"}
    progress.start(sum(sizes))
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


def _with_perplexity(vlm: Any, completions: list[Completion], kinds: dict, known: dict) -> list[Completion]:
    """Adds the reference perplexity of the answers that the coherence gate reads; equal texts are read once."""
    from dataclasses import replace

    from ..engines import prefix

    texts = sorted({c.text for c in completions if kinds[c.sample] != "vqa"} - known.keys())
    known.update(zip(texts, prefix.perplexities(vlm, texts), strict=True))
    return [replace(c, perplexity=known[c.text]) if kinds[c.sample] != "vqa" else c for c in completions]
