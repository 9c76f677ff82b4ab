"""Runs a checked evaluation: loads the model, scores it and writes the results."""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch
import torch.distributed as dist
from rich.console import Console

from cp_megatron.checkpoint.hf_load import load_hf
from cp_megatron.checkpoint.load import load_checkpoint
from cp_megatron.cli.programs import EVALUATE, EvaluationOptions
from cp_megatron.cli.refusal import error_line
from cp_megatron.comm.groups import ParallelGroups
from cp_megatron.comm.runtime import Launch
from cp_megatron.context_parallel import ContextParallel
from cp_megatron.data.read.corpus import Corpus, CorpusRange
from cp_megatron.data.rows.corpora import open_single
from cp_megatron.data.rows.sampler import count_rows, parse_split, split_sizes
from cp_megatron.data.tokenize.open_tokenizer import open_tokenizer
from cp_megatron.errors import ConfigError
from cp_megatron.evaluate.check_evaluation import EvaluationSetup, make_tasks
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
from cp_megatron.evaluate.score import LabeledRow, bucket_ends, perplexity_row, score, task_row
from cp_megatron.model.transformer import Transformer
from cp_megatron.preflight.run_plan import DeviceName, RunPlan
from cp_megatron.preflight.start import begin, make_context, make_model, read_alike

HAYSTACK_ROWS = 64
"""The user's text for the needle tasks is cut to this many of the longest rows."""


def run_evaluation(setup: EvaluationSetup, launch: Launch) -> int:
    """Evaluates the model, prints the results and writes them.

    Returns:
        the exit code: 0, or 2 if the results cannot be written.

    Raises:
        ConfigError: the device, the data or the weights cannot be used.
    """
    runs, device, control = begin(setup.runs, launch)
    setup = replace(setup, runs=runs)
    try:
        results = evaluate(setup, launch, device, control)
        written = launch.rank != 0 or _show(setup, results)
        dist.barrier(group=control)
        return 0 if written else 2
    finally:
        with suppress(Exception):  # an error of a broken group must not hide its cause
            dist.destroy_process_group()


def evaluate(
    setup: EvaluationSetup, launch: Launch, device_name: DeviceName, control: dist.ProcessGroup
) -> EvaluationResults:
    """Loads the model and scores it. Every rank calls this and gets the same results.

    Args:
        setup: the evaluation; its plans name the device.
        launch: how this process was started.
        device_name: the device of the plans.
        control: a group of all ranks for CPU tensors; the default group exists.

    Raises:
        ConfigError: the data or the checkpoint cannot be used; on every rank.
    """
    options = setup.options
    reads = "perplexity" in options.tasks or (setup.kinds and setup.own_text)
    data = setup.longest.config.data
    corpus = read_alike(control, lambda: open_single(data)) if reads else None
    text = _text(setup, corpus) if corpus is not None and "perplexity" in options.tasks else None
    tasks = _tasks(setup, corpus)
    evaluator = _Evaluator.load(setup, launch, control)
    perplexity, answers = [], []
    for run in setup.runs:
        if text is not None:
            perplexity.append(evaluator.perplexity(run, text, options))
        answers += evaluator.answers(run, tasks[run.config.data.seq_length])
    about = {
        "model": str(setup.load),
        "step": None if setup.manifest is None else setup.manifest.step,
        "data": None if corpus is None else corpus.name,
        "part": setup.part if text is not None else None,
        "seed": setup.longest.config.train.seed,
        "dtype": setup.longest.dtype,
        "device": device_name,
        "grid": setup.longest.grid.sizes,
        "settings": asdict(setup.longest.config.model),
    }
    return EvaluationResults(about=about, perplexity=tuple(perplexity), answers=tuple(answers))


def _text(setup: EvaluationSetup, corpus: Corpus) -> CorpusRange:
    """Returns the part of the corpus whose perplexity is measured."""
    data, total = setup.longest.config.data, len(corpus.tokens)
    cuts = [0, total]
    if setup.part != "all":
        assert setup.manifest is not None, "only a run of ours has parts"
        plain = data.tokenizer_type == "byte"  # otherwise the fingerprint also covers the tokenizer
        changed = corpus.fingerprint != setup.manifest.data_fingerprint
        if plain and changed and not setup.own_text:
            rule = f"is not the data that {setup.load} was trained on, so its parts are not known"
            raise ConfigError("--data-path", corpus.name, rule, "name the data by --data-path")
        trained = int(setup.manifest.config["data"]["seq_length"])
        sizes = split_sizes(total, weights=parse_split(data.split), seq_length=trained)
        ends = np.cumsum(sizes).tolist()
        number = ("train", "valid", "test").index(setup.part)
        cuts = [ends[number] - sizes[number], ends[number]]
    part = corpus.range(*cuts)
    size = len(part.tokens)
    for length in setup.options.lengths:
        if count_rows(size, length) == 0:
            rule = (
                f"a row needs {length + 1} tokens, but the part {setup.part} of the data has {size}"
            )
            works = f"up to {size - 1}" if size > 2 else "--part all"
            raise ConfigError("--lengths", length, rule, f"{works}, or --data-path with more data")
    return part


