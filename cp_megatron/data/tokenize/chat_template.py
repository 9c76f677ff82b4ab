"""The chat template of a tokenizer, which writes a conversation as text.

The template comes from the tokenizer's folder (chat_template.jinja, or ``chat_template`` in
tokenizer_config.json). Jinja runs it in a sandbox, with the names that transformers gives it. A
tokenizer without a template that has the two tokens of ChatML uses ChatML::

    <|im_start|>user
    Hello<|im_end|>
    <|im_start|>assistant
    Hi.<|im_end|>
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from datetime import datetime
from pathlib import Path
from typing import Any, NoReturn

from cp_megatron.data.tokenize.tokenizer import MODEL_FLAG, TYPE_FLAG, Tokenizer
from cp_megatron.errors import ConfigError

Message = Mapping[str, Any]
Render = Callable[[Sequence[Message], bool], str]
"""(messages, whether to add the beginning of an answer) -> text."""

CHATML = (
    "{% for message in messages %}"
    "{{ '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>' + '\\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)
_SPECIAL = ("bos_token", "eos_token", "unk_token", "pad_token", "sep_token", "cls_token")


def find_template(tokenizer: Tokenizer, *, today: datetime | None = None) -> Render | None:
    """Returns the tokenizer's template, or ChatML; None if the tokenizer has neither.

    Args:
        tokenizer: its folder is searched.
        today: the date that the template may write. None gives no date, so that training data
            does not change from one day to the next.

    Raises:
        ConfigError: the template is malformed, or Jinja is not installed.
    """
    template, names = _in_folder(tokenizer)
    if template is None:
        if any(len(tokenizer.encode(token)) != 1 for token in ("<|im_start|>", "<|im_end|>")):
            return None
        template = CHATML
    where = tokenizer.path or f"{TYPE_FLAG} {tokenizer.kind}"
    return _compiled(template, names, where, today)


def _in_folder(tokenizer: Tokenizer) -> tuple[str | None, dict[str, str]]:
    """The template in the tokenizer's folder, and the special tokens that it may name."""
    if tokenizer.path is None or tokenizer.kind != "huggingface":
        return None, {}
    folder = Path(tokenizer.path).parent
    config: dict[str, Any] = {}
    try:
        if (folder / "tokenizer_config.json").is_file():
            config = json.loads((folder / "tokenizer_config.json").read_text(encoding="utf-8"))
        own = folder / "chat_template.jinja"
        template = own.read_text(encoding="utf-8") if own.is_file() else config.get("chat_template")
    except (OSError, ValueError, AttributeError) as error:
        rule = f"its chat template cannot be read: {error}"
        raise ConfigError(MODEL_FLAG, str(folder), rule, "a valid tokenizer_config.json") from None
    if isinstance(template, list):  # several named templates
        template = {entry.get("name"): entry.get("template") for entry in template}.get("default")
    tokens = {name: config.get(name) for name in _SPECIAL}
    texts = {n: t.get("content") if isinstance(t, dict) else t for n, t in tokens.items()}
    names = {name: text for name, text in texts.items() if isinstance(text, str)}
    return template if isinstance(template, str) else None, names


def _compiled(template: str, names: dict[str, str], where: str, today: datetime | None) -> Render:
    try:
        import jinja2
        from jinja2 import nodes
        from jinja2.ext import Extension, loopcontrols
        from jinja2.sandbox import ImmutableSandboxedEnvironment
    except ImportError:
        rule = "its chat template needs the package jinja2, which is not installed"
        raise ConfigError(MODEL_FLAG, where, rule, "pip install 'cp_megatron[data]'") from None

    class Generation(Extension):
        """Accepts ``{% generation %}``, which marks answers and changes no text."""

        tags = {"generation"}  # noqa: RUF012 - Jinja's own interface

        def parse(self, parser: Any) -> list[nodes.Node]:
            next(parser.stream)
            return list(parser.parse_statements(("name:endgeneration",), True))

    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[Generation, loopcontrols]
    )
    environment.filters["tojson"] = lambda value, indent=None: json.dumps(
        value, ensure_ascii=False, indent=indent
    )
    environment.globals["raise_exception"] = _raise
    if today is not None:
        environment.globals["strftime_now"] = today.strftime
    try:
        compiled = environment.from_string(template)
    except jinja2.TemplateError as error:
        rule = f"its chat template is malformed: {error}"
        raise ConfigError(MODEL_FLAG, where, rule, "a template that Jinja reads") from None

    def render(messages: Sequence[Message], answer_follows: bool) -> str:
        values = {"messages": messages, "tools": None, "documents": None, **names}
        try:
            return compiled.render(**values, add_generation_prompt=answer_follows)
        except Exception as error:  # a template is a program and may fail in any way
            if today is None and "strftime_now" in str(error):
                rule = "its chat template writes today's date (strftime_now), so the data would "
                works = "a copy of the folder with a fixed date in its template"
                raise ConfigError(MODEL_FLAG, where, f"{rule}change daily", works) from None
            raise TemplateRefusalError(str(error)) from None

    return render


class TemplateRefusalError(ValueError):
    """The template refuses a conversation."""


def _raise(message: str) -> NoReturn:
    raise TemplateRefusalError(message)
