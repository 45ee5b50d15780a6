"""Build hooks of the documentation site: the options of every command, and a check that the API reference is complete.

Problems are logged as warnings, which `mkdocs build --strict` turns into a failed build.
"""

import html
import logging
import os
import re
import subprocess
import sys
from pathlib import Path

import griffe

SOURCE = Path(__file__).parents[1] / "src"
log = logging.getLogger("mkdocs.hooks.exitwise")
OPTIONS = re.compile(r"<!-- options: ([\w ]+) -->")
ENTRIES = re.compile(r"^::: exitwise\.(\w+)$", re.M)
WIDE = "4000"  # columns of the terminal: each option on one line


def on_startup(**_) -> None:
    """Makes the package of this checkout importable: it need not be installed."""
    sys.path.insert(0, str(SOURCE))


def on_page_markdown(markdown: str, page, config, files) -> str:
    """Replaces `<!-- options: COMMAND -->` by what `exitwise COMMAND --help` prints, as a table."""
    if page.file.src_uri == "reference/api.md":
        for problem in problems_of_api(markdown):
            log.warning("reference/api.md: %s", problem)
    return OPTIONS.sub(lambda match: options_of(help_of(match[1])), markdown)


def problems_of_api(markdown: str) -> list[str]:
    """Public names without an entry on the page, entries that are not public, and public names without a docstring."""
    import exitwise

    listed, public = ENTRIES.findall(markdown), set(exitwise.__all__)
    package = griffe.load("exitwise", search_paths=[SOURCE], try_relative_path=False)
    found = [f"exitwise.{name} is public but has no entry" for name in sorted(public - set(listed))]
    found += [f"exitwise.{name} has an entry but is not public" for name in sorted(set(listed) - public)]
    for name in sorted(public & set(listed)):
        target = package[name].final_target if package[name].is_alias else package[name]
        parts = [
            target,
            *(m for m in target.members.values() if target.is_class and m.is_function and not m.name.startswith("_")),
        ]
        found += [f"{part.path} has no docstring" for part in parts if not (part.is_attribute or part.docstring)]
    return found


def help_of(command: str) -> str:
    """What `exitwise COMMAND --help` prints on a wide terminal."""
    words = [sys.executable, "-m", "exitwise", *command.split(), "--help"]
    environment = {"COLUMNS": WIDE, "NO_COLOR": "1", "PYTHONIOENCODING": "utf-8", "PYTHONPATH": str(SOURCE)}
    done = subprocess.run(words, env=os.environ | environment, capture_output=True, encoding="utf-8", check=False)
    if done.returncode:
        raise RuntimeError(f"exitwise {command} --help fails: {done.stderr}")
    return done.stdout


def options_of(text: str) -> str:
    """The description, then a table of arguments and options.

    Args:
        text: usage, description, and boxes of lines `│ NAME  HELP │`; a long name has its help on the next lines.
    """
    lines = text.splitlines()
    boxed = next(number for number, line in enumerate(lines) if line.startswith("╭"))
    rows: list[list[str]] = []
    for line in lines[boxed:]:
        if line.startswith("╭"):
            group = []
        elif line.startswith("╰"):
            rows += group
        elif line.startswith("│ ──"):
            group = []  # what precedes the rule describes the group
        elif line.startswith("│   "):
            group[-1][1] += " " + line[1:-1].strip()
        else:
            name, _, effect = line[1:-1].strip().partition("  ")
            group.append([name, effect.strip()])
    usage, _, description = "\n".join(lines[:boxed]).strip().partition("\n\n")
    cells = [(name.replace("{None}|", ""), _escaped(effect)) for name, effect in rows if name != "-h, --help"]
    table = "\n".join(f"| `{name}` | {effect} |" for name, effect in cells)
    return f"```\n{usage.strip()}\n```\n\n{description.strip()}\n\n| argument | effect |\n|---|---|\n{table}"


def _escaped(text: str) -> str:
    """Text for a cell of a table: `code` stays, anything else is no link, tag, emphasis or column."""
    parts = text.strip().split("`")
    parts[::2] = [re.sub(r"([\[\]*_|])", r"\\\1", html.escape(part, quote=False)) for part in parts[::2]]
    return "`".join(parts)
