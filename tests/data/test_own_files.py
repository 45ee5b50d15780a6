"""Own files: columns by any name, images in every format, and malformed rows named with their line."""

import json
import sys

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from exitwise.data.catalogue import BENCHMARKS
from exitwise.data.prompts import load_prompts
from exitwise.data.sets import load_benchmark
from exitwise.errors import UserError
from tests.data.files import colour_of, packed, picture, png, table

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
    assert sum(found.source["skipped"].values()) == 1  # type: ignore[attr-defined]


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
