"""The policy says what the stock model says at the exit it was given, however rows are batched.

In float64, but for the head of the loss: log-probabilities and values come out in float32, hence tolerances of 1e-5.
"""

import copy
import gc
import weakref

import torch

from exitwise.alignment import ppo
from exitwise.alignment.policy import Policy, without_encoder
from exitwise.alignment.rollout import (
    ResponseBatch,
    answer,
    select,
)
from exitwise.engines.prefix import Decoding
from exitwise.model.exits import exit_at
from tests.alignment.stage import CLOSE, PLAN, PROMPTS, Stage, tiny_double
from tests.conftest import pixels_of

# ------------------------------------------------------------------------------------------------ what it says


def test_a_fresh_adapter_is_the_reference(clip):
    stage = clip(moved=False)
    answers = stage.answers(PLAN)
    new, reference = stage.outputs(answers), stage.outputs(answers, reference=True)
    assert torch.equal(new.logprobs, reference.logprobs)
    assert float(new.values.detach().abs().max()) == 0.0
    parts = ppo.token_rewards(torch.ones(len(PLAN)), new.logprobs, reference.logprobs, answers.mask, 1.0)
    assert float(parts.kl.detach().abs().max()) == 0.0
    loss = ppo.policy_loss(new.logprobs, reference.logprobs, torch.ones_like(answers.mask), answers.mask, 1.0, 0.2)
    assert torch.equal(loss.ratio, torch.ones_like(loss.ratio))


def test_log_probabilities_are_those_of_the_stock_model_at_that_exit(stage):
    """With the adapter, and as the reference without; entropy likewise; the stock model is given the pixels."""
    answers = stage.answers(PLAN)
    mine, reference = stage.outputs(answers), stage.outputs(answers, reference=True)
    for line, (_, _, exit, n) in enumerate(PLAN):
        for vlm, found in ((stage.vlm, mine), (stage.stock, reference)):
            logprobs, entropy = stage.plain(vlm, answers, line)
            assert torch.allclose(found.logprobs[line, :n].double(), logprobs, **CLOSE), (line, exit)
            assert torch.allclose(found.entropy[line, :n].double(), entropy, **CLOSE)
        for store in mine:
            assert float(store[line, n:].detach().abs().sum()) == 0.0
    assert not torch.allclose(mine.logprobs, reference.logprobs, atol=1e-2)  # the adapter was moved


def test_another_exit_gives_other_numbers(stage):
    at = lambda exit: stage.outputs(stage.answers([(PROMPTS[0], "coffee", exit, 4)])).logprobs
    found = [at(exit) for exit in range(5)]
    for i in range(5):
        for j in range(i):
            assert not torch.allclose(found[i], found[j], atol=1e-3), (i, j)
    other = stage.outputs(stage.answers([(PROMPTS[0], "chelsea", 3, 4)])).logprobs
    assert not torch.allclose(other, found[3], atol=1e-3)  # and another image


def test_values_are_linear_in_the_last_hidden_states(stage):
    answers = stage.answers(PLAN[:1])
    row, response = answers.rows[0], answers.responses[0].tolist()
    ids = torch.tensor([[*row.head, *row.tail, *response]])
    with exit_at(stage.vlm, 3), torch.no_grad():
        hidden = stage.vlm.model.model(
            input_ids=ids, pixel_values=pixels_of(stage.vlm, [stage.pictures["coffee"]]), use_cache=False
        ).last_hidden_state[0, -5:-1]
    head = stage.policy.value_head
    wanted = hidden @ head.weight[0].double() + head.bias.double()
    assert torch.allclose(stage.outputs(answers).values[0].double(), wanted, **CLOSE)


# ------------------------------------------------------------------------------------------------ however it is batched


def gradients(stage, answers, parts=None):
    """Of a loss that all outputs enter, with other weights for every token."""
    stage.policy.zero_grad()
    width = answers.mask.shape[1]
    weights = torch.linspace(-1, 1, len(answers.rows) * width).view(-1, width)
    for part in parts or [list(range(len(answers.rows)))]:
        found = stage.outputs(select(answers, part), entropy_gradient=True)
        loss = (found.logprobs + 0.3 * found.entropy + 0.5 * found.values) * weights[part]
        loss.sum().backward()
    return {name: p.grad.clone() for name, p in stage.policy.trainable().items()}


