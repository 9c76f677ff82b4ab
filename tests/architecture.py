"""The rules of the package's shape. Each is a function from source files to complaints.

The sources are parsed, never imported, so that a file which does not run is judged too.
"""

from __future__ import annotations

import ast
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass

PACKAGE = "cp_megatron"

# An import may point to a smaller number or stay inside its own layer. Layers of one number are
# siblings and never import each other.
LAYERS = {
    "errors": 0,
    "config": 1,
    "plan": 2,
    "spec": 3,
    "kernels": 3,
    "families": 4,
    "comm": 4,
    "cli": 5,
    "data": 6,
    "context_parallel": 7,
    "tensor_parallel": 7,
    "model": 8,
    "checkpoint": 9,
    "faults": 10,
    "metrics": 10,
    "preflight": 11,
    "memory": 12,
    "evaluate": 13,
    "generate": 13,
    "train": 14,
    "launch": 15,
    "tests": 16,
    "benchmarks": 17,
}

# What a wrong flag needs, and no more: importing torch would cost seconds before the answer. So do
# the modules in launch/, outside their functions.
TORCH_FREE_PACKAGES = ("config", "errors", "plan", "spec", "families", "cli")
# Modules, or packages with all that is in them.
TORCH_FREE_MODULES = (
    PACKAGE,
    f"{PACKAGE}.kernels",
    f"{PACKAGE}.kernels.select",
    f"{PACKAGE}.comm",
    f"{PACKAGE}.comm.runtime",
    f"{PACKAGE}.data",
    f"{PACKAGE}.data.prepare",
    f"{PACKAGE}.data.read",
    f"{PACKAGE}.data.rows",
    f"{PACKAGE}.data.tokenize",
    f"{PACKAGE}.checkpoint",
    f"{PACKAGE}.checkpoint.convert",
    f"{PACKAGE}.checkpoint.gguf",
    f"{PACKAGE}.checkpoint.gguf_convert",
    f"{PACKAGE}.checkpoint.hf_export",
    f"{PACKAGE}.checkpoint.hf_files",
    f"{PACKAGE}.checkpoint.hf_tokenizer",
    f"{PACKAGE}.checkpoint.manifest",
    f"{PACKAGE}.evaluate",
    f"{PACKAGE}.evaluate.check_evaluation",
    f"{PACKAGE}.evaluate.needle",
    f"{PACKAGE}.evaluate.results",
    f"{PACKAGE}.faults",
    f"{PACKAGE}.faults.guard",
    f"{PACKAGE}.faults.inject",
    f"{PACKAGE}.generate",
    f"{PACKAGE}.generate.check_generation",
    f"{PACKAGE}.generate.dialogue",
    f"{PACKAGE}.memory",
    f"{PACKAGE}.memory.exchange_buffers",
    f"{PACKAGE}.memory.memory_report",
    f"{PACKAGE}.memory.predict",
    f"{PACKAGE}.metrics",
    f"{PACKAGE}.metrics.plots",
    f"{PACKAGE}.preflight",
    f"{PACKAGE}.preflight.check",
    f"{PACKAGE}.preflight.log_rules",
    f"{PACKAGE}.preflight.pretrained",
    f"{PACKAGE}.preflight.rope_rules",
    f"{PACKAGE}.preflight.run_plan",
    f"{PACKAGE}.preflight.start_table",
    f"{PACKAGE}.train",
)

OPTIONAL_PACKAGES = frozenset(
    {
        "apex",
        "datasets",
        "deepspeed",
        "flash_attn",
        "flash_attn_interface",
        "gguf",
        "jinja2",
        "matplotlib",
        "pyarrow",
        "sentencepiece",
        "tiktoken",
        "tokenizers",
        "transformer_engine",
        "transformers",
        "triton",
        "wandb",
        "xformers",
    }
)
ENVIRONMENT_READERS = (f"{PACKAGE}.comm.runtime",)
MAX_LINES = 450
MAX_LAUNCH_LINES = 60
DRAWERS = ("utils.py", "util.py", "helpers.py", "misc.py")
MUTABLE_CALLS = frozenset(
    {
        "list",
        "dict",
        "set",
        "bytearray",
        "defaultdict",
        "deque",
        "OrderedDict",
        "Counter",
        "WeakKeyDictionary",
        "WeakValueDictionary",
        "SimpleNamespace",
    }
)
READ_ONLY_TYPES = frozenset(
    {
        "Mapping",
        "Sequence",
        "Set",
        "AbstractSet",
        "Collection",
        "Iterable",
    }
)
GROUP_NAMES = frozenset(
    {
        "ProcessGroup",
        "DeviceMesh",
        "ParallelGroups",
    }
)
GROUP_MAKERS = frozenset(
    {
        "new_group",
        "init_process_group",
        "init_device_mesh",
        "_flatten",
        "split_group",
        "new_subgroups",
    }
)


