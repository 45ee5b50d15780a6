"""VQA-v2 accuracy: how many of ten human annotators gave the model's answer.

Source: Agrawal et al. 2015 (VQA), Goyal et al. 2017 (VQA-v2), and the evaluation code that the authors publish
(GT-Vision-Lab/VQA, vqaEval.py), whose quirks are part of every published figure and are kept:

- answers are normalised only where the people's answers differ from one another; else letter case and a full stop
  count;
- a mark of punctuation is taken out where it touches a blank anywhere in the answer, and becomes a blank elsewhere;
  where a comma stands between two digits anywhere, every mark is taken out ("red/blue 1,000" becomes "redblue 1000");
- a full stop goes unless a digit follows (the look-behind of the published expression is a typing slip that never
  fails); and only the first 32 go, since a flag landed in the place of a count;
- "none" is the number 0, and articles go wherever they stand, even the answer "a";
- contractions are looked up in lower case, so the entries that hold a capital I never apply ("im" stays "im"), and
  "somebody'd" loses its apostrophe instead of keeping it.

"always" is the variant of lmms-eval (checked against its state of August 2026): answers are always normalised,
a run of commas between digits counts as one, and a digit may be of any script.

Departs from the published code in the last bit: the mean of ten is rounded once, so it does not depend on the order of
the answers. At the two decimals of a per cent that the published code reports there is no difference.
"""

import re
from collections.abc import Sequence
from math import fsum
from typing import Literal, get_args

from ..run.records import Completion, Sample
from .base import ScoredAnswer, ScorerInfo, ScorerInput

Normalise = Literal["official", "always"]
ANNOTATORS = 10
"""Human answers to a question of VQA-v2."""

MARKS = ';/[]"{}()=+\\_-><@`,?!'
ARTICLES = frozenset(("a", "an", "the"))
NUMBERS = {"none": "0", "zero": "0", "one": "1", "two": "2", "three": "3", "four": "4", "five": "5", "six": "6"}
NUMBERS |= {"seven": "7", "eight": "8", "nine": "9", "ten": "10"}
MOST_FULL_STOPS = 32
COMMA_IN_NUMBER = {"official": re.compile(r"\d,\d", re.ASCII), "always": re.compile(r"\d,+\d")}
FULL_STOP = {"official": re.compile(r"\.(?!\d)", re.ASCII), "always": re.compile(r"\.(?!\d)")}

SPELLINGS = """
ain't aren't can't could've couldn't couldn't've didn't doesn't don't hadn't hadn't've hasn't haven't he'd he'd've he's
how'd how'll how's isn't it'd it'd've it'll ma'am mightn't mightn't've might've mustn't must've needn't not've o'clock
oughtn't 'ow's'at shan't she'd've should've shouldn't shouldn't've somebody'd've somebody'll somebody's someone'd
someone'd've someone'll someone's something'd something'd've something'll that's there'd there'd've there're there's
they'd they'd've they'll they're they've 'twas wasn't we'd've we've weren't what'll what're what's what've when's
where'd where's where've who'd who'd've who'll who's who've why'll why're why's won't would've wouldn't wouldn't've
y'all y'all'll y'all'd've you'd you'd've you'll you're you've
"""


def _contractions(spellings: str) -> dict[str, str]:
    """Each spelling with any one of its apostrophes forgotten -> the spelling: what the published table comes to."""
    table = {
        word[:place] + word[place + 1 :]: word
        for word in spellings.split()
        for place, character in enumerate(word)
        if character == "'"
    }
    return table | {"somebody'd": "somebodyd"}  # the published entry stands the wrong way round


CONTRACTIONS = _contractions(SPELLINGS)


class VqaV2Scorer:
    """`vqa-v2` is the official rule, `vqa-v2-always` the variant that always normalises (lmms-eval)."""

    batch_size = 4096

    def __init__(self, normalise: Normalise = "official"):
        self.normalise = normalise
        self.info = ScorerInfo(
            name="vqa-v2" if normalise == "official" else "vqa-v2-always",
            backend="VQA-v2 accuracy",
            version="1",
            quantity="accuracy",
            kinds=("vqa",),
            settings={"normalise": normalise},
            licence="none: a formula",
        )

    def key(self, sample: Sample, completion: Completion) -> tuple[str, ...]:
        return sample.id, completion.text

    def score(self, batch: Sequence[ScorerInput]) -> list[ScoredAnswer]:
        return [self._score(sample, completion) for sample, completion in batch]

    def _score(self, sample: Sample, completion: Completion) -> ScoredAnswer:
        """An empty answer is wrong, as in the published rule; a sample without ten human answers has no accuracy."""
        if len(sample.answers) != ANNOTATORS:
            n = len(sample.answers)
            return ScoredAnswer(None, f"the rule needs the answers of {ANNOTATORS} people, the sample has {n}")
        return ScoredAnswer(vqa_accuracy(completion.text, sample.answers, self.normalise))


def vqa_accuracy(prediction: str, answers: Sequence[str], normalise: Normalise = "official") -> float:
    """Mean over the people of min(1, how many of the others gave this answer / 3): 0, 0.3, 0.6, 0.9 or 1 of ten.

    Args:
        prediction: the model's whole answer; a sentence around the right word does not count.
        answers: each person's answer, one entry a person (ten in VQA-v2), in any order.
        normalise: "official" as published, "always" as lmms-eval has it.

    Raises:
        ValueError: there are no answers, or there is no such way to normalise.
    """
    if not answers:
        raise ValueError("no answers; expected each person's answer (ten in VQA-v2)")
    if normalise not in get_args(Normalise):
        raise ValueError(f"normalise is {normalise!r}; expected one of: {', '.join(get_args(Normalise))}")
    answered, given = [_one_line(answer) for answer in answers], _one_line(prediction)
    if normalise == "always" or len(set(answered)) > 1:
        answered, given = [_normal(answer, normalise) for answer in answered], _normal(given, normalise)
    same = [answer == given for answer in answered]
    return fsum(min(1.0, (sum(same) - own) / 3) for own in same) / len(same)


def _one_line(answer: str) -> str:
    return answer.replace("\n", " ").replace("\t", " ").strip()


def _normal(answer: str, normalise: Normalise) -> str:
    """Punctuation first, then words: numbers, articles, contractions, in this order."""
    words = [NUMBERS.get(word, word) for word in _unmarked(answer, normalise).lower().split()]
    return " ".join(CONTRACTIONS.get(word, word) for word in words if word not in ARTICLES)


def _unmarked(answer: str, normalise: Normalise) -> str:
    in_number = COMMA_IN_NUMBER[normalise].search(answer) is not None
    text = answer
    for mark in MARKS:  # what touches a blank is judged in the answer as it came
        gone = in_number or f"{mark} " in answer or f" {mark}" in answer
        text = text.replace(mark, "" if gone else " ")
    return FULL_STOP[normalise].sub("", text, count=MOST_FULL_STOPS)
