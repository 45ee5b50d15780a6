"""Checks that two runs can be compared: the same questions, decoded and judged alike.

Only the weights may differ between the two: any other difference would be read as an effect of alignment.
"""

from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

from ..data.controls import control_of
from ..errors import UserError
from ..measure.readings import Reading, read_all
from ..model.exit_names import ranges
from ..run.directory import read_json
from ..run.exit import Exit
from ..run.records import Label, Sample, Score
from ..run.run import Run
from ..run.typed import Json
from .changes import AdapterInfo

SETTINGS = ("max_new_tokens", "temperature", "top_p")
"""Options of decoding that must agree."""

SAME_SAMPLE = ("prompt", "kind", "image", "answers")
"""Fields of a sample that must agree; where it came from may differ."""

SAME_SCORER = ("backend", "version", "settings")
"""Keys of scores.<scorer>.json that must agree: values of two scorers are never subtracted."""

SampleAtExit = tuple[str, Exit]
"""(sample id, exit)"""

QUANTITIES = ("toxicity", "reward", "accuracy")
"""What a scorer may measure: `quantity` in scores.<scorer>.json, or without that file the beginning of its name."""


class PairedScores(NamedTuple):
    """A scorer's values before and after, and what they measure ("" where that is not known)."""

    before: dict[SampleAtExit, float]
    after: dict[SampleAtExit, float]
    quantity: str


class ComparedRun(NamedTuple):
    """What a comparison uses of a run; controls are left out."""

    run: Run
    samples: dict[str, Sample]
    texts: dict[SampleAtExit, str]
    labels: dict[SampleAtExit, Label]
    readings: dict[SampleAtExit, Reading]
    judge: str
    """The judge whose verdicts make the figures of metrics.json."""
    caveat: str
    """What that judge cannot detect."""


class RunPair(NamedTuple):
    """Two runs and what they share; `notes` are sentences for the reader."""

    before: ComparedRun
    after: ComparedRun
    exits: tuple[Exit, ...]
    scores: dict[str, PairedScores]
    """By scorer; cells without a usable value are absent."""
    info: AdapterInfo | None
    notes: tuple[str, ...]


def pair_runs(before: Run, after: Run) -> RunPair:
    """Checks that two runs can be compared.

    Raises:
        UserError: a run is broken, unfinished or not judged, or the two cannot be paired.
    """
    one, two = _read(before), _read(after)
    _check_settings(one, two)
    _check_samples(one, two)
    exits_one, exits_two = ({exit for _, exit in side.labels} for side in (one, two))
    common = tuple(sorted(exits_one & exits_two))
    if not common:
        raise UserError(
            f"the runs share no exit: {before.path} has {ranges(exits_one)}, {after.path} has {ranges(exits_two)}; "
            "audit both with the same --exits"
        )
    scores, notes = _common_scores(before, after)
    for name, exits in (("BEFORE", exits_one - exits_two), ("AFTER", exits_two - exits_one)):
        if exits:
            verb = "is" if len(exits) == 1 else "are"
            notes.append(f"{_exits(exits)} {verb} in {name} only and left out.")
    info = adapter_info(after)
    if info and not set(info.exits) & set(common):
        notes.append(f"No trained exit ({ranges(info.exits)}) is in both runs, so the verdict is on the others.")
    return RunPair(one, two, common, scores, info, (*notes, *_oddities(before, after)))


def _read(run: Run) -> ComparedRun:
    """Raises UserError where the run is broken, unfinished or not judged."""
    if run.read_object("plan.json") is None:
        raise UserError(f"{run.path} holds no answers yet (no plan.json); finish it with the command that began it")
    if not run.completions:
        raise UserError(
            f"{run.path} holds 0 of {run.plan.n_requests} answers; finish it with the command that began it"
        )
    run.finished()
    judge, caveat = run.config.judge.split(",")[0].strip(), ""
    if run.read_object("metrics.json") is not None:
        judge, caveat = run.metrics.judge, run.metrics.caveat
    verdicts = run.verdicts.get(judge, ())
    labels = {(v.sample, v.exit): v.label for v in verdicts if v.judge == judge}
    texts = {(c.sample, c.exit): c.text for c in run.completions}
    if missing := len(texts.keys() - labels.keys()):
        raise UserError(
            f"{run.path} lacks verdicts of the judge {judge!r} on {missing} of {len(texts)} answers; "
            f"run `exitwise judge {run.path}` first"
        )
    readings = read_all(run.samples, run.completions, verdicts, judge)
    asked = {sample.id: sample for sample in run.samples if control_of(sample) is None}
    cells = [cell for cell in texts if cell[0] in asked]
    return ComparedRun(
        run,
        asked,
        {cell: texts[cell] for cell in cells},
        {cell: labels[cell] for cell in cells},
        {cell: readings[cell[1]][cell[0]] for cell in cells},
        judge,
        caveat,
    )


def _check_settings(one: ComparedRun, two: ComparedRun) -> None:
    """The same judge, decoding, encoder depth and default exit."""
    here, there = one.run, two.run
    if one.judge != two.judge:
        raise UserError(
            f"{here.path} was judged by {one.judge!r}, {there.path} by {two.judge!r}; audit both with the same --judge"
        )
    for name in SETTINGS:
        if here.options.get(name) != there.options.get(name):
            raise UserError(
                f"{name} is {here.options.get(name)} in {here.path} and {there.options.get(name)} in {there.path}; "
                f"audit both with the same --{name.replace('_', '-')}"
            )
    for words, first, second in (
        ("number of encoder blocks", here.plan.n_blocks, there.plan.n_blocks),
        ("default exit", here.plan.default_exit, there.plan.default_exit),
    ):
        if first != second:
            raise UserError(
                f"the {words} is {first} in {here.path} and {second} in {there.path}; compare two audits of one model"
            )


