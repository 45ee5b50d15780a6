"""`Run`: each file is parsed once, figures and answers are frames, and metrics.json survives the round trip."""

import json

import matplotlib
import pytest

from exitwise import Run, UserError
from exitwise.run import directory
from exitwise.run.exit import Exit
from exitwise.run.typed import to_json
from tests.report_fixture import HOSTILE, write_run


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write_run(tmp_path_factory.mktemp("run") / "run")


def test_metrics_are_what_the_file_holds(folder):
    metrics = Run.open(folder).metrics
    assert to_json(metrics) == json.loads((folder / "metrics.json").read_text())
    assert metrics.by_exit[8].exit == Exit([8])
    assert metrics.by_exit[8].share("asr") is metrics.by_exit[8].asr


def test_each_file_is_parsed_once(folder, monkeypatch):
    parsed = []
    for name in ("read_json", "read_records"):
        real = getattr(directory, name)

        def count(path, *rest, real=real):
            parsed.append(path.name)
            return real(path, *rest)

        monkeypatch.setattr(directory, name, count)
    run = Run.open(folder)
    for _ in range(2):
        assert len(run.answers()) == len(run.completions)
        assert len(run.figures()) == len(run.metrics.exits)
        assert run.config.judge == "refusal"
        assert run._repr_html_()
    assert sorted(parsed) == sorted(set(parsed))
    assert {"samples.jsonl", "completions.jsonl", "verdicts.refusal.jsonl", "metrics.json"} <= set(parsed)


def test_frames(folder):
    run = Run.open(folder)
    figures = run.figures().set_index("exit")
    eight = run.metrics.by_exit[8]
    assert figures.loc["8", ["asr", "asr_low", "asr_high", "asr_n"]].tolist() == [
        eight.asr.value, eight.asr.low, eight.asr.high, eight.asr.n
    ]  # fmt: skip
    assert figures.index[figures.may_stop].tolist() == [str(e) for e in run.answer.stop_at]
    answers = run.answers()
    let_through = answers.query("exit == '8' and kind == 'harmful' and label == 'answered'")
    kinds = {sample.id: sample.kind for sample in run.samples}
    said = [
        v for v in run.verdicts["refusal"] if v.exit == 8 and v.label == "answered" and kinds[v.sample] == "harmful"
    ]
    assert let_through["sample"].tolist() == [v.sample for v in said] != []


def test_the_summary_is_escaped(folder, tmp_path):
    metrics = json.loads((folder / "metrics.json").read_text())
    metrics["answer"]["headline"] = "".join(HOSTILE)
    (tmp_path / "config.json").write_text((folder / "config.json").read_text())
    (tmp_path / "metrics.json").write_text(json.dumps(metrics))
    page = Run.open(tmp_path)._repr_html_()
    assert "<script" not in page
    assert "&lt;script" in page


def test_the_plot_shows_each_share(folder):
    matplotlib.use("agg")
    run = Run.open(folder)
    axes = run.plot()
    lines = {line.get_label(): line for line in axes.get_lines()}
    assert {"ASR", "utility", "over-refusal", "default exit"} <= lines.keys()
    assert list(lines["ASR"].get_ydata()) == [100 * row.asr.value for row in run.metrics.exits]
    assert run.plot(axes) is axes


@pytest.mark.parametrize("broken", ["{}", '{"exits": 3}', "[]", "{"])
def test_a_broken_file_is_named(folder, tmp_path, broken):
    (tmp_path / "config.json").write_text((folder / "config.json").read_text())
    (tmp_path / "metrics.json").write_text(broken)
    with pytest.raises(UserError, match=r"metrics\.json"):
        assert Run.open(tmp_path).metrics


def test_what_is_no_run(tmp_path):
    with pytest.raises(UserError, match="no config"):
        Run.open(tmp_path)
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(UserError, match=r"metrics\.json does not exist"):
        assert Run.open(tmp_path).metrics
    with pytest.raises(KeyError):
        assert Run.open(tmp_path).verdicts["refusal"]


def test_what_is_written_is_what_is_read(folder, tmp_path):
    source, run = Run.open(folder), Run(tmp_path)
    run.write_verdicts("other", source.verdicts["refusal"][:3])
    run.write_metrics(source.metrics)
    fresh = Run(tmp_path)
    assert fresh.verdicts["other"] == run.verdicts["other"] == source.verdicts["refusal"][:3]
    assert fresh.metrics == run.metrics == source.metrics
    assert (tmp_path / "metrics.json").read_text() == json.dumps(
        json.loads((folder / "metrics.json").read_text()), indent=1, ensure_ascii=False
    ) + "\n"
