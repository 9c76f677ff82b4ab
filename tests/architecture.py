"""The rules of the package's shape. Each is a function from source files to complaints."""

from __future__ import annotations

import ast
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping
from fnmatch import fnmatch

from tests.sources import File, called, imports

Rule = Callable[[list[File]], Iterator[str]]

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
    "expert_parallel": 7,
    "tensor_parallel": 7,
    "pipeline": 7,
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

# Packages in which no file imports torch, not even inside a function: what they do has to be done
# before torch is loaded, which takes seconds, or on a machine without it.
TORCH_FREE_PACKAGES = (
    *("config", "errors", "plan", "spec", "families", "cli", "preflight"),
    *("data.read", "data.tokenize", "data.rows", "data.prepare"),
)
NEEDS_TORCH = (f"{PACKAGE}.preflight.start",)
# Other modules that do not load torch when they are imported. So do all files in launch/, and
# therefore what they import outside their functions.
TORCH_FREE_MODULES = (
    PACKAGE,
    f"{PACKAGE}.evaluate.results",
    f"{PACKAGE}.faults.guard",
    f"{PACKAGE}.generate.dialogue",
    f"{PACKAGE}.metrics.plots",
)

OPTIONAL_PACKAGES = frozenset(
    {
        *("accelerate", "apex", "datasets", "deepspeed", "fla", "flash_attn"),
        "flash_attn_interface",
        *("gguf", "jinja2", "matplotlib", "pyarrow", "sentencepiece", "tiktoken", "tokenizers"),
        *("transformer_engine", "transformers", "triton", "trl", "wandb", "xformers"),
        "zstandard",
    }
)
TRITON_FILES = f"{PACKAGE}/kernels/*_triton.py"
"""The files of Triton kernels, which count as one importer of the package."""
ENVIRONMENT_READERS = (f"{PACKAGE}.comm.runtime",)
# The first prefix that a path begins with counts.
MAX_LINES: Mapping[str, int] = {"launch/": 60, f"{PACKAGE}/": 400, "": 450}
MAX_FUNCTION_LINES = 40
DRAWERS = ("utils.py", "util.py", "helpers.py", "misc.py")
MUTABLE_CALLS = frozenset(
    {
        *("list", "dict", "set", "bytearray", "defaultdict", "deque", "OrderedDict", "Counter"),
        *("WeakKeyDictionary", "WeakValueDictionary", "SimpleNamespace"),
    }
)
READ_ONLY_TYPES = frozenset({"Mapping", "Sequence", "Set", "AbstractSet", "Collection", "Iterable"})
GROUP_NAMES = frozenset({"ProcessGroup", "DeviceMesh", "ParallelGroups"})
GROUP_MAKERS = frozenset(
    {
        *("new_group", "init_process_group", "init_device_mesh", "_flatten", "split_group"),
        "new_subgroups",
    }
)


def layer_of(module: str) -> str | None:
    parts = module.split(".")
    if parts[0] != PACKAGE:
        return parts[0] if parts[0] in LAYERS else None
    return parts[1] if len(parts) > 1 and parts[1] in LAYERS else None


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


def torch_free(files: list[File]) -> Iterator[str]:
    """No import of torch in a torch-free package; none by importing another torch-free module."""
    known = {file.module: file for file in files}
    for file in files:
        whole = in_torch_free_package(file.module)
        direct = [found for found in imports(file) if found.name.split(".")[0] == "torch"]
        if whole and direct:
            yield f"{file.path}:{direct[0].line}: imports torch"
        elif whole or file.module in TORCH_FREE_MODULES or file.path.startswith("launch/"):
            chain = way_to_torch(file.module, known)
            if chain:
                yield f"{file.path}: loads torch: {' > '.join(chain)}"


def in_torch_free_package(module: str) -> bool:
    inside = (f"{module}.".startswith(f"{PACKAGE}.{part}.") for part in TORCH_FREE_PACKAGES)
    return module not in NEEDS_TORCH and any(inside)


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


