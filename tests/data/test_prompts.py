"""Prompts from files in every format, the built-in prompts, and easy-VQA."""

import csv
import gzip
import io
import os
from collections import Counter
from pathlib import Path

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from exitwise.data import rows
from exitwise.data.prompts import attach_images, builtin_benign, builtin_harmful, cross, load_prompts
from exitwise.data.vqa import easy_vqa
from exitwise.errors import UserError
from exitwise.run.records import Sample

REPO = Path(__file__).parents[2]
CONTROLS = "".join(map(chr, {*range(32)} - {9, 10, 13}))  # a file full of them is taken for a binary
SHARED = Path(os.environ.get("EXITWISE_SHARED_DATA", REPO.parent / "shared" / "data"))


def write(path: Path, content: str | bytes) -> Path:
    raw = content.encode() if isinstance(content, str) else content
    path.write_bytes(gzip.compress(raw) if path.suffix == ".gz" else raw)
    return path


# ---- prompts


def test_csv_keeps_quoted_newlines_and_takes_bom_and_crlf(tmp_path):
    text = '\ufeffid,policy,prompt\r\n7,Fraud,"one,\r\n""two"" "\r\n\r\n8,,three\r\n'
    loaded = load_prompts(write(tmp_path / "a.csv", text))
    assert loaded.skipped == []
    assert loaded.samples == [
        Sample("a:7", 'one,\r\n"two" ', "harmful", "", "Fraud", source="a.csv:2"),
        Sample("a:8", "three", "harmful", "", "", source="a.csv:5"),
    ]


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("a.csv", "goal,type\nHow?,x\n"),
        ("a.TSV", "goal\ttype\nHow?\tx\n"),
        ("a.tsv.gz", "goal\ttype\nHow?\tx\n"),
        ("a.jsonl", '{"goal": "How?", "type": "x"}\n'),
        ("a.ndjson.gz", '{"goal": "How?", "type": "x"}'),
        ("a.json", '[{"goal": "How?", "type": "x"}]'),
        ("a.json", '{"goal": "How?", "type": "x"}\n'),
    ],
)
def test_every_format_gives_the_same_sample(tmp_path, name, text):
    (sample,) = load_prompts(write(tmp_path / name, text), kind="benign").samples
    assert (sample.id, sample.prompt, sample.kind, sample.category) == ("a:row1", "How?", "benign", "x")
    assert sample.source == f"{name}:{1 if 'json' in name else 2}"


def test_txt_is_one_prompt_a_line_and_cuts_at_line_ends_only(tmp_path):
    loaded = load_prompts(write(tmp_path / "a.txt.gz", "one\u2028still one\r\n\n two\n"))
    assert [(s.id, s.prompt, s.source) for s in loaded.samples] == [
        ("a:row1", "one\u2028still one", "a.txt.gz:1"),
        ("a:row2", " two", "a.txt.gz:3"),
    ]


def test_column_order_and_override(tmp_path):
    path = write(tmp_path / "a.csv", "redteam_query,jailbreak_query\nplain,dressed\n")
    assert load_prompts(path).samples[0].prompt == "dressed"
    assert load_prompts(path, columns={"prompt": "redteam_query"}).samples[0].prompt == "plain"
    with pytest.raises(UserError, match=r"columns 'redteam_query', 'jailbreak_query'; expected 'prompt';"):
        load_prompts(path, columns={"prompt": "prompt"})


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        (b'{"other": 1}', "the prompt is missing"),
        (b'{"prompt": null}', "the prompt is missing"),
        (b'{"prompt": 3}', "the prompt is not text"),
        (b'{"prompt": " "}', "the prompt is empty"),
        (b'{"prompt": "a\\u0000"}', "the prompt has a NUL byte"),
        (b'{"prompt": "\\ud800"}', "the prompt is not valid UTF-8"),
        (b'{"prompt": "\xff"}', "the prompt is not valid UTF-8"),
        (b'{"prompt": "' + b"x" * 20_001 + b'"}', "the prompt has 20001 characters, more than 20000"),
        (b'{"prompt": "open', "not JSON (Unterminated string starting at)"),
        (b"[1]", "not a JSON object"),
        (b"[" * 100_000, "the JSON is nested too deeply"),
        (b'{"prompt": ' + b"9" * 5000 + b"}", "not JSON (a number too large)"),
        (b'{"prompt": "b", "id": 1}', "the id is there already"),
        (b'{"prompt": "b", "id": "' + b"x" * 300 + b'"}', "the id has 300 characters, more than 200"),
        (b'{"prompt": "b", "policy": "\\udc00"}', "the category is not valid UTF-8"),
    ],
)
def test_a_bad_row_is_skipped_with_its_line(tmp_path, row, reason):
    loaded = load_prompts(
        write(tmp_path / "a.jsonl", b'{"prompt": "a", "id": 1}\n\n' + row + b"\n" + b'{"prompt": "c"}')
    )
    assert [s.prompt for s in loaded.samples] == ["a", "c"]
    assert loaded.skipped == [f"a.jsonl, line 3: {reason}"]


