"""HTTP POST requests, sent again while a service is busy. Redirects are not followed: a key would go along."""

import http.client
import urllib.error
import urllib.request
from collections.abc import Callable, Mapping
from typing import NamedTuple

MOST_ERROR_BYTES = 20_000
"""Read of the body of an error."""


class HttpReply(NamedTuple):
    """What came back for one request."""

    status: int
    """0 where no reply arrived."""
    body: bytes
    """Where no reply arrived, the reason."""
    retry_after: float | None = None
    """Seconds that the server asks to wait; None where it does not, or gives a date."""


class _NoRedirect(urllib.request.HTTPRedirectHandler):
    def redirect_request(self, *_: object) -> None:
        return None


def post(url: str, body: bytes, headers: Mapping[str, str], timeout: float) -> HttpReply:
    """Sends one request. Errors of the network and of the server are replies too.

    Args:
        timeout: seconds.
    """
    request = urllib.request.Request(url, body, dict(headers), method="POST")
    try:
        with urllib.request.build_opener(_NoRedirect).open(request, timeout=timeout) as reply:
            return HttpReply(reply.status, reply.read())
    except urllib.error.HTTPError as error:
        with error:
            return HttpReply(error.code, error.read(MOST_ERROR_BYTES), _seconds(error.headers.get("Retry-After")))
    except (http.client.HTTPException, OSError) as error:
        return HttpReply(0, (str(getattr(error, "reason", error)) or type(error).__name__).encode())


def retry(
    send: Callable[[], HttpReply],
    is_final: Callable[[HttpReply], bool],
    wait: Callable[[int, HttpReply], float],
    tries: int,
    sleep: Callable[[float], None],
) -> HttpReply:
    """Sends until a reply is final, at most `tries` times; returns the last reply.

    Args:
        wait: seconds to wait after the reply to attempt 0, 1, …
        sleep: lets so many seconds pass.
    """
    for attempt in range(tries - 1):
        reply = send()
        if is_final(reply):
            return reply
        sleep(wait(attempt, reply))
    return send()


def _seconds(retry_after: str | None) -> float | None:
    try:
        return max(0.0, float(retry_after)) if retry_after else None
    except ValueError:
        return None
