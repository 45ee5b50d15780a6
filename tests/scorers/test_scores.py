"""Scores: numbers that are never dropped, never averaged over two scorers, and the same after any kill."""

import json
import os
import random
import signal
import subprocess
import sys
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from exitwise import UserError
from exitwise.cli.commands import entry
from exitwise.judges.refusal import refusal_phrase
from exitwise.measure import stats
from exitwise.measure.scores import (
    bootstrap_mean,
    mean_score,
    refusal_contrast,
    score_table,
    unfinished,
    write_score_metrics,
)
from exitwise.run.directory import read_records, to_lines
from exitwise.run.records import Completion, Sample, Score, Verdict
from exitwise.scorers import make_scorer, score_run
from exitwise.scorers.base import About, Mark
from exitwise.scorers.perspective import Perspective
from exitwise.scorers.reward import RewardScorer
from tests.conftest import ROOT, tiny_processor

TODAY = "2026-11-21"
KEY = "s3cret key/+"
PEOPLE = ("red",) * 3 + tuple(f"colour {i}" for i in range(7))


def write_run(folder: Path, exits=(0, 1, 2, 3), n=5, text=lambda i, exit: f"Answer {i} at {exit}.") -> Path:
    """A finished run of `n` samples of each kind; three blocks, one a band."""
    samples = [Sample(f"h{i}", f"Harmful request {i}?", "harmful", "photo") for i in range(n)]
    samples += [Sample(f"b{i}", f"Harmless request {i}?", "benign", "photo") for i in range(n)]
    samples += [Sample(f"v{i}", "What colour?", "vqa", f"photo {i}", answers=PEOPLE) for i in range(n)]
    completions = [
        Completion(s.id, exit, "red" if s.kind == "vqa" else text(int(s.id[1:]), exit), (1,), "stop")
        for s in samples
        for exit in exits
    ]
    folder.mkdir(parents=True)
    (folder / "samples.jsonl").write_text(to_lines(samples))
    (folder / "completions.jsonl").write_text(to_lines(completions))
    (folder / "config.json").write_text(json.dumps({"seed": 0}))
    (folder / "plan.json").write_text(json.dumps({"n_requests": len(completions), "n_blocks": 3, "default_exit": 2}))
    return folder


@pytest.fixture
def run(tmp_path) -> Path:
    return write_run(tmp_path / "run")


class Length:
    """A scorer without weights: the length of the answer over 100; notes what it was given."""

    def __init__(self, version="1", batch_size=4, quantity="toxicity", value=lambda text: len(text) / 100):
        self.about = About("length", "len", version, quantity, ("harmful",))
        self.batch_size, self.value, self.batches = batch_size, value, []

    def key(self, sample, completion):
        return (completion.text,)

    def score(self, batch):
        self.batches.append([completion.text for _, completion in batch])
        return [Mark(self.value(completion.text)) for _, completion in batch]


# ------------------------------------------------------------------------------------------ the record


def test_a_score_goes_in_and_out_of_json():
    for score in (Score("a", 3, "x@1", 0.25), Score("a", 0, "x@1", None, "empty answer")):
        assert Score.from_dict(json.loads(score.to_json())) == score


@pytest.mark.parametrize("value", [float("nan"), float("inf"), None])
def test_what_is_no_number_needs_a_reason_instead(value):
    with pytest.raises(ValueError, match=r"finite|reason"):
        Score("a", 0, "x@1", value)


@pytest.mark.parametrize("value", ["0.5", True, [0.5]])
def test_what_only_looks_like_a_number_is_refused(value):
    with pytest.raises(TypeError, match="expected a number"):
        Score("a", 0, "x@1", value)


def test_nan_in_a_file_is_named_by_its_line(tmp_path):
    (tmp_path / "s.jsonl").write_text('{"sample": "a", "exit": 0, "scorer": "x@1", "value": NaN}\n')
    with pytest.raises(UserError, match=r"s\.jsonl, line 1: .*finite"):
        read_records(tmp_path / "s.jsonl", Score)


# ------------------------------------------------------------------------------------------ scoring a run


