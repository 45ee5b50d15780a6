"""Writes the tables of the paper from one or two runs, as Markdown, LaTeX or CSV.

    bands     Table 2: AASR, ATS and ATR by band, original → aligned, and their changes
    curves    Figure 3 in numbers: the same by exit
    examples  one request at the default exit, at the worst exit, and there after alignment
    costs     what each exit costs and saves, and which exits dominate it

What no scorer has scored is "not scored", never 0. Requests and answers are hostile text: every cell is escaped, and
answers are left out by default. Every mean has its interval; those of changes are paired.
"""

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from ..errors import UserError
from ..measure import pareto, stats
from ..measure.metrics import clusters_of
from ..measure.readings import outcome
from ..model.exit_names import ranges
from ..run.exit import Exit
from ..run.figures import BandFigures, Estimate, ExitFigures, Interval
from ..run.records import Sample
from ..run.run import Run
from .markup import RENDERERS, Table
from .table_run import TableRun, check_alike, read_run

WHAT = ("bands", "curves", "examples", "costs")
NOT_SCORED, NOT_MEASURED = "not scored", "not measured"
HIDDEN = "hidden (--with-answers shows it)"
ANSWER_LIMIT = 300
SCORED = (("toxicity", 100), ("reward", 1))
CHANGED = (("asr", 100, NOT_MEASURED), ("toxicity", 100, NOT_SCORED), ("reward", 1, NOT_SCORED))
"""Quantity, factor, and the text where there is none."""
NOTHING = Estimate(None, None, None)


def tables(
    run: Run | str | Path,
    after: Run | str | Path | None = None,
    *,
    what: str = "all",
    format: str = "md",
    with_answers: bool = False,
    toxicity: str | None = None,
    reward: str | None = None,
) -> str:
    """The tables of one run, or of a run and the same audit after alignment, as text.

    Args:
        run: a run or its directory.
        after: the run after alignment; its figures are printed after an arrow.
        what: bands, curves, examples, costs or all (costs where they were measured).
        format: md, latex or csv (one table at a time).
        with_answers: print the answers of the example; they may be harmful.
        toxicity: scorer of the toxicity if a run has several; the beginning of its name is enough.
        reward: scorer of the reward, likewise.

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
    pair = [read_run(Run.open(each), chosen) for each in (run, after) if each is not None]
    check_alike(pair)
    make = {
        "bands": lambda: bands(pair),
        "curves": lambda: curves(pair),
        "examples": lambda: examples(pair, with_answers),
        "costs": lambda: costs(pair[-1].run),
    }
    if what == "all" and pareto.read_costs(pair[-1].run) is None:
        del make["costs"]
    return "\n".join(RENDERERS[format](table()) for name, table in make.items() if what in (name, "all"))


def bands(pair: Sequence[TableRun]) -> Table:
    """Table 2 of Bachu et al. 2025: means over the exits of each band of each exit's mean, with intervals."""
    rows = []
    for band in pair[0].run.metrics.bands:
        exits = band.exits
        row = [f"{band.band} ({ranges(exits)})"]
        row.append(_arrow([_figure(_asr_of_band(run, band), 100, NOT_MEASURED) for run in pair]))
        row += [_arrow([_figure(_mean_score(run, key, exits), scale) for run in pair]) for key, scale in SCORED]
        if len(pair) == 2:
            row += [_figure(_change(pair, key, exits), scale, absent) for key, scale, absent in CHANGED]
        rows.append(row)
    header = ["Band", "AASR ↓ (%)", "ATS ↓", "ATR ↑"]
    header += ["AASR change", "ATS change", "ATR change"] if len(pair) == 2 else []
    title = "Bands of exits" + (", original → aligned" if len(pair) == 2 else "")
    return Table(title, header, rows, _note(pair))


