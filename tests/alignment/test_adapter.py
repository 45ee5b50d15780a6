"""The function `align` and the `Adapter` it returns: options as keywords, a loaded model, metrics as a DataFrame."""

import copy
import json

import pytest
import torch
from transformers import LlavaForConditionalGeneration

from exitwise import Adapter, UserError, align, load_vlm
from exitwise.cli.main import entry
from tests.align_setup import CHEAP, config_of
from tests.alignment.runs import assert_same_bytes, code_of, one_line, rows_of
from tests.conftest import tiny_llava

pytestmark = pytest.mark.usefixtures("few_questions")


@pytest.fixture
def options(material):
    """Those of `config_of`, as a user writes them."""
    files = {"prompts": material / "harmful.txt", "benign": str(material / "benign.txt"), "images": material / "images"}
    return CHEAP | files | {"exits": 1, "method": "sft", "mix": [0.5, 0.5, 0], "features": material / "features"}


def test_keywords_make_the_run_of_the_command_line(tiny_folder, material, tmp_path, options):
    tuned = align(tiny_folder, out=tmp_path / "keywords", **options)
    config = config_of(tiny_folder, material, method="sft", mix=(0.5, 0.5, 0.0))
    words = align(config_of(tiny_folder, material, method="sft"), mix=(0.5, 0.5, 0.0), out=tmp_path / "config")
    assert_same_bytes(tuned.path, words.path)
    assert tuned.config == words.config == config


def test_a_loaded_model_is_used_as_it_is_and_left_so(tiny_folder, tmp_path, options, monkeypatch):
    vlm = load_vlm(tiny_folder, device="cpu")
    state = copy.deepcopy(vlm.model.state_dict())
    by_name = align(tiny_folder, out=tmp_path / "name", **options)
    monkeypatch.setattr("exitwise.alignment.setup.load_vlm", lambda *_, **__: pytest.fail("it is loaded already"))
    options.pop("device")
    tuned = align(vlm, out=tmp_path / "vlm", **options)
    weights = [(run.folder / "adapter_model.safetensors").read_bytes() for run in (tuned, by_name)]
    assert weights[0] == weights[1]
    assert vlm.model.state_dict().keys() == state.keys()
    assert all(torch.equal(value, state[name]) for name, value in vlm.model.state_dict().items())
    assert len(vlm.blocks) == 4
    with pytest.raises(UserError, match="align got a loaded model and device; give that to load_vlm"):
        align(vlm, out=tmp_path / "other", device="cpu")


def test_an_unknown_option_names_the_nearest_one(tmp_path):
    with pytest.raises(UserError, match="no option 'lora_rnk'; did you mean 'lora_rank'"):
        align("testbed", lora_rnk=4, out=tmp_path)
    with pytest.raises(UserError, match="steps got 'two'; expected a whole number"):
        align("testbed", steps="two", out=tmp_path)


def test_the_history_is_metrics_jsonl(whole):
    adapter = Adapter.open(whole[0])
    frame, rows = adapter.history(), rows_of(whole[0])
    assert frame.index.tolist() == [row["step"] for row in rows] == [1, 2, 3, 4]
    assert frame.index.name == "step"
    for row in rows:
        for key, value in row.items():
            if key == "signatures":
                assert list(frame.loc[row["step"], key]) == value
            elif key != "step":
                assert frame.loc[row["step"], key] == pytest.approx(
                    float("nan") if value is None else value, nan_ok=True
                )
    assert frame["eval/asr@3"].isna().tolist() == [True, True, False, True]
    assert set(frame.drop(columns="signatures").dtypes) == {torch.zeros((), dtype=torch.float64).numpy().dtype}


def test_what_an_adapter_says_of_itself(whole, tiny_folder, tmp_path):
    adapter = Adapter.open(str(whole[0]))
    assert adapter == Adapter(whole[0])
    assert repr(adapter) == f"Adapter({str(whole[0])!r}: {tiny_folder}, l-ppo at exits 0,1,3, 4 steps)"
    assert adapter.config.cliprange_high == 0.3
    with pytest.raises(UserError, match="not the run directory of an alignment"):
        Adapter.open(tmp_path)
    (tmp_path / "metrics.jsonl").touch()
    with pytest.raises(UserError, match="has no finished adapter"):
        Adapter.open(tmp_path)


def test_an_adapter_is_given_where_its_path_is(whole, tiny_folder):
    by_path, by_object = (load_vlm(tiny_folder, device="cpu", adapter=a) for a in (whole[0], Adapter(whole[0])))
    pairs = zip(by_path.model.parameters(), by_object.model.parameters(), strict=True)
    assert all(torch.equal(a, b) for a, b in pairs)


def test_audit_takes_the_run_as_an_adapter(whole, tiny_folder, tmp_path, capsys):
    words = ["audit", str(tiny_folder), "--exits", "1,3", "--limit", "2", "--vqa", "0", "--no-over-refusal",
             "--max-new-tokens", "6"]  # fmt: skip
    entry([*words, "--out", str(tmp_path / "before")])
    entry([*words, "--adapter", str(whole[0]), "--out", str(tmp_path / "after")])
    config = json.loads((tmp_path / "after/config.json").read_text())
    assert config["adapter_info"]["exits"] == [0, 1, 3]
    assert config["adapter_info"]["method"] == "l-ppo"
    said = [(tmp_path / name / "completions.jsonl").read_text() for name in ("before", "after")]
    assert said[0] != said[1]  # it is really used


def test_an_adapter_of_another_base_is_one_line(whole, tiny_folder, tmp_path, capsys):
    config = copy.deepcopy(tiny_llava().model.config)
    config.text_config.hidden_size = 48
    vlm = tiny_llava()
    LlavaForConditionalGeneration(config).save_pretrained(tmp_path / "wider")
    vlm.processor.save_pretrained(tmp_path / "wider")
    assert code_of(["audit", str(tmp_path / "wider"), "--adapter", str(whole[0]), "--out", str(tmp_path / "x")]) == 2
    assert one_line(capsys).startswith(f"exitwise: the adapter {whole[0] / 'adapter'} does not fit this model")
