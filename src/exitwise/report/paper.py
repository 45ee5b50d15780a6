"""The tables of the paper from run directories, as Markdown, LaTeX or CSV.

    bands     Table 2: AASR, ATS and ATR by band, original → aligned, and how they changed
    curves    Figure 3 in numbers: the same by exit
    examples  one request at the default exit, at the worst one, and there after alignment
    costs     what each exit costs and saves, and which exits dominate it

Scores come from scores.<scorer>.jsonl, one object {sample, exit, scorer, value, reason} a line; what nobody scored is
"not scored", never 0. Requests and answers are hostile text: every cell is escaped, and answers are left out unless
asked for. Every mean has its interval, those of changes are paired.
"""

import json
from collections.abc import Mapping, Sequence
from math import isfinite
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from ..data.controls import control_of
from ..errors import UserError
from ..measure import pareto, stats
from ..measure.metrics import clusters_of
from ..measure.readings import Reading, outcome, read_all
from ..model.exit_names import ranges
from ..run import directory
from ..run.exit import Exit
from ..run.figures import Estimate
from ..run.records import Completion, Sample, Verdict
from .markup import RENDERERS, Table

WHAT = ("bands", "curves", "examples", "costs")
NOT_SCORED, NOT_MEASURED = "not scored", "not measured"
HIDDEN = "hidden (--with-answers shows it)"
ANSWER_LIMIT = 300
QUANTITIES = {"perspective": "toxicity", "detoxify": "toxicity", "granite-guardian-hap": "toxicity", "reward": "reward"}
"""What a scorer measures, by what its name begins with."""

SCORED = (("toxicity", 100), ("reward", 1))
CHANGED = (("asr", 100, NOT_MEASURED), ("toxicity", 100, NOT_SCORED), ("reward", 1, NOT_SCORED))
"""Quantity, factor, and what stands where there is none."""
LIMITS = ("value", "low", "high")

Values = dict[Exit, dict[str, float]]
"""Scores by exit, by sample id."""


class Run(NamedTuple):
    """What the tables need of a run directory."""

    folder: Path
    seed: int
    metrics: dict[str, Any]
    samples: dict[str, Sample]
    completions: dict[tuple[str, Exit], Completion]
    readings: dict[Exit, dict[str, Reading]]
    scores: dict[str, tuple[str, Values]]
    """By quantity: (the scorer with its version, values); quantities that nobody scored are missing."""


def make_tables(
    before: Path,
    after: Path | None = None,
    *,
    what: str = "all",
    format: str = "md",
    with_answers: bool = False,
    toxicity: str | None = None,
    reward: str | None = None,
) -> str:
    """The tables of one run, or of a run and the same one after alignment, as text.

    Args:
        what: bands, curves, examples, costs or all (costs where they were measured).
        format: md, latex or csv (one table at a time).
        toxicity, reward: the scorer of each where a run has several; the beginning of its name will do.

    Raises:
        UserError: not a finished run, runs that do not match, an unknown choice, or several scorers to choose from.
    """
    if what not in (*WHAT, "all"):
        raise UserError(f"--what got {what!r}; expected {', '.join(WHAT)} or all")
    if format not in RENDERERS:
        raise UserError(f"--format got {format!r}; expected {', '.join(RENDERERS)}")
    if format == "csv" and what == "all":
        raise UserError(f"--format csv holds one table; add --what {', --what '.join(WHAT)}")
    chosen = {"toxicity": toxicity, "reward": reward}
    pair = [read_run(folder, chosen) for folder in (before, after) if folder]
    _check_alike(pair)
    tables = {
        "bands": lambda: bands(pair),
        "curves": lambda: curves(pair),
        "examples": lambda: examples(pair, with_answers),
        "costs": lambda: costs(pair[-1]),
    }
    if what == "all" and pareto.read_costs(pair[-1].folder) is None:
        del tables["costs"]
    return "\n".join(RENDERERS[format](make()) for name, make in tables.items() if what in (name, "all"))


def read_run(folder: Path, scorers: Mapping[str, str | None]) -> Run:
    """Reads a run; `scorers` names the one to take by quantity, None for the only one."""
    metrics = directory.read_json(
        folder / "metrics.json", "exits", "bands", "judge", "default_exit", "n_blocks", "model"
    )
    samples = directory.read_records(folder / "samples.jsonl", Sample)
    completions = directory.read_records(folder / "completions.jsonl", Completion)
    judge = metrics["judge"]
    verdicts = directory.read_records(folder / f"verdicts.{judge}.jsonl", Verdict)
    return Run(
        folder,
        (directory.read_json(config) if (config := folder / "config.json").exists() else {}).get("seed", 0),
        metrics,
        {s.id: s for s in samples if control_of(s) is None},
        {(c.sample, c.exit): c for c in completions},
        read_all(samples, completions, verdicts, judge),
        _scores(folder, {s.id for s in samples if s.kind == "harmful" and control_of(s) is None}, scorers),
    )


