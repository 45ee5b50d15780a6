"""`exitwise align` end to end on a tiny model: it learns, survives being stopped anywhere, and says what is wrong."""

import copy
import errno
import json
import os
import random
import resource
import signal
import subprocess
import sys
import time
from contextlib import contextmanager, suppress
from dataclasses import replace
from typing import ClassVar

import pytest
import torch
from accelerate import tracking
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from transformers import LlavaForConditionalGeneration

import exitwise.alignment.steps
from exitwise import UserError, load_vlm
from exitwise.alignment import batches, signatures
from exitwise.alignment.config import AlignConfig
from exitwise.alignment.loop import align
from exitwise.alignment.policy import without_encoder
from exitwise.alignment.rollout import ResponseBatch, Rollout
from exitwise.alignment.steps import shape_scores
from exitwise.cli.main import entry
from exitwise.data.images import load_image
from exitwise.engines import prefix
from exitwise.model.exits import exit_at, exit_features
from exitwise.model.families import FAMILIES
from exitwise.model.features import FeatureFiles
from exitwise.run.records import Completion, Sample, Verdict
from tests.align_setup import BENIGN, HARMFUL, VowelReward, config_of, write_material
from tests.conftest import ROOT, pixels_of, tiny_llava
from tests.families import TINY

SEED = int(os.environ.get("EXITWISE_KILL_SEED", "1"))


@pytest.fixture(scope="module")
def material(tmp_path_factory):
    folder = tmp_path_factory.mktemp("material")
    write_material(folder)
    return folder


@pytest.fixture
def vowels(monkeypatch):
    """Score answers by their vowels: a reward that differs from answer to answer and needs no model."""
    monkeypatch.setattr("exitwise.alignment.setup.load_scores", lambda *_: VowelReward())


def rows_of(out, name="metrics.jsonl"):
    return [json.loads(line) for line in (out / name).read_text().splitlines()]


def bytes_of(out):
    """All that must not depend on when a run was stopped: everything but what is measured."""
    measured = {"timing.json", "env.json", ".lock"}
    return {
        str(path.relative_to(out)): path.read_bytes()
        for path in sorted(out.rglob("*"))
        if path.is_file() and path.name not in measured and not path.name.endswith(".tmp")
    }


def assert_same_bytes(out, other):
    found, wanted = bytes_of(out), bytes_of(other)
    assert found.keys() == wanted.keys()
    assert [name for name in wanted if found[name] != wanted[name]] == []


# ------------------------------------------------------------------------------------------------ families

OTHERS = [name for name in TINY if name != "llava"]


@pytest.mark.parametrize("family", OTHERS)
def test_a_step_on_another_family(family, material, tmp_path, vowels, monkeypatch):
    """Two exits, one of them fused where it may be; what is saved has learnt and is of the language model alone."""
    monkeypatch.setattr("exitwise.alignment.setup.load_vlm", lambda *_, **__: TINY[family]())
    exits = "1,1+3" if FAMILIES[family].averages else "1,3"
    folder = align(config_of(family, material, steps=1, exits=exits, features=None), tmp_path / "run")
    learnt = load_file(folder / "adapter_model.safetensors")
    path = FAMILIES[family].language_model
    assert all(f".{path}." in name for name in learnt)
    assert all(tensor.any() for name, tensor in learnt.items() if "lora_B" in name)


# ------------------------------------------------------------------------------------------------ it learns


class OneToken:
    """Likes one character."""

    def __init__(self, character):
        self.character = character

    def scores(self, prompts, answers):
        return torch.tensor([float(answer.count(self.character)) for answer in answers])


@pytest.fixture(scope="module")
def peaked(tmp_path_factory):
    """A tiny model with an opinion, or a rare token would not be drawn often enough to learn it."""
    folder = tmp_path_factory.mktemp("peaked")
    vlm = tiny_llava()
    vlm.model.lm_head.weight.mul_(2)
    vlm.model.save_pretrained(folder)
    vlm.processor.save_pretrained(folder)
    return folder


def first_token(vlm, material, exit=1):
    """(V,) mean probability of each token to begin an answer at the exit, by the stock model from the pixels on."""
    image = load_image("file:red.png", material / "images")
    total = 0
    for prompt in HARMFUL:
        ids = torch.tensor([vlm.input_ids(prompt, 16)])
        with exit_at(vlm, exit), torch.no_grad():
            logits = vlm.model(input_ids=ids, pixel_values=pixels_of(vlm, [image])).logits
        total = total + torch.softmax(logits[0, -1].double(), dim=-1)
    return total / len(HARMFUL)


@pytest.mark.parametrize("method", ["l-ppo", "grpo"])
def test_a_reward_for_one_token_makes_it_likelier(peaked, material, tmp_path, monkeypatch, method):
    vlm = load_vlm(peaked, device="cpu")
    before, tokenizer = first_token(vlm, material), vlm.tokenizer
    letters = {tokenizer.convert_tokens_to_ids(chr(code)): chr(code) for code in range(33, 127)}
    token = max(letters, key=lambda t: float(before[t]))
    monkeypatch.setattr("exitwise.alignment.setup.load_scores", lambda *_: OneToken(letters[token]))
    options = {"steps": 8, "batch_size": 32, "max_new_tokens": 3, "lr": 2e-2, "kl_coef": 0.01, "checkpoint_every": 8}
    config = config_of(peaked, material, method=method, **options)
    align(config, tmp_path / "run")
    after = first_token(load_vlm(peaked, adapter=tmp_path / "run", device="cpu"), material)
    assert float(after[token]) > 2 * float(before[token])
    scores = [row["rollout/harmful_score"] for row in rows_of(tmp_path / "run")]
    assert sum(scores[-2:]) > 2 * sum(scores[:2])
    assert all(row["objective/kl"] > 0 for row in rows_of(tmp_path / "run")[4:])


