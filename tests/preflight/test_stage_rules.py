"""Flags of pipeline stages: what is planned, and what is refused before a rank starts."""

from __future__ import annotations

import pytest

from cp_megatron.errors import CombinedError, ConfigError
from cp_megatron.plan import Grid
from cp_megatron.preflight.stage_words import message_bytes, stages_of
from tests.preflight.test_check import plan, refused
from tests.preflight.test_start_table import shown

PP, CHUNKS = "--pipeline-parallel-size", "--num-virtual-stages-per-pipeline-rank"
LAYOUT = "--pipeline-model-parallel-layout"
EIGHT = "--preset toy --num-layers 8"


def lengths(words: str, world: int = 4) -> list[list[int]]:
    """The numbers of layers of each stage's chunks."""
    found = plan(*words.split(), world=world)
    assert found.grid.pp == found.stages.num_stages
    return [
        [len(chunk.layers) for chunk in found.stages.of(stage)] for stage in range(found.grid.pp)
    ]


def test_stages_share_layers_by_their_cost() -> None:
    # The head has the FLOPs of a few narrow layers: the last stage gets fewer.
    assert lengths(f"{EIGHT} {PP} 2 --seq-length 256") == [[4], [4]]
    assert lengths(f"{EIGHT} {PP} 2 --seq-length 256 --vocab-size 8000") == [[6], [2]]
    assert lengths(f"{EIGHT} {PP} 2 {CHUNKS} 2") == [[2, 2], [2, 2]]
    assert lengths(f"{EIGHT} {PP} 2 {LAYOUT} Et*5|t*3L") == [[5], [3]]
    assert lengths(f"{EIGHT} {PP} 2 {LAYOUT} E(t|)*3t*5L") == [[1, 1], [1, 5]]
    assert lengths("--preset toy --num-layers 100000", world=1) == [[100_000]]


def test_layers_of_a_hybrid_model_weigh_what_they_cost_at_the_length() -> None:
    hybrid = "--preset toy-qwen3.5 --linear-attention-freq None --num-layers 12"
    hybrid += f" --linear-attention-layers 0 1 2 3 4 5 {PP} 2"
    ((short, _), (long, _)) = (
        [chunks[0] for chunks in lengths(f"{hybrid} --seq-length {length}")]
        for length in (256, 65536)
    )
    assert short <= 6  # recurrences cost more than attention to few tokens
    assert long > 7  # attention to 65,536 tokens costs much more
    with_full_first = hybrid.replace("0 1 2 3 4 5", "6 7 8 9 10 11")
    assert lengths(f"{with_full_first} --seq-length 65536")[0][0] < 5


def test_the_grid_has_stages() -> None:
    words = f"{EIGHT} {PP} 2 --context-parallel-size 2 --global-batch-size 8"
    assert plan(*words.split(), world=8).grid == Grid(pp=2, dp=2, cp=2)
    assert plan(*words.split(), "--dry-run", torchrun=False).grid == Grid(pp=2, cp=2)
    error = refused(*words.split(), world=6)
    assert (error.flag, error.value) == (f"{PP} 2 x --context-parallel-size", "2")
    assert error.rule == "needs a multiple of 4 ranks, but torchrun started 6"
    moe = f"--preset toy-moe --num-layers 4 {PP} 2 --expert-model-parallel-size"
    assert plan(*f"{moe} 4".split(), world=8).grid == Grid(pp=2, dp=4, ep=4)
    error = refused(*f"{moe} 4".split(), world=4)
    assert error.rule == "must divide 2, the number of ranks of a copy of a pipeline stage"
    assert error.works == "2, or 8 ranks"
    assert plan(*f"{moe} 4 --dry-run".split(), torchrun=False).grid.world_size == 8


@pytest.mark.parametrize(
    ("words", "flag", "rule", "works"),
    [
        (f"{EIGHT} {PP} 9", PP, "must leave a layer for each of the 9 chunks", "at most 8"),
        (f"{EIGHT} {PP} 3 {CHUNKS} 4", PP, "must leave a layer for each of the 12", "at most 2"),
        (f"{EIGHT} {CHUNKS} 2", CHUNKS, f"has no effect without {PP} above 1", f"{PP} 2 with it"),
        (f"{EIGHT} {LAYOUT} Et*8L", LAYOUT, f"has no effect without {PP}", f"{PP} 2 with it"),
        (f"{EIGHT} {PP} 3 {LAYOUT} Et*3|t*3|tL", LAYOUT, "has 7 layers", "8 times t"),
        (f"{EIGHT} {PP} 3 {LAYOUT} Et*4|t*4L", LAYOUT, "has 2 chunks, which the", "a multiple"),
        (f"{EIGHT} {PP} 3 {LAYOUT} Et*4|t*4|L {CHUNKS} 2", LAYOUT, "has 1 chunks", f"{CHUNKS} 1"),
        (f"{EIGHT} {PP} 0", PP, "must be at least 1", "1"),
        (f"{EIGHT} {PP} 3 --fsdp-reshard never", "--fsdp-reshard", "has no effect on", "leave it"),
    ],
)
def test_what_stages_cannot_be_is_refused(words: str, flag: str, rule: str, works: str) -> None:
    world = 9 if f"{PP} 9" in words else 3
    error = refused(*words.split(), world=world)
    assert error.flag == flag
    assert error.rule.startswith(rule)
    assert error.works.startswith(works)


