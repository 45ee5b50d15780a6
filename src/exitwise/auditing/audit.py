"""Audits a model: answers every sample at every exit, judges the answers, computes figures and writes the report.

samples -> plan -> completions (batch by batch, on disk before the next starts) -> verdicts -> metrics -> report
"""

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from os import PathLike
from pathlib import Path
from typing import TYPE_CHECKING

from ..data import images
from ..data.controls import control_of
from ..data.options import make_config
from ..data.selection import Selection, load_samples, report_skipped
from ..errors import UserError
from ..judges.config import Judging
from ..run import directory
from ..run.clock import Clock
from ..run.progress import Progress, Silent
from ..run.run import Run
from .config import AuditConfig

if TYPE_CHECKING:
    from ..model.vlm import Vlm

LOADING = ("adapter", "dtype", "device", "trust_remote_code")
"""Options of `load_vlm`, which a loaded model has taken already."""


@dataclass(frozen=True)
class AuditOptions:
    """The keywords of `audit`: two configs side by side."""

    config: AuditConfig
    judging: Judging = field(default_factory=Judging)


def audit(
    model: "str | PathLike[str] | Vlm | AuditConfig",
    *,
    out: str | PathLike[str] | None = None,
    costs: bool = True,
    judging: Judging | None = None,
    progress: Progress | None = None,
    **options: object,
) -> Run:
    """Audits a model at the exits of its image encoder, or resumes an audit that was stopped.

        run = audit("testbed", exits="8,default", limit=8, out="runs/before")

    Args:
        model: "testbed", a folder or a hub id; or a loaded `Vlm`, which is not loaded again; or an `AuditConfig`.
        out: the run directory; without it, runs/<name of the model>.
        costs: measure what an exit costs (FLOPs, seconds) before the first answer, unless costs.json exists.
        judging: options of judges that are models; without it, those among `options`.
        progress: receives messages and the number of answers done.
        options: those of `exitwise audit`, with underscores: the fields of `AuditConfig`, `DataConfig`,
            `SelectionConfig` and `Judging`.

    Raises:
        UserError: an unknown option or bad input, or `out` belongs to another config or another process.
    """
    from .generation import generate
    from .judging import judge_and_measure
    from .report import write_report

    asked = _options(model, options)
    if judging is not None and asked.judging != Judging():
        raise UserError("got judging and options of judges as keywords; give one of the two")
    config = asked.config
    config.check()
    folder = Path(out) if out is not None else Path("runs", Path(config.model).resolve().name)
    progress = progress or Silent()
    found = load_samples(config.inputs, config.selection, config.seed)
    report_skipped(found.skipped, progress)
    with directory.open_run(folder, _config_json(config, found)):
        clock = Clock(folder / "timing.json")
        vlm = None if isinstance(model, str | PathLike | AuditConfig) else model
        run = generate(config, found, folder, progress, clock, vlm=vlm, costs=costs)
        with clock.phase("judge"):
            judge_and_measure(run, judging=judging or asked.judging, progress=progress)
        with clock.phase("report"):
            write_report(run)
    return run


def _options(model: "str | PathLike[str] | Vlm | AuditConfig", options: Mapping[str, object]) -> AuditOptions:
    """The configs of what `audit` was given."""
    if isinstance(model, AuditConfig):
        if options:
            raise UserError(f"audit got an AuditConfig and options ({', '.join(options)}); set them in the AuditConfig")
        return AuditOptions(model)
    if isinstance(model, str | PathLike):
        return make_config(AuditOptions, {"model": model, **options})
    if late := [name for name in LOADING if name in options]:
        raise UserError(f"audit got a loaded model and {', '.join(late)}; give that to load_vlm")
    found = make_config(AuditOptions, {"model": model.name, **options})
    return replace(found, config=replace(found.config, adapter=model.adapter))


def _config_json(config: AuditConfig, found: Selection) -> dict[str, object]:
    """The config, the counts, the sources, and the checksum of the samples: a changed prompt file is another config."""
    from ..model.testbed import TESTBED_NOTICE

    samples = found.samples
    digest = hashlib.sha256(directory.to_lines(samples).encode()).hexdigest()
    names = sorted({s.image for s in samples if s.image})
    pictures = hashlib.sha256()
    for name in names:
        image = images.load_image(name, found.roots)
        pictures.update(f"{name} {image.size}".encode() + image.tobytes())
    asked = [s for s in samples if control_of(s) is None]
    kinds = {kind: sum(s.kind == kind for s in asked) for kind in ("harmful", "benign", "vqa")}
    extra = {
        "counts": kinds | ({"controls": len(samples) - len(asked)} if config.selection.controls else {}),
        "skipped": found.skipped,
        "sources": found.sources,
        "samples_sha256": digest,
        "images_sha256": pictures.hexdigest(),
        "image_folders": {name: str(folder.resolve()) for name, folder in found.roots.items()},
        "notice": TESTBED_NOTICE.get(config.model, ""),
    }
    return config.to_json() | extra | _adapter_info(config)


def _adapter_info(config: AuditConfig) -> dict[str, object]:
    """How an adapter of `exitwise align` was trained, so that a comparison can tell trained exits from others."""
    if config.adapter is None:
        return {}
    for folder in (Path(config.adapter, "adapter"), Path(config.adapter)):
        if (folder / "exitwise.json").exists():
            return {"adapter_info": directory.read_json(folder / "exitwise.json", "method", "exits", "held_out")}
    return {}
