"""The seeds of dropout: pure functions of step and place, so that a resumed run repeats them.

Dropout is torch's own module and draws from torch's default generator. Seeding that generator
before every micro batch by (seed, step, micro batch, dp, cp) makes masks differ across dp and cp
and agree across tp, where activations are replicated. With sequence parallelism the residual stream
is split over tp as well, and tp joins the seed.
"""

from __future__ import annotations

import hashlib

import torch


def dropout_seed(
    *, seed: int, step: int, microbatch: int, dp: int, cp: int, tp: int | None = None
) -> int:
    """Returns a seed in [0, 2**63), the same on every machine and version of Python.

    Args:
        seed: the run's seed.
        step: the training step.
        microbatch: the micro batch within the step.
        dp, cp: this rank's coordinates.
        tp: this rank's coordinate if the residual stream is split over tp (sequence parallelism);
            None if it is replicated, so that all tp ranks draw the same masks.
    """
    return hash_text(f"dropout {seed} {step} {microbatch} {dp} {cp} {'-' if tp is None else tp}")


def attention_dropout_seed(*, seed: int, layer: int) -> int:
    """Returns the seed of a layer's attention dropout, in [0, 2**63), the same on every rank.

    The other inputs of its mask (row of the run, head, positions) are hashed for each pair, so the
    mask is the same on every grid; see ``kernels/dropout.py``.

    Args:
        seed: the run's seed.
        layer: the number of the layer in the whole model.
    """
    return hash_text(f"attention dropout {seed} {layer}")


def hash_text(text: str) -> int:
    """Returns 63 bits, the same on every machine and version of Python."""
    digest = hashlib.blake2b(text.encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 1


def seed_dropout(seed: int, device: torch.device) -> None:
    """Seeds the generator that dropout uses on ``device`` (on CUDA, the current device)."""
    if device.type == "cuda":
        torch.cuda.manual_seed(seed)
    else:
        torch.default_generator.manual_seed(seed)
