"""A model that takes whole rows, for loops that average gradients; FSDP2's settings for sums."""

from __future__ import annotations

import re
from collections.abc import Callable
from importlib.util import find_spec
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.fsdp import FSDPModule, fully_shard

from cp_megatron.errors import ConfigError
from cp_megatron.model import huggingface
from tests.model.test_huggingface import make_model, make_rows, relative
from tests.model.test_trainers import exact_loss, launched, padded
from tests.ranks import run_ranks

pytestmark = pytest.mark.skipif(
    find_spec("transformers") is None, reason="transformers is not installed: pip install '.[hf]'"
)
ROWS = ((7, 1, 15), (23,))  # joined to one row of 46, which four ranks do not divide


def whole_model() -> tuple[Any, Any]:
    """The plain model with its gradient, and what it returned."""
    model = make_model("llama", "sdpa")
    model.loss_function = exact_loss
    out = model(**make_rows(ROWS), use_cache=False)
    out.loss.backward()
    return model, out


def outputs(rank: int, world_size: int) -> dict[str, float]:
    huggingface.register()
    plain, expected = whole_model()
    model = make_model("llama", "cp_megatron")
    model.loss_function = exact_loss
    for whole_logits in (False, True):  # the second call replaces the first
        huggingface.take_whole_rows(model, dist.group.WORLD, whole_logits=whole_logits)
    out = model(**make_rows(ROWS))
    assert out.logits is None  # while it trains, no rank has to hold them
    out.loss.backward()
    for parameter in model.parameters():
        dist.all_reduce(parameter.grad)
        parameter.grad /= world_size  # as DDP does
    errors = {"loss": relative(out.loss, expected.loss)}
    for (name, mine), other in zip(model.named_parameters(), plain.parameters(), strict=True):
        errors[name] = relative(mine.grad, other.grad)
    model.eval()
    with torch.no_grad():
        errors["logits"] = relative(model(**make_rows(ROWS)).logits, expected.logits)
    # A batch that is sharded already passes through.
    batch = huggingface.shard_batch(dist.group.WORLD, **make_rows(ROWS))
    assert model(**batch).logits.shape[1] == batch["input_ids"].shape[1]
    return errors


@pytest.mark.parametrize("ranks", [1, 4])
def test_outputs_and_mean_gradients_are_those_of_whole_rows(ranks: int) -> None:
    for errors in run_ranks(outputs, ranks):
        assert max(errors.values()) < 1e-12, errors


def refusals(rank: int, world_size: int) -> dict[str, str]:
    model = make_model("llama", "cp_megatron")
    huggingface.take_whole_rows(model, None)
    rows = make_rows(ROWS)
    calls: dict[str, Callable[[], Any]] = {
        "by place": lambda: model(rows["input_ids"]),
        "use_cache": lambda: model(**rows, use_cache=True),
        "no labels": lambda: model(input_ids=rows["input_ids"]),
        "a tuple": lambda: model(**rows, return_dict=False),
    }
    answers = {}
    for name, call in calls.items():
        with pytest.raises(ConfigError) as refused:
            call()
        answers[name] = str(refused.value)
    return answers


def test_calls_without_whole_rows_are_refused() -> None:
    (answers,) = run_ranks(refusals, 1)
    assert answers["by place"].startswith("arguments of the model: must be given by")
    assert answers["use_cache"].startswith("use_cache True: needs the keys of whole")
    assert answers["no labels"].startswith("outputs of the model logits: are too large for a rank")
    assert answers["a tuple"].startswith("return_dict False: must be true")


def dealt_by_accelerate(rank: int, world_size: int, told: bool) -> str:
    """Each rank's dataloader; without ``prepare_accelerator`` it deals other rows to each rank."""
    from accelerate import Accelerator
    from torch.utils.data import DataLoader

    huggingface.register()
    with launched(rank, world_size):
        accelerator, model = Accelerator(cpu=True), make_model("llama", "cp_megatron")
        if told:
            for _ in range(2):  # the second call repeats the first
                huggingface.prepare_accelerator(accelerator, model, context_parallel_size=2)
            with pytest.raises(ConfigError, match="differs from the size that this accelerator"):
                huggingface.prepare_accelerator(accelerator, model, context_parallel_size=1)
        else:
            huggingface.take_whole_rows(model, dist.group.WORLD)
        rows = [{"input_ids": list(range(n, n + 8))} for n in range(4)]
        loader = accelerator.prepare(DataLoader(rows, 1, collate_fn=padded))
        try:
            for batch in loader:
                model(**batch)
        except ConfigError as error:
            return str(error)
    return ""


