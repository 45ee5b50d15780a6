"""The public sets: the real files where they are, and small ones in the layout that the authors publish."""

import csv
import io
import json
import os
import re
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from exitwise.auditing.config import AuditConfig
from exitwise.data.catalogue import BENCHMARKS, count_reasons, load_benchmark, parse_request, split_requests
from exitwise.data.images import load_image
from exitwise.data.prompts import FIELDS, load_prompts, pair_images
from exitwise.data.selection import load_samples
from exitwise.errors import UserError
from exitwise.run.records import Sample
from tests.conftest import ROOT


def picture(path: Path, colour: str = "red") -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (8, 8), colour).save(path)
    return path


def png(colour: str) -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (8, 8), colour).save(buffer, "PNG")
    return buffer.getvalue()


def table(path: Path, *rows: dict) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "w", newline="", encoding="utf-8") as handle:
        writer = csv.DictWriter(handle, rows[0])
        writer.writeheader()
        writer.writerows(rows)
    return path


def packed(path: Path, rows: list[dict]) -> Path:
    import pyarrow
    from pyarrow import parquet

    path.parent.mkdir(parents=True, exist_ok=True)
    parquet.write_table(pyarrow.Table.from_pylist(rows), path)
    return path


def colour_of(dataset, sample: Sample) -> tuple[int, ...]:
    return load_image(sample.image, dataset.roots).getpixel((0, 0))


# ---- the real files


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
    assert found.source["files"].keys() == {file}
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


def vqa_files(folder: Path, questions: list[dict], annotations: list[dict]) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "v2_OpenEnded_mscoco_val2014_questions.json").write_text(json.dumps({"questions": questions}))
    (folder / "v2_mscoco_val2014_annotations.json").write_text(json.dumps({"annotations": annotations}))


def answers(*texts: str) -> list[dict]:
    return [{"answer": t, "answer_confidence": "yes", "answer_id": i} for i, t in enumerate(texts, start=1)]


TEN = ("net", "net", "netting", "mesh", "net", "pitcher", "orange", "net", "net", "yes")


def test_vqav2_of_its_own_files(tmp_path):
    asked = [
        {"image_id": 262148, "question": "What is behind?", "question_id": 262148000},
        {"image_id": 262148, "question": "Nobody answered?", "question_id": 262148001},
        {"image_id": 99, "question": "No picture?", "question_id": 99000},
        {"image_id": 262148, "question": "Nine answers?", "question_id": 262148002},
        {"image_id": "x", "question": "?", "question_id": 3},
        {"image_id": 262148, "question": "", "question_id": 262148003},
        {"image_id": 262148, "question": "Odd id?", "question_id": [1]},
        "nonsense",
    ]
    notes = [
        {"question_id": q, "answer_type": "other", "question_type": "what is", "answers": answers(*TEN)}
        for q in (262148000, 99000, 3, 262148003)
    ]
    notes += [{"question_id": 262148002, "answer_type": "other", "answers": answers(*TEN[:9])}, {"question_id": [2]}, 7]
    vqa_files(tmp_path, asked, notes)
    picture(tmp_path / "val2014" / "COCO_val2014_000000262148.jpg")
    found = load_benchmark("vqav2", tmp_path)
    assert found.samples == [
        Sample(
            "vqav2:262148000",
            "What is behind?",
            "vqa",
            "vqav2:COCO_val2014_000000262148.jpg",
            "other",
            TEN,
            "v2_OpenEnded_mscoco_val2014_questions.json:1",
        )
    ]
    assert colour_of(found, found.samples[0])[0] > 250
    assert [line.partition(", ")[2] for line in found.skipped] == [
        "item 2: the question has no annotation",
        "item 3: the image is missing (COCO_val2014_000000000099.jpg)",
        "item 4: the annotation has not 10 answers",
        "item 5: the image_id is not a number",
        "item 6: the prompt is empty",
        "item 7: the question_id is not a number",
        "item 8: not a JSON object",
    ]
    assert found.source["files"].keys() == {
        "v2_OpenEnded_mscoco_val2014_questions.json",
        "v2_mscoco_val2014_annotations.json",
    }
    (tmp_path / "v2_mscoco_val2014_annotations.json").unlink()
    with pytest.raises(UserError, match=r"expected v2_mscoco_val2014_annotations\.json"):
        load_benchmark("vqav2", tmp_path)
    (tmp_path / "v2_mscoco_val2014_annotations.json").write_text("[1]")
    with pytest.raises(UserError, match="no list 'annotations'"):
        load_benchmark("vqav2", tmp_path)


