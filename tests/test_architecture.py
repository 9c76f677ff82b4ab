"""The sources keep every rule of the package's shape, and every rule sees what breaks it."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.architecture import (
    LAYERS,
    PACKAGE,
    RULES,
    File,
    Rule,
    environment_read_in_one_place,
    files_are_short,
    imports_point_down,
    no_drawer,
    no_module_state,
    optional_packages_have_one_importer,
    torch_free,
)

ROOT = Path(__file__).resolve().parent.parent


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
    (no_module_state, "cp_megatron/a.py", "if True:\n    SEEN = set()"),
    (no_module_state, "cp_megatron/a.py", "GROUP: dist.ProcessGroup | None = None"),
    (no_module_state, "cp_megatron/a.py", "GROUP = dist.new_group([0])"),
    (no_module_state, "cp_megatron/a.py", "def f():\n    global x\n    x = 1"),
    (no_module_state, "cp_megatron/a.py", "@functools.cache\ndef f(group: ProcessGroup): ..."),
    (environment_read_in_one_place, "cp_megatron/train/a.py", "import os\nos.environ['RANK']"),
    (environment_read_in_one_place, "cp_megatron/train/a.py", "import os\nos.getenv('RANK')"),
    (environment_read_in_one_place, "cp_megatron/train/a.py", "from os import environ"),
    (files_are_short, "cp_megatron/a.py", "x = 1\n" * 451),
    (files_are_short, "launch/a.py", "x = 1\n" * 61),
    (no_drawer, "cp_megatron/utils.py", ""),
)


@pytest.mark.parametrize(("rule", "path", "source"), BROKEN)
def test_the_rule_sees_what_breaks_it(rule: Rule, path: str, source: str) -> None:
    assert len(list(rule([File(path, source)]))) == 1


def test_a_second_importer_of_an_optional_package_is_seen() -> None:
    one = File("cp_megatron/kernels/a.py", "def f():\n    import flash_attn")
    two = File(
        "cp_megatron/kernels/b.py",
        "from importlib import import_module\nimport_module('flash_attn.interface')",
    )
    assert list(optional_packages_have_one_importer([one])) == []
    assert len(list(optional_packages_have_one_importer([one, two]))) == 1


@pytest.mark.parametrize(
    "statement",
    ["from cp_megatron.data.batch import batch", "from cp_megatron.data.batch.batch import x"],
)
def test_torch_behind_other_modules_is_seen(statement: str) -> None:
    files = [
        File("launch/pretrain.py", "from cp_megatron.preflight import check"),
        File("cp_megatron/preflight/check.py", statement),
        File("cp_megatron/data/batch/batch.py", "import torch"),
    ]
    chain = "cp_megatron.preflight.check > cp_megatron.data.batch.batch > torch"
    complaints = list(torch_free(files))
    assert len(complaints) == 2
    assert all(complaint.endswith(chain) for complaint in complaints)


ALLOWED: tuple[tuple[str, str], ...] = (
    ("cp_megatron/model/a.py", "from cp_megatron.comm.groups import x\nfrom .rope import y"),
    ("cp_megatron/config/a.py", "from cp_megatron.errors import ConfigError"),
    ("cp_megatron/preflight/check.py", "from cp_megatron.plan import Grid"),
    ("cp_megatron/comm/runtime.py", "import os\nx = os.environ"),
    ("cp_megatron/a.py", "__all__ = ['a']\nTABLE: Mapping[str, int] = {'a': 1}\nSIZES = (1, 2)"),
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
