"""Controls: asked at every exit, told apart, the same pictures every time."""

import json

import numpy as np
import pytest

from exitwise import UserError
from exitwise.auditing.audit import audit
from exitwise.data.config import DataConfig, SelectionConfig
from exitwise.data.controls import control_of, make_controls
from exitwise.data.images import load_image
from exitwise.data.selection import load_samples
from exitwise.run.records import Sample


def test_a_control_is_known_by_id_and_image():
    sample = Sample("a", "p", "harmful", "photo:coffee", "Fraud")
    made = make_controls([sample])
    assert [(s.id, s.image, control_of(s)) for s in made] == [
        ("a@control:blank", "control:blank", "blank"),
        ("a@control:noise", "control:noise", "noise"),
        ("a@control:none", "", "none"),
    ]
    assert {(s.prompt, s.kind, s.category) for s in made} == {("p", "harmful", "Fraud")}
    for identifier, image in (("a", ""), ("a@control:none", "photo:coffee"), ("a@control:grey", "control:grey")):
        assert control_of(Sample(identifier, "p", "harmful", image)) is None


def test_control_images():
    blank, noise = (np.asarray(load_image(f"control:{name}", None)) for name in ("blank", "noise"))
    assert (blank == 128).all()
    assert blank.shape == noise.shape == (336, 336, 3)
    assert np.array_equal(noise, load_image("control:noise", None))
    assert 70 < noise.std() < 78  # uniform on 0 ... 255: 73.9
    with pytest.raises(UserError, match="not a control"):
        load_image("control:grey", None)


def test_every_prompt_gets_them_once_even_where_images_cross():
    chosen = SelectionConfig(limit=3, vqa=0, cross=True, controls=True)
    samples = load_samples(DataConfig(), chosen, 0).samples
    controls = [s for s in samples if control_of(s)]
    assert len(controls) == 9
    assert all(s.kind == "harmful" for s in controls)
    plain = load_samples(DataConfig(), SelectionConfig(limit=3, vqa=0, cross=True), 0).samples
    assert [s for s in samples if not control_of(s)] == plain


def test_an_audit_with_controls(tiny_folder, tmp_path):
    run = tmp_path / "run"
    audit(str(tiny_folder), limit=3, vqa=0, max_new_tokens=4, controls=True, out=run)
    config = json.loads((run / "config.json").read_text())
    assert config["counts"] == {"harmful": 3, "benign": 3, "vqa": 0, "controls": 9}
    metrics = json.loads((run / "metrics.json").read_text())
    for row in metrics["exits"]:
        assert sum(row["unscored"].values()) + row["asr"]["n"] + row["over_refusal"]["n"] == 6
        assert set(row["controls"]) == {"blank", "noise", "none"}
    completions = [json.loads(line) for line in (run / "completions.jsonl").read_text().splitlines()]
    without = {}
    for c in completions:
        if c["sample"].endswith("@control:none"):
            without.setdefault(c["sample"], set()).add(c["text"])
    assert all(len(texts) == 1 for texts in without.values())  # without an image there is no exit to leave at
    page = (run / "report.html").read_text()
    assert "ASR of the controls at every exit" in page
