"""Fixtures of the tests of alignment."""

import pytest

from exitwise.alignment.loop import align
from tests.align_setup import VowelReward, config_of, write_material
from tests.alignment.runs import EVERYTHING, Watched
from tests.alignment.stage import Stage

QUESTIONS = 24


@pytest.fixture(scope="session")
def material(tmp_path_factory):
    folder = tmp_path_factory.mktemp("material")
    write_material(folder)
    return folder


@pytest.fixture
def vowels(monkeypatch):
    """Score answers by their vowels: a reward that differs from answer to answer and needs no model."""
    monkeypatch.setattr("exitwise.alignment.setup.load_scores", lambda *_: VowelReward())


@pytest.fixture
def few_questions(monkeypatch):
    """Fewer questions of easy-VQA: preparing all 1,200 would take longer than the steps."""
    monkeypatch.setattr("exitwise.alignment.batches.VQA_QUESTIONS", QUESTIONS)


@pytest.fixture(scope="session")
def whole(tiny_folder, material, tmp_path_factory):
    """(an uninterrupted run with everything on, how often it asked for scores)."""
    out, reward = tmp_path_factory.mktemp("whole") / "run", Watched()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("exitwise.alignment.setup.load_scores", lambda *_: reward)
        patch.setattr("exitwise.alignment.batches.VQA_QUESTIONS", QUESTIONS)
        align(config_of(tiny_folder, material, **EVERYTHING), out=out)
    return out, reward.calls


@pytest.fixture(scope="module", params=["clip", "dinov2"])
def stage(request, pictures, tmp_path_factory):
    return Stage(pictures, tmp_path_factory.mktemp("features"), request.param)


@pytest.fixture
def clip(pictures, tmp_path):
    """For tests that change it."""
    return lambda **options: Stage(pictures, tmp_path, **options)
