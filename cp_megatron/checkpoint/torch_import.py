"""Converts a checkpoint of torch to a Hugging Face folder: DCP, torchtitan's, a file of torch.save.

The values are those of the checkpoint, bit for bit if the dtype is as wide; config.json and the
tokenizer are copied from a folder that the user names. One tensor is in memory at a time.
"""

from __future__ import annotations

import shutil
from collections.abc import Collection, Mapping
from functools import partial
from pathlib import Path
from typing import Protocol

import torch
from einops import rearrange
from torch import Tensor

from cp_megatron.checkpoint.dcp_metadata import DCPChunk, DCPTensor, read_dcp_metadata
from cp_megatron.checkpoint.foreign_names import ForeignTensors, TensorType, find_tensors
from cp_megatron.checkpoint.hf_folder import TOKENIZER_FILES, check_output, new_folder
from cp_megatron.checkpoint.hf_write import dtype_of, write_json, write_weights
from cp_megatron.checkpoint.inert_pickle import MalformedError
from cp_megatron.checkpoint.shard_writer import sync
from cp_megatron.checkpoint.torch_file_reader import TorchFileReader
from cp_megatron.config.files.foreign_folders import FROM_TORCH, HF_CONFIG
from cp_megatron.errors import ConfigError
from cp_megatron.families.family import HFTensor
from cp_megatron.families.registry import HFModel, read_hf_config

_COPIED = (*TOKENIZER_FILES, "generation_config.json")


def import_torch(
    source: Path, model_folder: Path, output: Path, *, dtype: str = "float32"
) -> tuple[str, ...]:
    """Writes ``output``, and returns what of the checkpoint is not in it, such as ``optimizer``.

    Args:
        source: a folder of torch.distributed.checkpoint, or a file of ``torch.save``.
        model_folder: has the model's config.json, and its tokenizer if there is one.
        output: must not exist; the folder gets this name when it is complete and on the disk.
        dtype: of the weights.

    Raises:
        ConfigError: the checkpoint is damaged or of another model, or the output exists or cannot
            be written.
    """
    check_output(output)
    target = read_hf_config(model_folder)
    try:
        checkpoint = _open(source)
        wanted = _wanted(target, checkpoint.types)
        tensors = find_tensors(source, target, wanted, checkpoint.types, checkpoint.others)
        _write(checkpoint, tensors, target, wanted, output, dtype)
    except MalformedError as error:
        raise ConfigError(FROM_TORCH, source, str(error), error.works) from None
    return tensors.left_out


def _wanted(target: HFModel, stored: Collection[str]) -> list[HFTensor]:
    """The tensors of the folder: with its other names, if the checkpoint has one of these."""
    positions = target.model.max_position_embeddings or 1
    tensors_of = partial(
        target.family.tensors, target.model, vocab_size=target.vocab_size, seq_length=positions
    )
    usual = tensors_of()
    if target.family.other_names:
        others = tensors_of(other=True)
        known = {tensor.key for tensor in usual}
        key = next((tensor.key for tensor in others if tensor.key not in known), None)
        if key is not None and any(name.endswith(key) for name in stored):
            return others
    return usual


def _write(
    checkpoint: _Reader,
    tensors: ForeignTensors,
    target: HFModel,
    wanted: Collection[HFTensor],
    output: Path,
    dtype: str,
) -> None:
    heads = {"q_proj": target.model.num_attention_heads, "k_proj": target.model.num_kv_heads}
    by_key = {tensor.key: tensor for tensor in wanted}

    def read(tensor: HFTensor) -> Tensor:
        value = checkpoint.read(tensors.names[tensor.key])
        if tensor.key in tensors.interleaved:
            num_heads = heads[tensor.key.split(".")[-2]]
            pairs = "(head pair two) ... -> (head two pair) ..."
            value = rearrange(value, pairs, head=num_heads, two=2)
        return value.to(getattr(torch, dtype_of(tensor, dtype))).contiguous()

    if tensors.head is not None:
        embedding = checkpoint.read(tensors.names["model.embed_tokens.weight"])
        if not torch.equal(checkpoint.read(tensors.head), embedding):
            rule = f"{tensors.head} differs from the embedding, with which config.json ties it"
            works = "tie_word_embeddings false in config.json"
            raise ConfigError("--load-hf", target.folder, rule, works)
    folder_from = Path(target.folder)
    entries = {**target.raw, "architectures": [target.family.architecture], "torch_dtype": dtype}
    if "dtype" in entries:  # the newer name
        entries["dtype"] = dtype
    with new_folder(output) as folder:
        write_json(folder / HF_CONFIG, entries)
        for name in _COPIED:
            if (folder_from / name).is_file():
                shutil.copyfile(folder_from / name, folder / name)
        write_weights(folder, list(by_key.values()), read, dtype=dtype)
        sync(folder)
    sync(output.parent)


class _Reader(Protocol):
    """A checkpoint: its tensors by name, and the names of what is not a tensor."""

    types: Mapping[str, TensorType]
    others: Collection[str]

    def read(self, name: str) -> Tensor:
        """Reads a whole tensor."""


def _open(source: Path) -> _Reader:
    try:
        return _DCPReader(source) if source.is_dir() else _FileReader(source)
    except OSError as error:
        raise MalformedError(f"cannot be read ({error.strerror})") from None


class _FileReader:
    def __init__(self, path: Path) -> None:
        self._file = TorchFileReader.open(path)
        tensors = self._file.tensors
        self.types: Mapping[str, TensorType] = {n: (x.dtype, x.shape) for n, x in tensors.items()}
        self.others: Collection[str] = ()

    def read(self, name: str) -> Tensor:
        return self._file.get_tensor(name)


class _DCPReader:
    def __init__(self, folder: Path) -> None:
        self._folder, content = folder, read_dcp_metadata(folder)
        self._tensors: Mapping[str, DCPTensor] = content.tensors
        self.types: Mapping[str, TensorType] = {
            name: (x.dtype, x.shape) for name, x in content.tensors.items()
        }
        self.others: Collection[str] = content.others

    def read(self, name: str) -> Tensor:
        tensor = self._tensors[name]
        whole = torch.empty(tensor.shape, dtype=getattr(torch, tensor.dtype))
        for chunk in tensor.chunks:
            spans = zip(chunk.offsets, chunk.sizes)
            box = whole[tuple(slice(start, start + size) for start, size in spans)]
            box.copy_(self._read_chunk(name, chunk, whole.dtype))
        return whole

    def _read_chunk(self, name: str, chunk: DCPChunk, dtype: torch.dtype) -> Tensor:
        try:
            with (self._folder / chunk.file).open("rb") as stream:
                stream.seek(chunk.start)
                saved = TorchFileReader.of_bytes(stream.read(chunk.length))
        except OSError as error:
            raise MalformedError(f"{chunk.file} cannot be read ({error.strerror})") from None
        except MalformedError as error:
            raise MalformedError(f"{name} in {chunk.file} {error}") from None
        if saved.tensors.keys() != {""}:
            raise MalformedError(f"{chunk.file} holds something else than the tensor {name}")
        value = saved.get_tensor("")
        if tuple(value.shape) != chunk.sizes:
            raise MalformedError(f"{chunk.file} holds {name} in another shape")
        if value.dtype != dtype:
            raise MalformedError(f"{chunk.file} holds {name} in another dtype")
        return value
