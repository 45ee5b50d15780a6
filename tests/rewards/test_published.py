"""Published reward models: the text form of their cards, templates by id, models that cannot be used."""

import pytest
import torch

from exitwise.errors import UserError
from exitwise.rewards.loading import load_reward
from exitwise.rewards.published import choose_template
from tests.conftest import tiny_processor
from tests.reward_setup import ANSWERS, PROMPTS


def classifier(folder, labels=1, name="gpt2-large-harmless-reward_model"):
    """A tiny random GPT-2 sequence classifier under the name of the published one, as any checkpoint is saved."""
    from transformers import GPT2Config, GPT2ForSequenceClassification

    torch.manual_seed(0)
    tokenizer = tiny_processor().tokenizer
    config = GPT2Config(  # type: ignore[call-arg]
        vocab_size=len(tokenizer), n_embd=16, n_layer=2, n_head=2, n_positions=128, num_labels=labels, pad_token_id=2
    )
    model = GPT2ForSequenceClassification(config)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    model.save_pretrained(folder / name)
    tokenizer.save_pretrained(folder / name)
    return folder / name, model.eval(), tokenizer


def test_the_published_template_to_the_letter(tmp_path):
    """The model card: tokenizer("\\n\\nHuman: … \\n\\nAssistant:", answer), logits[0] of one pair alone."""
    folder, model, tokenizer = classifier(tmp_path)
    reward = load_reward(folder)
    found = reward.scores(PROMPTS[:3], ANSWERS[:3])
    for prompt, answer, score in zip(PROMPTS, ANSWERS, found.tolist(), strict=False):
        inputs = tokenizer(f"\n\nHuman: {prompt} \n\nAssistant:", answer, return_tensors="pt")
        with torch.no_grad():
            assert score == pytest.approx(float(model(**inputs).logits[0, 0]), abs=1e-5)
    dialogue = reward.template("\n\nHuman: a\n\nAssistant: b\n\nHuman: c", "d")
    assert dialogue == ("\n\nHuman: a\n\nAssistant: b\n\nHuman: c \n\nAssistant:", "d")


def test_the_other_published_template(tmp_path):
    folder, model, tokenizer = classifier(tmp_path, name="reward-model-deberta-v3-large-v2")
    with torch.no_grad():
        wanted = model(**tokenizer("how?", "so", return_tensors="pt")).logits[0, 0]
    assert float(load_reward(folder).scores(["how?"], ["so"])) == pytest.approx(float(wanted), abs=1e-5)


def test_ids_and_the_hubs_cache_name_the_template():
    choose = choose_template
    assert choose("Ray2333/gpt2-large-harmless-reward_model", None) == "human-assistant"
    assert choose("/c/models--Ray2333--gpt2-large-harmless-reward_model/snapshots/0", None) == "human-assistant"
    assert choose("OpenAssistant/reward-model-deberta-v3-large-v2", None) == "question"
    assert choose("other/model", "question") == "question"


def test_long_texts_fit_the_published_model(tmp_path):
    folder, _, _ = classifier(tmp_path)
    assert torch.isfinite(load_reward(folder).scores(["long " * 200], ["longer " * 90])).all()


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda p: classifier(p, labels=3)[0], "3 labels"),
        (lambda p: classifier(p, name="unheard-of")[0], "is not known"),
        (lambda p: p / "gpt2-large-harmless-reward_model", "cannot load"),
    ],
)
def test_a_published_model_that_does_not_do(tmp_path, make, message):
    with pytest.raises(UserError, match=message):
        load_reward(make(tmp_path))