def test_mistakes_are_told_together() -> None:
    error = refused(*f"{EIGHT} {PP} 9 --fsdp-reshard always --split x".split(), world=9)
    assert isinstance(error, CombinedError)
    assert {each.flag for each in error.errors} == {PP, "--fsdp-reshard", "--split"}


def test_reshard_has_an_effect_where_weights_are_sharded() -> None:
    for words in (
        "--seq-length 96 --context-parallel-size 3",
        "",
        f"{PP} 3 --optimizer-cpu-offload",
    ):
        plan(*f"{EIGHT} --global-batch-size 6 --fsdp-reshard never {words}".split(), world=3)


def test_the_table_shows_stages() -> None:
    words = f"{EIGHT} {PP} 2 {CHUNKS} 2 --context-parallel-size 2 --global-batch-size 6"
    planned = plan(*words.split(), "--micro-batch-size", "1", world=4)
    text = shown(planned, width=150)
    for part in (
        "pp 1  dp 0  cp 0  tp 0   positions 0-255, 768-1023",
        "interleaved 1F1B, 2 virtual stages on each rank: stages wait for 8% of the time with 6",
        # 2 x 6 micro batches x 512 tokens x 192 x 4 bytes
        "each of 3 boundaries carries 4.5 MiB in float32 or 2.25 MiB in bfloat16 a step for each",
        "whole weights and gradients of a stage are kept until the end of a step (--fsdp-reshard)",
        "embedding, layers 0-1 and layers 4-5: 49",
        "layers 2-3 and layers 6-7, head: 50",
    ):
        assert part in text
    few = plan(*f"{EIGHT} {PP} 4 --micro-batch-size 1 --global-batch-size 8".split(), world=4)
    (label, told), (_, message), *_ = stages_of(few)
    assert (label, told) == (
        "pipeline",
        "1F1B: stages wait for 27% of the time with 8 micro batches; less with a smaller "
        "--micro-batch-size or a larger --global-batch-size",
    )
    assert message.startswith("each of 3 boundaries carries")
    assert not list(stages_of(plan("--preset", "toy")))


def test_messages_are_split_by_sequence_parallelism() -> None:
    words = f"{EIGHT} {PP} 2 --tensor-parallel-size 2 --micro-batch-size 2 --global-batch-size 4"
    whole = plan(*words.split(), world=4)
    assert message_bytes(whole, "bfloat16") == 2 * 2 * 2 * 1024 * 192 * 2
    split = plan(*words.split(), "--sequence-parallel", world=4)
    assert 2 * message_bytes(split, "float64") == message_bytes(whole, "float64")
    packed = plan(*words.split(), "--document-mask", world=4)
    assert message_bytes(packed, "float32") == message_bytes(whole, "float32")


# --- copies of the model on nodes


def copies(words: str, *, world: int, local: int) -> tuple[int, str]:
    """The copies, and the note about them."""
    found = plan(*words.split(), world=world, local=local)
    notes = [note for note in found.notes if "--data-parallel-replicate-size auto" in note]
    return found.grid.replicas, " ".join(notes)


@pytest.mark.parametrize(
    ("words", "world", "local", "number"),
    [
        ("", 8, 8, 1),  # one node
        ("", 8, 2, 4),
        ("--context-parallel-size 2", 8, 2, 4),
        ("--context-parallel-size 2", 8, 4, 2),
        ("--context-parallel-size 4 --num-query-groups 4", 8, 2, 1),  # cp crosses nodes
        ("--data-parallel-replicate-size 1", 8, 2, 1),
        ("--data-parallel-replicate-size 2", 8, 2, 2),
        (f"{PP} 2", 8, 2, 2),
        (f"{PP} 2", 8, 4, 1),  # a stage is on one node
        (f"{PP} 4", 16, 8, 1),  # two stages are on one node
        ("", 4, 1, 1),  # a copy would not be sharded
    ],
)
def test_a_copy_of_the_model_lies_on_one_node(
    words: str, world: int, local: int, number: int
) -> None:
    batch = "--global-batch-size 16 --micro-batch-size 1"
    found, note = copies(f"{EIGHT} {batch} {words}", world=world, local=local)
    assert found == number
    if found > 1 and "replicate" not in words:
        of = "each pipeline stage" if PP in words else "the model"
        told = f"{number} copies of {of}, one on the {local} ranks of each node"
        assert note.startswith(told)
    if f"{PP} " in words and found == 1:
        assert note == "", "nothing was to decide"


def test_why_there_is_no_copy_on_a_node() -> None:
    batch = "--global-batch-size 8"
    found, note = copies(f"{EIGHT} {batch} --context-parallel-size 4", world=8, local=2)
    assert (found, "4 context and tensor parallel ranks do not divide its ranks" in note) == (
        1,
        True,
    )
    moe = f"--preset toy-moe {batch} --expert-model-parallel-size 4"
    found, note = copies(moe, world=8, local=2)
    assert found == 1
    assert "4 expert parallel ranks do not divide its ranks" in note
    large = "--preset qwen3-30b-a3b --seq-length 4096 --global-batch-size 16"
    found, note = copies(large, world=16, local=8)
    assert found == 1
    assert "GiB of weights, gradients and optimizer state, above 16 GiB" in note


def test_the_number_of_copies_is_a_number_or_auto() -> None:
    with pytest.raises(ConfigError, match="must be a whole number or auto"):
        plan("--data-parallel-replicate-size", "some")
    assert plan("--data-parallel-replicate-size", "auto", world=2).grid.replicas == 1
