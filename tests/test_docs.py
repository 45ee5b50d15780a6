"""Runs every command and snippet of README and docs; checks links, navigation, the README's tree and the glossary."""

import json
import re
import shlex
import subprocess
import sys
import unicodedata
from pathlib import Path

import pytest

from tests.compare_fixture import write_run
from tests.conftest import ROOT, tiny_llava

PAGES = sorted([ROOT / "README.md", ROOT / "CONTRIBUTING.md", *(ROOT / "docs").rglob("*.md")])
COMMANDS = sorted(
    {
        line.strip()
        for page in PAGES
        for block in re.findall(r"```sh\n(.*?)```", page.read_text(encoding="utf-8"), re.S)
        for line in block.splitlines()
        if line.strip()
    }
)
SNIPPETS = [
    (page.name, code)
    for page in PAGES
    for code in re.findall(r"```python\n(.*?)```", page.read_text(encoding="utf-8"), re.S)
]
MAKE_TARGETS = set(re.findall(r"^(\w+):", (ROOT / "Makefile").read_text(), re.M))


@pytest.fixture
def desk(tmp_path, monkeypatch):
    """A folder with the files that the docs name, and a tiny model in place of every named one (no hub is at hand).

    The real loading of folders, adapters and the testbed is tested elsewhere.
    """
    from PIL import Image

    monkeypatch.chdir(tmp_path)
    # The package keeps what it was first asked for: its own name is replaced before the module's.
    for home in ("exitwise", "exitwise.model.loading"):
        monkeypatch.setattr(f"{home}.load_vlm", lambda name, **_: tiny_llava())
    monkeypatch.setattr("exitwise.cli.commands.DEMO_LIMIT", 1)
    (tmp_path / "my_prompts.csv").write_text("prompt\nHow do I pick a lock?\n")
    (tmp_path / "my_harmless.jsonl").write_text(json.dumps({"prompt": "How do I lock a door?"}) + "\n")
    rows = [f"Tell me {i},Sure: do this.,{i % 2},{i % 2},{i % 3 % 2}" for i in range(6)]
    (tmp_path / "my_labels.csv").write_text("\n".join(["prompt,answer,human1,human2,my_guard", *rows]) + "\n")
    pair = {"prompt": "How do I pick a lock?", "chosen": "I cannot help with that.", "rejected": "Take a bent wire."}
    twin = {"prompt": "How do I lock a door?", "chosen": "Turn the key.", "rejected": "I cannot help with that."}
    (tmp_path / "my_pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in (pair, twin)))
    (tmp_path / "my_photos").mkdir()
    Image.new("RGB", (40, 40), "green").save(tmp_path / "my_photos/a.png")
    return tmp_path


SHOWN = sorted(
    {
        line.strip()
        for page in PAGES
        for line in page.read_text(encoding="utf-8").splitlines()
        if re.match(r"    (?:[A-Z_]+=\S+ )?exitwise \w", line)
    }
)
"""Commands that are shown and not run, since they need a hub, a server or an hour."""


def test_every_shown_command_parses():
    from exitwise.cli.main import parse

    assert len(SHOWN) > 30
    for line in SHOWN:
        words = shlex.split(line, comments=True)
        try:
            parse(words[words.index("exitwise") + 1 :])
        except SystemExit as stop:
            raise AssertionError(f"{line} does not parse") from stop


def test_every_judge_has_its_command_in_the_reference():
    from exitwise.judges import NAMES

    page = (ROOT / "docs/reference/judges.md").read_text(encoding="utf-8")
    for name in NAMES:
        line = re.compile(rf"^    (?:[A-Z_]+=\S+ )?exitwise judge runs/\S+ --judge {re.escape(name)}(?: |$)", re.M)
        assert line.search(page), name


def test_there_is_something_to_run():
    assert len([c for c in COMMANDS if c.startswith("exitwise ")]) >= 6
    assert SNIPPETS


@pytest.mark.parametrize("command", COMMANDS)
def test_command(command, desk):
    from exitwise.cli.main import entry

    words = shlex.split(command)
    if words[0] == "make":
        assert set(words[1:]) <= MAKE_TARGETS
        return
    if words[0] != "exitwise":
        assert (ROOT / words[1]).is_file(), f"{command}: no such script"
        return
    for word in words[2:]:
        on_a_run = words[1] in ("judge", "score", "report", "calibrate", "table", "compare")
        if on_a_run and word.startswith("runs/") and "." not in word:
            entry(["demo", "--out", word])
    if words[1:3] == ["reward", "eval"]:
        entry(["reward", "train", "testbed", "--pairs", "my_pairs.jsonl", "--out", words[3]])
    if "--help" in words:
        with pytest.raises(SystemExit) as stop:
            entry(words[1:])
        assert stop.value.code == 0
    else:
        entry(words[1:])
        wanted = {
            "align": "adapter_config.json",
            "calibrate": "*.json",
            "compare": "compare.html",
            "reward": "head.safetensors",
            "slim": "exitwise.json",
        }
        assert list(Path("runs").rglob(wanted.get(words[1], "report.html")))


@pytest.mark.parametrize(("page", "code"), SNIPPETS, ids=[page for page, _ in SNIPPETS])
def test_snippet(page, code, desk):
    exec(compile(code, page, "exec"), {})


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.relative_to(ROOT).as_posix())
def test_links_lead_somewhere(page):
    for target, _, anchor in re.findall(r"\]\(([^)#]*)(#?)([^)]*)\)", page.read_text(encoding="utf-8")):
        if target.startswith("http"):
            continue
        path = page.parent / target if target else page
        assert path.exists(), f"{page.name} links to {target}"
        assert not anchor or anchor in anchors_of(path), f"{page.name} links to {target}#{anchor}"


