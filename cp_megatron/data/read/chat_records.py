"""The shapes of a record that holds a conversation.

    messages, conversations or conversation    a list of turns: role and content, or from and value
    prompt, completion or response             two texts, or two lists of turns; of these, answers
                                               in the prompt have no loss
    instruction (input), output or response    Alpaca's, with history

Beside them, ``system`` begins the conversation, ``tools`` (or ``functions``), ``documents`` and
``chat_template_kwargs`` go to the template. Data of other kinds is refused by name.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from types import MappingProxyType
from typing import Any

from cp_megatron.data.read.chat_turns import RecordError, Turn, answer, other, parsed, read_turns
from cp_megatron.data.read.json_lines import CHAT_KEYS, BadLineError, check_surrogates

SHAPES = (
    "a list of turns under messages or conversations; prompt and completion; or instruction "
    "(with input) and output"
)
_OUTPUTS = ("output", "response")
_ALPACA = ("instruction", "input", "history")
_COMPLETIONS = ("completion", "response")
_VALUES = ("tools", "documents", "chat_template_kwargs")
_MEDIA = ("images", "image", "videos", "video", "audios", "audio")
_RESERVED = ("messages", "tools", "documents", "add_generation_prompt")
_WITHOUT_SFT = "without --sft, with --json-keys if the key is not text"
_OTHER_KINDS: tuple[tuple[frozenset[str], str, str], ...] = (
    (
        frozenset(("chosen", "rejected")),
        "is a preference between two answers (for DPO and its kin), not a conversation",
        "a file whose messages hold the prompt and the chosen answer",
    ),
    (
        frozenset(("prompt", "completion", "label")),
        "is an answer with a judgement (for KTO), which may be a bad answer",
        "the records whose label is true, without the label",
    ),
    (
        frozenset(("completions", "labels")),
        "is steps of an answer with judgements (for a reward model), not a conversation",
        "other data",
    ),
    (frozenset(("text",)), "is a text, not a conversation", _WITHOUT_SFT),
)
"""Data that --sft cannot train on: (the keys of a record, what it is, what to do)."""


@dataclass(frozen=True, kw_only=True)
class ChatRecord:
    """A conversation as a record has it.

    Attributes:
        turns: the messages, at least one of them an answer.
        values: what else the template may read, such as ``tools``.
        unread: keys of the record that are not used.
        shape: the keys that the turns come from.
    """

    turns: tuple[Turn, ...]
    values: Mapping[str, Any]
    unread: tuple[str, ...]
    shape: str

    @property
    def messages(self) -> list[Mapping[str, Any]]:
        return [turn.message for turn in self.turns]


def read_record(value: Mapping[str, Any]) -> ChatRecord:
    """Reads the object of a line, an element of a JSON array or a row of a table.

    Raises:
        BadLineError: it is not a conversation; ``RecordError`` if it is data of another kind.
    """
    given = {key: item for key, item in value.items() if item is not None}
    read = next((read for keys, read in _SHAPES.items() if _fits(keys, given)), None)
    if read is None:
        raise _unknown(value)
    for key in _MEDIA:
        if given.pop(key, None):
            raise RecordError(f"has {key}, and only text is trained on", "records without it")
    turns, used = read(given)
    system, rest = given.get("system"), {k: v for k, v in given.items() if k not in used}
    if isinstance(system, str):
        turns = _with_system(turns, rest.pop("system"))
    values = {key: rest.pop(key) for key in _VALUES if key in rest}
    if "functions" in rest and "tools" not in values:  # how OpenAI spelled them before tools
        functions = _objects(rest.pop("functions"), "functions")
        values["tools"] = [{"type": "function", "function": each} for each in functions]
    shape = ", ".join(key for key in given if key in used)
    if not any(turn.role == "assistant" for turn in turns):
        roles = ", ".join(sorted({turn.role for turn in turns}))
        raise BadLineError(f"has no answer of the assistant, only turns of {roles}")
    return ChatRecord(turns=tuple(turns), values=_values(values), unread=tuple(rest), shape=shape)


def _values(given: dict[str, Any]) -> dict[str, Any]:
    """What the template reads besides the messages; nothing for an empty list of tools."""
    extra = parsed(given.pop("chat_template_kwargs", {}), "chat_template_kwargs")
    if not isinstance(extra, dict) or set(extra) & set(_RESERVED):
        rule = f"has chat_template_kwargs that are no object, or that hold {', '.join(_RESERVED)}"
        raise BadLineError(rule)
    lists = {key: _objects(value, key) for key, value in given.items()}
    values = {**extra, **{key: value for key, value in lists.items() if value}}
    check_surrogates(str(values), "what stands beside the messages")
    return values


def _objects(value: Any, key: str) -> list[Any]:
    """A list of objects, each perhaps as JSON in a string; a single object is a list of one."""
    items = parsed(value, key)
    items = [parsed(item, key) for item in (items if isinstance(items, list) else [items])]
    if not all(isinstance(item, dict) for item in items):
        raise BadLineError(f"{key!r} is no list of objects")
    return items


def _with_system(turns: list[Turn], text: str) -> list[Turn]:
    if not text.strip():
        return turns
    if turns and turns[0].role == "system":
        if turns[0].message.get("content") == text:
            return turns
        raise BadLineError('has a "system" beside turns that begin with another system message')
    return [other("system", text), *turns]


# ---- shapes --------------------------------------------------------------------------------------

Read = Callable[[Mapping[str, Any]], tuple[list[Turn], set[str]]]
"""The values of a record that are not null -> its turns, and the keys that they come from."""


def _listed(given: Mapping[str, Any]) -> tuple[list[Turn], set[str]]:
    key = next(key for key in CHAT_KEYS if key in given)
    return read_turns(given[key], key), {key}


def _completed(given: Mapping[str, Any]) -> tuple[list[Turn], set[str]]:
    if isinstance(given.get("label"), bool):
        raise _unknown(given)
    key = next(key for key in _COMPLETIONS if key in given)
    prompt, completion, used = given["prompt"], given[key], {"prompt", key}
    if isinstance(prompt, str) and isinstance(completion, str):
        check_surrogates(prompt + completion, "the prompt or completion")
        return [other("user", prompt), answer(completion)], used
    before = [replace(turn, trained=False) for turn in read_turns(prompt, "prompt")]
    return [*before, *read_turns(completion, key)], used


def _instructed(given: Mapping[str, Any]) -> tuple[list[Turn], set[str]]:
    output = next(key for key in _OUTPUTS if key in given)
    pairs = given.get("history", [])
    if not isinstance(pairs, list) or any(not isinstance(x, list) or len(x) != 2 for x in pairs):
        raise BadLineError("'history' is no list of pairs of texts")
    asked = [given["instruction"], given.get("input", "")]
    texts = [*asked, given[output], *(text for pair in pairs for text in pair)]
    if not all(isinstance(text, str) for text in texts):
        raise BadLineError(f"'instruction', 'input', {output!r} and 'history' must be texts")
    check_surrogates("".join(texts), "a text")
    turns = [turn for pair in pairs for turn in (other("user", pair[0]), answer(pair[1]))]
    question = other("user", "\n".join(filter(None, asked)))
    return [*turns, question, answer(given[output])], {*_ALPACA, output} & set(given)


_SHAPES: Mapping[tuple[str, ...], Read] = MappingProxyType(
    {
        ("|".join(CHAT_KEYS),): _listed,
        ("prompt", "completion|response"): _completed,
        ("instruction", "output|response"): _instructed,
    }
)
"""The keys that a shape has, ``a|b`` for either, and how it is read; the first that fits counts."""


def _fits(keys: tuple[str, ...], given: Mapping[str, Any]) -> bool:
    return all(any(key in given for key in choice.split("|")) for choice in keys)


def _unknown(value: Mapping[str, Any]) -> BadLineError:
    """The error for a record without a conversation, which says what it is instead."""
    keys = f"a record has the keys {', '.join(value)}" if value else "a record has no keys"
    for there, what, works in _OTHER_KINDS:
        if there <= set(value) or (there & set(value) and "chosen" in there):
            return RecordError(f"{keys}; it {what}", works)
    return RecordError(f"{keys}; none of them holds a conversation", SHAPES)
