"""Where a run ends: after steps, rows or passes over its data; and notes about its schedule."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import pytest

from cp_megatron.checkpoint.manifest import read_manifest
from cp_megatron.cli.parse import parse_arguments
from cp_megatron.comm.runtime import Launch
from cp_megatron.config import Config, DataConfig
from cp_megatron.config.files.yaml_io import overlay, read_values, to_yaml
from cp_megatron.data.rows.small_data import MOST_BYTES, is_small
from cp_megatron.errors import ConfigError, FinishedError
from cp_megatron.preflight.check import check
from cp_megatron.preflight.rope_rules import rope_notes
from cp_megatron.preflight.run_length import continued_from, length_flag
from cp_megatron.preflight.run_plan import RunPlan
from cp_megatron.train.run import _persistent
from tests.data.ranges import write_pair
from tests.preflight.test_check import plan, refused
from tests.preflight.test_save_and_load import run
from tests.preflight.test_start_table import shown

__all__ = ["run"]  # the fixture: steps 20 and 40 of 4 rows of 1,024 tokens


@pytest.fixture
def nine(tmp_path: Path) -> list[str]:
    """The flags of nine rows of 8 tokens, four of them a step."""
    write_pair(tmp_path / "nine", [[*range(97, 113)] * 4 + [1] * 9])
    flags = ["--data-path", str(tmp_path / "nine"), "--split", "1", "--seq-length", "8"]
    return [*flags, "--global-batch-size", "4", "--eval-iters", "0"]


# --- the last step


def test_rows_are_whole_batches() -> None:
    found = plan("--train-samples", "103", "--global-batch-size", "4")
    assert found.last_step == 25
    assert found.config.train.train_iters is None
    error = refused("--train-samples", "3", "--global-batch-size", "4")
    assert (error.flag, error.value, error.works) == ("--train-samples", 3, "4")
    assert plan("--train-samples", error.works, "--global-batch-size", "4").last_step == 1


@pytest.mark.parametrize(
    ("epochs", "last"), [("1", 3), ("2", 5), ("3", 7), ("0.1", 1), ("0.5", 2), ("1.7777", 4)]
)
def test_epochs_are_passes_over_the_rows(nine: list[str], epochs: str, last: int) -> None:
    """9, 18, 27, 0.9, 4.5 and 15.9993 rows, rounded up to batches of 4."""
    found = plan(*nine, "--train-epochs", epochs)
    assert (found.last_step, found.rows_per_epoch) == (last, 9)


def test_how_often_the_data_is_seen_is_told(nine: list[str]) -> None:
    text = shown(plan(*nine, "--train-epochs", "26.2", "--dry-run"), 160)
    assert "9 rows, 26.2 epochs in 59 steps" in text
    assert "the data repeats: the run trains 26 or 27 times on each of its 9 rows" in text
    text = shown(plan(*nine, "--train-epochs", "0.8", "--dry-run"), 160)
    assert "9 rows, 0.889 epochs in 2 steps" in text
    assert "repeats" not in text
    # A dry run counts the rows of small data.
    text = shown(plan(*nine, "--train-iters", "60", "--dry-run"), 160)
    assert "9 rows, 26.7 epochs in 60 steps" in text
    assert "26 or 27 times" in text
    assert "epochs" not in shown(plan(*nine, "--train-iters", "60"), 160)
    # A dry run may plan for more data than is here.
    longer = [word if word != "8" else "800" for word in nine]
    text = shown(plan(*longer, "--dry-run"), 160)
    assert "epochs" not in text
    assert "with this data the run would be refused: --seq-length 800: a row needs 801" in text


def test_nothing_says_how_long() -> None:
    error = refused("--train-iters", "None")
    assert (error.flag, error.works) == ("--train-iters", "--train-iters 200")


# --- alternatives


@pytest.mark.parametrize(
    "argv",
    [
        ["--train-iters", "10", "--train-samples", "40"],
        ["--train-samples", "40", "--train-epochs", "1"],
        ["--train-iters", "10", "--train-epochs", "0.5"],
        ["--lr-warmup-iters", "2", "--lr-warmup-fraction", "0.1"],
        ["--lr-warmup-samples", "2", "--lr-warmup-fraction", "0.1"],
        ["--lr-decay-iters", "2", "--lr-decay-samples", "8"],
        ["--lr-wsd-decay-iters", "2", "--lr-wsd-decay-samples", "8", "--lr-decay-style", "WSD"],
    ],
)
def test_two_that_contradict_each_other(argv: list[str], tmp_path: Path) -> None:
    error = refused(*argv)
    assert error.flag == argv[2]
    assert argv[0] in error.rule
    names = [(argv[i][2:].replace("-", "_"), argv[i + 1]) for i in (0, 2)]
    section = "train" if argv[0].startswith("--train") else "optimizer"
    lines = [f"{section}:", *(f"  {name}: {value}" for name, value in names)]
    (tmp_path / "file.yaml").write_text("\n".join(lines))
    with pytest.raises(ConfigError, match="contradicts"):
        parse_arguments(["--config", str(tmp_path / "file.yaml")])


@pytest.mark.parametrize(
    "argv",
    [
        ["--train-samples", "400", "--lr-warmup-iters", "2"],
        ["--train-samples", "400", "--lr-decay-iters", "8"],
        ["--train-iters", "100", "--lr-warmup-samples", "4"],
        ["--train-iters", "100", "--lr-decay-samples", "40"],
        ["--train-iters", "100", "--lr-decay-style", "WSD", "--lr-wsd-decay-samples", "4"],
    ],
)
def test_steps_and_rows_do_not_mix(argv: list[str]) -> None:
    error = refused(*argv)
    assert error.flag == argv[-2]
    assert argv[0] in error.rule
    assert plan(*argv[:-2], error.works, "80")


def test_zeros_contradict_nothing() -> None:
    """As in Megatron's lines, which write out defaults."""
    found = plan(
        "--lr-warmup-fraction", "0.1", "--lr-warmup-iters", "0", "--lr-warmup-samples", "0"
    )
    assert found.learning_rate.warmup == pytest.approx(12)