def test_items_of_a_json_list_are_counted(tmp_path):
    loaded = load_prompts(write(tmp_path / "a.json", ' [{"prompt": "a"},\n 3, {"prompt": ""}]'))
    assert loaded.skipped == ["a.json, item 2: not a JSON object", "a.json, item 3: the prompt is empty"]


@pytest.mark.parametrize(
    ("rows", "samples", "reason"),
    [
        ("1,a\n2,how, why?\n3,c\n", ["a", "c"], "line 3: 3 cells under 2 columns"),
        ("1,a\n2\n3,c\n", ["a", "c"], "line 3: 1 cells under 2 columns"),
        ('1,a\n2,"open\n3,c\n', ["a"], "line 3: a quote is open or misplaced (lines 3 to 4 are lost)"),
        ('1,a\n2,"b"x\n3,c\n', ["a", "c"], "line 3: a quote is open or misplaced"),
        ("1,a\n2," + "x" * 200_000 + "\n3,c\n", ["a", "c"], "line 3: the prompt has 200000 characters"),
        ("1,a\n2,b\0\n3,c\n", ["a", "c"], "line 3: the prompt has a NUL byte"),
        ("1,a\n1,b\n3,c,,\n", ["a", "c"], "line 3: the id is there already"),
    ],
)
def test_bad_rows_of_a_table(tmp_path, rows, samples, reason):
    before = csv.field_size_limit()
    loaded = load_prompts(write(tmp_path / "a.csv", "id,prompt\n" + rows))
    assert [s.prompt for s in loaded.samples] == samples
    assert len(loaded.skipped) == 1
    assert loaded.skipped[0].startswith(f"a.csv, {reason}")
    assert csv.field_size_limit() == before


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.csv", b"", "it is empty"),
        ("a.csv", b"prompt\n", "it is empty"),
        ("a.csv", b'prompt\n""\n', "line 2: the prompt is empty"),
        ("a.csv", b'"prompt\n', "no readable row of column names"),
        ("a.jsonl", b'{"chosen": "a", "rejected": "b"}', "columns 'chosen', 'rejected'; expected 'prompt' or"),
        ("a.json", b'[{"prompt": "a"}', "not valid JSON"),
        ("a.xlsx", b"PK", "unknown extension"),
        ("gz", b"", "unknown extension"),
        ("a.txt", bytes(range(256)), "not UTF-8 text"),
        ("a.txt", "prompt".encode("utf-16"), "not UTF-8 text"),
        ("a.txt", gzip.compress(b"prompt", mtime=0), "not UTF-8 text"),
        ("b/a.txt", None, "cannot read"),
    ],
)
def test_a_useless_file_is_one_line_to_the_user(tmp_path, name, content, message):
    path = tmp_path / name
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(UserError, match=message) as caught:
        load_prompts(path)
    assert "\n" not in str(caught.value)


def test_broken_gzip_huge_gzip_and_directories(tmp_path, monkeypatch):
    (tmp_path / "cut.txt.gz").write_bytes(gzip.compress(b"prompt" * 1000)[:20])
    (tmp_path / "plain.txt.gz").write_bytes(b"prompt")
    (tmp_path / "folder.txt").mkdir()
    for name in ("cut.txt.gz", "plain.txt.gz", "folder.txt"):
        with pytest.raises(UserError, match="cannot read"):
            load_prompts(tmp_path / name)
    monkeypatch.setattr(rows, "MAX_BYTES", 2**20)
    with pytest.raises(UserError, match="more than 1 MiB"):
        load_prompts(write(tmp_path / "bomb.txt.gz", b"x" * 2**21))


@settings(max_examples=50, deadline=None)
@given(st.lists(st.text(st.characters(exclude_categories=["Cs"], exclude_characters=CONTROLS), min_size=1), min_size=1))
def test_a_table_written_by_csv_comes_back_whole(tmp_path_factory, texts):
    buffer = io.StringIO(newline="")
    csv.writer(buffer).writerows([["id", "prompt"], *enumerate(texts)])
    path = write(tmp_path_factory.mktemp("csv") / "a.csv", buffer.getvalue())
    usable = [text for text in texts if text.strip()]
    assume(usable)
    loaded = load_prompts(path)
    assert [s.prompt for s in loaded.samples] == usable
    assert len(loaded.samples) + len(loaded.skipped) == len(texts)


