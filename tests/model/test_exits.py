"""Replay equals the encoder cut after l, for every l; the default exit is the plain model."""

import pytest
import torch

from exitwise import UserError, encode, exit_at, exit_features, parse_exits
from exitwise.model.exit_names import band_exits, ranges
from exitwise.model.exits import replay
from exitwise.run.exit import Exit
from tests.conftest import pixels_of, tiny_llava


def truncated_features(vlm, pixels, exit):
    """Features of a model whose encoder really has `exit` blocks: the module list is shortened, nothing is patched."""
    tower = vlm.model.model.vision_tower
    holder = tower.encoder
    name = "layers" if hasattr(holder, "layers") else "layer"
    whole = getattr(holder, name)
    setattr(holder, name, whole[:exit])
    vlm.model.config.vision_config.num_hidden_layers = exit
    try:
        return vlm.model.get_image_features(pixel_values=pixels, vision_feature_layer=-1).pooler_output
    finally:
        setattr(holder, name, whole)
        vlm.model.config.vision_config.num_hidden_layers = len(whole)


def test_replay_is_the_truncated_and_the_native_model(tiny, pictures):
    pixels = pixels_of(tiny, list(pictures.values()))
    states = encode(tiny, pixels)
    assert len(states) == tiny.n_blocks + 1
    for exit in range(tiny.n_blocks + 1):
        found = torch.stack(replay(tiny, pixels, states, exit))
        native = torch.stack(
            tiny.model.get_image_features(pixel_values=pixels, vision_feature_layer=[exit]).pooler_output
        )
        torch.testing.assert_close(found, native, rtol=0, atol=1e-6)
        if exit:  # transformers records no state where there is no block
            torch.testing.assert_close(found, torch.stack(truncated_features(tiny, pixels, exit)), rtol=0, atol=1e-6)


def test_exits_differ_from_each_other(tiny, pictures):
    features = exit_features(tiny, pictures["coffee"], range(tiny.n_blocks + 1))
    for exit in range(tiny.n_blocks):
        assert (features[exit] - features[exit + 1]).abs().max() > 1e-3


def test_exit_at_restores_the_model(tiny, pictures):
    pixels = pixels_of(tiny, [pictures["coffee"]])
    before = tiny.model.get_image_features(pixel_values=pixels).pooler_output[0]
    with exit_at(tiny, 1):
        assert (tiny.model.get_image_features(pixel_values=pixels).pooler_output[0] - before).abs().max() > 1e-3
    with exit_at(tiny, 1), exit_at(tiny, 2):
        pass
    with pytest.raises(KeyError), exit_at(tiny, 2):
        raise KeyError
    after = tiny.model.get_image_features(pixel_values=pixels).pooler_output[0]
    assert torch.equal(before, after)
    with exit_at(tiny, tiny.default_exit):
        assert torch.equal(before, tiny.model.get_image_features(pixel_values=pixels).pooler_output[0])


def test_each_exit_within_exit_at_is_the_replayed_one(tiny, pictures):
    features = exit_features(tiny, pictures["chelsea"], range(tiny.n_blocks + 1))
    pixels = pixels_of(tiny, [pictures["chelsea"]])
    for exit, expected in features.items():
        with exit_at(tiny, exit):
            torch.testing.assert_close(
                tiny.model.get_image_features(pixel_values=pixels).pooler_output[0], expected, rtol=0, atol=1e-6
            )


@pytest.mark.parametrize(("layer", "exit"), [(-2, 3), (-1, 4), (2, 2)])
def test_default_exit_follows_the_config(layer, exit):
    assert tiny_llava(feature_layer=layer).default_exit == exit


def test_bands_are_the_papers():
    assert [band_exits(b, 24) for b in ("early", "middle", "late")] == [
        tuple(range(1, 9)),
        tuple(range(9, 17)),
        tuple(range(17, 25)),
    ]
    assert [e for b in ("early", "middle", "late") for e in band_exits(b, 5)] == [1, 2, 3, 4, 5]


def test_parse_exits():
    assert parse_exits("all", 4, 3) == (0, 1, 2, 3, 4)
    assert parse_exits("default, 0-1", 4, 3) == (0, 1, 3)
    assert parse_exits("late,2", 12, 11) == (2, 9, 10, 11, 12)
    assert parse_exits("3+10+1, 2", 12, 11) == (2, Exit([1, 3, 10]))
    assert [str(e) for e in (7, Exit([0, 3, 10]))] == ["7", "0+3+10"]
    assert ranges([1, 2, 5, Exit([1, 3])]) == "1-2, 5, 1+3"
    for wrong in ("3+13", "3+3", "3+", "25", "-1", "", "3-2", "first", "1.5", "0-13"):
        with pytest.raises(UserError, match="exit"):
            parse_exits(wrong, 12, 11)


def test_an_exit_that_is_not_there(tiny, pictures):
    for exit in (-1, tiny.n_blocks + 1):
        with pytest.raises(UserError, match="exits 0 to"):
            exit_features(tiny, pictures["coffee"], [exit])
