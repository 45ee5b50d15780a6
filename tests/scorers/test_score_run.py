"""Scoring a run: numbers that are never dropped, never averaged over two scorers, and the same after any kill."""

import json
import os
import random
import subprocess
import sys

import pytest

from exitwise import UserError
from exitwise.cli.main import entry
from exitwise.run import directory
from exitwise.run.directory import read_records, to_lines
from exitwise.run.records import Completion, Score, Verdict
from exitwise.run.run import Run
from exitwise.scorers import score, score_run
from exitwise.scorers.base import ScorerInfo
from tests.score_setup import TODAY, Length, contents, write_run


def test_a_score_goes_in_and_out_of_json():
    for record in (Score("a", 3, "x@1", 0.25), Score("a", 0, "x@1", None, "empty answer")):
        assert Score.from_dict(json.loads(record.to_json())) == record


@pytest.mark.parametrize("value", [float("nan"), float("inf"), None])
def test_what_is_no_number_needs_a_reason_instead(value):
    with pytest.raises(ValueError, match=r"finite|reason"):
        Score("a", 0, "x@1", value)


@pytest.mark.parametrize("value", ["0.5", True, [0.5]])
def test_what_only_looks_like_a_number_is_refused(value):
    with pytest.raises(TypeError, match="expected a number"):
        Score("a", 0, "x@1", value)


def test_nan_in_a_file_is_named_by_its_line(tmp_path):
    (tmp_path / "s.jsonl").write_text('{"sample": "a", "exit": 0, "scorer": "x@1", "value": NaN}\n')
    with pytest.raises(UserError, match=r"s\.jsonl, line 1: .*finite"):
        read_records(tmp_path / "s.jsonl", Score)


def test_scores_follow_the_answers(run):
    scores = score_run(Run(run), Length(), TODAY)
    completions = [c for c in read_records(run / "completions.jsonl", Completion) if c.sample.startswith("h")]
    assert [(s.sample, s.exit, s.value) for s in scores] == [(c.sample, c.exit, len(c.text) / 100) for c in completions]
    assert {s.scorer for s in scores} == {"length@1"}
    about = json.loads((run / "scores.length.json").read_text())
    assert about["begun"] == TODAY
    assert (about["backend"], about["version"], about["n_answers"]) == ("len", "1", 20)


def test_answers_alike_are_scored_once(tmp_path):
    run = write_run(tmp_path / "run", text=lambda i, exit: "Same.")
    scorer = Length()
    assert len(score_run(Run(run), scorer, TODAY)) == 20
    assert scorer.batches == [["Same."]]


def test_what_is_scored_is_not_scored_again(run):
    score_run(Run(run), Length(), TODAY)
    before = contents(run)
    again = Length()
    score_run(Run(run), again, "2027-01-01")
    assert again.batches == []
    assert contents(run) == before


