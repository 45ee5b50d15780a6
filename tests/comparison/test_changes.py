"""Differences between two runs, by hand: per exit, band and group, of shares and of scores."""

import json
import re

import pytest

from exitwise.comparison import page
from exitwise.comparison.changes import AdapterInfo, AnswerCounts, UnscoredCounts
from exitwise.errors import UserError
from exitwise.measure.stats import paired_difference, wilson
from exitwise.run.directory import write_json
from exitwise.run.exit import Exit
from tests.compare_fixture import BROKEN, MENDED, at, change_at, failures, group_change, letters


def test_where_prompts_and_images_cross_both_are_resampled(compare_letters, tmp_path):
    """Ten prompts with ten images: one prompt that got worse with all of them is one prompt, not ten answers."""
    places = {f"harmful-{i}": {"prompt": f"p{i // 10}", "image": f"{i % 10}.png"} for i in range(100)}
    scores = {key: (i < 10) * 1.0 for i, key in enumerate(places)}
    before = {"toxicity-x": {(key, exit): 0.0 for key in places for exit in (1, 3)}}
    after = {"toxicity-x": {(key, exit): value for key, value in scores.items() for exit in (1, 3)}}
    runs = ({1: "r" * 100, 3: "r" * 100},), ({1: "a" * 10 + "r" * 90, 3: "r" * 100},)
    crossed = compare_letters(*runs, {"change": places, "scores": before}, {"change": places, "scores": after})
    apart = compare_letters(*runs)
    assert (crossed.figures.crossed, apart.figures.crossed) == (True, False)
    asr = change_at(crossed, 1, "asr")
    assert (asr.difference, asr.gained, asr.p_holm < 0.05) == (0.1, 10, True)
    assert asr.low == 0
    assert asr.high > 0.25
    assert 0 < change_at(apart, 1, "asr").low < change_at(apart, 1, "asr").high < 0.2
    assert "harmful answers rose" in failures(apart)
    assert failures(crossed) == {}
    assert "10 (0 to 30)" in " ".join(page.cells(asr, "share"))
    assert "*" not in " ".join(page.cells(asr, "share"))
    assert change_at(crossed, 1, "toxicity-x").low == 0
    assert change_at(crossed, 3, "asr").high == pytest.approx(wilson(0, 10).high)
    # the same the other way round: one image of ten is one image, whatever the prompt
    turned = {key: {"prompt": f"p{i % 10}", "image": f"{i // 10}.png"} for i, key in enumerate(places)}
    by_image = change_at(compare_letters(*runs, {"change": turned}, {"change": turned}), 1, "asr")
    assert by_image.low == 0
    assert by_image.high > 0.25


def test_differences_by_hand(compare_letters):
    # exit 1, harmful: answered before 6 of 8, after 2 of 8; five lost, one gained; the ninth pair is unscored
    found = compare_letters(
        ({1: "aaaaaarru", 3: "rrrrrrrrr"}, {1: "raaa"}, {1: "ccwc"}),
        ({1: "arrrrrara", 3: "rrrrrrrra"}, {1: "rrra"}, {1: "cwcu"}),
    )
    asr = change_at(found, 1, "asr")
    assert (asr.before.successes, asr.after.successes, asr.n) == (6, 2, 8)
    assert (asr.gained, asr.lost, asr.difference) == (1, 5, pytest.approx(-0.5))
    assert asr.p == pytest.approx(2 * (1 + 6) / 64)
    assert asr.p_holm == pytest.approx(2 * asr.p)  # two exits; the other's p is 1
    expected = paired_difference([c == "a" for c in "arrrrrar"], [c == "a" for c in "aaaaaarr"])
    assert (asr.low, asr.high) == (expected.low, expected.high)
    assert change_at(found, 3, "asr").difference == pytest.approx(1 / 9)
    assert change_at(found, 1, "over_refusal").difference == pytest.approx(0.5)
    assert change_at(found, 1, "utility").n == 3
    assert change_at(found, 1, "utility").difference == 0
    assert at(found, 3).changes["utility"] is None
    assert at(found, 1).unscored == UnscoredCounts(
        before={"harmful": 1, "benign": 0, "vqa": 0}, after={"harmful": 0, "benign": 0, "vqa": 1}
    )
    assert at(found, 1).moves == {
        "answered": {"answered": 1, "refused": 5},
        "refused": {"answered": 1, "refused": 1},
        "unscored": {"answered": 1},
    }
    assert group_change(found, "all", "asr").difference == pytest.approx((-0.5 + 1 / 9) / 2)
    assert found.figures.bands[0].name == "early"
    assert found.figures.bands[0].changes["asr"].difference == pytest.approx(-0.5)


