"""Conversations as documents, with a loss on the assistant's answers only. No torch.

A line of the file is ``{"messages": [{"role": ..., "content": ...}, ...]}``, or ShareGPT's
``{"conversations": [{"from": ..., "value": ...}, ...]}``. Where an answer lies follows from the
template alone, by writing beginnings of the conversation::

    all messages          <user>Hello</s><assistant>Hi.</s><user>Bye</s>
    before the answer     <user>Hello</s><assistant>
    up to the answer      <user>Hello</s><assistant>Hi.</s>
    loss                                            ^^^^^^^

White space that the template puts behind the end of an answer has no loss. A tokenizer without a
template (a token per byte, say) is given ``User: Hello``, an empty line, ``Assistant: Hi.`` and the
end of the document, which ends each answer.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any

import numpy as np
import numpy.typing as npt

from cp_megatron.data.read.json_lines import BadLineError, check_letters, read_lines
from cp_megatron.data.read.sources import FLAG, Corpus
from cp_megatron.data.tokenize.chat_template import (
    Message,
    Render,
    TemplateRefusalError,
    find_template,
)
from cp_megatron.data.tokenize.tokenizer import MODEL_FLAG, Tokenizer
from cp_megatron.errors import ConfigError

_ROLES: Mapping[str, str] = MappingProxyType({"human": "user", "gpt": "assistant"})

Ids = npt.NDArray[np.int32]


@dataclass(frozen=True, kw_only=True)
class Conversation:
    """One conversation as tokens.

    Attributes:
        tokens: int32 [n].
        loss: bool [n], whether the token belongs to an answer.
    """

    tokens: Ids
    loss: npt.NDArray[np.bool_]


@dataclass(frozen=True, kw_only=True)
class Chats:
    """The conversations of a file.

    Attributes:
        corpus: a document each.
        cut: conversations that were longer than a row and lost their end.
        dropped: conversations of which no answer begins within a row.
    """

    corpus: Corpus
    cut: int
    dropped: int


def load_chats(path: str, tokenizer: Tokenizer, *, seq_length: int, skip_bad: bool) -> Chats:
    """Reads a file of conversations.

    Args:
        path: the file.
        tokenizer: with its chat template.
        seq_length: what is longer is cut to it; the rest would be trained on out of its context.
        skip_bad: leave malformed lines out and count them.

    Raises:
        ConfigError: a line is malformed, no conversation is left, or the template can not be used.
    """
    render = find_template(tokenizer)
    write = _plain(tokenizer) if render is None else _templated(tokenizer, render)
    lines = read_lines(path, lambda found: write(_messages(found)), skip_bad=skip_bad)
    kept, cut, dropped = [], 0, 0
    for item in lines.items:
        long = len(item.tokens) > seq_length
        if not item.loss[1:seq_length].any():
            dropped += 1
            continue
        cut += long
        kept.append((item.tokens[:seq_length], item.loss[:seq_length]))
    if not kept:
        rule = f"holds no conversation with an answer within {seq_length} tokens"
        raise ConfigError(FLAG, path, rule, "a longer --seq-length, or other data")
    lengths = np.array([len(tokens) for tokens, _ in kept], dtype=np.int64)
    tokens, loss = (np.concatenate(parts) for parts in zip(*kept))
    # Of what is trained on, as the template decides it too and is no part of the tokenizer's own.
    digest = hashlib.sha256(lengths.tobytes())
    for array in (tokens, loss):
        digest.update(array.tobytes())
    corpus = Corpus(
        tokens=tokens,
        document_starts=np.cumsum(lengths) - lengths,
        name=path,
        names=(Path(path).name,),
        fingerprint=digest.hexdigest(),
        skipped=lines.bad,
        eod=tokenizer.eod,
        vocab_size=tokenizer.vocab_size,
        loss=loss,
    )
    return Chats(corpus=corpus, cut=cut, dropped=dropped)


def _messages(found: Any) -> list[dict[str, Any]]:
    """The messages of a line, ShareGPT's in the other spelling."""
    key, role, content = "messages", "role", "content"
    if key not in found and "conversations" in found:
        key, role, content = "conversations", "from", "value"
    turns = found.get(key)
    if not isinstance(turns, list) or not turns:
        raise BadLineError('has no "messages" (or "conversations")')
    messages = []
    for number, turn in enumerate(turns):
        if not isinstance(turn, dict) or not isinstance(turn.get(role), str):
            raise BadLineError(f'message {number} has no "{role}"')
        if not isinstance(turn.get(content), str):
            raise BadLineError(f'message {number} has no "{content}" that is a string')
        check_letters(turn[role] + turn[content], f"message {number}")
        rest = {name: value for name, value in turn.items() if name not in (role, content)}
        name = _ROLES.get(turn[role], turn[role])
        messages.append({"role": name, "content": turn[content], **rest})
    if not any(message["role"] == "assistant" for message in messages):
        raise BadLineError("has no answer of the assistant")
    return messages


