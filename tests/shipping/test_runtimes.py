"""`exitwise inspect` finds the exit of a checkpoint by runtime, and warns where a runtime stops at another one."""

import importlib.util
import json
import shutil

import numpy as np
import pytest
from gguf import GGUFReader, GGUFWriter
from safetensors.torch import load_file, save_file
from transformers import AutoConfig

from exitwise import UserError, inspect_checkpoint
from exitwise.model.families import FAMILIES
from exitwise.shipping.checkpoints import FAMILY_DEFAULTS, TOWER_BLOCKS, read_encoder_config
from exitwise.shipping.runtimes import lines, llama_cpp_exit
from exitwise.shipping.slim import save, save_model
from tests.conftest import ROOT, tiny_llava
from tests.families import TINY

spec = importlib.util.spec_from_file_location("mmproj", ROOT / "recipes/llama-cpp/mmproj.py")
mmproj = importlib.util.module_from_spec(spec)
spec.loader.exec_module(mmproj)


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    """`full` (exit 3 of 4), `slim` (cut at exit 2, with its note), `dino` (cut at 2)."""
    home = tmp_path_factory.mktemp("inspect")
    vlm = tiny_llava()
    vlm.model.save_pretrained(home / "full")
    vlm.processor.save_pretrained(home / "full")
    for name, made in (("slim", vlm), ("dino", tiny_llava("dinov2"))):
        (home / name).mkdir()
        save(made, 2, home / name)
    note = {"made_by": "exitwise", "source": "full", "source_default_exit": 3, "exit": 2, "source_blocks": 4}
    (home / "slim/exitwise.json").write_text(json.dumps(note))
    return home


def copy(home, tmp_path, name, **changes):
    shutil.copytree(home / name, tmp_path / name)
    path = tmp_path / name / "config.json"
    config = json.loads(path.read_text())
    config["vision_config"] |= changes.pop("vision", {})
    path.write_text(json.dumps(config | changes))
    return tmp_path / name


def test_a_full_model(home):
    found = inspect_checkpoint(home / "full")
    assert (found.blocks_in_weights, found.blocks_in_config, found.feature_layer) == (4, 4, -2)
    assert set(found.runs_at.values()) == {3}
    assert not found.warnings


def test_a_slim_model(home):
    found = inspect_checkpoint(home / "slim")
    assert (found.blocks_in_weights, found.made_for, found.source_blocks) == (2, 2, 4)
    assert set(found.runs_at.values()) == {2}
    assert not found.warnings
    assert "transformers: exit 2/4" in lines(found)
    dino = inspect_checkpoint(home / "dino")
    assert dino.runs_at["transformers"] == 2
    assert dino.runs_at["vLLM"] is None


def test_the_feature_layer_of_the_source_left_in_place(home, tmp_path):
    """-2 on a slim model stops one block early: what a slim by hand does."""
    found = inspect_checkpoint(copy(home, tmp_path, "slim", vision_feature_layer=-2))
    assert found.runs_at["transformers"] == 1
    assert any("stops at exit 1, but the checkpoint was made for exit 2" in warning for warning in found.warnings)


def test_config_and_weights_that_differ(home, tmp_path):
    more = inspect_checkpoint(copy(home, tmp_path, "slim", vision={"num_hidden_layers": 4}))
    assert any("2 of 4 blocks have no weights (first: block 2)" in warning for warning in more.warnings)
    fewer = inspect_checkpoint(copy(home, tmp_path, "full", vision={"num_hidden_layers": 3}))
    assert any("block 3 and later are never run" in warning for warning in fewer.warnings)
    assert fewer.runs_at["transformers"] == 2


def test_the_global_encoder_of_mllama_is_no_block(tmp_path):
    """Llama 3.2 Vision has eight layers behind its 32 blocks; a slim one may have fewer blocks than that."""
    vlm = TINY["mllama"](global_layers=3)
    save_model(vlm, 2, tmp_path)
    found = inspect_checkpoint(tmp_path)
    assert (found.blocks_in_weights, found.blocks_in_config, found.runs_at["transformers"]) == (2, 2, 2)
    assert not found.warnings


def test_a_number_of_blocks_that_no_memory_holds(home, tmp_path):
    found = inspect_checkpoint(copy(home, tmp_path, "slim", vision={"num_hidden_layers": 10**12}))
    assert any(f"{10**12 - 2} of {10**12} blocks have no weights (first: block 2)" in w for w in found.warnings)