def _asr_of_band(side: TableRun, band: BandFigures) -> Estimate:
    """ASR of the band with the same name and exits; nothing where the run has none."""
    alike = (b.asr for b in side.run.metrics.bands if (b.band, b.exits) == (band.band, band.exits))
    return next(alike, NOTHING)


def curves(pair: Sequence[TableRun]) -> Table:
    """Figure 3 in numbers: a row for each exit, a column for each figure of each run."""
    sides = [""] if len(pair) == 1 else [" (original)", " (aligned)"]
    names = ["ASR (%)", "ASR low", "ASR high", "ASR without gate (%)", "TS", "TS low", "TS high"]
    names += ["TR", "TR low", "TR high", "utility (%)", "over-refusal (%)"]
    header = ["exit"] + [name + side for side in sides for name in names]
    if len(pair) == 2:
        header += [f"{name} change{limit}" for name in ("ASR", "TS", "TR") for limit in ("", " low", " high")]
    by_exit = [side.run.metrics.by_exit for side in pair]
    rows = []
    for exit_ in sorted({exit_ for table in by_exit for exit_ in table}):
        cells = [str(exit_)]
        for side, table in zip(pair, by_exit, strict=True):
            cells += _curve_cells(side, exit_, table.get(exit_))
        if len(pair) == 2:
            cells += [cell for key, scale, no in CHANGED for cell in _limits(_change(pair, key, [exit_]), scale, no)]
        rows.append(cells)
    return Table("Every exit", header, rows, _note(pair))


def _curve_cells(side: TableRun, exit_: Exit, row: ExitFigures | None) -> list[str]:
    asr: Estimate | Interval = (row.asr_clustered or row.asr) if row else NOTHING
    cells = [_percent(value) for value in (asr.value, asr.low, asr.high)]
    cells.append(_percent(row.not_refused.value if row else None))
    cells += [cell for key, scale in SCORED for cell in _limits(_mean_score(side, key, [exit_]), scale)]
    return [*cells, *(_percent(row.share(key).value if row else None) for key in ("utility", "over_refusal"))]


def examples(pair: Sequence[TableRun], with_answers: bool) -> Table:
    """One request: at the default exit, at the exit with the largest ASR, and there after alignment.

    The first request, in the order of the run, that the default exit refuses and the worst one answers and, with a
    second run, the aligned model refuses there; where there is none, the first that meets fewer of these conditions.
    """
    first, default = pair[0], pair[0].run.metrics.default_exit
    worst = first.run.metrics.disparity.largest_exit
    header = ["", "Exit", "Verdict", "Answer"]
    key = _best_example(pair, default, worst) if worst is not None else None
    if key is None or worst is None:
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
    """What a request costs at each exit up to its first new token.

    Raises:
        UserError: the run was made without costs.
    """
    measured, metrics = pareto.read_costs(run), run.metrics
    if measured is None:
        raise UserError(f"{run.path} has no costs.json; expected a run made by `exitwise audit` without --no-costs")
    found = pareto.join(measured, metrics.exits, metrics.answer.stop_at)
    header = ["exit", "parameters", "bytes", "encoder FLOPs", "request FLOPs", "saved (%)"]
    header += ["encoder (ms)", "request (ms)", "ASR (%)", "utility (%)", "dominated by"]
    rows = []
    for row in found.rows:
        cost, seconds = row.costs, row.costs.seconds
        cells = [str(row.exit), str(cost.parameters["total"]), str(cost.bytes["total"])]
        cells += [str(cost.flops["encoder"]), str(cost.flops["total"]), _percent(row.saved)]
        cells += [f"{1000 * seconds[part].median:.3f}" if seconds else "" for part in ("encoder", "total")]
        cells += [_percent(row.asr.value), _percent(row.utility.value)]
        rows.append([*cells, "not compared" if row.by is None else ranges(row.by) or "none"])
    note = f"Judge: {metrics.judge}. {metrics.model} in {run.path.name}. {found.sentence}"
    return Table("What an exit costs", header, rows, f"{note} Point estimates of {found.of}.")


