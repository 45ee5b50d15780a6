"""L-PPO against TRL 1.12's experimental PPO: samples/s, peak memory, and where our own time goes.

    python benchmarks/align.py [--trl-python PATH] [--batch 16] [--prompt 24] [--response 12] [--epochs 2 4] [--steps 2]

Both sides get one language model (the testbed's SmolLM2-135M, saved once more as a plain Llama; logits are compared),
the same prompts without images, all of one length, answers of one length (nothing ends them), the same LoRA, epochs,
mini-batches and coefficients, float32 and the same threads. Ours is `align.prepare` and `align.train_step` as the
command runs them, without the probe; a random reward adapter and head on the policy's own language model scores every
answer. TRL's runs as its users run it (align_trl.py): reference = adapter off, value and reward model on backbones of
their own, the value model trained whole; `--lean-rounds` adds a TRL whose value model has LoRA only.

The sides alternate, each run in a process of its own whose first step is a warm-up and not counted. Peak memory is the
process's peak resident set (ru_maxrss), interpreter and libraries included. Without --trl-python an environment is made
under runs/ (torch first and pinned, then TRL).

Written down before the first measurement. Floor: what the linear layers must multiply, two operations a weight and
token, one forward each for rollout (prompt, then token by token), scoring, old and reference log-probabilities and the
look back after the update, and per epoch a forward and a backward, which through frozen weights costs as much; the
vocabulary only where a response token is predicted. Divided by the speed of the model's commonest product (gate and up
projection, one mini-batch) in the same run. Prediction: 60 % of that floor's speed overall and under 40 % in the
rollout, whose products have `batch` rows; against TRL the same count says 1.57 times fewer operations at the defaults,
and its AdamW over a whole value model and its logits over prompts too should make that about 1.75 in time; memory about
half. (Written for prompts of 32 and answers of 16 tokens and two epochs; the look back takes every other answer since,
and the count follows; what came of it is in docs/log.md.)

Writes one JSON object to --out and prints it.
"""

import json
import os
import platform
import resource
import subprocess
import sys
import time
import venv
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated

import tyro

HERE = Path(__file__).resolve().parent
TRL = ("torch==2.13.0", "trl==1.12.0", "peft==0.21.2", "transformers==5.23.0")  # torch alone, first
UNUSED = "<image>"  # a token that no prompt holds and whose embedding never wins

LONG = ("model", "text_model", "prompts", "prompt_ids", "out", "value")
"""Fields of a job that are paths or lists, and left out of the result."""


@dataclass(frozen=True)
class Config:
    trl_python: Path | None = None
    """Python of an environment that has TRL and peft."""
    model: str = "testbed"
    """testbed, or a folder of a LLaVA-1.5-style checkpoint."""
    batch: int = 16
    """Prompts in a step."""
    prompt: int = 24
    """Tokens of every prompt, chat format included."""
    response: int = 12
    """Tokens of every answer."""
    epochs: tuple[int, ...] = (2, 4)
    """Passes over a rollout: our default and TRL's. Of all but the first there is one round."""
    steps: int = 2
    """Of a run, the first being a warm-up."""
    rounds: int = 2
    """Runs of each side, alternating."""
    lean_rounds: int = 1
    """Runs of TRL with LoRA instead of a whole trained value model."""
    threads: int = 1
    """Of torch, on both sides."""
    work: Path = Path("runs/bench-align")
    """Folder for checkpoints, jobs and TRL's environment."""
    out: Path = HERE / "align.result.json"
    """The result."""
    job: Annotated[Path | None, tyro.conf.arg(help="Internal: run our side of this job and write its result.")] = None
    export: Annotated[Path | None, tyro.conf.arg(help="Internal: write the job's checkpoint and prompts.")] = None


# ------------------------------------------------------------------------------------------------ the job


