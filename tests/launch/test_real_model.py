"""A real model: evaluate it on any grid, extend its context, train it.

SmolLM2-135M was trained on 8,192 tokens, Gemma 3 270M on 32,768. The text is English prose that
ships with Python. All tests are slow: a row of 16,384 tokens takes two cores a minute.
"""

from __future__ import annotations

import json
import pydoc_data.topics
import shlex
import subprocess
from pathlib import Path
from typing import Any

import pytest

from tests.launch.test_end_to_end import environment
from tests.real_models import gemma3_folder, smollm2_folder

LAUNCH = Path(__file__).parents[2] / "launch"
RECIPE = LAUNCH / "recipes" / "extend-context.yaml"
MINUTES = 60.0

pytestmark = [pytest.mark.slow, pytest.mark.timeout(6 * 600)]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder that holds the text."""
    folder = tmp_path_factory.mktemp("real")
    topics: dict[str, str] = pydoc_data.topics.topics
    (folder / "text.txt").write_text("\n\n".join(topics.values()), encoding="utf-8")
    return folder


def launch(folder: Path, ranks: int, script: str, flags: str) -> str:
    """Runs a program of ``launch/`` in ``folder`` and returns its output."""
    starter = ["python"] if ranks == 1 else ["torchrun", "--nproc-per-node", str(ranks)]
    command = [*starter, str(LAUNCH / script), *shlex.split(flags)]
    ended = subprocess.run(
        command,
        cwd=folder,
        env=environment(),
        capture_output=True,
        text=True,
        check=False,
        timeout=45 * MINUTES,
    )
    assert ended.returncode == 0, ended.stdout + ended.stderr
    return ended.stdout


def evaluated(folder: Path, ranks: int, name: str, flags: str) -> dict[int, Any]:
    """Length -> the result of ``evaluate.py`` for one row, shared by the ranks."""
    model = "" if "--load" in flags else f"--load-hf {smollm2_folder()}"
    launch(
        folder,
        ranks,
        "evaluate.py",
        f"{model} --context-parallel-size {ranks} --data-path text.txt --tasks perplexity"
        f" --num-samples 1 --dtype float32 --no-plot --output {name} {flags}",
    )
    results: dict[str, Any] = json.loads((folder / name / "results.json").read_text())
    return {row["length"]: row for row in results["perplexity"]}


def perplexity(folder: Path, ranks: int, name: str, flags: str) -> dict[int, float]:
    """Length -> perplexity."""
    rows = evaluated(folder, ranks, name, flags)
    return {length: row["perplexity"] for length, row in rows.items()}


def test_perplexity_is_the_same_on_any_number_of_ranks(folder: Path) -> None:
    lengths = "--lengths 512 2048 8192"
    one = perplexity(folder, 1, "one", lengths)
    assert one.keys() == {512, 2048, 8192}
    assert all(1 < value < 30 for value in one.values()), one
    for ranks in (2, 4):
        shared = perplexity(folder, ranks, f"cp{ranks}", lengths)
        assert shared == pytest.approx(one, rel=1e-4), ranks


def test_yarn_keeps_the_perplexity_beyond_the_trained_length(folder: Path) -> None:
    trained = perplexity(folder, 2, "trained", "--lengths 8192")[8192]
    plain = evaluated(folder, 2, "plain", "--lengths 16384")[16384]
    yarn = "--rope-type yarn --rope-scaling-factor 2 --lengths 16384"
    scaled = evaluated(folder, 2, "yarn", yarn)[16384]
    whole, beyond = ([row["perplexity"], row["buckets"][-1]] for row in (plain, scaled))
    print(f"perplexity of 8K {trained:.2f}; of 16K and its second half", whole, "YaRN", beyond)
    assert scaled["perplexity"] < 1.3 * trained
    assert scaled["buckets"][-1]["perplexity"] < 1.3 * trained
    assert plain["perplexity"] > 2 * trained
    assert plain["buckets"][-1]["perplexity"] > 5 * trained


def test_a_few_steps_extend_the_context(folder: Path) -> None:
    """A tenth of the rotary base stands for a model that was made for shorter texts."""
    base = "--rotary-base 10000"
    before = perplexity(folder, 2, "before", f"{base} --lengths 4096")[4096]
    launch(
        folder,
        2,
        "pretrain.py",
        f"--load-hf {smollm2_folder()} {base} --context-parallel-size 2 --seq-length 4096"
        " --global-batch-size 1 --train-iters 6 --lr 2e-4 --split 90,10"
        " --eval-iters 1 --log-interval 1 --data-path text.txt --save extended --no-plot",
    )
    after = perplexity(folder, 2, "after", "--load extended --part all --lengths 4096")[4096]
    print(f"perplexity at 4K: {before:.2f} before, {after:.2f} after")
    assert after < before


def test_sixteen_thousand_tokens_train_on_two_ranks_in_sixteen_gib(folder: Path) -> None:
    """Twice the trained length, with YaRN. Both steps read the same row, so the loss decreases."""
    text = (folder / "text.txt").read_text(encoding="utf-8")
    (folder / "row.txt").write_text(text[:90_000], encoding="utf-8")
    launch(
        folder,
        2,
        "pretrain.py",
        f"--load-hf {smollm2_folder()} --rope-type yarn --rope-scaling-factor 2"
        " --context-parallel-size 2 --seq-length 16384 --global-batch-size 1 --train-iters 2"
        " --lr 1e-4 --split 1,0,0 --eval-iters 0 --log-interval 1 --data-path row.txt"
        " --recompute-granularity full --cpu-offloading --mlp-tile-size 1024 --loss-chunk-size 512"
        " --save long --no-plot",
    )
    lines = (folder / "long" / "metrics.jsonl").read_text().splitlines()
    first, second = (json.loads(line) for line in lines)
    print({key: (first[key], second[key]) for key in ("loss", "step_seconds", "memory_bytes")})
    assert second["loss"] < first["loss"]
    assert 2 * second["memory_bytes"] < 16 << 30


def test_gemma_3_is_evaluated_extended_and_exported(folder: Path) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = gemma3_folder()
    rows = [
        perplexity(folder, ranks, f"gemma{ranks}", f"--load-hf {model} --lengths 4096")[4096]
        for ranks in (1, 2)
    ]
    assert rows[0] == pytest.approx(15.571, abs=0.001)
    assert rows[1] == pytest.approx(rows[0], rel=1e-5)
    launch(
        folder,
        2,
        "pretrain.py",
        f"--load-hf {model} --context-parallel-size 2 --seq-length 4096 --global-batch-size 1"
        " --train-iters 3 --lr 2e-5 --split 90,10 --eval-iters 1 --log-interval 1"
        " --data-path text.txt --save gemma --no-plot",
    )
    after = perplexity(folder, 2, "gemma-after", "--load gemma --part all --lengths 4096")[4096]
    print(f"perplexity at 4K: {rows[0]:.2f} before, {after:.2f} after")
    assert after < rows[0]
    launch(folder, 1, "convert.py", "--load gemma --output gemma-out")
    found, told = AutoModelForCausalLM.from_pretrained(
        folder / "gemma-out", output_loading_info=True
    )
    assert not any(told.values()), told
    tokenizer = AutoTokenizer.from_pretrained(folder / "gemma-out")
    ids = tokenizer("The capital of France is", return_tensors="pt")
    text = tokenizer.decode(found.generate(**ids, max_new_tokens=8, do_sample=False)[0])
    assert text.startswith("<bos>The capital of France is")
