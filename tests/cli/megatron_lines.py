"""Command lines for Megatron-LM's pretrain_gpt.py, as scripts in the field put them together.

They are our own, written from counts of the flags that public scripts have
(tests/cli/test_megatron_lines.py checks the counts). The arrays are those into which such scripts
divide their flags.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType


@dataclass(frozen=True)
class MegatronLine:
    """A command line, and the ranks that torchrun starts."""

    world: int
    text: str

    @property
    def words(self) -> list[str]:
        """The command line in words."""
        return self.text.split()


# --- the arrays that scripts share

CORE = """--use-mcore-models --transformer-impl transformer_engine --distributed-backend nccl
    --use-distributed-optimizer --overlap-grad-reduce --overlap-param-gather
    --distributed-timeout-minutes 60"""
OLD_CORE = """--transformer-impl local --distributed-backend nccl --use-flash-attn
    --no-masked-softmax-fusion --no-gradient-accumulation-fusion --use-distributed-optimizer"""
LLAMA = """--normalization RMSNorm --norm-epsilon 1e-5 --swiglu --disable-bias-linear
    --position-embedding-type rope --rotary-percent 1.0 --no-position-embedding
    --untie-embeddings-and-output-weights --attention-dropout 0.0 --hidden-dropout 0.0"""
GROUPS = "--group-query-attention --num-query-groups 8"
STABLE = """--attention-softmax-in-fp32 --accumulate-allreduce-grads-in-fp32 --bf16
    --initial-loss-scale 65536 --init-method-std 0.02 --clip-grad 1.0 --weight-decay 0.1"""
ADAM = "--optimizer adam --adam-beta1 0.9 --adam-beta2 0.95 --adam-eps 1e-8"
FUSED = """--no-rope-fusion --no-bias-swiglu-fusion --cross-entropy-loss-fusion
    --no-create-attention-mask-in-dataloader --no-check-for-nan-in-loss-and-grad"""
FORK = """--use-fused-rotary-pos-emb --use-fused-swiglu --use-fused-rmsnorm
    --attention-mask-type causal --no-masked-softmax-fusion --no-gradient-accumulation-fusion
    --use-flash-attn"""
HF_DATA = """--data-path data/corpus_text_document --split 949,50,1 --num-workers 8
    --data-cache-path /tmp/data_cache --tokenizer-type HuggingFaceTokenizer
    --tokenizer-model tokenizer --no-mmap-bin-files"""
LLAMA2_DATA = """--data-path 0.7 data/corpus_text_document 0.3 data/other_text_document
    --split 98,2,0 --tokenizer-type Llama2Tokenizer --tokenizer-model tokenizer.model
    --num-workers 4 --data-cache-path cache"""
GPT2_DATA = """--data-path data/corpus_text_document --split 949,50,1 --vocab-file gpt2-vocab.json
    --merge-file gpt2-merges.txt"""
EVAL = "--log-interval 10 --eval-interval 1000 --eval-iters 32 --save-interval 500"
BOARD = """--tensorboard-dir tensorboard --tensorboard-log-interval 1 --tensorboard-queue-size 5
    --log-timers-to-tensorboard --log-memory-to-tensorboard --log-validation-ppl-to-tensorboard
    --log-throughput --timing-log-level 0"""
DIST_CKPT = """--ckpt-format torch_dist --use-persistent-ckpt-worker --dist-ckpt-strictness log_all
    --ckpt-fully-parallel-load --async-save --no-load-rng --no-save-optim"""
PLAIN_CKPT = "--save checkpoints --ckpt-format torch --no-load-optim --no-load-rng"
COSINE = "--lr 3e-4 --min-lr 3e-5 --lr-decay-style cosine"
ITERS = "--train-iters 100000 --lr-warmup-iters 2000 --lr-decay-iters 100000"
FP8 = "--fp8-format hybrid --fp8-amax-history-len 1024 --fp8-amax-compute-algo max"
MOE = """--moe-router-topk 2 --moe-router-load-balancing-type aux_loss --moe-aux-loss-coeff 1e-2
    --moe-grouped-gemm --moe-token-dispatcher-type alltoall --moe-permute-fusion"""
FULL = "--recompute-granularity full --recompute-method uniform --recompute-num-layers 1"

# --- the sizes of models

L7 = """--num-layers 32 --hidden-size 4096 --ffn-hidden-size 11008 --num-attention-heads 32
    --seq-length 4096 --max-position-embeddings 4096"""
L8 = """--num-layers 32 --hidden-size 4096 --ffn-hidden-size 14336 --num-attention-heads 32
    --rotary-base 500000 --make-vocab-size-divisible-by 128"""
L70 = """--num-layers 80 --hidden-size 8192 --ffn-hidden-size 28672 --num-attention-heads 64
    --rotary-base 500000 --seq-length 8192 --max-position-embeddings 8192"""
SIZE_8K = "--seq-length 8192 --max-position-embeddings 8192"
SIZE_128K = "--seq-length 131072 --max-position-embeddings 131072"
G13 = """--num-layers 40 --hidden-size 5120 --num-attention-heads 40 --seq-length 2048
    --max-position-embeddings 2048 --attention-dropout 0.1 --hidden-dropout 0.1"""
G175 = """--num-layers 96 --hidden-size 12288 --num-attention-heads 96 --seq-length 2048
    --max-position-embeddings 2048 --attention-dropout 0 --hidden-dropout 0"""
G345M = """--num-layers 24 --hidden-size 1024 --num-attention-heads 16 --seq-length 1024
    --max-position-embeddings 1024 --attention-dropout 0.1 --hidden-dropout 0.1"""
QWEN7 = """--num-layers 28 --hidden-size 3584 --ffn-hidden-size 18944 --num-attention-heads 28
    --group-query-attention --num-query-groups 4 --add-qkv-bias --rotary-base 1000000"""
QWEN3 = """--num-layers 36 --hidden-size 4096 --ffn-hidden-size 12288 --num-attention-heads 32
    --kv-channels 128 --qk-layernorm --rotary-base 1000000 --max-position-embeddings 40960"""
MIXTRAL = """--num-layers 32 --hidden-size 4096 --ffn-hidden-size 14336 --num-attention-heads 32
    --rotary-base 1000000 --num-experts 8 --expert-model-parallel-size 8"""

LINES: Mapping[str, MegatronLine] = MappingProxyType(
    {
        "Llama 2 7B": MegatronLine(
            64,
            f"""{OLD_CORE} {LLAMA} {L7} {STABLE} {LLAMA2_DATA} {BOARD} {COSINE} {ITERS}
            {PLAIN_CKPT} --tensor-model-parallel-size 2 --pipeline-model-parallel-size 1
            --sequence-parallel --micro-batch-size 2 --global-batch-size 256 --adam-beta1 0.9
            --adam-beta2 0.95 --log-interval 10 --eval-interval 1000 --eval-iters 10
            --save-interval 1000 --no-bias-gelu-fusion --no-bias-dropout-fusion --seed 42""",
        ),
        "Llama 2 7B on one node": MegatronLine(
            8,
            f"""{OLD_CORE} {LLAMA} {L7} {STABLE} {HF_DATA} {BOARD} {ADAM} {PLAIN_CKPT} {COSINE}
            --tensor-model-parallel-size 8 --pipeline-model-parallel-size 1
            --micro-batch-size 1 --global-batch-size 64 --train-iters 5000
            --lr-warmup-fraction .01 --log-interval 1 --eval-interval 1000 --eval-iters 0
            --save-interval 10000 --use-rotary-position-embeddings --sequence-parallel""",
        ),
        "Llama 3 8B": MegatronLine(
            128,
            f"""{CORE} {LLAMA} {L8} {SIZE_8K} {GROUPS} {STABLE} {HF_DATA} {BOARD} {EVAL} {ADAM}
            {DIST_CKPT} {COSINE} {ITERS} --save checkpoints --load checkpoints
            --tensor-model-parallel-size 4 --pipeline-model-parallel-size 2
            --context-parallel-size 2 --sequence-parallel --micro-batch-size 1
            --global-batch-size 128 --attention-backend auto --manual-gc
            --empty-unused-memory-level 1 --exit-duration-in-mins 230""",
        ),
        "Llama 3 8B, FP8": MegatronLine(
            8,
            f"""{CORE} {LLAMA} {L8} {SIZE_8K} {GROUPS} {STABLE} {HF_DATA} {BOARD} {ADAM} {COSINE}
            {FP8} {FUSED} --fp8-param-gather --train-samples 1953125
            --tensor-model-parallel-size 1 --pipeline-model-parallel-size 1
            --context-parallel-size 2 --micro-batch-size 1 --global-batch-size 128
            --attention-backend fused --calculate-per-token-loss --log-interval 1
            --save-interval 1000 --ckpt-format torch_dist --save checkpoints""",
        ),
        "Llama 3 8B, FSDP": MegatronLine(
            32,
            f"""{CORE} {LLAMA} {L8} {SIZE_8K} {GROUPS} {STABLE} {HF_DATA} {BOARD} {EVAL} {ADAM}
            {COSINE} {ITERS} {FUSED} --use-megatron-fsdp --calculate-per-token-loss
            --data-parallel-sharding-strategy optim_grads_params --tensor-model-parallel-size 1
            --micro-batch-size 1 --global-batch-size 128 --init-model-with-meta-device
            --ckpt-format fsdp_dtensor --save checkpoints --recompute-activations
            --grad-reduce-in-bf16 --attention-backend flash""",
        ),
        "Llama 3.1 8B, long": MegatronLine(
            64,
            f"""{CORE} {LLAMA} {L8} {SIZE_128K} {GROUPS} {STABLE} {HF_DATA} {BOARD} {EVAL} {ADAM}
            {DIST_CKPT} --lr 2e-5 --min-lr 2e-6 --lr-decay-style cosine --lr-warmup-iters 50
            --train-iters 1000 --use-rope-scaling --rope-scaling-factor 8.0
            --tensor-model-parallel-size 4 --pipeline-model-parallel-size 1
            --context-parallel-size 16 --cp-comm-type p2p --sequence-parallel
            --micro-batch-size 1 --global-batch-size 8 {FULL} --finetune
            --save checkpoints --reset-position-ids --reset-attention-mask""",
        ),
        "Llama 3 70B": MegatronLine(
            512,
            f"""{CORE} {LLAMA} {L70} {GROUPS} {STABLE} {HF_DATA} {BOARD} {EVAL} {ADAM}
            {DIST_CKPT} {FUSED} --save checkpoints --lr 1.5e-4 --min-lr 1.5e-5
            --lr-decay-style cosine {ITERS} --tensor-model-parallel-size 8
            --pipeline-model-parallel-size 4 --num-layers-per-virtual-pipeline-stage 5
            --context-parallel-size 2 --sequence-parallel --micro-batch-size 1
            --global-batch-size 1024 --tp-comm-overlap --overlap-p2p-communication-warmup-flush
            --account-for-embedding-in-pipeline-split""",
        ),
        "Llama 3 70B, FP8 and selective": MegatronLine(
            256,
            f"""{CORE} {LLAMA} {L70} {GROUPS} {STABLE} {HF_DATA} {BOARD} {EVAL} {ADAM} {FP8}
            {COSINE} {ITERS} {PLAIN_CKPT} --fp8-param-gather --fp8-margin 0 --fp8-interval 1
            --tensor-model-parallel-size 8 --pipeline-model-parallel-size 4
            --sequence-parallel --micro-batch-size 1 --global-batch-size 512
            --recompute-activations --recompute-modules core_attn mlp
            --attention-backend fused""",
        ),
        "Llama 7B of a fork": MegatronLine(
            8,
            f"""{FORK} {LLAMA} {L7} {HF_DATA} --tokenizer-name-or-path tokenizer --bf16
            --tensor-model-parallel-size 8 --pipeline-model-parallel-size 1
            --sequence-parallel --micro-batch-size 4 --global-batch-size 32 --lr 1.25e-6
            --min-lr 1.25e-7 --lr-decay-style cosine --weight-decay 1e-1 --clip-grad 1.0
            --lr-warmup-fraction 0.01 --adam-beta1 0.9 --adam-beta2 0.95
            --initial-loss-scale 65536 --train-iters 5000 --init-method-std 0.01
            --attention-softmax-in-fp32 --no-load-optim --no-load-rng --padded-vocab-size 32000
            --log-interval 1 --save-interval 10000 --eval-interval 10000 --eval-iters 0
            --save checkpoints --use-distributed-optimizer --overlap-grad-reduce""",
        ),
        "long rows of a fork": MegatronLine(
            64,
            f"""{FORK} {LLAMA} {L8} --seq-length 65536 --max-position-embeddings 65536 {GROUPS}
            {HF_DATA} {BOARD} --bf16 --context-parallel-algo megatron_cp_algo
            --context-parallel-size 8 --tensor-model-parallel-size 8
            --pipeline-model-parallel-size 1 --sequence-parallel --micro-batch-size 1
            --global-batch-size 16 --lr 1e-5 --min-lr 1e-6 --lr-decay-style cosine
            --weight-decay 0.1 --clip-grad 1.0 --lr-warmup-iters 100 --train-iters 2000
            --init-method-std 0.01 --attention-softmax-in-fp32 --no-load-optim --no-load-rng
            --padded-vocab-size 128256 --log-interval 1 --save-interval 1000 {FULL}
            --save checkpoints --use-distributed-optimizer --use-mcore-models
            --distributed-timeout-minutes 120 --seed 1234""",
        ),
        "GPT-3 13B": MegatronLine(
            64,
            f"""{OLD_CORE} {G13} {BOARD} {PLAIN_CKPT} --data-path data/corpus_text_document
            --split 949,50,1 --tokenizer-type HuggingFaceTokenizer --tokenizer-model tokenizer
            --tensor-model-parallel-size 4 --pipeline-model-parallel-size 1
            --micro-batch-size 1 --global-batch-size 256 --train-iters 500000
            --lr-decay-iters 320000 --lr 1.0e-4 --min-lr 1.0e-5 --lr-decay-style cosine
            --lr-warmup-fraction .01 --weight-decay 1e-2 --clip-grad 1.0 --bf16
            --init-method-std 0.006 --log-interval 100 --save-interval 1000
            --eval-interval 1000 --eval-iters 10 --recompute-activations
            --attention-softmax-in-fp32 --no-query-key-layer-scaling --DDP-impl local
            --no-bias-gelu-fusion --overlap-grad-reduce --num-workers 2
            --log-batch-size-to-tensorboard --log-num-zeros-in-grad""",
        ),
        "GPT-3 175B": MegatronLine(
            1024,
            f"""{CORE} {G175} {STABLE} {BOARD} {GPT2_DATA} --tokenizer-type GPT2BPETokenizer
            --tensor-model-parallel-size 8 --pipeline-model-parallel-size 1
            --sequence-parallel --micro-batch-size 1 --global-batch-size 1536
            --train-iters 95000 --lr-decay-iters 85000 --lr-warmup-iters 2000 --lr 6.0e-5
            --min-lr 6.0e-6 --lr-decay-style cosine --adam-beta1 0.9 --adam-beta2 0.95
            --log-interval 10 --save-interval 1000 --eval-interval 1000 --eval-iters 10
            --save checkpoints {FULL} --no-load-rng --ckpt-format torch_dist
            --apply-layernorm-1p --exit-signal-handler --log-world-size-to-tensorboard""",
        ),
        "GPT-3 175B, samples": MegatronLine(
            1024,
            f"""{CORE} {G175} {STABLE} {BOARD} {HF_DATA} {DIST_CKPT} --train-samples 146484375
            --lr-decay-samples 126953125 --lr-warmup-samples 183105 --lr 6.0e-5 --min-lr 6.0e-6
            --lr-decay-style cosine --adam-beta1 0.9 --adam-beta2 0.95
            --tensor-model-parallel-size 8 --pipeline-model-parallel-size 1
            --sequence-parallel --micro-batch-size 1 --global-batch-size 1536
            --log-interval 10 --save-interval 1000 --eval-iters 32 --save checkpoints
            --attention-backend auto --apply-layernorm-1p --seed 1234 {FULL}""",
        ),
        "GPT 345M": MegatronLine(
            8,
            f"""{OLD_CORE} {G345M} {GPT2_DATA} {BOARD} --tokenizer-type GPT2BPETokenizer
            --tensor-model-parallel-size 1 --pipeline-model-parallel-size 1
            --micro-batch-size 8 --global-batch-size 64 --lr 0.00015 --train-iters 500000
            --lr-decay-iters 320000 --lr-decay-style cosine --min-lr 1.0e-5
            --weight-decay 1e-2 --lr-warmup-iters 3200 --clip-grad 1.0 --log-interval 100
            --save-interval 10000 --eval-interval 1000 --eval-iters 10 --save checkpoints
            --attention-softmax-in-fp32 --no-query-key-layer-scaling --bf16
            --no-bias-dropout-fusion --no-bias-gelu-fusion --num-workers 2 --seed 1234
            --log-num-zeros-in-grad --no-load-optim --no-load-rng --ckpt-format torch""",
        ),
        "GPT of a benchmark": MegatronLine(
            128,
            f"""{CORE} {G13} {BOARD} {FUSED} --mock-data --tokenizer-type NullTokenizer
            --vocab-size 51200 --tensor-model-parallel-size 8 --pipeline-model-parallel-size 2
            --sequence-parallel --micro-batch-size 2 --global-batch-size 512 --train-iters 50
            --lr 1e-4 --min-lr 1e-5 --lr-decay-style cosine --lr-warmup-iters 2 --bf16
            --clip-grad 1.0 --weight-decay 0.1 --init-method-std 0.006 --log-interval 1
            --eval-iters 0 --attention-softmax-in-fp32 --attention-backend fused
            --tp-comm-overlap --timing-log-option minmax --use-pytorch-profiler --profile
            --profile-step-start 10 --profile-step-end 12 --profile-ranks 0 --num-workers 1
            --optimizer adam --adam-beta1 0.9 --adam-beta2 0.95 --use-cpu-initialization""",
        ),
        "BLOOM style": MegatronLine(
            48,
            f"""{OLD_CORE} {BOARD} {HF_DATA} {PLAIN_CKPT} --num-layers 24 --hidden-size 2048
            --num-attention-heads 16 --seq-length 2048 --max-position-embeddings 2048
            --attention-dropout 0 --hidden-dropout 0 --position-embedding-type rope
            --micro-batch-size 2 --global-batch-size 480 --tensor-model-parallel-size 1
            --pipeline-model-parallel-size 3 --lr 2e-4 --min-lr 1e-5 --lr-decay-style cosine
            --train-iters 110000 --lr-warmup-iters 375 --clip-grad 1.0 --weight-decay 1e-1
            --adam-beta1 0.9 --adam-beta2 0.95 --adam-eps 1e-8 --init-method-std 0.0048 --bf16
            --rampup-batch-size 192 16 9765625 --seed 42 --log-interval 10
            --save-interval 1000 --eval-interval 1000 --eval-iters 1
            --checkpoint-activations --exit-duration-in-mins 5990""",
        ),
        "Mistral 7B": MegatronLine(
            32,
            f"""{CORE} {LLAMA} {GROUPS} {STABLE} {LLAMA2_DATA} {BOARD} {EVAL} {ADAM}
            {PLAIN_CKPT} {COSINE} {ITERS} --num-layers 32 --hidden-size 4096
            --ffn-hidden-size 14336 --num-attention-heads 32 --seq-length 8192
            --max-position-embeddings 32768 --window-size 4095,0 --rotary-base 10000
            --tensor-model-parallel-size 2 --pipeline-model-parallel-size 1
            --context-parallel-size 2 --cp-comm-type a2a --sequence-parallel
            --micro-batch-size 1 --global-batch-size 256 --attention-backend flash""",
        ),
        "Qwen2.5 7B": MegatronLine(
            32,
            f"""{CORE} {LLAMA} {QWEN7} {STABLE} {HF_DATA} {BOARD} {EVAL} {ADAM} {PLAIN_CKPT}
            --seq-length 4096 --max-position-embeddings 131072 --lr 1e-5 --min-lr 1e-6
            --lr-decay-style cosine --train-iters 2000 --lr-warmup-iters 100
            --lr-decay-iters 2000 --tensor-model-parallel-size 4
            --pipeline-model-parallel-size 1 --sequence-parallel --micro-batch-size 1
            --global-batch-size 64 --recompute-activations --no-save-optim --eod-mask-loss
            --dataloader-type cyclic --vocab-size 152064""",
        ),
        "Qwen3 8B": MegatronLine(
            64,
            f"""{CORE} {LLAMA} {QWEN3} {GROUPS} {STABLE} {HF_DATA} {BOARD} {EVAL} {ADAM}
            {DIST_CKPT} {COSINE} {ITERS} --save checkpoints --seq-length 32768
            --tensor-model-parallel-size 2 --pipeline-model-parallel-size 1
            --context-parallel-size 4 --sequence-parallel --micro-batch-size 1
            --global-batch-size 64 --recompute-granularity selective
            --use-rotary-position-embeddings --log-params-norm --log-num-zeros-in-grad""",
        ),
        "small model with WSD": MegatronLine(
            16,
            f"""{CORE} {LLAMA} {GROUPS} {STABLE} {HF_DATA} {BOARD} {EVAL} {ADAM} {DIST_CKPT}
            --save checkpoints --num-layers 16 --hidden-size 2048 --ffn-hidden-size 8192
            --num-attention-heads 32 --seq-length 4096 --max-position-embeddings 4096
            --lr 1e-3 --min-lr 1e-5 --lr-decay-style WSD --lr-wsd-decay-style exponential
            --lr-wsd-decay-iters 10000 --lr-warmup-iters 2000 --train-iters 100000
            --tensor-model-parallel-size 1 --pipeline-model-parallel-size 1
            --micro-batch-size 4 --global-batch-size 512 --manual-gc""",
        ),
        "two learning rates": MegatronLine(
            256,
            f"""{CORE} {G13} {STABLE} {HF_DATA} {BOARD} {DIST_CKPT} --squared-relu
            --apply-layernorm-1p --position-embedding-type rope --rotary-percent 0.5
            --no-position-embedding --untie-embeddings-and-output-weights
            --disable-bias-linear {ADAM} {COSINE} {ITERS} --decoupled-lr 5e-4
            --decoupled-min-lr 5e-5 --tensor-model-parallel-size 8
            --pipeline-model-parallel-size 1 --sequence-parallel --micro-batch-size 2
            --global-batch-size 1024 --log-interval 100 --eval-iters 32 --save-interval 1000
            --save checkpoints --exit-signal-handler --rerun-mode disabled""",
        ),
        "Mixtral 8x7B": MegatronLine(
            128,
            f"""{CORE} {LLAMA} {MIXTRAL} {MOE} {GROUPS} {STABLE} {LLAMA2_DATA} {BOARD} {EVAL}
            {COSINE} {ITERS} {PLAIN_CKPT} --seq-length 4096 --max-position-embeddings 32768
            --tensor-model-parallel-size 1 --pipeline-model-parallel-size 4
            --num-layers-per-virtual-pipeline-stage 8 --micro-batch-size 1
            --global-batch-size 256 --adam-beta1 0.9 --adam-beta2 0.95
            --moe-pad-expert-input-to-capacity""",
        ),
        "a small mixture of experts": MegatronLine(
            8,
            f"""{CORE} {LLAMA} {MOE} {STABLE} {HF_DATA} {BOARD} {EVAL} {ADAM} {PLAIN_CKPT}
            {COSINE} {ITERS} --num-layers 12 --hidden-size 768 --ffn-hidden-size 2048
            --num-attention-heads 12 --seq-length 2048 --max-position-embeddings 2048
            --num-experts 16 --moe-ffn-hidden-size 512 --expert-model-parallel-size 4
            --tensor-model-parallel-size 1 --pipeline-model-parallel-size 1
            --micro-batch-size 4 --global-batch-size 256 --moe-z-loss-coeff 1e-3""",
        ),
        "no positions": MegatronLine(
            16,
            f"""{OLD_CORE} {STABLE} {HF_DATA} {BOARD} {EVAL} {ADAM} {PLAIN_CKPT} {COSINE}
            --num-layers 24 --hidden-size 2048 --num-attention-heads 16 --seq-length 4096
            --max-position-embeddings 4096 --no-position-embedding --attention-dropout 0
            --hidden-dropout 0 --lr-warmup-fraction 0.02 --train-iters 50000
            --tensor-model-parallel-size 2 --pipeline-model-parallel-size 1
            --micro-batch-size 2 --global-batch-size 256 --log-params-norm
            --recompute-granularity full --recompute-method block --recompute-num-layers 12
            --use-checkpoint-args --override-opt_param-scheduler""",
        ),
    }
)

TRAINED: Sequence[str] = (
    *("Llama 2 7B", "Llama 3 8B", "Llama 3 8B, FSDP", "Llama 3.1 8B, long"),
    *("Llama 7B of a fork", "long rows of a fork", "GPT-3 13B", "GPT 345M"),
    *("Mistral 7B", "Qwen2.5 7B", "Qwen3 8B", "no positions", "BLOOM style", "Mixtral 8x7B"),
)
"""The lines that the tests train for two steps, with small sizes."""
