"""Flags of other trainers are answered by their meaning."""

from __future__ import annotations

from pathlib import Path

import pytest

from cp_megatron.cli.megatron_flags import answers
from cp_megatron.cli.parse import LaunchOptions, parse_arguments
from cp_megatron.cli.synonyms import SYNONYMS
from cp_megatron.config.fields import settings, settings_of
from cp_megatron.data.prepare.prepare_command import Request
from cp_megatron.errors import ConfigError


@pytest.mark.parametrize(
    ("flag", "works"),
    [
        ("--learning_rate", "--lr"),
        ("--learning-rate", "--lr"),
        ("--max_grad_norm", "--clip-grad"),
        ("--per_device_train_batch_size", "--micro-batch-size"),
        ("--gradient_accumulation_steps", "--global-batch-size"),
        ("--gradient_checkpointing", "--recompute-granularity"),
        ("--output_dir", "--save"),
        ("--model_name_or_path", "--load-hf"),
        ("--resume_from_checkpoint", "--load"),
        ("--num_train_epochs", "--train-epochs"),
        ("--eval_strategy", "--eval-interval"),
        ("--optim", "--optimizer adam, or muon"),
        ("--max_steps", "--train-iters"),
        ("--max_seq_length", "--seq-length"),
        ("--training.seq_len", "--seq-length"),
        ("--parallelism.context_parallel_degree", "--context-parallel-size"),
        ("--compile.enable", "--compile"),
        ("--torch_compile", "--compile"),
        ("--deepspeed", "nothing"),
        ("--zero_stage", "nothing"),
        ("--batch-size", "--global-batch-size or --micro-batch-size"),
        ("--warmup", "--lr-warmup-fraction"),
        ("--num_epochs", "--train-epochs"),
        ("--cp", "--context-parallel-size"),
        ("--tp", "--tensor-parallel-size"),
        ("--ckpt-step", "--load RUN/step-N"),
    ],
)
def test_a_flag_of_another_trainer(flag: str, works: str) -> None:
    with pytest.raises(ConfigError) as caught:
        parse_arguments([flag, "4"])
    assert caught.value.flag == flag
    assert caught.value.works.startswith(works)


def test_what_is_recommended_exists() -> None:
    rows = [*settings().values(), *settings_of(LaunchOptions), *settings_of(Request)]
    known = {row.flag for row in rows} | {row.off_flag for row in rows if row.kind == "bool"}
    texts = [text for table in SYNONYMS.values() for text in table.values()]
    words = {word.strip(",:;") for text in texts for word in text.split()}
    assert {word for word in words if word.startswith("--")} <= known


def test_a_synonym_is_no_flag_of_ours() -> None:
    names = [name for table in SYNONYMS.values() for name in table]
    assert len(names) == len(set(names))
    known = {row.flag for row in settings().values()}
    assert not {f"--{name.replace('_', '-')}" for name in names} & known
    assert not {f"--{name}" for name in names} & answers().keys()


TITAN = """
[model]
flavor = "8B"
[training]
seq_len = 8192
steps = 1000
compile = true
deterministic = false
[optimizer]
lr = 3e-4
[lr_scheduler]
min_lr_factor = 0.1
[comm]
train_timeout_seconds = 100
"""


def test_a_toml_file_says_what_it_is(tmp_path: Path) -> None:
    file = tmp_path / "llama3_8b.toml"
    file.write_text(TITAN)
    with pytest.raises(ConfigError) as caught:
        parse_arguments(["--config", str(file)])
    assert "TOML" in caught.value.rule
    assert "model.flavor, lr_scheduler.min_lr_factor, comm" in caught.value.rule
    assert (
        caught.value.works
        == "--seq-length 8192 --train-iters 1000 --compile --no-deterministic --lr 0.0003"
    )