def _plain(tokenizer: Tokenizer) -> Callable[[Sequence[Message]], Conversation]:
    """Conversations of a tokenizer without a template."""
    end = np.array([tokenizer.eod], dtype=np.int32)

    def write(messages: Sequence[Message]) -> Conversation:
        pieces: list[tuple[Ids, bool]] = []
        for number, message in enumerate(messages):
            heading = "\n\n" if number else ""
            heading += f"{message['role'].capitalize()}: "
            pieces.append((tokenizer.encode(heading), False))
            answer = message["role"] == "assistant"
            pieces.append((tokenizer.encode(message["content"]), answer))
            if answer:
                pieces.append((end, True))
        return Conversation(
            tokens=np.concatenate([ids for ids, _ in pieces]),
            loss=np.concatenate([np.full(len(ids), answer) for ids, answer in pieces]),
        )

    return write


def _templated(tokenizer: Tokenizer, render: Render) -> Callable[[Sequence[Message]], Conversation]:
    """Conversations by the tokenizer's template."""

    def write(messages: Sequence[Message]) -> Conversation:
        try:
            whole = render(messages, False)
            check_letters(whole, "a message")
            spans = _answers(messages, whole, render)
        except TemplateRefusalError as error:
            raise BadLineError(f"the chat template refuses it: {error}") from None
        except _NotNestedError as error:
            rule = f"its chat template writes {error}, so where answers lie can not be told"
            works = "a template that only ever appends"
            raise ConfigError(MODEL_FLAG, tokenizer.path, rule, works) from None
        tokens = tokenizer.encode(whole)
        loss = np.zeros(len(tokens), dtype=bool)
        for start, end in spans:
            first, last = (_common(tokens, tokenizer.encode(whole[:n])) for n in (start, end))
            loss[first:last] = True
        return Conversation(tokens=tokens, loss=loss)

    return write


class _NotNestedError(ValueError):
    """A beginning of the conversation is not written as the beginning of its text."""


def _answers(messages: Sequence[Message], whole: str, render: Render) -> list[tuple[int, int]]:
    """Where in ``whole`` the answers lie, as characters."""
    spans = []
    for number, message in enumerate(messages):
        if message["role"] != "assistant":
            continue
        before = render(messages[:number], True)
        after = render(messages[: number + 1], False)
        if not after.startswith(before):
            raise _NotNestedError("an answer otherwise than after its generation prompt")
        if not whole.startswith(after):
            raise _NotNestedError("a message otherwise once others follow it")
        spans.append((len(before), len(after.rstrip())))
    return spans


def _common(tokens: Ids, beginning: Ids) -> int:
    """How many tokens the two have in common at the beginning.

    Text cut at a character may be other tokens at its end than in the whole.
    """
    shorter = min(len(tokens), len(beginning))
    differing = np.flatnonzero(tokens[:shorter] != beginning[:shorter])
    return int(differing[0]) if len(differing) else shorter
