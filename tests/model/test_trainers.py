"""README's recipes for Trainer, SFTTrainer and accelerate, each against the plain loop on one rank.

The plain loop runs transformers' own attention on one rank. Losses, parameters after three steps
and the evaluation's loss must be the same on two ranks that share rows, and on two groups of two.
"""

from __future__ import annotations

import os
import re
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from importlib.util import find_spec
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from cp_megatron.model import huggingface
from tests.model.test_huggingface import VOCABULARY, make_model
from tests.ranks import run_ranks
from tests.test_readme import README

pytestmark = pytest.mark.skipif(
    not all(find_spec(name) for name in ("transformers", "accelerate", "trl", "datasets")),
    reason="transformers, accelerate or trl is not installed: pip install '.[test]'",
)

LENGTHS = (21, 9, 16, 30, 5, 12, 24, 17, 8, 13, 11)
STEPS = 3


@dataclass(frozen=True, kw_only=True)
class Result:
    """What a loop computed.

    Attributes:
        losses: as logged, one for each step.
        weights: every parameter after the last step, in one vector.
        figures: the evaluation's loss and metrics, gradient norms and what else is logged.
    """

    losses: list[float]
    weights: Tensor
    figures: dict[str, float]


@contextmanager
def launched(rank: int, world_size: int) -> Iterator[str]:
    """The environment of a launcher, which accelerate reads, and a folder for what is written."""
    from accelerate.state import AcceleratorState, GradientState, PartialState

    names = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": world_size}
    added = {name: str(value) for name, value in names.items() if world_size > 1}
    added |= {"MASTER_ADDR": "localhost", "MASTER_PORT": "29500", "ACCELERATE_USE_CPU": "true"}
    kept = dict(os.environ)
    os.environ.update(added)
    try:
        with tempfile.TemporaryDirectory() as folder:
            yield folder
    finally:
        os.environ.clear()
        os.environ.update(kept)
        for state in (AcceleratorState, GradientState, PartialState):
            state._reset_state()


def exact_loss(logits: Tensor, labels: Tensor, **kwargs: Any) -> Tensor:
    """transformers' loss without its rounding of the logits to float32."""
    shifted = kwargs.get("shift_labels")
    shifted = F.pad(labels[:, 1:], (0, 1), value=-100) if shifted is None else shifted
    losses = F.cross_entropy(logits.flatten(0, 1), shifted.flatten(), reduction="sum")
    divisor = kwargs.get("num_items_in_batch")
    return losses / ((shifted != -100).sum() if divisor is None else divisor)


def new_model(attention: str) -> Any:
    model = make_model("llama", attention)
    model.loss_function = exact_loss
    return model


def make_rows(count: int = 8) -> list[dict[str, list[int]]]:
    generator = torch.Generator().manual_seed(7)
    draw = [torch.randint(3, VOCABULARY, (n,), generator=generator) for n in LENGTHS[:count]]
    return [{"input_ids": ids.tolist()} for ids in draw]


def padded(rows: list[dict[str, list[int]]]) -> dict[str, Tensor]:
    """Rows of different lengths, padded on the right, as most collators do it."""
    longest = max(len(row["input_ids"]) for row in rows)
    ids, mask = torch.zeros(2, len(rows), longest, dtype=torch.long)
    for place, row in enumerate(rows):
        ids[place, : len(row["input_ids"])] = torch.tensor(row["input_ids"])
        mask[place, : len(row["input_ids"])] = 1
    return {
        "input_ids": ids,
        "attention_mask": mask,
        "labels": ids.masked_fill(mask == 0, -100),
    }


def recipe(start: str, *, plain: bool) -> str:
    """README's lines that begin so; ``plain`` leaves out the engine's, for the reference."""
    blocks = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
    (found,) = (x for block in blocks for x in block.split("\n\n") if x.startswith(start))
    lines = found.splitlines()
    assert sum("huggingface." in line for line in lines) == 1
    return "\n".join(line for line in lines if not (plain and "huggingface." in line))


def weights_of(model: Any) -> Tensor:
    return torch.cat([p.detach().flatten().double() for p in model.parameters()]).clone()


def with_trainer(folder: str, kind: str, plain: bool, options: dict[str, Any]) -> Result:
    from datasets import Dataset
    from transformers import Trainer, TrainingArguments
    from trl import SFTConfig, SFTTrainer

    options = dict(options)
    data: dict[str, Any] = {"eval_dataset": Dataset.from_list(make_rows(options.pop("rows", 4)))}
    if kind == "Trainer":
        make, config = Trainer, TrainingArguments
        data["data_collator"] = padded
        data["compute_metrics"] = accuracy if options.pop("metrics", False) else None
    else:
        make, config = SFTTrainer, SFTConfig
        data["processing_class"] = tokenizer()
        options |= {"max_length": 32, "pad_token": "a"}
    names: dict[str, Any] = {
        "huggingface": huggingface,
        "SFTTrainer": partial(make, **data),
        "model": new_model("sdpa" if plain else "cp_megatron"),
        "rows": Dataset.from_list(make_rows()),
        "args": config(
            output_dir=folder,
            max_steps=STEPS,
            learning_rate=3e-3,
            max_grad_norm=0.5,
            per_device_eval_batch_size=2,
            logging_steps=1,
            use_cpu=True,
            report_to=[],
            save_strategy="no",
            disable_tqdm=True,
            per_device_train_batch_size=options.pop("batch"),
            **options,
        ),
    }
    exec(recipe("trainer =", plain=plain), names)
    trainer = names["trainer"]
    trainer.train()
    evaluated = trainer.evaluate().items()
    figures = {name: x for name, x in evaluated if not re.search("_per_|time", name)}
    logged = [entry for entry in trainer.state.log_history if "loss" in entry]
    for step, entry in enumerate(logged):
        figures |= {f"{name} {step}": entry[name] for name in LOGGED if name in entry}
    losses = [entry["loss"] for entry in logged]
    return Result(losses=losses, weights=weights_of(names["model"]), figures=figures)


