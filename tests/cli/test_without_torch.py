"""Commands that read a finished run work where torch and transformers cannot be imported."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
from gguf import GGUFWriter

from exitwise.cli import entry
from tests.conftest import ROOT

BLOCKED = """
import sys
from importlib.abc import MetaPathFinder

class Absent(MetaPathFinder):
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in ("torch", "torchvision", "transformers", "tokenizers", "peft", "accelerate"):
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)

sys.meta_path.insert(0, Absent())
from exitwise.cli import entry
entry()
"""


@pytest.fixture(scope="module")
def run(tmp_path_factory, tiny_folder) -> Path:
    """A finished audit of a tiny model by the real command."""
    out = tmp_path_factory.mktemp("runs") / "tiny"
    entry([
        "audit", str(tiny_folder), "--exits", "1,default", "--limit", "3", "--max-new-tokens", "4", "--out", str(out),
    ])  # fmt: skip
    return out


def without_torch(*words: object) -> subprocess.CompletedProcess[str]:
    environment = os.environ | {"PYTHONPATH": str(ROOT / "src"), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-c", BLOCKED, *map(str, words)]
    return subprocess.run(command, env=environment, capture_output=True, text=True, check=False)


@pytest.mark.parametrize(
    "command", ["", "audit", "align", "judge", "score", "report", "compare", "calibrate", "table", "slim", "inspect"]
)
def test_help(command):
    done = without_torch(*filter(None, [command]), "--help")
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.startswith(f"usage: exitwise {command}".strip())


def test_report(run):
    (run / "report.html").unlink()
    done = without_torch("report", run)
    assert done.returncode == 0, done.stderr
    assert (run / "report.html").stat().st_size > 10_000


def test_judge_and_measure_again(run):
    verdicts, metrics = ((run / name).read_bytes() for name in ("verdicts.refusal.jsonl", "metrics.json"))
    (run / "verdicts.refusal.jsonl").unlink()
    done = without_torch("judge", run)
    assert done.returncode == 0, done.stderr
    assert ((run / "verdicts.refusal.jsonl").read_bytes(), (run / "metrics.json").read_bytes()) == (verdicts, metrics)


def test_compare(run, tmp_path):
    done = without_torch("compare", run, run, "--out", tmp_path)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "compare.html").is_file()


def test_table(run):
    done = without_torch("table", run)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("|") or "|" in done.stdout


def test_calibrate_of_a_column(tmp_path):
    rows = [f"Tell me {i},Sure: do this.,{i % 2},{i % 2},{i % 3 % 2}" for i in range(6)]
    labels = tmp_path / "labels.csv"
    labels.write_text("\n".join(["prompt,answer,human1,human2,my_guard", *rows]) + "\n")
    done = without_torch("calibrate", "column:my_guard", "--labels", labels, "--out", tmp_path / "out.json")
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "out.json").is_file()


def test_inspect_a_folder(tiny_folder):
    done = without_torch("inspect", tiny_folder)
    assert done.returncode == 0, done.stderr
    assert "transformers: exit 3" in done.stdout


def test_inspect_a_gguf_file(tmp_path):
    path = tmp_path / "mmproj.gguf"
    writer = GGUFWriter(path, "clip")
    writer.add_uint32("clip.vision.block_count", 2)
    writer.add_string("clip.projector_type", "mlp")
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    done = without_torch("inspect", path)
    assert done.returncode in (0, 1), done.stderr
    assert "llama.cpp: exit 1" in done.stdout


def test_what_needs_torch_fails_without(tiny_folder, tmp_path):
    """The block works: an audit cannot begin."""
    done = without_torch("audit", tiny_folder, "--out", tmp_path / "run")
    assert done.returncode != 0
    assert "torch" in done.stderr
