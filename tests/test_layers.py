"""The order of the packages: each imports only those above it, and inside one there is no circle."""

import ast
import subprocess
import sys
from graphlib import TopologicalSorter
from pathlib import Path

import exitwise

ORDER = (
    "errors",
    "run",
    "data",
    "model",
    "engines",
    "judges",
    "measure",
    "rewards",
    "scorers",
    "report",
    "comparison",
    "people",
    "auditing",
    "alignment",
    "shipping",
    "cli",
)
OUTSIDE = ("__init__", "__main__")
"""The public API and the start of the command line stand above all packages."""
SOURCE = Path(exitwise.__file__).parent


def imports_of(path: Path) -> set[str]:
    """Modules of exitwise that a file imports, wherever in the file, as `package.module` paths."""
    parts = path.relative_to(SOURCE).with_suffix("").parts
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if not isinstance(node, ast.ImportFrom):
            continue
        if node.level:
            base = [*parts[: len(parts) - node.level], *(node.module or "").split(".")]
        elif node.module and node.module.split(".")[0] == "exitwise":
            base = node.module.split(".")[1:]
        else:
            continue
        base = [part for part in base if part]
        for alias in node.names:
            found.add(".".join(module_of([*base, alias.name]) or module_of(base)))
    return found - {""}


def module_of(parts: list[str]) -> list[str]:
    """The longest beginning of `parts` that is a module or a package; [] where none is."""
    path = SOURCE.joinpath(*parts)
    if parts and (path.with_suffix(".py").is_file() or (path / "__init__.py").is_file()):
        return parts
    return []


FILES = sorted(
    path for path in SOURCE.rglob("*.py") if path.relative_to(SOURCE).parts[0].removesuffix(".py") not in OUTSIDE
)


def test_each_package_imports_only_packages_above_it():
    assert len(FILES) > 60
    for path in FILES:
        package = path.relative_to(SOURCE).parts[0].removesuffix(".py")
        assert package in ORDER, f"{package} has no place in the order: add it to ORDER and to the README"
        below = {name for name in imports_of(path) if ORDER.index(name.split(".")[0]) > ORDER.index(package)}
        assert not below, f"{path.relative_to(SOURCE)} imports {sorted(below)}, which lie below it"


def test_no_package_has_a_circle_of_imports():
    graph = {}
    for path in FILES:
        parts = path.relative_to(SOURCE).with_suffix("").parts
        name = ".".join(parts[:-1] if parts[-1] == "__init__" else parts)
        graph[name] = {other for other in imports_of(path) if other.split(".")[0] == parts[0]} - {name}
    TopologicalSorter(graph).prepare()  # raises CycleError, which names the circle


def test_few_names_lie_directly_in_the_package():
    names = {path.name for path in SOURCE.iterdir() if path.name not in ("__pycache__", "__init__.py")}
    assert len(names) <= 18, sorted(names)


def test_the_judging_side_needs_no_torch():
    """`judge`, `report` and `--help` must start at once."""
    rooms = ("cli.commands", "judges", "measure.metrics", "report", "comparison")
    code = f"import sys, {', '.join(f'exitwise.{room}' for room in rooms)}; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
