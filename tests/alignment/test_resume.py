"""An alignment that is stopped anywhere, killed, or fails, resumes to the same bytes; errors name what to do."""

import errno
import json
import os
import pickle
import random
import resource
import signal
import subprocess
import sys
import time
from contextlib import contextmanager, suppress

import pytest
import torch
from safetensors.torch import load_file

from exitwise import UserError
from exitwise.alignment import batches
from exitwise.alignment.loop import align
from exitwise.alignment.state import State
from exitwise.cli.main import entry
from exitwise.run.exit import Exit
from tests.align_setup import VowelReward, config_of
from tests.alignment.runs import (
    EVERYTHING,
    SEED,
    Doing,
    StopError,
    Watched,
    assert_same_bytes,
    bytes_of,
    code_of,
    command,
    one_line,
    raiser,
    rows_of,
)
from tests.conftest import ROOT

pytestmark = pytest.mark.usefixtures("few_questions")


def test_a_run_holds_what_it_should(whole):
    out, _ = whole
    rows = rows_of(out)
    assert [row["step"] for row in rows] == [1, 2, 3, 4]
    keys = {"objective/kl", "objective/entropy", "objective/scores", "objective/non_score_reward",
            "objective/rlhf_reward", "policy/approxkl_avg", "policy/clipfrac_avg", "policy/entropy_avg",
            "loss/policy_avg", "loss/value_avg", "val/ratio", "val/clipfrac_avg", "theory/surrogate_gain",
            "theory/mean_kl", "theory/max_kl", "theory/mean_tv", "theory/return_before", "theory/return_after",
            "rollout/asr", "rollout/over_refusal", "rollout/vqa"}  # fmt: skip
    assert keys <= rows[0].keys()
    assert rows[0]["objective/kl"] == pytest.approx(0.0, abs=1e-5)  # the first rollout is the reference's
    assert rows[3]["objective/kl"] != pytest.approx(0.0, abs=1e-3)
    score, kl = json.loads((out / "checkpoints/step-000002/state.json").read_text())["measured"]
    assert rows[1]["theory/return_after"] == pytest.approx(score - rows[1]["kl_coef"] * kl)
    assert rows[2]["theory/return_before"] == pytest.approx(score - rows[2]["kl_coef"] * kl)  # the same answers
    assert "eval/asr@3" in rows[2]
    assert "eval/asr@3" not in rows[1]
    assert rows[1]["kl_coef"] != rows[0]["kl_coef"]
    assert {path.name for path in (out / "checkpoints").iterdir()} == {"step-000002", "step-000004"}
    assert {row["step"] for row in rows_of(out, "answers.jsonl")} == {1, 3}
    regret = json.loads((out / "regret.json").read_text())
    assert regret["best_score"] >= regret["score_before"]
    assert regret["regret_before"] == pytest.approx(regret["best_score"] - regret["score_before"])


def stop():
    raise StopError


def test_stopped_after_any_step_it_ends_with_the_same_bytes(whole, tiny_folder, material, tmp_path, vowels):
    """One run, stopped after step 1 (no checkpoint yet), after 3 (a step past its checkpoint) and after 4."""
    config = config_of(tiny_folder, material, **EVERYTHING)
    for step in (1, 3, 4):
        with pytest.raises(StopError):
            align(config, out=tmp_path / "run", progress=Doing(step, stop))
        assert not (tmp_path / "run/adapter").exists()
    align(config, out=tmp_path / "run")
    assert_same_bytes(tmp_path / "run", whole[0])


def test_stopped_within_any_step_it_ends_with_the_same_bytes(whole, tiny_folder, material, tmp_path, monkeypatch):
    """Whenever scores are asked for - in a rollout, after an update, for the regret - it may be the last thing done."""
    out, calls = whole
    config, rng = (
        config_of(tiny_folder, material, **EVERYTHING),
        random.Random(SEED),
    )
    for number in sorted(rng.sample(range(1, calls - 1), 2)):
        reward = Watched(raiser(number))
        monkeypatch.setattr("exitwise.alignment.setup.load_scores", lambda *_, reward=reward: reward)
        with suppress(StopError):  # a resumed run asks for fewer, so the later of the two may not come
            align(config, out=tmp_path / "run")
    monkeypatch.setattr("exitwise.alignment.setup.load_scores", lambda *_: VowelReward())
    align(config, out=tmp_path / "run")
    assert_same_bytes(tmp_path / "run", out)


