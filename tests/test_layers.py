"""The arrows of the house: a module imports only modules above it."""

import ast
from pathlib import Path

import exitwise

ORDER = (
    "errors",
    "quiet",
    "exit_names",
    "records",
    "runs",
    "data",
    "testbed",
    "families",
    "layout",
    "loading",
    "vlm",
    "exits",
    "costs",
    "features",
    "cka",
    "engines",
    "rewards",
    "judges",
    "config",
    "inputs",
    "timing",
    "stats",
    "agreement",
    "outcomes",
    "metrics",
    "pareto",
    "calibrate",
    "scorers",
    "score_metrics",
    "report",
    "compare",
    "markup",
    "tables",
    "audit",
    "align_config",
    "batches",
    "policy",
    "ppo",
    "signatures",
    "checkpoints",
    "rollout",
    "align_setup",
    "align_losses",
    "align_watch",
    "align",
    "reward_training",
    "slim_card",
    "slim",
    "inspection",
    "cli",
)
SOURCE = Path(exitwise.__file__).parent


def imported(path: Path) -> set[str]:
    """Top-level modules of exitwise that a file imports, relative or absolute."""
    depth = len(path.relative_to(SOURCE).parts)
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom):
            if node.level == depth:  # the package itself
                found |= {node.module.split(".")[0]} if node.module else {alias.name for alias in node.names}
            elif node.level == 0 and node.module and node.module.startswith("exitwise"):
                found |= set(node.module.split(".")[1:2]) or {alias.name for alias in node.names}
    return found


def test_imports_point_upwards():
    for path in SOURCE.rglob("*.py"):
        room = path.relative_to(SOURCE).parts[0].removesuffix(".py")
        if room in ("__init__", "__pycache__"):
            continue
        assert room in ORDER, f"{room} has no place in the tree: add it to ORDER and to the README"
        below = [name for name in imported(path) if name in ORDER and ORDER.index(name) > ORDER.index(room)]
        assert not below, f"{path.relative_to(SOURCE)} imports {below}, which lie below it"


def test_the_judging_side_needs_no_torch():
    """`judge`, `report` and `--help` must start at once."""
    import subprocess
    import sys

    rooms = ("cli", "judges", "metrics", "report", "compare")
    code = f"import sys, {', '.join(f'exitwise.{room}' for room in rooms)}; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
