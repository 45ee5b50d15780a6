"""Alignment at the exits that a device will use: L-PPO (Bachu et al., 2025, section 4) and its baselines in one loop.

    requests at exits -> answers -> scores -> rewards after KL -> advantages -> clipped updates -> the next step

Encoder and projector are frozen, and not in memory once the image features of the training images are on disk; LoRA on
the language model and a linear value head are trained. Everything random depends on the seed and the step alone, and a
checkpoint holds the rest, so a killed run resumes to the same weights, bit for bit on a CPU in float32.

Departures from the paper, which published no code: batches may contain harmless prompts and VQA questions (--mix 1 0 0
leaves them out), and the return before and after each update is measured on fixed requests.

Several processes (`accelerate launch`) answer a share of the batch each, exchange the rollouts, and take a share of
every mini-batch, so that the update equals that of one process.
"""

from contextlib import nullcontext
from pathlib import Path

from ..run import directory
from ..run.progress import Progress, Silent
from . import batches, checkpoints, signatures
from .config import AlignConfig
from .monitor import estimate_regret
from .records import Metrics, StepRecord
from .setup import check_share, check_tracker, config_json, first_state, for_tracker, prepare
from .state import Bench, State
from .steps import train_step


def align(config: AlignConfig, out: Path, progress: Progress | None = None) -> Path:
    """Runs or resumes an alignment in `out`; returns the folder of the adapter, plain PEFT.

    Raises:
        UserError: bad input, `out` belongs to another config, or a score, loss or gradient is not finite.
    """
    from accelerate import Accelerator

    config.check()
    check_tracker(config.tracker)
    pools = batches.load_pools(config)
    accelerator = Accelerator(cpu=config.device == "cpu", log_with=config.tracker, project_dir=str(out))
    main = accelerator.is_main_process
    progress = progress if progress and main else Silent()
    check_share(config, accelerator.num_processes)
    with directory.open_run(out, config_json(config, pools)) if main else nullcontext():
        accelerator.wait_for_everyone()
        if (out / "adapter/exitwise.json").exists():
            progress.say(f"{out} is finished")
            return out / "adapter"
        bench = prepare(config, out, pools, accelerator, progress)
        state, history = checkpoints.resume(bench, out, first_state(config, bench.exits))
        if config.tracker:
            accelerator.init_trackers("exitwise", config=for_tracker(config, pools))
        train(bench, state, history, out, progress)
        if config.best_of and config.method in ("l-ppo", "grpo"):
            regret = estimate_regret(bench)
            if main:
                directory.write_json(out / "regret.json", regret)
        checkpoints.save_adapter(bench, out)
        accelerator.wait_for_everyone()
        accelerator.end_training()  # ends the process group too
    return out / "adapter"


def train(bench: Bench, state: State, history: list[StepRecord], out: Path, progress: Progress) -> None:
    """The steps from `state` on, with their logs and checkpoints.

    Args:
        history: lines of metrics.jsonl so far; those of the new steps are appended.
    """
    config, accelerator = bench.config, bench.accelerator
    progress.start(config.steps, "steps")
    progress.advance(state.step)
    while state.step < config.steps:
        metrics, answers = train_step(bench, state, out)
        state.step += 1
        found = signatures.find([*(record.metrics for record in history), metrics])
        raised = {name for record in history for name in record.signatures}
        for signature in found:
            if signature.name not in raised:
                progress.say(f"step {state.step}: {signature.name}: {signature.message}")
        history.append(StepRecord(metrics, tuple(signature.name for signature in found)))
        if accelerator.is_main_process:
            checkpoints.log(out, history[-1], answers if (state.step - 1) % config.samples_every == 0 else [])
            named = {key.replace("@", "/"): value for key, value in metrics.items()}  # mlflow allows no @
            accelerator.log(named, step=state.step)
        if state.step % config.checkpoint_every == 0 or state.step == config.steps:
            checkpoints.save(bench, out, state)
        progress.say(_line(state.step, config.steps, metrics))
        progress.advance(1)


def _line(step: int, steps: int, metrics: Metrics) -> str:
    """What a step prints."""
    shown = (
        ("score", "rollout/harmful_score", "{:+.2f}"), ("ASR", "rollout/asr", "{:.0%}"),
        ("refuses harmless", "rollout/over_refusal", "{:.0%}"), ("VQA", "rollout/vqa", "{:.0%}"),
        ("KL", "objective/kl", "{:.2f}"), ("loss", "loss/policy_avg", "{:.3f}"),
    )  # fmt: skip
    parts = [f"{name} {form.format(value)}" for name, key, form in shown if (value := metrics.get(key)) is not None]
    return f"step {step}/{steps}: " + ", ".join(parts)