def test_killed_at_any_moment_it_ends_with_the_same_bytes(tiny_folder, material, tmp_path):
    """A real kill of a real process, at a seeded moment after a seeded step."""
    options = {"steps": 6, "checkpoint_every": 2, "mix": (0.5, 0.5, 0.0), "probe": 2}
    config = config_of(tiny_folder, material, **options)
    align(config, out=tmp_path / "once")
    rng = random.Random(SEED)
    out, after = tmp_path / "killed", rng.randrange(1, 5)
    code = (
        "import pickle, sys; from exitwise import align; from exitwise.alignment import batches; "
        f"batches.VQA_QUESTIONS = {batches.VQA_QUESTIONS}; "
        "align(pickle.loads(bytes.fromhex(sys.argv[1])), out=sys.argv[2])"
    )
    environment = os.environ | {"OMP_NUM_THREADS": str(torch.get_num_threads())}
    process = subprocess.Popen(
        [sys.executable, "-c", code, pickle.dumps(config).hex(), str(out)], cwd=ROOT, env=environment
    )
    while process.poll() is None and not (
        (out / "metrics.jsonl").exists() and (out / "metrics.jsonl").read_bytes().count(b"\n") >= after
    ):
        time.sleep(0.005)
    time.sleep(rng.uniform(0, 0.2))
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL, "it was finished, or broken, before the kill"
    assert not (out / "adapter/exitwise.json").exists()
    align(config, out=out)
    assert_same_bytes(out, tmp_path / "once")


def test_ctrl_c_says_so_and_the_same_command_goes_on(tiny_folder, material, tmp_path, monkeypatch, capsys):
    words = command(tiny_folder, material, tmp_path / "run")
    reward = Watched(raiser(2, KeyboardInterrupt))
    monkeypatch.setattr("exitwise.alignment.setup.load_scores", lambda *_: reward)
    assert code_of(words) == 130
    assert "run the same command again to resume" in capsys.readouterr().err
    assert code_of(words) == 0
    assert [row["step"] for row in rows_of(tmp_path / "run")] == [1, 2]
    assert f"adapter: {tmp_path / 'run' / 'adapter'}" in capsys.readouterr().out
    assert code_of(words) == 0  # and a finished one is only told
    assert "is finished" in capsys.readouterr().err


def test_another_config_is_refused(whole, tiny_folder, material):
    before = bytes_of(whole[0])
    with pytest.raises(UserError, match="lora_rank differ"):
        align(config_of(tiny_folder, material, **(EVERYTHING | {"lora_rank": 5})), out=whole[0])
    assert bytes_of(whole[0]) == before


def test_a_state_of_an_earlier_version_is_read():
    """exitwise 0.1.0 wrote the set of layers 3 and 18 as 1003018."""
    written = {"step": 2, "kl_coef": 0.05, "weights": {"3": 0.25, "1003018": 0.75}, "measured": [0.5, 1.5]}
    state = State.from_json(written)
    assert state.weights == {Exit([3]): 0.25, Exit([3, 18]): 0.75}
    assert state.to_json() == written | {"weights": {"3": 0.25, "3+18": 0.75}}


class NanAt(Watched):
    def __init__(self, fatal):
        super().__init__()
        self.fatal = fatal

    def scores(self, prompts, answers):
        found = super().scores(prompts, answers)
        return found * float("nan") if self.calls == self.fatal else found


@pytest.mark.parametrize("fatal", ["first", "third rollout"])
def test_a_reward_that_is_no_number_stops_and_a_mended_one_goes_on(
    whole, tiny_folder, material, tmp_path, monkeypatch, capsys, fatal
):
    """Calls are: probe, then rollout and probe of each step. Exits' weights are drawn anew in the third step."""
    number = {"first": 2, "third rollout": 6}[fatal]
    config = config_of(tiny_folder, material, **EVERYTHING)
    reward = NanAt(number)
    monkeypatch.setattr("exitwise.alignment.setup.load_scores", lambda *_: reward)
    with pytest.raises(UserError, match="fix the reward model and run the same command again"):
        align(config, out=tmp_path / "run")
    done = {"first": 0, "third rollout": 2}[fatal]
    newest = max((tmp_path / "run/checkpoints").iterdir())
    assert newest.name == f"step-{done:06d}"
    assert all(torch.isfinite(t).all() for t in load_file(newest / "trainable.safetensors").values())
    monkeypatch.setattr("exitwise.alignment.setup.load_scores", lambda *_: VowelReward())
    align(config, out=tmp_path / "run")
    assert_same_bytes(tmp_path / "run", whole[0])


