"""Two runs that may be laid side by side: the same questions, asked and judged alike. Else one line that says why not.

Only the weights may differ between the two: whatever else differs would be read as an effect of alignment.
"""

import json
from collections.abc import Iterable
from math import isfinite
from pathlib import Path
from typing import Any, NamedTuple

from ..data.controls import control_of
from ..errors import UserError
from ..measure.readings import Reading, read_all
from ..model.exit_names import ranges
from ..run.directory import read_json, read_records
from ..run.exit import Exit
from ..run.records import Completion, Label, Sample, Verdict

SETTINGS = ("max_new_tokens", "temperature", "top_p")
"""Of decoding; they must agree."""

SAME_SAMPLE = ("prompt", "kind", "image", "answers")
"""Fields of a sample that must agree; where it came from may differ."""

STAMPS = ("scorer", "backend", "version")
"""Fields of a score that say who gave it: figures of two scorers are never subtracted."""

Cell = tuple[str, Exit]
"""(sample id, exit)"""

QUANTITIES = ("toxicity", "reward", "accuracy")
"""What a scorer may measure. Its scores.<scorer>.json says which, or else its name begins with one of them."""


class Scores(NamedTuple):
    """A scorer's values before and after, and what they measure ("" where nobody says)."""

    before: dict[Cell, float]
    after: dict[Cell, float]
    quantity: str


class Run(NamedTuple):
    """What a comparison reads of a run directory."""

    folder: Path
    config: dict[str, Any]
    plan: dict[str, Any]
    env: dict[str, Any]
    samples: dict[str, Sample]
    texts: dict[Cell, str]
    labels: dict[Cell, Label]
    readings: dict[Cell, Reading]
    judge: str
    """Whose verdicts make the figures of metrics.json."""
    caveat: str
    """What that judge cannot see, as the run's metrics.json says it."""


class AdapterInfo(NamedTuple):
    """What alignment says of its adapter: the method, the exits it trained at, and those it left out on purpose."""

    method: str
    exits: tuple[Exit, ...]
    held_out: tuple[Exit, ...]


class Pair(NamedTuple):
    """Two runs and what they share; `notes` are sentences for the reader."""

    before: Run
    after: Run
    exits: tuple[Exit, ...]
    scores: dict[str, Scores]
    """By scorer: values of BEFORE, values of AFTER; cells without a usable value are absent."""
    info: AdapterInfo | None
    notes: tuple[str, ...]


def read_pair(before: Path, after: Path) -> Pair:
    """Reads both runs.

    Raises:
        UserError: a directory is no run, is broken, unfinished or not judged, or the two cannot be paired.
    """
    one, two = read_run(before), read_run(after)
    _check_settings(one, two)
    _check_samples(one, two)
    exits_one, exits_two = ({exit for _, exit in run.labels} for run in (one, two))
    common = tuple(sorted(exits_one & exits_two))
    if not common:
        raise UserError(
            f"the runs share no exit: {before} has {ranges(exits_one)}, {after} has {ranges(exits_two)}; "
            "audit both with the same --exits"
        )
    scores, notes = _common_scores(before, after)
    for name, exits in (("BEFORE", exits_one - exits_two), ("AFTER", exits_two - exits_one)):
        if exits:
            verb = "is" if len(exits) == 1 else "are"
            notes.append(f"{_exits(exits)} {verb} in {name} only and left out.")
    info = adapter_info(two)
    if info and not set(info.exits) & set(common):
        notes.append(f"No trained exit ({ranges(info.exits)}) is in both runs, so the verdict is on the others.")
    return Pair(one, two, common, scores, info, (*notes, *_oddities(one, two)))


