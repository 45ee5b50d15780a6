"""A finished run that the tests of audits share."""

import pytest

from exitwise import audit
from tests.auditing.runs import config_of


@pytest.fixture(scope="module")
def finished(tiny_folder, tmp_path_factory):
    out = tmp_path_factory.mktemp("run") / "a"
    audit(config_of(tiny_folder), out=out)
    return out