def test_an_update_is_that_of_plain_loops(tiny_folder, material, tmp_path, monkeypatch, vowels):
    """Rollout to gradient, from a policy that has moved: KL and values are not zero, and neither gamma nor lambda is 1.

    AdamW's first moment after one update is a tenth of the gradient.
    """
    real, wanted = exitwise.alignment.steps.collect, {}
    options = {"gamma": 0.9, "lam": 0.8, "kl_coef": 0.3, "vf_coef": 0.2, "max_grad_norm": 1e9}

    def collect(bench, *rest):
        torch.manual_seed(3)
        for name, parameter in bench.policy.trainable().items():
            if "lora_B" in name or "value_head" in name:
                torch.nn.init.normal_(parameter, std=0.1)
        rollout = real(bench, *rest)
        answers, texts = rollout.answers, [c.text for c in rollout.completions]
        new, ref = (bench.policy(*answers, bench.features, reference=reference) for reference in (False, True))
        rows = []  # of each answer: (advantage, return) of each token
        for i, score in enumerate(VowelReward().scores(texts, texts).tolist()):
            n = len(rollout.completions[i].tokens)
            values = [*new.values[i, :n].tolist(), 0.0]
            kl = (new.logprobs[i, :n] - ref.logprobs[i, :n]).tolist()
            rewards = [-0.3 * x for x in kl]
            rewards[-1] += score
            deltas = [rewards[t] + 0.9 * values[t + 1] - values[t] for t in range(n)]
            gains = [sum((0.9 * 0.8) ** (k - t) * deltas[k] for k in range(t, n)) for t in range(n)]
            rows.append([(gain, gain + values[t]) for t, gain in enumerate(gains)])
        gains = [gain for row in rows for gain, _ in row]
        mean = sum(gains) / len(gains)
        deviation = (sum((gain - mean) ** 2 for gain in gains) / len(gains)) ** 0.5
        loss = torch.zeros(())
        for i, row in enumerate(rows):
            for t, (gain, goal) in enumerate(row):
                ratio = torch.exp(new.logprobs[i, t] - new.logprobs[i, t].detach())
                loss = loss - (gain - mean) / deviation * ratio + 0.2 * (new.values[i, t] - goal) ** 2
        (loss / len(gains)).backward()
        wanted.update({name: p.grad.clone() for name, p in bench.policy.trainable().items()})
        bench.optimizer.zero_grad()
        return rollout

    monkeypatch.setattr(exitwise.alignment.steps, "collect", collect)
    config = config_of(tiny_folder, material, steps=1, num_ppo_epochs=1, num_mini_batches=1, **options)
    align(config, tmp_path / "run")
    moments = load_file(tmp_path / "run/checkpoints/step-000001/optimizer.safetensors")
    for i, (name, gradient) in enumerate(wanted.items()):
        largest = float(gradient.abs().max())
        assert largest > 1e-5, name
        assert torch.allclose(10 * moments[f"{i}.exp_avg"], gradient, rtol=1e-3, atol=1e-4 * largest), name


def test_an_update_of_no_size_shifts_nothing(tiny_folder, material, tmp_path, vowels):
    """Every other answer is looked back at; a row compared with another's would show."""
    align(config_of(tiny_folder, material, lr=0.0, steps=1, exits="1,3"), tmp_path / "run")
    (row,) = rows_of(tmp_path / "run")
    for name in ("surrogate_gain", "mean_kl", "max_kl", "mean_tv", "max_tv"):
        assert row[f"theory/{name}"] == pytest.approx(0.0, abs=1e-5)


def test_sft_loss_falls(tiny_folder, material, tmp_path):
    align(config_of(tiny_folder, material, method="sft", steps=6, lr=2e-2, batch_size=16), tmp_path / "run")
    losses = [row["loss/policy_avg"] for row in rows_of(tmp_path / "run")]
    assert losses[0] == pytest.approx(5.56, abs=1.5)  # about log 260: it knows nothing yet
    assert losses[-1] < 0.6 * losses[0]


def test_dpo_begins_at_log_2_and_falls(tiny_folder, material, tmp_path):
    options = {"steps": 4, "lr": 1e-2, "batch_size": 16, "num_ppo_epochs": 1, "num_mini_batches": 1}
    align(config_of(tiny_folder, material, method="dpo", **options), tmp_path / "run")
    rows = rows_of(tmp_path / "run")
    assert rows[0]["loss/policy_avg"] == pytest.approx(0.693147, abs=1e-5)
    assert rows[-1]["loss/policy_avg"] < 0.4
    assert rows[-1]["dpo/accuracy"] > 0.9


# ------------------------------------------------------------------------------------------------ stop and go on


EVERYTHING = {
    "exits": "0,1,3", "schedule": "worst", "eval_every": 2, "mix": (0.5, 0.25, 0.25), "steps": 4, "probe": 3,
    "best_of": 2, "kl_target": 0.1, "num_mini_batches": 2, "gradient_accumulation_steps": 2, "checkpoint_every": 2,
    "samples_every": 2, "lr": 1e-2, "whiten_rewards": True, "missing_eos_penalty": 0.5, "entropy_coef": 0.01,
    "cliprange_high": 0.3,
}  # fmt: skip


class Watched(VowelReward):
    """Calls `event(number of the call)` before it scores."""

    def __init__(self, event=lambda number: None):
        self.calls, self.event = 0, event

    def scores(self, prompts, answers):
        self.calls += 1
        self.event(self.calls)
        return super().scores(prompts, answers)


@pytest.fixture(scope="module")
def whole(tiny_folder, material, tmp_path_factory):
    """(an uninterrupted run with everything on, how often it asked for scores)."""
    out, reward = tmp_path_factory.mktemp("whole") / "run", Watched()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("exitwise.alignment.setup.load_scores", lambda *_: reward)
        align(config_of(tiny_folder, material, **EVERYTHING), out)
    return out, reward.calls


