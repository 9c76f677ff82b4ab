"""From a checked evaluation to its results. The first module on that path that imports torch."""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import asdict, replace
from datetime import timedelta
from pathlib import Path
from typing import cast

import numpy as np
import numpy.typing as npt
import torch
import torch.distributed as dist
from rich.console import Console

from cp_megatron.checkpoint.huggingface import load_hf
from cp_megatron.checkpoint.store import load_checkpoint
from cp_megatron.cli.programs import EVALUATE
from cp_megatron.cli.refusal import error_line
from cp_megatron.comm.groups import ParallelGroups
from cp_megatron.comm.runtime import Launch
from cp_megatron.context_parallel import ContextParallel
from cp_megatron.data.read.part import Part
from cp_megatron.data.read.sources import Corpus
from cp_megatron.data.rows.corpora import open_single
from cp_megatron.data.rows.sampler import count_rows, parse_split, split_sizes
from cp_megatron.data.tokenize.tokenizer import open_tokenizer
from cp_megatron.errors import ConfigError
from cp_megatron.evaluate.check_evaluation import EvaluationPlan, make_tasks
from cp_megatron.evaluate.needle import Haystack, Task, library_prose
from cp_megatron.evaluate.results import (
    Answer,
    Bucket,
    Perplexity,
    Results,
    Score,
    print_results,
    write_results,
)
from cp_megatron.evaluate.score import Row, bucket_ends, perplexity_row, score, task_row
from cp_megatron.model.parallelize import ComputeDType, build_model
from cp_megatron.model.transformer import Transformer
from cp_megatron.preflight.check import DeviceName, RunPlan
from cp_megatron.preflight.start import begin, make_context, read_alike

HAYSTACK_ROWS = 64
"""The text of the needle tasks is this many of the longest rows, where the data has so much."""


def run_evaluation(plan: EvaluationPlan, launch: Launch) -> int:
    """Evaluates as planned, prints and writes; the exit code: 0, or 2 where nothing was written.

    Raises:
        ConfigError: something that only torch or the whole of the data could tell.
    """
    runs, device, control = begin(plan.runs, launch)
    plan = replace(plan, runs=runs)
    try:
        results = evaluate(plan, launch, device, control)
        written = launch.rank != 0 or _shown(plan, results)
        dist.barrier(group=control)
        return 0 if written else 2
    finally:
        with suppress(Exception):  # a broken group must not hide what broke it
            dist.destroy_process_group()


def evaluate(
    plan: EvaluationPlan, launch: Launch, device_name: DeviceName, control: dist.ProcessGroup
) -> Results:
    """Loads the model and scores it. Called on every rank; the results are alike on all.

    Args:
        plan: on its device.
        launch: this process.
        device_name: the plan's device.
        control: a group of all ranks for CPU tensors; the default group exists.

    Raises:
        ConfigError: the data or the checkpoint can not be used; on every rank alike.
    """
    asked = plan.options
    reads = "perplexity" in asked.tasks or (plan.kinds and plan.own_text)
    data = plan.longest.config.data
    corpus = read_alike(control, lambda: open_single(data)) if reads else None
    text = _part(plan, corpus) if corpus is not None and "perplexity" in asked.tasks else None
    tasks = _tasks(plan, corpus)
    evaluator = _Evaluator.load(plan, launch, device_name, control)
    perplexity, answers = [], []
    for run in plan.runs:
        if text is not None:
            perplexity.append(
                evaluator.perplexity(
                    run,
                    text,
                    num_samples=asked.num_samples,
                    num_buckets=asked.buckets,
                    longest=asked.lengths[-1],
                )
            )
        answers += evaluator.answers(run, tasks[run.config.data.seq_length])
    about = {
        "model": str(plan.load),
        "step": None if plan.manifest is None else plan.manifest.step,
        "data": None if corpus is None else corpus.name,
        "part": plan.part if text is not None else None,
        "seed": plan.longest.config.train.seed,
        "dtype": plan.longest.dtype,
        "device": device_name,
        "grid": asdict(plan.longest.grid),
        "settings": asdict(plan.longest.config.model),
    }
    return Results(about=about, perplexity=tuple(perplexity), answers=tuple(answers))


