"""Writes a checkpoint as a folder that Hugging Face transformers loads.

The export runs in one process and needs the memory of one tensor of the folder and one chunk of the
checkpoint.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from cp_megatron.checkpoint.find_checkpoint import named_step, saved_config
from cp_megatron.checkpoint.hf_folder import DTYPES, TOKENIZER_FILES, check_output, new_folder
from cp_megatron.checkpoint.hf_write import (
    MAX_SHARD_BYTES,
    dtype_of,
    write_json,
    write_weights,
)
from cp_megatron.checkpoint.manifest import (
    FLAG,
    Manifest,
    TensorEntry,
    read_manifest,
    verify_files,
)
from cp_megatron.checkpoint.shard_writer import sync
from cp_megatron.config import Config
from cp_megatron.data.tokenize.open_tokenizer import tokenizer_of
from cp_megatron.data.tokenize.tokenizer import ByteTokenizer, Tokenizer
from cp_megatron.data.tokenize.tokenizer_huggingface import GPT2Tokenizer
from cp_megatron.errors import ConfigError
from cp_megatron.families.family import HFTensor
from cp_megatron.families.registry import to_hf_config

_END_TOKEN = "<|endoftext|>"
_TOKEN_IDS = ("bos_token_id", "eos_token_id", "pad_token_id")


def export_hf(
    checkpoint: Path,
    output: Path,
    *,
    dtype: str = "float32",
    max_shard_bytes: int = MAX_SHARD_BYTES,
) -> Path:
    """Writes a checkpoint as a Hugging Face folder, and returns ``output``.

    Args:
        checkpoint: a ``step-N``, or the folder of a run, whose newest checkpoint is taken.
        output: must not exist; the folder gets this name when it is complete and on the disk.
        dtype: type of the weights: float64, float32, bfloat16 or float16.
        max_shard_bytes: largest size of the tensors in a file, unless it holds only one.

    Raises:
        ConfigError: the checkpoint is missing or damaged, ``output`` exists or cannot be written,
            or no Hugging Face architecture has such a model.
    """
    if dtype not in DTYPES.values():
        raise ConfigError("--dtype", dtype, "is not a dtype of weights", ", ".join(DTYPES.values()))
    check_output(output)
    files, weights = _prepare(named_step(Path(checkpoint)), dtype)
    with new_folder(output) as folder:
        for name, content in files.items():
            if isinstance(content, Path):
                shutil.copyfile(content, folder / name)
            else:
                write_json(folder / name, content)
        write_weights(
            folder, weights.tensors, weights.read, dtype=dtype, max_shard_bytes=max_shard_bytes
        )
        sync(folder)
    sync(output.parent)
    return output


def _prepare(step: Path, dtype: str) -> tuple[dict[str, Path | dict[str, Any]], _Weights]:
    """Checks that a checkpoint can be exported, and returns the files and weights of its folder.

    A file is a path to copy, or a JSON object.
    """
    manifest = read_manifest(step)
    config = saved_config(manifest, step)
    seq_length = config.data.seq_length
    chosen = tokenizer_of(config.data)
    family, entries = to_hf_config(
        config.model,
        vocab_size=manifest.vocab_size,
        seq_length=seq_length,
        eod=chosen.eod,
        dtype=dtype,
    )
    tensors = family.tensors(config.model, vocab_size=manifest.vocab_size, seq_length=seq_length)
    sources = _sources(step, manifest, tensors)
    verify_files(step, manifest, {chunk.file for x in sources.values() for chunk in x.chunks})
    tokenizer = _tokenizer_files(config)
    entries |= _token_ids(tokenizer)
    generation = {name: entries[name] for name in _TOKEN_IDS} | {"_from_model_config": True}
    files: dict[str, Path | dict[str, Any]] = {
        "config.json": entries,
        "generation_config.json": generation,
        **{path.name: path for path in tokenizer},
    }
    if config.data.tokenizer_type == "gpt2":
        files |= gpt2_tokenizer_files(chosen)
    if config.data.tokenizer_type == "byte":
        files |= _byte_tokenizer_files(max(config.model.max_position_embeddings or 0, seq_length))
    return files, _Weights(step=step, tensors=tensors, sources=sources, dtype=dtype)


def _byte_tokenizer_files(seq_length: int) -> dict[str, dict[str, Any]]:
    """Makes tokenizer.json and tokenizer_config.json of the byte tokenizer, as JSON objects.

    tokenizer.json cannot contain a byte that is not a printable character. So the 256 bytes are
    written in the alphabet of GPT-2 (Radford et al. 2019): a printable byte is the character of
    that number, and the other bytes are the characters from 256 on, in their order. A BPE over this
    alphabet without merges makes every byte a token, whose id is the byte::

        byte    "A" 65    "\\n" 10    0xC3 195
        token   A         Ċ (266)     Ã
    """
    level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True}
    level |= {"use_regex": False}
    end = {"id": ByteTokenizer.eod, "content": _END_TOKEN, "special": True, "normalized": False}
    end |= dict.fromkeys(("single_word", "lstrip", "rstrip"), False)
    body: dict[str, Any] = {
        "version": "1.0",
        **dict.fromkeys(("truncation", "padding")),
        "added_tokens": [end],
        "normalizer": None,
        "pre_tokenizer": level,
        "post_processor": None,
        "decoder": level,
        "model": {
            "type": "BPE",
            **dict.fromkeys(("dropout", "unk_token", "continuing_subword_prefix")),
            "end_of_word_suffix": None,
            **dict.fromkeys(("fuse_unk", "byte_fallback", "ignore_merges"), False),
            "vocab": {token: byte for byte, token in enumerate(_byte_alphabet())},
            "merges": [],
        },
    }
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "model_max_length": seq_length,
        "eos_token": _END_TOKEN,
        "clean_up_tokenization_spaces": False,
        # As in the byte tokenizer, a text that contains the name of the end token is only bytes.
        "split_special_tokens": True,
    }
    return {"tokenizer.json": body, "tokenizer_config.json": config}


def gpt2_tokenizer_files(tokenizer: Tokenizer) -> dict[str, dict[str, Any]]:
    """Makes tokenizer.json and tokenizer_config.json of GPT-2's vocabulary and merges."""
    assert isinstance(tokenizer, GPT2Tokenizer)
    special = dict.fromkeys(("bos_token", "eos_token", "unk_token"), tokenizer.end)
    config = {"tokenizer_class": "GPT2Tokenizer", **special}
    return {
        "tokenizer.json": json.loads(tokenizer.backend.to_str()),
        "tokenizer_config.json": config,
    }