def test_scores_are_shaped_row_by_row():
    """Worked by hand: a refused harmless request at its cost, then the clip, then the penalty for no end."""
    asked = [("harmful", "refused"), ("benign", "refused"), ("benign", "answered"), ("benign", "incoherent")]
    rows = [
        prefix.TokenRow(prefix.ExitRequest(Sample(str(i), "x", kind, ""), 1), (), ())
        for i, (kind, _) in enumerate(asked)
    ]
    done = [Completion(str(i), 1, "x", (5,), finish) for i, finish in enumerate(("stop", "length", "stop", "length"))]
    rollout = Rollout(
        ResponseBatch(rows, torch.zeros(4, 1), torch.ones(4, 1)), done, [label for _, label in asked],
        None, torch.zeros(4, 1), torch.tensor([5.0, -1.0, 1.0, -1.0]),
    )  # fmt: skip
    shaped = lambda **options: shape_scores(AlignConfig.of("testbed", **options), rollout).tolist()
    assert shaped() == [5, -1, 1, -1]
    assert shaped(refusal_cost=3) == [5, -3, 1, -1]
    assert shaped(refusal_cost=4, reward_clip=2) == [2, -2, 1, -1]
    assert shaped(refusal_cost=4, missing_eos_penalty=0.5) == [5, -4.5, 1, -1.5]


def test_a_run_holds_what_it_should(whole):
    out, _ = whole
    rows = rows_of(out)
    assert [row["step"] for row in rows] == [1, 2, 3, 4]
    keys = {"objective/kl", "objective/entropy", "objective/scores", "objective/non_score_reward",
            "objective/rlhf_reward", "policy/approxkl_avg", "policy/clipfrac_avg", "policy/entropy_avg",
            "loss/policy_avg", "loss/value_avg", "val/ratio", "val/clipfrac_avg", "theory/surrogate_gain",
            "theory/mean_kl", "theory/max_kl", "theory/mean_tv", "theory/return_before", "theory/return_after",
            "rollout/asr", "rollout/over_refusal", "rollout/vqa"}  # fmt: skip
    assert keys <= rows[0].keys()
    assert rows[0]["objective/kl"] == pytest.approx(0.0, abs=1e-5)  # the first rollout is the reference's
    assert rows[3]["objective/kl"] != pytest.approx(0.0, abs=1e-3)
    score, kl = json.loads((out / "checkpoints/step-000002/state.json").read_text())["measured"]
    assert rows[1]["theory/return_after"] == pytest.approx(score - rows[1]["kl_coef"] * kl)
    assert rows[2]["theory/return_before"] == pytest.approx(score - rows[2]["kl_coef"] * kl)  # the same answers
    assert "eval/asr@3" in rows[2]
    assert "eval/asr@3" not in rows[1]
    assert rows[1]["kl_coef"] != rows[0]["kl_coef"]
    assert {path.name for path in (out / "checkpoints").iterdir()} == {"step-000002", "step-000004"}
    assert {row["step"] for row in rows_of(out, "answers.jsonl")} == {1, 3}
    regret = json.loads((out / "regret.json").read_text())
    assert regret["best_score"] >= regret["score_before"]
    assert regret["regret_before"] == pytest.approx(regret["best_score"] - regret["score_before"])


class StopError(Exception):
    pass


def raiser(fatal, error=StopError):
    def event(number):
        if number == fatal:
            raise error

    return event


class Raising:
    """A progress that ends the run when the given step is told."""

    def __init__(self, step):
        self.wanted = f"step {step}/"

    def say(self, text):
        if text.startswith(self.wanted):
            raise StopError

    def start(self, total, what=""): ...
    def advance(self, done): ...


def test_stopped_after_any_step_it_ends_with_the_same_bytes(whole, tiny_folder, material, tmp_path, vowels):
    """One run, stopped after step 1 (no checkpoint yet), after 3 (a step past its checkpoint) and after 4."""
    config = config_of(tiny_folder, material, **EVERYTHING)
    for step in (1, 3, 4):
        with pytest.raises(StopError):
            align(config, tmp_path / "run", Raising(step))
        assert not (tmp_path / "run/adapter").exists()
    align(config, tmp_path / "run")
    assert_same_bytes(tmp_path / "run", whole[0])


def test_stopped_within_any_step_it_ends_with_the_same_bytes(whole, tiny_folder, material, tmp_path, monkeypatch):
    """Whenever scores are asked for - in a rollout, after an update, for the regret - it may be the last thing done."""
    out, calls = whole
    config, rng = (
        config_of(tiny_folder, material, **EVERYTHING),
        random.Random(SEED),
    )
    for number in sorted(rng.sample(range(1, calls - 1), 2)):
        reward = Watched(raiser(number))
        monkeypatch.setattr("exitwise.alignment.setup.load_scores", lambda *_, reward=reward: reward)
        with suppress(StopError):  # a resumed run asks for fewer, so the later of the two may not come
            align(config, tmp_path / "run")
    monkeypatch.setattr("exitwise.alignment.setup.load_scores", lambda *_: VowelReward())
    align(config, tmp_path / "run")
    assert_same_bytes(tmp_path / "run", out)


def test_killed_at_any_moment_it_ends_with_the_same_bytes(tiny_folder, material, tmp_path):
    """A real kill of a real process, at a seeded moment after a seeded step."""
    options = {"steps": 8, "checkpoint_every": 3, "mix": (0.5, 0.5, 0.0), "probe": 2}
    config = config_of(tiny_folder, material, **options)
    align(config, tmp_path / "once")
    rng = random.Random(SEED)
    out, after = tmp_path / "killed", rng.randrange(1, 7)
    code = (
        "from pathlib import *; from exitwise.alignment.config import *; from exitwise.alignment.loop import align; "
        f"align({config!r}, Path({str(out)!r}))"
    )
    environment = os.environ | {"OMP_NUM_THREADS": str(torch.get_num_threads())}
    process = subprocess.Popen([sys.executable, "-c", code], cwd=ROOT, env=environment)
    while process.poll() is None and not (
        (out / "metrics.jsonl").exists() and (out / "metrics.jsonl").read_bytes().count(b"\n") >= after
    ):
        time.sleep(0.005)
    time.sleep(rng.uniform(0, 0.2))
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL, "it was finished, or broken, before the kill"
    assert not (out / "adapter/exitwise.json").exists()
    align(config, out)
    assert_same_bytes(out, tmp_path / "once")


