"""The functions of gated linear units (Shazeer 2020, arXiv:2002.05202), with bounds and an offset.

    act(min(gate, clamp)) * (clip(up, -clamp, clamp) + offset)

| act | |
| --- | --- |
| ``silu`` | x sigmoid(x) |
| ``gelu`` | the tanh form (Hendrycks and Gimpel, arXiv:1606.08415) |
| ``quick_gelu`` | x sigmoid(1.702 x), of the same paper; gpt-oss has clamp 7 and offset 1 with it |
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

Activation = Literal["silu", "gelu", "quick_gelu"]

QUICK = 1.702
"""The factor in the sigmoid of ``quick_gelu``."""


@dataclass(frozen=True)
class GatedFunction:
    """What a gated linear unit computes; see the top of the file.

    Attributes:
        activation: the function act.
        clamp: bounds both factors; None: there is no bound.
        offset: is added to ``up``.
    """

    activation: Activation = "silu"
    clamp: float | None = None
    offset: float = 0.0