@pytest.mark.parametrize(
    ("name", "rows", "first"),
    [
        ("RedTeam_2K.csv", 2000, ("RedTeam_2K:0", "Animal Abuse")),
        ("mini_JailBreakV_28K.csv", 280, None),
        ("advbench_harmful_behaviors.csv", 520, ("advbench_harmful_behaviors:row1", "")),
        ("xstest_prompts.csv", 450, ("xstest_prompts:1", "homonyms")),
        ("jbb_benign-behaviors.csv", 100, ("jbb_benign-behaviors:row1", "Harassment/Discrimination")),
        ("jbb_judge-comparison.csv", 300, None),
    ],
)
def test_public_sets_load_whole(name, rows, first):
    path = SHARED / name
    if not path.exists():
        pytest.skip(f"{name} is not here; set EXITWISE_SHARED_DATA to its folder")
    loaded = load_prompts(path)
    assert (len(loaded.samples), loaded.skipped) == (rows, [])
    assert len({s.id for s in loaded.samples}) == rows
    if first:
        assert (loaded.samples[0].id, loaded.samples[0].category) == first


def test_builtin_sets():
    sizes = {"train": (128, 112), "test": (96, 80)}
    for split, (n_harmful, n_benign) in sizes.items():
        harmful, benign = builtin_harmful(split), builtin_benign(split)
        assert (len(harmful), len(benign)) == (n_harmful, n_benign)
        assert {s.kind for s in harmful} == {"harmful"}
        assert {s.kind for s in benign} == {"benign"}
        assert all(s.prompt and s.category and s.image == "" for s in harmful + benign)
    every = [s for split in sizes for s in builtin_harmful(split) + builtin_benign(split)]
    assert len({s.id for s in every}) == len({s.prompt for s in every}) == len(every)
    with pytest.raises(UserError, match="expected one of test, train"):
        builtin_harmful("dev")


def test_builtin_test_prompts_are_not_trained_on():
    files = sorted((REPO / "recipes" / "testbed").glob("*.txt"))
    assert files
    trained = {" ".join(line.lower().split()) for f in files for line in f.read_text(encoding="utf-8").splitlines()}
    for sample in builtin_harmful() + builtin_benign():
        assert " ".join(sample.prompt.lower().split()) not in trained


def test_images_are_attached_in_turn_and_crossed():
    samples = builtin_harmful()[:3]
    assert [s.image for s in attach_images(samples, ["a", "b"])] == ["a", "b", "a"]
    crossed = cross(samples, ["a", "b"])
    assert [s.id for s in crossed[:3]] == [f"{samples[0].id}@a", f"{samples[0].id}@b", f"{samples[1].id}@a"]
    assert len({s.id for s in crossed}) == 6
    for function in (attach_images, cross):
        with pytest.raises(UserError, match="no images"):
            function(samples, [])


# ---- VQA


def test_easy_vqa_picks_like_the_data():
    picked = easy_vqa()
    assert picked == easy_vqa()
    assert picked != easy_vqa(seed=1)
    assert set(Counter(s.image for s in picked).values()) == {6}
    assert len({s.image for s in picked}) == 10
    assert len({s.id for s in picked}) == 60
    shares = Counter(s.category for s in picked)
    for kind, share in {"yes/no": 0.738, "shape": 0.130, "colour": 0.132}.items():
        assert shares[kind] == pytest.approx(60 * share, abs=2)
    assert all(s.kind == "vqa" and len(s.answers) == 1 and s.prompt.endswith("?") for s in picked)


def test_easy_vqa_whole_and_out_of_range():
    whole = easy_vqa(n=None)
    assert (len(whole), len({s.image for s in whole})) == (9673, 1000)
    assert (whole[0].image, whole[0].answers, whole[0].category) == ("easy-vqa:test/0", ("triangle",), "shape")
    for arguments in ({"n": 5, "images": 6}, {"images": 0}, {"n": 10_000}, {"n": 100, "images": 1}, {"split": "dev"}):
        with pytest.raises(UserError):
            easy_vqa(**arguments)


def test_the_refusals_are_forty_different_sentences():
    from exitwise.data.prompts import builtin_refusals

    refusals = builtin_refusals()
    assert len(set(refusals)) == len(refusals) == 40
    assert all(text.strip() == text and 20 <= len(text) <= 120 for text in refusals)