def test_ctrl_c_says_so_and_the_same_command_goes_on(tiny_folder, material, tmp_path, monkeypatch, capsys):
    words = command(tiny_folder, material, tmp_path / "run")
    reward = Watched(raiser(2, KeyboardInterrupt))
    monkeypatch.setattr("exitwise.alignment.setup.load_scores", lambda *_: reward)
    assert code_of(words) == 130
    assert "the same command goes on" in capsys.readouterr().err
    assert code_of(words) == 0
    assert [row["step"] for row in rows_of(tmp_path / "run")] == [1, 2]
    assert f"adapter: {tmp_path / 'run' / 'adapter'}" in capsys.readouterr().out
    assert code_of(words) == 0  # and a finished one is only told
    assert "is finished" in capsys.readouterr().err


def test_another_config_is_refused(whole, tiny_folder, material):
    before = bytes_of(whole[0])
    with pytest.raises(UserError, match="lora_rank differ"):
        align(config_of(tiny_folder, material, **(EVERYTHING | {"lora_rank": 5})), whole[0])
    assert bytes_of(whole[0]) == before


# ------------------------------------------------------------------------------------------------ which exits


def exits_of(trained=(1, 2, 4), held_out=(), default=3):
    return batches.Exits(trained, held_out, default)


def pools_of(n=20):
    make = lambda kind: [Sample(f"{kind}{i}", f"{kind} {i}", kind, "") for i in range(n)]
    return batches.Pools(make("harmful"), make("benign"), [], ["a", "b", "c"], [])


def test_random_draws_an_exit_per_prompt_and_the_same_again(tmp_path):
    config, weights = config_of(tmp_path, tmp_path, batch_size=30), {}
    steps = [batches.draw(config, pools_of(), exits_of(), step, weights) for step in range(10)]
    assert {r.exit for r in steps[0]} == {1, 2, 4}
    counts = {exit: sum(r.exit == exit for step in steps for r in step) for exit in (1, 2, 4)}
    assert all(70 < count < 130 for count in counts.values())
    assert steps[3] == batches.draw(config, pools_of(), exits_of(), 3, weights)
    assert [r.exit for r in steps[0]] != [r.exit for r in steps[1]]
    assert len({r.sample.id for r in steps[0]}) == 30
    seen = [r.sample.prompt for step in steps for r in step]
    assert {seen.count(f"harmful {i}") for i in range(20)} == {15}  # every prompt in its turn
    one = batches.draw(config, pools_of(), exits_of((2,)), 0, weights)
    assert {r.exit for r in one} == {2}


def test_each_puts_every_prompt_to_every_exit(tmp_path):
    config = config_of(tmp_path, tmp_path, batch_size=12, schedule="each")
    requests = batches.draw(config, pools_of(), exits_of(), 0, {})
    by_prompt = {}
    for r in requests:
        by_prompt.setdefault((r.sample.prompt, r.sample.image), []).append(r.exit)
    assert sorted(by_prompt.values()) == [[1, 2, 4]] * 4
    with pytest.raises(UserError, match=r"cannot be divided among 3 exits .* multiple of 3"):
        batches.draw(config_of(tmp_path, tmp_path, batch_size=8, schedule="each"), pools_of(), exits_of(), 0, {})


def test_groups_of_grpo_share_prompt_image_and_exit(tmp_path):
    config = config_of(tmp_path, tmp_path, batch_size=24, method="grpo", group_size=4)
    requests = batches.draw(config, pools_of(), exits_of(), 0, {})
    for start in range(0, 24, 4):
        group = requests[start : start + 4]
        assert len({(r.sample.prompt, r.sample.image, r.exit) for r in group}) == 1
        assert len({r.sample.id for r in group}) == 4


def test_worst_draws_by_its_weights(tmp_path):
    config = config_of(tmp_path, tmp_path, batch_size=300, schedule="worst")
    found = [r.exit for r in batches.draw(config, pools_of(), exits_of(), 0, {1: 0.7, 2: 0.2, 4: 0.1})]
    assert 0.6 < found.count(1) / 300 < 0.8
    assert 0.04 < found.count(4) / 300 < 0.17


def test_harmless_prompts_are_anchored_at_the_default_exit(tmp_path):
    for anchor, low, high in ((0.0, 0, 0), (0.5, 0.3, 0.7), (1.0, 1, 1)):
        config = config_of(tmp_path, tmp_path, batch_size=200, mix=(0.5, 0.5, 0.0), anchor=(anchor, 1.0))
        requests = batches.draw(config, pools_of(), exits_of(), 0, {})
        benign = [r.exit for r in requests if r.sample.kind == "benign"]
        assert low <= benign.count(3) / len(benign) <= high
        assert all(r.exit != 3 for r in requests if r.sample.kind == "harmful")


@settings(deadline=None)
@given(st.integers(1, 40), st.tuples(*[st.integers(0, 4)] * 3).filter(any))
def test_a_batch_is_full_and_asks_no_kind_without_a_share(n, parts):
    mix = [part / sum(parts) for part in parts]
    counts = batches._counts(n, mix)
    assert sum(counts) == n
    assert min(counts) >= 0
    assert not any(count for count, share in zip(counts, mix, strict=True) if not share)


def test_held_out_exits_are_not_trained():
    from exitwise.alignment.config import AlignConfig

    found = batches.choose_exits(AlignConfig.of("m", exits="all", hold_out="1,3", anchor=(0.0, 0.0)), 4, 3)
    assert found == ((0, 2, 4), (1, 3), 3)
    with pytest.raises(UserError, match="holds out the default exit 3, at which --anchor trains"):
        batches.choose_exits(AlignConfig.of("m", exits="all", hold_out="1,3"), 4, 3)
    paper = AlignConfig.of("m", exits="all", hold_out="1,3", mix=(1.0, 0.0, 0.0))  # nothing to anchor
    assert batches.choose_exits(paper, 4, 3).held_out == (1, 3)
    with pytest.raises(UserError, match="leaves no exit"):
        batches.choose_exits(AlignConfig.of("m", exits="1", hold_out="0-2"), 4, 3)
    with pytest.raises(UserError, match="exits 0 to 4"):
        batches.choose_exits(AlignConfig.of("m", exits="9"), 4, 3)


