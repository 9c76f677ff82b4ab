"""Runs a checked evaluation: loads the model, scores it and writes the results."""

from __future__ import annotations

import signal
import sys
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext, suppress
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch.distributed as dist
from rich.console import Console

from cp_megatron.checkpoint.claim_folder import claimed_folder
from cp_megatron.checkpoint.hf_load import load_hf
from cp_megatron.checkpoint.load import load_checkpoint
from cp_megatron.cli.programs import EVALUATE, EvaluationOptions
from cp_megatron.cli.refusal import error_line
from cp_megatron.comm.runtime import Launch
from cp_megatron.comm.signals import StopRequest, stop_on_signal
from cp_megatron.comm.stopping import Stopping
from cp_megatron.data.read.corpus import Corpus, CorpusRange
from cp_megatron.data.rows.corpora import open_single
from cp_megatron.data.rows.sampler import count_rows, parse_split, split_sizes
from cp_megatron.data.tokenize.open_tokenizer import tokenizer_of
from cp_megatron.errors import ConfigError
from cp_megatron.evaluate.check_evaluation import (
    DEFAULT_OUTPUT,
    EvaluationSetup,
    check_vacant,
    make_tasks,
)
from cp_megatron.evaluate.needle import Haystack, Task, library_prose
from cp_megatron.evaluate.results import (
    Answer,
    Bucket,
    EvaluationResults,
    Perplexity,
    Score,
    print_results,
    write_results,
)
from cp_megatron.evaluate.row_progress import RowProgress, Section
from cp_megatron.evaluate.score import LabeledRow, bucket_ends, perplexity_row, score, task_row
from cp_megatron.preflight.run_plan import RunPlan
from cp_megatron.preflight.save_and_load import fresh_run_folder
from cp_megatron.preflight.start import begin, make_context, make_model, read_and_compare
from cp_megatron.spec import ModelSpec

HAYSTACK_ROWS = 64
"""The user's text for the needle tasks is cut to this many of the longest rows."""
ScoreRows = Callable[..., npt.NDArray[np.float64] | None]
"""``score.score`` with the model and the context of one length bound to it."""


def run_evaluation(setup: EvaluationSetup, launch: Launch) -> int:
    """Evaluates the model, prints the results and writes them.

    A signal ends it after the row; then the measurements that are complete are the results.

    Returns:
        the exit code: 0, 2 if the results cannot be written, or 128 and its number after a signal.

    Raises:
        ConfigError: the device, the data, the weights or the folder cannot be used.
    """
    runs, _, control = begin(setup.runs, launch)
    setup = replace(setup, runs=runs)
    quiet, output = launch.rank != 0, setup.options.output
    caught = partial(stop_on_signal, quiet=quiet, then="finishing the row, then ending")
    try:
        with claimed_folder(
            lambda: (Path(output), False) if output else (_fresh_folder(), True),
            lambda: None if output is None else check_vacant(Path(output)),
            flag="--output",
            again=launch.restarts > 0,
            group=control,
        ) as (folder, note):
            if note and not quiet:
                print(f"note       {note}")
            results = evaluate(setup, launch, control, catch=caught, quiet=quiet)
            written = quiet or _show(setup, results, folder)
            dist.barrier(group=control)
        stopped = results.about["stopped_by"]
        return 128 + signal.Signals[stopped] if stopped else 0 if written else 2
    finally:
        with suppress(Exception):  # an error of a broken group must not hide its cause
            dist.destroy_process_group()


def _fresh_folder() -> Path:
    return fresh_run_folder(Path(), DEFAULT_OUTPUT)


