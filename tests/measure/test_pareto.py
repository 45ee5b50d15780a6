"""Dominance against its definition; the join of costs and figures; the figure."""

import xml.etree.ElementTree as ET

import pytest
from hypothesis import given
from hypothesis import strategies as st

from exitwise import UserError
from exitwise.measure.pareto import CostsFile, CostsOfExit, Point, Quartiles, RequestSize, dominated, join
from exitwise.report import html, scatter
from exitwise.run.exit import Exit
from exitwise.run.figures import ExitFigures, Interval

SHARE = st.sampled_from([0.0, 0.25, 0.5, 0.75, 1.0])  # few values, so that ties occur
POINTS = st.lists(st.tuples(SHARE, SHARE, SHARE), max_size=8).map(
    lambda rows: [Point(i, *r) for i, r in enumerate(rows)]
)


@given(POINTS)
def test_dominance_is_its_definition(points):
    better = {p.exit: (p.saved, -p.asr, p.utility) for p in points}  # more is better in each
    expected = {
        exit: tuple(
            other
            for other, theirs in better.items()
            if all(t >= m for t, m in zip(theirs, mine, strict=True))
            and any(t > m for t, m in zip(theirs, mine, strict=True))
        )
        for exit, mine in better.items()
    }
    assert dominated(points) == expected


@given(POINTS)
def test_whoever_is_dominated_is_so_by_the_front(points):
    by = dominated(points)
    front = {exit for exit, better in by.items() if not better}
    assert bool(front) == bool(points)
    assert all(front & set(better) for better in by.values() if better)


def share(value):
    if value is None:
        return Interval(None, None, None, 0, 0)
    return Interval(value, max(0, value - 0.1), min(1, value + 0.1), round(100 * value), 100)


def joined(*exits, default=4, stop_at=(), measured=None):
    """Tradeoffs of exits (exit, ASR, utility); a block is 5 of 100 + 5 l FLOPs, known at the exits `measured`."""
    numbers = sorted({e for e, _, _ in exits} | {default}) if measured is None else measured
    costs = [CostsOfExit(Exit([e]), {}, {}, {"encoder": 5 * e, "total": 100 + 5 * e}, None) for e in numbers]
    none = share(None)
    rows = [
        ExitFigures(
            Exit([e]), "early", share(asr), none, none, none, none, none, share(use), {}, None, {}, {}, None, None, ""
        )
        for e, asr, use in exits
    ]
    return join(CostsFile(Exit([default]), RequestSize(5, 2), 0, costs), rows, [Exit([e]) for e in stop_at])


def test_join():
    found = joined((1, 0.9, 0.2), (2, 0.9, 0.1), (3, 0.1, 0.8), (4, 0.1, 0.8), stop_at=(3,))
    assert {row.exit: row.by for row in found.rows} == {1: (), 2: (1,), 3: (), 4: (3,)}
    assert [round(row.saved, 4) for row in found.rows] == [0.125, 0.0833, 0.0417, 0]
    assert found.rows[3].share == pytest.approx(20 / 120)
    assert found.sentence == (
        "Not dominated: exits 1, 3. Of these, the device may stop at exit 3. Dominated: exits 2, 4."
    )


def test_what_was_not_measured_is_not_compared():
    found = joined((1, None, 0.2), (2, 0.5, None), (3, 0.5, 0.5))
    assert [row.by for row in found.rows] == [None, None, ()]
    without = joined((1, 0.5, None), (2, 0.5, None))
    assert [row.by for row in without.rows] == [(), (1,)]
    assert "utility was not measured" in without.of
    nobody = joined((1, None, None))
    assert nobody.sentence == "No exit has the figures that dominance compares."


def test_costs_of_another_run():
    with pytest.raises(UserError, match="lacks exit 1;"):
        joined((1, 0.5, 0.5), (2, 0.5, 0.5), measured=[2, 4])


def drawn(rows, size=(1120, 330), default=4):
    notes = {row.exit: "<&>" for row in rows}
    return ET.fromstring(scatter.pareto("wide", rows, Exit([default]), notes, "label", size))


def of_class(tree, name):
    return [node for node in tree.iter() if node.get("class", "").startswith(name)]


@pytest.mark.parametrize("size", [(1120, 330), (358, 340)])
@pytest.mark.parametrize("exits", [(4,), (0, 4), (1, 5), tuple(range(49))])
def test_the_figure_holds_every_exit(size, exits):
    tree = drawn(joined(*[(e, e / 48, 1 - e / 48) for e in exits]).rows, size)
    points = of_class(tree, "point")
    assert len(points) == len(exits)
    assert all(scatter.LEFT < float(p.get("cx")) < size[0] - scatter.RIGHT for p in points)
    places = [float(text.get("x")) for text in of_class(tree, "exit")]
    assert all(abs(a - b) >= scatter.NUMBER for i, a in enumerate(places) for b in places[:i])
    assert not [node for node in tree.iter() if node.get("style")]  # the page's policy would drop it


def test_more_saved_is_right_safer_is_low_more_useful_is_darker():
    tree = drawn(joined((1, 0.9, 0.2), (2, 0.8, 0.5), (4, 0.1, 0.8), (5, 0.2, 0.7)).rows)
    by_kind = {kind: of_class(tree, f"point {kind}") for kind in ("front", "beaten")}
    assert [len(nodes) for nodes in by_kind.values()] == [3, 1]
    points = sorted(by_kind["front"], key=lambda p: float(p.get("cx")))  # exits 4, 2, 1
    heights = [float(p.get("cy")) for p in points]
    assert heights == sorted(heights, reverse=True)
    assert [p.get("fill-opacity") for p in points] == ["1.00", "0.56", "0.12"]


@pytest.mark.parametrize(
    ("low", "high", "texts"),
    [
        (-0.01, 0.115, ["0 %", "2 %", "4 %", "6 %", "8 %", "10 %"]),
        (-0.0001, 0.0004, ["−0.01 %", "0.00 %", "0.01 %", "0.02 %", "0.03 %", "0.04 %"]),
        (0.1, 0.9, ["10 %", "20 %", "30 %", "40 %", "50 %", "60 %", "70 %", "80 %", "90 %"]),
    ],
)
def test_ticks(low, high, texts):
    assert [text for _, text in scatter.ticks(low, high, 8)] == texts


@given(st.floats(-1, 0), st.floats(1e-5, 1))
def test_ticks_are_few_and_inside(low, high):
    places = [place for place, _ in scatter.ticks(low, high, 5)]
    assert 2 <= len(places) <= 6
    assert all(low - 1e-9 <= place <= high + 1e-9 for place in places)


def test_numbers():
    assert [html.digits(v) for v in (0, 0.0398, 1.4797, 13.02, 7063)] == ["0", "0.0398", "1.48", "13.0", "7,063"]
    assert [html.share(v) for v in (0, 0.0000123, 0.0038, -0.01, 0.1104)] == [
        "0 %",
        "0.0012 %",
        "0.38 %",
        "−1.0 %",
        "11.0 %",
    ]
    assert html.spread(Quartiles(low=0.1214, median=0.122, high=1.2)) == "122 (121–1,200)"
