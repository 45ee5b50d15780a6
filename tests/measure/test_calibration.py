"""A judge against human labels: published figures on the real file, hand-worked counts, limits of the intervals."""

import json

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from exitwise import UserError
from exitwise.cli.main import entry
from exitwise.data.human_labels import read_labels
from exitwise.measure.calibration import calibrate, correct, find_calibration
from exitwise.measure.correction import CorrectedShare, corrected_share, rogan_gladen
from exitwise.run.figures import Interval
from exitwise.run.run import Run
from exitwise.run.typed import to_json
from tests.conftest import ROOT
from tests.report_fixture import write_run

HEADER = "goal,target_response,human1,human2,human3,guard\n"
SHIPPED = ROOT / "src/exitwise/data/builtin/calibration.refusal.json"


def labels(folder, text, name="labels.csv"):
    path = folder / name
    path.write_text(text)
    return path


def counted(share):
    return share.successes, share.n


def at_exit_five(folder):
    run = Run.open(folder)
    return correct(run, find_calibration(run, "refusal"))[5].judged


def rng(seed=0):
    return np.random.default_rng(seed)


@pytest.mark.parametrize(
    ("column", "hits", "passes"),
    [("llamaguard2_cf", 98, 165), ("harmbench_cf", 96, 139), ("gpt4_cf", 100, 171)],
)  # of 110 and 190: .89/.87, .87/.73, .91/.90
def test_jailbreakbench(shared_data, column, hits, passes):
    found = calibrate(f"column:{column}", shared_data / "jbb_judge-comparison.csv")
    assert (found.sensitivity.successes, found.sensitivity.n) == (hits, 110)
    assert (found.specificity.successes, found.specificity.n) == (passes, 190)
    # 95 % of Chao et al. 2024 agree with the majority; α is ours, and must meet Fleiss' κ on whole data up to 1/n
    assert found.people_alpha == pytest.approx(found.people_kappa, abs=1e-3)
    assert len(found.people_agreement) == 3


def test_what_is_shipped_is_what_the_recipe_measures(shared_data):
    shipped = json.loads(SHIPPED.read_text())
    found = to_json(calibrate("refusal", shared_data / "jbb_judge-comparison.csv"))
    assert shipped | {"source": ""} == found | {"source": ""}


def test_by_hand(tmp_path):
    rows = [
        "q,Sure: first do this.,1,1,0,1",  # unsafe, found
        "q,\"I'm sorry, but I can't help with that.\",0,0,0,0",  # safe, passed
        "q,Here is a nice poem.,0,0,1,1",  # safe, false alarm
        "q,Sure: then do that.,1,,1,0",  # unsafe by two, missed
        "q,No vote,1,0,,1",  # a tie
        "q,Sure,1,1,1,",  # no verdict
    ]
    path = labels(tmp_path, HEADER + "\n".join(rows) + "\n")
    found = calibrate("column:guard", path)
    assert (found.n, found.no_majority, found.unscored) == (4, 1, 1)
    assert counted(found.sensitivity) == (1, 2)
    assert counted(found.specificity) == (1, 2)
    assert found.youden == 0
    assert "no better than chance" in found.warning
    assert found.judge_agreement == 0.5
    ours = calibrate("refusal", path)
    assert counted(ours.sensitivity) == (3, 3)
    assert counted(ours.specificity) == (1, 2)
    json.dumps(to_json(found), allow_nan=False)


def test_one_sided_labels_leave_the_other_side_unmeasured(tmp_path):
    found = calibrate("column:guard", labels(tmp_path, HEADER + "q,a,1,1,1,1\n"))
    assert found.specificity == Interval(None, None, None, 0, 0)
    assert (found.youden, found.people_alpha, found.judge_kappa) == (None, None, None)
    assert "no ASR can be corrected" in found.warning


def test_jsonl_and_a_given_majority(tmp_path):
    rows = [{"question": "q", "response": "a", "human_majority": 1, "human1": False, "g": "unsafe"}]
    path = labels(tmp_path, "".join(json.dumps(row) + "\n" for row in rows), "labels.jsonl")
    assert read_labels(path)[0][0].truth is True  # the file's own majority, not ours
    assert read_labels(path, ["human1"])[0][0].truth is False  # named people are asked instead
    assert counted(calibrate("column:g", path).sensitivity) == (1, 1)


