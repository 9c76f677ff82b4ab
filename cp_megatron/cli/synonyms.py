"""Answers flags of other trainers by their meaning, with the flag that is used here.

A flag of another trainer is not accepted, because its value may have another unit; the error names
what to use.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from cp_megatron.errors import ConfigError

_BATCH = "--global-batch-size: micro batch x data parallel ranks x accumulated micro batches"
_SHARDED = "nothing: weights, gradients and optimizer state are sharded over the ranks of a copy"
_SELECTIVE = "--recompute-granularity selective or full"
_TENSORBOARD = "nothing: TensorBoard events are written to the folder of --save"
_WARMUP = "--lr-warmup-iters"
_CHUNKS = "--num-virtual-stages-per-pipeline-rank"
_LAYOUT = "--pipeline-model-parallel-layout, such as Et*4|t*4L; by default stages take equally long"
_ROWS = "nothing: rows are cut in the process itself"

SYNONYMS: Mapping[str, Mapping[str, str]] = {
    "transformers or TRL": {
        "learning_rate": "--lr",
        "lr_scheduler_type": "--lr-decay-style",
        "warmup_steps": _WARMUP,
        "warmup_ratio": "--lr-warmup-fraction",
        "adam_epsilon": "--adam-eps",
        "max_grad_norm": "--clip-grad",
        "per_device_train_batch_size": "--micro-batch-size",
        "per_gpu_train_batch_size": "--micro-batch-size",
        "train_batch_size": "--global-batch-size",
        "per_device_eval_batch_size": "--micro-batch-size",
        "gradient_accumulation_steps": _BATCH,
        "num_train_epochs": "--train-epochs",
        "max_steps": "--train-iters",
        "max_seq_length": "--seq-length",
        "max_seq_len": "--seq-length",
        "max_length": "--seq-length",
        "block_size": "--seq-length",
        "model_max_length": "--seq-length",
        "gradient_checkpointing": _SELECTIVE,
        "output_dir": "--save",
        "overwrite_output_dir": "--save with a new folder: nothing is ever overwritten",
        "model_name_or_path": "--load-hf DIR, the folder of the model on this machine",
        "config_name": "--load-hf DIR, the folder of the model on this machine",
        "tokenizer_name": "--tokenizer-type huggingface --tokenizer-model DIR",
        "resume_from_checkpoint": "--load RUN, or --load auto with --save RUN",
        "save_steps": "--save-interval",
        "save_total_limit": "--keep-latest-k",
        "save_strategy": "--save-interval",
        "eval_steps": "--eval-interval",
        "eval_strategy": "--eval-interval",
        "evaluation_strategy": "--eval-interval",
        "max_eval_samples": "--eval-iters",
        "logging_steps": "--log-interval",
        "logging_dir": _TENSORBOARD,
        "report_to": "--wandb-project; TensorBoard events are always written",
        "run_name": "--wandb-exp-name",
        "data_seed": "--seed",
        "tf32": "--dtype",
        "torch_dtype": "--dtype",
        "attn_implementation": "--kernel",
        "use_flash_attention_2": "--kernel",
        "torch_compile": "--compile",
        "optim": "--optimizer adam, or muon",
        "dataloader_num_workers": _ROWS,
        "remove_unused_columns": _ROWS,
        "dataset_name": "--data-path FILE or FOLDER on this machine",
        "dataset_path": "--data-path",
        "train_file": "--train-data-path",
        "validation_file": "--valid-data-path",
        "dataset_text_field": "--json-keys of launch/prepare_data.py",
        "assistant_only_loss": "--sft",
        "completion_only_loss": "--sft",
        "sliding_window": "--window-size LEFT 0, with LEFT one less",
        "num_hidden_layers": "--num-layers",
        "intermediate_size": "--ffn-hidden-size",
        "num_key_value_heads": "--num-query-groups",
        "rms_norm_eps": "--norm-epsilon",
        "rope_theta": "--rotary-base",
        "num_local_experts": "--num-experts",
        "n_routed_experts": "--num-experts",
        "num_experts_per_tok": "--moe-router-topk",
        "moe_intermediate_size": "--moe-ffn-hidden-size",
        "shared_expert_intermediate_size": "--moe-shared-expert-intermediate-size",
        "norm_topk_prob": "--moe-router-pre-softmax, which is the opposite",
        "routed_scaling_factor": "--moe-router-topk-scaling-factor",
        "router_aux_loss_coef": "--moe-aux-loss-coeff with --moe-router-load-balancing-type",
        "experts_implementation": "nothing: experts run in one grouped product",
        "tie_word_embeddings": "--no-untie-embeddings-and-output-weights",
        "ddp_timeout": "--distributed-timeout-minutes, in minutes",
        "fsdp": _SHARDED,
        "fsdp_config": _SHARDED,
        "do_train": "nothing: this program trains",
        "do_eval": "--eval-iters",
        "push_to_hub": "launch/convert.py, which writes a folder that transformers reads",
        "lora_r": "nothing: all weights are trained",
        "use_peft": "nothing: all weights are trained",
    },
    "torchtitan": {
        "job.config_file": "--config FILE.yaml",
        "job.dump_folder": "--save",
        "model.name": "--preset NAME or --load-hf DIR",
        "model.flavor": "--preset NAME or --load-hf DIR",
        "model.tokenizer_path": "--tokenizer-model",
        "model.hf_assets_path": "--load-hf",
        "training.seq_len": "--seq-length",
        "training.steps": "--train-iters",
        "training.local_batch_size": "--micro-batch-size",
        "training.batch_size": "--micro-batch-size",
        "training.global_batch_size": "--global-batch-size",
        "training.max_norm": "--clip-grad",
        "training.dataset": "--data-path FILE or FOLDER",
        "training.dataset_path": "--data-path",
        "training.seed": "--seed",
        "training.deterministic": "--deterministic",
        "training.mixed_precision_param": "--dtype",
        "training.compile": "--compile",
        "compile.enable": "--compile",
        "compile.components": "nothing: --compile compiles parts of layers",
        "compile.backend": "nothing: --compile uses Inductor",
        "training.data_parallel_shard_degree": _SHARDED,
        "training.context_parallel_degree": "--context-parallel-size",
        "training.tensor_parallel_degree": "--tensor-parallel-size",
        "parallelism.data_parallel_shard_degree": _SHARDED,
        "parallelism.data_parallel_replicate_degree": "--data-parallel-replicate-size",
        "parallelism.tensor_parallel_degree": "--tensor-parallel-size",
        "parallelism.context_parallel_degree": "--context-parallel-size",
        "parallelism.context_parallel_rotate_method": "--cp-comm-type",
        "parallelism.expert_parallel_degree": "--expert-model-parallel-size",
        "parallelism.expert_tensor_parallel_degree": "nothing: experts are not split over tp",
        "parallelism.pipeline_parallel_degree": "--pipeline-parallel-size",
        "parallelism.pipeline_parallel_schedule": f"{_CHUNKS} for Interleaved1F1B, or 1F1B",
        "parallelism.pipeline_parallel_microbatch_size": "--micro-batch-size",
        "parallelism.pipeline_parallel_layers_per_stage": _LAYOUT,
        "parallelism.pipeline_parallel_first_stage_less_layers": _LAYOUT,
        "parallelism.pipeline_parallel_last_stage_less_layers": _LAYOUT,
        "parallelism.pipeline_parallel_split_points": _LAYOUT,
        "parallelism.module_fqns_per_model_part": _LAYOUT,
        "parallelism.fsdp_reshard_after_forward": "--fsdp-reshard auto, always or never",
        "optimizer.name": "--optimizer",
        "optimizer.lr": "--lr",
        "optimizer.eps": "--adam-eps",
        "optimizer.beta1": "--adam-beta1",
        "optimizer.beta2": "--adam-beta2",
        "optimizer.weight_decay": "--weight-decay",
        "lr_scheduler.warmup_steps": _WARMUP,
        "lr_scheduler.decay_type": "--lr-decay-style",
        "lr_scheduler.min_lr_factor": "--min-lr: the factor times --lr",
        "activation_checkpoint.mode": _SELECTIVE,
        "checkpoint.enable": "--save-interval N; the end of a run is always saved",
        "checkpoint.enable_checkpoint": "--save-interval N; the end of a run is always saved",
        "checkpoint.folder": "--save",
        "checkpoint.interval": "--save-interval",
        "checkpoint.keep_latest_k": "--keep-latest-k",
        "checkpoint.async_mode": "--async-save or --no-async-save",
        "checkpoint.initial_load_path": "--load RUN or --load-hf DIR",
        "metrics.log_freq": "--log-interval",
        "metrics.enable_tensorboard": _TENSORBOARD,
        "metrics.enable_wandb": "--wandb-project NAME",
        "validation.freq": "--eval-interval",
        "validation.steps": "--eval-iters",
        "comm.train_timeout_seconds": "--distributed-timeout-minutes, in minutes",
        "profiling.enable_profiling": "--profile",
        "debug.deterministic": "--deterministic",
        "debug.seed": "--seed",
    },
    "DeepSpeed": {
        "deepspeed": _SHARDED,
        "deepspeed_config": _SHARDED,
        "zero_stage": _SHARDED,
        "offload": "--optimizer-cpu-offload",
        "offload_optimizer": "--optimizer-cpu-offload",
        "sequence_parallel_size": "--context-parallel-size",
        "ds_sequence_parallel_size": "--context-parallel-size",
        "train_micro_batch_size_per_gpu": "--micro-batch-size",
        "gradient_clipping": "--clip-grad",
        "pipe_parallel_size": "--pipeline-parallel-size",
        "ep_world_size": "--expert-model-parallel-size",
        "moe_expert_parallel_size": "--expert-model-parallel-size",
        "noisy_gate_policy": "nothing: the router reads its input without noise",
        "deepspeed_activation_checkpointing": _SELECTIVE,
    },
    "another trainer": {
        "cp": "--context-parallel-size",
        "cp_size": "--context-parallel-size",
        "tp": "--tensor-parallel-size",
        "tp_size": "--tensor-parallel-size",
        "tensor_parallel": "--tensor-parallel-size",
        "context_parallel": "--context-parallel-size",
        "ep": "--expert-model-parallel-size",
        "ep_size": "--expert-model-parallel-size",
        "expert_parallel_size": "--expert-model-parallel-size",
        "expert_model_parallel_degree": "--expert-model-parallel-size",
        "dp": "nothing: the ranks that tp, cp and pp leave are data parallel",
        "dp_size": "nothing: the ranks that tp, cp and pp leave are data parallel",
        "data_parallel_size": "nothing: the ranks that tp, cp and pp leave are data parallel",
        "pp": "--pipeline-parallel-size",
        "pp_size": "--pipeline-parallel-size",
        "pipeline_parallel_degree": "--pipeline-parallel-size",
        "virtual_pipeline_model_parallel_size": _CHUNKS,
        "sp": "--sequence-parallel, or --context-parallel-size",
        "ulysses_degree": "--context-parallel-size with --cp-comm-type a2a",
        "ring_degree": "--context-parallel-size with --cp-comm-type p2p",
        "batch_size": "--global-batch-size or --micro-batch-size",
        "model_parallel_size": "--tensor-parallel-size",
        "warmup": "--lr-warmup-fraction",
        "epochs": "--train-epochs",
        "num_epochs": "--train-epochs",
        "steps": "--train-iters",
        "context_length": "--seq-length",
        "seq_len": "--seq-length",
        "n_layers": "--num-layers",
        "n_heads": "--num-attention-heads",
        "vocab": "--vocab-size",
        "precision": "--dtype",
        "checkpoint": "--load",
        "resume": "--load RUN, or --load auto with --save RUN",
        "ckpt": "--load",
        "output": "--save",
        "data": "--data-path",
        "dataset": "--data-path",
        "model": "--preset, or --load-hf DIR",
        "activation_checkpointing": _SELECTIVE,
        "dropout": "--hidden-dropout and --attention-dropout",
    },
}
"""By trainer: the name of a flag without dashes, and what to use here."""


def refuse_synonym(flag: str, value: str) -> None:
    """Raises the error for an unknown flag that other trainers have.

    Raises:
        ConfigError: it is one of these.
    """
    name = flag.lstrip("-").replace("-", "_").lower()
    for trainer, answers in SYNONYMS.items():
        if name in answers:
            raise ConfigError(
                flag, value, f"unknown flag: it is a flag of {trainer}", answers[name]
            )


def flags_of_tables(tables: Mapping[str, Any]) -> tuple[list[str], list[str]]:
    """Translates torchtitan's settings.

    Args:
        tables: the content of a TOML file.

    Returns:
        The flags that have the same values, and the names of the other settings.
    """
    flags: list[str] = []
    others: list[str] = []
    for section, values in tables.items():
        for key, value in values.items() if isinstance(values, dict) else ():
            name = f"{section}.{key}"
            answer = SYNONYMS["torchtitan"].get(name, "")
            if answer.startswith("--") and " " not in answer and not isinstance(value, dict):
                text = f"{answer} {value}"
                if isinstance(value, bool):
                    text = answer if value else f"--no-{answer.removeprefix('--')}"
                flags.append(text)
            else:
                others.append(name)
    return flags, others
