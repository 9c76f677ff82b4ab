"""Every causal family of the installed transformers on two ranks: equal, refused, or a fault.

A family's model is tiny, made from the family's default config. One rank runs it with transformers'
own attention, document by document; two ranks run it as a user does, with a batch of
``shard_batch``. Compared are the logits, and the gradients of the sum of all tokens' losses.
"""

from __future__ import annotations

import importlib
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode

from cp_megatron.errors import ConfigError
from cp_megatron.model import huggingface
from cp_megatron.model.huggingface.batch_plan import IGNORED_LABEL
from cp_megatron.model.huggingface.shrink_config import NUM_ORDINARY_TOKENS, shrink
from tests.ranks import RanksFailed, run_ranks

ROWS: Mapping[str, tuple[int, ...]] = {
    "one document": (48,),
    "seven packed": (7, 1, 13, 5, 9, 3, 10),
}
EXACT = 1e-8  # the relative error that counts as equal in float64

# The class of these families takes the text's config, the family's mapping gives the whole one.
PARTS: Mapping[str, str] = {
    **dict.fromkeys(
        ("dots3_note", "emu3", "llama4", "qwen3_5", "qwen3_5_moe", "qwen4_exp"), "text_config"
    ),
    **dict.fromkeys(("musicgen", "musicgen_melody"), "decoder"),
}
ROPE = {"rope_type": "default", "rope_theta": 10000.0}
INDEXER = {
    "indexer_n_heads": 2,
    "indexer_kv_heads": 1,
    "indexer_head_dim": 256,
    "indexer_budget": 16,
    "indexer_compress_ratio": 4,
}
# What a default config lacks.
CHANGES: Mapping[str, Mapping[str, Any]] = {
    "cohere_compass_text": {"rope_parameters": {"full_attention": ROPE, "sliding_attention": ROPE}},
    "dbrx": {"attn_config": {"rope_theta": 10000.0, "clip_qkv": 8.0}},
    "deepseek_v2": {"num_experts_per_tok": 2},
    "dots1": {
        "n_routed_experts": 8,
        "num_experts_per_tok": 2,
        "n_shared_experts": 1,
        "n_group": 1,
        "topk_group": 1,
    },
    "dots3_note": {"text_config": {"num_hidden_layers": 2}},
    "dots3_note_text": {"num_hidden_layers": 2},
    "gemma4_assistant": {
        "text_config": {"hidden_size_per_layer_input": 0, "vocab_size_per_layer_input": 0}
    },
    "hunyuan_v1_dense": {"head_dim": 128},
    "hunyuan_v1_moe": {"head_dim": 128},
    "lfm2_moe": {"layer_types": ["conv", "full_attention"] * 16},
    "ministral": {"head_dim": 128},
    "nemotron": {"num_key_value_heads": 48, "head_dim": 128},
    "qwen4_exp": {"text_config": INDEXER},
    "qwen4_exp_text": INDEXER,
}


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """What became of a family.

    Attributes:
        family: its model type in transformers.
        result: equal, refused, wrong, crashed, or lacks what the installation lacks.
        reason: the refusal or the error.
        errors: the largest relative error of each row.
        reference: how the model ran on one rank.
    """

    family: str
    model: str
    result: str
    reason: str = ""
    errors: Mapping[str, float] | None = None
    reference: str = ""


def causal_families() -> dict[str, str]:
    """The model types of transformers' mapping of causal models, and their classes."""
    auto = importlib.import_module("transformers.models.auto.modeling_auto")
    return dict(auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES)


def try_family(family: str, model: str) -> Outcome:
    """Runs a family on two ranks. A rank that dies or hangs counts as a crash."""
    try:
        return run_ranks(outcome_of, 2, family, model, timeout=120)[0]
    except RanksFailed as failed:
        return Outcome(family=family, model=model, result="crashed", reason=str(failed))


def outcome_of(rank: int, world_size: int, family: str, model: str) -> Outcome:
    huggingface.register()
    try:
        errors, reference = compare(family, model)
    except ConfigError as error:
        return Outcome(family=family, model=model, result="refused", reason=str(error))
    except ImportError as error:  # of a package that the family needs
        return Outcome(family=family, model=model, result="lacks", reason=str(error).strip())
    result = "equal" if max(errors.values()) < EXACT else "wrong"
    return Outcome(family=family, model=model, result=result, errors=errors, reference=reference)


def tiny_config(family: str) -> Any:
    library = importlib.import_module("transformers")
    config = library.CONFIG_MAPPING[family](**CHANGES.get(family, {}))
    if family in PARTS:
        config = getattr(config, PARTS[family])
    if hasattr(config, "is_decoder"):
        config.is_decoder = True
    return shrink(config)