def _part(plan: EvaluationPlan, corpus: Corpus) -> Part:
    """The tokens that the perplexity reads."""
    data, total = plan.longest.config.data, len(corpus.tokens)
    cuts = [0, total]
    if plan.part != "all":
        assert plan.manifest is not None, "another model has no parts"
        plain = data.tokenizer_type == "byte"  # else the fingerprint is of more than the data
        changed = corpus.fingerprint != plan.manifest.data_fingerprint
        if plain and changed and not plan.own_text:
            rule = f"is not the data that {plan.load} was trained on, so its parts are not known"
            raise ConfigError("--data-path", corpus.name, rule, "name the data by --data-path")
        trained = int(plan.manifest.config["data"]["seq_length"])
        sizes = split_sizes(total, weights=parse_split(data.split), seq_length=trained)
        ends = np.cumsum(sizes).tolist()
        number = ("train", "valid", "test").index(plan.part)
        cuts = [ends[number] - sizes[number], ends[number]]
    part = corpus.part(*cuts)
    size = len(part.tokens)
    for length in plan.options.lengths:
        if count_rows(size, length) == 0:
            rule = f"a row needs {length + 1} tokens, the data's part ({plan.part}) has {size}"
            works = f"up to {size - 1}" if size > 2 else "--part all"
            raise ConfigError("--lengths", length, rule, f"{works}, or --data-path with more data")
    return part


def _tasks(plan: EvaluationPlan, corpus: Corpus | None) -> dict[int, list[Task]]:
    """The questions of each length, on every rank alike."""
    lengths = plan.options.lengths
    if not plan.kinds:
        return {length: [] for length in lengths}
    data, text = plan.longest.config.data, library_prose()
    tokenizer = open_tokenizer(data.tokenizer_type, data.tokenizer_model)
    if plan.own_text:
        assert corpus is not None
        text = tokenizer.decode(corpus.tokens[: HAYSTACK_ROWS * lengths[-1]])
    haystack = Haystack.of(text, tokenizer.encode)
    return {length: make_tasks(plan, length, haystack, tokenizer.encode) for length in lengths}


def _shown(plan: EvaluationPlan, results: Results) -> bool:
    """Prints and writes the results; whether they are written."""
    console, folder = Console(), Path(plan.options.output)
    print_results(results, console)
    try:
        files = write_results(results, folder, plot=plan.plot)
    except OSError as error:
        wrong = ConfigError("--output", folder, f"can not be written: {error.strerror}")
        print(error_line(wrong, EVALUATE.name), file=sys.stderr, flush=True)
        return False
    for file in files:
        console.print(f"written  {file}", highlight=False, soft_wrap=True)
    return True


class _Evaluator:
    """The loaded model on its ranks."""

    def __init__(
        self,
        model: Transformer,
        groups: ParallelGroups,
        device: torch.device,
        cps: Mapping[int, ContextParallel],
    ) -> None:
        self._model, self._groups, self._device, self._cps = model, groups, device, cps

    @classmethod
    def load(
        cls,
        plan: EvaluationPlan,
        launch: Launch,
        device_name: DeviceName,
        control: dist.ProcessGroup,
    ) -> _Evaluator:
        """Builds the model for the longest rows and fills it from the checkpoint."""
        run = plan.longest
        assert run.dtype is not None
        device = torch.device(f"cuda:{launch.local_rank}" if device_name == "cuda" else "cpu")
        timeout = timedelta(minutes=run.config.parallel.distributed_timeout_minutes)
        groups = ParallelGroups.create(run.grid, device.type, timeout)
        dtype = cast(ComputeDType, run.dtype)
        model = build_model(
            run.config,
            groups,
            vocab_size=run.vocab_size,
            dtype=dtype,
            device=device,
            initialize=False,
        )
        if plan.manifest is None:
            load_hf(plan.load, model=model, process_group=control)
        else:
            load_checkpoint(plan.load, model=model, optimizer=None, process_group=control)
        cps = {each.config.data.seq_length: make_context(each, groups) for each in plan.runs}
        return cls(model, groups, device, cps)

    def perplexity(
        self, run: RunPlan, text: Part, *, num_samples: int, num_buckets: int, longest: int
    ) -> Perplexity:
        """Of rows spread evenly over the text, none of which share a label."""
        length = run.config.data.seq_length
        available = count_rows(len(text.tokens), length)
        num_rows, ends = min(num_samples, available), bucket_ends(length, num_buckets, longest)

        def row_of(number: int) -> Row:
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
        """Of the questions of one length."""
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
        self, run: RunPlan, row_of: Callable[[int], Row], num_rows: int, num_cells: int
    ) -> npt.NDArray[np.float64]:
        return score(
            self._model,
            self._groups,
            self._cps[run.config.data.seq_length],
            row_of,
            num_rows=num_rows,
            num_cells=num_cells,
            device=self._device,
            padding=run.sequence.padding,
        )