def export(config: Config, path: Path) -> None:
    """Saves the language model for TRL, finds prompts of one length, and writes the job."""
    import torch
    from transformers import LlamaForCausalLM

    from exitwise import load_vlm
    from exitwise.alignment.config import AlignConfig

    folder = config.model
    if folder == "testbed":
        from exitwise.model.testbed.parts import base_folder

        folder = str(base_folder())
    vlm = load_vlm(folder, dtype="float32", device="cpu")
    text = LlamaForCausalLM(vlm.model.config.text_config).eval()
    text.model.load_state_dict(vlm.model.model.language_model.state_dict())
    text.lm_head.load_state_dict(vlm.model.lm_head.state_dict())
    target = config.work / "text-model"
    text.save_pretrained(target)
    vlm.tokenizer.save_pretrained(target)
    prompts = fixed_length_prompts(vlm, config.batch * config.steps, config.prompt)
    ids = [vlm.input_ids(p, 0) for p in prompts]
    with torch.inference_mode():
        reloaded = LlamaForCausalLM.from_pretrained(target, dtype=torch.float32).eval()
        probe = torch.tensor(ids[: min(8, len(ids))])
        gap = (reloaded(probe).logits - vlm.model(input_ids=probe).logits).abs().max()
    if not gap < 1e-3:
        raise SystemExit(f"the two checkpoints differ: logits are {gap} apart")
    defaults = AlignConfig.of(folder)
    copied = ("lora_rank", "lora_alpha", "lr", "kl_coef", "cliprange", "cliprange_value", "vf_coef", "gamma", "lam")
    job = {name: getattr(defaults, name) for name in copied} | {
        "model": folder, "text_model": str(target), "prompts": prompts, "prompt_ids": ids, "unused_token": UNUSED,
        "batch": config.batch, "prompt": config.prompt, "response": config.response, "steps": config.steps,
        "epochs": config.epochs[0], "mini_batches": defaults.num_mini_batches, "seed": 0,
        "logits_gap": float(gap), "out": str(config.work), "value": "whole",
    }  # fmt: skip
    path.write_text(json.dumps(job))


def fixed_length_prompts(vlm, n: int, length: int) -> list[str]:
    """`n` stretches of the built-in requests, each of exactly `length` tokens with its chat format."""
    from exitwise.data.prompts import builtin_benign, builtin_harmful

    words = " ".join(s.prompt for s in (*builtin_benign("train"), *builtin_harmful("train"))).split()
    found: list[str] = []
    for start in range(len(words)):
        stretch: list[str] = []
        for word in words[start:]:
            stretch.append(word)
            got = len(vlm.input_ids(" ".join(stretch), 0))
            if got >= length:
                break
        if got == length:
            found.append(" ".join(stretch))
        if len(found) == n:
            return found
    raise SystemExit(f"only {len(found)} prompts of {length} tokens; expected {n}: lower --batch or --steps")


# ------------------------------------------------------------------------------------------------ our side


class AdapterReward:
    """A random reward adapter and head on the policy's own language model: the work of scoring without its sense."""

    name = "random"

    def __init__(self, policy):
        import torch

        self.policy = policy
        policy.peft_model.add_adapter("reward", policy.peft_model.peft_config["default"])
        self.head = torch.randn(policy.vlm.model.config.text_config.hidden_size, generator=torch.Generator()) / 100

    def scores(self, prompts, answers):
        """(B,) head of the last token's hidden state, over question and answer."""
        import torch

        vlm, model = self.policy.vlm, self.policy.peft_model
        rows = [
            vlm.input_ids(p, 0) + vlm.tokenizer(a, add_special_tokens=False).input_ids
            for p, a in zip(prompts, answers, strict=True)
        ]
        longest = max(map(len, rows))
        ids = torch.tensor([row + [0] * (longest - len(row)) for row in rows])  # right padding: causal, no mask
        model.set_adapter("reward")
        with torch.no_grad():
            hidden = vlm.model.model(input_ids=ids, use_cache=False).last_hidden_state
        model.set_adapter("default")
        return torch.stack([hidden[i, len(row) - 1] @ self.head for i, row in enumerate(rows)])


