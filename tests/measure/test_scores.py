"""Figures from scores: means, their intervals, bands, over-refusal beside its contrast."""

import csv

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from exitwise import UserError
from exitwise.judges.refusal import refusal_phrase
from exitwise.measure import stats
from exitwise.measure.scores import (
    bootstrap_mean,
    mean_score,
    refusal_contrast,
    score_table,
    unfinished,
    write_score_metrics,
)
from exitwise.run.directory import to_lines
from exitwise.run.records import Completion, Sample, Score, Verdict
from exitwise.run.run import Run
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
    assert unfinished(run) == ["length (9 of 20)"]


VALUES = st.floats(0, 1)


@given(st.lists(st.tuples(VALUES, VALUES, st.sampled_from("abcd")), min_size=1, max_size=12), st.integers(0, 9))
@settings(deadline=None, max_examples=60)
def test_a_mean_lies_in_its_interval_s_world(rows, seed):
    values = np.array([row[:2] for row in rows])
    found = bootstrap_mean(values, [row[2] for row in rows], np.random.default_rng(seed), (0.0, 1.0), draws=200)
    assert found.value == pytest.approx(values.mean())
    if found.low is not None:
        assert 0 <= found.low <= found.high <= 1


@given(
    st.lists(st.tuples(*[st.sampled_from([0.0, 1.0, np.nan])] * 2, st.sampled_from("abcd")), min_size=1, max_size=12)
)
@settings(deadline=None, max_examples=60)
def test_of_noughts_and_ones_it_is_the_bootstrap_of_shares(rows):
    values, clusters = np.array([row[:2] for row in rows]), [row[2] for row in rows]
    ours = bootstrap_mean(values, clusters, np.random.default_rng(0), (0.0, 1.0), draws=200)
    assert ours == pytest.approx(stats.cluster_bootstrap(values, clusters, np.random.default_rng(0), draws=200))


def test_whole_clusters_are_resampled():
    """Ten copies of two prompts tell no more than two prompts."""
    values = np.array([[0.1]] * 10 + [[0.9]] * 10)
    together = bootstrap_mean(values, ["a"] * 10 + ["b"] * 10, np.random.default_rng(0), (0.0, 1.0))
    apart = bootstrap_mean(values, [str(i) for i in range(20)], np.random.default_rng(0), (0.0, 1.0))
    assert (together.low, together.high) == pytest.approx((0.1, 0.9))
    assert apart.high - apart.low < 0.4


def test_no_figure_claims_certainty():
    rng = np.random.default_rng(0)
    none = np.full((3, 1), np.nan)
    assert bootstrap_mean(none, list("abc"), rng) == (None, None, None)
    assert bootstrap_mean(np.full((3, 1), 1.5), list("abc"), rng) == (
        1.5,
        None,
        None,
    )  # alike, and no scale: nothing to say
    assert bootstrap_mean(np.array([[1.0], [2.0]]), ["a", "a"], rng) == (1.5, None, None)  # one cluster
    floor = bootstrap_mean(np.zeros((8, 1)), [str(i) for i in range(8)], rng, (0.0, 1.0))
    assert floor == (0, *stats.wilson(0, 8)[1:3])
    for wrong in (np.inf, 1.01):
        with pytest.raises(ValueError, match="outside"):
            bootstrap_mean(np.array([[wrong], [0.5]]), ["a", "b"], rng, (0.0, 1.0))


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
    assert rows == [(0, 0.0, None, None, None, None, 1, 0)]


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
    found = write_score_metrics(run)
    keys = found.keys() | found["scores"][0].keys() | found["refusal_contrast"][0].keys()
    text = (ROOT / "docs/reference/metrics.md").read_text()
    assert not {key for key in keys if f"`{key}`" not in text}
