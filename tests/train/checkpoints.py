"""Reads the files of a run without the code that wrote them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor


def tensors_of(step: Path) -> dict[str, Tensor]:
    """All tensors of a ``step-N``, put together from its shards."""
    manifest = json.loads((step / "manifest.json").read_text())["manifest"]
    shards = {name: safe_open(step / name, framework="pt") for name in manifest["files"]}
    found = {}
    for name, entry in manifest["tensors"].items():
        whole = torch.full(entry["shape"], torch.nan, dtype=getattr(torch, entry["dtype"]))
        for chunk in entry["chunks"]:
            place = tuple(slice(o, o + s) for o, s in zip(chunk["offsets"], chunk["sizes"]))
            whole[place] = shards[chunk["file"]].get_tensor(chunk["key"])
        found[name] = whole
    return found


def differing(one: Path, other: Path) -> list[str]:
    """Names of the tensors whose bits differ between two ``step-N`` of the same tensors."""
    here, there = tensors_of(one), tensors_of(other)
    assert here.keys() == there.keys()
    assert not any(tensor.isnan().any() for tensor in here.values())
    return [name for name in here if not torch.equal(here[name], there[name])]


def metrics_of(run: Path) -> list[dict[str, Any]]:
    """The lines of ``metrics.jsonl``."""
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def numbers(row: dict[str, Any]) -> dict[str, Any]:
    """The metrics of a line that depend on the settings only, not on the machine."""
    kept = ("step", "loss", "grad_norm", "lr", "tokens", "valid_loss")
    return {key: row[key] for key in kept if key in row}
