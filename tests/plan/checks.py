"""Properties of a schedule of any exchange, one function for each.

If heads are exchanged, the members of a group compute the same tiles for different heads. Rows and
columns then count in the tokens that the group holds together, and one group computes each pair.
"""

from __future__ import annotations

from itertools import pairwise

import numpy as np

from cp_megatron.plan import Schedule
from cp_megatron.plan.gather import Gather
from cp_megatron.plan.heads import HeadExchange
from cp_megatron.plan.rounds import Round
from tests.plan.simulation import (
    MESSAGES,
    Ints,
    Machine,
    Rounds,
    exchanged_heads,
    expand,
    gathered,
    heads_of_tokens,
    held,
    read_columns,
    results_returned,
    tile_matrix,
    wires,
)


def computed(schedule: Schedule, rank: int, rounds: tuple[Round, ...]) -> Ints:
    """int64 [S, S]: the number of times that ``rank`` computes each pair."""
    rows = held(schedule, rank)
    count = np.zeros((schedule.mask.seq_len,) * 2, np.int64)
    for round_ in rounds:
        columns = expand(round_.keys)
        for tile in round_.tiles:
            where = np.ix_(rows[tile.q0 : tile.q1], columns[tile.k0 : tile.k1])
            count[where] += tile_matrix(tile)
    return count


def check_pairs(schedule: Schedule, rounds: Rounds) -> None:
    """Each attended pair is in exactly one tile of one group, and no tile has any other pair."""
    total = np.zeros((schedule.mask.seq_len,) * 2, np.int64)
    for rank, mine in enumerate(rounds):
        first = rank // schedule.all_to_all_size * schedule.all_to_all_size
        if rank == first:
            count = computed(schedule, rank, mine)
            outside = np.delete(count, held(schedule, rank), axis=0)
            assert not outside.any(), "a rank computes rows it does not hold"
            total += count
        tiles = [(round_.owner, round_.keys, round_.tiles) for round_ in mine]
        assert tiles == [(round_.owner, round_.keys, round_.tiles) for round_ in rounds[first]]
    assert np.array_equal(total, schedule.mask.dense().astype(np.int64))


def check_tiles(schedule: Schedule, rank: int, rounds: tuple[Round, ...]) -> None:
    """Kernels can rely on lengths, trimming, kinds, and the first tile of each row."""
    touched = np.zeros(len(held(schedule, rank)), np.bool_)
    total = 0
    for number, round_ in enumerate(rounds):
        for tile in round_.tiles:
            assert 0 <= tile.q0 < tile.q1 <= len(touched)
            assert 0 <= tile.k0 < tile.k1 <= round_.num_keys
            matrix = tile_matrix(tile)
            assert matrix.any(axis=1).all(), "a row without a key"
            assert matrix.any(axis=0).all(), "a column without a query"
            assert tile.pairs == matrix.sum()
            cuts = not matrix.all() or matrix.size == 1  # one token under a causal band
            assert cuts or tile.kind == "full", "a band that cuts nothing"
            if tile.kind == "causal":
                assert np.array_equal(matrix, np.tri(len(matrix), dtype=np.bool_))
            rows = touched[tile.q0 : tile.q1]
            assert rows.all() or not rows.any(), "stored over some rows, merged into others"
            assert tile.first == (not rows.any())
            rows[:] = True
            total += tile.pairs
        assert touched.all(), f"a row without a key after round {number}"
    assert schedule.pairs(rank) == total


def check_messages(schedule: Schedule, rounds: Rounds) -> None:
    """Both ends of each message agree on its content and on its place in the order."""
    sent = wires(schedule, rounds, sending=True)
    assert sent == wires(schedule, rounds, sending=False)
    for (source, target), messages in sent.items():
        assert source != target
        assert source % schedule.all_to_all_size == target % schedule.all_to_all_size
        seen = [(wire.slot, MESSAGES.index(wire.kind)) for wire in messages]
        assert seen == sorted(set(seen)), "two of a kind, or not keys, passed, returned"


def check_needed_only(schedule: Schedule, rounds: Rounds) -> None:
    """An arrival holds only keys that its tiles read and, on a ring, keys to forward."""
    for mine in rounds:
        for number, round_ in enumerate(mine[1:], start=1):
            needed = read_columns(round_)
            if schedule.route == "ring" and round_.send_keys:
                needed[expand(round_.send_keys.spans)] = True
            assert needed.all()
            received = mine[number - 1].receive_keys
            if schedule.exchange != "all_gather":
                assert round_.num_keys == (received.num_tokens if received else 0)


def check_run(schedule: Schedule, rounds: Rounds) -> None:
    """All keys arrive, and each reader's gradient returns to the owner exactly once."""
    machine = Machine(schedule, rounds)
    machine.run()
    expected = expected_home(schedule)
    for rank, home in enumerate(machine.home):
        assert np.array_equal(home, expected[rank]), rank


def expected_home(schedule: Schedule) -> list[Ints]:
    """For each rank int64 [keys held, ranks]: 1 if another rank reads the key.

    A rank does not send its own contribution, and members of a group keep to their own heads.
    """
    dense, size = schedule.mask.dense(), schedule.all_to_all_size
    shards = [held(schedule, rank) for rank in range(schedule.layout.cp_size)]
    read = np.stack([dense[shard].any(axis=0) for shard in shards], axis=1).astype(np.int64)
    expected = []
    for rank, shard in enumerate(shards):
        home = read[shard]
        home[:, [r for r in range(len(shards)) if r == rank or (r - rank) % size]] = 0
        expected.append(home)
    return expected


