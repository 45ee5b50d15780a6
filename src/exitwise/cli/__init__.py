"""The command line."""

from .commands import entry

__all__ = ["entry"]
