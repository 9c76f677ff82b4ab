"""How rows are shared: padding, windows, and the exchange that fits heads, bytes and nodes."""

from __future__ import annotations

import pytest

from cp_megatron.plan import Grid
from cp_megatron.preflight.sequence import ranks_together
from tests.preflight.test_check import CP2, CP8, PACKED, TP4, plan, refused


@pytest.mark.parametrize(
    ("argv", "world", "row_length", "padding"),
    [
        ([*CP2, "--seq-length", "1023"], 2, 1024, 1),
        ([*CP2, "--seq-length", "1022"], 2, 1024, 2),
        ([*CP2, "--seq-length", "1022", "--cp-layout", "contiguous"], 2, 1022, 0),
        ([*CP2, *TP4, "--sequence-parallel", "--seq-length", "1020"], 8, 1024, 4),
        ([*TP4, "--sequence-parallel", "--seq-length", "1023"], 4, 1024, 1),
        (
            [*CP2, *PACKED, "--cp-layout", "zigzag", "--seq-length", "1023"],
            2,
            2048,
            2,
        ),
        (["--seq-length", "1023"], 1, 1023, 0),
    ],
)
def test_rows_are_padded_to_what_cuts_them(
    argv: list[str], world: int, row_length: int, padding: int
) -> None:
    run = plan(*argv, "--pad-rows", world=world)
    sequence = run.sequence
    assert (sequence.row_length, sequence.padding) == (row_length, padding)
    assert sequence.layout.shard_len * run.grid.cp == row_length
    assert any(f"padded to {row_length:,}" in note for note in run.notes) == bool(padding)
    if not run.config.data.document_mask and padding:
        assert sequence.mask.lengths == (row_length - padding, padding)


def test_a_window_is_every_row_s() -> None:
    for argv in ([], ["--document-mask"]):
        mask = plan(*CP2, *argv, "--window-size", "99", "-1", world=2).sequence.mask
        assert (mask.window, mask.is_causal) == ((99, 0), True)


def test_the_exchange_is_chosen_by_what_it_moves() -> None:
    heads = ["--num-attention-heads", "8", "--seq-length", "4096"]
    sequence = plan(*CP8, *heads, world=8).sequence
    assert (sequence.exchange, sequence.sizes) == ("a2a", None)
    assert sequence.reason.startswith("moves the fewest bytes, p2p ")
    few = plan(*CP8, *heads, "--num-query-groups", "1", world=8).sequence
    assert (few.exchange, few.route) == ("p2p", "ring")
    narrow = plan(*CP8, *heads, "--window-size", "63", "0", world=8).sequence
    assert (narrow.exchange, narrow.route) == ("p2p", "direct")
    unfit = plan(*CP8, "--num-attention-heads", "4", "--seq-length", "4096", world=8).sequence
    assert unfit.exchange == "p2p"
    assert "a2a cannot share 4 heads among 8" in unfit.reason


def test_heads_are_those_of_a_tensor_parallel_rank() -> None:
    tp2 = [*CP8, "--tensor-parallel-size", "2", "--num-attention-heads", "8"]
    assert "share 4 heads among 8" in plan(*tp2, world=16).sequence.reason
    error = refused(*tp2, "--cp-comm-type", "a2a", world=16)
    assert "4 query heads (--num-attention-heads 8 / --tensor-parallel-size 2)" in error.rule
    # One key/value head for four ranks: each has it, and reads it with two query heads.
    one = ["--num-attention-heads", "8", "--num-query-groups", "1"]
    assert plan(*CP2, *TP4, *one, "--cp-comm-type", "a2a", world=8).sequence.exchange == "a2a"


@pytest.mark.parametrize(
    ("tp", "cp", "world", "local", "together"),
    [
        (1, 8, 8, 8, 8),
        (1, 8, 16, 8, 8),
        (1, 8, 16, 4, 4),
        (2, 8, 16, 8, 4),
        (2, 2, 16, 8, 2),
        (1, 6, 24, 8, 2),  # the second group lies on two nodes: ranks 6 to 11
        (8, 4, 32, 8, 1),
        (4, 2, 12, 6, 1),  # tp itself crosses nodes
        (1, 6, 12, 4, 2),
    ],
)
def test_neighbours_that_share_a_node(
    tp: int, cp: int, world: int, local: int, together: int
) -> None:
    grid = Grid(dp=world // (tp * cp), cp=cp, tp=tp)
    assert ranks_together(grid, local) == together

    def fits(size: int) -> bool:
        groups = grid.groups("cp")
        blocks = [group[i : i + size] for group in groups for i in range(0, cp, size)]
        return all(block[0] // local == block[-1] // local for block in blocks)

    assert max(size for size in range(1, cp + 1) if cp % size == 0 and fits(size)) == together


def test_a2a_stays_inside_a_node() -> None:
    heads = ["--num-attention-heads", "8", "--seq-length", "4096"]
    sequence = plan(*CP8, *heads, world=16, local=4).sequence
    assert (sequence.exchange, sequence.sizes) == ("a2a+p2p", (4, 2))
    alone = plan(*CP8, *TP4, *heads, world=32, local=4).sequence
    assert (alone.exchange, alone.sizes) == ("p2p", None)
    assert "a node of its own" in alone.reason
    dry = plan("--dry-run", *CP8, *heads, torchrun=False)
    assert dry.sequence.exchange == "a2a"
    assert any("as if one node had all ranks" in note for note in dry.notes)


def test_documents_leave_the_choice_to_each_batch() -> None:
    documents = [*CP8, "--document-mask", "--num-attention-heads", "8"]
    sequence = plan(*documents, world=16, local=4).sequence
    assert (sequence.exchange, sequence.route, sequence.sizes) == ("auto", "auto", (4, 2))
    assert "each batch" in sequence.reason
    assert sequence.layout.kind == "balanced"
    words = ["--cp-comm-type", "p2p", "--cp-route", "direct", "--cp-layout", "zigzag"]
    asked = plan(*documents, *words, world=8).sequence
    assert (asked.exchange, asked.route, asked.sizes) == ("p2p", "direct", None)
    assert asked.layout.kind == "zigzag"


MLA = ["--multi-latent-attention", "--num-attention-heads", "16", "--num-query-groups", "16"]


def test_latents_are_sent_where_that_is_fewer_bytes() -> None:
    sequence = plan(*CP8, *MLA, world=8).sequence
    assert (sequence.exchange, sequence.reason) == (
        "p2p",
        "moves the fewest bytes, p2p 8.9x, a2a 3x",
    )
    assert any("latents are sent" in note for note in sequence.notes)
    expanded = plan(*CP8, *MLA, "--cp-latent-exchange", "expanded", world=8).sequence
    assert (expanded.exchange, expanded.notes) == ("a2a", ())


def test_an_exchange_of_latents_that_cannot_be_is_refused() -> None:
    latent = ["--cp-latent-exchange", "latent"]
    error = refused(*CP8, *latent, world=8)
    assert str(error).startswith(
        "--cp-latent-exchange latent: has no effect without --multi-latent"
    )
    error = refused(*CP8, *MLA, *latent, "--cp-comm-type", "a2a", world=8)
    assert "contradicts --cp-comm-type a2a" in str(error)
