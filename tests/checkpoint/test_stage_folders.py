"""Hugging Face folders are read and written by pipeline stages as by one rank."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from cp_megatron.checkpoint import hf_load
from cp_megatron.checkpoint.hf_export import export_hf
from cp_megatron.checkpoint.hf_load import load_hf
from cp_megatron.checkpoint.manifest import read_manifest
from cp_megatron.checkpoint.object_collectives import all_gather_objects
from cp_megatron.cli.programs import GenerationOptions
from cp_megatron.comm.groups import ParallelGroups
from cp_megatron.data.tokenize.tokenizer import ByteTokenizer
from cp_megatron.errors import ConfigError
from cp_megatron.generate.check_generation import GenerationSetup
from cp_megatron.generate.run_generation import open_session
from cp_megatron.model import Transformer, build_model
from cp_megatron.plan import Grid
from cp_megatron.plan.stages import Stages
from tests.checkpoint.test_huggingface import SIZES, VOCAB, run_of
from tests.checkpoint.toy import save_checkpoint
from tests.ranks import run_ranks

pytestmark = pytest.mark.skipif(
    find_spec("transformers") is None, reason="transformers is not installed: pip install '.[hf]'"
)

LAYERS = 4
MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "untied": ("Llama", {}),
    "tied": ("Llama", {"tie_word_embeddings": True}),
    "experts": ("Mixtral", {"num_local_experts": 4, "sliding_window": None}),
}


@dataclass(frozen=True, kw_only=True)
class Place:
    """A grid, and the chunks of each stage."""

    grid: Grid
    num_chunks: int = 1

    def __str__(self) -> str:
        return f"{self.grid}, {self.num_chunks} chunks"


PLACES = [
    Place(grid=Grid(pp=4)),
    Place(grid=Grid(pp=2, dp=2)),
    Place(grid=Grid(pp=2, tp=2, ep=2), num_chunks=2),
]


@pytest.fixture(scope="module", params=MODELS)
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model with fixed random weights, as transformers saves it."""
    import transformers

    family, options = MODELS[request.param]
    sizes = {**SIZES, "num_hidden_layers": LAYERS, **options}
    config = getattr(transformers, f"{family}Config")(**sizes)
    torch.manual_seed(3)
    model = getattr(transformers, f"{family}ForCausalLM")(config)
    with torch.no_grad():
        for weight in model.parameters():
            weight.copy_(torch.randn_like(weight))
    folder = tmp_path_factory.mktemp("hf") / str(request.param)
    model.save_pretrained(folder)
    return folder


def load_on(folder: Path, place: Place) -> Transformer:
    config, grid = run_of(folder), place.grid
    config = replace(config, parallel=replace(config.parallel, sequence_parallel=grid.tp > 1))
    groups = ParallelGroups.create(grid, "cpu", has_experts=bool(config.model.num_experts))
    stages = Stages.split(
        [1] * LAYERS, first=0, last=0, num_stages=grid.pp, num_chunks=place.num_chunks
    )
    model = build_model(
        config,
        groups,
        vocab_size=VOCAB,
        dtype="float32",
        device="cpu",
        initialize=False,
        chunks=stages.of(groups.coordinates.pp),
    )
    load_hf(folder, model=model)
    return model


def load_and_save(rank: int, world_size: int, folder: Path, place: Place, run: Path) -> None:
    """Loads the folder and saves it as the checkpoint of a run."""
    save_checkpoint(
        run,
        step=0,
        consumed=0,
        model=load_on(folder, place),
        optimizer=None,
        config=run_of(folder),
        grid=place.grid,
        data_fingerprint="",
        vocab_size=VOCAB,
    )


def weights(folder: Path) -> dict[str, Tensor]:
    files = map(load_file, folder.glob("*.safetensors"))
    return {key: value for file in files for key, value in file.items()}