def accuracy(predictions: Any) -> dict[str, float]:
    """Looks at every logit and label that the evaluation gathers."""
    logits = torch.as_tensor(predictions.predictions)[:, :-1]
    labels = torch.as_tensor(predictions.label_ids)[:, 1:]
    counted = labels != -100
    picked = logits.log_softmax(-1).gather(2, labels.clamp(min=0)[..., None])[..., 0]
    return {"logits": float(picked[counted].sum()), "labels": float(counted.sum())}


def tokenizer() -> Any:
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel
    from transformers import PreTrainedTokenizerFast

    words = {chr(97 + n): n for n in range(VOCABULARY)}
    model = Tokenizer(WordLevel(words, unk_token="a"))
    return PreTrainedTokenizerFast(tokenizer_object=model, eos_token="b", pad_token="a")


def with_accelerate(folder: str, plain: bool, options: dict[str, Any]) -> Result:
    from accelerate import Accelerator
    from torch.utils.data import DataLoader

    names: dict[str, Any] = {
        "huggingface": huggingface,
        "Accelerator": partial(Accelerator, cpu=True),
        "model": new_model("sdpa" if plain else "cp_megatron"),
    }
    exec(recipe("accelerator =", plain=plain), names)
    accelerator, model = names["accelerator"], names["model"]
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    scheduler = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.1, 4)
    order = torch.Generator().manual_seed(1)
    rows = DataLoader(make_rows(11), 2, shuffle=True, generator=order, collate_fn=padded)
    wrapped, optimizer, loader, scheduler = accelerator.prepare(model, optimizer, rows, scheduler)
    losses = []
    for batch in loader:
        loss = wrapped(**batch).loss
        losses.append(loss.item())
        accelerator.backward(loss)
        accelerator.clip_grad_norm_(wrapped.parameters(), 0.5)
        optimizer.step()
        scheduler.step()
        optimizer.zero_grad()
    seen = accelerator.prepare(DataLoader(make_rows(5), 2, collate_fn=padded))
    lengths = [accelerator.gather_for_metrics(batch["attention_mask"].sum(1)) for batch in seen]
    figures = {"lengths": float((torch.cat(lengths) * torch.arange(1, 6)).sum())}
    figures["rate"] = optimizer.param_groups[0]["lr"]
    mean = accelerator.reduce(torch.tensor(losses), "mean").tolist()
    return Result(losses=mean, weights=weights_of(model), figures=figures)


LOGGED = ("grad_norm", "learning_rate", "entropy", "mean_token_accuracy", "num_tokens")
CASES: dict[str, tuple[Any, ...]] = {
    "Trainer": (
        *(with_trainer, "Trainer"),
        {"metrics": True, "gradient_accumulation_steps": 2, "batch": 1, "rows": 5},
    ),
    "SFTTrainer": (with_trainer, "SFTTrainer", {"rows": 5}),
    "SFTTrainer, packing": (with_trainer, "SFTTrainer", {"packing": True}),
    "accelerate": (with_accelerate, {}),
}
MORE: dict[str, tuple[Any, ...]] = {
    "Trainer without accumulation": (with_trainer, "Trainer", {"metrics": True}),
    "Trainer, compiled": (
        *(with_trainer, "Trainer"),
        {"torch_compile": True, "torch_compile_backend": "eager"},
    ),
    "Trainer, tokens averaged per rank": (
        *(with_trainer, "Trainer"),
        {"average_tokens_across_devices": False},
    ),
}


def all_cases(
    rank: int, world_size: int, plain: bool, cases: dict[str, tuple[Any, ...]], batch: int = 1
) -> dict[str, Result]:
    """Every case in one job, because importing the packages costs seconds.

    Args:
        batch: multiplies the number of rows of a trainer's batch.
    """
    huggingface.register()
    results = {}
    for name, (run, *how, options) in cases.items():
        with launched(rank, world_size) as folder:
            changed = {**options, "batch": batch * options.get("batch", 2)}
            results[name] = run(folder, *how, plain, changed)
    return results


def compare(name: str, result: Result, expected: Result) -> None:
    # trl computes the losses of tokens in float32, and all figures are logged in float32.
    exact = 1e-6 if "SFT" in name else 1e-12
    assert len(result.losses) == len(expected.losses) >= STEPS, name
    assert result.losses == pytest.approx(expected.losses, rel=1e-6), name
    error = (result.weights - expected.weights).norm() / expected.weights.norm()
    assert error < exact, name


@pytest.mark.parametrize("groups", [1, pytest.param(2, marks=pytest.mark.slow)])
def test_the_recipes_equal_the_plain_loops(groups: int) -> None:
    """``groups`` groups of two ranks against as many ranks without context parallelism."""
    cases = CASES if groups == 1 else CASES | MORE
    plain = run_ranks(all_cases, groups, True, cases, timeout=250)[0]
    found = run_ranks(all_cases, 2 * groups, False, cases, timeout=250)
    for results in found:
        for name, result in results.items():
            compare(name, result, plain[name])
            figures = pytest.approx(plain[name].figures, rel=1e-6 if "SFT" in name else 1e-9)
            assert result.figures == figures, name
    if groups == 2:  # and against one rank that has the rows of both groups
        same = {name: CASES[name] for name in ("Trainer", "SFTTrainer")}
        (alone,) = run_ranks(all_cases, 1, True, same, 2, timeout=250)
        for name, expected in alone.items():
            compare(name, found[0][name], expected)