def test_a_later_source_replaces_the_alternative() -> None:
    """The presets count 120 steps with a warm-up of 10."""
    found = plan("--train-samples", "400", "--lr-warmup-fraction", "0.5")
    assert (found.last_step, found.learning_rate.warmup, found.learning_rate.end) == (100, 200, 400)
    assert found.learning_rate_at(25) == pytest.approx(3e-3 / 2)
    # A run's config.yaml leads to the same, and a flag replaces what it says.
    values = read_values(to_yaml(_persistent(found.config)), "config.yaml")
    again = overlay(Config(), values)
    assert again.train == found.config.train
    assert again.optimizer == found.config.optimizer
    steps = overlay(again, {"train_iters": 7, "lr_warmup_iters": 0})
    assert (steps.train.train_samples, steps.train.train_iters) == (None, 7)
    assert steps.optimizer.lr_warmup_fraction is None


def test_a_warm_up_of_a_preset_is_converted_to_rows() -> None:
    found = plan("--train-samples", "400")  # of 4 rows a step
    assert found.learning_rate.warmup == 40
    assert found.learning_rate_at(5) == pytest.approx(3e-3 / 2)


# --- runs that go on


@pytest.mark.parametrize(
    ("argv", "flag", "works"),
    [
        (["--train-iters", "40"], "--train-iters", "80"),
        (["--train-samples", "160"], "--train-samples", "320"),
        (["--train-samples", "163"], "--train-samples", "323"),
        (["--train-samples", "2"], "--train-samples", "164"),
    ],
)
def test_a_run_that_is_over_says_how_it_goes_on(
    run: Path, argv: list[str], flag: str, works: str
) -> None:
    error = refused("--load", str(run), *argv)
    assert (error.flag, error.value, error.works) == (flag, argv[1], works)
    assert plan("--load", str(run), flag, works).last_step > 40
    with pytest.raises(FinishedError):
        check(parse_arguments(["--load", str(run), *argv]).config, Launch(), auto=True)


def test_epochs_that_are_over_say_how_they_go_on(run: Path, nine: list[str]) -> None:
    """160 rows are nearly 18 passes over 9 rows."""
    model = nine[:4]
    (tokens,) = ([*range(97, 113)] * 600,)
    write_pair(Path(nine[1]), [tokens])  # nine rows of 1,024 tokens
    error = refused("--load", str(run), *model, "--train-epochs", "10")
    assert (error.flag, error.works) == ("--train-epochs", "28")
    assert plan("--load", str(run), *model, "--train-epochs", "28").last_step == 63
    assert plan("--load", str(run), *model, "--train-epochs", "18").last_step == 41