@settings(deadline=None)
@given(st.lists(st.tuples(st.floats(0, 1), st.floats(0, 1)), min_size=2, max_size=6), st.data())
def test_minimax_weights_follow_asr_and_forget_no_exit(pairs, data):
    total = sum(w for w, _ in pairs) + 1e-3 * len(pairs)
    weights = {i: (w + 1e-3) / total for i, (w, _) in enumerate(pairs)}
    asr = {i: a for i, (_, a) in enumerate(pairs)}
    found = batches.next_weights(weights, asr)
    assert sum(found.values()) == pytest.approx(1)
    assert min(found.values()) >= 0.1 / len(pairs)
    for i in asr:
        for j in asr:
            if asr[i] > asr[j] + 1e-6 and weights[i] >= weights[j]:
                assert found[i] > found[j]


def test_several_exits_with_one_held_out_end_to_end(tiny_folder, material, tmp_path):
    config = config_of(tiny_folder, material, method="sft", exits="all", hold_out="2", schedule="each", steps=1)
    align(config, tmp_path / "run")
    assert sorted({row["exit"] for row in rows_of(tmp_path / "run", "answers.jsonl")}) == [0, 1, 3, 4]
    about = json.loads((tmp_path / "run/adapter/exitwise.json").read_text())
    assert (about["exits"], about["held_out"], about["default_exit"]) == ([0, 1, 3, 4], [2], 3)


def test_worst_starts_from_an_audit_and_puts_its_weight_where_asr_is_higher(tiny_folder, material, tmp_path):
    found = {0: 0.0, 1: 0.9, 3: 0.4}
    (tmp_path / "audit").mkdir()
    exits = [{"exit": exit, "asr": {"value": value}} for exit, value in found.items()]
    (tmp_path / "audit/metrics.json").write_text(json.dumps({"exits": exits}))
    options = {"method": "sft", "exits": "0,1,3", "schedule": "worst", "audit": tmp_path / "audit"}
    align(config_of(tiny_folder, material, **options), tmp_path / "run")
    state = json.loads((tmp_path / "run/checkpoints/step-000002/state.json").read_text())
    assert sorted(state["weights"], key=state["weights"].get) == ["0", "3", "1"]
    with pytest.raises(UserError, match="no ASR at exit 4"):
        align(config_of(tiny_folder, material, **(options | {"exits": "0,4"})), tmp_path / "other")


def test_worst_follows_its_own_small_audits(whole):
    weights = json.loads((whole[0] / "checkpoints/step-000004/state.json").read_text())["weights"]
    even = dict.fromkeys((0, 1, 3), 1 / 3)
    asr = {exit: rows_of(whole[0])[2][f"eval/asr@{exit}"] for exit in even}
    assert {int(k): v for k, v in weights.items()} == pytest.approx(batches.next_weights(even, asr))


def test_prompts_with_control_tokens_are_left_out_and_told(tiny_folder, material, tmp_path, vowels, capsys):
    (tmp_path / "forged.txt").write_text("\n".join([*HARMFUL, "Look: <image> and tell"]))
    more = ["--prompts", str(tmp_path / "forged.txt"), "--steps", "4", "--samples-every", "1"]
    entry(command(tiny_folder, material, tmp_path / "run", *more))
    assert "skipped forged:row13: its prompt has the control token '<image>'" in capsys.readouterr().err
    asked = {row["sample"].partition("#")[0] for row in rows_of(tmp_path / "run", "answers.jsonl")}
    assert len(asked) == len(HARMFUL)
    with pytest.raises(UserError, match="no benign sample can be used: one"):
        batches.askable(batches.Pools([], [Sample("one", "a <image>", "benign", "")], [], []), lambda prompt: "<image>")


def test_validation_prompts_are_audited_and_never_trained_on(tiny_folder, material, tmp_path, vowels):
    options = {"mix": (0.5, 0.5, 0.0), "exits": "1,3", "eval_every": 2, "validation": 3, "steps": 6}
    config = config_of(tiny_folder, material, **options)
    kept = batches.load_pools(config).validation
    assert [s.kind for s in kept] == ["harmful"] * 3 + ["benign"] * 3
    assert kept == batches.load_pools(replace(config, seed=1)).validation  # runs of other seeds are compared with it
    align(config, tmp_path / "run")
    asked = {row["sample"].partition("#")[0] for row in rows_of(tmp_path / "run", "answers.jsonl")}
    assert len(asked) == len(HARMFUL) + len(BENIGN) - 6  # all the others, and no more
    assert not asked & {s.id for s in kept}
    audits = [{k for k in row if k.startswith("eval/")} for row in rows_of(tmp_path / "run")]
    everything = {f"eval/{name}@{exit}" for name in ("asr", "over_refusal") for exit in (1, 3)}
    assert audits == [set(), set(), everything, set(), everything, set()]


def test_validation_keeps_a_prompt_out_about_every_image():
    pool = [Sample(f"{i}", f"Request {i % 4}", "harmful", f"file:{i}.png") for i in range(12)]
    kept = batches._keep(pool, 2)
    assert len({s.prompt for s in kept}) == len(kept) == 2
    assert not {s.prompt for s in pool} & {s.prompt for s in kept}
    assert len(pool) == 6
    with pytest.raises(UserError, match="leaves none of 2 harmful prompts"):
        batches._keep(pool, 2)


