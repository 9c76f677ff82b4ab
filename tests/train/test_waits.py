"""Between two log lines no step waits for the device, however many micro batches it has."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from cp_megatron.comm import nonblocking
from cp_megatron.comm.host_copies import HostCopy
from cp_megatron.train.late_results import LAG, Results
from cp_megatron.train.loop import Trainer
from cp_megatron.train.shard import Shard
from cp_megatron.train.step import TrainStep
from tests.ranks import run_ranks
from tests.train.test_loop import GRIDS, Place, StoppingView, assembled, changed, finish
from tests.train.test_loop import place as place  # the fixture
from tests.waits import Waits, waits

LONG = "--train-iters", "8", "--log-interval", "8", "--eval-iters", "0"


class CountingView(StoppingView):
    """A view that keeps what waited in each step."""

    def __init__(self, found: Waits) -> None:
        super().__init__()
        self._waits, self.by_step = found, dict[int, list[str]]()

    def step_done(self, step: int) -> None:
        self.by_step[step], self._waits.found = self._waits.found, []


@contextmanager
def as_on_a_gpu(found: Waits) -> Iterator[None]:
    """Results are read late, which waits for no step that the device still has to compute."""
    read, prepare = HostCopy.read, TrainStep.prepare

    def late(copy: HostCopy) -> list[float]:
        with found.allowed():
            return read(copy)

    def prepared(step: TrainStep, *args: object, **options: bool) -> Shard:
        shard = prepare(step, *args, **options)  # type: ignore[arg-type]
        found.adopt((shard.tokens, shard.labels, shard.cp.document_positions))
        return shard

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Results, "lag_on", lambda _: LAG)
        patch.setattr(HostCopy, "read", late)
        patch.setattr(TrainStep, "prepare", prepared)
        yield


def waits_of(rank: int, world_size: int, argv: list[str], broken: bool) -> dict[int, list[str]]:
    """What each step waited for; ``broken`` reads the loss in each."""
    run: Trainer = assembled(rank, world_size, argv)
    with waits() as found, as_on_a_gpu(found), pytest.MonkeyPatch.context() as patch:
        if broken:
            losses = TrainStep._loss_and_norm

            def reading(*args: object) -> tuple[Tensor, Tensor, object]:
                loss, norm, report = losses(*args)  # type: ignore[arg-type]
                return loss, torch.full_like(norm, norm.item()), report

            patch.setattr(TrainStep, "_loss_and_norm", reading)
        view = CountingView(found)
        finish(run, view)
    return view.by_step


MODES = {
    "one": (1, ["--micro-batch-size", "1"]),
    "spikes": (1, ["--spike-threshold", "6", "--log-num-zeros-in-grad"]),
    "documents": (2, ["--context-parallel-size", "2", "--document-mask", "--check-interval", "8"]),
    "learned positions": (1, ["--preset", "toy-gpt", "--hidden-dropout", "0.1"]),
    "muon": (2, ["--context-parallel-size", "2", "--optimizer", "muon"]),
    "tp2 cp2": (4, [*GRIDS["tp2 cp2"], "--sequence-parallel"]),
}
BY_DEFAULT = ("spikes", "documents")


@pytest.mark.parametrize(
    "mode",
    [name if name in BY_DEFAULT else pytest.param(name, marks=pytest.mark.slow) for name in MODES],
)
def test_no_step_waits_between_log_lines(place: Place, mode: str) -> None:
    world_size, flags = MODES[mode]
    for found in run_ranks(waits_of, world_size, changed(place.argv("run", *flags), *LONG), False):
        assert {step: found[step] for step in range(2, 8)} == {step: [] for step in range(2, 8)}
        assert found[8], "the last step is saved"


def test_a_wait_is_seen(place: Place) -> None:
    ((found),) = run_ranks(waits_of, 1, changed(place.argv("run"), *LONG), True)
    assert all(len(found[step]) == 1 for step in range(2, 8)), found


def messages_of(rank: int, world_size: int, argv: list[str]) -> dict[int, list[str]]:
    """The messages of each step but those of FSDP."""
    view, sent = StoppingView(), list[str]()
    by_step = dict[int, list[str]]()

    def counting(name: str, send: Callable[..., Any]) -> Callable[..., Any]:
        def counted(*args: Any, **options: Any) -> Any:
            sent.append(name)
            return send(*args, **options)

        return counted

    def step_done(step: int) -> None:
        by_step[step] = [*sent]
        sent.clear()

    with pytest.MonkeyPatch.context() as patch:
        for module, name in ((dist, "all_reduce"), (nonblocking, "start_host_gather")):
            patch.setattr(module, name, counting(name, getattr(module, name)))
        patch.setattr(view, "step_done", step_done)
        finish(assembled(rank, world_size, argv), view)
    return by_step


def test_a_step_takes_two_messages(place: Place) -> None:
    argv = changed(place.argv("run"), *LONG)
    for sent in run_ranks(messages_of, 2, argv):
        expected = ["start_host_gather", "all_reduce"]  # what is announced; the loss and the norm
        assert {step: sent[step] for step in range(2, 8)} == dict.fromkeys(range(2, 8), expected)
