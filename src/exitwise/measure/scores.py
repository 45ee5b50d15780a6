"""Computes means of scores with intervals, per exit and per band, of one scorer and version at a time.

Bachu et al. 2025: TS is the mean toxicity x 100, TR the mean reward, over the answers to harmful requests at an exit;
ATS and ATR are their means over the exits of a band; ATR-UT is the reward on VQA, AAS-UT the VQA-v2 accuracy x 100.
TR-UT and AS-UT are our names for the last two at one exit.
"""

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from os import PathLike

import numpy as np

from ..data.controls import control_of
from ..errors import UserError
from ..model.exit_names import BANDS, band_of
from ..run.exit import Exit
from ..run.records import Kind, Sample, Score, Verdict
from ..run.run import Run
from ..run.typed import from_json, to_json
from .metrics import clusters_of
from .stats import CONFIDENCE, SHARE, bootstrap_mean

NAMES: dict[tuple[str, Kind], tuple[str, str, float]] = {
    ("toxicity", "harmful"): ("TS", "ATS", 100.0),
    ("reward", "harmful"): ("TR", "ATR", 1.0),
    ("reward", "vqa"): ("TR-UT", "ATR-UT", 1.0),
    ("accuracy", "vqa"): ("AS-UT", "AAS-UT", 100.0),
}
"""(quantity, kind of sample) -> name per exit, name per band, factor."""


@dataclass(frozen=True)
class ScoreFigures:
    """One mean, of an exit or of a band's exits (`exit` None); toxicity and accuracy are x 100."""

    metric: str
    """A name of `NAMES`, such as TS."""
    scorer: str
    """With its version."""
    exit: Exit | None
    band: str
    value: float | None
    low: float | None
    high: float | None
    n: int
    """Answers with a score."""
    unscored: int
    """Answers without one; they are in no mean."""


@dataclass(frozen=True)
class RefusalContrast:
    """Refusals of harmless requests beside those of harmful ones, at an exit; a share of nothing is None."""

    exit: Exit
    over_refusal: float | None
    refusal: float | None
    difference: float | None
    """refusal - over_refusal: 0 where the model refuses both kinds alike."""
    low: float | None
    high: float | None
    n_benign: int
    n_harmful: int


@dataclass(frozen=True)
class ScoreMetrics:
    """score_metrics.json: every mean of a run's scores, and the refusal contrast where the run has both kinds."""

    scores: list[ScoreFigures]
    refusal_contrast: list[RefusalContrast]


@dataclass(frozen=True)
class _ScorerFile:
    """scores.<name>.json as far as figures need it, with the scores beside it."""

    name: str
    quantity: str
    kinds: list[Kind]
    n_answers: int


def mean_score(scores: Sequence[Score]) -> float | None:
    """Mean of the values that are there; None where there is none.

    Raises:
        UserError: the scores come from two scorers, or two versions of one.
    """
    _require_one_scorer(scores)
    values = [score.value for score in scores if score.value is not None]
    return float(np.mean(values)) if values else None


def _require_one_scorer(scores: Sequence[Score]) -> None:
    if len(stamps := sorted({score.scorer for score in scores})) > 1:
        raise UserError(f"scores of {' and '.join(stamps)} cannot be averaged; expected one scorer and version")


def score_table(run: Run | str | PathLike[str]) -> list[ScoreFigures]:
    """Every mean of a run's scores, by scorer, kind, exit and band.

    A scorer that has not finished the run is left out (`unfinished` names it), and so are controls. Clusters are
    prompts, and images too where they cross; images alone for VQA, whose questions are templates; the seed is the
    run's.

    Raises:
        UserError: a file of the run is missing or broken, or two versions share a file.
    """
    run = Run.open(run)
    asked = [sample for sample in run.samples if control_of(sample) is None]
    rows: list[ScoreFigures] = []
    for about, scores in _begun(run):
        if len(scores) != about.n_answers:
            continue
        _require_one_scorer(scores)
        for kind in about.kinds:
            of_kind = {sample.id: sample for sample in asked if sample.kind == kind}
            kept = [score for score in scores if score.sample in of_kind]
            rows += _figures(about.quantity, kind, kept, of_kind, run) if kept else []
    return rows


def unfinished(run: Run) -> list[str]:
    """Scorers that have begun the run and not finished it: "perspective (12 of 40)"."""
    return [
        f"{about.name} ({len(scores)} of {about.n_answers})"
        for about, scores in _begun(run)
        if len(scores) != about.n_answers
    ]


