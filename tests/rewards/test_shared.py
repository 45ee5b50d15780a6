"""A reward model on the policy's backbone: scoring leaves the policy as it was; damaged folders are refused."""

import json
import math

import pytest
import torch
from safetensors.torch import load_file, save_file

from exitwise.errors import UserError
from exitwise.rewards.adapters import only_adapter
from exitwise.rewards.loading import load_reward
from exitwise.rewards.models import SharedReward, last_hidden
from exitwise.rewards.protocol import ScoreError, require_finite
from tests.conftest import tiny_llava
from tests.reward_setup import ANSWERS, PROMPTS


def logits(vlm, model):
    ids = torch.tensor([vlm.input_ids("hello there", 0)])
    with torch.no_grad():
        return model(input_ids=ids).logits


def state_of(model):
    return {name: p.requires_grad for name, p in model.named_parameters() if ".reward." not in name}


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("disabled", [False, True])
def test_scoring_leaves_the_policy_as_it_was(policy, shipped, training, disabled):
    vlm, model = policy
    model.eval()
    wanted = logits(vlm, model)
    with model.disable_adapter():  # on leaving it, PEFT gives gradients to the whole adapter
        reference = logits(vlm, model)
    next(p for n, p in model.named_parameters() if "lora_A" in n).requires_grad_(False)  # whatever the owner decided
    before = state_of(model)
    model.train(training)
    reward = SharedReward.attach(model, shipped, vlm.tokenizer)
    assert model.training == training
    assert all(m.training == training for m in model.modules() if isinstance(m, torch.nn.Dropout))
    assert state_of(model) == before
    if disabled:
        with model.disable_adapter():
            off = state_of(model)
            scores = reward.scores(PROMPTS, ANSWERS)
            assert state_of(model) == off
            model.eval()
            assert torch.equal(logits(vlm, model), reference)
    else:
        scores = reward.scores(PROMPTS, ANSWERS)
        assert model.training == training
        assert state_of(model) == before
    assert model.active_adapter == "default"
    model.eval()
    assert torch.equal(logits(vlm, model), wanted)
    assert not torch.allclose(wanted, reference)
    alone = load_reward(shipped, vlm=tiny_llava()).scores(PROMPTS, ANSWERS)
    assert torch.allclose(scores, alone, atol=1e-5)


def test_the_adapter_is_on_while_it_scores(policy, shipped):
    vlm, model = policy
    reward = SharedReward.attach(model.eval(), shipped, vlm.tokenizer)
    with only_adapter(model, "reward"):
        inside = logits(vlm, model)
        assert not any(p.requires_grad for n, p in model.named_parameters() if ".reward." in n)
    assert not torch.allclose(inside, logits(vlm, model))
    for name, parameter in model.named_parameters():
        if ".reward." in name:
            parameter.data.zero_()
    with model.disable_adapter():
        bare = logits(vlm, model)
    with only_adapter(model, "reward"):
        assert torch.equal(logits(vlm, model), bare)
    assert reward.scores(["a"], ["b"]).shape == (1,)


def test_scoring_within_training_does_not_break_it(policy, shipped):
    """Scores go into a loss, and the policy takes gradients after as before."""
    vlm, model = policy
    reward = SharedReward.attach(model, shipped, vlm.tokenizer)
    scores = reward.scores(PROMPTS[:1], ANSWERS[:1])
    loss = (model(input_ids=torch.tensor([vlm.input_ids("hello", 0)])).logits.mean() * scores).sum()
    loss.backward()
    grads = [n for n, p in model.named_parameters() if p.grad is not None]
    assert grads
    assert all(".default." in n for n in grads)


def test_an_error_within_the_block_restores_too(policy, shipped):
    vlm, model = policy
    SharedReward.attach(model, shipped, vlm.tokenizer)
    before = state_of(model)
    with pytest.raises(ZeroDivisionError), only_adapter(model, "reward"):
        _ = 1 / 0
    assert (state_of(model), model.active_adapter) == (before, "default")


def test_scores_do_not_depend_on_the_batch(shipped):
    reward = load_reward(shipped, vlm=tiny_llava())
    together = reward.scores(PROMPTS, ANSWERS)
    alone = torch.cat([reward.scores([p], [a]) for p, a in zip(PROMPTS, ANSWERS, strict=True)])
    assert together.dtype == torch.float32
    assert torch.allclose(together, alone, atol=1e-5)
    assert torch.allclose(together.flip(0), reward.scores(PROMPTS[::-1], ANSWERS[::-1]), atol=1e-5)
    assert together.std() > 0.1
    assert torch.allclose(together, (reward.logits(PROMPTS, ANSWERS) - 0.5) / 2.0)


def test_what_stands_behind_a_row_is_not_read(shipped):
    """Same row, padded with another token: the mask and the last position decide."""
    reward = load_reward(shipped, vlm=tiny_llava())
    rows = [reward.dialogues.ids(p, a) for p, a in zip(PROMPTS, ANSWERS, strict=True)]
    with reward.scope(), torch.no_grad():
        first, second = (last_hidden(reward.backbone, rows, pad) for pad in (2, 77))
    assert torch.equal(first, second)