def evaluate(
    setup: EvaluationSetup,
    launch: Launch,
    control: dist.ProcessGroup,
    *,
    catch: Callable[[], AbstractContextManager[StopRequest]] = lambda: nullcontext(StopRequest()),
    quiet: bool = True,
) -> EvaluationResults:
    """Loads the model and scores it. Every rank calls this and gets the same results.

    Args:
        setup: the evaluation; its plans name the device.
        launch: how this process was started.
        control: a group of all ranks for CPU tensors; the default group exists.
        catch: entered around the scoring; a signal that it catches ends the scoring.
        quiet: print no progress.

    Raises:
        ConfigError: the data or the checkpoint cannot be used; on every rank.
    """
    options = setup.options
    reads = "perplexity" in options.tasks or (setup.kinds and setup.own_text)
    data = setup.longest.config.data
    corpus = read_and_compare(control, lambda: open_single(data)) if reads else None
    text = _text(setup, corpus) if corpus is not None and "perplexity" in options.tasks else None
    tasks = _tasks(setup, corpus)
    model, groups, device = make_model(setup.longest, launch, initialize=False)
    if setup.manifest is None:
        load_hf(setup.load, model=model, process_group=control)
    else:
        load_checkpoint(setup.load, model=model, optimizer=None, process_group=control)
    sections = _sections(setup, model.spec, text, tasks)
    dist.barrier(group=control)  # all ranks catch signals from here on
    with catch() as stop, RowProgress(sections, Console(), quiet=quiet) as progress:
        stopping = Stopping(stop, control)

        def go_on(done: int) -> bool:
            progress.rows_done(done)
            return not stopping.agreed()

        def score_on(run: RunPlan) -> ScoreRows:
            cp, padding = make_context(run, groups), run.sequence.padding
            return partial(score, model, groups, cp, device=device, padding=padding, go_on=go_on)

        perplexity, answers = _measure(setup, text, tasks, score_on, progress.section_done)
    about = {**_about(setup, corpus, text), "stopped_by": stopping.reason or None}
    return EvaluationResults(about=about, perplexity=tuple(perplexity), answers=tuple(answers))


def _about(
    setup: EvaluationSetup, corpus: Corpus | None, text: CorpusRange | None
) -> dict[str, Any]:
    """Returns what was evaluated, and how."""
    return {
        "model": str(setup.load),
        "step": None if setup.manifest is None else setup.manifest.step,
        "data": None if corpus is None else corpus.name,
        "part": setup.part if text is not None else None,
        "seed": setup.longest.config.train.seed,
        "dtype": setup.longest.dtype,
        "device": setup.longest.device,
        "grid": setup.longest.grid.sizes,
        "settings": asdict(setup.longest.config.model),
    }


def _sections(
    setup: EvaluationSetup, spec: ModelSpec, text: CorpusRange | None, tasks: dict[int, list[Task]]
) -> list[Section]:
    """Returns what is scored, in the order of ``_measure``, with the FLOPs of a row as its cost."""
    sections = []
    for length, run in zip(setup.options.lengths, setup.runs, strict=True):
        cost = spec.training_flops(num_tokens=length, num_pairs=run.sequence.mask.pairs())
        counts = {"perplexity": 0 if text is None else _num_rows(text, length, setup.options)}
        counts[" and ".join(setup.kinds)] = len(tasks[length])
        sections += [
            Section(name=f"{length:,} tokens, {name}", rows=rows, cost=cost)
            for name, rows in counts.items()
            if rows
        ]
    return sections


def _measure(
    setup: EvaluationSetup,
    text: CorpusRange | None,
    tasks: dict[int, list[Task]],
    score_on: Callable[[RunPlan], ScoreRows],
    done: Callable[[], None],
) -> tuple[list[Perplexity], list[Answer]]:
    """Returns the measurements of all lengths, or those before a signal.

    Args:
        score_on: returns ``score`` for rows of the length of a plan.
        done: called after each measurement.
    """
    perplexity: list[Perplexity] = []
    answers: list[Answer] = []
    for length, run in zip(setup.options.lengths, setup.runs, strict=True):
        score_rows = score_on(run)
        if text is not None:
            measured = _perplexity(text, length, setup.options, score_rows)
            if measured is None:
                break
            perplexity.append(measured)
            done()
        if tasks[length]:
            answered = _answers(tasks[length], score_rows)
            if answered is None:
                break
            answers += answered
            done()
    return perplexity, answers


