"""What an evaluation will do, checked before torch is imported: rows, tasks, how they are shared.

The checks of a run are asked for each length; what only training reads is refused where it is
typed. Evaluation has no dropout, no masks of documents, and one row at a time on a rank.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from rich.console import Console

from cp_megatron.checkpoint.manifest import Manifest, read_manifest
from cp_megatron.checkpoint.newest import named_step
from cp_megatron.cli.programs import TASKS, EvaluationOptions, Part
from cp_megatron.comm.runtime import Launch
from cp_megatron.config import Config, LogConfig, ModelConfig, OptimizerConfig, TrainConfig
from cp_megatron.config.fields import check_values, settings
from cp_megatron.config.files.yaml_io import overlay
from cp_megatron.config.schema.ranges import LARGEST_SIZE
from cp_megatron.data.tokenize.tokenizer import open_tokenizer
from cp_megatron.errors import ConfigError
from cp_megatron.evaluate.needle import Encode, Haystack, Kind, Task, make_task
from cp_megatron.metrics.plots import require_matplotlib
from cp_megatron.preflight.check import RunPlan, check
from cp_megatron.preflight.rope_rules import FIELDS
from cp_megatron.preflight.save_and_load import check_goes_on

_READ: frozenset[str] = frozenset({"seed", "dtype", "bf16", "device", "deterministic"})
"""Settings of the training that an evaluation reads."""
_ROPE: frozenset[str] = FIELDS | {"rope_type", "rotary_base", "original_max_position_embeddings"}
"""Settings of rotary positions; they hold no weight, so others may be tried out."""
_UNREAD_ELSEWHERE: frozenset[str] = frozenset(
    {
        *("save", "save_interval", "async_save", "keep_latest_k", "save_retain_interval"),
        *("seq_length", "micro_batch_size", "global_batch_size"),
        *("pad_rows", "document_mask", "allow_data_change", "sequence_parallel"),
        *("train_data_path", "valid_data_path", "test_data_path", "packing", "sft"),
        *("hidden_dropout", "attention_dropout", "init_method_std"),
    }
)


@dataclass(frozen=True, kw_only=True)
class EvaluationPlan:
    """An evaluation that passed every check.

    Attributes:
        options: what is asked, lengths and depths in increasing order.
        part: of the data that the perplexity reads.
        own_text: the text of the needle tasks is the user's, not Python's.
        plot: pictures are drawn.
        runs: per length, what a run on rows of that length would be; the same model and grid.
        load: the checkpoint, step-N, or a Hugging Face folder.
        manifest: of the checkpoint; None of a Hugging Face folder.
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
        """The plan of the longest rows, which the model is built with."""
        return self.runs[-1]

    @property
    def kinds(self) -> tuple[Kind, ...]:
        """The tasks that ask a question."""
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
) -> EvaluationPlan:
    """The plan of the evaluation.

    Args:
        config: the loaded run with the user's flags.
        options: what is asked.
        launch: how this process was started.
        given: flags the user typed.
        argv: the user's words, for the corrected command.
        script: the program as the user called it, for the same.

    Raises:
        ConfigError: it is not possible.
    """
    options = _checked_options(options, given)
    plot = config.log.plot or "--plot" not in given  # of the loaded run's pictures it says nothing
    if plot and not options.dry_run:
        _check_plots()
    _refuse_training_flags(given)
    if config.checkpoint.load is None and config.checkpoint.load_hf is None:
        works = "--load RUN or --load-hf DIR"
        raise ConfigError("--load", "", "an evaluation needs a trained model", works)
    _check_part(config, options, given)
    config = _without_training(config)
    _check_positions(config.model, options.lengths)
    runs = []
    for length in options.lengths:
        row = replace(config.data, seq_length=length)
        checkpoint = replace(config.checkpoint, load=None)
        asked = replace(config, data=row, checkpoint=checkpoint)
        try:
            run = check(
                asked,
                launch,
                dry_run=options.dry_run,
                dry_run_world_size=options.world_size,
                given=given,
                argv=argv,
                script=script,
            )
        except ConfigError as error:
            if error.flag != "--seq-length":
                raise
            raise ConfigError("--lengths", error.value, error.rule, error.works) from None
        runs.append(run)
    load, manifest = Path(str(config.checkpoint.load_hf)), None
    if config.checkpoint.load is not None:
        load, manifest = _find_checkpoint(config, runs[-1].vocab_size)
    plan = EvaluationPlan(
        options=options,
        part=options.part or ("all" if manifest is None or "--data-path" in given else "valid"),
        own_text="--data-path" in given,
        plot=plot,
        runs=tuple(runs),
        load=load,
        manifest=manifest,
    )
    if plan.kinds:  # the questions fit, whatever the text is
        tokenizer = open_tokenizer(config.data.tokenizer_type, config.data.tokenizer_model)
        text = Haystack.of("A text.", tokenizer.encode)
        make_tasks(plan, options.lengths[0], text, tokenizer.encode)
    return plan


