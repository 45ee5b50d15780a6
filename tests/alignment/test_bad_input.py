"""Bad input of `exitwise align` is one line that says what to do; trackers get every step."""

from typing import ClassVar

import pytest
from accelerate import tracking

from exitwise.alignment.loop import align
from tests.align_setup import config_of
from tests.alignment.runs import code_of, command, one_line, rows_of


@pytest.mark.parametrize(
    ("more", "said"),
    [
        (["--mix", "0.5", "0.5", "0.5"], "three shares that add up to 1"),
        (["--mix", "1.5", "-0.5", "0"], "three shares that add up to 1"),
        (["--mix", "0", "1", "0", "--probe", "2"], "without harmful prompts"),
        (["--mix", "0", "1", "0", "--best-of", "2"], "without harmful prompts"),
        (["--mix", "0", "1", "0", "--exits", "0,1", "--schedule", "worst"], "without harmful prompts"),
        (["--batch-size", "9"], "cannot be divided into 2 mini-batches of 1 micro-batches; give a multiple of 2"),
        (["--batch-size", "8", "--num-mini-batches", "4", "--gradient-accumulation-steps", "4"], "a multiple of 16"),
        (["--method", "grpo", "--batch-size", "6"], "not a multiple of --group-size 4"),
        (["--kl-target", "1", "--kl-horizon", "7"], "--kl-horizon 7 is less than --batch-size 8"),
        (["--audit", "."], "--schedule worst"),
        (["--gamma", "1.1"], "--gamma got 1.1; expected 0 to 1"),
        (["--steps", "0"], "--steps got 0"),
        (["--mix", "nan", "0.5", "0.5"], "three shares that add up to 1"),
        (["--kl-coef", "inf"], "--kl-coef got inf; expected at least 0, and finite"),
        (["--kl-coef", "0", "--kl-target", "1"], "--kl-target multiplies --kl-coef, which is 0"),
        (["--reward-template", "question"], "not for --reward matcher"),
        (["--lr", "nan"], "--lr got nan"),
        (["--prompts", "EMPTY"], "no usable row"),
        (["--images", "NONE"], "no readable image"),
        (["--tracker", "nonsense"], "--tracker got 'nonsense'; expected all, or one of: "),
    ],
)
def test_bad_input_is_one_line_before_anything_is_loaded(tmp_path, material, capsys, more, said):
    (tmp_path / "empty.txt").touch()
    (tmp_path / "none").mkdir()
    more = [{"EMPTY": str(tmp_path / "empty.txt"), "NONE": str(tmp_path / "none")}.get(word, word) for word in more]
    assert code_of(command("no-such-model", material, tmp_path / "run", *more)) == 2
    assert said in one_line(capsys)


def test_a_data_set_of_which_nothing_is_left_is_one_line(tmp_path, material, capsys):
    (tmp_path / "rows.csv").write_text("prompt,file\na,bad.png\n")
    (tmp_path / "bad.png").write_bytes(b"no picture")
    more = ["--prompts", str(tmp_path / "rows.csv"), "--map", "image=file"]
    assert code_of(command("no-such-model", material, tmp_path / "run", *more)) == 2
    assert "no harmful sample can be used, and --mix gives them 1 of a batch; first skipped: rows" in one_line(capsys)


def test_an_exit_the_model_lacks(tiny_folder, material, tmp_path, capsys):
    assert code_of(command(tiny_folder, material, tmp_path / "run", "--exits", "9")) == 2
    assert "exits 0 to 4" in one_line(capsys)


@pytest.mark.parametrize(
    ("more", "said"),
    [
        (["--exits", "1,2,3", "--schedule", "each"], "cannot be divided among 3 exits"),
        (["--exits", "1,2", "--schedule", "worst", "--audit", "NONE"], "metrics.json does not exist"),
        (["--mix", "0.95", "0", "0.05"], "has 8 prompts per step, of which --mix (0.95, 0.0, 0.05) gives (8, 0, 0)"),
        (["--hold-out", "frog"], "--hold-out got 'frog'"),
    ],
)
def test_a_mistake_that_only_the_model_shows_may_be_mended(tiny_folder, material, tmp_path, capsys, more, said):
    """In the same directory: nothing was begun there."""
    more = [str(tmp_path / "none") if word == "NONE" else word for word in more]
    assert code_of(command(tiny_folder, material, tmp_path / "run", *more)) == 2
    assert said in one_line(capsys)
    assert not (tmp_path / "run/plan.json").exists()


def test_features_that_are_no_folder(tiny_folder, material, tmp_path, capsys):
    (tmp_path / "file").touch()
    assert code_of(command(tiny_folder, material, tmp_path / "run", "--features", str(tmp_path / "file"))) == 2
    assert "is no folder; give --features one" in one_line(capsys)


class StrictTracker:
    """As particular as TensorBoard's: no lists or objects among the settings."""

    name, requires_logging_directory = "strict", False
    told: ClassVar[list] = []

    def __init__(self, project):
        self.told.clear()

    def store_init_configuration(self, values):
        assert all(value is None or isinstance(value, str | int | float) for value in values.values())

    def log(self, values, step):
        self.told.append((step, values["objective/kl"]))

    def start(self): ...
    def finish(self): ...


def test_a_tracker_gets_settings_it_can_take_and_every_step(tiny_folder, material, tmp_path, monkeypatch):
    monkeypatch.setitem(tracking.LOGGER_TYPE_TO_CLASS, "strict", StrictTracker)
    align(config_of(tiny_folder, material, tracker="strict"), out=tmp_path / "run")
    assert StrictTracker.told == [(row["step"], row["objective/kl"]) for row in rows_of(tmp_path / "run")]


def test_a_tracker_that_is_not_installed_is_not_passed_over(tmp_path, material, monkeypatch, capsys):
    monkeypatch.setattr(tracking, "_available_trackers", [])
    assert code_of(command("no-such-model", material, tmp_path / "run", "--tracker", "tensorboard")) == 2
    assert "--tracker tensorboard is not installed" in one_line(capsys)


def test_a_prompt_longer_than_the_context(tiny_folder, material, tmp_path, capsys):
    (tmp_path / "long.txt").write_text("short\n" + "x" * 1100)
    assert code_of(command(tiny_folder, material, tmp_path / "run", "--prompts", str(tmp_path / "long.txt"))) == 2
    assert "model's context is 1024; shorten it or lower --max-new-tokens" in one_line(capsys)
