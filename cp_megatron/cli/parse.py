"""The command line of a run: its flags, over a run's ``config.yaml``, a file and a preset.

A setting comes from the last of these that gives it: the preset, ``--config FILE``, the
``config.yaml`` of the run that ``--load`` names, the flags.
"""

from __future__ import annotations

import contextlib
import os
import tomllib
from collections.abc import Mapping, Sequence, Set
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from cp_megatron.cli.megatron_flags import Translation, notes, translate
from cp_megatron.cli.synonyms import flags_of_tables, refuse_synonym
from cp_megatron.config.fields import settings, settings_of
from cp_megatron.config.files.foreign_folders import recognize
from cp_megatron.config.files.presets import (
    DEFAULT_PRESET,
    MEGATRON_PRESET,
    PRESETS,
    PRETRAINED_OPTIMIZER,
    REQUIRED_SIZES,
)
from cp_megatron.config.files.run_folders import CONFIG_FILE, find_run, run_folder, runs_near
from cp_megatron.config.files.yaml_io import Values, overlay, read_file, read_values
from cp_megatron.config.help_page import HELP, help_page
from cp_megatron.config.schema import Config
from cp_megatron.config.words import read_pieces, spellings, split_words
from cp_megatron.errors import ConfigError, Mistakes
from cp_megatron.families.registry import has_tokenizer, read_hf_config

_ALIASES: Mapping[str, str] = {
    "--tensor-model-parallel-size": "--tensor-parallel-size",
    "--pipeline-model-parallel-size": "--pipeline-parallel-size",
    "--num-distributed-optimizer-instances": "--data-parallel-replicate-size",
    "--deterministic-mode": "--deterministic",
    "--layernorm-epsilon": "--norm-epsilon",
}


@dataclass(frozen=True, kw_only=True)
class LaunchOptions:
    """Where settings come from, and what to do instead of training."""

    config: str | None = None
    """A YAML file with any of the settings; flags override it."""
    dry_run: bool = False
    """Check everything and print the start table, but do not train."""
    world_size: int | None = None
    """The number of ranks to plan for; only with --dry-run."""


@dataclass(frozen=True, kw_only=True)
class Program:
    """A program that takes the flags of a run and, in ``options``, some flags of its own.

    Attributes:
        trains: whether it takes flags of Megatron-LM that have no effect here; the others refuse
            every flag that they do not read.
    """

    name: str
    description: str
    options: type[LaunchOptions] = LaunchOptions
    trains: bool = False


PRETRAIN = Program(
    name="pretrain.py",
    trains=True,
    description="""Train a transformer over tensor, context and data parallel ranks.

torchrun --nproc-per-node 4 launch/pretrain.py
    --context-parallel-size 2 --tensor-parallel-size 2""",
)


@dataclass(frozen=True, kw_only=True)
class Arguments:
    """The content of a command line.

    Attributes:
        given: the flags that the user typed, as ``--help`` spells them.
        auto: whether the same command line begins a run and continues it, so that ``--save`` may
            name the folder of a run that has no checkpoint yet.
        notes: what happened to flags that are not flags here, and which defaults hold.
        mistakes: flags that are not accepted, if ``read_arguments`` has read the command line.
    """

    config: Config
    given: frozenset[str]
    auto: bool = False
    options: LaunchOptions = field(default_factory=LaunchOptions)
    notes: tuple[str, ...] = ()
    mistakes: tuple[ConfigError, ...] = ()


@dataclass(frozen=True, kw_only=True)
class _Words:
    """The values that are typed, by name, and where they come from."""

    typed: dict[str, Any]
    given: frozenset[str]
    auto: bool
    notes: tuple[str, ...]


def parse_arguments(
    argv: Sequence[str], *, program: Program = PRETRAIN, quiet: bool = False, again: bool = False
) -> Arguments:
    """Reads a command line, without the program's name.

    Args:
        quiet: whether to print no help (on all ranks but the first).
        again: whether a launcher repeats the command line after a failure, which has the effect
            of ``--load auto``.

    Raises:
        ConfigError: flags or values are not accepted; all that are not, in one ``CombinedError``.
        SystemExit: with code 0, after ``--help`` is printed.
    """
    arguments = read_arguments(argv, program=program, quiet=quiet, again=again)
    Mistakes(arguments.mistakes).raise_any()
    return arguments


