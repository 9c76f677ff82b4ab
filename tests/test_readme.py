"""README and the pages that it links to are true: their commands, paths, links and examples."""

from __future__ import annotations

import ast
import re
import shlex
import subprocess
import sys
from functools import cache
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from tests.ranks import run_ranks

ROOT = Path(__file__).parent.parent
PAGES = (
    "README.md",
    "CONTRIBUTING.md",
    "benchmarks/README.md",
    "launch/README.md",
    "tests/faults/README.md",
)
README = (ROOT / "README.md").read_text(encoding="utf-8")

# Flags of other programs.
OTHERS = frozenset(
    {
        *("--nproc-per-node", "--nnodes", "--rdzv-backend", "--rdzv-endpoint", "--max-restarts"),
        *("--shutdown-timeout", "--signals-to-handle", "--nodes", "--no-deps", "--gpus", "--ipc"),
    }
)
PROGRAMS = (
    *(f"launch/{name}.py" for name in ("pretrain", "prepare_data", "evaluate", "generate")),
    *("launch/convert.py", "-m cp_megatron.plan"),
)
WRITTEN_BY_A_RUN = frozenset({"config.yaml", "curves.png", "experts.png", "FILE.yaml"})
FLAG = re.compile(r"(?<![\w-])--[a-z][a-z0-9-]+")


def page(name: str) -> str:
    return (ROOT / name).read_text(encoding="utf-8")


def python_examples() -> list[str]:
    return re.findall(r"```python\n(.*?)```", README, re.DOTALL)


