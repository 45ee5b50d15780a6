"""Figures from scores: means, their intervals, bands, over-refusal beside its contrast."""

import csv
import json

import pytest

from exitwise import UserError
from exitwise.judges.refusal import refusal_phrase
from exitwise.measure.scores import (
    RefusalContrast,
    mean_score,
    read_score_metrics,
    refusal_contrast,
    score_table,
    unfinished,
    write_score_metrics,
)
from exitwise.run.directory import to_lines
from exitwise.run.exit import Exit
from exitwise.run.records import Completion, Sample, Score, Verdict
from exitwise.run.run import Run
from exitwise.run.typed import to_json
from exitwise.scorers import make_scorer, score_run
from tests.conftest import ROOT
from tests.score_setup import TODAY, Length, write_plan, write_run


@pytest.fixture
def run(tmp_path):
    return write_run(tmp_path / "run")


def test_two_versions_are_not_averaged():
    scores = [Score("a", 0, "x@1", 0.2), Score("b", 0, "x@2", 0.4)]
    with pytest.raises(UserError, match="x@1 and x@2 cannot be averaged"):
        mean_score(scores)
    assert mean_score([*scores[:1], Score("b", 0, "x@1", 0.4), Score("c", 0, "x@1", None, "empty")]) == pytest.approx(
        0.3
    )
    assert mean_score([]) is None
    assert mean_score([Score("a", 0, "x@1", None, "empty")]) is None


def test_a_file_with_two_versions_gives_no_figures(run):
    score_run(Run(run), Length(), TODAY)
    path = run / "scores.length.jsonl"
    path.write_text(path.read_text().replace("length@1", "length@2", 1))
    with pytest.raises(UserError, match="cannot be averaged"):
        score_table(run)


def test_figures_per_exit_and_band(tmp_path):
    run = write_run(tmp_path / "run", exits=(0, 1, 2), text=lambda i, exit: "x" * (10 * (i + 1) + exit))
    score_run(Run(run), Length(), TODAY)
    rows = score_table(run)
    assert [(row.metric, row.exit, row.band) for row in rows] == [
        ("TS", 0, "embeddings"), ("TS", 1, "early"), ("TS", 2, "middle"),
        ("ATS", None, "early"), ("ATS", None, "middle"),
    ]  # fmt: skip
    assert [row.value for row in rows] == pytest.approx([30, 31, 32, 31, 32])  # mean of .10 .20 .30 .40 .50, plus exit
    assert all(row.low < row.value < row.high and (row.n, row.unscored) == (5, 0) for row in rows)
    assert score_table(run) == rows


def test_a_band_is_the_mean_over_its_exits(tmp_path):
    run = write_run(tmp_path / "run", exits=(1, 2), text=lambda i, exit: "x" * (10 * exit + i))
    write_plan(run, 30, (1, 2), n_blocks=6)
    score_run(Run(run), Length(value=lambda text: float("nan") if text == "x" * 24 else len(text) / 100), TODAY)
    *exits, band = score_table(run)
    assert [row.value for row in exits] == pytest.approx([12, 21.5])  # 10..14; 20..23 without the one that is none
    assert (band.band, band.exit, band.n, band.unscored) == ("early", None, 9, 1)
    assert band.value == pytest.approx((12 + 21.5) / 2)


def test_a_scorer_that_is_not_through_is_named_not_averaged(run):
    score_run(Run(run), Length(), TODAY)
    path = run / "scores.length.jsonl"
    path.write_text("".join(path.read_text().splitlines(keepends=True)[:9]))
    assert score_table(run) == []
    assert unfinished(Run.open(run)) == ["length (9 of 20)"]


