"""The public sets: the real files where they are, and small ones in the layout that the authors publish."""

import json
import re
from collections import Counter

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from exitwise.data.catalogue import BENCHMARKS
from exitwise.data.prompts import pair_images
from exitwise.data.sets import count_reasons, load_benchmark
from exitwise.errors import UserError
from exitwise.run.records import Sample
from tests.conftest import ROOT
from tests.data.files import colour_of, packed, picture, png, table


@pytest.mark.parametrize(
    ("name", "split", "file", "n"),
    [
        ("redteam2k", None, "RedTeam_2K.csv", 2000),
        ("jailbreakv-mini", "text", "mini_JailBreakV_28K.csv", 280),
        ("advbench", None, "advbench_harmful_behaviors.csv", 520),
        ("custom", None, "advbench_harmful_behaviors.csv", 100),
        ("xstest-safe", None, "xstest_prompts.csv", 250),
        ("xstest-unsafe", None, "xstest_prompts.csv", 200),
        ("jbb-benign", None, "jbb_benign-behaviors.csv", 100),
    ],
)
@pytest.mark.parametrize("whole_folder", [False, True])
def test_real_files(shared_data, name, split, file, n, whole_folder):
    found = load_benchmark(name, shared_data if whole_folder else shared_data / file, split=split)
    assert (len(found.samples), found.skipped) == (n, [])
    assert len({s.id for s in found.samples}) == n
    assert {s.kind for s in found.samples} == {BENCHMARKS[name].kind}
    assert found.source["files"].keys() == {file}  # type: ignore[attr-defined]
    assert re.fullmatch("[0-9a-f]{64}", found.source["files"][file])
    assert found.source["licence"] in ("MIT", "CC-BY-4.0")


def test_policies_of_the_two_sets_are_the_same(shared_data):
    names = [
        {s.category for s in load_benchmark(name, shared_data, split=split).samples}
        for name, split in (("redteam2k", None), ("jailbreakv-mini", "text"))
    ]
    assert names[0] == names[1]
    assert len(names[0]) == 16


def test_xstest_splits_are_a_partition(shared_data):
    safe, unsafe = (load_benchmark(f"xstest-{part}", shared_data).samples for part in ("safe", "unsafe"))
    assert not {s.prompt for s in safe} & {s.prompt for s in unsafe}
    assert all(s.category.startswith("contrast_") for s in unsafe)
    assert not any(s.category.startswith("contrast_") for s in safe)


def test_images_that_are_not_there_are_counted(shared_data):
    with pytest.raises(UserError, match=r"the image is missing: 280.*--image-root"):
        load_benchmark("jailbreakv-mini", shared_data)


def test_advbench_coco_leaves_the_custom_prompts_out(shared_data, tmp_path):
    for i in range(7):
        picture(tmp_path / "val2017" / f"{i:012d}.jpg")
    coco = load_benchmark("advbench-coco", shared_data, tmp_path, seed=3)
    custom = load_benchmark("custom", shared_data, tmp_path, seed=3)
    assert (len(coco.samples), len(custom.samples)) == (510, 70)
    assert not {s.prompt for s in coco.samples} & {s.prompt for s in custom.samples}
    assert count_reasons(coco.skipped) == {"held out for the custom prompts": 10}
    assert set(Counter(s.image for s in coco.samples).values()) == {72, 73}
    again = load_benchmark("advbench-coco", shared_data, tmp_path, seed=3)
    assert again == coco
    assert [s.image for s in load_benchmark("advbench-coco", shared_data, tmp_path, seed=4).samples] != [
        s.image for s in coco.samples
    ]
    named = load_benchmark("advbench-coco", shared_data, tmp_path, hold_out={coco.samples[0].prompt})
    assert len(named.samples) == 519
    with pytest.raises(UserError, match="--image-root"):
        load_benchmark("advbench-coco", shared_data)


