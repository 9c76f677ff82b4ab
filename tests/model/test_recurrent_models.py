"""Tests transformers' own recurrent models, sharded, against their own code document by document.

Decays are 0.001 to 0.1 a token, so that a state that is not handed on is seen.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from importlib.util import find_spec
from types import SimpleNamespace
from typing import Any
from unittest import mock

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from cp_megatron.context_parallel import linear_function, short_convolution
from cp_megatron.errors import ConfigError
from cp_megatron.model import huggingface
from cp_megatron.model.huggingface import recurrence_hooks
from tests.model.recurrent_models import MODELS, SIZES, make_model
from tests.model.test_huggingface import make_rows, relative, summed, token_losses
from tests.ranks import run_ranks

pytestmark = pytest.mark.skipif(
    find_spec("transformers") is None, reason="transformers is not installed: pip install '.[hf]'"
)

PACKED = (41, 3, 1, 17, 50, 8)  # 120 tokens: every layout divides them among 2, 3 and 4 ranks


@dataclass(frozen=True, kw_only=True)
class Case:
    """A model on one packed row."""

    model: str
    checkpointing: dict[str, Any] | None = None
    options: dict[str, Any] = field(default_factory=dict)
    dtype: torch.dtype = torch.float64


def alone(model: Any, rows: Mapping[str, Tensor], lengths: Sequence[int]) -> Tensor:
    """The logits of each document by itself, by transformers' own code."""
    pieces = rows["input_ids"].split(list(lengths), 1)
    return torch.cat([model(input_ids=piece, use_cache=False).logits for piece in pieces], 1)


def case_errors(case: Case, group: dist.ProcessGroup | None) -> dict[str, float]:
    """Relative errors of the logits, of the ranks' summed loss and of all gradients, by name."""
    rows = make_rows((PACKED,))
    whole = make_model(case.model, "eager", case.dtype)
    logits = alone(whole, rows, PACKED)
    shifted = F.pad(rows["labels"][:, 1:], (0, 1), value=-100)
    loss = token_losses(logits, shifted)
    loss.backward()

    model = make_model(case.model, "cp_megatron", case.dtype)
    if case.checkpointing is not None:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs=case.checkpointing)
    batch = huggingface.shard_batch(group, **rows, **case.options)
    found = model(**batch).logits
    own_loss = token_losses(found, batch["shift_labels"])
    own_loss.backward()
    places = batch["context_parallel"].cp.positions
    errors = {
        "logits": relative(found.detach(), logits.detach()[:, places]),
        "loss": relative(summed(own_loss, group), loss.detach()),
    }
    for (name, parameter), reference in zip(
        model.named_parameters(), whole.parameters(), strict=True
    ):
        if reference.grad is not None:
            errors[name] = relative(summed(parameter.grad, group), reference.grad)
    return errors


def errors_of(
    rank: int, world_size: int, cases: Mapping[str, Case], sizes: Sequence[int]
) -> dict[str, dict[str, float]]:
    """Every case on groups of these sizes, made of the first ranks."""
    huggingface.register()
    found = {}
    for size in sizes:
        group = dist.new_group(range(size))
        for name, case in cases.items() if rank < size else ():
            found[f"{name}, {size} ranks"] = case_errors(case, group)
    return found


def check(cases: Mapping[str, Case], sizes: Sequence[int], bound: float = 1e-12) -> None:
    for result in run_ranks(errors_of, max(sizes), cases, sizes, timeout=300):
        for name, errors in result.items():
            assert max(errors.values()) < bound, (name, errors)


def test_loss_and_gradients_are_those_of_documents_alone() -> None:
    check({"": Case(model="linear layers only")}, (2, 3, 4))
    check({name: Case(model=name) for name in ("Qwen3.5", "Mamba2", "Kimi")}, (2,))


@pytest.mark.slow
def test_every_model_on_any_number_of_ranks() -> None:
    cases = {name: Case(model=name) for name in MODELS}
    layouts = ("zigzag", "contiguous")
    more = {x: Case(model="Qwen3-Next", options={"layout": x}) for x in layouts}
    check({**cases, **more}, (2, 3, 4))


@pytest.mark.slow
@pytest.mark.parametrize(("dtype", "bound"), [(torch.float32, 1e-5), (torch.bfloat16, 0.05)])
def test_low_precision_rounds_as_transformers_does(dtype: torch.dtype, bound: float) -> None:
    names = ("Qwen3.5", "Qwen3-Next", "linear layers only", "Mamba2", "Kimi")
    cases = {name: Case(model=name, dtype=dtype) for name in names}
    for result in run_ranks(errors_of, 2, cases, (2,), timeout=300):
        assert max(errors["logits"] for errors in result.values()) < bound, result


