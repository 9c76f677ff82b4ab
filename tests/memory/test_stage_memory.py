"""Tests what pipeline stages keep and send in a real run, and what the plan says of it."""

from __future__ import annotations

import io
import weakref
from collections import Counter
from typing import Any

import pytest
import torch
from rich.console import Console

from cp_megatron.memory import capacity, kinds
from cp_megatron.memory.kinds import Held
from cp_megatron.memory.memory_report import MemoryReport
from cp_megatron.memory.predict import predict_ranks
from cp_megatron.memory.stage_notes import stage_needs, stage_notes
from cp_megatron.pipeline import Outputs, StageLinks
from cp_megatron.pipeline.stage_links import Arriving
from cp_megatron.plan.pipeline import Action, PipelineMessage, PipelinePlan
from cp_megatron.preflight.run_plan import RunPlan
from cp_megatron.preflight.stage_words import message_bytes
from cp_megatron.spec import ModelSpec
from cp_megatron.train.microbatch_passes import _TrainingPasses
from tests.memory.test_measure import (
    AUX,
    CP2,
    GPT,
    INTERLEAVED,
    LAYERS4,
    LAYERS8,
    LLAMA,
    MICRO,
    MOE,
    PP2,
    PP4,
    SP,
    TP2,
    Place,
    by_name,
    measured,
    place,
    prepared,
)
from tests.memory.test_predict import B, H, S, V, bytes_of, planned
from tests.ranks import run_ranks

assert place is not None  # a fixture

Counts = tuple[int, int, Counter[tuple[bool, int]], int]


def counted(rank: int, world_size: int, argv: list[str]) -> tuple[Counts, RunPlan]:
    """The passes whose results are alive at the same time, at most, as planned and as counted; and
    the bytes exchanged with each peer, by whether the message wraps, as counted and as planned."""
    step, shards, plan = prepared(rank, world_size, argv)
    assert isinstance(plan, RunPlan)
    alive, most, moved = list[weakref.ref[torch.Tensor]](), [0], Counter[tuple[bool, int]]()
    forward, receive, send = _TrainingPasses.forward, StageLinks.receive, StageLinks.send

    def counting(self: _TrainingPasses, action: Action, x: torch.Tensor | None) -> Outputs:
        outputs = forward(self, action, x)
        result = outputs.objective if outputs.stream is None else outputs.stream
        assert result is not None
        alive.append(weakref.ref(result))
        most[0] = max(most[0], sum(each() is not None for each in alive))
        return outputs

    def receiving(self: StageLinks, message: PipelineMessage, x: torch.Tensor) -> Arriving:
        moved[message.channel.wraps, message.peer] += x.nbytes
        return receive(self, message, x)

    def sending(self: StageLinks, message: PipelineMessage, x: torch.Tensor) -> Any:
        moved[message.channel.wraps, message.peer] += x.nbytes
        return send(self, message, x)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(_TrainingPasses, "forward", counting)
        patch.setattr(StageLinks, "receive", receiving)
        patch.setattr(StageLinks, "send", sending)
        step.run(shards, step=1, lr=1e-3)
    schedule = PipelinePlan(plan.grid.pp, plan.num_microbatches, plan.stages.num_chunks)
    in_flight = schedule.in_flight(plan.grid.coordinates(rank).pp)
    assert plan.dtype is not None
    return (in_flight, most[0], moved, message_bytes(plan, plan.dtype)), plan


@pytest.mark.parametrize(
    ("world_size", "flags"),
    [
        (2, [*LLAMA, *PP2, *LAYERS8, *INTERLEAVED, *MICRO]),
        (4, [*LLAMA, *PP4, *LAYERS4, *MICRO]),
        pytest.param(4, [*GPT, *PP2, *TP2, *SP, *MICRO, "--bf16"], marks=pytest.mark.slow),
        pytest.param(4, [*LLAMA, *PP2, *TP2, *MICRO, "--bf16"], marks=pytest.mark.slow),
        pytest.param(4, [*LLAMA, *PP2, *CP2, *LAYERS4, *INTERLEAVED], marks=pytest.mark.slow),
        pytest.param(4, [*LLAMA, *PP4, *LAYERS8, *INTERLEAVED, *MICRO], marks=pytest.mark.slow),
    ],
)
def test_passes_in_flight_and_bytes_per_boundary(
    place: Place, world_size: int, flags: list[str]
) -> None:
    for rank, (found, plan) in enumerate(run_ranks(counted, world_size, place.argv("run", *flags))):
        in_flight, most, moved, per_boundary = found
        assert most == in_flight
        model, splits = plan.config.model, plan.grid.tp if "--sequence-parallel" in flags else 1
        element = 2 if "--bf16" in flags else 4
        tokens = plan.micro_batch_size * 64 // plan.grid.cp // splits
        assert per_boundary == 2 * plan.num_microbatches * tokens * model.hidden_size * element
        stage, pp, chunks = plan.grid.coordinates(rank).pp, plan.grid.pp, plan.stages.num_chunks
        expected = Counter[tuple[bool, int]]()
        for number in range(pp * chunks - 1):  # the boundary behind chunk number
            ends = {number % pp, (number + 1) % pp}
            if stage in ends:
                (peer,) = ends - {stage}
                expected[number % pp == pp - 1, peer] += per_boundary
        assert moved == expected


