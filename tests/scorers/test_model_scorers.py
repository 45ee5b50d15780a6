"""Scorers that are models or rules: Granite-HAP, reward models, Detoxify, VQA-v2."""

import sys
from pathlib import Path

import pytest
import torch

from exitwise import UserError
from exitwise.measure.scores import score_table
from exitwise.run.directory import read_records, to_lines
from exitwise.run.records import Completion, Sample
from exitwise.run.run import Run
from exitwise.scorers import make_scorer, score_run
from exitwise.scorers.base import ScoredAnswer
from exitwise.scorers.reward import RewardScorer
from tests.conftest import tiny_processor
from tests.score_setup import TODAY, pair


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
    config = RobertaConfig(  # type: ignore[call-arg]
        vocab_size=len(tokenizer), hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=32,
        max_position_embeddings=40, num_labels=labels, pad_token_id=tokenizer.pad_token_id, initializer_range=1.0,
    )  # fmt: skip
    RobertaForSequenceClassification(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def test_granite_is_the_softmax_of_label_1(hap, run):
    from transformers import AutoModelForSequenceClassification

    scorer = make_scorer("granite-guardian-hap", model=str(hap), batch_size=3)
    scores = score_run(Run(run), scorer, TODAY)
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
    assert empty == ScoredAnswer(None, "empty answer")
    assert long.reason == "only the first 37 of 38 tokens were read"
    assert long.value == pytest.approx(short.value, abs=1e-6)


def test_other_weights_are_another_version(hap, tmp_path, run):
    score_run(Run(run), make_scorer("granite-guardian-hap", model=str(hap)), TODAY)
    other = make_scorer("granite-guardian-hap", model=str(save_hap(tmp_path / "hap", seed=1)))
    with pytest.raises(UserError, match="version"):
        score_run(Run(run), other, TODAY)


def test_classifiers_that_cannot_be_used(hap, tmp_path):
    with pytest.raises(UserError, match="cannot load"):
        make_scorer("granite-guardian-hap", model=str(tmp_path / "nothing"))
    with pytest.raises(UserError, match="3 labels"):
        make_scorer("granite-guardian-hap", model=str(save_hap(tmp_path / "three", labels=3)))
    from transformers import AutoModel

    AutoModel.from_pretrained(save_hap(tmp_path / "headless")).save_pretrained(tmp_path / "headless")
    with pytest.raises(UserError, match="are incomplete"):
        make_scorer("granite-guardian-hap", model=str(tmp_path / "headless"))


class TinyReward:
    """A real GPT-2 classifier with random weights; it refuses numbers that are none, as reward models here do."""

    name = "tiny"

    def __init__(self, poison: str = ""):
        from transformers import GPT2Config, GPT2ForSequenceClassification

        torch.manual_seed(0)
        self.tokenizer = text_tokenizer()
        config = GPT2Config(  # type: ignore[call-arg]
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
    scores = score_run(Run(run), RewardScorer("tiny", reward), TODAY)
    samples = {s.id: s for s in read_records(run / "samples.jsonl", Sample)}
    texts = {(c.sample, c.exit): c.text for c in read_records(run / "completions.jsonl", Completion)}
    assert {samples[s.sample].kind for s in scores} == {"harmful", "vqa"}
    for score in scores:
        wanted = reward.scores([samples[score.sample].prompt], [texts[score.sample, score.exit]])[0].item()
        assert score.value == pytest.approx(wanted, abs=1e-6)
    table = score_table(run)
    assert {row.metric for row in table} == {"TR", "ATR", "TR-UT", "ATR-UT"}
    assert {row.scorer for row in table} == {scores[0].scorer}


def test_a_reward_that_is_no_number_costs_only_itself(run):
    path = run / "completions.jsonl"
    path.write_text(path.read_text().replace("Answer 2 at", "Answer 2 @"))
    scores = score_run(Run(run), RewardScorer("tiny", TinyReward(poison="@")), TODAY)
    bad = [s for s in scores if s.value is None]
    assert {s.sample for s in bad} == {"h2"}
    assert all(s.reason == "the reward model tiny gave nan" for s in bad)
    assert len(scores) == 40


def test_another_reward_under_the_same_name_is_refused(run):
    score_run(Run(run), RewardScorer("tiny", TinyReward()), TODAY)
    other = TinyReward()
    other.model.score.weight.data *= 1.5
    with pytest.raises(UserError, match="version"):
        score_run(Run(run), RewardScorer("tiny", other), TODAY)


def test_a_published_reward_model_through_the_loader(run, tmp_path):
    tiny = TinyReward()
    folder = tmp_path / "rm"
    tiny.model.save_pretrained(folder)
    tiny.tokenizer.save_pretrained(folder)
    scores = score_run(Run(run), make_scorer(f"reward:{folder}", template="question"), TODAY)
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
    config = BertConfig(  # type: ignore[call-arg]
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
    scores = score_run(Run(run), scorer, TODAY)
    assert len({s.value for s in scores}) > 1
    assert scores[0].scorer.startswith("detoxify@0.5.4 tiny.ckpt ")
    alone = scorer.score([pair("Answer 0 at 0.")])[0].value  # the package unpacks a list of one
    assert alone == pytest.approx(scores[0].value, abs=1e-6)


def test_detoxify_takes_no_other_model():
    with pytest.raises(UserError, match="original, unbiased"):
        make_scorer("detoxify", model="nothing", trust_remote_code=True)


def test_vqa_v2_lands_as_fractions(run):
    samples = read_records(run / "samples.jsonl", Sample)
    rows = [s if s.id != "v4" else Sample("v4", "?", "vqa", "photo 4", answers=("red",)) for s in samples]
    (run / "samples.jsonl").write_text(to_lines(rows))
    text = (run / "completions.jsonl").read_text()
    text = text.replace('"sample": "v0", "exit": 0, "text": "red"', '"sample": "v0", "exit": 0, "text": ""')
    (run / "completions.jsonl").write_text(text)
    scores = score_run(Run(run), make_scorer("vqa-v2"), TODAY)
    assert {(s.sample, s.exit): s.value for s in scores if s.exit < 2} == {
        ("v0", 0): 0, ("v1", 0): 0.9, ("v2", 0): 0.9, ("v3", 0): 0.9, ("v4", 0): None,
        ("v0", 1): 0.9, ("v1", 1): 0.9, ("v2", 1): 0.9, ("v3", 1): 0.9, ("v4", 1): None,
    }  # fmt: skip
    assert {s.reason for s in scores if s.value is None} == {
        "the rule needs the answers of 10 people, the sample has 1"
    }
    first = score_table(run)[0]
    assert (first.metric, first.scorer, first.exit, first.band) == ("AS-UT", "vqa-v2@1", 0, "embeddings")
    assert first.value == pytest.approx(100 * 2.7 / 4)
    assert (first.n, first.unscored) == (4, 1)
