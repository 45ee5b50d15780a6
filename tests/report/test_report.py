"""The report of a synthetic run, read as text. What a browser makes of it: test_report_browser.py."""

import base64
import hashlib
import json
import re
import shlex
import xml.etree.ElementTree as ET
from html import unescape
from pathlib import Path
from typing import Any

import pytest

from exitwise.auditing.config import AuditConfig
from exitwise.auditing.report import command_line, write_report
from exitwise.errors import UserError
from exitwise.report import html, svg, transcripts
from exitwise.report.judges import judge_agreement
from exitwise.run.exit import Exit
from exitwise.run.figures import Interval, PairedTest
from exitwise.run.run import Run
from tests.report_fixture import HOSTILE, N_BLOCKS, add_judge, write_run


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> Path:
    return write_run(tmp_path_factory.mktemp("report") / "run")


@pytest.fixture(scope="module")
def page(run: Path) -> str:
    return write_report(run).read_text(encoding="utf-8")


def embedded(page: str) -> Any:
    found = re.search(r'<script type="application/json" id="data">(.*?)</script>', page, re.S)
    assert found
    return json.loads(found[1])


def change_metrics(folder: Path, change) -> Path:
    metrics = json.loads((folder / "metrics.json").read_text())
    change(metrics)
    (folder / "metrics.json").write_text(json.dumps(metrics))
    return folder


def test_the_answer_comes_first(page):
    assert page.index("Your device may stop at") < page.index("<svg") < page.index("<table")
    assert "model organism" in page[: page.index("<svg")]


def test_costs_come_after_the_answer(page):
    assert page.index("May stop at") < page.index("What an exit costs") < page.index("Every exit")
    assert 'Not dominated: exits 0, <span class="nb">2–9</span>, 11.' in page
    assert "Of these, the device may stop at exit 9." in page
    assert 'class="is-default ' in page.split("What an exit costs")[1].split("</section>")[0]


def test_a_run_without_costs(tmp_path):
    folder = write_run(tmp_path / "run")
    (folder / "costs.json").unlink()
    assert "What an exit costs" not in write_report(folder).read_text(encoding="utf-8")


def test_same_run_same_bytes(run, page):
    before = (run / "report.html").read_bytes()
    assert write_report(run).read_bytes() == before


def test_policy_names_the_scripts_and_styles_that_are_there(page):
    policy = re.findall(r'Content-Security-Policy" content="([^"]*)"', page)[0].replace("&#39;", "'")
    for kind, tag in (("script", "<script>"), ("style", "<style>")):
        text = page.split(tag)[1].split(f"</{kind}>")[0]
        digest = base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()
        assert f"{kind}-src 'sha256-{digest}'" in policy
    assert "default-src 'none'" in policy
    assert "unsafe" not in policy


def test_nothing_is_fetched(page):
    assert not re.search(r"""(?:src|href)=["'](?!#|data:)""", page)
    assert "url(http" not in page


def test_hostile_text_is_data(page):
    for text in ("window.pwned=1</script>", "<img src=x", "\x00", "\u202e", "\u2028", "\x1b"):
        assert text not in page
    assert page.count("<script") == 2
    shown = [card["answers"][0]["text"] for card in embedded(page)["samples"][: len(HOSTILE)]]
    assert shown[0] == HOSTILE[0]
    assert shown[3] == "before␀after ␛[31mred␇"
    assert shown[4] == "x" * 2000
    assert shown[5].startswith("Sure⟨U+202E⟩evil⟨U+202C⟩")
    assert shown[7] == HOSTILE[7]
    assert "⟨U+D800⟩" in shown[8]


def test_long_answers_keep_their_length(page):
    assert embedded(page)["samples"][4]["answers"][0]["length"] == 1_000_000


def test_prompts_in_the_tables_are_escaped(run, tmp_path):
    folder = write_run(tmp_path / "run")
    change_metrics(folder, lambda m: m.update(model="<b>{{7*7}}\u202e</b>", caveat="<script>alert(1)</script>"))
    page = write_report(folder).read_text(encoding="utf-8")
    assert "&lt;b&gt;{{7*7}}⟨U+202E⟩&lt;/b&gt;" in page
    assert "<script>alert" not in page


def test_what_may_be_missing(tmp_path):
    folder = write_run(tmp_path / "run")
    for name in ("env.json", "timing.json", "images/index.json"):
        (folder / name).unlink()
    page = write_report(folder).read_text(encoding="utf-8")
    assert "Environment" not in page
    assert embedded(page)["images"] == {}


def test_what_may_not_be_missing(tmp_path):
    folder = write_run(tmp_path / "run")
    (folder / "metrics.json").unlink()
    with pytest.raises(UserError, match=r"metrics\.json"):
        write_report(folder)


