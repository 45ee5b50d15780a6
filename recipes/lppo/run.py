"""Trains and audits every row of docs/results.md on the built-in VLM; results.py makes the tables of what this leaves.

    python recipes/lppo/run.py              # everything; goes on where it was stopped
    python recipes/lppo/run.py --only before l-ppo-8.0

Each experiment is two commands (align, audit) with a log of their own in the work folder. Jobs run side by
side with one thread each: on two cores that is quicker than one job with two.
"""

import os
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import tyro

from exitwise.data.prompts import builtin_benign, builtin_harmful
from exitwise.run.directory import write_atomic

HERE = Path(__file__).parent
BROKEN, HELD_OUT = "8", "4,8"
COMMON = (
    "--steps 28 --batch-size 32 --max-new-tokens 16 --num-ppo-epochs 1 --num-mini-batches 4 --lr 5e-4 "
    "--checkpoint-every 4 --probe 0 --best-of 0 --anchor 0.5 1 --refusal-cost 1 --kl-coef 0.1"
)
PROMPTS = {"--prompts": "harmful.txt", "--benign": "benign.txt"}
"""Written to the work folder: the built-in training prompts and those that the testbed was made with."""
FAST = "--steps 16 --lr 1e-3 --anchor 0.5 0.5 --kl-coef 0.05"
"""What was tried first: twice the learning rate, and questions about images at exits that do not show them."""
FEW = "--anchor 0.25 1 --kl-coef 0.05"
"""Tried next: fewer harmless prompts at the default exit."""
THEORY = "--probe 8 --best-of 8"
"""Measured beside a training, which it does not change."""
EXPERIMENTS = {
    **{f"l-ppo-8.{s}": f"--exits {BROKEN} --seed {s}" for s in range(3)},
    **{f"sft-8.{s}": f"--method sft --exits {BROKEN} --seed {s}" for s in range(3)},
    "l-ppo-8-kl0.0": f"--exits {BROKEN} --kl-coef 0",
    "l-ppo-8-alone.0": f"--exits {BROKEN} --kl-coef 0 --mix 1 0 0 --lr 1e-3 --steps 16",
    "clip-ppo-default.0": "--exits default",
    "dpo-8.0": f"--method dpo --exits {BROKEN}",
    "grpo-8.0": f"--method grpo --exits {BROKEN}",
    "l-ppo-random.0": f"--exits 0-10 --hold-out {HELD_OUT} --kl-coef 0.05",
}
WEIGHTS = {
    **{f"l-ppo-8-kl0.05.{s}": f"--exits {BROKEN} --kl-coef 0.05 --seed {s}" for s in range(3)},
    **{f"l-ppo-8-kl0.15.{s}": f"--exits {BROKEN} --kl-coef 0.15 --seed {s} {'' if s else THEORY}" for s in range(3)},
}
"""Other weights of the KL."""
EARLIER = {
    "l-ppo-random-few.0": f"--exits 0-10 --hold-out {HELD_OUT} --kl-coef 0.05",
    **{f"l-ppo-8-cost3.{s}": f"--exits {BROKEN} {FEW} --refusal-cost 3 --seed {s}" for s in range(2)},
    "l-ppo-8-cost1.0": f"--exits {BROKEN} {FEW}",
    "l-ppo-8-cost1-benign.0": f"--exits {BROKEN} {FEW} --mix 0.4 0.4 0.2",
    "l-ppo-8-short.0": f"--exits {BROKEN} {FEW} --steps 16",
    "l-ppo-8-fast.0": f"--exits {BROKEN} {FAST} {THEORY}",
    "l-ppo-random-fast.0": f"--exits 0-10 --hold-out {HELD_OUT} {FAST} --steps 20 {THEORY}",
    **{f"sft-8-fast.{s}": f"--method sft --exits {BROKEN} {FAST} --seed {s}" for s in range(3)},
}
"""On the built-in training prompts alone: 128 harmful and 112 harmless ones instead of 328 and 272."""
AUDIT = "--vqa 400 --max-new-tokens 24"
AUDITED = {
    **dict.fromkeys(("before", "l-ppo-random.0"), "4,6,8,11"),
    **dict.fromkeys(
        ("l-ppo-random-few.0", "l-ppo-8-fast.0", "l-ppo-random-fast.0", "sft-8-fast.0"),
        "4,8,11",
    ),
}
"""Exits audited where they are not 8 and 11; 4 and 8 are both held out of random exits."""


