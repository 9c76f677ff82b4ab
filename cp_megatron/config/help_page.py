"""The page of ``--help``, made from dataclasses: a field's docstring is the help of its flag."""

from __future__ import annotations

import ast
import inspect
import itertools
import shutil
import textwrap
from collections.abc import Mapping

from cp_megatron.config.fields import settings_of

HELP = frozenset({"-h", "--help", "-H", "--help-verbose"})
"""The flags that ask for this page."""


def help_page(program: str, description: str | None, sections: Mapping[str, object]) -> str:
    """Every flag with its help and its default, section by section.

    Args:
        description: what the program does, with examples of its use.
        sections: dataclass instances by title; a flag's default is the value of its field.
    """
    lines = [f"usage: {program} [-h] [flags]", "", description or ""]
    width, indent = min(100, shutil.get_terminal_size().columns), " " * 6
    for title, values in sections.items():
        helps = _field_docs(type(values))
        lines += ["", f"{title}: {' '.join((type(values).__doc__ or '').split())}"]
        own = inspect.get_annotations(type(values))
        # What a program adds comes before what it inherits.
        for row in sorted(settings_of(type(values)), key=lambda row: row.name not in own):
            words = f"{row.metavar}{'|None' if row.optional else ''}"
            usage = f"{row.flag}, {row.off_flag}" if row.kind == "bool" else f"{row.flag} {words}"
            value = getattr(values, row.name)
            default = " ".join(map(str, value)) if isinstance(value, tuple) else value
            lines.append(f"  {usage} (default: {default})")
            text = textwrap.fill(helps[row.name], width - len(indent), break_on_hyphens=False)
            lines.append(textwrap.indent(text, indent))
    return "\n".join(lines)


def _field_docs(options: type) -> dict[str, str]:
    """The docstrings of a dataclass's fields, which only its source has."""
    docs = {}
    for base in reversed(options.__mro__[:-1]):
        (tree,) = ast.parse(inspect.getsource(base)).body
        assert isinstance(tree, ast.ClassDef)
        for pair in itertools.pairwise(tree.body):
            match pair:
                case ast.AnnAssign(ast.Name(name)), ast.Expr(ast.Constant(doc)):
                    docs[name] = " ".join(str(doc).split())
    return docs
