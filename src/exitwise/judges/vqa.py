"""Compares a VQA answer with the accepted answers: correct or wrong.

After Agrawal et al. 2015 (VQA): lower case, no punctuation, no leading article. Departs from it in two ways: an answer
is correct when it begins with any accepted answer (the built-in sets have one): "Yes, there is." for "yes".
"""

import re

from ..run.records import Completion, Label, Sample


def normalise(answer: str) -> list[str]:
    """Words of an answer: lower case, apostrophes dropped, other punctuation parted from words, 2.5 kept whole."""
    text = re.sub(r"['’`´]", "", answer.lower())
    text = re.sub(r"(?<!\d)[^\w\s]|[^\w\s](?!\d)|_", " ", text)
    return re.sub(r"^\s*(?:a|an|the)\s+(?=\S)", "", text).split()


def judge_vqa(sample: Sample, completion: Completion) -> tuple[Label, str]:
    """ "correct" where the answer is an accepted one or begins with it, else "wrong"; "unscored" with a reason."""
    if not completion.text.strip():
        return "unscored", "empty answer"
    accepted = [gold for gold in map(normalise, sample.answers) if gold]
    if not accepted:
        return "unscored", "the sample has no accepted answer"
    given = normalise(completion.text)
    for gold in accepted:
        if given[: len(gold)] == gold:
            return "correct", f"begins with {' '.join(gold)!r}"
    return "wrong", f"expected {' / '.join(' '.join(gold) for gold in accepted)}"
