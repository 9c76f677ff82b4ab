"""Checks an evaluation before torch is imported.

Every length of rows is checked like a training run of that length. A flag that only training reads
is refused. An evaluation has no dropout and no document masks, and a rank scores one row at a time.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

from rich.console import Console

from cp_megatron.checkpoint.find_checkpoint import named_step
from cp_megatron.checkpoint.manifest import Manifest, read_manifest
from cp_megatron.cli.programs import TASKS, EvaluationOptions, Part
from cp_megatron.comm.runtime import Launch
from cp_megatron.config import Config
from cp_megatron.config.fields import Setting, settings
from cp_megatron.config.files.folder_lock import refuse_held
from cp_megatron.config.files.run_folders import is_vacant
from cp_megatron.config.files.yaml_io import overlay
from cp_megatron.config.schema.ranges import LARGEST_SIZE
from cp_megatron.data.tokenize.open_tokenizer import tokenizer_of
from cp_megatron.errors import ConfigError
from cp_megatron.evaluate.needle import Encode, Haystack, Kind, Task, make_task
from cp_megatron.families.mixture import BALANCE_FIELDS
from cp_megatron.families.rope_fields import ROPE_FIELDS
from cp_megatron.metrics.plots import require_matplotlib
from cp_megatron.preflight.check import check
from cp_megatron.preflight.run_plan import RunPlan
from cp_megatron.preflight.save_and_load import check_resume, check_writable
from cp_megatron.preflight.stage_rules import STAGE_FIELDS

_READ = frozenset({"seed", "dtype", "bf16", "device", "deterministic", "plot"})
"""Settings of the sections ``train``, ``optimizer`` and ``log`` that an evaluation reads."""
DEFAULT_OUTPUT = "evaluation"
"""The beginning of the folder's name without ``--output``; a number follows."""
_UNREAD_ELSEWHERE = frozenset(
    {
        *("save", "save_interval", "async_save", "keep_latest_k", "save_retain_interval"),
        *("seq_length", "micro_batch_size", "global_batch_size"),
        *("pad_rows", "document_mask", "allow_data_change", "sequence_parallel"),
        "kernel_benchmark",
        *("train_data_path", "valid_data_path", "test_data_path", "packing", "sft"),
        *("hidden_dropout", "attention_dropout"),
        *(BALANCE_FIELDS - {"moe_router_dtype"}),
        *STAGE_FIELDS,
    }
)
"""Settings of other sections that an evaluation does not read."""


@dataclass(frozen=True, kw_only=True)
class EvaluationSetup:
    """An evaluation that passed every check.

    Attributes:
        options: the user's options, with lengths and depths in increasing order.
        part: the part of the data whose perplexity is measured.
        own_text: whether the needle tasks use the user's text instead of Python's help texts.
        plot: whether pictures are drawn.
        runs: for each length, the plan of a run on rows of that length; model and grid are equal.
        load: the checkpoint ``step-N`` or the Hugging Face folder.
        manifest: the checkpoint's manifest; None for a Hugging Face folder.
    """

    options: EvaluationOptions
    part: Part
    own_text: bool
    plot: bool
    runs: tuple[RunPlan, ...]
    load: Path
    manifest: Manifest | None

    @property
    def longest(self) -> RunPlan:
        """The plan for the longest rows, which the model is built with."""
        return self.runs[-1]

    @property
    def kinds(self) -> tuple[Kind, ...]:
        """The chosen tasks that ask questions."""
        kinds: tuple[Kind, ...] = ("needle", "variables")
        return tuple(kind for kind in kinds if kind in self.options.tasks)


def check_evaluation(
    config: Config,
    options: EvaluationOptions,
    launch: Launch,
    *,
    given: frozenset[str],
    argv: Sequence[str] = (),
    script: str = "launch/evaluate.py",
) -> EvaluationSetup:
    """Checks what the user asks for, and finds the checkpoint.

    Args:
        config: the configuration of the loaded run, with the user's flags.
        options: the options of the evaluation.
        launch: how this process was started.
        given: the flags that the user typed.
        argv: the command line, for the corrected command in an error.
        script: the program as the user called it, for the same.

    Raises:
        ConfigError: the evaluation is not possible.
    """
    options = _checked_options(options, given)
    plot = _draws_pictures(config, options, given)
    _refuse_training_flags(config, given)
    _check_sources(config, options, given)
    config = _without_training(config, options.lengths[-1], given)
    check_run = partial(
        check,
        launch=launch,
        dry_run=options.dry_run,
        dry_run_world_size=options.world_size,
        given=given,
        argv=argv,
        script=script,
    )
    runs = tuple(_check_length(config, length, check_run) for length in options.lengths)
    load, manifest = _find_model(config, runs[-1].vocab_size)
    own_text = "--data-path" in given
    part = options.part or ("all" if manifest is None or own_text else "valid")
    setup = EvaluationSetup(
        options=options,
        part=part,
        own_text=own_text,
        plot=plot,
        runs=runs,
        load=load,
        manifest=manifest,
    )
    _check_questions_fit(setup)
    return setup