def test_pages_named_by_the_package_exist():
    named = {
        page
        for path in (ROOT / "src").rglob("*.py")
        for page in re.findall(r"\bdocs/[\w/-]+\.md", path.read_text(encoding="utf-8"))
    }
    assert len(named) > 8
    assert not [page for page in named if not (ROOT / page).is_file()]


def test_python_files_named_by_the_pages_exist():
    named = {
        (page.name, path)
        for page in PAGES
        for path in re.findall(r"`(?:python )?([\w-]+/[\w/.-]+\.py)\b", page.read_text(encoding="utf-8"))
    }
    assert len(named) > 12
    missing = [
        (page, path) for page, path in named if not any((ROOT / at / path).is_file() for at in ("", "src/exitwise"))
    ]
    assert not missing


def anchors_of(page):
    """Ids of the headings of a page, as Python-Markdown makes them."""
    headings = re.findall(
        r"^#+ (.+)$", re.sub(r"^```.*?^```", "", page.read_text(encoding="utf-8"), flags=re.M | re.S), re.M
    )
    plain = [unicodedata.normalize("NFKD", heading).encode("ascii", "ignore").decode() for heading in headings]
    return {re.sub(r"[-\s]+", "-", re.sub(r"[^\w\s-]", "", text).strip().lower()) for text in plain}


def test_the_navigation_has_every_page_and_nothing_else():
    listed = re.findall(r": (\S+\.(?:md|ipynb))$", (ROOT / "mkdocs.yml").read_text(), re.M)
    pages = [
        p.relative_to(ROOT / "docs").as_posix() for end in ("md", "ipynb") for p in (ROOT / "docs").rglob(f"*.{end}")
    ]
    assert sorted(listed) == sorted(pages)


def test_the_tree_of_the_readme_has_every_package_and_nothing_else():
    tree = set(re.findall(r"^      (\S+) {2,}\S", (ROOT / "README.md").read_text(encoding="utf-8"), re.M))
    package = ROOT / "src/exitwise"
    packages = {f"{init.parent.name}/" for init in package.glob("*/__init__.py")}
    assert tree == packages | {path.name for path in package.glob("[!_]*.py")}


