"""`UserError`, the exception whose message the command line prints on one line, and two checks that raise it."""

from math import inf


class UserError(Exception):
    """Bad input or a missing part. The command line prints its message on one line and exits with code 2."""


def missing_package(what: str, package: str, extra: str, keep: str = "") -> UserError:
    """The error where a package of an optional extra is not installed.

    Args:
        what: what needs the package; the beginning of the sentence.
        keep: a requirement that pip must not replace, such as `torch==2.13.0`.
    """
    command = " ".join(filter(None, (f"pip install 'exitwise[{extra}]'", keep)))
    return UserError(f"{what} needs the package {package}, which is not installed; run: {command}")


def check_ranges(config: object, ranges: tuple[tuple[str, float, float], ...]) -> None:
    """Raises UserError where a field of (name, least, most) is out of range; None is not set and passes."""
    for name, low, high in ranges:
        value = getattr(config, name)
        if value is not None and (value == inf or not low <= value <= high):
            wanted = f"at least {low}, and finite" if value == inf else f"at least {low}"
            wanted = wanted if high == inf else f"{low} to {high}"
            raise UserError(f"--{name.replace('_', '-')} got {value}; expected {wanted}")