def test_several_layers_and_one_that_is_not_there(home, tmp_path):
    assert inspect_checkpoint(copy(home, tmp_path, "full", vision_feature_layer=[1, -2])).runs_at["transformers"] == 3
    (tmp_path / "x").mkdir()
    found = inspect_checkpoint(copy(home, tmp_path / "x", "full", vision_feature_layer=9))
    assert any("exit 9 does not exist" in warning for warning in found.warnings)


def test_an_mmproj_file(home, tmp_path):
    for name, exit in (("full", 3), ("slim", 2)):
        assert mmproj.convert(home / name, tmp_path / f"{name}.gguf") == exit
        found = inspect_checkpoint(tmp_path / f"{name}.gguf")
        assert (found.blocks_in_config, found.blocks_in_weights, found.feature_layer) == (exit, exit, [exit])
        assert found.runs_at["llama.cpp"] == found.made_for == exit
        assert not any("feature_layer" in warning or "stops" in warning for warning in found.warnings)
    held = {tensor.name: tensor.data for tensor in GGUFReader(tmp_path / "full.gguf").tensors}
    weights = load_file(home / "full/model.safetensors")
    assert np.array_equal(
        held["v.blk.2.ffn_up.weight"], weights["vision_tower.encoder.layers.2.mlp.fc1.weight"].numpy()
    )


def test_an_mmproj_file_without_the_list(home, tmp_path):
    """llama.cpp issue 25817: one block fewer than the model was trained with."""
    mmproj.convert(home / "full", tmp_path / "old.gguf", with_feature_layer=False)
    found = inspect_checkpoint(tmp_path / "old.gguf")
    assert (found.runs_at["llama.cpp"], found.made_for) == (2, 3)
    assert any("llama.cpp runs 2 of 3 blocks" in warning for warning in found.warnings)
    assert any("stops at exit 2, but the checkpoint was made for exit 3" in warning for warning in found.warnings)


