"""Preference files: every row is a pair or a line that says why not."""

import gzip
import json

import pytest

from exitwise.data.preferences import Preference, load_preferences, turns
from exitwise.errors import UserError

ONE = "\n\nHuman: hi\n\nAssistant: hello\n\nHuman: how?\n\nAssistant:"


def write(path, *rows):
    opener = gzip.open if path.suffix == ".gz" else open
    with opener(path, "wt", encoding="utf-8") as handle:
        handle.write("".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows))
    return path


@pytest.mark.parametrize("name", ["pairs.jsonl", "pairs.jsonl.gz"])
def test_a_dialogue_is_parted_before_its_last_answer(tmp_path, name):
    path = write(tmp_path / name, {"chosen": ONE + " so.", "rejected": ONE + " no."})
    assert load_preferences(path).pairs == [
        Preference("\n\nHuman: hi\n\nAssistant: hello\n\nHuman: how?", "so.", "no.", "", f"{name}:1")
    ]


def test_plain_rows_keep_prompt_and_category(tmp_path):
    row = {"prompt": " a  question ", "chosen": "yes", "rejected": "no", "category": "x"}
    (pair,) = load_preferences(write(tmp_path / "a.jsonl", row)).pairs
    assert (pair.prompt, pair.chosen, pair.rejected, pair.category) == (" a  question ", "yes", "no", "x")


def test_own_records_can_be_read_again(tmp_path):
    path = write(tmp_path / "a.jsonl", Preference("q", "a", "b", "c").to_json())
    assert load_preferences(path).pairs == [Preference("q", "a", "b", "c", "a.jsonl:1")]


BAD = [
    ("{", "not JSON"),
    ("[1]", "not a JSON object"),
    ({"prompt": "q", "chosen": "a"}, "the rejected is missing"),
    ({"prompt": "q", "chosen": 3, "rejected": "b"}, "the chosen is not text"),
    ({"prompt": "q", "chosen": "a", "rejected": " "}, "the rejected is empty"),
    ({"prompt": "q", "chosen": "a", "rejected": " a "}, "chosen and rejected are the same"),
    ({"prompt": "", "chosen": "a", "rejected": "b"}, "the prompt is empty"),
    ({"prompt": None, "chosen": "a", "rejected": "b"}, "the prompt is missing"),
    ({"prompt": 7, "chosen": "a", "rejected": "b"}, "the prompt is not text"),
    ({"prompt": "q", "chosen": "a\0", "rejected": "b"}, "NUL"),
    ({"prompt": "q", "chosen": "a", "rejected": "b", "category": "c" * 300}, "the category has 300 characters"),
    ({"chosen": "a", "rejected": "b"}, "there is no prompt, and the answers are no dialogues"),
    ({"chosen": ONE + " a", "rejected": ONE + " a"}, "chosen and rejected are the same"),
    ({"chosen": ONE + " a", "rejected": ONE.replace("hi", "ho") + " b"}, "the dialogues differ before"),
    ({"chosen": ONE + " a", "rejected": ONE + " a\n\nHuman: b\n\nAssistant: c"}, "the dialogues differ before"),
    ({"chosen": ONE + " ", "rejected": ONE + " b"}, "the chosen answer is empty"),
    ({"chosen": "\n\nAssistant: a", "rejected": "\n\nAssistant: b"}, "no dialogues"),
]


@pytest.mark.parametrize(("row", "reason"), BAD)
def test_a_bad_row_is_named_with_its_line(tmp_path, row, reason):
    good = {"prompt": "q", "chosen": "a", "rejected": "b"}
    loaded = load_preferences(write(tmp_path / "a.jsonl", good, row, good))
    assert [pair.source for pair in loaded.pairs] == ["a.jsonl:1", "a.jsonl:3"]
    (line,) = loaded.skipped
    assert line.startswith("a.jsonl, line 2: ")
    assert reason in line


def test_the_limit_counts_pairs_not_rows(tmp_path):
    path = write(tmp_path / "a.jsonl", "{", *({"prompt": str(i), "chosen": "a", "rejected": "b"} for i in range(5)))
    assert [pair.prompt for pair in load_preferences(path, limit=2).pairs] == ["0", "1"]
    with pytest.raises(UserError, match="at least 1"):
        load_preferences(path, limit=0)


@pytest.mark.parametrize(
    ("name", "content", "reason"),
    [
        ("a.jsonl", "", "it is empty"),
        ("a.jsonl", "{}\n", "line 1: the chosen is missing"),
        ("a.pdf", "x", "unknown extension"),
    ],
)
def test_a_file_without_pairs_is_an_error(tmp_path, name, content, reason):
    (tmp_path / name).write_text(content)
    with pytest.raises(UserError, match=reason):
        load_preferences(tmp_path / name)


def test_a_file_that_is_not_there_is_no_hub_id(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match=r"cannot read 'folder/pairs\.jsonl'"):
        load_preferences("folder/pairs.jsonl")


@pytest.mark.parametrize(
    ("source", "wanted"),
    [
        ("owner/name", ["train.jsonl.gz", "test.jsonl.gz"]),
        ("owner/name:part", ["part/train.jsonl.gz", "part/test.jsonl.gz"]),
        ("owner/name:part/test", ["part/test.jsonl.gz"]),
    ],
)
def test_a_hub_id_names_files_of_the_data_set(tmp_path, monkeypatch, source, wanted):
    """The download alone is replaced: there is no hub here. Its last candidate exists."""
    import huggingface_hub
    from huggingface_hub.errors import EntryNotFoundError

    there = write(tmp_path / "test.jsonl.gz", {"prompt": "q", "chosen": "a", "rejected": "b"})
    asked = []

    def download(repo, name, repo_type):
        assert (repo, repo_type) == ("owner/name", "dataset")
        asked.append(name)
        if name == wanted[-1]:
            return str(there)
        raise EntryNotFoundError("no such file")

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(huggingface_hub, "hf_hub_download", download)
    assert len(load_preferences(source).pairs) == 1
    assert asked == wanted


def test_turns_of_a_dialogue():
    assert turns("plain\n\nHuman: text") == [{"role": "user", "content": "plain\n\nHuman: text"}]
    assert turns("\n\nHuman: a \n\nAssistant: b\nc\n\nHuman: d") == [
        {"role": "user", "content": "a"},
        {"role": "assistant", "content": "b\nc"},
        {"role": "user", "content": "d"},
    ]


def test_the_public_file(shared_data):
    """Of its 2312 rows 4 lack an answer and 5 part ways earlier."""
    loaded = load_preferences(shared_data / "hh-rlhf_harmless-base_test.jsonl.gz")
    assert (len(loaded.pairs), len(loaded.skipped)) == (2303, 9)
    assert sum("is empty" in line for line in loaded.skipped) == 4
    assert sum("dialogues differ" in line for line in loaded.skipped) == 5
    assert all(turns(pair.prompt)[-1]["role"] == "user" for pair in loaded.pairs)
