"""Versions of transformers and torchvision: what is refused, in which words, and what differs without showing."""

import json
import tomllib

import pytest
import torch
import transformers
from packaging.requirements import Requirement
from packaging.version import Version

from exitwise import UserError, load_vlm
from exitwise.model import compat
from tests.conftest import ROOT, tiny_llava
from tests.environment import TORCHVISION
from tests.families import TINY


def requirement(name: str) -> Requirement:
    lines = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["dependencies"]
    return next(r for line in lines if (r := Requirement(line)).name == name)


def test_the_floor_is_that_of_the_package_and_the_installed_version_is_in_its_range():
    wanted = requirement("transformers").specifier
    assert compat.FLOOR in wanted
    assert f">={compat.FLOOR}" in str(wanted)
    assert transformers.__version__ in wanted
    assert Version(torch.__version__).public in requirement("torch").specifier


def test_an_older_transformers_is_refused_at_load_in_one_line(monkeypatch, tiny_folder):
    monkeypatch.setattr(compat, "transformers_version", lambda: Version("5.17.0"))
    with pytest.raises(UserError, match=r"5\.19 or newer, and 5\.17\.0 is installed; run: pip install 'transformers>="):
        load_vlm(str(tiny_folder))


def test_a_model_type_that_a_release_cannot_run_is_refused_at_load(monkeypatch, tiny_folder):
    found = compat.transformers_version()
    monkeypatch.setitem(compat.BROKEN, ("llava", f"{found.major}.{found.minor}"), "its forward pass fails")
    with pytest.raises(UserError, match=r"cannot run .*'llava' model \(its forward pass fails\); install another"):
        load_vlm(str(tiny_folder))


def test_the_cache_goes_by_the_name_that_this_transformers_wants(recwarn):
    tiny_vlm, ids = tiny_llava(), torch.tensor([[1, 2, 3]])
    whole = tiny_vlm.model(input_ids=ids).logits[:, -1]
    first = tiny_vlm.model(input_ids=ids[:, :2], use_cache=True)
    rest = tiny_vlm.model(input_ids=ids[:, 2:], use_cache=True, **{compat.CACHE: first[compat.CACHE]})
    torch.testing.assert_close(rest.logits[:, -1], whole)
    assert not [w for w in recwarn if "deprecated" in str(w.message)]


@pytest.fixture(scope="module")
def video_folder(tmp_path_factory):
    """A Qwen2-VL as it is published: its processor has a video processor, which needs torchvision."""
    folder = tmp_path_factory.mktemp("qwen2_vl")
    vlm = TINY["qwen2_vl"]()
    vlm.model.save_pretrained(folder)
    vlm.tokenizer.save_pretrained(folder)
    vlm.processor.image_processor.save_pretrained(folder)
    (folder / "chat_template.jinja").write_text(vlm.processor.chat_template)
    image = json.loads((folder / "preprocessor_config.json").read_text())
    image["image_processor_type"] = "Qwen2VLImageProcessor"
    (folder / "preprocessor_config.json").write_text(json.dumps(image | {"processor_class": "Qwen2VLProcessor"}))
    video = {"video_processor_type": "Qwen2VLVideoProcessor", "processor_class": "Qwen2VLProcessor"}
    (folder / "video_preprocessor_config.json").write_text(json.dumps(image | video))
    return folder


def test_a_processor_that_needs_torchvision_loads_with_it_and_names_the_extra_without(video_folder):
    if TORCHVISION:
        assert type(load_vlm(str(video_folder)).processor).__name__ == "Qwen2VLProcessor"
        return
    version = Version(torch.__version__).public
    with pytest.raises(UserError) as caught:
        load_vlm(str(video_folder))
    assert str(caught.value).endswith(
        f"needs the package torchvision, which is not installed; run: pip install 'exitwise[vision]' torch=={version}"
    )


@pytest.mark.parametrize(
    ("message", "absent", "package"),
    [
        ("Qwen2VLVideoProcessor requires the Torchvision library but it was not found", "torchvision", "torchvision"),
        ("Could not load any image processor class", "torchvision", "torchvision"),
        ("Package `num2words` is required to run SmolVLM processor", "num2words", "num2words"),
        ("Package `num2words` is required to run SmolVLM processor", "torchvision", None),
        ("Qwen2VLVideoProcessor requires the Torchvision library", "", None),
        ("config.json is not there", "torchvision", None),
    ],
)
def test_which_package_an_error_of_a_processor_is_about(monkeypatch, message, absent, package):
    monkeypatch.setattr(compat.importlib.util, "find_spec", lambda name: None if name == absent else object())
    assert compat.missing_vision_package(message) == package
