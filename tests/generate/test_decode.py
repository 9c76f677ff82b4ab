"""Generation with a cache equals a forward pass over the whole text at every token.

The oracle has no cache: for each token it computes the whole text with the attention of training.
"""

from __future__ import annotations

import math
from dataclasses import replace
from typing import cast
from unittest import mock

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from cp_megatron.cli.parse import parse_arguments
from cp_megatron.cli.programs import GENERATE, GenerationOptions, check_sampling
from cp_megatron.config import ModelConfig
from cp_megatron.context_parallel import ContextParallel
from cp_megatron.errors import ConfigError
from cp_megatron.generate import decode as generate_module
from cp_megatron.generate import key_value_cache as cache_module
from cp_megatron.generate.decode import Sampling, Session
from cp_megatron.model import Transformer
from cp_megatron.model.initialize import initial_value
from cp_megatron.plan import Mask
from cp_megatron.tensor_parallel import named_specs
from tests.model.grids import GPT, LLAMA, STYLES

VOCAB, SEQ = 131, 64
PROMPT = [5, 17, 99, 3, 3, 42, 7]
MODELS = {
    **STYLES,
    "window": replace(LLAMA, window_size=(3, 0)),
    "window-below": replace(LLAMA, window_size=(3, 0), window_layers=(0,)),
    "window-above": replace(LLAMA, window_size=(3, 0), window_layers=(1,)),
    "gpt-window": replace(GPT, window_size=(4, -1)),
    "no-positions": replace(GPT, position_embedding_type="none"),
    "wide-heads": replace(LLAMA, kv_channels=16),
}


def tiny(config: ModelConfig) -> Transformer:
    """Makes a float64 model with weights that are large enough for tokens to differ."""
    config = replace(config, init_method_std=0.3)
    model = Transformer(
        config, seq_length=SEQ, vocab_size=VOCAB, tp=None, sequence_parallel=False
    ).double()
    with torch.no_grad():
        for owner, name, spec in named_specs(model):
            owner.get_parameter(name).copy_(initial_value(spec, config=config, seed=1))
    return model.eval()


@torch.no_grad()
def whole_logits(model: Transformer, tokens: list[int]) -> Tensor:
    """Returns the logits after the last token, without a cache."""
    cp = ContextParallel(None, Mask.causal(len(tokens), model.config.row_window))
    logits: Tensor = model(torch.tensor([tokens]), cp=cp)[0, -1]
    return logits


def error(x: Tensor, reference: Tensor) -> float:
    x, reference = x[:VOCAB], reference[:VOCAB]
    return float((x - reference).norm() / reference.norm())


@pytest.mark.parametrize("name", MODELS)
def test_every_token_equals_the_whole_forward_pass(name: str) -> None:
    model = tiny(MODELS[name])
    session = Session(model=model, seq_length=SEQ)
    text, fresh = list(PROMPT), list(PROMPT)
    for _ in range(12):
        logits = session.feed(fresh)
        assert error(logits, whole_logits(model, text)) < 1e-10
        fresh = [int(logits.argmax())]
        text += fresh


