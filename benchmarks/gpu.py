"""Where does a training step on one GPU spend its time? Everything of interest within ten minutes.

The model is a Llama of 1.24 billion parameters with random weights; weights, gradients and AdamW
are float32, products bfloat16. The stages run in order until ``--minutes`` are over:

- ``machine``: bandwidth of a copy, TFLOP/s of the products of a layer;
- ``attention``: every kernel that the machine has, head dims 64 and 128, one row of 32K tokens;
- ``documents``: 32 documents, computed tile by tile and in one call;
- ``step``: a step at 32K tokens without recomputation, with selective recomputation, with the
  settings that save most memory, and with each kernel; tokens per second, MFU, peak memory;
- ``profile``: the milliseconds of a step by class of GPU kernel, and the time the GPU is idle;
- ``waits``: how often a step waits for the GPU, counted by PyTorch;
- ``short``: rows of 4K and 8K tokens, and transformers on the same rows;
- ``packed``: rows of 128K tokens with 32, 256 and 1,024 documents;
- ``wide``: four layers of the shape of Llama 3 8B, 16K tokens.

MFU is relative to the dense bfloat16 peak; attended pairs of a causal row are counted once, and
recomputation is not counted. Each result is printed at once as a JSON line.

    python benchmarks/gpu.py
    python benchmarks/gpu.py --only step profile --minutes 3
    python benchmarks/gpu.py --quick                   # tiny sizes on the CPU: shows that it runs
"""

from __future__ import annotations

import gc
import json
import statistics
import sys
import time
import warnings
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Literal

import torch
from harness.steps import Job, OurStep, TheirStep, llama_shape
from harness.teams import hardware
from torch import Tensor
from torch.profiler import ProfilerActivity, profile

from cp_megatron.config import MemoryConfig, ModelConfig
from cp_megatron.config.files.presets import PRESETS
from cp_megatron.config.words import read_options
from cp_megatron.context_parallel import ContextParallel
from cp_megatron.errors import ConfigError
from cp_megatron.kernels.interface import BackwardInputs
from cp_megatron.kernels.load_kernel import load_kernel
from cp_megatron.kernels.select import FLASH_ATTENTION, select_kernel
from cp_megatron.metrics.writer import peak_flops
from cp_megatron.plan.tiling import CAUSAL
from cp_megatron.spec import ModelSpec

Result = dict[str, object]
SELECTIVE = MemoryConfig(recompute_granularity="selective")
LEAN = MemoryConfig(recompute_granularity="full", mlp_tile_size=8192)
MODEL = PRESETS["llama-1b"].model
WIDE = replace(PRESETS["llama3-8b"].model, num_layers=4)
TINY = llama_shape(num_layers=2, hidden=64, ffn=128, heads=4, kv_heads=2)
CLASSES = (
    ("attention", ("flash", "fmha", "sdpa", "softmaxlse", "flashattn")),
    ("gemm", ("gemm", "nvjet", "cutlass", "xmma", "cublas", "addmm", "::mm", "bmm")),
    ("optimizer and norm", ("multi_tensor", "adam", "foreach")),
    ("copies", ("memcpy", "memset", "copy", "chunk_cat", "split_with_sizes")),
)
"""Words in the names of GPU kernels (of CPU operators, if there is no GPU), in order of priority.
What none of them matches is elementwise work, norms and the loss."""


@dataclass(frozen=True, kw_only=True)
class Arguments:
    """A training step on one GPU, piece by piece."""

    only: tuple[str, ...] = ()
    """The stages to run, by name; by default all."""
    minutes: float = 10.0
    """No stage begins after this."""
    steps: int = 3
    """Timed steps per case, after two that are not timed."""
    kernel: str = "auto"
    """The attention kernel of all stages that do not compare kernels."""
    label: str = ""
    """A text that every line repeats, such as the commit."""
    quick: bool = False
    """Tiny sizes on the CPU, which show that the script runs but measure nothing."""


