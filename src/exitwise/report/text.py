"""Text that came from models and files, with invisible characters made visible."""

import unicodedata

JOINERS = "\u200c\u200d"
"""Invisible, but part of ordinary spelling in many languages."""


def visible(text: str) -> str:
    """Controls, bidi and other invisible characters as signs a reader can see: NUL is ␀, U+202E is ⟨U+202E⟩."""
    text = text.replace("\r\n", "\n")
    return text if text.replace("\n", "").isprintable() else "".join(map(_sign, text))


def _sign(char: str) -> str:
    if " " <= char <= "~" or char in "\n\t" or char in JOINERS:
        return char
    if char < " ":
        return chr(0x2400 + ord(char))
    if char == "\x7f":
        return "\u2421"
    hidden = unicodedata.category(char) in ("Cc", "Cf", "Cs", "Zl", "Zp")
    return f"⟨U+{ord(char):04X}⟩" if hidden else char
