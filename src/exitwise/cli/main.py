"""Audit, align and ship vision-language models that leave their image encoder early."""

import errno
import inspect
import os
import re
import sys
from collections.abc import Sequence
from typing import NoReturn

import tyro
from tyro import _strings as tyro_strings

from ..errors import UserError
from .commands import Command, Runnable

EXIT_BAD_INPUT, EXIT_STOPPED, EXIT_PIPE = 2, 130, 141


def entry(arguments: Sequence[str] | None = None) -> None:
    """The command `exitwise`: an error is one line and exit code 2; `--debug` shows the traceback."""
    words = list(sys.argv[1:] if arguments is None else arguments)
    debug = "--debug" in words
    words = [word for word in words if word != "--debug"]
    if not words:
        words = ["--help"]
    try:
        parse(words).run()
    except BrokenPipeError:  # the reader had enough, as in `exitwise --help | head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # or the flush at the end raises again
        raise SystemExit(EXIT_PIPE) from None
    except UserError as error:
        if debug:
            raise
        _fail(str(error), EXIT_BAD_INPUT)
    except KeyboardInterrupt:
        _fail("stopped; run the same command again to resume", EXIT_STOPPED)
    except OSError as error:
        if debug or error.errno not in (errno.ENOSPC, errno.EACCES, errno.EROFS, errno.EDQUOT):
            raise
        where = f" ({error.filename})" if error.filename else ""
        _fail(
            f"cannot write: {error.strerror}{where}; free space or change the permissions, then run the same command "
            "again",
            EXIT_BAD_INPUT,
        )


def parse(words: Sequence[str]) -> Runnable:
    """The command that the words name, not yet run. Raises SystemExit where they name none."""
    return tyro.cli(Command, args=words, prog="exitwise", description=__doc__)  # type: ignore[call-overload]


def _join_help_lines() -> None:
    """Makes the lines of a paragraph flow in `--help`.

    tyro 1.0 joins the lines of a docstring before it removes their indentation, so that each indented line stays a line
    of its own. Its function is private: if a later tyro has no such function, nothing is replaced.
    """

    def join(helptext: str) -> str:
        return re.sub(r"(?<!\n)\n(?!\n)", " ", inspect.cleandoc(helptext))

    if hasattr(tyro_strings, "remove_single_line_breaks"):
        tyro_strings.remove_single_line_breaks = join


_join_help_lines()


def _fail(message: str, code: int) -> NoReturn:
    print(f"exitwise: {message}", file=sys.stderr)
    raise SystemExit(code)
