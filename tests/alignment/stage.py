"""A small policy in float64 with an untouched copy of its model, and a plan of rows for it."""

import copy
from functools import partial

import torch

from exitwise.alignment.policy import Policy
from exitwise.alignment.rollout import (
    pad_responses,
)
from exitwise.engines.prefix import ExitRequest
from exitwise.model.exits import exit_at
from exitwise.model.features import FeatureFiles
from exitwise.run.records import Sample
from tests.conftest import pixels_of, tiny_llava

CLOSE = {"rtol": 1e-5, "atol": 1e-5}
PROMPTS = ("What is it?", "Say something longer about what you see here.", "Go on", "Why?", "Name the colour of it.")


class Stage:
    """A policy and an untouched twin of its model, both in float64."""

    def __init__(self, pictures, folder, tower="clip", moved=True, **options):
        vlm = tiny_llava(tower)
        vlm.model.double()
        self.stock = copy.copy(vlm.__class__)(vlm.name, copy.deepcopy(vlm.model), vlm.processor, None, vlm.default_exit)
        object.__setattr__(self.stock, "blocks", _blocks(self.stock.model))
        self.features = FeatureFiles(folder, tower, vlm.device)
        self.features.fill(vlm, {name: partial(pictures.get, name) for name in pictures}, range(5))
        torch.manual_seed(1)
        self.policy = Policy(vlm, 4, 8.0, **{"critic": True} | options)
        self.pictures, self.tower = pictures, tower
        if moved:  # a fresh adapter is zero, and so is a fresh value head: neither would show
            for name, parameter in self.policy.trainable().items():
                if "lora_B" in name or "value_head" in name:
                    torch.nn.init.normal_(parameter, std=0.3)

    @property
    def vlm(self):
        return self.policy.vlm

    def answers(self, plan, seed=0):
        """`plan`: (prompt, image, exit, length of the response) per row; the responses are random tokens."""
        requests = [
            ExitRequest(Sample(f"s{i}", p, "harmful", image), exit) for i, (p, image, exit, _) in enumerate(plan)
        ]
        generator = torch.Generator().manual_seed(seed)
        tokens = [torch.randint(4, 260, (n,), generator=generator).tolist() for *_, n in plan]
        return pad_responses(self.policy, requests, tokens, self.features)

    def outputs(self, answers, **options):
        return self.policy(*answers, self.features, **options)

    def plain(self, vlm, answers, line):
        """(log-probabilities, entropies) of one row by the stock code, pixels and all: (n,), (n,)."""
        row, n = answers.rows[line], int(answers.mask[line].sum())
        response = answers.responses[line, :n].tolist()
        ids = torch.tensor([[*row.head, *row.tail, *response]])
        image = row.request.sample.image
        pixels = {"pixel_values": pixels_of(vlm, [self.pictures[image]])} if image else {}
        with exit_at(vlm, row.request.exit), torch.no_grad():
            logits = vlm.model(input_ids=ids, **pixels, use_cache=False).logits[0, -n - 1 : -1]
        normal = torch.log_softmax(logits, dim=-1)
        return normal.gather(1, torch.tensor(response)[:, None])[:, 0], -(normal.exp() * normal).sum(dim=-1)


def tiny_double():
    vlm = tiny_llava()
    vlm.model.double()
    return vlm


def _blocks(model):
    tower = model.model.vision_tower
    return tower.encoder.layers if hasattr(tower.encoder, "layers") else tower.encoder.layer


PLAN = [
    (PROMPTS[0], "coffee", 3, 4), (PROMPTS[1], "coffee", 3, 2), (PROMPTS[2], "coffee", 1, 6),
    (PROMPTS[3], "chelsea", 1, 1), (PROMPTS[4], "chelsea", 1, 3), (PROMPTS[0], "astronaut", 0, 5),
    (PROMPTS[1], "astronaut", 4, 2),
]  # fmt: skip
