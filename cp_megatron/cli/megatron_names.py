"""The names of Megatron-LM's flags, by what this program answers to them.

They are those of Megatron-LM from 23.08 to August 2026, and of some of its forks. A name that ends
with = is followed by one or more values; the others are switches. ``mtp-*`` stands for every other
name that begins with ``mtp-``, with or without values. Those of experts are in
``megatron_experts.py``.
"""

from __future__ import annotations

from collections.abc import Mapping

NOTED: Mapping[str, str] = {
    "weights, gradients and optimizer state are sharded over the ranks of a copy": """
        create-all-gather-group data-parallel-sharding-strategy= DDP-impl=
        disable-strict-fsdp-dtensor-load enable-full-sharding-in-hsdp
        fsdp-db-use-persist-buf-on-alloc-fail fsdp-double-buffer fsdp-manual-registration
        init-model-with-meta-device keep-fp8-transpose-cache
        keep-fp8-transpose-cache-when-using-custom-fsdp
        megatron-fsdp-enable-fine-grained-param-gather megatron-fsdp-max-pool-double-buffer
        megatron-fsdp-version= no-strict-fsdp-dtensor-load no-use-layer-wise-param-layout
        outer-dp-sharding-strategy=
        suggested-communication-unit-size= torch-fsdp2-no-reshard-after-forward
        use-custom-fsdp use-distributed-optimizer use-megatron-fsdp
        use-precision-aware-optimizer use-torch-fsdp2""",
    "gradients are always reduced in float32, and weights are float32": """
        accumulate-allreduce-grads-in-fp32 embedding-weights-in-fp32 grad-reduce-in-bf16
        megatron-fsdp-grad-comm-dtype= megatron-fsdp-main-grads-dtype=
        megatron-fsdp-main-params-dtype=""",
    "messages are chosen and overlapped by this program": """
        ddp-average-in-collective ddp-bucket-size= ddp-num-buckets=
        ddp-pad-buckets-for-high-nccl-busbw
        ddp-param-name-patterns-for-fp32-local-accumulation=
        ddp-reduce-scatter-with-fp32-accumulation delay-offload-until-cuda-graph
        delay-param-gather delay-wgrad-compute disable-align-grad-reduce
        disable-async-tensor-model-parallel-allreduce
        disable-clone-scatter-output-in-embedding disable-gloo-process-groups
        disable-symmetric-registration disable-tp-comm-bulk-dgrad disable-tp-comm-bulk-wgrad
        disable-tp-comm-overlap-ag disable-tp-comm-overlap-rs disable-tp-comm-split-ag
        disable-tp-comm-split-rs distribute-saved-activations= distributed-backend=
        distributed-timeout-seconds-after-init= high-priority-a2a-comm-stream
        high-priority-stream-groups= lazy-mpu-init local-rank= local_rank=
        nccl-all-reduce-for-prefill nccl-communicator-config-path= no-align-grad-reduce
        no-align-param-gather no-async-tensor-model-parallel-allreduce
        no-clone-scatter-output-in-embedding no-contiguous-buffers-in-local-ddp
        no-delay-grad-reduce no-gradient-reduce-div-fusion no-overlap-p2p-communication
        no-scatter-gather-tensors-in-pipeline no-tp-comm-bulk-dgrad no-tp-comm-bulk-wgrad
        no-tp-comm-overlap-ag no-tp-comm-overlap-rs no-tp-comm-split-ag no-tp-comm-split-rs
        overlap-cpu-optimizer-d2h-h2d overlap-dispatch-backward-with-experts-wgrad
        overlap-grad-reduce overlap-moe-expert-parallel-comm overlap-p2p-communication
        overlap-p2p-communication-warmup-flush overlap-param-gather
        overlap-param-gather-with-optimizer-step sharp-enabled-group= symmetric-ar-type=
        tp-comm-bootstrap-backend= tp-comm-overlap tp-comm-overlap-cfg=
        tp-comm-overlap-rs-dgrad use-nccl-ub use-ring-exchange-p2p use-sharp
        use-tp-pp-dp-mapping""",
    "softmax is always computed in float32 or more": """
        apply-query-key-layer-scaling attention-softmax-in-fp32 no-query-key-layer-scaling""",
    "the loss is always the mean over all valid tokens": """
        calculate-per-token-loss""",
    "there is one implementation, and it chooses its kernels": """
        cross-entropy-fusion-impl= cross-entropy-loss-fusion cuda-graph-impl=
        cuda-graph-modules= cuda-graph-scope= cuda-graph-warmup-steps= disable-jit-fuser
        enable-cuda-graph enable-experimental external-cuda-graph flash-attention-version=
        flash-decode fused-residual-rmsnorm kitchen-attention-backend= mla-down-proj-fusion
        mlp-chunks-for-prefill= mlp-chunks-for-training= no-bias-dropout-fusion
        no-bias-gelu-fusion no-bias-swiglu-fusion no-gradient-accumulation-fusion
        no-initialization no-masked-softmax-fusion no-persist-layer-norm no-rope-fusion
        muon-use-syrk onnx-safe= optimizer-cuda-graph te-rng-tracker transformer-impl=
        use-cpu-initialization use-flash-attn use-fused-rmsnorm use-fused-rotary-pos-emb
        use-fused-swiglu use-fused-weighted-squared-relu use-grouped-gemm-for-dense-mlp
        use-legacy-models use-mcore-models use-te-activation-func
        use-transformer-engine-op-fuser""",
    "padding of the vocabulary is never predicted": """
        disable-pad-vocab-size no-pad-vocab-size padded-vocab-size=""",
    "no dense mask is ever made": """
        no-create-attention-mask-in-dataloader""",
    "memory is saved with the flags of launch/README.md, Memory": """
        activation-offload-fraction= cpu-offloading-num-layers=
        cpu-offloading-retain-pinned-cpu-buffers defer-embedding-wgrad-compute
        delta-offload-bytes-across-pp-ranks= empty-unused-memory-level=
        fine-grained-activation-offloading fine-grained-offloading-max-inflight-offloads=
        min-offloaded-tensor-size= no-pin-cpu-grads no-pin-cpu-params offload-modules=
        optimizer-offload-fraction= recompute-modules= use-torch-optimizer-for-cpu-offload
        wgrad-deferral-limit=""",
    "reports go to the run's folder, as metrics.jsonl and TensorBoard events": """
        app-tag-run-name= app-tag-run-version= config-logger-dir=
        disable-flight-recorder-dump-on-timeout disable-flight-recorder-extra-dump-on-exec
        disable-flight-recorder-include-only-active disable-log-loss-scale-to-tensorboard
        disable-straggler-on-startup dump-param-to-param-group-map= enable-one-logger
        flight-recorder-dump-path= flight-recorder-include-stack-trace
        flight-recorder-trace-buffer-size=
        log-batch-size-to-tensorboard log-device-memory-used log-energy log-grad-norm
        log-max-attention-logit log-memory-interval= log-memory-to-tensorboard
        log-progress log-throughput log-timers-to-tensorboard
        log-validation-ppl-to-tensorboard log-world-size-to-tensorboard logging-level=
        no-barrier-with-level-1-timing no-flight-recorder-dump-on-timeout
        no-flight-recorder-extra-dump-on-exec no-flight-recorder-include-only-active
        no-log-learnig-rate-to-tensorboard no-log-loss-scale-to-tensorboard no-one-logger
        nvtx-ranges one-logger-async one-logger-entity= one-logger-project=
        one-logger-run-name= otel-enabled otel-service-name= otel-span-groups=
        pytorch-profiler-collect-callstack pytorch-profiler-collect-chakra record-shapes
        run-workload-inspector-server straggler-ctrlr-port= straggler-minmax-count=
        tensorboard-dir= tensorboard-log-interval= tensorboard-queue-size= timing-log-level=
        timing-log-option= use-pytorch-profiler""",
    "bfloat16 needs no loss scaling": """
        fp16-lm-cross-entropy hysteresis= initial-loss-scale= loss-scale= loss-scale-window=
        min-loss-scale=""",
    "a checkpoint is always whole: safetensors files and a manifest": """
        async-ckpt-cpu-priority= async-ckpt-io-priority= async-ckpt-use-cpu-shm
        async-strategy= auto-detect-ckpt-format ckpt-assume-constant-structure
        ckpt-convert-update-legacy-dist-opt-format
        ckpt-drop-redundant-extra-state ckpt-format= ckpt-fully-parallel-load
        ckpt-fully-parallel-load-exchange-algo= ckpt-fully-parallel-load-per-rank-objects
        ckpt-fully-parallel-load-process-group= ckpt-fully-parallel-save
        ckpt-fully-parallel-save-process-group= ckpt-pg-tensors-cache-create
        ckpt-pg-tensors-cache-path= disable-ckpt-fully-parallel-save
        disable-ckpt-load-validate-sharding-integrity disable-save-tokenizer-assets
        disable-stream-ckpt-dequant disable-use-tokenizer-model-from-checkpoint-args
        dist-ckpt-format= dist-ckpt-optim-fully-reshardable dist-ckpt-save-pre-mcore-014
        dist-ckpt-strictness= dist-ckpt-workers=
        distrib-optim-fully-reshardable-mem-efficient load-main-params-from-ckpt
        no-ckpt-fully-parallel-save no-ckpt-load-validate-sharding-integrity no-load-rng
        no-save-optim no-save-rng no-save-tokenizer-assets no-stream-ckpt-dequant
        no-use-tokenizer-model-from-checkpoint-args override-opt-param-scheduler
        override-opt_param-scheduler use-checkpoint-args use-dist-ckpt
        use-mp-args-from-checkpoint-args use-persistent-ckpt-worker verify-integrity""",
    "rows are cut in the process itself, and nothing is cached on disk": """
        data-cache-path= data-impl= dataloader-defer-npy-index-mmap
        dataloader-fast-cache-load disable-msc enable-msc mmap-warmup no-data-sharding
        no-mmap-bin-files num-dataset-builder-threads= num-workers=
        object-storage-cache-path= s3-cache-path=""",
    "no code of a tokenizer's folder is executed": """
        legacy-tokenizer tokenizer-hf-use-fast trust-remote-code use-gigatoken=""",
    "the run guards itself; tests/faults/README.md has the flags": """
        adlr-autoresume adlr-autoresume-interval= calc-ft-timeouts check-for-large-grads
        check-for-spiky-loss check-weight-hash-across-dp-replicas-interval=
        disable-manual-gc-eval enable-ft-package exit-signal-handler
        exit-signal-handler-for-dataloader exit-signal-handler-for-training exit-signal=
        ft-num-warmup-iters= gpu-sniff-test-interval= inprocess-* manual-gc
        manual-gc-interval= no-check-for-nan-in-loss-and-grad no-manual-gc-eval
        non-persistent-ckpt-type= non-persistent-global-ckpt-dir=
        non-persistent-local-ckpt-algo= non-persistent-local-ckpt-dir= replication
        replication-factor= replication-jump= rerun-mode= result-rejected-tracker-filename=
        train-sync-interval=""",
    "it concerns inference": """
        cache-mla-latents decode-only-cuda-graphs disable-chunked-prefill
        enable-chunked-prefill inference-* max-tokens-to-oom= num-speculative-tokens=
        output-bert-embeddings use-legacy-static-engine""",
    "it has an effect only with --fp8-format or --fp4-format": """
        disable-fp8-wgrad first-last-layers-bf16 fp4-param-gather fp4-quantizer-factory=
        fp4-recipe= fp8-amax-compute-algo= fp8-amax-history-len= fp8-interval= fp8-margin=
        fp8-output-proj fp8-param-gather fp8-quantizer-factory= fp8-recipe=
        kitchen-config-file= kitchen-recipe-number= no-fp8-wgrad num-layers-at-end-in-bf16=
        num-layers-at-start-in-bf16= reuse-grad-buf-for-mxfp8-param-ag
        te-precision-config-file= use-kitchen-attention""",
    "it has an effect only with --mtp-num-layers": """
        mtp-*""",
    "stages share layers by cost, that of the embedding and the loss included": """
        account-for-embedding-in-pipeline-split account-for-loss-in-pipeline-split""",
    "micro batches pass through the stages in the order of 1F1B": """
        microbatch-group-size-per-virtual-pipeline-stage=
        pipeline-model-parallel-comm-backend=""",
    "it has an effect only with another --optimizer": """
        lion-beta1= lion-beta2= sgd-momentum=""",
    "it has an effect only with --qk-clip": """
        qk-clip-alpha= qk-clip-threshold=""",
    "it has an effect only with --decoupled-lr": """
        decoupled-min-lr=""",
    "it has an effect only with --use-mup": """
        mup-*""",
    "it has an effect only with --fim-data": """
        fim-*""",
}
"""Flags that are taken without an effect, by the reason. None of them changes the result."""

