"""Source files as data. They are parsed, never imported, so that a file that fails counts too."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache, cached_property


@dataclass(frozen=True)
class File:
    """One source file: its path from the root, e.g. ``cp_megatron/plan/grid.py``, and its text."""

    path: str
    source: str

    @property
    def module(self) -> str:
        return self.path.removesuffix(".py").replace("/", ".").removesuffix(".__init__")

    @property
    def name(self) -> str:
        return self.path.rsplit("/", 1)[-1]

    @cached_property
    def tree(self) -> ast.Module:
        return ast.parse(self.source, self.path)


@dataclass(frozen=True)
class Import:
    """An import of a module, or of a name that may be a module (``from a import b`` is a.b).

    Attributes:
        name: the absolute dotted name.
        line: the line of the statement.
        at_import_time: whether importing the file runs it: not inside a function, and not under
            ``TYPE_CHECKING``.
    """

    name: str
    line: int
    at_import_time: bool


def absolute(node: ast.ImportFrom, file: File) -> str:
    if not node.level:
        return node.module or ""
    package = file.module.split(".")
    if not file.path.endswith("__init__.py"):
        package = package[:-1]
    base = package[: len(package) - node.level + 1]
    return ".".join([*base, node.module] if node.module else base)


def type_checking_only(node: ast.AST) -> bool:
    return isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test)


@cache
def imports(file: File) -> tuple[Import, ...]:
    """Every import, wherever it stands, ``importlib.import_module("literal")`` included."""

    def visit(node: ast.AST, at_import_time: bool) -> Iterator[Import]:
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield Import(alias.name, node.lineno, at_import_time)
        elif isinstance(node, ast.ImportFrom):
            for alias in node.names:
                name = f"{absolute(node, file)}.{alias.name}"
                yield Import(name, node.lineno, at_import_time)
        elif isinstance(node, ast.Call) and called(node) in ("import_module", "__import__"):
            literals = [argument for argument in node.args if isinstance(argument, ast.Constant)]
            for literal in literals[:1]:
                yield Import(str(literal.value), node.lineno, at_import_time)
        inside = isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda)
        for child in ast.iter_child_nodes(node):
            yield from visit(child, at_import_time and not inside and not type_checking_only(node))

    return tuple(visit(file.tree, True))


def called(node: ast.Call) -> str:
    return ast.unparse(node.func).rsplit(".", 1)[-1]