def test_a_small_audit_counts_what_the_judge_says(tiny_folder, material, tmp_path, monkeypatch):
    """Each kind by its own label, each exit by its own answers."""
    said = {("harmful", 1): "answered", ("harmful", 3): "refused", ("benign", 1): "answered", ("benign", 3): "refused"}
    judge = lambda sample, completion: Verdict(sample.id, completion.exit, "x", said[sample.kind, completion.exit], "")
    monkeypatch.setattr("exitwise.alignment.monitor.judge_completion", judge)
    options = {"method": "sft", "mix": (0.5, 0.5, 0.0), "exits": "1,3", "eval_every": 1, "validation": 2}
    align(config_of(tiny_folder, material, **options), tmp_path / "run")
    last = rows_of(tmp_path / "run")[-1]
    assert {k: v for k, v in last.items() if k.startswith("eval/")} == {
        "eval/asr@1": 1.0, "eval/asr@3": 0.0, "eval/over_refusal@1": 0.0, "eval/over_refusal@3": 1.0,
    }  # fmt: skip


def test_validation_that_leaves_nothing_or_serves_nothing_is_one_line(tiny_folder, material, tmp_path):
    with pytest.raises(UserError, match="leaves none of 12 harmful prompts"):
        align(config_of(tiny_folder, material, validation=12, eval_every=1), tmp_path / "run")
    with pytest.raises(UserError, match="give --eval-every too"):
        align(config_of(tiny_folder, material, validation=2), tmp_path / "run")
    with pytest.raises(UserError, match="less than --steps"):  # no audit would come
        align(config_of(tiny_folder, material, validation=2, eval_every=2), tmp_path / "run")


# ------------------------------------------------------------------------------------------------ audit of the result


def test_audit_takes_the_run_as_an_adapter(whole, tiny_folder, tmp_path, capsys):
    words = ["audit", str(tiny_folder), "--exits", "1,3", "--limit", "2", "--vqa", "0", "--no-over-refusal",
             "--max-new-tokens", "6"]  # fmt: skip
    entry([*words, "--out", str(tmp_path / "before")])
    entry([*words, "--adapter", str(whole[0]), "--out", str(tmp_path / "after")])
    config = json.loads((tmp_path / "after/config.json").read_text())
    assert config["adapter_info"]["exits"] == [0, 1, 3]
    assert config["adapter_info"]["method"] == "l-ppo"
    said = [(tmp_path / name / "completions.jsonl").read_text() for name in ("before", "after")]
    assert said[0] != said[1]  # it is really used


def test_an_adapter_of_another_base_is_one_line(whole, tiny_folder, tmp_path, capsys):
    config = copy.deepcopy(tiny_llava().model.config)
    config.text_config.hidden_size = 48
    vlm = tiny_llava()
    LlavaForConditionalGeneration(config).save_pretrained(tmp_path / "wider")
    vlm.processor.save_pretrained(tmp_path / "wider")
    assert code_of(["audit", str(tmp_path / "wider"), "--adapter", str(whole[0]), "--out", str(tmp_path / "x")]) == 2
    assert one_line(capsys).startswith(f"exitwise: the adapter {whole[0] / 'adapter'} does not fit this model")


# ------------------------------------------------------------------------------------------------ bad input


def code_of(words):
    """The exit code of the command."""
    try:
        entry(words)
    except SystemExit as stop:
        return stop.code
    return 0


def one_line(capsys):
    """The only line of stderr that is an error."""
    lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("exitwise: ")]
    assert len(lines) == 1
    return lines[0]


def command(model, material, out, *more):
    words = ["align", str(model), "--exits", "1", "--steps", "2", "--batch-size", "8", "--max-new-tokens", "4",
             "--mix", "1", "0", "0", "--reward", "matcher", "--probe", "0", "--best-of", "0", "--device", "cpu",
             "--prompts", str(material / "harmful.txt"), "--images", str(material / "images"),
             "--out", str(out)]  # fmt: skip
    return [*words, *more]