def print_setup(setup: EvaluationSetup) -> None:
    """Prints what will be evaluated and on which ranks."""
    grid, options = setup.longest.grid, setup.options
    step = "" if setup.manifest is None else f", step {setup.manifest.step:,}"
    lines = [
        f"evaluates  {setup.load}{step}",
        f"world      {grid.world_size:,} ranks = {grid}",
        f"tasks      {', '.join(options.tasks)}",
        f"lengths    {', '.join(f'{length:,}' for length in options.lengths)} tokens",
        f"into       {options.output or f'{DEFAULT_OUTPUT}-<n>'}",
    ]
    notes = dict.fromkeys(f"note       {note}" for run in setup.runs for note in run.notes)
    console = Console()
    for line in [*lines, *notes]:
        console.print(line, highlight=False, markup=False, soft_wrap=True)


def make_tasks(
    setup: EvaluationSetup, length: int, haystack: Haystack, encode: Encode
) -> list[Task]:
    """Makes all tasks of one length: needle by depth, then variables.

    Raises:
        ConfigError: the length is too short for a question.
    """
    options, seed = setup.options, setup.longest.config.train.seed
    return [
        make_task(kind, haystack, encode, seed=seed, length=length, depth=depth, sample=sample)
        for kind in setup.kinds
        for depth in (options.depths if kind == "needle" else (0,))
        for sample in range(options.num_samples)
    ]


def _checked_options(options: EvaluationOptions, given: frozenset[str]) -> EvaluationOptions:
    readers = {"--buckets": "perplexity", "--part": "perplexity", "--depths": "needle"}
    for flag, task in readers.items():
        if flag in given and task not in options.tasks:
            rule = f"has no effect without the task {task}"
            raise ConfigError(flag, "", rule, f"--tasks {task}")
    output = Path(options.output or f"{DEFAULT_OUTPUT}-1")
    if options.output is not None:
        if not options.dry_run:
            refuse_held("--output", output)
        check_vacant(output)
    check_writable("--output", output)
    lengths, depths = (tuple(sorted(set(values))) for values in (options.lengths, options.depths))
    tasks = tuple(task for task in TASKS if task in options.tasks)
    return replace(options, tasks=tasks, lengths=lengths, depths=depths)


def check_vacant(output: Path) -> None:
    """Refuses a folder that holds something already.

    Raises:
        ConfigError: it does.
    """
    if not is_vacant(output):
        rule = "exists already, and nothing is overwritten"
        raise ConfigError("--output", output, rule, "a new folder")


def _draws_pictures(config: Config, options: EvaluationOptions, given: frozenset[str]) -> bool:
    """Whether pictures are drawn. Without --no-plot, a missing matplotlib is an error."""
    plot = config.log.plot or "--plot" not in given  # the loaded run's setting does not count
    if plot and not options.dry_run:
        try:
            require_matplotlib("--plot")
        except ConfigError as error:
            works = f"{error.works}, or --no-plot"
            raise ConfigError(error.flag, error.value, error.rule, works) from None
    return plot


def _is_unread(row: Setting) -> bool:
    if row.section in ("optimizer", "log", "train"):
        return row.name not in _READ
    return row.name in _UNREAD_ELSEWHERE


def _refuse_training_flags(config: Config, given: frozenset[str]) -> None:
    for row in settings().values():
        if row.name == "sequence_parallel" and config.model.num_experts:
            continue
        if row.flag in given and (_is_unread(row) or row.name == "init_method_std"):
            works = "--lengths" if row.name == "seq_length" else "leave it out"
            if row.name in STAGE_FIELDS:
                works += ": any checkpoint loads on a grid without pipeline stages"
            raise ConfigError(row.flag, "", "has no effect on an evaluation", works)


