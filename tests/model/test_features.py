"""Files of image features: encoded once, read without the encoder, encoded again where they are broken."""

import pytest
import torch
from safetensors.torch import save_file

from exitwise import UserError
from exitwise.alignment.policy import without_encoder
from exitwise.model.exits import exit_features
from exitwise.model.features import FeatureFiles
from tests.conftest import tiny_llava


def test_features_are_encoded_once_and_then_read_without_the_encoder(pictures, tmp_path):
    vlm = tiny_llava()
    load = {name: (lambda image=image: image) for name, image in pictures.items()}
    wanted = {name: exit_features(vlm, image, range(5)) for name, image in pictures.items()}
    files = lambda model="m": FeatureFiles(tmp_path / "features", model, vlm.device)
    assert files().fill(vlm, load, [1, 3]) == 3
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
