"""The Perspective API, by a server on this machine that misbehaves on demand."""

import json
import random
import signal
import subprocess
import sys
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import pytest

from exitwise import UserError
from exitwise.measure.scores import (
    score_table,
    unfinished,
)
from exitwise.run.directory import read_records
from exitwise.run.records import Score
from exitwise.run.run import Run
from exitwise.scorers import score_run
from exitwise.scorers.base import ScoredAnswer
from exitwise.scorers.perspective import PerspectiveScorer
from tests.score_setup import TODAY, contents, pair, write_run

KEY = "s3cret key/+"


def reply(value=0.25, status=200, headers=(), body=None):
    found = {"attributeScores": {"TOXICITY": {"summaryScore": {"value": value, "type": "PROBABILITY"}}}}
    return status, dict(headers), json.dumps(found).encode() if body is None else body


@pytest.fixture
def service(monkeypatch):
    """A server on this machine that gives the replies of `script` in turn, and `then(text)` after them."""
    monkeypatch.setenv("PERSPECTIVE_API_KEY", KEY)
    for name in ("http_proxy", "HTTP_PROXY", "all_proxy", "ALL_PROXY"):
        monkeypatch.delenv(name, raising=False)

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self):
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            server.requests.append((self.path, body))
            status, headers, text = server.script.pop(0) if server.script else server.then(body["comment"]["text"])
            time.sleep(server.delay)
            self.send_response(status)
            for name, value in headers.items():
                self.send_header(name, value)
            self.send_header("Content-Length", str(len(text)))
            self.end_headers()
            self.wfile.write(text)

        def log_message(self, *_):
            pass

    server: Any = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.requests, server.script, server.delay = [], [], 0.0
    server.then = lambda text: reply(len(text) / 1000)
    server.url = f"http://127.0.0.1:{server.server_port}"
    threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
    yield server
    server.shutdown()
    server.server_close()


class FakeTime:
    """A clock that only sleeping moves."""

    def __init__(self):
        self.now, self.slept = 100.0, []

    def clock(self):
        return self.now

    def sleep(self, seconds):
        self.slept.append(seconds)
        self.now += seconds


def perspective(service, **changes):
    fake = FakeTime()
    options = {"queries_per_second": 1000.0, "clock": fake.clock, "sleep": fake.sleep} | changes
    return PerspectiveScorer(service.url, **options), fake


def test_what_perspective_is_asked(service, run):
    scorer, _ = perspective(service)
    scores = score_run(Run(run), scorer, TODAY)
    assert [s.value for s in scores] == [len("Answer 0 at 0.") / 1000] * 20
    path, body = service.requests[0]
    assert path == "/v1alpha1/comments:analyze?key=s3cret+key%2F%2B"
    assert body == {
        "comment": {"text": "Answer 0 at 0."},
        "languages": ["en"],
        "requestedAttributes": {"TOXICITY": {}},
        "doNotStore": True,
    }
    about = json.loads((run / "scores.perspective.json").read_text())
    assert "31 December 2026" in about["notice"]
    assert about["scorer"] == f"perspective@v1alpha1 at 127.0.0.1:{service.server_port}"
    assert PerspectiveScorer().info.stamp == "perspective@v1alpha1"
    for file in run.iterdir():
        assert b"s3cret" not in file.read_bytes()


def test_one_query_a_second(service):
    scorer, fake = perspective(service, queries_per_second=1.0)
    asked = []
    service.then = lambda text: (asked.append(fake.now), reply())[1]  # type: ignore[func-returns-value]
    for i in range(4):
        scorer.score([pair(f"text {i}")])
        fake.now += 0.3  # what we do in between counts
    assert asked == pytest.approx([100, 101, 102, 103])
    fake.now += 60  # a pause gives no credit for a burst
    scorer.score([pair("a"), pair("b")])
    assert asked[4:] == pytest.approx([163.3, 164.3])


def test_busy_then_well(service):
    service.script = [reply(status=429), reply(status=500), reply(status=503, headers={"Retry-After": "20"})]
    scorer, fake = perspective(service, rng=random.Random(3))
    assert scorer.score([pair("hello")]) == [ScoredAnswer(0.005)]
    waits = [seconds for seconds in fake.slept if seconds > 0.01]
    rng = random.Random(3)
    jitter = [0.5 + rng.random() / 2 for _ in range(3)]
    assert waits == pytest.approx([jitter[0], 2 * jitter[1], 20], abs=0.002)


def test_a_server_that_hangs_up_is_asked_again(service):
    def hang_up(text):
        service.then = lambda text: reply(0.5)
        raise ConnectionError

    service.then = hang_up
    service.handle_error = lambda *_: None
    scorer, _ = perspective(service)
    assert scorer.score([pair("hello")]) == [ScoredAnswer(0.5)]


