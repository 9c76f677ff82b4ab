"""Reads the Dockerfile, which a test cannot build: what it names must exist."""

from __future__ import annotations

import re
import shlex
import tomllib
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
TEXT = (ROOT / "launch" / "Dockerfile").read_text()
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]


def instructions(name: str) -> list[str]:
    """The arguments of every instruction ``name``, with continued lines joined."""
    lines = "\n".join(line for line in TEXT.splitlines() if not line.startswith("#"))
    joined = re.sub(r"\\\n\s*", " ", lines)
    return re.findall(rf"^{name} (.*)$", joined, re.M)


def argument(name: str) -> str:
    (found,) = (text for text in instructions("ARG") if text.startswith(f"{name}="))
    return shlex.split(found)[0].removeprefix(f"{name}=")


def test_only_known_instructions_and_every_argument_is_declared_before_its_use() -> None:
    known = {"ARG", "FROM", "RUN", "ENV", "WORKDIR", "COPY", "CMD"}
    for line in TEXT.splitlines():
        word = line.split(" ")[0]
        assert not line or line.startswith((" ", "#")) or word in known, line
    for name in re.findall(r"\$\{(\w+)\}", TEXT):
        assert TEXT.index(f"ARG {name}=") < TEXT.index(f"${{{name}}}")


def test_what_is_copied_exists() -> None:
    copied = [word for text in instructions("COPY") for word in shlex.split(text)[:-1]]
    assert copied
    assert [name for name in copied if not (ROOT / name).exists()] == []


def test_it_installs_the_project_with_its_extras_on_its_torch() -> None:
    assert set(argument("EXTRAS").split(",")) <= PROJECT["optional-dependencies"].keys()
    assert argument("TORCH") in PROJECT["dependencies"]
    assert PROJECT["requires-python"] == ">=3.11"
    needed = {PROJECT["readme"], "pyproject.toml", "cp_megatron"}
    copied = {word for text in instructions("COPY") for word in shlex.split(text)[:-1]}
    assert needed <= copied, "pip cannot build the package without them"


def test_its_commands_name_scripts_that_exist() -> None:
    scripts = set(re.findall(r"launch/\w+\.py", TEXT))
    assert scripts
    assert all((ROOT / script).is_file() for script in scripts)
