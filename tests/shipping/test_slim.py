"""A slim checkpoint is the full model at its exit, for transformers alone; what goes wrong leaves nothing behind."""

import json
import resource
import shutil
import subprocess
import sys
from itertools import pairwise

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file

from exitwise import SlimConfig, UserError, describe, exit_at, load_vlm, slim
from exitwise.run.exit import Exit
from exitwise.run.provenance import fingerprint
from exitwise.shipping.slim import _published_names, save, savings
from tests.conftest import tiny_llava
from tests.families import TINY
from tests.model.test_vlm import adapter

QUESTION = "What is this?"
STOCK = """
import json, sys
sys.modules["exitwise"] = None  # whoever imports it now fails
import torch
from PIL import Image
from safetensors.torch import save_file
from transformers import AutoModelForImageTextToText, AutoProcessor
torch.set_num_threads(1)
out = {}
for folder in sys.argv[2:]:
    processor = AutoProcessor.from_pretrained(folder)
    assert processor.tokenizer.padding_side == "left", folder
    model, info = AutoModelForImageTextToText.from_pretrained(folder, output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"] and not info["mismatched_keys"], info
    turn = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "QUESTION"}]}]
    text = processor.apply_chat_template(turn, add_generation_prompt=True)
    inputs = processor(images=Image.open(sys.argv[1]), text=text, return_tensors="pt")
    with torch.inference_mode():
        out[folder + ":logits"] = model(**inputs).logits[0].float().contiguous()
        out[folder + ":tokens"] = model.generate(**inputs, max_new_tokens=12, do_sample=False)[0].contiguous()
save_file(out, sys.argv[1] + ".safetensors")
""".replace("QUESTION", QUESTION)


@pytest.fixture(scope="module")
def full(tmp_path_factory):
    """A folder per tower: a full model with four blocks."""
    home = tmp_path_factory.mktemp("full")
    for tower in ("clip", "dinov2"):
        vlm = tiny_llava(tower)
        vlm.model.save_pretrained(home / tower)
        vlm.processor.save_pretrained(home / tower)
    return home


def test_stock_transformers_gives_the_exit_at_every_exit(tmp_path, pictures):
    """In a process that cannot import exitwise; the reference is `exit_at`, and transformers' own feature layer."""
    picture = tmp_path / "picture.png"
    pictures["coffee"].save(picture)
    folders = {(tower, exit): tmp_path / f"{tower}-{exit}" for tower in ("clip", "dinov2") for exit in range(1, 5)}
    for (tower, exit), folder in folders.items():
        folder.mkdir()
        save(tiny_llava(tower), exit, folder)
    command = [sys.executable, "-I", "-c", STOCK, str(picture), *map(str, folders.values())]
    subprocess.run(command, check=True, capture_output=True, text=True)
    found = load_file(f"{picture}.safetensors")
    for tower in ("clip", "dinov2"):
        vlm = tiny_llava(tower)
        inputs = vlm.processor(images=pictures["coffee"], text=vlm.chat(QUESTION), return_tensors="pt")
        seen = []
        for exit in range(1, 5):
            logits, tokens = (found[f"{folders[tower, exit]}:{what}"] for what in ("logits", "tokens"))
            with torch.inference_mode(), exit_at(vlm, exit):
                torch.testing.assert_close(logits, vlm.model(**inputs).logits[0], rtol=0, atol=1e-5)
                assert tokens.tolist() == vlm.model.generate(**inputs, max_new_tokens=12, do_sample=False)[0].tolist()
            with torch.inference_mode():
                native = vlm.model(**inputs, vision_feature_layer=exit).logits[0]
            torch.testing.assert_close(logits, native, rtol=0, atol=1e-5)
            seen.append(logits)
        assert all((a - b).abs().max() > 1e-3 for a, b in pairwise(seen))