WITHOUT_COUNTERPART: Mapping[str, str] = {
    "this program does not train by reinforcement learning": """
        grpo-* langrl-* perform-rl-step refit-method rl-*""",
    "this program trains decoders of text": """
        bert-embedder-type bert-load bert-no-binary-head biencoder-projection-dim
        biencoder-shared-query-context-model block-data-path classes-fraction
        data-per-class-fraction decoder-num-layers dino-* embedding-path evidence-data-path
        ict-head-size ict-load img-h img-w indexer-batch-size indexer-log-interval
        iter-per-epoch mask-factor mask-prob mask-type mid-level-dataset-surplus
        mrope-section num-channels num-classes patch-dim query-in-block-prob
        relative-attention-max-distance relative-attention-num-buckets
        retriever-report-topk-accuracies retriever-score-scaling retriever-seq-length
        retro-* sample-rate short-seq-prob swin-backbone-type titles-data-path
        use-one-sent-docs vision-backbone-type vision-pretraining vision-pretraining-type""",
    "the layers are attention or a gated DeltaNet, and an MLP or a mixture of experts": """
        disable-dsa-indexer-rotate-activation disable-dsa-indexer-scoring-relu
        disable-mamba-mem-eff-path dsa-* enable-mhc-connections gdp-*
        heterogeneous-layers-config-encoded-json heterogeneous-layers-config-path
        hybrid-attention-ratio hybrid-layer-pattern hybrid-mlp-ratio hybrid-override-pattern
        is-hybrid-model mamba-* mhc-*
        no-dsa-indexer-rotate-activation no-dsa-indexer-scoring-relu output-logit-dtype
        qk-clip qk-l2-norm spec use-mup""",
    "nothing here corresponds to it": """
        allow-ambiguous-pad-tokens apply-wd-to-qk-layernorm batch-invariant-backend
        batch-invariant-mode chat-template ckpt-convert-format ckpt-convert-save
        data-parallel-random-init dataloader-inter-document-masking
        decrease-batch-size-if-needed disable-bf16-reduced-precision-matmul
        disable-tokenizer-sentencepiece-ignore-extra-whitespaces error-injection-rate
        error-injection-type eval-global-batch-size eval-micro-batch-size fake-process-group
        fault-* fim-data freeze-all-layers full-validation gtp-expert-remat-nccl-ub
        gtp-remat-nccl-ub gtp-remat-opt-in-modules
        gtp-remat-reduce-scatter-with-fp32-accumulation iterations-to-skip
        load-model-opt-format logits-* max-seqlen-per-dp-cp-rank multiple-validation-sets
        no-tokenizer-sentencepiece-ignore-extra-whitespaces no-weight-decay-cond-type
        non-persistent-save-interval null-tokenizer-eod-id null-tokenizer-pad-id
        override-ckpt-iteration per-dataset-sequences-path phase-transition-iterations
        pretrained-checkpoint renormalize-blend-weights save-activations-interval
        save-dgrads-interval save-params-interval save-wgrads-interval
        sft-tokenizer-prompt-format start-eval-at-iter step-batch-size-schedule
        tensor-parallel-num-weight-shards test-mode tiktoken-num-special-tokens
        tiktoken-pattern tiktoken-special-tokens tokenizer-hf-include-special-tokens
        tokenizer-hf-no-include-special-tokens tokenizer-hf-no-use-fast tokenizer-metadata
        tokenizer-sentencepiece-legacy tokenizer-special-tokens
        use-same-sampling-seed-across-dp-ranks validation-set-names yaml-cfg""",
}
"""Flags that are refused, by the reason."""