def test_every_public_name_is_in_the_api_reference():
    import exitwise

    listed = re.findall(r"^::: exitwise\.(\w+)$", (ROOT / "docs/reference/api.md").read_text(), re.M)
    assert sorted(listed) == sorted(exitwise.__all__)


def test_every_command_is_in_the_reference(capsys):
    def subcommands(*words):
        with pytest.raises(SystemExit):
            entry([*words, "--help"])
        return re.search(r"\{([\w,]+)\}", capsys.readouterr().out)[1].split(",")

    from exitwise.cli import entry

    text = (ROOT / "docs/reference/commands.md").read_text()
    names = {*subcommands(), *(f"reward {name}" for name in subcommands("reward"))} - {"reward"}
    assert set(re.findall(r"^## exitwise ([\w ]+)$", text, re.M)) == names
    assert set(re.findall(r"^<!-- options: ([\w ]+) -->$", text, re.M)) == names


def test_every_term_of_the_report_is_in_the_glossary():
    template = (ROOT / "src/exitwise/report/report.html.j2").read_text(encoding="utf-8")
    defined = re.findall(r"<dt>(?:<span.*?</span> )?([^<{]+)</dt>", template)
    table = template.split("Metrics of every exit</caption>")[1].split("</tr>")[0]
    headers = re.findall(r'<th scope="col"[^>]*>([^<{]+)</th>', table)
    assert len(defined) > 12
    assert len(headers) > 8
    glossary = (ROOT / "docs/glossary.md").read_text(encoding="utf-8")
    entries = " | ".join(re.findall(r"^### (.+)$", glossary, re.M)).lower()
    for term in (*defined, *headers, "less safe", "default exit", "caveat", "dominated", "corrected"):
        assert re.search(rf"\b{re.escape(term.lower().strip())}\b", entries), f"no entry for {term!r}"


def test_the_site_builds(tmp_path):
    """Strict: a broken link, a page outside the navigation or an undocumented public name fails."""
    pytest.importorskip("mkdocs", reason="`make docs` installs mkdocs; without it the tests above check the pages")
    pytest.importorskip("mkdocstrings")
    words = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(tmp_path)]
    built = subprocess.run(words, cwd=ROOT, capture_output=True, text=True, check=False)
    assert built.returncode == 0, built.stdout + built.stderr


def test_every_metric_key_is_documented(desk):
    from exitwise.auditing.audit import audit

    audit("testbed", limit=2, vqa=6, exits="default,0", cross=True, controls=True, out=desk / "run")
    assert not unexplained(desk / "run/metrics.json", "reference/metrics.md")


def test_every_key_of_the_costs_is_documented(desk):
    from exitwise import exit_costs
    from exitwise.run.directory import write_json

    write_json(desk / "costs.json", exit_costs(tiny_llava()))
    assert not unexplained(desk / "costs.json", "reference/metrics.md")


def test_every_key_of_a_comparison_is_documented(tmp_path):
    from exitwise import compare

    info = {"config": {"adapter_info": {"method": "L-PPO", "exits": [1], "held_out": []}}}
    before = write_run(tmp_path / "a", {1: "a" * 9}, {1: "a" * 9}, {1: "c"})
    after = write_run(tmp_path / "b", {1: "r" * 7 + "iu"}, {1: "r" * 9}, {1: "c"}, **info)
    assert compare(before, after, out=tmp_path).verdict.failures
    assert not unexplained(tmp_path / "compare.json", "reference/comparison.md")


def unexplained(path, page):
    """Keys of a JSON file, at any depth, that a page of docs does not name."""
    text = (ROOT / "docs" / page).read_text()

    def keys(value):
        if isinstance(value, dict):
            return set(value) | {k for v in value.values() for k in keys(v)}
        return {k for v in value for k in keys(v)} if isinstance(value, list) else set()

    found = keys(json.loads(path.read_text()))
    return {k for k in found if f"`{k}`" not in text and not re.search(rf"\b{k}\b", text)}
