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
    answers = [None if rank_in(group) else attempt(action)]
    if dist.is_initialized():
        dist.broadcast_object_list(answers, group=group, group_src=0)
    result, failure = cast(tuple[Result, Exception | None], answers[0])
    raise_first([failure])
    return result


def attempt(action: Callable[[], Result]) -> tuple[Result | None, Exception | None]:
    """Returns the action's result, or its exception in a form that can be sent to other ranks.

    An error that cannot be pickled becomes a RuntimeError with its traceback.
    """
    try:
        return action(), None
    except Exception as error:
        try:
            pickle.loads(pickle.dumps(error))
            return None, error
        except Exception:
            return None, RuntimeError("".join(traceback.format_exception(error)))


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
