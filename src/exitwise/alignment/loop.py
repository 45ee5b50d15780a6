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

from collections.abc import Mapping
from contextlib import nullcontext
from os import PathLike
from pathlib import Path

from ..data.options import make_config, to_json
from ..errors import UserError
from ..model.vlm import Vlm
from ..run import directory
from ..run.progress import Progress, Silent
from . import batches, checkpoints, signatures
from .adapter import Adapter
from .config import AlignConfig
from .monitor import estimate_regret
from .records import Metrics, StepRecord
from .setup import check_share, check_tracker, config_json, first_state, for_tracker, prepare
from .state import Bench, State
from .steps import train_step


def align(
    model: str | PathLike[str] | Vlm | AlignConfig,
    *,
    out: str | PathLike[str] | None = None,
    progress: Progress | None = None,
    **options: object,
) -> Adapter:
    """Aligns a model at some of its exits, or resumes an alignment that was stopped.

        tuned = align("testbed", exits="8", steps=2, out="runs/aligned")

    Args:
        model: "testbed", a folder or a hub id; or a loaded `Vlm`, which is not loaded again and stays as it is: the
            adapter is trained on a model that shares its weights in memory and has no encoder; or an `AlignConfig`.
        out: the run directory; without it, runs/<name of the model>-<method>.
        progress: receives messages and the number of steps done.
        options: those of `exitwise align`, with underscores: the fields of `AlignConfig` and of `DataConfig`. They
            replace those of an `AlignConfig` given as `model`.

    Raises:
        UserError: an unknown option or bad input, `out` belongs to another config, or a score or a gradient is not
            finite.
    """
    config = _config(model, options)
    config.check()
    check_tracker(config.tracker)
    folder = Path(out) if out is not None else Path("runs", f"{Path(config.model).resolve().name}-{config.method}")
    _run(config, folder, progress or Silent(), model if isinstance(model, Vlm) else None)
    return Adapter(folder)


def _config(model: str | PathLike[str] | Vlm | AlignConfig, options: Mapping[str, object]) -> AlignConfig:
    """The config of what `align` was given."""
    if isinstance(model, AlignConfig):
        return make_config(AlignConfig, to_json(model) | dict(options)) if options else model
    if isinstance(model, Vlm):
        late = [name for name in ("dtype", "device", "trust_remote_code") if name in options]
        if late:
            raise UserError(f"align got a loaded model and {', '.join(late)}; give that to load_vlm")
        model = model.name
    return AlignConfig.of(model, **options)


def _run(config: AlignConfig, out: Path, progress: Progress, vlm: Vlm | None) -> None:
    """Runs or resumes an alignment in `out`, in as many processes as accelerate has."""
    from accelerate import Accelerator

    pools = batches.load_pools(config)
    accelerator = Accelerator(
        cpu=config.device == "cpu" if vlm is None else vlm.device.type == "cpu",
        device_placement=vlm is None,  # a given model stays where it is
        log_with=config.tracker,
        project_dir=str(out),
    )
    main = accelerator.is_main_process
    progress = progress if main else Silent()
    check_share(config, accelerator.num_processes)
    with directory.open_run(out, config_json(config, pools)) if main else nullcontext():
        accelerator.wait_for_everyone()
        if (out / "adapter/exitwise.json").exists():
            progress.say(f"{out} is finished")
            return
        bench = prepare(config, out, pools, accelerator, progress, vlm)
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
            # mlflow allows neither @ nor +
            named = {key.replace("@", "/").replace("+", "_"): value for key, value in metrics.items()}
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
