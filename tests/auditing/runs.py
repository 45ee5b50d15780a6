"""A small audit of a tiny model, and the files of a run that must keep their bytes."""

from exitwise import AuditConfig

SAME_BYTES = (
    "config.json",
    "plan.json",
    "samples.jsonl",
    "completions.jsonl",
    "verdicts.refusal.jsonl",
    "metrics.json",
)


def config_of(folder, **changes):
    return AuditConfig.of(str(folder), **{"limit": 4, "vqa": 6, "max_new_tokens": 6, "batch_size": 7} | changes)


def contents(out):
    return {name: (out / name).read_bytes() for name in SAME_BYTES}