@dataclass(frozen=True)
class File:
    """One source file: its path from the root, e.g. ``cp_megatron/plan/grid.py``, and its text."""

    path: str
    source: str

    @property
    def module(self) -> str:
        return self.path.removesuffix(".py").replace("/", ".").removesuffix(".__init__")

    @property
    def tree(self) -> ast.Module:
        return ast.parse(self.source, self.path)


@dataclass(frozen=True)
class Import:
    """An import of a module, or of a name that may be a module (``from a import b`` is a.b)."""

    name: str
    line: int
    at_import_time: bool


Rule = Callable[[list[File]], Iterator[str]]


def layer_of(module: str) -> str | None:
    parts = module.split(".")
    if parts[0] != PACKAGE:
        return parts[0] if parts[0] in LAYERS else None
    return parts[1] if len(parts) > 1 and parts[1] in LAYERS else None


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


def imports(file: File) -> Iterator[Import]:
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

    yield from visit(file.tree, True)


def called(node: ast.Call) -> str:
    return ast.unparse(node.func).rsplit(".", 1)[-1]


# ---- the rules -----------------------------------------------------------------------------------


def imports_point_down(files: list[File]) -> Iterator[str]:
    for file in files:
        here = layer_of(file.module)
        if here is None:
            continue
        for found in imports(file):
            there = layer_of(found.name)
            if there is None or there == here or LAYERS[there] < LAYERS[here]:
                continue
            yield f"{file.path}:{found.line}: {here} imports {there}, which is not below it"


def in_torch_free_package(module: str) -> bool:
    return any(f"{module}.".startswith(f"{PACKAGE}.{part}.") for part in TORCH_FREE_PACKAGES)


def in_torch_free_module(file: File) -> bool:
    module = file.module
    whole = ("prepare", "read", "rows", "tokenize")
    inside = any(module.startswith(f"{PACKAGE}.data.{name}.") for name in whole)
    return inside or module in TORCH_FREE_MODULES


def torch_free(files: list[File]) -> Iterator[str]:
    """No torch in the ground packages; none loaded by importing a torch-free module."""
    known = {file.module: file for file in files}
    for file in files:
        if in_torch_free_package(file.module):
            for found in imports(file):
                if found.name.split(".")[0] == "torch":
                    yield f"{file.path}:{found.line}: imports torch"
        elif in_torch_free_module(file) or file.path.startswith("launch/"):
            chain = way_to_torch(file.module, known)
            if chain:
                yield f"{file.path}: loads torch: {' > '.join(chain)}"


def way_to_torch(module: str, known: Mapping[str, File]) -> list[str]:
    """The chain of imports that runs torch when ``module`` is imported; empty if there is none."""
    ways = {module: [module]}
    queue = [module]
    while queue:
        here = queue.pop(0)
        for name in loaded_by(known[here]):
            if name.split(".")[0] == "torch":
                return [*ways[here], "torch"]
            if name in known and name not in ways:
                ways[name] = [*ways[here], name]
                queue.append(name)
    return []


def loaded_by(file: File) -> Iterator[str]:
    """The modules that run when ``file`` is imported; packages run before what is in them."""
    for found in imports(file):
        if found.at_import_time:
            parts = found.name.split(".")
            yield from (".".join(parts[: end + 1]) for end in range(len(parts)))


def optional_packages_have_one_importer(files: list[File]) -> Iterator[str]:
    importers: dict[str, set[str]] = defaultdict(set)
    for file in files:
        # Benchmarks may: other projects are what they compare with.
        if file.path.startswith(("tests/", "benchmarks/")):
            continue
        for found in imports(file):
            package = found.name.split(".")[0]
            if package in OPTIONAL_PACKAGES:
                importers[package].add(file.path)
    for package, paths in importers.items():
        if len(paths) > 1:
            yield f"{package} is imported by {', '.join(sorted(paths))}: one file may"