def build(family: str, model: str, attention: str) -> Any:
    """The same weights every time, in float64."""
    library = importlib.import_module("transformers")
    config = tiny_config(family)
    config._attn_implementation = attention
    config._experts_implementation = "eager"
    config.use_cache = False
    torch.manual_seed(3)
    built = getattr(library, model)(config)
    generator = torch.Generator().manual_seed(4)
    with torch.no_grad():
        for parameter in built.parameters():  # some begin as zeros and would hide what they do
            parameter.add_(0.05 * torch.randn(parameter.shape, generator=generator))
    return built.double().eval()


def compare(family: str, model: str) -> tuple[dict[str, float], str]:
    """The largest relative error of each row, and how the reference attended."""
    with NoFloat32():
        sharded = build(family, model, "cp_megatron")
        found = {name: sharded_row(sharded, row) for name, row in ROWS.items()}
        for reference in ("sdpa", "eager"):
            try:
                whole = build(family, model, reference)
                expected = {name: whole_row(whole, row) for name, row in ROWS.items()}
                break
            except ValueError:  # sdpa has no softcap, and some models have no sdpa
                if reference == "eager":
                    raise
    return {name: error_of(found[name], expected[name]) for name in ROWS}, reference


class NoFloat32(TorchFunctionMode):
    """Computes in float64 what a model casts to float32, as routers and eager attention do.

    Otherwise rounding would make up most of the difference.
    """

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        def wide(value: Any) -> Any:
            return torch.float64 if value is torch.float32 else value

        wider = torch.Tensor.double if func is torch.Tensor.float else func
        return wider(*map(wide, args), **{name: wide(x) for name, x in (kwargs or {}).items()})


def inputs(lengths: tuple[int, ...]) -> tuple[Tensor, Tensor, Tensor]:
    """input_ids, position_ids and labels [1, S]; no document's first token is a target."""
    generator = torch.Generator().manual_seed(len(lengths))
    ids = torch.randint(5, NUM_ORDINARY_TOKENS, (1, sum(lengths)), generator=generator)
    positions = torch.cat([torch.arange(length) for length in lengths])[None]
    return ids, positions, torch.where(positions == 0, IGNORED_LABEL, ids)


def sharded_row(model: Any, lengths: tuple[int, ...]) -> list[Tensor]:
    """The logits of the whole row, and the gradients summed over ranks."""
    ids, positions, labels = inputs(lengths)
    group = dist.group.WORLD
    batch = huggingface.shard_batch(group, input_ids=ids, position_ids=positions, labels=labels)
    # The losses are summed here, in float64; some families' own is not a sum.
    logits = model(**{name: batch[name] for name in batch if name != "labels"}).logits
    gradients = gradients_of(model, logits, batch["shift_labels"])
    for gradient in gradients:
        dist.all_reduce(gradient)
    return [batch["context_parallel"].cp.gather(logits.detach(), 1), *gradients]


def whole_row(model: Any, lengths: tuple[int, ...]) -> list[Tensor]:
    """The same, each document alone."""
    ids, _, labels = inputs(lengths)
    logits = torch.cat([model(input_ids=piece).logits for piece in ids.split(lengths, 1)], 1)
    shifted = F.pad(labels[:, 1:], (0, 1), value=IGNORED_LABEL)
    return [logits.detach(), *gradients_of(model, logits, shifted)]


def gradients_of(model: Any, logits: Tensor, labels: Tensor) -> list[Tensor]:
    """The gradients of the sum of the tokens' losses; zeros where a parameter has none."""
    loss = F.cross_entropy(logits.flatten(0, 1), labels.flatten(), reduction="sum")
    parameters = [p for p in model.parameters() if p.requires_grad]
    return list(torch.autograd.grad(loss, parameters, allow_unused=True, materialize_grads=True))


def error_of(found: list[Tensor], expected: list[Tensor]) -> float:
    """The largest relative error of the logits and of a gradient.

    A bias of keys has no gradient but rounding errors, because softmax ignores it.
    """
    least = 1e-6 * float(torch.stack([x.norm() for x in expected[1:]]).norm())
    return max(relative(x, y, least) for x, y in zip(found, expected, strict=True))


def relative(found: Tensor, expected: Tensor, least: float = 0.0) -> float:
    """||found - expected|| over ||expected||, or over ``least`` where that is larger."""
    if found.shape != expected.shape or not found.isfinite().all():
        return float("inf")
    return float((found - expected).norm()) / max(float(expected.norm()), least)