def test_vqav2_in_three_folders(tmp_path):
    vqa_files(
        tmp_path, [{"image_id": 1, "question": "?", "question_id": 7}], [{"question_id": 7, "answers": list(TEN)}]
    )
    for part, name in (
        ("questions", "v2_OpenEnded_mscoco_val2014_questions"),
        ("annotations", "v2_mscoco_val2014_annotations"),
    ):
        (tmp_path / part).mkdir()
        (tmp_path / f"{name}.json").rename(tmp_path / part / f"{name}.json")
    picture(tmp_path / "images" / "val2014" / "COCO_val2014_000000000001.jpg")
    assert load_benchmark("vqav2", tmp_path).samples[0].answers == TEN


def test_vqav2_of_the_hub(tmp_path, monkeypatch):
    monkeypatch.setenv("EXITWISE_CACHE", str(tmp_path / "cache"))
    row = {"question_id": 7, "question": "What?", "answer_type": "number", "answers": answers(*TEN)}
    packed(
        tmp_path / "data" / "validation-00000-of-00068.parquet", [row | {"image": {"bytes": png("red"), "path": "x"}}]
    )
    found = load_benchmark("vqav2", tmp_path)
    (sample,) = found.samples
    assert (sample.id, sample.category, sample.answers) == ("vqav2:7", "number", TEN)
    assert re.fullmatch("unpacked:[0-9a-f]{64}", sample.image)
    assert colour_of(found, sample) == (255, 0, 0)


# ---- own files

COLUMNS = st.text(st.characters(categories=["L", "N", "Zs"], exclude_characters=" "), min_size=1, max_size=12)


@settings(max_examples=60, deadline=None)
@given(
    names=st.lists(COLUMNS.map(str.strip).filter(bool), min_size=4, max_size=7, unique=True),
    order=st.randoms(use_true_random=False),
    form=st.sampled_from(["csv", "jsonl"]),
)
def test_any_column_can_be_mapped(tmp_path_factory, names, order, form):
    folder = tmp_path_factory.mktemp("own")
    values = dict(zip(names, ["What?", "Fraud", "k1", "yes|no", "noise", "more", "rest"], strict=False))
    columns = dict(zip(("prompt", "category", "id", "answers"), names, strict=False))
    shuffled = list(values)
    order.shuffle(shuffled)
    row = {name: values[name] for name in shuffled}
    path = folder / f"a.{form}"
    if form == "csv":
        table(path, row)
    else:
        path.write_text(json.dumps(row) + "\n")
    (sample,) = load_prompts(path, "vqa", columns).samples
    assert (sample.prompt, sample.category, sample.id, sample.answers) == ("What?", "Fraud", "a:k1", ("yes", "no"))
    for field in columns:
        with pytest.raises(UserError, match=f"--map {field}=COLUMN"):
            load_prompts(path, "vqa", columns | {field: "no such column"})


@settings(max_examples=60, deadline=None)
@given(st.dictionaries(st.sampled_from(FIELDS), COLUMNS.map(str.strip).filter(bool)))
def test_map_is_read_as_it_was_written(columns):
    text = ",".join(f"{field}={column}" for field, column in columns.items())
    assert AuditConfig("testbed", map=text).columns() == columns