def _byte_alphabet() -> str:
    """Returns the characters that stand for the bytes, in the order of the bytes."""
    printable = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    others = iter(range(256, 512))
    return "".join(chr(byte if byte in printable else next(others)) for byte in range(256))


def _tokenizer_files(config: Config) -> list[Path]:
    if config.data.tokenizer_type != "huggingface" or config.data.tokenizer_model is None:
        return []
    path = Path(config.data.tokenizer_model)
    folder = path if path.is_dir() else path.parent
    return [folder / name for name in TOKENIZER_FILES if (folder / name).is_file()]


def _token_ids(tokenizer: Sequence[Path]) -> dict[str, Any]:
    """The ids of special tokens that the config.json beside the tokenizer names."""
    try:
        entries = json.loads((tokenizer[0].parent / "config.json").read_bytes())
    except (IndexError, OSError, ValueError, RecursionError):
        return {}
    named = entries if isinstance(entries, dict) else {}
    return {key: named[key] for key in _TOKEN_IDS if named.get(key) is not None}


def _sources(step: Path, manifest: Manifest, tensors: Sequence[HFTensor]) -> dict[str, TensorEntry]:
    """The tensors of the checkpoint that are exported, by their names in the model."""
    sources: dict[str, TensorEntry] = {}
    for part in (part for tensor in tensors for part in tensor.parts):
        entry = manifest.tensors.get(f"model.{part.name}")
        fits = entry is not None and entry.shape[1:] == part.shape[1:]
        if entry is None or not fits or entry.shape[0] < part.start + part.shape[0]:
            rule = f"it has no model.{part.name} of shape {list(part.shape)}, as its config says"
            raise ConfigError(FLAG, step, rule, "another step")
        sources[part.name] = entry
    return sources


@dataclass(frozen=True, kw_only=True)
class _Weights:
    """The weights of a folder, and where they come from."""

    step: Path
    tensors: Sequence[HFTensor]  # of the folder, in order
    sources: Mapping[str, TensorEntry]  # of the checkpoint, by names in the model
    dtype: str

    def read(self, tensor: HFTensor) -> Tensor:
        """A tensor of the folder, read from the checkpoint."""
        whole = torch.empty(tensor.shape, dtype=getattr(torch, dtype_of(tensor, self.dtype)))
        joined = whole.transpose(-1, -2) if tensor.transposed else whole
        joined = joined.unsqueeze(0) if tensor.is_row else joined
        for number, part in enumerate(tensor.parts):
            place = (slice(None),) * tensor.dim + (tensor.place(number),)
            self._fill(joined[place], self.sources[part.name], part.start)
        return whole

    def _fill(self, target: Tensor, entry: TensorEntry, first: int) -> None:
        """Copies the rows of a tensor of the checkpoint from ``first`` on."""
        for chunk in entry.chunks:
            row, *columns = chunk.offsets
            start, stop = max(row, first), min(row + chunk.sizes[0], first + len(target))
            if start >= stop:  # another group, or the padding of the vocabulary
                continue
            try:
                with safe_open(self.step / chunk.file, framework="pt", device="cpu") as shard:
                    stored = shard.get_slice(chunk.key)
                    found = tuple(stored.get_shape()), DTYPES.get(stored.get_dtype())
                    rows = stored[start - row : stop - row]
            except (SafetensorError, OSError) as error:
                rule = f"{chunk.file} cannot be read ({error})"
                raise ConfigError(FLAG, self.step, rule) from None
            if found != (chunk.sizes, entry.dtype):
                rule = f"{chunk.file} holds {chunk.key} in another shape or dtype"
                raise ConfigError(FLAG, self.step, rule)
            spans = zip(columns, chunk.sizes[1:])
            box = (slice(start - first, stop - first), *(slice(x, x + n) for x, n in spans))
            target[box].copy_(rows)
