"""How fast the network and the devices of a run are, as ``auto`` takes it."""

from __future__ import annotations

from dataclasses import dataclass

_LEAST_SECONDS = 84e-6  # 4 MiB at 50 GB/s: less than a kernel's launch and smaller tiles cost
_ELEMENT_BYTES = 2


@dataclass(frozen=True)
class Rates:
    """Speeds of a rank. The defaults are a GPU of the Hopper generation and its share of a network
    between nodes. Links inside a node are faster and hide more.

    Attributes:
        network: GB/s that a rank receives from other ranks while all of them receive.
        attention: TFLOP/s at which a rank computes attention.
    """

    network: float = 50.0
    attention: float = 400.0

    @property
    def flops_per_element(self) -> float:
        """FLOPs of attention that take as long as one bfloat16 element on the network."""
        return self.attention * 1e3 / self.network * _ELEMENT_BYTES

    @property
    def least_part(self) -> int:
        """Elements: below this size of a part, starting another message and smaller tiles cost more
        than they hide."""
        return round(_LEAST_SECONDS * self.network * 1e9 / _ELEMENT_BYTES)


USUAL_RATES = Rates()
