"""Training a reward model: the loss, what is learnt, resuming, pairs held out, the command line."""

import json
import math
import resource
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from exitwise.data.preferences import Preference, load_preferences
from exitwise.errors import UserError
from exitwise.rewards import training
from exitwise.rewards.checkpoint import load_checkpoint
from exitwise.rewards.config import RewardConfig
from exitwise.rewards.evaluation import evaluate, evaluate_reward
from exitwise.rewards.loading import load_reward
from exitwise.rewards.pairs import split_by_prompt
from exitwise.rewards.training import batch_order, bradley_terry_loss, lr_at, train_reward
from exitwise.run.directory import to_lines
from tests.conftest import tiny_llava
from tests.families import TINY
from tests.reward_setup import ANSWERS, PROMPTS, QUESTIONS, files_of, small


def test_bradley_terry_by_hand():
    """σ(2) = 0.880797, σ(-1) = 0.268941: -(ln 0.880797 + ln 0.268941) / 2 = (0.126928 + 1.313262) / 2."""
    loss = bradley_terry_loss(torch.tensor([3.0, 0.5]), torch.tensor([1.0, 1.5]))
    assert float(loss) == pytest.approx(0.720095, abs=1e-6)
    assert float(bradley_terry_loss(torch.zeros(3), torch.zeros(3))) == pytest.approx(math.log(2))


def test_bradley_terry_gradient_by_hand():
    """d loss / d chosen = -(1 - σ(margin)) / B."""
    chosen = torch.tensor([3.0, 0.5], requires_grad=True)
    bradley_terry_loss(chosen, torch.tensor([1.0, 1.5])).backward()
    assert chosen.grad.tolist() == pytest.approx([-(1 - 0.880797) / 2, -(1 - 0.268941) / 2], abs=1e-6)


def test_bradley_terry_of_a_hopeless_pair_is_finite():
    assert float(bradley_terry_loss(torch.tensor([-500.0]), torch.tensor([500.0]))) == pytest.approx(1000)


