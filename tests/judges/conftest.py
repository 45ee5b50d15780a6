"""Tiny guards on disk."""

import pytest

from tests.guard_fixture import SHAPES, save_guard


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory):
    """By guard, a checkpoint of its family; made when asked for."""
    folder, made = tmp_path_factory.mktemp("guards"), {}

    def get(name, always="", **changes):
        key = (name, always, tuple(changes.items()))
        if key not in made:
            context = changes.pop("context", 4096)
            shape = SHAPES[name]._replace(**changes)
            made[key] = save_guard(folder / f"{len(made)}", shape, always, context)
        return str(made[key])

    return get
