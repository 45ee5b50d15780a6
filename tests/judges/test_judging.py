"""Judging that is stopped and resumed, and verdicts that must not be mixed."""

import json
import random
import signal
import subprocess
import sys
import time
from dataclasses import replace

import pytest

from exitwise.errors import UserError
from exitwise.judges import judge_run
from exitwise.judges.guards import GUARDS
from exitwise.run.records import Verdict
from exitwise.run.run import Run
from tests.guard_fixture import POISON
from tests.judge_setup import judging, write_run

TEXTS = [f"{'word ' * (i % 11)}{POISON if i % 4 == 0 else 'tea'} {i % 40}" for i in range(40)]


@pytest.fixture(scope="module")
def judged(checkpoints, tmp_path_factory):
    run = write_run(tmp_path_factory.mktemp("judged") / "run", TEXTS)
    judge_run(Run(run), "llama-guard-3-8b", judging(checkpoints("llama-guard-3-8b"), judge_batch_size=2))
    return run


def test_cut_anywhere_a_judging_ends_with_the_same_bytes(judged, checkpoints, tmp_path):
    import shutil

    name = "verdicts.llama-guard-3-8b.jsonl"
    whole, rng = (judged / name).read_bytes(), random.Random(3)
    for case in range(3):
        run = tmp_path / str(case)
        shutil.copytree(judged, run)
        (run / name).write_bytes(whole[: rng.randrange(len(whole))])
        judge_run(Run(run), "llama-guard-3-8b", judging(checkpoints("llama-guard-3-8b"), judge_batch_size=2))
        assert (run / name).read_bytes() == whole
        assert (run / "judge.llama-guard-3-8b.json").read_bytes() == (
            judged / "judge.llama-guard-3-8b.json"
        ).read_bytes()


@pytest.mark.slow
def test_killed_a_judging_goes_on(judged, checkpoints, tmp_path):
    code = (
        "import sys; from exitwise.run.run import Run; from exitwise.judges import Judging, judge_run; "
        "judge_run(Run(sys.argv[1]), 'llama-guard-3-8b', Judging((sys.argv[2],), None, 2))"
    )
    run = write_run(tmp_path / "run", TEXTS)
    name, path = "verdicts.llama-guard-3-8b.jsonl", checkpoints("llama-guard-3-8b")
    process = subprocess.Popen([sys.executable, "-c", code, str(run), path])
    while process.poll() is None and not ((run / name).exists() and (run / name).stat().st_size):
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert (run / name).stat().st_size
    subprocess.run([sys.executable, "-c", code, str(run), path], check=True)
    assert (run / name).read_bytes() == (judged / name).read_bytes()


def test_nothing_is_asked_twice(judged, checkpoints, monkeypatch):
    from exitwise.judges import local

    before = (judged / "verdicts.llama-guard-3-8b.jsonl").read_bytes()
    monkeypatch.setattr(local, "load", lambda *a, **k: pytest.fail("loaded the judge again"))
    judge_run(Run(judged), "llama-guard-3-8b", judging(checkpoints("llama-guard-3-8b"), judge_batch_size=2))
    assert (judged / "verdicts.llama-guard-3-8b.jsonl").read_bytes() == before


def test_equal_questions_are_asked_once(checkpoints, tmp_path, monkeypatch):
    from exitwise.judges.local import LocalModel

    run = write_run(tmp_path / "run", ["Same."])
    row = (run / "completions.jsonl").read_text().splitlines()[0]
    (run / "completions.jsonl").write_text("".join(row.replace('"exit": 0', f'"exit": {i}') + "\n" for i in range(30)))
    asked, reply = [], LocalModel.reply
    monkeypatch.setattr(LocalModel, "reply", lambda self, texts, *a: (asked.extend(texts), reply(self, texts, *a))[1])  # type: ignore[func-returns-value]
    verdicts = judge_run(Run(run), "llama-guard-3-8b", judging(checkpoints("llama-guard-3-8b"), judge_batch_size=1))
    assert len(asked) == 1
    assert len({v.p_unsafe for v in verdicts}) == 1
    assert [v.exit for v in verdicts] == list(range(30))


def test_verdicts_of_other_wording_are_not_mixed_in(judged, checkpoints, monkeypatch):
    """As after an update of exitwise that mends a guard's prompt."""
    before = (judged / "verdicts.llama-guard-3-8b.jsonl").read_bytes()
    guard = GUARDS["llama-guard-3-8b"]
    reworded = {**GUARDS, "llama-guard-3-8b": replace(guard, last_turn="Is it safe?")}
    monkeypatch.setattr("exitwise.judges.judging.GUARDS", reworded)
    with pytest.raises(UserError, match=r"made with other options \(prompt_sha256"):
        judge_run(Run(judged), "llama-guard-3-8b", judging(checkpoints("llama-guard-3-8b"), judge_batch_size=2))
    assert (judged / "verdicts.llama-guard-3-8b.jsonl").read_bytes() == before


def test_another_model_s_verdicts_are_not_mixed_in(judged, checkpoints):
    before = (judged / "verdicts.llama-guard-3-8b.jsonl").read_bytes()
    other = checkpoints("llama-guard-3-8b", "unsafe")
    with pytest.raises(UserError, match=r"made with other options \(model"):
        judge_run(Run(judged), "llama-guard-3-8b", judging(other, judge_batch_size=2))
    assert (judged / "verdicts.llama-guard-3-8b.jsonl").read_bytes() == before


RECORDED = {
    "wildguard": "5877d8980581d816dbcda16e3c8a7520fa52aa6cddeea6a4ff8abfd1172df32a",
    "shieldgemma-2b": "a67bf0da2bf7a58d7f4a6dda92f544f9d80923d71a073d740ae01162579d2b4e",
    "llama-guard-3-1b": "d1f1f50edb5c577c8d69157cb23a012e562dcc68f037eacf5852c5973200c9ee",
    "rubric": "68566712b3d4d47dada723e0313206e8ac37a3377465bb0d4a69832bfb2355df",
}
"""prompt_sha256 in judge.<name>.json as written at commit d2fd867."""


@pytest.mark.parametrize("name", RECORDED)
def test_a_judging_of_an_earlier_release_can_be_resumed(name, tmp_path):
    run = write_run(tmp_path / "run", [])  # nothing to ask, so no model is loaded
    judge_run(Run(run), name, judging(tmp_path / "nothing"))
    assert json.loads((run / f"judge.{name}.json").read_text())["prompt_sha256"] == RECORDED[name]


def test_old_verdict_files_are_read_and_written_as_they_were():
    line = '{"sample": "a", "exit": 1, "judge": "refusal", "label": "refused", "reason": "says \'no\'"}'
    verdict = Verdict.from_dict(json.loads(line))
    assert verdict.to_json() == line
    whole = Verdict("a", 1, "x", "unsafe", "S1", ("S1",), 0.9, 0.5, False, 0.0, "unsafe\nS1")
    assert Verdict.from_dict(json.loads(whole.to_json())) == whole
    assert '"refusal": false, "score": 0.0' in whole.to_json()
