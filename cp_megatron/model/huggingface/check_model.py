"""Which transformers models may be given a sharded batch: what is known of a class, or a probe.

Shapes: none; this file reads configs and classes.
"""

from __future__ import annotations

import inspect
import re
import sys
from collections.abc import Callable, Iterator, Mapping
from copy import deepcopy
from functools import partial
from types import ModuleType
from typing import Any

import torch
from torch import nn
from torch.distributed.fsdp import FSDPModule

from cp_megatron.errors import ConfigError
from cp_megatron.model.huggingface.attention_interface import (
    ROUTER_LOSS,
    attention,
    refuse_unsupported,
    wanted_mask,
)
from cp_megatron.model.huggingface.batch_plan import BatchPlan
from cp_megatron.model.huggingface.keyword_hooks import hand_down, tell_base
from cp_megatron.model.huggingface.probe import (
    DROPS_KEYWORDS,
    Finding,
    ProbePlan,
    Untried,
    try_sharding,
)
from cp_megatron.model.huggingface.recomputed_layer import remember_messages
from cp_megatron.model.huggingface.recurrence_hooks import hook_layers, refuse_other_mixers
from cp_megatron.model.huggingface.shrink_config import parts_of, shrink
from cp_megatron.model.huggingface.unseen_models import VOUCHED
from cp_megatron.model.transformers_library import import_transformers

_PROBE_NAME = "cp_megatron_probe"  # the name of our attention in the small models
_ANOTHER = "a decoder whose layers call transformers' AttentionInterface, such as Llama"
_LOSS_WORKS = "a call without labels, and cross_entropy of its logits with batch['shift_labels']"
# Heads by the end of their class's name, what they do, and what works instead.
_HEADS: Mapping[str, str] = {
    "ForSequenceClassification": "reads the last token of each rank's part of a row",
    "ForQuestionAnswering": "computes a softmax over the tokens of one rank",
    "ForMultipleChoice": "reads the last token of each rank's part of a row",
    "ForNextSentencePrediction": "reads the first token of each rank's part of a row",
    "DoubleHeadsModel": "reads one token of each rank's part of a row",
}
_LAYER_DROPS = ("layerdrop", "decoder_layerdrop")
# A model of its own is tried by itself where its small copy does not run, if it is no larger.
_MOST_PARAMETERS = 50_000_000
# Classes that may be put into a model after it was built, because they wrap modules or treat each
# token alone. Modules of transformers itself follow from the model's class and config, and the
# tried copy has them, too.
_PER_TOKEN = (
    r"torch\.nn\.modules\.(container|linear|dropout|sparse)\.|torch\.nn\..*(LayerNorm|RMSNorm)$"
    r"|torch\.(distributed|_dynamo|ao)\.|transformers\.|peft\.(utils|tuners\.(lora|tuners_utils))\."
    r"|bitsandbytes\.|torchao\."
)


def check(model: nn.Module, *, loss: bool = True, itself: bool = False) -> None:
    """Refuses a model that would compute something else from a sharded batch.

    A small copy of the model, made from its class and config, runs for a fraction of a second on
    the CPU of this process: whole, and cut into the parts of two ranks. A model may thus be checked
    on the meta device, before its weights are loaded. The first call with a batch of
    ``shard_batch`` checks a model that is built, or set to the engine's attention, after
    ``register``. Later calls only look for modules that were put in since.

    Args:
        model: a transformers model, or a module that contains some.
        loss: whether the model's own loss is used as well as its logits.
        itself: try a copy of this model itself instead of a small one, for a config that cannot be
            made small. It needs whole parameters, so check before they are sharded.

    Raises:
        ConfigError: the model cannot be sharded, or cannot be tried.
    """
    library = import_transformers("check", type(model).__name__)
    roots = list(_outermost(model, library.PreTrainedModel))
    if not roots:
        rule = "contains no transformers model"
        raise ConfigError("model", type(model).__name__, rule, "a PreTrainedModel")
    for root in roots:
        hooked = hook_layers(root)
        if VOUCHED not in vars(root) or any(map(_is_new, root.modules())):
            loss_fault = _check_root(root, library, hooked, itself)
            for module in root.modules():
                setattr(module, VOUCHED, loss_fault)
        if loss:
            refuse_loss(root)


def refuse_loss(model: Any) -> None:
    """Refuses labels for a checked model whose loss is not the sum over tokens."""
    fault = getattr(model, VOUCHED)
    if fault:
        raise ConfigError("labels", f"for {_own_class(model).__name__}", fault, _LOSS_WORKS)


@torch.compiler.disable  # type: ignore[untyped-decorator]
def check_call(model: Any, args: Any, kwargs: Mapping[str, Any]) -> None:
    """A forward pre-hook of every transformers model: checks it once, if the batch is sharded."""
    plan = kwargs.get("context_parallel")
    if not isinstance(plan, BatchPlan) or isinstance(plan, ProbePlan):
        return
    _refuse_router_loss(model, kwargs)
    check(model, loss=kwargs.get("labels") is not None)
    tell_base(model, plan)
    if not any(map(_uses_engine, parts_of(model.config))):
        name = model.config._attn_implementation
        rule = f"of {_own_class(model).__name__} attends to the tokens of one rank only"
        works = "model.set_attn_implementation('cp_megatron')"
        raise ConfigError("attn_implementation", name, rule, works)


def _refuse_router_loss(model: Any, kwargs: Mapping[str, Any]) -> None:
    """Refuses the loss by which transformers balances experts: its mean is over a rank's tokens.

    A config may request it at any time. Layers that carry states do not tell the attention.
    """
    for config in parts_of(model.config):
        refuse_unsupported(ROUTER_LOSS, kwargs, config)


