"""The names of Megatron-LM's flags, by what this program answers to them.

They are those of Megatron-LM from 23.08 to August 2026, and of some of its forks. A name that ends
with = is followed by one or more values; the others are switches.
"""

from __future__ import annotations

from collections.abc import Mapping

NOTED: Mapping[str, str] = {
    "weights, gradients and optimizer state are always sharded over dp x cp": """
        create-all-gather-group data-parallel-sharding-strategy= DDP-impl=
        disable-strict-fsdp-dtensor-load enable-full-sharding-in-hsdp
        fsdp-db-use-persist-buf-on-alloc-fail fsdp-double-buffer fsdp-manual-registration
        init-model-with-meta-device keep-fp8-transpose-cache
        keep-fp8-transpose-cache-when-using-custom-fsdp
        megatron-fsdp-enable-fine-grained-param-gather megatron-fsdp-max-pool-double-buffer
        megatron-fsdp-version= no-strict-fsdp-dtensor-load no-use-layer-wise-param-layout
        num-distributed-optimizer-instances= outer-dp-sharding-strategy=
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
    "the norms compute the same function, whatever is stored": """
        apply-layernorm-1p""",
    "softmax is always computed in float32 or more": """
        apply-query-key-layer-scaling attention-softmax-in-fp32 no-query-key-layer-scaling""",
    "the loss is always the mean over all valid tokens": """
        calculate-per-token-loss""",
    "there is one implementation, and it chooses its kernels": """
        cross-entropy-fusion-impl= cross-entropy-loss-fusion cuda-graph-impl=
        cuda-graph-modules= cuda-graph-scope= cuda-graph-warmup-steps= disable-jit-fuser
        enable-cuda-graph enable-experimental external-cuda-graph flash-attention-version=
        flash-decode fused-residual-rmsnorm inference-rng-tracker kitchen-attention-backend=
        mlp-chunks-for-prefill= mlp-chunks-for-training= no-bias-dropout-fusion
        no-bias-gelu-fusion no-bias-swiglu-fusion no-gradient-accumulation-fusion
        no-initialization no-masked-softmax-fusion no-persist-layer-norm no-rope-fusion
        onnx-safe= optimizer-cuda-graph te-rng-tracker transformer-impl=
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
        flight-recorder-trace-buffer-size= inference-logging-step-interval=
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
        disable-manual-gc-eval enable-ft-package exit-signal= exit-signal-handler
        exit-signal-handler-for-dataloader exit-signal-handler-for-training
        ft-num-warmup-iters= gpu-sniff-test-interval= inprocess-active-world-size=
        inprocess-barrier-timeout= inprocess-completion-timeout= inprocess-empty-cuda-cache
        inprocess-granularity= inprocess-hard-timeout= inprocess-heartbeat-interval=
        inprocess-heartbeat-timeout= inprocess-last-call-wait= inprocess-max-iterations=
        inprocess-monitor-process-interval= inprocess-monitor-thread-interval=
        inprocess-progress-watchdog-interval= inprocess-restart inprocess-soft-timeout=
        inprocess-termination-grace-time= manual-gc manual-gc-interval=
        no-check-for-nan-in-loss-and-grad no-manual-gc-eval non-persistent-ckpt-type=
        non-persistent-global-ckpt-dir= non-persistent-local-ckpt-algo=
        non-persistent-local-ckpt-dir= replication replication-factor= replication-jump=
        rerun-mode= result-rejected-tracker-filename= train-sync-interval=""",
    "it concerns inference": """
        cache-mla-latents decode-only-cuda-graphs disable-chunked-prefill
        enable-chunked-prefill inference-batch-times-seqlen-threshold=
        inference-coordinator-port= inference-cuda-graph-all-prefills
        inference-cuda-graph-max-tokens= inference-cuda-graph-scope=
        inference-disable-ep-consensus= inference-disable-triton-nvls-kernels
        inference-dynamic-batching inference-dynamic-batching-async-sched-mode=
        inference-dynamic-batching-block-size=
        inference-dynamic-batching-buffer-guaranteed-fraction=
        inference-dynamic-batching-buffer-overflow-factor=
        inference-dynamic-batching-buffer-size-gb= inference-dynamic-batching-chunk-size=
        inference-dynamic-batching-cuda-graph-max-tokens=
        inference-dynamic-batching-cuda-graph-mixed-prefill-count=
        inference-dynamic-batching-cuda-graph-sizing-distribution=
        inference-dynamic-batching-logprobs-mode=
        inference-dynamic-batching-mamba-memory-ratio=
        inference-dynamic-batching-max-requests=
        inference-dynamic-batching-max-requests-override=
        inference-dynamic-batching-max-tokens=
        inference-dynamic-batching-max-tokens-override=
        inference-dynamic-batching-num-cuda-graphs=
        inference-dynamic-batching-paused-buffer-size-gb=
        inference-dynamic-batching-prefix-caching=
        inference-dynamic-batching-prefix-caching-coordinator-policy=
        inference-dynamic-batching-prefix-caching-eviction-policy=
        inference-dynamic-batching-prefix-caching-mamba-gb=
        inference-dynamic-batching-prefix-caching-routing-alpha=
        inference-dynamic-batching-sampling-backend=
        inference-dynamic-batching-track-generated-token-events
        inference-dynamic-batching-track-paused-request-events
        inference-dynamic-batching-unified-memory-level= inference-fuse-tp-communication
        inference-grouped-gemm-backend= inference-max-batch-size= inference-max-requests=
        inference-max-seq-length= inference-moe-disable-fused-quant-kernels
        inference-moe-token-dispatcher-type= inference-shards=
        inference-text-gen-server-logging= inference-use-synchronous-zmq-collectives=
        inference-wandb-logging= max-tokens-to-oom= num-speculative-tokens=
        output-bert-embeddings use-legacy-static-engine""",
    "it has an effect only with --num-experts": """
        ep-overlap-early-attn-memory-release expert-tensor-parallel-num-weight-shards=
        expert-tensor-parallel-size= moe-apply-probs-on-input moe-aux-loss-coeff=
        moe-combine-bwd-dtype= moe-deepep-num-sms= moe-dispatch-fwd-dtype= moe-enable-deepep
        moe-enable-routing-replay moe-expert-capacity-factor=
        moe-expert-rank-capacity-factor= moe-extended-tp moe-ffn-hidden-size=
        moe-flex-dispatcher-backend= moe-flex-dispatcher-num-sms= moe-grouped-gemm
        moe-hybridep-num-blocks-permute= moe-hybridep-num-blocks-unpermute=
        moe-hybridep-num-sms= moe-hybridep-num-sms-preprocessing=
        moe-hybridep-pad-uneven-dispatch-inputs moe-input-jitter-eps= moe-latent-size=
        moe-layer-freq= moe-layer-recompute moe-mlp-glu-interleave-size=
        moe-ncclep-static-shape moe-ncclep-zero-copy moe-pad-expert-input-to-capacity
        moe-pad-experts-for-cuda-graph-inference moe-paged-stash
        moe-paged-stash-buffer-size-factor-cpu= moe-paged-stash-buffer-size-factor-cuda=
        moe-paged-stash-page-size= moe-per-layer-logging moe-permute-fusion
        moe-permute-fusion-into-hybridep moe-router-bias-update-rate= moe-router-dtype=
        moe-router-enable-expert-bias moe-router-force-biased=
        moe-router-force-load-balancing moe-router-fusion moe-router-group-topk=
        moe-router-load-balancing-type= moe-router-num-groups= moe-router-padding-for-fp8=
        moe-router-padding-for-quantization= moe-router-pre-softmax
        moe-router-quantile-balancing-ema= moe-router-score-function= moe-router-topk=
        moe-router-topk-scaling-factor= moe-routing-trace-capture-hidden-states
        moe-routing-trace-capture-logits moe-routing-trace-dump-weights
        moe-routing-trace-max-training-iters= moe-routing-trace-path= moe-shared-expert-gate
        moe-shared-expert-glu-interleave-size= moe-shared-expert-intermediate-size=
        moe-shared-expert-overlap moe-single-grouped-bias moe-single-grouped-weight
        moe-token-dispatcher-type= moe-token-drop-policy= moe-token-dropping
        moe-upcycling-granularity= moe-use-grouped-tensor moe-use-legacy-grouped-gemm
        moe-use-upcycling moe-z-loss-coeff= save-tokens-per-expert-interval=
        use-grouped-gemm-for-shared-expert""",
    "it has an effect only with --fp8-format or --fp4-format": """
        disable-fp8-wgrad first-last-layers-bf16 fp4-param-gather fp4-quantizer-factory=
        fp4-recipe= fp8-amax-compute-algo= fp8-amax-history-len= fp8-interval= fp8-margin=
        fp8-output-proj fp8-param-gather fp8-quantizer-factory= fp8-recipe=
        kitchen-config-file= kitchen-recipe-number= no-fp8-wgrad num-layers-at-end-in-bf16=
        num-layers-at-start-in-bf16= reuse-grad-buf-for-mxfp8-param-ag
        te-precision-config-file= use-kitchen-attention""",
    "it has an effect only with --mtp-num-layers": """
        mtp-detach-heads mtp-hsm mtp-hybrid-override-pattern= mtp-loss-scaling-factor=
        mtp-standalone mtp-use-repeated-layer""",
    "it has an effect only with --multi-latent-attention": """
        kv-lora-rank= mla-down-proj-fusion q-lora-rank= qk-head-dim= qk-pos-emb-head-dim=
        v-head-dim=""",
    "it has an effect only with --pipeline-model-parallel-size above 1": """
        account-for-embedding-in-pipeline-split account-for-loss-in-pipeline-split
        decoder-first-pipeline-num-layers= decoder-last-pipeline-num-layers=
        encoder-pipeline-model-parallel-size= encoder-tensor-model-parallel-size=
        microbatch-group-size-per-virtual-pipeline-stage=
        num-layers-per-virtual-pipeline-stage= num-virtual-stages-per-pipeline-rank=
        pipeline-model-parallel-comm-backend= pipeline-model-parallel-layout=
        pipeline-model-parallel-split-rank= standalone-embedding-stage""",
    "it has an effect only with another --optimizer": """
        lion-beta1= lion-beta2= muon-coefficient-type= muon-extra-scale-factor=
        muon-fp32-matmul-prec= muon-momentum= muon-nesterov muon-no-split-qkv
        muon-num-ns-steps= muon-scalar-optimizer= muon-scale-mode= muon-tp-mode=
        muon-use-nesterov muon-use-syrk sgd-momentum=""",
    "it has an effect only with --qk-clip": """
        qk-clip-alpha= qk-clip-threshold=""",
    "it has an effect only with --decoupled-lr": """
        decoupled-min-lr=""",
    "it has an effect only with --use-mup": """
        mup-attn-scale-power= mup-base-head-dim= mup-base-hidden-size= mup-embedding-mult=
        mup-output-mult= mup-width-mult=""",
    "it has an effect only with --fim-data": """
        fim-eod-token= fim-fragment-rate= fim-middle-token= fim-no-prefix= fim-pad-token=
        fim-prefix-token= fim-rate= fim-split-sample= fim-spm-rate= fim-suffix-token=""",
}
"""Flags that are taken without an effect, by the reason. None of them changes the result."""

WITHOUT_COUNTERPART: Mapping[str, str] = {
    "this program does not train by reinforcement learning": """
        grpo-clamp-eps-lower grpo-clamp-eps-upper grpo-default-temperature
        grpo-default-top-p grpo-entropy-term-weight grpo-filter-groups-with-same-reward
        grpo-group-size grpo-iterations grpo-kl-beta grpo-prompts-per-step langrl-env-config
        langrl-external-server langrl-inference-server-conversation-template
        langrl-inference-server-type perform-rl-step refit-method
        rl-calculate-intra-group-similarity rl-consumption-granularity
        rl-default-temperature rl-default-top-k rl-default-top-p rl-durable-rollout-bank
        rl-generation-batch-size rl-generation-lag rl-importance-sampling-truncation-coef
        rl-inference-expert-model-parallel-size
        rl-inference-expert-tensor-model-parallel-size rl-inference-logprobs-is-correction
        rl-inference-model-unified-memory-level rl-inference-parsers
        rl-inference-pipeline-model-parallel-size rl-inference-tensor-model-parallel-size
        rl-kv-cache-management-mode rl-max-inflight-requests
        rl-num-parallel-generation-batches rl-num-parallel-generations
        rl-offload-inference-model-weights-when-idle rl-offload-kv-cache-during-training
        rl-offload-optimizer-during-inference rl-parallel-generation-tasks
        rl-partial-rollouts rl-persist-cuda-graphs rl-profile rl-profile-dir
        rl-prompts-per-eval rl-remove-kv-cache-during-training rl-reset-cuda-graphs
        rl-rollout-bank-dir rl-rollout-bank-max-bytes rl-sequence-packing-algo
        rl-sequence-packing-bin-size rl-sequence-packing-max-sequences-per-bin
        rl-skip-bos-token rl-submission-granularity rl-training-cuda-graphs
        rl-use-sequence-packing rl-verify-model-weights-swap""",
    "this program trains decoders of text": """
        bert-embedder-type bert-load bert-no-binary-head biencoder-projection-dim
        biencoder-shared-query-context-model block-data-path classes-fraction
        data-per-class-fraction decoder-num-layers dino-bottleneck-size
        dino-freeze-last-layer dino-head-hidden-size dino-local-crops-number
        dino-local-img-size dino-norm-last-layer dino-teacher-temp dino-warmup-teacher-temp
        dino-warmup-teacher-temp-epochs embedding-path
        evidence-data-path ict-head-size ict-load img-h img-w indexer-batch-size
        indexer-log-interval iter-per-epoch mask-factor mask-prob mask-type
        mid-level-dataset-surplus mrope-section num-channels num-classes patch-dim
        query-in-block-prob relative-attention-max-distance relative-attention-num-buckets
        retriever-report-topk-accuracies retriever-score-scaling retriever-seq-length
        retro-add-retriever retro-attention-gate retro-cyclic-train-iters
        retro-encoder-attention-dropout retro-encoder-hidden-dropout retro-encoder-layers
        retro-no-verify-neighbor-count retro-num-neighbors retro-num-retrieved-chunks
        retro-project-dir retro-return-doc-ids retro-workdir sample-rate short-seq-prob
        swin-backbone-type titles-data-path use-one-sent-docs vision-backbone-type
        vision-pretraining vision-pretraining-type""",
    "the layers are attention and a dense MLP": """
        activation-func-clamp-value attention-output-gate
        disable-dsa-indexer-rotate-activation disable-dsa-indexer-scoring-relu
        disable-mamba-mem-eff-path dsa-indexer-head-dim dsa-indexer-k-norm-epsilon
        dsa-indexer-k-norm-fp32 dsa-indexer-loss-coeff dsa-indexer-n-heads
        dsa-indexer-rope-interleaved dsa-indexer-skip-topk-offset dsa-indexer-topk
        dsa-indexer-topk-freq dsa-indexer-use-sparse-loss dsa-kernel-backend
        enable-mhc-connections experimental-attention-variant gdp-cutedsl-kernel
        gdp-num-chunk-states-to-recompute gdp-num-householder glu-linear-offset
        heterogeneous-layers-config-encoded-json heterogeneous-layers-config-path
        hybrid-attention-ratio hybrid-layer-pattern hybrid-mlp-ratio hybrid-override-pattern
        is-hybrid-model linear-attention-freq linear-conv-kernel-dim linear-key-head-dim
        linear-num-key-heads linear-num-value-heads linear-value-head-dim mamba-head-dim
        mamba-inference-conv-states-dtype mamba-inference-ssm-states-dtype mamba-num-groups
        mamba-num-heads mamba-state-dim mamba-training-ssm-states-dtype
        mhc-init-gating-factor mhc-num-residual-streams mhc-recompute-layer-num
        mhc-sinkhorn-iterations no-dsa-indexer-rotate-activation no-dsa-indexer-scoring-relu
        no-rope-freq output-logit-dtype qk-clip qk-l2-norm spec use-mup""",
    "nothing here corresponds to it": """
        allow-ambiguous-pad-tokens apply-wd-to-qk-layernorm batch-invariant-backend
        batch-invariant-mode chat-template ckpt-convert-format ckpt-convert-save
        data-parallel-random-init
        dataloader-inter-document-masking decrease-batch-size-if-needed
        disable-bf16-reduced-precision-matmul
        disable-tokenizer-sentencepiece-ignore-extra-whitespaces error-injection-rate
        error-injection-type eval-global-batch-size eval-micro-batch-size fake-process-group
        fault-injector-delay-start-iteration fault-injector-fault-delay
        fault-injector-fault-probabilities fault-injector-fault-types
        fault-injector-mtti-seconds fault-injector-num-ranks fault-injector-offset-seconds
        fault-injector-ranks fault-injector-seed fim-data freeze-all-layers full-validation
        gtp-expert-remat-nccl-ub gtp-remat-nccl-ub gtp-remat-opt-in-modules
        gtp-remat-reduce-scatter-with-fp32-accumulation iterations-to-skip
        load-model-opt-format logits-load-decode-threads logits-load-dir
        logits-load-ignore-errors logits-load-kd-loss-alpha logits-load-msc-prefetch-depth
        logits-load-prefetch-factor logits-save-dir logits-save-dtype logits-save-top-k
        logits-save-top-p logits-save-top-p-min-k max-seqlen-per-dp-cp-rank
        multiple-validation-sets
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
