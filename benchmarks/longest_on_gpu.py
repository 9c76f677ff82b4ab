"""How long is the longest row of a 1B Llama that trains on one GPU, here and with transformers?

The model has the shape of Llama 3.2 with 1.24 billion parameters; weights, gradients and AdamW are
float32, products bfloat16. transformers uses its own gradient checkpointing, autocast and fused
attention. Ours recomputes layers, keeps their inputs on the host, and cuts MLP and loss into tiles.
Each row length is measured in a separate process; bytes are the peak of the CUDA allocator.

Memory grows linearly with the length, so the longest row is computed from two short ones, and then
trained for one step if that takes at most ``--seconds``. The time of attention grows quadratically,
so ours is also trained on a row of that length that is packed with documents, which takes minutes.

    python benchmarks/longest_on_gpu.py
    python benchmarks/longest_on_gpu.py --device cpu --quick    # tiny sizes: shows that it runs
"""

from __future__ import annotations

import json
import subprocess
import sys
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from harness.steps import Job, OurStep, TheirStep, llama_shape
from harness.teams import hardware

from cp_megatron.config import MemoryConfig
from cp_megatron.config.files.presets import PRESETS
from cp_megatron.config.words import read_options
from tests.allocations import counting_memory

Who = Literal["ours", "transformers"]
GIB = 1 << 30
MODEL = PRESETS["llama-1b"].model
TINY = llama_shape(num_layers=2, hidden=64, ffn=128, heads=4, kv_heads=2)
LEAN = MemoryConfig(
    recompute_granularity="full", mlp_tile_size=8192, loss_chunk_size=2048, cpu_offloading=True
)
SPARE = 0.97
"""The share of the GPU's memory that tensors can use; CUDA and the allocator's rounding need the
rest."""


@dataclass(frozen=True, kw_only=True)
class Arguments:
    """Longest rows."""

    seconds: float = 120.0
    """Steps that would take longer than this are not made."""
    document: int = 16384
    """Tokens per document in the packed row."""
    budget: float | None = None
    """GiB of the GPU's memory to use; by default nearly all of it."""
    device: Literal["cpu", "cuda"] = "cuda"
    """cpu counts the same bytes with the CPU's kernels, in float32."""
    quick: bool = False
    """Use tiny sizes, which show that the script runs but measure nothing."""
    measure: str | None = None
    """Internal: one measurement, as JSON."""


@dataclass(frozen=True, kw_only=True)
class Length:
    """One measurement: which implementation, on which row."""

    who: Who
    tokens: int
    document: int | None = None
    budget: int | None = None
    device: Literal["cpu", "cuda"] = "cuda"
    quick: bool = False

    def job(self) -> Job:
        """The training that the flags describe."""
        model, vocab = (TINY, 512) if self.quick else (MODEL, 128256)
        return Job(
            model=model,
            vocab_size=vocab,
            tokens=self.tokens,
            memory=LEAN,
            device=self.device,
            document=self.document,
        )


def measured(length: Length) -> dict[str, Any]:
    """Peak and seconds of a step: of the second one if the first takes less than 15 s."""
    kind = OurStep if length.who == "ours" else TheirStep
    if length.device == "cpu":
        with counting_memory() as count:
            step = kind(length.job())
            begin = time.monotonic()
            loss = step.run()
        return {"peak": count.peak, "seconds": time.monotonic() - begin, "loss": loss}
    if length.budget is not None:
        torch.cuda.set_per_process_memory_fraction(length.budget / torch.cuda.mem_get_info()[1])
    step = kind(length.job())
    begin = time.monotonic()
    loss = step.run()  # the first step also makes the optimizer's state
    seconds = time.monotonic() - begin
    found: dict[str, Any] = {"peak": torch.cuda.max_memory_allocated(), "loss": loss}
    if seconds < 15:
        begin = time.monotonic()
        step.run()
        seconds = time.monotonic() - begin
        found["peak"] = torch.cuda.max_memory_allocated()
    return {**found, "reserved": torch.cuda.max_memory_reserved(), "seconds": seconds}


def ask(length: Length) -> dict[str, Any] | None:
    """Calls ``measured`` in a separate process; None if memory does not suffice."""
    command = [sys.executable, str(Path(__file__)), "--measure", json.dumps(asdict(length))]
    ended = subprocess.run(command, capture_output=True, text=True, check=False)
    if ended.returncode:
        if "OutOfMemoryError" in ended.stderr:
            return None
        raise RuntimeError(ended.stderr)
    found: dict[str, Any] = json.loads(ended.stdout.splitlines()[-1])
    return found


def rows(arguments: Arguments) -> list[dict[str, Any]]:
    """Makes every measurement and prints it at once."""
    machine = dict(hardware())
    budget = 64 << 20
    if arguments.device == "cuda":
        machine["gpu"] = torch.cuda.get_device_name()
        budget = int(SPARE * torch.cuda.mem_get_info()[1])
    if arguments.budget is not None:
        budget = int(arguments.budget * GIB)
    found: list[dict[str, Any]] = []

    def measure(length: Length, **more: object) -> dict[str, Any]:
        begin = time.monotonic()
        answer = ask(length)
        row = {"benchmark": "longest_on_gpu", "who": length.who, "tokens": length.tokens}
        row |= {"document": length.document, **more, **(answer or {"out_of_memory": True})}
        row["whole_seconds"] = round(time.monotonic() - begin, 1)
        found.append(row)
        print(json.dumps({**row, "hardware": machine}), flush=True)
        return row

    short: dict[Who, tuple[int, int]] = {"transformers": (4096, 8192), "ours": (32768, 65536)}
    if arguments.quick:
        short = {"transformers": (128, 256), "ours": (256, 512)}
    sizes: dict[str, Any] = {"device": arguments.device, "quick": arguments.quick}
    sizes["budget"] = budget
    for who, (low, high) in short.items():
        first, second = (measure(Length(who=who, tokens=n, **sizes)) for n in (low, high))
        slope = (second["peak"] - first["peak"]) / (high - low)
        longest = int(high + (budget - second["peak"]) / slope) // 1024 * 1024
        line = {"budget": budget, "bytes_per_token": round(slope), "longest": longest}
        # Time grows linearly and quadratically; quadratic growth alone is an upper bound.
        if second["seconds"] * (longest / high) ** 2 <= arguments.seconds:
            measure(Length(who=who, tokens=longest, **sizes), **line)
            continue
        measure(Length(who=who, tokens=longest, document=arguments.document, **sizes), **line)
        trained = int(high * (arguments.seconds / second["seconds"]) ** 0.5) // 1024 * 1024
        measure(Length(who=who, tokens=min(trained, longest), **sizes), **line)
    return found


def main() -> None:
    arguments = read_options(sys.argv[1:], Arguments, program=sys.argv[0], description=__doc__)
    if arguments.measure is not None:
        print(json.dumps(measured(Length(**json.loads(arguments.measure)))))
        return
    rows(arguments)


if __name__ == "__main__":
    main()
