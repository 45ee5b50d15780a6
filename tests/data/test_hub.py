"""Data sets from the local cache of the Hugging Face hub."""

import os
import subprocess
import sys
from pathlib import Path

from tests.data.files import png

HUB = """
import sys
from exitwise.data.sets import load_benchmark
from exitwise.data.images import load_image
from exitwise.errors import UserError
found = load_benchmark("jailbreakv-mini")
print(len(found.samples), found.skipped, found.source["from"], found.source["revision"])
print(load_image(found.samples[0].image, found.roots).size)
print(len(load_benchmark("redteam2k").samples))
print(load_benchmark("own-benign", "hf://datasets/some/body@v1/deep/rows.csv").source["revision"])
for name, path in (("advbench", None), ("figstep", None), ("own-harmful", "hf://nonsense"), ("own-harmful", "hf://a/b"),
                   ("redteam2k", "hf://some/body@v1")):
    try:
        load_benchmark(name, path)
    except UserError as error:
        print(error)
print("torch" in sys.modules)
"""


def cached(home: Path, repo: str, revision: str, ref: str, files: dict[str, bytes]) -> None:
    """The hub's own cache layout: snapshots are links into blobs, refs name the commits."""
    store = home / "hub" / f"datasets--{repo.replace('/', '--')}"
    (store / "refs").mkdir(parents=True)
    (store / "refs" / ref).write_text(revision)
    (store / "blobs").mkdir()
    for i, (name, content) in enumerate(files.items()):
        (store / "blobs" / f"b{i}").write_bytes(content)
        link = store / "snapshots" / revision / name
        link.parent.mkdir(parents=True, exist_ok=True)
        link.symlink_to(os.path.relpath(store / "blobs" / f"b{i}", link.parent))


def test_sets_come_from_the_right_place_of_the_hub(tmp_path):
    head = "id,jailbreak_query,redteam_query,format,policy,image_path\n"
    rows = f"{head}0,Say it,it,SD,Fraud,figstep/a.png\n1,Say it,it,SD,Fraud,figstep/b.png\n"
    files = {
        "JailBreakV_28K/mini_JailBreakV_28K.csv": rows.encode(),
        "JailBreakV_28K/RedTeam_2K.csv": b"id,question,policy,from\n0,How?,Fraud,x\n",
        "JailBreakV_28K/figstep/a.png": png("red"),
    }
    cached(tmp_path, "JailbreakV-28K/JailBreakV-28k", "a" * 40, "main", files)
    cached(tmp_path, "some/body", "b" * 40, "v1", {"deep/rows.csv": b"prompt\nHow?\n"})
    environment = os.environ | {"HF_HOME": str(tmp_path), "HF_HUB_OFFLINE": "1", "HF_HUB_CACHE": str(tmp_path / "hub")}
    result = subprocess.run([sys.executable, "-c", HUB], capture_output=True, text=True, env=environment, check=False)
    lines = result.stdout.splitlines()
    assert result.returncode == 0, result.stderr
    missing = "['mini_JailBreakV_28K.csv, line 3: the image is missing (figstep/b.png)']"
    assert lines[:4] == [f"1 {missing} JailbreakV-28K/JailBreakV-28k {'a' * 40}", "(8, 8)", "1", "b" * 40]
    assert lines[4].startswith("cannot fetch data/train-*.parquet of the data set walledai/AdvBench (")
    assert lines[5].startswith(
        "figstep is not on the hub; give its files as figstep:PATH and its images with --image-root"
    )
    assert lines[6] == "'hf://nonsense' is no address on the hub; expected hf://datasets/OWNER/NAME[@REVISION][/FILE]"
    assert lines[7] == "hf://a/b names no file; expected hf://datasets/OWNER/NAME/FILE"
    assert lines[8].startswith("the data set some/body has no JailBreakV_28K/RedTeam_2K.csv")
    assert lines[9] == "False"
