"""Errors that are reported to the user in one line."""

from __future__ import annotations


class ConfigError(ValueError):
    """A user's mistake: which flag, its value, the rule it breaks and what works instead.

    ``str(error)`` is one line. The command line prints it and ends with exit code 2; a library
    caller catches it as a ``ValueError``.

    Args:
        flag: the flag or argument as the user spells it, e.g. ``--seq-length``.
        value: the value given.
        rule: what must hold, as a full clause, e.g. ``must be divisible by 2 x cp = 4``.
        works: the nearest values that work, or what to do instead; empty if there are none.
    """

    def __init__(self, flag: str, value: object, rule: str, works: str = "") -> None:
        self.flag = flag
        self.value = value
        self.rule = rule
        self.works = works
        hint = f" (works: {works})" if works else ""
        super().__init__(f"{f'{flag} {value}'.rstrip()}: {rule}{hint}")

    def __reduce__(self) -> tuple[type[ConfigError], tuple[str, object, str, str]]:
        """Pickles the four parts, so that the error can cross a process boundary."""
        return type(self), (self.flag, self.value, self.rule, self.works)


class FinishedError(ConfigError):
    """The run that the same command line began has no steps left to train."""
