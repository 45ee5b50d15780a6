"""Loads VQA questions: easy-VQA (PyPI package easy-vqa 1.0, one coloured shape an image) and VQA-v2."""

import os
import random
from collections import Counter, defaultdict
from pathlib import Path
from typing import Literal

from ..errors import UserError
from ..run.records import Sample
from .prompts import Loaded, Place, collect
from .rows import object_row, read_json, show

SHAPES = ("circle", "rectangle", "triangle")
ANNOTATORS = 10
MAX_JSON = 2**30
"""Bytes: the annotations of VQA-v2's training part are 400 MB."""


def easy_vqa(
    split: Literal["train", "test"] = "test", n: int | None = 60, images: int = 10, seed: int = 0
) -> list[Sample]:
    """`n` questions over exactly `images` images, in the order of the data; n=None gives the whole split.

    Each image gets n/images questions, rounded up or down: an image is encoded once for all of its questions. The
    types (yes/no, shape, colour) have about the shares they have in the data. The same seed gives the same questions.

    Raises:
        UserError: unknown split, or more questions or images than the data have.
    """
    samples = _split(split)
    return samples if n is None else _pick(samples, n, images, seed)


def _split(split: str) -> list[Sample]:
    import easy_vqa as package

    readers = {"train": package.get_train_questions, "test": package.get_test_questions}
    if split not in readers:
        raise UserError(f"easy-vqa split is {split!r}; expected train or test")
    rows = zip(*readers[split](), strict=True)
    return [
        Sample(
            id=f"easy-vqa-{split}-{number}",
            prompt=question,
            kind="vqa",
            image=f"easy-vqa:{split}/{image}",
            category=_question_type(answer),
            answers=(answer,),
            source=f"easy-vqa 1.0 {split}:{number}",
        )
        for number, (question, answer, image) in enumerate(rows)
    ]


def _question_type(answer: str) -> str:
    if answer in ("yes", "no"):
        return "yes/no"
    return "shape" if answer in SHAPES else "colour"


def _pick(samples: list[Sample], n: int, images: int, seed: int) -> list[Sample]:
    if not 1 <= images <= n:
        raise UserError(f"{n} questions over {images} images; expected at least one image and one question an image")
    by_image = defaultdict(list)
    for index, sample in enumerate(samples):
        by_image[sample.image].append(index)
    each = -(-n // images)
    enough = [name for name, indices in by_image.items() if len(indices) >= each]
    if len(enough) < images:
        raise UserError(
            f"{n} questions over {images} images are {each} an image, which {len(enough)} images have; "
            "ask for fewer questions or images"
        )
    draw = random.Random(seed)
    chosen = draw.sample(enough, images)
    for name in chosen:
        draw.shuffle(by_image[name])
    shares = {kind: count / len(samples) for kind, count in Counter(s.category for s in samples).items()}
    picked: list[int] = []
    taken: Counter[str] = Counter()
    for turn in range(n):
        left = by_image[chosen[turn % images]]
        # of what this image still has, the type that lags its share the most
        index = max(left, key=lambda i: shares[samples[i].category] * (turn + 1) - taken[samples[i].category])
        left.remove(index)
        taken[samples[index].category] += 1
        picked.append(index)
    return [samples[index] for index in sorted(picked)]


def vqa_v2(questions: Path, annotations: Path, images: Place, prefix: str = "vqav2") -> Loaded:
    """VQA-v2 from its official files (visualqa.org) and a folder of MS-COCO images named as COCO names them.

    `answers` are the ten annotators' in their order, `category` is the answer type (yes/no, number, other), the id is
    `<prefix>:<question_id>`. Questions without annotation, with another number of answers, or whose image is not in the
    folder are skipped.

    Raises:
        UserError: a file cannot be read or has another layout.
    """
    asked, annotated = _items(questions, "questions"), _items(annotations, "annotations")
    known = {n["question_id"]: n for n in annotated if isinstance(n, dict) and isinstance(n.get("question_id"), int)}
    part = "train2014" if "train2014" in questions.name else "val2014"
    there = {name for name in os.listdir(images.folder) if name.endswith(".jpg")} if images.folder.is_dir() else set()

    def adapt(cells: dict[str, object]) -> dict[str, object] | str:
        key, number = cells.get("question_id"), cells.get("image_id")
        if not isinstance(key, int):
            return "the question_id is not a number"
        note = known.get(key)
        if note is None:
            return "the question has no annotation"
        if not isinstance(number, int):
            return "the image_id is not a number"
        answers = note.get("answers")
        if not isinstance(answers, list) or len(answers) != ANNOTATORS:
            return f"the annotation has not {ANNOTATORS} answers"
        file = f"COCO_{part}_{number:012d}.jpg"
        if file not in there:
            return f"the image is missing ({file})"
        fields = {"id": key, "prompt": cells.get("question"), "category": note.get("answer_type")}
        return fields | {"image": file, "answers": answers}

    rows = (object_row(f"item {n}", item) for n, item in enumerate(asked, start=1))
    return collect(rows, questions.name, "vqa", prefix, adapt, images)


def _items(path: Path, key: str) -> list[object]:
    value = read_json(path, MAX_JSON)
    if not isinstance(value, dict) or not isinstance(value.get(key), list):
        raise UserError(f"{show(path)} has no list {key!r}; expected the {key} file of VQA-v2 from visualqa.org")
    return value[key]
