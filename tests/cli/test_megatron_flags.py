"""Flags of Megatron-LM: taken, translated, or refused with a reason, all at once."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import pytest

from cp_megatron.cli.megatron_answers import Noted, OneOf, Refused, Renamed, Translated
from cp_megatron.cli.megatron_flags import SPECIAL, answers
from cp_megatron.cli.megatron_names import NOTED, WITHOUT_COUNTERPART
from cp_megatron.cli.parse import Arguments, LaunchOptions, parse_arguments
from cp_megatron.cli.programs import EVALUATE
from cp_megatron.config.fields import settings, settings_of
from cp_megatron.config.files.yaml_io import to_yaml
from cp_megatron.errors import CombinedError, ConfigError

SIZES = "--num-layers 40 --hidden-size 5120 --num-attention-heads 40"
KNOWN = {row.flag for row in [*settings().values(), *settings_of(LaunchOptions)]}
KNOWN |= {row.off_flag for row in settings().values() if row.kind == "bool"}
ALIASES = {"--layernorm-epsilon", "--pipeline-model-parallel-size"}


def read(line: str) -> Arguments:
    return parse_arguments(line.split())


def refusals(line: str) -> list[ConfigError]:
    with pytest.raises(ConfigError) as caught:
        read(line)
    error = caught.value
    return list(error.errors) if isinstance(error, CombinedError) else [error]


# --- the tables


def test_a_name_has_one_answer_and_is_no_flag_of_ours() -> None:
    names = [name.rstrip("=") for text in NOTED.values() for name in text.split()]
    names += [name for text in WITHOUT_COUNTERPART.values() for name in text.split()]
    names += [flag[2:] for flag in SPECIAL]
    assert len(names) == len(set(names))
    assert len(names) > 550
    assert not KNOWN & answers().keys()


def test_what_an_answer_recommends_exists() -> None:
    programs = {"--json-keys"}
    texts = [answer.works for answer in answers().values() if isinstance(answer, OneOf | Refused)]
    texts += [answer.flag for answer in answers().values() if isinstance(answer, Renamed)]
    texts += [answer.words for answer in answers().values() if isinstance(answer, Translated)]
    for answer in answers().values():
        texts += answer.values.values() if isinstance(answer, OneOf) else []
    words = {word.strip(",") for text in texts for word in text.split()}
    recommended = {word for word in words if word.startswith("--")}
    assert recommended <= KNOWN | programs | answers().keys()
    assert len(recommended) > 20


@pytest.mark.parametrize(
    "flag", [flag for flag, answer in answers().items() if isinstance(answer, Refused)]
)
def test_what_is_refused_is_known_as_megatrons(flag: str) -> None:
    (error,) = refusals(f"{flag} 7")
    assert (error.flag, error.value) == (flag, "7")
    assert error.rule.startswith("is a Megatron-LM flag that is not supported: ")
    assert error.works


@pytest.mark.parametrize(
    ("flag", "answer"),
    [(flag, answer) for flag, answer in answers().items() if isinstance(answer, Noted)],
)
def test_what_has_no_effect_is_taken_with_its_words(flag: str, answer: Noted) -> None:
    plain = read("--seed 3")
    line = f"{flag} 5 6 --seed 3" if answer.has_values else f"{flag} --seed 3"
    taken = read(line)
    assert (taken.config, taken.given) == (plain.config, plain.given)
    (note,) = taken.notes
    assert note.endswith(f": {flag}")
    if answer.has_values is None:
        assert read(f"{flag} 5").notes == taken.notes
    else:
        wrong = flag if answer.has_values else f"{flag} 5"
        assert refusals(wrong)[0].flag == flag


def test_a_family_of_flags_has_one_answer() -> None:
    (note,) = read("--mtp-use-repeated-layer --mtp-x 2 --inference-max-requests 8").notes
    assert note.endswith("--mtp-use-repeated-layer, --mtp-x, --inference-max-requests")
    assert [error.flag for error in refusals("--rl-x 3 --moex 3 --moe 3")] == [
        "--rl-x",
        "--moex",
        "--moe",
    ]


# --- the flags that the public command lines have, from the most frequent on

FREQUENT: Mapping[str, str] = {
    "--pipeline-model-parallel-size 1": "",
    "--pipeline-model-parallel-size 4": "--pipeline-parallel-size 4",
    "--num-layers 40 --pipeline-parallel-size 4 --num-layers-per-virtual-pipeline-stage 5": (
        "--num-layers 40 --pipeline-parallel-size 4 --num-virtual-stages-per-pipeline-rank 2"
    ),
    "--pipeline-model-parallel-size 41 --num-layers-per-virtual-pipeline-stage 1"
    " --account-for-embedding-in-pipeline-split": (
        "--pipeline-parallel-size 41 --num-virtual-stages-per-pipeline-rank 1"
    ),
    "--num-layers 40 --pipeline-model-parallel-size 4 --decoder-first-pipeline-num-layers 11"
    " --decoder-last-pipeline-num-layers 9": (
        "--num-layers 40 --pipeline-parallel-size 4"
        " --pipeline-model-parallel-layout Et*11|t*10|t*10|t*9L"
    ),
    "--num-layers 40 --pipeline-model-parallel-size 4 --decoder-last-pipeline-num-layers 7": (
        "--num-layers 40 --pipeline-parallel-size 4"
        " --pipeline-model-parallel-layout Et*11|t*11|t*11|t*7L"
    ),
    "--account-for-loss-in-pipeline-split --overlap-p2p-communication-warmup-flush": "",
    "--use-distributed-optimizer": "",
    "--transformer-impl transformer_engine": "",
    "--transformer-impl local": "",
    "--use-mcore-models": "",
    "--group-query-attention --num-query-groups 8": "--num-query-groups 8",
    "--group-query-attention": "--num-query-groups 1",
    "--tensorboard-dir logs/x": "",
    "--ckpt-format torch_dist": "",
    "--overlap-grad-reduce": "",
    "--log-throughput": "",
    "--attention-softmax-in-fp32": "",
    "--data-cache-path /tmp/cache": "",
    "--attention-backend auto": "",
    "--attention-backend flash": "",
    "--attention-backend fused": "",
    "--attention-backend unfused --kernel cpu": "--kernel cpu",
    "--attention-backend unfused": "--kernel reference",
    "--overlap-param-gather": "",
    "--distributed-backend nccl": "",
    "--no-gradient-accumulation-fusion": "",
    "--use-flash-attn": "",
    "--use-flash-attn true": "",
    "--use-flash-attn false": "",
    "--no-load-optim": "",
    "--no-load-rng": "",
    "--finetune": "",
    "--num-workers 8": "",
    "--use-rotary-position-embeddings": "--position-embedding-type rope",
    "--use-rotary-position-embeddings --no-position-embedding": "--position-embedding-type rope",
    "--position-embedding-type rope --no-position-embedding": "--position-embedding-type rope",
    "--no-position-embedding": "--position-embedding-type none",
    "--optimizer adam": "",
    "--optimizer AdamW": "",
    "--optimizer dist_muon": "--optimizer muon",
    "--optimizer muon --muon-use-nesterov": "--optimizer muon --muon-nesterov",
    "--optimizer muon --muon-no-nesterov": "--optimizer muon --no-muon-nesterov",
    "--muon-tp-mode duplicated": "",
    "--muon-fp32-matmul-prec medium": "",
    "--muon-use-syrk": "",
    "--no-create-attention-mask-in-dataloader": "",
    "--cross-entropy-loss-fusion": "",
    "--calculate-per-token-loss": "",
    "--fp8-param-gather": "",
    "--fp8-amax-compute-algo max": "",
    "--fp8-amax-history-len 1024": "",
    "--recompute-activations": "--recompute-granularity selective",
    "--recompute-granularity full --recompute-method block --recompute-num-layers 4": (
        "--recompute-granularity full --recompute-num-layers 4"
    ),
    "--recompute-granularity full --recompute-method uniform --recompute-num-layers 1": (
        "--recompute-granularity full"
    ),
    "--moe-grouped-gemm --moe-permute-fusion --moe-router-fusion": "",
    "--expert-tensor-parallel-size 1": "",
    "--num-experts 8 --moe-layer-freq ([0]*3+[1]*37) --num-layers 40": (
        f"--num-experts 8 --moe-layers {' '.join(map(str, range(3, 40)))}"
    ),
    "--linear-attention-freq ([1]*3+[0]*1)*10 --num-layers 40": (
        f"--linear-attention-layers {' '.join(str(n) for n in range(40) if n % 4 < 3)}"
    ),
    "--moe-token-dispatcher-type alltoall": "",
    "--expert-model-parallel-size 1": "",
    "--tp-comm-overlap": "",
    "--use-megatron-fsdp": "",
    "--no-masked-softmax-fusion": "",
    "--log-validation-ppl-to-tensorboard": "",
    "--log-timers-to-tensorboard": "",
    "--no-mmap-bin-files": "",
    "--timing-log-level 0": "",
    "--log-memory-to-tensorboard": "",
    "--use-persistent-ckpt-worker": "",
    "--initial-loss-scale 65536": "",
    "--padded-vocab-size 32000": "",
    "--tensorboard-queue-size 5": "",
    "--no-save-optim": "",
    "--context-parallel-algo megatron_cp_algo": "--cp-comm-type p2p",
    "--context-parallel-algo ulysses_cp_algo": "--cp-comm-type a2a",
    "--tokenizer-name-or-path /models/x": "--tokenizer-model /models/x",
    "--use-fused-rotary-pos-emb": "",
    "--use-fused-swiglu": "",
    "--use-fused-rmsnorm": "",
    "--dist-ckpt-strictness log_all": "",
    "--manual-gc": "",
    "--attention-mask-type causal": "",
    # less frequent
    "--layernorm-epsilon 1e-6": "--norm-epsilon 1e-6",
    "--rotary-scaling-factor 2": "--rope-scaling-factor 2",
    "--rotary-seq-len-interpolation-factor 4": "--rope-type linear --rope-scaling-factor 4",
    "--use-rope-scaling": (
        "--rope-type llama3 --rope-scaling-factor 8 --original-max-position-embeddings 8192"
    ),
    "--use-rope-scaling --rope-scaling-factor 32": (
        "--rope-type llama3 --rope-scaling-factor 32 --original-max-position-embeddings 8192"
    ),
    "--reset-position-ids --reset-attention-mask": "--document-mask",
    "--reset-position-ids --reset-attention-mask --eod-mask-loss": "--document-mask",
    "--eod-mask-loss --document-mask": "--document-mask",
    "--position-embedding-type learned_absolute --use-rotary-position-embeddings": (
        "--position-embedding-type rope"
    ),
    "--encoder-seq-length 512 --encoder-num-layers 40": "--seq-length 512",
    "--rope-type rope": "",
    "--use-mcore-models --use-mcore-models": "",
}


@pytest.mark.parametrize(("line", "meaning"), FREQUENT.items())
def test_a_frequent_flag_means_what_it_says(line: str, meaning: str) -> None:
    found, expected = read(f"{SIZES} {line}"), read(f"{SIZES} {meaning}")
    assert found.config == expected.config
    foreign = {word for word in line.split() if word.startswith("--")} - KNOWN
    is_computed = "[" in line or "num-layers-per" in line or "--decoder-" in line
    silent = line.endswith("false") or (foreign <= ALIASES and not is_computed)
    assert (len(found.notes) > len(expected.notes)) == (not silent)


STAGES = "--num-layers 40 --pipeline-model-parallel-size"
_WEIGHTS_ONLY = "launch/convert.py --load RUN --output DIR, then --load-hf DIR"


@pytest.mark.parametrize(
    ("line", "works"),
    [
        ("--num-layers-per-virtual-pipeline-stage 5", "--num-layers and"),
        (f"{STAGES} 3 --num-layers-per-virtual-pipeline-stage 5", "--num-virtual-stages-per"),
        (f"{STAGES} 1 --decoder-first-pipeline-num-layers 5", "leave it out"),
        (f"{STAGES} 4 --decoder-first-pipeline-num-layers 9", "--pipeline-model-parallel-layout"),
        (f"{STAGES} 2 --decoder-last-pipeline-num-layers 0", "--pipeline-model-parallel-layout"),
        (
            f"{STAGES} 4 --decoder-first-pipeline-num-layers 10"
            " --num-virtual-stages-per-pipeline-rank 2",
            "--pipeline-model-parallel-layout",
        ),
        (f"{STAGES} 4 --standalone-embedding-stage", "--pipeline-model-parallel-layout"),
        ("--encoder-pipeline-model-parallel-size 2", "leave the flag out"),
        ("--optimizer sgd", "adam, muon"),
        ("--squared-relu", "--swiglu"),
        ("--muon-tp-mode blockwise", "--muon-tp-mode duplicated"),
        ("--muon-no-split-qkv", "leave the flag out"),
        ("--muon-coefficient-type cans", "simple, quintic, polar_express"),
        ("--fp8-format hybrid", "--bf16"),
        ("--moe-expert-capacity-factor 1.25", "leave the flag out"),
        ("--moe-router-load-balancing-type sinkhorn", "seq_aux_loss, or none with"),
        ("--moe-router-load-balancing-type global_aux_loss", "seq_aux_loss, or aux_loss"),
        ("--expert-tensor-parallel-size 2", "--expert-tensor-parallel-size 1"),
        ("--moe-layer-freq [1,0,1]", "--num-layers 3 with it"),
        ("--moe-layer-freq [1,0,2] --num-layers 3", "([0]*3+[1]*58)"),
        ("--moe-layer-freq [[1]] --num-layers 1", "([0]*3+[1]*58)"),
        ("--moe-layer-freq [1]*9999*9999 --num-layers 1", "([0]*3+[1]*58)"),
        ("--moe-layer-freq [1]*(1+1) --num-layers 3", "--num-layers 2"),
        ("--moe-layer-freq [0]*3 --num-layers 3", "leave the flag out"),
        ("--decoupled-lr 1e-4", "--lr"),
        ("--fp16", "--bf16"),
        ("--load x --no-load-optim", _WEIGHTS_ONLY),
        ("--load x --finetune", _WEIGHTS_ONLY),
        ("--load x --save x --exit-on-missing-checkpoint", "--load without --save"),
        ("--tokenizer-name-or-path x --tokenizer-model y", "--tokenizer-model"),
        ("--eod-mask-loss", "--document-mask"),
        ("--window-attn-skip-freq 4", "--window-layers"),
        ("--ckpt-convert-format torch", "leave the flag out"),
        ("--reset-position-ids", "--document-mask"),
        ("--attention-mask-type general", "--document-mask"),
        ("--ckpt-step 100", "--load RUN/step-N"),
        ("--optimizer", "adam, muon"),
        ("--use-mcore-models 5", "--use-mcore-models"),
    ],
)
def test_what_would_change_the_result_is_refused(line: str, works: str) -> None:
    error = next(error for error in refusals(line) if error.flag != "--load")
    assert error.flag in line
    assert error.works.startswith(works)


def test_notes_are_two_lines() -> None:
    line = "--use-mcore-models --num-workers 8 --recompute-activations --tensorboard-dir x"
    taken, translated, defaults = read(f"{SIZES} {line}").notes
    assert taken.endswith(": --use-mcore-models, --num-workers, --tensorboard-dir")
    assert translated.endswith(": --recompute-activations as --recompute-granularity selective")
    assert "dropout is 0 where Megatron-LM's is 0.1" in defaults
    said = read(f"{SIZES} --hidden-dropout 0.1 --attention-dropout 0")
    assert "dropout" not in said.notes[-1]


def test_another_program_refuses_what_it_does_not_read() -> None:
    with pytest.raises(ConfigError, match=r"--use-mcore-models: has no effect on evaluate\.py"):
        parse_arguments(["--use-mcore-models"], program=EVALUATE)


# --- all at once


def test_all_mistakes_are_told_in_their_order() -> None:
    line = "--moe-latent-size 8 --lr x --foo --seq-length 0 --bf16 maybe --lr 3 --use-mcore-models"
    errors = refusals(f"{line} --optimizer sgd")
    flags = ["--moe-latent-size", "--lr", "--foo", "--seq-length", "--bf16", "--optimizer"]
    assert [error.flag for error in errors] == flags


# --- the defaults of a model of one's own


def test_a_line_without_groups_has_one_group_a_head() -> None:
    config = read(f"{SIZES} --seq-length 2048").config
    model, optimizer = config.model, config.optimizer
    assert (config.preset, model.num_kv_heads, model.ffn_size) == ("megatron", 40, 20480)
    assert (model.normalization, model.position_embedding_type) == (
        "LayerNorm",
        "learned_absolute",
    )
    off = (model.swiglu, model.disable_bias_linear, model.untie_embeddings_and_output_weights)
    assert not any(off)
    assert (optimizer.lr_warmup_iters, optimizer.lr_decay_style) == (0, "linear")
    assert (optimizer.weight_decay, optimizer.adam_beta1, optimizer.adam_beta2) == (
        0.01,
        0.9,
        0.999,
    )
    assert (model.init_method_std, optimizer.adam_eps, optimizer.clip_grad) == (0.02, 1e-8, 1.0)


@pytest.mark.parametrize(
    ("line", "missing"),
    [
        ("--hidden-size 64", "--num-layers --num-attention-heads"),
        ("--swiglu", "--num-layers --hidden-size --num-attention-heads"),
        ("--preset megatron", "--num-layers --hidden-size --num-attention-heads"),
        ("--vocab-size 300 --num-layers 2", "--hidden-size --num-attention-heads"),
    ],
)
def test_sizes_without_a_default_are_required_together(line: str, missing: str) -> None:
    (error,) = refusals(line)
    assert error.flag == missing
    assert "--preset toy" in error.works


def test_a_preset_or_a_file_says_otherwise(
    tmp_path_factory: pytest.TempPathFactory,
) -> None:
    assert read("--preset toy --num-layers 3").config.model.num_query_groups == 2
    assert read("--lr 1e-3").config.preset == "toy"
    file = tmp_path_factory.mktemp("files") / "model.yaml"
    file.write_text("model: {num_layers: 3, hidden_size: 64, num_attention_heads: 8}\n")
    config = read(f"--config {file}").config
    assert (config.preset, config.model.num_kv_heads) == ("megatron", 8)
    file.write_text("preset: toy\nmodel: {num_layers: 3}\n")
    assert read(f"--config {file}").config.model.num_query_groups == 2


def test_a_run_with_the_defaults_continues_with_them(tmp_path: Path) -> None:
    begun = read(f"{SIZES} --recompute-activations").config
    (tmp_path / "config.yaml").write_text(to_yaml(begun))
    loaded = read(f"--load {tmp_path} --use-flash-attn")
    assert loaded.config.model == begun.model
    assert (loaded.config.optimizer, loaded.config.preset) == (begun.optimizer, "megatron")
    assert len(loaded.notes) == 1
