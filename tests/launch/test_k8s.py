"""Tests the Kubernetes job: its parts refer to each other, and its script starts the ranks.

A double of torchrun prints its arguments; bash and the script in the file are real.
"""

from __future__ import annotations

import os
import subprocess
from pathlib import Path
from typing import Any

import pytest
import yaml

from cp_megatron.cli.parse import parse_arguments
from cp_megatron.comm.runtime import Launch
from cp_megatron.preflight.check import check

ROOT = Path(__file__).resolve().parents[2]
SERVICE, JOB = yaml.safe_load_all((ROOT / "launch" / "k8s.yaml").read_text())
SPEC: dict[str, Any] = JOB["spec"]
POD: dict[str, Any] = SPEC["template"]["spec"]
(CONTAINER,) = POD["containers"]
VARIABLES: dict[str, str] = {entry["name"]: entry["value"] for entry in CONTAINER["env"]}
_, _, *FLAGS = CONTAINER["args"]


def torchrun(folder: Path, index: int) -> list[str]:
    """The arguments with which the pod of that index starts torchrun."""
    program = folder / "bin" / "torchrun"
    program.parent.mkdir(exist_ok=True)
    program.write_text("#!/bin/bash\nprintf '%s\\n' \"$@\"\n")
    program.chmod(0o755)
    path = os.pathsep.join([str(program.parent), os.environ["PATH"]])
    done = subprocess.run(
        [*CONTAINER["command"], *CONTAINER["args"]],
        cwd=folder,
        env={**VARIABLES, "PATH": path, "JOB_COMPLETION_INDEX": str(index)},
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stderr == ""
    return done.stdout.splitlines()


def test_the_parts_refer_to_each_other() -> None:
    name = JOB["metadata"]["name"]
    assert SERVICE["spec"]["selector"] == {"job-name": name}
    assert SERVICE["metadata"]["name"] == POD["subdomain"] == name
    assert SPEC["completions"] == SPEC["parallelism"] == int(VARIABLES["NODES"])
    limits = CONTAINER["resources"]["limits"]
    assert limits["nvidia.com/gpu"] == int(VARIABLES["RANKS_PER_NODE"])
    seconds = int(VARIABLES["TORCH_ELASTIC_SHUTDOWN_TIMEOUT"])
    assert 30 < seconds < POD["terminationGracePeriodSeconds"]
    mounted = {mount["name"] for mount in CONTAINER["volumeMounts"]}
    assert mounted == {volume["name"] for volume in POD["volumes"]}


def test_its_flags_make_a_run_on_its_ranks() -> None:
    nodes, ranks = int(VARIABLES["NODES"]), int(VARIABLES["RANKS_PER_NODE"])
    launch = Launch(
        world_size=nodes * ranks, local_world_size=ranks, rank=0, local_rank=0, under_torchrun=True
    )
    arguments = parse_arguments(FLAGS)
    assert check(arguments.config, launch, given=arguments.given).grid.world_size == nodes * ranks


@pytest.mark.parametrize(("index", "host"), [(0, "true"), (1, "false")])
def test_the_pods_connect_at_the_first_one(tmp_path: Path, index: int, host: str) -> None:
    name = JOB["metadata"]["name"]
    assert torchrun(tmp_path, index) == [
        *("--nnodes", "2", "--nproc-per-node", "8"),
        *("--signals-to-handle", "SIGTERM,SIGINT,SIGHUP,SIGQUIT,SIGUSR1,SIGUSR2"),
        *("--rdzv-id", name, "--rdzv-backend", "c10d"),
        *("--rdzv-conf", f"is_host={host}", "--rdzv-endpoint", f"{name}-0.{name}:29500"),
        *("launch/pretrain.py", "--save", VARIABLES["RUN"], "--load", "auto", *FLAGS),
    ]
