"""Runs that cannot be compared are refused in one line; scores that cannot be paired are left out."""

import re

import pytest

from exitwise import compare
from exitwise.comparison.pairing import pair_runs
from exitwise.errors import UserError
from exitwise.run.directory import write_json
from exitwise.run.run import Run
from tests.compare_fixture import write_run


def pair_of(*folders):
    return pair_runs(*map(Run.open, folders))


def refusal(tmp_path, before, after):
    with pytest.raises(UserError) as refused:
        compare(before, after, out=tmp_path)
    assert "\n" not in str(refused.value)
    assert not list(tmp_path.glob("compare.*"))
    return str(refused.value)


@pytest.mark.parametrize(
    ("keywords", "words"),
    [
        ({"config": {"max_new_tokens": 64}}, r"max_new_tokens is 32 in .* and 64 in .*same --max-new-tokens"),
        ({"config": {"temperature": 0.7}}, "temperature is 0.0 in .* and 0.7 in .*same --temperature"),
        ({"config": {"top_p": 0.5}}, "same --top-p"),
        ({"config": {"images_sha256": "1"}}, "images of .* differ under the same names; use the same --images"),
        ({"plan": {"default_exit": 2}}, "the default exit is 3 in .* and 2 in .*two audits of one model"),
        ({"plan": {"n_blocks": 12}}, "the number of encoder blocks is 4 in .* and 12 in"),
        ({"plan": {"n_requests": 9}}, "holds 4 of 9 answers; finish it with the command that began it"),
        ({"change": {"harmful-1": {"prompt": "another"}}}, "sample 'harmful-1' has another prompt"),
        ({"change": {"harmful-1": {"image": "b.png"}}}, "sample 'harmful-1' has another image"),
        (
            {"change": {"harmful-0": {"id": "\x1bnew"}}},
            r"lacks 1 of the 2 samples of .*\(first: 'harmful-0'\).*--limit",
        ),
    ],
)
def test_runs_that_differ_are_refused(tmp_path, keywords, words):
    before, after = (write_run(tmp_path / n, {1: "ar", 3: "rr"}, **k) for n, k in (("a", {}), ("b", keywords)))
    assert re.search(words, refusal(tmp_path, before, after))


def test_missing_samples_are_refused_either_way(tmp_path):
    more, less = write_run(tmp_path / "a", {1: "aar"}), write_run(tmp_path / "b", {1: "aa"})
    assert "b lacks 1 of the 3 samples of" in refusal(tmp_path, more, less)
    assert "b lacks 1 of the 3 samples of" in refusal(tmp_path, less, more)


def test_another_judge_is_refused(tmp_path):
    before, after = write_run(tmp_path / "a", {1: "a"}), write_run(tmp_path / "b", {1: "a"}, config={"judge": "guard"})
    verdicts = after / "verdicts.refusal.jsonl"
    (after / "verdicts.guard.jsonl").write_text(verdicts.read_text().replace("refusal", "guard"))
    assert "was judged by 'refusal', " in refusal(tmp_path, before, after)


def test_the_first_of_several_judges_decides(tmp_path):
    runs = [
        write_run(tmp_path / name, {1: "a"}, config={"judge": judges})
        for name, judges in (("a", "refusal"), ("b", "refusal, guard"))
    ]
    assert pair_of(*runs).after.judge == "refusal"


def test_runs_without_a_common_exit_are_refused(tmp_path):
    before, after = write_run(tmp_path / "a", {0: "a", 1: "a"}), write_run(tmp_path / "b", {3: "a"})
    assert re.search("the runs share no exit: .* has 0-1, .* has 3; audit both", refusal(tmp_path, before, after))


def test_unfinished_and_broken_runs_are_refused(tmp_path):
    good = write_run(tmp_path / "good", {1: "aa"})

    def broken(name, change):
        folder = write_run(tmp_path / name, {1: "aa"})
        change(folder)
        return refusal(tmp_path, good, folder)

    assert "not a run directory" in refusal(tmp_path, good, tmp_path / "nowhere")
    assert "not a run directory" in refusal(tmp_path, good / "plan.json", good)
    assert "holds no answers yet" in broken("1", lambda f: (f / "plan.json").unlink())
    assert "holds 0 of 2 answers" in broken("2", lambda f: (f / "completions.jsonl").write_text(""))
    assert "lacks verdicts of the judge 'refusal' on 2 of 2" in broken(
        "3", lambda f: (f / "verdicts.refusal.jsonl").unlink()
    )
    assert "answers samples that samples.jsonl lacks" in broken("4", lambda f: (f / "samples.jsonl").write_text(""))
    assert "does not have the format of a run" in broken("5", lambda f: write_json(f / "config.json", {"model": "x"}))