@pytest.mark.parametrize(
    ("more", "said"),
    [
        (["--mix", "0.5", "0.5", "0.5"], "three shares that add up to 1"),
        (["--mix", "1.5", "-0.5", "0"], "three shares that add up to 1"),
        (["--mix", "0", "1", "0", "--probe", "2"], "no share of harmful prompts"),
        (["--mix", "0", "1", "0", "--best-of", "2"], "no share of harmful prompts"),
        (["--mix", "0", "1", "0", "--exits", "0,1", "--schedule", "worst"], "no share of harmful prompts"),
        (["--batch-size", "9"], "cannot be cut into 2 mini-batches of 1 pieces; give a multiple of 2"),
        (["--batch-size", "8", "--num-mini-batches", "4", "--gradient-accumulation-steps", "4"], "a multiple of 16"),
        (["--method", "grpo", "--batch-size", "6"], "no multiple of --group-size 4"),
        (["--kl-target", "1", "--kl-horizon", "7"], "--kl-horizon 7 is less than --batch-size 8"),
        (["--audit", "."], "--schedule worst"),
        (["--gamma", "1.1"], "--gamma got 1.1; expected 0 to 1"),
        (["--steps", "0"], "--steps got 0"),
        (["--mix", "nan", "0.5", "0.5"], "three shares that add up to 1"),
        (["--kl-coef", "inf"], "--kl-coef got inf; expected at least 0, and finite"),
        (["--kl-coef", "0", "--kl-target", "1"], "--kl-target multiplies --kl-coef, and 0 stays 0"),
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
    align(config_of(tiny_folder, material, tracker="strict"), tmp_path / "run")
    assert StrictTracker.told == [(row["step"], row["objective/kl"]) for row in rows_of(tmp_path / "run")]


def test_a_tracker_that_is_not_installed_is_not_passed_over(tmp_path, material, monkeypatch, capsys):
    monkeypatch.setattr(tracking, "_available_trackers", [])
    assert code_of(command("no-such-model", material, tmp_path / "run", "--tracker", "tensorboard")) == 2
    assert "--tracker tensorboard is not installed" in one_line(capsys)


def test_a_prompt_longer_than_the_context(tiny_folder, material, tmp_path, capsys):
    (tmp_path / "long.txt").write_text("short\n" + "x" * 1100)
    assert code_of(command(tiny_folder, material, tmp_path / "run", "--prompts", str(tmp_path / "long.txt"))) == 2
    assert "model's context is 1024; shorten it or lower --max-new-tokens" in one_line(capsys)


class NanAt(Watched):
    def __init__(self, fatal):
        super().__init__()
        self.fatal = fatal

    def scores(self, prompts, answers):
        found = super().scores(prompts, answers)
        return found * float("nan") if self.calls == self.fatal else found


@pytest.mark.parametrize("fatal", ["first", "third rollout"])
def test_a_reward_that_is_no_number_stops_and_a_mended_one_goes_on(
    whole, tiny_folder, material, tmp_path, monkeypatch, capsys, fatal
):
    """Calls are: probe, then rollout and probe of each step. Exits' weights are drawn anew in the third step."""
    number = {"first": 2, "third rollout": 6}[fatal]
    config = config_of(tiny_folder, material, **EVERYTHING)
    reward = NanAt(number)
    monkeypatch.setattr("exitwise.alignment.setup.load_scores", lambda *_: reward)
    with pytest.raises(UserError, match="fix the reward model and run the same command again"):
        align(config, tmp_path / "run")
    done = {"first": 0, "third rollout": 2}[fatal]
    newest = max((tmp_path / "run/checkpoints").iterdir())
    assert newest.name == f"step-{done:06d}"
    assert all(torch.isfinite(t).all() for t in load_file(newest / "trainable.safetensors").values())
    monkeypatch.setattr("exitwise.alignment.setup.load_scores", lambda *_: VowelReward())
    align(config, tmp_path / "run")
    assert_same_bytes(tmp_path / "run", whole[0])


def test_a_gradient_that_is_no_number_stops_and_leaves_the_checkpoint(tiny_folder, material, tmp_path, monkeypatch):
    """A score that is finite and too large for the square of its return."""

    class Huge(VowelReward):
        def scores(self, prompts, answers):
            return super().scores(prompts, answers) * 1e30

    monkeypatch.setattr("exitwise.alignment.setup.load_scores", lambda *_: Huge())
    with pytest.raises(UserError, match=r"step 1: the gradient norm is (nan|inf)"):
        align(config_of(tiny_folder, material), tmp_path / "run")
    assert not list((tmp_path / "run").glob("checkpoints/*"))


# ------------------------------------------------------------------------------------------------ a full disk


@contextmanager
def small_disk(folder):
    """(a callable that fills what is left, one that makes room) for a file system of its own; without the right to
    mount one, a limit on the size of files, whose error is a real one too."""
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=2m", "tmpfs", str(folder)], capture_output=True, check=False
    )
    if mounted.returncode == 0:
        try:
            filler = folder / "filler"

            def fill():
                free = os.statvfs(folder).f_bavail * os.statvfs(folder).f_frsize
                filler.write_bytes(bytes(free - 40 * 1024))

            yield fill, filler.unlink
        finally:
            subprocess.run(["umount", "--lazy", str(folder)], check=True)  # what was read may still be mapped
        return
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    try:
        yield (
            lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (40 * 1024, hard)),
            lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard)),
        )
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


class Doing:
    """A progress that does something when a step is told."""

    def __init__(self, step, deed):
        self.wanted, self.deed = f"step {step}/", deed

    def say(self, text):
        if text.startswith(self.wanted):
            self.deed()

    def start(self, total, what=""): ...
    def advance(self, done): ...


def test_a_full_disk_at_a_checkpoint_leaves_the_one_before(whole, tiny_folder, material, tmp_path, vowels):
    config, disk = config_of(tiny_folder, material, **EVERYTHING), tmp_path / "disk"
    disk.mkdir()
    with small_disk(disk) as (fill, make_room):
        with pytest.raises(UserError, match=r"cannot write .*; make room, then give the same command again"):
            align(config, disk / "run", Doing(3, fill))
        assert [path.name for path in (disk / "run/checkpoints").glob("step-??????")] == ["step-000002"]
        make_room()
        align(config, disk / "run")
        assert_same_bytes(disk / "run", whole[0])


def test_a_full_disk_is_one_line_on_the_command_line(tiny_folder, material, tmp_path, capsys):
    disk = tmp_path / "disk"
    disk.mkdir()
    with small_disk(disk) as (fill, _):
        fill()
        with pytest.raises((SystemExit, OSError)) as stopped:
            entry(command(tiny_folder, material, disk / "run", "--lora-rank", "64"))
        if isinstance(stopped.value, OSError):  # a limit on files is no full disk
            assert stopped.value.errno == errno.EFBIG
        else:
            assert stopped.value.code == 2
            assert "make room" in one_line(capsys)