def run_example(rank: int, world_size: int, source: str) -> tuple[Tensor, Tensor]:
    def model_heads(tokens: Tensor, positions: Tensor) -> tuple[Tensor, ...]:
        assert tokens.shape == (1, 1024 // world_size)
        assert positions.shape == (1024 // world_size,)
        x = torch.stack([tokens * 0.1, positions[None] * 0.01], dim=-1).double()
        return x[:, :, None], x[:, :, None], x[:, :, None]

    names = {
        "group": dist.group.WORLD,
        "tokens": torch.arange(1024)[None] % 7,
        "model_heads": model_heads,
    }
    exec(source, names)
    cp = names["cp"]
    return cp.positions, names["out"]


def test_the_library_example_runs_and_is_exact() -> None:
    example = python_examples()[0]
    ((_, whole),) = run_ranks(run_example, 1, example)
    for positions, out in run_ranks(run_example, 2, example):
        torch.testing.assert_close(out, whole[:, positions], rtol=1e-12, atol=1e-12)


def test_the_transformers_example_is_the_one_that_is_tested() -> None:
    """README shows the calls of the module's own example, which tests/model runs."""
    source = page("cp_megatron/model/huggingface/__init__.py")
    docstring = " ".join((ast.get_docstring(ast.parse(source)) or "").split())
    for line in python_examples()[1].splitlines():
        statement = " ".join(line.partition("  #")[0].split())
        assert statement in docstring, statement


def run_program(command: str, folder: Path) -> subprocess.CompletedProcess[str]:
    words = [sys.executable, *shlex.split(command)]
    return subprocess.run(words, cwd=folder, capture_output=True, text=True, check=False)


def lines_of(text: str) -> list[str]:
    return [line.rstrip() for line in text.splitlines() if line.strip()]


def test_the_printed_plan_is_what_the_program_prints(tmp_path: Path) -> None:
    found = re.search(r"\$ python (-m cp_megatron.plan .*)\n((?:.*\n)*?)```", README)
    assert found is not None
    shown = lines_of(found[2])
    assert lines_of(run_program(found[1], tmp_path).stdout)[: len(shown)] == shown


def test_the_start_table_is_what_the_program_prints() -> None:
    command = re.search(r"--nproc-per-node 4 (launch/pretrain.py .*)\n", README)
    output = re.search(r"```\n( world  (?:.*\n)*?)```", README)
    assert command is not None
    assert output is not None
    table = output[1].partition("\nstep ")[0]
    shown = [line for line in lines_of(table) if line != "..."]
    answer = run_program(f"{command[1]} --device cpu --dry-run --world-size 4", ROOT)
    printed = lines_of(answer.stdout)
    assert [line for line in shown if line not in printed] == []


def test_the_refusal_is_what_the_program_says() -> None:
    found = re.search(r"\$ python (launch/pretrain.py .*)\n(pretrain.py: error: .*)\n", README)
    assert found is not None
    answer = run_program(found[1], ROOT)
    assert answer.returncode == 2
    assert answer.stderr.strip() == found[2]


# ---- flags, paths and links of every page --------------------------------------------------------


@cache
def flags_of(program: str) -> frozenset[str]:
    """The flags that a program's help lists; those of a benchmark are its arguments' fields."""
    if program.startswith("benchmarks/"):
        (arguments,) = (
            node
            for node in ast.parse(page(program)).body
            if isinstance(node, ast.ClassDef) and node.name == "Arguments"
        )
        fields = (node.target for node in arguments.body if isinstance(node, ast.AnnAssign))
        return frozenset("--" + ast.unparse(field).replace("_", "-") for field in fields)
    if program == "-m cp_megatron.metrics.plots":
        assert (ROOT / "cp_megatron/metrics/plots.py").is_file()
        return frozenset()
    answer = run_program(f"{program} --help", ROOT)
    assert answer.returncode == 0, answer.stderr
    return frozenset(FLAG.findall(answer.stdout)) | {"--help"}


def commands_of(text: str) -> list[tuple[str, list[str]]]:
    """(program of ours, its flags) of every command in a code block or in backticks."""
    blocks = re.findall(r"```\n(.*?)```", text, re.DOTALL)
    spans = re.findall(r"`([^`\n]+)`", re.sub(r"```.*?```", "", text, flags=re.DOTALL))
    lines = [line for block in blocks for line in block.replace("\\\n", " ").splitlines()]
    found = []
    for line in (*lines, *spans):
        match = re.search(
            r"(?:^|\s)(launch/(?:\w+\.py|slurm\.sh)|benchmarks/\w+\.py|-m cp_megatron[\w.]+)\s(.*)",
            f"{line} ",
        )
        if match:
            program = match[1].replace("slurm.sh", "pretrain.py")
            found.append((program, FLAG.findall(match[2])))
    return found


@pytest.mark.parametrize("name", PAGES)
def test_the_flags_of_its_commands_exist(name: str) -> None:
    for program, flags in commands_of(page(name)):
        unknown = set(flags) - flags_of(program)
        assert not unknown, f"{program} has no {', '.join(sorted(unknown))}"


def test_the_flags_that_the_pages_mention_exist() -> None:
    known = frozenset[str]().union(*map(flags_of, PROGRAMS)) | OTHERS
    for name in ("README.md", "launch/README.md", "tests/faults/README.md"):
        text = re.sub(r"`python benchmarks/[^`]*`", "", page(name))
        # tests/cli/test_coming_from.py checks the tables about other trainers.
        text = re.sub(r"\n## Coming from .*?(?=\n## )", "", text, flags=re.DOTALL)
        for span in re.findall(r"`(--[^`\n]+)`", text):
            unknown = set(FLAG.findall(span)) - known
            assert not unknown, f"{name}: {', '.join(sorted(unknown))}"


@pytest.mark.parametrize("name", PAGES)
def test_the_paths_it_names_exist(name: str) -> None:
    """A path begins at the root, in the package or beside the page; a file may go by its name."""
    bases = (ROOT, ROOT / "cp_megatron", (ROOT / name).parent)
    folders = ("cp_megatron", "launch", "benchmarks", "tests")
    names = {path.name for folder in folders for path in (ROOT / folder).rglob("*.*")}
    words = re.findall(r"[\w./-]+", re.sub(r"https?://\S+", "", page(name)))
    paths = {word for word in words if re.fullmatch(r"[\w/-]+\.(py|sh|ya?ml|png)", word)}
    paths |= set(re.findall(r"`((?:[a-z_]+/)+)`", page(name)))
    missing = {path for path in paths if not any((base / path).exists() for base in bases)}
    assert missing - names - WRITTEN_BY_A_RUN == set()


def anchors_of(text: str) -> set[str]:
    """GitHub's anchors of the headings."""
    headings = re.findall(r"^#+ (.*)$", text, re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("name", PAGES)
def test_its_links_resolve(name: str) -> None:
    for target in re.findall(r"\]\(([^)\s]+)\)", page(name)):
        if target.startswith("https://"):
            continue
        path, _, anchor = target.partition("#")
        file = (ROOT / name).parent / path if path else ROOT / name
        assert file.exists(), target
        assert not anchor or anchor in anchors_of(file.read_text("utf-8")), target


def test_readme_is_short_and_links_every_page() -> None:
    assert len(README.splitlines()) <= 250
    for name in PAGES[1:]:
        assert f"]({name}" in README


def test_every_benchmark_is_described() -> None:
    text = page("benchmarks/README.md")
    for script in (ROOT / "benchmarks").glob("*.py"):
        assert f"| `{script.name}` |" in text


def test_every_fault_names_a_test_that_exists() -> None:
    rows = [
        row.split(" | ")
        for row in page("tests/faults/README.md").splitlines()
        if row.startswith("| ") and not row.startswith(("| fault |", "| --- |"))
    ]
    assert len(rows) > 20
    for row in rows:
        named = re.findall(r"`(tests/\S+\.py)::(\w+)`", row[-1])
        assert named, row[0]
        for path, function in named:
            assert f"def {function}(" in page(path), f"{path}::{function}"