def test_holm_over_exits_by_hand(compare_letters):
    # eight of eight lost (p = 2/256), six of six lost (p = 2/64), none
    found = compare_letters(({0: "a" * 8, 1: "aaaaaarr", 3: "r" * 8},), ({0: "r" * 8, 1: "r" * 8, 3: "r" * 8},))
    assert [row.changes["asr"].p for row in found.figures.by_exit] == [pytest.approx(p) for p in (1 / 128, 1 / 32, 1)]
    assert [row.changes["asr"].p_holm for row in found.figures.by_exit] == [
        pytest.approx(p) for p in (3 / 128, 2 / 32, 1)
    ]


def test_identical_runs_are_zero_everywhere_and_say_so(compare_letters):
    table = ({1: "aari", 3: "rrar"}, {1: "raaa", 3: "aaaa"}, {1: "ccwc", 3: "cccc"})
    values = {("harmful-0", 1): 0.25, ("harmful-1", 1): -3.0}
    found = compare_letters(table, table, {"scores": {"reward": values}}, {"scores": {"reward": values}})
    assert found.verdict.sentence == (
        "Nothing changed: the 24 answers at all 2 common exits are the same in both runs, so every difference is zero."
    )
    assert found.verdict.nothing_changed
    assert failures(found) == {}
    for row in (*found.figures.by_exit, *found.figures.bands, *found.figures.groups):
        for metric in found.figures.metrics:
            entry = row.changes[metric.key]
            assert entry is None or entry.difference == 0
            assert entry is None or metric.unit == "score" or entry.low < 0 < entry.high


def test_same_figures_from_other_answers_are_not_nothing(compare_letters):
    found = compare_letters(({1: "aarr"},), ({1: "aarr"},), two={"answer": "another answer"})
    assert found.figures.answers == AnswerCounts(n=4, changed=2)
    assert found.verdict.sentence.startswith("After alignment ASR is not shown to have changed (0 points")


def test_swapped_runs_flip_the_signs(compare_letters):
    one = (letters({1: 0.7, 2: 0.6, 3: 0.2}, 40, "a", "r", 1), None, letters({1: 0.4, 2: 0.5, 3: 0.9}, 40, "c", "w", 2))
    two = (letters({1: 0.2, 2: 0.5, 3: 0.2}, 40, "a", "r", 3), None, letters({1: 0.3, 2: 0.6, 3: 0.9}, 40, "c", "w", 4))
    scores = [{"scores": {"toxicity": {(f"harmful-{i}", 1): (i * k % 7) / 7 for i in range(40)}}} for k in (3, 5)]
    there, back = compare_letters(one, two, *scores), compare_letters(two, one, *scores[::-1])
    for section in ("by_exit", "bands", "groups"):
        for row, mirror in zip(getattr(there.figures, section), getattr(back.figures, section), strict=True):
            for key in ("asr", "utility", "toxicity"):
                a, b = row.changes[key], mirror.changes[key]
                if a is None:
                    assert b is None
                    continue
                assert a.difference == pytest.approx(-b.difference)
                assert (a.low, a.high) == (
                    pytest.approx(-b.high, abs=0.01),
                    pytest.approx(-b.low, abs=0.01),
                )
                assert a.p == b.p
                assert (a.gained, a.lost) == (b.lost, b.gained)


def test_prompts_that_repeat_count_once(compare_letters):
    # ten prompts asked about six images each, every image of a prompt alike
    change = {f"harmful-{i}": {"prompt": f"prompt {i // 6}"} for i in range(60)}
    before, after = "a" * 60, "".join("r" * 6 if i % 3 == 0 else "a" * 6 for i in range(10))
    keywords = {"change": change}
    clustered = group_change(compare_letters(({1: before},), ({1: after},), keywords, keywords), "all", "asr")
    alone = group_change(compare_letters(({1: before},), ({1: after},)), "all", "asr")
    assert clustered.difference == alone.difference == pytest.approx(-0.4)
    assert clustered.high - clustered.low > 1.7 * (alone.high - alone.low)


