"""The data to prepare, as the flags of ``prepare_data.py`` give it."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from cp_megatron.config.schema.data_config import TokenizerType
from cp_megatron.config.schema.ranges import Size


@dataclass(frozen=True, kw_only=True)
class Request:
    """The data to prepare."""

    input: tuple[str, ...] = ()
    """Files of text, JSON (.jsonl, .ndjson, .json) or tables (.csv, .tsv, .parquet, .arrow), also
    packed (.gz, .bz2, .xz, .zst), folders of these, and folders that Dataset.save_to_disk wrote;
    patterns with * and ? work. A text file is one document."""
    output_prefix: str | None = None
    """Where to write PREFIX_KEY_document.bin and .idx; KEY is text for text files."""
    tokenizer_type: TokenizerType = "byte"
    """How text is turned into ids; byte gives one id per byte of UTF-8."""
    tokenizer_model: str | None = None
    """The tokenizer's file, or the folder of a Hugging Face model."""
    vocab_file: str | None = None
    """The vocabulary of the gpt2 tokenizer, a vocab.json: token to id."""
    merge_file: str | None = None
    """The merges of the gpt2 tokenizer, a merges.txt: a pair of tokens on each line."""
    json_keys: tuple[str, ...] = ("text",)
    """The keys of a JSON object, or the columns of a table, that hold text."""
    append_eod: bool = True
    """End every document with the tokenizer's end-of-document id."""
    workers: int | None = None
    """The number of processes; by default one for each core."""
    skip_bad_lines: bool = False
    """Skip malformed JSON lines and list them in PREFIX_skipped.txt instead of refusing them."""
    log_interval: Size = 100_000
    """Documents between two lines of progress."""

    @property
    def outputs(self) -> tuple[str, ...]:
        """The prefix of each key's files."""
        return tuple(f"{self.output_prefix}_{key}_document" for key in self.json_keys)

    @property
    def partial(self) -> Path:
        """The folder of the finished spans."""
        return Path(f"{self.output_prefix}.partial")
