"""The command line: flags generated from the dataclasses by tyro, mistakes told in one line.

tyro 1.x prints a box and exits when it refuses something, and offers no stable hook. So the words
are checked first against the table of settings, which gives the error every other mistake has
(``ConfigError``); tyro then reads words it can not refuse, and writes ``--help``.

What a setting is, the later winning: preset, ``--config FILE``, the ``config.yaml`` of the run that
``--load`` names, flags.
"""

from __future__ import annotations

import contextlib
import dataclasses
import io
import os
import re
import shlex
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import MappingProxyType
from typing import NoReturn, get_type_hints

import tyro

from cp_megatron.cli.megatron_flags import why_meaningless
from cp_megatron.config.fields import BadValueError, Setting, setting_of_type, settings
from cp_megatron.config.presets import DEFAULT_PRESET, PRETRAINED_OPTIMIZER
from cp_megatron.config.run_folders import CONFIG_FILE, find_run, run_folder, runs_near
from cp_megatron.config.schema import Config
from cp_megatron.config.words import is_flag, unknown
from cp_megatron.config.yaml_io import Values, overlay, preset_named, read_file, read_values
from cp_megatron.errors import ConfigError
from cp_megatron.families.registry import has_tokenizer, read_hf_config

_ALIASES: Mapping[str, str] = MappingProxyType(
    {
        "--tensor-model-parallel-size": "--tensor-parallel-size",
        "--deterministic-mode": "--deterministic",
    }
)
_HELP = ("-h", "--help", "-H", "--help-verbose")
_DESCRIPTION = """Train a transformer over tensor, context and data parallel ranks.

torchrun --nproc-per-node 4 launch/pretrain.py --context-parallel-size 2 --tensor-parallel-size 2"""


@dataclass(frozen=True, kw_only=True)
class LaunchOptions:
    """Where settings come from, and what to do besides training."""

    config: str | None = None
    """A YAML file with any part of the settings; flags override it."""
    dry_run: bool = False
    """Check everything, print the start table, train nothing."""
    world_size: int | None = None
    """With --dry-run: plan for this many ranks."""


@dataclass(frozen=True, kw_only=True)
class Program:
    """A program with the settings of a run and some flags of its own.

    Attributes:
        name: for ``--help``.
        description: for the same.
        options: its own flags.
    """

    name: str = "pretrain.py"
    description: str = _DESCRIPTION
    options: type[LaunchOptions] = LaunchOptions


@dataclass(frozen=True, kw_only=True)
class Arguments:
    """What a command line says.

    Attributes:
        config: the run.
        dry_run: only show what would run.
        world_size: the ranks to plan a dry run for; None where the launch says it.
        given: the flags the user typed, in the spelling of ``--help``.
        auto: ``--load auto``: a folder that was begun and has no checkpoint yet is begun again.
        options: the program's own flags.
    """

    config: Config
    dry_run: bool
    world_size: int | None
    given: frozenset[str]
    auto: bool = False
    options: LaunchOptions = field(default_factory=LaunchOptions)


@dataclass(frozen=True)
class _Word:
    """One flag as typed: its setting, and its values as texts."""

    setting: Setting
    flag: str
    texts: tuple[str, ...]

    def for_tyro(self) -> list[str]:
        """The same in the form that tyro can not misread."""
        if self.setting.kind == "bool":
            return [_ALIASES.get(self.flag, self.flag)]
        if self.setting.kind in ("strings", "ints", "floats"):
            return [self.setting.flag, *self.texts]
        return [f"{self.setting.flag}={self.texts[0]}"]


