"""Collectives of Python objects, and actions that succeed or fail on all ranks together."""

from __future__ import annotations

import pickle
import traceback
from collections.abc import Callable
from typing import Any, TypeVar, cast

import torch.distributed as dist

Group = dist.ProcessGroup | None
"""Ranks that act together. None means all ranks, or this process if there are no ranks."""
Result = TypeVar("Result")


def rank_in(group: Group) -> int:
    """Returns this process's rank in the group."""
    return dist.get_rank(group) if dist.is_initialized() else 0


def size_of(group: Group) -> int:
    """Returns the number of ranks in the group."""
    return dist.get_world_size(group) if dist.is_initialized() else 1


def on_all_ranks(action: Callable[[], Result], group: Group) -> Result:
    """Runs an action on every rank. If it fails on any, every rank raises the first failure."""
    result, failure = attempt(action)
    raise_first(all_gather_objects(failure, group))
    return cast(Result, result)


def on_first_rank(action: Callable[[], Result], group: Group) -> Result:
    """Runs an action on the first rank. Every rank returns its result or raises its failure."""
    result, failure = broadcast_object(None if rank_in(group) else attempt(action), group)
    raise_first([failure])
    return cast(Result, result)


def attempt(action: Callable[[], Result]) -> tuple[Result | None, Exception | None]:
    """Returns the action's result, or its exception in a form that can be sent to other ranks."""
    try:
        return action(), None
    except Exception as error:
        return None, _picklable(error)


def raise_first(failures: list[Exception | None]) -> None:
    """Raises the first exception of the list, if there is one."""
    for failure in filter(None, failures):
        raise failure


def all_gather_objects(value: Any, group: Group) -> list[Any]:
    """Returns every rank's value, in rank order, on every rank."""
    if not dist.is_initialized():
        return [value]
    values: list[Any] = [None] * size_of(group)
    dist.all_gather_object(values, value, group=group)
    return values


def broadcast_object(value: Any, group: Group) -> Any:
    """Returns the first rank's value on every rank."""
    if not dist.is_initialized():
        return value
    values = [value]
    dist.broadcast_object_list(values, group=group, group_src=0)
    return values[0]


def _picklable(error: Exception) -> Exception:
    """Returns the error, or a RuntimeError with its traceback if the error cannot be pickled."""
    try:
        pickle.loads(pickle.dumps(error))
    except Exception:
        return RuntimeError("".join(traceback.format_exception(error)))
    return error
