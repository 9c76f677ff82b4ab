"""Settings: the fields of the configuration's dataclasses, with their flags and valid values.

The command line and the YAML files read values by the same ``Setting``, so that each rule about a
value is stated once: on the field, as its type.
"""

from __future__ import annotations

import dataclasses
import math
import types
from collections.abc import Mapping, Sequence
from functools import cache
from typing import Annotated, Any, Literal, Union, get_args, get_origin, get_type_hints

from cp_megatron.config.schema import Config
from cp_megatron.config.schema.ranges import EVERY_NUMBER, Range
from cp_megatron.errors import ConfigError

Kind = Literal["bool", "int", "float", "str"]

# The Python type, the rule in a message, and the name in --help.
_KINDS: Mapping[Kind, tuple[type, str, str]] = {
    "bool": (bool, "must be true or false", ""),
    "int": (int, "must be a whole number", "INT"),
    "float": (float, "must be a number", "FLOAT"),
    "str": (str, "must be text", "TEXT"),
}
# Megatron's names of choices, for --cp-comm-type, --rope-type, --tokenizer-type and --optimizer.
# AdamW is torchtitan's.
_SPELLINGS: Mapping[str, str] = {
    "allgather": "all_gather",
    "rope": "default",
    **dict.fromkeys(("adamw", "AdamW"), "adam"),
    "dist_muon": "muon",
    "HuggingFaceTokenizer": "huggingface",
    "SentencePieceTokenizer": "sentencepiece",
    "GPTSentencePieceTokenizer": "sentencepiece",
    "Llama2Tokenizer": "sentencepiece",
    "TikTokenizer": "tiktoken",
    "GPT2BPETokenizer": "gpt2",
    "HFTokenizer": "huggingface",
    "PretrainedFromHF": "huggingface",
}
# Megatron's choices that have no counterpart: why, and what to use instead.
_ABSENT: Mapping[str, tuple[str, str]] = {
    "NullTokenizer": (
        "makes no ids of a text, and a run has the vocabulary of its tokenizer",
        "the tokenizer that the data was made with, or byte; --vocab-size N gives the model N rows",
    ),
    **dict.fromkeys(
        ("BertWordPieceLowerCase", "BertWordPieceCase"),
        ("is of BERT, which reads a text from both sides", "huggingface with its tokenizer.json"),
    ),
    **dict.fromkeys(
        ("MultimodalTokenizer", "NullMultimodalTokenizer"),
        ("is for images, and only text is trained", "huggingface with the model's folder"),
    ),
    "global_aux_loss": (
        "depends on how many micro batches a step is divided into",
        "seq_aux_loss, or aux_loss",
    ),
    **dict.fromkeys(
        ("sinkhorn", "quantile_balancing"),
        (
            "makes the choice of one token depend on all others of a micro batch",
            "seq_aux_loss, or none with --moe-router-enable-expert-bias",
        ),
    ),
    "SFTTokenizer": ("is not needed to train on conversations", "huggingface, with --sft"),
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Setting:
    """One field of the configuration, or of a program's options.

    Attributes:
        section: the field of ``Config`` that holds it; empty if the field is not in a section.
        optional: whether ``None`` is a value.
        words: texts that are values beside those of its kind, such as ``auto`` beside numbers.
        choices: the only texts that it accepts; empty if it accepts any.
        count: the number of values; 0 means one or more.
    """

    section: str
    name: str
    kind: Kind
    optional: bool = False
    words: tuple[str, ...] = ()
    default: Any = None
    choices: tuple[str, ...] = ()
    range: Range = EVERY_NUMBER
    count: int = 1

    @property
    def flag(self) -> str:
        """The flag, e.g. ``--num-layers``."""
        return "--" + self.name.replace("_", "-")

    @property
    def off_flag(self) -> str:
        """The flag that switches it off, e.g. ``--no-swiglu``."""
        return f"--no-{self.flag[2:]}"

    @property
    def key(self) -> str:
        """The key in a YAML file, e.g. ``model.num_layers``."""
        return f"{self.section}.{self.name}" if self.section else self.name

    @property
    def metavar(self) -> str:
        """The values that follow the flag, for ``--help``."""
        one = f"{{{','.join(self.choices)}}}" if self.choices else _KINDS[self.kind][2]
        one = "|".join((one, *self.words))
        return f"{one} [{one} ...]" if self.count == 0 else " ".join([one] * self.count)

    def from_words(self, words: Sequence[str]) -> Any:
        """The value that the words after the flag stand for.

        Raises:
            ConfigError: the field does not accept them.
        """
        if self.optional and list(words) == ["None"]:
            return None
        if len(words) == 1 and words[0] in self.words:
            return words[0]
        if self.count != 1 and (self.kind != "str" or self.choices):
            # Megatron writes --window-size 128,0.
            words = [part for word in words for part in word.strip("()").split(",")]
        if not words or (self.count and len(words) != self.count):
            some = {0: "one or more values", 1: "one value"}.get(self.count, f"{self.count} values")
            works = ", ".join(self.choices) or f"{self.flag} {self.metavar}"
            raise ConfigError(self.flag, " ".join(words), f"needs {some}", works)
        values = tuple(self._from_word(word) for word in words)
        return values[0] if self.count == 1 else values

    def from_yaml(self, entry: Any) -> Any:
        """The value that an entry of a YAML or JSON file stands for, in the field's own type.

        Raises:
            ConfigError: the field does not accept it.
        """
        if (entry is None and self.optional) or (entry in self.words):
            return entry
        if self.count == 1:
            return self._from_entry(entry)
        if not isinstance(entry, list | tuple) or self.count not in (0, len(entry)):
            number = f"{self.count} values" if self.count else "values"
            raise ConfigError(self.flag, shown(entry), f"must be a list of {number}")
        return tuple(self._from_entry(item) for item in entry)

    def _from_word(self, word: str) -> Any:
        name = _SPELLINGS.get(word, word)
        type_, rule, _ = _KINDS[self.kind]
        rule = " or ".join((rule, *self.words))
        try:
            value = type_(name if name in self.choices else word)
        except ValueError:
            works = _whole_number(word) if self.kind == "int" else ""
            raise ConfigError(self.flag, word, rule, works) from None
        return self.checked(value, word)

    def _from_entry(self, entry: Any) -> Any:
        if isinstance(entry, str) and self.kind in ("float", "str"):
            return self._from_word(entry)  # YAML 1.1 reads 3e-4 as text because it has no dot.
        if self.kind == "float" and type(entry) is int:
            entry = float(entry) if abs(entry) < 1e308 else math.inf
        type_, rule, _ = _KINDS[self.kind]
        if type(entry) is not type_:
            raise ConfigError(self.flag, shown(entry), rule, ", ".join(self.choices))
        return self.checked(entry, shown(entry))

    def checked(self, value: Any, text: str) -> Any:
        """A value of the field's type, or one of several, if the field accepts it.

        Raises:
            ConfigError: it does not; the message shows the value as ``text``.
        """
        rule = works = ""
        if value in self.words:
            return value
        if not isinstance(value, str):
            if isinstance(value, int) and not -(2**63) <= value < 2**63:
                rule = "must be a number of 64 bits"
            elif not math.isfinite(value):
                rule = "must be finite"
            elif value not in self.range:
                defaults = self.default if isinstance(self.default, tuple) else (self.default,)
                numbers = [x for x in (*defaults, 1, 0, 2) if x not in (None, *self.words)]
                valid = [x for x in numbers if x in self.range]
                rule, works = self.range.rule, self.range.nearest(value) or f"{valid[0]:g}"
        elif self.choices and value not in self.choices:
            several = ("must be one of its choices", ", ".join(self.choices))
            rule, works = _ABSENT.get(value, several)
        elif not value:
            rule = "must not be empty"
        # The bytes of a command line that are not UTF-8 arrive as lone surrogates.
        elif "\0" in value or any("\ud800" <= letter <= "\udfff" for letter in value):
            rule = "must be UTF-8 text without NUL"
        elif value.startswith("-"):
            rule, works = "must not begin with a dash", f"./{value}"
        if rule:
            raise ConfigError(self.flag, text, rule, works)
        return value


def shown(value: Any) -> str:
    """A value on one line of at most 80 letters."""
    try:
        text = " ".join(str(value).split())
    except ValueError:  # Python does not write numbers of thousands of digits.
        text = "a number of thousands of digits"
    return text if len(text) <= 80 else text[:77] + "..."


def _whole_number(text: str) -> str:
    """The whole number that ``1e3`` or ``4.0`` stands for; empty for any other text."""
    try:
        number = float(text)
    except ValueError:
        return ""
    return str(int(number)) if number.is_integer() else ""


@cache
def settings() -> Mapping[str, Setting]:
    """All settings of a run by name. A name is unique over the sections because flags are flat."""
    rows = settings_of(Config)
    for name, hint in get_type_hints(Config).items():
        if dataclasses.is_dataclass(hint):
            rows += settings_of(hint, name)
    by_name = {row.name: row for row in rows}
    assert len(by_name) == len(rows), "two settings have the same name"
    return by_name


def check_values(config: Config) -> None:
    """Checks the value of every setting, for configurations that were not read from text.

    Raises:
        ConfigError: a field does not accept its value.
    """
    for row in settings().values():
        value = getattr(getattr(config, row.section) if row.section else config, row.name)
        for item in () if value is None else (value,) if row.count == 1 else value:
            row.checked(item, shown(item))


def settings_of(options: Any, section: str = "") -> list[Setting]:
    """The settings of a dataclass; fields that are sections of settings are left out."""
    hints = get_type_hints(options, include_extras=True)
    return [
        _setting(hints[row.name], section=section, name=row.name, default=row.default)
        for row in dataclasses.fields(options)
        if not dataclasses.is_dataclass(hints[row.name])
    ]


def _setting(hint: Any, **row: Any) -> Setting:
    if get_origin(hint) in (Union, types.UnionType):
        parts = get_args(hint)
        row["optional"] = type(None) in parts
        literals = [part for part in parts if get_origin(part) is Literal]
        others = [part for part in parts if part is not type(None) and part not in literals]
        if others:
            row["words"] = tuple(word for part in literals for word in get_args(part))
        (hint,) = others or literals
    if get_origin(hint) is tuple:
        parts = get_args(hint)
        hint, row["count"] = parts[0], 0 if Ellipsis in parts else len(parts)
    if get_origin(hint) is Annotated:
        hint, row["range"] = get_args(hint)
    if get_origin(hint) is Literal:
        hint, row["choices"] = str, get_args(hint)
    return Setting(kind=hint.__name__, **row)