def _scores(folder: Path, asked: set[str], wanted: Mapping[str, str | None]) -> dict[str, tuple[str, Values]]:
    """By quantity, the values of its one scorer over the harmful requests."""
    found: dict[str, Values] = {}
    for path in sorted(folder.glob("scores.*.jsonl")):
        for row in _score_lines(path):
            values = found.setdefault(str(row["scorer"]), {})
            if row["value"] is not None and row["sample"] in asked:
                values.setdefault(row["exit"], {})[row["sample"]] = float(row["value"])
    chosen = {}
    for quantity, name in wanted.items():
        fits = [s for s in found if _quantity(s) == quantity and any(found[s].values())]
        fits = [s for s in fits if s.startswith(name)] if name else fits
        if name and not fits:
            raise UserError(f"--{quantity} {name}: {folder} has no such scores; it has {', '.join(found) or 'none'}")
        if len(fits) > 1:
            raise UserError(f"{folder} has {quantity} from {', '.join(fits)}; choose one with --{quantity}")
        if fits:
            chosen[quantity] = (fits[0], found[fits[0]])
    return chosen


def _quantity(scorer: str) -> str | None:
    return next((quantity for name, quantity in QUANTITIES.items() if scorer.startswith(name)), None)


def _score_lines(path: Path) -> list[dict[str, Any]]:
    rows = []
    for number, line in enumerate(path.read_bytes().split(b"\n")[:-1], start=1):
        try:
            row = json.loads(line)
            value = row["value"]
            if type(row["exit"]) is not int or (value is not None and (type(value) is bool or not isfinite(value))):
                raise ValueError("value or exit is no number")
            rows.append({key: row[key] for key in ("sample", "exit", "scorer", "value")})
        except (ValueError, TypeError, KeyError) as error:
            raise UserError(f"{path}, line {number}: not a score ({error}); restore the file") from None
    return rows


def _check_alike(pair: Sequence[Run]) -> None:
    """Original and aligned must be of one encoder, one judge, one scorer: else the arrow means nothing."""
    if len(pair) < 2:
        return
    for key in ("n_blocks", "judge"):
        values = [run.metrics[key] for run in pair]
        if values[0] != values[1]:
            raise UserError(
                f"{key} is {values[0]} in {pair[0].folder} and {values[1]} in {pair[1].folder}; expected the same"
            )
    for quantity in pair[0].scores.keys() & pair[1].scores.keys():
        names = [run.scores[quantity][0] for run in pair]
        if names[0] != names[1]:
            raise UserError(
                f"{quantity} is from {names[0]} in one run and from {names[1]} in the other; score both alike"
            )


def bands(pair: Sequence[Run]) -> Table:
    """Table 2 of Bachu et al. 2025: means over the exits of each band of each exit's mean, with intervals."""
    rows = []
    for band in pair[0].metrics["bands"]:
        name, exits = band["band"], band["exits"]
        others = [
            next((b for b in run.metrics["bands"] if (b["band"], b["exits"]) == (name, exits)), None) for run in pair
        ]
        shares = [Estimate(*(b["asr"][k] for k in LIMITS)) if b else Estimate(None, None, None) for b in others]
        row = [f"{name} ({ranges(exits)})", _arrow([_figure(share, 100, NOT_MEASURED) for share in shares])]
        row += [_arrow([_figure(_mean_score(run, key, exits), scale) for run in pair]) for key, scale in SCORED]
        if len(pair) == 2:
            row += [_figure(_change(pair, key, exits), scale, absent) for key, scale, absent in CHANGED]
        rows.append(row)
    header = ["Band", "AASR ↓ (%)", "ATS ↓", "ATR ↑"]
    header += ["AASR change", "ATS change", "ATR change"] if len(pair) == 2 else []
    title = "Bands of exits" + (", original → aligned" if len(pair) == 2 else "")
    return Table(title, header, rows, _note(pair))


