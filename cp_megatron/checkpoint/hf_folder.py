"""Finds our parameters in a Hugging Face folder, and names a new one when it is complete.

This module does not import torch.

A folder holds one ``model.safetensors``, or several shards and an index that says which shard holds
which tensor; older ones hold ``pytorch_model.bin`` in the same way. Only headers are read here, but
all of them, so that a missing shard, a truncated file, or a tensor that is superfluous or has a
wrong shape or dtype is found before a rank waits for another one.
"""

from __future__ import annotations

import os
import re
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from types import MappingProxyType

from safetensors import SafetensorError, safe_open

from cp_megatron.checkpoint.inert_pickle import MalformedError
from cp_megatron.checkpoint.manifest import DTYPE_CODES, ChunkEntry, TensorEntry
from cp_megatron.checkpoint.torch_file import read_torch_file
from cp_megatron.config import ModelConfig
from cp_megatron.config.files.folder_lock import FolderLock, is_lock
from cp_megatron.config.files.foreign_folders import HF_WEIGHTS, HF_WEIGHTS_TORCH
from cp_megatron.errors import ConfigError
from cp_megatron.families.family import HFTensor
from cp_megatron.families.json_fields import FLAG, file_size, read_json
from cp_megatron.families.registry import HFModel

SINGLE_FILE, INDEX_FILE = HF_WEIGHTS
TORCH_SUFFIX = ".bin"
"""The suffix of weights that torch.save wrote; those without it are safetensors."""
DTYPES: Mapping[str, str] = MappingProxyType(
    {code: name for name, code in DTYPE_CODES.items() if "float" in name}
)
"""The dtypes that weights may have, by their names in safetensors."""
TOKENIZER_FILES = (
    *("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json"),
    *("vocab.json", "merges.txt", "tokenizer.model", "chat_template.jinja"),
)
"""The files of a tokenizer."""
OUTPUT = "--output"
_PART_PREFIX = "model.language_model."
_SHARD = re.compile(r"[A-Za-z0-9_-][A-Za-z0-9._-]*\.(safetensors|bin)")


@dataclass(frozen=True, kw_only=True)
class Source:
    """Where a parameter of ours is stored.

    Attributes:
        entry: the parameter as a tensor of a checkpoint, in one chunk, or in one for each row or
            group of rows. Our embedding has more rows, which pad the vocabulary; its chunk ends
            before them.
        places: for each chunk, by its key and its first row, the tensor of the folder that holds it
            and the chunk's number among the tensor's parts.
    """

    entry: TensorEntry
    places: Mapping[tuple[str, int], tuple[HFTensor, int]]


def find_weights(
    found: HFModel, model: ModelConfig, *, padded_vocab_size: int
) -> dict[str, Source]:
    """Checks the headers of all files of a folder against a model.

    Args:
        found: the folder and its config.json.
        model: the model whose parameters are looked for; it may differ from ``found.model`` in
            flags that change no tensor.
        padded_vocab_size: rows of our embedding.

    Returns:
        the source of each parameter, by its name.

    Raises:
        ConfigError: names the file and what is wrong with it.
    """
    folder, family = Path(found.folder), found.family
    stored = _with_prefix(_stored(folder), family.base_prefix)
    if found.is_part:
        stored = {key.replace(_PART_PREFIX, "model.", 1): at for key, at in stored.items()}
    if model.num_layers > len(stored):
        rule = f"config.json says {model.num_layers} layers, but the folder has only {len(stored)} "
        raise _wrong(folder, f"{rule}tensors")
    positions = found.model.max_position_embeddings or 1
    tensors_of = partial(family.tensors, model, vocab_size=found.vocab_size, seq_length=positions)
    tensors = tensors_of()
    if family.other_names and not stored.keys() >= {tensor.key for tensor in tensors}:
        others = tensors_of(other=True)
        if stored.keys() >= {tensor.key for tensor in others}:
            tensors = others
    sources: dict[str, Source] = {}
    for tensor in tensors:
        at = stored.pop(tensor.key, None)
        if at is None:
            raise _wrong(folder, f"its weights lack {tensor.key}")
        if at.dtype not in DTYPES.values():
            rule, works = f"{at.file}: {tensor.key} has the dtype {at.dtype}", DTYPES.values()
            raise ConfigError(FLAG, folder, rule, f"weights in {', '.join(works)}")
        if at.shape != tensor.shape:
            rule = f"{at.file}: {tensor.key} has the shape {list(at.shape)}, but by config.json and"
            raise _wrong(folder, f"{rule} the flags it is {list(tensor.shape)}")
        _add_sources(sources, tensor, at, padded_vocab_size)
    if not model.untie_embeddings_and_output_weights:
        stored.pop("lm_head.weight", None)  # transformers ignores it and uses the embedding
    extra = [key for key in stored if not re.fullmatch(family.buffers, key)]
    if extra:
        more = f" (and {len(extra) - 1} more)" if len(extra) > 1 else ""
        rule = f"{stored[extra[0]].file} holds {extra[0]}{more}, which config.json has no place for"
        raise _wrong(folder, rule)
    return sources


@dataclass(frozen=True, kw_only=True)
class _Stored:
    file: str
    key: str
    dtype: str
    shape: tuple[int, ...]