def ours(job: dict) -> dict:
    """Our side: `prepare`, then `train_step` by `train_step`."""
    import torch
    from accelerate import Accelerator

    from exitwise import Sample
    from exitwise.alignment import batches, setup
    from exitwise.alignment.config import AlignConfig
    from exitwise.alignment.steps import train_step
    from exitwise.run.clock import Clock
    from exitwise.run.progress import Silent

    class ProcessorClock(Clock):
        """Also counts processor seconds by phase, which other work on the machine hardly touches."""

        def __init__(self, path):
            super().__init__(path)
            self.cpu = {}

        @contextmanager
        def phase(self, name):
            began = time.process_time()
            with super().phase(name):
                yield
            self.cpu[name] = self.cpu.get(name, 0.0) + time.process_time() - began

    out = Path(job["out"]) / "ours"
    out.mkdir(parents=True, exist_ok=True)
    for name in ("timing.json", "plan.json"):
        (out / name).unlink(missing_ok=True)
    copied = ("lora_rank", "lora_alpha", "lr", "kl_coef", "cliprange", "cliprange_value", "vf_coef", "gamma", "lam")
    config = AlignConfig.of(
        model=job["model"], mix=(1.0, 0.0, 0.0), reward="matcher", steps=job["steps"], batch_size=job["batch"],
        max_new_tokens=job["response"], num_ppo_epochs=job["epochs"], num_mini_batches=job["mini_batches"],
        probe=0, best_of=0, seed=job["seed"], dtype="float32", device="cpu", **{name: job[name] for name in copied},
    )  # fmt: skip
    config.check()
    samples = [Sample(f"p{i}", text, "harmful", "") for i, text in enumerate(job["prompts"])]
    pools = batches.Pools(samples, [], [], [], [])
    bench = setup.prepare(config, out, pools, Accelerator(cpu=True), Silent())
    bench = bench._replace(reward=AdapterReward(bench.policy), clock=ProcessorClock(out / "timing.json"))
    bench.policy.vlm.model.generation_config.eos_token_id = -1  # answers of one length
    trainable = sum(p.numel() for p in bench.policy.trainable().values())
    state = setup.first_state(config, bench.exits)
    speed, steps = matrix_speed(bench.policy.vlm, job), []
    for _ in range(job["steps"]):
        before, before_cpu = dict(bench.clock.phases), dict(bench.clock.cpu)
        began = time.monotonic(), time.process_time()
        metrics, _ = train_step(bench, state, out)
        seconds, cpu = time.monotonic() - began[0], time.process_time() - began[1]
        state.step += 1
        phases = {k: bench.clock.phases[k] - before.get(k, 0.0) for k in bench.clock.cpu}
        phases_cpu = {k: v - before_cpu.get(k, 0.0) for k, v in bench.clock.cpu.items()}
        steps.append({"seconds": seconds, "cpu_seconds": cpu, "phases": phases, "phases_cpu": phases_cpu})
        if metrics["rollout/length"] != job["response"] or metrics["updates"] != job["epochs"] * job["mini_batches"]:
            raise SystemExit(f"this was not the job: {metrics}")
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    speed = [*speed, *matrix_speed(bench.policy.vlm, job)]
    return {"steps": steps, "peak_mib": peak, "trainable": trainable, "threads": torch.get_num_threads(),
            "gflops": speed, "flop": floor_flop(bench.policy.vlm, job)}  # fmt: skip


def matrix_speed(vlm, job: dict) -> list[float]:
    """GFLOP per second of this thread's processor time of the commonest product: gate and up, one mini-batch.

    Processor time, because other work may run beside the benchmark."""
    import torch

    config = vlm.model.config.text_config
    n = job["batch"] // job["mini_batches"] * (job["prompt"] + job["response"])
    left, right = torch.randn(n, config.hidden_size), torch.randn(config.intermediate_size, config.hidden_size)
    for _ in range(5):
        torch.nn.functional.linear(left, right)
    began, wall, times = time.process_time(), time.monotonic(), 0
    while time.monotonic() - wall < 1:
        torch.nn.functional.linear(left, right)
        times += 1
    return [times * 2 * n * left.shape[1] * right.shape[0] / (time.process_time() - began) / 1e9]


