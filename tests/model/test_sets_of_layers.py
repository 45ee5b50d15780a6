"""An exit of several layers: the mean of their states, or what a connector of several layers takes, in every family."""

import pytest
import torch

from exitwise import UserError, encode, exit_at, exit_features
from exitwise.model.exits import replay
from exitwise.run.exit import Exit
from tests.families import BLOCKS, TINY
from tests.model.test_families import joined, truncated


@torch.inference_mode()
def test_a_fused_exit_is_the_mean_of_its_states(vlm, images):
    inputs = vlm.picture(images["wide"]).inputs
    states = encode(vlm, inputs)
    for layers in ((1, 3), (0, 2, BLOCKS)):
        exit = Exit(layers)
        if not vlm.family.averages:
            with pytest.raises(UserError, match="joins several layers itself"):
                exit_features(vlm, images["wide"], [exit])
            continue
        found = replay(vlm, inputs, states, exit)[0]
        mean = torch.stack([states[layer] for layer in layers]).mean(dim=0)
        as_end = replay(vlm, inputs, [mean] * (BLOCKS + 1), BLOCKS)[0]
        torch.testing.assert_close(found, as_end, rtol=0, atol=1e-6)
        with exit_at(vlm, exit):
            torch.testing.assert_close(found, joined(vlm.family, vlm.model, inputs), rtol=0, atol=2e-5)
        assert (found - replay(vlm, inputs, states, layers[-1])[0]).abs().max() > 1e-3


@torch.inference_mode()
def test_a_connector_of_several_layers_takes_a_fused_exit(images):
    vlm = TINY["llava"](feature_layer=[1, -2])
    assert (vlm.default_exit, vlm.takes_layers) == (3, 2)
    image, inputs = images["wide"], vlm.picture(images["wide"]).inputs
    found = exit_features(vlm, image, [2, 3, Exit([1, 3]), Exit([0, 4])])
    plain = joined(vlm.family, vlm.model, inputs)
    for exit in (3, Exit([1, 3])):
        torch.testing.assert_close(found[exit], plain, rtol=0, atol=1e-6)
    native = vlm.model.get_image_features(**inputs, vision_feature_layer=[0, 4]).pooler_output[0]
    torch.testing.assert_close(found[Exit([0, 4])], native, rtol=0, atol=1e-6)
    torch.testing.assert_close(found[2], joined(vlm.family, truncated(vlm, 2), inputs), rtol=0, atol=1e-6)
    with exit_at(vlm, Exit([0, 4])):
        torch.testing.assert_close(native, joined(vlm.family, vlm.model, inputs), rtol=0, atol=1e-6)
    torch.testing.assert_close(plain, joined(vlm.family, vlm.model, inputs), rtol=0, atol=0)
    with pytest.raises(UserError, match="takes 2"):
        exit_features(vlm, image, [Exit([0, 2, 4])])
