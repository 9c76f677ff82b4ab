"""Whole command lines of Megatron-LM: they reach a plan, and they train."""

from __future__ import annotations

import statistics
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import pytest

from cp_megatron.cli.parse import read_arguments
from cp_megatron.comm.runtime import Launch
from cp_megatron.config.words import split_words
from cp_megatron.errors import CombinedError, ConfigError
from cp_megatron.preflight.check import check
from cp_megatron.preflight.run_plan import RunPlan
from tests.cli.megatron_lines import LINES, TRAINED, MegatronLine
from tests.data import tokenizer_files
from tests.data.test_indexed import index_bytes
from tests.ranks import run_ranks
from tests.train.checkpoints import metrics_of
from tests.train.test_loop import train

# By the number of public command lines, of 24: the flags that so many of them have.
COUNTED: Mapping[int, str] = {
    21: "pipeline-model-parallel-size",
    20: "use-distributed-optimizer",
    19: "transformer-impl",
    18: "use-mcore-models",
    17: "group-query-attention",
    15: "tensorboard-dir ckpt-format",
    14: "overlap-grad-reduce",
    13: "log-throughput attention-softmax-in-fp32",
    12: "data-cache-path attention-backend overlap-param-gather distributed-backend",
    10: """
        use-flash-attn no-gradient-accumulation-fusion no-load-optim lr-warmup-fraction
        no-masked-softmax-fusion""",
    9: "num-workers no-load-rng",
    8: """
        use-rotary-position-embeddings log-validation-ppl-to-tensorboard
        log-timers-to-tensorboard""",
    6: "rotary-percent",
    5: "optimizer vocab-file merge-file",
    4: """
        train-samples no-create-attention-mask-in-dataloader cross-entropy-loss-fusion
        calculate-per-token-loss fp8-format fp8-param-gather no-mmap-bin-files
        log-params-norm log-num-zeros-in-grad timing-log-level log-memory-to-tensorboard
        use-persistent-ckpt-worker initial-loss-scale padded-vocab-size
        tensorboard-queue-size no-save-optim context-parallel-algo tokenizer-name-or-path
        use-fused-rotary-pos-emb use-fused-swiglu use-fused-rmsnorm""",
    3: """
        exit-duration-in-mins lr-warmup-samples lr-decay-samples recompute-activations
        fp8-amax-compute-algo fp8-amax-history-len dist-ckpt-strictness""",
    2: """
        num-experts moe-router-topk moe-router-load-balancing-type moe-aux-loss-coeff
        moe-grouped-gemm moe-token-dispatcher-type expert-model-parallel-size
        apply-layernorm-1p tp-comm-overlap use-megatron-fsdp lr-wsd-decay-style
        lr-wsd-decay-iters decoupled-lr manual-gc attention-mask-type""",
}
COUNTS = {name: count for count, names in COUNTED.items() for name in names.split()}

# What these lines ask for and does not exist here.
ABSENT = {
    *("--fp8-format", "--decoupled-lr"),
    "--moe-pad-expert-input-to-capacity",
    *("--rampup-batch-size", "--squared-relu", "--dataloader-type"),
    *("--eod-mask-loss", "--tokenizer-type"),
}

# What a test may shrink.
SMALL: Mapping[str, str] = {
    "--num-layers": "2",
    "--hidden-size": "64",
    "--ffn-hidden-size": "96",
    "--num-attention-heads": "4",
    "--num-query-groups": "2",
    "--kv-channels": "16",
    "--num-experts": "4",
    "--moe-ffn-hidden-size": "32",
    "--expert-model-parallel-size": "2",
    "--seq-length": "64",
    "--max-position-embeddings": "64",
    "--window-size": "15,0",
    "--vocab-size": "400",
    "--recompute-num-layers": "1",
    "--tensor-model-parallel-size": "1",
    "--pipeline-model-parallel-size": "1",
    "--context-parallel-size": "2",
    "--micro-batch-size": "1",
    "--global-batch-size": "2",
    "--train-iters": "2",
    "--lr-warmup-iters": "1",
    "--lr-decay-iters": "2",
    "--save-interval": "2",
    "--eval-iters": "1",
    "--eval-interval": "2",
    "--log-interval": "1",
}


