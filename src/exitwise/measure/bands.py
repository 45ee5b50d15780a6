"""Groups exits with similar features into contiguous bands, by linear CKA (centered kernel alignment).

The paper's bands are thirds of the encoder. Where an encoder changes in other places, thirds mix unlike exits;
`write_bands` puts the grouping into a run, and metrics and tables follow it from then on.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from os import PathLike
from typing import TYPE_CHECKING

import numpy as np

from ..errors import UserError
from ..model.exit_names import BANDS, ranges, thirds
from ..run import directory
from ..run.exit import Exit
from ..run.run import Run
from ..run.typed import from_json, to_json

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


@dataclass(frozen=True)
class Bands:
    """bands.json: contiguous groups of single-layer exits, by name."""

    method: str
    bands: dict[str, list[int]]


def read_bands(run: Run) -> dict[str, tuple[Exit, ...]]:
    """The bands of bands.json where the run has one, else thirds of the encoder.

    Raises:
        UserError: bands.json is not {"bands": {name: [exits of this encoder]}}.
    """
    n_blocks, found = run.plan.n_blocks, run.read_object("bands.json")
    if found is None:
        return thirds(n_blocks)
    path = run.path / "bands.json"
    bands = from_json({"method": "", **found}, Bands, path, "correct or remove it").bands
    exits = [exit_ for group in bands.values() for exit_ in group]
    if any(not 0 <= exit_ <= n_blocks for exit_ in exits) or len(set(exits)) < len(exits):
        raise UserError(f"{path} has an exit twice, or one outside 0 to {n_blocks}; correct or remove the file")
    return {name: tuple(Exit([exit_]) for exit_ in group) for name, group in bands.items()}


def write_bands(
    run: Run | str | PathLike[str], vlm: "Vlm", images: Sequence["Image"], n_groups: int = len(BANDS)
) -> Bands:
    """Writes bands.json of a run: its exits grouped by the CKA of their features of `images`.

    Examples are encoder tokens of all images, at most MAX_TOKENS of them, evenly spaced. Three groups are named early,
    middle and late; others are named by their exits. `exitwise judge` measures by these bands from then on.

    Raises:
        UserError: no image, not a run directory, or more groups than the encoder has blocks.
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
    bands = Bands("linear CKA", dict(zip(names, groups, strict=True)))
    run = Run.open(run)
    with directory.edit_run(run.path):
        run.write_object("bands.json", to_json(bands))
    return bands
