"""The datasets that ``--data-path`` and its siblings name.

A path is one dataset::

    P, P.bin or P.idx    if both files exist: indexed data, as Megatron writes it
    JSON objects         a text in each
    a table              a text in each row: .csv, .tsv, Parquet, Arrow
    any other            a text file, or a folder of files of one of these kinds
    any with --sft       a file of conversations

``W1 P1 W2 P2`` gives weights; ``P1 P2`` takes rows of each in proportion to its size. Paths of text
without weights are one dataset together.
"""

from __future__ import annotations

import math
import os
from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction
from typing import Literal

from cp_megatron.config import DataConfig
from cp_megatron.data.read.file_kinds import Format, format_of_name, in_folder, kind_of
from cp_megatron.data.read.tables import SAVED_DATASET, SAVED_DATASETS
from cp_megatron.data.read.text_files import FLAG, walk_files
from cp_megatron.errors import ConfigError

PARTS = ("train", "valid", "test")


@dataclass(frozen=True, kw_only=True)
class DatasetSpec:
    """One dataset as the user names it.

    Attributes:
        kind: how it is read.
        paths: what is read; empty means the sources of Python's standard library. Indexed data has
            its prefix, without .bin or .idx.
        given: the path as the user typed it, for messages.
        weight: the weight in the blend; None if the user gave none.
        lined: whether it can have lines or rows that are malformed.
        note: why the user may not want it read so; empty if there is nothing to say.
    """

    kind: Literal["text", "json", "table", "indexed", "chats"]
    paths: tuple[str, ...]
    given: str
    weight: Fraction | None = None
    lined: bool = False
    note: str = ""


def path_lists(data: DataConfig) -> tuple[tuple[str, tuple[str, ...]], ...]:
    """(flag, its words) of the paths to read: one list that is split, or one for each part."""
    own = (data.train_data_path, data.valid_data_path, data.test_data_path)
    if not any(own):
        return ((FLAG, data.data_path),)
    return tuple((f"--{part}-data-path", words) for part, words in zip(PARTS, own) if words)


def parse_datasets(
    words: Sequence[str], flag: str = FLAG, *, sft: bool = False
) -> tuple[DatasetSpec, ...]:
    """Returns the datasets that the words of a flag name, with ``sft`` files of conversations.

    Raises:
        ConfigError: weights are mixed with paths without one, or a weight is not above zero.
    """
    numbers = [_weight(word) for word in words]
    if all(number is None for number in numbers):
        specs = [_dataset(word, flag, sft=sft) for word in words]
        if all(spec.kind == "text" for spec in specs):
            given = ", ".join(words) or "(none)"
            note = "; ".join(spec.note for spec in specs if spec.note)
            return (DatasetSpec(kind="text", paths=tuple(words), given=given, note=note),)
        return tuple(specs)
    paired = len(words) % 2 == 0
    if not paired or None in numbers[::2] or any(number is not None for number in numbers[1::2]):
        rule = "must be paths, or a weight before each path"
        raise ConfigError(flag, " ".join(words), rule, "0.7 FIRST 0.3 SECOND")
    specs = []
    for weight, path in zip(numbers[::2], words[1::2]):
        if weight is None or weight <= 0:
            raise ConfigError(flag, " ".join(words), "a weight must be above zero", f"1 {path}")
        specs.append(_dataset(path, flag, weight, sft=sft))
    return tuple(specs)


def _weight(word: str) -> Fraction | None:
    """The weight that a word spells; None for a path."""
    try:
        number = float(word)
    except ValueError:
        return None
    if not math.isfinite(number):
        return None
    if number == 0:  # as a fraction, 1e-99999999 would take minutes
        return Fraction(0)
    try:
        return Fraction(word)
    except ValueError:
        return Fraction(number)


def _dataset(path: str, flag: str, weight: Fraction | None = None, *, sft: bool) -> DatasetSpec:
    if sft:
        return DatasetSpec(kind="chats", paths=(path,), given=path, weight=weight, lined=True)
    prefix = path[:-4] if path.endswith((".bin", ".idx")) else path
    # A text file may have any name, even one with .bin. Half of a pair is indexed data: .idx alone,
    # or P.bin if the user named P.
    half = not os.path.exists(path) and os.path.isfile(f"{prefix}.bin")
    if half or path.endswith(".idx") or os.path.isfile(f"{prefix}.idx"):
        return DatasetSpec(kind="indexed", paths=(prefix,), given=path, weight=weight)
    formats, note = _formats(path, flag)
    kind: Literal["text", "json", "table"] = "text"
    if formats - {"text"}:
        kind = "json" if formats <= {"lines", "objects"} else "table"
    lined = bool(formats & {"lines", "csv", "tsv"})
    return DatasetSpec(kind=kind, paths=(path,), given=path, weight=weight, lined=lined, note=note)


def _formats(path: str, flag: str) -> tuple[set[Format], str]:
    """Returns what the files of a path hold, and a note about them."""
    if os.path.isfile(path):
        kind = kind_of(path, flag)
        return {kind.format}, kind.note
    if not os.path.isdir(path):
        return {format_of_name(path)}, ""
    if any(os.path.isfile(os.path.join(path, name)) for name in (SAVED_DATASET, SAVED_DATASETS)):
        return {"arrow"}, ""
    listed = in_folder(list(walk_files(path)))
    return {format_of_name(each) for each in listed.chosen} if listed.data else {"text"}, ""