def floor_flop(vlm, job: dict) -> dict[str, dict[str, float]]:
    """Operations of the linear layers in one step, by phase: ours, and TRL's in its own way of working."""
    layers = dict(vlm.model.model.language_model.layers.named_parameters())
    body = 2 * sum(p.numel() for name, p in layers.items() if p.dim() == 2 and "lora_" not in name)
    lora = 2 * sum(p.numel() for name, p in layers.items() if "lora_" in name and ".default." in name)
    head = 2 * vlm.model.lm_head.weight.numel()
    rows, epochs = job["batch"], job["epochs"]
    whole, seen, said = (rows * n for n in (job["prompt"] + job["response"], job["prompt"] + job["response"] - 1,
                                            job["response"]))  # fmt: skip
    policy = seen * (body + lora) + said * head
    backward = seen * (body + 2 * lora) + said * head  # no gradient of frozen weights
    full = whole * (body + lora + head)
    return {
        "ours": {
            "rollout": policy,
            "scoring": whole * (body + lora),
            "log-probabilities": policy + policy - seen * lora,
            "update": epochs * (policy + backward),
            "theory": policy / 2,  # every other answer
        },
        "trl": {
            "rollout": policy,
            "scoring": whole * body,
            "values": whole * body,
            "reference": whole * (body + head),
            "update": epochs * (full + full + whole * lora + (whole * 3 * body)),
        },
    }


# ------------------------------------------------------------------------------------------------ the comparison


def trl_environment(config: Config) -> Path:
    """Python of an environment with TRL, made where none is given."""
    if config.trl_python is not None:
        return config.trl_python
    folder = config.work / "trl-env"
    python = folder / "bin/python"
    if not (folder / "ready").exists():
        venv.create(folder, with_pip=True)
        for packages in (TRL[:1], TRL):
            subprocess.run([python, "-m", "pip", "install", "--quiet", *packages], check=True)
        (folder / "ready").touch()
    return python.absolute()


