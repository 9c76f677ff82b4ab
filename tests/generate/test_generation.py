"""A conversation keeps its messages, including an answer that Ctrl-C interrupted."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from cp_megatron.cli.programs import GenerationOptions
from cp_megatron.config import Config, ModelConfig
from cp_megatron.data.tokenize.chat_template import Message, TemplateRefusalError
from cp_megatron.data.tokenize.tokenizer import ByteTokenizer
from cp_megatron.errors import ConfigError
from cp_megatron.generate.check_generation import GenerationSetup, end_tokens
from cp_megatron.generate.decode import Session
from cp_megatron.generate.run_generation import Responder
from cp_megatron.model import Transformer

MODEL = ModelConfig(num_layers=1, hidden_size=16, num_attention_heads=2, max_position_embeddings=64)


def parrot(messages: Sequence[Message], answer_follows: bool) -> str:
    """A template that writes ``U:text|A:text|``, and refuses upper case."""
    if any(message["content"].isupper() for message in messages):
        raise TemplateRefusalError("do not shout")
    said = "".join(f"{m['role'][0].upper()}:{m['content']}|" for m in messages)
    return said + ("A:" if answer_follows else "")


def responder() -> Responder:
    """Makes a model that repeats the last character."""
    model = Transformer(MODEL, seq_length=64, vocab_size=257, tp=None, sequence_parallel=False)
    torch.manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
        model.get_parameter("embedding.weight").normal_()
        model.get_parameter("norm.weight").fill_(1)
    setup = GenerationSetup(
        config=Config(model=MODEL),
        options=GenerationOptions(max_new_tokens=4, chat=True),
        folder=Path(),
        manifest=None,
        vocab_size=257,
        tokenizer=ByteTokenizer(),
        template=parrot,
    )
    return Responder(setup=setup, session=Session(model=model.eval(), seq_length=64))


def text_of(one: Responder) -> str:
    return bytes(one.session.tokens).decode()


def test_the_model_reads_the_whole_conversation() -> None:
    one = responder()
    assert "".join(one.answer("hi")) == "::::"
    assert text_of(one) == "U:hi|A::::"
    assert "".join(one.answer("so")) == "::::"
    assert text_of(one) == "U:hi|A:::::|U:so|A::::"
    assert [message["role"] for message in one.messages] == ["user", "assistant"] * 2


def test_an_interrupted_answer_is_kept() -> None:
    one = responder()
    answer = one.answer("hi")
    next(answer)
    with pytest.raises(KeyboardInterrupt):
        answer.throw(KeyboardInterrupt())  # type: ignore[attr-defined]
    assert one.messages[-1] == {"role": "assistant", "content": ":"}


def test_a_conversation_that_does_not_fit_is_refused() -> None:
    with pytest.raises(ConfigError, match="do not shout"):
        next(responder().answer("HI"))
    with pytest.raises(ConfigError, match="has learned 64"):
        next(responder().answer("long" * 20))


@pytest.mark.parametrize("words", ["HI", "long" * 20])
def test_a_refused_text_is_not_part_of_the_conversation(words: str) -> None:
    one = responder()
    "".join(one.answer("hi"))
    before = list(one.messages)
    with pytest.raises(ConfigError):
        next(one.answer(words))
    assert one.messages == before
    assert "".join(one.answer("so")) == "::::"


def test_an_answer_ends_at_any_end_token() -> None:
    one = responder()
    ends = end_tokens({"eos_token_id": [256, ord(":")]})
    assert end_tokens({"eos_token_id": 2}) == {2}
    assert end_tokens({"eos_token_id": None}) == end_tokens({}) == frozenset()
    one = replace(one, setup=replace(one.setup, ends=ends))
    assert "".join(one.answer("hi")) == ""