def parse_arguments(
    argv: Sequence[str],
    *,
    program: str | Program = "pretrain.py",
    quiet: bool = False,
    again: bool = False,
) -> Arguments:
    """Reads a command line, without the program's name.

    Args:
        argv: the words.
        program: the program, or the name of one that has no flags of its own, for ``--help``.
        quiet: print no help (on all ranks but the first).
        again: a launcher starts these words again after a failure: as if ``--load auto`` were said.

    Raises:
        ConfigError: a flag or a value that can not be honoured.
        SystemExit: with code 0, after ``--help`` is printed.
    """
    program = Program(name=program) if isinstance(program, str) else program
    if any(word in _HELP for word in argv):
        _print_help(argv, program, quiet)
    words, auto = _find_run(_read_words(argv, program.options), again)
    line = [text for word in words.values() for text in word.for_tyro()]
    parsed, launch = _ask_tyro(line, _base(words), program, quiet)
    given = frozenset(word.setting.flag for word in words.values())
    names = [row.name for row in dataclasses.fields(Config)]
    config = Config(**{name: getattr(parsed, name) for name in names})
    config = _fold_bf16(_place_of_run(config, given), given)
    if launch.world_size is not None and not launch.dry_run:
        rule = "only plans a --dry-run; a real run's world is what torchrun starts"
        raise ConfigError(
            "--world-size", launch.world_size, rule, "--dry-run, or torchrun --nproc-per-node"
        )
    return Arguments(
        config=config,
        dry_run=launch.dry_run,
        world_size=launch.world_size,
        given=given,
        auto=auto,
        options=launch,
    )


def _print_help(argv: Sequence[str], program: Program, quiet: bool) -> NoReturn:
    """Shows the flags with the defaults that the rest of the line leads to."""
    base = preset_named(DEFAULT_PRESET)
    with contextlib.suppress(ConfigError):
        others = [word for word in argv if word not in _HELP]
        base = _base(_find_run(_read_words(others, program.options), False)[0])
    asked = next(word for word in argv if word in _HELP)
    _ask_tyro([asked], base, program, quiet)
    raise SystemExit(0)


def _ask_tyro(
    line: list[str], base: Config, program: Program, quiet: bool
) -> tuple[Config, LaunchOptions]:
    """tyro's reading of ``line`` over the defaults ``base``, and the program's own flags."""
    names = [row.name for row in dataclasses.fields(Config)]
    options = program.options
    row = ("launch", options, field(default_factory=options))
    form = dataclasses.make_dataclass("Form", [row], bases=(Config,), frozen=True, kw_only=True)
    default = form(**{name: getattr(base, name) for name in names})
    complaint = io.StringIO()
    try:
        with contextlib.redirect_stderr(complaint):
            parsed = tyro.cli(
                form,
                prog=program.name,
                description=program.description,
                args=line,
                default=default,
                console_outputs=not quiet,
                compact_help=True,
                config=(tyro.conf.OmitArgPrefixes,),
            )
            return parsed, parsed.launch
    except SystemExit as end:
        if not end.code:
            raise
        told = " ".join(re.sub(r"[^\x20-\x7e]", " ", complaint.getvalue()).split())
        raise ConfigError("command line", shlex.join(line), told or "was refused") from None


def _flags(options: type[LaunchOptions]) -> Mapping[str, tuple[Setting, bool]]:
    """Every flag -> its setting, and whether the flag switches off."""
    launch = get_type_hints(options)
    rows = [setting_of_type("launch", name, hint) for name, hint in launch.items()]
    rows += settings().values()
    flags = {row.flag: (row, False) for row in rows}
    flags |= {f"--no-{row.flag[2:]}": (row, True) for row in rows if row.kind == "bool"}
    flags |= {alias: flags[flag] for alias, flag in _ALIASES.items()}
    return flags


