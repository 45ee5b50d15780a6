"""The provenance of a slim checkpoint, as its exitwise.json holds it: one field a key, in the order of the file."""

from dataclasses import dataclass

from ..run.exit import Exit
from ..run.figures import Interval


@dataclass(frozen=True)
class Savings:
    """What the cut saves, and out of how much: FLOPs are those of one request up to its first new token."""

    blocks_cut: int
    parameters: int
    whole_parameters: int
    bytes: int
    whole_bytes: int
    flops: int
    whole_flops: int
    encoder_flops: int


@dataclass(frozen=True)
class AuditedExit:
    """Shares that an audit measured at one exit."""

    exit: Exit
    asr: Interval
    utility: Interval
    over_refusal: Interval
    coherence: Interval


@dataclass(frozen=True)
class AuditFigures:
    """What an audit found at the exit of the checkpoint and at the default exit of its source."""

    run: str
    judge: str
    caveat: str
    notice: str
    standing: str
    exits: list[AuditedExit]


@dataclass(frozen=True)
class CheckResult:
    """How far the checkpoint was from the full model at the exit, in float32."""

    questions: int
    tokens: int
    largest_logit: float
    largest_difference: float


@dataclass(frozen=True)
class Note:
    """exitwise.json of a slim checkpoint."""

    made_by: str
    source: str
    adapter: str | None
    source_sha256: str
    exit: int
    source_blocks: int
    source_default_exit: int
    dtype: str
    saves: Savings
    notice: str | None
    audit: AuditFigures | None
    check: CheckResult | None = None
