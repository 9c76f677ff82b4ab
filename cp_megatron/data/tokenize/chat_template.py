"""The chat template of a tokenizer, which writes a conversation as text.

The template comes from the tokenizer's folder: chat_template.jinja, or ``chat_template`` in
tokenizer_config.json. Of several named ones, ``tool_use`` writes conversations with tools, and
``default`` all others. Jinja runs it in a sandbox, with the names that transformers gives it. A
tokenizer without a template that has the two tokens of ChatML uses ChatML::

    <|im_start|>user
    Hello<|im_end|>
    <|im_start|>assistant
    Hi.<|im_end|>
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any, NoReturn, Protocol

from cp_megatron.data.tokenize.tokenizer import MODEL_FLAG, TYPE_FLAG, Tokenizer
from cp_megatron.errors import ConfigError

Message = Mapping[str, Any]
Span = tuple[int, int]

CHATML = (
    "{% for message in messages %}"
    "{{ '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>' + '\\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)
DATE_FLAG = "--chat-date"
_SPECIAL = ("bos_token", "eos_token", "unk_token", "pad_token", "sep_token", "cls_token")
# Code points that Unicode reserves for use inside a program; they stand where a mark begins and
# ends until the text is complete.
_OPEN, _CLOSE = "\ufdd0", "\ufdd1"
_MARKS = re.compile(r"\{%-?\s*generation\s*-?%\}")


class Render(Protocol):
    """Writes messages as text; ``answer_follows`` adds the beginning of an answer.

    Raises:
        TemplateRefusalError: the template refuses the messages.
    """

    def __call__(self, messages: Sequence[Message], answer_follows: bool) -> str: ...


@dataclass(frozen=True, kw_only=True)
class ChatTemplate:
    """A compiled template.

    Attributes:
        run: writes the variables that it is given as text, with ``_OPEN`` and ``_CLOSE`` in it.
        marked: ``{% generation %}`` marks what the assistant writes.
        variables: the names that the template reads.
        with_tools: the template for conversations with tools, if that is another one.
    """

    run: Callable[[Mapping[str, Any]], str]
    marked: bool
    variables: frozenset[str]
    with_tools: ChatTemplate | None = None

    def __call__(
        self,
        messages: Sequence[Message],
        answer_follows: bool,
        values: Mapping[str, Any] | None = None,
    ) -> str:
        """Writes a conversation.

        Args:
            messages: the turns.
            answer_follows: add the beginning of an answer.
            values: what else the template may read, such as ``tools``.

        Raises:
            TemplateRefusalError: the template refuses the messages.
        """
        return self.mark(messages, answer_follows, values)[0]

    def mark(
        self, messages: Sequence[Message], answer_follows: bool, values: Mapping[str, Any] | None
    ) -> tuple[str, list[Span]]:
        """Writes a conversation; returns also the ranges of characters that are marked."""
        given = {"tools": None, "documents": None, **(values or {}), "messages": messages}
        given["add_generation_prompt"] = answer_follows
        if not self.marked:
            return self.run(given), []
        if any(
            mark in json.dumps(given, ensure_ascii=False, default=str) for mark in (_OPEN, _CLOSE)
        ):
            raise TemplateRefusalError("U+FDD0 and U+FDD1 are no characters of a text")
        pieces = re.split(f"([{_OPEN}{_CLOSE}])", self.run(given))
        place, spans = 0, list[Span]()
        opened: list[int] = []
        for piece in pieces:
            if piece == _OPEN:
                opened.append(place)
            elif piece == _CLOSE and opened:
                spans.append((opened.pop(), place))
            elif piece != _CLOSE:
                place += len(piece)
        return "".join(pieces[::2]), spans


def find_template(tokenizer: Tokenizer, *, today: datetime | None = None) -> ChatTemplate | None:
    """Returns the tokenizer's template, or ChatML; None if the tokenizer has neither.

    Args:
        tokenizer: its folder is searched.
        today: the date that the template may write. None gives no date, so that training data
            does not change from one day to the next.

    Raises:
        ConfigError: the template is malformed, or Jinja is not installed.
    """
    templates, names = _in_folder(tokenizer)
    if "default" not in templates:
        if any(len(tokenizer.encode(token)) != 1 for token in ("<|im_start|>", "<|im_end|>")):
            return None
        templates = {"default": CHATML}
    where = tokenizer.path or f"{TYPE_FLAG} {tokenizer.kind}"
    with_tools = None
    if "tool_use" in templates:
        with_tools = _compiled(templates["tool_use"], names, where, today)
    return _compiled(templates["default"], names, where, today, with_tools)


def _in_folder(tokenizer: Tokenizer) -> tuple[dict[str, str], dict[str, str]]:
    """The named templates in the tokenizer's folder, and the special tokens they may name."""
    if tokenizer.path is None or tokenizer.kind != "huggingface":
        return {}, {}
    folder = Path(tokenizer.path).parent
    config: dict[str, Any] = {}
    try:
        if (folder / "tokenizer_config.json").is_file():
            config = json.loads((folder / "tokenizer_config.json").read_text(encoding="utf-8"))
        found = config.get("chat_template")
        if isinstance(found, list):
            found = {entry.get("name"): entry.get("template") for entry in found}
        elif not isinstance(found, dict):
            found = {"default": found}
        own = [folder / "chat_template.jinja", *folder.glob("additional_chat_templates/*.jinja")]
        for path in filter(Path.is_file, own):
            name = "default" if path == own[0] else path.stem
            found[name] = path.read_text(encoding="utf-8")
    except (OSError, ValueError, AttributeError) as error:
        rule = f"its chat template cannot be read: {error}"
        raise ConfigError(MODEL_FLAG, str(folder), rule, "a valid tokenizer_config.json") from None
    tokens = {name: config.get(name) for name in _SPECIAL}
    texts = {n: t.get("content") if isinstance(t, dict) else t for n, t in tokens.items()}
    names = {name: text for name, text in texts.items() if isinstance(text, str)}
    return {name: text for name, text in found.items() if isinstance(text, str)}, names


