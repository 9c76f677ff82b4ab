"""Every family computes, trains and exports what transformers does, on any grid.

The trainer is assembled from a command line, as the program does it.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
from _pytest.mark import ParameterSet
from torch import Tensor

from cp_megatron.checkpoint.hf_export import export_hf
from cp_megatron.comm.collectives import all_gather_dim
from cp_megatron.families.registry import read_hf_config
from cp_megatron.plan import Grid
from tests.checkpoint.toy import save_checkpoint, whole
from tests.families.cases import CASES, VOCAB
from tests.families.tiny_models import (
    LENGTHS,
    SEQ,
    Reference,
    batch,
    logits_of,
    make_model,
    refer,
    registered,
    tensors_of,
)
from tests.ranks import run_ranks
from tests.train.test_loop import assembled

pytestmark = pytest.mark.skipif(
    find_spec("transformers") is None, reason="transformers is not installed: pip install '.[hf]'"
)
Refer = Callable[[str], Reference]
Alone = Callable[[str, int], dict[str, Tensor]]

STEPS, FEW = 20, 4
ROWS = 2  # of a global batch
GRIDS = {
    "one": Grid(),
    "tp2 cp2": Grid(tp=2, cp=2),
    "cp4": Grid(cp=4),
    "tp4": Grid(tp=4),
    "tp2 dp2": Grid(tp=2, dp=2),
    "cp2 dp2": Grid(cp=2, dp=2),
}
FOURS = ("tp2 cp2", "cp4", "tp4", "tp2 dp2", "cp2 dp2")
# By default, a few steps of models that have little in common.
DIVERSE = ("qwen3", "gemma2", "olmo2", "stablelm", "deepseek_v3")
LONG_FIRST = (29, 2, 17)


@pytest.fixture(scope="session")
def reference(tmp_path_factory: pytest.TempPathFactory) -> Refer:
    return functools.cache(lambda name: refer(name, tmp_path_factory.mktemp("family")))


def argv(folder: Path, target: Path, grid: Grid, dtype: str) -> list[str]:
    """The command of a run in ``target`` that starts from the folder. Its data are not used."""
    text = target / "text.txt"
    text.write_text("three blind mice " * 100)
    flags = {
        "load-hf": folder,
        "data-path": text,
        "save": target / "run",
        "seq-length": SEQ,
        "micro-batch-size": 1,
        "global-batch-size": ROWS,
        "train-iters": STEPS,
        "tensor-parallel-size": grid.tp,
        "context-parallel-size": grid.cp,
        "dtype": dtype,
        "hidden-dropout": 0,
        "attention-dropout": 0,
        "eval-iters": 0,
        "lr-warmup-iters": 0,
        "device": "cpu",
    }
    words = [word for flag, value in flags.items() for word in (f"--{flag}", str(value))]
    return [*words, "--document-mask", *(["--sequence-parallel"] if grid.tp > 1 else [])]


def compute(rank: int, world_size: int, words: list[str], target: Path) -> Tensor:
    """Logits [1, SEQ, VOCAB]; saves the model as step 1 and its gradients as step 2."""
    run = assembled(rank, world_size, words)
    step, model = run.train_step, run.train_step.model
    shard = step.prepare(batch(model.config.row_window))
    with torch.no_grad():
        logits = model.eval()(shard.tokens, cp=shard.cp)
    logits = shard.cp.gather(all_gather_dim(logits, -1, step.groups.tp), 1)
    assert logits[..., VOCAB:].eq(float("-inf")).all()
    gradients: dict[str, Tensor] = {}

    def keep(loss: float, norm: float) -> bool:
        for name, parameter in model.named_parameters():
            assert parameter.grad is not None, name
            gradients[name] = parameter.grad.clone()
        return False

    step.run([shard], step=1, lr=0.0, accept=keep)
    for number in (1, 2):
        save_checkpoint(
            target / f"{number}",
            step=number,
            consumed=0,
            model=model,
            optimizer=None,
            config=run.plan.config,
            grid=run.plan.grid,
            data_fingerprint="",
            vocab_size=VOCAB,
        )
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                parameter.copy_(gradients[name])
    return logits[..., :VOCAB]


def compare(name: str, reference: Reference, grid: Grid, target: Path) -> None:
    """Logits to 1e-5 and gradients to 1e-4, by tensor of the folder."""
    words = argv(reference.folder, target, grid, "float32")
    for logits in run_ranks(compute, grid.world_size, words, target):
        gap = (logits - reference.logits).abs().max() / reference.logits.abs().max()
        assert gap < 1e-5, f"logits differ by {gap}"
    found = tensors_of(export_hf(target / "2", target / "gradients"))
    assert found.keys() == reference.gradients.keys()
    total = torch.stack([x.norm() for x in reference.gradients.values()]).norm()
    for key, expected in reference.gradients.items():
        error = (found[key] - expected).norm() / max(expected.norm(), 1e-3 * total)
        assert error < 1e-4, f"the gradient of {key} differs by {error}"


@pytest.mark.parametrize("name", registered())
def test_an_export_is_the_folder(name: str, reference: Refer, tmp_path: Path) -> None:
    """On TP2 x CP2; first, logits and gradients are those of transformers."""
    from transformers import AutoModelForCausalLM

    refers = reference(name)
    source = read_hf_config(refers.folder)
    compare(name, refers, GRIDS["tp2 cp2"], tmp_path)
    out = export_hf(tmp_path / "1", tmp_path / "out", max_shard_bytes=30_000)
    expected, found = tensors_of(refers.folder), tensors_of(out)
    assert expected.keys() == found.keys()
    for key, value in expected.items():
        assert torch.equal(value, found[key]), key
    written = read_hf_config(out)
    assert written.family.model_type == (CASES[name].exported or source.family.model_type)
    assert replace(written.model, attention_dropout=0.0) == replace(
        source.model, attention_dropout=0.0, hidden_dropout=0.0
    )
    theirs, told = AutoModelForCausalLM.from_pretrained(
        out, attn_implementation="eager", output_loading_info=True
    )
    assert not any(told.values()), told
    with torch.no_grad():
        torch.testing.assert_close(
            logits_of(theirs.eval()), refers.logits, atol=1e-6, rtol=1e-5
        )


@pytest.mark.slow
@pytest.mark.parametrize("grid", ["one", "cp4", "tp4"])
@pytest.mark.parametrize("name", registered())
def test_other_grids_compute_the_same(
    name: str, grid: str, reference: Refer, tmp_path: Path
) -> None:
    compare(name, reference(name), GRIDS[grid], tmp_path)


def train(rank: int, world_size: int, words: list[str], steps: int) -> dict[str, Tensor]:
    """All parameters after the steps, on rank 0. Rows and their documents differ."""
    run = assembled(rank, world_size, words)
    step, dp = run.train_step, run.train_step.groups.coordinates.dp
    window, own = step.model.config.row_window, ROWS // step.groups.grid.dp
    for number in range(steps):
        first = number * ROWS + dp * own
        rows = [(row, LONG_FIRST if row % 2 else LENGTHS) for row in range(first, first + own)]
        shards = [step.prepare(batch(window, *row)) for row in rows]
        step.run(shards, step=number + 1, lr=3e-3)
    found = {name: whole(p) for name, p in step.model.named_parameters()}
    return found if rank == 0 else {}


@pytest.fixture(scope="session")
def alone(reference: Refer, tmp_path_factory: pytest.TempPathFactory) -> Alone:
    """The training on one rank."""

    @functools.cache
    def trained(name: str, steps: int) -> dict[str, Tensor]:
        target = tmp_path_factory.mktemp("alone")
        words = argv(reference(name).folder, target, Grid(), "float64")
        return run_ranks(train, 1, words, steps)[0]

    return trained


def few_and_all() -> Iterator[ParameterSet]:
    """Case, grid, steps. All grids for the first case of a family, one for its variants."""
    for name in registered():
        if name in DIVERSE:
            yield pytest.param(name, "tp2 cp2", FEW)
        for grid in FOURS[:1] if "," in name else FOURS:
            yield pytest.param(name, grid, STEPS, marks=pytest.mark.slow)


@pytest.mark.parametrize(("name", "grid", "steps"), few_and_all())
def test_training_equals_one_rank(
    name: str, grid: str, steps: int, reference: Refer, alone: Alone, tmp_path: Path
) -> None:
    words = argv(reference(name).folder, tmp_path, GRIDS[grid], "float64")
    expected, found = alone(name, steps), run_ranks(train, 4, words, steps, timeout=120)[0]
    assert found.keys() == expected.keys()
    for key, value in expected.items():
        assert (found[key] - value).norm() / value.norm() < 1e-10, key