def clip_file(path, tensors=(), **fields):
    writer = GGUFWriter(path, "clip")
    for key, value in fields.items():
        add = {str: writer.add_string, int: writer.add_uint32, bool: writer.add_bool, list: writer.add_array}
        add[type(value)](key.replace("__", "."), value)
    for name in tensors:
        writer.add_tensor(name, np.ones(4, dtype=np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def test_other_things_an_mmproj_file_may_be(tmp_path):
    blocks = [f"v.blk.{i}.ln1.weight" for i in range(3)]
    told = {"clip__vision__block_count": 3, "clip__projector_type": "mlp"}
    normed = inspect_checkpoint(clip_file(tmp_path / "a", [*blocks, "v.post_ln.weight"], **told))
    assert any("v.post_ln" in warning for warning in normed.warnings)
    cls = inspect_checkpoint(clip_file(tmp_path / "b", [*blocks, "v.class_embd"], **told))
    assert any("CLS" in warning for warning in cls.warnings)
    other = inspect_checkpoint(clip_file(tmp_path / "c", blocks, **told | {"clip__projector_type": "gemma3"}))
    assert other.runs_at["llama.cpp"] == 3
    assert not other.warnings
    beyond = inspect_checkpoint(clip_file(tmp_path / "d", blocks, **told, clip__vision__feature_layer=[4]))
    assert beyond.runs_at["llama.cpp"] is None
    assert any("refuses" in warning for warning in beyond.warnings)
    holes = inspect_checkpoint(clip_file(tmp_path / "e", blocks[:2], **told, clip__vision__feature_layer=[3]))
    assert any("block 2" in warning and "cannot load" in warning for warning in holes.warnings)
    with pytest.raises(UserError, match="expected a list of layers"):
        inspect_checkpoint(clip_file(tmp_path / "h", blocks, **told, clip__vision__feature_layer=2))
    with pytest.raises(UserError, match="lacks clip"):
        inspect_checkpoint(clip_file(tmp_path / "f", blocks))
    with pytest.raises(UserError, match="no image encoder"):
        inspect_checkpoint(clip_file(tmp_path / "g", **told, clip__has_vision_encoder=False))


@pytest.mark.parametrize(
    ("projector", "layers", "exit"),
    [
        ("mlp", (), 22),
        ("mlp", (23,), 23),
        ("ldpv2", (), 22),
        ("mlp", (5, 18), 18),
        ("adapter", (), 23),
        ("gemma3", (), 23),
    ],
)
def test_the_rule_of_llama_cpp(projector, layers, exit):
    assert llama_cpp_exit(projector, 23, layers) == exit


def test_a_gguf_file_that_was_cut(home, tmp_path):
    whole = tmp_path / "whole.gguf"
    mmproj.convert(home / "slim", whole)
    data = whole.read_bytes()
    assert inspect_checkpoint(whole).runs_at
    for size in (3, 4, 8, 20, 100, 600, len(data) // 2, len(data) - 40):
        (tmp_path / "cut.gguf").write_bytes(data[:size])
        with pytest.raises(UserError, match=r"not a whole GGUF file|no GGUF file"):
            inspect_checkpoint(tmp_path / "cut.gguf")


def test_what_is_neither(home, tmp_path):
    (tmp_path / "notes.txt").write_text("hello")
    (tmp_path / "empty").mkdir()
    writer = GGUFWriter(tmp_path / "text.gguf", "llama")
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.close()
    for name, said in (
        ("notes.txt", "no GGUF file"),
        ("empty", "no config.json; expected"),
        ("nowhere", "does not exist"),
        ("text.gguf", "'llama' model without an image encoder"),
        (".", "give one of its GGUF files: text.gguf"),
    ):
        with pytest.raises(UserError, match=said):
            inspect_checkpoint(tmp_path / name)
    (tmp_path / "empty/config.json").write_text('{"model_type": "llama"}')
    with pytest.raises(UserError, match="'llama' model without an image encoder"):
        inspect_checkpoint(tmp_path / "empty")
    (tmp_path / "empty/config.json").write_text("{")
    with pytest.raises(UserError, match=r"cannot read config\.json"):
        inspect_checkpoint(tmp_path / "empty")


@pytest.mark.parametrize("family", FAMILY_DEFAULTS)
def test_a_silent_config_means_what_transformers_makes_of_it(family, tmp_path):
    """Every family and tower, with and without the number of blocks."""
    exchangeable = TOWER_BLOCKS if FAMILY_DEFAULTS[family].tower in TOWER_BLOCKS else ()
    for vision in (None, {}, {"num_hidden_layers": 5}, *({"model_type": tower} for tower in exchangeable)):
        given = {"model_type": family} | ({} if vision is None else {"vision_config": vision})
        (tmp_path / "config.json").write_text(json.dumps(given))
        config = AutoConfig.from_pretrained(tmp_path)
        if config.vision_config is None:
            with pytest.raises(UserError, match="without an image encoder"):
                read_encoder_config(tmp_path)
            continue
        found = read_encoder_config(tmp_path)
        blocks = getattr(config.vision_config, "depth", None) or config.vision_config.num_hidden_layers
        assert found.n_blocks == blocks, vision
        assert found.feature_layer == getattr(config, "vision_feature_layer", None)
        assert vision or found.tower == config.vision_config.model_type


def test_the_defaults_cover_every_family():
    assert set(FAMILY_DEFAULTS) == set(FAMILIES) - {"pixtral"}  # a llava with another tower


def test_other_values_than_numbers(home, tmp_path):
    with pytest.raises(UserError, match=r"number of blocks is 'four'"):
        inspect_checkpoint(copy(home, tmp_path, "full", vision={"num_hidden_layers": "four"}))
    with pytest.raises(UserError, match=r"vision_feature_layer is 'last'"):
        inspect_checkpoint(copy(home, tmp_path, "slim", vision_feature_layer="last"))


def test_code_beside_the_config_is_not_run(tmp_path):
    (tmp_path / "config.json").write_text('{"model_type": "mine", "auto_map": {"AutoConfig": "mine.Mine"}}')
    (tmp_path / "mine.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')")
    with pytest.raises(UserError, match="'mine' model without an image encoder"):
        inspect_checkpoint(tmp_path)
    assert not (tmp_path / "ran").exists()


def test_weights_that_are_not_whole(home, tmp_path):
    folder = copy(home, tmp_path, "full")
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:500])
    with pytest.raises(UserError, match="not a whole safetensors file"):
        inspect_checkpoint(folder)
    path.unlink()
    with pytest.raises(UserError, match=r"no .safetensors file"):
        inspect_checkpoint(folder)


def test_a_file_that_the_index_names_is_missing(home, tmp_path):
    folder = copy(home, tmp_path, "full")
    tensors = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    save_file(tensors, folder / "model-1.safetensors")
    index = {"weight_map": dict.fromkeys(tensors, "model-1.safetensors") | {"x": "model-2.safetensors"}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(UserError, match=r"lacks model-2.safetensors"):
        inspect_checkpoint(folder)


def test_the_command(home, capsys):
    from exitwise.cli.main import entry

    entry(["inspect", str(home / "slim")])
    assert "made for: exit 2/4" in capsys.readouterr().out