def read_run(folder: Path) -> Run:
    """Raises UserError where the run is missing, broken, unfinished or not judged."""
    if not (folder / "config.json").is_file():
        raise UserError(f"{folder} is not a run directory (no config.json); expected one made by `exitwise audit`")
    config = read_json(folder / "config.json", "judge", "model", "seed", *SETTINGS)
    if not (folder / "plan.json").is_file():
        raise UserError(f"{folder} holds no answers yet (no plan.json); finish it with the command that began it")
    plan = read_json(folder / "plan.json", "n_requests", "default_exit", "n_blocks")
    completions = read_records(folder / "completions.jsonl", Completion)
    if len(completions) != plan["n_requests"] or not completions:
        raise UserError(
            f"{folder} holds {len(completions)} of {plan['n_requests']} answers; "
            "finish it with the command that began it"
        )
    samples = {sample.id: sample for sample in read_records(folder / "samples.jsonl", Sample)}
    texts = {(c.sample, c.exit): c.text for c in completions}
    strangers = sorted({sample for sample, _ in texts} - samples.keys())
    if strangers:
        raise UserError(
            f"{folder}/completions.jsonl answers samples that samples.jsonl lacks (first: {strangers[0]!r}); restore it"
        )
    env, metrics = (
        read_json(path) if (path := folder / name).is_file() else {} for name in ("env.json", "metrics.json")
    )
    judge = str(metrics.get("judge") or config["judge"]).split(",")[0].strip()
    verdicts = read_records(folder / f"verdicts.{judge}.jsonl", Verdict)
    labels = {(v.sample, v.exit): v.label for v in verdicts if v.judge == judge}
    missing = len(texts.keys() - labels.keys())
    if missing:
        raise UserError(
            f"{folder} lacks verdicts of the judge {judge!r} on {missing} of {len(texts)} answers; "
            f"give `exitwise judge {folder}` first"
        )
    readings = read_all(list(samples.values()), completions, verdicts, judge)
    asked = {key: sample for key, sample in samples.items() if control_of(sample) is None}  # controls pair with nothing
    cells = [cell for cell in texts if cell[0] in asked]
    return Run(
        folder,
        config,
        plan,
        env,
        asked,
        {cell: texts[cell] for cell in cells},
        {cell: labels[cell] for cell in cells},
        {cell: readings[cell[1]][cell[0]] for cell in cells},
        judge,
        str(metrics.get("caveat", "")),
    )


def _check_settings(one: Run, two: Run) -> None:
    """The same judge, decoding, encoder depth, default exit and images."""
    if one.judge != two.judge:
        raise UserError(
            f"{one.folder} was judged by {one.judge!r}, {two.folder} by {two.judge!r}; audit both with the same --judge"
        )
    for name in SETTINGS:
        if one.config[name] != two.config[name]:
            raise UserError(
                f"{name} is {one.config[name]} in {one.folder} and {two.config[name]} in {two.folder}; "
                f"audit both with the same --{name.replace('_', '-')}"
            )
    for name, words in (("n_blocks", "number of encoder blocks"), ("default_exit", "default exit")):
        if one.plan[name] != two.plan[name]:
            raise UserError(
                f"the {words} is {one.plan[name]} in {one.folder} and {two.plan[name]} in {two.folder}; "
                "compare two audits of one model"
            )


def _check_samples(one: Run, two: Run) -> None:
    """The same ids, each with the same prompt, kind, image and accepted answers, and images that look the same."""
    for here, there in ((one, two), (two, one)):
        absent = sorted(here.samples.keys() - there.samples.keys())
        if absent:
            raise UserError(
                f"{there.folder} lacks {len(absent)} of the {len(here.samples)} samples of {here.folder} "
                f"(first: {absent[0]!r}); audit both with the same prompts, images, --limit, --vqa and --seed"
            )
    for key, sample in one.samples.items():
        for field in SAME_SAMPLE:
            if getattr(sample, field) != getattr(two.samples[key], field):
                raise UserError(
                    f"sample {key!r} has another {field} in {two.folder} than in {one.folder}; "
                    "audit both with the same prompts and images"
                )
    pictures = [run.config.get("images_sha256") for run in (one, two)]
    if None not in pictures and pictures[0] != pictures[1]:
        raise UserError(
            f"the images of {one.folder} and {two.folder} differ under the same names; use the same --images"
        )


def _oddities(one: Run, two: Run) -> list[str]:
    """What does not forbid the comparison, but should be known when it is read."""
    notes = []
    if one.config["model"] != two.config["model"]:
        notes.append(f"The models have different names: {one.config['model']!r} and {two.config['model']!r}.")
    if one.plan.get("model_sha256") and one.plan["model_sha256"] == two.plan.get("model_sha256"):
        notes.append("Both runs asked the same weights.")
    if one.config.get("adapter") and not two.config.get("adapter"):
        notes.append("Only BEFORE has an adapter; the two runs may be swapped.")
    elif one.config.get("adapter") and one.config["adapter"] != two.config["adapter"]:
        notes.append(
            f"BEFORE has an adapter too ({one.config['adapter']!r}): the differences are those between two adapters."
        )
    for name in ("device", "dtype"):
        values = one.env.get(name), two.env.get(name)
        if None not in values and values[0] != values[1]:
            notes.append(f"The {name} differs: {values[0]} before, {values[1]} after.")
    return notes