def test_a_gradient_that_is_no_number_stops_and_leaves_the_checkpoint(tiny_folder, material, tmp_path, monkeypatch):
    """A score that is finite and too large for the square of its return."""

    class Huge(VowelReward):
        def scores(self, prompts, answers):
            return super().scores(prompts, answers) * 1e30

    monkeypatch.setattr("exitwise.alignment.setup.load_scores", lambda *_: Huge())
    with pytest.raises(UserError, match=r"step 1: the gradient norm is (nan|inf)"):
        align(config_of(tiny_folder, material), out=tmp_path / "run")
    assert not list((tmp_path / "run").glob("checkpoints/*"))


@contextmanager
def small_disk(folder):
    """(a callable that fills what is left, one that makes room) for a file system of its own; without the right to
    mount one, a limit on the size of files, whose error is a real one too."""
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=2m", "tmpfs", str(folder)], capture_output=True, check=False
    )
    if mounted.returncode == 0:
        try:
            filler = folder / "filler"

            def fill():
                free = os.statvfs(folder).f_bavail * os.statvfs(folder).f_frsize
                filler.write_bytes(bytes(free - 40 * 1024))

            yield fill, filler.unlink
        finally:
            subprocess.run(["umount", "--lazy", str(folder)], check=True)  # what was read may still be mapped
        return
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    try:
        yield (
            lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (40 * 1024, hard)),
            lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard)),
        )
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_a_full_disk_at_a_checkpoint_leaves_the_one_before(whole, tiny_folder, material, tmp_path, vowels):
    config, disk = config_of(tiny_folder, material, **EVERYTHING), tmp_path / "disk"
    disk.mkdir()
    with small_disk(disk) as (fill, make_room):
        with pytest.raises(UserError, match=r"cannot write .*; free space, then run the same command again"):
            align(config, out=disk / "run", progress=Doing(3, fill))
        assert [path.name for path in (disk / "run/checkpoints").glob("step-??????")] == ["step-000002"]
        make_room()
        align(config, out=disk / "run")
        assert_same_bytes(disk / "run", whole[0])


def test_a_full_disk_is_one_line_on_the_command_line(tiny_folder, material, tmp_path, capsys):
    disk = tmp_path / "disk"
    disk.mkdir()
    with small_disk(disk) as (fill, _):
        fill()
        with pytest.raises((SystemExit, OSError)) as stopped:
            entry(command(tiny_folder, material, disk / "run", "--lora-rank", "64"))
        if isinstance(stopped.value, OSError):  # a limit on files is no full disk
            assert stopped.value.errno == errno.EFBIG
        else:
            assert isinstance(stopped.value, SystemExit)
            assert stopped.value.code == 2
            assert "free space" in one_line(capsys)


def test_a_broken_checkpoint_is_named(whole, tiny_folder, material, tmp_path, vowels):
    config = config_of(tiny_folder, material, **EVERYTHING)
    with pytest.raises(StopError):
        align(config, out=tmp_path / "run", progress=Doing(4, stop))
    newest = tmp_path / "run/checkpoints/step-000004"
    for name in ("trainable.safetensors", "state.json"):
        kept = (newest / name).read_bytes()
        (newest / name).write_bytes(kept[: len(kept) // 2])
        with pytest.raises(UserError, match="step-000004"):
            align(config, out=tmp_path / "run")
        (newest / name).write_bytes(kept)
    for path in newest.iterdir():
        path.unlink()
    newest.rmdir()  # as the message says
    align(config, out=tmp_path / "run")
    assert_same_bytes(tmp_path / "run", whole[0])


def test_worst_follows_its_own_small_audits(whole):
    weights = json.loads((whole[0] / "checkpoints/step-000004/state.json").read_text())["weights"]
    even = dict.fromkeys((0, 1, 3), 1 / 3)
    asr = {exit: rows_of(whole[0])[2][f"eval/asr@{exit}"] for exit in even}
    assert {int(k): v for k, v in weights.items()} == pytest.approx(batches.next_weights(even, asr))
