"""The command line: the values that it reads and the mistakes that it refuses."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cp_megatron.cli.parse import (
    PRETRAIN,
    Arguments,
    LaunchOptions,
    parse_arguments,
    read_arguments,
)
from cp_megatron.cli.programs import CONVERT, EVALUATE, GENERATE
from cp_megatron.config import Config
from cp_megatron.config.fields import settings, settings_of
from cp_megatron.config.files.presets import PRESETS
from cp_megatron.config.files.yaml_io import to_yaml
from cp_megatron.config.help_page import HELP
from cp_megatron.errors import CombinedError, ConfigError
from tests.config.yaml_text import from_yaml

TOY = ["--preset", "toy"]


def refused(*argv: str) -> ConfigError:
    with pytest.raises(ConfigError) as caught:
        parse_arguments(argv)
    return caught.value


def test_nothing_given_is_the_toy_preset() -> None:
    arguments = parse_arguments([])
    assert arguments == Arguments(config=PRESETS["toy"], given=frozenset(), options=LaunchOptions())


@pytest.mark.parametrize(
    "argv",
    [
        ["--preset", "toy", "--num-layers", "7", "--lr", "1e-4", "--dtype", "float64", "--swiglu"],
        ["--preset=toy", "--num-layers=7", "--lr=1e-4", "--dtype=float64", "--swiglu"],
    ],
)
def test_values_in_both_spellings(argv: list[str]) -> None:
    arguments = parse_arguments(argv)
    config = arguments.config
    assert (config.model.num_layers, config.optimizer.lr) == (7, 1e-4)
    assert (config.train.dtype, config.model.swiglu) == ("float64", True)
    assert arguments.given == {"--preset", "--num-layers", "--lr", "--dtype", "--swiglu"}


def test_a_switch_of_a_preset_is_switched_off() -> None:
    config = parse_arguments(["--preset", "llama-1b", "--no-swiglu"]).config
    assert not config.model.swiglu
    assert config.model.normalization == "RMSNorm"


def test_a_value_of_a_preset_goes_back_to_its_default() -> None:
    argv = ["--preset", "llama-1b", "--num-query-groups", "None"]
    assert parse_arguments(argv).config.model.num_query_groups is None


def test_several_paths_end_at_the_next_flag() -> None:
    config = parse_arguments(["--data-path", "a b", "c", "--seed", "3"]).config
    assert (config.data.data_path, config.train.seed) == (("a b", "c"), 3)
    assert parse_arguments(["--data-path=a", "b"]).config.data.data_path == ("a", "b")


def test_negative_numbers_are_values() -> None:
    argv = [*TOY, "--window-size", "-1", "0", "--rope-short-factor=-.5", "-1"]
    model = parse_arguments(argv).config.model
    assert (model.window_size, model.rope_short_factor) == ((-1, 0), (-0.5, -1.0))
    assert refused("--lr", "-1").rule == "must be above 0"


def test_megatrons_spellings() -> None:
    arguments = parse_arguments(
        ["--tensor-model-parallel-size=2", "--deterministic-mode", "--cp-comm-type", "allgather"]
    )
    parallel = arguments.config.parallel
    assert (parallel.tensor_parallel_size, parallel.cp_comm_type) == (2, "all_gather")
    assert arguments.config.train.deterministic
    assert arguments.given == {"--tensor-parallel-size", "--deterministic", "--cp-comm-type"}


@pytest.mark.parametrize("window", [["-1", "0"], ["-1,0"], ["(-1,0)"]])
def test_a_window_is_two_numbers(window: list[str]) -> None:
    argv = [*TOY, "--window-size", *window, "--hierarchical-context-parallel-sizes", "2", "4"]
    config = parse_arguments([*argv, "--seed", "3"]).config
    assert (config.model.window_size, config.train.seed) == ((-1, 0), 3)
    assert config.parallel.hierarchical_context_parallel_sizes == (2, 4)
    assert from_yaml(to_yaml(config), "test") == config
    assert parse_arguments([*TOY, "--window-size", "None"]).config.model.window_size is None


@pytest.mark.parametrize(
    ("words", "on"),
    [
        *((["--plot", word], True) for word in ("true", "True", "1", "yes")),
        *((["--plot", word], False) for word in ("false", "FALSE", "0", "no")),
        (["--plot=true"], True),
        (["--no-plot", "true"], False),
        (["--no-plot=false"], True),
    ],
)
def test_a_switch_may_have_a_word(words: list[str], on: bool) -> None:
    assert parse_arguments(words).config.log.plot is on


def test_bf16_is_a_dtype() -> None:
    for argv in (
        ["--bf16"],
        ["--bf16", "True"],
        ["--bf16", "--dtype", "bfloat16"],
        ["--dtype", "bfloat16"],
    ):
        train = parse_arguments(argv).config.train
        assert (train.dtype, train.bf16) == ("bfloat16", False)


@pytest.mark.parametrize(
    ("argv", "flag", "value", "works"),
    [
        (["--seq-lenght", "20"], "--seq-lenght", "20", "--seq-length"),
        (["--num_layers=3"], "--num_layers", "3", "--num-layers"),
        (["--num-layer", "3"], "--num-layer", "3", "--num-layers"),
        (["-x"], "-x", "", "see --help"),
        (["--"], "--", "", ""),
        (["--num-layers"], "--num-layers", "", "--num-layers INT"),
        (["--num-layers", "--lr", "1"], "--num-layers", "", "--num-layers INT"),
        (["--data-path"], "--data-path", "", "--data-path TEXT [TEXT ...]"),
        (["--num-layers", "1e3"], "--num-layers", "1e3", "1000"),
        (["--num-layers", "four"], "--num-layers", "four", ""),
        (["--num-layers", "9" * 5000], "--num-layers", "9" * 5000, ""),
        (["--lr", "nan"], "--lr", "nan", ""),
        (["--lr-warmup-fraction", "1.5"], "--lr-warmup-fraction", "1.5", "0"),
        (["--lr="], "--lr", "", ""),
        (["--save="], "--save", "", ""),
        (["--save=-x"], "--save", "-x", "./-x"),
        (["--save", "\udcff"], "--save", "\udcff", ""),
        (["--dtype", "fp32"], "--dtype", "fp32", "auto, float64, float32, bfloat16"),
        (["--cp-comm-type", "nvlink"], "--cp-comm-type", "nvlink", "auto, p2p, all_gather, a2a"),
        (["--window-size", "5"], "--window-size", "5", "--window-size INT INT"),
        (["--window-size", "1,2,3"], "--window-size", "1 2 3", "--window-size INT INT"),
        (["--window-size", "1", "b"], "--window-size", "b", ""),
        (["--window-size", "1", "2", "3"], "--window-size", "1 2 3", "--window-size INT INT"),
        (["--window-size"], "--window-size", "", "--window-size INT INT"),
        (["--dtype"], "--dtype", "", "auto, float64, float32, bfloat16"),
        (["--swiglu=maybe"], "--swiglu", "maybe", "--swiglu or --no-swiglu"),
        (["--swiglu", "true", "1"], "--swiglu", "true 1", "--swiglu or --no-swiglu"),
        (["train"], "argument", "train", "--flag value"),
        (["--lr", "1", "2"], "--lr", "1 2", "--lr FLOAT"),
        (["--lr", "1", "--lr", "2"], "--lr", "2", "--lr 1, or --lr 2"),
        (["--swiglu", "--no-swiglu"], "--no-swiglu", "", "--swiglu, or --no-swiglu"),
        (["--bf16", "--dtype", "float32"], "--bf16", "", "one of the two"),
        (["--no-bf16", "--dtype", "bfloat16"], "--no-bf16", "", "--dtype float32"),
        (["--preset", "big"], "--preset", "big", ", ".join(PRESETS)),
        (["--world-size", "8"], "--world-size", "8", "--dry-run"),
    ],
)
def test_refusals(argv: list[str], flag: str, value: str, works: str) -> None:
    error = refused(*argv)
    assert (error.flag, str(error.value)) == (flag, value)
    assert works in error.works
    assert error.rule


@pytest.mark.parametrize("base", ["--load-hf", "--load", "--config"])
def test_no_default_stands_for_a_file_that_cannot_be_read(base: str, tmp_path: Path) -> None:
    """The toy's least learning rate would be above this rate."""
    with pytest.raises(ConfigError) as caught:
        read_arguments([base, str(tmp_path / "none"), "--lr", "1e-5", "--seed", "x"])
    assert isinstance(caught.value, CombinedError)
    assert [error.flag for error in caught.value.errors] == [base, "--seed"]


