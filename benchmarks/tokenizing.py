"""How fast is ``prepare_data`` on all cores, next to the library that it uses?

Both read the same JSON lines, tokenize them with the same byte-level BPE, and write the ids:

- ``ours``: ``cp_megatron.data.prepare.prepare``, from the start of its processes to the final
  .bin/.idx;
- ``library``: ``encode_batch_fast`` of ``tokenizers`` with its own threads, on 16 MB of text at a
  time; numpy joins the ids and writes them to one file.

Each round measures both, in alternating order; the ratio is the median of the ratios of the rounds.
Prints one JSON line, with the hardware. The text is Python's standard library, each file cut at
random places and repeated until there is enough, or what --text names; the tokenizer is trained on
it unless --tokenizer names one.

    python benchmarks/tokenizing.py                     # 100 MB, minutes
    python benchmarks/tokenizing.py --quick             # seconds
"""

from __future__ import annotations

import json
import os
import random
import statistics
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import harness  # noqa: F401 - so that tests can be imported
import numpy as np

from cp_megatron.config.words import read_options
from cp_megatron.data.prepare.prepare import cores, prepare
from cp_megatron.data.prepare.request import Request
from cp_megatron.data.read.indexed import IndexedDataset, optimal_dtype
from cp_megatron.data.read.text_files import load_text_files
from cp_megatron.data.tokenize.tokenizer import ByteTokenizer
from cp_megatron.data.tokenize.tokenizer_huggingface import HuggingFaceTokenizer
from tests.data.tokenizer_files import train_byte_level

BATCH_BYTES = 1 << 24
TRAINED_ON = 4_000_000


@dataclass(frozen=True, kw_only=True)
class Arguments:
    """prepare_data against the batches of tokenizers."""

    text: str | None = None
    """A text file or a folder of text files; by default Python's standard library."""
    tokenizer: str | None = None
    """A tokenizer.json; by default one is trained on the text."""
    megabytes: float = 100.0
    """Megabytes of text to tokenize."""
    vocab_size: int = 16_384
    """The vocabulary of the tokenizer that is trained."""
    rounds: int = 5
    """Measured rounds."""
    quick: bool = False
    """Use one megabyte and one round, which show that the script runs."""


def documents(text: str | None, size: int) -> Iterator[str]:
    """Documents of ``size`` bytes in total, cut at random."""
    tokenizer = ByteTokenizer()
    corpus = load_text_files([text] if text else [], tokenizer)
    ends = [*corpus.document_starts.tolist()[1:], len(corpus.tokens)]
    files = [
        tokenizer.decode(corpus.tokens[start:end])
        for start, end in zip(corpus.document_starts, ends)
    ]
    rng = random.Random(0)
    while size > 0:
        lines = rng.choice(files).splitlines(keepends=True)
        first, last = sorted((rng.randrange(len(lines) + 1), rng.randrange(len(lines) + 1)))
        document = "".join(lines[first:last])
        if document:
            size -= len(document.encode())
            yield document


def trained(texts: list[str], vocab_size: int, path: Path) -> str:
    """Trains a byte-level BPE and writes its ``tokenizer.json``."""
    sample, left = [], TRAINED_ON
    for text in texts:
        sample.append(text)
        left -= len(text)
        if left < 0:
            break
    train_byte_level(sample, path, vocab_size=vocab_size)
    return str(path)


def run_library(source: Path, tokenizer: str, output: Path) -> float:
    """Seconds that the batches of the library take."""
    start = time.perf_counter()
    library = HuggingFaceTokenizer.read(Path(tokenizer))  # adds only the copy to numpy
    dtype, end = optimal_dtype(library.vocab_size), np.array([library.eod])
    with source.open("rb") as lines, output.open("wb") as stream:
        while batch := lines.readlines(BATCH_BYTES):
            texts = [json.loads(line)["text"] for line in batch]
            parts = [part for ids in library.encode_batch(texts) for part in (ids, end)]
            np.concatenate(parts).astype(dtype).tofile(stream)
    return time.perf_counter() - start


def run_ours(source: Path, tokenizer: str, prefix: Path) -> float:
    """Seconds that ``prepare`` takes; its old output is deleted first."""
    for suffix in (".bin", ".idx"):
        Path(f"{prefix}_text_document{suffix}").unlink(missing_ok=True)
    request = Request(
        input=(str(source),),
        output_prefix=str(prefix),
        tokenizer_type="huggingface",
        tokenizer_model=tokenizer,
    )
    start = time.perf_counter()
    prepare(request)
    return time.perf_counter() - start


def measure(arguments: Arguments, folder: Path) -> dict[str, object]:
    size = 1_000_000 if arguments.quick else int(arguments.megabytes * 1e6)
    texts = list(documents(arguments.text, size))
    source = folder / "text.jsonl"
    source.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    vocab_size = 500 if arguments.quick else arguments.vocab_size
    tokenizer = arguments.tokenizer or trained(texts, vocab_size, folder / "tokenizer.json")
    seconds: dict[str, list[float]] = {"ours": [], "library": []}
    for number in range(1 if arguments.quick else arguments.rounds):
        for name in ("ours", "library") if number % 2 else ("library", "ours"):
            output = folder / name
            run = run_ours if name == "ours" else run_library
            seconds[name].append(run(source, tokenizer, output))
    made = IndexedDataset.open(f"{folder / 'ours'}_text_document")
    assert np.array_equal(made.tokens, np.fromfile(folder / "library", dtype=made.tokens.dtype))
    ratios = [ours / library for ours, library in zip(seconds["ours"], seconds["library"])]
    return {
        "result": "prepare",
        "megabytes": round(sum(len(text.encode()) for text in texts) / 1e6, 1),
        "documents": len(texts),
        "tokens": len(made.tokens),
        "processes": cores(),
        **{f"{name}_s": [round(s, 2) for s in times] for name, times in seconds.items()},
        "ratio": round(statistics.median(ratios), 3),
    }


def main() -> None:
    from harness.teams import (
        hardware,
    )  # imported here, because every process of ours would import torch otherwise

    arguments = read_options(sys.argv[1:], Arguments, program=sys.argv[0], description=__doc__)
    load = round(os.getloadavg()[0], 2)
    with tempfile.TemporaryDirectory() as folder:
        result = measure(arguments, Path(folder))
    machine = {**hardware(), "load_before": load}
    print(json.dumps({"benchmark": "tokenizing", **result, "hardware": machine}), flush=True)


if __name__ == "__main__":
    main()
