"""`align` on a tiny model: what is rewarded becomes likelier, and an update equals plain loops over its formulas."""

import pytest
import torch
from safetensors.torch import load_file

import exitwise.alignment.steps
from exitwise import load_vlm
from exitwise.alignment.config import AlignConfig
from exitwise.alignment.loop import align
from exitwise.alignment.rollout import ResponseBatch, Rollout
from exitwise.alignment.steps import shape_scores
from exitwise.data.images import load_image
from exitwise.engines import prefix
from exitwise.model.exits import exit_at
from exitwise.model.families import FAMILIES
from exitwise.run.records import Completion, Kind, Label, Sample
from tests.align_setup import HARMFUL, VowelReward, config_of
from tests.alignment.runs import rows_of
from tests.conftest import pixels_of, tiny_llava
from tests.families import TINY

OTHERS = [name for name in TINY if name != "llava"]


@pytest.mark.parametrize("family", OTHERS)
def test_a_step_on_another_family(family, material, tmp_path, vowels, monkeypatch):
    """Two exits, one of them fused where it may be; what is saved has learnt and is of the language model alone."""
    monkeypatch.setattr("exitwise.alignment.setup.load_vlm", lambda *_, **__: TINY[family]())
    exits = "1,1+3" if FAMILIES[family].averages else "1,3"
    folder = align(config_of(family, material, steps=1, exits=exits, features=None), out=tmp_path / "run").folder
    learnt = load_file(folder / "adapter_model.safetensors")
    path = FAMILIES[family].language_model
    assert all(f".{path}." in name for name in learnt)
    assert all(tensor.any() for name, tensor in learnt.items() if "lora_B" in name)


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
    total = torch.zeros(())
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
    align(config, out=tmp_path / "run")
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
    align(config, out=tmp_path / "run")
    moments = load_file(tmp_path / "run/checkpoints/step-000001/optimizer.safetensors")
    for i, (name, gradient) in enumerate(wanted.items()):
        largest = float(gradient.abs().max())
        assert largest > 1e-5, name
        assert torch.allclose(10 * moments[f"{i}.exp_avg"], gradient, rtol=1e-3, atol=1e-4 * largest), name


def test_an_update_of_no_size_shifts_nothing(tiny_folder, material, tmp_path, vowels):
    """Every other answer is looked back at; a row compared with another's would show."""
    align(config_of(tiny_folder, material, lr=0.0, steps=1, exits="1,3"), out=tmp_path / "run")
    (row,) = rows_of(tmp_path / "run")
    for name in ("surrogate_gain", "mean_kl", "max_kl", "mean_tv", "max_tv"):
        assert row[f"theory/{name}"] == pytest.approx(0.0, abs=1e-5)


def test_sft_loss_falls(tiny_folder, material, tmp_path):
    align(config_of(tiny_folder, material, method="sft", steps=6, lr=2e-2, batch_size=16), out=tmp_path / "run")
    losses = [row["loss/policy_avg"] for row in rows_of(tmp_path / "run")]
    assert losses[0] == pytest.approx(5.56, abs=1.5)  # about log 260: it knows nothing yet
    assert losses[-1] < 0.6 * losses[0]


def test_dpo_begins_at_log_2_and_falls(tiny_folder, material, tmp_path):
    options = {"steps": 4, "lr": 1e-2, "batch_size": 16, "num_ppo_epochs": 1, "num_mini_batches": 1}
    align(config_of(tiny_folder, material, method="dpo", **options), out=tmp_path / "run")
    rows = rows_of(tmp_path / "run")
    assert rows[0]["loss/policy_avg"] == pytest.approx(0.693147, abs=1e-5)
    assert rows[-1]["loss/policy_avg"] < 0.4
    assert rows[-1]["dpo/accuracy"] > 0.9


def test_scores_are_shaped_row_by_row():
    """Worked by hand: a refused harmless request at its cost, then the clip, then the penalty for no end."""
    asked: list[tuple[Kind, Label]] = [
        ("harmful", "refused"), ("benign", "refused"), ("benign", "answered"), ("benign", "incoherent"),
    ]  # fmt: skip
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