def _read_words(argv: Sequence[str], options: type[LaunchOptions]) -> dict[str, _Word]:
    """The flags of ``argv`` by setting, all checked."""
    flags = _flags(options)
    words: dict[str, _Word] = {}
    place = 0
    while place < len(argv):
        flag, has_value, value = argv[place].partition("=")
        place += 1
        texts = [value] if has_value else []
        if flag not in flags:
            follows = argv[place] if place < len(argv) and not is_flag(argv[place]) else ""
            raise _unknown(flag, value if has_value else follows, flags)
        setting, _ = flags[flag]
        room = (0 if setting.kind == "bool" else setting.count or len(argv)) - len(texts)
        while room > 0 and place < len(argv) and not is_flag(argv[place]):
            texts.append(argv[place])
            place, room = place + 1, room - 1
        word = _Word(setting, flag, _checked(setting, flag, texts))
        _refuse_second(words.get(setting.name), word)
        words[setting.name] = word
    return words


def _find_run(words: dict[str, _Word], again: bool) -> tuple[dict[str, _Word], bool]:
    """The words with the run that ``--load auto`` finds, which needs no other beginning."""
    typed = {name: word.texts[0] for name, word in words.items() if word.texts}
    load, auto = find_run(typed.get("load"), typed.get("save"), again=again)
    if not auto:
        return words, False
    kept = {name: word for name, word in words.items() if name != "load"}
    if load is not None:
        kept.pop("load_hf", None)
        kept["load"] = _Word(settings()["load"], "--load", (load,))
    return kept, True


def _unknown(flag: str, value: str, flags: Collection[str]) -> ConfigError:
    why = why_meaningless(flag)
    if why is not None:
        return ConfigError(
            flag, value, f"a flag of Megatron without a meaning here: {why[0]}", why[1]
        )
    return unknown(flag, value, flags)


def _checked(setting: Setting, flag: str, texts: list[str]) -> tuple[str, ...]:
    if setting.kind == "bool":
        if texts:
            off = f"--no-{setting.flag[2:]}"
            rule = "is a switch and takes no value"
            raise ConfigError(flag, texts[0], rule, f"{setting.flag} or {off}")
        return ()
    if not texts:
        hint = ", ".join(setting.choices)
        raise ConfigError(flag, "", "needs a value", hint or f"{flag} {_values(setting)}")
    texts = setting.words(texts)
    counted = setting.kind == "ints" and setting.count > 0
    if counted and len(texts) != setting.count and texts != ["None"]:
        rule = f"needs {setting.count} whole numbers"
        raise ConfigError(flag, " ".join(texts), rule, f"{flag} {_values(setting)}")
    for text in texts:
        try:
            setting.from_text(text)
        except BadValueError as error:
            raise ConfigError(flag, text, error.rule, error.works) from None
    return tuple(texts)


def _values(setting: Setting) -> str:
    return " ".join(["VALUE"] * max(1, setting.count))


def _refuse_second(first: _Word | None, second: _Word) -> None:
    """The same flag with two values: one of them would silently be ignored."""
    if first is None or (first.flag, first.texts) == (second.flag, second.texts):
        return
    one, two = (" ".join([word.flag, *word.texts]) for word in (first, second))
    raise ConfigError(second.flag, " ".join(second.texts), f"contradicts {one}", f"{one}, or {two}")


def _base(words: Mapping[str, _Word]) -> Config:
    """What the flags override: the preset, the ``--config`` file, the run that is loaded."""
    typed = {name: word.texts[0] for name, word in words.items() if word.texts}
    typed = {name: text for name, text in typed.items() if text != "None"}
    preset, load, file = typed.get("preset"), typed.get("load"), typed.get("config")
    if load is not None and "load_hf" in typed:
        rule = f"starts a new run, --load {load} goes on with one"
        raise ConfigError("--load-hf", typed["load_hf"], rule, "one of the two")
    earlier: Values = {"preset": preset} if preset else {}
    values: Values = {}
    if file is not None:
        values = _values_of_file(file)
        _refuse_lost(values, earlier, f"--config {file}")
    base = preset_named(preset or values.get("preset", DEFAULT_PRESET))
    folder = typed.get("load_hf", values.get("load_hf"))
    if load is None and folder is not None:
        said = words.keys() | values.keys()
        base = _started_from(
            base, folder, tokenizer=not said & {"tokenizer_type", "tokenizer_model"}
        )
        if "preset" not in said:
            base = dataclasses.replace(base, optimizer=PRETRAINED_OPTIMIZER)
    base = overlay(base, values)
    if load is None:
        return base
    saved = _values_of_run(load)
    # A setting that is a flag too is taken from the flag: nothing is lost there.
    untyped = {name: value for name, value in values.items() if name not in words}
    _refuse_lost(saved, {**untyped, **earlier}, f"--load {load}")
    return overlay(base, saved)


