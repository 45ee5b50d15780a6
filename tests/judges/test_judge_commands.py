"""The commands that judge: options, several judges, images of public sets, calibration."""

import json

import pytest

from exitwise.errors import UserError
from exitwise.judges import Judging, judge_run, parse_judges
from exitwise.run.directory import read_records
from exitwise.run.records import Completion, Sample, Verdict
from exitwise.run.run import Run
from tests.guard_fixture import save_vision_guard
from tests.judge_setup import HARMFUL, HARMLESS, judging, write_run


def test_which_model_a_judge_takes():
    assert Judging().model_of("llama-guard-4") == "meta-llama/Llama-Guard-4-12B"
    assert Judging(("a/b",)).model_of("llama-guard-4") == "a/b"
    two = Judging(("llama-guard-4=a/b", "wildguard=c=d"))
    assert (two.model_of("llama-guard-4"), two.model_of("wildguard")) == ("a/b", "c=d")
    assert two.model_of("harmbench") == "cais/HarmBench-Llama-2-13b-cls"
    for broken, name in ((Judging(("a", "b")), "wildguard"), (Judging(), "rubric")):
        with pytest.raises(UserError, match="--judge-model"):
            broken.model_of(name)


def test_names_of_judges():
    assert parse_judges("refusal, llama-guard-4,refusal") == ("refusal", "llama-guard-4")
    for broken in ("", "refusal,", "oracle"):
        with pytest.raises(UserError, match="--judge got"):
            parse_judges(broken)


def test_a_judge_that_is_not_there_is_one_line(tmp_path):
    run = write_run(tmp_path / "run", HARMLESS)
    with pytest.raises(UserError, match=r"cannot load .*for --judge-model a folder") as error:
        judge_run(Run(run), "wildguard", judging(tmp_path / "nothing"))
    assert "\n" not in str(error.value)


def test_images_of_public_sets_are_found_again(tiny_folder, tmp_path, monkeypatch, capsys):
    """--image-root is relative to where the audit ran; the judging runs elsewhere."""
    from PIL import Image

    from exitwise.cli.main import entry

    (tmp_path / "pictures").mkdir()
    Image.new("RGB", (20, 20), "red").save(tmp_path / "pictures/a.png")
    (tmp_path / "rows.csv").write_text("prompt,file\nHow does it work?,a.png\n")
    monkeypatch.chdir(tmp_path)
    words = ["audit", str(tiny_folder), "--data", "own-harmful:rows.csv", "--map", "image=file", "--vqa", "0"]
    words += ["--image-root", "pictures", "--no-over-refusal", "--exits", "default", "--out", "run"]
    entry([*words, "--max-new-tokens", "4"])
    assert json.loads((tmp_path / "run/config.json").read_text())["image_folders"] == {
        "own-harmful": str(tmp_path / "pictures")
    }
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    guard = ["--judge", "llama-guard-3-vision", "--judge-model", str(save_vision_guard(tmp_path / "guard"))]
    entry(["judge", str(tmp_path / "run"), *guard])
    (verdict,) = read_records(tmp_path / "run/verdicts.llama-guard-3-vision.jsonl", Verdict)
    assert verdict.label == "unsafe", "the tiny guard was not shown the image"
    # the images moved: one line that says so; the audit started again with their new place is the same run
    (tmp_path / "pictures").rename(tmp_path / "moved")
    (tmp_path / "run/judge.llama-guard-3-vision.json").unlink()
    with pytest.raises(SystemExit):
        entry(["judge", str(tmp_path / "run"), *guard])
    assert "image_folders" in capsys.readouterr().err.strip().splitlines()[-1]


def test_the_command_judges_with_several(tiny_folder, checkpoints, tmp_path, capsys):
    from exitwise.cli.main import entry

    out = tmp_path / "run"
    entry(
        [
            "audit",
            str(tiny_folder),
            "--limit",
            "2",
            "--vqa",
            "6",
            "--max-new-tokens",
            "4",
            "--exits",
            "0,default",
            "--out",
            str(out),
        ]
    )
    before = (out / "completions.jsonl").read_bytes()
    models = [f"{name}={checkpoints(name)}" for name in ("llama-guard-3-8b", "wildguard")]
    entry(["judge", str(out), "--judge", "refusal,llama-guard-3-8b,wildguard", "--judge-model", *models])
    assert (out / "completions.jsonl").read_bytes() == before
    samples = {s.id: s for s in read_records(out / "samples.jsonl", Sample)}
    by_judge = {
        name: read_records(out / f"verdicts.{name}.jsonl", Verdict)
        for name in ("refusal", "llama-guard-3-8b", "wildguard")
    }
    vqa = [[v.label for v in verdicts if samples[v.sample].kind == "vqa"] for verdicts in by_judge.values()]
    assert vqa[0] == vqa[1] == vqa[2], "utility does not depend on the judge"
    assert json.loads((out / "metrics.json").read_text())["judge"] == "refusal"
    entry(["judge", str(out), "--judge", "wildguard", "--judge-model", models[1]])
    metrics = json.loads((out / "metrics.json").read_text())
    assert metrics["judge"] == "wildguard"
    assert all(e["utility"]["n"] for e in metrics["exits"])
    assert "llama-guard-3-8b: 20/20 verdicts" in capsys.readouterr().err


def test_asr_by_a_guard_counts_unsafe(checkpoints, tmp_path):
    from exitwise.measure.metrics import compute_metrics

    run = write_run(tmp_path / "run", HARMLESS + HARMFUL)
    verdicts = judge_run(Run(run), "wildguard", judging(checkpoints("wildguard")))
    samples, completions = (
        read_records(run / f, k) for f, k in (("samples.jsonl", Sample), ("completions.jsonl", Completion))
    )
    got = compute_metrics(samples, completions, verdicts, model="m", default_exit=0, n_blocks=3, judge="wildguard")
    assert sum(row.asr.successes for row in got.exits) == 2


def test_a_guard_is_calibrated(checkpoints, tmp_path, monkeypatch, capsys):
    """Where a model comes from is said as for judging; labelled answers have no image and no run."""
    from exitwise.cli.main import entry

    rows = [(text, int("poison" in text)) for text in HARMLESS[:2] + HARMFUL]
    lines = [f'"How?","{text}",{label}' for text, label in rows]
    (tmp_path / "labels.csv").write_text("\n".join(["prompt,answer,human1", *lines]) + "\n")
    monkeypatch.chdir(tmp_path)
    models = {"wildguard": checkpoints("wildguard"), "llama-guard-3-vision": str(save_vision_guard(tmp_path / "v"))}
    for name, path in models.items():
        entry(["calibrate", name, "--labels", "labels.csv", "--judge-model", path])
    found = {name: json.loads((tmp_path / f"calibration.{name}.json").read_text()) for name in models}
    assert [found["wildguard"][key]["successes"] for key in ("sensitivity", "specificity")] == [2, 2]
    assert found["llama-guard-3-vision"]["n"] == 4
    with pytest.raises(SystemExit):
        entry(["calibrate", "rubric", "--labels", "labels.csv"])
    assert "the judge rubric needs --judge-model" in capsys.readouterr().err
