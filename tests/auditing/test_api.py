"""`audit` as a function: keywords, loaded models, adapters by path."""

import json

import pytest

from exitwise import AuditConfig, Run, UserError, audit
from exitwise.model.vlm import describe
from tests.conftest import tiny_llava

SMALL = {"exits": "1", "limit": 1, "vqa": 0, "max_new_tokens": 2, "batch_size": 4, "costs": False}


@pytest.fixture
def no_loading(monkeypatch):
    monkeypatch.setattr("exitwise.model.loading.load_vlm", lambda *a, **k: pytest.fail("loaded the model"))


def test_an_audit_by_keywords_gives_a_run(tiny_folder, tmp_path):
    run = audit(tiny_folder, out=str(tmp_path / "run"), **SMALL)
    assert isinstance(run, Run)
    assert (run.path, run.config.model) == (tmp_path / "run", str(tiny_folder))
    assert len(run.completions) == 2
    assert run.metrics.judge == "refusal"
    assert (tmp_path / "run/report.html").exists()


def test_a_loaded_model_is_not_loaded_again_and_makes_the_same_run(tiny_folder, tmp_path, monkeypatch):
    audit(tiny_folder, out=tmp_path / "by-name", **SMALL)
    loaded = tiny_llava()
    vlm = describe(str(tiny_folder), loaded.model, loaded.processor)
    monkeypatch.setattr("exitwise.model.loading.load_vlm", lambda *a, **k: pytest.fail("loaded the model"))
    audit(vlm, out=tmp_path / "loaded", **SMALL)
    for name in ("config.json", "plan.json", "completions.jsonl", "metrics.json"):
        assert (tmp_path / "loaded" / name).read_bytes() == (tmp_path / "by-name" / name).read_bytes(), name


def test_a_run_goes_to_the_folder_of_the_models_name(tiny_folder, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert audit(tiny_folder, **SMALL).path.as_posix() == f"runs/{tiny_folder.name}"


@pytest.mark.usefixtures("no_loading")
@pytest.mark.parametrize("option", ["adapter", "dtype", "device"])
def test_options_of_loading_do_not_go_with_a_loaded_model(option, tmp_path):
    with pytest.raises(UserError, match=f"a loaded model and {option}; give that to load_vlm"):
        audit(tiny_llava(), out=tmp_path / "run", **{option: "x"})


@pytest.mark.usefixtures("no_loading")
def test_a_config_takes_no_options_beside_it(tmp_path):
    with pytest.raises(UserError, match="an AuditConfig and options"):
        audit(AuditConfig("testbed"), out=tmp_path / "run", limit=2)
    with pytest.raises(UserError, match="no option 'limt'; did you mean 'limit'"):
        audit("testbed", out=tmp_path / "run", limt=2)
    with pytest.raises(UserError, match="no option 'judge_modl'; did you mean 'judge_model'"):
        audit("testbed", out=tmp_path / "run", judge_modl="x")


def test_an_adapter_is_recorded_whoever_loaded_it(tiny_folder, tmp_path):
    """By path, by an object with a path (such as an Adapter), or with the model that has it."""
    from peft import LoraConfig, get_peft_model

    from exitwise import load_vlm

    adapter = tmp_path / "adapter"
    targets = r".*language_model.*\.(q_proj|v_proj)"
    get_peft_model(tiny_llava().model, LoraConfig(r=2, target_modules=targets)).save_pretrained(str(adapter))
    audit(tiny_folder, adapter=adapter, out=tmp_path / "by-path", **SMALL)
    audit(load_vlm(tiny_folder, adapter=adapter), out=tmp_path / "loaded", **SMALL)
    written = [(tmp_path / name / "config.json").read_bytes() for name in ("by-path", "loaded")]
    assert json.loads(written[0])["adapter"] == str(adapter)
    assert written[0] == written[1]
