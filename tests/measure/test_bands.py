"""Linear CKA against its formula and its invariances; groups against all partitions; bands that a run follows."""

import itertools
import json

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from exitwise import UserError
from exitwise.auditing.audit import audit
from exitwise.cli.main import entry
from exitwise.measure.bands import cka_matrix, group_exits, linear_cka, write_bands
from tests.conftest import tiny_llava


def features(n, d, seed):
    return np.random.default_rng(seed).normal(size=(n, d))


def test_cka_is_its_formula():
    x, y = features(30, 5, 0), features(30, 8, 1)
    xc, yc = x - x.mean(0), y - y.mean(0)
    norm = np.linalg.norm
    expected = norm(yc.T @ xc) ** 2 / (norm(xc.T @ xc) * norm(yc.T @ yc))
    assert linear_cka(x, y) == pytest.approx(expected)


def test_cka_by_hand():
    # centred: x = (-1, 0, 1), y = (-1/3, 2/3, -1/3): orthogonal. And z = (1, 1, 4) is -1, -1, 2 centred:
    # (x.z)² / (|x|² |z|²) = 9 / (2 * 6)
    x, y, z = (np.array(v, dtype=float)[:, None] for v in ((0, 1, 2), (0, 1, 0), (1, 1, 4)))
    assert linear_cka(x, y) == pytest.approx(0)
    assert linear_cka(x, z) == pytest.approx(0.75)


def test_cka_sees_past_rotation_scale_and_shift_but_not_past_other_maps():
    x = features(40, 6, 2)
    rotation, _ = np.linalg.qr(features(6, 6, 3))
    assert linear_cka(x, 3 * x @ rotation + 7) == pytest.approx(1)
    assert linear_cka(x, x @ np.diag([100, 1, 1, 1, 1, 1])) < 0.9
    matrix = cka_matrix([x, x**2, features(40, 3, 4)])
    assert matrix == pytest.approx(matrix.T)
    assert np.diag(matrix) == pytest.approx(1)
    assert matrix.min() >= 0


def test_cka_of_what_cannot_be_compared():
    with pytest.raises(ValueError, match="as many of both"):
        linear_cka(features(3, 2, 0), features(4, 2, 0))
    with pytest.raises(ValueError, match="features 1 are the same"):
        cka_matrix([features(3, 2, 0), np.ones((3, 2))])


def scatter(similarity, groups):
    return sum(
        similarity[np.ix_(g, g)].diagonal().sum() - similarity[np.ix_(g, g)].sum() / len(g) for g in map(list, groups)
    )


@settings(deadline=None)
@given(st.integers(2, 7), st.data())
def test_groups_are_the_best_of_all(n, data):
    k = data.draw(st.integers(1, n))
    x = features(n + 1, 3, data.draw(st.integers(0, 1000)))
    similarity = x @ x.T
    found = group_exits(similarity, k)
    assert [exit_ for group in found for exit_ in group] == list(range(1, n + 1))
    assert len(found) == k
    best = min(
        scatter(similarity, [range(a, b) for a, b in itertools.pairwise((1, *cuts, n + 1))])
        for cuts in itertools.combinations(range(2, n + 1), k - 1)
    )
    assert scatter(similarity, found) == pytest.approx(best)


def test_groups_follow_blocks_not_thirds():
    block = np.zeros((10, 10))
    for low, high in ((0, 1), (1, 3), (3, 4), (4, 10)):
        block[low:high, low:high] = 1
    assert group_exits(block) == [[1, 2], [3], [4, 5, 6, 7, 8, 9]]
    for n_groups in (0, 10):
        with pytest.raises(ValueError, match="1 to L groups"):
            group_exits(block, n_groups)


def test_a_run_follows_its_bands(tiny_folder, tmp_path, pictures):
    run = tmp_path / "run"
    audit(str(tiny_folder), limit=2, vqa=0, max_new_tokens=2, out=run)
    bands = write_bands(run, tiny_llava(), list(pictures.values())).bands
    assert [exit_ for group in bands.values() for exit_ in group] == [1, 2, 3, 4]
    assert list(bands) == ["early", "middle", "late"]
    entry(["judge", str(run)])
    metrics = json.loads((run / "metrics.json").read_text())
    assert {row["band"]: row["exits"] for row in metrics["bands"]} == bands
    assert list(write_bands(run, tiny_llava(), list(pictures.values()), 2).bands) == [
        f"exits {g[0]}-{g[-1]}" if len(g) > 1 else f"exits {g[0]}"
        for g in json.loads((run / "bands.json").read_text())["bands"].values()
    ]
    for text in ('{"bands": {"a": [9]}}', '{"bands": {"a": [1, 1]}}', '{"bands": 3}', '{"bands": {"a": 3}}', "{}"):
        (run / "bands.json").write_text(text)
        with pytest.raises(SystemExit) as stop:
            entry(["judge", str(run)])
        assert stop.value.code == 2
    with pytest.raises(UserError, match="an image or more"):
        write_bands(run, tiny_llava(), [])
