"""The rules of mixtures of experts: which flags go together, and which ranks can share experts."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import chain

from cp_megatron.config import Config, ModelConfig, ParallelConfig
from cp_megatron.errors import ConfigError, Mistakes
from cp_megatron.families.mixture import EXPERT_FIELDS
from cp_megatron.preflight.rules import divisors, misnumbered, multiples, nearest, refuse_unused

_EP = "--expert-model-parallel-size"
_TOPK = "--moe-router-topk"
_SIGMOID = "--moe-router-score-function sigmoid"
_NORM = "--no-moe-router-norm-topk-prob"


def check_experts(config: Config, given: frozenset[str]) -> None:
    """Checks the flags of experts against one another and against the other flags.

    Args:
        config: the run.
        given: the flags that the user typed, with their dashes.

    Raises:
        ConfigError: they do not fit together, or one has no effect; several mistakes are one
            ``CombinedError``.
    """
    model, mistakes = config.model, Mistakes()
    if model.num_experts is None:
        works = "--num-experts 8 with it"
        with mistakes.collect():
            reason = "without --num-experts"
            refuse_unused(model, EXPERT_FIELDS, given, reason=reason, works=works)
        with mistakes.collect():
            if (ep := config.parallel.expert_model_parallel_size) > 1:
                rule = "has no effect without --num-experts: there are no experts to share"
                raise ConfigError(_EP, ep, rule, works)
        mistakes.raise_any()
        return
    found = _layers(model), _choice(model), _balance(model), _groups(model), _beside(config)
    for error in chain(*found, _shared(config.parallel, model.num_experts)):
        with mistakes.collect():
            raise error
    for names, reason, works in _unread(model):
        with mistakes.collect():
            refuse_unused(model, names, given, reason=reason, works=works)
    mistakes.raise_any()


def expert_notes(model: ModelConfig, given: frozenset[str]) -> tuple[str, ...]:
    """Notes for the start table.

    Args:
        model: the model, which passed ``check_experts``.
        given: the flags that the user typed, with their dashes.
    """
    dense = len(model.expert_layers) < model.num_layers
    if dense or model.moe_ffn_hidden_size is None or "--ffn-hidden-size" not in given:
        return ()
    return ("--ffn-hidden-size has no effect: every layer has experts instead of a dense MLP",)


def _layers(model: ModelConfig) -> Iterator[ConfigError]:
    """The mistakes about which layers have experts."""
    flag, layers = "--moe-layers", model.moe_layers
    if layers is None:
        return
    rule, works = misnumbered(layers, model.num_layers)
    if not layers:
        rule, works = "names no layer", f"no {flag} and no --num-experts"
    elif model.moe_layer_freq is not None:
        rule, works = "contradicts --moe-layer-freq", "one of the two"
    if rule:
        yield ConfigError(flag, " ".join(map(str, layers)), rule, works)


def _choice(model: ModelConfig) -> Iterator[ConfigError]:
    """The mistakes about the scores and the number of chosen experts."""
    experts, topk = model.num_experts or 1, model.moe_router_topk
    softmax = model.moe_router_score_function == "softmax"
    if experts == 1 and (softmax or model.moe_router_norm_topk_prob):
        rule = "would always weight its expert by 1, so that the router would not be trained"
        more = max(2, topk)
        works = f"--num-experts {more} {_TOPK} {more}, or no --num-experts for a dense model"
        yield ConfigError("--num-experts", experts, rule, works)
        return
    if topk > experts:
        yield ConfigError(_TOPK, topk, f"must be at most --num-experts {experts}", str(experts))
    constant = "would weight every chosen expert by 1, so that the router would not be trained"
    or_two = f", or {_TOPK} 2" if _most(model) > 1 else ""
    if topk == 1 and softmax and not model.moe_router_pre_softmax:
        works = f"--moe-router-pre-softmax{or_two}"
        yield ConfigError(_TOPK, topk, f"{constant}: the softmax is over one expert", works)
    if topk == 1 and not softmax and model.moe_router_norm_topk_prob:
        works = f"{_NORM}{or_two}"
        yield ConfigError(_TOPK, topk, f"{constant}: a score is divided by itself", works)


def _most(model: ModelConfig) -> int:
    """The number of experts that a token may choose from."""
    experts, groups = model.num_experts or 1, model.moe_router_num_groups
    return experts if groups is None else (model.moe_router_group_topk or 1) * (experts // groups)


def _balance(model: ModelConfig) -> Iterator[ConfigError]:
    """The mistakes about what keeps experts equally busy."""
    kind, coefficient = model.moe_router_load_balancing_type, model.moe_aux_loss_coeff
    if coefficient and kind == "none":
        rule = "has no effect with --moe-router-load-balancing-type none"
        works = "--moe-router-load-balancing-type seq_aux_loss, or --moe-aux-loss-coeff 0"
        yield ConfigError("--moe-aux-loss-coeff", coefficient, rule, works)
    if model.moe_router_enable_expert_bias and model.moe_router_score_function == "softmax":
        rule = "needs sigmoid scores: those of softmax change with the number of experts"
        yield ConfigError("--moe-router-enable-expert-bias", "", rule, f"{_SIGMOID} with it")


def _groups(model: ModelConfig) -> Iterator[ConfigError]:
    """The mistakes about groups of experts."""
    groups, best = model.moe_router_num_groups, model.moe_router_group_topk
    of_groups, of_best = "--moe-router-num-groups", "--moe-router-group-topk"
    if groups is None and best is not None:
        yield ConfigError(of_best, best, f"needs {of_groups}", f"{of_groups} 8 with it")
    if groups is not None and best is None:
        yield ConfigError(of_groups, groups, f"needs {of_best}", f"{of_best} 1 with it")
    if groups is None or best is None:
        return
    experts, topk = model.num_experts or 1, model.moe_router_topk
    if experts % groups:
        rule = f"must divide --num-experts {experts}"
        yield ConfigError(of_groups, groups, rule, nearest(divisors(experts), groups))
        return
    size, ranking = experts // groups, model.group_num_scores
    if best > groups:
        yield ConfigError(of_best, best, f"must be at most {of_groups} {groups}", str(groups))
    elif topk > best * size:
        rule = f"must be at most {best * size}, the experts in {best} of {groups} groups"
        yield ConfigError(_TOPK, topk, rule, str(best * size))
    elif ranking > size:
        flag, rule = "--moe-router-group-num-scores", f"must be at most {size}, a group's experts"
        yield ConfigError(flag, ranking, rule, str(size))


def _beside(config: Config) -> Iterator[ConfigError]:
    """What experts do not run with."""
    tp, tile = config.parallel.tensor_parallel_size, config.memory.mlp_tile_size
    if tp > 1 and not config.parallel.sequence_parallel:
        rule = "needs sequence parallelism beside experts: each rank routes tokens of its own"
        works = f"--tensor-parallel-size {tp} --sequence-parallel"
        yield ConfigError("--tensor-parallel-size", tp, rule, works)
    if tile is not None:
        rule = "does not go with --num-experts: experts compute all tokens of a rank at once"
        yield ConfigError("--mlp-tile-size", tile, rule, "no --mlp-tile-size")


def _shared(parallel: ParallelConfig, experts: int) -> Iterator[ConfigError]:
    """The mistakes about how many ranks share the experts."""
    ep = parallel.expert_model_parallel_size
    if ep > experts:
        rule = f"must be at most --num-experts {experts}, because a rank holds whole experts"
        yield ConfigError(_EP, ep, rule, nearest(divisors(experts), ep))
    elif experts % ep:
        rule = f"must be divisible by {_EP} {ep}"
        yield ConfigError("--num-experts", experts, rule, multiples(experts, ep))


def _unread(model: ModelConfig) -> Iterator[tuple[tuple[str, ...], str, str]]:
    """Flags without an effect, with the reason and what works."""
    if model.moe_router_score_function == "sigmoid":
        works = "--moe-router-score-function softmax"
        yield ("moe_router_pre_softmax",), "with --moe-router-score-function sigmoid", works
    else:
        reason, works = "without sigmoid scores", _SIGMOID
        yield ("moe_router_norm_topk_prob",), reason, works
    if model.moe_router_num_groups is None:
        works = "--moe-router-num-groups 8 --moe-router-group-topk 4 with it"
        yield ("moe_router_group_num_scores",), "without groups of experts", works
    if not model.moe_router_enable_expert_bias:
        works = f"--moe-router-enable-expert-bias and {_SIGMOID} with it"
        yield ("moe_router_bias_update_rate",), "without biases of experts", works
    if not model.moe_aux_loss_coeff and model.moe_router_load_balancing_type != "none":
        works = "--moe-aux-loss-coeff 1e-3 with it"
        yield ("moe_router_load_balancing_type",), "with --moe-aux-loss-coeff 0", works
    if model.moe_shared_expert_intermediate_size is None:
        works = "--moe-shared-expert-intermediate-size with it"
        yield ("moe_shared_expert_gate",), "without a shared expert", works