def test_exits_of_one_run_only_are_named_and_left_out(compare_letters):
    found = compare_letters(({0: "a", 1: "a", 3: "r"},), ({1: "r", 3: "r", 4: "r"},))
    assert found.figures.exits == (1, 3)
    assert found.figures.notes == ("Exit 0 is in BEFORE only and left out.", "Exit 4 is in AFTER only and left out.")


def test_trained_exits_that_were_not_audited_are_told(compare_letters):
    info = {"config": {"adapter_info": {"method": "l-ppo", "exits": [2, 4], "held_out": [1]}}}
    found = compare_letters(({1: "aa", 3: "rr"},), ({1: "rr", 3: "rr", 4: "rr"},), None, info)
    assert found.verdict.focus == "all"
    assert "No trained exit (2, 4) is in both runs, so the verdict is on the others." in found.figures.notes


def test_what_is_odd_but_allowed_is_noted(compare_letters, tmp_path):
    same = {"plan": {"model_sha256": "x"}}
    assert compare_letters(({1: "a"},), ({1: "r"},), same, same).figures.notes == ("Both runs asked the same weights.",)
    found = compare_letters(({1: "a"},), ({1: "r"},), {"config": {"adapter": "x", "model": "other"}})
    assert found.figures.notes == (
        "The models have different names: 'other' and 'tiny'.",
        "Only BEFORE has an adapter; the two runs may be swapped.",
    )
    found = compare_letters(({1: "a"},), ({1: "r"},), {"config": {"adapter": "x"}}, {"config": {"adapter": "y"}})
    assert found.figures.notes == ("BEFORE has an adapter too ('x'): the differences are those between two adapters.",)
    runs = [write_run(tmp_path / name, {1: "a"}) for name in "ab"]
    write_json(runs[1] / "env.json", {"device": "cuda", "dtype": "float32"})
    assert pair_of(*runs).notes == ("The device differs: cpu before, cuda after.",)


# Scores


def test_scores_of_one_run_or_of_two_scorers_are_left_out_and_named(compare_letters, tmp_path):
    values = {("harmful-0", 1): 0.5}
    found = compare_letters(({1: "a"},), ({1: "r"},), {"scores": {"toxicity": values}})
    assert found.figures.notes == ("Scores of 'toxicity' are in BEFORE only and left out.",)
    runs = [write_run(tmp_path / name, {1: "a"}, scores={"toxicity": values}) for name in "ab"]
    path = runs[1] / "scores.toxicity.jsonl"
    path.write_text(path.read_text().replace('"scorer": "toxicity"', '"scorer": "another"'))
    assert pair_of(*runs).notes == (
        "Scores of 'toxicity' come from different scorers, versions or settings and are left out.",
    )
    assert pair_of(*runs).scores == {}


def test_a_scorer_says_what_it_measures(tmp_path):
    runs = [write_run(tmp_path / name, {1: "a"}, scores={"perspective": {("harmful-0", 1): 1.0}}) for name in "ab"]
    assert pair_of(*runs).scores["perspective"].quantity == ""
    for run in runs:
        write_json(run / "scores.perspective.json", {"quantity": "toxicity", "settings": {"language": "en"}})
    assert pair_of(*runs).scores["perspective"].quantity == "toxicity"
    write_json(runs[1] / "scores.perspective.json", {"quantity": "toxicity", "settings": {"language": "fr"}})
    assert pair_of(*runs).scores == {}


@pytest.mark.parametrize("key", ["backend", "version", "settings"])
def test_scores_of_another_backend_version_or_setting_are_left_out(tmp_path, key):
    runs = [write_run(tmp_path / name, {1: "a"}, scores={"perspective": {("harmful-0", 1): 1.0}}) for name in "ab"]
    about = {"quantity": "toxicity", "backend": "Perspective API", "version": "v1", "settings": {"language": "en"}}
    for run in runs:
        write_json(run / "scores.perspective.json", about)
    assert pair_of(*runs).scores.keys() == {"perspective"}
    write_json(runs[1] / "scores.perspective.json", about | {key: {"other": 1} if key == "settings" else "other"})
    assert pair_of(*runs).scores == {}
    assert "come from different scorers" in pair_of(*runs).notes[0]


@pytest.mark.parametrize("line", ['{"sample": "harmful-0"}', "[1]", "{", '{"sample": "x", "exit": 1, "value": NaN}'])
def test_broken_scores_are_named_with_their_line(tmp_path, line):
    runs = [write_run(tmp_path / name, {1: "a"}, scores={"toxicity": {("harmful-0", 1): 1.0}}) for name in "ab"]
    with open(runs[1] / "scores.toxicity.jsonl", "a") as handle:
        handle.write(line + "\n")
    with pytest.raises(UserError, match=r"scores\.toxicity\.jsonl, line 2: not a Score"):
        pair_of(*runs)
