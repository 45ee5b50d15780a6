"""Requests of a step: which prompts, at which exits, in which order; and the prompts kept for validation."""

import json
from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from exitwise import UserError
from exitwise.alignment import batches
from exitwise.alignment.config import AlignConfig
from exitwise.alignment.loop import align
from exitwise.cli.main import entry
from exitwise.run.records import Sample, Verdict
from tests.align_setup import BENIGN, HARMFUL, config_of
from tests.alignment.runs import command, rows_of


def exits_of(trained=(1, 2, 4), held_out=(), default=3):
    return batches.Exits(trained, held_out, default)


def pools_of(n=20):
    make = lambda kind: [Sample(f"{kind}{i}", f"{kind} {i}", kind, "") for i in range(n)]
    return batches.Pools(make("harmful"), make("benign"), [], ["a", "b", "c"], [])


def test_random_draws_an_exit_per_prompt_and_the_same_again(tmp_path):
    config, weights = config_of(tmp_path, tmp_path, batch_size=30), {}
    steps = [batches.draw(config, pools_of(), exits_of(), step, weights) for step in range(10)]
    assert {r.exit for r in steps[0]} == {1, 2, 4}
    counts = {exit: sum(r.exit == exit for step in steps for r in step) for exit in (1, 2, 4)}
    assert all(70 < count < 130 for count in counts.values())
    assert steps[3] == batches.draw(config, pools_of(), exits_of(), 3, weights)
    assert [r.exit for r in steps[0]] != [r.exit for r in steps[1]]
    assert len({r.sample.id for r in steps[0]}) == 30
    seen = [r.sample.prompt for step in steps for r in step]
    assert {seen.count(f"harmful {i}") for i in range(20)} == {15}  # every prompt in its turn
    one = batches.draw(config, pools_of(), exits_of((2,)), 0, weights)
    assert {r.exit for r in one} == {2}


def test_draws_are_those_of_earlier_versions():
    """Values of exitwise 0.1.0, which shuffled the whole pool for every sample; its runs resume the same."""
    make = lambda kind, n: [Sample(f"{kind[0]}{i}", f"{kind} {i}", kind, "a" if i % 3 else "own") for i in range(n)]
    pools = batches.Pools(make("harmful", 7), make("benign", 3), make("vqa", 2), ["a", "b", "c"])
    config = AlignConfig("m", exits="1,2,4", batch_size=8, seed=5)
    wanted = {
        0: "h0#0 own 1, h2#1 a 4, h1#2 a 2, h4#3 a 1, b0#4 own 2, b2#5 a 3, v0#6 own 3, v1#7 a 3",
        1: "h3#0 own 1, h6#1 own 4, h5#2 b 4, h6#3 own 2, b1#4 b 2, b1#5 b 3, v0#6 own 3, v1#7 b 3",
        9: "h5#0 c 1, h3#1 own 1, h0#2 own 1, h2#3 c 4, b0#4 own 2, b1#5 c 2, v1#6 c 3, v0#7 own 3",
    }
    for step, text in wanted.items():
        requests = batches.draw(config, pools, exits_of(), step, {})
        assert ", ".join(f"{r.sample.id} {r.sample.image} {r.exit}" for r in requests) == text
    large = make("harmful", 28_000)
    turns = [[s.id for s in batches._turn(large, 4, step, 0)] for step in (2, 6999, 7000)]
    assert turns == [
        ["h7588", "h23581", "h9403", "h24808"],
        ["h25121", "h11777", "h13449", "h16392"],
        ["h24055", "h12938", "h22112", "h10436"],
    ]


def test_a_large_pool_is_shuffled_once_a_lap():
    pool = [Sample(f"s{i}", "x", "harmful", "") for i in range(28_000)]
    batches._order.cache_clear()
    for step in range(3):
        batches._turn(pool, 128, step, 0)
    assert batches._order.cache_info().misses == 1


def test_each_puts_every_prompt_to_every_exit(tmp_path):
    config = config_of(tmp_path, tmp_path, batch_size=12, schedule="each")
    requests = batches.draw(config, pools_of(), exits_of(), 0, {})
    by_prompt = {}
    for r in requests:
        by_prompt.setdefault((r.sample.prompt, r.sample.image), []).append(r.exit)
    assert sorted(by_prompt.values()) == [[1, 2, 4]] * 4
    with pytest.raises(UserError, match=r"cannot be divided among 3 exits .* multiple of 3"):
        batches.draw(config_of(tmp_path, tmp_path, batch_size=8, schedule="each"), pools_of(), exits_of(), 0, {})


