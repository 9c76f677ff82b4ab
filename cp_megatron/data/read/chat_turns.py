"""The turns of a conversation: one spelling for those that are in use.

role     human, user, prompter -> user       gpt, model, bot, ... -> assistant
         function, observation, ... -> tool  function_call -> assistant with a call
content  a text, parts {"type": "text"}, or nothing beside calls or reasoning
loss     "weight": 0, "train": false, "training": false or "loss": false: the answer has none
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

from cp_megatron.data.read.json_lines import BadLineError, check_surrogates

ROLES: Mapping[str, str] = MappingProxyType(
    {
        **dict.fromkeys(("user", "human", "prompter"), "user"),
        **dict.fromkeys(("assistant", "gpt", "chatgpt", "bing", "bard", "model"), "assistant"),
        **dict.fromkeys(("bot", "ai", "chatbot", "function_call", "tool_call"), "assistant"),
        **dict.fromkeys(("tool", "function", "observation"), "tool"),
        **dict.fromkeys(("tool_response", "function_response"), "tool"),
        **dict.fromkeys(("system", "developer"), ""),
    }
)
"""How a role is spelled, in lower case -> the name that templates know; "" keeps the name."""
_CALLS = ("function_call", "tool_call")
_TRAINED = ("weight", "train", "training", "loss")
"""Keys that say whether an answer has a loss."""
REASONING = ("reasoning_content", "thinking", "reasoning")
"""Keys of an answer's reasoning; the first is the one that most templates read."""
CONTENT = ("content", "value")


class RecordError(BadLineError):
    """A record cannot be trained on; ``works`` tells how to mend the data."""

    def __init__(self, reason: str, works: str) -> None:
        super().__init__(reason)
        self.works = works


@dataclass(frozen=True, kw_only=True)
class Turn:
    """A message for the template, and whether it is an answer with a loss."""

    message: Mapping[str, Any]
    trained: bool

    @property
    def role(self) -> str:
        return str(self.message["role"])


def read_turns(entries: Any, key: str) -> list[Turn]:
    """Reads a list of messages.

    Args:
        entries: the value found in the record, perhaps as JSON in a string.
        key: the key of the record, for messages.

    Raises:
        BadLineError: it is no list of messages, or one is malformed.
    """
    entries = parsed(entries, key)
    if not isinstance(entries, list) or not entries:
        raise BadLineError(f"{key!r} is no list of messages")
    return [_turn(entry, number) for number, entry in enumerate(entries)]


def answer(content: str) -> Turn:
    """An answer that has a loss."""
    return Turn(message={"role": "assistant", "content": content}, trained=True)


def other(role: str, content: str) -> Turn:
    """A message that has no loss."""
    return Turn(message={"role": role, "content": content}, trained=False)


def parsed(value: Any, what: str) -> Any:
    """The value, or what it spells as JSON if it is a string.

    Raises:
        BadLineError: the string is not JSON.
    """
    if not isinstance(value, str):
        return value
    try:
        return json.loads(value)
    except (ValueError, RecursionError):
        raise BadLineError(f"{what!r} is a string that is not JSON") from None