def test_the_same_value_twice_is_no_contradiction() -> None:
    assert parse_arguments(["--lr", "1", "--lr", "1"]).config.optimizer.lr == 1.0


@pytest.mark.parametrize("flag", sorted(HELP))
def test_every_setting_is_a_flag_with_a_help_text(
    flag: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as end:
        parse_arguments([flag])
    assert end.value.code == 0
    lines = capsys.readouterr().out.splitlines()
    for row in [*settings().values(), *settings_of(LaunchOptions)]:
        flag = f"  {row.flag}, {row.off_flag} " if row.kind == "bool" else f"  {row.flag} "
        (place,) = (number for number, line in enumerate(lines) if line.startswith(flag))
        assert "(default: " in lines[place]
        assert lines[place + 1].startswith(" " * 6)
    titles = [line.partition(":")[0] for line in lines if line[:1].isalpha() and ": " in line]
    sections = dict.fromkeys(row.section or "run" for row in settings().values())
    assert titles == ["usage", *sections, "launch"]


def test_help_shows_the_presets_values_and_survives_a_wrong_flag(
    capsys: pytest.CaptureFixture[str],
) -> None:
    for argv in (["--preset", "llama3-8b", "--help"], ["--wrong", "-h"]):
        with pytest.raises(SystemExit):
            parse_arguments(argv)
    first, second = capsys.readouterr().out.split("usage:")[1:]
    assert "--ffn-hidden-size INT|None (default: 14336)" in first
    assert "--ffn-hidden-size INT|None (default: None)" in second


def test_the_flags_of_its_own_come_first_in_a_programs_help(
    capsys: pytest.CaptureFixture[str],
) -> None:
    for program, first in ((EVALUATE, "--tasks"), (GENERATE, "--prompt"), (CONVERT, "--from-gguf")):
        with pytest.raises(SystemExit):
            parse_arguments(["--help"], program=program)
        lines = capsys.readouterr().out.splitlines()
        flags = [line.split()[0] for line in lines if line.startswith("  --")]
        own = {row.flag for row in settings_of(program.options)}
        assert flags[0] == first
        assert {flag.rstrip(",") for flag in flags[: len(own)]} == own


def test_a_quiet_rank_prints_no_help(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        parse_arguments(["--help"], quiet=True)
    assert capsys.readouterr() == ("", "")


# --config FILE and --load RUN


def test_flags_go_before_the_file_and_the_file_before_the_preset(tmp_path: Path) -> None:
    file = tmp_path / "mine.yaml"
    file.write_text("preset: llama-1b\nmodel: {num_layers: 5, hidden_size: 64}\n")
    config = parse_arguments(["--config", str(file), "--num-layers", "6"]).config
    assert (config.model.num_layers, config.model.hidden_size) == (6, 64)
    assert (config.preset, config.model.normalization) == ("llama-1b", "RMSNorm")


def write_run(folder: Path, config: Config) -> str:
    folder.mkdir(parents=True)
    (folder / "config.yaml").write_text(to_yaml(config))
    return str(folder)


SAVED = dataclasses.replace(
    PRESETS["llama-1b"],
    train=dataclasses.replace(PRESETS["llama-1b"].train, seed=7, train_iters=11),
)


def test_load_needs_no_other_flag_and_goes_on_in_the_same_folder(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run", SAVED)
    for load in (run, f"{run}/step-40"):
        config = parse_arguments(["--load", load, "--train-iters", "99"]).config
        assert config.model == SAVED.model
        assert (config.train.seed, config.train.train_iters) == (7, 99)
        assert (config.checkpoint.load, config.checkpoint.save) == (load, run)


def test_load_into_another_folder(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run", SAVED)
    assert parse_arguments(["--load", run, "--save", "other"]).config.checkpoint.save == "other"


def test_what_load_would_silently_override_is_refused(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run", SAVED)
    file = tmp_path / "mine.yaml"
    file.write_text("model: {num_layers: 9}\n")
    assert refused("--load", run, "--preset", "toy").flag == "--preset"
    error = refused("--load", run, "--config", str(file))
    assert (error.flag, error.value) == ("--num-layers", 9)
    argv = ["--load", run, "--config", str(file), "--num-layers", "9", "--preset", "llama-1b"]
    assert parse_arguments(argv).config.model.num_layers == 9


def test_places_of_a_former_run_are_not_taken_over(tmp_path: Path) -> None:
    places = dataclasses.replace(SAVED.checkpoint, save="old", load="older")
    run = write_run(tmp_path / "moved", dataclasses.replace(SAVED, checkpoint=places))
    checkpoint = parse_arguments(["--load", run]).config.checkpoint
    assert (checkpoint.load, checkpoint.save) == (run, run)
    assert refused("--config", f"{run}/config.yaml").works == "--load older"


def test_a_folder_that_is_no_run_names_the_runs_beside_it(tmp_path: Path) -> None:
    run = write_run(tmp_path / "toy-1", SAVED)
    error = refused("--load", str(tmp_path / "toy-2"))
    assert (error.flag, error.works) == ("--load", run)


@pytest.mark.parametrize("flag", ["--config", "--load"])
def test_files_that_cannot_be_read(flag: str, tmp_path: Path) -> None:
    assert refused(flag, str(tmp_path / "none")).flag == flag
    (tmp_path / "config.yaml").write_bytes(b"\xff\xfe\x00")
    place = tmp_path / "config.yaml" if flag == "--config" else tmp_path
    assert refused(flag, str(place)).flag == flag


FLAGS = sorted({row.flag for row in settings().values()} - {"--config", "--load"})
WORDS = st.one_of(
    st.sampled_from(FLAGS),
    st.sampled_from(["--no-swiglu", "--dry-run", "--world-size", "None", "toy", "1", "-1", "p2p"]),
    st.text(max_size=8),
    st.builds("{}={}".format, st.sampled_from(FLAGS), st.text(max_size=5)),
    st.builds("{}={}".format, st.sampled_from(FLAGS), st.integers().map(str)),
)


@given(st.lists(WORDS, max_size=6))
def test_any_words_give_arguments_or_one_error(argv: list[str]) -> None:
    config: Config | None
    try:
        config = parse_arguments(argv).config
    except ConfigError:
        return
    except SystemExit:
        config = Config() if HELP & set(argv) else None
    assert type(config) is Config


def test_the_advice_for_a_number_outside_the_range_is_a_number_that_the_flag_takes() -> None:
    errors = 0
    programs = (PRETRAIN, CONVERT, EVALUATE, GENERATE)
    own = [row for program in programs for row in settings_of(program.options)]
    for row in (*settings().values(), *own):
        for word in ("-1e30", "-3", "0", "101", "1e30") if row.kind == "float" else ("-3", "101"):
            words = [word] * max(1, row.count)
            try:
                if row.kind in ("int", "float"):
                    row.from_words(words)
            except ConfigError as error:
                errors += 1
                row.from_words([error.works] * max(1, row.count))
    assert errors > 100