def no_import_circle(files: list[File]) -> Iterator[str]:
    """No file imports itself by way of others, counting imports inside functions and for types."""
    known = {file.module: file for file in files if file.path.startswith(f"{PACKAGE}/")}
    ways = {module: set(imported_files(file, known)) for module, file in known.items()}
    seen: set[str] = set()
    for module in sorted(known):
        circle = {other for other in reached(module, ways) if module in reached(other, ways)}
        if circle and module not in seen:
            seen |= circle
            paths = (known[other].path for other in sorted(circle))
            yield f"{' and '.join(paths)} import each other"


def imported_files(file: File, known: Mapping[str, File]) -> Iterator[str]:
    """The modules that a file names: the package's own file only where a name is taken from it."""
    for found in imports(file):
        parent = found.name.rpartition(".")[0]
        if found.name in known or parent in known:
            yield found.name if found.name in known else parent


def reached(module: str, ways: Mapping[str, set[str]]) -> set[str]:
    """Every module that ``module`` imports, directly or through others."""
    found: set[str] = set()
    queue = [module]
    while queue:
        new = ways[queue.pop()] - found
        found |= new
        queue += new
    return found


def optional_packages_have_one_importer(files: list[File]) -> Iterator[str]:
    importers: dict[str, set[str]] = defaultdict(set)
    for file in files:
        # Benchmarks may: other projects are what they compare with.
        if file.path.startswith(("tests/", "benchmarks/")):
            continue
        for found in imports(file):
            package = found.name.split(".")[0]
            if package in OPTIONAL_PACKAGES:
                is_kernel = package == "triton" and fnmatch(file.path, TRITON_FILES)
                importers[package].add(TRITON_FILES if is_kernel else file.path)
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
    if isinstance(value, ast.ListComp | ast.DictComp | ast.SetComp):
        return False
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
        limit = next(most for prefix, most in MAX_LINES.items() if file.path.startswith(prefix))
        lines = len(file.source.splitlines())
        if lines > limit:
            yield f"{file.path}: {lines} lines, at most {limit}"


def functions_are_short(files: list[File]) -> Iterator[str]:
    """At most 40 lines of code: the signature counts; docstrings, comments and blanks do not."""
    for file in files:
        if not file.path.startswith(f"{PACKAGE}/"):
            continue
        for node in ast.walk(file.tree):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                lines = code_lines(node, file)
                if lines > MAX_FUNCTION_LINES:
                    yield f"{file.path}: {node.name}: {lines} lines, at most {MAX_FUNCTION_LINES}"


def code_lines(function: ast.FunctionDef | ast.AsyncFunctionDef, file: File) -> int:
    """Lines of code from ``def`` on, so without decorators."""
    source = file.source.splitlines()
    assert function.end_lineno is not None
    numbers = set(range(function.lineno, function.end_lineno + 1))
    for node in ast.walk(function):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            first = node.body[0]
            if ast.get_docstring(node) is not None and first.end_lineno is not None:
                numbers -= set(range(first.lineno, first.end_lineno + 1))
    texts = (source[number - 1].strip() for number in numbers)
    return sum(1 for text in texts if text and not text.startswith("#"))


def file_names_differ(files: list[File]) -> Iterator[str]:
    places: dict[str, list[str]] = defaultdict(list)
    for file in files:
        if file.path.startswith(f"{PACKAGE}/") and file.name != "__init__.py":
            places[file.name].append(file.path)
    yield from said_twice(places)


def public_class_names_differ(files: list[File]) -> Iterator[str]:
    places: dict[str, list[str]] = defaultdict(list)
    for file in files:
        for node in file.tree.body if file.path.startswith(f"{PACKAGE}/") else ():
            if isinstance(node, ast.ClassDef) and not node.name.startswith("_"):
                places[node.name].append(file.path)
    yield from said_twice(places)


def said_twice(places: Mapping[str, list[str]]) -> Iterator[str]:
    for name, paths in sorted(places.items()):
        if len(paths) > 1:
            yield f"{name} names different things: {', '.join(sorted(paths))}"


def no_drawer(files: list[File]) -> Iterator[str]:
    for file in files:
        if file.name in DRAWERS:
            yield f"{file.path}: the name does not say what is in the file"


RULES: tuple[Rule, ...] = (
    imports_point_down,
    torch_free,
    no_import_circle,
    optional_packages_have_one_importer,
    no_module_state,
    environment_read_in_one_place,
    files_are_short,
    functions_are_short,
    file_names_differ,
    public_class_names_differ,
    no_drawer,
)
