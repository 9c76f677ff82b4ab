"""The answers to Megatron-LM's flags of mixtures of experts that are not flags here."""

from __future__ import annotations

from collections.abc import Mapping

from cp_megatron.cli.megatron_answers import Answer, Noted, OneOf, Refused

_ONE_WAY = "experts run in one grouped product, which chooses its kernels"
_SENT = "tokens are sent by all-to-all, and what is computed does not depend on how they are sent"
_NO_CAPACITY = "no expert has a capacity, and no token is dropped"
_CAPACITY = (
    *("--moe-expert-capacity-factor", "--moe-pad-expert-input-to-capacity"),
    *("--moe-token-drop-policy", "--moe-token-dropping", "--moe-expert-rank-capacity-factor"),
)
_DENSE_START = "experts cannot start from a dense model"
_FORCED = "it routes at random, to measure speed only"
_BF16 = OneOf({"bf16": ""}, "tokens are sent in the type of the activations", "--bf16")

EXPERTS: Mapping[str, Answer] = {
    "--expert-tensor-parallel-size": OneOf(
        {"1": ""},
        "experts are split over --expert-model-parallel-size alone, each of them whole",
        "--expert-tensor-parallel-size 1",
    ),
    "--expert-tensor-parallel-num-weight-shards": Refused("experts are not split over tp"),
    **dict.fromkeys(
        (
            *("--moe-grouped-gemm", "--moe-use-legacy-grouped-gemm", "--moe-use-grouped-tensor"),
            *("--moe-single-grouped-weight", "--moe-single-grouped-bias", "--moe-permute-fusion"),
            *("--moe-router-fusion", "--use-grouped-gemm-for-shared-expert"),
            *("--moe-router-padding-for-fp8", "--moe-router-padding-for-quantization"),
            *("--moe-pad-experts-for-cuda-graph-inference", "--moe-paged-stash"),
        ),
        Noted(_ONE_WAY),
    ),
    **dict.fromkeys(
        (
            *("--moe-mlp-glu-interleave-size", "--moe-shared-expert-glu-interleave-size"),
            *("--moe-paged-stash-page-size", "--moe-paged-stash-buffer-size-factor-cuda"),
            "--moe-paged-stash-buffer-size-factor-cpu",
        ),
        Noted(_ONE_WAY, True),
    ),
    **dict.fromkeys(
        (
            *("--moe-enable-deepep", "--moe-permute-fusion-into-hybridep"),
            *("--moe-hybridep-pad-uneven-dispatch-inputs", "--moe-ncclep-zero-copy"),
            *("--moe-shared-expert-overlap", "--ep-overlap-early-attn-memory-release"),
        ),
        Noted(_SENT),
    ),
    **dict.fromkeys(
        (
            *("--moe-token-dispatcher-type", "--moe-flex-dispatcher-backend"),
            *("--moe-flex-dispatcher-num-sms", "--moe-deepep-num-sms", "--moe-hybridep-num-sms"),
            *("--moe-hybridep-num-blocks-permute", "--moe-hybridep-num-blocks-unpermute"),
            "--moe-hybridep-num-sms-preprocessing",
        ),
        Noted(_SENT, True),
    ),
    **dict.fromkeys(("--moe-dispatch-fwd-dtype", "--moe-combine-bwd-dtype"), _BF16),
    "--moe-per-layer-logging": Noted("the metrics have the load of the busiest expert"),
    "--save-tokens-per-expert-interval": Noted("the metrics have the load of the experts", True),
    "--moe-layer-recompute": Noted("memory is saved with the flags of launch/README.md, Memory"),
    "--moe-enable-routing-replay": Noted("a recomputed layer always repeats its first choice"),
    **dict.fromkeys(_CAPACITY, Refused(_NO_CAPACITY)),
    "--moe-input-jitter-eps": Refused("the router reads its input without noise"),
    "--moe-router-force-load-balancing": Refused(_FORCED),
    "--moe-router-force-biased": Refused(_FORCED),
    "--moe-router-topk-limited-devices": Refused(
        "a choice that depends on the grid is not reproducible",
        "--moe-router-num-groups and --moe-router-group-topk",
    ),
    "--moe-router-quantile-balancing-ema": Refused(
        "biases of experts follow counts of tokens", "--moe-router-enable-expert-bias"
    ),
    "--moe-use-upcycling": Refused(_DENSE_START, "--load-hf with a mixture of experts"),
    "--moe-upcycling-granularity": Refused(_DENSE_START, "--load-hf with a mixture of experts"),
    "--moe-apply-probs-on-input": Refused("what experts compute is weighted, not what they read"),
    "--moe-latent-size": Refused("experts read the residual stream itself"),
    "--moe-extended-tp": Refused("experts are not split over tp", "--expert-model-parallel-size"),
    "--moe-*": Refused("nothing here corresponds to it"),
}
"""Flags that concern speed are taken, and those that change the result are refused."""
