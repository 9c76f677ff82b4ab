"""Runs that start from a Hugging Face folder: what is refused before torch is imported."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import save_file

from cp_megatron.cli.parse import parse_arguments
from cp_megatron.comm.runtime import Launch
from cp_megatron.config.files.presets import PRESETS
from cp_megatron.config.files.yaml_io import to_yaml
from cp_megatron.errors import ConfigError
from cp_megatron.families.registry import to_hf_config
from cp_megatron.preflight.check import check
from cp_megatron.preflight.run_plan import RunPlan
from tests.config.yaml_text import from_yaml

VOCAB = 300
LISTS = [*("--rope-short-factor", "1", "2", "3"), *("--rope-long-factor", "1", "2", "3")]
SCALED = ["--rope-scaling-factor", "4"]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A tiny Qwen3 of zeros."""
    model = dataclasses.replace(
        PRESETS["toy"].model, hidden_size=32, kv_channels=6, qk_layernorm=True, num_layers=1
    )
    family, config = to_hf_config(model, vocab_size=VOCAB, seq_length=64, eod=0)
    (tmp_path / "config.json").write_text(json.dumps(config))
    tensors = family.tensors(model, vocab_size=VOCAB, seq_length=64)
    weights = {tensor.key: np.zeros(tensor.shape, np.float32) for tensor in tensors}
    save_file(weights, tmp_path / "model.safetensors")
    return tmp_path


def plan(folder: Path, *words: str) -> RunPlan:
    arguments = parse_arguments(["--load-hf", str(folder), *words])
    launch = Launch(world_size=1, local_world_size=1, under_torchrun=False)
    return check(arguments.config, launch, given=arguments.given, argv=words)


def test_a_balance_that_is_not_used_is_noted(folder: Path) -> None:
    mixture = dataclasses.replace(
        PRESETS["toy-moe"].model,
        hidden_size=32,
        kv_channels=6,
        qk_layernorm=True,
        num_layers=1,
        moe_router_topk_scaling_factor=None,
        moe_shared_expert_intermediate_size=None,
    )
    family, config = to_hf_config(mixture, vocab_size=VOCAB, seq_length=64, eod=0)
    config["router_aux_loss_coef"] = 0.001
    (folder / "config.json").write_text(json.dumps(config))
    tensors = family.tensors(mixture, vocab_size=VOCAB, seq_length=64)
    weights = {tensor.key: np.zeros(tensor.shape, np.float32) for tensor in tensors}
    save_file(weights, folder / "model.safetensors")
    told = "config.json names router_aux_loss_coef 0.001; none is used without --moe-aux-loss-coeff"
    assert told in plan(folder).notes
    assert told not in plan(folder, "--moe-aux-loss-coeff", "1e-3").notes


def test_the_folder_says_the_model(folder: Path) -> None:
    found = plan(folder, "--seq-length", "128")
    model = found.config.model
    assert (model.qk_layernorm, model.kv_channels, model.vocab_size) == (True, 6, VOCAB)
    assert (found.vocab_size, found.padded_vocab_size) == (VOCAB, 384)
    assert any("made for 64 positions" in note for note in found.notes)
    assert any("has no tokenizer" in note for note in found.notes)
    config = json.loads((folder / "config.json").read_text()) | {"dual_chunk_attention_config": [1]}
    (folder / "config.json").write_text(json.dumps(config))
    assert any("dual_chunk_attention_config = [1]" in note for note in plan(folder).notes)
    assert model.hf_model_type == "qwen3"
    # What the run writes down is enough to go on without the folder.
    assert from_yaml(to_yaml(found.config), "test").model == model


def test_the_family_of_the_export(folder: Path) -> None:
    assert plan(folder, "--hf-model-type", "qwen3").config.model.hf_model_type == "qwen3"
    with pytest.raises(ConfigError, match="phi3: has no model with --qk-layernorm"):
        plan(folder, "--hf-model-type", "phi3")
    with pytest.raises(ConfigError, match=r"--hf-model-type phi: is not supported .works: llama"):
        plan(folder, "--hf-model-type", "phi")