def strings(value: Any) -> Iterator[str]:
    """All strings inside a value of JSON, without the keys of objects."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, Mapping):
        for item in value.values():
            yield from strings(item)
    elif isinstance(value, Sequence):
        for item in value:
            yield from strings(item)


def joined(message: Mapping[str, Any]) -> Mapping[str, Any]:
    """The message with its parts as one text, a line each."""
    content = message.get("content")
    if not isinstance(content, list):
        return message
    return {**message, "content": "\n".join(part["text"] for part in content)}


def in_parts(message: Mapping[str, Any]) -> Mapping[str, Any]:
    """The message with its text as a part."""
    content = message.get("content")
    if not isinstance(content, str):
        return message
    return {**message, "content": [{"type": "text", "text": content}]}


def spell_calls(message: Mapping[str, Any], empty: str | None, swap: bool) -> Mapping[str, Any]:
    """The message with its calls as another template expects them.

    Args:
        message: one without calls is returned as it is.
        empty: the content, if the message has none.
        swap: make a string of JSON of arguments that are an object, and the reverse.
    """
    calls = message.get("tool_calls")
    if not calls or not all(isinstance(call, Mapping) for call in calls):
        return message
    return {
        **message,
        "content": message.get("content") or empty,
        "tool_calls": [_swapped(call) if swap else call for call in calls],
    }


def _swapped(call: Mapping[str, Any]) -> Mapping[str, Any]:
    inner = call.get("function")
    if isinstance(inner, Mapping):
        return {**call, "function": _swapped(inner)}
    arguments = call.get("arguments")
    if isinstance(arguments, Mapping):
        return {**call, "arguments": json.dumps(arguments, ensure_ascii=False)}
    with suppress(ValueError, RecursionError):
        if isinstance(arguments, str) and isinstance(value := json.loads(arguments), dict):
            return {**call, "arguments": value}
    return call


def _turn(entry: Any, number: int) -> Turn:
    where = f"message {number}"
    if not isinstance(entry, dict):
        raise BadLineError(f"{where} is no object with a role and a content")
    rest = {key: value for key, value in entry.items() if value is not None}
    key = "role" if "role" in rest else "from"
    if not isinstance(spelled := rest.pop(key, None), str):
        raise BadLineError(f'{where} has no "role" (or "from"), only {", ".join(entry)}')
    known = spelled.strip().lower()
    role = ROLES.get(known) or (known if known in ROLES else spelled)
    trained = _trained(rest, where, role)
    key = next((key for key in CONTENT if key in rest), CONTENT[0])
    content = rest.pop(key, None)
    message: dict[str, Any] = {"role": role}
    if known in _CALLS:
        message["tool_calls"] = [_call(each, where) for each in _listed(parsed(content, where))]
    elif content is not None:
        message["content"] = _content(content, where, key)
    if "function_call" in rest:  # how OpenAI spelled it before tool_calls
        message["tool_calls"] = [_call(rest.pop("function_call"), where)]
    if "tool_calls" in rest:
        message["tool_calls"] = _listed(parsed(rest.pop("tool_calls"), "tool_calls"))
    message |= rest
    reasoning = next((rest[key] for key in REASONING if key in rest), None)
    if reasoning is not None:
        if not isinstance(reasoning, str):
            raise BadLineError(f"{where} has reasoning that is not a text")
        message = {"thinking": reasoning, **message, "reasoning_content": reasoning}
    if content is None and not message.get("tool_calls") and reasoning is None:
        raise BadLineError(f'{where} has no "content"')
    check_surrogates("".join(strings(message)), where)
    return Turn(message=message, trained=trained)


def _trained(rest: dict[str, Any], where: str, role: str) -> bool:
    """Whether a message has a loss; takes the keys that say so out of it."""
    if "mask" in rest:
        raise BadLineError(f'{where} has a "mask"; "weight": 0 means that an answer has no loss')
    said = {key: rest.pop(key) for key in _TRAINED if key in rest}
    for key, value in said.items():
        if not isinstance(value, int | float) or value not in (0, 1):
            raise BadLineError(f"{where} has {key!r} {value!r}; 0, 1, true and false are possible")
        if value and role != "assistant":
            raise BadLineError(f"{where} has {key!r} {value!r}, and only answers have a loss")
    return role == "assistant" and all(said.values())


def _content(content: Any, where: str, key: str) -> str | list[dict[str, str]]:
    """A text, or parts that are texts."""
    if isinstance(content, str):
        return content
    if not isinstance(content, list):
        raise BadLineError(f"{where} has no {key!r} that is a text or a list of parts")
    parts = []
    for part in content:
        if isinstance(part, str):
            part = {"type": "text", "text": part}
        kind = part.get("type", "text") if isinstance(part, dict) else type(part).__name__
        text = part.get("text") if isinstance(part, dict) else None
        if kind not in ("text", "input_text", "output_text") or not isinstance(text, str):
            works = "text parts alone, with reasoning under reasoning_content and calls under"
            raise RecordError(f"{where} has a part {kind!r}, not a text", f"{works} tool_calls")
        parts.append({"type": "text", "text": text})
    return parts


def _listed(value: Any) -> list[Any]:
    return value if isinstance(value, list) else [value]


def _call(value: Any, where: str) -> dict[str, Any]:
    """A call of a function, as templates know it."""
    value = parsed(value, f"{where}: the call")
    if isinstance(value, dict) and isinstance(value.get("function"), dict):
        return value
    if not isinstance(value, dict) or not isinstance(value.get("name"), str):
        raise BadLineError(f'{where} is a call without a "name"')
    function = {"name": value["name"], "arguments": value.get("arguments", {})}
    return {"type": "function", "function": function}
