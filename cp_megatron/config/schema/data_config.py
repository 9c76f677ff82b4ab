"""Settings of the data."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from cp_megatron.config.schema.ranges import Size

TokenizerType = Literal["byte", "huggingface", "sentencepiece", "tiktoken", "gpt2"]
PackingKind = Literal["concatenate", "best-fit"]


@dataclass(frozen=True, kw_only=True)
class DataConfig:
    """Where tokens come from, and how they are cut into rows."""

    data_path: tuple[str, ...] = ()
    """Files of text, JSON (.jsonl, .ndjson, .json) or tables (.csv, .tsv, .parquet, .arrow), also
    packed, folders of them, or prefixes of .bin/.idx pairs; to weight them, put a number before
    each: 0.7 A 0.3 B. By default the sources of Python's standard library."""
    train_data_path: tuple[str, ...] = ()
    """Data for training only, written like --data-path; replaces --data-path and --split."""
    valid_data_path: tuple[str, ...] = ()
    """Data for validation only, written like --data-path."""
    test_data_path: tuple[str, ...] = ()
    """Data for the test part only, written like --data-path."""
    split: str = "969,30,1"
    """Weights of the training, validation and test parts, e.g. 969,30,1."""
    tokenizer_type: TokenizerType = "byte"
    """byte has one token per byte of UTF-8 and one for the end of a document; gpt2 reads
    --vocab-file and --merge-file, the others --tokenizer-model."""
    tokenizer_model: str | None = None
    """The tokenizer's file, or for huggingface also the folder of a model."""
    packing: PackingKind = "concatenate"
    """concatenate cuts rows from the documents laid end to end; best-fit fills each row with whole
    documents, pads the rest, and masks documents."""
    sft: bool = False
    """Read conversations from .jsonl, .json, .parquet or .arrow files; only the assistant's answers
    have a loss."""
    chat_date: str | None = None
    """The day that a chat template may write, e.g. 2026-01-31; by default it gets no date."""
    skip_bad_lines: bool = False
    """Skip and count malformed lines of JSON, rows of .csv and conversations instead of refusing
    them."""
    seq_length: Size = 2048
    """Tokens per row."""
    micro_batch_size: Size | None = None
    """Rows that go through the model at once; by default a rank's whole share of the batch."""
    global_batch_size: Size | None = None
    """Rows per training step over all ranks; by default one micro batch per data parallel rank."""
    pad_rows: bool = False
    """If the ranks cannot share rows evenly, pad rows with tokens without a loss instead of
    refusing the sequence length."""
    document_mask: bool = False
    """Restrict attention to the document of a token, and restart positions at each document."""
    allow_data_change: bool = False
    """Continue a loaded run even if its data has changed."""
    vocab_file: str | None = None
    """The vocabulary of the gpt2 tokenizer, a vocab.json: token to id."""
    merge_file: str | None = None
    """The merges of the gpt2 tokenizer, a merges.txt: a pair of tokens on each line."""
