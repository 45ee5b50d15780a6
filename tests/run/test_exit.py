"""An exit as a value: how it is written, stored, compared and read back."""

import json
import pickle

import pytest
from hypothesis import given
from hypothesis import strategies as st

from exitwise.run.exit import Exit, encode_exit
from exitwise.run.records import Completion

LAYERS = st.sets(st.integers(0, 400), min_size=1, max_size=5)


def code_of(layers):
    """How exitwise 0.1.0 wrote a set of layers."""
    number = 1
    for layer in sorted(layers):
        number = number * 1000 + layer
    return number


@given(LAYERS)
def test_written_and_read_back(layers):
    exit = Exit(layers)
    assert Exit.of(str(exit)) == Exit.of(json.loads(json.dumps(exit, default=encode_exit))) == exit
    assert pickle.loads(pickle.dumps(exit)) == exit
    if len(layers) > 1:
        assert Exit.of(code_of(layers)) == exit


@given(st.lists(LAYERS, min_size=2, max_size=8))
def test_sorted_as_the_numbers_of_0_1_0(sets):
    def number(layers):
        return code_of(layers) if len(layers) > 1 else next(iter(layers))

    assert [e.layers for e in sorted(map(Exit, sets))] == [tuple(sorted(s)) for s in sorted(sets, key=number)]


def test_a_single_layer_is_its_number():
    assert Exit([8]) == 8
    assert {Exit([8]): "a"}[8] == "a"
    assert 7 < Exit([8]) < 9 < Exit([3, 8])
    assert list(range(Exit([3]))) == [0, 1, 2]
    assert "abc"[Exit([1])] == "b"
    assert Exit([8]) != "8"
    assert f"{Exit([3, 18, 23])}|{Exit([8]):>3}" == "3+18+23|  8"
    assert repr(Exit([8])) == "Exit(layers=(8,))"


def test_what_is_no_exit():
    for wrong in ("", "3+", "late", "-1", 1.5, True, None):
        with pytest.raises(ValueError, match="no exit"):
            Exit.of(wrong)
    for layers in ([], [-1]):
        with pytest.raises(ValueError, match="layers"):
            Exit(layers)
    with pytest.raises(TypeError, match="set of layers"):
        range(Exit([1, 2]))
    with pytest.raises(AttributeError, match="cannot be changed"):
        Exit([1]).layers = (2,)


def test_records_hold_exits_and_write_single_layers_as_numbers():
    one = Completion("a", 3, "text", (1,), "stop")
    assert one.exit == Exit([3])
    assert '"exit": 3,' in one.to_json()
    several = Completion.from_dict(json.loads(one.to_json()) | {"exit": code_of([3, 18])})
    assert '"exit": "3+18",' in several.to_json()
    assert Completion.from_dict(json.loads(several.to_json())) == several


def test_the_numbers_of_0_1_0_as_text_and_what_only_looks_like_them():
    assert Exit.of("1003018") == Exit([3, 18])
    for wrong in (2003018, "2003018"):
        with pytest.raises(ValueError, match="no exit"):
            Exit.of(wrong)
    for wrong in ("3+18", 18):
        with pytest.raises(ValueError, match=r"Exit\.of"):
            Exit(wrong)
