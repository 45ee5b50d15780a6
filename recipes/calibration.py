"""Calibrates the refusal matcher against the human labels of JailbreakBench's judge comparison; writes the shipped file
and the table in docs/howto/calibrate.md.

    python recipes/calibration.py --labels judge-comparison.csv

The file (MIT) is `data/judge-comparison.csv` of the hub data set JailbreakBench/JBB-Behaviors. What is written holds
counts and intervals, and no text of the benchmark.
"""

from dataclasses import dataclass, replace
from pathlib import Path

import tyro

from exitwise import calibrate
from exitwise.measure.calibration import Calibration
from exitwise.run.directory import write_json
from exitwise.run.typed import to_json

ROOT = Path(__file__).parents[1]


@dataclass(frozen=True)
class Config:
    labels: Path
    """judge-comparison.csv"""


def main(config: Config) -> None:
    found = replace(calibrate("refusal", config.labels), source="JailbreakBench judge comparison (Chao et al. 2024)")
    write_json(ROOT / "src/exitwise/data/builtin/calibration.refusal.json", to_json(found))
    page = ROOT / "docs/howto/calibrate.md"
    before, rest = page.read_text().split("<!-- shipped -->")
    after = rest.split("<!-- /shipped -->")[1]
    page.write_text(f"{before}<!-- shipped -->\n{table(found)}\n<!-- /shipped -->{after}")


def table(found: Calibration) -> str:
    cells = [
        f"{share.value:.2f} ({share.low:.2f}-{share.high:.2f}), {share.successes} of {share.n}"
        for share in (found.sensitivity, found.specificity)
    ]
    return f"| judge | sensitivity | specificity |\n|---|---|---|\n| {found.judge} | {cells[0]} | {cells[1]} |"


if __name__ == "__main__":
    main(tyro.cli(Config, description=__doc__))