def _best_example(pair: Sequence[TableRun], default: Exit, worst: Exit) -> str | None:
    def through(run: TableRun, key: str, exit_: Exit) -> bool | None:
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


def _example(name: str, run: TableRun, key: str, exit_: Exit, with_answers: bool) -> list[str]:
    completion, reading = run.completions.get((key, exit_)), run.readings.get(exit_, {}).get(key)
    if completion is None or reading is None:
        return [name, str(exit_), "not asked", ""]
    text = completion.text if len(completion.text) <= ANSWER_LIMIT else completion.text[:ANSWER_LIMIT] + " …"
    return [name, str(exit_), reading.label, text if with_answers else HIDDEN]


# Figures with their intervals


def _mean_score(run: TableRun, quantity: str, exits: Sequence[Exit]) -> Estimate:
    """Mean over exits of each exit's mean, and its interval (score_metrics); nothing unless every exit has a score."""
    if not _scored(run, quantity, exits):
        return NOTHING
    asked = _harmful(run)
    clusters, crossing = clusters_of(asked)
    bounds = None if quantity == "reward" else stats.SHARE
    rng = np.random.default_rng(run.run.config.seed)
    return stats.bootstrap_mean(_values(run, quantity, asked, exits), clusters, rng, bounds, crossing=crossing)


def _change(pair: Sequence[TableRun], quantity: str, exits: Sequence[Exit]) -> Estimate:
    """Aligned minus original over the requests that both runs have scored, with a paired interval.

    Newcombe's for the ASR of one exit where every request is a cluster of its own, else the bootstrap over prompts (and
    images, where they cross), as `exitwise compare` has it.
    """
    before, after = pair
    if quantity != "asr" and not all(_scored(run, quantity, exits) for run in pair):
        return NOTHING
    asked = [s for s in _harmful(before) if s.id in after.samples and after.samples[s.id].prompt == s.prompt]
    old, new = (_values(run, quantity, asked, exits) for run in pair)
    clusters, crossing = clusters_of(asked)
    if quantity == "asr" and len(exits) == 1 and len(set(clusters)) == len(clusters):
        both = ~(np.isnan(old) | np.isnan(new))
        paired = stats.paired_difference(new[both].astype(bool).tolist(), old[both].astype(bool).tolist())
        return Estimate(paired.difference, paired.low, paired.high) if paired else NOTHING
    limits = None if quantity == "reward" else (-1.0, 1.0)
    rng = np.random.default_rng(before.run.config.seed)
    found = stats.paired_cluster_bootstrap(new, old, clusters, rng, limits=limits, crossing=crossing)
    return Estimate(found.difference, found.low, found.high)


def _harmful(run: TableRun) -> list[Sample]:
    return [sample for sample in run.samples.values() if sample.kind == "harmful"]


def _scored(run: TableRun, quantity: str, exits: Sequence[Exit]) -> bool:
    values = run.scores[quantity][1] if quantity in run.scores else {}
    return bool(exits) and all(values.get(exit_) for exit_ in exits)


def _values(run: TableRun, quantity: str, asked: Sequence[Sample], exits: Sequence[Exit]) -> np.ndarray:
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


def _note(pair: Sequence[TableRun]) -> str:
    runs = "; ".join(f"{side.run.metrics.model} in {side.run.path.name}" for side in pair)
    parts = [f"Judge: {pair[0].run.metrics.judge}. {runs}"]
    for quantity in ("toxicity", "reward"):
        names = {side.scores[quantity][0] for side in pair if quantity in side.scores}
        parts.append(f"{quantity}: {', '.join(sorted(names)) or NOT_SCORED}")
    parts.append("In brackets: 95 % intervals" + (", of changes paired over the same requests" * (len(pair) == 2)))
    return ". ".join(parts) + "."
