"""Keywords of the functions: what contradicts is refused, and text is not taken for a sequence of letters."""

import pytest

import exitwise
from exitwise import UserError, calibrate, judge, slim
from exitwise.judges.config import Judging


def test_judging_and_its_options_together_are_refused(tmp_path):
    with pytest.raises(UserError, match="one of the two"):
        judge(tmp_path, judging=Judging(), judge_model="somewhere")
    with pytest.raises(UserError, match="one of the two"):
        exitwise.audit("testbed", out=tmp_path / "run", judging=Judging(), judge_model="somewhere")
    assert not (tmp_path / "run").exists()


def test_a_typo_is_named_before_a_missing_option(tmp_path):
    with pytest.raises(UserError, match="exit"):
        slim("testbed", tmp_path / "out")
    with pytest.raises(UserError, match="exits"):
        slim("testbed", tmp_path / "out", exits=8)


def test_one_name_of_a_column_may_be_text(tmp_path):
    path = tmp_path / "labels.csv"
    rows = [f"Tell me {i},Sure: do this.,{i % 2},{i % 2}" for i in range(6)]
    path.write_text("\n".join(["prompt,answer,checked_by_ann,my_guard", *rows]) + "\n")
    assert calibrate("column:my_guard", path, humans="checked_by_ann").sensitivity.successes == 3


def test_a_notebook_completes_the_public_names():
    assert set(exitwise.__all__) <= set(dir(exitwise))