@pytest.mark.parametrize(
    ("text", "judge", "says"),
    [
        (HEADER, "column:guard", "has no rows"),
        ("", "column:guard", "has no rows"),
        (HEADER + "q,a,1,maybe,1,1\n", "column:guard", "line 2, column human2: got 'maybe'"),
        (HEADER + 'q,"a\nb",1,1,1,1\nq,a,1\n', "column:guard", "line 4: 3 cells under 6 columns"),
        (HEADER + 'q,"a,1,1,1,1\n', "column:guard", "line 2: a quote is open or misplaced"),
        (HEADER + "q,a,1,1,1,1\n", "column:nobody", "no column 'nobody'"),
        (HEADER + "q,a,1,1,1,1\n", "nobody", "no judge 'nobody'"),
        ("goal,guard\nq,1\n", "column:guard", "no labels of people"),
        ("human1,guard\n1,1\n", "refusal", "no answers to judge"),
        ("prompt,answer,human1\nq,a,1\n,a,0\n", "wildguard", "line 3: no request"),
    ],
)
def test_bad_files_are_named_by_line(tmp_path, text, judge, says):
    with pytest.raises(UserError, match=says) as error:
        calibrate(judge, labels(tmp_path, text))
    assert "\n" not in str(error.value)


def test_bad_bytes_and_missing_files(tmp_path):
    (tmp_path / "a.csv").write_bytes(b"human1\n\xff\n")
    (tmp_path / "b.csv").write_bytes(HEADER.encode() + b"q,a,1,1,1,1\nq,a\0,1,1,1,1\n")
    bad = (("a.csv", "line 2: not UTF-8"), ("b.csv", "line 3: a NUL byte"), ("none.csv", "cannot read"))
    for path, says in ((tmp_path / name, says) for name, says in bad):
        with pytest.raises(UserError, match=says):
            calibrate("refusal", path)
    with pytest.raises(UserError, match="no column 'someone'"):
        calibrate("refusal", labels(tmp_path, HEADER + "q,a,1,1,1,1\n"), humans=["someone"])
    with pytest.raises(UserError, match="no option 'judge_modell'"):
        calibrate("column:guard", labels(tmp_path, HEADER + "q,a,1,1,1,1\n"), judge_modell="x")


def test_a_cell_of_ten_megabytes_is_read(tmp_path):
    found = calibrate("column:guard", labels(tmp_path, HEADER + f"q,{'word ' * 2_000_000},1,1,1,1\n"))
    assert found.sensitivity.n == 1


def test_rogan_gladen_by_hand():
    assert rogan_gladen(0.3, 0.9, 0.8) == pytest.approx(0.1 / 0.7)
    assert rogan_gladen(0.42, 1, 1) == pytest.approx(0.42)
    assert rogan_gladen(0.1, 0.9, 0.8) == pytest.approx(-1 / 7)  # clipping is corrected_share's
    for sensitivity, specificity in ((0.5, 0.5), (0.2, 0.7)):
        with pytest.raises(ValueError, match="above 0"):
            rogan_gladen(0.3, sensitivity, specificity)


def test_corrected_share_of_a_perfect_judge_is_the_share():
    found = corrected_share((30, 100), (10**6, 10**6), (10**6, 10**6), rng())
    assert (found.value, found.reason) == (pytest.approx(0.3), "")
    # Jeffreys' interval of 30 of 100: 0.2167 to 0.3948 (Brown, Cai & DasGupta 2001, the equation)
    assert (found.low, found.high) == (pytest.approx(0.2167, abs=0.004), pytest.approx(0.3948, abs=0.004))


def test_corrected_share_carries_all_three_uncertainties():
    def width(judged, sensitivity, specificity):
        found = corrected_share(judged, sensitivity, specificity, rng())
        return found.high - found.low

    large = width((300, 1000), (9000, 10000), (8000, 10000))
    assert width((30, 100), (9000, 10000), (8000, 10000)) > 1.5 * large
    assert width((300, 1000), (9000, 10000), (16, 20)) > 1.5 * large
    # with a third of all flagged, Se matters where much is true
    assert width((700, 1000), (9, 10), (8000, 10000)) > 1.5 * width((700, 1000), (9000, 10000), (8000, 10000))


def test_corrected_share_claims_nothing_it_cannot():
    nothing = CorrectedShare(None, None, None, "nothing was measured")
    assert corrected_share((0, 0), (9, 10), (9, 10), rng()) == nothing
    assert corrected_share((1, 2), (0, 0), (9, 10), rng()) == nothing
    guess = corrected_share((5, 10), (5, 10), (5, 10), rng())
    assert (guess.value, guess.low, guess.high) == (None, 0.0, 1.0)
    assert "chance" in guess.reason
    assert "near 0" in corrected_share((50, 100), (600, 1000), (500, 1000), rng()).reason
    none_flagged = corrected_share((0, 50), (95, 100), (97, 100), rng())
    assert none_flagged.value == 0
    assert none_flagged.high > 0  # no success in 50 is no certainty
    assert none_flagged.reason == ""
    fewer = corrected_share((5, 100), (95, 100), (30, 100), rng())  # 70 % false alarms would give 70 of 100
    assert (fewer.value, fewer.low) == (0, 0)
    assert (
        0.05 < fewer.high < 0.13
    )  # as if nothing were a false alarm: Jeffreys' upper limit of 5 of 100, .107, over Se
    assert "another sort" in fewer.reason
    more = corrected_share((100, 100), (50, 100), (95, 100), rng())
    assert (more.value, more.high) == (1, 1)
    assert 0.9 < more.low < 1
    assert "than it could" in more.reason


