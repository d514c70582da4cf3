"""Learned, scored and served tokens are those that transformers has, whatever the tokenizer, with several ends."""

from typing import Any

import pytest
import torch
from torch.nn import functional as F

from gaisnet.config import Config
from gaisnet.config.file import parse_config
from gaisnet.data.examples import DeviceData, Example
from gaisnet.engines.local import build_network
from gaisnet.learning.relay import TaskTemplate
from gaisnet.messages import EvaluationReport
from gaisnet.models.foundation import Foundation
from gaisnet.models.parts import CutLayers
from gaisnet.models.tokenization import ending_ids, prompt_ids
from gaisnet.serving.generation.decoding import generate
from gaisnet.serving.generation.text import Sampling, text_of
from tests.serving.models import lively_model, served, session
from tests.tiny import tiny_raw_config
from tests.tiny_tokenizers import KINDS, tokenizer_of

pytestmark = pytest.mark.numeric

ENDS = [2, 3]
EXACT = {"smashed": "float32", "body_output": "float32", "gradient": "float32", "anchor": "float32"}
EXAMPLES = (
    Example("Is it so?", " yes"),
    Example("so 日本 is", " no</s>yes 😀😀"),
)


def model_for(tokenizer: Any) -> Any:
    return lively_model(vocab_size=len(tokenizer), bos_token_id=1, eos_token_id=ENDS, tied=False)


def one_device(**model: Any) -> Config:
    edge: dict[str, Any] = {"name": "e", "domain": "facts", "template": "Is {text} so?", "labels": ["yes", "no"]}
    edge["devices"] = [{"name": "d", "head_layers": 1}]
    return parse_config(
        tiny_raw_config(
            edges=[edge],
            model={"foundation": "tiny", **model},
            domain={"precision": "float32"},
            relay={"enabled": False, "sequences": 8, "tokens": 12},
            wire=EXACT,
        )
    )


def scored(tokenizer: Any, model: Any) -> EvaluationReport:
    """The network's score of the FM before anything is learned."""
    data = {"d": DeviceData(EXAMPLES, EXAMPLES)}
    shapes = {"facts": TaskTemplate("Is {text} so?", ("yes", "no"))}
    network = build_network(one_device(), Foundation("tiny", model, tokenizer), shapes, data, "the inn is so. " * 60)
    network.install()
    return network.evaluate().foundation["facts"]


@torch.no_grad()
def loss_outside(tokenizer: Any, model: Any, example: Example) -> tuple[float, int]:
    """Sum over a completion's tokens and its end, and how many they are, with transformers alone."""
    text = example.prompt + example.completion
    before = tokenizer(example.prompt, split_special_tokens=True)["input_ids"]
    whole = [*tokenizer(text, split_special_tokens=True)["input_ids"], 2]
    assert whole[: len(before)] == before
    labels = torch.tensor(whole[len(before) :])
    logits = model(torch.tensor([whole])).logits[0, len(before) - 1 : -1]
    return float(F.cross_entropy(logits, labels, reduction="sum")), len(labels)


@pytest.mark.parametrize("kind", ["byte_level", "byte_fallback"])
def test_scores_are_of_the_tokens_that_transformers_has(kind: str) -> None:
    tokenizer: Any = tokenizer_of(kind)
    model = model_for(tokenizer)
    outside = [loss_outside(tokenizer, model, example) for example in EXAMPLES]
    report = scored(tokenizer, model)
    assert report.num_tokens == sum(num for _, num in outside)
    assert report.loss_sum == pytest.approx(sum(loss for loss, _ in outside), rel=1e-4)


@pytest.mark.parametrize("bos", [True, False])
@pytest.mark.parametrize("kind", KINDS)
def test_served_text_is_what_transformers_generates(kind: str, bos: bool) -> None:
    tokenizer: Any = tokenizer_of(kind, bos)
    model: Any = model_for(tokenizer)
    parts, service = served(model, CutLayers(1))
    ends = ending_ids(tokenizer, model.config)
    spelled = "" if kind == "unigram" else "</s>"  # that one finds its special pieces in text, and transformers lets it
    for prompt in ("Is it so?", "日本 no", f"the 😀 is {spelled}"):
        ids = tokenizer(prompt, split_special_tokens=True, return_tensors="pt")["input_ids"]
        generated = model.generate(ids, max_new_tokens=24, do_sample=False, pad_token_id=2, eos_token_id=ENDS)
        expected = generated[0, ids.shape[1] :].tolist()
        sampling = Sampling(max_tokens=24, stop_ids=ends)
        written = list(generate(parts, session(parts, service), prompt_ids(tokenizer, prompt), sampling))
        assert written == expected
        assert "".join(text_of(written, tokenizer)) == tokenizer.decode(expected, skip_special_tokens=True)