def _started_from(base: Config, folder: str, *, tokenizer: bool) -> Config:
    """The preset with the model of a Hugging Face folder, and its tokenizer where none is said."""
    model, data = read_hf_config(folder).model, base.data
    if tokenizer and has_tokenizer(folder):
        values = {"tokenizer_type": "huggingface", "tokenizer_model": folder}
        data = overlay(base, values).data
    # Training has the dropout of the preset, not of the model's own training.
    model = dataclasses.replace(
        model,
        attention_dropout=base.model.attention_dropout,
        hidden_dropout=base.model.hidden_dropout,
        make_vocab_size_divisible_by=base.model.make_vocab_size_divisible_by,
    )
    return dataclasses.replace(base, model=model, data=data)


def _values_of_file(file: str) -> Values:
    """The settings of a ``--config`` file."""
    values = read_values(read_file(Path(file), "--config"), f"--config {file}")
    if values.get("load") is not None:
        rule = "a file can not say which run to load"
        key = f"--config {file}: {settings()['load'].key}"
        raise ConfigError(key, values["load"], rule, f"--load {values['load']}")
    return values


def _values_of_run(load: str) -> Values:
    """The settings of the run that ``--load`` names."""
    path = run_folder(Path(load)) / CONFIG_FILE
    if not os.path.isfile(path):  # a Path's own raises for a name that is too long
        rule = f"is no run's folder: it has no {CONFIG_FILE}"
        raise ConfigError("--load", load, rule, runs_near(path.parent))
    return read_values(read_file(path, "--load"), str(path))


def _refuse_lost(later: Values, earlier: Values, source: str) -> None:
    """A setting of ``--preset`` or ``--config`` that ``source`` would silently override."""
    for name, value in sorted(earlier.items()):
        if name in ("save", "load") or name not in later or later[name] == value:
            continue
        flag = settings()[name].flag
        rule = f"{source} brings {later[name]}, which goes before presets and files"
        raise ConfigError(flag, value, rule, f"leave it out, or give {flag} as a flag")


def _place_of_run(config: Config, given: frozenset[str]) -> Config:
    """A loaded run goes on in its own folder, wherever that was moved to."""
    checkpoint = config.checkpoint
    if "--load" not in given:
        checkpoint = dataclasses.replace(checkpoint, load=None)
    elif checkpoint.load is not None and "--save" not in given:
        save = str(run_folder(Path(checkpoint.load)))
        checkpoint = dataclasses.replace(checkpoint, save=save)
    return dataclasses.replace(config, checkpoint=checkpoint)


def _fold_bf16(config: Config, given: frozenset[str]) -> Config:
    """``--bf16`` said as ``--dtype bfloat16``. A flag overrides the other one's value in a file."""
    train, dtype = config.train, config.train.dtype
    typed = given & {"--bf16", "--dtype"}
    if "--bf16" in typed and not train.bf16 and dtype == "bfloat16":
        raise ConfigError("--no-bf16", "", "contradicts --dtype bfloat16", "--dtype float32")
    if train.bf16 and typed != {"--dtype"}:
        if len(typed) != 1 and dtype not in ("auto", "bfloat16"):
            raise ConfigError("--bf16", "", f"contradicts --dtype {dtype}", "one of the two")
        dtype = "bfloat16"
    folded = dataclasses.replace(train, dtype=dtype, bf16=False)
    return dataclasses.replace(config, train=folded)