@settings(max_examples=50, deadline=None)
@given(st.integers(0, 60), st.integers(1, 20), st.integers(0, 5))
def test_pairing_uses_every_image_about_equally(n_samples, n_images, seed):
    samples = [Sample(str(i), "?", "harmful", "") for i in range(n_samples)]
    names = [f"file:{i}.png" for i in range(n_images)]
    paired = pair_images(samples, names, seed)
    assert paired == pair_images(samples, list(reversed(names)), seed)
    uses = Counter({name: 0 for name in names} | Counter(s.image for s in paired))
    assert max(uses.values()) - min(uses.values()) <= 1
    assert [s.id for s in paired] == [s.id for s in samples]


# ---- layouts


def test_jailbreakv_with_its_images(tmp_path):
    row = {"jailbreak_query": "Say it", "policy": "Child Abuse Content", "format": "Template"}
    rows = [
        row | {"id": 0, "image_path": "llm_transfer_attack/SD_1.png"},
        row | {"id": 1, "image_path": "figstep/gone.png"},
        row | {"id": 2, "image_path": "../secret.png"},
        row | {"id": 3, "image_path": ""},
    ]
    file = table(tmp_path / "set" / "JailBreakV_28K.csv", *rows)
    picture(tmp_path / "pictures" / "JailBreakV_28K" / "llm_transfer_attack" / "SD_1.png")
    picture(tmp_path / "pictures" / "secret.png")
    found = load_benchmark("jailbreakv", file, tmp_path / "pictures")
    (sample,) = found.samples
    assert (sample.id, sample.category) == ("jailbreakv:0", "Child Abuse")
    assert sample.image == "jailbreakv:llm_transfer_attack/SD_1.png"
    assert colour_of(found, sample) == (255, 0, 0)
    assert found.skipped == [
        "JailBreakV_28K.csv, line 3: the image is missing (figstep/gone.png)",
        "JailBreakV_28K.csv, line 4: the image is missing (../secret.png)",
        "JailBreakV_28K.csv, line 5: the image path is empty",
    ]
    assert found.source["skipped"] == {"the image is missing": 2, "the image path is empty": 1}
    text = load_benchmark("jailbreakv", tmp_path / "set", split="text")
    assert [(s.id, s.image) for s in text.samples] == [(f"jailbreakv-text:{i}", "") for i in range(4)]


SCENARIO = {
    "0": {"Question": "q", "Changed Question": "c", "Rephrased Question": "typo?", "Rephrased Question(SD)": "drawn?"},
    "1": {"Question": "q", "Rephrased Question": ""},
    "2": 5,
}


@pytest.mark.parametrize(("split", "prompt"), [("SD_TYPO", "typo?"), ("TYPO", "typo?"), ("SD", "drawn?")])
def test_mm_safetybench_of_its_repository(tmp_path, split, prompt):
    folder = tmp_path / "data" / "processed_questions"
    folder.mkdir(parents=True)
    for name in ("01-Illegal_Activitiy", "02-HateSpeech"):
        (folder / f"{name}.json").write_text(json.dumps(SCENARIO))
    picture(tmp_path / "data" / "imgs" / "01-Illegal_Activitiy" / split / "0.jpg")
    found = load_benchmark("mm-safetybench", tmp_path, split=split)
    (sample,) = found.samples
    assert (sample.prompt, sample.category) == (prompt, "Illegal_Activitiy")
    assert colour_of(found, sample)[0] > 250
    assert found.skipped[1] == "01-Illegal_Activitiy.json, item 2: not a JSON object"
    assert f"02-HateSpeech.json, item 0: the image is missing (02-HateSpeech/{split}/0.jpg)" in found.skipped
    assert len(found.skipped) == 5
    assert len(found.source["files"]) == 2


def test_mm_safetybench_of_the_hub(tmp_path, monkeypatch):
    monkeypatch.setenv("EXITWISE_CACHE", str(tmp_path / "cache"))
    for scenario, colour in (("Fraud", "red"), ("Sex", "blue")):
        row = {"id": "0", "question": f"{scenario}?", "image": {"bytes": png(colour), "path": None}}
        packed(tmp_path / "data" / scenario / "SD.parquet", [row])
    found = load_benchmark("mm-safetybench", tmp_path, split="SD")
    assert [(s.id, s.prompt, s.category) for s in found.samples] == [
        ("mm-safetybench-SD:Fraud:0", "Fraud?", "Fraud"),
        ("mm-safetybench-SD:Sex:0", "Sex?", "Sex"),
    ]
    assert [colour_of(found, s) for s in found.samples] == [(255, 0, 0), (0, 0, 255)]