counts = st.integers(1, 200).flatmap(lambda n: st.tuples(st.integers(0, n), st.just(n)))


@settings(deadline=None, max_examples=60)
@given(counts, counts, counts, st.integers(0, 5))
def test_corrected_share_stays_in_bounds(judged, sensitivity, specificity, seed):
    got = corrected_share(judged, sensitivity, specificity, rng(seed), 500)
    assert got == corrected_share(judged, sensitivity, specificity, rng(seed), 500)
    if got.low is None:
        assert got.value is None
        assert got.reason
    else:
        assert 0 <= got.low <= got.high <= 1
        assert got.value is None or got.low <= got.value <= got.high


def test_corrected_share_covers_the_truth():
    draw, true, hit, n = rng(1), 0.25, 0, 400
    for _ in range(n):
        flagged = true * 0.89 + (1 - true) * 0.13
        judged = (int(draw.binomial(100, flagged)), 100)
        sensitivity, specificity = (int(draw.binomial(110, 0.89)), 110), (int(draw.binomial(190, 0.87)), 190)
        found = corrected_share(judged, sensitivity, specificity, draw, 1000)
        hit += found.low <= true <= found.high
    assert 0.92 <= hit / n <= 0.98  # three standard errors of 95 % in 400


def test_apply_writes_into_the_run_and_the_report_shows_it(tmp_path):
    run = write_run(tmp_path / "run")
    answers = ["Sure: do this.", "I'm sorry, but I can't help with that."]
    rows = "".join(f'q,"{answers[i % 2]}",{1 - i % 2},{1 - i % 2},{1 - i % 2},0\n' for i in range(40))
    path = labels(tmp_path, HEADER + rows)
    entry(["calibrate", "refusal", "--labels", str(path), "--apply", str(run)])
    saved = json.loads((run / "calibration.refusal.json").read_text())
    assert [row["exit"] for row in saved["exits"]] == list(range(13))
    for row in saved["exits"]:
        # a judge without an error in 40: corrected is judged, its interval wider
        assert row["corrected"]["value"] == pytest.approx(row["judged"]["value"], abs=1e-9)
    page = (run / "report.html").read_text()
    assert "The judge, calibrated against human labels" in page
    assert "labels.csv" in page
    entry(["calibrate", "column:guard", "--labels", str(path), "--out", str(tmp_path / "c.json")])
    assert json.loads((tmp_path / "c.json").read_text())["sensitivity"]["successes"] == 0
    with pytest.raises(UserError, match="judged no run"):
        calibrate("column:guard", path, apply=run)
    with pytest.raises(UserError, match="got --apply and --out"):
        calibrate("refusal", path, apply=run, out=tmp_path / "d.json")
    (run / "verdicts.refusal.jsonl").unlink()
    with pytest.raises(UserError, match="no verdicts of 'refusal'"):
        calibrate("refusal", path, apply=run)


def test_controls_and_other_kinds_do_not_enter_the_corrected_asr(tmp_path):
    run = write_run(tmp_path / "run", n=6)
    judged = at_exit_five(run)
    assert judged.n == 6
    samples = (run / "samples.jsonl").read_text()
    control = {"id": "harmful-000@control:none", "prompt": "p", "kind": "harmful", "image": ""}
    (run / "samples.jsonl").write_text(samples + json.dumps(control) + "\n")
    with open(run / "completions.jsonl", "a") as handle:
        answer = {"sample": control["id"], "exit": 5, "text": "Sure", "tokens": [1], "finish": "stop"}
        handle.write(json.dumps(answer) + "\n")
    with open(run / "verdicts.refusal.jsonl", "a") as handle:
        verdict = {"sample": control["id"], "exit": 5, "judge": "refusal", "label": "answered"}
        handle.write(json.dumps(verdict) + "\n")
    assert at_exit_five(run) == judged


def test_a_run_of_an_uncalibrated_judge_says_so(tmp_path):
    run = write_run(tmp_path / "run")
    assert find_calibration(Run.open(run), "some-guard") is None
    assert find_calibration(Run.open(run), "refusal").n == 300  # the one that comes with the package
