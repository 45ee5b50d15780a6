"""Compares two audits of the same questions, such as before and after alignment.

    pairing.py   checks that two runs can be compared
    figures.py   differences per exit, band and group, with intervals and tests
    changes.py   the dataclasses that hold them
    verdict.py   the sentence and the named failures
    page.py      terminal, Markdown, HTML

Needs neither the model nor torch.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from html import escape
from pathlib import Path
from typing import TYPE_CHECKING

from ..errors import UserError
from ..run.directory import write_json
from ..run.run import Run
from ..run.typed import Json, to_json
from .changes import ComparisonFigures, ComparisonVerdict
from .figures import compare_pair
from .page import sections, write_pages
from .pairing import pair_runs
from .verdict import judge_comparison

if TYPE_CHECKING:
    from pandas import DataFrame

__all__ = ["Comparison", "compare"]


@dataclass(frozen=True)
class Comparison:
    """Two runs compared.

    Attributes:
        verdict: one sentence, and the failures that were found.
        figures: every difference with its interval; docs/reference/comparison.md lists the keys.
        path: compare.html; None where nothing was written.
    """

    verdict: ComparisonVerdict
    figures: ComparisonFigures
    path: Path | None = None

    def to_json(self) -> dict[str, Json]:
        """What compare.json holds."""
        return {"verdict": to_json(self.verdict), **self.figures.to_json()}

    def table(self) -> "DataFrame":
        """The tables that `exitwise compare` prints, as numbers: one row for each exit, band and group of exits.

        Columns: `rows` (exit, band or group), `name`, and for each metric `<metric>_before`, `<metric>_after`,
        `<metric>_change` (after minus before), its 95 % interval `<metric>_low` and `<metric>_high`, and for shares
        `<metric>_p_holm` (McNemar's test, Holm-corrected over the exits). Shares lie in [0, 1]; NaN where nothing was
        measured.
        """
        from pandas import DataFrame

        return DataFrame(list(self._rows()))

    def _rows(self) -> Iterator[dict[str, str | float | None]]:
        for title, rows in sections(self.figures):
            for name, row in rows:
                cells: dict[str, str | float | None] = {"rows": title, "name": name}
                for metric in self.figures.metrics:
                    change, key = row.changes[metric.key], metric.key
                    cells[f"{key}_before"] = change.before.value if change else None
                    cells[f"{key}_after"] = change.after.value if change else None
                    cells[f"{key}_change"] = change.difference if change else None
                    cells[f"{key}_low"] = change.low if change else None
                    cells[f"{key}_high"] = change.high if change else None
                    if metric.unit == "share":
                        cells[f"{key}_p_holm"] = change.p_holm if change and isinstance(change.p_holm, float) else None
                yield cells

    def _repr_html_(self) -> str:
        lines = [f"{failure.name}: {failure.text}" for failure in self.verdict.failures]
        items = "".join(f"<li>{escape(line)}</li>" for line in (*lines, *self.verdict.detail, *self.figures.notes))
        table = self.table().to_html(index=False, float_format=lambda x: f"{x:.3f}", na_rep="not measured")
        return f"<p><b>{escape(self.verdict.sentence)}</b></p><ul>{items}</ul>{table}"


def compare(before: Run | str | Path, after: Run | str | Path, *, out: str | Path | None = None) -> Comparison:
    """Compares two audits of the same questions: of a model, and of that model after alignment.

    Args:
        before: the run of the model as it was, or its directory.
        after: the run of the same model with an adapter, audited with the same options.
        out: folder for compare.json, compare.md and compare.html; without it nothing is written. (The command
            `exitwise compare` writes into the directory AFTER by default.)

    Raises:
        UserError: a run is unfinished or not judged, or the two cannot be paired.
    """
    pair = pair_runs(Run.open(before), Run.open(after))
    figures = compare_pair(pair)
    verdict = judge_comparison(figures)
    if out is None:
        return Comparison(verdict, figures)
    folder = Path(out)
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"cannot create the directory {folder} ({error.strerror}); choose another with --out") from None
    comparison = Comparison(verdict, figures, folder / "compare.html")
    write_json(folder / "compare.json", comparison.to_json())
    write_pages(folder, figures, verdict, pair)
    return comparison
