"""Tests that measured equals predicted, to the byte, on any grid, and that measuring is neutral."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch

from cp_megatron.memory import kinds
from cp_megatron.memory.kinds import Held
from cp_megatron.memory.live_bytes import LiveBytes
from cp_megatron.memory.measure import MemoryMeter
from cp_megatron.memory.predict import predict
from cp_megatron.train.shard import Shard
from cp_megatron.train.step import TrainStep
from tests.allocations import counting_memory
from tests.ranks import run_ranks
from tests.train.checkpoints import differing, metrics_of, numbers
from tests.train.test_loop import assembled, train

GPT, LLAMA = ["--preset", "toy-gpt"], ["--preset", "toy"]
TP2 = ["--tensor-parallel-size", "2"]
CP2, CP4 = (["--context-parallel-size", size] for size in ("2", "4"))
A2A, GATHER = (["--cp-comm-type", name] for name in ("a2a", "all_gather"))
LEVELS = ["--cp-comm-type", "a2a+p2p", "--hierarchical-context-parallel-sizes", "2", "2"]
SP, BF16, ROWS = ["--sequence-parallel"], ["--bf16"], ["--micro-batch-size", "2"]
KEEPS = ["--recompute-keeps-attention"]
SELECTIVE, FULL = (["--recompute-granularity", name] for name in ("selective", "full"))
FIRST = ["--recompute-num-layers", "1"]
TILES, CHUNKS = ["--mlp-tile-size", "24"], ["--loss-chunk-size", "24"]
HIDDEN = ["--hidden-dropout", "0.1"]
DROPOUT = [*HIDDEN, "--attention-dropout", "0.1"]
EACH_HEAD, ALL_HEADS = (
    ["--qk-layernorm", "--qk-norm-scope", scope] for scope in ("each_head", "all_heads")
)
FACTORS = ["--logit-multiplier", "2", "--embedding-multiplier", "3"]
CAPPED = ["--final-logit-softcapping", "5", *FACTORS]

POST, PARALLEL = ["--norm-placement", "post"], ["--parallel-residual"]
GEMMA = ["--norm-placement", "both", "--apply-layernorm-1p", "--geglu", "--no-swiglu"]
COOLING = ["--query-temperature-beta", "0.1", "--original-max-position-embeddings", "16"]

MLA = ["--multi-latent-attention", "--q-lora-rank", "12", "--kv-lora-rank", "16"]
MLA += ["--qk-head-dim", "8", "--qk-pos-emb-head-dim", "4", "--v-head-dim", "6"]
MLA += ["--qk-layernorm", "--num-query-groups", "4"]
EXPANDED, LATENT = (["--cp-latent-exchange", way] for way in ("expanded", "latent"))

LINEAR = ["--linear-attention-layers", "0", "--linear-num-key-heads", "2"]
LINEAR += ["--linear-num-value-heads", "4", "--linear-key-head-dim", "6"]
LINEAR += ["--linear-value-head-dim", "5"]
GATED = ["--attention-output-gate"]

MOE = ["--num-experts", "4", "--moe-ffn-hidden-size", "24", "--moe-router-topk", "2"]
AUX = ["--moe-aux-loss-coeff", "0.1", "--moe-z-loss-coeff", "0.01"]
SHARED = ["--moe-shared-expert-intermediate-size", "20", "--moe-shared-expert-gate"]
SIGMOID = ["--moe-router-score-function", "sigmoid", "--moe-router-enable-expert-bias"]

PP2, PP4 = (["--pipeline-parallel-size", size] for size in ("2", "4"))
LAYERS4, LAYERS8 = (["--num-layers", number] for number in ("4", "8"))
INTERLEAVED = ["--num-virtual-stages-per-pipeline-rank", "2"]
ALWAYS, NEVER = (["--fsdp-reshard", when] for when in ("always", "never"))
LAYOUT = ["--pipeline-model-parallel-layout"]
MICRO = ["--micro-batch-size", "1"]
UNTIED, TIED = "--untie-embeddings-and-output-weights", "--no-untie-embeddings-and-output-weights"
OFFLOADS = ["--cpu-offloading", "--optimizer-cpu-offload"]

PIPELINES = [
    (2, [*GPT, *PP2, *BF16, *MICRO, *DROPOUT]),
    (2, [*LLAMA, *PP2, *BF16, *GEMMA, *MICRO, *LAYERS4, *SELECTIVE, *FIRST, "--optimizer", "muon"]),
    (2, [*LLAMA, *PP2, *LAYERS4, *INTERLEAVED, *MICRO, *LINEAR, *GATED, *BF16]),
    (4, [*LLAMA, *PP4, *LAYERS8, *MICRO, TIED]),
    (4, [*LLAMA, *PP2, *CP2, *MICRO, "--window-size", "9", "0", "--window-layers", "1"]),
    (4, [*GPT, *PP2, *TP2, *SP, *BF16, *MICRO]),
    (4, [*LLAMA, *PP2, *BF16, *MICRO, *LAYERS4, *INTERLEAVED, TIED]),
    (4, [*LLAMA, *PP2, *MICRO, *ALWAYS]),
    (2, [*LLAMA, *MICRO, *BF16, *NEVER]),
]
SLOW_PIPELINES = [
    (2, [*GPT, *PP2, *BF16, *MICRO, "--apply-layernorm-1p", UNTIED, *LAYERS4, *INTERLEAVED]),
    (2, [*LLAMA, *PP2, *MICRO, *FULL, *OFFLOADS]),
    (2, [*LLAMA, *PP2, *MICRO, *FULL, *KEEPS, *OFFLOADS, *LAYERS4, *INTERLEAVED]),
    (2, [*LLAMA, *PP2, *MICRO, *LAYOUT, "E|ttL"]),
    (2, [*GPT, *PP2, *BF16, "--apply-layernorm-1p", *MICRO, *LAYOUT, "Ett|L", *FULL]),
    (2, [*GPT, *PP2, *LAYOUT, "E|t|t|L", "--micro-batch-size", "4"]),
    (2, [*LLAMA, *PP2, *MICRO, *MOE, *AUX, *SHARED, "--moe-layer-freq", "2", *LAYERS4]),
    (4, [*LLAMA, *PP2, *MICRO, *BF16, *LINEAR, *LAYERS4, "--optimizer", "muon"]),
    (4, [*LLAMA, *PP2, *BF16, "--data-parallel-replicate-size", "2"]),
    (4, [*LLAMA, *PP2, "--micro-batch-size", "2", *LAYERS4, *INTERLEAVED]),
    (4, [*LLAMA, *PP2, *LAYERS4, *INTERLEAVED, *MICRO, *ALWAYS, *POST]),
    (4, [*LLAMA, *PP4, *LAYERS8, *INTERLEAVED, *MICRO, "--dtype", "float64", *SELECTIVE]),
    (4, [*LLAMA, *CP2, *MICRO, *NEVER, "--global-batch-size", "8"]),
    (4, [*LLAMA, *MICRO, *BF16, *NEVER, *TP2, *SP, *LINEAR, *GATED]),
]
CASES = [
    (1, [*LLAMA, *MOE, *AUX, *SHARED, "--moe-layer-freq", "2"]),
    (1, [*LLAMA, *MOE, *SIGMOID, *AUX, *BF16, "--optimizer", "muon"]),
    (2, [*LLAMA, *MOE, *TP2, *SP, *SIGMOID, *SHARED, *BF16, *SELECTIVE, *FIRST]),
    (1, GPT),
    (1, [*LLAMA, *BF16, *TILES, *CHUNKS, "--qk-layernorm", *CAPPED]),
    (1, [*GPT, *BF16, *SELECTIVE, *ROWS, *HIDDEN]),
    (1, [*LLAMA, *BF16, *SELECTIVE, *FIRST, *TILES]),
    (1, [*LLAMA, *FULL, *FIRST, "--cpu-offloading", "--optimizer-cpu-offload"]),
    (1, [*LLAMA, *FULL, *FIRST, *KEEPS, "--cpu-offloading"]),
    (1, [*GPT, *DROPOUT, *EACH_HEAD]),
    (1, [*GPT, "--dtype", "float64", "--untie-embeddings-and-output-weights"]),
    (1, [*LLAMA, *BF16, *GEMMA, *COOLING, "--qk-layernorm"]),
    (2, [*LLAMA, *TP2, *SP, *TILES, *POST, "--optimizer", "muon"]),
    (2, [*LLAMA, *TP2, *SP, *PARALLEL]),
    (2, [*LLAMA, *TP2, *SP, *TILES, "--num-query-groups", "1", *ALL_HEADS, *CAPPED]),
    (2, [*LLAMA, *CP2, *A2A, *BF16, *SELECTIVE, *ALWAYS, "--num-query-groups", "1"]),
    (2, [*LLAMA, *CP2, *GATHER, *ALWAYS]),
    (2, [*LLAMA, *CP2, *A2A, *BF16, *FULL, *KEEPS, "--num-query-groups", "4"]),
    (2, [*LLAMA, *BF16, "--data-parallel-replicate-size", "2"]),
    (4, [*LLAMA, *CP2, *ALWAYS, "--data-parallel-replicate-size", "2"]),
    (4, [*GPT, *TP2, *CP2, *SP, *FULL, *TILES, *CHUNKS, *HIDDEN, *ALWAYS]),
    (4, [*LLAMA, *TP2, *CP2, *BF16, *ROWS, *ROWS]),
    (4, [*LLAMA, *CP4, *ALWAYS, "--window-size", "9", "0", "--window-layers", "1"]),
    (4, [*LLAMA, *CP4, *LEVELS]),
    (2, [*LLAMA, *CP2, *MLA, *SELECTIVE, *FIRST, *ALWAYS]),
    (4, [*LLAMA, *CP2, *TP2, *SP, *LINEAR, *GATED, *BF16, *SELECTIVE, *FIRST, *ALWAYS]),
    (4, [*LLAMA, *CP4, *LINEAR, *GATED, *ROWS]),
]
SLOW = [
    (1, [*GPT, *MOE, "--moe-router-pre-softmax", "--moe-z-loss-coeff", "0.01"]),
    (2, [*GPT, *MOE, *CP2, "--optimizer", "muon"]),
    (1, [*GPT, *MOE, "--disable-bias-linear"]),
    (1, [*LLAMA, *MOE, "--no-disable-bias-linear", *BF16]),
    (1, [*LLAMA, *MOE, "--moe-z-loss-coeff", "0.01"]),
    (1, [*LLAMA, *MOE, "--moe-aux-loss-coeff", "0.01"]),
    (2, [*LLAMA, *MOE, *CP2, *SIGMOID, "--moe-aux-loss-coeff", "0.1", *FULL]),
    (4, [*LLAMA, *MOE, *CP2, *TP2, *SP, *AUX, *SHARED]),
    (1, [*LLAMA, *LINEAR]),
    (1, [*LLAMA, *GATED, "--kernel", "reference"]),
    (2, [*LLAMA, *CP2, *LINEAR, *BF16, "--optimizer", "muon"]),
    (2, [*LLAMA, *CP2, *LINEAR, *FULL]),
    (2, [*LLAMA, *CP2, *LINEAR, *GATED, *FULL, *KEEPS]),
    (2, [*LLAMA, *CP2, *MLA, *FULL, *KEEPS, "--cpu-offloading"]),
    (2, [*LLAMA, *CP2, *LINEAR, *SELECTIVE, *GATED, "--dtype", "float64"]),
    (2, [*LLAMA, *BF16, *ROWS]),
    (4, [*LLAMA, *CP4, *BF16, "--cp-comm-type", "p2p", "--cp-route", "direct"]),
    (1, [*GPT, *BF16, "--apply-layernorm-1p"]),
    (1, [*LLAMA, *MLA, *BF16]),
    (2, [*LLAMA, *CP2, *MLA, *EXPANDED]),
    (2, [*LLAMA, *CP2, *MLA, *GATHER, *BF16]),
    (4, [*LLAMA, *CP2, *TP2, *SP, *MLA, *LATENT]),
    (4, [*LLAMA, *CP4, *MLA, *A2A]),
]

LONG = [*SLOW, *SLOW_PIPELINES]


def words_of(value: object) -> str:
    """A case's name."""
    return " ".join(value) if isinstance(value, list) else str(value)