@dataclass(frozen=True, kw_only=True)
class Stages:
    """The stages, which yield their results one by one."""

    arguments: Arguments
    device: Literal["cpu", "cuda"]
    began: float = field(default_factory=time.monotonic)

    def size(self, tokens: int) -> int:
        """A number of tokens, or less than a hundredth of it with ``--quick``."""
        return max(tokens // 512, 32) if self.arguments.quick else tokens

    def job(
        self,
        tokens: int,
        *,
        memory: MemoryConfig | None = None,
        documents: int = 1,
        model: ModelConfig = MODEL,
        kernel: str | None = None,
    ) -> Job:
        """A row of ``tokens`` in equally long documents."""
        quick, tokens = self.arguments.quick, self.size(tokens)
        return Job(
            model=TINY if quick else model,
            vocab_size=512 if quick else 128256,
            tokens=tokens,
            memory=memory or MemoryConfig(),
            device=self.device,
            document=None if documents == 1 else max(1, tokens // documents),
            kernel=kernel or self.arguments.kernel,
        )

    def machine(self) -> Iterator[Result]:
        """Copies and products."""
        rows = self.size(1 << 30)
        source = torch.ones(rows, dtype=torch.bfloat16, device=self.device)
        target = torch.empty_like(source)
        seconds = self.median(partial(target.copy_, source))
        yield {"what": "copy", "terabytes_per_second": round(4e-12 * rows / seconds, 2)}
        del source, target
        tokens = self.size(32768)
        for i, o in ((2048, 2048), (2048, 512), (2048, 8192), (8192, 2048), (2048, 128256)):
            rows = min(tokens, 8192) if o > 65536 else tokens
            x, w = (torch.randn(n, i, device=self.device).bfloat16() for n in (rows, o))
            seconds = self.median(partial(torch.mm, x, w.T))
            yield {
                "what": f"{rows} x {i} x {o}",
                "tflops": round(2e-12 * rows * i * o / seconds, 1),
            }

    def attention(self) -> Iterator[Result]:
        """Every kernel alone, on one causal row."""
        tokens = self.size(32768)
        for heads, kv_heads, dim in ((32, 8, 64), (32, 8, 128)):
            shape = 1, tokens, heads, dim
            q, dout = (torch.randn(shape, device=self.device).bfloat16() for _ in "qd")
            k, v = (torch.randn(1, tokens, kv_heads, dim, device=q.device).bfloat16() for _ in "kv")
            for name in self.kernels(dim):
                try:
                    yield self.one_kernel(name, q, k, v, dout)
                except Exception as error:  # a package that does not fit this machine
                    yield {"kernel": name, "head_dim": dim, "error": str(error)[:300]}

    def one_kernel(self, name: str, q: Tensor, k: Tensor, v: Tensor, dout: Tensor) -> Result:
        """Milliseconds and TFLOP/s of one kernel, forward and backward."""
        kernel, scale = load_kernel(name), q.shape[-1] ** -0.5
        q, k, v, dout = (x.to(kernel.compute_dtype(x.dtype)) for x in (q, k, v, dout))
        out, lse = kernel.forward(q, k, v, CAUSAL, scale)
        x = BackwardInputs(dout, q, k, v, out, lse)
        forward = self.median(lambda: kernel.forward(q, k, v, CAUSAL, scale))
        backward = self.median(lambda: kernel.backward(x, CAUSAL, scale))
        flops = 2e-12 * q.shape[1] ** 2 * q.shape[2] * q.shape[3]
        return {
            "kernel": name,
            "head_dim": q.shape[-1],
            "forward_ms": round(1e3 * forward, 2),
            "backward_ms": round(1e3 * backward, 2),
            "forward_tflops": round(flops / forward, 1),
            "backward_tflops": round(2.5 * flops / backward, 1),
        }

    def kernels(self, head_dim: int) -> Iterator[str]:
        """The kernels that this machine can run."""
        if self.arguments.quick:
            yield "cpu"
            return
        capability = torch.cuda.get_device_capability()
        for name in ("cuda", "cudnn", *FLASH_ATTENTION):
            try:
                wanted = select_kernel(
                    name, device="cuda", dtype="bfloat16", head_dim=head_dim, capability=capability
                )
                yield wanted.name
            except ConfigError:
                continue

    def documents(self) -> Iterator[Result]:
        """The attention of a packed row of 16K tokens, as the engine runs it."""
        for count in (1, 32, 256):
            job = self.job(16384, documents=count)
            cp = ContextParallel(None, job.mask, kernel=job.kernel)
            dtype = torch.float32 if self.device == "cpu" else torch.bfloat16
            q, k, v = (
                torch.randn(1, job.tokens, heads, 64, dtype=dtype, device=self.device)
                for heads in (32, 8, 8)
            )
            for x in (q, k, v):
                x.requires_grad_()
            forward = partial(cp.attention, q, k, v)
            dout = torch.randn_like(q)
            yield {
                "documents": len(job.mask.lengths),
                "tokens": job.tokens,
                "ms": round(1e3 * self.median(partial(_both, forward, (q, k, v), dout)), 3),
                "host_ms_forward": round(1e3 * host_seconds(forward), 3),
            }

    def step(self) -> Iterator[Result]:
        """Steps at 32K tokens."""
        for name, memory in (("none", None), ("selective", SELECTIVE), ("lean", LEAN)):
            yield {"recompute": name, **self.timed(self.job(32768, memory=memory))}
        for kernel in self.kernels(64):
            yield {
                "recompute": "none",
                "kernel": kernel,
                **self.timed(self.job(32768, kernel=kernel)),
            }

    def profile(self) -> Iterator[Result]:
        """One step at 32K tokens by class of kernel."""
        step = OurStep(self.job(32768))
        for _ in range(2):
            step.run()
        kinds = [ProfilerActivity.CUDA if self.device == "cuda" else ProfilerActivity.CPU]
        self.wait()
        begin = time.perf_counter()
        with profile(activities=kinds) as recorded:
            step.run()
            self.wait()
            elapsed = time.perf_counter() - begin
        yield {**by_class(recorded, elapsed, self.device)}

    def waits(self) -> Iterator[Result]:
        """Synchronisations of the host with the GPU in a step."""
        step = OurStep(self.job(4096))
        for _ in range(2):
            step.run()
        if self.device == "cpu":
            yield {"synchronizations": None}
            return
        self.wait()
        torch.cuda.set_sync_debug_mode("warn")
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            step.launch()
        torch.cuda.set_sync_debug_mode("default")
        places = [f"{w.filename.rpartition('/')[2]}:{w.lineno}" for w in caught]
        yield {"synchronizations": len(caught), "places": places}

    def short(self) -> Iterator[Result]:
        """Rows of 4K and 8K tokens beside transformers."""
        whole = partial(TheirStep, checkpointing=False)
        for tokens in (4096, 8192):
            ours = self.timed(self.job(tokens))
            theirs = self.timed(self.job(tokens), whole)
            yield {"who": "ours", **ours}
            yield {"who": "transformers", **theirs}

    def packed(self) -> Iterator[Result]:
        """Rows of 128K tokens with many documents."""
        for documents in (32, 256, 1024):
            yield self.timed(self.job(131072, memory=SELECTIVE, documents=documents), count=2)

    def wide(self) -> Iterator[Result]:
        """Four layers of 8B."""
        yield self.timed(self.job(16384, model=WIDE))

    def timed(
        self,
        job: Job,
        kind: Callable[[Job], OurStep | TheirStep] = OurStep,
        count: int | None = None,
    ) -> Result:
        """Seconds of a step, tokens per second, MFU and peak memory."""
        self.free()
        step = kind(job)
        for _ in range(2):
            loss = step.run()
        seconds = []
        for _ in range(count or self.arguments.steps):
            self.wait()
            begin = time.perf_counter()
            loss = step.run()
            self.wait()
            seconds.append(time.perf_counter() - begin)
        median, tokens = statistics.median(seconds), job.tokens
        found: Result = {
            "tokens": tokens,
            "documents": len(job.mask.lengths),
            "seconds": round(median, 4),
            "tokens_per_second": round(tokens / median),
            "loss": round(loss, 4),
        }
        if self.device == "cuda":
            flops = model_flops(job)
            found["mfu"] = round(flops / median / (peak_flops(torch.device("cuda")) or 1.0), 4)
            found["peak_gib"] = round(torch.cuda.max_memory_allocated() / (1 << 30), 2)
        return found

    def median(self, run: Callable[[], object], count: int = 7) -> float:
        """Median seconds of ``run``, after a warm-up."""
        seconds = []
        for _ in range(count + 2):
            self.wait()
            begin = time.perf_counter()
            run()
            self.wait()
            seconds.append(time.perf_counter() - begin)
        return statistics.median(seconds[2:])

    def wait(self) -> None:
        """Waits for the GPU."""
        if self.device == "cuda":
            torch.cuda.synchronize()

    def free(self) -> None:
        """Frees what earlier steps held, and forgets their peak."""
        gc.collect()
        if self.device == "cuda":
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()


def _both(forward: Callable[[], Tensor], inputs: Sequence[Tensor], dout: Tensor) -> None:
    torch.autograd.grad(forward(), inputs, dout)


def host_seconds(run: Callable[[], object]) -> float:
    """Seconds until ``run`` returns, without waiting for the GPU; the best of five."""
    found = []
    for _ in range(5):
        begin = time.perf_counter()
        run()
        found.append(time.perf_counter() - begin)
    return min(found)


def by_class(recorded: profile, elapsed: float, device: str) -> Result:
    """Milliseconds by class of kernel, and the largest kernels of no class."""
    totals: dict[str, float] = defaultdict(float)
    others: dict[str, float] = defaultdict(float)
    num_kernels = 0
    for event in recorded.key_averages():
        on_cpu, on_gpu = event.self_cpu_time_total, event.self_device_time_total
        spent, name = (on_gpu if device == "cuda" else on_cpu) / 1e3, event.key.lower()
        found = next((kind for kind, words in CLASSES if any(w in name for w in words)), "rest")
        totals[found] += spent
        num_kernels += event.count
        if found in ("rest", "copies"):
            others[event.key[:80]] += spent
    whole, largest = 1e3 * elapsed, sorted(others.items(), key=lambda item: -item[1])[:12]
    return {
        "milliseconds": {name: round(spent, 2) for name, spent in totals.items()},
        "gemm_and_attention": round((totals["gemm"] + totals["attention"]) / whole, 4),
        "idle": round(max(0.0, 1 - sum(totals.values()) / whole), 4),
        "kernels": num_kernels,
        "largest_others": {name: round(spent, 2) for name, spent in largest},
    }


def model_flops(job: Job) -> float:
    """FLOPs of a step of the job's model."""
    spec = ModelSpec.of(job.model, seq_length=job.tokens, vocab_size=job.vocab_size)
    return spec.training_flops(num_tokens=job.tokens, num_pairs=job.mask.pairs())


def main() -> None:
    arguments = read_options(sys.argv[1:], Arguments, program=sys.argv[0], description=__doc__)
    stages = Stages(arguments=arguments, device="cpu" if arguments.quick else "cuda")
    machine = dict(hardware())
    if not arguments.quick:
        machine["gpu"] = torch.cuda.get_device_name()
    for name in arguments.only or STAGES:
        head: Result = {"benchmark": "gpu", "stage": name, "label": arguments.label}
        begin = time.monotonic()
        results: Iterator[Result] = getattr(stages, name)()
        if begin - stages.began > 60 * arguments.minutes:
            results = iter([{"skipped": "the time is over"}])
        try:
            for result in results:
                spent = round(time.monotonic() - begin, 1)
                line = {**head, **result, "stage_seconds": spent, "hardware": machine}
                print(json.dumps(line), flush=True)
        except torch.OutOfMemoryError as error:
            print(json.dumps({**head, "error": str(error)[:200], "hardware": machine}), flush=True)
        stages.free()


STAGES = (
    "machine",
    "attention",
    "documents",
    "step",
    "profile",
    "waits",
    "short",
    "packed",
    "wide",
)

if __name__ == "__main__":
    main()