def read_arguments(
    argv: Sequence[str], *, program: Program = PRETRAIN, quiet: bool = False, again: bool = False
) -> Arguments:
    """Reads a command line like ``parse_arguments``, but returns its mistakes.

    ``check`` then adds those that it finds in the rest, so that the user is told all of them.

    Raises:
        ConfigError: what supplies the defaults (a preset, file, folder or run) cannot be read.
        SystemExit: with code 0, after ``--help`` is printed.
    """
    if HELP & set(argv):
        if not quiet:
            _print_help([word for word in argv if word not in HELP], program)
        raise SystemExit(0)
    mistakes = Mistakes()
    words = _read(argv, program, again, mistakes)
    own = {row.name for row in settings_of(program.options)}
    typed, given = words.typed, words.given
    options = program.options(**{name: typed[name] for name in own & typed.keys()})
    if options.world_size is not None and not options.dry_run:
        with mistakes.collect():
            rule = "plans a --dry-run only; torchrun sets the number of ranks of a real run"
            works = "--dry-run, or torchrun --nproc-per-node"
            raise ConfigError("--world-size", options.world_size, rule, works)
    config: Config | None = None
    with mistakes.collect():
        config = _base(typed)
    if config is None:  # Other defaults in its place would lead to mistakes that are none.
        _in_order(mistakes, argv).raise_any()
    assert config is not None
    with mistakes.collect():
        config = overlay(config, {name: typed[name] for name in typed.keys() - own})
    with mistakes.collect():
        config = _fold_bf16(_place_of_run(config, given), given)
    return Arguments(
        config=config,
        given=given,
        auto=words.auto,
        options=options,
        notes=(*words.notes, *_defaults(config, given)),
        mistakes=tuple(_in_order(mistakes, argv).errors),
    )


def _in_order(mistakes: Mistakes, argv: Sequence[str]) -> Mistakes:
    """The mistakes in the order of their flags on the command line; those of other flags last."""
    places = {word.partition("=")[0]: -place for place, word in enumerate(reversed(argv))}
    return Mistakes(sorted(mistakes.errors, key=lambda error: places.get(error.flag, 1)))


def _defaults(config: Config, given: frozenset[str]) -> tuple[str, ...]:
    """A note if the defaults are Megatron-LM's and no run's."""
    if config.preset != MEGATRON_PRESET or config.checkpoint.load is not None:
        return ()
    text = "defaults are Megatron-LM's (--preset megatron), such as linear decay without warm-up, "
    text += "weight decay 0.01 and Adam's betas 0.9 and 0.999"
    if not given >= {"--hidden-dropout", "--attention-dropout"}:
        text += "; but dropout is 0 where Megatron-LM's is 0.1"
    return (text,)


def _print_help(argv: Sequence[str], program: Program) -> None:
    """Shows every flag with the default that the rest of the command line leads to."""
    base = PRESETS[DEFAULT_PRESET]
    with contextlib.suppress(ConfigError):
        base = _base(_read(argv, program, False, Mistakes()).typed)
    inner = {name: values for name, values in vars(base).items() if name != "preset"}
    own: dict[str, object] = {"launch": program.options()}
    sections = {"run": base, **inner}
    # A program's own flags come first, since it reads few of a run's.
    sections = {**sections, **own} if program.trains else {**own, **sections}
    print(help_page(program.name, program.description, sections))


def _read(argv: Sequence[str], program: Program, again: bool, mistakes: Mistakes) -> _Words:
    """The words of the command line; ``auto`` says whether ``--save`` is searched for a run.

    A run that is found there takes the place of what the run began with.
    """
    rows = [*settings_of(program.options), *settings().values()]
    flags = spellings(rows, _ALIASES)
    translation = Translation([])
    with mistakes.collect():
        pieces = split_words(argv)
        translation = translate(pieces, {name: row.flag for name, row in flags.items()}, mistakes)
    typed = read_pieces(translation.pieces, flags, mistakes, refuse_synonym)
    if not program.trains:
        for flag in translation.noted:
            with mistakes.collect():
                raise ConfigError(flag, "", f"has no effect on {program.name}", "leave it out")
    load, auto = None, False
    with mistakes.collect():
        load, auto = find_run(typed.get("load"), typed.get("save"), again=again)
    if auto:
        typed.pop("load", None)
        if load is not None:
            typed.pop("load_hf", None)
            typed["load"] = load
    given = frozenset(row.flag for row in rows if row.name in typed)
    return _Words(typed=typed, given=given, auto=auto, notes=tuple(notes(translation)))


def _base(typed: Values) -> Config:
    """The settings that flags override: preset, ``--config`` file and loaded run."""
    preset, load, file = typed.get("preset"), typed.get("load"), typed.get("config")
    if load is not None and typed.get("load_hf") is not None:
        rule = f"starts a new run, but --load {load} continues one"
        raise ConfigError("--load-hf", typed["load_hf"], rule, "one of the two")
    earlier: Values = {"preset": preset} if preset else {}
    values = {} if file is None else _values_of_file(file)
    _refuse_lost(values, earlier, f"--config {file}")
    folder = typed.get("load_hf") or values.get("load_hf")
    if load is not None or folder is not None:
        base = PRESETS[preset or values.get("preset", DEFAULT_PRESET)]
    else:
        base = _preset({**values, **typed})
    if load is None and folder is not None:
        base = _started_from(base, folder, typed.keys() | values.keys())
    base = overlay(base, values)
    if load is None:
        return base
    saved = _values_of_run(load)
    # A setting of the file that is also typed comes from the flag and is not lost.
    untyped = {name: value for name, value in values.items() if name not in typed}
    _refuse_lost(saved, {**untyped, **earlier}, f"--load {load}")
    return overlay(base, saved)