def check_gather(schedule: Schedule, rounds: Rounds, gathers: list[Gather]) -> None:
    """Ranks give what others read and pick what their tiles read; gradients return once."""
    size = schedule.layout.cp_size
    assert len(gathers) == size
    everything = gathered(schedule, gathers)
    expected = expected_home(schedule)
    home = [np.zeros_like(counts) for counts in expected]
    width = gathers[0].width
    for rank, (mine, gather) in enumerate(zip(rounds, gathers)):
        picked = everything[expand(gather.picked)]
        assert np.array_equal(picked, expand(mine[1].keys if len(mine) > 1 else ())), rank
        assert len(mine) == (2 if len(picked) else 1)
        wanted = expected[rank].any(axis=1)
        assert np.array_equal(np.flatnonzero(wanted), expand(gather.given)), "not what is read"
        assert schedule.kv_tokens_received(rank) == (size - 1) * width
        sums = np.zeros(size * width, np.int64)  # what this rank puts into reduce-scatter
        sums[expand(gather.picked)] = 1
        for owner, part in enumerate(sums.reshape(size, width)):
            places = expand(gathers[owner].given)
            home[owner][places, rank] += part[: len(places)]
            assert not part[len(places) :].any(), "a gradient in the padding"
    assert width == max(int(counts.any(axis=1).sum()) for counts in expected)
    for rank in range(size):
        assert np.array_equal(home[rank], expected[rank]), rank


def check_head_exchange(schedule: Schedule, head_exchanges: list[HeadExchange], rank: int) -> None:
    """One member of a group computes each query head of each token, with the kv head it reads."""
    num_heads, num_kv_heads = schedule.num_heads, schedule.num_kv_heads
    assert num_heads is not None
    assert num_kv_heads is not None
    serves, size = num_heads // num_kv_heads, schedule.all_to_all_size
    head_exchange = head_exchanges[rank]
    first = rank // size * size
    assert head_exchange.peers == tuple(range(first, first + size))
    assert head_exchange.peers[head_exchange.index] == rank
    assert [h for span in head_exchange.query_heads for h in range(*span)] == list(range(num_heads))
    for queries, keys in zip(head_exchange.query_heads, head_exchange.kv_heads):
        assert set(range(*keys)) == {h // serves for h in range(*queries)}, "kv heads sent"
    tokens, shard = held(schedule, rank), schedule.layout.positions(rank)
    for kind, spans in (("query", head_exchange.query_heads), ("kv", head_exchange.kv_heads)):
        arrived, _ = exchanged_heads(schedule, head_exchanges, rank, kind)
        assert np.array_equal(arrived, heads_of_tokens(tokens, spans[head_exchange.index])), (
            "misplaced"
        )
    back, _ = results_returned(schedule, head_exchanges, rank)
    assert np.array_equal(back, heads_of_tokens(shard, (0, num_heads))), "results misplaced"
    check_groups(head_exchange, serves)


def check_groups(head_exchange: HeadExchange, serves: int) -> None:
    """The rank's groups are uniform, cover its heads in order, and pair them as the model does."""
    (q0, q1), (k0, k1) = (
        head_exchange.query_heads[head_exchange.index],
        head_exchange.kv_heads[head_exchange.index],
    )
    pairs = []
    for queries, keys in head_exchange.groups:
        num_queries, num_keys = queries[1] - queries[0], keys[1] - keys[0]
        assert num_queries % num_keys == 0, "a group that is not uniform"
        each = num_queries // num_keys
        pairs += [(q, keys[0] + i // each) for i, q in enumerate(range(*queries))]
    assert pairs == [(h - q0, h // serves - k0) for h in range(q0, q1)]
    assert {k for _, k in pairs} == set(range(k1 - k0))
    for a, b in pairwise(head_exchange.groups):
        each_of = [(q[1] - q[0]) // (k[1] - k[0]) for q, k in (a, b)]
        assert each_of[0] != each_of[1] or a.keys[1] != b.keys[0], "two groups that could be one"


def check_bytes(
    schedule: Schedule,
    rank: int,
    rounds: Rounds,
    gathers: list[Gather],
    head_exchanges: list[HeadExchange],
) -> None:
    """Bytes that ``rank`` receives in forward; heads of 3 and 5 elements, two bytes each."""
    head_dim, v_dim, width = 3, 5, 3 + 5
    in_rounds = sum(t.receive_keys.num_tokens for t in rounds[rank] if t.receive_keys)
    tokens = (schedule.all_to_all_size - 1) * schedule.layout.shard_len + in_rounds
    elements = tokens * (schedule.num_kv_heads or 1) * width
    if gathers:
        tokens = len(gathered(schedule, gathers)) - gathers[rank].width
        elements = tokens * (schedule.num_kv_heads or 1) * width
    if head_exchanges:
        _, queries = exchanged_heads(schedule, head_exchanges, rank, "query")
        arrived, keys = exchanged_heads(schedule, head_exchanges, rank, "kv")
        _, results = results_returned(schedule, head_exchanges, rank)
        elements = queries * head_dim + results * v_dim
        elements += (keys + in_rounds * arrived.shape[1]) * width
    assert schedule.kv_tokens_received(rank) == tokens
    assert schedule.bytes_received(rank, head_dim, 2, v_head_dim=v_dim) == 2 * elements