def test_what_is_written(full, tmp_path):
    folder = slim(SlimConfig(str(full / "clip"), 2, check=True), tmp_path / "new" / "slim")
    config = json.loads((folder / "config.json").read_text())
    assert (config["vision_config"]["num_hidden_layers"], config["vision_feature_layer"]) == (2, -1)
    with safe_open(folder / "model.safetensors", "pt") as weights:
        names = set(weights.keys())
    assert "vision_tower.vision_model.encoder.layers.1.mlp.fc1.weight" in names  # as vLLM and published ones have it
    assert not any("encoder.layers.2" in name for name in names)
    note = json.loads((folder / "exitwise.json").read_text())
    assert (note["exit"], note["source_blocks"], note["source_default_exit"]) == (2, 4, 3)
    assert note["source_sha256"] == fingerprint(load_vlm(full / "clip"))
    assert note["check"]["largest_difference"] < 1e-5
    text = (folder / "README.md").read_text()
    for part in ("exit 2 of 4", "Content warning", "No audit was given", "2 of 4 (blocks 2 and later", "greedy tokens"):
        assert part in text
    again = load_vlm(folder)
    assert (again.n_blocks, again.default_exit) == (2, 2)
    assert sorted(p.name for p in folder.parent.iterdir()) == ["slim"]
    assert (folder.stat().st_mode & 0o777) == 0o755


def test_keywords_paths_and_a_loaded_model(full, tmp_path):
    """The same files each way; a model in memory is cast and merged as a copy."""
    path, folder = adapter(full, tmp_path), full / "clip"
    wanted = load_file(slim(SlimConfig(str(folder), 2, str(path)), tmp_path / "config") / "model.safetensors")
    slim(folder, exit=Exit([2]), adapter=path, out=tmp_path / "keywords", check=True)
    vlm = load_vlm(folder)
    before = {name: tensor.clone() for name, tensor in vlm.model.state_dict().items()}
    slim(vlm, exit=2, adapter=path, out=str(tmp_path / "loaded"), check=True)
    slim(vlm, exit=2, dtype="bfloat16", out=tmp_path / "small", check=True)
    assert all(torch.equal(tensor, before[name]) for name, tensor in vlm.model.state_dict().items())
    for way in ("keywords", "loaded"):
        found = load_file(tmp_path / way / "model.safetensors")
        assert found.keys() == wanted.keys()
        assert all(torch.equal(tensor, wanted[name]) for name, tensor in found.items())
    notes = [json.loads((tmp_path / way / "exitwise.json").read_text()) for way in ("config", "keywords", "loaded")]
    assert {note["adapter"] for note in notes} == {str(path)}
    assert len({note["source_sha256"] for note in notes}) == 1
    for options, message in (
        ({}, "exit is missing"),
        ({"exit": Exit([1, 2])}, r"exit got 1\+2"),
        ({"exit": 2, "adaptor": path}, "did you mean 'adapter'"),
    ):
        with pytest.raises(UserError, match=message):
            slim(folder, out=tmp_path / "wrong", **options)


def test_the_figures_of_the_cut_are_those_of_the_files(full, tmp_path):
    def weights(folder):
        tensors = load_file(folder / "model.safetensors").values()
        return sum(t.numel() for t in tensors), sum(t.numel() * t.element_size() for t in tensors)

    folder = slim(SlimConfig(str(full / "dinov2"), 1), tmp_path / "slim")
    saves = json.loads((folder / "exitwise.json").read_text())["saves"]
    before, after = weights(full / "dinov2"), weights(folder)
    assert (saves["parameters"], saves["bytes"]) == (before[0] - after[0], before[1] - after[1])
    assert saves["whole_parameters"] == before[0]
    assert 0 < saves["flops"] < saves["encoder_flops"] < saves["whole_flops"]
    one = savings(tiny_llava("dinov2"), 3)
    assert [saves[key] for key in ("parameters", "bytes", "flops")] == [
        3 * getattr(one, key) for key in ("parameters", "bytes", "flops")
    ]


def test_the_model_in_memory_is_as_before(tiny, tmp_path):
    generation, before = tiny.model.generation_config, tiny.model.config.to_dict()
    save(tiny, 1, tmp_path)
    assert tiny.model.config.to_dict() == before
    assert tiny.model.generation_config is generation
    assert describe("whole", tiny.model, tiny.processor).blocks is tiny.blocks
    assert len(tiny.blocks) == 4