def print_plan(plan: EvaluationPlan) -> None:
    """Prints what will be evaluated, and how rows are shared."""
    grid, options = plan.longest.grid, plan.options
    ranks = f"dp {grid.dp} x cp {grid.cp} x tp {grid.tp}"
    console = Console()
    step = "" if plan.manifest is None else f", step {plan.manifest.step:,}"
    lines = [
        f"evaluates  {plan.load}{step}",
        f"world      {grid.world_size:,} ranks = {ranks}",
        f"tasks      {', '.join(options.tasks)}",
        f"lengths    {', '.join(f'{length:,}' for length in options.lengths)} tokens",
        f"into       {options.output}",
    ]
    notes = dict.fromkeys(note for run in plan.runs for note in run.notes)
    for line in [*lines, *(f"note       {note}" for note in notes)]:
        console.print(line, highlight=False, markup=False, soft_wrap=True)


def make_tasks(plan: EvaluationPlan, length: int, haystack: Haystack, encode: Encode) -> list[Task]:
    """All tasks of one length: needle by depth, then variables.

    Raises:
        ConfigError: the length has no room for them.
    """
    options, seed = plan.options, plan.longest.config.train.seed
    return [
        make_task(kind, haystack, encode, seed=seed, length=length, depth=depth, sample=sample)
        for kind in plan.kinds
        for depth in (options.depths if kind == "needle" else (0,))
        for sample in range(options.num_samples)
    ]


def _checked_options(options: EvaluationOptions, given: frozenset[str]) -> EvaluationOptions:
    asked = [task for word in options.tasks for task in word.split(",") if task]
    for task in asked or [""]:
        if task not in TASKS:
            raise ConfigError("--tasks", task, "is no task", ", ".join(TASKS))
    for flag, values, least, most in (
        ("--lengths", options.lengths, 2, LARGEST_SIZE),
        ("--num-samples", (options.num_samples,), 1, LARGEST_SIZE),
        ("--buckets", (options.buckets,), 1, 32),
        ("--depths", options.depths, 0, 100),
    ):
        for value in values:
            if not least <= value <= most:
                works = str(least if value < least else most)
                raise ConfigError(flag, value, f"must lie in {least} to {most}", works)
    for flag, task in (
        ("--buckets", "perplexity"),
        ("--part", "perplexity"),
        ("--depths", "needle"),
    ):
        if flag in given and task not in asked:
            rule = f"has no effect without the task {task}"
            raise ConfigError(flag, "", rule, f"--tasks {task}")
    output = Path(options.output)
    if os.path.lexists(output) and not (output.is_dir() and not any(output.iterdir())):
        rule = "is there already, and nothing is overwritten"
        raise ConfigError("--output", options.output, rule, "a new folder")
    place = next(x for x in (output, *output.absolute().parents) if x.exists())
    if not place.is_dir() or not os.access(place, os.W_OK):
        rule = f"can not be written: {place} is no folder that one may write to"
        raise ConfigError("--output", options.output, rule, "another folder")
    lengths, depths = (tuple(sorted(set(values))) for values in (options.lengths, options.depths))
    tasks = tuple(task for task in TASKS if task in asked)
    return replace(options, tasks=tasks, lengths=lengths, depths=depths)