@pytest.mark.parametrize("place", PLACES, ids=str)
def test_what_stages_load_and_export_is_what_was_there(
    place: Place, folder: Path, tmp_path: Path
) -> None:
    if place.grid.ep > 1 and folder.name != "experts":
        place = Place(grid=Grid(pp=2, tp=2), num_chunks=place.num_chunks)
    run_ranks(load_and_save, place.grid.world_size, folder, place, tmp_path / "run")
    out, expected = export_hf(tmp_path / "run" / "step-0", tmp_path / "out"), weights(folder)
    found = weights(out)
    assert found.keys() == expected.keys()
    for key, value in expected.items():
        assert torch.equal(found[key], value), key


def test_a_checkpoint_of_stages_is_exported_as_that_of_one_rank(
    folder: Path, tmp_path: Path
) -> None:
    outputs = list[Path]()
    for number, place in enumerate((Place(grid=Grid()), Place(grid=Grid(pp=2), num_chunks=2))):
        run = tmp_path / f"run-{number}"
        run_ranks(load_and_save, place.grid.world_size, folder, place, run)
        outputs.append(export_hf(run, tmp_path / f"out-{number}", max_shard_bytes=20_000))
    one, other = ({path.name: path.read_bytes() for path in out.iterdir()} for out in outputs)
    assert len(one) > 3
    assert one == other


def read_names(rank: int, world_size: int, folder: Path, place: Place) -> list[str]:
    """The parameters that this rank reads from the files."""
    names, read_box = list[str](), hf_load._FolderReader._read_box

    def noting(self: Any, shard: Any, item: Any, chunk: Any) -> Tensor:
        names.append(item.storage_index.fqn)
        return read_box(self, shard, item, chunk)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(hf_load._FolderReader, "_read_box", noting)
        load_on(folder, place)
    return sorted(set(names))


def test_a_stage_reads_only_what_it_has(folder: Path) -> None:
    read = run_ranks(read_names, 4, folder, Place(grid=Grid(pp=4)))
    for stage, names in enumerate(read):
        layers = {name.split(".")[1] for name in names if name.startswith("layers.")}
        assert layers == {str(stage)}
    ends = [{name for name in names if not name.startswith("layers.")} for names in read]
    head = "embedding.weight" if folder.name == "tied" else "head.weight"
    assert ends == [{"embedding.weight"}, set(), set(), {"norm.weight", head}]


def refusals(rank: int, world_size: int, source: Path, folder: Path) -> list[str]:
    """The error of each rank when a folder is of another vocabulary than the model."""
    has_experts = bool(run_of(source).model.num_experts)
    groups = ParallelGroups.create(Grid(pp=world_size), "cpu", has_experts=has_experts)
    stages = Stages.split([1] * LAYERS, first=0, last=0, num_stages=world_size)
    chunks = stages.of(groups.coordinates.pp)
    model = build_model(
        run_of(source), groups, vocab_size=64, dtype="float32", device="cpu", chunks=chunks
    )
    try:
        load_hf(folder, model=model)
    except ConfigError as error:
        return all_gather_objects(str(error), None)
    return []


def test_a_folder_with_a_larger_vocabulary_is_refused_on_every_stage(folder: Path) -> None:
    told = run_ranks(refusals, 4, folder, folder)
    assert told == [[told[0][0]] * 4] * 4
    assert "its vocabulary has 300 tokens, the model's has 128" in told[0][0]


def test_text_is_generated_from_a_checkpoint_of_stages(folder: Path, tmp_path: Path) -> None:
    place = Place(grid=Grid(pp=4))
    run_ranks(load_and_save, 4, folder, place, tmp_path)
    states: Sequence[dict[str, Tensor]] = [
        open_session(_setup(folder, path), "cpu").model.state_dict()
        for path in (folder, tmp_path / "step-0")
    ]
    assert states[0].keys() == states[1].keys()
    for name, value in states[0].items():
        assert torch.equal(value, states[1][name]), name


def _setup(folder: Path, path: Path) -> GenerationSetup:
    return GenerationSetup(
        config=run_of(folder),
        options=GenerationOptions(),
        folder=path,
        manifest=None if path == folder else read_manifest(path),
        vocab_size=VOCAB,
        tokenizer=ByteTokenizer(),
        template=None,
    )