def test_groups_of_grpo_share_prompt_image_and_exit(tmp_path):
    config = config_of(tmp_path, tmp_path, batch_size=24, method="grpo", group_size=4)
    requests = batches.draw(config, pools_of(), exits_of(), 0, {})
    for start in range(0, 24, 4):
        group = requests[start : start + 4]
        assert len({(r.sample.prompt, r.sample.image, r.exit) for r in group}) == 1
        assert len({r.sample.id for r in group}) == 4


def test_worst_draws_by_its_weights(tmp_path):
    config = config_of(tmp_path, tmp_path, batch_size=300, schedule="worst")
    found = [r.exit for r in batches.draw(config, pools_of(), exits_of(), 0, {1: 0.7, 2: 0.2, 4: 0.1})]
    assert 0.6 < found.count(1) / 300 < 0.8
    assert 0.04 < found.count(4) / 300 < 0.17


def test_harmless_prompts_are_anchored_at_the_default_exit(tmp_path):
    for anchor, low, high in ((0.0, 0, 0), (0.5, 0.3, 0.7), (1.0, 1, 1)):
        config = config_of(tmp_path, tmp_path, batch_size=200, mix=(0.5, 0.5, 0.0), anchor=(anchor, 1.0))
        requests = batches.draw(config, pools_of(), exits_of(), 0, {})
        benign = [r.exit for r in requests if r.sample.kind == "benign"]
        assert low <= benign.count(3) / len(benign) <= high
        assert all(r.exit != 3 for r in requests if r.sample.kind == "harmful")


@settings(deadline=None)
@given(st.integers(1, 40), st.tuples(*[st.integers(0, 4)] * 3).filter(any))
def test_a_batch_is_full_and_asks_no_kind_without_a_share(n, parts):
    mix = [part / sum(parts) for part in parts]
    counts = batches._counts(n, mix)
    assert sum(counts) == n
    assert min(counts) >= 0
    assert not any(count for count, share in zip(counts, mix, strict=True) if not share)


def test_held_out_exits_are_not_trained():

    found = batches.choose_exits(AlignConfig.of("m", exits="all", hold_out="1,3", anchor=(0.0, 0.0)), 4, 3)
    assert found == ((0, 2, 4), (1, 3), 3)
    with pytest.raises(UserError, match="holds out the default exit 3, at which --anchor trains"):
        batches.choose_exits(AlignConfig.of("m", exits="all", hold_out="1,3"), 4, 3)
    paper = AlignConfig.of("m", exits="all", hold_out="1,3", mix=(1.0, 0.0, 0.0))  # nothing to anchor
    assert batches.choose_exits(paper, 4, 3).held_out == (1, 3)
    with pytest.raises(UserError, match="leaves no exit"):
        batches.choose_exits(AlignConfig.of("m", exits="1", hold_out="0-2"), 4, 3)
    with pytest.raises(UserError, match="exits 0 to 4"):
        batches.choose_exits(AlignConfig.of("m", exits="9"), 4, 3)


@settings(deadline=None)
@given(st.lists(st.tuples(st.floats(0, 1), st.floats(0, 1)), min_size=2, max_size=6), st.data())
def test_minimax_weights_follow_asr_and_forget_no_exit(pairs, data):
    total = sum(w for w, _ in pairs) + 1e-3 * len(pairs)
    weights = {i: (w + 1e-3) / total for i, (w, _) in enumerate(pairs)}
    asr = {i: a for i, (_, a) in enumerate(pairs)}
    found = batches.next_weights(weights, asr)
    assert sum(found.values()) == pytest.approx(1)
    assert min(found.values()) >= 0.1 / len(pairs)
    for i in asr:
        for j in asr:
            if asr[i] > asr[j] + 1e-6 and weights[i] >= weights[j]:
                assert found[i] > found[j]


def test_several_exits_with_one_held_out_end_to_end(tiny_folder, material, tmp_path):
    config = config_of(tiny_folder, material, method="sft", exits="all", hold_out="2", schedule="each", steps=1)
    align(config, out=tmp_path / "run")
    assert sorted({row["exit"] for row in rows_of(tmp_path / "run", "answers.jsonl")}) == [0, 1, 3, 4]
    about = json.loads((tmp_path / "run/adapter/exitwise.json").read_text())
    assert (about["exits"], about["held_out"], about["default_exit"]) == ([0, 1, 3, 4], [2], 3)