@dataclass(frozen=True)
class Place:
    """A folder with a text, and the arguments that every run in it has."""

    folder: Path

    def argv(self, save: str, *flags: str) -> list[str]:
        words = ["--hidden-size", "32", "--num-attention-heads", "4"]
        for name, value in (("--num-layers", "2"), ("--global-batch-size", "4")):
            words += [] if name in flags else [name, value]
        words += ["--seq-length", "64", "--lr-warmup-iters", "0"]
        words += ["--train-iters", "2", "--eval-iters", "0", "--log-interval", "1"]
        words += ["--device", "cpu", "--data-path", str(self.folder / "text.txt")]
        words += [] if "--preset" in flags else LLAMA
        return [*words, "--save", str(self.folder / save), *flags]


@pytest.fixture
def place(tmp_path: Path) -> Place:
    (tmp_path / "text.txt").write_text("three blind mice, see how they run, " * 100)
    return Place(tmp_path)


def prepared(rank: int, world_size: int, argv: list[str]) -> tuple[TrainStep, list[Shard], object]:
    run = assembled(rank, world_size, argv)
    if run.writer is not None:
        run.writer.close()
    batches = run.batches(run.rows.train, 0)
    return run.train_step, [run.train_step.prepare(batch) for batch in batches], run.plan