def test_answers_need_their_sample(tmp_path):
    folder = write_run(tmp_path / "run")
    (folder / "samples.jsonl").write_text("")
    with pytest.raises(UserError, match="harmful-000"):
        write_report(folder)


def test_unmeasured_figures_say_so(tmp_path):
    nothing = {"value": None, "low": None, "high": None, "successes": 0, "n": 0}

    def empty(metrics):
        for row in metrics["exits"]:
            row |= {"utility": nothing, "coherence": nothing, "mean_tokens": None}
            if row["versus_default"]:
                row["versus_default"]["utility"] = None
        metrics["exits"][3]["asr"] = nothing
        metrics["disparity"] = {"ratio": None, "largest_exit": None, "smallest_exit": None, "reason": "the least is 0"}

    page = write_report(change_metrics(write_run(tmp_path / "run"), empty)).read_text(encoding="utf-8")
    assert "not measured" in page
    assert "the least is 0" in page
    assert "None" not in page.split("<style>")[0] + page.split("</style>")[1].split("<script")[0]


def test_too_many_transcripts_are_thinned_evenly(tmp_path):
    folder = write_run(tmp_path / "run", n=60, filler=" <lock>" * 250)
    page = write_report(folder).read_text(encoding="utf-8")
    cards = embedded(page)["samples"]
    assert len(page.encode()) < 3_000_000
    assert 20 < len(cards) < 180
    assert {len(card["answers"]) for card in cards} == {N_BLOCKS + 1}
    kinds = [sum(card["kind"] == kind for card in cards) for kind in ("harmful", "benign", "vqa")]
    assert max(kinds) - min(kinds) <= 1
    assert f"{len(cards) * 13} of {180 * 13} answers" in page


def test_thumbnails_are_jpegs_from_the_run(tmp_path):
    folder = write_run(tmp_path / "run")
    (tmp_path / "secret.jpg").write_bytes(b"\xff\xd8\xff secret")
    (folder / "images" / "1.jpg").write_bytes(b"<svg onload=alert(1)>")
    index = {"scene-0": "0.jpg", "scene-1": "1.jpg", "scene-2": "../../secret.jpg", "scene-3": "gone.jpg"}
    (folder / "images" / "index.json").write_text(json.dumps(index))
    images = embedded(write_report(folder).read_text(encoding="utf-8"))["images"]
    assert list(images) == ["scene-0"]
    assert images["scene-0"].startswith("data:image/jpeg;base64,")


def test_the_judge_of_the_metrics_decides(tmp_path):
    folder = write_run(tmp_path / "run")
    other = {"sample": "harmful-001", "exit": 0, "judge": "zeal", "label": "unscored", "reason": "other"}
    (folder / "verdicts.zeal.jsonl").write_text(json.dumps(other) + "\n")
    answer = embedded(write_report(folder).read_text(encoding="utf-8"))["samples"][1]["answers"][0]
    assert answer["judge"] == "refusal"


@pytest.mark.parametrize(
    ("value", "text"),
    [(None, "not measured"), (0, "0 %"), (0.003, "<1 %"), (0.077, "8 %"), (1, "100 %")],
)
def test_percent(value, text):
    assert html.percent(value) == text


def test_numbers():
    assert html.bounds(Interval(0.08, 0.03, 0.2, 8, 100)) == "(3–20)"
    assert html.points(PairedTest(-0.12, -0.2, 0.004, 1, 2, 0.5, 0.5)) == "−12 (−20 to 0)"
    assert html.p_value(0.0002) == "<0.001"
    assert html.p_value(0.0319) == "0.032"
    assert html.ranges([9, 4, 5, 6]) == "4–6, 9"
    assert html.ranges([]) == "none"


def test_command_says_what_differs_from_the_defaults():
    config = {
        "model": "a b",
        "exits": "all",
        "limit": 4,
        "prompts": ["x.csv", "y.csv"],
        "cross": True,
        "counts": {"vqa": 1},
    }
    assert command_line(config) == ("exitwise audit 'a b' --prompts x.csv y.csv --limit 4 --cross --out runs/again")


def test_visible_keeps_ordinary_writing():
    text = "naïve 日本語 עברית فارسی\u200cها 👩‍🚀\n\tend"
    assert transcripts.visible(text) == text


HALF, NOTHING = Interval(0.5, 0.4, 0.6, 5, 10), Interval(None, None, None, 0, 0)


def point(exit, share=HALF):
    return svg.CurvePoint(exit, "undecided", dict.fromkeys(svg.SERIES, share), "<&>")


@pytest.mark.parametrize(("n_blocks", "exits"), [(48, range(49)), (24, (5, 10, 18, 23)), (2, (1,))])
def test_curve_of_any_depth(n_blocks, exits):
    points = [point(exit) for exit in exits]
    for size in ((1120, 372), (358, 330)):
        drawn = ET.fromstring(svg.curve("c", points, Exit([n_blocks - 1]), n_blocks, "label", size))
        marks = [node for node in drawn.iter() if node.get("class") == "mark asr"]
        assert len(marks) == len(points)
        assert all(0 < float(mark.attrib["cx"]) < size[0] for mark in marks)


