"""Two processes (gloo, CPU) make the update of one on the same global batch, and the first alone writes the run."""

import json
import os
import socket
import subprocess
import sys

import pytest
import torch
from safetensors.torch import load_file

from exitwise import UserError
from exitwise.alignment.setup import check_share
from tests.align_setup import CHEAP, DISTRIBUTED, VowelReward, align_all, config_of, write_material
from tests.conftest import ROOT

MEASURED = {"timing.json", "env.json", ".lock"}  # never the same twice


def launch(processes: int, *arguments: str) -> None:
    """`tests.align_setup` in so many processes, with the variables that torchrun sets; raises with what they said."""
    probes = [socket.create_server(("127.0.0.1", 0)) for _ in range(3)]
    ports = [str(probe.getsockname()[1]) for probe in probes]
    for probe in probes:
        probe.close()
    shared = {"WORLD_SIZE": processes, "LOCAL_WORLD_SIZE": processes, "MASTER_ADDR": "127.0.0.1",
              "ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": torch.get_num_threads(),
              "PYTHONPATH": f"{ROOT}:{ROOT / 'src'}"}  # fmt: skip
    running = [
        subprocess.Popen(
            [sys.executable, "-m", "tests.align_setup", *arguments, *ports],
            cwd=ROOT, text=True, stderr=subprocess.PIPE,
            env=os.environ | {k: str(v) for k, v in (shared | {"RANK": rank, "LOCAL_RANK": rank}).items()},
        )
        for rank in range(processes)
    ]  # fmt: skip
    try:
        said = [process.communicate(timeout=600)[1] for process in running]
    finally:
        for process in running:
            process.kill()
    assert [process.returncode for process in running] == [0] * processes, "\n".join(said)[-3000:]


@pytest.fixture(scope="module")
def runs(tiny_folder, tmp_path_factory):
    """{number of processes: folder of its runs}."""
    material = tmp_path_factory.mktemp("material")
    write_material(material)
    found = {processes: tmp_path_factory.mktemp(f"processes{processes}") for processes in (1, 2)}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("exitwise.alignment.setup.load_scores", lambda *_: VowelReward())
        align_all(tiny_folder, material, found[1])
    launch(2, str(tiny_folder), str(material), str(found[2]))
    return found


def files_of(folder):
    return {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()}


@pytest.mark.slow
@pytest.mark.parametrize("method", list(DISTRIBUTED))
def test_two_processes_make_the_update_of_one(runs, method):
    steps = CHEAP["steps"]
    last = f"checkpoints/step-{steps:06d}"
    for name in (f"{last}/trainable.safetensors", f"{last}/optimizer.safetensors", "adapter/adapter_model.safetensors"):
        one, two = (load_file(runs[n] / method / name) for n in (1, 2))
        assert one.keys() == two.keys()
        for key, value in one.items():
            assert torch.allclose(value, two[key], rtol=1e-4, atol=3e-6), (name, key)  # 0.3 % of a step
    early, late = (load_file(runs[2] / method / f"checkpoints/step-00000{n}/trainable.safetensors") for n in (1, steps))
    moved = [float((early[key] - late[key]).abs().max()) for key in early]
    assert max(moved) > 1e-4  # or agreeing would be no news


@pytest.mark.slow
def test_two_processes_sample_and_log_what_one_does(runs):
    one, two = ((runs[n] / "l-ppo/answers.jsonl").read_text() for n in (1, 2))
    assert one == two
    assert len(one.splitlines()) == CHEAP["steps"] * CHEAP["batch_size"]
    for method in DISTRIBUTED:
        rows = [
            [json.loads(line) for line in (runs[n] / method / "metrics.jsonl").read_text().splitlines()] for n in (1, 2)
        ]
        for a, b in zip(*rows, strict=True):
            assert a.keys() == b.keys()
            for key, value in a.items():
                assert b[key] == (pytest.approx(value, rel=1e-4, abs=1e-5) if isinstance(value, float) else value), key
    one, two = (json.loads((runs[n] / "l-ppo/regret.json").read_text()) for n in (1, 2))
    assert one == pytest.approx(two, rel=1e-6)


@pytest.mark.slow
@pytest.mark.parametrize("method", list(DISTRIBUTED))
def test_only_the_first_process_writes(runs, method):
    """The same files as of one process, each line once; features are encoded once, too."""
    assert files_of(runs[2] / method) == files_of(runs[1] / method)
    for name in ("config.json", "plan.json"):
        assert (runs[2] / method / name).read_bytes() == (runs[1] / method / name).read_bytes()
    assert files_of(runs[2] / method) > MEASURED
    assert len((runs[2] / method / "metrics.jsonl").read_text().splitlines()) == CHEAP["steps"]


@pytest.mark.slow
def test_an_error_in_one_process_stops_all_of_them(runs):
    """The reward is no number in the second process only; the first would wait for it for ever."""
    said = [(runs[2] / f"said.{rank}").read_text() for rank in (0, 1)]
    assert said[0] == said[1]
    assert "with nan; training stopped" in said[0]
    assert [path.name for path in (runs[2] / "nan/checkpoints").iterdir()] == ["step-000000"]


def test_too_many_processes_for_a_batch_are_refused(tmp_path):
    config = config_of(tmp_path, tmp_path, batch_size=8, num_mini_batches=2, gradient_accumulation_steps=2)
    check_share(config, 2)
    with pytest.raises(UserError, match=r"one row for each of 3 processes; give at least 12"):
        check_share(config, 3)
