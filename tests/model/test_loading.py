"""Families from disk, as users have them: folders, adapters, few bits, and what is missing."""

import functools
import json

import pytest
import torch

from exitwise import AuditConfig, UserError, audit, load_vlm
from exitwise.model.families import FAMILIES
from exitwise.model.loading import loading_errors, quantisation
from exitwise.report.paper import tables
from tests.families import TINY

FAMILY_FOLDERS = ("llava_next", "mllama", "gemma3", "idefics3", "paligemma")  # others' processors need torchvision


@functools.cache
def tiny(name):
    return TINY[name]()


@pytest.fixture(scope="module")
def folder_of(tmp_path_factory):
    @functools.cache
    def save(name):
        folder = tmp_path_factory.mktemp(name)
        tiny(name).model.save_pretrained(folder)
        tiny(name).processor.save_pretrained(folder)
        return folder

    return save


@pytest.mark.parametrize("name", FAMILY_FOLDERS)
def test_a_saved_checkpoint_answers_as_before(name, folder_of, pictures):
    before, after = tiny(name), load_vlm(folder_of(name))
    assert (after.n_blocks, after.default_exit) == (before.n_blocks, before.default_exit)
    logits = []
    for vlm in (before, after):
        text = vlm.chat("What is this?")
        inputs = vlm.processor(images=[pictures["coffee"]], text=[text], return_tensors="pt", add_special_tokens=False)
        inputs.pop("labels", None)
        with torch.inference_mode():
            logits.append(vlm.model(**inputs).logits)
    torch.testing.assert_close(*logits, rtol=0, atol=1e-5)


@pytest.mark.parametrize(("name", "exits"), [("llava_next", "default,1,1+3"), ("mllama", "default,1")])
def test_an_audit_of_another_family_resumes_with_the_same_bytes(name, exits, folder_of, tmp_path):
    config = AuditConfig.of(str(folder_of(name)), exits=exits, limit=2, vqa=2, max_new_tokens=4, batch_size=3)
    audit(config, out=tmp_path / "a")
    page = (tmp_path / "a/report.html").read_text()
    whole = (tmp_path / "a/completions.jsonl").read_bytes()
    assert len(whole.splitlines()) == 6 * len(exits.split(","))
    if "+" in exits:
        written = json.loads((tmp_path / "a/metrics.json").read_text())["exits"]
        assert {row["exit"] for row in written} == {1, 3, "1+3"}
        assert ">1+3<" in page
        said = page + tables(tmp_path / "a", None, what="all", format="md", with_answers=True)
        assert "1001003" not in said  # the number of 0.1.0
    (tmp_path / "b").mkdir()
    for part in ("config.json", "plan.json", "samples.jsonl"):
        (tmp_path / "b" / part).write_bytes((tmp_path / "a" / part).read_bytes())
    (tmp_path / "b/completions.jsonl").write_bytes(whole[: len(whole) // 2])
    audit(config, out=tmp_path / "b")
    assert (tmp_path / "b/completions.jsonl").read_bytes() == whole


def test_layers_that_cannot_be_fused_are_refused_before_the_run_begins(folder_of, tmp_path):
    config = AuditConfig.of(str(folder_of("mllama")), exits="1+3", limit=1, vqa=0, max_new_tokens=2)
    with pytest.raises(UserError, match="joins several layers itself"):
        audit(config, out=tmp_path / "run")
    assert not (tmp_path / "run/plan.json").exists()  # so the command may be corrected


def test_an_adapter_goes_on_top_of_another_family(folder_of, tmp_path):
    from peft import LoraConfig, get_peft_model

    config = LoraConfig(r=2, target_modules=FAMILIES["mllama"].lora_targets, init_lora_weights=False)
    get_peft_model(TINY["mllama"]().model, config).save_pretrained(tmp_path / "adapter")
    plain, adapted = (load_vlm(folder_of("mllama"), adapter=a).model.state_dict() for a in (None, tmp_path / "adapter"))
    changed = {name for name in plain if not torch.equal(plain[name], adapted[name])}
    assert any("cross_attn" in name for name in changed)
    assert all(name.startswith("model.language_model.") for name in changed)
    with pytest.raises(UserError, match="does not fit this model"):
        load_vlm(folder_of("llava_next"), adapter=tmp_path / "adapter")


def test_a_model_is_spread(folder_of):
    assert load_vlm(folder_of("llava_next"), device="spread").shares_prefix  # one device here: nothing to mind


def test_a_model_that_does_not_fit_is_refused(folder_of, tmp_path, monkeypatch):
    parts = ("model.vision_tower", "model.multi_modal_projector", "model.image_newline", "lm_head")
    spread = dict.fromkeys(parts, "cpu") | {"model.language_model": "disk"}
    monkeypatch.setattr(
        "exitwise.model.loading.placement", lambda _: {"device_map": spread, "offload_folder": tmp_path}
    )
    with pytest.raises(UserError, match="does not fit the GPUs"):
        load_vlm(folder_of("llava_next"), device="spread")


def test_no_image_processor(folder_of, tmp_path):
    import shutil

    shutil.copytree(folder_of("llava_next"), tmp_path / "m")
    for name in ("processor_config.json", "preprocessor_config.json"):
        (tmp_path / "m" / name).unlink(missing_ok=True)
    with pytest.raises(UserError, match="processor"):
        load_vlm(tmp_path / "m")


def test_few_bits_need_a_package(monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"bitsandbytes.*pip install 'exitwise\[quantise\]'"):
        quantisation("int4", "cpu", FAMILIES["llava"])
    assert quantisation("bfloat16", "cpu", FAMILIES["llava"]) == {}


def test_a_config_that_transformers_refuses(folder_of, tmp_path):
    import shutil

    shutil.copytree(folder_of("llava_next"), tmp_path / "m")
    path = tmp_path / "m/config.json"
    config = json.loads(path.read_text())
    config["vision_config"]["num_hidden_layers"] = "four"
    path.write_text(json.dumps(config))
    with pytest.raises(UserError, match=r"cannot load .*num_hidden_layers.*four") as error:
        load_vlm(tmp_path / "m")
    assert "\n" not in str(error.value)


def test_a_gated_model_says_what_to_do():
    wanted = r"accept its licence at https://huggingface\.co/meta/x, then set HF_TOKEN"
    with pytest.raises(UserError, match=wanted), loading_errors("meta/x"):
        raise OSError("You are trying to access a gated repo.\nMake sure to have access to it")


def test_layers_that_are_not_there():
    with pytest.raises(UserError, match=r"vision_feature_layer = \[1, 9\], but its encoder has 4 blocks"):
        TINY["llava"](feature_layer=[1, 9])
