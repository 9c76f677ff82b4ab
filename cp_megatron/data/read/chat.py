"""Reads conversations as documents, with a loss on the assistant's answers only.

A line of the file is ``{"messages": [{"role": ..., "content": ...}, ...]}``, or ShareGPT's
``{"conversations": [{"from": ..., "value": ...}, ...]}``. The chat template alone decides where an
answer lies: the program renders the beginnings of the conversation and compares them::

    all messages          <user>Hello</s><assistant>Hi.</s><user>Bye</s>
    before the answer     <user>Hello</s><assistant>
    up to the answer      <user>Hello</s><assistant>Hi.</s>
    loss                                            ^^^^^^^

White space that the template adds after the end of an answer has no loss. For a tokenizer without
a template (such as the byte tokenizer) a conversation is written as ``User: Hello``, an empty line,
``Assistant: Hi.`` and the end of the document, which ends each answer.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping, Sequence
from types import MappingProxyType
from typing import Any

import numpy as np
import numpy.typing as npt

from cp_megatron.data.read.corpus import Corpus
from cp_megatron.data.read.json_lines import BadLineError, check_surrogates, read_lines
from cp_megatron.data.read.text_files import FLAG
from cp_megatron.data.tokenize.chat_template import (
    Message,
    Render,
    TemplateRefusalError,
    find_template,
)
from cp_megatron.data.tokenize.tokenizer import MODEL_FLAG, Ids, Tokenizer
from cp_megatron.errors import ConfigError

_ROLES: Mapping[str, str] = MappingProxyType({"human": "user", "gpt": "assistant"})

Conversation = tuple[Ids, npt.NDArray[np.bool_]]
"""The tokens, int32 [n], and whether each belongs to an answer, bool [n]."""


def load_chats(
    path: str, tokenizer: Tokenizer, *, seq_length: int, skip_bad: bool
) -> tuple[Corpus, int, int]:
    """Reads a file of conversations.

    Args:
        path: the file.
        tokenizer: its chat template is used.
        seq_length: longer conversations are cut to this length, because the model would read the
            rest without its context.
        skip_bad: leave malformed lines out and count them.

    Returns:
        a document for each conversation, the number of conversations that were longer than a row
        and lost their end, and of those left out without an answer that begins within a row.

    Raises:
        ConfigError: a line is malformed, no conversation is left, or the template cannot be used.
    """
    render = find_template(tokenizer)
    write = _plain(tokenizer) if render is None else _templated(tokenizer, render)
    lines, bad = read_lines(path, lambda value: write(_messages(value)), skip_bad=skip_bad)
    kept = [item for _, item in lines if item[1][1:seq_length].any()]
    if not kept:
        rule = f"holds no conversation with an answer within {seq_length} tokens"
        raise ConfigError(FLAG, path, rule, "a longer --seq-length, or other data")
    lengths = np.array([min(len(tokens), seq_length) for tokens, _ in kept], dtype=np.int64)
    tokens, loss = (np.concatenate([each[:seq_length] for each in part]) for part in zip(*kept))
    # The result is hashed, because the template decides it too, and no other fingerprint has it.
    digest = hashlib.sha256(lengths.tobytes())
    for array in (tokens, loss):
        digest.update(array.tobytes())
    corpus = Corpus(
        tokens=tokens,
        document_starts=np.cumsum(lengths) - lengths,
        name=path,
        fingerprint=digest.hexdigest(),
        skipped=bad,
        eod=tokenizer.eod,
        vocab_size=tokenizer.vocab_size,
        loss=loss,
    )
    num_cut = sum(len(tokens) > seq_length for tokens, _ in kept)
    return corpus, num_cut, len(lines) - len(kept)


def _messages(value: Any) -> list[dict[str, Any]]:
    """The messages of a line, those of ShareGPT in the other spelling."""
    key, role, content = "messages", "role", "content"
    if key not in value and "conversations" in value:
        key, role, content = "conversations", "from", "value"
    entries = value.get(key)
    if not isinstance(entries, list) or not entries:
        raise BadLineError('has no "messages" (or "conversations")')
    messages = []
    for number, entry in enumerate(entries):
        if not isinstance(entry, dict) or not isinstance(entry.get(role), str):
            raise BadLineError(f'message {number} has no "{role}"')
        if not isinstance(entry.get(content), str):
            raise BadLineError(f'message {number} has no "{content}" that is a string')
        check_surrogates(entry[role] + entry[content], f"message {number}")
        rest = {name: item for name, item in entry.items() if name not in (role, content)}
        name = _ROLES.get(entry[role], entry[role])
        messages.append({"role": name, "content": entry[content], **rest})
    if not any(message["role"] == "assistant" for message in messages):
        raise BadLineError("has no answer of the assistant")
    return messages


def _plain(tokenizer: Tokenizer) -> Callable[[Sequence[Message]], Conversation]:
    """Writes conversations for a tokenizer without a template."""
    end = np.array([tokenizer.eod], dtype=np.int32)

    def write(messages: Sequence[Message]) -> Conversation:
        parts: list[tuple[Ids, bool]] = []
        for number, message in enumerate(messages):
            heading = f"{message['role'].capitalize()}: "
            parts.append((tokenizer.encode("\n\n" * (number > 0) + heading), False))
            answer = message["role"] == "assistant"
            parts.append((tokenizer.encode(message["content"]), answer))
            parts += [(end, True)] * answer
        loss = [np.full(len(ids), answer) for ids, answer in parts]
        return np.concatenate([ids for ids, _ in parts]), np.concatenate(loss)

    return write


def _templated(tokenizer: Tokenizer, render: Render) -> Callable[[Sequence[Message]], Conversation]:
    """Writes conversations by the tokenizer's template."""

    def write(messages: Sequence[Message]) -> Conversation:
        try:
            whole = render(messages, False)
            check_surrogates(whole, "a message")
            spans = _answers(messages, whole, tokenizer, render)
        except TemplateRefusalError as error:
            raise BadLineError(f"the chat template refuses it: {error}") from None
        tokens = tokenizer.encode(whole)
        loss = np.zeros(len(tokens), dtype=bool)
        for start, end in spans:
            first, last = (_common(tokens, tokenizer.encode(whole[:n])) for n in (start, end))
            loss[first:last] = True
        return tokens, loss

    return write


def _answers(
    messages: Sequence[Message], whole: str, tokenizer: Tokenizer, render: Render
) -> list[tuple[int, int]]:
    """The ranges of characters in ``whole`` that are answers."""
    spans = []
    for number in (n for n, message in enumerate(messages) if message["role"] == "assistant"):
        before = render(messages[:number], True)
        after = render(messages[: number + 1], False)
        if not (after.startswith(before) and whole.startswith(after)):
            how = "a message differently once others follow it"
            if not after.startswith(before):
                how = "an answer otherwise than after its generation prompt"
            rule = f"its chat template writes {how}, so it is unknown where answers lie"
            raise ConfigError(MODEL_FLAG, tokenizer.path, rule, "a template that only appends")
        spans.append((len(before), len(after.rstrip())))
    return spans


def _common(tokens: Ids, beginning: Ids) -> int:
    """The number of tokens at the beginning that both have.

    A text cut after a character may end in other tokens than the whole text has there.
    """
    shorter = min(len(tokens), len(beginning))
    differing = np.flatnonzero(tokens[:shorter] != beginning[:shorter])
    return int(differing[0]) if len(differing) else shorter