def is_mutable(value: ast.expr) -> bool:
    if isinstance(value, ast.Call):
        return called(value) in MUTABLE_CALLS
    displays = (ast.List, ast.Dict, ast.Set, ast.ListComp, ast.DictComp, ast.SetComp)
    return isinstance(value, displays)


def is_empty(value: ast.expr) -> bool:
    if isinstance(value, ast.Call):
        return not value.args and not value.keywords
    return not getattr(value, "elts", None) and not getattr(value, "keys", [])


def names_in(node: ast.AST | None) -> set[str]:
    if node is None:
        return set()
    walked = list(ast.walk(node))
    names = {part.id for part in walked if isinstance(part, ast.Name)}
    return names | {part.attr for part in walked if isinstance(part, ast.Attribute)}


def module_statements(body: list[ast.stmt]) -> Iterator[ast.stmt]:
    """The statements that run on import, those inside if, try and with included."""
    for node in body:
        yield node
        for field in ("body", "orelse", "finalbody", "handlers"):
            if isinstance(node, ast.If | ast.Try | ast.With | ast.For | ast.While):
                for child in getattr(node, field, []):
                    inner = child.body if isinstance(child, ast.ExceptHandler) else [child]
                    yield from module_statements(inner)


def no_module_state(files: list[File]) -> Iterator[str]:
    """No container that a function could fill, no process group, no ``global``.

    A constant table is fine when its annotation is read-only (``Mapping``, ``Sequence``), because
    the type checker then refuses to write to it.
    """
    for file in files:
        if not file.path.startswith(PACKAGE):
            continue
        for node in ast.walk(file.tree):
            if isinstance(node, ast.Global):
                yield f"{file.path}:{node.lineno}: global {', '.join(node.names)}"
            if isinstance(node, ast.FunctionDef):
                cached = any("cache" in ast.unparse(item) for item in node.decorator_list)
                groups = (names_in(node.args) | names_in(node.returns)) & GROUP_NAMES
                if cached and groups:
                    yield f"{file.path}:{node.lineno}: caches {', '.join(sorted(groups))}"
        for node in module_statements(file.tree.body):
            yield from state_in(node, file)


def state_in(node: ast.stmt, file: File) -> Iterator[str]:
    if not isinstance(node, ast.Assign | ast.AnnAssign) or node.value is None:
        return
    targets = node.targets if isinstance(node, ast.Assign) else [node.target]
    name = ast.unparse(targets[0])
    annotation = names_in(node.annotation) if isinstance(node, ast.AnnAssign) else set()
    read_only = bool(annotation & READ_ONLY_TYPES)
    at = f"{file.path}:{node.lineno}: {name}"
    if annotation & GROUP_NAMES or names_in(node.value) & GROUP_MAKERS:
        yield f"{at} holds a process group"
    elif is_mutable(node.value) and name != "__all__" and (is_empty(node.value) or not read_only):
        yield f"{at} is mutable module state"


def environment_read_in_one_place(files: list[File]) -> Iterator[str]:
    for file in files:
        if not file.path.startswith(PACKAGE) or file.module in ENVIRONMENT_READERS:
            continue
        for node in ast.walk(file.tree):
            names: set[str] = set()
            if isinstance(node, ast.ImportFrom) and node.module == "os":
                names = {alias.name for alias in node.names}
            elif isinstance(node, ast.Attribute) and ast.unparse(node.value) == "os":
                names = {node.attr}
            if names & {"environ", "getenv", "putenv", "environb"}:
                yield f"{file.path}:{getattr(node, 'lineno', 0)}: reads the environment"


def files_are_short(files: list[File]) -> Iterator[str]:
    for file in files:
        limit = MAX_LAUNCH_LINES if file.path.startswith("launch/") else MAX_LINES
        lines = len(file.source.splitlines())
        if lines > limit:
            yield f"{file.path}: {lines} lines, at most {limit}"


def no_drawer(files: list[File]) -> Iterator[str]:
    for file in files:
        if file.path.rsplit("/", 1)[-1] in DRAWERS:
            yield f"{file.path}: say what is in it"


RULES: tuple[Rule, ...] = (
    imports_point_down,
    torch_free,
    optional_packages_have_one_importer,
    no_module_state,
    environment_read_in_one_place,
    files_are_short,
    no_drawer,
)
