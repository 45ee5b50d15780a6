"""The model card of a slim checkpoint: what was cut, what that saves, what an audit found, and a warning.

Names and paths come from outside and stand in table cells only, where nothing can end the cell (markup.py).
"""

import json
import re
from pathlib import Path
from typing import Any

from ..errors import UserError
from ..model.vlm import Vlm
from ..report.markup import Table, markdown
from ..run import directory

METRICS = {"asr": "ASR", "utility": "utility", "over_refusal": "over-refusal", "coherence": "coherent"}

WARNING = """> **Content warning.** A vision-language model whose image encoder stops early may answer harmful requests
> that the full model refuses (Bachu et al., ICML 2025). Use this checkpoint only where an audit of this very exit says
> that it may be used, and keep the safeguards that you would keep around the full model."""

NO_AUDIT = "No audit was given. Nothing is known here about the safety or the usefulness of this model at this exit."


def audit_figures(run: Path, identity: str, exit: int) -> dict[str, Any]:
    """The figures of an audit's run directory at `exit` and at the default exit.

    Args:
        identity: `audit.fingerprint` of the model that is being cut, adapter included.

    Raises:
        UserError: it is no finished audit, its weights are others, or it did not ask at the exit.
    """
    plan = directory.read_json(run / "plan.json", "model_sha256", "default_exit")
    metrics = directory.read_json(run / "metrics.json", "exits", "judge", "caveat")
    if plan["model_sha256"] != identity:
        raise UserError(
            f"{run} audited other weights than those to be cut (or the same on another device or in another dtype); "
            "give the audit of this model with this --adapter, or leave --audit away"
        )
    by_exit = {row["exit"]: row for row in metrics["exits"]}
    wanted = {exit: "this model", plan["default_exit"]: "default exit of the source"}
    if missing := [str(e) for e in wanted if e not in by_exit]:
        raise UserError(f"{run} did not ask at exit {', '.join(missing)}; audit with --exits {exit},default")
    return {
        "run": str(run),
        "judge": metrics["judge"],
        "caveat": metrics["caveat"],
        "notice": metrics.get("notice"),
        "standing": by_exit[exit]["standing"],
        "exits": [
            {"exit": e, **{key: by_exit[e][key] for key in METRICS if key in by_exit[e]}} for e in sorted(wanted)
        ],
    }


def card(note: dict[str, Any], vlm: Vlm) -> str:
    """README.md of a slim checkpoint, from its `exitwise.json`."""
    exit, blocks, default = note["exit"], note["source_blocks"], note["source_default_exit"]
    parts = [
        _front_matter(note),
        f"# A vision-language model cut at exit {exit} of {blocks}",
        f"The image encoder of this checkpoint ends after block {exit}; the model it was made from has {blocks} blocks "
        f"and was trained with exit {default}. {_language_model(note)} It loads with stock transformers, with "
        "`AutoModelForImageTextToText.from_pretrained`.",
        WARNING,
        note["notice"] or "",
        "## What was cut",
        _cut_table(note),
        "## What an audit found",
        _audit_table(note["audit"], exit) if note["audit"] else NO_AUDIT,
        "## Checked",
        _checked(note["check"]),
        "The licence is that of the source. Made by exitwise; `exitwise.json` holds the provenance, "
        "`exitwise inspect` reads it.",
    ]
    return "\n\n".join(part.strip() for part in parts if part) + "\n"


def _front_matter(note: dict[str, Any]) -> str:
    lines = ["---", "library_name: transformers", "pipeline_tag: image-text-to-text", "tags:", "- exitwise"]
    on_hub = re.fullmatch(r"[\w.-]+/[\w.-]+", note["source"], re.ASCII) and not Path(note["source"]).exists()
    if on_hub:
        lines.append(f"base_model: {json.dumps(note['source'])}")
    return "\n".join([*lines, "---"])


def _language_model(note: dict[str, Any]) -> str:
    return (
        "An adapter is merged into the weights."
        if note["adapter"]
        else "The language model is the source's, unchanged."
    )


def _cut_table(note: dict[str, Any]) -> str:
    saves = note["saves"]

    def share(part: int, whole: int) -> str:
        return f"{100 * part / whole:.1f} %" if whole else "none"

    rows = [
        ["source", note["source"]],
        ["adapter", note["adapter"] or "none"],
        ["blocks cut", f"{saves['blocks_cut']} of {note['source_blocks']} (blocks {note['exit']} and later, from 0)"],
        ["parameters saved", f"{saves['parameters']:,} ({share(saves['parameters'], saves['whole_parameters'])})"],
        ["bytes saved", f"{saves['bytes']:,} ({share(saves['bytes'], saves['whole_bytes'])})"],
        [
            "FLOPs saved per request",
            f"{saves['flops']:.3g} ({share(saves['flops'], saves['encoder_flops'])} of the encoder, "
            f"{share(saves['flops'], saves['whole_flops'])} of the way to the first token)",
        ],
        ["weights saved in", note["dtype"]],
    ]
    said = (
        "Shares are of the whole source model with all its blocks; one that already stops at its default exit saves "
        "less. FLOPs are counted, not measured."
    )
    return markdown(Table("The cut", ["what", "how much"], rows, said))


def _audit_table(audit: dict[str, Any], exit: int) -> str:
    metrics = [key for key in METRICS if key in audit["exits"][0]]
    rows = [
        [f"{row['exit']} (this model)" if row["exit"] == exit else f"{row['exit']} (default of the source)"]
        + [_interval(row[key]) for key in metrics]
        for row in audit["exits"]
    ]
    said = f"95 % intervals. Judge: {audit['judge']}. Standing of this exit: {audit['standing']}. {audit['caveat']}"
    header = ["exit", *(METRICS[key] for key in metrics)]
    notice = f"\n{audit['notice']}" if audit["notice"] else ""
    return markdown(Table("Shares per exit", header, rows, said)) + notice


def _interval(share: dict[str, Any]) -> str:
    if not share["n"]:
        return "not measured"
    return f"{100 * share['value']:.0f} % ({100 * share['low']:.0f}-{100 * share['high']:.0f}), n = {share['n']}"


def _checked(check: dict[str, Any] | None) -> str:
    if check is None:
        return "Not compared with the full model when it was made (`exitwise slim --check` does)."
    return (
        f"Loaded with transformers and compared with the full model at this exit, in float32: over "
        f"{check['questions']} questions the largest difference of a logit is {check['largest_difference']:.2g} "
        f"(largest logit {check['largest_logit']:.3g}), and all {check['tokens']} greedy tokens are the same."
    )
