"""The run that the scorer tests score."""

from pathlib import Path

import pytest

from tests.score_setup import write_run


@pytest.fixture
def run(tmp_path) -> Path:
    return write_run(tmp_path / "run")
