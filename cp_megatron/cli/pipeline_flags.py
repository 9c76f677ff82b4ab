"""Reads Megatron-LM's counts of layers of pipeline stages as the flags of this program."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from cp_megatron.config.words import Piece
from cp_megatron.errors import ConfigError

_VIRTUAL = "--num-layers-per-virtual-pipeline-stage"
_FIRST, _LAST = "--decoder-first-pipeline-num-layers", "--decoder-last-pipeline-num-layers"
STAGE_FLAGS = frozenset({_VIRTUAL, _FIRST, _LAST})
"""The flags that count layers."""
_SIZES = "--pipeline-model-parallel-size", "--pipeline-parallel-size"
_CHUNKS, _LAYOUT = "--num-virtual-stages-per-pipeline-rank", "--pipeline-model-parallel-layout"
# Beside these, Megatron-LM counts the embedding, or the loss, as one more layer.
_AS_LAYERS = "--account-for-embedding-in-pipeline-split", "--account-for-loss-in-pipeline-split"
_LARGEST = 10_000


def stage_piece(flag: str, pieces: Mapping[str, Sequence[str]]) -> Piece | None:
    """What a flag of ``STAGE_FLAGS`` means.

    Args:
        flag: the flag.
        pieces: the command line.

    Returns:
        The flag of this program with its value; None if another flag of the line includes it.

    Raises:
        ConfigError: the numbers do not fit together, or one of them is missing.
    """
    text = " ".join(pieces[flag])
    if _LAYOUT in pieces:
        raise ConfigError(flag, text, f"contradicts {_LAYOUT}, which has all counts", "one of them")
    layers, stages = _number(pieces, "--num-layers"), _number(pieces, *_SIZES)
    if not layers or not stages:
        works = f"--num-layers and {_SIZES[0]} with it, or {_CHUNKS} N or {_LAYOUT}"
        raise ConfigError(flag, text, "needs the number of layers and of stages beside it", works)
    if stages == 1:
        rule = f"has no effect without {_SIZES[0]} above 1"
        raise ConfigError(flag, text, rule, "leave it out")
    if flag == _VIRTUAL:
        extra = sum(name in pieces for name in _AS_LAYERS)
        return _CHUNKS, [str(_chunks(text, layers, stages, extra))]
    if {_VIRTUAL, _CHUNKS} & pieces.keys():
        rule = "does not say how many layers each virtual stage has"
        raise ConfigError(flag, text, rule, f"{_LAYOUT}, such as Et|t|tt|t|ttL")
    if flag == _LAST and _FIRST in pieces:
        return None
    return _LAYOUT, [_layout(flag, pieces, layers, stages)]


def _chunks(text: str, layers: int, stages: int, extra: int) -> int:
    """The virtual stages of a stage, each of which has as many layers as ``text`` says."""
    each = int(text) if text.isdecimal() and len(text) < 6 else 0
    for total in (layers, layers + extra):
        if each and not total % (each * stages):
            return total // (each * stages)
    rule = f"must be a number that {stages} stages with {layers} layers can share"
    per_stage = max(1, layers // stages)
    works = f"{_CHUNKS} N with N up to {per_stage}: layers are shared by their cost"
    raise ConfigError(_VIRTUAL, text, rule, works)


def _layout(flag: str, pieces: Mapping[str, Sequence[str]], layers: int, stages: int) -> str:
    """The layout in which the other stages have equally many layers."""
    ends = {name: _number(pieces, name) for name in (_FIRST, _LAST) if name in pieces}
    others, left = stages - len(ends), layers - sum(ends.values())
    fits = left >= others and not left % others if others else not left
    if not all(ends.values()) or not fits:
        shown = " ".join(pieces[flag])
        rule = f"must leave equally many of {layers} layers for each of the {others} other stages"
        raise ConfigError(flag, shown, rule, f"{_LAYOUT}, such as Et*2|t*3|t*2L for 7 layers")
    each = left // others if others else 0
    counts = [each] * stages
    counts[0], counts[-1] = ends.get(_FIRST, each), ends.get(_LAST, each)
    return f"E{'|'.join(f't*{count}' for count in counts)}L"


def _number(pieces: Mapping[str, Sequence[str]], *names: str) -> int:
    """The number after one of the flags; 0 if there is none."""
    words = next((pieces[name] for name in names if name in pieces), ())
    text = " ".join(words)
    number = int(text) if text.isdecimal() and len(text) < 6 else 0
    return number if number <= _LARGEST else 0