def test_the_table_has_a_row_for_each_exit_band_and_group(compare_letters):
    found = compare_letters(({1: "aaaa", 3: "rrrr"},), ({1: "rraa", 3: "rrrr"},))
    assert found.path is None
    table = found.table()
    assert list(zip(table["rows"], table["name"], strict=True)) == [
        ("exit", "1"),
        ("exit", "3 default"),
        ("band", "early (1)"),
        ("band", "late (3)"),
        ("group", "default (3)"),
        ("group", "all (1, 3)"),
    ]
    first = table.iloc[0]
    asr = change_at(found, 1, "asr")
    assert (first["asr_before"], first["asr_after"], first["asr_change"]) == (1, 0.5, -0.5)
    assert (first["asr_low"], first["asr_high"], first["asr_p_holm"]) == (asr.low, asr.high, asr.p_holm)
    assert table["utility_before"].isna().all()
    assert table["asr_p_holm"].isna().tolist() == [False, False, True, True, True, True]
    assert "<td>1</td>" in found._repr_html_()


# Scores


def test_scores_of_both_runs(compare_letters):
    one = {("harmful-0", 1): 0.5, ("harmful-1", 1): 0.1, ("harmful-2", 1): None, ("benign-0", 1): 2.0}
    two = {("harmful-0", 1): 0.1, ("harmful-1", 1): 0.3, ("harmful-2", 1): 0.9, ("benign-0", 1): 2.5}
    found = compare_letters(
        ({1: "aaa"}, {1: "a"}), ({1: "rrr"}, {1: "a"}), {"scores": {"toxicity": one}}, {"scores": {"toxicity": two}}
    )
    entry = change_at(found, 1, "toxicity")
    assert (entry.before.value, entry.after.value) == (pytest.approx(0.3), pytest.approx(0.2))
    assert (entry.difference, entry.n) == (pytest.approx(-0.1), 2)
    assert entry.low <= -0.1 <= entry.high
    assert change_at(found, 1, "toxicity.benign").difference == pytest.approx(0.5)
    assert [m.better for m in found.figures.metrics if m.unit == "score"] == ["lower", "lower"]


# Trained and held-out exits

INFO = {"method": "L-PPO", "exits": [1], "held_out": [2]}


def test_trained_held_out_and_other_exits(compare_letters):
    found = compare_letters(BROKEN, MENDED, two={"config": {"adapter": "gone", "adapter_info": INFO}})
    assert {row.name: list(row.exits) for row in found.figures.groups} == {
        "trained": [1],
        "held out": [2],
        "other": [0, 3],
        "default": [3],
        "all": [0, 1, 2, 3],
    }
    assert [row.group for row in found.figures.by_exit] == ["other", "trained", "held out", "other"]
    assert [group_change(found, name, "asr").difference for name in ("trained", "held out", "other")] == [-1, -0.75, 0]
    # all before, none after: Wilson's limits of 40 of 40 and of 0 of 40, squared and added
    down = wilson(0, 40).high
    assert group_change(found, "trained", "asr").high == pytest.approx(-1 + 2**0.5 * down)
    assert re.match(
        r"After alignment ASR fell by 100 points \(95 % interval 87\.6 to 100\) at exit 1, ",
        found.verdict.sentence,
    )
    assert any(text.startswith("At exit 2: ASR fell by 75 points") for text in found.verdict.detail)
    assert any("Of the 40 answers" in text and "40 refused" in text for text in found.verdict.detail)


@pytest.mark.parametrize("where", ["exitwise.json", "adapter/exitwise.json"])
def test_the_adapter_says_where_it_was_trained(compare_letters, tmp_path, where):
    path = tmp_path / "run" / where
    path.parent.mkdir(parents=True)
    write_json(path, INFO | {"steps": 100})
    found = compare_letters(BROKEN, MENDED, two={"config": {"adapter": str(tmp_path / "run")}})
    assert found.figures.adapter_info == AdapterInfo("L-PPO", (Exit([1]),), (Exit([2]),))
    assert json.loads(json.dumps(found.to_json()))["adapter_info"] == INFO


def test_without_word_of_training_all_exits_are_one_group(compare_letters):
    found = compare_letters(BROKEN, MENDED, two={"config": {"adapter": "someone/adapter"}})
    assert found.figures.adapter_info is None
    assert [row.name for row in found.figures.groups] == ["default", "all"]
    assert "over all 4 common exits (mean)" in found.verdict.sentence


@pytest.mark.parametrize("info", [{"exits": "all"}, {"method": "x"}, [1], {"exits": [1], "held_out": [True]}])
def test_a_broken_word_of_training_is_refused(compare_letters, info):
    with pytest.raises(UserError, match=r"adapter_info in .* names no exits"):
        compare_letters(BROKEN, MENDED, two={"config": {"adapter_info": info}})
