"""Writes report.html into a run, with the command line that repeats its audit."""

import shlex
from collections.abc import Mapping
from pathlib import Path

from ..report import html
from ..run.directory import write_atomic
from ..run.run import Run
from ..run.typed import Json
from .config import AuditConfig


def write_report(run: Run | str | Path) -> Path:
    """Writes report.html into the run directory and returns its path; the same run gives the same bytes.

    Raises:
        UserError: a file of the run is missing or broken.
    """
    run = Run.open(run)
    path = run.path / "report.html"
    write_atomic(path, html.render(run, command_line(run.options)))
    return path


def command_line(options: Mapping[str, Json]) -> str:
    """The `exitwise audit` command for the options of a config.json; those with their default value are left out."""
    words = ["exitwise", "audit", str(options["model"])]
    for name, default in AuditConfig("").to_json().items():
        value = options.get(name, default)
        flag = name.replace("_", "-")
        if name == "model" or value == default:
            continue
        values = value if isinstance(value, list) else [value]
        if name == "data":  # the option is repeated for each set
            words += [word for part in values for word in ("--data", str(part))]
        elif isinstance(value, bool):
            words.append(f"--{flag}" if value else f"--no-{flag}")
        else:
            words += [f"--{flag}", *map(str, values)]
    return shlex.join([*words, "--out", "runs/again"])
