"""Two audits of the same questions, before and after alignment, laid side by side.

    pairing.py   two runs that may be paired, or the line that says why not
    figures.py   differences per exit, band and group, with intervals and tests
    verdict.py   one sentence, and failures by their names
    page.py      terminal, Markdown, HTML

Needs neither the model nor torch.
"""

from pathlib import Path
from typing import Any

from ..run.directory import write_json
from .figures import compare_pair
from .page import write_pages
from .pairing import read_pair
from .verdict import judge_comparison

__all__ = ["compare_runs"]


def compare_runs(before: Path, after: Path, out: Path) -> dict[str, Any]:
    """Compares two runs of `exitwise audit`; writes compare.json, compare.md and compare.html into the folder `out`.

    Returns:
        What compare.json holds; docs/reference/comparison.md lists the keys.

    Raises:
        UserError: the runs cannot be paired.
    """
    pair = read_pair(before, after)
    figures = compare_pair(pair)
    figures = {"verdict": judge_comparison(figures), **figures}
    write_json(out / "compare.json", figures)
    write_pages(out, figures, pair)
    return figures
