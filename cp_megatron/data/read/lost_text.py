"""Finds texts of a record that a chat template left out of the conversation that it wrote."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

from cp_megatron.data.read.chat_records import ChatRecord
from cp_megatron.data.read.chat_turns import REASONING, ROLES, strings
from cp_megatron.data.read.json_lines import CHAT_KEYS

Remark = tuple[str, str]
"""(what is true of some conversations, an example of it)."""
# Keys of a message that hold its texts, or that only describe it.
_KNOWN = frozenset(
    ("content", "tool_calls", *REASONING, "id", "type", "tool_call_id", "name", "role")
)
_SPELLINGS: tuple[Callable[[str], str], ...] = (
    lambda text: text,
    lambda text: json.dumps(text, ensure_ascii=False)[1:-1],
    lambda text: json.dumps(text)[1:-1],
    lambda text: repr(text)[1:-1],
)


def first_missing(texts: Iterable[str], written: str) -> str | None:
    """Returns the first text that does not occur, or None.

    White space does not count, since templates trim and indent; nor do the backslashes that a text
    has inside JSON.
    """
    squeezed = ""
    for text in texts:
        if text.strip() in written:
            continue
        squeezed = squeezed or _squeezed(written)
        if not any(_squeezed(spell(text)) in squeezed for spell in _SPELLINGS):
            return text
    return None


def texts_of(message: Mapping[str, Any]) -> Iterator[str]:
    """The texts of a message that the model reads or writes: content, reasoning, calls."""
    yield from content_of(message)
    yield from strings(message.get(REASONING[0]))
    for call in message.get("tool_calls", ()):
        function = call.get("function", call) if isinstance(call, Mapping) else call
        yield from strings(function)


def content_of(message: Mapping[str, Any]) -> list[str]:
    """The texts of a message's content."""
    content = message.get("content") or ""
    return [content] if isinstance(content, str) else [part["text"] for part in content]


def remarks_on(
    record: ChatRecord,
    messages: Sequence[Mapping[str, Any]],
    text: str,
    variables: frozenset[str] = frozenset(),
) -> Iterator[Remark]:
    """What the user should know about a record that was written.

    Args:
        record: the record.
        messages: its messages as the template got them.
        text: what was written of it.
        variables: the names that the template reads.
    """
    for number, message in enumerate(messages):
        if (lost := first_missing(texts_of(message), text)) is not None:
            yield "have text that is not written", f"{shortened(lost)} of message {number}"
        others = {key: value for key, value in message.items() if key not in _KNOWN}
        if keys := [key for key, value in others.items() if first_missing(strings(value), text)]:
            yield "have keys in messages that are not read", ", ".join(keys)
        if message["role"] not in ROLES:
            yield "have turns of another role, which have no loss", str(message["role"])
        calls = (strings(call) for call in message.get("tool_calls", ()))
        if any('{"' in each and each not in text for call in calls for each in call):
            what = "have arguments of calls that are a string, which is written with backslashes"
            yield what, f"message {number}; an object would be written without"
    if (lost := first_missing(_beside(record.values), text)) is not None:
        yield "have tools or documents that are not written", shortened(lost)
    known = ("tools", "documents")
    unread = [key for key in record.values if key not in known and key not in variables]
    read = [key for key in record.unread if key in variables]
    if unread or len(read) < len(record.unread):
        keys = [*unread, *(key for key in record.unread if key not in read)]
        yield "have keys beside the messages that are not read", ", ".join(keys)
    if read:
        what = "have keys that the template could read if chat_template_kwargs held them"
        yield what, ", ".join(read)
    if record.shape not in CHAT_KEYS:
        yield "are written as a question and an answer", record.shape


def shortened(text: str) -> str:
    """The beginning of a text in quotes."""
    line = " ".join(text.split())
    return f'"{line[:40]}..."' if len(line) > 43 else f'"{line}"'


def _beside(values: Mapping[str, Any]) -> Iterator[str]:
    """Names and descriptions of tools, of their parameters, and the texts of documents."""
    for tool in values.get("tools", ()):
        yield from _described(tool)
    for document in values.get("documents", ()):
        yield from (text for key in ("title", "text") for text in strings(document.get(key)))


def _described(schema: Any) -> Iterator[str]:
    if isinstance(schema, Mapping):
        for key, value in schema.items():
            if key in ("name", "description") and isinstance(value, str):
                yield value
            elif key == "properties" and isinstance(value, Mapping):
                yield from value
            yield from _described(value)
    elif isinstance(schema, list):
        for item in schema:
            yield from _described(item)


def _squeezed(text: str) -> str:
    return "".join(text.split())