@pytest.mark.skipif(find_spec("accelerate") is None, reason="accelerate is not installed")
def test_rows_that_accelerate_deals_apart_are_an_error_on_every_rank() -> None:
    assert run_ranks(dealt_by_accelerate, 2, True) == ["", ""]
    for rank, answer in enumerate(run_ranks(dealt_by_accelerate, 2, False)):
        assert answer.startswith(f"rows: differ from what rank {1 - rank} of the group has")


def accelerator(**changed: Any) -> Any:
    made = {
        "num_processes": 4,
        "distributed_type": "DistributedType.MULTI_CPU",
        "dispatch_batches": None,
        "parallelism_config": None,
    }
    return SimpleNamespace(**{**made, **changed})


@pytest.mark.parametrize(
    ("changed", "size", "start"),
    [
        ({}, 3, "context_parallel_size 3: must divide the number of ranks, 4 (works: 1, 2, 4)"),
        ({}, 0, "context_parallel_size 0"),
        ({"distributed_type": "DistributedType.DEEPSPEED"}, 2, "distributed_type DEEPSPEED"),
        ({"dispatch_batches": True}, 2, "dispatch_batches True: deals other rows"),
        (
            {"parallelism_config": SimpleNamespace(non_data_parallel_size=2)},
            *(2, "parallelism_config: has tensor, context or sequence parallelism"),
        ),
    ],
)
def test_accelerators_refused(changed: dict[str, Any], size: int, start: str) -> None:
    with pytest.raises(ConfigError, match=re.escape(start)):
        huggingface.prepare_accelerator(accelerator(**changed), torch.nn.Identity(), size)


@pytest.mark.parametrize(
    ("changed", "start"),
    [
        ({"label_smoothing_factor": 0.1}, "label_smoothing_factor 0.1: needs the logits"),
        ({"neftune_noise_alpha": 5.0}, "neftune_noise_alpha 5.0: would scale its noise"),
        ({"eval_use_gather_object": True}, "eval_use_gather_object True: would count"),
        ({"include_num_input_tokens_seen": "all"}, "include_num_input_tokens_seen all: would"),
        ({"compute_loss_func": len}, "compute_loss_func <built-in function len>: needs the logits"),
    ],
)
def test_trainers_refused(changed: dict[str, Any], start: str) -> None:
    off = ("label_smoothing_factor", "eval_use_gather_object", "neftune_noise_alpha")
    made = dict.fromkeys(off, 0.0)
    args = SimpleNamespace(**{**made, "include_num_input_tokens_seen": "no", **changed})
    loss = changed.get("compute_loss_func")
    with pytest.raises(ConfigError, match=re.escape(start)):
        huggingface.prepare_trainer(SimpleNamespace(args=args, compute_loss_func=loss), 2)


# ---- FSDP2 ---------------------------------------------------------------------------------------


def sum_gradients(module: Any) -> None:
    module.set_gradient_divide_factor(1.0)
    module.set_force_sum_reduction_for_comms(True)


def fsdp_errors(rank: int, world_size: int, told: str) -> dict[str, float]:
    """Relative errors of FSDP2's gradients in a loop of one's own, by parameter."""
    huggingface.register()
    plain, _ = whole_model()
    model = make_model("llama", "cp_megatron")
    model.loss_function = exact_loss
    if told == "mean of whole rows":
        huggingface.take_whole_rows(model, dist.group.WORLD)
    for layer in model.model.layers:
        fully_shard(layer)
    fully_shard(model)
    if told == "sum on every module":
        for module in model.modules():
            if isinstance(module, FSDPModule):
                sum_gradients(module)
    elif told == "sum on the root":
        sum_gradients(model)
    rows = make_rows(ROWS)
    if told != "mean of whole rows":
        rows = huggingface.shard_batch(dist.group.WORLD, **rows)
    model(**rows).loss.backward()
    pairs = zip(model.named_parameters(), plain.parameters(), strict=True)
    whole: Callable[[Tensor], Tensor] = lambda x: x.full_tensor()  # noqa: E731
    return {name: relative(whole(mine.grad), other.grad) for (name, mine), other in pairs}


@pytest.mark.parametrize("told", ["sum on every module", "mean of whole rows"])
def test_fsdp_sums_or_averages_to_the_gradient(told: str) -> None:
    for errors in run_ranks(fsdp_errors, 2, told):
        assert max(errors.values()) < 1e-12, errors


def test_fsdp_told_at_the_root_alone_halves_the_layers_gradients() -> None:
    """Why launch/README.md says: on every FSDP module."""
    for errors in run_ranks(fsdp_errors, 2, "sum on the root"):
        for name, error in errors.items():
            assert error == pytest.approx(0.5 if ".layers." in name else 0, abs=1e-12), name
