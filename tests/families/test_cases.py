"""The tiny models are sensitive to every optional field, every tensor and every number."""

from __future__ import annotations

import copy
import functools
import importlib
import inspect
import operator
import re
from collections.abc import Iterator
from importlib.util import find_spec
from typing import Any

import pytest
import torch

from cp_megatron.families.registry import FAMILIES
from tests.families.cases import CASES
from tests.families.tiny_models import cases_of, logits_of, make_config, make_model

pytestmark = pytest.mark.skipif(
    find_spec("transformers") is None, reason="transformers is not installed: pip install '.[hf]'"
)

# Fields that change no logits, that belong to experts and state spaces, or that have only one value
# in a family.
EXEMPT = re.compile(
    r"_id$|dropout|pdrop|initializer|use_cache|expert|router|routed|moe_|n_group|topk|mamba|"
    r"time_step|pretraining_tp|hidden_act|activation_function|bidirectional|^summary|"
    r"^default_theta|mtp|add_cross_attention|scale_attn|reorder_and|"
    r"swiglu_alpha|clip_qkv|sparse_step"
)
# More numbers of config.json that are not changed, because they are sizes of tensors or limits.
SIZES = re.compile(
    r"_size$|num_|n_|_dim$|_rank$|max_position|max_window|first_k|cache|layer_types|torch_dtype"
)
LOUD = 1e-3  # the least relative difference of logits that shows an effect
MODEL_TYPES = sorted(family.model_type for family in FAMILIES)


def test_every_family_has_a_case() -> None:
    assert all(map(cases_of, MODEL_TYPES))
    assert sum(len(cases_of(family)) for family in MODEL_TYPES) == len(CASES)


@pytest.mark.parametrize("family", MODEL_TYPES)
def test_every_optional_field_has_a_value_that_is_not_its_default(family: str) -> None:
    configs = [make_config(name) for name in cases_of(family)]
    assert all(config.model_type == family for config in configs)
    base = importlib.import_module("transformers").PreTrainedConfig
    kinds = [kind for kind in type(configs[0]).__mro__ if issubclass(kind, base) and kind != base]
    names = {name for kind in kinds for name in inspect.get_annotations(kind)}
    default = type(configs[0])()
    # transformers does not read it in Gemma 3.
    unread = {"attn_logit_softcapping"} if family == "gemma3_text" else set()
    missed = {
        name
        for name in names - unread
        if not EXEMPT.search(name)
        and all(getattr(config, name) == getattr(default, name) for config in configs)
    }
    assert not missed, missed


def numbers(value: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[tuple[Any, ...], float]]:
    """The numbers of config.json that are not sizes, each with the keys that lead to it."""
    if isinstance(value, dict | list):
        items = value.items() if isinstance(value, dict) else enumerate(value)
        for key, inner in items:
            yield from numbers(inner, (*path, key))
    elif type(value) in (int, float) and not any(x.search(str(path[-1])) for x in (EXEMPT, SIZES)):
        yield path, value


def other(value: float) -> float:
    """A value nearby: 1 for 0 and 0 for 1 (switches), one more (windows), or a third less."""
    if isinstance(value, int):
        return 1 - value if value in (0, 1) else value + 1
    return value * 2 / 3


@pytest.mark.slow
@pytest.mark.parametrize("name", CASES)
@torch.no_grad()
def test_every_tensor_and_every_number_changes_the_logits(name: str) -> None:
    model, inert = make_model(name), CASES[name].inert
    expected = logits_of(model)
    quiet = []

    def listen(what: str, changed: Any) -> None:
        gap = (logits_of(changed) - expected).abs().max() / expected.abs().max()
        if not gap > LOUD:
            quiet.append((what, gap.item()))

    for key, weight in model.named_parameters():
        if key.endswith(inert):
            continue
        kept = weight.clone()
        weight.view(-1)[::2].mul_(1.5)
        listen(key, model)
        weight.copy_(kept)
    for path, value in numbers(CASES[name].options):
        if not {*inert}.isdisjoint(path):
            continue
        options = copy.deepcopy(dict(CASES[name].options))
        *way, last = path
        functools.reduce(operator.getitem, way, options)[last] = other(value)
        listen(".".join(map(str, path)), make_model(name, make_config(name, **options)))
    assert not quiet