def test_a_connector_of_several_layers(tmp_path):
    """Layers 1 and 3 of 4: behind the deepest, cutting takes away what does not count, and the exit is no other."""
    vlm = TINY["llava"](feature_layer=[1, -2])
    vlm.model.save_pretrained(tmp_path / "full")
    vlm.processor.save_pretrained(tmp_path / "full")
    for exit, layers in ((3, [1, 3]), (2, [1, 2])):
        folder = slim(SlimConfig(str(tmp_path / "full"), exit, check=True), tmp_path / str(exit))
        assert json.loads((folder / "config.json").read_text())["vision_feature_layer"] == layers
    with pytest.raises(UserError, match=r"exit 4 of .* equals its default exit.* give --exit 3 or less"):
        slim(SlimConfig(str(tmp_path / "full"), 4, check=True), tmp_path / "4")


def test_an_adapter_is_merged_and_checked(full, tmp_path):
    path = adapter(full, tmp_path)
    plain = slim(SlimConfig(str(full / "clip"), 2), tmp_path / "plain")
    folder = slim(SlimConfig(str(full / "clip"), 2, adapter=str(path), check=True), tmp_path / "slim")
    assert not (folder / "adapter_config.json").exists()
    name = "language_model.model.layers.0.self_attn.q_proj.weight"
    before, after = (load_file(f / "model.safetensors") for f in (plain, folder))
    assert before.keys() == after.keys()
    assert not torch.equal(before[name], after[name])
    assert "An adapter is merged" in (folder / "README.md").read_text()


def test_another_dtype(full, tmp_path):
    folder = slim(SlimConfig(str(full / "clip"), 2, dtype="bfloat16", check=True), tmp_path / "slim")
    assert {t.dtype for t in load_file(folder / "model.safetensors").values()} == {torch.bfloat16}
    assert json.loads((folder / "config.json").read_text())["dtype"] == "bfloat16"
    again = slim(SlimConfig(str(folder), 1, check=True), tmp_path / "again")  # auto: as the source is saved
    assert {t.dtype for t in load_file(again / "model.safetensors").values()} == {torch.bfloat16}


def test_a_generation_config_that_transformers_will_not_save(full, tmp_path):
    shutil.copytree(full / "clip", tmp_path / "m")
    path = tmp_path / "m/generation_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"temperature": 0.9, "top_p": 0.6}))
    folder = slim(SlimConfig(str(tmp_path / "m"), 2, check=True), tmp_path / "slim")
    kept = json.loads((folder / "generation_config.json").read_text())
    assert (kept["temperature"], kept["top_p"], kept["eos_token_id"]) == (0.9, 0.6, 2)


def test_names_in_several_files(full, tmp_path):
    vlm = tiny_llava()
    vlm.model.save_pretrained(tmp_path, max_shard_size="40KB")
    vlm.processor.save_pretrained(tmp_path)
    assert len(list(tmp_path.glob("*.safetensors"))) > 1
    _published_names(tmp_path)
    index = json.loads((tmp_path / "model.safetensors.index.json").read_text())["weight_map"]
    for name, file in index.items():
        with safe_open(tmp_path / file, "pt") as weights:
            assert name in weights.keys()  # noqa: SIM118 (no mapping)
    assert any(name.startswith("vision_tower.vision_model.") for name in index)
    again = load_vlm(tmp_path)
    for (name, a), b in zip(vlm.model.state_dict().items(), again.model.state_dict().values(), strict=True):
        assert torch.equal(a, b), name


@pytest.mark.parametrize(
    ("exit", "said"), [(0, "exit 0 .* cannot be cut"), (25, "cut at exits 1 to 4"), (-1, "--exit got -1")]
)
def test_an_exit_that_is_not_there(full, tmp_path, exit, said):
    with pytest.raises(UserError, match=said):
        slim(SlimConfig(str(full / "clip"), exit), tmp_path / "slim")
    assert not list(tmp_path.iterdir())


