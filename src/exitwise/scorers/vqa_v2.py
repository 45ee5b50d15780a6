"""VQA-v2 accuracy as a scorer: a fraction for each answer (judges/vqa_v2.py has the rule)."""

from collections.abc import Sequence

from ..run.records import Completion, Sample
from .base import About, Mark, Pair
from .vqa_accuracy import Normalise, vqa_accuracy

PEOPLE = 10


class VqaV2:
    """`vqa-v2` is the official rule, `vqa-v2-always` the variant that always normalises (lmms-eval)."""

    batch_size = 4096

    def __init__(self, normalise: Normalise = "official"):
        self.normalise = normalise
        self.about = About(
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

    def score(self, batch: Sequence[Pair]) -> list[Mark]:
        return [self._mark(sample, completion) for sample, completion in batch]

    def _mark(self, sample: Sample, completion: Completion) -> Mark:
        """An empty answer is wrong, as in the published rule; a sample without ten people's answers has no accuracy."""
        if len(sample.answers) != PEOPLE:
            n = len(sample.answers)
            return Mark(None, f"the rule needs the answers of {PEOPLE} people, the sample has {n}")
        return Mark(vqa_accuracy(completion.text, sample.answers, self.normalise))
