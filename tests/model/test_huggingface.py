"""Tests an unmodified transformers model, sharded, against the same model on one rank; refusals.

The whole model runs transformers' own ``sdpa`` attention with the mask it makes itself from
``position_ids``, so that nothing of the engine is in the reference.
"""

from __future__ import annotations

import re
import sys
from contextlib import nullcontext
from dataclasses import dataclass, field
from importlib.util import find_spec
from textwrap import dedent
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from cp_megatron.context_parallel import ContextParallel
from cp_megatron.errors import ConfigError
from cp_megatron.model import huggingface
from cp_megatron.model.huggingface import attention_interface, batch_plan
from cp_megatron.plan import Mask
from tests.ranks import run_ranks

needs_transformers = pytest.mark.skipif(
    find_spec("transformers") is None, reason="transformers is not installed: pip install '.[hf]'"
)

VOCABULARY = 64
SIZES = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "bos_token_id": None,
    "eos_token_id": None,
}
ODD = (7, 1, 13, 5, 9, 3, 10)  # 48 tokens: every layout divides them among four ranks


@dataclass(frozen=True, kw_only=True)
class Case:
    """One row of documents for every entry, and how it is run."""

    rows: tuple[tuple[int, ...], ...]
    model: str = "llama"
    checkpointing: dict[str, Any] | None = None
    options: dict[str, Any] = field(default_factory=dict)


CASES = {
    "documents": Case(rows=(ODD,)),
    "one document": Case(rows=((48,),)),
    "two rows alike": Case(rows=(ODD, ODD)),
    "two rows apart": Case(rows=((7, 1, 16), (24,))),
    "a row no layout divides": Case(rows=((7, 12, 4),)),
    "exchange": Case(rows=(ODD,), options={"exchange": "all_gather", "layout": "contiguous"}),
    "checkpointing": Case(rows=(ODD,), checkpointing={"use_reentrant": False}),
    "checkpointing, reentrant": Case(rows=(ODD,), checkpointing={"use_reentrant": True}),
    "window in one layer": Case(rows=(ODD,), model="qwen2"),
    "layers that drop keywords": Case(
        rows=(ODD,), model="stablelm", checkpointing={"use_reentrant": False}
    ),
}


def make_model(name: str, attention: str) -> Any:
    """The same weights every time, in float64."""
    import transformers
    from transformers import LlamaConfig, LlamaForCausalLM, Qwen2Config, Qwen2ForCausalLM

    torch.manual_seed(3)
    if name == "stablelm":
        stable = transformers.StableLmConfig(**SIZES, attn_implementation=attention)
        return transformers.StableLmForCausalLM(stable).double().train()
    if name == "qwen2":
        window = {"use_sliding_window": True, "sliding_window": 4, "max_window_layers": 1}
        config = Qwen2Config(**SIZES, **window, attn_implementation=attention)
        return Qwen2ForCausalLM(config).double().train()
    return LlamaForCausalLM(LlamaConfig(**SIZES, attn_implementation=attention)).double().train()


def make_rows(rows: tuple[tuple[int, ...], ...]) -> dict[str, Tensor]:
    """input_ids, position_ids and labels [B, S]; no document's first token is a target."""
    generator = torch.Generator().manual_seed(5)
    ids = torch.randint(0, VOCABULARY, (len(rows), sum(rows[0])), generator=generator)
    positions = torch.stack([torch.cat([torch.arange(n) for n in row]) for row in rows])
    labels = torch.where(positions == 0, batch_plan.IGNORED_LABEL, ids)
    return {"input_ids": ids, "position_ids": positions, "labels": labels}


def token_losses(logits: Tensor, labels: Tensor) -> Tensor:
    """Their sum in float64: transformers' own loss rounds logits to float32."""
    return F.cross_entropy(logits.flatten(0, 1), labels.flatten(), reduction="sum")


def relative(x: Tensor, reference: Tensor) -> float:
    return float((x - reference).norm() / reference.norm())


def summed(x: Tensor, group: dist.ProcessGroup | None) -> Tensor:
    x = x.detach().clone()
    if group is not None:
        dist.all_reduce(x, group=group)
    return x


