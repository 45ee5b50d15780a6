"""Every family as a fixture, and images of three shapes."""

import functools

import numpy as np
import pytest
from PIL import Image

from tests.families import TINY

SIZES = {"wide": (60, 40), "tall": (30, 75), "small": (20, 20)}


@functools.cache
def family_model(name):
    return TINY[name]()


@pytest.fixture(scope="module", params=list(TINY))
def vlm(request):
    return family_model(request.param)


@pytest.fixture(scope="module")
def images():
    random = np.random.default_rng(0)
    return {
        name: Image.fromarray(random.integers(0, 256, (height, width, 3), dtype=np.uint8))
        for name, (width, height) in SIZES.items()
    }