def _check_sources(config: Config, options: EvaluationOptions, given: frozenset[str]) -> None:
    """Checks that there is a model and, for the perplexity, a single corpus."""
    data, load = config.data, config.checkpoint.load
    if load is None and config.checkpoint.load_hf is None:
        works = "--load RUN or --load-hf DIR"
        raise ConfigError("--load", "", "an evaluation needs a trained model", works)
    if options.part not in (None, "all") and load is None:
        rule = "a Hugging Face model does not say what it was trained on"
        raise ConfigError("--part", options.part, rule, "--part all")
    if "--data-path" in given or "perplexity" not in options.tasks:
        return
    if data.sft or any((data.train_data_path, data.valid_data_path, data.test_data_path)):
        rule = "the run has conversations or a list of paths per part, but perplexity needs a text"
        raise ConfigError("--data-path", "", rule, "--data-path with the text to read")


def _without_training(config: Config, longest: int, given: frozenset[str]) -> Config:
    """Resets what only training reads, so that the checks of a run do not judge it.

    Experts need sequence parallelism, which is turned on for them unless the user chose.

    Raises:
        ConfigError: the model has learned fewer positions than the longest row has.
    """
    model, default = config.model, Config()
    rows = model.max_position_embeddings
    if model.position_embedding_type == "learned_absolute":
        rows = rows or config.data.seq_length
        if longest > rows:
            rule = f"the model has learned {rows} positions"
            raise ConfigError("--lengths", longest, rule, f"up to {rows}")
    unread = [row for row in settings().values() if _is_unread(row)]
    values = {row.name: getattr(getattr(default, row.section), row.name) for row in unread}
    values |= {"micro_batch_size": 1, "pad_rows": True, "train_iters": LARGEST_SIZE}
    values |= {"eval_iters": 0, "plot": False, "max_position_embeddings": rows}
    if model.num_experts:
        parallel = config.parallel
        chosen = parallel.sequence_parallel and "--sequence-parallel" in given
        by_default = parallel.tensor_parallel_size > 1 and "--sequence-parallel" not in given
        values["sequence_parallel"] = chosen or by_default
    return overlay(config, values)


def _check_length(config: Config, length: int, check_run: Callable[[Config], RunPlan]) -> RunPlan:
    """Checks a run on rows of this length; the checkpoint is checked separately."""
    try:
        return check_run(overlay(config, {"seq_length": length, "load": None}))
    except ConfigError as error:
        if error.flag != "--seq-length":
            raise
        raise ConfigError("--lengths", error.value, error.rule, error.works) from None


def _find_model(config: Config, vocab_size: int) -> tuple[Path, Manifest | None]:
    """Finds the Hugging Face folder, or the checkpoint, which must be of this model.

    Only settings of rotary positions may differ from the checkpoint's, and weights are not
    converted between float64 and other dtypes.
    """
    if config.checkpoint.load is None:
        return Path(str(config.checkpoint.load_hf)), None
    step = named_step(Path(config.checkpoint.load))
    manifest = read_manifest(step)
    saved = manifest.config.get("model", {})
    # Rotary positions have no weights, so other settings can be tried.
    names = {"rope_type", "rotary_base", *ROPE_FIELDS}
    if config.model.position_embedding_type == "rope":
        names |= {"max_position_embeddings"}  # otherwise the rows of a table of weights
    rotary = sorted(saved.keys() & names)
    config = overlay(config, {name: settings()[name].from_yaml(saved[name]) for name in rotary})
    check_resume(config, manifest, vocab_size)
    kept = {row.dtype for name, row in manifest.tensors.items() if name.startswith("model.")}
    asked = config.train.dtype
    if (asked == "float64") != ("float64" in kept):
        works = "--dtype float64" if "float64" in kept else "--dtype float32 or bfloat16"
        rule = f"the checkpoint's weights are {', '.join(sorted(kept))}"
        raise ConfigError("--dtype", asked, rule, works)
    return step, manifest


def _check_questions_fit(setup: EvaluationSetup) -> None:
    """Makes the questions of the shortest length; their size does not depend on the text."""
    if not setup.kinds:
        return
    data = setup.longest.config.data
    tokenizer = tokenizer_of(data)
    text = Haystack.of("A text.", tokenizer.encode)
    make_tasks(setup, setup.options.lengths[0], text, tokenizer.encode)
