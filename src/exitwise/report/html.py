"""Renders the report of a run: one offline HTML file that first answers "at which exit may my device stop?".

Answers are hostile text. They are stored as JSON without any `<`, `>` or `&`, are put on the page by `textContent`
alone, and only when a button is clicked (see transcripts.py). The content security policy allows one script, whose hash
it names, and no request to any server.
"""

import base64
import hashlib
import json
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from functools import partial
from importlib.resources import files
from math import floor, log10

from jinja2 import Environment, FunctionLoader, StrictUndefined
from markupsafe import Markup, escape

from ..measure import calibration, pareto
from ..measure.answer import UTILITY_LOSS
from ..model import exit_names
from ..run.exit import Exit
from ..run.figures import Estimate, ExitFigures, Interval, Metrics, PairedTest
from ..run.run import Run
from ..run.typed import Json
from . import scatter, svg
from .judges import judge_agreement
from .text import visible
from .transcripts import ANSWER_LIMIT, page_data

ABSENT = "not measured"


@dataclass(frozen=True)
class CostsSection:
    """What the exits cost, and the drawings of that section."""

    file: pareto.CostsFile
    found: pareto.Tradeoffs
    useful: tuple[float, float] | None
    """Smallest and largest utility; None where no exit has one."""
    wide: Markup
    narrow: Markup
    least: Markup
    most: Markup
    beaten: Markup


def render(run: Run, command: str) -> str:
    """report.html as text; the same run gives the same bytes.

    Args:
        command: the command line that repeats the audit.

    Raises:
        UserError: a file of the run is missing or broken.
    """
    metrics, judges = run.metrics, judge_agreement(run)
    calibrated = calibration.find_calibration(run, metrics.judge)
    if calibrated:
        calibrated = replace(calibrated, exits=calibration.correct(run, calibrated))
    transcripts = page_data(run, judges.splits if judges else {})
    marks = {row.exit: "may stop" if row.exit in metrics.answer.stop_at else row.standing for row in metrics.exits}
    timing = run.read_object("timing.json") or {}
    speed = timing.get("tokens_per_second")
    here = files(__package__)
    css, js, template = (here.joinpath(f"report.{end}").read_text(encoding="utf-8") for end in ("css", "js", "html.j2"))
    policy = (
        f"default-src 'none'; script-src '{digest(js)}'; style-src '{digest(css)}'; img-src data:; "
        "base-uri 'none'; form-action 'none'"
    )
    return (
        environment()
        .from_string(template)
        .render(
            css=Markup(css),
            js=Markup(js),
            policy=policy,
            icons=svg.ICONS,
            limit=ANSWER_LIMIT,
            loss=UTILITY_LOSS,
            m=metrics,
            marks=marks,
            useless=[exit for exit, mark in marks.items() if mark == "no less safe"],
            notice=run.config.notice,
            config=_flat({key: value for key, value in run.options.items() if key != "notice"}),
            env=_flat(run.read_object("env.json") or {}),
            phases=timing.get("phases", {}),
            speed={str(Exit.of(key)): rate for key, rate in speed.items()} if isinstance(speed, dict) else {},
            command=command,
            judges=judges,
            calibration=calibrated,
            judged_by=calibration.in_words(metrics.judge, calibrated),
            data=Markup(transcripts.json),
            shown=transcripts.shown,
            total=transcripts.total,
            costs=_costs(run, marks),
            **_curves(metrics, marks),
        )
    )


def environment() -> Environment:
    """Templates that escape what they print and make invisible characters visible, with the filters below."""
    env = Environment(
        autoescape=True,
        undefined=StrictUndefined,
        finalize=_finalize,
        trim_blocks=True,
        lstrip_blocks=True,
        loader=FunctionLoader(lambda name: files(__package__).joinpath(name).read_text("utf-8")),
    )
    env.filters.update(
        percent=percent,
        share=share,
        digits=digits,
        spread=spread,
        bounds=bounds,
        points=points,
        p_value=p_value,
        ranges=ranges,
        number=number,
        plain=plain,
        unbroken=unbroken,
    )
    return env


def digest(text: str) -> str:
    """Hash of a script or a style in the form of a content security policy."""
    return "sha256-" + base64.b64encode(hashlib.sha256(text.encode("utf-8")).digest()).decode("ascii")


def _finalize(value: object) -> object:
    """Makes printed text visible; only what this package wrote itself is Markup."""
    return value if isinstance(value, Markup) or not isinstance(value, str) else visible(value)


def _curves(metrics: Metrics, marks: Mapping[Exit, str]) -> dict[str, Markup]:
    """The curve twice, for a wide and for a narrow screen, and the keys of its legend."""
    label = "ASR, utility and over-refusal at each exit, and its standing. The table below holds the same numbers."
    points = [
        svg.CurvePoint(
            int(row.exit),
            marks[row.exit],
            {name: row.share(name) for name in svg.SERIES},
            _curve_note(row, marks[row.exit], metrics.n_blocks),
        )
        for row in sorted(metrics.exits, key=lambda row: row.exit)
        if not row.exit.is_set
    ]
    draw = partial(svg.curve, points=points, default_exit=metrics.default_exit, n_blocks=metrics.n_blocks, label=label)
    return {
        "wide": draw("wide"),
        "narrow": draw("narrow", size=(358, 330)),
        **{f"key_{name}": svg.key(name) for name in svg.SERIES},
    }


