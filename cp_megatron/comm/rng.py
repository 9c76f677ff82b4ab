"""The seeds of dropout, and the hash of a text.

What is dropped is a hash of what it is: of the number of its row in the run, its position, and more
(``kernels/dropout.py``, ``kernels/stream_dropout.py``). So the seeds below depend on neither step
nor rank, no random generator has a state, and every grid, and a resumed run, drops the same.
"""

from __future__ import annotations

import hashlib


def hidden_dropout_seed(*, seed: int) -> int:
    """Returns the seed of the dropout of the residual stream, in [0, 2**63).

    Args:
        seed: the run's seed.
    """
    return hash_text(f"hidden dropout {seed}")


def attention_dropout_seed(*, seed: int, layer: int) -> int:
    """Returns the seed of a layer's attention dropout, in [0, 2**63).

    Args:
        seed: the run's seed.
        layer: the number of the layer in the whole model.
    """
    return hash_text(f"attention dropout {seed} {layer}")


def hash_text(text: str) -> int:
    """Returns 63 bits, the same on every machine and version of Python."""
    digest = hashlib.blake2b(text.encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 1