@pytest.mark.parametrize("name", ["gpt", "llama", "window", "window-above", "recurrent"])
def test_prompts_in_parts_and_a_cache_that_grows(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(generate_module, "PREFILL_TOKENS", 5)
    monkeypatch.setattr(cache_module, "FIRST_CAPACITY", 2)
    model = tiny(MODELS[name])
    text = [(7 * i * i + i) % VOCAB for i in range(23)]
    session = Session(model=model, seq_length=SEQ)
    assert error(session.feed(text), whole_logits(model, text)) < 1e-10
    assert error(session.feed([1, 2, 3]), whole_logits(model, [*text, 1, 2, 3])) < 1e-10


@pytest.mark.parametrize("name", ["window", pytest.param("recurrent", marks=pytest.mark.slow)])
@settings(max_examples=6)
@given(data=st.data())
def test_a_reused_session_equals_a_fresh_one(name: str, data: st.DataObject) -> None:
    """For prompts with any common prefix, the answer is that of a fresh session."""
    model = tiny(MODELS[name])
    session = Session(model=model, seq_length=SEQ)
    texts = st.lists(st.integers(0, 2), min_size=1, max_size=9)
    greedy = Sampling()
    for prompt in data.draw(st.lists(texts, min_size=2, max_size=4)):
        fresh = Session(model=model, seq_length=SEQ)
        answers = [
            list(one.generate(prompt, max_new_tokens=3, stop=(), sampling=greedy, seed=0))
            for one in (session, fresh)
        ]
        assert answers[0] == answers[1]
        assert session.tokens[: len(prompt)] == prompt


@pytest.mark.parametrize("name", ["llama", "recurrent"])
def test_an_interrupted_pass_leaves_nothing(name: str) -> None:
    model = tiny(MODELS[name])
    session = Session(model=model, seq_length=SEQ)
    for text in (PROMPT, [*PROMPT, 1]):
        last = list(model.layers.values())[-1]
        handle = last.register_forward_pre_hook(mock.Mock(side_effect=KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            session.feed(text[len(session.tokens) :])
        handle.remove()
        logits = session.feed(text[len(session.tokens) :])
        assert error(logits, whole_logits(model, text)) < 1e-10


def continuation(model: Transformer, **changes: object) -> list[int]:
    options: dict[str, object] = {"max_new_tokens": 10, "stop": (), "sampling": Sampling()}
    options |= {"seed": 0, **changes}
    session = Session(model=model, seq_length=SEQ)
    return list(session.generate(PROMPT, **options))  # type: ignore[arg-type]


def test_ends_at_a_stop_token_and_at_the_last_position() -> None:
    model = tiny(GPT)
    free = continuation(model, max_new_tokens=1000)
    assert len(free) == SEQ - len(PROMPT) + 1, "the last position still predicts a token"
    stop = free[4]
    assert continuation(model, stop=(stop,)) == free[: free.index(stop)]
    assert continuation(model, max_new_tokens=0) == []
    with pytest.raises(ConfigError, match="learned 64"):
        Session(model=model, seq_length=SEQ).feed([1] * (SEQ + 1))


def test_samples_depend_only_on_the_seed() -> None:
    model = tiny(LLAMA)
    hot = Sampling(temperature=1.5)
    first = continuation(model, sampling=hot, seed=3)
    assert continuation(model, sampling=hot, seed=3) == first
    assert continuation(model, sampling=hot, seed=4) != first
    assert all(0 <= token < VOCAB for token in first), "padding is never sampled"


def test_top_1_is_greedy() -> None:
    model = tiny(LLAMA)
    assert continuation(model, sampling=Sampling(temperature=9.0, top_k=1)) == continuation(model)


def test_the_smallest_temperature_is_greedy_too() -> None:
    model = tiny(LLAMA)
    assert continuation(model, sampling=Sampling(temperature=1e-6)) == continuation(model)


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_logits_that_are_not_finite_are_refused(temperature: float) -> None:
    model = tiny(LLAMA)
    assert model.norm is not None
    with torch.no_grad():
        model.norm.weight.fill_(math.nan)
    with pytest.raises(ConfigError, match="not finite"):
        continuation(model, sampling=Sampling(temperature=temperature))


# Scores differ by more than rounding, because the order of equal scores is not specified.
HUNDREDTHS = st.integers(-800, 800).map(lambda n: n / 100)


@settings(max_examples=60)
@given(
    scores=st.lists(HUNDREDTHS, min_size=2, max_size=12, unique=True),
    temperature=st.floats(0.1, 4),
    top_k=st.integers(0, 13),
    top_p=st.floats(0.05, 1),
)
def test_probabilities_by_a_slow_loop(
    scores: list[float], temperature: float, top_k: int, top_p: float
) -> None:
    sampling = Sampling(temperature=temperature, top_k=top_k, top_p=top_p)
    found = sampling.probabilities(torch.tensor(scores, dtype=torch.float64))
    assert found.sum().item() == pytest.approx(1)
    order = sorted(range(len(scores)), key=lambda i: -scores[i])
    kept = order[: top_k or len(order)]
    weights = {i: torch.tensor(scores[i] / temperature).double().exp().item() for i in kept}
    total, nucleus, reached = sum(weights.values()), [], 0.0
    for i in kept:
        if reached < top_p - 1e-9 or top_p == 1:
            nucleus.append(i)
        reached += weights[i] / total
    share = sum(weights[i] for i in nucleus)
    on_the_edge = any(
        abs(sum(weights[j] for j in kept[:n]) / total - top_p) < 1e-6 for n in range(len(kept))
    )
    for i in range(len(scores)):
        wanted = weights[i] / share if i in nucleus else 0.0
        assert on_the_edge or found[i].item() == pytest.approx(wanted, abs=1e-6)


@pytest.mark.parametrize(
    ("flags", "refused"),
    [
        (["--temperature", "-1"], "--temperature"),
        (["--temperature", "nan"], "--temperature"),
        (["--temperature", "5e-324"], "--temperature"),
        (["--temperature", "1", "--top-k", "-1"], "--top-k"),
        (["--temperature", "1", "--top-p", "0"], "--top-p"),
        (["--top-k", "5"], "--top-k"),
        (["--top-p", "0.5"], "--top-p"),
    ],
)
def test_refusals(flags: list[str], refused: str) -> None:
    with pytest.raises(ConfigError) as error:
        check_sampling(cast(GenerationOptions, parse_arguments(flags, program=GENERATE).options))
    assert error.value.flag == refused