def test_a_folder_that_is_taken(full, tmp_path):
    (tmp_path / "taken").mkdir()
    (tmp_path / "taken/mine.txt").write_text("mine")
    (tmp_path / "file").write_text("mine")
    (tmp_path / "empty").mkdir()
    for name, said in (("taken", "not empty"), ("file", "is a file"), ("file/below", "cannot write")):
        with pytest.raises(UserError, match=said):
            slim(SlimConfig(str(full / "clip"), 2), tmp_path / name)
    assert (tmp_path / "taken/mine.txt").read_text() == (tmp_path / "file").read_text() == "mine"
    assert (slim(SlimConfig(str(full / "clip"), 2), tmp_path / "empty") / "config.json").exists()


@pytest.mark.parametrize("limit", [0, 3_000, 60_000])
def test_no_room_in_the_middle_leaves_nothing(full, tmp_path, limit):
    """No file may grow beyond `limit` bytes: the real error of the real writers."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, hard))
    try:
        with pytest.raises(UserError, match=r"cannot write .* nothing is kept"):
            slim(SlimConfig(str(full / "clip"), 2), tmp_path / "slim")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert not list(tmp_path.iterdir())


def test_an_adapter_for_another_base(full, tmp_path):
    from safetensors.torch import save_file

    path = adapter(full, tmp_path) / "adapter_model.safetensors"
    save_file({k: torch.zeros(5, 7) for k in load_file(path)}, path)
    with pytest.raises(UserError, match="does not fit"):
        slim(SlimConfig(str(full / "clip"), 2, adapter=str(path.parent)), tmp_path / "slim")
    assert not (tmp_path / "slim").exists()


def test_the_figures_of_an_audit(full, tmp_path):
    from exitwise.auditing.audit import audit

    audit(str(full / "clip"), exits="2,default", limit=2, vqa=4, max_new_tokens=4, out=tmp_path / "run")
    folder = slim(SlimConfig(str(full / "clip"), 2, audit=tmp_path / "run"), tmp_path / "slim")
    text = (folder / "README.md").read_text()
    figures = json.loads((tmp_path / "run/metrics.json").read_text())["exits"]
    for row in figures:
        asr = row["asr"]
        assert f"{100 * asr['value']:.0f} % ({100 * asr['low']:.0f}-{100 * asr['high']:.0f}), n = {asr['n']}" in text
    assert "2 (this model)" in text
    assert "3 (default of the source)" in text
    assert "No audit was given" not in text
    with pytest.raises(UserError, match="no figures at exit 1"):
        slim(SlimConfig(str(full / "clip"), 1, audit=tmp_path / "run"), tmp_path / "other")
    with pytest.raises(UserError, match="other weights"):
        slim(SlimConfig(str(full / "dinov2"), 2, audit=tmp_path / "run"), tmp_path / "other")
    with pytest.raises(UserError, match="not a run directory"):
        slim(SlimConfig(str(full / "clip"), 2, audit=tmp_path / "nowhere"), tmp_path / "other")


def test_a_hostile_name_stays_in_its_cell(full, tmp_path):
    evil = tmp_path / "a|b ![x](http:evil) <img src=x>"
    shutil.copytree(full / "clip", evil)
    text = (slim(SlimConfig(str(evil), 2), tmp_path / "slim") / "README.md").read_text()
    assert "![x]" not in text
    assert " <img" not in text
    assert not text.startswith("---\nbase_model")


def test_the_command(full, tmp_path, capsys):
    from exitwise.cli.main import entry

    entry(["slim", str(full / "clip"), "--exit", "3", "-o", str(tmp_path / "slim")])
    assert "1 blocks cut" in capsys.readouterr().out
    with pytest.raises(SystemExit) as stop:
        entry(["slim", str(full / "clip"), "--exit", "25", "-o", str(tmp_path / "other")])
    assert stop.value.code == 2
    assert "exit 25 does not exist" in capsys.readouterr().err


@pytest.mark.testbed
@pytest.mark.slow
def test_the_testbed(tmp_path):
    folder = slim(SlimConfig("testbed", 8, check=True), tmp_path / "slim")
    note = json.loads((folder / "exitwise.json").read_text())
    assert (note["source_blocks"], note["saves"]["blocks_cut"]) == (12, 4)
    assert "model organism" in (folder / "README.md").read_text()