def curves(pair: Sequence[Run]) -> Table:
    """Figure 3 in numbers: a row an exit, each figure of each run in a column of its own."""
    sides = [""] if len(pair) == 1 else [" (original)", " (aligned)"]
    names = ["ASR (%)", "ASR low", "ASR high", "ASR without gate (%)", "TS", "TS low", "TS high"]
    names += ["TR", "TR low", "TR high", "utility (%)", "over-refusal (%)"]
    header = ["exit"] + [name + side for side in sides for name in names]
    if len(pair) == 2:
        header += [f"{name} change{limit}" for name in ("ASR", "TS", "TR") for limit in ("", " low", " high")]
    by_exit = [{row["exit"]: row for row in run.metrics["exits"]} for run in pair]
    rows = []
    for exit_ in sorted({exit_ for table in by_exit for exit_ in table}):
        cells = [str(exit_)]
        for run, table in zip(pair, by_exit, strict=True):
            row = table.get(exit_)
            asr = (row["asr_clustered"] if row.get("asr_clustered") else row["asr"]) if row else {}
            cells += [_percent(asr.get(key)) for key in LIMITS]
            cells += [_percent(row["not_refused"]["value"] if row else None)]
            cells += [cell for key, scale in SCORED for cell in _limits(_mean_score(run, key, [exit_]), scale)]
            cells += [_percent(row[key]["value"] if row else None) for key in ("utility", "over_refusal")]
        if len(pair) == 2:
            cells += [cell for key, scale, no in CHANGED for cell in _limits(_change(pair, key, [exit_]), scale, no)]
        rows.append(cells)
    return Table("Every exit", header, rows, _note(pair))


def examples(pair: Sequence[Run], with_answers: bool) -> Table:
    """One request: at the default exit, at the exit with the largest ASR, and there after alignment.

    The first request, in the order of the run, that the default exit refuses and the worst one lets through and, with
    a second run, the aligned model refuses there; where there is none, the first that meets fewer of these, in turn.
    """
    first, default = pair[0], pair[0].metrics["default_exit"]
    worst = first.metrics["disparity"]["largest_exit"]
    header = ["", "Exit", "Verdict", "Answer"]
    key = _telling(pair, default, worst) if worst is not None else None
    if key is None:
        return Table("An example", header, [], "No request was let through at any exit.")
    rows = [
        _example("default exit", first, key, default, with_answers),
        _example("worst exit", first, key, worst, with_answers),
    ]
    if len(pair) == 2:
        rows.append(_example("aligned, worst exit", pair[1], key, worst, with_answers))
    sample = first.samples[key]
    return Table("An example", header, rows, f"Request: {sample.prompt} (image: {sample.image or 'none'})")


def costs(run: Run) -> Table:
    """What a request costs at each exit up to its first new token; of a pair, in the second run.

    Raises:
        UserError: the run was made without costs.
    """
    measured = pareto.read_costs(run.folder)
    if measured is None:
        raise UserError(f"{run.folder} has no costs.json; expected a run made by `exitwise audit` without --no-costs")
    found = pareto.join(measured, run.metrics)
    header = ["exit", "parameters", "bytes", "encoder FLOPs", "request FLOPs", "saved (%)"]
    header += ["encoder (ms)", "request (ms)", "ASR (%)", "utility (%)", "dominated by"]
    rows = []
    for row in found["rows"]:
        seconds = row["seconds"] or {}
        cells = [str(row["exit"]), *(str(row[key]["total"]) for key in ("parameters", "bytes"))]
        cells += [str(row["flops"][part]) for part in ("encoder", "total")] + [_percent(row["saved"])]
        cells += [f"{1000 * seconds[part]['median']:.3f}" if seconds else "" for part in ("encoder", "total")]
        cells += [_percent(row[key]["value"]) for key in ("asr", "utility")]
        rows.append([*cells, "not compared" if row["by"] is None else ranges(row["by"]) or "none"])
    note = f"Judge: {run.metrics['judge']}. {run.metrics['model']} in {run.folder.name}. {found['sentence']}"
    return Table("What an exit costs", header, rows, f"{note} Point estimates of {found['of']}.")


def _telling(pair: Sequence[Run], default: Exit, worst: Exit) -> str | None:
    def through(run: Run, key: str, exit_: Exit) -> bool | None:
        reading = run.readings.get(exit_, {}).get(key)
        return outcome("asr", run.samples[key], reading) if reading and key in run.samples else None

    best: tuple[int, str] | None = None
    for key, sample in pair[0].samples.items():
        if sample.kind != "harmful" or not through(pair[0], key, worst):
            continue
        points = 2 * (through(pair[0], key, default) is False)
        points += len(pair) == 2 and key in pair[1].samples and through(pair[1], key, worst) is False
        if best is None or points > best[0]:
            best = points, key
    return best[1] if best else None


def _example(name: str, run: Run, key: str, exit_: Exit, with_answers: bool) -> list[str]:
    completion, reading = run.completions.get((key, exit_)), run.readings.get(exit_, {}).get(key)
    if completion is None or reading is None:
        return [name, str(exit_), "not asked", ""]
    text = completion.text if len(completion.text) <= ANSWER_LIMIT else completion.text[:ANSWER_LIMIT] + " …"
    return [name, str(exit_), reading.label, text if with_answers else HIDDEN]


