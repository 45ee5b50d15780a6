"""The data options: how they are read, and which samples they select."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from exitwise.auditing.config import AuditConfig
from exitwise.data.catalogue import BENCHMARKS, parse_request, split_requests
from exitwise.data.config import DataConfig, SelectionConfig
from exitwise.data.images import load_image
from exitwise.data.prompts import FIELDS
from exitwise.data.selection import load_samples
from exitwise.errors import UserError
from tests.data.files import TEN, picture, table, vqa_files

HARMFUL = SelectionConfig(vqa=0, over_refusal=False)
COLUMNS = st.text(st.characters(categories=["L", "N", "Zs"], exclude_characters=" "), min_size=1, max_size=12)


@settings(max_examples=60, deadline=None)
@given(st.dictionaries(st.sampled_from(FIELDS), COLUMNS.map(str.strip).filter(bool)))
def test_map_is_read_as_it_was_written(columns):
    text = ",".join(f"{field}={column}" for field, column in columns.items())
    assert DataConfig(map=text).columns == columns


@pytest.mark.parametrize("text", ["question", "prompt=", "colour=x", "prompt=a,prompt=b", "=x"])
def test_a_bad_map_is_one_line(text):
    with pytest.raises(UserError, match="--map got") as caught:
        DataConfig(map=text).check()
    assert "\n" not in str(caught.value)


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
    data = DataConfig(
        data=(f"xstest-safe:{tmp_path},vqav2:{tmp_path}",), image_root=(f"vqav2={tmp_path / 'pictures'}",)
    )
    SelectionConfig(limit=2).check(data)
    found = load_samples(data, SelectionConfig(limit=2), 0)
    assert [s.id for s in found.samples if s.kind != "harmful"] == ["xstest-safe:1", "vqav2:7"]
    assert [s.kind for s in found.samples].count("harmful") == 2
    assert found.samples[2].image == "photo:astronaut"
    assert [(s["set"], s["samples"]) for s in found.sources] == [("built-in", 2), ("xstest-safe", 1), ("vqav2", 1)]
    assert load_image(found.samples[-1].image, found.roots).size == (8, 8)


def test_custom_prompts_of_a_run_are_left_out_of_its_advbench_coco(tmp_path):
    path = table(tmp_path / "harmful_behaviors.csv", *({"goal": f"Do {i}", "target": ""} for i in range(5)))
    own = table(tmp_path / "mine.csv", {"prompt": "Do 3"}, {"prompt": "Other"})
    picture(tmp_path / "coco" / "a.jpg")
    data = DataConfig(data=(f"advbench-coco:{path}", f"custom:{own}"), image_root=(str(tmp_path / "coco"),))
    samples = [s for s in load_samples(data, SelectionConfig(), 0).samples if s.kind == "harmful"]
    assert [s.prompt for s in samples if s.id.startswith("advbench-coco")] == ["Do 0", "Do 1", "Do 2", "Do 4"]
    assert len([s for s in samples if s.id.startswith("custom")]) == 2 * 10


def test_a_picture_that_does_not_open_is_skipped(tmp_path):
    file = table(tmp_path / "a.csv", {"prompt": "a", "file": "good.png"}, {"prompt": "b", "file": "bad.png"})
    picture(tmp_path / "good.png")
    (tmp_path / "bad.png").write_bytes(b"no picture")
    found = load_samples(DataConfig(prompts=(file,), map="image=file"), HARMFUL, 0)
    assert [s.image for s in found.samples] == ["own:good.png"]
    assert found.skipped[0].startswith("a.csv, line 3: the image is broken (image 'own:bad.png' is not a PNG")
    assert found.sources[0]["skipped"] == {"the image is broken": 1}


def test_files_of_one_name_can_be_used_together(tmp_path):
    files = []
    for folder, text in (("a", "one"), ("b", "two"), ("c", "three")):
        (tmp_path / folder).mkdir()
        files.append(table(tmp_path / folder / "mine.csv", {"prompt": text}, {"prompt": f"{text} more"}))
    table(files[2], {"prompt": "three"})
    data = DataConfig(prompts=tuple(files[:2]), benign=(files[2],))
    ids = {s.prompt: s.id for s in load_samples(data, SelectionConfig(vqa=0), 0).samples}
    assert ids == {
        "one": "harmful/mine:row1",
        "one more": "harmful/mine:row2",
        "two": "harmful/mine:row1#2",
        "two more": "harmful/mine:row2#2",
        "three": "benign/mine:row1",
    }
    alone = load_samples(DataConfig(prompts=(files[0],)), HARMFUL, 0).samples
    assert [s.id for s in alone] == ["mine:row1", "mine:row2"]


@pytest.mark.parametrize(
    ("data", "chosen", "message"),
    [
        ({"data": ("redteam3k",)}, {}, "there is no data set 'redteam3k'; expected one of: redteam2k"),
        ({"image_root": ("no such folder",)}, {}, "--image-root got 'no such folder'"),
        ({"data": ("xstest-safe",)}, {"over_refusal": False}, "--no-over-refusal"),
        ({"data": ("vqav2",)}, {"vqa": 0}, "--vqa 0"),
        ({}, {"limit": 0}, "--limit got 0; expected 1 to"),
    ],
)
def test_bad_requests_are_one_line(data, chosen, message):
    with pytest.raises(UserError, match=message):
        AuditConfig("testbed", inputs=DataConfig(**data), selection=SelectionConfig(**chosen)).check()
