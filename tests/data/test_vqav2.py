"""VQA-v2 in the layouts that its authors and the hub publish."""

import re

import pytest

from exitwise.data.sets import load_benchmark
from exitwise.errors import UserError
from exitwise.run.records import Sample
from tests.data.files import TEN, answers, colour_of, packed, picture, png, vqa_files


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
    assert found.source["files"].keys() == {  # type: ignore[attr-defined]
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
