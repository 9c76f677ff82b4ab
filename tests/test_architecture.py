"""The sources keep every rule of the package's shape, and every rule detects what breaks it."""

from __future__ import annotations

from functools import cache
from pathlib import Path

import pytest

from tests.architecture import (
    LAYERS,
    PACKAGE,
    RULES,
    Rule,
    environment_read_in_one_place,
    file_names_differ,
    files_are_short,
    functions_are_short,
    imports_point_down,
    no_drawer,
    no_import_circle,
    no_module_state,
    optional_packages_have_one_importer,
    public_class_names_differ,
    torch_free,
)
from tests.sources import File

ROOT = Path(__file__).resolve().parent.parent


@cache
def all_files() -> list[File]:
    paths = [
        path
        for folder in (PACKAGE, "launch", "benchmarks", "tests")
        for path in sorted((ROOT / folder).rglob("*.py"))
    ]
    return [File(path.relative_to(ROOT).as_posix(), path.read_text("utf-8")) for path in paths]


@pytest.mark.parametrize("rule", RULES, ids=lambda rule: rule.__name__)
def test_sources_keep_the_rule(rule: Rule) -> None:
    complaints = list(rule(all_files()))
    assert not complaints, "\n".join(complaints)


def test_every_folder_of_the_package_has_a_layer() -> None:
    entries = [path for path in (ROOT / PACKAGE).iterdir() if not path.name.startswith("__")]
    names = {path.stem for path in entries if path.is_dir() or path.suffix == ".py"}
    assert names - set(LAYERS) == set()


BROKEN: tuple[tuple[Rule, str, str], ...] = (
    (imports_point_down, "cp_megatron/plan/a.py", "from cp_megatron.model import x"),
    (imports_point_down, "cp_megatron/plan/a.py", "from ..model import x"),
    (imports_point_down, "cp_megatron/plan/a.py", "from cp_megatron import model"),
    (imports_point_down, "cp_megatron/plan/a.py", "def f():\n    import cp_megatron.model"),
    (
        imports_point_down,
        "cp_megatron/model/a.py",
        "import importlib as i\ni.import_module('cp_megatron.train')",
    ),
    (imports_point_down, "cp_megatron/tensor_parallel/a.py", "from ..context_parallel import x"),
    (imports_point_down, "cp_megatron/context_parallel/a.py", "import cp_megatron.tensor_parallel"),
    (imports_point_down, "cp_megatron/errors.py", "from cp_megatron.config import Config"),
    (imports_point_down, "cp_megatron/train/a.py", "from tests.ranks import run_ranks"),
    (torch_free, "cp_megatron/plan/a.py", "import torch"),
    (torch_free, "cp_megatron/plan/a.py", "def f():\n    import torch.nn"),
    (torch_free, "cp_megatron/config/a.py", "from torch import nn"),
    (torch_free, "cp_megatron/errors.py", "import torch"),
    (torch_free, "cp_megatron/__init__.py", "import torch"),
    (torch_free, "cp_megatron/preflight/check.py", "from torch import nn"),
    (torch_free, "launch/pretrain.py", "import torch.distributed"),
    (no_module_state, "cp_megatron/a.py", "CACHE = {}"),
    (no_module_state, "cp_megatron/a.py", "CACHE: Mapping[str, int] = {}"),
    (no_module_state, "cp_megatron/a.py", "SIZES = [1, 2]"),
    (no_module_state, "cp_megatron/a.py", "SIZES = [size for size in (1, 2)]"),
    (no_module_state, "cp_megatron/a.py", "if True:\n    SEEN = set()"),
    (no_module_state, "cp_megatron/a.py", "GROUP: dist.ProcessGroup | None = None"),
    (no_module_state, "cp_megatron/a.py", "GROUP = dist.new_group([0])"),
    (no_module_state, "cp_megatron/a.py", "def f():\n    global x\n    x = 1"),
    (no_module_state, "cp_megatron/a.py", "@functools.cache\ndef f(group: ProcessGroup): ..."),
    (environment_read_in_one_place, "cp_megatron/train/a.py", "import os\nos.environ['RANK']"),
    (environment_read_in_one_place, "cp_megatron/train/a.py", "import os\nos.getenv('RANK')"),
    (environment_read_in_one_place, "cp_megatron/train/a.py", "from os import environ"),
    (files_are_short, "cp_megatron/a.py", "x = 1\n" * 401),
    (files_are_short, "tests/a.py", "x = 1\n" * 451),
    (files_are_short, "launch/a.py", "x = 1\n" * 61),
    (functions_are_short, "cp_megatron/a.py", "def f():\n" + "    x = 1\n" * 40),
    (functions_are_short, "cp_megatron/a.py", "class A:\n def f(self):\n" + "  x = 1\n" * 40),
    (no_drawer, "cp_megatron/utils.py", ""),
)