# Figures with their intervals


def _mean_score(run: Run, quantity: str, exits: Sequence[Exit]) -> Estimate:
    """Mean over exits of each exit's mean, and its interval (score_metrics); nothing unless every exit has a score."""
    if not _scored(run, quantity, exits):
        return Estimate(None, None, None)
    asked = _harmful(run)
    clusters, crossing = clusters_of(asked)
    bounds = None if quantity == "reward" else stats.SHARE
    rng = np.random.default_rng(run.seed)
    return stats.bootstrap_mean(_values(run, quantity, asked, exits), clusters, rng, bounds, crossing=crossing)


def _change(pair: Sequence[Run], quantity: str, exits: Sequence[Exit]) -> Estimate:
    """Aligned minus original over the requests that both runs have scored, with a paired interval.

    Newcombe's for the ASR of one exit where every request is a cluster of its own, else the bootstrap over prompts (and
    images, where they cross), as `exitwise compare` has it.
    """
    before, after = pair
    if quantity != "asr" and not all(_scored(run, quantity, exits) for run in pair):
        return Estimate(None, None, None)
    asked = [s for s in _harmful(before) if s.id in after.samples and after.samples[s.id].prompt == s.prompt]
    old, new = (_values(run, quantity, asked, exits) for run in pair)
    clusters, crossing = clusters_of(asked)
    if quantity == "asr" and len(exits) == 1 and len(set(clusters)) == len(clusters):
        both = ~(np.isnan(old) | np.isnan(new))
        paired = stats.paired_difference(new[both].astype(bool).tolist(), old[both].astype(bool).tolist())
        return Estimate(paired.difference, paired.low, paired.high) if paired else Estimate(None, None, None)
    limits = None if quantity == "reward" else (-1.0, 1.0)
    rng = np.random.default_rng(before.seed)
    found = stats.paired_cluster_bootstrap(new, old, clusters, rng, limits=limits, crossing=crossing)
    return Estimate(found.difference, found.low, found.high)


def _harmful(run: Run) -> list[Sample]:
    return [sample for sample in run.samples.values() if sample.kind == "harmful"]


def _scored(run: Run, quantity: str, exits: Sequence[Exit]) -> bool:
    values = run.scores[quantity][1] if quantity in run.scores else {}
    return bool(exits) and all(values.get(exit_) for exit_ in exits)


def _values(run: Run, quantity: str, asked: Sequence[Sample], exits: Sequence[Exit]) -> np.ndarray:
    """(S, L) samples by exits, outcomes of ASR or scores; NaN where there is none."""
    values = np.full((len(asked), len(exits)), np.nan)
    for column, exit_ in enumerate(exits):
        for row, sample in enumerate(asked):
            found: float | None
            if quantity == "asr":
                reading = run.readings.get(exit_, {}).get(sample.id)
                found = None if reading is None else outcome("asr", sample, reading)
            else:
                found = run.scores[quantity][1].get(exit_, {}).get(sample.id)
            values[row, column] = np.nan if found is None else found
    return values


def _limits(found: Estimate, scale: int, absent: str = NOT_SCORED) -> list[str]:
    """Value, low, high as cells of their own."""
    if found.value is None:
        return [absent] * 3
    return ["no interval" if x is None else f"{scale * x:.2f}" for x in (found.value, found.low, found.high)]


def _figure(found: Estimate, scale: int, absent: str = NOT_SCORED) -> str:
    """ "20.00 (12.50 to 28.00)"."""
    value, low, high = _limits(found, scale, absent)
    if found.value is None:
        return value
    return f"{value} (no interval)" if found.low is None else f"{value} ({low} to {high})"


def _percent(share: float | None) -> str:
    return NOT_MEASURED if share is None else f"{100 * share:.2f}"


def _arrow(cells: Sequence[str]) -> str:
    return cells[0] if len(set(cells)) == 1 and cells[0] in (NOT_SCORED, NOT_MEASURED) else " → ".join(cells)


def _note(pair: Sequence[Run]) -> str:
    parts = [
        f"Judge: {pair[0].metrics['judge']}. "
        + "; ".join(f"{run.metrics['model']} in {run.folder.name}" for run in pair)
    ]
    for quantity in ("toxicity", "reward"):
        names = {run.scores[quantity][0] for run in pair if quantity in run.scores}
        parts.append(f"{quantity}: {', '.join(sorted(names)) or NOT_SCORED}")
    parts.append("In brackets: 95 % intervals" + (", of changes paired over the same requests" * (len(pair) == 2)))
    return ". ".join(parts) + "."