@pytest.mark.parametrize("text", ["question", "prompt=", "colour=x", "prompt=a,prompt=b", "=x"])
def test_a_bad_map_is_one_line(text):
    with pytest.raises(UserError, match="--map got") as caught:
        AuditConfig("testbed", map=text).check()
    assert "\n" not in str(caught.value)


def test_own_rows_with_images_in_every_format(tmp_path, monkeypatch):
    monkeypatch.setenv("EXITWISE_CACHE", str(tmp_path / "cache"))
    columns = {"prompt": "question", "category": "policy", "image": "file", "answers": "truth"}
    row = {"question": "What?", "policy": "p", "file": "sub/a.png", "truth": "yes|no"}
    picture(tmp_path / "sub" / "a.png")
    table(tmp_path / "a.csv", row)
    (tmp_path / "a.jsonl").write_text(json.dumps(row | {"truth": ["yes", "no"]}))
    paths = [tmp_path / "a.csv", tmp_path / "a.jsonl"]
    for path in paths:
        found = load_benchmark("own-vqa", path, columns=columns)
        (sample,) = found.samples
        assert (sample.prompt, sample.image, sample.answers) == ("What?", "own-vqa:sub/a.png", ("yes", "no"))
        assert colour_of(found, sample) == (255, 0, 0)
    inside = packed(
        tmp_path / "a.parquet", [row | {"file": {"bytes": png("blue"), "path": "b.png"}}, row | {"file": None}]
    )
    found = load_benchmark("own-vqa", inside, columns=columns)
    assert colour_of(found, found.samples[0]) == (0, 0, 255)
    assert found.skipped == ["a.parquet, row 2: the image path is missing"]


def test_columns_that_happen_to_be_called_like_a_field_are_left_alone(tmp_path):
    path = table(tmp_path / "a.csv", {"prompt": "mine", "image": "gone.png", "answers": "", "query": "What?"})
    (sample,) = load_prompts(path, columns={"prompt": "query"}).samples
    assert (sample.prompt, sample.image, sample.answers) == ("What?", "", ())


def test_a_set_without_answers_says_how_to_name_them(tmp_path):
    with pytest.raises(UserError, match=r"the answers are missing: 1.*--map"):
        load_benchmark("own-vqa", table(tmp_path / "a.csv", {"prompt": "What?"}))


def test_files_of_one_folder_have_their_own_ids(tmp_path):
    for name in ("a", "b"):
        table(tmp_path / f"{name}.csv", {"prompt": name})
    assert [s.id for s in load_benchmark("own-harmful", tmp_path).samples] == [
        "own-harmful:a:row1",
        "own-harmful:b:row1",
    ]


# ---- malformed rows


@pytest.mark.parametrize(
    ("cell", "reason"),
    [
        (b"", "the prompt is empty"),
        (b"caf\xe9 how", "the prompt is not valid UTF-8"),
        (b"a\0b", "the prompt has a NUL byte"),
        (b"x" * 10_000_000, "the prompt has 10000000 characters, more than 20000"),
        (b'"open', "a quote is open or misplaced"),
    ],
    ids=["empty", "encoding", "nul", "ten megabytes", "quote"],
)
def test_a_bad_row_of_a_set_is_named(tmp_path, cell, reason):
    path = tmp_path / "RedTeam_2K.csv"
    path.write_bytes(b"id,question,policy,from\n0,How?,Fraud,x\n1," + cell + b",Fraud,x\n")
    found = load_benchmark("redteam2k", path)
    assert len(found.samples) == 1
    assert found.skipped == [f"RedTeam_2K.csv, line 3: {reason}"]
    assert sum(found.source["skipped"].values()) == 1


@pytest.mark.parametrize("name", [n for n, b in BENCHMARKS.items() if b.columns and n != "mm-safetybench"])
def test_a_missing_column_is_named(tmp_path, name):
    path = table(tmp_path / "a.csv", {"nonsense": "x"})
    with pytest.raises(UserError, match=r"a\.csv' has the columns 'nonsense'; expected"):
        load_benchmark(name, path, tmp_path)


