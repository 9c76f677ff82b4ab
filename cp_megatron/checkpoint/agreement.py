"""All ranks of a group succeed or all of them fail, with the failure of the first that did."""

from __future__ import annotations

import pickle
import traceback
from collections.abc import Callable
from typing import Any, TypeVar

import torch.distributed as dist

Group = dist.ProcessGroup | None
"""Ranks that act together. None is all, and without torch.distributed this process alone."""
Result = TypeVar("Result")


def rank_in(group: Group) -> int:
    """This process's number in the group."""
    return dist.get_rank(group) if dist.is_initialized() else 0


def size_of(group: Group) -> int:
    """Processes in the group."""
    return dist.get_world_size(group) if dist.is_initialized() else 1


def agreed(action: Callable[[], Result], group: Group) -> Result:
    """Runs it on every rank; when one fails, all raise the failure of the first that did."""
    result, failure = attempt(action)
    raise_first(gathered(failure, group))
    assert result is not None
    return result


def attempt(action: Callable[[], Result]) -> tuple[Result | None, Exception | None]:
    """What it returns, or what it raises in a form that other ranks can be told."""
    try:
        return action(), None
    except Exception as error:
        return None, _tellable(error)


def raise_first(failures: list[Exception | None]) -> None:
    """Raises the first failure there is."""
    for failure in failures:
        if failure is not None:
            raise failure


def gathered(value: Any, group: Group) -> list[Any]:
    """Every rank's value, on every rank."""
    if not dist.is_initialized():
        return [value]
    values: list[Any] = [None] * size_of(group)
    dist.all_gather_object(values, value, group=group)
    return values


def from_first(value: Any, group: Group) -> Any:
    """The first rank's value, on every rank."""
    if not dist.is_initialized():
        return value
    values = [value]
    dist.broadcast_object_list(values, group=group, group_src=0)
    return values[0]


def _tellable(error: Exception) -> Exception:
    """The error, or a RuntimeError with its text where it can not be sent."""
    try:
        pickle.loads(pickle.dumps(error))
    except Exception:
        return RuntimeError("".join(traceback.format_exception(error)))
    return error
