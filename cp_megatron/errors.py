"""Errors that are reported to the user in one line each."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager


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


class CombinedError(ConfigError):
    """Several mistakes that are independent of each other.

    It has the flag, the value, the rule and the advice of the first; ``str(error)`` has a line for
    each.
    """

    def __init__(self, errors: Sequence[ConfigError]) -> None:
        first = errors[0]
        super().__init__(first.flag, first.value, first.rule, first.works)
        self.errors = tuple(errors)
        self.args = ("\n".join(map(str, errors)),)

    def __reduce__(self) -> tuple[type[ConfigError], tuple[tuple[ConfigError, ...]]]:  # type: ignore[override]
        """Pickles the errors."""
        return type(self), (self.errors,)


class Mistakes:
    """Collects errors, so that a user is told all of them at once."""

    def __init__(self, errors: Iterable[ConfigError] = ()) -> None:
        self.errors = list(errors)

    @contextmanager
    def collect(self) -> Iterator[None]:
        """Keeps a ``ConfigError`` that the block raises.

        An error that names a flag that was already refused is dropped: it may end with the first.
        """
        try:
            yield
        except FinishedError:
            raise
        except CombinedError as several:
            for error in several.errors:
                self._add(error)
        except ConfigError as error:
            self._add(error)

    def _add(self, error: ConfigError) -> None:
        flags = set(re.findall(r"--[\w-]+", f"{error.flag} {error.rule}"))
        if not flags & {flag for known in self.errors for flag in known.flag.split()}:
            self.errors.append(error)

    def raise_any(self) -> None:
        """Raises what was collected.

        Raises:
            ConfigError: there is an error; several are one ``CombinedError``.
        """
        if len(self.errors) > 1:
            raise CombinedError(self.errors)
        if self.errors:
            raise self.errors[0]