def test_cut_anywhere_scoring_ends_with_the_same_bytes(run):
    first = Length()
    score_run(Run(run), first, TODAY)
    whole, path, rng = contents(run), run / "scores.length.jsonl", random.Random(0)
    for _ in range(12):
        kept = path.read_bytes()[: rng.randrange(len(whole["scores.length.jsonl"]))]
        path.write_bytes(kept)
        again = Length()
        score_run(Run(run), again, TODAY)
        assert contents(run) == whole
        assert again.batches == first.batches[kept.count(b"\n") // 4 :]  # whole batches, as they were


def test_a_number_that_is_none_becomes_a_reason(run):
    scores = score_run(Run(run), Length(value=lambda text: float("nan") if "2" in text else 0.5), TODAY)
    assert len(scores) == 20
    assert {(s.value, s.reason) for s in scores} == {(None, "the scorer gave nan"), (0.5, "")}


def test_another_version_is_refused_and_loses_nothing(run):
    score_run(Run(run), Length(), TODAY)
    before = contents(run)
    with pytest.raises(UserError, match=r"made by length@1, this is length@2 .* not averaged"):
        score_run(Run(run), Length(version="2"), TODAY)
    with pytest.raises(UserError, match="quantity"):
        score_run(Run(run), Length(quantity="reward"), TODAY)
    assert contents(run) == before


def test_other_answers_are_refused(run):
    score_run(Run(run), Length(), TODAY)
    path = run / "completions.jsonl"
    path.write_text(path.read_text().replace("Answer 0 at 1", "Answer 0 at one"))
    with pytest.raises(UserError, match="answers_sha256"):
        score_run(Run(run), Length(), TODAY)


def test_before_the_first_score_a_typo_may_be_corrected(run):
    def broken(text):
        raise UserError("no key")

    with pytest.raises(UserError, match="no key"):
        score_run(Run(run), Length(version="typo", value=broken), TODAY)
    assert {s.scorer for s in score_run(Run(run), Length(), TODAY)} == {"length@1"}


def test_runs_that_cannot_be_scored(run, tmp_path):
    scorer = Length()
    scorer.info = ScorerInfo("length", "len", "1", "toxicity", ())
    with pytest.raises(UserError, match="no answers of the kind"):
        score_run(Run(run), scorer, TODAY)
    lines = (run / "completions.jsonl").read_text().splitlines(keepends=True)
    (run / "completions.jsonl").write_text("".join(lines[:7]))
    with pytest.raises(UserError, match="7 of 60 answers; finish it"):
        score_run(Run(run), Length(), TODAY)


def test_the_command(run, capsys):
    verdicts = [
        Verdict(f"{kind}{i}", 1, "refusal", "refused" if kind == "h" else "answered") for kind in "hb" for i in range(5)
    ]
    (run / "verdicts.refusal.jsonl").write_text(to_lines(verdicts))
    entry(["score", str(run), "--scorer", "vqa-v2,vqa-v2-always"])
    printed = capsys.readouterr().out
    assert "AS-UT  exit 3      90.00  n 5, unscored 0  vqa-v2@1" in printed
    assert "AAS-UT late band   90.00  n 5, unscored 0  vqa-v2-always@1" in printed
    assert "exit 1: refuses 100 % of harmful and 0 % of harmless requests" in printed
    before = (run / "score_metrics.json").read_bytes()
    entry(["score", str(run)])
    assert (run / "score_metrics.json").read_bytes() == before


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--scorer", "toxic"], "expected one of: perspective"),
        (["--scorer", "reward:"], "expected one of: perspective"),
        (["--scorer", "vqa-v2,detoxify", "--model", "x"], "--model is for one scorer"),
        (["--scorer", "vqa-v2", "--batch-size", "0"], "--batch-size got 0"),
    ],
)
def test_one_line_for_what_is_wrong(run, words, message, capsys):
    with pytest.raises(SystemExit) as stop:
        entry(["score", str(run), *words])
    assert stop.value.code == 2
    assert message in capsys.readouterr().err


def test_scores_without_weights_need_no_torch():
    code = "import sys, exitwise.measure.scores, exitwise.scorers as s; s.make_scorer('perspective'); "
    code += "s.make_scorer('vqa-v2'); sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False, env=os.environ).returncode == 0


def test_from_a_notebook_a_run_is_parsed_once(run, monkeypatch):
    """`score` returns the run with its scores; what scoring wrote is not parsed again."""
    parsed = []
    read = directory.read_records

    def recording(path, kind):
        parsed.append(path.name)
        return read(path, kind)

    monkeypatch.setattr(directory, "read_records", recording)
    opened = Run.open(run)
    before = (opened.samples, opened.completions)
    assert score_run(opened, Length(), TODAY) == opened.scores["length"]
    assert (opened.samples, opened.completions) == before
    assert sorted(parsed) == ["completions.jsonl", "samples.jsonl"]


def test_score_returns_the_run_with_its_figures(run):
    found = score(run, "vqa-v2", batch_size=7)
    assert found.path == run
    assert len(found.scores["vqa-v2"]) == 20
    assert {row["metric"] for row in json.loads((run / "score_metrics.json").read_text())["scores"]} == {
        "AS-UT",
        "AAS-UT",
    }
    assert score(found, "vqa-v2-always") is found
    assert set(found.scores) == {"vqa-v2", "vqa-v2-always"}
    with pytest.raises(UserError, match="for one scorer"):
        score(run, "vqa-v2,detoxify", model="x")