def test_broken_parquet_is_named(tmp_path):
    whole = packed(tmp_path / "whole.parquet", [{"prompt": f"What {i}?"} for i in range(2000)])
    raw = bytearray(whole.read_bytes())
    raw[200:400] = bytes(200)
    for name, content in (
        ("cut.parquet", raw[:500]),
        ("torn.parquet", raw),
        ("no.parquet", b"PAR1 what"),
        ("nil.parquet", b""),
    ):
        (tmp_path / name).write_bytes(content)
        with pytest.raises(UserError, match=f"cannot read '.*{name}'") as caught:
            load_prompts(tmp_path / name)
        assert "\n" not in str(caught.value)
    assert len(load_prompts(whole).samples) == 2000


def test_bad_rows_of_parquet_are_named(tmp_path):
    import pyarrow
    from pyarrow import parquet

    texts = pyarrow.array([b"ok", b"\xff\xfe", None, b"", b"a\0"], pyarrow.binary()).cast(pyarrow.string(), safe=False)
    parquet.write_table(pyarrow.table({"prompt": texts}), tmp_path / "a.parquet")
    loaded = load_prompts(tmp_path / "a.parquet")
    assert [s.prompt for s in loaded.samples] == ["ok"]
    assert loaded.skipped == [
        "a.parquet, row 2: the column 'prompt' is not valid UTF-8",
        "a.parquet, row 3: the prompt is missing",
        "a.parquet, row 4: the prompt is empty",
        "a.parquet, row 5: the prompt has a NUL byte",
    ]