def test_a_broken_checkpoint_is_named(whole, tiny_folder, material, tmp_path, vowels):
    config = config_of(tiny_folder, material, **EVERYTHING)
    with pytest.raises(StopError):
        align(config, tmp_path / "run", Raising(4))
    newest = tmp_path / "run/checkpoints/step-000004"
    for name in ("trainable.safetensors", "state.json"):
        kept = (newest / name).read_bytes()
        (newest / name).write_bytes(kept[: len(kept) // 2])
        with pytest.raises(UserError, match="step-000004"):
            align(config, tmp_path / "run")
        (newest / name).write_bytes(kept)
    for path in newest.iterdir():
        path.unlink()
    newest.rmdir()  # as the message says
    align(config, tmp_path / "run")
    assert_same_bytes(tmp_path / "run", whole[0])


# ------------------------------------------------------------------------------------------------ features on disk


def test_features_are_encoded_once_and_then_read_without_the_encoder(pictures, tmp_path):
    vlm = tiny_llava()
    load = {name: (lambda image=image: image) for name, image in pictures.items()}
    wanted = {name: exit_features(vlm, image, range(5)) for name, image in pictures.items()}
    files = lambda model="m": FeatureFiles(tmp_path / "features", model, vlm.device)
    ticks = []
    assert files().fill(vlm, load, [1, 3], lambda: ticks.append(1)) == 3
    assert len(ticks) == 3
    assert files().fill(vlm, load, [1]) == 0  # by a later run, too
    assert files().fill(vlm, load, [4, 3]) == 3  # one exit more: all are kept
    assert files("another model").fill(vlm, load, [1]) == 3
    kept = files()
    vlm = without_encoder(vlm)
    assert kept.fill(vlm, load, [1, 3, 4]) == 0  # no encoder any more, and no need of one
    for name in pictures:
        assert kept.n_tokens(name) == 16
        for exit in (1, 3, 4):
            assert torch.equal(kept(name, exit), wanted[name][exit])
    assert not list((tmp_path / "features").glob("*.tmp"))


def test_another_picture_under_the_same_name_is_encoded_again(pictures, tmp_path):
    vlm, files = tiny_llava(), FeatureFiles(tmp_path, "m", torch.device("cpu"))
    files.fill(vlm, {"a": lambda: pictures["coffee"]}, [1])
    assert files.fill(vlm, {"a": lambda: pictures["chelsea"]}, [1]) == 1
    assert torch.equal(files("a", 1), exit_features(vlm, pictures["chelsea"], [1])[1])


@pytest.mark.parametrize("broken", ["cut", "empty", "noise", "foreign"])
def test_a_corrupt_file_of_features_is_encoded_again(pictures, tmp_path, broken):
    vlm, load = tiny_llava(), {"coffee": lambda: pictures["coffee"]}
    FeatureFiles(tmp_path, "m", vlm.device).fill(vlm, load, [1])
    (path,) = tmp_path.iterdir()
    raw = path.read_bytes()
    if broken == "foreign":
        save_file({"weights": torch.zeros(3)}, path)
    else:
        path.write_bytes({"cut": raw[:-7], "empty": b"", "noise": b"\x07" * 300}[broken])
    files = FeatureFiles(tmp_path, "m", vlm.device)
    assert files.fill(vlm, load, [1]) == 1
    assert torch.equal(files("coffee", 1), exit_features(vlm, pictures["coffee"], [1])[1])


def test_features_that_vanish_under_a_run_are_named(pictures, tmp_path):
    vlm, files = tiny_llava(), FeatureFiles(tmp_path, "m", torch.device("cpu"))
    files.fill(vlm, {"coffee": lambda: pictures["coffee"]}, [1])
    next(tmp_path.iterdir()).write_bytes(b"")
    for read in (lambda: files("coffee", 1), lambda: files.n_tokens("coffee")):
        with pytest.raises(UserError, match=f"image 'coffee' cannot be read .* delete {tmp_path}"):
            read()


# ------------------------------------------------------------------------------------------------ failure signatures


HEALTHY = {
    "objective/kl": 2.0, "policy/entropy_avg": 2.0, "rollout/over_refusal": 0.05, "rollout/distinct": 0.9,
    "rollout/coherence": 0.97, "rollout/harmful_score": 0.0, "rollout/asr": 0.8,
}  # fmt: skip


def history(n=12, **courses):
    """Rows of metrics; a course is the value in the first row and in the last four, straight in between."""
    rows = []
    for i in range(n):
        here = {key.replace("__", "/"): a + (b - a) * min(1, i / (n - 4)) for key, (a, b) in courses.items()}
        rows.append(HEALTHY | here)
    return rows


def names(rows):
    return [signature.name for signature in signatures.find(rows)]


LEARNS = {"rollout__harmful_score": (-1.0, 1.5), "rollout__asr": (0.9, 0.1), "objective__kl": (0.0, 8.0),
          "policy__entropy_avg": (2.0, 0.9)}  # fmt: skip


@pytest.mark.parametrize(
    ("name", "courses"),
    [
        ("KL blow-up", {"objective__kl": (0, 60)}),
        ("refusal loop", {"rollout__over_refusal": (0.0, 0.9)}),
        ("collapse", {"rollout__distinct": (1.0, 0.1)}),
        ("incoherence", {"rollout__coherence": (1.0, 0.2)}),
        ("entropy gone", {"policy__entropy_avg": (2.0, 0.01)}),
        ("reward-model bias", {"rollout__asr": (0.8, 0.8)}),
    ],
)
def test_a_signature_is_raised_by_name_and_alone(name, courses):
    assert names(history(**(LEARNS | courses))) == [name]
    assert names(history(**(LEARNS | courses))[:2]) == []  # two steps are noise
    (found,) = signatures.find(history(**(LEARNS | courses)))
    assert any(character.isdigit() for character in found.message)


def test_a_healthy_run_raises_nothing():
    whole = history(**LEARNS)
    assert [names(whole[:n]) for n in range(len(whole) + 1)] == [[]] * (len(whole) + 1)
    assert names(history()) == []


def test_one_bad_batch_raises_nothing():
    rows = history(**LEARNS)
    rows[-1] = rows[-1] | {"rollout/over_refusal": 1.0, "rollout/distinct": 0.2, "objective/kl": 40.0}
    assert names(rows) == []


def test_what_was_not_measured_raises_nothing():
    """Batches without harmless prompts have no over-refusal, and imitation has no rollouts at all."""
    rows = [row | {"rollout/over_refusal": None, "rollout/asr": None} for row in history(**LEARNS)]
    assert names(rows) == []
    assert names([{"step": i, "loss/policy_avg": 1.0} for i in range(20)]) == []


def test_signatures_are_told_once_and_kept_with_each_step(tiny_folder, material, tmp_path, vowels):
    """A random model babbles, so a real run must say so by name; resumed, it does not say it again."""
    said = []

    class Listening(Doing):
        def say(self, text):
            said.append(text)

    align(config_of(tiny_folder, material, steps=4), tmp_path / "run", Listening(0, None))
    raised = [row["signatures"] for row in rows_of(tmp_path / "run")]
    assert raised[:2] == [[], []]
    assert "incoherence" in raised[2]
    assert sum(": incoherence: " in line for line in said) == 1
