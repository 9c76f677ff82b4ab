"""The attention function and the mask function that are registered in transformers.

Shapes: B batch, S tokens of the whole row, N ranks, H query heads, G key/value heads, D head dim,
E value head dim.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, NoReturn

from einops import rearrange
from torch import Tensor, nn

from cp_megatron.errors import ConfigError
from cp_megatron.model.huggingface.batch_plan import BatchPlan, refuse_padding
from cp_megatron.model.huggingface.unseen_models import VOUCHED

ROUTER_LOSS: Mapping[str, str] = {
    "output_router_logits": "False; transformers would balance the experts over the tokens of each "
    "rank alone, but launch/pretrain.py balances whole rows"
}
"""What adds the router's loss to a model's own, and what works instead."""
# Arguments of attention that would change the result, and what to use instead.
_UNSUPPORTED: Mapping[str, str] = {
    "head_mask": "no head_mask",
    "position_bias": "a model with rotary or absolute positions",
    "indices": "a model without sparse attention",
    "block_indices": "a model without sparse attention",
    "cu_seq_lens_q": "documents given by position_ids",
    "cu_seq_lens_k": "documents given by position_ids",
    "cache": "training, without a cache",
    "output_attentions": "attn_implementation='eager' on one rank",
    **ROUTER_LOSS,
}


@dataclass(frozen=True)
class WantedMask:
    """Takes the place of a mask in transformers, and carries the window that it would have.

    A model that computes with its mask is refused at the first operation.

    Attributes:
        window: the number of keys that a query sees, including its own; None is all.
        model: the type of the model, for the error message.
        plan: the batch's plan, which a hook puts here if a layer does not pass it on to its
            attention (``hand_down``); otherwise None.
    """

    window: int | None
    model: str = "the model"
    plan: BatchPlan | None = None

    def refuse(self, *args: object, **kwargs: object) -> NoReturn:
        rule = f"does not exist as a tensor, but {self.model} computes with it"
        works = "a model that passes the mask on to transformers' AttentionInterface"
        raise ConfigError("attention_mask", "", rule, works)

    def __getattr__(self, name: str) -> NoReturn:
        if name.startswith("__"):
            raise AttributeError(name)  # Python itself asks, to copy or to pickle
        self.refuse()

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, WantedMask):
            self.refuse()
        return (self.window, self.model) == (other.window, other.model)

    @classmethod
    def __torch_function__(
        cls, function: object, types: object, args: Any = (), kwargs: Any = None
    ) -> NoReturn:
        given = (*args, *(kwargs or {}).values())
        next((x for x in given if isinstance(x, cls)), cls(None)).refuse()

    __getitem__ = __len__ = __iter__ = __bool__ = __invert__ = __neg__ = refuse
    __add__ = __radd__ = __sub__ = __rsub__ = __mul__ = __rmul__ = refuse
    __truediv__ = __rtruediv__ = __and__ = __rand__ = __or__ = __ror__ = refuse
    __lt__ = __le__ = __gt__ = __ge__ = refuse


def wanted_mask(
    *args: Any,
    q_length: int | None = None,
    kv_length: int | None = None,
    mask_function: Callable[..., Any] | None = None,
    attention_mask: Tensor | None = None,
    local_size: int | None = None,
    use_vmap: bool = False,
    config: Any = None,
    **kwargs: Any,
) -> WantedMask:
    """The registered mask function. It builds no mask, and refuses masks that are not supported.

    Raises:
        ConfigError: padding, a mask with further conditions, or keys from a cache.
    """
    if attention_mask is not None:
        refuse_padding(attention_mask)
    # transformers uses vmap or or_masks if a model adds conditions to the mask.
    alternatives = getattr(mask_function, "__qualname__", "").startswith("or_masks")
    if use_vmap or alternatives:
        rule = "the model adds conditions to the causal mask"
        raise ConfigError("attention_mask", "", rule, "a model with causal or sliding attention")
    if q_length is not None and kv_length is not None and q_length != kv_length:
        _refuse_cache(q_length, kv_length)
    return WantedMask(local_size, getattr(config, "model_type", WantedMask.model))


def attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: WantedMask | Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    sliding_window: int | None = None,
    is_causal: bool | None = None,
    softcap: float | None = None,
    s_aux: Tensor | None = None,
    sinks: Tensor | None = None,
    context_parallel: BatchPlan | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """The registered attention function: the queries of this rank attend the keys of all ranks.

    Args:
        module: the attention of the layer; its config describes the rotary embedding.
        query: [B, H, S / N, D].
        key: [B, G, S / N, D].
        value: [B, G, S / N, E].
        attention_mask: what ``wanted_mask`` returned, or None.
        scaling: multiplies the scores, by default D ** -0.5.
        dropout: must be 0.
        sliding_window: number of keys that a query sees, including its own.
        is_causal: overrides the attribute of the module; must be true.
        softcap: the scores become softcap * tanh(score / softcap).
        s_aux, sinks: [H], attention sinks; models of transformers use either of the two names.
        context_parallel: made by ``shard_batch``.
        kwargs: all other arguments of the model.

    Returns:
        [B, S / N, H, E], and None for the probabilities, which never exist as a whole.

    Raises:
        ConfigError: the call needs something that is not supported, or shapes do not fit.
    """
    plan = _checked_plan(module, attention_mask, context_parallel)
    causal = getattr(module, "is_causal", True) if is_causal is None else is_causal
    if not causal or "CrossAttention" in type(module).__name__:
        rule = "must be causal self-attention"
        raise ConfigError("attention", type(module).__name__, rule)
    if isinstance(attention_mask, Tensor):
        rule = "is not supported: position_ids decide which keys a query sees"
        raise ConfigError("attention_mask", tuple(attention_mask.shape), rule, "no attention_mask")
    if query.shape[2] != key.shape[2]:
        _refuse_cache(query.shape[2], key.shape[2])
    if dropout:
        raise ConfigError("attention_dropout", dropout, "must be 0 in training", "0.0")
    refuse_unsupported(_UNSUPPORTED, kwargs, getattr(module, "config", None))
    _refuse_changing_rope(getattr(module, "config", None), plan)
    if s_aux is not None and sinks is not None:
        raise ConfigError("sinks", tuple(sinks.shape), "are given a second time", "s_aux alone")
    cp = plan.within(_window(attention_mask, sliding_window))
    # [B, H, S, D] -> [B, S, H, D]
    q, k, v = (rearrange(x, "b h s d -> b s h d").contiguous() for x in (query, key, value))
    return cp.attention(
        q, k, v, scaling, sinks=sinks if s_aux is None else s_aux, softcap=softcap
    ), None


def _checked_plan(
    module: nn.Module, mask: WantedMask | Tensor | None, plan: BatchPlan | None
) -> BatchPlan:
    """Returns the batch's plan, which comes with the call or with the mask.

    Refuses a model that was built before ``register`` and was not set to this attention since.
    """
    if plan is None and isinstance(mask, WantedMask):
        plan = mask.plan
    if plan is None:
        works = "model(**shard_batch(group, ...)), with a model that passes keywords to attention"
        raise ConfigError("context_parallel", None, "is missing from the call", works)
    is_models = hasattr(getattr(module, "config", None), "_attn_implementation")
    if is_models and type(plan) is BatchPlan and VOUCHED not in vars(module):
        rule = "belongs to a model that was not checked"
        works = "huggingface.check(model), or huggingface.register() before the model is built"
        raise ConfigError("attention", type(module).__name__, rule, works)
    return plan


def _window(wanted: WantedMask | None, sliding_window: int | None) -> int | None:
    """The window. Some models give it to the mask alone, and not to attention."""
    if wanted is None or sliding_window == wanted.window:
        return sliding_window
    if sliding_window is not None:
        rule = f"differs from {wanted.window}, the window of the mask"
        raise ConfigError("sliding_window", sliding_window, rule, "the same in mask and attention")
    return wanted.window


def _refuse_cache(num_queries: int, num_keys: int) -> None:
    rule = f"gives {num_queries} queries {num_keys} keys, but only self-attention is supported"
    raise ConfigError("past_key_values", "", rule, "use_cache=False, one call per batch")


def refuse_unsupported(
    table: Mapping[str, str], kwargs: Mapping[str, Any], config: Any = None
) -> None:
    """Refuses arguments that would change the result.

    Args:
        table: their names, and what to use instead.
        kwargs: the arguments of the call. None and False are off.
        config: may turn on what begins with ``output_`` as well.
    """
    for name, works in table.items():
        value = kwargs.get(name)
        if name.startswith("output_"):
            value = value or getattr(config, name, None)
        if value is not None and value is not False:
            shown = tuple(value.shape) if isinstance(value, Tensor) else value
            rule = "is not supported under context parallelism"
            raise ConfigError(name, shown, rule, works)


def _refuse_changing_rope(config: Any, plan: BatchPlan) -> None:
    """Refuses frequencies that depend on the largest position, which differs between ranks."""
    parameters = getattr(config, "rope_parameters", None) or {}
    nested = [x for x in parameters.values() if isinstance(x, Mapping)] or [parameters]
    for rope in nested if plan.cp.cp_size > 1 else ():
        kind = rope.get("rope_type")
        limit = None
        if kind == "dynamic":
            limit = getattr(config, "max_position_embeddings", None)
        elif kind == "longrope":
            limit = rope.get("original_max_position_embeddings")
        if limit is not None and plan.longest > limit:
            rule = f"would differ between ranks beyond position {limit}"
            works = f"documents of at most {limit} tokens, or another rope_type"
            raise ConfigError("rope_type", kind, rule, works)