def _add_sources(
    sources: dict[str, Source], tensor: HFTensor, at: _Stored, padded_vocab_size: int
) -> None:
    """Adds what a tensor of the folder holds of our parameters."""
    for number, part in enumerate(tensor.parts):
        chunk = ChunkEntry(
            offsets=(part.start, *(0 for _ in part.shape[1:])),
            sizes=part.shape,
            file=at.file,
            key=at.key,
        )
        earlier = sources.get(part.name)
        chunks = (*(earlier.entry.chunks if earlier else ()), chunk)
        rows = padded_vocab_size if part.padded else part.start + part.shape[0]
        entry = TensorEntry(dtype=at.dtype, shape=(rows, *part.shape[1:]), chunks=chunks)
        places = {**(earlier.places if earlier else {}), (at.key, part.start): (tensor, number)}
        sources[part.name] = Source(entry=entry, places=places)


def _with_prefix(stored: dict[str, _Stored], prefix: str) -> dict[str, _Stored]:
    """The tensors by the names that the family's class gives them; a folder of the class without
    the output layer lacks a prefix."""
    if any(key.startswith(prefix) for key in stored):
        return stored
    return {f"{prefix}{key}": tensor for key, tensor in stored.items()}


def _stored(folder: Path) -> dict[str, _Stored]:
    """All tensors of the folder by key. As in transformers, safetensors come before torch's."""
    has_torch = any((folder / name).exists() for name in HF_WEIGHTS_TORCH)
    has_safe = any((folder / name).exists() for name in HF_WEIGHTS)
    single, index_file = HF_WEIGHTS_TORCH if has_torch and not has_safe else HF_WEIGHTS
    index = _index(folder, index_file)
    stored: dict[str, _Stored] = {}
    for name in [single] if index is None else sorted(set(index.values())):
        for key, tensor in _header(folder, name).items():
            if index is not None and index.get(key) != name:
                where = f"in {index[key]}" if key in index else "in no file"
                raise _wrong(folder, f"{name} holds {key}, which by {index_file} is {where}")
            stored[key] = tensor
    for key, name in (index or {}).items():
        if key not in stored:
            raise _wrong(folder, f"{name} lacks {key}, which by {index_file} is there")
    return stored


def _index(folder: Path, file: str) -> dict[str, str] | None:
    """The file of each key; None if the folder has a single file."""
    if not (folder / file).exists():
        return None
    index = read_json(folder, file, max_bytes=1 << 27).get("weight_map")
    if not isinstance(index, dict) or not index:
        raise _wrong(folder, f"{file} has no weight_map")
    for key, name in index.items():
        # A name without a separator cannot lead out of the folder.
        if not isinstance(name, str) or not _SHARD.fullmatch(name):
            rule = f"{file}: {str(name)[:80]!r} of {key} is not the name of a file beside it"
            raise _wrong(folder, rule)
    return index


def _header(folder: Path, name: str) -> dict[str, _Stored]:
    """The tensors of a file by key, which is checked to hold all of them."""
    file_size(folder, name)
    is_torch, stored = Path(name).suffix == TORCH_SUFFIX, dict[str, _Stored]()
    tensors = _torch_header(folder, name) if is_torch else safetensors_header(folder, name)
    for key, (dtype, shape) in tensors.items():
        stored[key] = _Stored(file=name, key=key, dtype=dtype, shape=shape)
    return stored


def safetensors_header(folder: Path, name: str) -> dict[str, tuple[str, tuple[int, ...]]]:
    """Returns dtype and shape of each tensor. The library checks that they fill the file exactly.

    Raises:
        ConfigError: the file is damaged.
    """
    tensors = {}
    try:
        with safe_open(folder / name, framework="np") as file:
            for key in file.keys():  # noqa: SIM118 - a file is not a dict
                tensor = file.get_slice(key)
                code = tensor.get_dtype()
                tensors[key] = (DTYPES.get(code, code), tuple(tensor.get_shape()))
    except (SafetensorError, OSError) as error:
        reason = str(error).removeprefix("Error while deserializing header: ")[:160]
        rule = f"{name} is truncated, damaged or not a safetensors file ({reason})"
        raise _wrong(folder, rule) from None
    return tensors


def _torch_header(folder: Path, name: str) -> dict[str, tuple[str, tuple[int, ...]]]:
    try:
        with (folder / name).open("rb") as stream:
            tensors = read_torch_file(stream)
    except MalformedError as error:
        raise ConfigError(FLAG, folder, f"{name} {error}", error.works) from None
    except OSError as error:
        raise _wrong(folder, f"{name} cannot be read ({error.strerror})") from None
    return {key: (tensor.dtype, tensor.shape) for key, tensor in tensors.items()}


def _wrong(folder: Path, rule: str) -> ConfigError:
    return ConfigError(FLAG, folder, " ".join(rule.split()))


def check_output(output: Path) -> None:
    """Raises ConfigError if the path exists."""
    if os.path.lexists(output):
        rule = "exists already, and nothing is overwritten"
        raise ConfigError(OUTPUT, output, rule, "a new folder")


@contextmanager
def new_folder(output: Path) -> Iterator[Path]:
    """Yields a temporary folder, which gets the name ``output`` if the block does not fail.

    Raises:
        ConfigError: another process writes it, or the folder cannot be written.
    """
    temporary = output.with_name(output.name + ".tmp")
    lock = FolderLock(temporary, flag=OUTPUT)
    try:
        lock.acquire()
    except ConfigError as error:
        raise ConfigError(OUTPUT, output, error.rule, error.works) from None
    try:
        for left in temporary.iterdir():  # by a process that was killed
            if not is_lock(left):
                shutil.rmtree(left) if left.is_dir() else left.unlink()
        yield temporary
        lock.release()
        temporary.rename(output)
    except (OSError, SafetensorError) as error:
        rule = f"cannot be written: {getattr(error, 'strerror', None) or error}"
        raise ConfigError(OUTPUT, output, rule, "another folder") from None
    finally:
        lock.release()
        shutil.rmtree(temporary, ignore_errors=True)
