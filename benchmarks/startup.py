"""Processor time of the commands that read a finished run, beside that of an empty Python program.

    python benchmarks/startup.py runs/demo [--rounds 7]

The run is copied first: `report` writes into it. Each command runs in a process of its own; the time is user plus
system, the least of the rounds, so that other work on the machine shows little. Bytecode is compiled in a first round
that does not count. Prints one JSON object.
"""

import json
import os
import shutil
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro


@dataclass(frozen=True)
class Config:
    run: Annotated[Path, tyro.conf.Positional]
    """A finished run directory."""
    rounds: int = 7


def processor_seconds(command: list[str]) -> float:
    """User and system seconds of one process."""
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONDONTWRITEBYTECODE"}
    before = os.times()
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL, env=environment | {"OMP_NUM_THREADS": "1"})
    after = os.times()
    return after.children_user - before.children_user + after.children_system - before.children_system


def main(config: Config) -> None:
    with tempfile.TemporaryDirectory() as scratch:
        run = shutil.copytree(config.run, Path(scratch, "run"))
        exitwise = [sys.executable, "-m", "exitwise"]
        commands = {
            "python": [sys.executable, "-c", "pass"],
            "numpy": [sys.executable, "-c", "import numpy"],
            "help": [*exitwise, "--help"],
            "report": [*exitwise, "report", str(run)],
            "table": [*exitwise, "table", str(run)],
            "compare": [*exitwise, "compare", str(run), str(run), "--out", str(Path(scratch, "compared"))],
        }
        rounds = [{name: processor_seconds(command) for name, command in commands.items()}
                  for _ in range(config.rounds + 1)][1:]  # fmt: skip
    seconds = {name: min(each[name] for each in rounds) for name in commands}
    found = {
        "answers": (config.run / "completions.jsonl").read_bytes().count(b"\n"),
        "processor_seconds": {name: round(value, 3) for name, value in seconds.items()},
        "ratio_to_numpy": {name: round(seconds[name] / seconds["numpy"], 1) for name in commands},
    }
    print(json.dumps(found, indent=1))


if __name__ == "__main__":
    main(tyro.cli(Config, description=__doc__))