# Numeric scores


def _common_scores(before: Path, after: Path) -> tuple[dict[str, Scores], list[str]]:
    """The scorers of both runs, and notes on those that only one has or that differ under one name."""
    found = [
        {path.name.removeprefix("scores.").removesuffix(".jsonl"): path for path in folder.glob("scores.*.jsonl")}
        for folder in (before, after)
    ]
    common: dict[str, Scores] = {}
    notes: list[str] = []
    for name in sorted(found[0].keys() | found[1].keys()):
        if name not in found[0] or name not in found[1]:
            notes.append(f"Scores of {name!r} are in {'BEFORE' if name in found[0] else 'AFTER'} only and left out.")
            continue
        (one, stamps_one), (two, stamps_two) = (read_scores(paths[name]) for paths in found)
        about = [read_json(path) if (path := paths[name].with_suffix(".json")).is_file() else {} for paths in found]
        if stamps_one != stamps_two or about[0].get("settings") != about[1].get("settings"):
            notes.append(f"Scores of {name!r} come from different scorers, versions or settings and are left out.")
            continue
        by_name = next((quantity for quantity in QUANTITIES if name.startswith(quantity)), "")
        common[name] = Scores(one, two, str(about[1].get("quantity", by_name)))
    return common, notes


def read_scores(path: Path) -> tuple[dict[Cell, float], set[tuple[str, ...]]]:
    """Values by (sample, exit) of a scores.<scorer>.jsonl, and who gave them. A null value is not scored and absent.

    Raises:
        UserError: a line is no score. A last line without its newline is passed over, as in `runs.read_records`.
    """
    values: dict[Cell, float] = {}
    stamps: set[tuple[str, ...]] = set()
    for number, line in enumerate(path.read_bytes().split(b"\n")[:-1], start=1):
        try:
            row = json.loads(line)
            cell, value = (str(row["sample"]), Exit.of(row["exit"])), row["value"]
            stamps.add(tuple(str(row.get(name, "")) for name in STAMPS))
            if value is not None:
                values[cell] = float(value)
                if not isfinite(values[cell]):
                    raise ValueError(f"value {value}")
        except (ValueError, TypeError, KeyError, AttributeError) as error:
            raise UserError(
                f"{path}, line {number}: not a score ({error!r}); expected sample, exit and a number or null as value"
            ) from None
    return values, stamps


# What alignment said of its adapter


def adapter_info(run: Run) -> AdapterInfo | None:
    """From adapter_info in the run's config.json, else from exitwise.json in its adapter's folder; None without.

    Raises:
        UserError: it is there but not {"method": text, "exits": [numbers], "held_out": [numbers]}.
    """
    if run.config.get("adapter_info") is not None:
        return _parse_info(run.config["adapter_info"], f"adapter_info in {run.folder / 'config.json'}")
    if not run.config.get("adapter"):
        return None
    folder = Path(run.config["adapter"])
    for path in (folder / "exitwise.json", folder / "adapter" / "exitwise.json"):
        if path.is_file():
            return _parse_info(read_json(path), str(path))
    return None


def _parse_info(value: Any, where: str) -> AdapterInfo:
    row = value if isinstance(value, dict) else {}
    trained, held_out = (row.get(name) or [] for name in ("exits", "held_out"))
    lists = isinstance(trained, list) and isinstance(held_out, list)
    if not lists or not trained or not all(type(exit) is int for exit in trained + held_out):
        raise UserError(f'{where} names no exits; expected {{"method": text, "exits": [8], "held_out": [5]}}')
    return AdapterInfo(str(row.get("method", "")), tuple(trained), tuple(e for e in held_out if e not in trained))


def _exits(exits: Iterable[Exit]) -> str:
    exits = list(exits)
    return f"Exit{'' if len(exits) == 1 else 's'} {ranges(exits)}"
