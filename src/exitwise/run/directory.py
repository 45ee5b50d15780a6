"""The run directory: what it holds, how it survives a kill, and who may write to it.

    config.json               options of the command, files and sets; a directory with another config is refused
    plan.json                 values set at the first start that must not change on resume (batch size, threads, prompts
                              skipped because they contain a control token)
    env.json                  versions, device, threads, git
    costs.json                what an exit costs, measured once at the first start
    samples.jsonl             one Sample a line
    images/                   thumbnails of the images, for the report
    completions.jsonl         one Completion a line, in the order of the plan
    verdicts.<judge>.jsonl    one Verdict a line, in the order of completions.jsonl
    judge.<judge>.json        which model judged and how it was asked, for judges that are models
    metrics.json              figures with intervals
    timing.json               seconds by phase and tokens/s by exit: measured, so never the same twice
    report.html               the report

Everything but env.json, costs.json, timing.json and report.html (which shows seconds) is byte for byte the same however
often the run was killed on its way.
"""

import fcntl
import json
import os
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

from ..errors import UserError
from .exit import encode_exit
from .records import Record

R = TypeVar("R", bound=Record)
MAY_CHANGE = ("image_folders",)
"""Keys of config.json that may differ on resume; the newest value wins."""


def write_atomic(path: Path, text: str) -> None:
    """Writes `text` so that a reader sees the old file or the new one, never half of it."""
    scratch = path.with_name(path.name + ".tmp")
    with open(scratch, "w", encoding="utf-8") as handle:
        handle.write(text)
        handle.flush()
        os.fsync(handle.fileno())
    os.replace(scratch, path)


def write_json(path: Path, value: Any) -> None:
    """As `write_atomic`, indented, NaN refused (metrics use null)."""
    write_atomic(path, json.dumps(value, indent=1, ensure_ascii=False, allow_nan=False, default=encode_exit) + "\n")


def read_json(path: Path, *keys: str) -> dict[str, Any]:
    """A JSON object with `keys`; raises UserError, naming the file, if it is missing, invalid, or not an object."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError(f"{path} does not exist; expected a run directory made by `exitwise audit`") from None
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise UserError(f"{path} is not valid JSON ({error}); restore it or start a new run directory") from None
    if not isinstance(value, dict):
        raise UserError(f"{path} is not a JSON object; restore it or start a new run directory")
    if absent := [key for key in keys if key not in value]:
        raise UserError(f"{path} lacks the keys {', '.join(absent)}; restore it or start a new run directory")
    return value


def read_records(path: Path, kind: type[R]) -> list[R]:
    """All whole lines of a .jsonl file of records; [] where there is no file.

    A last line without its newline is what a kill leaves behind and is passed over; any other broken line is an error.
    """
    if not path.exists():
        return []
    records = []
    for number, line in enumerate(path.read_bytes().split(b"\n")[:-1], start=1):
        try:
            records.append(kind.from_dict(json.loads(line)))
        except (ValueError, TypeError) as error:
            raise UserError(f"{path}, line {number}: not a {kind.__name__} ({error}); restore the file") from None
    return records


def to_lines(records: Iterable[Record]) -> str:
    return "".join(record.to_json() + "\n" for record in records)


class Appender:
    """Appends batches of records; a batch is on disk whole before `append` returns, or is cut off on the next start."""

    def __init__(self, path: Path):
        self.handle = open(path, "ab")  # noqa: SIM115 (held until close)

    def append(self, records: Iterable[Record]) -> None:
        self.handle.write(to_lines(records).encode("utf-8"))
        self.handle.flush()
        os.fsync(self.handle.fileno())

    def close(self) -> None:
        self.handle.close()


def truncate_to(path: Path, n_lines: int) -> None:
    """Keeps the first `n_lines` lines of the file."""
    if not path.exists():
        return
    with open(path, "r+b") as handle:
        for _ in range(n_lines):
            handle.readline()
        handle.truncate(handle.tell())


@contextmanager
def open_run(folder: Path, config: dict[str, Any]) -> Iterator[Path]:
    """Opens `folder` for writing under `config`, alone.

    Raises:
        UserError: another process writes there, another config made it, or it is not a run directory.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(
            f"cannot create the run directory {folder} ({error.strerror}); choose another with --out"
        ) from None
    with _alone(folder):
        path = folder / "config.json"
        begun = (folder / "plan.json").exists()  # before that nothing is worth keeping: a typo may be corrected
        if path.exists() and begun:
            existing = read_json(path)
            changed = sorted(k for k in existing.keys() | config.keys() if existing.get(k) != config.get(k))
            if set(changed) - set(MAY_CHANGE):
                raise UserError(
                    f"{folder} was made with another config ({', '.join(changed)} differ); "
                    "give --out another directory, or repeat the first command to resume it"
                )
            if changed:
                write_json(path, config)
        else:
            strangers = [p.name for p in folder.iterdir() if p.name != ".lock" and not p.name.endswith(".tmp")]
            if strangers and not _is_run(path):
                raise UserError(f"{folder} is not empty and not a run directory; give --out another directory")
            write_json(path, config)
        yield folder


def _is_run(path: Path) -> bool:
    """Whether the config.json is of a run that was never begun, and not of a model, which must not be overwritten."""
    fields = read_json(path) if path.exists() else {}
    return "seed" in fields and "model_type" not in fields


@contextmanager
def _alone(folder: Path) -> Iterator[None]:
    with open(folder / ".lock", "w") as handle:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise UserError(
                f"another process is writing to {folder}; wait for it, or give --out another directory"
            ) from None
        yield


@contextmanager
def edit_run(folder: Path) -> Iterator[Path]:
    """Opens an existing run directory for judging or reporting, alone."""
    if not (folder / "config.json").is_file():
        raise UserError(f"{folder} is not a run directory (no config.json); expected one made by `exitwise audit`")
    with _alone(folder):
        yield folder


def plain(value: Any) -> Any:
    """A config's value as JSON holds it: paths as text, tuples as lists."""
    if isinstance(value, Path):
        return str(value)
    return [plain(v) for v in value] if isinstance(value, tuple) else value