def _preset(said: Values) -> Config:
    """The preset of a new run: the one that is named, or Megatron-LM's defaults for a model of the
    user's own, or else the default.

    Raises:
        ConfigError: a size that Megatron-LM requires is missing.
    """
    of_model = [name for name in said if name in settings() and settings()[name].section == "model"]
    name = said.get("preset") or (MEGATRON_PRESET if of_model else DEFAULT_PRESET)
    missing = [size for size in REQUIRED_SIZES if said.get(size) is None]
    if name == MEGATRON_PRESET and missing:
        given = ", ".join(settings()[name].flag for name in of_model) or f"--preset {name}"
        rule = f"must be given too, as in Megatron-LM, beside {given}"
        works = f"--preset {DEFAULT_PRESET} to change a model that has all sizes"
        raise ConfigError(" ".join(settings()[size].flag for size in missing), "", rule, works)
    return PRESETS[name]


def _started_from(base: Config, folder: str, said: Set[str]) -> Config:
    """``base`` with the model of a Hugging Face folder; ``said`` names the settings given."""
    # The dropout is the preset's: the folder records the dropout of pretraining, not of this run.
    kept = ("attention_dropout", "hidden_dropout", "make_vocab_size_divisible_by")
    values = {name: getattr(base.model, name) for name in kept}
    base = replace(base, model=read_hf_config(folder).model)
    if has_tokenizer(folder) and not said & {"tokenizer_type", "tokenizer_model"}:
        values |= {"tokenizer_type": "huggingface", "tokenizer_model": folder}
    if "preset" not in said:
        base = replace(base, optimizer=PRETRAINED_OPTIMIZER)
    return overlay(base, values)


def _values_of_file(file: str) -> Values:
    """The settings of a ``--config`` file."""
    text = read_file(Path(file), "--config")
    _refuse_toml(file, text)
    values = read_values(text, f"--config {file}")
    if (load := values.get("load")) is not None:
        rule = "a file cannot choose the run to load"
        raise ConfigError(f"--config {file}: checkpoint.load", load, rule, f"--load {load}")
    return values


def _refuse_toml(file: str, text: str) -> None:
    """Refuses a TOML file, such as torchtitan's, and names the flags for what it says."""
    with contextlib.suppress(tomllib.TOMLDecodeError):
        tables = tomllib.loads(text)
        if any(isinstance(value, dict) for value in tables.values()):
            rule = "is a TOML file, such as torchtitan's, and not YAML"
            flags, others = flags_of_tables(tables)
            if others:
                rule += f"; no flag has the values of {', '.join(others)}"
            works = " ".join(flags) or "flags, or a YAML file such as the config.yaml of a run"
            raise ConfigError("--config", file, rule, works)


def _values_of_run(load: str) -> Values:
    """The settings of the run that ``--load`` names."""
    path = run_folder(Path(load)) / CONFIG_FILE
    if not os.path.isfile(path):  # Path.is_file raises for a name that is too long.
        rule = f"is not a run's folder: it has no {CONFIG_FILE}"
        raise recognize("--load", load) or ConfigError("--load", load, rule, runs_near(path.parent))
    return read_values(read_file(path, "--load"), str(path))


def _refuse_lost(later: Values, earlier: Values, source: str) -> None:
    """Refuses a setting of ``--preset`` or ``--config`` that ``source`` would override."""
    for name, value in sorted(earlier.items()):
        if name in ("save", "load") or name not in later or later[name] == value:
            continue
        flag = settings()[name].flag
        rule = f"{source} sets it to {later[name]}, which overrides presets and files"
        raise ConfigError(flag, value, rule, f"leave it out, or give {flag} as a flag")


def _place_of_run(config: Config, given: frozenset[str]) -> Config:
    """A loaded run continues in its own folder, even if the folder was moved."""
    load = config.checkpoint.load
    if "--load" not in given:
        return overlay(config, {"load": None})
    if load is None or "--save" in given:
        return config
    return overlay(config, {"save": str(run_folder(Path(load)))})


def _fold_bf16(config: Config, given: frozenset[str]) -> Config:
    """Replaces ``--bf16`` by ``--dtype bfloat16``; each overrides the other one in a file."""
    train, dtype = config.train, config.train.dtype
    typed = given & {"--bf16", "--dtype"}
    if "--bf16" in typed and not train.bf16 and dtype == "bfloat16":
        raise ConfigError("--no-bf16", "", "contradicts --dtype bfloat16", "--dtype float32")
    if train.bf16 and typed != {"--dtype"}:
        if len(typed) != 1 and dtype not in ("auto", "bfloat16"):
            raise ConfigError("--bf16", "", f"contradicts --dtype {dtype}", "one of the two")
        dtype = "bfloat16"
    return overlay(config, {"dtype": dtype, "bf16": False})
