"""Judges behind an OpenAI-compatible endpoint: a commercial one, or your own `vllm serve`.

The key comes from EXITWISE_JUDGE_API_KEY, else OPENAI_API_KEY, goes into one header, and is never written to a file. A
server that is busy or broken gets the request again after growing pauses.
"""

import json
import math
import os
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NamedTuple
from urllib.parse import urlsplit

from ..errors import UserError
from .guards import GuardRequest
from .http_post import HttpReply, post, retry

TRIES = 6
LONGEST_PAUSE = 60.0
SECONDS = 120.0
KEYS = ("EXITWISE_JUDGE_API_KEY", "OPENAI_API_KEY")
BUSY = (0, 408, 409, 425, 429, 500, 502, 503, 504)
"""Status codes after which the request is sent again; 0: no reply arrived."""


class EndpointReply(NamedTuple):
    """The endpoint's reply to one request.

    Attributes:
        tokens: each token's text with the log-probabilities of the likeliest tokens there, where the server gives them.
        refused: why the server did not answer this request; "" where it did.
    """

    text: str
    tokens: tuple[tuple[str, dict[str, float]], ...] = ()
    refused: str = ""


def check_address(url: str) -> None:
    """Raises UserError for what is not an address, or contains a user name, a password or a query."""
    parts = urlsplit(url)
    if parts.scheme not in ("http", "https") or not parts.hostname:
        raise UserError(f"--judge-endpoint got {_shown(url)!r}; expected an address like http://localhost:8000/v1")
    if parts.username or parts.password or parts.query:
        raise UserError(
            "--judge-endpoint contains more than an address; set the key in the environment as EXITWISE_JUDGE_API_KEY"
        )


class Endpoint:
    """An address and a model there; `ask` answers a batch in its order, eight requests at a time."""

    def __init__(self, url: str, model: str, pause: Callable[[float], None] = time.sleep):
        check_address(url)
        self.url, self.model, self.pause = url.rstrip("/"), model, pause

    def ask(self, requests: Sequence[GuardRequest], room: int, logprobs: bool) -> list[EndpointReply]:
        """The replies to a batch of requests.

        Args:
            room: tokens of a reply at the most.
            logprobs: request the log-probabilities of the likeliest 20 tokens.

        Raises:
            UserError: the server does not answer, or refuses the key, the model or the form of the request.
        """
        with ThreadPoolExecutor(8) as pool:
            return list(pool.map(lambda request: self._ask(request, room, logprobs), requests))

    def _ask(self, request: GuardRequest, room: int, logprobs: bool) -> EndpointReply:
        body: dict[str, object] = {"model": self.model, "temperature": 0, "max_tokens": room}
        if request.text:
            path, body["prompt"] = "/completions", request.text
        else:
            path = "/chat/completions"
            body["messages"] = [{"role": role, "content": text} for role, text in request.messages]
            if logprobs:
                body |= {"logprobs": True, "top_logprobs": 20}
            if request.template:
                # vLLM's; only guards with such a template send it
                body["chat_template_kwargs"] = dict(request.template)
        headers = {"Content-Type": "application/json"}
        key = next((os.environ[name] for name in KEYS if os.environ.get(name)), "")
        if key:
            headers["Authorization"] = f"Bearer {key}"
        data = json.dumps(body).encode()
        send = lambda: post(self.url + path, data, headers, SECONDS)
        return self._read(retry(send, _is_final, _pause, TRIES, self.pause), bool(request.text))

    def _read(self, reply: HttpReply, plain: bool) -> EndpointReply:
        if reply.status == 400:
            message = reply.body[:2000].decode("utf-8", "replace")
            if "content" in message and ("filter" in message or "policy" in message):
                return EndpointReply("", refused="the endpoint's content filter refused the request")
        if not _is_final(reply):
            cause = f"HTTP {reply.status}" if reply.status in BUSY[1:] else reply.body[:200].decode("utf-8", "replace")
            raise UserError(
                f"{self.url} did not answer after {TRIES} tries ({cause}); what was judged is kept: the same command "
                "resumes there"
            )
        if not 200 <= reply.status < 300:
            raise UserError(self._fatal(reply.status))
        return _parse(json.loads(reply.body), plain)

    def _fatal(self, code: int) -> str:
        if code in (401, 403):
            return f"{self.url} refused the key (HTTP {code}); set {KEYS[0]} or {KEYS[1]} in the environment"
        if 300 <= code < 400:
            return f"{self.url} points elsewhere (HTTP {code}); give --judge-endpoint the final address"
        return (
            f"{self.url} cannot use the request (HTTP {code}); check --judge-endpoint (it usually ends in /v1) and "
            f"that it serves the model {self.model!r} (--judge-model)"
        )


def _is_final(reply: HttpReply) -> bool:
    """Whether asking again is of no use; a success that is not JSON comes from a broken server."""
    if not 200 <= reply.status < 300:
        return reply.status not in BUSY
    try:
        json.loads(reply.body)
    except ValueError:
        return False
    return True


def _pause(attempt: int, reply: HttpReply) -> float:
    return min(2.0**attempt if reply.retry_after is None else reply.retry_after, LONGEST_PAUSE)


def _parse(answer: Any, plain: bool) -> EndpointReply:
    """Raises UserError where the JSON is not of the protocol's form."""
    try:
        choice = answer["choices"][0]
        if choice.get("finish_reason") == "content_filter":
            return EndpointReply("", refused="the endpoint's content filter cut the reply")
        text = choice["text"] if plain else choice["message"]["content"]
        steps = () if plain else ((choice.get("logprobs") or {}).get("content") or ())
        tokens = tuple(
            (step["token"], {likely["token"]: float(likely["logprob"]) for likely in step["top_logprobs"]})
            for step in steps
        )
    except (KeyError, IndexError, TypeError, AttributeError, ValueError):
        raise UserError(
            "the endpoint's answer is not of the OpenAI form (choices[0].message.content); check --judge-endpoint"
        ) from None
    return EndpointReply((text or "").encode("utf-8", "replace").decode(), tokens)  # lone surrogates break UTF-8


def shares(reply: EndpointReply, at: int, words: Sequence[str]) -> tuple[float, float] | None:
    """(restricted, raw) probability of `words[0]` at character `at` of the reply, from the likeliest 20 tokens.

    Words that are not among the 20 count as 0, so that the restricted share is an upper or lower bound there.
    """
    length = 0
    for token, likely in reply.tokens:
        length += len(token)
        if length > at:
            masses = [0.0 for _ in words]
            for text, logprob in likely.items():
                fits = [i for i, word in enumerate(words) if _begins(word, text)]
                if len(fits) == 1:
                    masses[fits[0]] += math.exp(logprob)
            total = sum(masses)
            return (float(f"{masses[0] / total:.6g}"), float(f"{masses[0]:.6g}")) if total else None
    return None


def _begins(word: str, token: str) -> bool:
    token = token.strip().lower()
    return bool(token) and word.lower().startswith(token)


def _shown(url: str) -> str:
    """The address without what may be a key."""
    return url.split("@")[-1].split("?")[0][:100]