# ---- what must be noticed ------------------------------------------------------------------------


def errors_without(rank: int, world_size: int, what: str) -> float:
    """The largest error if states, or the tokens before a convolution, are not handed on."""
    huggingface.register()

    enter = linear_function._Call.enter

    def no_state(call: Any, x: Any) -> tuple[Tensor, Tensor]:
        entering, chained = enter(call, x)
        return entering if entering is None else torch.zeros_like(entering), chained

    def no_tokens(self: Any, x: Tensor) -> Tensor:
        return x.new_zeros((x.shape[0], len(self.halo.received), x.shape[2]))

    exchange = short_convolution.HaloExchange
    changed = {
        "state": mock.patch.object(linear_function._Call, "enter", no_state),
        "tokens": mock.patch.object(exchange, "fetch", no_tokens),
    }
    with changed[what]:
        return case_errors(Case(model="linear layers only"), dist.group.WORLD)["logits"]


@pytest.mark.parametrize("what", ["state", "tokens"])
def test_what_is_not_handed_on_is_seen(what: str) -> None:
    assert max(run_ranks(errors_without, 2, what)) > 1e-3


# ---- recomputation -------------------------------------------------------------------------------


@contextmanager
def counted() -> Iterator[list[int]]:
    """The elements that this rank gives to collectives and messages."""
    sent: list[int] = []

    def counting(name: str) -> Any:
        own = getattr(dist, name)

        def count(*args: Any, **kwargs: Any) -> Any:
            given = args[0] if name != "all_to_all_single" else [args[1]]
            for x in given if isinstance(given, list) else [given]:
                sent.append(x.tensor.numel() if isinstance(x, dist.P2POp) else x.numel())
            return own(*args, **kwargs)

        return mock.patch.object(dist, name, count)

    with counting("all_to_all_single"), counting("batch_isend_irecv"), counting("all_reduce"):
        yield sent


def messages(rank: int, world_size: int, options: Sequence[dict[str, Any] | None]) -> list[Any]:
    """What forward and backward send, with each kind of recomputation, and twice in a row."""
    huggingface.register()
    found = []
    for checkpointing in options:
        model = make_model("linear layers only", "cp_megatron", torch.float32)
        if checkpointing is not None:
            model.gradient_checkpointing_enable(gradient_checkpointing_kwargs=checkpointing)
        batch = huggingface.shard_batch(dist.group.WORLD, **make_rows((PACKED,)))
        huggingface.check(model)
        parts = []
        for _ in range(2):
            with counted() as sent:
                loss = model(**batch).loss
                parts.append(tuple(sent))
                loss.backward()
                parts.append(tuple(sent))
        found.append(parts)
    return found


def test_a_recomputed_layer_is_exact_and_sends_nothing_twice() -> None:
    kinds: list[dict[str, Any]] = [{"use_reentrant": False}, {"use_reentrant": True}]
    cases = {str(x): Case(model="linear layers only", checkpointing=x) for x in kinds}
    check(cases, (2,))
    for without, *others in run_ranks(messages, 2, [None, *kinds]):
        assert len(without[0]) > 0
        assert len(without[1]) > len(without[0])
        assert all(sorted(x) == sorted(y) for other in others for x, y in zip(other, without))


# ---- the hooks -----------------------------------------------------------------------------------


def own_calls(rank: int, world_size: int) -> list[bool]:
    """Whether a model without a plan computes the same bits before and after it was hooked."""
    same = []
    for name in ("Qwen3-Next", "Mamba2", "Kimi"):
        model = make_model(name, "eager", torch.float32)
        ids = make_rows((PACKED,))["input_ids"]
        before = model(input_ids=ids, use_cache=True)
        assert recurrence_hooks.hook_layers(model)
        after = model(input_ids=ids, use_cache=True)
        more = model(input_ids=ids[:, :1], cache=after.get("cache") or after.past_key_values)
        same += [torch.equal(before.logits, after.logits), bool(more.logits.isfinite().all())]
    return same


def test_without_a_plan_transformers_code_runs() -> None:
    (same,) = run_ranks(own_calls, 1)
    assert all(same)