def assert_same_gradients(found, wanted):
    assert max(float(g.abs().max()) for g in wanted.values()) > 0.1
    for name, gradient in wanted.items():
        assert float(gradient.abs().max()) > 0, name
        assert torch.allclose(found[name], gradient, rtol=1e-4, atol=1e-5 * float(gradient.abs().max())), name


def test_shared_heads_are_row_by_row_in_outputs_and_gradients(stage, pictures, tmp_path):
    answers = stage.answers(PLAN)
    shared, shared_gradients = stage.outputs(answers), gradients(stage, answers)
    apart = Stage(pictures, tmp_path, stage.tower, share_heads=False)
    apart.policy.load_state_dict(stage.policy.state_dict())
    for line in range(len(PLAN)):
        alone = apart.outputs(select(answers, [line]))
        for name, whole, one in zip(shared._fields, shared, alone, strict=True):
            assert torch.allclose(whole[line], one[0], **CLOSE), (name, line)
    row_by_row = gradients(apart, answers, [[line] for line in range(len(PLAN))])
    together = gradients(apart, answers)
    assert_same_gradients(shared_gradients, row_by_row)
    assert_same_gradients(together, row_by_row)


def test_heads_of_unequal_length_share_a_batch(stage):
    """A template that greets some users at more length: the shorter heads are padded, and must not see it."""
    answers = stage.answers(PLAN)
    longer = {1: (5, 6, 7), 4: (9,), 5: (70, 80)}
    rows = [row._replace(head=(*longer.get(line, ()), *row.head)) for line, row in enumerate(answers.rows)]
    answers = answers._replace(rows=rows)
    found = stage.outputs(answers)
    for line, (*_, n) in enumerate(PLAN):
        assert torch.allclose(found.logprobs[line, :n].double(), stage.plain(stage.vlm, answers, line)[0], **CLOSE)


def test_padding_and_neighbours_change_nothing(stage):
    answers = stage.answers(PLAN)
    whole = stage.outputs(answers)
    wider = ResponseBatch(
        answers.rows,
        torch.cat([answers.responses.where(answers.mask.bool(), torch.tensor(77)), torch.full((len(PLAN), 3), 99)], 1),
        torch.cat([answers.mask, torch.zeros(len(PLAN), 3)], 1),
    )
    n = answers.mask.shape[1]
    for name, mine, padded in zip(whole._fields, whole, stage.outputs(wider), strict=True):
        assert torch.allclose(mine, padded[:, :n], **CLOSE), name
        assert float(padded[:, n:].detach().abs().sum()) == 0.0
    order = [5, 0, 3, 2]
    for name, mine, some in zip(whole._fields, whole, stage.outputs(select(answers, order)), strict=True):
        assert torch.allclose(mine[order], some, **CLOSE), name


def test_rows_without_an_image_mix_with_others(stage):
    plan = [(PROMPTS[0], "", 3, 4), (PROMPTS[1], "coffee", 1, 2), (PROMPTS[2], "chelsea", 1, 3)]
    answers = stage.answers(plan)
    found = stage.outputs(answers)
    for line, (*_, n) in enumerate(plan):
        assert torch.allclose(found.logprobs[line, :n].double(), stage.plain(stage.vlm, answers, line)[0], **CLOSE)


def test_gradient_checkpointing_gives_the_same_gradients(clip):
    plain, checkpointed = clip(), clip(gradient_checkpointing=True)
    checkpointed.policy.load_state_dict(plain.policy.state_dict())
    answers = plain.answers(PLAN)
    layer, runs = checkpointed.vlm.model.model.language_model.layers[0], []
    layer.self_attn.register_forward_hook(lambda *args: runs.append(1))
    wanted = gradients(plain, answers)
    assert_same_gradients(gradients(checkpointed, answers), wanted)
    assert len(runs) == 2  # forward, and again on the way back
    requests = [row.request for row in answers.rows]
    texts = lambda stage: [c.text for c in answer(stage.policy, requests, stage.features, Decoding(4))]
    assert texts(checkpointed) == texts(plain)
    assert checkpointed.vlm.model.training  # as before