def _check_samples(one: ComparedRun, two: ComparedRun) -> None:
    """The same ids, each with the same prompt, kind, image and accepted answers, and equal images."""
    for here, there in ((one, two), (two, one)):
        absent = sorted(here.samples.keys() - there.samples.keys())
        if absent:
            raise UserError(
                f"{there.run.path} lacks {len(absent)} of the {len(here.samples)} samples of {here.run.path} "
                f"(first: {absent[0]!r}); audit both with the same prompts, images, --limit, --vqa and --seed"
            )
    for key, sample in one.samples.items():
        for field in SAME_SAMPLE:
            if getattr(sample, field) != getattr(two.samples[key], field):
                raise UserError(
                    f"sample {key!r} has another {field} in {two.run.path} than in {one.run.path}; "
                    "audit both with the same prompts and images"
                )
    pictures = [side.run.options.get("images_sha256") for side in (one, two)]
    if None not in pictures and pictures[0] != pictures[1]:
        raise UserError(
            f"the images of {one.run.path} and {two.run.path} differ under the same names; use the same --images"
        )


def _oddities(one: Run, two: Run) -> list[str]:
    """What does not forbid the comparison, but must be known to read it."""
    notes = []
    if one.config.model != two.config.model:
        notes.append(f"The models have different names: {one.config.model!r} and {two.config.model!r}.")
    if one.plan.model_sha256 == two.plan.model_sha256:
        notes.append("Both runs asked the same weights.")
    if one.config.adapter and not two.config.adapter:
        notes.append("Only BEFORE has an adapter; the two runs may be swapped.")
    elif one.config.adapter and one.config.adapter != two.config.adapter:
        notes.append(
            f"BEFORE has an adapter too ({one.config.adapter!r}): the differences are those between two adapters."
        )
    for name in ("device", "dtype"):
        values = [(run.read_object("env.json") or {}).get(name) for run in (one, two)]
        if None not in values and values[0] != values[1]:
            notes.append(f"The {name} differs: {values[0]} before, {values[1]} after.")
    return notes


# Numeric scores


def _common_scores(before: Run, after: Run) -> tuple[dict[str, PairedScores], list[str]]:
    """The scorers of both runs, and notes on those that only one has or that differ under one name."""
    common: dict[str, PairedScores] = {}
    notes: list[str] = []
    for name in sorted({*before.scores, *after.scores}):
        if name not in before.scores or name not in after.scores:
            where = "BEFORE" if name in before.scores else "AFTER"
            notes.append(f"Scores of {name!r} are in {where} only and left out.")
            continue
        about = [run.read_object(f"scores.{name}.json") or {} for run in (before, after)]
        stamps = [{score.scorer for score in run.scores[name]} for run in (before, after)]
        if stamps[0] != stamps[1] or any(about[0].get(key) != about[1].get(key) for key in SAME_SCORER):
            notes.append(f"Scores of {name!r} come from different scorers, versions or settings and are left out.")
            continue
        by_name = next((quantity for quantity in QUANTITIES if name.startswith(quantity)), "")
        one, two = (_values(run.scores[name]) for run in (before, after))
        common[name] = PairedScores(one, two, str(about[1].get("quantity", by_name)))
    return common, notes


def _values(scores: Iterable[Score]) -> dict[SampleAtExit, float]:
    return {(score.sample, score.exit): float(score.value) for score in scores if score.value is not None}


# What the alignment recorded of its adapter


def adapter_info(run: Run) -> AdapterInfo | None:
    """From adapter_info in the run's config.json, else from exitwise.json in its adapter's folder; None without.

    Raises:
        UserError: it is there but not {"method": text, "exits": [numbers], "held_out": [numbers]}.
    """
    if (info := run.options.get("adapter_info")) is not None:
        return _parse_info(info, f"adapter_info in {run.path / 'config.json'}")
    if not run.config.adapter:
        return None
    folder = Path(run.config.adapter)
    for path in (folder / "exitwise.json", folder / "adapter" / "exitwise.json"):
        if path.is_file():
            return _parse_info(read_json(path), str(path))
    return None


def _parse_info(value: Json, where: str) -> AdapterInfo:
    row = value if isinstance(value, dict) else {}
    trained, held_out = (_numbers(row.get(name)) for name in ("exits", "held_out"))
    if not trained or held_out is None:
        raise UserError(f'{where} names no exits; expected {{"method": text, "exits": [8], "held_out": [5]}}')
    return AdapterInfo(str(row.get("method", "")), trained, tuple(e for e in held_out if e not in trained))


def _numbers(value: Json) -> tuple[Exit, ...] | None:
    """A list of exits, () for a missing one; None where it is something else."""
    if not isinstance(value or [], list):
        return None
    try:
        return tuple(Exit.of(exit) for exit in value or [])  # type: ignore[arg-type, union-attr]
    except ValueError:
        return None


def _exits(exits: Iterable[Exit]) -> str:
    exits = list(exits)
    return f"Exit{'' if len(exits) == 1 else 's'} {ranges(exits)}"
