"""Weights of a Hugging Face folder into a model on any grid, and any checkpoint back into one.

Loading describes the folder as a checkpoint of ours (``hf_files``); torch.distributed.checkpoint
then plans which box of which tensor each rank reads, as for any other grid. Exporting takes one
process and the memory of one tensor: the header of a shard follows from the shapes alone, so that
tensors are written one after the other.
"""

from __future__ import annotations

import json
import math
import os
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any, BinaryIO

import torch
import torch.distributed as dist
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from cp_megatron.checkpoint.find_checkpoint import named_step
from cp_megatron.checkpoint.hf_export import ExportTensor, export_tensors
from cp_megatron.checkpoint.hf_files import (
    DTYPES,
    FLAG,
    INDEX_FILE,
    SINGLE_FILE,
    read_hf_weights,
)
from cp_megatron.checkpoint.hf_tokenizer import byte_tokenizer_files
from cp_megatron.checkpoint.manifest import (
    ELEMENT_BYTES,
    Manifest,
    TensorEntry,
    read_manifest,
    verify_files,
)
from cp_megatron.checkpoint.object_collectives import on_all_ranks
from cp_megatron.checkpoint.shard_reader import read_shards
from cp_megatron.checkpoint.shard_writer import discard, sync
from cp_megatron.config import Config
from cp_megatron.config.fields import settings
from cp_megatron.config.files.yaml_io import overlay
from cp_megatron.data.tokenize.tokenizer import open_tokenizer
from cp_megatron.errors import ConfigError
from cp_megatron.families.llama import TOKENIZER_FILES, read_hf_config, to_hf_config

OUTPUT = "--output"
_TOKEN_IDS = ("bos_token_id", "eos_token_id", "pad_token_id")
_TYPES: Mapping[str, str] = MappingProxyType({name: code for code, name in DTYPES.items()})


def load_hf(
    folder: str | Path, *, model: nn.Module, process_group: dist.ProcessGroup | None = None
) -> None:
    """Fills a model in place; each rank reads its part. Called on every rank.

    Args:
        folder: config.json and safetensors, in one file or in shards, of any float dtype.
        model: a ``Transformer`` of that config, on memory; with the vocabulary's padding, whose
            rows become zero.
        process_group: the ranks that load, by default all.

    Raises:
        ConfigError: the folder is damaged, or of another model; on every rank alike.
    """
    state = {f"model.{name}": value.detach() for name, value in model.state_dict().items()}
    config = getattr(model, "config")  # noqa: B009 - a module's attributes are untyped

    def prepare() -> Manifest:
        vocab_size = read_hf_config(folder).vocab_size
        rows = state["model.embedding.weight"].shape[0]
        if vocab_size > rows:
            rule = f"its vocabulary has {vocab_size} tokens, the model's {rows}"
            raise ConfigError(FLAG, folder, rule)
        manifest = read_hf_weights(folder, config, vocab_size=vocab_size, padded_vocab_size=rows)
        assert manifest.tensors.keys() == state.keys(), "the table of names is the model's"
        return manifest

    manifest = on_all_ranks(prepare, process_group)
    with torch.no_grad():
        for name in ("model.embedding.weight", "model.head.weight"):
            if name in state:
                state[name].zero_()
    read_shards(state, Path(folder), manifest, flag=FLAG, group=process_group)