def test_parquet_without_pyarrow_says_what_to_install(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    (tmp_path / "a.parquet").write_bytes(b"PAR1")
    with pytest.raises(UserError, match=r"run: pip install 'exitwise\[parquet\]'"):
        load_prompts(tmp_path / "a.parquet")


# ---- the hub

HUB = """
import sys
from exitwise.data.catalogue import load_benchmark
from exitwise.data.images import load_image
from exitwise.errors import UserError
found = load_benchmark("jailbreakv-mini")
print(len(found.samples), found.skipped, found.source["from"], found.source["revision"])
print(load_image(found.samples[0].image, found.roots).size)
print(len(load_benchmark("redteam2k").samples))
print(load_benchmark("own-benign", "hf://datasets/some/body@v1/deep/rows.csv").source["revision"])
for name, path in (("advbench", None), ("figstep", None), ("own-harmful", "hf://nonsense"), ("own-harmful", "hf://a/b"),
                   ("redteam2k", "hf://some/body@v1")):
    try:
        load_benchmark(name, path)
    except UserError as error:
        print(error)
print("torch" in sys.modules)
"""


def cached(home: Path, repo: str, revision: str, ref: str, files: dict[str, bytes]) -> None:
    """The hub's own cache layout: snapshots are links into blobs, refs name the commits."""
    store = home / "hub" / f"datasets--{repo.replace('/', '--')}"
    (store / "refs").mkdir(parents=True)
    (store / "refs" / ref).write_text(revision)
    (store / "blobs").mkdir()
    for i, (name, content) in enumerate(files.items()):
        (store / "blobs" / f"b{i}").write_bytes(content)
        link = store / "snapshots" / revision / name
        link.parent.mkdir(parents=True, exist_ok=True)
        link.symlink_to(os.path.relpath(store / "blobs" / f"b{i}", link.parent))


def test_sets_come_from_the_right_place_of_the_hub(tmp_path):
    head = "id,jailbreak_query,redteam_query,format,policy,image_path\n"
    rows = f"{head}0,Say it,it,SD,Fraud,figstep/a.png\n1,Say it,it,SD,Fraud,figstep/b.png\n"
    files = {
        "JailBreakV_28K/mini_JailBreakV_28K.csv": rows.encode(),
        "JailBreakV_28K/RedTeam_2K.csv": b"id,question,policy,from\n0,How?,Fraud,x\n",
        "JailBreakV_28K/figstep/a.png": png("red"),
    }
    cached(tmp_path, "JailbreakV-28K/JailBreakV-28k", "a" * 40, "main", files)
    cached(tmp_path, "some/body", "b" * 40, "v1", {"deep/rows.csv": b"prompt\nHow?\n"})
    environment = os.environ | {"HF_HOME": str(tmp_path), "HF_HUB_OFFLINE": "1", "HF_HUB_CACHE": str(tmp_path / "hub")}
    result = subprocess.run([sys.executable, "-c", HUB], capture_output=True, text=True, env=environment, check=False)
    lines = result.stdout.splitlines()
    assert result.returncode == 0, result.stderr
    missing = "['mini_JailBreakV_28K.csv, line 3: the image is missing (figstep/b.png)']"
    assert lines[:4] == [f"1 {missing} JailbreakV-28K/JailBreakV-28k {'a' * 40}", "(8, 8)", "1", "b" * 40]
    assert lines[4].startswith("cannot fetch data/train-*.parquet of the data set walledai/AdvBench (")
    assert lines[5].startswith(
        "figstep is not on the hub; give its files as figstep:PATH and its images with --image-root"
    )
    assert lines[6] == "'hf://nonsense' is no address on the hub; expected hf://datasets/OWNER/NAME[@REVISION][/FILE]"
    assert lines[7] == "hf://a/b names no file; expected hf://datasets/OWNER/NAME/FILE"
    assert lines[8].startswith("the data set some/body has no JailBreakV_28K/RedTeam_2K.csv")
    assert lines[9] == "False"


# ---- the command line's side


def test_requests_are_cut_at_names_only():
    assert split_requests("redteam2k:a,b.csv,xstest-safe,msts/german:c") == [
        "redteam2k:a,b.csv",
        "xstest-safe",
        "msts/german:c",
    ]
    assert parse_request("msts/german:hf://a/b") == ("msts", "german", "hf://a/b")
    assert parse_request("vqav2") == ("vqav2", None, None)
    for text in ("redteam2k:", "nonsense", "msts/", "", "redteam3k:a"):
        with pytest.raises(UserError):
            parse_request(text)


@settings(max_examples=60, deadline=None)
@given(
    st.lists(
        st.tuples(st.sampled_from(sorted(BENCHMARKS)), st.text(st.sampled_from("ab/._, "), min_size=1)), min_size=1
    )
)
def test_requests_survive_the_comma(requests):
    parts = [f"{name}:{path}" for name, path in requests]
    assert [parse_request(p) for p in split_requests(",".join(parts))] == [
        (name, None, path) for name, path in requests
    ]


def test_sets_replace_the_built_in_of_their_kind(tmp_path):
    table(
        tmp_path / "xstest_prompts.csv", {"id": 1, "prompt": "How do I kill a process?", "type": "t", "label": "safe"}
    )
    vqa_files(
        tmp_path, [{"image_id": 1, "question": "?", "question_id": 7}], [{"question_id": 7, "answers": list(TEN)}]
    )
    picture(tmp_path / "pictures" / "COCO_val2014_000000000001.jpg")
    config = AuditConfig(
        "testbed",
        data=(f"xstest-safe:{tmp_path},vqav2:{tmp_path}",),
        image_root=(f"vqav2={tmp_path / 'pictures'}",),
        limit=2,
    )
    config.check()
    inputs = load_samples(config)
    assert [s.id for s in inputs.samples if s.kind != "harmful"] == ["xstest-safe:1", "vqav2:7"]
    assert [s.kind for s in inputs.samples].count("harmful") == 2
    assert inputs.samples[2].image == "photo:astronaut"
    assert [(s["set"], s["samples"]) for s in inputs.sources] == [("built-in", 2), ("xstest-safe", 1), ("vqav2", 1)]
    assert load_image(inputs.samples[-1].image, inputs.roots).size == (8, 8)


def test_custom_prompts_of_a_run_are_left_out_of_its_advbench_coco(tmp_path):
    path = table(tmp_path / "harmful_behaviors.csv", *({"goal": f"Do {i}", "target": ""} for i in range(5)))
    own = table(tmp_path / "mine.csv", {"prompt": "Do 3"}, {"prompt": "Other"})
    picture(tmp_path / "coco" / "a.jpg")
    config = AuditConfig(
        "testbed", data=(f"advbench-coco:{path}", f"custom:{own}"), image_root=(str(tmp_path / "coco"),), vqa=0
    )
    samples = [s for s in load_samples(config).samples if s.kind == "harmful"]
    assert [s.prompt for s in samples if s.id.startswith("advbench-coco")] == ["Do 0", "Do 1", "Do 2", "Do 4"]
    assert len([s for s in samples if s.id.startswith("custom")]) == 2 * 10


def test_a_picture_that_does_not_open_is_skipped(tmp_path):
    file = table(tmp_path / "a.csv", {"prompt": "a", "file": "good.png"}, {"prompt": "b", "file": "bad.png"})
    picture(tmp_path / "good.png")
    (tmp_path / "bad.png").write_bytes(b"no picture")
    config = AuditConfig("testbed", prompts=(file,), map="image=file", vqa=0, over_refusal=False)
    inputs = load_samples(config)
    assert [s.image for s in inputs.samples] == ["own:good.png"]
    assert inputs.skipped[0].startswith("a.csv, line 3: the image is broken (image 'own:bad.png' is not a PNG")
    assert inputs.sources[0]["skipped"] == {"the image is broken": 1}


def test_files_of_one_name_can_be_used_together(tmp_path):
    files = []
    for folder, text in (("a", "one"), ("b", "two"), ("c", "three")):
        (tmp_path / folder).mkdir()
        files.append(table(tmp_path / folder / "mine.csv", {"prompt": text}, {"prompt": f"{text} more"}))
    table(files[2], {"prompt": "three"})
    config = AuditConfig("testbed", prompts=tuple(files[:2]), benign=(files[2],), vqa=0)
    ids = {s.prompt: s.id for s in load_samples(config).samples}
    assert ids == {
        "one": "harmful/mine:row1",
        "one more": "harmful/mine:row2",
        "two": "harmful/mine:row1#2",
        "two more": "harmful/mine:row2#2",
        "three": "benign/mine:row1",
    }
    alone = load_samples(AuditConfig("testbed", prompts=(files[0],), vqa=0, over_refusal=False)).samples
    assert [s.id for s in alone] == ["mine:row1", "mine:row2"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"data": ("redteam3k",)}, "there is no data set 'redteam3k'; expected one of: redteam2k"),
        ({"image_root": ("no such folder",)}, "--image-root got 'no such folder'"),
        ({"data": ("xstest-safe",), "over_refusal": False}, "--no-over-refusal"),
        ({"data": ("vqav2",), "vqa": 0}, "--vqa 0"),
    ],
)
def test_bad_requests_are_one_line(options, message):
    with pytest.raises(UserError, match=message):
        AuditConfig("testbed", **options).check()


def test_the_page_lists_every_set():
    page = (ROOT / "docs/reference/data.md").read_text()
    rows = re.findall(r"^\| `([\w-]+)` \| (.*?) \| (.*?) \| (.*?) \|", page, re.M)
    listed = {name: (size, licence, hub) for name, size, licence, hub in rows}
    hub = lambda bench: f"`{bench.hub}`" if bench.hub else "no"
    assert listed == {n: (b.size, b.licence, hub(b)) for n, b in BENCHMARKS.items() if not n.startswith("own-")}
