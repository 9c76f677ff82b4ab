"""Every setting as one row: its name, its flag, and which values it takes.

The rows are read off the dataclasses, once. The command line and the YAML files both check values
here, so that a rule about a type is written in one place.
"""

from __future__ import annotations

import dataclasses
import math
import types
from collections.abc import Mapping, Sequence
from functools import cache
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

from cp_megatron.config.schema import Config

Kind = Literal["bool", "int", "float", "str", "strings", "ints", "floats"]

_RULES: Mapping[Kind, str] = {
    "bool": "must be true or false",
    "int": "must be a whole number",
    "float": "must be a number",
    "str": "must be a text",
    "strings": "must be a list of texts",
    "ints": "must be whole numbers",
    "floats": "must be numbers",
}

# Megatron's spellings of choices: in the help of --cp-comm-type, and of --tokenizer-type.
_SPELLINGS: Mapping[str, str] = types.MappingProxyType(
    {
        "allgather": "all_gather",
        "HuggingFaceTokenizer": "huggingface",
        "SentencePieceTokenizer": "sentencepiece",
        "GPTSentencePieceTokenizer": "sentencepiece",
        "Llama2Tokenizer": "sentencepiece",
        "TikTokenizer": "tiktoken",
    }
)


class BadValueError(ValueError):
    """A value that its setting does not take; the caller knows which flag or key it was.

    Attributes:
        rule: what must hold.
        works: values that work, or empty.
    """

    def __init__(self, rule: str, works: str = "") -> None:
        self.rule = rule
        self.works = works
        super().__init__(rule)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Setting:
    """One field of the configuration.

    Attributes:
        section: the field of ``Config`` it lies in, empty for one of ``Config`` itself.
        name: the field's name.
        kind: its type.
        optional: ``None`` is a value.
        choices: the only texts it takes; empty when any will do.
        count: how many values it takes; 0 is one or more.
    """

    section: str
    name: str
    kind: Kind
    optional: bool
    choices: tuple[str, ...] = ()
    count: int = 1

    @property
    def flag(self) -> str:
        """The flag, e.g. ``--num-layers``."""
        return "--" + self.name.replace("_", "-")

    @property
    def key(self) -> str:
        """The place in a YAML file, e.g. ``model.num_layers``."""
        return f"{self.section}.{self.name}" if self.section else self.name

    def words(self, texts: Sequence[str]) -> list[str]:
        """The words of the command line in the one spelling that the rest knows."""
        if self.kind in ("ints", "floats") and len(texts) == 1 and "," in texts[0]:
            texts = texts[0].strip("()").split(",")  # Megatron writes --window-size 128,0
        spelled = [(text, _SPELLINGS.get(text, text)) for text in texts]
        return [new if new in self.choices else text for text, new in spelled]

    def from_text(self, text: str) -> Any:
        """The value that a word of the command line stands for.

        Raises:
            BadValueError: the word is no such value.
        """
        if self.optional and text == "None":
            return None
        if self.kind in ("int", "float", "ints", "floats"):
            number: type = float if self.kind in ("float", "floats") else int
            try:
                return self._in_range(number(text))
            except ValueError as error:
                if isinstance(error, BadValueError):
                    raise
                raise BadValueError(_RULES[self.kind], self._number_hint(text)) from None
        return self._chosen(text)

    def from_yaml(self, value: Any) -> Any:
        """The value that an entry of a YAML file stands for, in the field's own type.

        Raises:
            BadValueError: the entry is no such value.
        """
        if value is None and self.optional:
            return None
        if self.kind == "bool" and isinstance(value, bool):
            return value
        if self.kind == "int" and isinstance(value, int) and not isinstance(value, bool):
            return self._in_range(value)
        if self.kind == "float" and not isinstance(value, bool):
            # YAML 1.1 reads 3e-4 as a text, for want of a dot.
            if isinstance(value, str):
                return self.from_text(value)
            if isinstance(value, (int, float)):
                return self._float(value)
        if self.kind == "str" and isinstance(value, str):
            return self._chosen(value)
        if self.kind == "strings" and isinstance(value, (list, tuple)):
            return tuple(self._chosen(item) for item in value)
        if self.kind == "ints" and isinstance(value, (list, tuple)):
            if len(value) == (self.count or len(value)) and all(type(x) is int for x in value):
                return tuple(self._in_range(x) for x in value)
            raise BadValueError(f"must be {self.count or 'a list of'} whole numbers")
        if self.kind == "floats" and isinstance(value, (list, tuple)):
            if any(isinstance(x, bool) or not isinstance(x, (int, float)) for x in value):
                raise BadValueError("must be a list of numbers")
            return tuple(self._float(x) for x in value)
        raise BadValueError(_RULES[self.kind], ", ".join(self.choices))

    def _chosen(self, text: Any) -> str:
        if not isinstance(text, str):
            raise BadValueError(_RULES[self.kind])
        (text,) = self.words([text])
        if self.choices and text not in self.choices:
            raise BadValueError("must be one of its choices", ", ".join(self.choices))
        if not text:
            raise BadValueError("must not be empty")
        if "\0" in text or not _is_utf8(text):
            raise BadValueError("must be UTF-8 text without NUL")
        if text.startswith("-"):
            raise BadValueError("must not begin with a dash", f"./{text}")
        return text

    def _float(self, number: float) -> float:
        try:
            return self._in_range(float(number))
        except OverflowError:
            raise BadValueError("must be finite") from None

    def _in_range(self, number: float) -> float:
        if isinstance(number, int) and not -(2**63) <= number < 2**63:
            raise BadValueError("must be a number of 64 bits")
        if isinstance(number, float) and not math.isfinite(number):
            raise BadValueError("must be finite")
        return number

    def _number_hint(self, text: str) -> str:
        """The whole number that somebody who wrote ``1e3`` or ``4.0`` meant."""
        try:
            number = float(text)
        except ValueError:
            return ""
        return str(int(number)) if math.isfinite(number) and number.is_integer() else ""