def _text(setup: EvaluationSetup, corpus: Corpus) -> CorpusRange:
    """Returns the part of the corpus whose perplexity is measured."""
    data, start, end = setup.longest.config.data, 0, len(corpus.tokens)
    if setup.part != "all":
        assert setup.manifest is not None, "only a run of ours has parts"
        plain = data.tokenizer_type == "byte"  # otherwise the fingerprint also covers the tokenizer
        changed = corpus.fingerprint != setup.manifest.data_fingerprint
        if plain and changed and not setup.own_text:
            rule = f"is not the data that {setup.load} was trained on, so its parts are not known"
            raise ConfigError("--data-path", corpus.name, rule, "name the data by --data-path")
        trained = int(setup.manifest.config["data"]["seq_length"])
        sizes = split_sizes(end, weights=parse_split(data.split), seq_length=trained)
        number = ("train", "valid", "test").index(setup.part)
        start, end = sum(sizes[:number]), sum(sizes[: number + 1])
    part, size = corpus.range(start, end), end - start
    for length in setup.options.lengths:
        if count_rows(size, length) == 0:
            rule = f"a row needs {length + 1} tokens, but the part {setup.part} has {size}"
            works = f"up to {size - 1}" if size > 2 else "--part all"
            raise ConfigError("--lengths", length, rule, f"{works}, or --data-path with more data")
    return part


def _tasks(setup: EvaluationSetup, corpus: Corpus | None) -> dict[int, list[Task]]:
    """Returns the questions of each length, equal on every rank."""
    lengths = setup.options.lengths
    if not setup.kinds:
        return {length: [] for length in lengths}
    data, text = setup.longest.config.data, library_prose()
    tokenizer = tokenizer_of(data)
    if setup.own_text:
        assert corpus is not None
        text = tokenizer.decode(corpus.tokens[: HAYSTACK_ROWS * lengths[-1]])
    haystack = Haystack.of(text, tokenizer.encode)
    return {length: make_tasks(setup, length, haystack, tokenizer.encode) for length in lengths}


def _show(setup: EvaluationSetup, results: EvaluationResults, folder: Path) -> bool:
    """Prints and writes the results; returns whether they could be written."""
    console, stopped = Console(), results.about["stopped_by"]
    if stopped and not (results.perplexity or results.answers):
        console.print(f"{stopped} ended the evaluation before its first result")
        return True
    print_results(results, console)
    try:
        files = write_results(results, folder, plot=setup.plot)
    except OSError as error:
        wrong = ConfigError("--output", folder, f"cannot be written: {error.strerror}")
        print(error_line(wrong, EVALUATE.name), file=sys.stderr, flush=True)
        return False
    for file in files:
        console.print(f"written  {file}", highlight=False, soft_wrap=True)
    if stopped:
        console.print(
            f"{stopped} ended the evaluation: only what was complete is shown and written"
        )
    return True


def _num_rows(text: CorpusRange, length: int, options: EvaluationOptions) -> int:
    return min(options.num_samples, count_rows(len(text.tokens), length))


def _perplexity(
    text: CorpusRange, length: int, options: EvaluationOptions, score_rows: ScoreRows
) -> Perplexity | None:
    """Scores rows that are spread evenly over the text and share no label; None if stopped."""
    available = count_rows(len(text.tokens), length)
    num_rows = _num_rows(text, length, options)
    ends = bucket_ends(length, options.buckets, options.lengths[-1])

    def row_of(number: int) -> LabeledRow:
        start = number * available // num_rows * length
        loss = None if text.loss is None else text.loss[start + 1 : start + length + 1]
        return perplexity_row(text.read(start, start + length + 1), ends, loss)

    table = score_rows(row_of, num_rows=num_rows, num_cells=len(ends))
    if table is None:
        return None
    buckets = [
        Bucket(first=first, end=end, score=Score.of(sums))
        for first, end, sums in zip([0, *ends], ends, table.tolist())
    ]
    whole = Score.of(table.sum(0).tolist())
    return Perplexity(length=length, rows=num_rows, whole=whole, buckets=tuple(buckets))


def _answers(tasks: list[Task], score_rows: ScoreRows) -> list[Answer] | None:
    """Scores the answers to the questions of one length; None if stopped."""
    num_rows = len(tasks)
    table = score_rows(lambda n: task_row(tasks[n], n), num_rows=num_rows, num_cells=num_rows)
    if table is None:
        return None
    return [
        Answer(
            task=task.kind,
            length=task.length,
            depth=task.depth,
            sample=task.sample,
            answer=task.answer.strip(),
            exact=right == tokens,
            token_accuracy=right / tokens,
            log_probability=-loss,
        )
        for task, (loss, right, tokens) in zip(tasks, table.tolist(), strict=True)
    ]
