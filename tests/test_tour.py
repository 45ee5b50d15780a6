"""The tour: the code of docs/tour.py runs as it stands, and docs/tour.ipynb is that code, executed."""

import ast
import json
import os
import re
from dataclasses import replace

import matplotlib
import pytest

from exitwise import Run
from exitwise.model.loading import load_vlm
from tests.align_setup import VowelReward
from tests.conftest import ROOT, tiny_llava

SOURCE = (ROOT / "docs/tour.py").read_text(encoding="utf-8")
CELLS = re.findall(r"^# %%( \[markdown\])?\n(.*?)(?=^# %%|\Z)", SOURCE, re.M | re.S)
CODE = [body.strip() for markdown, body in CELLS if not markdown]
NOTEBOOK = ROOT / "docs/tour.ipynb"


@pytest.fixture
def built_in(tmp_path_factory, monkeypatch):
    """A saved random model of 12 blocks in place of the built-in VLM, whose tour takes four minutes of a core, and a
    reward without a model. `make tour` runs the same cells on the built-in one; EXITWISE_REAL_TOUR=1 does so here."""
    if os.environ.get("EXITWISE_REAL_TOUR"):
        return
    folder = tmp_path_factory.mktemp("stand-in")
    model = tiny_llava(layers=12)
    model.model.save_pretrained(folder)
    model.processor.save_pretrained(folder)

    def load(name, **options):
        return replace(load_vlm(folder if name == "testbed" else name, **options), name=str(name))

    for module in ("exitwise", "exitwise.model.loading", "exitwise.alignment.setup", "exitwise.shipping.slim"):
        monkeypatch.setattr(f"{module}.load_vlm", load)
    monkeypatch.setattr("exitwise.alignment.setup.load_scores", lambda *_: VowelReward())


def test_the_tour_runs(built_in, tmp_path, monkeypatch):
    """Cell by cell; a cell's last expression is what a notebook shows."""
    matplotlib.use("agg")
    monkeypatch.chdir(tmp_path)
    names: dict[str, object] = {}
    shown = []
    for cell in CODE:
        tree = ast.parse(cell)
        *body, last = tree.body
        if isinstance(last, ast.Expr):
            exec(compile(ast.Module(body, []), "tour", "exec"), names)
            shown.append(eval(compile(ast.Expression(last.value), "tour", "eval"), names))
        else:
            exec(compile(tree, "tour", "exec"), names)
    vlm, answers, before, figures, let_through, curve, history, _, table, folder, headline = shown
    assert repr(vlm) == "Vlm(testbed, llava, 12 blocks, default exit 11, cpu)"
    assert [str(exit) for exit in answers] == ["2", "11"]
    assert all(isinstance(text, str) and "assistant" not in text for text in answers.values())
    assert before._repr_html_().count("<tr") == 3
    assert figures["exit"].tolist() == ["8", "11"]
    assert set(let_through["label"]) <= {"answered"}
    assert curve.get_xlabel().startswith("exit")
    assert len(history) == 2
    assert {"name", "asr_change"} <= set(table.columns)
    assert (folder / "model.safetensors").is_file()
    after = names["after"]
    assert isinstance(after, Run)
    assert headline == after.answer.headline


def test_the_notebook_is_the_source_executed():
    notebook = json.loads(NOTEBOOK.read_text(encoding="utf-8"))
    code = [cell for cell in notebook["cells"] if cell["cell_type"] == "code"]
    assert ["".join(cell["source"]).strip() for cell in code] == CODE, "run `make tour`"
    assert [cell["execution_count"] for cell in code] == list(range(1, len(code) + 1))
    assert not [out for cell in code for out in cell["outputs"] if out["output_type"] == "error"]
    assert NOTEBOOK.stat().st_size < 250_000
    assert not re.search(r"/(home|root|tmp|work|Users)/", NOTEBOOK.read_text(encoding="utf-8"))