def _check_part(config: Config, options: EvaluationOptions, given: frozenset[str]) -> None:
    """The data is one corpus, and only a run of our own has parts of it."""
    data = config.data
    if options.part not in (None, "all") and config.checkpoint.load is None:
        rule = "a Hugging Face model does not say what it was trained on"
        raise ConfigError("--part", options.part, rule, "--part all")
    if "--data-path" in given or "perplexity" not in options.tasks:
        return
    if data.sft or any((data.train_data_path, data.valid_data_path, data.test_data_path)):
        rule = "the run has a list of paths per part, or conversations; an evaluation reads a text"
        raise ConfigError("--data-path", "", rule, "--data-path with the text to read")


def _check_plots() -> None:
    """Pictures are the half of the results, so they are not left out silently."""
    try:
        require_matplotlib("--plot")
    except ConfigError as error:
        works = f"{error.works}, or --no-plot"
        raise ConfigError(error.flag, error.value, error.rule, works) from None


def _refuse_training_flags(given: frozenset[str]) -> None:
    """What has no effect here."""
    for row in settings().values():
        unread = row.section == "optimizer" or row.name in _UNREAD_ELSEWHERE
        unread |= row.section == "log" and row.name != "plot"
        unread |= row.section == "train" and row.name not in _READ
        if unread and row.flag in given:
            works = "--lengths" if row.name == "seq_length" else "leave it out"
            raise ConfigError(row.flag, "", "has no effect on an evaluation", works)


def _without_training(config: Config) -> Config:
    """The run as an evaluation sees it: rows as long as the model takes them, nothing trained."""
    model, data, train = config.model, config.data, config.train
    rows = model.max_position_embeddings
    if model.position_embedding_type == "learned_absolute":
        rows = rows or data.seq_length
    read = {name: getattr(train, name) for name in _READ}
    return replace(
        config,
        model=replace(
            model, hidden_dropout=0.0, attention_dropout=0.0, max_position_embeddings=rows
        ),
        parallel=replace(config.parallel, sequence_parallel=False),
        data=replace(
            data,
            micro_batch_size=1,
            global_batch_size=None,
            train_data_path=(),
            valid_data_path=(),
            test_data_path=(),
            packing="concatenate",
            sft=False,
            pad_rows=True,
            document_mask=False,
        ),
        optimizer=OptimizerConfig(),
        train=TrainConfig(train_iters=LARGEST_SIZE, eval_iters=0, **read),
        checkpoint=replace(config.checkpoint, save=None),
        log=LogConfig(plot=False),
    )


def _check_positions(model: ModelConfig, lengths: Sequence[int]) -> None:
    rows = model.max_position_embeddings
    if model.position_embedding_type == "learned_absolute" and rows and lengths[-1] > rows:
        rule = f"the model has learned {rows} positions"
        raise ConfigError("--lengths", lengths[-1], rule, f"up to {rows}")


def _find_checkpoint(config: Config, vocab_size: int) -> tuple[Path, Manifest]:
    """The checkpoint; it is of this model, but for rotary positions, which one may try out."""
    check_values(config)
    step = named_step(Path(str(config.checkpoint.load)))
    manifest = read_manifest(step)
    saved = manifest.config.get("model", {})
    names = sorted(_ROPE & saved.keys())
    config = overlay(config, {n: settings()[n].from_yaml(saved[n]) for n in names})
    check_goes_on(config, manifest, vocab_size)
    _check_dtype(config, manifest)
    return step, manifest


def _check_dtype(config: Config, manifest: Manifest) -> None:
    """Weights are kept in float64 or in float32, and read as they are kept."""
    kept = {row.dtype for name, row in manifest.tensors.items() if name.startswith("model.")}
    asked = config.train.dtype
    if (asked == "float64") != ("float64" in kept):
        works = "--dtype float64" if "float64" in kept else "--dtype float32 or bfloat16"
        rule = f"the checkpoint's weights are {', '.join(sorted(kept))}"
        raise ConfigError("--dtype", asked, rule, works)
