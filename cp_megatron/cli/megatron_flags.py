"""Flags of Megatron-LM that are not supported: each is refused with the reason."""

from __future__ import annotations

from collections.abc import Mapping

from cp_megatron.errors import ConfigError

Answer = tuple[str, str]
"""Why a flag is not supported, and what to use instead."""

_OUT = "leave the flag out"
_ALWAYS = "leave the flag out: it is always so"
_NO_PIPELINE = ("there is no pipeline parallelism yet", _OUT)
_NO_EXPERTS = ("there are no mixture-of-experts models", _OUT)
_FSDP = ("FSDP2 over dp x cp is always used", _ALWAYS)
_MASK = ("it belongs to the mask of documents", "--document-mask")
_TRACE = ("the trace can show memory", "--profile --profile-memory")
_LLAMA3 = "--rope-type llama3 --rope-scaling-factor 8 --original-max-position-embeddings 8192"

MEANINGLESS: Mapping[str, Answer] = {
    # parallelism
    "--pipeline-model-parallel-size": _NO_PIPELINE,
    "--virtual-pipeline-model-parallel-size": _NO_PIPELINE,
    "--num-layers-per-virtual-pipeline-stage": _NO_PIPELINE,
    "--num-experts": _NO_EXPERTS,
    "--hybrid-context-parallel": ("all rows share one size", "--context-parallel-size"),
    "--use-tp-pp-dp-mapping": ("ranks are always ordered tp, then cp, then dp", _OUT),
    "--distributed-backend": ("the device decides: NCCL or gloo", "--device cuda or cpu"),
    "--tp-comm-overlap": ("it needs TransformerEngine", _OUT),
    # optimizer and gradients
    "--use-distributed-optimizer": ("its state is always sharded over dp x cp", _ALWAYS),
    "--overlap-grad-reduce": ("gradients are always reduced during backward", _ALWAYS),
    "--overlap-param-gather": ("weights are always gathered ahead of their use", _ALWAYS),
    **dict.fromkeys(("--use-torch-fsdp2", "--use-megatron-fsdp"), _FSDP),
    "--calculate-per-token-loss": ("the loss is always the mean over valid tokens", _ALWAYS),
    "--no-gradient-accumulation-fusion": ("there is no such fusion to turn off", _ALWAYS),
    "--accumulate-allreduce-grads-in-fp32": ("gradients are reduced in float32", _ALWAYS),
    "--optimizer": ("AdamW is the only optimizer", _ALWAYS),
    "--loss-scale": ("bfloat16 needs no loss scaling", _OUT),
    "--rampup-batch-size": ("the batch size never changes", "--global-batch-size"),
    "--check-weight-hash-across-dp-replicas-interval": (
        "weights are sharded over dp x cp; sums of their bits and of messages are compared",
        "--check-interval",
    ),
    # precision and kernels
    "--fp16": ("float16 needs loss scaling, which does not exist here", "--bf16"),
    "--params-dtype": ("weights are float32; the compute type is a flag", "--dtype"),
    "--use-flash-attn": ("the kernel is chosen by name", "--kernel auto or flash_attn"),
    "--attention-backend": ("the kernel is chosen by name", "--kernel"),
    "--transformer-impl": ("there is one implementation", "--kernel chooses the attention"),
    "--use-mcore-models": ("there is one implementation", _ALWAYS),
    "--attention-softmax-in-fp32": ("softmax is always in float32 or more", _ALWAYS),
    # model
    "--window-attn-skip-freq": ("layers are listed, from 0", "--window-layers 0 2 4"),
    "--group-query-attention": ("the number of groups implies it", "--num-query-groups"),
    "--use-rotary-position-embeddings": ("a type implies it", "--position-embedding-type rope"),
    "--rotary-percent": ("rope always rotates the whole head", _OUT),
    "--use-rope-scaling": ("the kind of scaling is chosen by name", _LLAMA3),
    "--rotary-scaling-factor": ("it has another name", "--rope-scaling-factor"),
    "--squared-relu": ("the MLP has GELU or SwiGLU", "--swiglu"),
    "--apply-layernorm-1p": ("the norms have a plain weight", "--normalization"),
    "--layernorm-epsilon": ("it has another name", "--norm-epsilon"),
    # recomputation
    "--recompute-activations": ("it has another name", "--recompute-granularity selective"),
    "--recompute-method": ("it is always Megatron's block", "--recompute-num-layers"),
    "--recompute-modules": ("the modules are fixed", "--recompute-granularity selective"),
    "--cpu-offloading-num-layers": ("every recomputed layer is moved", "--cpu-offloading"),
    "--use-cpu-initialization": ("weights are always initialized on the CPU", _ALWAYS),
    "--cross-entropy-loss-fusion": ("head and loss are always fused", _ALWAYS),
    # data
    "--mock-data": ("without --data-path, the run reads Python's own sources", _OUT),
    "--data-cache-path": ("nothing is cached on disk", _OUT),
    "--num-workers": ("rows are cut in the process itself", _OUT),
    **dict.fromkeys(("--reset-position-ids", "--reset-attention-mask", "--eod-mask-loss"), _MASK),
    "--no-create-attention-mask-in-dataloader": ("no dense mask is ever made", _ALWAYS),
    # checkpoints and logs
    "--ckpt-format": ("the only format is safetensors with a manifest", _ALWAYS),
    "--use-dist-ckpt": ("checkpoints are always distributed", _ALWAYS),
    "--use-checkpoint-args": ("--load always reads the run's config.yaml", _ALWAYS),
    "--no-load-optim": ("a run always continues with its optimizer", _OUT),
    "--no-load-rng": ("random numbers are a function of seed and step", "--seed"),
    "--finetune": ("a run continues from its step", "--load with a larger --train-iters"),
    "--override-opt-param-scheduler": ("flags always override --load", _ALWAYS),
    "--tensorboard-dir": ("events are written to the run's folder", "--save"),
    "--use-pytorch-profiler": ("the profiler is always PyTorch's", "--profile"),
    "--pytorch-profiler-collect-callstack": ("the trace names a step's parts", "--profile"),
    **dict.fromkeys(("--record-memory-history", "--memory-snapshot-path"), _TRACE),
    "--log-throughput": ("tokens per second are always logged", _ALWAYS),
    "--exit-interval": ("the run ends with its last step", "--train-iters"),
    "--exit-duration-in-mins": ("Ctrl-C and SIGTERM save and end the run", "--train-iters"),
    "--local-rank": ("torchrun sets it in the environment", "torchrun"),
}
"""Flags, each with the answer to it."""

FAMILIES: Mapping[str, Answer] = {
    **dict.fromkeys(("--moe-", "--expert-"), _NO_EXPERTS),
    "--fp8-": ("there is no FP8", "--bf16"),
    "--wandb-": (
        "a run has a project, an entity, a name and a folder in Weights & Biases",
        "--wandb-project, --wandb-entity, --wandb-exp-name, --wandb-save-dir",
    ),
    "--mtp-": ("there is no multi-token prediction", _OUT),
    "--inference-": ("this program trains", _OUT),
}
"""Beginnings of flags, each with the answer to all of them."""


def refuse_megatron_flag(flag: str, value: str) -> None:
    """Raises the error for a flag of Megatron that does not exist here.

    Raises:
        ConfigError: ``flag`` is one of these.
    """
    families = (answer for prefix, answer in FAMILIES.items() if flag.startswith(prefix))
    answer = MEANINGLESS.get(flag) or next(families, None)
    if answer is not None:
        rule = f"is a Megatron-LM flag that is not supported: {answer[0]}"
        raise ConfigError(flag, value, rule, answer[1])
