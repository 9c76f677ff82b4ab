"""The page of ``--help``, made from dataclasses: a field's docstring is the help of its flag."""

from __future__ import annotations

import ast
import inspect
import itertools
import shutil
import textwrap
from collections.abc import Iterator, Mapping
from typing import Any

from cp_megatron.config.fields import Setting, settings_of

HELP = frozenset({"-h", "--help", "-H", "--help-verbose"})
"""The flags that ask for this page."""


def help_page(program: str, description: str | None, sections: Mapping[str, object]) -> str:
    """Every flag with its help and its default, section by section.

    Args:
        program: the program's name.
        description: what the program does, and examples of its use.
        sections: dataclass instances by title; a flag's default is the value of its field.
    """
    lines = [f"usage: {program} [-h] [flags]", "", description or ""]
    wrapper = textwrap.TextWrapper(
        width=min(100, shutil.get_terminal_size().columns),
        initial_indent=" " * 6,
        subsequent_indent=" " * 6,
        break_on_hyphens=False,
    )
    for title, values in sections.items():
        helps = _field_docs(type(values))
        lines += ["", f"{title}: {' '.join((type(values).__doc__ or '').split())}"]
        for row in settings_of(type(values)):
            lines.append(f"  {_usage(row)} (default: {_shown(getattr(values, row.name))})")
            lines += wrapper.wrap(helps[row.name])
    return "\n".join(lines)


def _usage(row: Setting) -> str:
    if row.kind == "bool":
        return f"{row.flag}, {row.off_flag}"
    return f"{row.flag} {row.metavar}{'|None' if row.optional else ''}"


def _shown(value: Any) -> str:
    return " ".join(map(str, value)) if isinstance(value, tuple) else str(value)


def _field_docs(options: type) -> dict[str, str]:
    """The docstrings of a dataclass's fields, which exist in the source only."""
    return dict(doc for base in reversed(options.__mro__[:-1]) for doc in _own_field_docs(base))


def _own_field_docs(options: type) -> Iterator[tuple[str, str]]:
    (tree,) = ast.parse(inspect.getsource(options)).body
    assert isinstance(tree, ast.ClassDef)
    for field, doc in itertools.pairwise(tree.body):
        if (
            isinstance(field, ast.AnnAssign)
            and isinstance(doc, ast.Expr)
            and isinstance(doc.value, ast.Constant)
        ):
            yield ast.unparse(field.target), " ".join(str(doc.value.value).split())