def padded_error(rank: int, world_size: int) -> float:
    """Of two rows with padding on the left, which transformers masks by itself on one rank."""
    huggingface.register()
    rows: dict[str, Any] = make_rows(((60,), (60,)))
    rows.pop("position_ids")
    mask = torch.ones_like(rows["input_ids"])
    mask[0, :23], mask[1, :5] = 0, 0
    whole = make_model("linear layers only", "eager", torch.float64)
    expected = whole(input_ids=rows["input_ids"], attention_mask=mask, use_cache=False).logits
    model = make_model("linear layers only", "cp_megatron", torch.float64)
    batch = huggingface.shard_batch(dist.group.WORLD, **rows, attention_mask=mask)
    found = batch["context_parallel"].whole(model(**batch).logits)
    kept = mask.bool()
    return relative(found[kept].detach(), expected[kept].detach())


def test_padding_is_left_out() -> None:
    assert max(run_ranks(padded_error, 2)) < 1e-12


def refusals(rank: int, world_size: int) -> dict[str, str]:
    huggingface.register()
    library = importlib.import_module("transformers")
    batch = huggingface.shard_batch(None, **make_rows((PACKED,)))
    tiny = {"vocab_size": 64, "hidden_size": 16, "num_hidden_layers": 2}
    mamba = library.MambaForCausalLM(library.MambaConfig(**tiny, state_size=4))
    jamba = library.JambaConfig(**{**SIZES, "num_hidden_layers": 2, "use_mamba_kernels": False})
    model = make_model("linear layers only", "cp_megatron", torch.float32)
    hybrid = make_model("Qwen3.5", "cp_megatron", torch.float32)
    unhooked = make_model("Qwen3.5", "cp_megatron", torch.float32)
    early = make_model("linear layers only", "eager", torch.float32)
    early._forward_pre_hooks.clear()  # as if it had been built before ``register``
    del early._cp_megatron_watches
    modeling = importlib.import_module(type(unhooked).__module__)
    own = modeling.causal_conv1d_fn

    def local(*args: Any, context_parallel: Any = None, **kwargs: Any) -> Any:
        return own(*args, **kwargs)  # as a layer that was not reached

    local._cp_megatron_hooked = True  # type: ignore[attr-defined]
    calls: dict[str, Callable[[], object]] = {
        "mamba": lambda: huggingface.check(mamba),
        "jamba": lambda: huggingface.check(library.JambaForCausalLM(jamba)),
        "cache": lambda: hybrid(**{**batch, "use_cache": True}),
        "built before": lambda: early(**batch),
        "offsets": lambda: model(**batch, cu_seq_lens_q=torch.tensor([0, 120])),
        "index": lambda: model(**batch, seq_idx=torch.zeros(1, 120)),
    }
    answers = {}
    for name, call in calls.items():
        answers[name] = refusal(call)
    with mock.patch.object(modeling, "causal_conv1d_fn", local):
        answers["not reached"] = refusal(lambda: unhooked(**batch))
    return answers


def refusal(call: Callable[[], object]) -> str:
    try:
        call()
    except ConfigError as error:
        return str(error)
    return ""


def test_what_is_not_covered_is_refused_by_name() -> None:
    (answers,) = run_ranks(refusals, 1, timeout=120)
    parts = {
        "mamba": "layer_types linear_attention: layers of this type would see the tokens of one",
        "jamba": "gated DeltaNet, KDA and Mamba-2",
        "cache": "output_final_state True: is not supported under context parallelism",
        "built before": "was built before huggingface.register()",
        "offsets": "cu_seq_lens_q (2,): is not supported under context parallelism",
        "index": "seq_idx (1, 120): is not supported under context parallelism",
        "not reached": "mixes the tokens of one rank outside of attention",
    }
    for name, part in parts.items():
        assert part in answers[name], (name, answers)


@pytest.mark.parametrize(
    ("config", "hooked", "refused"),
    [
        ({"layer_types": ["full_attention", "conv"]}, (), "conv"),
        ({"layer_types": ["linear_attention"]}, ("causal_conv1d_fn",), "linear_attention"),
        ({"layer_types": ["chunked_attention", "moe"]}, ("mamba2_chunk_scan",), "chunked_att"),
        ({"mamba_d_conv": 4}, ("causal_conv1d_fn",), "mamba"),
        ({"mamba_d_conv": 4}, ("mamba2_chunk_scan",), None),
        ({"layer_types": ["conv"]}, ("causal_conv1d_fn",), None),
    ],
)
def test_layers_that_no_hook_reaches_are_refused_by_type(
    config: dict[str, Any], hooked: tuple[str, ...], refused: str | None
) -> None:
    match = f"layer_types {refused}"
    with pytest.raises(ConfigError, match=match) if refused else nullcontext():
        recurrence_hooks.refuse_other_mixers(SimpleNamespace(**config), frozenset(hooked))