def make_folder(folder: Path) -> None:
    """The files that the lines name."""
    (folder / "data").mkdir()
    tokens = np.random.default_rng(1).integers(0, 250, 4000).astype("<u2")
    for name in ("corpus", "other"):
        # Two documents of 2,000 tokens each.
        index = index_bytes(lengths=(2000, 2000), pointers=(0, 4000), documents=(0, 1, 2))
        (folder / "data" / f"{name}_text_document.idx").write_bytes(index)
        (folder / "data" / f"{name}_text_document.bin").write_bytes(tokens.tobytes())
    path = tokenizer_files.huggingface(folder / "tokenizer")
    tokenizer_files.sentencepiece(folder)
    library = tokenizer_files.train_byte_level(tokenizer_files.TEXTS, path, vocab_size=300)
    library.model.save(str(folder), "gpt2")  # gpt2-vocab.json and gpt2-merges.txt


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    make_folder(tmp_path)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def planned(words: list[str], world: int) -> RunPlan:
    """What ``--dry-run --world-size`` plans."""
    arguments = read_arguments([*words, "--dry-run", "--world-size", str(world)])
    return check(
        arguments.config,
        Launch(),
        dry_run=True,
        dry_run_world_size=world,
        given=arguments.given,
        auto=arguments.auto,
        argv=words,
        notes=arguments.notes,
        mistakes=arguments.mistakes,
    )


def refusals(line: MegatronLine) -> list[ConfigError]:
    """What one run tells about the line."""
    try:
        planned(line.words, line.world)
    except CombinedError as error:
        return list(error.errors)
    except ConfigError as error:
        return [error]
    return []


def accepted(line: MegatronLine) -> list[str]:
    """The line without the flags that are refused."""
    refused = {error.flag for error in refusals(line)}
    pieces = [piece for piece in split_words(line.words) if piece[0] not in refused]
    return [word for flag, words in pieces for word in (flag, *words)]


def test_the_lines_are_like_those_of_the_field() -> None:
    flags = [{flag for flag, _ in split_words(line.words)} for line in LINES.values()]
    assert len(LINES) >= 20
    assert 55 <= statistics.median(map(len, flags)) <= 75
    for name, count in COUNTS.items():
        found = sum(f"--{name}" in line for line in flags)
        assert found >= min(count, 2) - (count <= 4), name


@pytest.mark.parametrize("name", LINES)
def test_a_line_reaches_a_plan_after_at_most_three_refusals(name: str, folder: Path) -> None:
    line = LINES[name]
    found = refusals(line)
    assert len(found) <= 3, "\n".join(map(str, found))
    assert {error.flag for error in found} <= ABSENT
    plan = planned(accepted(line), line.world)
    assert plan.grid.world_size == line.world
    assert plan.config.preset == "megatron"
    model = plan.config.model
    grouped = "--num-query-groups" in line.words
    assert (model.num_kv_heads == model.num_attention_heads) == (not grouped)
    assert (model.normalization == "RMSNorm") == ("RMSNorm" in line.words)


def shrunk(line: MegatronLine, folder: Path) -> list[str]:
    """The line with small sizes for two ranks, and with whole paths."""

    def is_file(word: str) -> bool:
        return (folder / word).exists() or (folder / f"{word}.idx").exists()

    words = ["--device", "cpu"]
    for flag, values in split_words(accepted(line)):
        if flag == "--num-layers-per-virtual-pipeline-stage":
            continue
        values = [SMALL[flag]] if flag in SMALL else values
        # The ranks may have been started in another folder.
        words += [flag, *(str(folder / v) if is_file(v) else v for v in values)]
    save = str(folder / "run")
    return [save if word == "checkpoints" else word for word in words]


def check_training(name: str, folder: Path) -> None:
    words = shrunk(LINES[name], folder)
    if "--save" not in words:
        words += ["--save", str(folder / "run")]
    assert run_ranks(train, 2, words) == [2, 2]
    rows = metrics_of(folder / "run")
    assert [row["step"] for row in rows] == [1, 2]
    assert all(0 < row["loss"] < 10 for row in rows)
    assert (folder / "run" / "step-2").is_dir()


@pytest.mark.parametrize("name", TRAINED[:2])
def test_a_small_line_trains(name: str, folder: Path) -> None:
    check_training(name, folder)


@pytest.mark.slow
@pytest.mark.parametrize("name", TRAINED[2:])
def test_every_small_line_trains(name: str, folder: Path) -> None:
    check_training(name, folder)