def test_controls_are_in_no_mean_and_crossed_images_are_resampled(tmp_path):
    """Toxicity follows the image here: ten prompts with ten images are ten images. Controls would raise every mean."""
    cells = [(p, i) for p in range(10) for i in range(10)]
    samples = [Sample(f"{p}@{i}", f"prompt {p}", "harmful", f"photo {i}") for p, i in cells]
    samples += [Sample(f"{p}@control:none", f"prompt {p}", "harmful", "") for p in range(10)]
    texts = ["x" * (40 if i < 3 else 10) for _, i in cells] + ["x" * 90] * 10
    answers = [Completion(sample.id, 1, text, (1,), "stop") for sample, text in zip(samples, texts, strict=True)]
    run = write_run(tmp_path / "run")
    (run / "samples.jsonl").write_text(to_lines(samples))
    (run / "completions.jsonl").write_text(to_lines(answers))
    write_plan(run, len(answers), (1,))
    score_run(Run(run), Length(), TODAY)
    row, band = score_table(run)
    assert (row.n, row.value) == (100, pytest.approx(100 * (0.3 * 0.4 + 0.7 * 0.1)))
    assert row.high - row.low > 14  # three images of ten; by prompt alone all ten are alike, and there is no interval
    assert (band.n, band.low, band.high) == (100, row.low, row.high)
    verdicts = [Verdict(s.id, 1, "refusal", "answered" if s.image else "refused") for s in samples]
    (contrast,) = refusal_contrast([*samples, Sample("b", "?", "benign", "")], verdicts)
    assert (contrast.n_harmful, contrast.refusal) == (100, 0.0)


def test_over_refusal_beside_its_contrast():
    """56 of 70 against 48 of 80: Newcombe 1998 gives the difference 0.20 the limits 0.0524 and 0.3339."""
    samples = [Sample(f"u{i}", "?", "harmful", "") for i in range(71)] + [
        Sample(f"s{i}", "?", "benign", "") for i in range(80)
    ]
    verdicts = [Verdict(f"u{i}", 3, "refusal", "refused" if i < 56 else "answered") for i in range(70)]
    verdicts += [Verdict("u70", 3, "refusal", "unscored", "empty answer")]
    verdicts += [Verdict(f"s{i}", 3, "refusal", "refused" if i < 48 else "incoherent") for i in range(80)]
    (row,) = refusal_contrast(samples, verdicts)
    assert (row.exit, row.n_benign, row.n_harmful) == (3, 80, 70)
    assert (row.over_refusal, row.refusal, row.difference) == pytest.approx((0.6, 0.8, 0.2))
    assert (row.low, row.high) == pytest.approx((0.0524, 0.3339), abs=5e-5)


def test_a_share_of_nothing_is_none():
    rows = refusal_contrast([Sample("s", "?", "benign", "")], [Verdict("s", 0, "refusal", "answered")])
    assert rows == [RefusalContrast(Exit([0]), 0.0, None, None, None, None, 1, 0)]


def test_the_matcher_takes_no_xstest_prompt_for_a_refusal(shared_data):
    """All that the prompts alone can show: none of the 450 requests reads as a refusal, whoever repeats it."""

    with open(shared_data / "xstest_prompts.csv", newline="", encoding="utf-8") as handle:
        rows = list(csv.DictReader(handle))
    assert [sum(row["label"] == label for row in rows) for label in ("safe", "unsafe")] == [250, 200]
    assert [row["prompt"] for row in rows if refusal_phrase(row["prompt"])] == []


def test_every_key_is_documented(run):
    (run / "verdicts.refusal.jsonl").write_text(
        to_lines([Verdict("h0", 1, "refusal", "refused"), Verdict("b0", 1, "refusal", "answered")])
    )
    score_run(Run(run), make_scorer("vqa-v2"), TODAY)
    write_score_metrics(Run(run))
    found = json.loads((run / "score_metrics.json").read_text())
    assert found == to_json(read_score_metrics(Run(run)))
    keys = found.keys() | found["scores"][0].keys() | found["refusal_contrast"][0].keys()
    text = (ROOT / "docs/reference/metrics.md").read_text()
    assert not {key for key in keys if f"`{key}`" not in text}