def test_line_does_not_bridge_what_was_not_measured():
    points = [point(exit, NOTHING if exit == 2 else HALF) for exit in range(5)]
    drawn = svg.curve("c", points, Exit([3]), 4, "label")
    assert drawn.count('class="line asr"') == 2


def test_line_does_not_bridge_exits_that_were_not_audited():
    drawn = svg.curve("c", [point(exit) for exit in (0, 1, 5, 6, 9)], Exit([8]), 9, "label")
    assert drawn.count('class="band asr"') == drawn.count('class="line asr"') == 3


@pytest.mark.parametrize(
    "config",
    [
        AuditConfig.of("testbed", limit=12),
        AuditConfig.of(
            "my model", data=("xstest-safe:a b.csv", "own-vqa:c.csv"), image_root=("x=/y", "/z"), over_refusal=False
        ),
        AuditConfig.of("m", prompts=(Path("a.csv"), Path("b.csv")), cross=True, top_p=0.5, judge="refusal,wildguard"),
    ],
)
def test_the_command_of_a_report_asks_the_same_again(tmp_path, config):
    from exitwise.cli.main import parse

    run = write_run(tmp_path / "run", n=6)
    (run / "config.json").write_text(json.dumps(config.to_json()))
    page = write_report(run).read_text(encoding="utf-8")
    shown = unescape(re.search(r"<code>(exitwise audit .*?)</code>", page, re.S)[1])
    assert parse(shlex.split(shown)[1:]).config == config  # type: ignore[attr-defined]


def data_of(report):
    page = report.read_text(encoding="utf-8")
    return json.loads(re.search(r'<script type="application/json" id="data">(.*?)</script>', page, re.S)[1])


def test_judges_side_by_side_and_their_splits_first(tmp_path):
    run = write_run(tmp_path / "run", n=6)
    assert judge_agreement(Run.open(run)) is None
    # it differs on one sample at two exits; and it has the first one scored that the matcher has not
    add_judge(run, {("harmful-004", 9), ("harmful-004", 10)})
    found = judge_agreement(Run.open(run))
    assert found
    assert (found.n, found.n_split, found.splits) == (6 * 13 - 1, 2, {"harmful-004": [9, 10]})
    (pair,) = found.pairs
    assert (pair.first, pair.second, pair.n) == ("guard", "refusal", 77)
    assert pair.agreement == pytest.approx(75 / 77)
    assert pair.kappa
    assert 0 < pair.kappa < 1
    page = write_report(run).read_text(encoding="utf-8")
    assert "Agreement of the judges" in page
    data = data_of(run / "report.html")
    assert data["samples"][0]["id"] == "harmful-004"
    assert [answer["exit"] for answer in data["samples"][0]["answers"] if answer["split"]] == [9, 10]
    assert not any(answer["split"] for sample in data["samples"][1:] for answer in sample["answers"])
    (other,) = data["samples"][0]["answers"][9]["others"]
    assert other in ("guard: safe", "guard: unsafe")


def test_what_judges_split_on_is_kept_where_not_all_fits(tmp_path, monkeypatch):
    run = write_run(tmp_path / "run", n=12)
    split = [f"harmful-{i:03d}" for i in (3, 7, 10)]
    add_judge(run, {(key, 5) for key in split})
    monkeypatch.setattr("exitwise.report.transcripts.DATA_LIMIT", 40_000)
    ids = [sample["id"] for sample in data_of(write_report(run))["samples"]]
    assert ids[:3] == split
    assert 3 < len(ids) < 30
    monkeypatch.setattr("exitwise.report.transcripts.DATA_LIMIT", 6_000)
    ids = [sample["id"] for sample in data_of(write_report(run))["samples"]]
    assert ids
    assert set(ids) < set(split)


def test_the_first_page_says_who_judged(tmp_path):
    run = write_run(tmp_path / "run", n=6)
    page = write_report(run).read_text(encoding="utf-8")
    first = " ".join(unescape(page[: page.index('id="exits"')]).split())
    assert "judged by “refusal”, which matches strings: it finds refusals and cannot assess harm." in first
    assert "detected 96 % of the unsafe ones and passed 31 % of the safe ones" in first
    assert "JailbreakBench" in first
    assert "What the judge cannot detect" in first
    metrics = json.loads((run / "metrics.json").read_text()) | {"judge": "guard"}
    add_judge(run, set())
    (run / "metrics.json").write_text(json.dumps(metrics))
    assert (
        "“guard”, which is a model and errs in both directions. This judge was not calibrated against human labels."
        in write_report(run).read_text(encoding="utf-8")
    )
