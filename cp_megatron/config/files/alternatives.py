"""Settings of which only one can hold, such as a number of steps and a number of rows.

A source (the flags, a file, a run's ``config.yaml``) may give one setting of a group. It replaces
whatever other setting of the group an earlier source gave.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from cp_megatron.config.fields import settings
from cp_megatron.errors import ConfigError

ALTERNATIVES: Sequence[Mapping[str, int | None]] = (
    {"train_iters": None, "train_samples": None, "train_epochs": None},
    {"lr_warmup_iters": 0, "lr_warmup_samples": None, "lr_warmup_fraction": None},
    {"lr_decay_iters": None, "lr_decay_samples": None},
    {"lr_wsd_decay_iters": None, "lr_wsd_decay_samples": None},
)
"""Groups of alternatives, each setting with the value that switches it off."""


def with_alternatives_off(values: Mapping[str, Any]) -> Mapping[str, Any]:
    """The settings of one source, with the alternatives to each of them switched off.

    Raises:
        ConfigError: the source gives two settings of a group.
    """
    values = dict(values)
    for group in ALTERNATIVES:
        given = [name for name in group if values.get(name) is not None]
        active = [name for name in given if values[name]]
        if len(active) > 1:
            one, other = (settings()[name].flag for name in active[:2])
            rule = f"contradicts {one} {values[active[0]]}, which says the same in another unit"
            raise ConfigError(other, values[active[1]], rule, "one of the two")
        if given:
            values |= {name: off for name, off in group.items() if name not in (active or given)}
    return values
