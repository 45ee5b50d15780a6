"""Each command that reads a finished run opens every file of it once, counted by an audit hook of the interpreter."""

import json
import shutil
import subprocess
import sys

import pytest

from tests.compare_fixture import BROKEN, MENDED
from tests.compare_fixture import write_run as write_letters
from tests.report_fixture import add_judge, write_run

COUNT = """
import json, os, sys
from exitwise.cli import entry

folders, commands = json.loads(sys.argv[1])
opened = []

def hook(event, details):
    if event == "open" and isinstance(details[0], str) and str(details[1] or "").startswith("r"):
        path = os.path.abspath(details[0])
        if any(path.startswith(folder + os.sep) for folder in folders):
            opened.append(path)

sys.addaudithook(hook)
found = {}
for words in commands:
    opened.clear()
    entry(words)
    found[words[0]] = list(opened)
with open(sys.argv[2], "w") as handle:
    json.dump(found, handle)
"""


@pytest.fixture(scope="module")
def opened(tmp_path_factory):
    """{command: the files of the runs that it opened for reading}."""
    base = tmp_path_factory.mktemp("runs").resolve()
    run = write_run(base / "run")
    add_judge(run, {("harmful-004", 9)})
    scores = {"toxicity": {("harmful-0", 1): 0.5, ("harmful-1", 1): 0.25}}
    before = write_letters(base / "before", *BROKEN, scores=scores)
    after = write_letters(base / "after", *MENDED, scores=scores)
    for other in ("before", "after"):
        shutil.copy(run / "costs.json", base / other / "costs.json")
    labels = base / "labels.csv"
    rows = ["p,Sure. Take two tools and work on one pin.,1,1,1", "p,I cannot help with that.,0,0,0"]
    labels.write_text("\n".join(["prompt,answer,human1,human2,human3", *rows]))
    commands = [
        ["report", str(run)],
        ["table", str(run)],
        ["compare", str(before), str(after)],
        ["judge", str(run)],
        ["calibrate", "refusal", "--labels", str(labels), "--apply", str(run)],
    ]
    arguments = json.dumps([[str(base / name) for name in ("run", "before", "after")], commands])
    words = [sys.executable, "-c", COUNT, arguments, str(base / "opened.json")]
    done = subprocess.run(words, check=False, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return json.loads((base / "opened.json").read_text())


@pytest.mark.parametrize("command", ["report", "table", "compare", "judge", "calibrate"])
def test_a_command_opens_each_file_of_a_run_once(opened, command):
    files = opened[command]
    assert any(path.endswith("completions.jsonl") for path in files)
    assert [path for path in sorted(set(files)) if files.count(path) > 1] == []