def test_rows_to_come_make_the_steps_of_another_batch_size(run: Path) -> None:
    flags = ["--load", str(run), "--train-samples", "240", "--lr-decay-style", "linear"]
    flags += ["--lr", "1", "--min-lr", "0", "--lr-warmup-samples", "40"]
    found = plan(*flags, "--global-batch-size", "8")
    assert (found.last_step, found.rows_of(41), found.rows_of(50)) == (
        50,
        range(160, 168),
        range(232, 240),
    )
    # The curve is a function of rows, so it goes on where it was.
    assert found.learning_rate_at(41) == pytest.approx(plan(*flags).learning_rate_at(42))
    assert found.learning_rate_at(50) == 0


def test_the_rate_of_a_run_of_epochs_goes_on_with_another_batch_size(
    run: Path, nine: list[str]
) -> None:
    """160 of 270 rows are over after 40 steps of 4: so is the same share of the decay."""
    write_pair(Path(nine[1]), [[*range(97, 113)] * 600])  # nine rows of 1,024 tokens
    flags = ["--load", str(run), *nine[:4], "--train-epochs", "30", "--lr-decay-style", "linear"]
    flags += ["--lr", "1", "--min-lr", "0", "--lr-warmup-iters", "0"]
    found = plan(*flags, "--global-batch-size", "10")
    assert (found.last_step, found.rows_of(41)) == (51, range(160, 170))
    assert found.learning_rate_at(41) == pytest.approx(1 - 170 / 270)
    assert found.learning_rate_at(51) == 0


def test_tokens_of_a_checkpoint_that_does_not_count_them(run: Path) -> None:
    found = plan("--load", str(run), "--seq-length", "512", "--max-position-embeddings", "1024")
    assert found.load_tokens == 160 * 1024
    assert found.tokens_after(41) == 160 * 1024 + 4 * 512
    manifest = dataclasses.replace(read_manifest(run / "step-40"), extra={"tokens": 5})
    assert continued_from(found, run / "step-40", manifest).load_tokens == 5


def test_the_command_that_trains_longer(nine: list[str]) -> None:
    for argv, expected in (
        (["--train-iters", "7"], ("--train-iters", "14")),
        (["--train-samples", "70"], ("--train-samples", "140")),
        (["--train-epochs", "1.5"], ("--train-epochs", "3")),
    ):
        assert length_flag(plan(*nine, *argv), 2) == expected


# --- notes


def notes(*argv: str) -> list[str]:
    found: RunPlan = plan(*argv)
    return [note for note in found.notes if "learning rate" in note or "rope" in note]


def test_settings_of_a_decay_that_a_constant_rate_does_not_read_are_noted() -> None:
    """As in Megatron-LM's lines."""
    argv = ["--lr-decay-style", "constant", "--lr-decay-iters", "100", "--min-lr", "1e-5"]
    assert (
        "--lr-decay-iters and --min-lr have no effect with --lr-decay-style constant"
        in plan(*argv).notes
    )
    assert not any("constant" in note for note in plan(*argv[:2]).notes)


def test_a_learning_rate_of_0_is_noted() -> None:
    zero = ["--min-lr", "0", "--lr-warmup-iters", "0"]
    (note,) = notes("--train-iters", "1", *zero)
    assert note.startswith("the learning rate is 0 in every step")
    assert not notes("--train-iters", "2", *zero)
    assert not notes("--train-iters", "1", *zero, "--lr-decay-iters", "2")
    assert not notes("--train-iters", "1", *zero[2:], "--min-lr", "1e-6")
    assert not notes("--train-iters", "1", *zero[2:], "--lr-decay-style", "constant")


def test_a_warm_up_longer_than_the_run_is_noted() -> None:
    (note,) = notes("--train-iters", "5")  # the preset's warm-up has 10 steps
    assert note.startswith("the warm-up of 10 steps is not over before the run ends after 5")
    assert "rises to 0.0015, --lr is 0.003" in note
    (note,) = notes("--train-iters", "5", "--lr-warmup-iters", "8", "--lr-decay-iters", "9")
    assert "warm-up of 8 steps" in note
    (note,) = notes("--train-samples", "20")
    assert "warm-up of 40 rows" in note
    assert not notes("--train-iters", "11")