def export_hf(
    checkpoint: Path,
    output: Path,
    *,
    dtype: str = "float32",
    max_shard_bytes: int = 5 * 2**30,
) -> Path:
    """A checkpoint as a folder that Hugging Face transformers loads.

    Args:
        checkpoint: a ``step-N``, or a run's folder, of which the newest is taken.
        output: must not exist; it gets its name when all of it is on the disk.
        dtype: of the weights: float64, float32, bfloat16 or float16.
        max_shard_bytes: a file holds no more, unless one tensor alone does.

    Returns:
        ``output``.

    Raises:
        ConfigError: there is no checkpoint, it is damaged, ``output`` exists, or no architecture
            of Hugging Face has such a model.
    """
    if dtype not in _TYPES:
        raise ConfigError("--dtype", dtype, "is no dtype of weights", ", ".join(_TYPES))
    if os.path.lexists(output):
        raise ConfigError(OUTPUT, output, "exists already, and nothing is overwritten")
    step = named_step(Path(checkpoint))
    manifest = read_manifest(step)
    config = _saved_config(step, manifest)
    eod = _eod(config)
    described = to_hf_config(
        config.model,
        vocab_size=manifest.vocab_size,
        seq_length=config.data.seq_length,
        eod=eod,
        dtype=dtype,
    )
    tokenizer = _tokenizer_files(config)
    described |= _token_ids(tokenizer)
    positions = max(config.model.max_position_embeddings or 0, config.data.seq_length)
    tensors = export_tensors(config.model, manifest.vocab_size, positions)
    entries = _entries(step, manifest, tensors)
    verify_files(step, manifest, {chunk.file for x in entries.values() for chunk in x.chunks})
    temporary = output.with_name(output.name + ".tmp")
    try:
        discard(temporary)
        temporary.mkdir(parents=True)
        _write_json(temporary / "config.json", described)
        ids = {name: described[name] for name in _TOKEN_IDS}
        _write_json(temporary / "generation_config.json", {**ids, "_from_model_config": True})
        for path in tokenizer:
            shutil.copyfile(path, temporary / path.name)
        if config.data.tokenizer_type == "byte":
            for name, value in byte_tokenizer_files(positions).items():
                _write_json(temporary / name, value)
        _write_shards(step, temporary, tensors, entries, dtype, max_shard_bytes)
        sync(temporary)
        temporary.rename(output)
        sync(output.parent)
    except BaseException as error:
        discard(temporary)
        if isinstance(error, OSError):
            rule = f"can not be written: {error.strerror or error}"
            raise ConfigError(OUTPUT, output, rule, "another folder") from None
        raise
    return output


def _saved_config(step: Path, manifest: Manifest) -> Config:
    """The model and the data of a checkpoint; what a later version added has its default."""
    values: dict[str, Any] = {}
    try:
        for row in settings().values():
            entries = manifest.config[row.section] if row.section in ("model", "data") else {}
            if row.name in entries:
                values[row.name] = row.from_yaml(entries[row.name])
        return overlay(Config(), values)
    except (KeyError, TypeError, ValueError) as error:
        rule = f"its manifest does not say its model: {error}"
        raise ConfigError("--load", step, rule, "another step") from None


def _eod(config: Config) -> int:
    return open_tokenizer(config.data.tokenizer_type, config.data.tokenizer_model).eod


def _token_ids(tokenizer: Sequence[Path]) -> dict[str, Any]:
    """The ids of a text's first and last tokens that the tokenizer's own folder names."""
    path = tokenizer[0].parent / "config.json" if tokenizer else None
    try:
        found = json.loads(path.read_bytes()) if path is not None else None
    except (OSError, ValueError, RecursionError):
        return {}
    named = found if isinstance(found, dict) else {}
    return {key: named[key] for key in _TOKEN_IDS if named.get(key) is not None}


def _tokenizer_files(config: Config) -> list[Path]:
    if config.data.tokenizer_type != "huggingface" or config.data.tokenizer_model is None:
        return []
    path = Path(config.data.tokenizer_model)
    folder = path if path.is_dir() else path.parent
    return [folder / name for name in TOKENIZER_FILES if (folder / name).is_file()]


Entries = Mapping[str, TensorEntry]


