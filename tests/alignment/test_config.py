"""config.json keeps its bytes: a run that an earlier version began resumes only under the same keys and values."""

from pathlib import Path

from accelerate.state import AcceleratorState

from exitwise.cli.main import entry
from tests.auditing.test_config import write_inputs

BEFORE = Path(__file__).parent / "config_before.json"
"""Written by the last commit whose configs had all options in one class."""


def test_config_json_of_an_alignment(tiny_folder, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write_inputs(tmp_path, tiny_folder)
    words = ["align", "tiny", "--exits", "1", "--prompts", "mine.csv", "more.csv", "--map", "prompt=query,id=key"]
    words += ["--data", "xstest-safe:safe.csv", "--data", "own-benign:asked.csv", "--images", "pictures"]
    words += ["--image-root", "own-benign=pictures", "--steps", "1", "--batch-size", "4", "--num-mini-batches", "1"]
    words += ["--max-new-tokens", "2", "--reward", "matcher", "--probe", "0", "--best-of", "0", "--seed", "3"]
    entry([*words, "--method", "sft", "--device", "cpu", "--out", "run"])
    AcceleratorState._reset_state(reset_partial_state=True)
    assert (tmp_path / "run/config.json").read_bytes().replace(bytes(tmp_path), b"HERE") == BEFORE.read_bytes()