def case_errors(case: Case, group: dist.ProcessGroup | None) -> dict[str, float]:
    """Relative errors of the ranks' summed loss and gradients, by name."""
    rows = make_rows(case.rows)
    counted = (rows["labels"][:, 1:] >= 0).sum()
    whole = make_model(case.model, "sdpa")
    expected = whole(**rows, num_items_in_batch=counted, use_cache=False)
    expected.loss.backward()

    model = make_model(case.model, "cp_megatron")
    if case.checkpointing is not None:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs=case.checkpointing)
    batch = huggingface.shard_batch(group, **rows, **case.options)
    found = model(**batch)
    found.loss.backward()

    shifted = F.pad(rows["labels"][:, 1:], (0, 1), value=batch_plan.IGNORED_LABEL)
    losses = summed(token_losses(found.logits, batch["shift_labels"]), group)
    errors = {
        "loss": relative(losses, token_losses(expected.logits, shifted)),
        "reported loss": relative(summed(found.loss, group), expected.loss) * 1e-6,  # in float32
    }
    for (name, parameter), reference in zip(
        model.named_parameters(), whole.parameters(), strict=True
    ):
        errors[name] = relative(summed(parameter.grad, group), reference.grad)
    return errors


def all_errors(rank: int, world_size: int) -> dict[str, dict[str, float]]:
    """Every case on one, two and four ranks of one job: importing transformers costs seconds."""
    huggingface.register()
    pairs = [dist.new_group([0, 1]), dist.new_group([2, 3])]
    groups = {1: None, 2: pairs[rank // 2], 4: dist.group.WORLD}
    return {
        f"{name}, {size} ranks": case_errors(case, group)
        for size, group in groups.items()
        for name, case in CASES.items()
    }


@needs_transformers
def test_loss_and_gradients_are_the_whole_model_s() -> None:
    for result in run_ranks(all_errors, 4, timeout=200):
        for name, errors in result.items():
            assert max(errors.values()) < 1e-12, (name, errors)


def example() -> str:
    assert huggingface.__doc__ is not None
    found = re.search(r"huggingface\.register\(\)\n.*?backward\(\)", huggingface.__doc__, re.DOTALL)
    assert found is not None
    return dedent(f"    {found.group()}")


def example_gradient(rank: int, world_size: int) -> float:
    from transformers import AutoModelForCausalLM, LlamaConfig

    rows = make_rows((ODD,))
    names: dict[str, Any] = {
        "AutoModelForCausalLM": AutoModelForCausalLM,
        "huggingface": huggingface,
        "config": LlamaConfig(**SIZES),
        "group": dist.group.WORLD,
        **dict(zip(("ids", "positions", "labels"), rows.values(), strict=True)),
    }
    torch.manual_seed(0)
    exec(example(), names)
    gradient = summed(names["model"].lm_head.weight.grad, names["group"])
    torch.manual_seed(0)
    alone = {**names, "group": None}
    exec(example(), alone)
    return relative(gradient, alone["model"].lm_head.weight.grad)


@needs_transformers
def test_the_example_runs_and_is_exact() -> None:
    assert max(run_ranks(example_gradient, 2)) < 1e-6  # a float32 model


# ---- refusals ------------------------------------------------------------------------------------


def answers_of_the_model(rank: int, world_size: int) -> dict[str, str]:
    """The errors of a real model for calls that the engine does not support."""
    huggingface.register()
    rows = make_rows((ODD,))
    batch = huggingface.shard_batch(None, **rows)
    dropping = make_model("llama", "cp_megatron")
    for layer in dropping.model.layers:
        layer.self_attn.attention_dropout = 0.1
    model = make_model("llama", "cp_megatron")
    whole_mask = torch.ones(1, 1, 48, 48, dtype=torch.bool)
    padding = (rows["input_ids"] >= 0).long()
    padding[0, -1] = 0
    cache = model(**{**batch, "use_cache": True}).past_key_values
    calls: dict[str, Any] = {
        "no plan": lambda: model(**rows),
        "a whole mask": lambda: model(**batch, attention_mask=whole_mask),
        "padding": lambda: model(**batch, attention_mask=padding),
        "cache": lambda: model(**batch, past_key_values=cache),
        "dropout": lambda: dropping(**batch),
        "probabilities": lambda: model(**batch, output_attentions=True),
        "both ways": lambda: model(**batch, is_causal=False),
    }
    answers = {}
    for name, call in calls.items():
        try:
            answers[name] = f"accepted: {call().loss}"
        except ConfigError as error:
            answers[name] = str(error)
    dropping.eval()(**batch)  # no dropout outside training
    return answers


@needs_transformers
def test_a_model_is_refused_what_is_not_supported() -> None:
    (answers,) = run_ranks(answers_of_the_model, 1)
    starts = {
        "no plan": "context_parallel None",
        "a whole mask": "attention_mask (1, 1, 48, 48)",
        "padding": "attention_mask with zeros",
        "cache": "past_key_values: gives 48 queries 96 keys",
        "dropout": "attention_dropout 0.1",
        "probabilities": "output_attentions True",
        "both ways": "attention LlamaAttention: must be causal",
    }
    assert answers.keys() == starts.keys()
    for name, start in starts.items():
        assert answers[name].startswith(start), answers[name]


def plan_of(longest: int) -> huggingface.BatchPlan:
    return huggingface.BatchPlan(cp=ContextParallel(None, Mask.causal(6)), longest=longest)


def call_attention(module: Any = None, **kwargs: Any) -> Tensor:
    query, key = torch.ones(1, 4, 6, 8), torch.ones(1, 2, 6, 8)
    given = {"context_parallel": plan_of(6), **kwargs}
    mask, module = attention_interface.WantedMask(None), module or nn.Identity()
    return huggingface.attention(module, query, key, key, mask, **given)[0]


class SomeCrossAttention(nn.Identity):
    """Named as in transformers, where some cross-attentions do not set ``is_causal = False``."""


@pytest.mark.parametrize(
    ("kwargs", "start"),
    [
        ({"softcap": 0.0}, "softcap 0.0: must be positive"),
        ({"sinks": torch.ones(1, 4, 6, 1)}, "sinks (1, 4, 6, 1), torch.float32: must be one real"),
        ({"sinks": torch.ones(4), "s_aux": torch.ones(4)}, "sinks (4,): are given a second time"),
        ({"position_bias": torch.ones(1, 4, 6, 6)}, "position_bias (1, 4, 6, 6)"),
        ({"cu_seq_lens_q": torch.tensor([0, 6])}, "cu_seq_lens_q (2,)"),
        ({"output_router_logits": True}, "output_router_logits True"),
        ({"module": SomeCrossAttention()}, "attention SomeCrossAttention: must be causal"),
        ({"sliding_window": 4}, "sliding_window 4: differs from None"),
    ],
)
def test_attention_refuses(kwargs: dict[str, Any], start: str) -> None:
    with pytest.raises(ConfigError, match=re.escape(start)):
        call_attention(**kwargs)


def test_attention_ignores_what_is_off() -> None:
    out = call_attention(softcap=None, output_attentions=False, position_ids=torch.arange(6))
    assert out.shape == (1, 6, 4, 8)


def test_sinks_and_softcap_reach_the_engine() -> None:
    sinks = torch.tensor([0.0, 1.0, -torch.inf, 2.0])
    q, k = torch.ones(1, 6, 4, 8), torch.ones(1, 6, 2, 8)
    expected = plan_of(6).cp.attention(q, k, k, sinks=sinks, softcap=2.0)
    for name in ("s_aux", "sinks"):
        assert torch.equal(call_attention(softcap=2.0, **{name: sinks}), expected)
    assert not torch.equal(call_attention(), expected)


@pytest.mark.parametrize(
    ("rope", "longest", "refused"),
    [
        ({"rope_type": "dynamic"}, 9, True),
        ({"rope_type": "dynamic"}, 8, False),
        ({"rope_type": "longrope", "original_max_position_embeddings": 4}, 5, True),
        ({"sliding_attention": {"rope_type": "dynamic"}}, 9, True),
    ],
)
def test_frequencies_that_follow_the_length_are_refused(
    rope: dict[str, Any], longest: int, refused: bool
) -> None:
    """Ranks see different largest positions, and would rotate differently."""
    config = SimpleNamespace(rope_parameters=rope, max_position_embeddings=8)
    plan, module = plan_of(longest), nn.Identity()
    module.config = config
    call_attention(module=module, context_parallel=plan)  # one rank sees them all
    plan.cp.cp_size = 2
    with pytest.raises(ConfigError, match="rope_type") if refused else nullcontext():
        attention_interface._refuse_changing_rope(config, plan)


@pytest.mark.parametrize(
    ("kwargs", "start"),
    [
        ({"attention_mask": torch.tensor([[True, False]])}, "attention_mask with zeros"),
        ({"attention_mask": torch.tensor([[1, 1, 2]])}, "attention_mask with numbers"),
        ({"use_vmap": True}, "attention_mask: the model adds conditions"),
        ({"q_length": 1, "kv_length": 5}, "past_key_values: gives 1 queries 5 keys"),
    ],
)
def test_masks_refused(kwargs: dict[str, Any], start: str) -> None:
    with pytest.raises(ConfigError, match=re.escape(start)):
        attention_interface.wanted_mask(**kwargs)


def overlaid_mask(rank: int, world_size: int) -> str:
    """As in models whose image tokens see each other in both directions."""
    from transformers.masking_utils import causal_mask_function, or_masks

    overlaid = or_masks(causal_mask_function, causal_mask_function)
    with pytest.raises(ConfigError) as refused:
        attention_interface.wanted_mask(mask_function=overlaid)
    attention_interface.wanted_mask(mask_function=causal_mask_function)
    return str(refused.value)


@needs_transformers
def test_blocks_seen_both_ways_are_refused() -> None:
    (answer,) = run_ranks(overlaid_mask, 1)
    assert answer.startswith("attention_mask: the model adds conditions")


def test_without_transformers(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(ConfigError, match="needs the package transformers"):
        huggingface.register()


# ---- the batch -----------------------------------------------------------------------------------


def test_a_batch_of_one_rank() -> None:
    """Positions separate documents, labels are shifted, and rows that differ are joined."""
    ids = torch.tensor([[10, 11, 12, 13], [20, 21, 22, 23]])
    positions = torch.tensor([[0, 1, 0, 1], [4, 5, 6, 8]])  # the second row goes on with a document
    batch = huggingface.shard_batch(None, input_ids=ids, position_ids=positions, labels=ids)
    assert batch["context_parallel"].cp.mask == Mask.documents([2, 2, 3, 1])
    assert batch["input_ids"].tolist() == [[10, 11, 12, 13, 20, 21, 22, 23]]
    assert batch["position_ids"].tolist() == [[0, 1, 0, 1, 4, 5, 6, 8]]
    assert batch["shift_labels"].tolist() == [[11, 12, 13, -100, 21, 22, 23, -100]]
    assert batch["labels"] is batch["shift_labels"]
    assert (batch["num_items_in_batch"], batch["use_cache"]) == (6, False)
    assert batch["context_parallel"].longest == 9


def test_rows_alike_stay_rows() -> None:
    ids = torch.arange(8).view(2, 4)
    batch = huggingface.shard_batch(None, input_ids=ids, num_items_in_batch=9)
    assert batch["context_parallel"].cp.mask == Mask.causal(4)
    assert batch["input_ids"].tolist() == ids.tolist()
    assert not {"labels", "num_items_in_batch"} & batch.keys()
    packed = torch.tensor([0, 1, 0, 1])
    batch = huggingface.shard_batch(None, input_ids=ids, position_ids=packed)
    assert batch["context_parallel"].cp.mask == Mask.documents([2, 2])


def test_labels_that_all_do_not_count_cost_nothing() -> None:
    ids = torch.arange(4)[None]
    batch = huggingface.shard_batch(None, input_ids=ids, labels=torch.full_like(ids, -100))
    assert batch["num_items_in_batch"] == 1  # an empty sum is divided by 1, not by 0


IDS = torch.zeros(2, 4, dtype=torch.int64)


@pytest.mark.parametrize(
    ("kwargs", "start"),
    [
        ({}, "shard_batch: needs either input_ids or inputs_embeds"),
        (
            {
                **dict.fromkeys(("input_ids", "labels"), torch.ones(2, 4).long()),
                "attention_mask": torch.tensor([[0, 0, 1, 1], [1, 1, 1, 0]]),
                "num_items_in_batch": 6,
            },
            "labels 3 of them: belong to padding or to the token after it",
        ),
        (
            {"input_ids": torch.ones(0, 8).long()},
            "tokens (0, 8): must be at least one token of one row",
        ),
        ({"input_ids": IDS, "labels": IDS[:, :3]}, "labels (2, 3)"),
        ({"input_ids": IDS, "position_ids": IDS[:, :3]}, "position_ids (2, 3)"),
        ({"input_ids": IDS, "position_ids": IDS[None]}, "position_ids (1, 2, 4)"),
        ({"input_ids": IDS, "attention_mask": IDS - 1}, "attention_mask with -1"),
        ({"input_ids": IDS, "output_hidden_states": True}, "output_hidden_states True"),
        ({"input_ids": IDS, "layout": "diagonal"}, "--cp-layout diagonal"),
    ],
)
def test_batches_refused(kwargs: dict[str, Any], start: str) -> None:
    with pytest.raises(ConfigError, match=re.escape(start)):
        huggingface.shard_batch(None, **kwargs)


def test_a_window_keeps_the_batch_s_layout_and_is_planned_once() -> None:
    cp = ContextParallel(None, Mask.documents([4, 9]))
    plan = huggingface.BatchPlan(cp=cp, longest=9)
    windowed = plan.within(3)
    assert windowed.mask == Mask.documents([4, 9], window=(2, 0))
    assert windowed.layout is cp.layout
    assert plan.within(3) is windowed
    assert plan.within(9) is cp  # wider than any document
    assert plan.within(None) is cp