def _entries(step: Path, manifest: Manifest, tensors: Sequence[ExportTensor]) -> Entries:
    """Where every tensor of ours that is exported lies, by its name."""
    entries: dict[str, TensorEntry] = {}
    for ours, shape in (part for tensor in tensors for part in tensor.parts):
        entry = manifest.tensors.get(f"model.{ours}")
        fits = entry is not None and entry.shape[1:] == shape[1:]
        if entry is None or not fits or entry.shape[0] < shape[0]:
            rule = f"has no model.{ours} of shape {list(shape)}, as its own config says"
            raise ConfigError("--load", step, rule, "another step")
        entries[ours] = entry
    return entries


def _size(tensor: ExportTensor, dtype: str) -> int:
    return math.prod(tensor.shape) * ELEMENT_BYTES[dtype]


def _shards(
    tensors: Sequence[ExportTensor], dtype: str, most: int
) -> list[tuple[ExportTensor, ...]]:
    """The tensors in order, as many to a file as fit."""
    shards: list[tuple[ExportTensor, ...]] = []
    held: list[ExportTensor] = []
    for tensor in tensors:
        if held and sum(_size(x, dtype) for x in (*held, tensor)) > most:
            shards.append(tuple(held))
            held = []
        held.append(tensor)
    return [*shards, tuple(held)]


def _write_shards(
    step: Path,
    folder: Path,
    tensors: Sequence[ExportTensor],
    entries: Entries,
    dtype: str,
    most: int,
) -> None:
    shards = _shards(tensors, dtype, most)
    place: dict[str, str] = {}
    for number, shard in enumerate(shards, 1):
        name = f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        name = SINGLE_FILE if len(shards) == 1 else name
        place |= {tensor.key: name for tensor in shard}
        with (folder / name).open("wb") as stream:
            _write_header(stream, shard, dtype)
            for tensor in shard:
                value = _read_tensor(step, tensor, entries, getattr(torch, dtype))
                stream.write(value.view(-1).view(torch.uint8).numpy().data)
        sync(folder / name)
    if len(shards) > 1:
        total = {"total_size": sum(_size(tensor, dtype) for tensor in tensors)}
        _write_json(folder / INDEX_FILE, {"metadata": total, "weight_map": place})


def _write_header(stream: BinaryIO, tensors: Sequence[ExportTensor], dtype: str) -> None:
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    start = 0
    for tensor in tensors:
        stop = start + _size(tensor, dtype)
        header[tensor.key] = {
            "dtype": _TYPES[dtype],
            "shape": list(tensor.shape),
            "data_offsets": [start, stop],
        }
        start = stop
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)  # the numbers are aligned
    stream.write(len(text).to_bytes(8, "little") + text)


def _read_tensor(step: Path, tensor: ExportTensor, entries: Entries, dtype: torch.dtype) -> Tensor:
    """A tensor as the folder holds it, without the vocabulary's padding; one chunk beside it."""
    whole = torch.empty(tensor.shape, dtype=dtype)
    rest = whole.T if tensor.transposed else whole
    for ours, shape in tensor.parts:
        _fill(rest[: shape[0]], step, entries[ours])
        rest = rest[shape[0] :]
    return whole


def _fill(target: Tensor, step: Path, entry: TensorEntry) -> None:
    """Writes the first rows of a tensor of ours into ``target``."""
    for chunk in entry.chunks:
        try:
            with safe_open(step / chunk.file, framework="pt", device="cpu") as shard:
                part = shard.get_tensor(chunk.key)
        except (SafetensorError, OSError) as error:
            raise ConfigError("--load", step, f"{chunk.file} can not be read ({error})") from None
        if tuple(part.shape) != chunk.sizes or part.dtype != getattr(torch, entry.dtype):
            raise ConfigError("--load", step, f"{chunk.file} holds {chunk.key} otherwise")
        box = tuple(slice(start, start + size) for start, size in zip(chunk.offsets, chunk.sizes))
        into = target[box]  # fewer rows than the chunk has where the padding begins
        into.copy_(part[: into.shape[0]])


def _write_json(path: Path, value: Mapping[str, Any]) -> None:
    path.write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8")
    sync(path)
