"""A real model, converted from GGUF, answers and predicts as it was trained to."""

from __future__ import annotations

import math
import pydoc_data.topics

import pytest
import torch
import torch.nn.functional as F

from cp_megatron.context_parallel import ContextParallel
from cp_megatron.data.tokenize.open_tokenizer import open_tokenizer
from cp_megatron.data.tokenize.tokenizer import Tokenizer
from cp_megatron.generate.decode import Sampling, Session
from cp_megatron.model import Transformer
from cp_megatron.plan import Mask
from tests.real_models import loaded, smollm2_folder

pytestmark = pytest.mark.slow
TOKENS = 512


@pytest.fixture(scope="module")
def model() -> tuple[Transformer, Tokenizer]:
    folder = smollm2_folder()
    return loaded(folder, TOKENS), open_tokenizer("huggingface", str(folder))


def test_it_knows_paris(model: tuple[Transformer, Tokenizer]) -> None:
    transformer, tokenizer = model
    session = Session(model=transformer, seq_length=TOKENS)
    prompt = tokenizer.encode("The capital of France is").tolist()
    found = session.generate(
        prompt, max_new_tokens=8, stop=(tokenizer.eod,), sampling=Sampling(), seed=0
    )
    assert tokenizer.decode(list(found)) == " Paris.\n\nThe answer is:"


def perplexity(transformer: Transformer, tokens: torch.Tensor) -> float:
    with torch.no_grad():
        cp = ContextParallel(None, Mask.causal(len(tokens)))
        logits = transformer(tokens[None], cp=cp)[0]
    return math.exp(F.cross_entropy(logits[:-1], tokens[1:]).item())


def test_it_predicts_english(model: tuple[Transformer, Tokenizer]) -> None:
    """With rows of q and k in the wrong order the model still says Paris, but predicts badly."""
    transformer, tokenizer = model
    text = pydoc_data.topics.topics["exceptions"] + pydoc_data.topics.topics["class"]
    tokens = torch.from_numpy(tokenizer.encode(text)[:TOKENS]).long()
    assert len(tokens) == TOKENS
    found = perplexity(transformer, tokens)
    assert found < 20
    for name in transformer.layers:
        for part, heads in (("query", 9), ("key", 3)):
            weight = transformer.get_parameter(f"layers.{name}.attention.{part}.weight")
            pairs = weight.data.view(heads, 2, 32, -1)
            weight.data = pairs.transpose(1, 2).reshape(weight.shape)
    assert perplexity(transformer, tokens) > 5 * found