def measured(
    rank: int, world_size: int, argv: list[str], forward_alone: bool = False
) -> tuple[tuple[Held, ...], tuple[Held, ...]]:
    """The predicted and the measured bytes of this rank."""
    train_step, shards, plan = prepared(rank, world_size, argv)
    with pytest.MonkeyPatch.context() as patch:
        meter = train_step.memory_meter(len(shards))
        if forward_alone:
            patch.setattr(meter, "_on_cuda", True)
            patch.setattr(torch.cuda, "memory_allocated", lambda _: 1)
            patch.setattr(torch.cuda, "max_memory_allocated", lambda _: 2)
            patch.setattr(MemoryMeter, "_parameters", lambda _: [])
        with meter:
            train_step.run(shards, step=0, lr=1e-3)
        return predict(plan, rank), meter.held()  # type: ignore[arg-type]


def by_name(held: tuple[Held, ...]) -> dict[tuple[str, str], int]:
    return {(row.kind, row.detail): row.num_bytes for row in held}


@pytest.mark.parametrize(
    ("world_size", "flags"),
    [*CASES, *PIPELINES, *(pytest.param(*case, marks=pytest.mark.slow) for case in LONG)],
    ids=words_of,
)
def test_measured_is_predicted_to_the_byte(place: Place, world_size: int, flags: list[str]) -> None:
    for predicted, found in run_ranks(measured, world_size, place.argv("run", *flags)):
        assert found[-1].kind == kinds.PEAK
        assert by_name(found[:-1]) == by_name(predicted)


