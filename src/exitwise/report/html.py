"""The HTML report of a run: one offline file that first answers "at which exit may my device stop?".

Answers are hostile text. They travel as JSON in which no `<`, `>` or `&` is left, are put on the page by `textContent`
alone, and only when somebody asks for one (see transcripts.py); the content security policy lets nothing run but the
one script whose hash it names, and lets nothing be fetched.
"""

import base64
import hashlib
import json
import re
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial
from importlib.resources import files
from math import floor, log10
from pathlib import Path
from typing import Any

from jinja2 import Environment, StrictUndefined
from markupsafe import Markup, escape

from ..auditing.config import AuditConfig
from ..measure import calibration, pareto
from ..measure.answer import UTILITY_LOSS
from ..model import exit_names
from ..run.directory import read_json, write_atomic
from ..run.run import Run
from ..run.typed import to_json
from . import scatter, svg
from .judges import disagreement
from .text import visible
from .transcripts import ANSWER_LIMIT, page_data

ABSENT = "not measured"


def write_report(folder: Path) -> Path:
    """Writes report.html into the run directory; the same run gives the same bytes.

    Raises:
        UserError: a file of the run is missing or broken.
    """
    config, figures = read_json(folder / "config.json"), read_json(folder / "metrics.json")
    judges = disagreement(folder)
    shown, total, data = page_data(folder, figures, judges["splits"] if judges else {})
    for row in figures["exits"]:
        row["mark"] = "may stop" if row["exit"] in figures["answer"]["stop_at"] else row["standing"]
    path = folder / "report.html"
    run = Run.open(folder)
    if calibrated := calibration.find_calibration(run, figures["judge"]):
        calibrated = replace(calibrated, exits=calibration.correct(run, calibrated))
    timing = _optional(folder / "timing.json")
    write_atomic(
        path,
        _render(
            metrics=figures,
            notice=config.get("notice"),
            config=_flat({key: value for key, value in config.items() if key != "notice"}),
            env=_flat(_optional(folder / "env.json")),
            phases=timing.get("phases", {}),
            speed=timing.get("tokens_per_second", {}),
            command=_command(config),
            judges=judges,
            calibration=calibrated and to_json(calibrated),
            judged_by=calibration.in_words(figures["judge"], calibrated),
            data=Markup(data),
            shown=shown,
            total=total,
            costs=_costs(folder, figures),
            **_curves(figures),
        ),
    )
    return path


def _optional(path: Path) -> Any:
    return read_json(path) if path.exists() else {}


def _render(**values: Any) -> str:
    here = files(__package__)
    css, js, template = (here.joinpath(f"report.{end}").read_text(encoding="utf-8") for end in ("css", "js", "html.j2"))
    policy = (
        f"default-src 'none'; script-src '{digest(js)}'; style-src '{digest(css)}'; img-src data:; "
        "base-uri 'none'; form-action 'none'"
    )
    values |= {"icons": svg.ICONS, "limit": ANSWER_LIMIT, "loss": UTILITY_LOSS, "policy": policy}
    return environment().from_string(template).render(css=Markup(css), js=Markup(js), **values)


def environment() -> Environment:
    """Templates that escape whatever they print and make it visible, with the filters below."""
    env = Environment(
        autoescape=True, undefined=StrictUndefined, finalize=_finalize, trim_blocks=True, lstrip_blocks=True
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
        exit_name=str,
        number=number,
        plain=plain,
        unbroken=unbroken,
    )
    return env


def digest(text: str) -> str:
    """Of a script or a style, as a content security policy names it."""
    return "sha256-" + base64.b64encode(hashlib.sha256(text.encode("utf-8")).digest()).decode("ascii")


def _finalize(value: Any) -> Any:
    """What the template prints is made visible; only what this package wrote itself is Markup."""
    return value if isinstance(value, Markup) or not isinstance(value, str) else visible(value)


def _curves(figures: Mapping[str, Any]) -> dict[str, Markup]:
    """The curve twice, for a wide and for a narrow screen, and the keys of its legend."""
    notes = {
        row["exit"]: "\n".join(
            [f"exit {row['exit']}/{figures['n_blocks']}: {row['mark']}"]
            + [f"{name} {percent(row[key]['value'])} {bounds(row[key])}".rstrip() for key, name in svg.SERIES.items()]
        )
        for row in figures["exits"]
    }
    label = "ASR, utility and over-refusal at each exit, and its standing. The table below holds the same numbers."
    return {
        "wide": svg.curve("wide", figures, notes, label),
        "narrow": svg.curve("narrow", figures, notes, label, (358, 330)),
        **{f"key_{metric}": svg.key(metric) for metric in svg.SERIES},
    }


