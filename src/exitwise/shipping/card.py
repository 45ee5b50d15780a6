"""Writes the model card of a slim checkpoint: the cut, its savings, the figures of an audit, and a warning.

Names and paths come from outside and stand in table cells only, where nothing can end the cell (markup.py).
"""

import json
import re
from pathlib import Path

from ..errors import UserError
from ..report.markup import Table, markdown
from ..run.exit import Exit
from ..run.figures import Interval
from ..run.run import Run
from .note import AuditedExit, AuditFigures, CheckResult, Note

METRICS = {"asr": "ASR", "utility": "utility", "over_refusal": "over-refusal", "coherence": "coherent"}

WARNING = """> **Content warning.** A vision-language model whose image encoder stops early may answer harmful requests
> that the full model refuses (Bachu et al., ICML 2025). Use this checkpoint only where an audit of this very exit says
> that it may be used, and keep the safeguards that you would keep around the full model."""

NO_AUDIT = "No audit was given. Nothing is known here about the safety or the usefulness of this model at this exit."


def audit_figures(run: Path, identity: str, exit: int) -> AuditFigures:
    """The figures of an audit at `exit` and at the default exit.

    Args:
        identity: `fingerprint` of the model that is being cut, adapter included.

    Raises:
        UserError: `run` is no finished audit, audited other weights, or not this exit.
    """
    audit = Run.open(run)
    if audit.plan.model_sha256 != identity:
        raise UserError(
            f"{run} audited other weights than those to be cut (or the same on another device or in another dtype); "
            "give the audit of this model with this --adapter, or omit --audit"
        )
    metrics, wanted = audit.metrics, sorted({Exit.of(exit), audit.plan.default_exit})
    if missing := [str(each) for each in wanted if each not in metrics.by_exit]:
        raise UserError(f"{run} has no figures at exit {', '.join(missing)}; audit with --exits {exit},default")
    found = [metrics.by_exit[each] for each in wanted]
    return AuditFigures(
        str(run),
        metrics.judge,
        metrics.caveat,
        metrics.notice,
        metrics.by_exit[Exit.of(exit)].standing,
        [AuditedExit(row.exit, row.asr, row.utility, row.over_refusal, row.coherence) for row in found],
    )


def card(note: Note) -> str:
    """README.md of a slim checkpoint, from its `exitwise.json`."""
    exit, blocks, default = note.exit, note.source_blocks, note.source_default_exit
    parts = [
        _front_matter(note),
        f"# A vision-language model cut at exit {exit} of {blocks}",
        f"The image encoder of this checkpoint ends after block {exit}; the model it was made from has {blocks} blocks "
        f"and was trained with exit {default}. {_language_model(note)} It loads with stock transformers, with "
        "`AutoModelForImageTextToText.from_pretrained`.",
        WARNING,
        note.notice or "",
        "## What was cut",
        _cut_table(note),
        "## What an audit found",
        _audit_table(note.audit, exit) if note.audit else NO_AUDIT,
        "## Checked",
        _checked(note.check),
        "The licence is that of the source. Made by exitwise; `exitwise.json` holds the provenance, "
        "`exitwise inspect` reads it.",
    ]
    return "\n\n".join(part.strip() for part in parts if part) + "\n"


def _front_matter(note: Note) -> str:
    lines = ["---", "library_name: transformers", "pipeline_tag: image-text-to-text", "tags:", "- exitwise"]
    on_hub = re.fullmatch(r"[\w.-]+/[\w.-]+", note.source, re.ASCII) and not Path(note.source).exists()
    if on_hub:
        lines.append(f"base_model: {json.dumps(note.source)}")
    return "\n".join([*lines, "---"])


def _language_model(note: Note) -> str:
    return (
        "An adapter is merged into the weights." if note.adapter else "The language model is the source's, unchanged."
    )


def _cut_table(note: Note) -> str:
    saves = note.saves

    def share(part: int, whole: int) -> str:
        return f"{100 * part / whole:.1f} %" if whole else "none"

    rows = [
        ["source", note.source],
        ["adapter", note.adapter or "none"],
        ["blocks cut", f"{saves.blocks_cut} of {note.source_blocks} (blocks {note.exit} and later, from 0)"],
        ["parameters saved", f"{saves.parameters:,} ({share(saves.parameters, saves.whole_parameters)})"],
        ["bytes saved", f"{saves.bytes:,} ({share(saves.bytes, saves.whole_bytes)})"],
        [
            "FLOPs saved per request",
            f"{saves.flops:.3g} ({share(saves.flops, saves.encoder_flops)} of the encoder, "
            f"{share(saves.flops, saves.whole_flops)} of the way to the first token)",
        ],
        ["weights saved in", note.dtype],
    ]
    said = (
        "Shares are of the whole source model with all its blocks; one that already stops at its default exit saves "
        "less. FLOPs are counted, not measured."
    )
    return markdown(Table("The cut", ["what", "how much"], rows, said))


def _audit_table(audit: AuditFigures, exit: int) -> str:
    rows = [
        [f"{row.exit} (this model)" if row.exit == exit else f"{row.exit} (default of the source)"]
        + [_interval(getattr(row, key)) for key in METRICS]
        for row in audit.exits
    ]
    text = f"95 % intervals. Judge: {audit.judge}. Standing of this exit: {audit.standing}. {audit.caveat}"
    notice = f"\n{audit.notice}" if audit.notice else ""
    return markdown(Table("Shares per exit", ["exit", *METRICS.values()], rows, text)) + notice


def _interval(share: Interval) -> str:
    if share.value is None or share.low is None or share.high is None:
        return "not measured"
    return f"{100 * share.value:.0f} % ({100 * share.low:.0f}-{100 * share.high:.0f}), n = {share.n}"


def _checked(check: CheckResult | None) -> str:
    if check is None:
        return "Not compared with the full model when it was made (`exitwise slim --check` does)."
    return (
        f"Loaded with transformers and compared with the full model at this exit, in float32: over "
        f"{check.questions} questions the largest difference of a logit is {check.largest_difference:.2g} "
        f"(largest logit {check.largest_logit:.3g}), and all {check.tokens} greedy tokens are the same."
    )
