"""How many bytes does an exchange move if it sends latents or expanded heads, or under a window?

Everything is counted from the schedules that would run; no attention is computed. Prints one JSON
line per result, with the hardware:

- ``latent``: the bytes that a rank receives in forward for each of its tokens and each layer, as
  the mean over ranks, and why ``auto`` chooses what it does. The attention is that of a DeepSeek
  model (width of a latent 512, of a rotary key 64, of the other part of a key 128, of a value 128)
  under a causal mask, zigzag, in bfloat16. The exchanges are p2p of expanded keys and values, p2p
  of latents, and a2a of heads where the ranks can share them;
- ``window``: for a causal window of 128 on 128K tokens and 8 ranks, the keys that a rank receives,
  the ranks that they come from, and the number of its tiles. Sinks change none of this, because
  they are not sent.

    python benchmarks/exchanges.py                   # seconds
    python benchmarks/exchanges.py --quick
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from itertools import chain

from harness.teams import hardware

from cp_megatron.config.words import read_options
from cp_megatron.plan import Mask, Schedule, SequenceLayout

HEADS: Mapping[str, int] = {"V2-Lite": 16, "V2 and V3": 128}
LATENT, PLAIN, VALUE = (512, 64), 128, 128  # widths: latent and rotary key; rest of a key; value
TOKENS_PER_RANK, BYTES = 1024, 2
WINDOW, ROW, RANKS = 128, 128 << 10, 8


@dataclass(frozen=True, kw_only=True)
class Arguments:
    """Bytes of exchanges, from their schedules."""

    ranks: tuple[int, ...] = (2, 4, 8, 16, 32, 64)
    """Numbers of ranks."""
    quick: bool = False
    """Use two ranks, which show that the script runs."""


def per_token(cp_size: int, num_heads: int, **options: str) -> tuple[float, Schedule]:
    """Returns the bytes that a rank receives in forward per token of its own, and the schedule."""
    mask = Mask.causal(TOKENS_PER_RANK * cp_size)
    layout = SequenceLayout.make(mask, cp_size, "zigzag")
    widths = {"head_dim": PLAIN + LATENT[1], "v_head_dim": VALUE}
    how = {"exchange": "p2p", "route": "ring", **options}
    schedule = Schedule.build(mask, layout, num_heads=num_heads, latent=LATENT, **widths, **how)  # type: ignore[arg-type]
    args = widths["head_dim"], BYTES, VALUE
    total = sum(schedule.bytes_received(rank, *args) for rank in range(cp_size))
    return total / mask.seq_len, schedule


def latent_results(ranks: tuple[int, ...]) -> Iterator[dict[str, object]]:
    """Yields a result for each model and number of ranks."""
    for model, num_heads in HEADS.items():
        for cp_size in ranks:
            shares = num_heads % cp_size == 0
            yield {
                "model": model,
                "ranks": cp_size,
                "expanded": per_token(cp_size, num_heads, exchange_latent="expanded")[0],
                "latent": per_token(cp_size, num_heads, exchange_latent="latent")[0],
                "a2a": per_token(cp_size, num_heads, exchange="a2a")[0] if shares else None,
                "auto": per_token(cp_size, num_heads, exchange="auto")[1].reason,
            }


def window_results(kind: str) -> Iterator[dict[str, object]]:
    """Yields a result for each rank; query q attends keys q - 127 to q."""
    mask = Mask.causal(ROW, window=(WINDOW - 1, 0))
    layout = SequenceLayout.make(mask, RANKS, kind)
    schedule = Schedule.build(mask, layout, route="auto")
    for rank in range(RANKS):
        rounds = schedule.rounds(rank)
        arrivals = [round_.receive_keys for round_ in rounds if round_.receive_keys]
        yield {
            "layout": kind,
            "route": schedule.route,
            "rank": rank,
            "tokens": layout.shard_len,
            "keys_received": schedule.kv_tokens_received(rank),
            "from": sorted(message.owner for message in arrivals),
            "tiles": sum(len(round_.tiles) for round_ in rounds),
            "pairs_of_mean": schedule.pairs(rank) * RANKS / mask.pairs(),
        }


def main() -> None:
    arguments = read_options(sys.argv[1:], Arguments, program=sys.argv[0], description=__doc__)
    machine = hardware()
    ranks = (2,) if arguments.quick else arguments.ranks
    windows = chain(window_results("contiguous"), window_results("zigzag"))
    for name, rows in (("latent", latent_results(ranks)), ("window", windows)):
        for row in rows:
            line = {"benchmark": "exchanges", "result": name, **row, "hardware": machine}
            print(json.dumps(line), flush=True)


if __name__ == "__main__":
    main()