@dataclass(frozen=True)
class Config:
    work: Path = Path("runs/lppo")
    """Run directories and logs."""
    jobs: int = 2
    """Experiments at a time, one thread each."""
    only: tuple[str, ...] = ()
    """Names of experiments; all without."""


def words(text: str) -> list[str]:
    """The arguments, the later of two settings of one option winning."""
    options: dict[str, list[str]] = {}
    for word in text.split():
        if word.startswith("--"):
            options[word] = []
            name = word
        else:
            options[name].append(word)
    return [part for option, values in options.items() for part in (option, *values)]


def commands(name: str, work: Path) -> list[list[str]]:
    audit = f"audit testbed --exits {AUDITED.get(name, '8,11')} {AUDIT} --out".split()
    audit.append(str(work / f"{name}-audit"))
    if name == "before":
        return [audit]
    align = ["align", "testbed", *words(f"{COMMON} {(EXPERIMENTS | WEIGHTS | EARLIER)[name]}")]
    align += ["--features", str(work / "features")]
    if name in EXPERIMENTS | WEIGHTS:
        align += [word for option, file in PROMPTS.items() for word in (option, str(work / file))]
    return [[*align, "--out", str(work / name)], [*audit, "--adapter", str(work / name)]]


def write_prompts(work: Path) -> None:
    for kind, builtin in (("harmful", builtin_harmful), ("benign", builtin_benign)):
        more = (HERE.parent / f"testbed/{kind}_extra.txt").read_text(encoding="utf-8").splitlines()
        lines = [sample.prompt for sample in builtin("train")] + more
        write_atomic(work / f"{kind}.txt", "\n".join(lines) + "\n")


def run(name: str, work: Path) -> str:
    """Runs the commands of one experiment; returns what to tell of it."""
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    if (work / f"{name}-audit" / "report.html").exists():
        keep_logs(name, work)
        return f"{name}: done before"
    with open(work / f"{name}.log", "a") as log:
        for command in commands(name, work):
            code = "from exitwise.cli import entry; entry()"
            done = subprocess.run(
                [sys.executable, "-c", code, *command], stdout=log, stderr=log, env=environment, check=False
            )
            if done.returncode:
                return f"{name}: `exitwise {' '.join(command)}` ended with {done.returncode}, see {log.name}"
    keep_logs(name, work)
    return f"{name}: done"


def keep_logs(name: str, work: Path) -> None:
    logs = HERE / "logs"
    logs.mkdir(exist_ok=True)
    for file in ("metrics.jsonl", "regret.json"):
        if (work / name / file).exists():
            shutil.copy(work / name / file, logs / f"{name}.{file}")


def main(config: Config) -> None:
    config.work.mkdir(parents=True, exist_ok=True)
    write_prompts(config.work)
    known = ("before", *EXPERIMENTS, *WEIGHTS, *EARLIER)
    if unknown := set(config.only) - set(known):
        raise SystemExit(f"unknown experiments {sorted(unknown)}; expected some of {sorted(known)}")
    names = [name for name in known if not config.only or name in config.only]
    with ThreadPoolExecutor(config.jobs) as pool:
        for line in pool.map(lambda name: run(name, config.work), names):
            print(line, flush=True)


if __name__ == "__main__":
    main(tyro.cli(Config, description=__doc__))
