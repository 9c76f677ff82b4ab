"""Writes the batch of a step that ended a run."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import save_file

from cp_megatron.data.rows.sampler import IGNORED, RowSource


def save_batch(
    file: Path, rows: RowSource, numbers: range, *, document_mask: bool, about: Mapping[str, object]
) -> None:
    """Writes a whole global batch, so that a step that ended a run can be examined and replayed.

    The file contains ``tokens`` and ``labels``, int64 [rows, S], and ``rows``, int64 [rows].

    Args:
        numbers: the numbers of the batch's rows.
        document_mask: documents are masked, so the last token of each has no label.
        about: entries for the file's metadata.

    Raises:
        OSError: the file cannot be written.
    """
    chosen = [rows[number] for number in numbers]
    labels = np.stack([row.labels for row in chosen])
    if document_mask:
        for place, row in enumerate(chosen):
            labels[place, row.crossing] = IGNORED
    tensors = {
        "tokens": torch.from_numpy(np.stack([row.inputs for row in chosen])),
        "labels": torch.from_numpy(labels),
        "rows": torch.tensor(numbers, dtype=torch.int64),
    }
    new = file.with_name(f"{file.name}.tmp")
    save_file(tensors, new, metadata={name: str(value) for name, value in about.items()})
    new.replace(file)
