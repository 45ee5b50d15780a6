"""FLOPs against hand-worked ones and against a direct count, parameters against numel, seconds where they are spent."""

import time

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from exitwise import UserError, exit_at, exit_costs
from exitwise.model.costs import PassMark, parts_of
from tests.conftest import PATCH, SIDE, pixels_of, tiny_llava

WIDTH, MLP, PATCHES, BLOCKS = 16, 32, (SIDE // PATCH) ** 2, 4
TOKENS, TEXT_WIDTH, TEXT_MLP, KV_WIDTH, TEXT_LAYERS = PATCHES + 1, 32, 64, 16, 2  # TOKENS with CLS


def product(rows, inner, columns):
    """FLOPs of a matrix product: a multiplication and an addition for each of its terms."""
    return 2 * rows * inner * columns


def numel(module):
    return sum(p.numel() for p in module.parameters())


def test_flops_by_hand(tiny):
    costs = exit_costs(tiny, repetitions=0)
    n = costs["request"]["tokens"]
    assert costs["request"]["image_tokens"] == PATCHES
    patches = product(PATCHES, 3 * PATCH * PATCH, WIDTH)
    attention = 4 * product(TOKENS, WIDTH, WIDTH) + 2 * product(TOKENS, WIDTH, TOKENS)  # q, k, v, out; scores, mix
    block = attention + 2 * product(TOKENS, WIDTH, MLP)
    projector = product(PATCHES, WIDTH, TEXT_WIDTH) + product(PATCHES, TEXT_WIDTH, TEXT_WIDTH)
    layer = 2 * product(n, TEXT_WIDTH, TEXT_WIDTH) + 2 * product(n, TEXT_WIDTH, KV_WIDTH)
    layer += 2 * product(n, TEXT_WIDTH, n) + 3 * product(n, TEXT_WIDTH, TEXT_MLP)
    prefill = TEXT_LAYERS * layer + product(1, TEXT_WIDTH, len(tiny.tokenizer))
    for row in costs["exits"]:
        encoder = patches + int(row["exit"]) * block
        expected = {"encoder": encoder, "projector": projector, "prefill": prefill}
        assert row["flops"] == expected | {"total": sum(expected.values())}


def test_flops_of_an_exit_are_those_of_the_model_cut_there(tiny, pictures):
    """Counted another way: at the exit itself, with attention as plain products."""
    pixels = pixels_of(tiny, [pictures["coffee"]])
    for row in exit_costs(tiny, image=pictures["coffee"], repetitions=0)["exits"]:
        if row["exit"] == tiny.default_exit:
            continue  # the stock model runs the blocks after its default exit too, for nothing
        with exit_at(tiny, row["exit"]), sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
            tiny.model.get_image_features(pixel_values=pixels)
        assert counter.get_total_flops() == row["flops"]["encoder"] + row["flops"]["projector"]


def test_parameters_are_those_of_the_model_without_the_blocks(tiny):
    model = tiny.model
    language = numel(model.model.language_model) + numel(model.lm_head)
    norm = 2 * WIDTH  # after the encoder's blocks
    for row in exit_costs(tiny, repetitions=0)["exits"]:
        skipped = sum(numel(block) for block in tiny.blocks[row["exit"] :])
        assert row["parameters"]["total"] == numel(model) - skipped
        assert row["parameters"]["language_model"] == language
        assert row["parameters"]["projector"] == numel(model.model.multi_modal_projector) + norm
        assert row["parameters"]["encoder"] == numel(model.model.vision_tower) - norm - skipped
        assert row["bytes"] == {part: 4 * n for part, n in row["parameters"].items()}


def test_tied_weights_count_once():
    vlm = tiny_llava()
    before = exit_costs(vlm, [0], repetitions=0)["exits"][0]["parameters"]
    vlm.model.lm_head.weight = vlm.model.get_input_embeddings().weight
    after = exit_costs(vlm, [0], repetitions=0)["exits"][0]["parameters"]
    saved = vlm.model.lm_head.weight.numel()
    assert after == before | {part: before[part] - saved for part in ("language_model", "total")}


def test_half_precision_takes_half_the_bytes():
    vlm = tiny_llava()
    vlm.model.to(torch.float16)
    row = exit_costs(vlm, [4], repetitions=0)["exits"][-1]
    assert row["bytes"]["total"] == 2 * numel(vlm.model)


@pytest.mark.parametrize("where", ["encoder", "projector", "prefill"])
def test_seconds_are_told_from_where_they_are_spent(where):
    vlm = tiny_llava()
    slow = {
        "encoder": vlm.blocks[2].mlp,
        "projector": vlm.model.model.multi_modal_projector.linear_1,
        "prefill": vlm.model.model.language_model.layers[1].mlp,
    }[where]
    slow.register_forward_pre_hook(lambda *_: time.sleep(0.3))
    rows = exit_costs(vlm, repetitions=3)["exits"]
    for row in rows:
        parts = {part: row["seconds"][part]["median"] for part in ("encoder", "projector", "prefill")}
        slept = where != "encoder" or row["exit"] >= 3  # exit 2 does not run block 2
        assert parts[where] >= 0.3 if slept else parts[where] < 0.3
        assert row["seconds"]["total"]["median"] >= max(parts.values())
    assert all(0 < s["low"] <= s["median"] <= s["high"] for row in rows for s in row["seconds"].values())


def test_how_often_it_is_timed(tiny):
    costs = exit_costs(tiny, [1], repetitions=4)
    assert costs["repetitions"] in (3, 4)  # on a machine that crawls, three are enough
    assert costs["threads"] == torch.get_num_threads()
    none = exit_costs(tiny, [1], repetitions=0)
    assert none["repetitions"] == 0
    assert [row["seconds"] for row in none["exits"]] == [None, None]


def test_exits_and_the_default(tiny):
    assert [row["exit"] for row in exit_costs(tiny, [1, 0], repetitions=0)["exits"]] == [0, 1, tiny.default_exit]
    assert [row["exit"] for row in exit_costs(tiny, "late", repetitions=0)["exits"]] == [3, 4]
    for wrong in ([5], [-1], "later"):
        with pytest.raises(UserError, match="exit"):
            exit_costs(tiny, wrong)


def test_the_model_is_left_as_it_was(tiny, pictures):
    pixels = pixels_of(tiny, [pictures["coffee"]])
    before = tiny.model.get_image_features(pixel_values=pixels).pooler_output[0]
    hooks = [set(block._forward_hooks) for block in tiny.blocks]  # transformers' own
    exit_costs(tiny)
    assert torch.equal(before, tiny.model.get_image_features(pixel_values=pixels).pooler_output[0])
    assert not any(m._forward_pre_hooks or "forward" in vars(m) for m in tiny.model.modules())
    assert [set(block._forward_hooks) for block in tiny.blocks] == hooks


def test_blocks_that_run_tile_by_tile_are_summed():
    places = [("start", 0, -1), ("enter", 1, 0), ("leave", 3, 0), ("enter", 3, 1), ("leave", 7, 1)]
    places += [
        ("enter", 8, 0),
        ("leave", 10, 0),
        ("enter", 10, 1),
        ("leave", 14, 1),
        ("prefill", 20, -1),
        ("end", 50, -1),
    ]
    parts = parts_of([PassMark(*place) for place in places], 2)
    assert parts == (1, [4, 8], 7, 30)  # between the tiles and after them: 7
    assert parts.at(1) == {"encoder": 5, "projector": 7, "prefill": 30, "total": 42}


def test_an_encoder_that_does_not_run():
    with pytest.raises(UserError, match="did not run"):
        parts_of([PassMark("start", 0), PassMark("prefill", 1), PassMark("end", 2)], 2)
