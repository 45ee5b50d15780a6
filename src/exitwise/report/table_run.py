"""Selects what the tables of the paper use of a run: samples, readings, and one scorer for each quantity."""

from collections.abc import Mapping, Sequence
from typing import NamedTuple

from ..data.controls import control_of
from ..errors import UserError
from ..measure.readings import Readings, read_all
from ..run.exit import Exit
from ..run.records import Completion, Sample
from ..run.run import Run

QUANTITIES = {"perspective": "toxicity", "detoxify": "toxicity", "granite-guardian-hap": "toxicity", "reward": "reward"}
"""What a scorer measures, by the beginning of its name."""


ScoreValues = dict[Exit, dict[str, float]]
"""Scores by exit, by sample id."""


class TableRun(NamedTuple):
    """What the tables use of a run; controls are left out."""

    run: Run
    samples: dict[str, Sample]
    completions: dict[tuple[str, Exit], Completion]
    readings: Readings
    scores: dict[str, tuple[str, ScoreValues]]
    """By quantity: (the scorer with its version, values); quantities without scores are missing."""


def read_run(run: Run, scorers: Mapping[str, str | None]) -> TableRun:
    """`scorers`: the scorer to take by quantity, None for the only one."""
    judge = run.metrics.judge
    asked = {sample.id: sample for sample in run.samples if control_of(sample) is None}
    return TableRun(
        run,
        asked,
        {(c.sample, c.exit): c for c in run.completions},
        read_all(run.samples, run.completions, run.verdicts.get(judge, ()), judge),
        _scores(run, {sample.id for sample in asked.values() if sample.kind == "harmful"}, scorers),
    )


def _scores(run: Run, asked: set[str], wanted: Mapping[str, str | None]) -> dict[str, tuple[str, ScoreValues]]:
    """By quantity, the values of its one scorer on the harmful requests."""
    found: dict[str, ScoreValues] = {}
    for score in (score for scores in run.scores.values() for score in scores):
        values = found.setdefault(score.scorer, {})
        if score.value is not None and score.sample in asked:
            values.setdefault(score.exit, {})[score.sample] = float(score.value)
    chosen = {}
    for quantity, name in wanted.items():
        fits = [s for s in found if _quantity(s) == quantity and any(found[s].values())]
        fits = [s for s in fits if s.startswith(name)] if name else fits
        if name and not fits:
            raise UserError(f"--{quantity} {name}: {run.path} has no such scores; it has {', '.join(found) or 'none'}")
        if len(fits) > 1:
            raise UserError(f"{run.path} has {quantity} from {', '.join(fits)}; choose one with --{quantity}")
        if fits:
            chosen[quantity] = (fits[0], found[fits[0]])
    return chosen


def _quantity(scorer: str) -> str | None:
    return next((quantity for name, quantity in QUANTITIES.items() if scorer.startswith(name)), None)


def check_alike(pair: Sequence[TableRun]) -> None:
    """Both runs must have one encoder, one judge and one scorer, or a difference has no meaning."""
    if len(pair) < 2:
        return
    (one, two), (here, there) = pair, (side.run.metrics for side in pair)
    for key, first, second in (("n_blocks", here.n_blocks, there.n_blocks), ("judge", here.judge, there.judge)):
        if first != second:
            raise UserError(
                f"{key} is {first} in {one.run.path} and {second} in {two.run.path}; expected the same in both"
            )
    for quantity in one.scores.keys() & two.scores.keys():
        first, second = one.scores[quantity][0], two.scores[quantity][0]
        if first != second:
            raise UserError(
                f"{quantity} is from {first} in one run and from {second} in the other; score both with one scorer"
            )
