"""Whether the data of a run is so small that a dry run can read all of it."""

from __future__ import annotations

import os

from cp_megatron.config import DataConfig
from cp_megatron.data.read.text_files import walk_files
from cp_megatron.data.rows.dataset_paths import parse_datasets, path_lists

MOST_BYTES = 16 << 20
"""The most text that is read at once, which takes four seconds with a slow tokenizer."""
_INDEXED_BYTES = 1 << 28


def is_small(data: DataConfig) -> bool:
    """Whether all of the data is read within seconds; the paths have been checked."""
    for flag, words in path_lists(data):
        for spec in parse_datasets(words, flag, sft=data.sft):
            indexed = spec.kind == "indexed"
            paths = [f"{spec.paths[0]}.bin"] if indexed else spec.paths
            left = _INDEXED_BYTES if indexed else MOST_BYTES
            for path in paths:
                for file in [path] if os.path.isfile(path) else walk_files(path):
                    left -= os.path.getsize(file)
                    if left < 0:
                        return False
    return True
