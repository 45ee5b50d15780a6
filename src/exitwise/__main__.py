"""`python -m exitwise` is the command `exitwise`."""

from .cli import entry

entry()