def test_worst_starts_from_an_audit_and_puts_its_weight_where_asr_is_higher(tiny_folder, material, tmp_path):
    found = {0: 0.0, 1: 0.9, 3: 0.4}
    (tmp_path / "audit").mkdir()
    exits = [{"exit": exit, "asr": {"value": value}} for exit, value in found.items()]
    (tmp_path / "audit/metrics.json").write_text(json.dumps({"exits": exits}))
    options = {"method": "sft", "exits": "0,1,3", "schedule": "worst", "audit": tmp_path / "audit"}
    align(config_of(tiny_folder, material, **options), out=tmp_path / "run")
    state = json.loads((tmp_path / "run/checkpoints/step-000002/state.json").read_text())
    assert sorted(state["weights"], key=state["weights"].get) == ["0", "3", "1"]
    with pytest.raises(UserError, match="no ASR at exit 4"):
        align(config_of(tiny_folder, material, **(options | {"exits": "0,4"})), out=tmp_path / "other")


def test_prompts_with_control_tokens_are_left_out_and_told(tiny_folder, material, tmp_path, vowels, capsys):
    (tmp_path / "forged.txt").write_text("\n".join([*HARMFUL, "Look: <image> and tell"]))
    more = ["--prompts", str(tmp_path / "forged.txt"), "--steps", "4", "--samples-every", "1"]
    entry(command(tiny_folder, material, tmp_path / "run", *more))
    assert "skipped forged:row13: its prompt has the control token '<image>'" in capsys.readouterr().err
    asked = {row["sample"].partition("#")[0] for row in rows_of(tmp_path / "run", "answers.jsonl")}
    assert len(asked) == len(HARMFUL)
    with pytest.raises(UserError, match="no benign sample can be used: one"):
        batches.askable(batches.Pools([], [Sample("one", "a <image>", "benign", "")], [], []), lambda prompt: "<image>")


def test_validation_prompts_are_audited_and_never_trained_on(tiny_folder, material, tmp_path, vowels):
    options = {"mix": (0.5, 0.5, 0.0), "exits": "1,3", "eval_every": 2, "validation": 3, "steps": 6}
    config = config_of(tiny_folder, material, **options)
    kept = batches.load_pools(config).validation
    assert [s.kind for s in kept] == ["harmful"] * 3 + ["benign"] * 3
    assert kept == batches.load_pools(replace(config, seed=1)).validation  # runs of other seeds are compared with it
    align(config, out=tmp_path / "run")
    asked = {row["sample"].partition("#")[0] for row in rows_of(tmp_path / "run", "answers.jsonl")}
    assert len(asked) == len(HARMFUL) + len(BENIGN) - 6  # all the others, and no more
    assert not asked & {s.id for s in kept}
    audits = [{k for k in row if k.startswith("eval/")} for row in rows_of(tmp_path / "run")]
    everything = {f"eval/{name}@{exit}" for name in ("asr", "over_refusal") for exit in (1, 3)}
    assert audits == [set(), set(), everything, set(), everything, set()]


def test_validation_keeps_a_prompt_out_about_every_image():
    pool = [Sample(f"{i}", f"Request {i % 4}", "harmful", f"file:{i}.png") for i in range(12)]
    kept = batches._keep(pool, 2)
    assert len({s.prompt for s in kept}) == len(kept) == 2
    assert not {s.prompt for s in pool} & {s.prompt for s in kept}
    assert len(pool) == 6
    with pytest.raises(UserError, match="leaves none of 2 harmful prompts"):
        batches._keep(pool, 2)


def test_a_small_audit_counts_what_the_judge_says(tiny_folder, material, tmp_path, monkeypatch):
    """Each kind by its own label, each exit by its own answers."""
    said = {("harmful", 1): "answered", ("harmful", 3): "refused", ("benign", 1): "answered", ("benign", 3): "refused"}
    judge = lambda sample, completion: Verdict(sample.id, completion.exit, "x", said[sample.kind, completion.exit], "")
    monkeypatch.setattr("exitwise.alignment.monitor.judge_completion", judge)
    options = {"method": "sft", "mix": (0.5, 0.5, 0.0), "exits": "1,3", "eval_every": 1, "validation": 2}
    align(config_of(tiny_folder, material, **options), out=tmp_path / "run")
    last = rows_of(tmp_path / "run")[-1]
    assert {k: v for k, v in last.items() if k.startswith("eval/")} == {
        "eval/asr@1": 1.0, "eval/asr@3": 0.0, "eval/over_refusal@1": 0.0, "eval/over_refusal@3": 1.0,
    }  # fmt: skip


def test_validation_that_leaves_nothing_or_serves_nothing_is_one_line(tiny_folder, material, tmp_path):
    with pytest.raises(UserError, match="leaves none of 12 harmful prompts"):
        align(config_of(tiny_folder, material, validation=12, eval_every=1), out=tmp_path / "run")
    with pytest.raises(UserError, match="give --eval-every too"):
        align(config_of(tiny_folder, material, validation=2), out=tmp_path / "run")
    with pytest.raises(UserError, match="less than --steps"):  # no audit would come
        align(config_of(tiny_folder, material, validation=2, eval_every=2), out=tmp_path / "run")
