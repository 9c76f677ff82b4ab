"""config.json as a literal: what is read from it, and what is written for the model that it is."""

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
"""What real folders say alike."""


def read(folder: Path, entries: Mapping[str, Any]) -> HFModel:
    (folder / "config.json").write_text(json.dumps({**SHARED, **entries}))
    return read_hf_config(folder)


def check(folder: Path, entries: Mapping[str, Any], **flags: Any) -> dict[str, Any]:
    """Reads the entries, which set these flags, and returns what is written for the model."""
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
    """No architecture has the model; the flag is what the nearest one does not express."""
    with pytest.raises(ConfigError, match="no supported Hugging Face architecture") as caught:
        to_hf_config(model, vocab_size=300, seq_length=8, eod=1)
    assert caught.value.flag == flag


def model_of(folder: Path, entries: Mapping[str, Any], **changes: Any) -> ModelConfig:
    """The flags of exactly these entries, all of which are read."""
    (folder / "config.json").write_text(json.dumps({**entries, **changes}))
    found = read_hf_config(folder)
    assert found.unread == ()
    return found.model


def written(model: ModelConfig, model_type: str) -> dict[str, Any]:
    """What is written for a model that the family of this name has."""
    family, entries = to_hf_config(model, vocab_size=model.vocab_size or 0, seq_length=8, eod=2)
    assert family.model_type == model_type
    return entries
