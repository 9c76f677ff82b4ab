"""A real Gemma 3, converted from GGUF, computes what transformers does."""

from __future__ import annotations

import pydoc_data.topics

import pytest
import torch

from cp_megatron.context_parallel import ContextParallel
from cp_megatron.data.tokenize.open_tokenizer import open_tokenizer
from cp_megatron.families.registry import read_hf_config
from cp_megatron.generate.decode import Sampling, Session
from cp_megatron.plan import Mask
from tests.real_models import gemma3_folder, loaded

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1200)]
TOKENS = 640  # more than the window of 512


def test_it_speaks_and_computes_what_transformers_does() -> None:
    from transformers import AutoModelForCausalLM

    folder = gemma3_folder()
    found = read_hf_config(folder)
    assert (found.unread, found.model.window_size) == ((), (511, 0))
    model = loaded(folder, TOKENS)
    tokenizer = open_tokenizer("huggingface", str(folder))
    assert (tokenizer.opening, tokenizer.eod) == ((2,), 1)
    prompt = [*tokenizer.opening, *tokenizer.encode("The capital of France is").tolist()]
    said = Session(model=model, seq_length=TOKENS).generate(
        prompt, max_new_tokens=12, stop=(tokenizer.eod,), sampling=Sampling(), seed=0
    )
    expected = " the capital of the country of France. It is the largest"
    assert tokenizer.decode(list(said)) == expected
    ids = tokenizer.encode(pydoc_data.topics.topics["class"])[: TOKENS - 1].tolist()
    tokens = torch.tensor([[*tokenizer.opening, *ids]])
    assert tokens.shape == (1, TOKENS)
    theirs = AutoModelForCausalLM.from_pretrained(folder, attn_implementation="eager").eval()
    with torch.no_grad():
        logits = model(tokens, cp=ContextParallel(None, Mask.causal(TOKENS)))
        reference = theirs(tokens).logits
    assert (logits - reference).norm() / reference.norm() < 1e-5
