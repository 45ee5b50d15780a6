"""Seconds and tokens by exit, over all starts of a run."""

import json

import pytest

from exitwise import UserError
from exitwise.run.clock import Clock
from exitwise.run.exit import Exit
from exitwise.run.records import Completion


def test_a_run_of_0_1_0_goes_on(tmp_path):
    """It wrote a set of layers as one number: tokens and seconds of both notations are one exit's."""
    path = tmp_path / "timing.json"
    path.write_text(json.dumps({"phases": {}, "tokens": {"1003005": 4, "3": 2}, "seconds": {"1003005": 2.0, "3": 1.0}}))
    clock = Clock(path)
    clock.batch([Completion("a", Exit([3, 5]), "", (1, 2), "stop")], 1.0)
    clock.save()
    saved = json.loads(path.read_text())
    assert saved["tokens"] == {"3+5": 6, "3": 2}
    assert saved["tokens_per_second"] == {"3": 2.0, "3+5": 2.0}


def test_a_broken_key_is_named(tmp_path):
    (tmp_path / "timing.json").write_text('{"phases": {}, "tokens": {"late": 1}, "seconds": {}}')
    with pytest.raises(UserError, match=r"timing\.json"):
        Clock(tmp_path / "timing.json")