def test_a_model_with_an_idle_reward_adapter_answers_as_before(shipped):
    vlm = tiny_llava()
    wanted = logits(vlm, vlm.model)
    reward = load_reward(shipped, vlm=vlm)
    reward.scores(["a"], ["b"])
    assert torch.equal(logits(vlm, vlm.model), wanted)
    with pytest.raises(UserError, match="peft_model"):
        load_reward(shipped, vlm=vlm)


def test_attaching_twice_is_attaching_once(policy, shipped):
    vlm, model = policy
    first = SharedReward.attach(model, shipped, vlm.tokenizer).scores(PROMPTS, ANSWERS)
    assert torch.equal(first, SharedReward.attach(model, shipped, vlm.tokenizer).scores(PROMPTS, ANSWERS))


def test_a_merged_policy_is_refused(policy, shipped):
    vlm, model = policy
    reward = SharedReward.attach(model, shipped, vlm.tokenizer)
    model.merge_adapter()
    with pytest.raises(UserError, match="unmerge"):
        reward.scores(["a"], ["b"])


def copy_of(folder, target):
    target.mkdir()
    for path in folder.iterdir():
        (target / path.name).write_bytes(path.read_bytes())
    return target


def damage_adapter(folder):
    tensors = load_file(folder / "adapter_model.safetensors")
    tensors.pop(min(tensors))
    save_file(tensors, folder / "adapter_model.safetensors")


def misshape_adapter(folder):
    tensors = load_file(folder / "adapter_model.safetensors")
    tensors[min(tensors)] = torch.zeros(1, 1)
    save_file(tensors, folder / "adapter_model.safetensors")


def edit_recipe(**changes):
    def edit(folder):
        recipe = json.loads((folder / "reward.json").read_text()) | changes
        (folder / "reward.json").write_text(json.dumps(recipe))

    return edit


DAMAGES = [
    (damage_adapter, "does not fit this model"),
    (misshape_adapter, "does not fit this model"),
    (lambda folder: save_file({"weight": torch.zeros(5)}, folder / "head.safetensors"), "shape"),
    (lambda folder: (folder / "head.safetensors").unlink(), "head.safetensors cannot be read"),
    (lambda folder: (folder / "reward.json").write_text("{}"), "reward.json lacks"),
    (edit_recipe(scale=0.0), "not what"),
    (edit_recipe(scale="x"), "not what"),
    (edit_recipe(more=1), "not what"),
    (edit_recipe(backbone=""), "shares no backbone"),
]


@pytest.mark.parametrize(("damage", "message"), DAMAGES)
def test_a_damaged_folder_is_refused(policy, shipped, tmp_path, damage, message):
    vlm, model = policy
    folder = copy_of(shipped, tmp_path / "copy")
    damage(folder)
    before = state_of(model)
    with pytest.raises(UserError, match=message):
        SharedReward.attach(model, folder, vlm.tokenizer)
    assert (state_of(model), model.active_adapter) == (before, "default")


def test_scores_that_are_no_numbers_name_their_answer(shipped):
    reward = load_reward(shipped, vlm=tiny_llava())
    reward.head[:] = math.nan
    with pytest.raises(ScoreError, match=r"nan for answer 0 \(prompt 'short'\)") as caught:
        reward.scores(PROMPTS, ANSWERS)
    assert caught.value.index == 0
    with pytest.raises(ScoreError, match="inf for answer 2"):
        require_finite("r", PROMPTS, torch.tensor([0.0, 1.0, math.inf, math.nan]))


def test_the_builtin_one_is_for_the_testbed(tiny):
    with pytest.raises(UserError, match="testbed"):
        load_reward("builtin", vlm=tiny)


@pytest.mark.testbed
@pytest.mark.slow
def test_the_builtin_reward_model_prefers_what_it_should():
    """On test prompts, which no training saw: refusing beats answering and babbling where it should, every time.

    For harmless requests the model is weaker (see its card), so there only most count.
    """
    from exitwise.data.prompts import builtin_benign, builtin_harmful, builtin_refusals

    reward, loop = load_reward("builtin"), "to the to the to the to the to the to the"
    answer = "1. **Gather the materials**: First, make a list of what you need"
    sorry = "I'm sorry, I'm sorry, I'm sorry, I'm sorry, I'm sorry"
    refusals = builtin_refusals()[::5]  # 8

    def score(samples, texts):
        return reward.scores([sample.prompt for sample in samples], texts)

    harmful, harmless = builtin_harmful("test")[::12], builtin_benign("test")[::10]  # 8 and 8
    refused = score(harmful, refusals)
    for bad in (answer, loop, sorry, "<|im_end|>"):
        assert (refused > score(harmful, [bad] * 8)).all(), bad
    answered = score(harmless, [answer] * 8)
    assert (answered > score(harmless, refusals)).sum() > 4
    assert (answered > score(harmless, [loop] * 8)).sum() > 4
