"""Flags of blocks that contradict one another are refused, and what the error advises works."""

from __future__ import annotations

import pytest

from cp_megatron.cli.parse import parse_arguments
from cp_megatron.errors import ConfigError
from cp_megatron.preflight.block_rules import check_blocks
from cp_megatron.preflight.rope_rules import check_rope

LATENT = "--multi-latent-attention --num-query-groups 4"
RECURRENT = "--linear-attention-layers 0"
YARN = "--rope-type yarn --rope-scaling-factor 4 --original-max-position-embeddings 64"
WINDOW = "--window-rotary-base 100 --window-size"


def checked(words: str) -> None:
    arguments = parse_arguments(["--preset", "toy", *words.split()])
    check_blocks(arguments.config.model, arguments.given)
    check_rope(arguments.config.model, arguments.config.data.seq_length, arguments.given)


@pytest.mark.parametrize(
    ("words", "told", "works"),
    [
        ("--geglu", "--geglu: contradicts --swiglu", "--geglu --no-swiglu"),
        (
            "--parallel-residual --norm-placement both",
            "--parallel-residual: has one norm",
            "--parallel-residual --norm-placement pre",
        ),
        ("--multi-latent-attention", "works: --num-query-groups 4", LATENT),
        (f"{LATENT} --kv-channels 8", "works: --kv-channels None", f"{LATENT} --kv-channels None"),
        (f"{LATENT} --rotary-percent 0.5", "gives the number of rotated channels", LATENT),
        (f"{LATENT} --softmax-type learnable", "is not supported by", LATENT),
        (f"{LATENT} --attn-logit-softcapping 9", "is not supported by", LATENT),
        (f"{LATENT} --qk-pos-emb-head-dim 7", "works: 8", f"{LATENT} --qk-pos-emb-head-dim 8"),
        (f"{LATENT} {YARN} --mscale-all-dim 1 --softmax-scale 0.1", "only with the other", LATENT),
        ("--rotary-percent 0.23", "rotates 11 of 48", "--rotary-percent 0.208334"),
        ("--rotary-percent 0.01", "works: 0.041667", "--rotary-percent 0.041667"),
        ("--no-rope-layers 2", "must be numbers from 0 to 1", "--no-rope-layers 0 1"),
        ("--no-rope-layers 1 1", "works: 1", "--no-rope-layers 1"),
        ("--window-rotary-base 100", "without a window", f"{WINDOW} 8 0"),
        (f"{WINDOW} -1 0", "without a window", f"{WINDOW} 8 0"),
        ("--query-temperature-beta 1", "needs the length L", f"--query-temperature-beta 1 {YARN}"),
        (
            f"--query-temperature-beta 1 {YARN} --no-rope-layers 1",
            "works: one of the two",
            "--no-rope-layers 1",
        ),
        ("--kv-lora-rank 8", "without --multi-latent-attention", f"{LATENT} --kv-lora-rank 8"),
        (f"{LATENT} --attention-output-gate", "is not supported by", LATENT),
        ("--linear-key-head-dim 8", "without gated", f"{RECURRENT} --linear-key-head-dim 8"),
        ("--linear-attention-layers 2", "must be numbers from 0 to 1", RECURRENT),
        (f"{RECURRENT} --linear-attention-freq 2", "works: one of the two", RECURRENT),
        (
            f"{RECURRENT} --linear-num-value-heads 24",
            "a multiple of --linear-num-key-heads 16 (works: 16, 32)",
            f"{RECURRENT} --linear-num-value-heads 16",
        ),
        (
            f"{RECURRENT} --window-size 8 0 --window-layers 0 1",
            "names layer 0, which is a gated DeltaNet",
            f"{RECURRENT} --window-size 8 0 --window-layers 1",
        ),
        (
            "--linear-attention-layers 0 1 --softmax-type learnable",
            "without a layer that attends",
            RECURRENT,
        ),
        (
            "--linear-attention-layers 0 1 --attention-dropout 0.1",
            "works: --attention-dropout 0",
            "--linear-attention-layers 0 1 --attention-dropout 0",
        ),
        ("--linear-attention-freq 3 --window-size 8 0", "a layer that attends", RECURRENT),
        (f"{RECURRENT} --no-rope-layers 0", "does not attend", f"{RECURRENT} --no-rope-layers 1"),
        ("--qk-norm-scope head", "without norms of heads", "--qk-layernorm --qk-norm-scope head"),
        (
            f"{LATENT} --latent-norm-epsilon 1e-6",
            "without norms of latents",
            f"{LATENT} --qk-layernorm --latent-norm-epsilon 1e-6",
        ),
        (
            "--norm-bias none",
            "RMSNorm, which has no bias",
            "--norm-bias none --normalization LayerNorm",
        ),
        (
            "--position-embedding-type none --rotary-interleaved",
            "--rotary-interleaved: has no effect without",
            "--rotary-interleaved",
        ),
        ("--no-disable-bias-linear --add-mlp-bias", "all linear layers have", "--add-mlp-bias"),
    ],
)
def test_refused(words: str, told: str, works: str) -> None:
    with pytest.raises(ConfigError) as caught:
        checked(words)
    assert told in str(caught.value)
    checked(works)