def test_experts_on_stages(place: Place) -> None:
    """Ranks compute unequally many rows of experts, but together as many as are predicted."""
    flags = [*LLAMA, *PP2, *MOE, *AUX, *LAYERS4, *MICRO, "--expert-model-parallel-size", "2"]
    results = run_ranks(measured, 4, place.argv("run", *flags))
    uneven = (kinds.ACTIVATIONS, kinds.MLP), (kinds.AFTER_FORWARD, "")
    for predicted, found in results:
        differing = by_name(predicted).items() ^ by_name(found[:-1]).items()
        assert {key for key, _ in differing} <= set(uneven)
    for stage in (results[:2], results[2:]):
        for key in uneven:
            assert sum(by_name(x)[key] for x, _ in stage) == sum(by_name(x)[key] for _, x in stage)


def test_each_stage_counted_by_hand() -> None:
    """Four micro batches, three layers on two stages, a tied table, and weights over two ranks."""
    words = ["--pipeline-parallel-size", "2", "--no-untie-embeddings-and-output-weights"]
    plan = planned(*words, "--pipeline-model-parallel-layout", "Ett|tL", world_size=4)
    first, last = bytes_of(plan, 0), bytes_of(plan, 2)
    layer = H * (64 + 2 * 32 + 64) + 3 * H * 96 + 2 * H
    stored = [(V * H + 2 * layer, 1 + 2 * 9), (V * H + H + layer, 2 + 9)]
    for found, (number, tensors) in zip((first, last), stored, strict=True):
        assert found[kinds.PARAMETERS] == found[kinds.GRADIENTS] == 4 * number // 2
        assert found[kinds.GATHERED] == found[kinds.WHOLE] == 4 * number
        assert found[kinds.OPTIMIZER] == 2 * found[kinds.PARAMETERS] + 4 * tensors
    stream = 4 * B * S * H
    assert first[kinds.BETWEEN] == 2 * stream + stream  # two results, a gradient to come
    assert last[kinds.BETWEEN] == 0
    assert first[kinds.MLP_NORM] == 2 * 2 * (stream + 4 * B * S)
    assert last[kinds.MLP_NORM] == stream + 4 * B * S
    assert first[kinds.FINAL_NORM] == first[kinds.LOSS] == first[kinds.LOGITS] == 0
    assert last[kinds.LOSS] == stream + 4 * (V * H + B * S + 1)
    always = planned(
        *words,
        "--pipeline-model-parallel-layout",
        "Ett|tL",
        "--fsdp-reshard",
        "always",
        world_size=4,
    )
    assert bytes_of(always, 0)[kinds.GATHERED] == 4 * V * H
    assert bytes_of(always, 0)[kinds.WHOLE] == 0
    assert bytes_of(always, 0)[kinds.BETWEEN] == first[kinds.BETWEEN]


def reported(plan: RunPlan, *, width: int = 80) -> str:
    file = io.StringIO()
    predicted = predict_ranks(plan, range(plan.grid.world_size))
    peak = [Held(kind=kinds.PEAK, num_bytes=1)]
    measured = [[*rows, *peak] for rows in predicted]
    MemoryReport(plan=plan, predicted=predicted, measured=measured).print(
        Console(file=file, width=width)
    )
    return file.getvalue()


def test_a_report_names_the_fullest_stage_and_the_price_of_whole_weights() -> None:
    plan = planned("--pipeline-parallel-size", "2", world_size=4)
    text = " ".join(reported(plan).split())
    needs = stage_needs(plan)
    assert needs[0] > needs[1]
    assert f"stage 0 is the fullest: a rank holds {needs[0] / 2**20:,.4f} MiB at least" in text
    assert "activations are kept of 2, 1 passes on stages 0 to 1" in text
    always = planned("--pipeline-parallel-size", "2", "--fsdp-reshard", "always", world_size=4)
    saved = (needs[0] - stage_needs(always)[0]) / 2**20
    assert saved > 0
    line = f"would need {saved:,.4f} MiB less on stage 0, and gather weights 4 times a step"
    assert f"--fsdp-reshard always {line} instead of once" in text
    (*_, back) = stage_notes(always)
    line = f"would need {saved:,.4f} MiB more on stage 0, and gather weights once a step"
    assert back == f"--fsdp-reshard never {line} instead of 4 times"
    assert not list(stage_notes(planned(world_size=2)))
    alone = planned("--pipeline-parallel-size", "2", world_size=2)
    assert len(list(stage_notes(alone))) == 2  # no weights are gathered


def test_a_report_has_a_column_for_each_stage() -> None:
    few = reported(planned("--pipeline-parallel-size", "2", world_size=4), width=100)
    assert [word for word in few.splitlines()[1].split("  ") if word] == ["stage 0", "stage 1"]
    assert "ranks 0-1" in few
    assert "ranks 2-3" in few
    words = ["--pipeline-parallel-size", "2", "--context-parallel-size", "2"]
    many = reported(planned(*words, world_size=16))
    assert "a column has the most that a rank of a stage holds" in many
    assert [word for word in many.splitlines()[1].split("  ") if word] == ["stage 0", "stage 1"]
    assert "rank 0" not in many
    assert max(map(len, many.splitlines())) <= 80


def test_ranks_of_several_stages_share_a_machine() -> None:
    plan = planned("--pipeline-parallel-size", "2", world_size=4)
    first, last = stage_needs(plan)
    least = capacity._least_of_several
    assert [least(plan, n) for n in (1, 2, 4)] == [first, 2 * first, 2 * first + 2 * last]


def test_a_checkpoint_has_a_tied_table_once() -> None:
    words = ["--no-untie-embeddings-and-output-weights"]
    one, two = planned(*words), planned(*words, "--pipeline-parallel-size", "2", world_size=2)
    assert capacity.checkpoint_bytes(one) == capacity.checkpoint_bytes(two)
    spec = ModelSpec.of(two.config.model, vocab_size=V, seq_length=S)
    held = [spec.parameters_on_rank(two.grid, rank, two.stages) for rank in range(2)]
    assert sum(held) == spec.num_parameters() + V * H
