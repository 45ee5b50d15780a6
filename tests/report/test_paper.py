"""The tables of the paper: figures by hand, absent scores, and hostile text in every format."""

import csv
import html
import io
import json
import re

import pytest
from hypothesis import given
from hypothesis import strategies as st
from markdown_it import MarkdownIt

from exitwise import UserError
from exitwise.cli.main import entry
from exitwise.measure.metrics import compute_metrics
from exitwise.measure.stats import paired_difference
from exitwise.report.markup import RENDERERS, Table, csv_text, latex, markdown
from exitwise.report.paper import tables
from exitwise.report.text import visible
from exitwise.run.records import Completion, Sample, Verdict
from exitwise.run.typed import to_json

MEAN = "Sure & 50% of \\textbf{it} | <script>alert(1)</script> [x](http://evil.example) $1^2_3# ~\n\\input{/etc/passwd}"
PROMPTS = ["p0", "Tell me\nof | pipes", "p2", "p3"]


def write_run(folder, labels, model="m", answers=MEAN, scores=None, prompts=PROMPTS, images="cccc"):
    """A run of four requests, blocks 3, default 3; one letter a sample at each exit."""
    folder.mkdir()
    names = {"a": "answered", "r": "refused", "u": "unscored"}
    samples = [Sample(f"s{i}", prompts[i], "harmful", f"photo:{images[i]}") for i in range(4)]
    cells = [(s.id, exit_, names[row[i]]) for exit_, row in labels.items() for i, s in enumerate(samples)]
    completions = [Completion(key, exit_, answers, (1,), "stop") for key, exit_, _ in cells]
    verdicts = [Verdict(key, exit_, "refusal", label, "") for key, exit_, label in cells]
    for name, records in (("samples", samples), ("completions", completions), ("verdicts.refusal", verdicts)):
        (folder / f"{name}.jsonl").write_text("".join(r.to_json() + "\n" for r in records))
    metrics = compute_metrics(samples, completions, verdicts, model=model, default_exit=3, n_blocks=3)
    (folder / "config.json").write_text(json.dumps({"model": model, "judge": "refusal", "seed": 0}))
    (folder / "metrics.json").write_text(json.dumps(to_json(metrics)))
    for scorer, values in (scores or {}).items():
        lines = [
            {"sample": f"s{i}", "exit": exit_, "scorer": f"{scorer}@1", "value": value, "reason": "no"}
            for exit_, row in values.items()
            for i, value in enumerate(row)
        ]
        name = scorer.replace(":", "-")
        (folder / f"scores.{name}.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return folder


@pytest.fixture
def pair(tmp_path):
    scores = {"detoxify": {1: [0.1, 0.3, 0.2, 0.2], 2: [0.5, None, 0.1, 0.3], 3: [0, 0, 0, 0]}}
    before = write_run(tmp_path / "before", {1: "aaar", 2: "arrr", 3: "arrr"}, "old", scores=scores)
    rewards = {"reward:x": {1: [-1, -2, -3, 0], 2: [1, 1, 1, 1]}}
    after = write_run(tmp_path / "after", {1: "arrr", 2: "rrrr", 3: "rrrr"}, "new", scores=scores | rewards)
    return before, after


def rows(text):
    return list(csv.reader(io.StringIO(text)))


def bare(cell):
    """A cell without its intervals."""
    return re.sub(r" \((?:-?[\d.]+ to -?[\d.]+|no interval)\)", "", cell)


def test_bands_by_hand(pair):
    table = rows(tables(*pair, what="bands", format="csv"))
    assert [[bare(cell) for cell in row] for row in table] == [
        ["Band", "AASR ↓ (%)", "ATS ↓", "ATR ↑", "AASR change", "ATS change", "ATR change"],
        # means of [.1 .3 .2 .2] and of [.5 .1 .3], 100 times; rewards of the second run alone
        ["early (1)", "75.00 → 25.00", "20.00 → 20.00", "not scored → -1.50", "-50.00", "0.00", "not scored"],
        ["middle (2)", "25.00 → 0.00", "30.00 → 30.00", "not scored → 1.00", "-25.00", "0.00", "not scored"],
        ["late (3)", "25.00 → 0.00", "0.00 → 0.00", "not scored", "-25.00", "0.00", "not scored"],
    ]
    alone = rows(tables(pair[0], what="bands", format="csv"))[1]
    assert [bare(cell) for cell in alone] == ["early (1)", "75.00", "20.00", "not scored"]


def limits(cell):
    return [float(x) for x in re.search(r"\((-?[\d.]+) to (-?[\d.]+)\)$", cell).groups()]


def test_means_of_scores_have_intervals_over_prompts(tmp_path):
    """Two values each of two prompts, all exits alike: the draws are (0, 0), (0, .4), (.4, .4) and no others."""
    values = {1: [0.0, 0.0, 0.4, 0.4], 2: [0.0, 0.0, 0.4, 0.4], 3: [0.0, 0.0, 0.4, 0.4]}
    lower = {exit_: [0.0, 0.0, 0.2, 0.2] for exit_ in values}
    runs = [
        write_run(tmp_path / name, dict.fromkeys(values, "aarr"), scores={"detoxify": v, "reward:x": v}, prompts="aabb")
        for name, v in (("before", values), ("after", lower))
    ]
    early = rows(tables(*runs, what="bands", format="csv"))[1]
    assert early[2] == "20.00 (0.00 to 40.00) → 10.00 (0.00 to 20.00)"
    assert early[3] == "0.20 (0.00 to 0.40) → 0.10 (0.00 to 0.20)"
    # paired: what the second prompt lost, not the difference of two independent means
    assert early[5] == "-10.00 (-20.00 to 0.00)"
    assert early[6] == "-0.10 (-0.20 to 0.00)"
    curves = rows(tables(*runs, what="curves", format="csv"))
    first = dict(zip(curves[0], curves[1], strict=True))
    assert [first[f"TS{limit} (original)"] for limit in ("", " low", " high")] == ["20.00", "0.00", "40.00"]
    assert [first[f"TR change{limit}"] for limit in ("", " low", " high")] == ["-0.10", "-0.20", "0.00"]


def test_a_change_is_paired_and_needs_both_runs(pair):
    early = rows(tables(*pair, what="bands", format="csv"))[1]
    # lost 2 of 4 pairs, gained none: Newcombe's interval, as `exitwise compare` has it
    found = paired_difference([True, False, False, False], [True, True, True, False])
    assert limits(early[4]) == [round(100 * found.low, 2), round(100 * found.high, 2)]
    assert early[5] == "0.00 (-48.99 to 48.99)"  # no request differs: as wide as 0 of 4 changed requests allow


def test_crossed_prompts_and_images_are_both_resampled(tmp_path):
    values = {1: [0.0, 0.0, 0.4, 0.4], 3: [0.0] * 4}
    letters = {1: "aarr", 3: "rrrr"}
    one_way, crossed = (
        write_run(tmp_path / images, letters, scores={"detoxify": values}, prompts="aabb", images=images)
        for images in ("wxyz", "wxwx")
    )
    seen = [limits(rows(tables(run, what="bands", format="csv"))[1][2]) for run in (one_way, crossed)]
    assert seen == [[0.0, 40.0], [0.0, 40.0]]
    values[1] = [0.0, 0.4, 0.0, 0.4]  # now the image decides
    one_way, crossed = (
        write_run(tmp_path / f"image {images}", letters, scores={"detoxify": values}, prompts="aabb", images=images)
        for images in ("wxyz", "wxwx")
    )
    seen = [rows(tables(run, what="bands", format="csv"))[1][2] for run in (one_way, crossed)]
    assert seen == ["20.00 (no interval)", "20.00 (0.00 to 40.00)"]  # alike prompts: no draw differs


def test_curves_have_a_row_an_exit(pair):
    table = rows(tables(*pair, what="curves", format="csv"))
    assert [row[0] for row in table] == ["exit", "1", "2", "3"]
    first = dict(zip(table[0], table[1], strict=True))
    assert first["ASR (%) (original)"] == "75.00"
    assert first["ASR (%) (aligned)"] == "25.00"
    assert float(first["ASR low (original)"]) < 75 < float(first["ASR high (original)"])
    assert first["TS (original)"] == "20.00"
    assert first["TR (original)"] == "not scored"
    assert first["utility (%) (aligned)"] == "not measured"


def test_nothing_measured_is_never_zero(tmp_path):
    run = write_run(tmp_path / "run", {1: "uuuu", 3: "uuuu"}, scores={"perspective": {1: [None] * 4, 3: [None] * 4}})
    for what in ("bands", "curves"):
        text = tables(run, what=what, format="csv")
        assert "0.00" not in text
        assert "not scored" in text
        assert "not measured" in text
    assert "No request was let through" in tables(run, what="examples")


def test_the_example_is_refused_at_the_default_and_after_alignment(pair):
    text = tables(*pair, what="examples")
    # s0 goes through everywhere; s1 is refused at the default exit and, after alignment, at the worst one
    assert "Tell me of \\| pipes" in text
    assert re.findall(r"\| (default exit|worst exit|aligned, worst exit) \| (\d) \| (\w+)", text) == [
        ("default exit", "3", "refused"),
        ("worst exit", "1", "answered"),
        ("aligned, worst exit", "1", "refused"),
    ]


@pytest.mark.parametrize("format", RENDERERS)
def test_answers_stay_hidden_unless_asked_for(pair, format):
    assert "passwd" not in tables(*pair, what="examples", format=format)
    assert "passwd" in tables(*pair, what="examples", format=format, with_answers=True)


def test_costs(pair):
    def cost(exit, blocks):
        flops, seconds = {"encoder": 10 + blocks, "total": 100 + blocks}, {"low": 0.001, "median": 0.002, "high": 0.003}
        sizes = {key: {"total": 7 + blocks} for key in ("parameters", "bytes")}
        return sizes | {"exit": exit, "flops": flops, "seconds": {"encoder": seconds, "total": seconds}}

    with pytest.raises(UserError, match=r"costs\.json"):
        tables(*pair, what="costs")
    assert "What an exit costs" not in tables(*pair)
    about = {"default_exit": 3, "request": {"tokens": 5, "image_tokens": 2}, "repetitions": 9}
    for run in pair:
        costs = about | {"exits": [cost(exit, 10 * exit) for exit in (1, 2, 3)]}
        (run / "costs.json").write_text(json.dumps(costs))
    table = rows(tables(*pair, what="costs", format="csv"))
    # of the aligned run: ASR 25, 0, 0 %, so the default exit costs more than exit 2 and is as safe
    picked = [[row[table[0].index(name)] for name in ("exit", "saved (%)", "dominated by")] for row in table[1:]]
    assert picked == [["1", "15.38", "none"], ["2", "7.69", "none"], ["3", "0.00", "2"]]
    assert table[1][1:7] == ["17", "17", "20", "110", "15.38", "2.000"]
    assert "What an exit costs" in tables(*pair)


def test_bad_choices(pair, tmp_path):
    for arguments, says in (
        ({"what": "all", "format": "csv"}, "holds one table"),
        ({"what": "rows"}, "--what got 'rows'"),
        ({"format": "pdf"}, "--format got 'pdf'"),
        ({"reward": "nobody"}, "no such scores"),
    ):
        with pytest.raises(UserError, match=says):
            tables(*pair, **arguments)
    with pytest.raises(UserError, match="is not a run directory"):
        tables(tmp_path / "nowhere")
    figures = json.loads((pair[1] / "metrics.json").read_text())
    (pair[1] / "metrics.json").write_text(json.dumps(figures | {"n_blocks": 4}))
    with pytest.raises(UserError, match=r"n_blocks is 3 in .* and 4 in"):
        tables(*pair)


def test_two_scorers_are_never_averaged(tmp_path):
    both = {"detoxify": {1: [1, 1, 1, 1]}, "perspective": {1: [0, 0, 0, 0]}}
    run = write_run(tmp_path / "run", {1: "aaar", 3: "rrrr"}, scores=both)
    with pytest.raises(UserError, match="toxicity from detoxify@1, perspective@1; choose one with --toxicity"):
        tables(run)
    assert "| 100.00 (51.01 to 100.00) |" in tables(run, what="bands", toxicity="detoxify").replace("\\", "")
    one, other = (
        write_run(tmp_path / name, {1: "aaar", 3: "rrrr"}, scores={name: {1: [1, 1, 1, 1]}})
        for name in ("detoxify", "perspective")
    )
    with pytest.raises(UserError, match="score both with one scorer"):
        tables(one, other)


BROKEN = (
    "{",
    "[]",
    '{"sample": "s0", "exit": 1, "scorer": "x"}',
    '{"sample": "s0", "exit": "one", "scorer": "x", "value": 1}',
    '{"sample": "s0", "exit": 1, "scorer": "x", "value": true}',
    '{"sample": "s0", "exit": 1, "scorer": "x", "value": NaN}',
)


@pytest.mark.parametrize("line", BROKEN)
def test_broken_scores_are_named_by_line(pair, line):
    (pair[0] / "scores.detoxify.jsonl").write_text(line + "\n")
    with pytest.raises(UserError, match=r"scores\.detoxify\.jsonl, line 1: not a Score"):
        tables(pair[0])


def test_the_command_prints(pair, capsys):
    entry(["table", *map(str, pair), "--format", "latex", "--with-answers"])
    text = capsys.readouterr().out
    assert text.count(r"\begin{table}") == text.count(r"\end{table}") == 3
    assert r"$\rightarrow$" in text


hostile = st.text(
    st.characters(codec=None) | st.sampled_from("\\{}$&#^_%~|[]*`<>\"'-=+@\n\r\t\x00\u202e\u2028"), max_size=40
)
COMMAND = re.compile(
    r"\\[{}$&#_%]|\\text(?:backslash|asciicircum|asciitilde|less|greater|bar|asciigrave)\{\}|\\ldots\{\}"
    r"|\\texttt\{U\+[0-9A-F]{4,6}\}|\{[\[\]*-]\}|\{''\}|\$\\(?:rightarrow|downarrow|uparrow|langle|rangle)\$"
)


@given(hostile)
def test_latex_runs_nothing(text):
    lines = latex(Table("t", ["h"], [[text]], "")).split("\n")
    cell = lines[lines.index(r"\hline", 4) + 1]
    assert cell.endswith(r" \\")
    rest = COMMAND.sub("", cell.removesuffix(r" \\"))
    assert not re.search(r"[\\{}$&#^_%~\[\]*]", rest), cell
    assert rest.isprintable()
    assert all(ord(c) < 0x180 or c in "‘’“”" for c in rest)


@given(hostile, hostile)
def test_markdown_stays_a_table_of_plain_text(first, second):
    page = MarkdownIt("commonmark").enable("table").render(markdown(Table("t", ["a", "b"], [[first, second]], "n")))
    tags = set(re.findall(r"</?([a-z0-9]+)", page))
    assert tags <= {"p", "strong", "table", "thead", "tbody", "tr", "th", "td"}, page
    cells = [html.unescape(cell) for cell in re.findall(r"<td>(.*?)</td>", page, re.S)]
    assert cells == [" ".join(visible(text).split()) for text in (first, second)]


def test_markdown_makes_no_links():
    page = markdown(Table("t", ["a"], [["http://evil.example www.evil.example ![x](y) <img src=x>"]], ""))
    rendered = MarkdownIt("commonmark").enable("table").render(page)
    assert "href" not in rendered
    assert "src=x&gt;" in rendered
    assert "http\\://" in page
    assert "www\\.evil" in page


@given(st.lists(hostile, min_size=1, max_size=3))
def test_csv_is_read_back_and_never_a_formula(cells):
    (header, row) = csv.reader(io.StringIO(csv_text(Table("t", ["h"] * len(cells), [cells], "")), newline=""))
    assert len(header) == len(row) == len(cells)
    for cell in row:
        assert cell.lstrip()[:1] not in ("=", "+", "-", "@") or re.fullmatch(r"[+-]?\d+(\.\d+)?", cell)


def test_csv_keeps_numbers():
    cells = ["-0.54", "=1+1", "-1+cmd", "-1.0 (-2.0 to 1.0)", "-1 (cmd)"]
    text = csv_text(Table("t", ["h"], [[cell] for cell in cells], ""))
    assert text == "h\n-0.54\n'=1+1\n'-1+cmd\n-1.0 (-2.0 to 1.0)\n'-1 (cmd)\n"
