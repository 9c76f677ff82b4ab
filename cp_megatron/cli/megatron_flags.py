"""Flags of Megatron-LM that mean nothing here: each is refused with the reason, never swallowed."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType

from cp_megatron.errors import ConfigError

_ALWAYS_ON = "leave the flag out: it is always so here"
_NOT_YET = "leave the flag out"

MEANINGLESS: Mapping[str, tuple[str, str]] = MappingProxyType(
    {
        # parallelism
        "--pipeline-model-parallel-size": (
            "there is no pipeline parallelism yet",
            "--tensor-parallel-size and --context-parallel-size",
        ),
        "--virtual-pipeline-model-parallel-size": ("there is no pipeline parallelism", _NOT_YET),
        "--num-layers-per-virtual-pipeline-stage": ("there is no pipeline parallelism", _NOT_YET),
        "--expert-model-parallel-size": ("there are no mixture-of-experts models", _NOT_YET),
        "--expert-tensor-parallel-size": ("there are no mixture-of-experts models", _NOT_YET),
        "--num-experts": ("there are no mixture-of-experts models", _NOT_YET),
        "--hybrid-context-parallel": (
            "the context parallel size is one for the whole run",
            "--context-parallel-size",
        ),
        "--use-tp-pp-dp-mapping": ("ranks are always ordered tp, then cp, then dp", _NOT_YET),
        "--distributed-backend": (
            "the device decides: NCCL on cuda, gloo on cpu",
            "--device cpu or --device cuda",
        ),
        "--tp-comm-overlap": ("needs TransformerEngine", _NOT_YET),
        # optimizer and gradients
        "--use-distributed-optimizer": (
            "optimizer state is always sharded over dp x cp",
            _ALWAYS_ON,
        ),
        "--overlap-grad-reduce": ("gradients are always reduced behind the backward", _ALWAYS_ON),
        "--overlap-param-gather": ("weights are always gathered ahead of their use", _ALWAYS_ON),
        "--use-torch-fsdp2": ("FSDP2 over dp x cp is always used", _ALWAYS_ON),
        "--use-megatron-fsdp": ("FSDP2 over dp x cp is always used", _ALWAYS_ON),
        "--calculate-per-token-loss": (
            "the loss is always the sum over all valid tokens by their number",
            _ALWAYS_ON,
        ),
        "--no-gradient-accumulation-fusion": ("there is no such fusion to switch off", _ALWAYS_ON),
        "--accumulate-allreduce-grads-in-fp32": (
            "gradients are always reduced in float32",
            _ALWAYS_ON,
        ),
        "--optimizer": ("AdamW is the only optimizer", _ALWAYS_ON),
        "--loss-scale": ("bfloat16 needs no loss scaling", _NOT_YET),
        "--lr-warmup-fraction": ("the warm-up is counted in steps", "--lr-warmup-iters"),
        "--lr-warmup-samples": ("the warm-up is counted in steps", "--lr-warmup-iters"),
        "--lr-decay-samples": ("the decay is counted in steps", "--lr-decay-iters"),
        "--train-samples": ("the training is counted in steps", "--train-iters"),
        "--rampup-batch-size": ("the batch size is one for the whole run", "--global-batch-size"),
        "--check-weight-hash-across-dp-replicas-interval": (
            "weights are sharded over dp x cp; sums of their bits and of messages are compared",
            "--check-interval",
        ),
        # precision and kernels
        "--fp16": ("float16 needs loss scaling, which is not there", "--bf16"),
        "--fp8-format": ("there is no FP8", "--bf16"),
        "--params-dtype": ("weights are float32, the compute type is a flag", "--dtype"),
        "--use-flash-attn": (
            "the kernel is chosen by name",
            "--kernel auto or --kernel flash_attn",
        ),
        "--attention-backend": ("the kernel is chosen by name", "--kernel"),
        "--transformer-impl": ("there is one implementation", "--kernel chooses the attention"),
        "--use-mcore-models": ("there is one implementation", _ALWAYS_ON),
        "--attention-softmax-in-fp32": ("softmax is always in float32 or more", _ALWAYS_ON),
        # model
        "--window-attn-skip-freq": ("the layers are named, from 0", "--window-layers 0 2 4"),
        "--group-query-attention": ("the number of groups says it", "--num-query-groups"),
        "--use-rotary-position-embeddings": (
            "is said by the type",
            "--position-embedding-type rope",
        ),
        "--rotary-percent": ("rope always rotates the whole head", _NOT_YET),
        "--use-rope-scaling": (
            "the kind of scaling is named",
            "--rope-type llama3 --rope-scaling-factor 8 --original-max-position-embeddings 8192",
        ),
        "--squared-relu": ("the MLP has GELU or SwiGLU", "--swiglu"),
        "--apply-layernorm-1p": ("the norms have a plain weight", "--normalization"),
        "--layernorm-epsilon": ("has another name here", "--norm-epsilon"),
        # recomputation
        "--recompute-activations": ("has another name", "--recompute-granularity selective"),
        "--recompute-method": (
            "the first layers are recomputed, each by itself: Megatron's block",
            "--recompute-num-layers",
        ),
        "--recompute-modules": ("the parts are fixed", "--recompute-granularity selective"),
        "--cpu-offloading-num-layers": ("every recomputed layer is moved", "--cpu-offloading"),
        "--use-cpu-initialization": ("weights are always drawn on the CPU", _ALWAYS_ON),
        "--cross-entropy-loss-fusion": ("head and loss are always one", _ALWAYS_ON),
        # data
        "--mock-data": (
            "without --data-path the run reads the sources of Python's library",
            "leave the flag out",
        ),
        "--vocab-file": (
            "a tokenizer is one file or folder",
            "--tokenizer-type and --tokenizer-model",
        ),
        "--merge-file": (
            "a tokenizer is one file or folder",
            "--tokenizer-type and --tokenizer-model",
        ),
        "--rotary-scaling-factor": ("has another name", "--rope-scaling-factor"),
        "--data-cache-path": ("nothing is cached on disk", "leave the flag out"),
        "--num-workers": ("rows are cut in the process itself", "leave the flag out"),
        "--reset-position-ids": ("belongs to the mask of documents", "--document-mask"),
        "--reset-attention-mask": ("belongs to the mask of documents", "--document-mask"),
        "--eod-mask-loss": ("belongs to the mask of documents", "--document-mask"),
        "--no-create-attention-mask-in-dataloader": ("no dense mask is ever made", _ALWAYS_ON),
        # checkpoints and logs
        "--ckpt-format": ("there is one format: safetensors shards and a manifest", _ALWAYS_ON),
        "--use-dist-ckpt": ("checkpoints are always distributed", _ALWAYS_ON),
        "--use-checkpoint-args": ("--load always reads the run's config.yaml", _ALWAYS_ON),
        "--no-load-optim": ("a run goes on with its optimizer", "leave the flag out"),
        "--no-load-rng": ("random numbers are a function of seed and step", "--seed"),
        "--finetune": ("a run goes on from its step", "--load with a larger --train-iters"),
        "--override-opt-param-scheduler": ("flags always override what --load brings", _ALWAYS_ON),
        "--tensorboard-dir": ("events lie in the run's folder", "--save"),
        "--use-pytorch-profiler": ("the profiler is always PyTorch's", "--profile"),
        "--pytorch-profiler-collect-callstack": (
            "the parts of a step have names in the trace",
            "--profile",
        ),
        "--record-memory-history": ("the trace can tell of memory", "--profile --profile-memory"),
        "--memory-snapshot-path": ("the trace can tell of memory", "--profile --profile-memory"),
        "--log-throughput": ("tokens per second are always logged", _ALWAYS_ON),
        "--exit-interval": ("the run ends with its last step", "--train-iters"),
        "--exit-duration-in-mins": (
            "end it with Ctrl-C or SIGTERM: it saves first",
            "--train-iters",
        ),
        "--local-rank": ("torchrun's variables say it", "torchrun"),
    }
)
"""Flag -> (why it means nothing here, what to use instead)."""

FAMILIES: Mapping[str, tuple[str, str]] = MappingProxyType(
    {
        "--moe-": ("there are no mixture-of-experts models", _NOT_YET),
        "--fp8-": ("there is no FP8", "--bf16"),
        "--wandb-": (
            "a run has a project, an entity, a name and a folder there",
            "--wandb-project, --wandb-entity, --wandb-exp-name, --wandb-save-dir",
        ),
        "--mtp-": ("there is no multi-token prediction", _NOT_YET),
        "--inference-": ("this program trains", _NOT_YET),
    }
)
"""The same for whole families, by how the flag begins."""


def refuse_megatron_flag(flag: str, value: str) -> None:
    """Raises the error for a flag of Megatron that this project does not have.

    Raises:
        ConfigError: ``flag`` is one of these.
    """
    families = (answer for prefix, answer in FAMILIES.items() if flag.startswith(prefix))
    answer = MEANINGLESS.get(flag) or next(families, None)
    if answer is not None:
        rule = f"is a flag of Megatron without a meaning here: {answer[0]}"
        raise ConfigError(flag, value, rule, answer[1])
