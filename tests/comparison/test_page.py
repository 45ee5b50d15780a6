"""A comparison in the terminal, as Markdown and as HTML; hostile text stays text."""

import io
import json
import re
from pathlib import Path

import pytest
from markdown_it import MarkdownIt

from exitwise import compare
from exitwise.cli import entry
from exitwise.comparison import page
from exitwise.comparison.figures import compare_pair
from exitwise.comparison.pairing import pair_runs
from exitwise.run.run import Run
from tests.compare_fixture import BROKEN, MENDED, write_run
from tests.report_fixture import HOSTILE


@pytest.fixture(scope="module")
def hostile(tmp_path_factory) -> Path:
    """A comparison whose ids, prompts, answers, names and scorers mean harm."""
    base = tmp_path_factory.mktemp("hostile")
    change = {
        f"harmful-{i}": {"prompt": text[:5000], "id": f"{i} {text[:40]}"}
        for i, text in enumerate(HOSTILE)
        if "\ud800" not in text
    }
    n = len(HOSTILE)
    scores = {"<img src=x>|`": {(f"{0} {HOSTILE[0][:40]}", 1): 1.0}}
    keywords = {"change": change, "scores": scores, "answer": "<script>window.pwned=2</script>\u202e"}
    name = {"model": "<b>{{7*7}}</b>|*x*"}
    before = write_run(base / "a", {1: "a" * n, 3: "a" * n}, {1: "a"}, config=name, **keywords)
    return_to = write_run(base / "b", {1: "r" * n, 3: "r" * n}, {1: "a"}, config=name, **keywords)
    compare(before, return_to, out=base)
    return base


def test_hostile_text_is_escaped_in_html(hostile):
    text = (hostile / "compare.html").read_text(encoding="utf-8")
    assert "<script" not in text
    assert "<img" not in text
    assert "<b>{{7*7}}</b>" not in text
    assert "&lt;script&gt;window.pwned=1&lt;/script&gt;" in text
    assert not re.search("[\u202e\u2028\x00\x1b\x07]", text)
    assert not re.search(r"""(?:src|href)=["'](?!#|data:)""", text)
    policy = re.findall(r'Content-Security-Policy" content="([^"]*)"', text)[0].replace("&#39;", "'")
    assert "default-src 'none'; style-src 'sha256-" in policy
    assert "script-src" not in policy
    assert "This judge &lt;matches&gt; strings." in text


def test_answers_wait_for_a_click(hostile):
    text = (hostile / "compare.html").read_text(encoding="utf-8")
    answer = "&lt;script&gt;window.pwned=2"
    assert answer in text
    hidden = re.sub(r"<details>.*?</details>", "", text, flags=re.S)
    assert answer not in hidden
    assert "<details open" not in text
    assert "pwned=2" not in (hostile / "compare.md").read_text() + (hostile / "compare.json").read_text()


def test_hostile_text_is_escaped_in_markdown(hostile):
    text = (hostile / "compare.md").read_text(encoding="utf-8")
    tags = set(re.findall(r"</?([a-z0-9]+)", MarkdownIt("commonmark").enable("table").render(text)))
    assert tags <= {"p", "strong", "ul", "li", "table", "thead", "tbody", "tr", "th", "td"}
    rows = [line for line in text.splitlines() if line.startswith("|")]
    assert len({len(re.findall(r"(?<!\\)\|", row)) for row in rows}) == 1


def test_same_runs_same_bytes(tmp_path):
    runs = [write_run(tmp_path / n, {1: t, 3: "rrrr"}, {1: "aara"}) for n, t in (("a", "aaaa"), ("b", "rrra"))]
    seen = []
    for name in ("x", "y"):
        entry(["compare", str(runs[0]), str(runs[1]), "--out", str(tmp_path / name)])
        seen.append([(tmp_path / name / f"compare.{end}").read_bytes() for end in ("json", "md", "html")])
    assert seen[0] == seen[1]


def test_command_prints_the_verdict_first_and_writes_beside_after(tmp_path, capsys):
    before, after = write_run(tmp_path / "a", *BROKEN), write_run(tmp_path / "b", *MENDED)
    entry(["compare", str(before), str(after)])
    printed = capsys.readouterr().out
    sentence = json.loads((after / "compare.json").read_text())["verdict"]["sentence"]
    assert printed.startswith(sentence)
    assert re.search(r"^1 +100 → 0 +−100 \(−100 to −87\.6\) \*", printed, re.M)
    assert "\x1b" not in printed
    assert printed.rstrip().endswith("compare.html")
    assert (after / "compare.html").is_file()
    assert (after / "compare.md").read_text().startswith(f"**{sentence[:40]}")
    assert not list(before.glob("compare.*"))


def test_command_refuses_in_one_line(tmp_path, capsys):
    with pytest.raises(SystemExit) as stop:
        entry(["compare", str(tmp_path / "a"), str(tmp_path / "b"), "--out", str(tmp_path / "out")])
    assert stop.value.code == 2
    assert len(capsys.readouterr().err.strip().splitlines()) == 1


def test_table_leaves_out_changes_where_they_do_not_fit(compare_letters):
    from rich.console import Console

    found = compare_letters(BROKEN, MENDED)
    drawn = {}
    for width in (80, 200):
        console = Console(width=width, record=True, file=io.StringIO())
        console.print(page.table(found.figures, width))
        drawn[width] = console.export_text()
    assert re.search(r"^ *1 +100 → 0 \* +– ", drawn[80], re.M)
    assert max(map(len, drawn[80].splitlines())) <= 80
    assert "−100 (−100 to −87.6) *" in drawn[200]


def test_example_of_each_kind_of_change(tmp_path):
    runs = [
        write_run(tmp_path / n, {3: h}, {3: b}, {3: v})
        for n, h, b, v in (("a", "aar", "aaa", "ccw"), ("b", "rra", "ara", "cwc"))
    ]
    pair = pair_runs(*map(Run.open, runs))
    shown = page.examples(pair, compare_pair(pair), "all")
    assert [(e.id, e.label_before, e.label_after) for e in shown] == [
        ("harmful-2", "refused", "answered"),
        ("benign-1", "answered", "refused"),
        ("vqa-1", "correct", "wrong"),
        ("harmful-0", "answered", "refused"),
        ("harmful-1", "answered", "refused"),
        ("vqa-2", "wrong", "correct"),
    ]
