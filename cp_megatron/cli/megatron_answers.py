"""The answers to flags of Megatron-LM that are not flags here."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

LEAVE_OUT = "leave the flag out"


@dataclass(frozen=True)
class Noted:
    """The flag has no effect here, for this reason.

    Attributes:
        has_values: whether values follow the flag; None if it stands for several flags.
        unless: a flag beside which it would have an effect, so that it is refused.
        works: what to use instead then.
    """

    reason: str
    has_values: bool | None = False
    unless: str = ""
    works: str = LEAVE_OUT


@dataclass(frozen=True)
class Renamed:
    """The flag has another name here, and the same values; ``beside`` are words that go with it."""

    flag: str
    beside: str = ""


@dataclass(frozen=True)
class Translated:
    """The switch is read as these words, except for flags that the command line gives itself.

    Attributes:
        needs: a flag without which it means something that does not exist here, unless the
            command line also gives the flag that it is read as.
        unless: a flag beside which it has no effect.
        replaces: whether the words replace what the command line says itself.
    """

    words: str
    needs: str = ""
    unless: str = ""
    replaces: bool = False


@dataclass(frozen=True)
class OneOf:
    """The values that are honoured, each with the words that it is read as; any other is refused.

    Attributes:
        values: no words stand for what is so already.
        replaces: whether the words replace what the command line says itself.
    """

    values: Mapping[str, str]
    reason: str
    works: str = LEAVE_OUT
    replaces: bool = False


@dataclass(frozen=True)
class Refused:
    """The flag cannot be honoured, for this reason; ``works`` is what to use instead."""

    reason: str
    works: str = LEAVE_OUT


Answer = Noted | Renamed | Translated | OneOf | Refused