def _tasks(setup: EvaluationSetup, corpus: Corpus | None) -> dict[int, list[Task]]:
    """Returns the questions of each length, equal on every rank."""
    lengths = setup.options.lengths
    if not setup.kinds:
        return {length: [] for length in lengths}
    data, text = setup.longest.config.data, library_prose()
    tokenizer = open_tokenizer(data.tokenizer_type, data.tokenizer_model)
    if setup.own_text:
        assert corpus is not None
        text = tokenizer.decode(corpus.tokens[: HAYSTACK_ROWS * lengths[-1]])
    haystack = Haystack.of(text, tokenizer.encode)
    return {length: make_tasks(setup, length, haystack, tokenizer.encode) for length in lengths}


def _show(setup: EvaluationSetup, results: EvaluationResults) -> bool:
    """Prints and writes the results; returns whether they could be written."""
    console, folder = Console(), Path(setup.options.output)
    print_results(results, console)
    try:
        files = write_results(results, folder, plot=setup.plot)
    except OSError as error:
        wrong = ConfigError("--output", folder, f"cannot be written: {error.strerror}")
        print(error_line(wrong, EVALUATE.name), file=sys.stderr, flush=True)
        return False
    for file in files:
        console.print(f"written  {file}", highlight=False, soft_wrap=True)
    return True


@dataclass(frozen=True)
class _Evaluator:
    """The loaded model on one rank, with context parallelism for each length of rows."""

    model: Transformer
    groups: ParallelGroups
    device: torch.device
    cps: Mapping[int, ContextParallel]

    @classmethod
    def load(
        cls,
        setup: EvaluationSetup,
        launch: Launch,
        control: dist.ProcessGroup,
    ) -> _Evaluator:
        """Builds the model for the longest rows and loads its weights."""
        model, groups, device = make_model(setup.longest, launch, initialize=False)
        if setup.manifest is None:
            load_hf(setup.load, model=model, process_group=control)
        else:
            load_checkpoint(setup.load, model=model, optimizer=None, process_group=control)
        cps = {each.config.data.seq_length: make_context(each, groups) for each in setup.runs}
        return cls(model, groups, device, cps)

    def perplexity(self, run: RunPlan, text: CorpusRange, options: EvaluationOptions) -> Perplexity:
        """Scores rows that are spread evenly over the text and share no label."""
        length = run.config.data.seq_length
        available = count_rows(len(text.tokens), length)
        num_rows = min(options.num_samples, available)
        ends = bucket_ends(length, options.buckets, options.lengths[-1])

        def row_of(number: int) -> LabeledRow:
            start = number * available // num_rows * length
            loss = None if text.loss is None else text.loss[start + 1 : start + length + 1]
            return perplexity_row(text.read(start, start + length + 1), ends, loss)

        table = self._score(run, row_of, num_rows, len(ends))
        buckets = [
            Bucket(first=first, end=end, score=Score.of(sums))
            for first, end, sums in zip([0, *ends], ends, table.tolist())
        ]
        whole = Score.of(table.sum(0).tolist())
        return Perplexity(length=length, rows=num_rows, whole=whole, buckets=tuple(buckets))

    def answers(self, run: RunPlan, tasks: list[Task]) -> list[Answer]:
        """Scores the answers to the questions of one length."""
        if not tasks:
            return []
        table = self._score(run, lambda n: task_row(tasks[n], n), len(tasks), len(tasks))
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

    def _score(
        self, run: RunPlan, row_of: Callable[[int], LabeledRow], num_rows: int, num_cells: int
    ) -> npt.NDArray[np.float64]:
        return score(
            self.model,
            self.groups,
            self.cps[run.config.data.seq_length],
            row_of,
            num_rows=num_rows,
            num_cells=num_cells,
            device=self.device,
            padding=run.sequence.padding,
        )
