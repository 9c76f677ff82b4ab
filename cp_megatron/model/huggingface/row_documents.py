"""Where the documents and the padding of rows lie, read from what collators write.

    position_ids     0 1 2 0 1 0 0       a document ends where the next position is not one more
    attention_mask   1 1 1 2 2 0 0       a number for each document; 0 is padding
    seq_idx          0 0 0 1 1 2 2       the same from 0, without padding
    cu_seq_lens_q    0 3 5 7             where documents begin, and the end
    max_length_q     3                   no document is longer

A mask of ones and zeros says where padding is, and nothing about documents. Statements that
contradict each other are refused. Each run of padding becomes a document of its own.

Shapes: B batch, S tokens of the whole row.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from cp_megatron.errors import ConfigError

# Arguments that say where documents are, and that no layer has to see.
BOUNDARIES: Sequence[str] = ("seq_idx", "cu_seq_lens_q", "cu_seq_lens_k")
LONGEST: Sequence[str] = ("max_length_q", "max_length_k")

Integers = npt.NDArray[np.int64]
Flags = npt.NDArray[np.bool_]


@dataclass(frozen=True, kw_only=True)
class RowDocuments:
    """The documents of a batch of whole rows, on the host.

    Attributes:
        positions: int64 [B, S], what rotary and absolute positions read.
        padding: bool [B, S]; None if there is none.
        lengths: the lengths of the documents of each row, in order; padding is among them.
        longest: the largest position, plus one.
    """

    positions: Tensor
    padding: Tensor | None
    lengths: list[list[int]]
    longest: int


def read_documents(
    shape: tuple[int, ...],
    position_ids: Tensor | None,
    attention_mask: Tensor | None,
    stated: Mapping[str, Any],
) -> RowDocuments:
    """Reads the documents of whole rows.

    Args:
        shape: B and S.
        position_ids: [B, S], [1, S] or [S]; or [3 or 4, B, S] with equal entries, as models for
            text and images get them for text. They stay as they are, except for padding. By
            default, positions count from 0 in each document.
        attention_mask: [B, S]: ones; 0 for padding; or a number for each document.
        stated: any of ``BOUNDARIES`` and ``LONGEST``.

    Raises:
        ConfigError: a shape does not fit, statements contradict each other, a document is not in
            one piece, or positions are those of images.
    """
    positions = None if position_ids is None else _read_positions(position_ids, shape)
    numbers = np.ones(shape, np.int64)
    if attention_mask is not None:
        numbers = _read_numbers("attention_mask", attention_mask, shape)
    padding = numbers == 0
    edges = _changes(numbers)
    said: dict[str, Flags] = {}
    if positions is not None:
        said["position_ids"] = _first_column(np.diff(positions) != 1)
    if numbers.max() > 1:
        said["attention_mask"] = edges
    for name in BOUNDARIES:
        if stated.get(name) is not None:
            read = _read_index if name == "seq_idx" else _read_offsets
            said[name] = read(name, stated[name], shape)
    # Padding is next to every token that these do not cover, so a document ends there anyway.
    inside = ~(padding | _changes(padding.astype(np.int64)))
    starts = edges | (inside & _agreed(said, inside))
    _refuse_pieces(numbers, starts, positions)
    lengths = [np.diff([*np.flatnonzero(row), shape[1]]).tolist() for row in starts]
    _check_longest(stated, starts, padding)
    counted = np.concatenate([np.arange(n) for row in lengths for n in row]).reshape(shape)
    used = counted if positions is None else np.where(padding, counted, positions)
    return RowDocuments(
        positions=torch.from_numpy(used),
        padding=torch.from_numpy(padding) if padding.any() else None,
        lengths=lengths,
        longest=int(used.max()) + 1,
    )


def _read_positions(position_ids: Tensor, shape: tuple[int, ...]) -> Integers:
    given = tuple(position_ids.shape)
    if position_ids.ndim == 3 and given[0] in (3, 4) and given[2] == shape[1]:
        if not bool((position_ids == position_ids[:1]).all()):
            rule = "has different positions of one token in time, height and width, as images have"
            raise ConfigError("position_ids", given, rule, "rows of text alone")
        position_ids = position_ids[0]
    rows = position_ids.shape[0] if position_ids.ndim == 2 else 1
    if position_ids.ndim not in (1, 2) or position_ids.shape[-1] != shape[1]:
        rows = 0
    if rows not in (1, shape[0]):
        rule = f"must be {list(shape)}, [1, {shape[1]}] or [{shape[1]}]"
        raise ConfigError("position_ids", given, rule)
    return position_ids.detach().long().cpu().expand(shape).numpy()


def _read_numbers(name: str, x: Tensor, shape: tuple[int, ...]) -> Integers:
    """Integers of at least 0 for each token."""
    if tuple(x.shape) != shape:
        raise ConfigError(name, tuple(x.shape), f"must be {list(shape)}, an entry for each token")
    values = x.detach().double().cpu()
    if bool(((values < 0) | (values != values.floor())).any()):
        rule = "must be ones, zeros for padding, or a number for each document"
        raise ConfigError(name, f"with {float(values.min()):g}", rule, "integers from 0")
    return values.long().numpy()


def _read_index(name: str, x: Tensor, shape: tuple[int, ...]) -> Flags:
    return _changes(_read_numbers(name, x, shape))


def _read_offsets(name: str, x: Any, shape: tuple[int, ...]) -> Flags:
    """Offsets [documents + 1] into all rows, one after the other."""
    offsets = torch.as_tensor(x).detach().cpu().flatten().numpy()
    starts = np.zeros(shape[0] * shape[1], bool)
    sizes = np.diff(offsets)
    if len(sizes) == 0 or offsets[0] != 0 or offsets[-1] != starts.size or sizes.min() < 0:
        rule = f"must rise from 0 to the number of tokens, {starts.size}"
        raise ConfigError(name, offsets.tolist()[:8], rule)
    starts[offsets[:-1][sizes > 0]] = True
    rows = starts.reshape(shape)
    if not rows[:, 0].all():
        raise ConfigError(name, offsets.tolist()[:8], "has a document that crosses rows")
    return rows


def _agreed(said: Mapping[str, Flags], inside: Flags) -> Flags:
    """Where documents begin according to all statements, which must agree inside of the text."""
    first, *others = said or {"": np.zeros_like(inside)}
    for name in others:
        differs = np.argwhere((said[first] != said[name]) & inside)
        if len(differs):
            row, token = differs[0].tolist()
            rule = f"separates other documents than {first}, first at token {token} of row {row}"
            raise ConfigError(name, "", rule, f"{name} or {first} alone, or the same in both")
    return said[first] if said else np.zeros_like(inside)


def _refuse_pieces(numbers: Integers, starts: Flags, positions: Integers | None) -> None:
    """Refuses a document that goes on after padding or after another document.

    Where the mask has no numbers, positions that do not rise over the padding begin a document.
    """
    numbered = numbers.max() > 1
    for row in np.flatnonzero((numbers != 1).any(1)).tolist():
        place = np.arange(numbers.shape[1]) if positions is None else positions[row]
        begins = np.flatnonzero(starts[row])
        last: dict[int, int] = {}  # the last token so far that has a number
        for start, end in zip(begins.tolist(), [*begins[1:].tolist(), len(place)], strict=True):
            number = int(numbers[row, start])
            before = last.get(number)
            last[number] = end - 1
            apart = before is not None and (numbered or before < start - 1)
            if number and apart and (numbered or place[start] > place[before]):
                rule = f"has document {number} of row {row} in pieces; one begins at token {start}"
                works = "each document in one piece, with a number of its own"
                raise ConfigError("attention_mask", "", rule, works)


def _check_longest(stated: Mapping[str, Any], starts: Flags, padding: Flags) -> None:
    begins = np.flatnonzero(starts)
    sizes = np.diff([*begins, starts.size])
    longest = sizes[~padding.flat[begins]].max(initial=0)
    for name in LONGEST:
        limit = stated.get(name)
        if limit is not None and int(limit) < longest:
            rule = f"is less than {longest}, the length of a document"
            raise ConfigError(name, int(limit), rule, f"{longest}, or no {name}")


def _changes(numbers: Integers) -> Flags:
    """Whether an entry differs from the one before it in its row; the first does."""
    return _first_column(np.diff(numbers) != 0)


def _first_column(later: Flags) -> Flags:
    return np.pad(later, ((0, 0), (1, 0)), constant_values=True)