@pytest.mark.parametrize(("rule", "path", "source"), BROKEN)
def test_the_rule_detects_what_breaks_it(rule: Rule, path: str, source: str) -> None:
    assert len(list(rule([File(path, source)]))) == 1


def test_a_second_importer_of_an_optional_package_is_detected() -> None:
    one = File("cp_megatron/kernels/a.py", "def f():\n    import flash_attn")
    two = File(
        "cp_megatron/kernels/b.py",
        "from importlib import import_module\nimport_module('flash_attn.interface')",
    )
    assert list(optional_packages_have_one_importer([one])) == []
    assert len(list(optional_packages_have_one_importer([one, two]))) == 1


def test_files_of_triton_kernels_are_one_importer() -> None:
    paths = ("cp_megatron/kernels/a_triton.py", "cp_megatron/kernels/b_triton.py")
    kernels = [File(path, "import triton") for path in paths]
    assert list(optional_packages_have_one_importer(kernels)) == []
    other = File("cp_megatron/kernels/c.py", "import triton")
    assert len(list(optional_packages_have_one_importer([*kernels, other]))) == 1


@pytest.mark.parametrize(
    "statement",
    ["from cp_megatron.data.batch import batch", "from cp_megatron.data.batch.batch import x"],
)
def test_torch_behind_other_modules_is_detected(statement: str) -> None:
    files = [
        File("launch/pretrain.py", "from cp_megatron.preflight import check"),
        File("cp_megatron/preflight/check.py", statement),
        File("cp_megatron/data/batch/batch.py", "import torch"),
    ]
    chain = "cp_megatron.preflight.check > cp_megatron.data.batch.batch > torch"
    complaints = list(torch_free(files))
    assert len(complaints) == 2
    assert all(complaint.endswith(chain) for complaint in complaints)


@pytest.mark.parametrize(
    "statement",
    [
        "from cp_megatron.plan.show.b import x",
        "from cp_megatron.plan.show import b",
        "import cp_megatron.plan.show.b",
        "from .show.b import x",
        "def f():\n    from .show.b import x",
        "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    from .show.b import x",
    ],
)
def test_an_import_circle_is_detected(statement: str) -> None:
    one = File("cp_megatron/plan/a.py", statement)
    other = File("cp_megatron/plan/show/b.py", "from cp_megatron.plan.c import x")
    third = File("cp_megatron/plan/c.py", "from .a import x")
    assert list(no_import_circle([one, other])) == []
    (complaint,) = no_import_circle([one, other, third])
    assert all(file.path in complaint for file in (one, other, third))


def test_importing_from_the_package_that_imports_the_file_is_a_circle() -> None:
    package = File("cp_megatron/plan/__init__.py", "from cp_megatron.plan.mask import Mask")
    mask = File("cp_megatron/plan/mask.py", "from cp_megatron.plan import x")
    assert len(list(no_import_circle([package, mask]))) == 1
    mask = File("cp_megatron/plan/mask.py", "from cp_megatron.plan.grid import x")
    assert list(no_import_circle([package, mask])) == []


def test_one_name_for_two_files_or_two_public_classes_is_detected() -> None:
    one = File("cp_megatron/plan/row.py", "class Row: ...\nclass _Own: ...")
    other = File("cp_megatron/data/row.py", "class Row: ...\nclass _Own: ...")
    packages = [File(f"cp_megatron/{name}/__init__.py", "") for name in ("plan", "data")]
    assert len(list(file_names_differ([one, other, *packages]))) == 1
    assert len(list(public_class_names_differ([one, other]))) == 1


ALLOWED: tuple[tuple[str, str], ...] = (
    ("cp_megatron/model/a.py", "from cp_megatron.comm.groups import x\nfrom .rope import y"),
    ("cp_megatron/config/a.py", "from cp_megatron.errors import ConfigError"),
    ("cp_megatron/preflight/check.py", "from cp_megatron.plan import Grid"),
    ("cp_megatron/comm/runtime.py", "import os\nx = os.environ"),
    (
        "cp_megatron/a.py",
        "__all__ = ['a']\nTABLE: Mapping[str, int] = {a: 1 for a in 'ab'}\nSIZES = (1, 2)",
    ),
    (
        "cp_megatron/a.py",
        '@cache\n@other\ndef f():\n    """One.\n\n    More.\n    """\n    # why\n\n'
        + "    x = 1\n" * 39,
    ),
    ("cp_megatron/preflight/start.py", "import torch"),
    ("launch/pretrain.py", "def main():\n    from cp_megatron.train.run import run"),
    (
        "cp_megatron/kernels/select.py",
        "from typing import TYPE_CHECKING\n"
        "if TYPE_CHECKING:\n    from cp_megatron.kernels.cuda import x",
    ),
)


@pytest.mark.parametrize(("path", "source"), ALLOWED)
def test_no_rule_complains_without_reason(path: str, source: str) -> None:
    assert [complaint for rule in RULES for complaint in rule([File(path, source)])] == []