@pytest.mark.parametrize(("split", "name"), [(None, "safebench"), ("SafeBench-Tiny", "SafeBench-Tiny")])
def test_figstep(tmp_path, split, name):
    row = {"dataset": "ForbidQI", "category_name": "Fraud", "question": "How?", "instruction": "Steps to it."}
    rows = [row | {"category_id": 10, "task_id": 2}, row | {"category_id": "x", "task_id": 2}]
    file = table(tmp_path / "data" / "question" / f"{name}.csv", *rows)
    picture(tmp_path / "data" / "images" / "SafeBench" / "query_ForbidQI_10_2_6.png")
    found = load_benchmark("figstep", tmp_path, split=split)
    (sample,) = found.samples
    assert sample.id.endswith(":10-2")
    assert sample.category == "Fraud"
    assert sample.prompt.startswith("The image shows a list")
    assert colour_of(found, sample) == (255, 0, 0)
    assert found.skipped == [f"{name}.csv, line 3: category_id or task_id is not a number"]
    assert load_benchmark("figstep", file, split=split).samples == found.samples


def test_harmbench_multimodal(tmp_path):
    row = {"Behavior": "Say how", "FunctionalCategory": "multimodal", "SemanticCategory": "illegal", "Tags": ""}
    row |= {"ImageDescription": "", "RedactedImageDescription": ""}
    rows = [
        row | {"ImageFileName": "shot.jpg", "BehaviorID": "a"},
        row | {"ImageFileName": "no.png", "BehaviorID": "b"},
    ]
    table(tmp_path / "data" / "behavior_datasets" / "harmbench_behaviors_multimodal_all.csv", *rows)
    picture(tmp_path / "data" / "multimodal_behavior_images" / "shot.png")  # the table says .jpg
    found = load_benchmark("harmbench", tmp_path)
    (sample,) = found.samples
    assert (sample.id, sample.category, sample.image) == ("harmbench:a", "illegal", "harmbench:shot.png")
    assert count_reasons(found.skipped) == {"the image is missing": 1}


def test_msts_of_its_repository(tmp_path):
    row = {"hazard_category": "Violent Crimes", "case_id": "case_0001", "prompt_text": "Should I?"}
    rows = [row | {"unsafe_image_id": "unsafe_image_0001"}, row | {"unsafe_image_id": "unsafe_image_0002"}]
    for language in ("english", "german"):
        table(tmp_path / "data" / "prompts" / f"{language}_multimodal.csv", *rows)
    picture(tmp_path / "data" / "unsafe_images" / "unsafe_image_0002.jpg")
    found = load_benchmark("msts", tmp_path)
    assert [(s.id, s.image) for s in found.samples] == [("msts:row2", "msts:unsafe_image_0002.jpg")]
    assert load_benchmark("msts", tmp_path, split="german").samples[0].id == "msts-german:row2"
    with pytest.raises(UserError, match="no split 'latin'; expected english"):
        load_benchmark("msts", tmp_path, split="latin")


def test_msts_of_the_hub(tmp_path, monkeypatch):
    monkeypatch.setenv("EXITWISE_CACHE", str(tmp_path / "cache"))
    row = {"hazard_category": "Violent Crimes", "prompt_text": "Should I?", "unsafe_image_id": "unsafe_image_0001"}
    packed(tmp_path / "data" / "english-00000-of-00001.parquet", [row | {"unsafe_image": {"bytes": png("blue")}}])
    found = load_benchmark("msts", tmp_path)
    assert colour_of(found, found.samples[0]) == (0, 0, 255)


def test_the_page_lists_every_set():
    page = (ROOT / "docs/reference/data.md").read_text()
    rows = re.findall(r"^\| `([\w-]+)` \| (.*?) \| (.*?) \| (.*?) \|", page, re.M)
    listed = {name: (size, licence, hub) for name, size, licence, hub in rows}
    hub = lambda bench: f"`{bench.hub}`" if bench.hub else "no"
    assert listed == {n: (b.size, b.licence, hub(b)) for n, b in BENCHMARKS.items() if not n.startswith("own-")}