def _uses_engine(config: Any) -> bool:
    library = import_transformers("check", "")
    name = getattr(config, "_attn_implementation", None)
    return library.AttentionInterface().get(name) is attention


def refuse_own_table(model: Any, name: str) -> None:
    """Refuses a model class that takes attention from a table of its own, where ``name`` is not.

    It would end in a KeyError while the model is built.
    """
    for table in vars(sys.modules[type(model).__module__]).values():
        if not isinstance(table, dict) or "eager" not in table or name in table:
            continue
        if all(isinstance(entry, type) for entry in table.values()):
            classes = ", ".join(dict.fromkeys(entry.__name__ for entry in table.values()))
            rule = f"is unknown to {type(model).__name__}, which computes attention itself"
            raise ConfigError("attn_implementation", name, f"{rule}, by {classes}", _ANOTHER)


def _outermost(model: nn.Module, kind: type) -> Iterator[Any]:
    if isinstance(model, kind):
        yield model
        return
    for child in model.children():
        yield from _outermost(child, kind)


def _own_class(model: nn.Module) -> Any:
    """The class of the model without what FSDP2 put before it."""
    return next(base for base in type(model).__mro__ if not issubclass(base, FSDPModule))


def _check_root(model: Any, library: ModuleType, hooked: frozenset[str], itself: bool) -> str:
    """Returns what is wrong with the model's own loss, if anything is.

    Raises:
        ConfigError: something is wrong with its logits.
    """
    _refuse_by_name(model, hooked)
    library.AttentionInterface.register(_PROBE_NAME, attention)
    library.AttentionMaskInterface.register(_PROBE_NAME, wanted_mask)
    finding = _try_copies(model, itself)
    if finding.fault:
        raise ConfigError("model", _own_class(model).__name__, finding.fault, _ANOTHER)
    if finding.hands_down:
        hand_down(model)
    if hooked:
        remember_messages(model)
    return finding.loss_fault


def _refuse_by_name(model: Any, hooked: frozenset[str]) -> None:
    config, name = model.config, _own_class(model).__name__
    if getattr(config, "is_encoder_decoder", False):
        rule = "has an encoder, and attention across to it, which is not causal self-attention"
        raise ConfigError("model", name, rule, "a decoder alone")
    for end, does in _HEADS.items():
        if name.endswith(end):
            works = "a head for each token, or batch['context_parallel'].cp.gather(hidden, 1)"
            raise ConfigError("model", name, does, works)
    for field in _LAYER_DROPS:
        if getattr(config, field, 0):
            rule = f"of {name} skips layers by each rank's own random numbers"
            raise ConfigError(field, getattr(config, field), rule, "0.0")
    _refuse_router_loss(model, {})
    refuse_other_mixers(config.get_text_config(), hooked)
    parameters = inspect.signature(_own_class(model).forward).parameters
    takes_any = any(p.kind is p.VAR_KEYWORD for p in parameters.values())
    if not takes_any and "context_parallel" not in parameters:
        raise ConfigError("model", name, DROPS_KEYWORDS, _ANOTHER)


def _try_copies(model: Any, itself: bool) -> Finding:
    """Tries a narrow copy, then one of full width, then the model itself if it is small.

    With ``itself``, and if modules were put into the model, only the model itself counts.
    """
    kind = _own_class(model)
    sharded = any(hasattr(p, "placements") or p.is_meta for p in model.parameters())
    if itself and sharded:
        raise ConfigError("itself", True, "needs whole parameters", "a check before sharding")
    problem = ""
    for narrow in () if itself else (True, False):
        build = partial(_build, kind, shrink(model.config, narrow=narrow))
        try:
            finding = try_sharding(build, _PROBE_NAME)
        except Untried as untried:
            problem = f"cannot be tried on a short row of tokens: {untried}"
            continue
        added = _added_module(model, build)
        if finding.fault or not added:
            return finding
        problem = f"contains {added}, which was put into it after it was built"
        break
    size = sum(p.numel() for p in model.parameters())
    if itself or (size <= _MOST_PARAMETERS and not sharded):
        try:
            return try_sharding(partial(_copy, model), _PROBE_NAME)
        except Untried as untried:
            problem = f"cannot be tried on a short row of tokens: {untried}"
    works = "check(model, itself=True), before the model is sharded"
    raise ConfigError("model", kind.__name__, problem, works)


def _added_module(model: Any, build: Callable[[str], Any]) -> str:
    """Names a module that a copy lacks and that may mix tokens; empty if there is none."""
    with torch.random.fork_rng(devices=[]), torch.device("cpu"):
        known = {type(module) for module in build(_PROBE_NAME).modules()}
    for place, module in model.named_modules():
        kind = _own_class(module)
        if kind not in known and not _is_per_token(kind):
            return f"{kind.__name__} at {place}"
    return ""


def _is_new(module: nn.Module) -> bool:
    """Whether a module was put into a model after a check, and may mix tokens."""
    return VOUCHED not in vars(module) and not _is_per_token(_own_class(module))


def _is_per_token(kind: type) -> bool:
    """Whether a class is one of ``_PER_TOKEN``."""
    return bool(re.match(_PER_TOKEN, f"{kind.__module__}.{kind.__name__}"))


def _build(model_class: Any, config: Any, attention_name: str) -> Any:
    config = deepcopy(config)
    config._attn_implementation = attention_name
    config._experts_implementation = "eager"
    config.use_cache = False
    return model_class(config)


def _copy(model: Any, attention_name: str) -> Any:
    copy = deepcopy(model).cpu()
    copy.config.use_cache = False
    copy.set_attn_implementation(attention_name)
    return copy
