"""A run as pandas DataFrames and as a short HTML table. pandas is imported when a frame is asked for."""

from collections.abc import Iterable, Mapping
from dataclasses import fields
from html import escape
from typing import TYPE_CHECKING

from .figures import Answer, ExitFigures, Interval, Metrics
from .records import Completion, Sample, Verdict

if TYPE_CHECKING:
    from pandas import DataFrame

SHARES = tuple(field.name for field in fields(ExitFigures) if field.type is Interval)
"""The metrics that are shares with an interval, in the order of metrics.json."""


def figures_frame(metrics: Metrics) -> "DataFrame":
    """One row an exit.

    Columns: `exit` (text, "3+18" for a set of layers), `band`, for each share its value under the metric's name and
    `<metric>_low`, `<metric>_high`, `<metric>_n` (95 % Wilson interval; NaN where nothing was measured), `mean_tokens`,
    `standing` and `may_stop`.
    """
    from pandas import DataFrame

    rows = []
    for row in metrics.exits:
        shares = {name: row.share(name) for name in SHARES}
        rows.append(
            {
                "exit": str(row.exit),
                "band": row.band,
                **{
                    column: value
                    for name, share in shares.items()
                    for column, value in (
                        (name, share.value),
                        (f"{name}_low", share.low),
                        (f"{name}_high", share.high),
                        (f"{name}_n", share.n),
                    )
                },
                "mean_tokens": row.mean_tokens,
                "standing": row.standing,
                "may_stop": row.exit in metrics.answer.stop_at,
            }
        )
    return DataFrame(rows)


def answers_frame(
    samples: Iterable[Sample],
    completions: Iterable[Completion],
    verdicts: Mapping[str, Iterable[Verdict]],
    first_judge: str,
) -> "DataFrame":
    """One row an answer, in the order of completions.jsonl.

    Columns: `sample`, `exit` (text), `kind`, `category`, `prompt`, `image`, `answer`, `finish`, `tokens` (a count),
    `perplexity`, `label` and `reason` of the first judge, and `label_<judge>` of every other judge.
    """
    from pandas import DataFrame

    by_id = {sample.id: sample for sample in samples}
    labels = {judge: {(v.sample, v.exit): v for v in found} for judge, found in verdicts.items()}
    rows = []
    for completion in completions:
        sample, at = by_id[completion.sample], (completion.sample, completion.exit)
        verdict = labels.get(first_judge, {}).get(at)
        rows.append(
            {
                "sample": _writable(sample.id),
                "exit": str(completion.exit),
                "kind": sample.kind,
                "category": _writable(sample.category),
                "prompt": _writable(sample.prompt),
                "image": _writable(sample.image),
                "answer": _writable(completion.text),
                "finish": completion.finish,
                "tokens": len(completion.tokens),
                "perplexity": completion.perplexity,
                "label": verdict.label if verdict else "unscored",
                "reason": _writable(verdict.reason) if verdict else "no verdict",
                **{
                    f"label_{judge}": found[at].label if at in found else "unscored"
                    for judge, found in labels.items()
                    if judge != first_judge
                },
            }
        )
    return DataFrame(rows)


def _writable(text: str) -> str:
    """Lone surrogates as `\\udXXX`: pandas keeps text as UTF-8, which has none."""
    return text.encode("utf-8", "backslashreplace").decode("utf-8")


def summary_html(answer: Answer, figures: "DataFrame") -> str:
    """A run's answer and its main shares by exit, for a notebook; every text is escaped."""
    shown = figures[["exit", "asr", "over_refusal", "utility", "standing"]]
    table = shown.to_html(index=False, float_format=lambda share: f"{100 * share:.0f} %", na_rep="not measured")
    return f"<p><b>{escape(answer.headline)}</b> {escape(answer.detail)}</p>{table}"
