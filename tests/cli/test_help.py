"""`--help`: paragraphs flow, and a typo names the option."""

import os
import subprocess
import sys

import pytest

from exitwise.cli.main import entry


@pytest.mark.parametrize(
    ("command", "sentence"),
    [
        ("align", "Layers joined by + are one exit that fuses them: 3+18+23."),
        ("audit", "separated by commas"),
    ],
)
def test_paragraphs_flow(command, sentence):
    """On a wide terminal the sentence stands on one line, although it spans two in the source."""
    words = [sys.executable, "-m", "exitwise", command, "--help"]
    shown = subprocess.run(
        words, capture_output=True, text=True, check=True, env=os.environ | {"COLUMNS": "300"}
    ).stdout
    assert sentence in shown


def test_a_typo_is_told_with_exit_code_2(capsys):
    with pytest.raises(SystemExit) as stop:
        entry(["audit", "testbed", "--exts", "3"])
    assert stop.value.code == 2
    assert "--exits" in capsys.readouterr().err