def test_scores_follow_the_answers(run):
    scores = score_run(run, Length(), TODAY)
    completions = [c for c in read_records(run / "completions.jsonl", Completion) if c.sample.startswith("h")]
    assert [(s.sample, s.exit, s.value) for s in scores] == [(c.sample, c.exit, len(c.text) / 100) for c in completions]
    assert {s.scorer for s in scores} == {"length@1"}
    about = json.loads((run / "scores.length.json").read_text())
    assert about["begun"] == TODAY
    assert (about["backend"], about["version"], about["n_answers"]) == ("len", "1", 20)


def test_answers_alike_are_scored_once(tmp_path):
    run = write_run(tmp_path / "run", text=lambda i, exit: "Same.")
    scorer = Length()
    assert len(score_run(run, scorer, TODAY)) == 20
    assert scorer.batches == [["Same."]]


def test_what_is_scored_is_not_scored_again(run):
    score_run(run, Length(), TODAY)
    before = contents(run)
    again = Length()
    score_run(run, again, "2027-01-01")
    assert again.batches == []
    assert contents(run) == before


def contents(run: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(run.glob("scores.*"))}


def test_cut_anywhere_scoring_ends_with_the_same_bytes(run):
    first = Length()
    score_run(run, first, TODAY)
    whole, path, rng = contents(run), run / "scores.length.jsonl", random.Random(0)
    for _ in range(12):
        kept = path.read_bytes()[: rng.randrange(len(whole["scores.length.jsonl"]))]
        path.write_bytes(kept)
        again = Length()
        score_run(run, again, TODAY)
        assert contents(run) == whole
        assert again.batches == first.batches[kept.count(b"\n") // 4 :]  # whole batches, as they were


def test_a_number_that_is_none_becomes_a_reason(run):
    scores = score_run(run, Length(value=lambda text: float("nan") if "2" in text else 0.5), TODAY)
    assert len(scores) == 20
    assert {(s.value, s.reason) for s in scores} == {(None, "the scorer gave nan"), (0.5, "")}


def test_another_version_is_refused_and_loses_nothing(run):
    score_run(run, Length(), TODAY)
    before = contents(run)
    with pytest.raises(UserError, match=r"made by length@1, this is length@2 .* not averaged"):
        score_run(run, Length(version="2"), TODAY)
    with pytest.raises(UserError, match="quantity"):
        score_run(run, Length(quantity="reward"), TODAY)
    assert contents(run) == before


def test_other_answers_are_refused(run):
    score_run(run, Length(), TODAY)
    path = run / "completions.jsonl"
    path.write_text(path.read_text().replace("Answer 0 at 1", "Answer 0 at one"))
    with pytest.raises(UserError, match="answers_sha256"):
        score_run(run, Length(), TODAY)


def test_before_the_first_score_a_typo_may_be_corrected(run):
    def broken(text):
        raise UserError("no key")

    with pytest.raises(UserError, match="no key"):
        score_run(run, Length(version="typo", value=broken), TODAY)
    assert {s.scorer for s in score_run(run, Length(), TODAY)} == {"length@1"}


def test_runs_that_cannot_be_scored(run, tmp_path):
    scorer = Length()
    scorer.about = About("length", "len", "1", "toxicity", ())
    with pytest.raises(UserError, match="no answers of the kind"):
        score_run(run, scorer, TODAY)
    lines = (run / "completions.jsonl").read_text().splitlines(keepends=True)
    (run / "completions.jsonl").write_text("".join(lines[:7]))
    with pytest.raises(UserError, match="7 of 60 answers; finish it"):
        score_run(run, Length(), TODAY)


# ------------------------------------------------------------------------------------------ Perspective


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

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
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
    return Perspective(service.url, **options), fake


def pair(text: str):
    return Sample("a", "p", "harmful", ""), Completion("a", 0, text, (1,), "stop")


def test_what_perspective_is_asked(service, run):
    scorer, _ = perspective(service)
    scores = score_run(run, scorer, TODAY)
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
    assert Perspective().about.stamp == "perspective@v1alpha1"
    for file in run.iterdir():
        assert b"s3cret" not in file.read_bytes()


def test_one_query_a_second(service):
    scorer, fake = perspective(service, queries_per_second=1.0)
    asked = []
    service.then = lambda text: (asked.append(fake.now), reply())[1]
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
    assert scorer.score([pair("hello")]) == [Mark(0.005)]
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
    assert scorer.score([pair("hello")]) == [Mark(0.5)]


def test_busy_for_good_stops_and_goes_on_later(service, run, tmp_path):
    once = write_run(tmp_path / "once")
    score_run(once, perspective(service)[0], TODAY)
    service.script = [reply(0.014)] * 7 + [reply(status=503)] * 8
    scorer, fake = perspective(service)
    with pytest.raises(UserError, match=r"8 tries \(status 503\).*goes on.*31 December 2026"):
        score_run(run, scorer, TODAY)
    assert sum(fake.slept) < 2 * 64 + 64
    assert len(read_records(run / "scores.perspective.jsonl", Score)) == 7
    assert unfinished(run) == ["perspective (7 of 20)"]
    n_before = len(service.requests)
    score_run(run, perspective(service)[0], TODAY)
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
    scores = score_run(run, perspective(service)[0], TODAY)
    assert len(scores) == 20
    assert [s.value for s in scores if s.sample == "h1"] == [0.5] * 4
    assert all(s.value is None and s.reason for s in scores if s.sample != "h1")
    row = next(row for row in score_table(run) if row.exit == 0)
    assert (row.n, row.unscored, row.value) == (1, 4, 50)


def test_a_text_that_is_refused_has_a_reason(service):
    message = "Attribute TOXICITY does not support request languages: is"
    body = json.dumps({"error": {"code": 400, "message": message, "status": "INVALID_ARGUMENT"}}).encode()
    service.script = [reply(status=400, body=body)]
    assert perspective(service)[0].score([pair("Halló")]) == [Mark(None, f"Perspective refused it (400): {message}")]


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
    marks = scorer.score([pair(" \n"), pair("é" * 10_241), pair("x" * 20_480)])
    assert [mark.reason for mark in marks] == ["empty answer", "20482 bytes; Perspective takes 20480", ""]
    assert len(service.requests) == 1
    monkeypatch.delenv("PERSPECTIVE_API_KEY")
    with pytest.raises(UserError, match=r"PERSPECTIVE_API_KEY is not set.*31 December 2026"):
        scorer.score([pair("hello")])


@pytest.mark.parametrize("url", ["http://example.org", "ftp://127.0.0.1", "127.0.0.1:80", "https://", ""])
def test_the_key_travels_only_encrypted_or_at_home(url):
    with pytest.raises(UserError, match="--base-url"):
        Perspective(url)


@pytest.mark.parametrize("rate", [0, -1, float("nan"), float("inf")])
def test_a_rate_is_above_0(rate):
    with pytest.raises(UserError, match="--queries-per-second"):
        Perspective(queries_per_second=rate)


def test_killed_at_any_moment_scoring_ends_with_the_same_bytes(service, tmp_path):
    """Real kills of a real process that asks a real server."""
    score_run(write_run(tmp_path / "once"), perspective(service)[0], TODAY)
    command = "import sys; from pathlib import Path; from exitwise.scorers import score_run;"
    command += "from exitwise.scorers.perspective import Perspective;"
    command += f"score_run(Path(sys.argv[1]), Perspective({service.url!r}, 1000.0), {TODAY!r})"
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


# ------------------------------------------------------------------------------------------ models


def text_tokenizer():
    return tiny_processor().tokenizer


@pytest.fixture(scope="module")
def hap(tmp_path_factory) -> Path:
    """A tiny RoBERTa classifier with random weights, saved as any checkpoint is."""
    return save_hap(tmp_path_factory.mktemp("hap"))


def save_hap(folder: Path, seed=0, labels=2) -> Path:
    from transformers import RobertaConfig, RobertaForSequenceClassification

    torch.manual_seed(seed)
    tokenizer = text_tokenizer()
    config = RobertaConfig(
        vocab_size=len(tokenizer), hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=32,
        max_position_embeddings=40, num_labels=labels, pad_token_id=tokenizer.pad_token_id, initializer_range=1.0,
    )  # fmt: skip
    RobertaForSequenceClassification(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def test_granite_is_the_softmax_of_label_1(hap, run):
    from transformers import AutoModelForSequenceClassification

    scorer = make_scorer("granite-guardian-hap", model=str(hap), batch_size=3)
    scores = score_run(run, scorer, TODAY)
    model, tokenizer = AutoModelForSequenceClassification.from_pretrained(hap), text_tokenizer()
    texts = {(c.sample, c.exit): c.text for c in read_records(run / "completions.jsonl", Completion)}
    for score in scores:
        logits = model(**tokenizer(texts[score.sample, score.exit], return_tensors="pt")).logits[0]
        assert score.value == pytest.approx(logits.softmax(0)[1].item(), abs=1e-6)
    assert len({s.value for s in scores}) > 10
    assert scores[0].scorer.startswith("granite-guardian-hap@")


def test_an_answer_that_is_too_long_for_granite_says_so(hap):
    scorer = make_scorer("granite-guardian-hap", model=str(hap))
    short, empty, long = scorer.score([pair("x" * 37), pair(" "), pair("x" * 38)])  # 40 positions less the offset of 3
    assert short.reason == ""
    assert empty == Mark(None, "empty answer")
    assert long.reason == "only the first 37 of 38 tokens were read"
    assert long.value == pytest.approx(short.value, abs=1e-6)


def test_other_weights_are_another_version(hap, tmp_path, run):
    score_run(run, make_scorer("granite-guardian-hap", model=str(hap)), TODAY)
    other = make_scorer("granite-guardian-hap", model=str(save_hap(tmp_path / "hap", seed=1)))
    with pytest.raises(UserError, match="version"):
        score_run(run, other, TODAY)


def test_classifiers_that_cannot_be_used(hap, tmp_path):
    with pytest.raises(UserError, match="cannot load"):
        make_scorer("granite-guardian-hap", model=str(tmp_path / "nothing"))
    with pytest.raises(UserError, match="3 labels"):
        make_scorer("granite-guardian-hap", model=str(save_hap(tmp_path / "three", labels=3)))
    from transformers import AutoModel

    AutoModel.from_pretrained(save_hap(tmp_path / "headless")).save_pretrained(tmp_path / "headless")
    with pytest.raises(UserError, match="not whole"):
        make_scorer("granite-guardian-hap", model=str(tmp_path / "headless"))


class TinyReward:
    """A real GPT-2 classifier with random weights; it refuses numbers that are none, as reward models here do."""

    name, end = "tiny", "<|im_end|>"

    def __init__(self, poison: str = ""):
        from transformers import GPT2Config, GPT2ForSequenceClassification

        torch.manual_seed(0)
        self.tokenizer = text_tokenizer()
        config = GPT2Config(
            vocab_size=len(self.tokenizer), n_embd=16, n_layer=1, n_head=2, n_positions=128, num_labels=1,
            pad_token_id=self.tokenizer.pad_token_id, initializer_range=1.0,
        )  # fmt: skip
        self.model = GPT2ForSequenceClassification(config).eval()
        for token in self.tokenizer(poison)["input_ids"]:
            self.model.transformer.wte.weight.data[token] = float("nan")

    def scores(self, prompts, answers):
        rows = [self.tokenizer(p + a, return_tensors="pt") for p, a in zip(prompts, answers, strict=True)]
        with torch.no_grad():
            found = torch.cat([self.model(input_ids=row["input_ids"]).logits[:, 0] for row in rows])
        if not torch.isfinite(found).all():
            raise UserError("the reward model tiny gave nan")
        return found


def test_rewards_of_harmful_requests_and_of_vqa(run):
    reward = TinyReward()
    scores = score_run(run, RewardScorer("tiny", reward), TODAY)
    samples = {s.id: s for s in read_records(run / "samples.jsonl", Sample)}
    texts = {(c.sample, c.exit): c.text for c in read_records(run / "completions.jsonl", Completion)}
    assert {samples[s.sample].kind for s in scores} == {"harmful", "vqa"}
    for score in scores:
        answer = texts[score.sample, score.exit] + "<|im_end|>"  # they all finished
        assert score.value == pytest.approx(reward.scores([samples[score.sample].prompt], [answer])[0].item(), abs=1e-6)
    table = score_table(run)
    assert {row.metric for row in table} == {"TR", "ATR", "TR-UT", "ATR-UT"}
    assert {row.scorer for row in table} == {scores[0].scorer}
    cut = RewardScorer("tiny", reward)
    assert cut._answer(Completion("a", 0, "x", (1,), "length")) == "x"


def test_a_reward_that_is_no_number_costs_only_itself(run):
    path = run / "completions.jsonl"
    path.write_text(path.read_text().replace("Answer 2 at", "Answer 2 @"))
    scores = score_run(run, RewardScorer("tiny", TinyReward(poison="@")), TODAY)
    bad = [s for s in scores if s.value is None]
    assert {s.sample for s in bad} == {"h2"}
    assert all(s.reason == "the reward model tiny gave nan" for s in bad)
    assert len(scores) == 40


def test_another_reward_under_the_same_name_is_refused(run):
    score_run(run, RewardScorer("tiny", TinyReward()), TODAY)
    other = TinyReward()
    other.model.score.weight.data *= 1.5
    with pytest.raises(UserError, match="version"):
        score_run(run, RewardScorer("tiny", other), TODAY)


def test_a_published_reward_model_through_the_loader(run, tmp_path):
    tiny = TinyReward()
    folder = tmp_path / "rm"
    tiny.model.save_pretrained(folder)
    tiny.tokenizer.save_pretrained(folder)
    scores = score_run(run, make_scorer(f"reward:{folder}", template="question"), TODAY)
    assert len(scores) == 40
    assert all(s.value is not None for s in scores)


def test_detoxify_is_named_with_its_install_command(monkeypatch):
    monkeypatch.setitem(sys.modules, "detoxify", None)
    with pytest.raises(UserError, match=r"pip install 'exitwise\[toxicity\]'"):
        make_scorer("detoxify", trust_remote_code=True)


def test_detoxify_through_the_real_package(tmp_path, run):
    pytest.importorskip("detoxify")
    from transformers import BertConfig, BertForSequenceClassification, BertTokenizer

    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *(p + chr(c) for c in range(33, 127) for p in ("", "##"))]
    (tmp_path / "vocab.txt").write_text("\n".join(words))
    BertTokenizer(str(tmp_path / "vocab.txt")).save_pretrained(tmp_path)
    config = BertConfig(
        vocab_size=len(words), hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16,
        num_labels=2, initializer_range=1.0,
    )  # fmt: skip
    config.save_pretrained(tmp_path)
    names = {"model_name": "BertForSequenceClassification", "tokenizer_name": "BertTokenizer", "num_classes": 2}
    layout = {
        "dataset": {"args": {"classes": ["toxic", "insult"]}},
        "arch": {"args": {"model_type": str(tmp_path)} | names},
    }
    weights = BertForSequenceClassification(config).state_dict()
    torch.save({"config": layout, "state_dict": weights}, tmp_path / "tiny.ckpt")
    with pytest.raises(UserError, match="--trust-remote-code"):
        make_scorer("detoxify", model=str(tmp_path / "tiny.ckpt"))
    scorer = make_scorer("detoxify", model=str(tmp_path / "tiny.ckpt"), trust_remote_code=True)
    scores = score_run(run, scorer, TODAY)
    assert len({s.value for s in scores}) > 1
    assert scores[0].scorer.startswith("detoxify@0.5.4 tiny.ckpt ")
    alone = scorer.score([pair("Answer 0 at 0.")])[0].value  # the package unpacks a list of one
    assert alone == pytest.approx(scores[0].value, abs=1e-6)


def test_detoxify_takes_no_other_model():
    with pytest.raises(UserError, match="original, unbiased"):
        make_scorer("detoxify", model="nothing", trust_remote_code=True)


# ------------------------------------------------------------------------------------------ VQA-v2


def test_vqa_v2_lands_as_fractions(run):
    samples = read_records(run / "samples.jsonl", Sample)
    rows = [s if s.id != "v4" else Sample("v4", "?", "vqa", "photo 4", answers=("red",)) for s in samples]
    (run / "samples.jsonl").write_text(to_lines(rows))
    text = (run / "completions.jsonl").read_text()
    text = text.replace('"sample": "v0", "exit": 0, "text": "red"', '"sample": "v0", "exit": 0, "text": ""')
    (run / "completions.jsonl").write_text(text)
    scores = score_run(run, make_scorer("vqa-v2"), TODAY)
    assert {(s.sample, s.exit): s.value for s in scores if s.exit < 2} == {
        ("v0", 0): 0, ("v1", 0): 0.9, ("v2", 0): 0.9, ("v3", 0): 0.9, ("v4", 0): None,
        ("v0", 1): 0.9, ("v1", 1): 0.9, ("v2", 1): 0.9, ("v3", 1): 0.9, ("v4", 1): None,
    }  # fmt: skip
    assert {s.reason for s in scores if s.value is None} == {
        "the rule needs the answers of 10 people, the sample has 1"
    }
    first = score_table(run)[0]
    assert first[:4] == ("AS-UT", "vqa-v2@1", 0, "embeddings")
    assert first.value == pytest.approx(100 * 2.7 / 4)
    assert (first.n, first.unscored) == (4, 1)


# ------------------------------------------------------------------------------------------ figures


def test_two_versions_are_not_averaged():
    scores = [Score("a", 0, "x@1", 0.2), Score("b", 0, "x@2", 0.4)]
    with pytest.raises(UserError, match="x@1 and x@2 cannot be averaged"):
        mean_score(scores)
    assert mean_score([*scores[:1], Score("b", 0, "x@1", 0.4), Score("c", 0, "x@1", None, "empty")]) == pytest.approx(
        0.3
    )
    assert mean_score([]) is None
    assert mean_score([Score("a", 0, "x@1", None, "empty")]) is None


def test_a_file_with_two_versions_gives_no_figures(run):
    score_run(run, Length(), TODAY)
    path = run / "scores.length.jsonl"
    path.write_text(path.read_text().replace("length@1", "length@2", 1))
    with pytest.raises(UserError, match="cannot be averaged"):
        score_table(run)


def test_figures_per_exit_and_band(tmp_path):
    run = write_run(tmp_path / "run", exits=(0, 1, 2), text=lambda i, exit: "x" * (10 * (i + 1) + exit))
    score_run(run, Length(), TODAY)
    rows = score_table(run)
    assert [(row.metric, row.exit, row.band) for row in rows] == [
        ("TS", 0, "embeddings"), ("TS", 1, "early"), ("TS", 2, "middle"),
        ("ATS", None, "early"), ("ATS", None, "middle"),
    ]  # fmt: skip
    assert [row.value for row in rows] == pytest.approx([30, 31, 32, 31, 32])  # mean of .10 .20 .30 .40 .50, plus exit
    assert all(row.low < row.value < row.high and (row.n, row.unscored) == (5, 0) for row in rows)
    assert score_table(run) == rows


def test_a_band_is_the_mean_over_its_exits(tmp_path):
    run = write_run(tmp_path / "run", exits=(1, 2), text=lambda i, exit: "x" * (10 * exit + i))
    (run / "plan.json").write_text(json.dumps({"n_requests": 30, "n_blocks": 6, "default_exit": 5}))
    score_run(run, Length(value=lambda text: float("nan") if text == "x" * 24 else len(text) / 100), TODAY)
    *exits, band = score_table(run)
    assert [row.value for row in exits] == pytest.approx([12, 21.5])  # 10..14; 20..23 without the one that is none
    assert (band.band, band.exit, band.n, band.unscored) == ("early", None, 9, 1)
    assert band.value == pytest.approx((12 + 21.5) / 2)


def test_a_scorer_that_is_not_through_is_named_not_averaged(run):
    score_run(run, Length(), TODAY)
    path = run / "scores.length.jsonl"
    path.write_text("".join(path.read_text().splitlines(keepends=True)[:9]))
    assert score_table(run) == []
    assert unfinished(run) == ["length (9 of 20)"]


VALUES = st.floats(0, 1)


@given(st.lists(st.tuples(VALUES, VALUES, st.sampled_from("abcd")), min_size=1, max_size=12), st.integers(0, 9))
@settings(deadline=None, max_examples=60)
def test_a_mean_lies_in_its_interval_s_world(rows, seed):
    values = np.array([row[:2] for row in rows])
    found = bootstrap_mean(values, [row[2] for row in rows], np.random.default_rng(seed), (0.0, 1.0), draws=200)
    assert found.value == pytest.approx(values.mean())
    if found.low is not None:
        assert 0 <= found.low <= found.high <= 1


@given(
    st.lists(st.tuples(*[st.sampled_from([0.0, 1.0, np.nan])] * 2, st.sampled_from("abcd")), min_size=1, max_size=12)
)
@settings(deadline=None, max_examples=60)
def test_of_noughts_and_ones_it_is_the_bootstrap_of_shares(rows):
    values, clusters = np.array([row[:2] for row in rows]), [row[2] for row in rows]
    ours = bootstrap_mean(values, clusters, np.random.default_rng(0), (0.0, 1.0), draws=200)
    assert ours == pytest.approx(stats.cluster_bootstrap(values, clusters, np.random.default_rng(0), draws=200))


def test_whole_clusters_are_resampled():
    """Ten copies of two prompts tell no more than two prompts."""
    values = np.array([[0.1]] * 10 + [[0.9]] * 10)
    together = bootstrap_mean(values, ["a"] * 10 + ["b"] * 10, np.random.default_rng(0), (0.0, 1.0))
    apart = bootstrap_mean(values, [str(i) for i in range(20)], np.random.default_rng(0), (0.0, 1.0))
    assert (together.low, together.high) == pytest.approx((0.1, 0.9))
    assert apart.high - apart.low < 0.4


def test_no_figure_claims_certainty():
    rng = np.random.default_rng(0)
    none = np.full((3, 1), np.nan)
    assert bootstrap_mean(none, list("abc"), rng) == (None, None, None)
    assert bootstrap_mean(np.full((3, 1), 1.5), list("abc"), rng) == (
        1.5,
        None,
        None,
    )  # alike, and no scale: nothing to say
    assert bootstrap_mean(np.array([[1.0], [2.0]]), ["a", "a"], rng) == (1.5, None, None)  # one cluster
    floor = bootstrap_mean(np.zeros((8, 1)), [str(i) for i in range(8)], rng, (0.0, 1.0))
    assert floor == (0, *stats.wilson(0, 8)[1:3])
    for wrong in (np.inf, 1.01):
        with pytest.raises(ValueError, match="outside"):
            bootstrap_mean(np.array([[wrong], [0.5]]), ["a", "b"], rng, (0.0, 1.0))


# ------------------------------------------------------------------------------------------ over-refusal


def test_controls_are_in_no_mean_and_crossed_images_are_resampled(tmp_path):
    """Toxicity follows the image here: ten prompts with ten images are ten images. Controls would raise every mean."""
    cells = [(p, i) for p in range(10) for i in range(10)]
    samples = [Sample(f"{p}@{i}", f"prompt {p}", "harmful", f"photo {i}") for p, i in cells]
    samples += [Sample(f"{p}@control:none", f"prompt {p}", "harmful", "") for p in range(10)]
    texts = ["x" * (40 if i < 3 else 10) for _, i in cells] + ["x" * 90] * 10
    answers = [Completion(sample.id, 1, text, (1,), "stop") for sample, text in zip(samples, texts, strict=True)]
    run = write_run(tmp_path / "run")
    (run / "samples.jsonl").write_text(to_lines(samples))
    (run / "completions.jsonl").write_text(to_lines(answers))
    (run / "plan.json").write_text(json.dumps({"n_requests": len(answers), "n_blocks": 3, "default_exit": 2}))
    score_run(run, Length(), TODAY)
    row, band = score_table(run)
    assert (row.n, row.value) == (100, pytest.approx(100 * (0.3 * 0.4 + 0.7 * 0.1)))
    assert row.high - row.low > 14  # three images of ten; by prompt alone all ten are alike, and there is no interval
    assert (band.n, band.low, band.high) == (100, row.low, row.high)
    verdicts = [Verdict(s.id, 1, "refusal", "answered" if s.image else "refused") for s in samples]
    (contrast,) = refusal_contrast([*samples, Sample("b", "?", "benign", "")], verdicts)
    assert (contrast.n_harmful, contrast.refusal) == (100, 0.0)


def test_over_refusal_beside_its_contrast():
    """56 of 70 against 48 of 80: Newcombe 1998 gives the difference 0.20 the limits 0.0524 and 0.3339."""
    samples = [Sample(f"u{i}", "?", "harmful", "") for i in range(71)] + [
        Sample(f"s{i}", "?", "benign", "") for i in range(80)
    ]
    verdicts = [Verdict(f"u{i}", 3, "refusal", "refused" if i < 56 else "answered") for i in range(70)]
    verdicts += [Verdict("u70", 3, "refusal", "unscored", "empty answer")]
    verdicts += [Verdict(f"s{i}", 3, "refusal", "refused" if i < 48 else "incoherent") for i in range(80)]
    (row,) = refusal_contrast(samples, verdicts)
    assert (row.exit, row.n_benign, row.n_harmful) == (3, 80, 70)
    assert (row.over_refusal, row.refusal, row.difference) == pytest.approx((0.6, 0.8, 0.2))
    assert (row.low, row.high) == pytest.approx((0.0524, 0.3339), abs=5e-5)


def test_a_share_of_nothing_is_none():
    rows = refusal_contrast([Sample("s", "?", "benign", "")], [Verdict("s", 0, "refusal", "answered")])
    assert rows == [(0, 0.0, None, None, None, None, 1, 0)]


def test_the_matcher_takes_no_xstest_prompt_for_a_refusal(shared_data):
    """All that the prompts alone can show: none of the 450 requests reads as a refusal, whoever repeats it."""
    import csv

    with open(shared_data / "xstest_prompts.csv", newline="", encoding="utf-8") as handle:
        rows = list(csv.DictReader(handle))
    assert [sum(row["label"] == label for row in rows) for label in ("safe", "unsafe")] == [250, 200]
    assert [row["prompt"] for row in rows if refusal_phrase(row["prompt"])] == []


# ------------------------------------------------------------------------------------------ the command


def test_the_command(run, capsys):
    verdicts = [
        Verdict(f"{kind}{i}", 1, "refusal", "refused" if kind == "h" else "answered") for kind in "hb" for i in range(5)
    ]
    (run / "verdicts.refusal.jsonl").write_text(to_lines(verdicts))
    entry(["score", str(run), "--scorer", "vqa-v2,vqa-v2-always"])
    printed = capsys.readouterr().out
    assert "AS-UT  exit 3      90.00  n 5, unscored 0  vqa-v2@1" in printed
    assert "AAS-UT late band   90.00  n 5, unscored 0  vqa-v2-always@1" in printed
    assert "exit 1: refuses 100 % of harmful and 0 % of harmless requests" in printed
    before = (run / "score_metrics.json").read_bytes()
    entry(["score", str(run)])
    assert (run / "score_metrics.json").read_bytes() == before


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--scorer", "toxic"], "expected one of: perspective"),
        (["--scorer", "reward:"], "expected one of: perspective"),
        (["--scorer", "vqa-v2,detoxify", "--model", "x"], "--model belongs to one scorer"),
        (["--scorer", "vqa-v2", "--batch-size", "0"], "--batch-size got 0"),
    ],
)
def test_one_line_for_what_is_wrong(run, words, message, capsys):
    with pytest.raises(SystemExit) as stop:
        entry(["score", str(run), *words])
    assert stop.value.code == 2
    assert message in capsys.readouterr().err


def test_scores_without_weights_need_no_torch():
    code = "import sys, exitwise.measure.scores, exitwise.scorers as s; s.make_scorer('perspective'); "
    code += "s.make_scorer('vqa-v2'); sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False, env=os.environ).returncode == 0


def test_every_key_is_documented(run):
    (run / "verdicts.refusal.jsonl").write_text(
        to_lines([Verdict("h0", 1, "refusal", "refused"), Verdict("b0", 1, "refusal", "answered")])
    )
    score_run(run, make_scorer("vqa-v2"), TODAY)
    found = write_score_metrics(run)
    keys = found.keys() | found["scores"][0].keys() | found["refusal_contrast"][0].keys()
    text = (ROOT / "docs/reference/metrics.md").read_text()
    assert not {key for key in keys if f"`{key}`" not in text}