@pytest.mark.parametrize("tuning", ["lora", "full"])
@pytest.mark.parametrize("kind", ["vlm", "text"])
def test_training_learns_and_can_be_loaded_again(tmp_path, tiny_folder, text_folder, pairs, tuning, kind):
    backbone = tiny_folder if kind == "vlm" else text_folder
    config = small(backbone, pairs, tuning=tuning, epochs=6, lr=1e-2 if tuning == "lora" else 3e-3)
    metrics = train_reward(config, tmp_path / "run")
    assert metrics["all"].accuracy.value == 1.0
    assert set(metrics) == {"all", "a", "b"}
    held_out = split_by_prompt(load_preferences(pairs).pairs, 0.15, 0).held_out
    again = evaluate(load_reward(tmp_path / "run"), held_out)
    for name, row in metrics.items():
        assert again[name].accuracy == row.accuracy
        assert again[name].margin == pytest.approx(row.margin, rel=1e-4)
    lines = [json.loads(line) for line in (tmp_path / "run/metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == list(range(len(lines)))
    assert lines[0]["loss"] == pytest.approx(math.log(2))
    assert lines[-1]["loss"] < lines[0]["loss"]


@pytest.mark.parametrize("family", ["mllama", "idefics3", "llama4"])
def test_a_language_model_of_another_family(tmp_path, pairs, family, monkeypatch):
    """Layers that only run beside an image, and language models that lie elsewhere."""
    monkeypatch.setattr("exitwise.rewards.trainee.is_vlm", lambda source: True)
    monkeypatch.setattr("exitwise.model.loading.load_vlm", lambda name, **_: TINY[family]())
    metrics = train_reward(small(family, pairs, limit=12), tmp_path / "run")
    assert metrics["all"].accuracy.n
    held_out = load_preferences(pairs, 12).pairs
    assert evaluate(load_reward(tmp_path / "run"), held_out)["all"].accuracy.n == 12


def test_held_out_scores_are_standardised(tmp_path, tiny_folder, pairs):
    train_reward(small(tiny_folder, pairs), tmp_path / "run")
    held_out = split_by_prompt(load_preferences(pairs).pairs, 0.15, 0).held_out
    reward, prompts = load_reward(tmp_path / "run"), [p.prompt for p in held_out] * 2
    scores = reward.scores(prompts, [p.chosen for p in held_out] + [p.rejected for p in held_out])
    assert float(scores.mean()) == pytest.approx(0, abs=1e-4)
    assert float(scores.std(correction=0)) == pytest.approx(1, abs=1e-4)


@pytest.mark.parametrize("tuning", ["lora", "full"])
def test_stopped_anywhere_it_ends_with_the_same_bytes(tmp_path, tiny_folder, pairs, tuning, monkeypatch):
    """Killed in step 3 and 7, between checkpoints; weights, moments, log and figures are the uninterrupted run's."""
    config = small(tiny_folder, pairs, tuning=tuning, weight_decay=0.1)
    train_reward(config, tmp_path / "whole")
    real, calls = training.gradients, []

    def stop_at(*steps):
        def gradients(*arguments):
            calls.append(1)
            if len(calls) in steps:
                raise KeyboardInterrupt
            return real(*arguments)

        return gradients

    monkeypatch.setattr(training, "gradients", stop_at(4, 10))
    for _ in range(2):
        with pytest.raises(KeyboardInterrupt):
            train_reward(config, tmp_path / "parts")
    train_reward(config, tmp_path / "parts")
    whole, parts = files_of(tmp_path / "whole"), files_of(tmp_path / "parts")
    assert whole.keys() == parts.keys()
    assert [name for name in whole if whole[name] != parts[name]] == []


def test_a_full_disk_is_one_line_and_the_same_command_goes_on(tmp_path, tiny_folder, pairs):
    config, (soft, hard) = small(tiny_folder, pairs), resource.getrlimit(resource.RLIMIT_FSIZE)
    train_reward(config, tmp_path / "whole")
    resource.setrlimit(resource.RLIMIT_FSIZE, (8 * 1024, hard))
    try:
        with pytest.raises(UserError, match=r"cannot write .*checkpoint\.safetensors .*; free space"):
            train_reward(config, tmp_path / "parts")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    train_reward(config, tmp_path / "parts")
    assert files_of(tmp_path / "parts") == files_of(tmp_path / "whole")


@pytest.mark.parametrize("family", ["idefics3", "mllama"])  # text_model; layers that only an image reaches
def test_a_backbone_of_another_family(tmp_path, pairs, family):
    vlm = TINY[family]()
    vlm.model.save_pretrained(tmp_path / "model")
    vlm.processor.save_pretrained(tmp_path / "model")
    metrics = train_reward(small(tmp_path / "model", pairs, epochs=6), tmp_path / "run")
    assert metrics["all"].accuracy.value == 1.0
    assert load_reward(tmp_path / "run").scores(["question one?"] * 2, ["yes 1", "no 1"]).diff() < 0


def test_on_another_model_it_reads_its_own(tmp_path, tiny_folder, pairs):
    """Of the same shapes, so that nothing but the name tells them apart."""
    train_reward(small(tiny_folder, pairs), tmp_path / "run")
    wanted = load_reward(tmp_path / "run").scores(PROMPTS, ANSWERS)
    other = tiny_llava(seed=7)
    assert torch.allclose(load_reward(tmp_path / "run", vlm=other).scores(PROMPTS, ANSWERS), wanted, atol=1e-5)


def test_micro_batches_change_no_gradient(tmp_path, tiny_folder, pairs):
    figures = []
    for tokens in (1, 10_000):
        train_reward(small(tiny_folder, pairs, micro_tokens=tokens), tmp_path / str(tokens))
        figures.append(load_file(tmp_path / str(tokens) / "head.safetensors")["weight"])
    assert torch.allclose(figures[0], figures[1], atol=1e-4)
    assert figures[0].abs().max() > 1e-2


def test_a_run_is_not_continued_with_other_things(tmp_path, tiny_folder, pairs):
    config = small(tiny_folder, pairs)
    train_reward(config, tmp_path / "run")
    with pytest.raises(UserError, match=r"another config \(lr"):
        train_reward(replace(config, lr=1e-3), tmp_path / "run")
    with open(pairs, "a", encoding="utf-8") as handle:
        handle.write(Preference("new?", "a", "b").to_json() + "\n")
    with pytest.raises(UserError, match="other pairs"):
        train_reward(config, tmp_path / "run")


def test_a_broken_checkpoint_is_named(tmp_path):
    (tmp_path / "checkpoint.safetensors").write_bytes(b"torn")
    with pytest.raises(UserError, match=r"checkpoint\.safetensors is broken"):
        load_checkpoint(tmp_path / "checkpoint.safetensors", {}, None)


def test_a_loss_that_is_no_number_stops_the_training(tmp_path, tiny_folder, pairs, monkeypatch):
    real, calls = training.gradients, []

    def gradients(*arguments):
        calls.append(1)
        return real(*arguments) * (math.nan if len(calls) == 6 else 1)

    monkeypatch.setattr(training, "gradients", gradients)
    with pytest.raises(UserError, match=r"nan .* at step 5; the last checkpoint is kept"):
        train_reward(small(tiny_folder, pairs), tmp_path / "run")
    assert (tmp_path / "run/checkpoint.safetensors").exists()


def test_prompts_are_held_out_whole():
    rows = [Preference(q, str(i), "x") for i, q in enumerate(QUESTIONS * 3)]
    train, held_out = split_by_prompt(rows, 0.2, 3)
    assert len({p.prompt for p in held_out}) == 2
    assert not {p.prompt for p in train} & {p.prompt for p in held_out}
    assert len(train) + len(held_out) == len(rows)
    assert split_by_prompt(rows, 0.2, 3) == (train, held_out)
    with pytest.raises(UserError, match="one prompt only"):
        split_by_prompt(rows[:1], 0.2, 0)


def test_a_held_out_file_must_not_overlap(tmp_path, tiny_folder, pairs):
    with pytest.raises(UserError, match="10 prompts are in both --pairs and --held-out"):
        train_reward(small(tiny_folder, pairs, held_out=(pairs,)), tmp_path / "run")
    (tmp_path / "other.jsonl").write_text(to_lines([Preference("new?", "yes 1", "no 1")]))
    metrics = train_reward(small(tiny_folder, pairs, held_out=(str(tmp_path / "other.jsonl"),)), tmp_path / "run")
    assert metrics["all"].n == 1


def test_the_learning_rate_rises_and_falls():
    rates = [lr_at(step, 10, 1.0, 0.2) for step in range(10)]
    assert rates[:3] == [0.5, 1.0, 1.0]
    assert rates[6] == pytest.approx(0.5)
    assert 0 < rates[-1] < 0.05
    assert lr_at(0, 1, 1.0, 0.0) == 1.0


def test_every_pair_once_an_epoch():
    order = batch_order(10, 4, 2, seed=0)
    assert [len(batch) for batch in order] == [4, 4, 2, 4, 4, 2]
    for epoch in (order[:3], order[3:]):
        assert sorted(i for batch in epoch for i in batch) == list(range(10))
    assert order[:3] != order[3:]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"pairs": ()}, "--pairs"),
        ({"tuning": "half"}, "--tuning"),
        ({"lr": 0.0}, "--lr"),
        ({"held_out_share": 1.0}, "--held-out-share"),
        ({"batch_size": 0}, "--batch-size"),
    ],
)
def test_bad_values_are_named(change, message):
    with pytest.raises(UserError, match=message):
        replace(RewardConfig("x", ("y",)), **change).check()