def _curve_note(row: ExitFigures, mark: str, n_blocks: int) -> str:
    lines = [f"{name} {_with_bounds(row.share(key))}" for key, name in svg.SERIES.items()]
    return "\n".join([f"exit {row.exit}/{n_blocks}: {mark}", *lines])


def _costs(run: Run, marks: Mapping[Exit, str]) -> CostsSection | None:
    """What an exit costs beside its figures, with the drawing; None for a run without costs.json."""
    costs, metrics = pareto.read_costs(run), run.metrics
    if costs is None:
        return None
    found = pareto.join(costs, metrics.exits, metrics.answer.stop_at)
    notes = {row.exit: _cost_note(row, marks[row.exit], metrics.n_blocks) for row in found.rows}
    useful = [row.utility.value for row in found.rows if row.utility.value is not None]
    label = f"Compute saved, ASR and utility of each exit. {found.sentence} The table below holds the same numbers."
    draw = partial(scatter.pareto, rows=found.rows, default_exit=metrics.default_exit, notes=notes, label=label)
    return CostsSection(
        costs,
        found,
        useful=(min(useful), max(useful)) if useful else None,
        wide=draw("wide"),
        narrow=draw("narrow", size=(358, 340)),
        least=scatter.dot("front", scatter.PALEST),
        most=scatter.dot("front", 1),
        beaten=scatter.dot("beaten", scatter.FADED),
    )


def _cost_note(row: pareto.ExitTradeoff, mark: str, n_blocks: int) -> str:
    lines = [
        f"exit {row.exit}/{n_blocks}: {mark}",
        f"compute saved {share(row.saved)}",
        f"ASR {_with_bounds(row.asr)}",
        f"Utility {_with_bounds(row.utility)}",
    ]
    return "\n".join([*lines, f"dominated by {ranges(row.by)}"] if row.by else lines)


def _with_bounds(interval: Interval) -> str:
    return f"{percent(interval.value)} {bounds(interval)}".rstrip()


def _flat(values: Mapping[str, Json]) -> dict[str, Json]:
    """Without one level of nesting: {"versions": {"torch": …}} becomes {"versions.torch": …}."""
    flat: dict[str, Json] = {}
    for key, value in values.items():
        flat |= {f"{key}.{inner}": v for inner, v in value.items()} if isinstance(value, dict) else {key: value}
    return flat


# Numbers as text


def percent(share: float | None) -> str:
    """8 %, or "not measured"; a value above zero is never printed as 0 %."""
    if share is None:
        return ABSENT
    return "<1 %" if 0 < share < 0.005 else f"{100 * share:.0f} %"


def share(value: float) -> str:
    """A share of compute with two significant digits, as savings of a large model's encoder are small: 4.5 %."""
    size = 100 * abs(value)
    return ("−" if value < 0 else "") + (f"{size:.1f}" if size >= 0.995 else digits(size, 2)) + " %"


def digits(value: float, n: int = 3) -> str:
    """At least n significant digits, without an exponent: 0.282, 13.0, 7,063."""
    if not value:
        return "0"
    return f"{value:,.{max(0, n - 1 - floor(log10(abs(value))))}f}"


def spread(quartiles: pareto.Quartiles) -> str:
    """Median and quartiles of seconds, in milliseconds: 122 (121–125)."""
    middle, low, high = (digits(1000 * seconds) for seconds in (quartiles.median, quartiles.low, quartiles.high))
    return f"{middle} ({low}–{high})"


def bounds(interval: Interval | Estimate) -> str:
    """(3–20) in percent; "" where nothing was measured. A band with one mixed cluster has a value and no limits."""
    if interval.value is None:
        return ""
    if interval.low is None or interval.high is None:
        return "(no interval)"
    return f"({100 * interval.low:.0f}–{100 * interval.high:.0f})"


def points(change: PairedTest | None) -> str:
    """A paired difference in percentage points: +12 (+3 to +20)."""
    if change is None:
        return ABSENT
    middle, low, high = (_signed(100 * value) for value in (change.difference, change.low, change.high))
    return f"{middle} ({low} to {high})"


def _signed(value: float) -> str:
    return "0" if round(value) == 0 else f"{value:+.0f}".replace("-", "−")


def p_value(p: float | None) -> str:
    if p is None:
        return "–"
    return "<0.001" if p < 0.001 else f"{p:.3f}"


def number(value: float | None) -> str:
    return ABSENT if value is None else f"{value:,.1f}"


def ranges(exits: Iterable[Exit]) -> str:
    """4–6, 9."""
    return exit_names.ranges(list(exits)).replace("-", "–") or "none"


def plain(value: Json) -> str:
    """A value of config.json or env.json."""
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)


def unbroken(text: str) -> Markup:
    """Sets ranges of exits with the dash of print, and keeps 0–2 and 70 % on one line."""
    text = re.sub(r"(\d)-(\d)", r"\1–\2", text)
    return Markup(re.sub(r"(\d+(?:–\d+| %))", r'<span class="nb">\1</span>', str(escape(visible(text)))))
