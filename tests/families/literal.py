"""Helpers of the tests of families whose config.json is a literal: what is read and written."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from cp_megatron.config import ModelConfig
from cp_megatron.errors import ConfigError
from cp_megatron.families.registry import HFModel, read_hf_config, to_hf_config

SHARED: Mapping[str, Any] = {
    "attention_dropout": 0.0,
    "hidden_act": "silu",
    "initializer_range": 0.02,
    "transformers_version": "4.56.0",
    "use_cache": True,
}
"""Entries that real folders have in common."""


def read(folder: Path, entries: Mapping[str, Any]) -> HFModel:
    (folder / "config.json").write_text(json.dumps({**SHARED, **entries}))
    return read_hf_config(folder)


def check(folder: Path, entries: Mapping[str, Any], **flags: Any) -> dict[str, Any]:
    """Reads the entries, expects the flags, and returns the entries that the model's export has."""
    found = read(folder, entries)
    assert found.unread == ()
    assert {name: getattr(found.model, name) for name in flags} == flags
    family, written = to_hf_config(
        found.model, vocab_size=found.vocab_size, seq_length=8, eod=entries.get("eos_token_id")
    )
    assert family is found.family
    assert read(folder, written).model == found.model
    return written


def refused(folder: Path, entries: Mapping[str, Any], told: str) -> None:
    with pytest.raises(ConfigError, match=told) as caught:
        read(folder, entries)
    assert str(caught.value).startswith(f"--load-hf {folder}: config.json")


def differs(model: ModelConfig, flag: str) -> None:
    """Expects that no architecture has the model; the nearest one does not express this flag."""
    with pytest.raises(ConfigError, match="no supported Hugging Face architecture") as caught:
        to_hf_config(model, vocab_size=300, seq_length=8, eod=1)
    assert caught.value.flag == flag


def model_of(folder: Path, entries: Mapping[str, Any], **changes: Any) -> ModelConfig:
    """The flags of these entries without ``SHARED``. All of them must be read."""
    (folder / "config.json").write_text(json.dumps({**entries, **changes}))
    found = read_hf_config(folder)
    assert found.unread == ()
    return found.model


def written(model: ModelConfig, model_type: str) -> dict[str, Any]:
    """The entries that the export of a model has; it must be of the family of this name."""
    family, entries = to_hf_config(model, vocab_size=model.vocab_size or 0, seq_length=8, eod=2)
    assert family.model_type == model_type
    return entries
