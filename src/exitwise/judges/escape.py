"""Breaks control tokens, fences and turns in untrusted text before it goes into a guard's prompt.

An answer may hold the control tokens of the guard that reads it (`<|eot_id|>`, `</s>`), its fences (`<END
CONVERSATION>`) or its turns (`Agent:` at the start of a line), and so end its own part of the prompt and forge what
comes after. Each gets one blank after its first character, or before its colon: a reader sees the same words,
the tokenizer and the guard no longer see structure. Text without them is passed on as it is, so that the
prompt is the published one to the letter.
"""

import re
from collections.abc import Iterable

CONTROL = re.compile(
    r"<\|[^<>|\s]{1,40}\|>|</?s>|<[bep](?:os|ad)>|\[/?INST\]|<</?SYS>>|<(?:start|end)_of_\w{1,20}>|<image(?:_soft_token)?>"
    r"|</?(?:think|score|guardian|no-think|confidence)>|<(?:BEGIN|END) [A-Z ]{3,60}>",
    re.IGNORECASE,
)
"""Control tokens and fences of the guards in the table, for text that a remote tokenizer will read."""

ROLES = re.compile(
    r"(?m)^([ \t]*\**(?:user|agent|assistant|human user|ai assistant|human question|chatbot response|answers?"
    r"|\[?behavior\]?|\[?generation\]?|#{1,4} ?criteria|#{1,4} ?scoring schema|verdict)\**)(?=[ \t]*:)",
    re.IGNORECASE,
)


def neutralise(text: str, tokens: Iterable[str] = ()) -> str:
    """`text` with every control token, fence and turn broken.

    Args:
        tokens: of the guard's own tokenizer, beside those known here.
    """
    own = sorted({token for token in tokens if len(token) > 2 and not token.isspace()}, key=len, reverse=True)
    listed = re.compile("|".join(map(re.escape, own))) if own else None
    while True:
        broken = CONTROL.sub(_break, text)
        broken = listed.sub(_break, broken) if listed else broken
        if broken == text:
            return ROLES.sub(r"\1 ", text)
        text = broken


def _break(found: re.Match[str]) -> str:
    return f"{found[0][0]} {found[0][1:]}"
