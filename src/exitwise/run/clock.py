"""Measures seconds by phase, and tokens and seconds by exit, over all starts of a run."""

import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TypeVar

from ..errors import UserError
from . import directory
from .exit import Exit
from .records import Completion

V = TypeVar("V", int, float)


class Clock:
    """Seconds by phase and tokens by exit, kept in timing.json over all starts of a run."""

    def __init__(self, path: Path | None):
        self.path = path  # None: measured and kept nowhere, as every process but the first does
        known = directory.read_json(path, "phases", "tokens", "seconds") if path and path.exists() else {}
        self.phases: dict[str, float] = known["phases"] if known else {}
        self.tokens: dict[str, int] = _by_exit(known["tokens"]) if known else {}
        self.seconds: dict[str, float] = _by_exit(known["seconds"]) if known else {}

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        started = time.monotonic()
        yield
        self.phases[name] = round(self.phases.get(name, 0.0) + time.monotonic() - started, 3)
        self.save()

    def batch(self, completions: list[Completion], seconds: float) -> None:
        """Shares the seconds of a batch among its exits by their tokens."""
        total = sum(len(c.tokens) for c in completions) or 1
        for c in completions:
            key = str(c.exit)
            self.tokens[key] = self.tokens.get(key, 0) + len(c.tokens)
            self.seconds[key] = self.seconds.get(key, 0.0) + seconds * len(c.tokens) / total

    def save(self) -> None:
        rate = {
            k: round(self.tokens[k] / s, 2) for k, s in sorted(self.seconds.items(), key=lambda i: Exit.of(i[0])) if s
        }
        record = {"phases": self.phases, "tokens": self.tokens, "seconds": self.seconds, "tokens_per_second": rate}
        if self.path:
            directory.write_json(self.path, record)


def _by_exit(values: dict[str, V]) -> dict[str, V]:
    """The keys as exits are written now; exitwise 0.1.0 wrote a set of layers as one number."""
    try:
        return {str(Exit.of(key)): value for key, value in values.items()}
    except ValueError as error:
        raise UserError(f"timing.json is broken ({error}); delete it") from None
