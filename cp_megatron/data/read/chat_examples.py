"""Writes a conversation as tokens, with a loss on the assistant's answers.

The chat template decides where an answer lies. If it marks answers (``{% generation %}``), the
marks count. Otherwise the program writes the beginnings of the conversation and compares them::

    all messages          <user>Hello</s><assistant>Hi.</s><user>Bye</s>
    before the answer     <user>Hello</s><assistant>
    up to the answer      <user>Hello</s><assistant>Hi.</s>
    loss                                            ^^^^^^^

White space that the template adds after the end of an answer has no loss. Many templates write an
answer otherwise once later turns follow; most of them drop its reasoning. Such an answer becomes an
example of its own, the conversation up to it, so that it is trained once and as it is generated::

    example 1   <user>Hello</s><assistant><think>r1</think>Hi.</s>
    loss                                  ^^^^^^^^^^^^^^^^^^^^^^^^
    example 2   <user>Hello</s><assistant>Hi.</s><user>Bye</s><assistant><think>r2</think>Bye.</s>
    loss                                                                ^^^^^^^^^^^^^^^^^^^^^^^^^

A template that drops the reasoning even of the last answer is given it back: the answer follows the
generation prompt word for word, up to what the template puts at its end.

For a tokenizer without a template (such as the byte tokenizer) a conversation is written as
``User: Hello``, an empty line, ``Assistant: Hi.`` and the end of the document, which ends each
answer.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import product

import numpy as np
import numpy.typing as npt

from cp_megatron.data.read.chat_records import ChatRecord
from cp_megatron.data.read.chat_turns import RecordError, in_parts, joined, spell_calls
from cp_megatron.data.read.json_lines import BadLineError
from cp_megatron.data.read.lost_text import (
    Remark,
    content_of,
    first_missing,
    remarks_on,
    shortened,
    texts_of,
)
from cp_megatron.data.tokenize.chat_template import (
    ChatTemplate,
    Message,
    Span,
    TemplateRefusalError,
)
from cp_megatron.data.tokenize.tokenizer import MODEL_FLAG, Ids, Tokenizer
from cp_megatron.data.tokenize.tokenizer_huggingface import HuggingFaceTokenizer

Conversation = tuple[Ids, npt.NDArray[np.bool_]]
"""The tokens, int32 [n], and whether each belongs to an answer, bool [n]."""
_MARKS = "a template that marks answers with {% generation %} and {% endgeneration %}"
_LAST_TAG = re.compile(r"[<\[][^\s<>\[\]]+[>\]]$")


@dataclass(frozen=True, kw_only=True)
class Written:
    """A record as examples to train on: one for the whole conversation, several, or none."""

    examples: tuple[Conversation, ...]
    remarks: tuple[Remark, ...]


Writer = Callable[[ChatRecord], Written]


@dataclass(kw_only=True)
class _Example:
    """A text and the ranges of its characters that have a loss."""

    text: str
    spans: list[Span]


def writer(tokenizer: Tokenizer, template: ChatTemplate | None) -> Writer:
    """Returns what writes records for a tokenizer; it raises ``BadLineError``."""
    if template is None:
        return lambda record: _plain(record, tokenizer)
    return lambda record: _Templated(record, tokenizer, template).write()


def _plain(record: ChatRecord, tokenizer: Tokenizer) -> Written:
    """Writes a conversation for a tokenizer without a template."""
    end = np.array([tokenizer.eod], dtype=np.int32)
    messages = [joined(message) for message in record.messages]
    parts: list[tuple[Ids, bool]] = []
    for number, (turn, message) in enumerate(zip(record.turns, messages)):
        content = message.get("content", "")
        if turn.trained and (lost := first_missing(texts_of(message), content)) is not None:
            rule = (
                f"message {number} has {shortened(lost)}, which is not written without a template"
            )
            raise RecordError(rule, f"{MODEL_FLAG} with a tokenizer that has a chat template")
        heading = f"{turn.role.capitalize()}: "
        parts.append((tokenizer.encode("\n\n" * (number > 0) + heading), False))
        parts.append((tokenizer.encode(content), turn.trained))
        parts += [(end, turn.trained)] * (turn.role == "assistant")
    tokens = np.concatenate([ids for ids, _ in parts])
    loss = np.concatenate([np.full(len(ids), trained) for ids, trained in parts])
    text = "\n".join(message.get("content", "") for message in messages)
    remarks = tuple(remarks_on(record, messages, text))
    return Written(examples=((tokens, loss),) if loss.any() else (), remarks=remarks)


class _Templated:
    """Writes one conversation with a chat template."""

    def __init__(self, record: ChatRecord, tokenizer: Tokenizer, template: ChatTemplate) -> None:
        if "tools" in record.values and template.with_tools is not None:
            template = template.with_tools
        self.record, self.tokenizer, self.template = record, tokenizer, template
        self.messages: Sequence[Message] = record.messages
        self.remarks: list[Remark] = []

    def write(self) -> Written:
        """Writes the examples.

        Raises:
            BadLineError: the template refuses the conversation, or leaves out a part of an answer.
        """
        try:
            self._choose_contents()
            examples = self._marked() if self.template.marked else self._compared()
        except TemplateRefusalError as error:
            raise BadLineError(f"the chat template refuses it: {error}") from None
        text = "\n".join(example.text for example in examples)
        self.remarks += remarks_on(self.record, self.messages, text, self.template.variables)
        examples = [example for example in examples if example.spans]
        if len(examples) > 1:
            what = "are cut into an example per answer, as the template rewrites earlier turns"
            self.remarks.append((what, f"{len(examples)} examples"))
        tokens = tuple(self._tokens(example) for example in examples)
        return Written(examples=tokens, remarks=tuple(self.remarks))

    def _render(self, messages: Sequence[Message], answer_follows: bool) -> str:
        return self.template(messages, answer_follows, self.record.values)

    def _choose_contents(self) -> None:
        """Chooses how contents are spelled, so that the template writes them."""
        own = self.messages
        spellings = [own, [joined(m) for m in own], [in_parts(m) for m in own]]
        # R1's template asks for null beside calls and for arguments as a string of JSON; others
        # need a text or an object there.
        others = product((False, True), (None, ""))
        spellings += [[spell_calls(m, empty, swap) for m in own] for swap, empty in others]
        possible: list[Sequence[Message]] = []
        for spelled in spellings:
            try:
                text = self._render(spelled, False)
            except TemplateRefusalError:
                continue
            possible.append(spelled)
            parts = [m["content"] for m in spelled if isinstance(m.get("content"), list)]
            # A template that does not know of parts writes the list as Python prints it.
            read = [m for m in spelled if m["role"] != "assistant" or m.get("tool_calls")]
            texts = (x for m in read for x in texts_of(m))
            if not any(str(each) in text for each in parts) and first_missing(texts, text) is None:
                self.messages = spelled
                return
        self.messages = (possible or spellings[-1:])[0]

    def _trained(self) -> Iterator[int]:
        """The numbers of the answers that have a loss, the last first."""
        turns = self.record.turns
        return (n for n in reversed(range(len(turns))) if turns[n].trained)

    # ---- marks -----------------------------------------------------------------------------------

    def _marked(self) -> list[_Example]:
        """The conversation with the ranges that the template marks.

        An answer that the template rewrites or shortens is marked in an example of its own.
        """
        text, spans = self._marks(len(self.messages))
        trained = list(self._trained())
        answers = sum(turn.role == "assistant" for turn in self.record.turns)
        if len(trained) == answers and all(self._lost(n, text) is None for n in trained):
            if not spans:
                raise RecordError("the chat template marks no answer in it", _MARKS)
            return [_Example(text=text, spans=spans)]
        examples = [_Example(text=text, spans=[])]
        for number in trained:
            upto, marks = self._marks(number + 1)
            if self._lost(number, upto) is not None:
                upto, span = self._answer(number)
                its = [span]
            else:
                first = _shared(self._marks(number)[0], upto)
                its = [span for span in marks if span[0] >= first]
            if not its:
                raise RecordError(f"the chat template marks nothing of message {number}", _MARKS)
            same = text.startswith(upto[: its[-1][1]]) and set(its) <= set(spans)
            if not same:
                examples.append(_Example(text=upto, spans=[]))
            examples[0 if same else -1].spans[:0] = its
        return examples[::-1]

    def _marks(self, number: int) -> tuple[str, list[Span]]:
        """The first messages as text, and what is marked in it."""
        if not number:  # many templates read the first message
            return "", []
        return self.template.mark(self.messages[:number], False, self.record.values)

    # ---- comparing -------------------------------------------------------------------------------

    def _compared(self) -> list[_Example]:
        """The whole conversation, and the beginnings that end with other answers."""
        examples = [_Example(text=self._render(self.messages, False), spans=[])]
        for number in self._trained():
            text, span = self._answer(number)
            whole = next((e for e in examples if e.text.startswith(text)), None)
            if whole is None:
                examples.append(whole := _Example(text=text, spans=[]))
            whole.spans.insert(0, span)
        return examples[::-1]

    def _answer(self, number: int) -> tuple[str, Span]:
        """The conversation up to an answer and with it, and the range of the answer."""
        before = self._render(self.messages[:number], True)
        after = self._render(self.messages[: number + 1], False)
        turns = self._render(self.messages[:number], False) if number else ""
        prompt = _shared(before, turns)  # where the generation prompt begins
        start = len(before)
        if not after.startswith(before):
            start = _shared(before, after)
            if start < prompt:
                rule = f"the chat template rewrites what is before message {number}"
                raise RecordError(f"{rule} when that is added", _MARKS)
            # An answer may begin with the same letters, as <tool> and <think> do.
            start = prompt + max(before.rfind(end, prompt, start) + 1 - prompt for end in "\n>]")
            start = max(start, prompt)
        if (lost := self._lost(number, after[prompt:])) is not None:
            return self._word_for_word(number, before, after[start:], lost)
        if start < len(before):
            what = "have an answer that does not begin as the generation prompt ends"
            self.remarks.append((what, repr(before[start:])))
        end = len(after.rstrip())
        content = content_of(self.messages[number])[-1:]
        if content and (last := content[0].rstrip()) and after.endswith(last, start, end):
            what = "have an answer with no end, so that the model does not learn to stop"
            self.remarks.append((what, repr(after[-30:])))
        return after, (start, end)

    def _word_for_word(self, number: int, before: str, written: str, lost: str) -> tuple[str, Span]:
        """An answer after its generation prompt, as the record has it.

        Args:
            number: the message.
            before: the conversation before it, with the generation prompt.
            written: what the template writes of the answer.
            lost: what it leaves out.
        """
        content = self.messages[number].get("content")
        if not isinstance(content, str) or self._lost(number, content) is not None:
            raise self._dropped(number, lost)
        # Search for the longest end of the answer that is kept.
        low, high = 0, len(content)
        while low < high:
            middle = (low + high) // 2
            low, high = (low, middle) if content[middle:].strip() in written else (middle + 1, high)
        kept = content[low:].strip()
        if not kept:
            raise self._dropped(number, lost)
        head, _, ending = written.rpartition(kept)
        if head.strip():
            raise self._dropped(number, lost)
        prompt = before.rstrip()
        answer = content
        if (tag := _LAST_TAG.search(prompt)) and content.lstrip().startswith(tag[0]):
            answer = content.lstrip()[len(tag[0]) :].removeprefix(before[len(prompt) :])
        text = before + answer.rstrip() + ending
        what = "have an answer that the template shortens, and that is trained as it is"
        self.remarks.append((what, shortened(lost)))
        return text, (len(before), len(text.rstrip()))

    def _lost(self, number: int, text: str) -> str | None:
        """The first text of a message that does not occur in ``text``."""
        return first_missing(texts_of(self.messages[number]), text)

    def _dropped(self, number: int, lost: str) -> RecordError:
        rule = f"the chat template leaves a part of message {number} out: {shortened(lost)}"
        return RecordError(rule, "a template that writes it, or the text in the content")

    # ---- tokens ----------------------------------------------------------------------------------

    def _tokens(self, example: _Example) -> Conversation:
        text, tokenizer = example.text, self.tokenizer
        tokens = tokenizer.encode(text)
        loss = np.zeros(len(tokens), dtype=bool)
        if self.template.marked and isinstance(tokenizer, HuggingFaceTokenizer):
            starts, ends = np.array(tokenizer.offsets(text), dtype=np.int64).reshape(-1, 2).T
            for start, end in example.spans:  # as transformers does it
                loss |= (ends > start) & (starts < end)
            return tokens, loss
        for start, end in example.spans:
            prompt = tokenizer.encode(text[:start])
            first, last = (_common(tokens, ids) for ids in (prompt, tokenizer.encode(text[:end])))
            loss[first:last] = True
            if first < len(prompt):
                what = "have an answer whose first token also holds the end of its prompt"
                self.remarks.append((what, repr(tokenizer.decode(tokens[first : first + 1]))))
        return tokens, loss


def _shared(first: str, second: str) -> int:
    """The number of characters at the beginning that both have."""
    low, high = 0, min(len(first), len(second))
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if first[:middle] == second[:middle] else (low, middle - 1)
    return low


def _common(tokens: Ids, beginning: Ids) -> int:
    """The number of tokens at the beginning that both have.

    A text cut after a character may end in other tokens than the whole text has there.
    """
    shorter = min(len(tokens), len(beginning))
    differing = np.flatnonzero(tokens[:shorter] != beginning[:shorter])
    return int(differing[0]) if len(differing) else shorter
