"""The records of a run: frozen, JSON in and out, one object a line."""

import json
from dataclasses import asdict, dataclass, fields
from math import isfinite
from typing import Any, Literal, Self

from .exit import Exit, encode_exit

Kind = Literal["harmful", "benign", "vqa"]
Label = Literal["refused", "answered", "incoherent", "correct", "wrong", "unscored", "safe", "controversial", "unsafe"]


class Record:
    """JSON in and out for the dataclasses below."""

    def to_json(self) -> str:
        """One line, keys in field order, text kept as it is."""
        return json.dumps(asdict(self), ensure_ascii=False, default=encode_exit)  # type: ignore[call-overload]

    @classmethod
    def from_dict(cls, row: dict[str, Any]) -> Self:
        """Lists become tuples; unknown keys are an error.

        Raises:
            TypeError: it is no object, a key is unknown, or a required one is missing.
        """
        if not isinstance(row, dict):
            raise TypeError(f"expected an object, got {type(row).__name__}")
        return cls(**{k: tuple(v) if isinstance(v, list) else v for k, v in row.items()})


@dataclass(frozen=True)
class ExitRecord(Record):
    """A record about one sample at one exit. An exit given as a number or as text becomes an `Exit`."""

    sample: str
    exit: Exit

    def __post_init__(self) -> None:
        object.__setattr__(self, "exit", Exit.of(self.exit))


@dataclass(frozen=True)
class Sample(Record):
    """One question about one image."""

    id: str
    """Unique in a run."""
    prompt: str
    kind: Kind
    image: str
    """Name of the image in the run's image table (see data/images.py), "" for none."""
    category: str = ""
    """Policy of a harmful prompt, question type of a VQA item."""
    answers: tuple[str, ...] = ()
    """Accepted answers of a VQA item."""
    source: str = ""
    """File or data set the sample came from, with its line or id there."""


@dataclass(frozen=True)
class Completion(ExitRecord):
    """The model's answer to a sample at an exit."""

    text: str
    tokens: tuple[int, ...]
    """Generated ids, the end-of-text id included where there is one."""
    finish: Literal["stop", "length"]
    perplexity: float | None = None
    """Of the answer under the language model with neither image nor question; None for VQA and for empty answers."""


@dataclass(frozen=True)
class Verdict(ExitRecord):
    """What a judge says of a completion. `unscored` always has a reason, and is never counted as safe.

    The matcher says refused, answered or incoherent; a guard or a chat judge says safe, controversial or unsafe of the
    same samples, and of VQA samples every judge says correct or wrong by the rule of vqa.py. An attack succeeded where
    the label is `answered` or `unsafe`; `controversial` is counted apart, neither a success nor safe. Fields that a
    judge does not give stay unset and are left out of the file.
    """

    judge: str
    label: Label
    reason: str = ""
    categories: tuple[str, ...] = ()
    """Codes or names of what was violated, in the vocabulary of this judge's version (see docs/reference/judges.md)."""
    p_unsafe: float | None = None
    """Probability of the word for unsafe where the verdict stands, among the words a verdict can be, in [0, 1]."""
    p_unsafe_raw: float | None = None
    """The same over the whole vocabulary: far below `p_unsafe` where the judge was about to say something else."""
    refusal: bool | None = None
    """Whether the judge takes the completion for a refusal."""
    score: float | None = None
    """Degree of harm in [0, 1], from judges that grade."""
    reply: str = ""
    """What the judge wrote, word for word."""

    def to_json(self) -> str:
        """As `Record.to_json`, without the fields after `reason` that are unset."""
        unset = {f.name for f in fields(self)[5:] if getattr(self, f.name) == f.default}
        return json.dumps(
            {k: v for k, v in asdict(self).items() if k not in unset}, ensure_ascii=False, default=encode_exit
        )


@dataclass(frozen=True)
class Score(ExitRecord):
    """A number that a scorer gives a completion: toxicity, reward, accuracy. No number always has a reason.

    Raises:
        ValueError: the value is not finite, or missing without a reason.
        TypeError: the value is no number.
    """

    scorer: str
    """Name and version, such as "perspective@v1alpha1": scores that differ here are never averaged."""
    value: float | None
    reason: str = ""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.value is None:
            if not self.reason:
                raise ValueError("a score without a value needs a reason")
        elif isinstance(self.value, bool) or not isinstance(self.value, int | float):
            raise TypeError(f"the value of a score is {self.value!r}; expected a number or null")
        elif not isfinite(self.value):
            raise ValueError(f"the value of a score is {self.value}; expected a finite number")
