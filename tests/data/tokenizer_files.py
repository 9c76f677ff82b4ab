"""Small tokenizers of each kind, made for a test."""

from __future__ import annotations

import base64
import io
import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

TEXTS = ("the cat sat on the mat", "naïve € text, a bit of it", "one two three four five") * 20


def train_byte_level(
    texts: Iterable[str],
    path: Path,
    *,
    vocab_size: int,
    special: Sequence[str] = ("<|endoftext|>",),
) -> Any:
    """Trains a byte-level BPE as GPT-2 has it, and writes it as ``tokenizer.json``.

    Returns:
        The tokenizer of the package ``tokenizers``. Its special tokens have the ids 0, 1, ...
    """
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    library = Tokenizer(models.BPE())
    library.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    library.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=list(special),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    library.train_from_iterator(texts, trainer)
    library.save(str(path))
    return library


def huggingface(folder: Path, *, special: tuple[str, ...] = ("<|endoftext|>",)) -> Path:
    """A byte-level BPE of 300 entries as ``tokenizer.json``."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "tokenizer.json"
    library = train_byte_level(TEXTS, path, vocab_size=300, special=special)
    library.enable_truncation(2)  # a training script may leave both in the file
    library.enable_padding(length=4)
    library.save(str(path))
    return path


def sentencepiece(folder: Path, *, eos_id: int = 2) -> Path:
    """A model with byte fallback that leaves spaces alone."""
    from sentencepiece import SentencePieceTrainer

    stream = io.BytesIO()
    SentencePieceTrainer.train(
        sentence_iterator=iter(TEXTS),
        model_writer=stream,
        vocab_size=300,
        byte_fallback=True,
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        add_dummy_prefix=False,
        hard_vocab_limit=False,
        eos_id=eos_id,
        minloglevel=2,
    )
    path = folder / "tokenizer.model"
    path.write_bytes(stream.getvalue())
    return path


def tiktoken(folder: Path, *, more: int = 2) -> Path:
    """All bytes, and ``th``, ``the``, ``12``, then as many ranks as wanted."""
    tokens = [bytes([value]) for value in range(256)] + [b"th", b"the", b"12"][:more]
    tokens += [f"\0{number}".encode() for number in range(more - 3)]
    lines = [f"{base64.b64encode(token).decode()} {rank}" for rank, token in enumerate(tokens)]
    path = folder / "ranks.tiktoken"
    path.write_text("\n".join(lines) + "\n")
    return path


def write_json(path: Path, value: object) -> None:
    path.write_text(json.dumps(value))


def gpt2(folder: Path) -> tuple[Path, Path]:
    """``vocab.json`` and ``merges.txt`` of a byte-level BPE, as GPT-2's are published."""
    train_byte_level(TEXTS, folder / "whole.json", vocab_size=300)
    model = json.loads((folder / "whole.json").read_text())["model"]
    write_json(folder / "vocab.json", model["vocab"])
    lines = ["#version: 0.2", *(" ".join(pair) for pair in model["merges"])]
    (folder / "merges.txt").write_text("\n".join(lines) + "\n")
    return folder / "vocab.json", folder / "merges.txt"
