"""Every family computes, trains and exports what transformers does, on any grid."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from cp_megatron.checkpoint.hf_export import export_hf
from cp_megatron.families.registry import read_hf_config
from cp_megatron.plan import Grid
from tests.families.cases import CASES
from tests.families.mixture_cases import MIXTURES
from tests.families.on_grids import (
    STEPS,
    argv,
    compute_on,
    exported_gradients,
    gradient_gap,
    logit_gap,
    train,
)
from tests.families.tiny_models import Reference, logits_of, refer, tensors_of
from tests.ranks import run_ranks

pytestmark = pytest.mark.skipif(
    find_spec("transformers") is None, reason="transformers is not installed: pip install '.[hf]'"
)
Refer = Callable[[str], Reference]
Alone = Callable[[str, int], dict[str, Tensor]]

FEW = 4
GRIDS = {
    "one": Grid(),
    "tp2 cp2": Grid(tp=2, cp=2),
    "cp4": Grid(cp=4),
    "tp4": Grid(tp=4),
    "tp2 dp2": Grid(tp=2, dp=2),
    "cp2 dp2": Grid(cp=2, dp=2),
    "cp2 ep2": Grid(cp=2, ep=2),
    "cp4 ep4": Grid(cp=4, ep=4),
    "tp2 cp2 ep2": Grid(tp=2, cp=2, ep=2),
    "cp2 dp2 ep4": Grid(cp=2, dp=2, ep=4),
}
FOURS = ("tp2 cp2", "cp4", "tp4", "tp2 dp2", "cp2 dp2")
WITH_EXPERTS = ("tp2 cp2 ep2", "cp2 dp2 ep4")
# The cases that train by default, for a few steps; they have little in common.
DIVERSE = ("gemma2", "deepseek_v3")
# The mixtures that run by default; the others share their code.
MIXED = ("qwen3_moe", "gpt_oss", "deepseek_v3, groups of experts")


@pytest.fixture(scope="session")
def reference(tmp_path_factory: pytest.TempPathFactory) -> Refer:
    return functools.cache(lambda name: refer(name, tmp_path_factory.mktemp("family")))


def compare(reference: Reference, grid: Grid, target: Path) -> None:
    """Compares logits to 1e-5, and the gradient of each tensor of the folder to 1e-4."""
    for found in compute_on(grid, reference.folder, target, "float32"):
        gap = logit_gap(found.logits, reference.logits)
        assert gap < 1e-5, f"logits differ by {gap}"
    gap, name = gradient_gap(exported_gradients(target), reference.gradients)
    assert gap < 1e-4, f"the gradient of {name} differs by {gap}"


def first_cases() -> Iterator[Any]:
    """Every case; by default only the first one of each family runs, and a few mixtures."""
    for name in CASES:
        later = name not in MIXED if name in MIXTURES else "," in name
        yield pytest.param(name, marks=[pytest.mark.slow] if later else [])


@pytest.mark.parametrize("name", list(first_cases()))
def test_an_export_is_the_folder(name: str, reference: Refer, tmp_path: Path) -> None:
    """The run is on TP2 x CP2, of which EP2; its logits and gradients are compared with
    transformers, too."""
    from transformers import AutoModelForCausalLM

    refers = reference(name)
    source = read_hf_config(refers.folder)
    compare(refers, GRIDS["tp2 cp2 ep2" if name in MIXTURES else "tp2 cp2"], tmp_path)
    out = export_hf(tmp_path / "1", tmp_path / "out", max_shard_bytes=30_000)
    expected, found = tensors_of(refers.folder), tensors_of(out)
    assert expected.keys() == found.keys()
    for key, value in expected.items():
        assert torch.equal(value, found[key]), key
    written = read_hf_config(out)
    assert written.family == source.family
    assert replace(written.model, attention_dropout=0.0) == replace(
        source.model, attention_dropout=0.0, hidden_dropout=0.0
    )
    theirs, told = AutoModelForCausalLM.from_pretrained(
        out, attn_implementation="eager", output_loading_info=True
    )
    assert not any(told.values()), told
    with torch.no_grad():
        torch.testing.assert_close(logits_of(theirs.eval()), refers.logits, atol=1e-6, rtol=1e-5)


def cases_and_grids() -> Iterator[Any]:
    """Every case with other grids; experts are also shared."""
    for name in CASES:
        shared = ("cp2 ep2", "cp4 ep4") if name in MIXTURES else ()
        for grid in ("one", "cp4", "tp4", *shared):
            yield pytest.param(name, grid)


@pytest.mark.slow
@pytest.mark.parametrize(("name", "grid"), list(cases_and_grids()))
def test_other_grids_compute_the_same(
    name: str, grid: str, reference: Refer, tmp_path: Path
) -> None:
    compare(reference(name), GRIDS[grid], tmp_path)


@pytest.fixture(scope="session")
def alone(reference: Refer, tmp_path_factory: pytest.TempPathFactory) -> Alone:
    """Trains a case on one rank, once for each number of steps."""

    @functools.cache
    def trained(name: str, steps: int) -> dict[str, Tensor]:
        target = tmp_path_factory.mktemp("alone")
        words = argv(reference(name).folder, target, Grid(), "float64")
        return run_ranks(train, 1, words, steps)[0]

    return trained


def few_and_all() -> Iterator[Any]:
    """Case, grid and steps: all grids for the first case of a family, one grid for the others."""
    for name in CASES:
        if name in DIVERSE:
            yield pytest.param(name, "tp2 cp2", FEW)
        grids = WITH_EXPERTS if name in MIXTURES else FOURS
        for grid in grids[:1] if "," in name else grids:
            yield pytest.param(name, grid, STEPS, marks=pytest.mark.slow)


@pytest.mark.parametrize(("name", "grid", "steps"), list(few_and_all()))
def test_training_equals_one_rank(
    name: str, grid: str, steps: int, reference: Refer, alone: Alone, tmp_path: Path
) -> None:
    words = argv(reference(name).folder, tmp_path, GRIDS[grid], "float64")
    expected, found = alone(name, steps), run_ranks(train, 4, words, steps, timeout=120)[0]
    assert found.keys() == expected.keys()
    for key, value in expected.items():
        assert (found[key] - value).norm() / value.norm() < 1e-10, key