@pytest.mark.parametrize(
    ("world_size", "flags"), [(2, [*CP2, *ROWS]), (4, [*CP2, *PP2, *MICRO, *SELECTIVE])]
)
def test_documents_change_the_exchange_alone(
    place: Place, world_size: int, flags: list[str]
) -> None:
    argv = place.argv("run", "--document-mask", *flags)
    for predicted, found in run_ranks(measured, world_size, argv):
        differ = {
            row.kind
            for row, other in zip(predicted, found[:-1], strict=True)
            if row.num_bytes != other.num_bytes
        }
        assert differ <= {kinds.EXCHANGE, kinds.AFTER_FORWARD}


def test_the_forward_pass_alone_is_enough_as_on_cuda(place: Place) -> None:
    flags = [*LLAMA, *BF16, *CP2, *SELECTIVE, *FIRST]
    whole = run_ranks(measured, 2, place.argv("whole", *flags))
    alone = run_ranks(measured, 2, place.argv("alone", *flags), True)
    for (_, found), (_, again) in zip(whole, alone, strict=True):
        after, peak = kinds.AFTER_FORWARD, kinds.PEAK
        expected = by_name(found) | {(after, ""): 1, (peak, ""): 2, (kinds.PARAMETERS, ""): 0}
        assert by_name(again) == expected


