"""Bands of exits that look alike: linear CKA between exits, and the contiguous grouping that fits it best.

The paper's bands are thirds of the encoder. Where an encoder changes in other places, thirds mix unlike exits;
`write_bands` puts the grouping into a run, and metrics and tables follow it from then on.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from ..errors import UserError
from ..model.exit_names import BANDS, ranges, thirds
from ..run import directory
from ..run.exit import Exit

if TYPE_CHECKING:
    from PIL.Image import Image

    from ..model.vlm import Vlm

MAX_TOKENS = 2048  # examples of the similarity: enough for a stable figure, a matrix of 32 MB


def linear_cka(x: np.ndarray, y: np.ndarray) -> float:
    """Linear CKA of two sets of features of the same N examples, 1 where one is a rotation and scaling of the other.

    Kornblith et al. 2019, "Similarity of Neural Network Representations Revisited", section 3 (HSIC with linear
    kernels, centred): ‖YᵀX‖² / (‖XᵀX‖ ‖YᵀY‖), Frobenius norms.

    Args:
        x, y: (N, D1), (N, D2).

    Raises:
        ValueError: N differs, or features do not vary over the examples.
    """
    if len(x) != len(y):
        raise ValueError(f"{len(x)} and {len(y)} examples; expected as many of both")
    return float(cka_matrix([x, y])[0, 1])


def cka_matrix(features: Sequence[np.ndarray]) -> np.ndarray:
    """(L+1, L+1) linear CKA between all pairs.

    Args:
        features: L+1 arrays (N, D), the features of the same N examples at each exit.

    Raises:
        ValueError: features do not vary over the examples, so that nothing can be compared.
    """
    grams = []
    for number, x in enumerate(features):
        centred = x.astype(np.float64) - x.mean(axis=0, dtype=np.float64)
        gram = centred @ centred.T  # (N, N): <XXᵀ, YYᵀ> = ‖YᵀX‖², and each is needed once only
        norm = np.linalg.norm(gram)
        if not norm > 0:
            raise ValueError(f"features {number} are the same for every example; expected some that vary")
        grams.append((gram / norm).ravel())
    stacked = np.stack(grams)
    return stacked @ stacked.T


def group_exits(similarity: np.ndarray, n_groups: int = len(BANDS)) -> list[list[int]]:
    """Contiguous groups of exits 1 … L that are as alike within as can be; exit 0 belongs to none, as with thirds.

    Minimises the sum over groups of Σ (S_ii - mean S of the group), the within-group scatter of the kernel S, exactly,
    by dynamic programming (kernel change-point detection: Harchaoui & Cappé 2007; Arlot, Celisse & Harchaoui 2019).

    Args:
        similarity: (L+1, L+1), symmetric, such as `cka_matrix` gives.

    Raises:
        ValueError: it is not square, or L is smaller than the number of groups.
    """
    n = len(similarity) - 1
    if similarity.shape != (n + 1, n + 1) or not 1 <= n_groups <= n:
        raise ValueError(f"{n_groups} groups of a {similarity.shape} similarity; expected 1 to L groups of (L+1, L+1)")
    kernel = similarity[1:, 1:]
    sums = np.zeros((n + 1, n + 1))
    sums[1:, 1:] = kernel.cumsum(axis=0).cumsum(axis=1)
    diagonal = np.concatenate([[0.0], np.diag(kernel).cumsum()])

    def scatter(start: int, end: int) -> float:
        block = sums[end, end] - sums[start, end] - sums[end, start] + sums[start, start]
        return diagonal[end] - diagonal[start] - block / (end - start)

    best = [[float("inf")] * (n + 1) for _ in range(n_groups + 1)]
    cut = [[0] * (n + 1) for _ in range(n_groups + 1)]
    best[0][0] = 0.0
    for groups in range(1, n_groups + 1):
        for end in range(groups, n + 1):
            costs = [best[groups - 1][start] + scatter(start, end) for start in range(groups - 1, end)]
            at = int(np.argmin(costs))
            best[groups][end], cut[groups][end] = costs[at], at + groups - 1
    groups_found, end = [], n
    for groups in range(n_groups, 0, -1):
        start = cut[groups][end]
        groups_found.append(list(range(start + 1, end + 1)))
        end = start
    return groups_found[::-1]


def read_bands(folder: Path, n_blocks: int) -> dict[str, tuple[Exit, ...]]:
    """The bands of bands.json where the run has one, else thirds.

    Raises:
        UserError: bands.json is not {"bands": {name: [exits of this encoder]}}.
    """
    path = folder / "bands.json"
    if not path.exists():
        return thirds(n_blocks)
    bands = directory.read_json(path, "bands")["bands"]
    groups = list(bands.values()) if isinstance(bands, dict) else [None]
    exits = [exit_ for group in groups for exit_ in (group if isinstance(group, list) else [None])]
    if any(type(exit_) is not int or not 0 <= exit_ <= n_blocks for exit_ in exits) or len(set(exits)) < len(exits):
        raise UserError(f"{path} names bands that are no groups of the exits 0 to {n_blocks}; correct or remove it")
    return {str(name): tuple(group) for name, group in bands.items()}


def write_bands(
    folder: Path, vlm: "Vlm", images: Sequence["Image"], n_groups: int = len(BANDS)
) -> dict[str, list[int]]:
    """bands.json of a run: its exits grouped by the CKA of what the encoder makes of `images`; returns the bands.

    Examples are encoder tokens of all images, at most MAX_TOKENS of them, evenly spaced. Three groups keep the names
    early, middle, late; others are named by their exits. `exitwise judge` measures by them from then on.

    Raises:
        UserError: no image, not a run directory, or another number of groups than the encoder can have.
    """
    from ..model.exits import encode

    if not images or not 1 <= n_groups <= vlm.n_blocks:
        raise UserError(
            f"got {len(images)} images and {n_groups} groups; expected an image or more, and 1 to {vlm.n_blocks} groups"
        )
    states: list[list[np.ndarray]] = [[] for _ in range(vlm.n_blocks + 1)]
    for image in images:
        for exit_, state in enumerate(encode(vlm, vlm.picture(image).inputs)):
            states[exit_].append(state.float().cpu().numpy().reshape(-1, state.shape[-1]))
    tokens = [np.concatenate(parts) for parts in states]
    step = -(-len(tokens[0]) // MAX_TOKENS)
    groups = group_exits(cka_matrix([rows[::step] for rows in tokens]), n_groups)
    names = BANDS if n_groups == len(BANDS) else [f"exits {ranges(group)}" for group in groups]
    bands = dict(zip(names, groups, strict=True))
    with directory.edit_run(folder):
        directory.write_json(folder / "bands.json", {"method": "linear CKA", "bands": bands})
    return bands
