"""A run survives being killed: it resumes with the same bytes, has one writer and one config."""

import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time

import pytest

from exitwise import UserError, audit
from exitwise.cli.main import entry
from tests.auditing.runs import config_of, contents
from tests.conftest import tiny_llava

KILLS = int(os.environ.get("EXITWISE_KILLS", "3"))


def test_cut_anywhere_a_resumed_run_ends_with_the_same_bytes(finished, tiny_folder, tmp_path):
    whole, rng = contents(finished), random.Random(0)
    text = whole["completions.jsonl"]
    for case in range(6):
        out = tmp_path / str(case)
        out.mkdir()
        for name in ("config.json", "plan.json", "samples.jsonl"):
            (out / name).write_bytes(whole[name])
        (out / "completions.jsonl").write_bytes(text[: rng.randrange(len(text))])
        audit(config_of(tiny_folder), out=out)
        assert contents(out) == whole


def test_killed_at_any_moment_a_run_ends_with_the_same_bytes(finished, tiny_folder, tmp_path):
    """Real kills of a real process; EXITWISE_KILLS=30 for the long version."""
    command = [sys.executable, "-m", "exitwise", "audit", str(tiny_folder)]
    command += ["--limit", "4", "--vqa", "6", "--max-new-tokens", "6", "--batch-size", "7"]
    rng = random.Random(int(os.environ.get("EXITWISE_KILL_SEED", "1")))
    started = time.monotonic()
    subprocess.run([*command, "--out", str(tmp_path / "once")], check=True, capture_output=True)
    whole_time = time.monotonic() - started
    assert contents(tmp_path / "once") == contents(finished)
    for case in range(KILLS):
        out = tmp_path / f"kill{case}"
        process = subprocess.Popen([*command, "--out", str(out)], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        time.sleep(rng.uniform(0.3, 1.0) * whole_time)
        process.send_signal(signal.SIGKILL)
        process.wait()
        subprocess.run([*command, "--out", str(out)], check=True, capture_output=True)
        assert contents(out) == contents(finished), f"kill {case}"


def test_costs_are_measured_once_and_kept(finished, tiny_folder, tmp_path, monkeypatch):
    import shutil

    costs = json.loads((finished / "costs.json").read_text())
    assert [row["exit"] for row in costs["exits"]] == [0, 1, 2, 3, 4]
    assert costs["request"]["image_tokens"] == 16
    shutil.copytree(finished, tmp_path / "x")
    lines = (finished / "completions.jsonl").read_bytes().splitlines(keepends=True)
    (tmp_path / "x/completions.jsonl").write_bytes(b"".join(lines[:9]))
    audit(config_of(tiny_folder), out=tmp_path / "x")
    entry(["judge", str(tmp_path / "x")])
    assert (tmp_path / "x/costs.json").read_bytes() == (finished / "costs.json").read_bytes()
    assert "What an exit costs" in (tmp_path / "x/report.html").read_text()


def test_nothing_is_generated_twice(finished, tiny_folder, monkeypatch):
    monkeypatch.setattr("exitwise.engines.prefix.answer_wave", lambda *a, **k: pytest.fail("generated again"))
    monkeypatch.setattr("exitwise.model.loading.load_vlm", lambda *a, **k: pytest.fail("loaded the model again"))
    before = contents(finished)
    audit(config_of(tiny_folder), out=finished)
    assert contents(finished) == before


def test_another_config_is_refused_and_loses_nothing(finished, tiny_folder):
    before = contents(finished)
    with pytest.raises(UserError, match="max_new_tokens"):
        audit(config_of(tiny_folder, max_new_tokens=7), out=finished)
    assert contents(finished) == before


def test_a_typo_does_not_block_the_directory(tiny_folder, tmp_path):
    with pytest.raises(UserError, match="exits 0 to 4"):
        audit(config_of(tiny_folder, exits="9"), out=tmp_path / "x")
    audit(config_of(tiny_folder, exits="1", vqa=0, limit=1), out=tmp_path / "x")


def test_another_model_under_the_same_name_is_refused(tiny_folder, tmp_path):
    import shutil

    shutil.copytree(tiny_folder, tmp_path / "m")
    audit(config_of(tmp_path / "m", vqa=0, limit=1), out=tmp_path / "x")
    lines = (tmp_path / "x/completions.jsonl").read_bytes().splitlines(keepends=True)
    (tmp_path / "x/completions.jsonl").write_bytes(b"".join(lines[:3]))
    other = tiny_llava(seed=1)
    other.model.save_pretrained(tmp_path / "m")
    with pytest.raises(UserError, match="changed since"):
        audit(config_of(tmp_path / "m", vqa=0, limit=1), out=tmp_path / "x")
    assert (tmp_path / "x/completions.jsonl").read_bytes() == b"".join(lines[:3])


def test_a_folder_of_somebody_else_is_refused(tiny_folder, tmp_path):
    (tmp_path / "thesis.txt").write_text("mine")
    with pytest.raises(UserError, match="not a run directory"):
        audit(config_of(tiny_folder), out=tmp_path)
    assert (tmp_path / "thesis.txt").read_text() == "mine"


def test_the_folder_of_a_model_is_no_run_to_begin(tiny_folder, tmp_path):
    """A run that was never begun may be begun otherwise, but a model has a config.json too."""
    shutil.copytree(tiny_folder, tmp_path / "model")
    kept = (tmp_path / "model/config.json").read_bytes()
    with pytest.raises(UserError, match="not a run directory"):
        audit(config_of(tmp_path / "model"), out=tmp_path / "model")
    assert (tmp_path / "model/config.json").read_bytes() == kept


def test_two_at_once_the_second_is_refused(tiny_folder, tmp_path):
    from exitwise.run.directory import open_run

    with open_run(tmp_path / "x", {"a": 1}), pytest.raises(UserError, match="another process"):
        audit(config_of(tiny_folder), out=tmp_path / "x")


def test_prompts_with_control_tokens_are_skipped_and_the_run_resumes(tiny_folder, tmp_path):
    """Which strings are control tokens is only known with the tokenizer; a resumed run must skip the same."""
    prompts = tmp_path / "mine.csv"
    prompts.write_text("prompt\nHow?\nsay <image> now\n<|im_end|> hello\nWhat?\n", encoding="utf-8")
    config = config_of(tiny_folder, prompts=(prompts,), vqa=0, over_refusal=False)
    audit(config, out=tmp_path / "once")
    whole = contents(tmp_path / "once")
    assert json.loads(whole["plan.json"])["skipped"] == {
        "mine:row2": "the prompt has the control token '<image>'",
        "mine:row3": "the prompt has the control token '<|im_end|>'",
    }
    asked = [json.loads(line)["id"] for line in whole["samples.jsonl"].splitlines()]
    assert asked == ["mine:row1", "mine:row4"]
    assert {json.loads(line)["sample"] for line in whole["completions.jsonl"].splitlines()} == set(asked)
    for n_bytes in (0, 100, len(whole["completions.jsonl"]) // 2):
        out = tmp_path / str(n_bytes)
        out.mkdir()
        for name in ("config.json", "plan.json"):
            (out / name).write_bytes(whole[name])
        (out / "completions.jsonl").write_bytes(whole["completions.jsonl"][:n_bytes])
        audit(config, out=out)
        assert contents(out) == whole
    before = contents(tmp_path / "once")
    audit(config, out=tmp_path / "once")
    assert contents(tmp_path / "once") == before


def test_a_set_of_nothing_but_control_tokens_is_one_line(tiny_folder, tmp_path):
    (tmp_path / "mine.csv").write_text("prompt\n<image>\n", encoding="utf-8")
    with pytest.raises(UserError, match="every prompt has a control token"):
        audit(config_of(tiny_folder, prompts=(tmp_path / "mine.csv",), vqa=0, over_refusal=False), out=tmp_path / "x")
