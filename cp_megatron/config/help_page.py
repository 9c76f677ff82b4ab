"""The page of ``--help``, made from dataclasses: a field's docstring is the help of its flag."""

from __future__ import annotations

import ast
import inspect
import itertools
import shutil
import textwrap
from collections.abc import Mapping
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
    """The docstrings of a dataclass's fields, which only its source has."""
    docs = {}
    for base in reversed(options.__mro__[:-1]):
        (tree,) = ast.parse(inspect.getsource(base)).body
        assert isinstance(tree, ast.ClassDef)
        for pair in itertools.pairwise(tree.body):
            match pair:
                case ast.AnnAssign(target=ast.Name(id=name)), ast.Expr(
                    value=ast.Constant(value=doc)
                ):
                    docs[name] = " ".join(str(doc).split())
    return docs