def run(command: list, threads: int) -> None:
    """A process of its own, with its torch held to the threads; its last lines where it fails."""
    env = os.environ | {"OMP_NUM_THREADS": str(threads), "MKL_NUM_THREADS": str(threads), "TOKENIZERS_PARALLELISM": "0"}
    done = subprocess.run([str(word) for word in command], env=env, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(f"{' '.join(map(str, command))} failed:\n" + "\n".join(done.stderr.splitlines()[-12:]))


def measure(config: Config) -> dict:
    """Alternating runs; this process never loads torch, because a child's ru_maxrss starts at its parent's peak."""
    work = config.work
    work.mkdir(parents=True, exist_ok=True)
    python = trl_environment(config)
    sizes = ["--model", config.model, "--batch", config.batch, "--prompt", config.prompt, "--response", config.response]
    path = work / "job.json"
    run([sys.executable, __file__, "--work", work, "--steps", config.steps, *sizes, "--export", path], config.threads)
    job = json.loads(path.read_text())
    found = {}
    for epochs in config.epochs:
        first, runs = epochs == config.epochs[0], []
        plan = ["ours", "trl"] * (config.rounds if first else 1) + ["trl_lean"] * (config.lean_rounds if first else 0)
        for side in plan:
            given = job | {"epochs": epochs, "value": "lora" if side == "trl_lean" else "whole"}
            path.write_text(json.dumps(given))
            result, load = work / "result.json", os.getloadavg()[0]
            script = [sys.executable, __file__, "--job", path, "--out", result]
            run(script if side == "ours" else [python, HERE / "align_trl.py", path, result], config.threads)
            runs.append({"side": side, "load_average": round(load, 2)} | json.loads(result.read_text()))
        found[f"{epochs} epochs"] = summary(job | {"epochs": epochs}, runs)
    return found | {"machine": machine(runs)}


def summary(job: dict, runs: list[dict]) -> dict:
    """Ratios, shares of the floor, seconds by phase; the counted steps are all but the first of each run."""
    sides: dict[str, dict] = {}
    for side in dict.fromkeys(r["side"] for r in runs):
        mine = [r for r in runs if r["side"] == side]
        steps = [step for r in mine for step in r["steps"][1:]]
        total = {key: sum(step[key] for step in steps) for key in ("seconds", "cpu_seconds")}
        sides[side] = {
            "samples_per_second": round(len(steps) * job["batch"] / total["seconds"], 4),
            "samples_per_cpu_second": round(len(steps) * job["batch"] / total["cpu_seconds"], 4),
            "by_run": [round(job["batch"] * len(r["steps"][1:]) / sum(s["seconds"] for s in r["steps"][1:]), 4)
                       for r in mine],
            "peak_mib": [round(r["peak_mib"]) for r in mine],
            "seconds_per_step": mean_phases(steps, "phases"),
            "cpu_seconds_per_step": mean_phases(steps, "phases_cpu"),
            "trainable": mine[0]["trainable"],
        }  # fmt: skip
    own, other = sides["ours"], sides["trl"]
    mine = [r for r in runs if r["side"] == "ours"]
    speed = sum(g for r in mine for g in r["gflops"]) / sum(len(r["gflops"]) for r in mine)
    flop = mine[0]["flop"]
    floors = {phase: value / speed / 1e9 for phase, value in flop["ours"].items()}
    return {
        "job": {k: v for k, v in job.items() if k not in LONG},
        "ratio_samples_per_second": round(own["samples_per_second"] / other["samples_per_second"], 2),
        "ratio_samples_per_cpu_second": round(own["samples_per_cpu_second"] / other["samples_per_cpu_second"], 2),
        "ratio_peak_memory": round(max(own["peak_mib"]) / min(other["peak_mib"]), 3),
        "ratio_operations_counted": round(sum(flop["trl"].values()) / sum(flop["ours"].values()), 2),
        "sides": sides,
        "floor": {
            "gflops_per_cpu_second": round(speed, 1),
            "tflop_per_step": {phase: round(value / 1e12, 3) for phase, value in flop["ours"].items()},
            "cpu_seconds_per_step": {phase: round(value, 2) for phase, value in floors.items()},
            "share_of_floor": {p: round(v / own["cpu_seconds_per_step"][p], 3) for p, v in floors.items()},
            "share_of_floor_whole_step": round(sum(floors.values()) * own["samples_per_cpu_second"] / job["batch"], 3),
        },
        "runs": [{"side": r["side"], "load_average": r["load_average"], "threads": r["threads"],
                  "steps": [round(s["seconds"], 2) for s in r["steps"]],
                  "cpu": [round(s["cpu_seconds"], 2) for s in r["steps"]]} for r in runs],
    }  # fmt: skip


def mean_phases(steps: list[dict], key: str) -> dict[str, float]:
    """Mean over the steps, longest phase first."""
    means = {name: round(sum(step[key][name] for step in steps) / len(steps), 3) for name in steps[0][key]}
    return dict(sorted(means.items(), key=lambda item: -item[1]))


def machine(runs: list[dict]) -> dict:
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    return {
        "processor": next(
            (x.split(":", 1)[1].strip() for x in lines if x.startswith("model name")), platform.machine()
        ),
        "cores": os.cpu_count(),
        "memory_gib": round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30, 1),
        "python": platform.python_version(),
        "trl_side": next((r["versions"] for r in runs if "versions" in r), {}),
    }


def main(config: Config) -> None:
    if config.export is not None:
        export(config, config.export)
    elif config.job is not None:
        config.out.write_text(json.dumps(ours(json.loads(config.job.read_text()))))
    else:
        started = time.monotonic()
        result = measure(config)
        result = {"config": {k: v for k, v in asdict(config).items() if isinstance(v, int | tuple)}, **result,
                  "minutes": round((time.monotonic() - started) / 60, 1)}  # fmt: skip
        config.out.write_text(json.dumps(result, indent=1) + "\n")
        print(json.dumps(result, indent=1))


if __name__ == "__main__":
    main(tyro.cli(Config, description=__doc__))
