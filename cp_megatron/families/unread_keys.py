"""Keys of config.json that a family does not read although their names speak of the computation.

transformers computes the same as the family without them, but another program may read them: the
attention in two chunks of Qwen2.5's long models, for example, exists in vLLM only.
"""

from __future__ import annotations

import json
import re
from typing import Any

_COMPUTES = re.compile(
    r"attention|attn|rope|rotary|norm|bias|scal|multiplier|window|softcap|logit|moe|expert|router"
    r"|chunk|clip|sink|qk_|alibi|activation|mlp|ffn|residual|gat(e|ing)|conv|ssm|mamba|lora|mtp"
    r"|nextn|causal|position|layer|head|dropout|pdrop|compress|sparse|latent|linear|eigval"
)
# What programs choose for themselves, and what transformers writes for every model.
_CHOICES = re.compile(
    r"^_|attn_impl|flash|sdpa|^output_(att|hid|router)|cross_attention|^is_|normalize_invocation"
)
_FACTOR = re.compile(r"scal|multiplier|factor|alpha")
_LONGEST = 60


class RecordedKeys(dict[str, Any]):
    """An object of JSON that records which of its keys are read."""

    def __init__(self, value: dict[str, Any]) -> None:
        super().__init__(value)
        self.read: set[str] = set()

    def get(self, key: str, default: Any = None) -> Any:
        self.read.add(key)
        return super().get(key, default)

    def __getitem__(self, key: str) -> Any:
        self.read.add(key)
        return super().__getitem__(key)


def unread_keys(entries: RecordedKeys) -> tuple[str, ...]:
    """``key = value`` for each key that was not read, if its value may change the computation."""
    return tuple(
        f"{name} = {json.dumps(value)[:_LONGEST]}"
        for name, value in sorted(entries.items())
        if name not in entries.read
        and _COMPUTES.search(name)
        and not _CHOICES.search(name)
        and not _is_neutral(name, value)
    )


def _is_neutral(name: str, value: Any) -> bool:
    """Whether the value is the one of a model without such a thing."""
    if isinstance(value, list):
        return all(item == "full_attention" for item in value)
    return not value or (value == 1 and _FACTOR.search(name) is not None)