def test_what_extends_a_context_may_be_changed(folder: Path) -> None:
    words = ["--rope-type", "yarn", *SCALED, "--rotary-base", "9000", "--window-size", "8", "0"]
    model = plan(folder, *words, "--seq-length", "256").config.model
    assert (model.rope_type, model.rotary_base, model.window_size) == ("yarn", 9000.0, (8, 0))
    assert model.original_length == 64
    listed = ["--rope-type", "longrope", *LISTS]
    assert plan(folder, *listed).config.model.rope_long_factor == (1.0, 2.0, 3.0)


def test_a_file_may_name_the_folder(folder: Path) -> None:
    recipe = folder / "recipe.yaml"
    text = (
        f"checkpoint: {{load_hf: {folder}}}\nmodel: {{rope_type: linear, rope_scaling_factor: 2}}"
    )
    recipe.write_text(text)
    model = parse_arguments(["--config", str(recipe)]).config.model
    assert (model.rope_type, model.qk_layernorm) == ("linear", True)


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["--num-layers", "2"], "--num-layers 2: contradicts the weights of --load-hf"),
        (["--no-qk-layernorm"], "--no-qk-layernorm: contradicts the weights"),
        (["--vocab-size", "301"], "--vocab-size 301: contradicts the weights"),
        (["--load", "run"], "starts a new run, but --load run continues one"),
        (["--beta-fast", "16"], "--beta-fast 16.0: has no effect with --rope-type default"),
        (["--no-rope-truncate"], "--no-rope-truncate: has no effect"),
        (["--rope-type", "linear"], "--rope-type linear: needs --rope-scaling-factor"),
        (["--rope-type", "linear", "--rope-scaling-factor", "0.5"], "must be at least 1"),
        (["--rope-type", "yarn", *SCALED, "--beta-slow", "64"], "at least --beta-slow 64"),
        (
            ["--rope-type", "yarn", *SCALED, "--mscale", "1"],
            "--mscale 1.0: has an effect only with",
        ),
        (
            ["--rope-type", "llama3", *SCALED, "--rope-low-freq-factor", "5"],
            "must be above --rope-low-freq-factor 5",
        ),
        (["--rope-type", "longrope", *LISTS[:4]], "needs 3 positive numbers"),
        (["--rope-type", "longrope", *LISTS[:-1]], "needs 3 positive numbers"),
        (["--rope-type", "none"], "must be one of its choices"),
        (["--max-position-embeddings", "16"], "must be at least --seq-length"),
        (["--rotary-percent", "0.5"], "rotates 3 of 6 channels of a head, which must be an even"),
    ],
)
def test_contradictions(folder: Path, words: list[str], told: str) -> None:
    with pytest.raises(ConfigError) as caught:
        plan(folder, *words)
    assert told in str(caught.value)
    assert "\n" not in str(caught.value)


def test_rope_scaling_without_rope() -> None:
    words = ["--preset", "toy-gpt", "--rope-type", "linear", *SCALED]
    arguments = parse_arguments(words)
    launch = Launch(world_size=1, local_world_size=1, under_torchrun=False)
    with pytest.raises(ConfigError, match="--position-embedding-type learned_absolute"):
        check(arguments.config, launch, given=arguments.given)


def test_a_vocabulary_too_small_for_the_tokenizer() -> None:
    arguments = parse_arguments(["--preset", "toy", "--vocab-size", "100"])
    launch = Launch(world_size=1, local_world_size=1, under_torchrun=False)
    with pytest.raises(ConfigError, match="has 257 ids, but the model knows only 100"):
        check(arguments.config, launch, given=arguments.given)


def test_layers_without_end_are_not_counted_one_by_one(folder: Path) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"num_hidden_layers": 10**9}))
    with pytest.raises(ConfigError, match="1000000000 layers, but the folder has only"):
        plan(folder)


def test_damage_is_found_before_the_run(folder: Path) -> None:
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-1])
    with pytest.raises(ConfigError, match=r"model\.safetensors is truncated, damaged or not"):
        plan(folder)