def _compiled(
    template: str,
    names: Mapping[str, str],
    where: str,
    today: datetime | None,
    with_tools: ChatTemplate | None = None,
) -> ChatTemplate:
    try:
        import jinja2
        from jinja2 import meta
    except ImportError:
        rule = "its chat template needs the package jinja2, which is not installed"
        raise ConfigError(MODEL_FLAG, where, rule, "pip install 'cp_megatron[data]'") from None
    environment = _environment()
    if today is not None:
        environment.globals["strftime_now"] = today.strftime
    try:
        compiled = environment.from_string(template)
        variables = frozenset(meta.find_undeclared_variables(environment.parse(template)))
    except jinja2.TemplateError as error:
        rule = f"its chat template is malformed: {error}"
        raise ConfigError(MODEL_FLAG, where, rule, "a template that Jinja reads") from None

    def run(values: Mapping[str, Any]) -> str:
        try:
            return compiled.render({**names, **values})
        except Exception as error:  # a template is a program and may fail in any way
            if today is None and "strftime_now" in str(error):
                rule = "its chat template writes the date, so the data would change daily"
                works = f"the date that it is to write: {DATE_FLAG} {datetime.now():%Y-%m-%d}"
                raise ConfigError(MODEL_FLAG, where, rule, works) from None
            raise TemplateRefusalError(" ".join(str(error).split())) from None

    marked = _MARKS.search(template) is not None
    return ChatTemplate(run=run, marked=marked, variables=variables, with_tools=with_tools)


def _environment() -> Any:
    """Jinja's sandbox as transformers sets it up."""
    from jinja2 import nodes
    from jinja2.ext import Extension, loopcontrols
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    class Generation(Extension):
        """Writes ``_OPEN`` and ``_CLOSE`` where ``{% generation %}`` begins and ends."""

        tags = {"generation"}  # noqa: RUF012 - Jinja's own interface

        def parse(self, parser: Any) -> nodes.Node:
            line = next(parser.stream).lineno
            body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
            first, last = (nodes.Output([nodes.TemplateData(mark)]) for mark in (_OPEN, _CLOSE))
            return nodes.Scope([first, *body, last]).set_lineno(line)

    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[Generation, loopcontrols]
    )
    environment.filters["tojson"] = _to_json
    environment.globals["raise_exception"] = _raise
    return environment


def _to_json(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    """Jinja's own filter escapes characters of HTML; this one is that of transformers."""
    return json.dumps(
        value,
        ensure_ascii=ensure_ascii,
        indent=indent,
        separators=separators,
        sort_keys=sort_keys,
    )


class TemplateRefusalError(ValueError):
    """The template refuses a conversation."""


def _raise(message: str) -> NoReturn:
    raise TemplateRefusalError(message)
