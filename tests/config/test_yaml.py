"""YAML: what is written is read back, and nothing else is."""

from __future__ import annotations

import math
import os
from pathlib import Path
from typing import Any

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from cp_megatron.config import Config
from cp_megatron.config.fields import Setting, settings
from cp_megatron.config.files.alternatives import ALTERNATIVES
from cp_megatron.config.files.presets import PRESETS
from cp_megatron.config.files.yaml_io import overlay, read_file, to_yaml
from cp_megatron.errors import ConfigError
from tests.config.yaml_text import from_yaml

TEXTS = st.text(
    st.characters(codec="utf-8", exclude_characters="\0"), min_size=1, max_size=12
).filter(lambda text: not text.startswith("-"))


def values_of(row: Setting) -> st.SearchStrategy[Any]:
    low, high = (end if math.isfinite(end) else None for end in (row.range.low, row.range.high))
    whole = (-(2**63) if low is None else low, 2**63 - 1 if high is None else high)
    kinds: dict[str, st.SearchStrategy[Any]] = {
        "bool": st.booleans(),
        "int": st.integers(*(int(end) for end in whole)),
        "float": st.floats(low, high, allow_nan=False, allow_infinity=False).filter(
            lambda number: number in row.range
        ),
        "str": st.sampled_from(row.choices) if row.choices else TEXTS,
    }
    value = kinds[row.kind]
    if row.count != 1:
        value = st.lists(value, min_size=row.count, max_size=row.count or 3).map(tuple)
    return st.none() | value if row.optional else value


def without_contradictions(values: dict[str, Any]) -> dict[str, Any]:
    """The values without all but one of the settings that exclude each other."""
    for group in ALTERNATIVES:
        active = [name for name in group if values.get(name)]
        values = {name: value for name, value in values.items() if name not in active[1:]}
    return values


CONFIGS = st.fixed_dictionaries(
    {}, optional={name: values_of(row) for name, row in settings().items()}
).map(lambda values: overlay(Config(), without_contradictions(values)))


@example(overlay(Config(), {"data_path": ("a\x85b", "\u2028")}))
@given(CONFIGS)
def test_round_trip(config: Config) -> None:
    assert from_yaml(to_yaml(config), "test") == config


@pytest.mark.parametrize("name", PRESETS)
def test_presets_round_trip(name: str) -> None:
    assert from_yaml(to_yaml(PRESETS[name]), "test") == PRESETS[name]


def test_what_is_left_out_comes_from_the_preset() -> None:
    config = from_yaml("preset: llama-1b\nmodel:\n  num_layers: 2\ndata:\n", "f")
    assert config == overlay(PRESETS["llama-1b"], {"num_layers": 2})
    assert from_yaml("", "f") == PRESETS["toy"]


def test_numbers_as_people_write_them() -> None:
    # YAML 1.1 reads the first as a text and the second as a whole number.
    config = from_yaml("optimizer: {lr: 3e-4, weight_decay: 0}", "f")
    assert config.optimizer.lr == 3e-4
    assert isinstance(config.optimizer.weight_decay, float)


HUGE = "0x" + "f" * 5000  # more digits than Python writes
# The tenth list stands for a billion words.
LAUGHS = "data:\n  data_path:\n  - &a0 [ha]\n" + "".join(
    f"  - &a{n} [{', '.join([f'*a{n - 1}'] * 10)}]\n" for n in range(1, 10)
)


@pytest.mark.timeout(20)
@pytest.mark.parametrize(
    ("text", "flag", "rule"),
    [
        ("model: {num_layer: 2}", "f: model.num_layer", "unknown key"),
        ("num_layers: 2", "f: num_layers", "unknown key"),
        ("data: {num_layers: 2}", "f: data.num_layers", "unknown key"),
        ("model: 3", "f: model", "keys and values"),
        ("[1, 2]", "f", "keys and values"),
        ("word", "f", "keys and values"),
        ("model: {num_layers: 2.5}", "f: model.num_layers", "whole number"),
        ("model: {num_layers: true}", "f: model.num_layers", "whole number"),
        ("model: {num_layers: '2'}", "f: model.num_layers", "whole number"),
        ("model: {num_layers: null}", "f: model.num_layers", "whole number"),
        ("model: {swiglu: 1}", "f: model.swiglu", "true or false"),
        ("optimizer: {lr: .inf}", "f: optimizer.lr", "finite"),
        ("optimizer: {lr: 0}", "f: optimizer.lr", "above 0"),
        ("model: {num_layers: 0}", "f: model.num_layers", "at least 1"),
        ("optimizer: {lr: true}", "f: optimizer.lr", "number"),
        ("train: {dtype: float16}", "f: train.dtype", "choices"),
        ("data: {data_path: a}", "f: data.data_path", "list of values"),
        ("data: {data_path: [1]}", "f: data.data_path", "must be text"),
        ("checkpoint: {save: '-x'}", "f: checkpoint.save", "dash"),
        ("preset: none-such", "f: preset", "choices"),
        ("model: {num_layers: 2, num_layers: 3}", "f", "is given twice"),
        ("model: {}\nmodel: {}", "f", "is given twice"),
        ("model: {", "f", "not valid YAML"),
        ("a: 2020-99-99", "f", "not valid YAML"),
        ("? [1]\n: 2", "f", "not valid YAML"),
        ("1: 2", "f: 1", "unknown key"),
        ('"a\\nb": 2', "f: a b", "unknown key"),
        ("!!python/object/apply:os.getcwd []", "f", "not valid YAML"),
        ("[" * 5000, "f", "not valid YAML"),
        ("\x00", "f", "not valid YAML"),
        ("a: !!bool maybe", "f", "not valid YAML"),
        (f"model: {{num_layers: {HUGE}}}", "f: model.num_layers", "64 bits"),
        (f"model: {{window_size: [{HUGE}, 0]}}", "f: model.window_size", "64 bits"),
        (f"model: {{rope_long_factor: [{HUGE}]}}", "f: model.rope_long_factor", "finite"),
        (f"model: {{swiglu: {HUGE}}}", "f: model.swiglu", "true or false"),
        (f"optimizer: {{lr: {HUGE}}}", "f: optimizer.lr", "finite"),
        (LAUGHS, "f", "repeat too much"),
        ("a: &a [*a]", "f", "repeat too much"),
    ],
)
def test_refusals(text: str, flag: str, rule: str) -> None:
    with pytest.raises(ConfigError) as caught:
        from_yaml(text, "f")
    assert rule in caught.value.rule
    assert caught.value.flag == flag


@pytest.mark.timeout(20)
@pytest.mark.parametrize("kind", ["pipe", "device", "large"])
def test_only_a_file_of_a_sane_size_is_read(kind: str, tmp_path: Path) -> None:
    path = tmp_path / "file"
    if kind == "pipe":
        os.mkfifo(path)
    elif kind == "device":
        path.symlink_to("/dev/zero")
    else:
        path.write_bytes(b"")
        os.truncate(path, 1 << 40)
    with pytest.raises(ConfigError, match=r"--config .*: is not a regular file of at most"):
        read_file(path, "--config")


@given(st.text(max_size=40))
def test_any_text_is_a_configuration_or_one_error(text: str) -> None:
    try:
        config = from_yaml(text, "f")
    except ConfigError:
        return
    assert type(config) is Config