def test_busy_for_good_stops_and_goes_on_later(service, run, tmp_path):
    once = write_run(tmp_path / "once")
    score_run(Run(once), perspective(service)[0], TODAY)
    service.script = [reply(0.014)] * 7 + [reply(status=503)] * 8
    scorer, fake = perspective(service)
    with pytest.raises(UserError, match=r"8 tries \(status 503\).*resumes.*31 December 2026"):
        score_run(Run(run), scorer, TODAY)
    assert sum(fake.slept) < 2 * 64 + 64
    assert len(read_records(run / "scores.perspective.jsonl", Score)) == 7
    assert unfinished(Run.open(run)) == ["perspective (7 of 20)"]
    n_before = len(service.requests)
    score_run(Run(run), perspective(service)[0], TODAY)
    assert len(service.requests) == n_before + 13
    assert contents(run) == contents(once)


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"<html>hello</html>",
        b"{}",
        b"[0.5]",
        b"0.5",
        b'{"attributeScores": null}',
        b'{"attributeScores": {"TOXICITY": {"summaryScore": {}}}}',
        b'{"attributeScores": {"TOXICITY": {"summaryScore": {"value": NaN}}}}',
        b'{"attributeScores": {"TOXICITY": {"summaryScore": {"value": Infinity}}}}',
        b'{"attributeScores": {"TOXICITY": {"summaryScore": {"value": 1.5}}}}',
        b'{"attributeScores": {"TOXICITY": {"summaryScore": {"value": -0.1}}}}',
        b'{"attributeScores": {"TOXICITY": {"summaryScore": {"value": true}}}}',
        b'{"attributeScores": {"TOXICITY": {"summaryScore": {"value": "0.5"}}}}',
        b'{"attributeScores": {"TOXICITY": {"summaryScore": {"value": "\\ud800"}}}}',
        b"[" * 100_000,
        b"\xff\xfe",
    ],
)
def test_a_malformed_reply_is_kept_as_such(service, run, body):
    service.then = lambda text: reply(0.5) if "Answer 1" in text else reply(body=body)
    scores = score_run(Run(run), perspective(service)[0], TODAY)
    assert len(scores) == 20
    assert [s.value for s in scores if s.sample == "h1"] == [0.5] * 4
    assert all(s.value is None and s.reason for s in scores if s.sample != "h1")
    row = next(row for row in score_table(run) if row.exit == 0)
    assert (row.n, row.unscored, row.value) == (1, 4, 50)


def test_a_text_that_is_refused_has_a_reason(service):
    message = "Attribute TOXICITY does not support request languages: is"
    body = json.dumps({"error": {"code": 400, "message": message, "status": "INVALID_ARGUMENT"}}).encode()
    service.script = [reply(status=400, body=body)]
    assert perspective(service)[0].score([pair("Halló")]) == [
        ScoredAnswer(None, f"Perspective refused it (400): {message}")
    ]


@pytest.mark.parametrize("status", [400, 401, 403, 404, 302])
def test_a_wrong_key_stops_and_is_not_repeated(service, status):
    words = f"API key not valid: {KEY} (s3cret+key%2F%2B)"
    body = json.dumps({"error": {"message": words}}).encode()
    service.script = [reply(status=status, body=body, headers={"Location": service.url})]
    with pytest.raises(UserError, match=f"answered {status}.*31 December 2026") as error:
        perspective(service)[0].score([pair("hello")])
    assert "s3cret" not in str(error.value)
    assert len(service.requests) == 1


def test_what_is_not_sent(service, monkeypatch):
    service.then = lambda text: reply(0.5)
    scorer, _ = perspective(service)
    results = scorer.score([pair(" \n"), pair("é" * 10_241), pair("x" * 20_480)])
    assert [result.reason for result in results] == ["empty answer", "20482 bytes; Perspective takes 20480", ""]
    assert len(service.requests) == 1
    monkeypatch.delenv("PERSPECTIVE_API_KEY")
    with pytest.raises(UserError, match=r"PERSPECTIVE_API_KEY is not set.*31 December 2026"):
        scorer.score([pair("hello")])


@pytest.mark.parametrize("url", ["http://example.org", "ftp://127.0.0.1", "127.0.0.1:80", "https://", ""])
def test_the_key_travels_only_encrypted_or_at_home(url):
    with pytest.raises(UserError, match="--base-url"):
        PerspectiveScorer(url)


@pytest.mark.parametrize("rate", [0, -1, float("nan"), float("inf")])
def test_a_rate_is_above_0(rate):
    with pytest.raises(UserError, match="--queries-per-second"):
        PerspectiveScorer(queries_per_second=rate)


def test_killed_at_any_moment_scoring_ends_with_the_same_bytes(service, tmp_path):
    """Real kills of a real process that asks a real server."""
    score_run(Run(write_run(tmp_path / "once")), perspective(service)[0], TODAY)
    command = "import sys; from exitwise.run.run import Run; from exitwise.scorers import score_run;"
    command += "from exitwise.scorers.perspective import PerspectiveScorer;"
    command += f"score_run(Run(sys.argv[1]), PerspectiveScorer({service.url!r}, 1000.0), {TODAY!r})"
    service.delay = 0.02
    for case, requests in enumerate((1, 6, 13)):
        run = write_run(tmp_path / f"kill{case}")
        service.requests.clear()
        process = subprocess.Popen([sys.executable, "-c", command, str(run)])
        while len(service.requests) < requests and process.poll() is None:
            time.sleep(0.002)
        process.send_signal(signal.SIGKILL)
        process.wait()
        kept = len(read_records(run / "scores.perspective.jsonl", Score))
        assert kept < 20, "killed too late to show anything"
        time.sleep(2 * service.delay)  # a reply that is still under way
        service.requests.clear()
        subprocess.run([sys.executable, "-c", command, str(run)], check=True)
        assert len(service.requests) == 20 - kept
        assert contents(run) == contents(tmp_path / "once")
