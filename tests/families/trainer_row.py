"""Measures how much one family in the trainer differs from one rank and from transformers."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from cp_megatron.families.registry import FAMILIES
from cp_megatron.plan import Grid
from tests.families.on_grids import (
    Computed,
    compute_on,
    exported_gradients,
    gradient_gap,
    logit_gap,
)
from tests.families.tiny_models import cases_of, refer

GRIDS: Mapping[str, Grid] = {"cp2": Grid(cp=2), "tp2 cp2": Grid(tp=2, cp=2)}


@dataclass(frozen=True, kw_only=True)
class TrainerRow:
    """The largest differences of all cases of a family, on a row of packed documents.

    Attributes:
        models: the number of tiny models, whose optional fields differ.
        loss: the mean loss of the first model on one rank, in nats.
        loss_to_one_rank: the relative difference of the loss in float64, by grid.
        gradients_to_one_rank: the relative L2 difference of a tensor's gradient in float64, by
            grid; see ``gradient_gap``.
        logits_to_transformers: the difference of a logit in float32 on TP2 x CP2, relative to the
            largest logit.
        gradients_to_transformers: the relative L2 difference of a tensor's gradient there.
    """

    models: int
    loss: float
    loss_to_one_rank: Mapping[str, float]
    gradients_to_one_rank: Mapping[str, float]
    logits_to_transformers: float
    gradients_to_transformers: float


def accepted() -> set[str]:
    """The model types that the trainer loads."""
    return {family.model_type for family in FAMILIES}


def measure_family(family: str, root: Path) -> TrainerRow:
    """Runs every case of the family; ``root`` is an empty folder for what they write."""
    names = cases_of(family)
    losses, gradients = dict.fromkeys(GRIDS, 0.0), dict.fromkeys(GRIDS, 0.0)
    of_logits, of_gradients, firsts = 0.0, 0.0, list[Computed]()
    for number, name in enumerate(names):
        place = root / f"{number}"
        place.mkdir()
        reference = refer(name, place)
        (alone,) = compute_on(Grid(), reference.folder, place / "one", "float64")
        firsts.append(alone)
        for label, grid in GRIDS.items():
            found = compute_on(grid, reference.folder, place / label, "float64")[0]
            losses[label] = max(losses[label], abs(found.loss / alone.loss - 1))
            gap, _ = gradient_gap(found.gradients, alone.gradients)
            gradients[label] = max(gradients[label], gap)
        found = compute_on(GRIDS["tp2 cp2"], reference.folder, place / "float32", "float32")[0]
        of_logits = max(of_logits, logit_gap(found.logits, reference.logits))
        gap, _ = gradient_gap(exported_gradients(place / "float32"), reference.gradients)
        of_gradients = max(of_gradients, gap)
    return TrainerRow(
        models=len(names),
        loss=firsts[0].loss,
        loss_to_one_rank=losses,
        gradients_to_one_rank=gradients,
        logits_to_transformers=of_logits,
        gradients_to_transformers=of_gradients,
    )