def _costs(folder: Path, figures: Mapping[str, Any]) -> dict[str, Any] | None:
    """What an exit costs, joined with what it is worth, and its figure; None for a run without costs.json."""
    costs = pareto.read_costs(folder)
    if costs is None:
        return None
    found = pareto.join(costs, figures)
    marks = {row["exit"]: row["mark"] for row in figures["exits"]}
    notes = {row["exit"]: _cost_note(row, marks[row["exit"]], figures["n_blocks"]) for row in found["rows"]}
    useful = [row["utility"]["value"] for row in found["rows"] if row["utility"]["value"] is not None]
    label = f"Compute saved, ASR and utility of each exit. {found['sentence']} The table below holds the same numbers."
    draw = partial(scatter.pareto, rows=found["rows"], default_exit=figures["default_exit"], notes=notes, label=label)
    return {
        **{key: value for key, value in costs.items() if key != "exits"},
        **found,
        "marks": marks,
        "useful": (min(useful), max(useful)) if useful else None,
        "wide": draw("wide"),
        "narrow": draw("narrow", size=(358, 340)),
        "least": scatter.dot("front", scatter.PALEST),
        "most": scatter.dot("front", 1),
        "beaten": scatter.dot("beaten", scatter.FADED),
    }


def _cost_note(row: Mapping[str, Any], mark: str, n_blocks: int) -> str:
    lines = [
        f"exit {row['exit']}/{n_blocks}: {mark}",
        f"compute saved {share(row['saved'])}",
        f"ASR {percent(row['asr']['value'])} {bounds(row['asr'])}".rstrip(),
        f"Utility {percent(row['utility']['value'])} {bounds(row['utility'])}".rstrip(),
    ]
    return "\n".join([*lines, f"dominated by {ranges(row['by'])}"] if row["by"] else lines)


def _command(config: Mapping[str, Any]) -> str:
    """The audit that made this run: what config.json says otherwise than the defaults of AuditConfig."""
    words = ["exitwise", "audit", str(config["model"])]
    for name, default in AuditConfig("").to_json().items():
        value = config.get(name, default)
        flag = name.replace("_", "-")
        if name == "model" or value == default:
            continue
        if name == "data":  # one set a flag
            words += [word for part in value for word in ("--data", str(part))]
        elif isinstance(value, bool):
            words.append(f"--{flag}" if value else f"--no-{flag}")
        else:
            words += [f"--{flag}", *map(str, value if isinstance(value, list) else (value,))]
    return shlex.join([*words, "--out", "runs/again"])


def _flat(values: Mapping[str, Any]) -> dict[str, Any]:
    """One level of nesting less: {"versions": {"torch": …}} is {"versions.torch": …}."""
    flat: dict[str, Any] = {}
    for key, value in values.items():
        flat |= {f"{key}.{inner}": v for inner, v in value.items()} if isinstance(value, dict) else {key: value}
    return flat


# Numbers, as a reader sees them


def percent(share: float | None) -> str:
    """8 %, or that it was not measured; what is not zero is never printed as 0."""
    if share is None:
        return ABSENT
    return "<1 %" if 0 < share < 0.005 else f"{100 * share:.0f} %"


def share(value: float) -> str:
    """A share of compute: 4.5 %, −0.38 %; savings of a large model's encoder are small."""
    size = 100 * abs(value)
    return ("−" if value < 0 else "") + (f"{size:.1f}" if size >= 0.995 else digits(size, 2)) + " %"


def digits(value: float, n: int = 3) -> str:
    """At least n significant digits, without an exponent: 0.282, 13.0, 7,063."""
    if not value:
        return "0"
    return f"{value:,.{max(0, n - 1 - floor(log10(abs(value))))}f}"


def spread(quartiles: Mapping[str, float]) -> str:
    """Median and quartiles of seconds, in milliseconds: 122 (121–125)."""
    middle, low, high = (digits(1000 * quartiles[key]) for key in ("median", "low", "high"))
    return f"{middle} ({low}–{high})"


def bounds(interval: Mapping[str, Any]) -> str:
    """(3–20), "" where nothing was measured; a band with one mixed cluster has a value and no limits."""
    if interval["value"] is None:
        return ""
    if interval["low"] is None:
        return "(no interval)"
    return f"({100 * interval['low']:.0f}–{100 * interval['high']:.0f})"


def points(change: Mapping[str, Any] | None) -> str:
    """A paired difference in percentage points: +12 (+3 to +20)."""
    if change is None or change["difference"] is None:
        return ABSENT
    middle, low, high = (_signed(100 * change[key]) for key in ("difference", "low", "high"))
    return f"{middle} ({low} to {high})"


def _signed(value: float) -> str:
    return "0" if round(value) == 0 else f"{value:+.0f}".replace("-", "−")


def p_value(p: float | None) -> str:
    if p is None:
        return "–"
    return "<0.001" if p < 0.001 else f"{p:.3f}"


def number(value: float | None) -> str:
    return ABSENT if value is None else f"{value:,.1f}"


def ranges(exits: Sequence[int]) -> str:
    """4–6, 9."""
    return exit_names.ranges(exits).replace("-", "–") or "none"


def plain(value: Any) -> str:
    """A value of config.json or env.json."""
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)


def unbroken(text: str) -> Markup:
    """Sets ranges of exits with the dash of print, and keeps 0–2 and 70 % on one line."""
    text = re.sub(r"(\d)-(\d)", r"\1–\2", text)
    return Markup(re.sub(r"(\d+(?:–\d+| %))", r'<span class="nb">\1</span>', str(escape(visible(text)))))
