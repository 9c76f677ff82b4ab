"""The command line of ``launch/prepare_data.py``: its flags and what it prints."""

from __future__ import annotations

import time
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

from cp_megatron.config.words import read_options
from cp_megatron.data.prepare.prepare import Prepared, WorkAhead, prepare
from cp_megatron.data.prepare.prepare_worker import SpanProgress
from cp_megatron.data.prepare.request import Request
from cp_megatron.errors import ConfigError

PROGRAM = "prepare_data.py"
_SHOWN = 10
_DESCRIPTION = """Turn documents into Megatron's .bin/.idx, with all cores.

python launch/prepare_data.py --input corpus/*.jsonl --output-prefix data/corpus
    --tokenizer-type huggingface --tokenizer-model models/llama

makes data/corpus_text_document.bin and .idx. To continue a run that was stopped, give the same
command again."""


def parse(argv: Sequence[str]) -> Request:
    """Reads a command line, without the program's name.

    Raises:
        ConfigError: a flag is unknown or its value cannot be used.
        SystemExit: with code 0, after ``--help`` is printed.
    """
    request = read_options(argv, Request, program=PROGRAM, description=_DESCRIPTION)
    if request.output_prefix is None:
        rule = "names the path that the new files begin with"
        raise ConfigError("--output-prefix", "", rule, "--output-prefix data/corpus")
    return request


def run(request: Request, console: Console | None = None) -> Prepared:
    """Prepares the data and shows the progress.

    Raises:
        ConfigError: a flag, an input or the output cannot be used.
    """
    out = console or Console()
    view = _View(out, request.log_interval)
    with view.bar:
        prepared = prepare(request, view)
    for note in prepared.notes:
        _print(out, f"note: {note}")
    for prefix, documents, tokens in zip(prepared.outputs, prepared.documents, prepared.tokens):
        _print(out, f"{prefix}.bin .idx: {documents:,} documents, {tokens:,} tokens")
    if lines := prepared.skipped:
        path = Path(f"{request.output_prefix}_skipped.txt")
        path.write_text("".join(f"{line}\n" for line in lines), "utf-8", "backslashreplace")
        for line in lines[:_SHOWN]:
            _print(out, f"skipped {line}")
        _print(out, f"skipped {len(lines):,} in all, listed in {path}")
    return prepared


def interrupted(argv: Sequence[str]) -> str:
    """The line to print after Ctrl-C."""
    folder = parse(argv).partial
    done = len(list(folder.glob("[0-9]*.json")))
    stopped = f"{PROGRAM}: stopped; {done} finished spans are in {folder}"
    return f"{stopped}; run the same command to continue"


def _print(out: Console, text: str) -> None:
    out.print(text, highlight=False, markup=False, soft_wrap=True)


class _View:
    """Shows a progress bar on a terminal, and prints a line every ``interval`` documents."""

    def __init__(self, console: Console, interval: int) -> None:
        self._interval = interval
        self._begin = time.monotonic()
        self._weight = self._tokens = self._documents = self._reported = 0
        begin = (TextColumn("{task.percentage:>3.0f}%"), BarColumn(bar_width=None))
        end = (TextColumn("{task.description}"), TextColumn("eta"), TimeRemainingColumn())
        hidden = not console.is_terminal
        self.bar = Progress(
            *begin, *end, console=console, expand=True, transient=True, disable=hidden
        )
        self._task = self.bar.add_task("", total=None)

    def __call__(self, event: WorkAhead | SpanProgress) -> None:
        if isinstance(event, WorkAhead):
            self._begin = time.monotonic()
            self.bar.update(self._task, total=event.weight, completed=event.kept_weight)
            if event.kept_spans:
                text = f"going on: {event.kept_spans} of {event.spans} spans were finished"
                _print(self.bar.console, text)
            return
        self._weight += event.weight
        self._tokens += event.tokens
        self._documents += event.documents
        self.bar.update(self._task, advance=event.weight, description=self._rates())
        if self._documents // self._interval > self._reported:
            self._reported = self._documents // self._interval
            _print(self.bar.console, f"{self._documents:,} documents  {self._rates()}")

    def _rates(self) -> str:
        seconds = max(1e-9, time.monotonic() - self._begin)
        speed = self._weight / seconds / 1e6
        return f"{self._tokens:,} tokens  {self._tokens / seconds:,.0f} tok/s  {speed:.1f} MB/s"
