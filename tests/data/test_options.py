"""Flat keywords become nested configs, and back."""

from pathlib import Path

import pytest

from exitwise import AlignConfig, AuditConfig, UserError
from exitwise.cli.commands import Align, Audit
from exitwise.cli.main import parse
from exitwise.data.options import option_types, to_json
from exitwise.run.exit import Exit


def test_keywords_reach_the_config_that_has_the_option():
    config = AuditConfig.of("testbed", exits="8,default", limit=2, prompts=("a.csv", Path("b.csv")), temperature=1)
    assert (config.exits, config.selection.limit, config.temperature) == ("8,default", 2, 1.0)
    assert config.inputs.prompts == (Path("a.csv"), Path("b.csv"))
    assert isinstance(config.temperature, float)
    assert AuditConfig.of("testbed") == AuditConfig("testbed")


@pytest.mark.parametrize(
    ("options", "same"),
    [
        ({"data": "xstest-safe"}, {"data": ("xstest-safe",)}),
        ({"prompts": "a.csv"}, {"prompts": (Path("a.csv"),)}),
        ({"images": "pictures"}, {"images": Path("pictures")}),
        ({"adapter": Path("runs/a")}, {"adapter": "runs/a"}),
        ({"exits": 8}, {"exits": "8"}),
        ({"exits": Exit(layers=(3, 18))}, {"exits": "3+18"}),
        ({"limit": None}, {}),
    ],
)
def test_one_value_text_and_numbers_are_converted(options, same):
    assert AuditConfig.of("testbed", **options) == AuditConfig.of("testbed", **same)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"limt": 2}, "there is no option 'limt'; did you mean 'limit'?"),
        ({"image_roots": ()}, "did you mean 'image_root'?"),
        ({"inputs": None}, "there is no option 'inputs'"),
        ({"zzz": 1}, "there is no option 'zzz'; expected one of: model, adapter, exits, data"),
        ({"limit": "2"}, "limit got '2'; expected a whole number"),
        ({"limit": True}, "limit got True; expected a whole number"),
        ({"cross": 1}, "cross got 1; expected True or False"),
        ({"temperature": None}, "temperature got None; expected a number"),
        ({"prompts": (3,)}, "prompts got 3; expected a path"),
    ],
)
def test_a_bad_keyword_is_one_line(options, message):
    with pytest.raises(UserError) as caught:
        AuditConfig.of("testbed", **options)
    assert message in str(caught.value)


def test_values_of_an_alignment_are_checked():
    assert AlignConfig.of("m", mix=[1, 0, 0]).mix == (1.0, 0.0, 0.0)
    with pytest.raises(UserError, match=r"mix got \(1, 0\); expected 3 values"):
        AlignConfig.of("m", mix=(1, 0))
    with pytest.raises(UserError, match="method got 'ppo'; expected one of: l-ppo, grpo, sft, dpo"):
        AlignConfig.of("m", method="ppo")


@pytest.mark.parametrize("kind", [AuditConfig, AlignConfig])
def test_no_two_configs_share_the_name_of_an_option(kind):
    names = list(to_json(kind("m")))
    assert names == list(option_types(kind))
    assert len(names) == len(set(names))


@pytest.mark.parametrize(("command", "kind"), [("audit", AuditConfig), ("align", AlignConfig)])
def test_the_command_line_and_the_keywords_are_the_same(command, kind):
    words = ["--data", "xstest-safe", "--data", "own-vqa:a.csv", "--image-root", "a", "b", "--prompts", "p.csv"]
    options = {"data": ("xstest-safe", "own-vqa:a.csv"), "image_root": ("a", "b"), "prompts": "p.csv", "seed": 3}
    parsed = parse([command, "m", *words, "--seed", "3"])
    assert isinstance(parsed, Audit | Align)
    assert parsed.config == kind.of("m", **options)