def _is_utf8(text: str) -> bool:
    """Bytes of the command line that are no UTF-8 arrive as lone surrogates."""
    return not any("\ud800" <= letter <= "\udfff" for letter in text)


@cache
def settings() -> Mapping[str, Setting]:
    """All settings by name. Names are unique over the sections, as flags are flat."""
    rows: dict[str, Setting] = {}
    for name, hint in get_type_hints(Config).items():
        if dataclasses.is_dataclass(hint):
            section = {
                inner: setting_of_type(name, inner, inner_hint)
                for inner, inner_hint in get_type_hints(hint).items()
            }
        else:
            section = {name: setting_of_type("", name, hint)}
        assert not rows.keys() & section.keys(), "two settings of one name"
        rows.update(section)
    return types.MappingProxyType(rows)


def setting_of_type(section: str, name: str, hint: Any) -> Setting:
    """The row of a field with the type ``hint``; the types a setting may have end here."""
    optional = False
    if get_origin(hint) in (Union, types.UnionType):
        (hint,) = [part for part in get_args(hint) if part is not type(None)]
        optional = True
    if get_origin(hint) is Literal:
        return Setting(
            section=section, name=name, kind="str", optional=optional, choices=get_args(hint)
        )
    kind: Kind
    if get_origin(hint) is tuple:
        parts = get_args(hint)
        lists: dict[Any, Kind] = {int: "ints", float: "floats", str: "strings"}
        kind = lists.get(parts[0], "strings")
        count = 0 if Ellipsis in parts else len(parts)
        return Setting(section=section, name=name, kind=kind, optional=optional, count=count)
    kinds: dict[Any, Kind] = {bool: "bool", int: "int", float: "float", str: "str"}
    return Setting(section=section, name=name, kind=kinds[hint], optional=optional)