def test_options_are_keywords(tmp_path, tiny_folder, pairs):
    measures = train_reward(tiny_folder, tmp_path / "run", pairs=pairs, batch_size=8, lr=1e-2)
    again = evaluate_reward(str(tmp_path / "run"), [pairs], out=tmp_path / "figures.json")
    assert measures["all"].n < again["all"].n == 40
    assert json.loads((tmp_path / "run/config.json").read_text())["pairs"] == [pairs]
    with pytest.raises(UserError, match="did you mean 'batch_size'"):
        train_reward(tiny_folder, tmp_path / "other", pairs=pairs, batchsize=8)
    with pytest.raises(UserError, match="a RewardConfig and options"):
        train_reward(small(tiny_folder, pairs), tmp_path / "other", lr=1e-2)


def test_the_command_line(tmp_path, tiny_folder, pairs, capsys):
    from exitwise.cli.main import entry

    run = str(tmp_path / "run")
    entry(["reward", "train", str(tiny_folder), "--pairs", pairs, "--out", run, "--batch-size", "8"])
    printed = capsys.readouterr()
    assert f"reward model: {run}" in printed.out
    assert "steps" in printed.err
    assert "answers" not in printed.err
    entry(["reward", "eval", run, "--pairs", pairs, "--out", str(tmp_path / "figures.json")])
    assert "| all | 40 |" in capsys.readouterr().out
    assert json.loads((tmp_path / "figures.json").read_text())["all"]["n"] == 40
    with pytest.raises(SystemExit) as stop:
        entry(["reward", "eval", str(tmp_path / "nothing"), "--pairs", pairs])
    assert stop.value.code == 2
    (tmp_path / "more.jsonl").write_text(Path(pairs).read_text() + '{"prompt": "lonely"}\n')
    figures = tmp_path / "new/folder/figures.json"
    entry(["reward", "eval", run, "--pairs", str(tmp_path / "more.jsonl"), "--out", str(figures)])
    assert "skipped more.jsonl, line 41: " in capsys.readouterr().err
    assert json.loads(figures.read_text())["all"]["n"] == 40
    for more, message in (
        (["--pairs"], "--pairs got nothing"),
        (["--pairs", pairs, "--template", "question"], "is not a published reward model"),
        (["--pairs", pairs, "--out", str(tmp_path)], "which is a folder"),
    ):
        with pytest.raises(SystemExit) as stop:
            entry(["reward", "eval", run, *more])
        assert stop.value.code == 2
        assert message in capsys.readouterr().err
