"""Runs start in a new folder or continue in their own; nothing is mixed up or overwritten."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
from torch import nn

from cp_megatron.checkpoint.find_checkpoint import CheckpointChoice
from cp_megatron.checkpoint.manifest import read_manifest
from cp_megatron.checkpoint.save import start_save
from cp_megatron.cli.parse import parse_arguments
from cp_megatron.config import Config
from cp_megatron.config.files.yaml_io import overlay, to_yaml
from cp_megatron.errors import ConfigError
from cp_megatron.plan import Grid
from cp_megatron.preflight.save_and_load import (
    check_optimizer,
    check_resume,
    check_save,
    data_changes,
    find_load,
    fresh_run_folder,
)

VOCAB = 257


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """The folder of a run of the preset toy-gpt with checkpoints at steps 20 and 40."""
    config = parse_arguments(["--preset", "toy-gpt"]).config
    folder = tmp_path / "run"
    folder.mkdir()
    (folder / "config.yaml").write_text(to_yaml(config))
    for step in (20, 40):
        start_save(
            folder,
            step=step,
            consumed=4 * step,
            model=nn.Linear(2, 2),
            optimizer=None,
            config=config,
            grid=Grid(),
            data_fingerprint="",
            vocab_size=VOCAB,
        ).wait()
    return folder


def config_of(*argv: str) -> Config:
    return parse_arguments(argv).config


def check_load(config: Config, vocab_size: int) -> CheckpointChoice | None:
    """Finds the checkpoint and checks it, as the checks before a run do."""
    newest = find_load(config)
    if newest is not None:
        check_resume(config, newest.manifest, vocab_size)
    return newest


def checked(config: Config) -> None:
    loaded = check_load(config, VOCAB)
    check_save(config, loaded)


def refused(config: Config) -> ConfigError:
    with pytest.raises(ConfigError) as caught:
        checked(config)
    return caught.value


def test_the_newest_checkpoint_of_a_run(run: Path) -> None:
    config = config_of("--load", str(run))
    loaded = check_load(config, VOCAB)
    assert loaded is not None
    assert (loaded.folder, loaded.manifest.step) == (run / "step-40", 40)
    check_save(config, loaded)
    assert check_load(config_of(), VOCAB) is None


def test_an_earlier_checkpoint_goes_on_elsewhere(run: Path, tmp_path: Path) -> None:
    error = refused(config_of("--load", f"{run}/step-20"))
    assert error.flag == "--load"
    assert f"--load {run}" in error.works
    config = config_of("--load", f"{run}/step-20", "--save", str(tmp_path / "new"))
    loaded = check_load(config, VOCAB)
    assert loaded is not None
    check_save(config, loaded)


@pytest.mark.parametrize(
    ("argv", "spelled", "works"),
    [
        (["--num-layers", "5"], "--num-layers 5", "--num-layers 4"),
        (["--ffn-hidden-size", "64"], "--ffn-hidden-size 64", "--ffn-hidden-size 512"),
        (["--disable-bias-linear"], "--disable-bias-linear", "--no-disable-bias-linear"),
        (["--seq-length", "2048"], "--seq-length 2048", "--seq-length 1024"),
        (["--normalization", "RMSNorm"], "--normalization RMSNorm", "--normalization LayerNorm"),
    ],
)
def test_another_model(run: Path, argv: list[str], spelled: str, works: str) -> None:
    error = refused(config_of("--load", str(run), *argv))
    assert (error.flag, error.works) == (spelled, works)
    assert "another model" in error.rule


def test_the_balance_of_experts_may_change(run: Path) -> None:
    changed = ["--moe-aux-loss-coeff", "0.1", "--moe-z-loss-coeff", "0.1"]
    changed += ["--moe-router-load-balancing-type", "aux_loss", "--moe-router-dtype", "fp64"]
    changed += ["--moe-router-bias-update-rate", "0.1"]
    checked(config_of("--load", str(run), *changed))
    error = refused(config_of("--load", str(run), "--moe-router-topk", "3"))
    assert error.works == "--moe-router-topk 2"


def test_another_optimizer(run: Path) -> None:
    manifest = read_manifest(run / "step-40")
    check_optimizer(config_of("--load", str(run)), manifest)
    with pytest.raises(ConfigError) as caught:
        check_optimizer(config_of("--load", str(run), "--optimizer", "muon"), manifest)
    assert (caught.value.flag, caught.value.value) == ("--optimizer", "muon")
    assert caught.value.works.startswith("--optimizer adam, or launch/convert.py")
    older = dataclasses.replace(manifest, config={})  # of before there was a choice
    check_optimizer(config_of("--load", str(run)), older)


@pytest.mark.parametrize("original", [None, 64])
def test_the_original_length_of_a_scaled_rope(run: Path, original: int | None) -> None:
    """It decides the frequencies, and without a flag of its own it is the number of positions."""
    scaled = ["--preset", "toy", "--rope-type", "yarn", "--rope-scaling-factor", "2"]
    if original is not None:
        scaled += ["--original-max-position-embeddings", str(original)]
    before, after = (
        config_of(*scaled, "--max-position-embeddings", length) for length in ("1024", "2048")
    )
    manifest = read_manifest(run / "step-40")
    manifest = dataclasses.replace(manifest, config=dataclasses.asdict(before))
    check_resume(before, manifest, VOCAB)
    if original is not None:
        check_resume(after, manifest, VOCAB)
        return
    with pytest.raises(ConfigError, match="another model") as caught:
        check_resume(after, manifest, VOCAB)
    assert caught.value.works == "--original-max-position-embeddings 1024"


def test_the_same_model_said_otherwise(run: Path) -> None:
    same = ["--ffn-hidden-size", "512", "--num-query-groups", "4", "--kv-channels", "32"]
    changed = ["--hidden-dropout", "0.1", "--max-position-embeddings", "1024"]
    assert check_load(config_of("--load", str(run), *same, *changed), VOCAB)


def test_a_note_about_rows_that_are_cut_anew(run: Path) -> None:
    manifest = read_manifest(run / "step-20")
    assert data_changes(config_of("--preset", "toy-gpt"), manifest) == ()
    now = config_of("--preset", "toy-gpt", "--seq-length", "512", "--seed", "7")
    (note,) = data_changes(now, manifest)
    assert note.startswith("--seed is 7, was 1234, --seq-length is 512, was 1024: ")
    assert "row 80" in note
    (note,) = data_changes(config_of("--preset", "toy-gpt", "--global-batch-size", "6"), manifest)
    assert note == "--global-batch-size is 6, was 4: step 21 begins at row 80 of the data"


def test_another_vocabulary(run: Path) -> None:
    with pytest.raises(ConfigError, match="257 tokens, this run's has 300"):
        check_load(config_of("--load", str(run)), 300)


def test_a_run_without_a_checkpoint_names_those_that_have_one(run: Path, tmp_path: Path) -> None:
    empty = tmp_path / "empty"
    empty.mkdir()
    (empty / "config.yaml").write_text(to_yaml(config_of()))
    error = refused(config_of("--load", str(empty)))
    assert (error.flag, error.works) == ("--load", str(run))


def test_a_folder_that_holds_something_is_not_saved_into(run: Path, tmp_path: Path) -> None:
    error = refused(config_of("--save", str(run)))
    assert error.flag == "--save"
    assert f"--load {run}" in error.works
    (tmp_path / "other").mkdir()
    check_save(config_of("--save", str(tmp_path / "other")), None)
    (tmp_path / "other" / "mine.txt").touch()
    assert refused(config_of("--save", str(tmp_path / "other"))).works == "a new folder"
    assert (
        refused(config_of("--load", str(run), "--save", str(tmp_path / "other"))).flag == "--save"
    )


def test_a_file_is_no_folder(run: Path, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    for place in ("file", "file/deeper"):
        assert refused(config_of("--save", str(tmp_path / place))).flag == "--save"


@pytest.mark.parametrize("name", ["x" * 300, "new/" + "x" * 300, "/".join(["x" * 200] * 30)])
def test_a_name_that_is_too_long(tmp_path: Path, name: str) -> None:
    place = str(tmp_path / name)
    assert refused(config_of("--save", place)).flag == "--save"
    with pytest.raises(ConfigError, match="is not a run's folder"):
        config_of("--load", place)


@pytest.mark.parametrize(
    "saved",
    [
        {},
        {"model": 3, "data": {}},
        {"model": {"num_layers": "four"}, "data": {}},
        {"model": {"num_attention_heads": 0}, "data": {}},
    ],
)
def test_a_manifest_without_a_usable_model(run: Path, saved: dict[str, object]) -> None:
    manifest = dataclasses.replace(read_manifest(run / "step-40"), config=saved)
    with pytest.raises(ConfigError, match="does not describe a model") as caught:
        check_resume(config_of("--load", str(run)), manifest, VOCAB)
    assert caught.value.flag == "--load"


def test_the_first_number_that_is_free(tmp_path: Path) -> None:
    assert fresh_run_folder(tmp_path, "toy") == tmp_path / "toy-1"
    (tmp_path / "toy-1").mkdir()
    (tmp_path / "toy-2").symlink_to(tmp_path / "gone")
    assert fresh_run_folder(tmp_path, "toy") == tmp_path / "toy-3"
    assert not (tmp_path / "toy-3").exists()


def test_overlay_keeps_the_rest() -> None:
    assert overlay(config_of(), {}) == config_of()
