"""`judge` on a finished run: verdicts, figures and report again, without the model."""

import json

import pytest

from exitwise import UserError, judge
from exitwise.run import directory
from exitwise.run.run import Run
from tests.score_setup import write_run


@pytest.fixture
def run(tmp_path):
    folder = write_run(tmp_path / "run", exits=(1, 2))
    directory.write_json(folder / "env.json", {"versions": {}, "device": "cpu", "dtype": "float32", "threads": 1})
    return folder


def test_judge_writes_verdicts_figures_and_report(run):
    found = judge(run, "refusal")
    assert isinstance(found, Run)
    assert [(v.sample, v.exit) for v in found.verdicts["refusal"]] == [(c.sample, c.exit) for c in found.completions]
    assert json.loads((run / "metrics.json").read_text())["judge"] == "refusal"
    assert (run / "report.html").stat().st_size > 10_000


def test_judging_and_measuring_parse_each_file_once(run, monkeypatch):
    from exitwise.auditing.judging import judge_and_measure

    parsed, read = [], directory.read_records

    def recording(path, kind):
        parsed.append(path.name)
        return read(path, kind)

    monkeypatch.setattr(directory, "read_records", recording)
    judge_and_measure(Run.open(run))
    assert sorted(parsed) == ["completions.jsonl", "samples.jsonl"]


def test_options_are_keywords(run):
    with pytest.raises(UserError, match="--judge-batch-size got 0"):
        judge(run, "rubric", judge_model="m", judge_batch_size=0)
    with pytest.raises(UserError, match="did you mean 'judge_model'"):
        judge(run, "rubric", judge_modell="m")
    with pytest.raises(UserError, match="--judge got 'oracle'"):
        judge(run, "oracle")
