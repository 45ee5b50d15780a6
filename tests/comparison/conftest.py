"""Fixtures of the tests of comparison/."""

import pytest

from exitwise import compare
from tests.compare_fixture import write_run


@pytest.fixture
def compare_letters(tmp_path):
    """Compares two tables of letters: compare_letters(before, after); keywords go to the runs."""
    count = iter(range(1000))

    def go(before, after, one=None, two=None):
        folder = tmp_path / str(next(count))
        first, second = write_run(folder / "a", *before, **(one or {})), write_run(folder / "b", *after, **(two or {}))
        return compare(first, second)

    return go
