"""Loads the weights of a Hugging Face folder into a model on any grid.

The folder is described as a checkpoint of ours (``hf_folder``). torch.distributed.checkpoint then
plans which box of which tensor each rank reads, as for a checkpoint of another grid.
"""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.checkpoint.planner import ReadItem

from cp_megatron.checkpoint.hf_folder import TORCH_SUFFIX, Source, find_weights
from cp_megatron.checkpoint.manifest import ChunkEntry
from cp_megatron.checkpoint.object_collectives import Group, on_all_ranks
from cp_megatron.checkpoint.shard_reader import ShardReader, read_shards
from cp_megatron.checkpoint.torch_file_reader import TorchFileReader
from cp_megatron.errors import ConfigError
from cp_megatron.families.json_fields import FLAG
from cp_megatron.families.registry import HFModel, read_hf_config


def load_hf(folder: str | Path, *, model: nn.Module, process_group: Group = None) -> None:
    """Fills a model in place; each rank reads its part. All ranks call it.

    Args:
        folder: holds config.json and weights of any float dtype, in one file or in shards.
        model: a ``Transformer`` of that config with storage, or a pipeline stage of it. The rows
            that pad its vocabulary become zero.
        process_group: the ranks that load; by default all.

    Raises:
        ConfigError: the folder is damaged, or of another model; all ranks raise the same error.
    """
    found = on_all_ranks(lambda: read_hf_config(folder), process_group)
    read_into(model, found, process_group)


def read_into(model: nn.Module, found: HFModel, process_group: Group = None) -> None:
    """Fills a model from a folder whose config.json is read; see ``load_hf``."""
    state = {name: value.detach() for name, value in model.state_dict().items()}
    config = getattr(model, "config")  # noqa: B009 - attributes of a module have no types
    # A stage in the middle has no table of the vocabulary, and reads none.
    tables = (state[name] for name in ("embedding.weight", "head.weight") if name in state)
    rows = next((table.shape[0] for table in tables), found.vocab_size)

    def find() -> dict[str, Source]:
        if found.vocab_size > rows:
            rule = f"its vocabulary has {found.vocab_size} tokens, the model's has {rows}"
            raise ConfigError(FLAG, found.folder, rule)
        sources = find_weights(found, config, padded_vocab_size=rows)
        assert sources.keys() >= state.keys(), "the model is built from its description"
        return {name: source for name, source in sources.items() if name in state}

    sources = on_all_ranks(find, process_group)
    with torch.no_grad():
        for name, source in sources.items():
            if source.entry.shape[0] > sum(chunk.sizes[0] for chunk in source.entry.chunks):
                state[name].zero_()  # the chunk leaves rows that pad the vocabulary
    read_shards(state, _FolderReader(found.folder, sources), flag=FLAG, group=process_group)


class _FolderReader(ShardReader):
    """Reads boxes of our parameters out of tensors that may be fused, transposed or single rows.

    Only the bytes of a box are read, so that a rank reads its own experts; of parts that alternate
    within a row, it reads all.
    """

    def __init__(self, folder: str, sources: Mapping[str, Source]) -> None:
        super().__init__(Path(folder), {name: source.entry for name, source in sources.items()})
        self._sources = sources

    def _open(self, file: str) -> AbstractContextManager[Any]:
        if Path(file).suffix == TORCH_SUFFIX:
            return TorchFileReader.open(self.folder / file)
        return super()._open(file)

    def _read_box(self, shard: Any, item: ReadItem, chunk: ChunkEntry) -> Tensor:
        places = self._sources[item.storage_index.fqn].places
        tensor, number = places[chunk.key, chunk.offsets[0]]
        stored = shard.get_slice(chunk.key)
        if tuple(stored.get_shape()) != tensor.shape:
            rule = f"{chunk.file} changed while it was read: {chunk.key} has another shape"
            raise ConfigError(FLAG, self.folder, rule)
        spans = zip(item.storage_offsets, item.lengths)
        box = [slice(start, start + length) for start, length in spans]
        if tensor.is_row:
            row: Tensor = stored[tuple(box[1:])]
            return row.unsqueeze(0)
        place, wanted = tensor.place(number), box[tensor.dim]
        first, last = (place.start + place.step * x for x in (wanted.start, wanted.stop - 1))
        box[tensor.dim] = slice(first, last + 1)
        if tensor.transposed:
            box[-2:] = box[:-3:-1]
        part: Tensor = stored[tuple(box)]
        part = part.transpose(-1, -2) if tensor.transposed else part
        return part[(slice(None),) * tensor.dim + (slice(None, None, place.step),)]