def test_the_entropy_has_a_gradient_only_where_it_is_asked_for(stage):
    answers = stage.answers(PLAN[:2])
    assert not stage.outputs(answers).entropy.requires_grad
    assert stage.outputs(answers, entropy_gradient=True).entropy.requires_grad


# ------------------------------------------------------------------------------------------------ what it leaves alone


def test_the_adapter_never_touches_the_encoder(stage):
    trained = stage.policy.trainable()
    assert len(trained) == 2 * 7 * 2 + 2  # layers x projections x (A, B), and the value head
    for name in trained:
        assert "language_model.layers" in name or name.startswith("value_head"), name
    assert (
        "q_proj" in " ".join(dict(stage.vlm.model.model.vision_tower.named_parameters()))
        or stage.vlm.name != "tiny-clip"
    )
    for part in (stage.vlm.model.model.vision_tower, stage.vlm.model.model.multi_modal_projector):
        assert not any("lora" in name for name, _ in part.named_parameters())
        assert not any(p.requires_grad for p in part.parameters())


def test_an_update_moves_the_adapter_and_nothing_else(clip):
    stage = clip()
    before = {name: p.detach().clone() for name, p in stage.policy.named_parameters()}
    optimizer = torch.optim.AdamW(stage.policy.trainable().values(), lr=0.1)
    gradients(stage, stage.answers(PLAN))
    optimizer.step()
    for name, parameter in stage.policy.named_parameters():
        assert torch.equal(parameter, before[name]) == (name not in stage.policy.trainable()), name


def test_switching_the_adapter_off_and_on_leaves_requires_grad_as_it_was(stage):
    flags = lambda: {name: p.requires_grad for name, p in stage.policy.named_parameters()}
    before = flags()
    stage.outputs(stage.answers(PLAN[:2]), reference=True)
    assert flags() == before
    with stage.policy.evaluating(), stage.policy.peft_model.disable_adapter():
        pass
    assert flags() == before
    assert not stage.vlm.model.training


def test_without_its_encoder_it_answers_the_same(clip):
    stage = clip()
    answers = stage.answers(PLAN)
    requests = [row.request for row in answers.rows]
    sampling = Decoding(5, temperature=1.0, seed=3)
    before = stage.outputs(answers), answer(stage.policy, requests, stage.features, sampling)
    size = sum(p.numel() for p in stage.vlm.model.parameters())
    tower = sum(p.numel() for p in stage.vlm.model.model.vision_tower.parameters())
    projector = sum(p.numel() for p in stage.vlm.model.model.multi_modal_projector.parameters())
    bare = Policy(without_encoder(tiny_double()), 4, 8.0, critic=True)
    missing = bare.load_state_dict(stage.policy.state_dict(), strict=False).missing_keys
    assert not missing
    assert sum(p.numel() for p in bare.vlm.model.parameters()) == size - tower - projector
    stage.policy = bare
    after = stage.outputs(answers), answer(stage.policy, requests, stage.features, sampling)
    assert all(torch.equal(a, b) for a, b in zip(before[0], after[0], strict=True))
    assert before[1] == after[1]


def test_a_model_without_its_encoder_leaves_the_given_one_as_it_was(clip):
    """Its weights are not copied, an adapter on it does not show, and with the given one its encoder is freed."""
    vlm = tiny_double()
    modules, state = [type(m) for m in vlm.model.modules()], copy.deepcopy(vlm.model.state_dict())
    embedding = vlm.model.get_input_embeddings().weight
    embedding.requires_grad_(True)
    bare = without_encoder(vlm)
    policy = Policy(bare, 4, 8.0, critic=True, gradient_checkpointing=True)
    assert bare.model.get_input_embeddings().weight.data_ptr() == embedding.data_ptr()
    assert embedding.requires_grad
    assert not vlm.model.training
    assert [type(m) for m in vlm.model.modules()] == modules
    assert all(torch.equal(value, state[name]) for name, value in vlm.model.state_dict().items())
    block = weakref.ref(vlm.blocks[0])
    del vlm
    gc.collect()
    assert block() is None
    assert policy.vlm is bare