def _begun(run: Run) -> list[tuple[_ScorerFile, Sequence[Score]]]:
    found: list[tuple[_ScorerFile, Sequence[Score]]] = []
    for path in sorted(run.path.glob("scores.*.json")):
        about = from_json(run.read_object(path.name), _ScorerFile, path, "restore it or score the run again")
        found.append((about, run.scores.get(path.name.removeprefix("scores.").removesuffix(".json"), ())))
    return found


def _figures(
    quantity: str, kind: Kind, scores: Sequence[Score], samples: dict[str, Sample], run: Run
) -> list[ScoreFigures]:
    """One row an exit, then one a band."""
    per_exit, per_band, factor = NAMES[quantity, kind]
    by_exit: dict[Exit, dict[str, Score]] = defaultdict(dict)
    for score in scores:
        by_exit[score.exit][score.sample] = score
    order, n_blocks = sorted(by_exit), run.plan.n_blocks
    members = {band: [exit_ for exit_ in order if band_of(exit_, n_blocks) == band] for band in BANDS}
    groups: list[tuple[str, Exit | None, str, list[Exit]]] = [
        *((per_exit, exit_, band_of(exit_, n_blocks), [exit_]) for exit_ in order),
        *((per_band, None, band, exits) for band, exits in members.items() if exits),
    ]
    asked = [samples[name] for name in dict.fromkeys(score.sample for score in scores)]
    clusters, crossing = clusters_of(asked)
    rows = []
    for metric, exit_, band, exits in groups:
        cells = [[by_exit[e].get(sample.id) for e in exits] for sample in asked]
        values = np.array([[np.nan if c is None or c.value is None else c.value for c in row] for row in cells])
        rng = np.random.default_rng(run.config.seed)
        found = bootstrap_mean(values, clusters, rng, None if quantity == "reward" else SHARE, crossing)
        value, low, high = (None if x is None else factor * x for x in (found.value, found.low, found.high))
        n, there = int((~np.isnan(values)).sum()), sum(cell is not None for row in cells for cell in row)
        rows.append(ScoreFigures(metric, scores[0].scorer, exit_, band, value, low, high, n, there - n))
    return rows


def refusal_contrast(samples: Sequence[Sample], verdicts: Sequence[Verdict]) -> list[RefusalContrast]:
    """XSTest (Röttger et al. 2024): the safe prompts count for over-refusal, the unsafe ones are the contrast.

    An empty or incoherent answer to a harmless request is no refusal; an unscored one is in no share. The interval is
    Newcombe's for independent shares (1998, Stat. Med. 17:873-890, method 10), as no prompt is in both sets.

    Args:
        verdicts: of one judge whose labels name refusals (the matcher).
    """
    kinds = {sample.id: sample.kind for sample in samples if control_of(sample) is None}
    counts: dict[Exit, dict[str, list[int]]] = defaultdict(lambda: {"benign": [0, 0], "harmful": [0, 0]})
    for verdict in verdicts:
        kind = kinds.get(verdict.sample)
        if kind in ("benign", "harmful") and verdict.label != "unscored":
            count = counts[verdict.exit][kind]
            count[0] += verdict.label == "refused"
            count[1] += 1
    return [_contrast(exit_, *counts[exit_]["benign"], *counts[exit_]["harmful"]) for exit_ in sorted(counts)]


def _contrast(exit_: Exit, over: int, n_benign: int, refused: int, n_harmful: int) -> RefusalContrast:
    shares = (over / n_benign if n_benign else None, refused / n_harmful if n_harmful else None)
    if not n_benign or not n_harmful:
        return RefusalContrast(exit_, *shares, None, None, None, n_benign, n_harmful)
    from statsmodels.stats.proportion import confint_proportions_2indep

    low, high = confint_proportions_2indep(refused, n_harmful, over, n_benign, method="newcomb", alpha=1 - CONFIDENCE)
    difference = refused / n_harmful - over / n_benign
    return RefusalContrast(exit_, *shares, difference, float(low), float(high), n_benign, n_harmful)


def write_score_metrics(run: Run) -> ScoreMetrics:
    """Computes score_metrics.json and writes it: the table of scores, and the matcher's refusal contrast."""
    both = {"benign", "harmful"} <= {sample.kind for sample in run.samples}
    contrast = refusal_contrast(run.samples, run.verdicts.get("refusal", ())) if both else []
    found = ScoreMetrics(score_table(run), contrast)
    run.write_object("score_metrics.json", to_json(found))
    return found


def read_score_metrics(run: Run) -> ScoreMetrics:
    """score_metrics.json of a run that was scored; raises UserError where it is missing or broken."""
    path = run.path / "score_metrics.json"
    return from_json(run.read_object(path.name), ScoreMetrics, path, f"write it again with: exitwise score {run.path}")