def peaks(rank: int, world_size: int, one: list[str], other: list[str]) -> tuple[int, int]:
    """The peak of a step by the meter and by torch's profiler."""
    train_step, shards, _ = prepared(rank, world_size, one)
    with counting_memory() as count:
        train_step.run(shards, step=0, lr=0.0)
    train_step, shards, _ = prepared(rank, world_size, other)
    with train_step.memory_meter(len(shards)) as meter:
        train_step.run(shards, step=0, lr=0.0)
    found = by_name(meter.held())
    return found[kinds.PEAK, ""] - found[kinds.PARAMETERS, ""], count.peak


def test_the_peak_is_all_but_what_operations_take_inside(place: Place) -> None:
    one, other = (place.argv(name, *LLAMA, *CP2) for name in ("one", "other"))
    for found, exact in run_ranks(peaks, 2, one, other):
        assert 0.9 * exact < found <= exact


@pytest.mark.parametrize(
    "flags",
    [
        [*TP2, *CP2, *SP, *FULL],
        pytest.param([*CP4, *DROPOUT, *ROWS, *ROWS], marks=pytest.mark.slow),
        pytest.param([*PP2, *LAYERS4, *INTERLEAVED, *MICRO], marks=pytest.mark.slow),
    ],
)
def test_looking_changes_no_bit(place: Place, flags: list[str]) -> None:
    for name, more in (("plain", []), ("looked at", ["--memory-report"])):
        argv = place.argv(name, *flags, *more)
        run_ranks(train, 4, argv)
    one, other = place.folder / "plain", place.folder / "looked at"
    assert differing(one / "step-2", other / "step-2") == []
    assert list(map(numbers, metrics_of(one))) == list(map(numbers, metrics_of(other)))
    assert (one / "config.yaml").read_text() == (other / "config.yaml").read_text()
    assert not (one / "memory.json").exists()
    written = json.loads((other / "memory.json").read_text())
    assert [row["rank"] for row in written["ranks"]] == [0, 1, 2, 3]
    assert written["step"] == 1
    for rank in written["ranks"]:
        *rows, peak = rank["held"]
        assert all(row["predicted"] == row["measured"] for row in rows)
        assert (peak["kind"], peak["predicted"]) == (kinds.PEAK, None)


def test_a_run_that_goes_on_has_its_optimizer_from_the_start(place: Place) -> None:
    run_ranks(train, 2, place.argv("run", *CP2))
    load = ["--load", str(place.folder / "run"), "--train-iters", "3", "--memory-report"]
    run_ranks(train, 2, load)
    written = json.loads((place.folder / "run" / "memory.json").read_text())
    assert written["step"] == 3
    for rank in written["ranks"]:
        assert all(row["predicted"] == row["measured"] for row in rank["held"][:-1])
    assert "memory_report: true" not in (place.folder / "run" / "config.yaml").read_text()


def test_memory_counts_until_it_is_released() -> None:
    before = torch.zeros(1000)
    where = "first"
    with LiveBytes(lambda func, tensor: where) as live:
        view = before.view(10, 100)[2:]
        one = before + 1
        same = one.view(-1)
        del one
        where = "second"
        two = torch.ones(500)
        assert sorted((x.place, x.num_bytes) for x in live.alive.values()) == [
            ("first", 4000),
            ("second", 2000),
        ]
        del same
        assert [x.place for x in live.alive.values()] == ["second"]
        two += 1
    assert (live.peak, live.peaks["first"], live.peaks["second"]) == (6000, 4000, 2000)
    assert view.shape == (8, 100)


def test_memory_that_is_emptied_and_filled() -> None:
    old = torch.zeros(50)
    resize = torch.UntypedStorage.resize_
    with LiveBytes(lambda func, tensor: "new") as live:
        weight = torch.zeros(100)
        live.adopt(weight, "weight")
        live.adopt(old, "old")
        assert [x.num_bytes for x in live.alive.values()] == [400, 200]
        assert live.alive[weight.view(10, 10).untyped_storage()._cdata].place == "weight"
        weight.untyped_storage().resize_(0)
        assert [x.num_bytes for x in live.alive.values()] == [200, 0]
        other = torch.ones(100)
        assert live.peak == 600
        weight.untyped_storage().resize_(800)
    assert torch.UntypedStorage.resize_ is resize
    assert (live.peak, live.peaks["weight"], live.peaks["old"]) == (1400, 800, 200)
    del weight, other
    assert [x.place for x in live.alive.values()] == ["old"]