def test_the_warm_up_that_a_flag_asks_for_is_shorter_than_the_decay() -> None:
    argv = ["--train-samples", "400", "--lr-warmup-samples"]
    error = refused(*argv, "400")
    assert (error.flag, error.works) == ("--lr-warmup-samples", "40")
    assert "--train-samples 400" in error.rule
    assert plan(*argv, error.works)
    error = refused(*argv, "40", "--lr-decay-samples", "40")
    assert "--lr-decay-samples 40" in error.rule


WSD = ["--lr-decay-style", "WSD"]


def test_a_decay_of_wsd() -> None:
    error = refused(*WSD)
    assert error.flag == "--lr-decay-style"
    assert plan(*WSD, *error.works.removesuffix(" with it").split())
    assert not notes(*WSD, "--lr-wsd-decay-iters", "110")
    (note,) = notes(*WSD, "--lr-wsd-decay-iters", "111")
    assert note.startswith("WSD's decay of 111 steps begins before the warm-up of 10 ends")
    for flag, value in (("--lr-wsd-decay-iters", "3"), ("--lr-wsd-decay-style", "linear")):
        assert refused(flag, value).flag == flag
    assert refused("--lr-warmup-init", "1").flag == "--lr-warmup-init"


ROPE = ["--position-embedding-type", "rope", "--original-max-position-embeddings", "2048"]


def test_a_rope_factor_that_rows_do_not_need_is_noted(run: Path) -> None:
    scaled = [*ROPE, "--rope-type", "yarn", "--rope-scaling-factor", "4"]
    (note,) = notes(*scaled)
    assert "rows of 1,024 tokens fit the 2,048 positions" in note
    assert notes(*scaled, "--seq-length", "2048")
    assert not notes(*scaled, "--seq-length", "2050")
    assert not notes("--position-embedding-type", "rope")
    assert not notes(*ROPE[:2], "--rope-type", "linear", "--rope-scaling-factor", "4")


def test_a_dry_run_tells_what_is_beyond_the_first_records(tmp_path: Path) -> None:
    turns = [{"role": role, "content": "word " * 9} for role in ("user", "assistant")]
    lines = [json.dumps({"messages": turns}) for _ in range(20)]
    path = tmp_path / "chats.jsonl"
    words = ["--data-path", str(path), "--sft", "--seq-length", "96", "--split", "1", "--dry-run"]
    path.write_text("\n".join([*lines, json.dumps({"messages": turns, "id": 3})]))
    found = [note for note in plan(*words).notes if str(path) in note]
    assert ["are cut to 96" in found[0], "the first in line 21" in found[1]] == [True, True]
    assert len(found) == 2
    path.write_text("\n".join([*lines, "{"]))
    assert refused(*words).rule.startswith("line 21: not JSON")


def test_only_small_data_is_read_by_a_dry_run(tmp_path: Path) -> None:
    (tmp_path / "folder").mkdir()
    for name, size in (("a", 5), ("folder/b", MOST_BYTES // 2)):
        with (tmp_path / name).open("wb") as file:
            file.truncate(size)
    paths = str(tmp_path / "a"), str(tmp_path / "folder")
    assert is_small(DataConfig())
    assert is_small(DataConfig(data_path=paths))
    with (tmp_path / "folder" / "c").open("wb") as file:
        file.truncate(MOST_BYTES // 2)
    assert not is_small(DataConfig(data_path=paths))


def test_the_rope_of_a_file_is_noted_and_that_of_a_loaded_model_is_not(
    run: Path, tmp_path: Path
) -> None:
    scaled = [*ROPE, "--rope-type", "yarn", "--rope-scaling-factor", "4"]
    config = parse_arguments(["--preset", "toy", *scaled]).config
    file, given = tmp_path / "file.yaml", frozenset({"--config"})
    file.write_text(to_yaml(config))
    assert notes("--preset", "toy", "--config", str(file))
    loaded = overlay(config, {"load": str(run)})
    assert list(rope_notes(config, given))
    assert not list(rope_notes(loaded, given))
    assert not list(rope_notes(config, frozenset()))
    assert list(rope_notes(loaded, frozenset({"--rope-scaling-factor"})))
