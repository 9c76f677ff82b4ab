"""Dropout's randomness: a pure function of where and when, so that a resume repeats it.

Dropout is torch's own module and draws from torch's default generator. Seeding that generator
before every micro batch by (seed, step, micro batch, dp, cp) makes masks differ across dp and cp
and agree across tp, where activations are replicated; with sequence parallelism the residual
stream is split over tp too, and tp joins the seed.
"""

from __future__ import annotations

import hashlib

import torch


def dropout_seed(
    *, seed: int, step: int, microbatch: int, dp: int, cp: int, tp: int | None = None
) -> int:
    """A seed in [0, 2**63), the same on every machine and Python.

    Args:
        seed: the run's seed.
        step: the training step.
        microbatch: the micro batch within the step.
        dp, cp: this rank's coordinates.
        tp: this rank's coordinate where the residual stream is split over tp (sequence
            parallelism); None where it is replicated, so that all tp ranks draw the same masks.
    """
    return _seed(f"dropout {seed} {step} {microbatch} {dp} {cp} {'-' if tp is None else tp}")


def attention_dropout_seed(*, seed: int, layer: int) -> int:
    """The seed of a layer's attention dropout, in [0, 2**63), the same for ever and on every rank.

    All else that its mask depends on (row of the run, head, positions) is hashed pair by pair, so
    it is the same on every grid: see ``kernels/dropout.py``.

    Args:
        seed: the run's seed.
        layer: the layer's number in the whole model.
    """
    return _seed(f"attention dropout {seed} {layer}")


def _seed(text: str) -> int:
    digest = hashlib.blake2b(text.encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 1


def seed_dropout(seed: int, device: torch.device) -> None:
    """Seed the generator that dropout draws from on ``device`` (with CUDA, the current one)."""
    if device.type == "cuda":
        torch.cuda.manual_seed(seed)
    else:
        torch.default_generator.manual_seed(seed)
