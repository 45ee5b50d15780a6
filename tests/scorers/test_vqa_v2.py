"""The published VQA-v2 rule, quirk by quirk, with numbers worked out by hand."""

import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from exitwise.scorers.vqa_v2 import CONTRACTIONS, vqa_accuracy

OTHER = ["a dog"]


def nine(answer: str) -> list[str]:
    """Nine people said this and one another thing, so the answers differ and are normalised."""
    return [answer] * 9 + OTHER


@pytest.mark.parametrize(
    ("people", "accuracy"), [(0, 0), (1, 0.3), (2, 0.6), (3, 0.9), (4, 1), (5, 1), (9, 1), (10, 1)]
)
def test_each_person_is_left_out_in_turn(people, accuracy):
    """Of 3 who agree with the model, each sees 2 others (2/3) and the 7 rest see 3 (1): (3 * 2/3 + 7) / 10 = 0.9."""
    answers = ["red"] * people + [f"colour {i}" for i in range(10 - people)]
    assert vqa_accuracy("red", answers) == accuracy


CASES = [
    # (what is shown, answers, prediction, official, always)
    ("unanimous: letter case counts", ["yes"] * 10, "Yes", 0, 1),
    ("unanimous: a full stop counts", ["yes"] * 10, "yes.", 0, 1),
    ("unanimous: a number word is no digit", ["2"] * 10, "two", 0, 1),
    ("unanimous: an article counts", ["the beach"] * 10, "beach", 0, 1),
    ("unanimous: blanks, tabs and newlines around are stripped all the same", ["yes"] * 10, "\tyes\n ", 1, 1),
    ("unanimous before newlines are blanks is unanimous after", ["on top"] * 5 + ["on\ntop"] * 5, "On top", 0, 1),
    ("differing in letter case is differing", ["yes"] * 9 + ["Yes"], "YES.", 1, 1),
    ("a full stop at the end goes", nine("2"), "2.", 1, 1),
    ("a full stop after a digit goes too: the look-behind never fails", nine("3b"), "3.b", 1, 1),
    ("a full stop before a digit stays", nine("25"), "2.5", 0, 0),
    ("... also where nothing is before it", nine("5"), ".5", 0, 0),
    ("32 full stops go", nine("yes"), "yes" + "." * 32, 1, 1),
    ("and no more", nine("yes"), "yes" + "." * 33, 0, 0),
    ("a digit of another script is none for the published code", nine("٣٣"), "٣.٣", 1, 0),
    ("a mark between letters becomes a blank", nine("red blue"), "red/blue", 1, 1),
    ("a mark that touches a blank goes", nine("red blue"), "red, blue", 1, 1),
    ("it goes everywhere then", nine("tshirt jeans"), "t-shirt -jeans", 1, 1),
    ("each mark for itself", nine("t shirt jeans"), "t-shirt, jeans", 1, 1),
    ("a mark at an end leaves nothing", nine("yes"), "(yes!)", 1, 1),
    ("a comma in a number takes all marks out", nine("redblue 1000"), "red/blue 1,000", 1, 1),
    ("two commas are no number for the published code", nine("1 000"), "1,,000", 1, 0),
    ("... but for lmms-eval", nine("1000"), "1,,000", 0, 1),
    ("an apostrophe is no mark", nine("dogs"), "dog's", 0, 0),
    ("a colon is no mark", nine("10 30"), "10:30", 0, 0),
    ("number words up to ten", nine("10"), "ten", 1, 1),
    ("eleven is a word", nine("11"), "eleven", 0, 0),
    ("none is a number", nine("0"), "none", 1, 1),
    ("people's answers are normalised too", nine("None"), "0", 1, 1),
    ("articles go anywhere", nine("man on bike"), "the man on a bike", 1, 1),
    ("even where nothing is left", nine("a"), "The", 1, 1),
    ("contractions get their apostrophe", nine("don't"), "DONT", 1, 1),
    ("one of two apostrophes", nine("couldn't've"), "couldnt've", 1, 1),
    ("both missing is unknown", nine("couldn't've"), "couldntve", 0, 0),
    ("capital entries never apply", nine("I'm"), "im", 0, 0),
    ("the entry that stands the wrong way round", nine("somebodyd"), "somebody'd", 1, 1),
    ("no spelling is mended inside a word", nine("won't"), "wonts", 0, 0),
    ("an empty prediction is wrong", nine("yes"), "", 0, 0),
    ("a sentence around the answer is wrong", nine("yes"), "Yes, there is", 0, 0),
]


@pytest.mark.parametrize(
    ("answers", "prediction", "official", "always"), [c[1:] for c in CASES], ids=[c[0] for c in CASES]
)
def test_quirk(answers, prediction, official, always):
    assert vqa_accuracy(prediction, answers) == official
    assert vqa_accuracy(prediction, answers, "always") == always


def test_the_contraction_table_has_the_published_size():
    """120 entries published, of which 4 hold a capital (Im, Ive, I'dve, Id've) and 2 change nothing (let's, she's)."""
    assert len(CONTRACTIONS) == 120 - 4 - 2
    assert CONTRACTIONS["yall'd've"] == CONTRACTIONS["y'alld've"] == CONTRACTIONS["y'all'dve"] == "y'all'd've"


def test_bad_arguments():
    with pytest.raises(ValueError, match="no answers"):
        vqa_accuracy("red", [])
    with pytest.raises(ValueError, match="official, always"):
        vqa_accuracy("red", ["red"] * 10, "never")


WORDS = st.sampled_from(["yes", "Yes", "yes.", "no", "none", "0", "a", "the cat", "1,000", "1000", "dont", "don't", ""])
ANSWERS = st.lists(WORDS | st.text(max_size=6), min_size=1, max_size=12)


@given(ANSWERS, WORDS | st.text(max_size=12), st.sampled_from(["official", "always"]), st.randoms())
@settings(deadline=None)
def test_between_0_and_1_whatever_the_order(answers, prediction, normalise, rng):
    score = vqa_accuracy(prediction, answers, normalise)
    assert 0 <= score <= 1
    shuffled = list(answers)
    rng.shuffle(shuffled)
    assert vqa_accuracy(prediction, shuffled, normalise) == score


@given(st.lists(st.sampled_from(["red", "blue", "green"]), min_size=10, max_size=10))
def test_as_published_to_the_two_decimals_that_are_published(answers):
    """The published mean adds floats in the order of the answers."""
    total = 0.0
    for person in range(10):
        others = answers[:person] + answers[person + 1 :]
        total += min(1, float(len([answer for answer in others if answer == "red"])) / 3)
    assert round(100 * vqa_accuracy("red", answers), 2) == round(100 * (total / 10), 2)


def test_ten_answers_score_one_of_five_values():
    rng = random.Random(0)
    seen = {vqa_accuracy("red", [rng.choice(["red", "blue", "x", "y", "z"]) for _ in range(10)]) for _ in range(300)}
    assert seen == {0, 0.3, 0.6, 0.9, 1}
