"""Tests which transformers models are refused, by name and by the probe, and when."""

from __future__ import annotations

import importlib
import pickle
from collections.abc import Callable, Mapping
from copy import deepcopy
from importlib.util import find_spec
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from cp_megatron.errors import ConfigError
from cp_megatron.families.refusals import ADAPTER_SERVES
from cp_megatron.model import huggingface
from cp_megatron.model.huggingface import attention_interface, check_model
from tests.model import family_table
from tests.model.family_table import causal_families, outcome_of, sharded_row, try_family, whole_row
from tests.model.test_huggingface import SIZES, make_rows
from tests.ranks import run_ranks

needs_transformers = pytest.mark.skipif(
    find_spec("transformers") is None, reason="transformers is not installed: pip install '.[hf]'"
)

STATES = "layer_types linear_attention: layers of this type would see the tokens of one rank"
ITSELF = "never calls the registered attention"
MASK = "attention_mask: does not exist as a tensor, but {} computes with it"
# model types, their classes, and what becomes of them: "" is equal, else a part of the refusal.
FAMILIES: Mapping[str, tuple[str, str]] = {
    "llama": ("LlamaForCausalLM", ""),
    "gpt2": ("GPT2LMHeadModel", ""),
    "bart": ("BartForCausalLM", "numbers the tokens of each rank from 0"),
    "bloom": ("BloomForCausalLM", MASK.format("bloom")),
    "falcon": ("FalconForCausalLM", "attn_implementation cp_megatron: is unknown to FalconForC"),
    "gpt_neo": ("GPTNeoForCausalLM", "attn_implementation cp_megatron: is unknown to GPTNeo"),
    "mamba": ("MambaForCausalLM", STATES),
    "rwkv": ("RwkvForCausalLM", ITSELF),
    "xlnet": ("XLNetLMHeadModel", ITSELF),
    "openai-gpt": ("OpenAIGPTLMHeadModel", ITSELF),
    "qwen3": ("Qwen3ForSequenceClassification", "reads the last token of each rank's part"),
    "roberta": ("RobertaForCausalLM", "begins its positions at another number than 0"),
    "stablelm": ("StableLmForCausalLM", ""),  # its layers drop keyword arguments
    "gpt_oss": ("GptOssForCausalLM", ""),
    "gemma2": ("Gemma2ForCausalLM", ""),
    "deepseek_v3": ("DeepseekV3ForCausalLM", ""),
    "qwen3_moe": ("Qwen3MoeForCausalLM", ""),
    "mixtral": ("MixtralForCausalLM", ""),
    "olmoe": ("OlmoeForCausalLM", ""),
}


def outcomes(rank: int, world_size: int) -> list[family_table.Outcome]:
    """All in one job, because importing transformers costs seconds."""
    return [outcome_of(rank, world_size, name, model) for name, (model, _) in FAMILIES.items()]


@needs_transformers
def test_a_family_is_equal_or_refused_with_the_reason() -> None:
    for found in run_ranks(outcomes, 2, timeout=200)[0]:
        _, reason = FAMILIES[found.family]
        assert found.result == ("refused" if reason else "equal"), found
        assert reason in found.reason


@needs_transformers
@pytest.mark.slow
def test_no_causal_family_is_wrong_or_crashes() -> None:
    results = [try_family(*item) for item in causal_families().items()]
    faults = [found for found in results if found.result in ("wrong", "crashed")]
    assert faults == []
    equal = {found.model for found in results if found.result == "equal"}
    assert len(equal) > 90
    # ``ADAPTER_SERVES`` decides what the owner of a refused folder is told. Another version of
    # transformers may lack a family.
    known = {found.model for found in results if found.result != "lacks"}
    assert known & ADAPTER_SERVES == equal


# ---- models that nobody has listed ---------------------------------------------------------------


def custom_models() -> dict[str, Any]:
    """Classes made of Llama, each with one habit; rank processes alone import transformers."""
    library = importlib.import_module("transformers")
    llama = library.LlamaForCausalLM

    def changed(change: Callable[[Tensor], Tensor], drop: str = "") -> type:
        class Custom(llama):  # type: ignore[misc, valid-type]
            def forward(self, input_ids: Any = None, **kwargs: Any) -> Any:
                kwargs.pop(drop, None)
                out = super().forward(input_ids=input_ids, **kwargs)
                out.logits = change(out.logits)
                return out

        return Custom

    class AttendsTwice(llama):  # type: ignore[misc, valid-type]
        def forward(self, input_ids: Any = None, **kwargs: Any) -> Any:
            x = self.model.embed_tokens(input_ids)[:, None]
            seen = F.scaled_dot_product_attention(x, x, x, is_causal=True)[:, 0]
            out = super().forward(input_ids=input_ids, **kwargs)
            out.logits = out.logits + self.lm_head(seen)
            return out

    class DropsInside(llama):  # type: ignore[misc, valid-type]
        def __init__(self, config: Any) -> None:
            super().__init__(config)
            own = self.model.forward
            self.model.forward = lambda *args, context_parallel=None, **kw: own(*args, **kw)

    class Value(llama):  # type: ignore[misc, valid-type]
        def forward(self, input_ids: Any = None, **kwargs: Any) -> Any:
            out = super().forward(input_ids=input_ids, **kwargs)
            out.logits = out.logits[:, -1]
            return out

    return {
        "per token": changed(torch.tanh),
        "positions": changed(torch.tanh, drop="position_ids"),
        "state": changed(lambda x: x + 0.1 * x.cumsum(1)),
        "short convolution": changed(lambda x: x + 0.1 * F.pad(x, (0, 0, 1, 0))[:, :-1]),
        "mean": changed(lambda x: x - x.mean(1, keepdim=True)),
        "future": changed(lambda x: x + 0.1 * x.roll(-1, 1)),
        "keywords": changed(torch.tanh, drop="context_parallel"),
        "keywords in the base": DropsInside,
        "own attention": AttendsTwice,
        "pooling": Value,
    }


class Previous(nn.Module):
    """Adds the previous token to the result of another module."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module

    def forward(self, x: Tensor) -> Tensor:
        return self.module(x) + F.pad(x, (0, 0, 1, 0))[:, :-1]


class Adapter(nn.Module):
    """A low-rank adapter, whose second factor begins as zeros."""

    def __init__(self, module: nn.Linear) -> None:
        super().__init__()
        self.module = module
        self.factors = nn.Sequential(
            nn.Linear(module.in_features, 2), nn.Linear(2, module.out_features)
        )
        nn.init.zeros_(self.factors[1].weight)

    def forward(self, x: Tensor) -> Tensor:
        return self.module(x) + self.factors(x)


def changed_after_build(
    config: Any, change: Callable[[Any], nn.Module], device: str = "cpu"
) -> Any:
    library = importlib.import_module("transformers")
    with torch.device(device):
        model = library.LlamaForCausalLM(config)
        for layer in model.model.layers:
            layer.mlp.up_proj = change(layer.mlp.up_proj)
    return model


def refusal(call: Callable[[], object]) -> str:
    try:
        call()
    except ConfigError as error:
        return str(error)
    return ""


def answers_on_custom_models(rank: int, world_size: int) -> dict[str, str]:
    library = importlib.import_module("transformers")
    config = library.LlamaConfig(**SIZES)
    answers = {
        name: refusal(lambda kind=kind: huggingface.check(kind(config)))  # type: ignore[misc]
        for name, kind in custom_models().items()
    }
    stateful = custom_models()["state"](config)
    answers["itself"] = refusal(lambda: huggingface.check(stateful, itself=True))
    answers["itself, right"] = refusal(
        lambda: huggingface.check(library.LlamaForCausalLM(config), itself=True)
    )
    with torch.device("meta"):
        empty = library.LlamaForCausalLM(config)
    answers["itself, empty"] = refusal(lambda: huggingface.check(empty, itself=True))
    with torch.device("meta"):  # before weights are loaded
        answers["large"] = refusal(
            lambda: huggingface.check(library.LlamaForCausalLM(library.LlamaConfig()))
        )
    square = library.LlamaConfig(**{**SIZES, "intermediate_size": SIZES["hidden_size"]})
    for name, change, device in (
        ("previous token put in", Previous, "cpu"),
        ("previous token put in, empty", Previous, "meta"),
        ("adapter put in", Adapter, "cpu"),
        ("linear put in, empty", lambda module: nn.Linear(32, 32), "meta"),
    ):
        put_in = changed_after_build(square, change, device)
        answers[name] = refusal(lambda model=put_in: huggingface.check(model))  # type: ignore[misc]
    model = library.LlamaForCausalLM(config)
    wrapped = nn.Sequential(model)
    answers["wrapped"] = refusal(lambda: huggingface.check(wrapped))
    answers["no model"] = refusal(lambda: huggingface.check(nn.Linear(2, 2)))
    tokens = library.LlamaForTokenClassification(config)
    answers["logits alone"] = refusal(lambda: huggingface.check(tokens, loss=False))
    answers["own loss"] = refusal(lambda: huggingface.check(tokens))
    return answers


@needs_transformers
def test_the_probe_sees_what_mixes_tokens() -> None:
    (answers,) = run_ranks(answers_on_custom_models, 1)
    mixes = "mixes the tokens of one rank outside of attention"
    expected = {
        "per token": "",
        "positions": "numbers the tokens of each rank from 0",
        "state": mixes,
        "short convolution": mixes,
        "mean": mixes,
        "future": mixes,
        "keywords": "",
        "keywords in the base": "does not pass keyword arguments on to its attention",
        "own attention": mixes,
        "pooling": "returns no entry per token",
        "itself": mixes,
        "itself, right": "",
        "itself, empty": "itself True: needs whole parameters",
        "large": "",
        "previous token put in": mixes,
        "previous token put in, empty": "contains Previous at model.layers.0.mlp.up_proj, which",
        "adapter put in": "",
        "linear put in, empty": "",
        "wrapped": "",
        "no model": "contains no transformers model",
        "logits alone": "",
        "own loss": "labels for LlamaForTokenClassification: computes a loss that is not the sum",
    }
    assert answers.keys() == expected.keys()
    for name, part in expected.items():
        assert bool(answers[name]) == bool(part), (name, answers[name])
        assert part in answers[name], (name, answers[name])


# ---- when models are checked ---------------------------------------------------------------------


def answers_at_first_use(rank: int, world_size: int) -> dict[str, Any]:
    """What calls with a sharded batch answer, without any call of ``check``."""
    library = importlib.import_module("transformers")
    huggingface.register()
    rows = make_rows(((24,),))
    batch = huggingface.shard_batch(dist.group.WORLD, **rows)
    config = library.LlamaConfig(**SIZES)
    forgotten = library.LlamaForCausalLM(library.LlamaConfig(**SIZES))
    set_later = library.LlamaForCausalLM(config)
    set_later.set_attn_implementation("cp_megatron")
    tiny = {"vocab_size": 64, "n_embd": 32, "n_layer": 1, "n_head": 2}
    gpt = library.OpenAIGPTLMHeadModel(library.OpenAIGPTConfig(**tiny))
    tokens = library.LlamaForTokenClassification(config)
    tokens.set_attn_implementation("cp_megatron")
    pooling = library.LlamaForSequenceClassification(library.LlamaConfig(**SIZES, pad_token_id=0))
    pooling.set_attn_implementation("cp_megatron")
    huggingface.take_whole_rows(pooling, dist.group.WORLD)
    dropping = library.OPTForCausalLM(library.OPTConfig(layerdrop=0.5, num_hidden_layers=1))

    calls = 0
    try_sharding = check_model.try_sharding

    def counting(*args: Any) -> Any:
        nonlocal calls
        calls += 1
        return try_sharding(*args)

    check_model.try_sharding = counting  # type: ignore[assignment]
    state = torch.get_rng_state()
    set_later.train()(**batch)
    untouched = bool((torch.get_rng_state() == state).all()) and set_later.training
    copy = pickle.loads(pickle.dumps(deepcopy(set_later)))
    for model in (set_later, copy):
        model(**batch)
    check_model.try_sharding = try_sharding
    copy.model.norm = Previous(copy.model.norm)
    without_labels = {name: batch[name] for name in batch if "labels" not in name}
    return {
        "forgotten": refusal(lambda: forgotten(**batch)),
        "gpt": refusal(lambda: gpt(**batch)),
        "own loss": refusal(lambda: tokens(**batch)),
        "no labels": refusal(lambda: tokens(**without_labels)),
        "pooling": refusal(lambda: pooling(input_ids=rows["input_ids"])),
        "put in later": refusal(lambda: copy(**batch)),
        "layerdrop": refusal(lambda: huggingface.check(dropping)),
        "probes": calls,
        "untouched": untouched,
    }


@needs_transformers
def test_a_model_is_checked_once_when_it_is_first_used() -> None:
    for answers in run_ranks(answers_at_first_use, 2):
        assert answers["forgotten"].startswith("attn_implementation sdpa: of LlamaForCausalLM")
        assert "model OpenAIGPTLMHeadModel" in answers["gpt"]
        assert answers["own loss"].startswith("labels for LlamaForTokenClassification")
        assert answers["no labels"] == ""
        assert answers["pooling"].startswith("model LlamaForSequenceClassification: reads the last")
        assert "mixes the tokens of one rank outside of attention" in answers["put in later"]
        assert answers["layerdrop"].startswith("layerdrop 0.5: of OPTForCausalLM skips layers")
        assert (answers["probes"], answers["untouched"]) == (1, True)


def unchecked_attention(rank: int, world_size: int) -> list[str]:
    """A model that was built before ``register`` and whose config was changed behind its back."""
    library = importlib.import_module("transformers")
    huggingface.register()
    model = library.LlamaForCausalLM(library.LlamaConfig(**SIZES))
    for part in model.modules():
        part._forward_pre_hooks.clear()  # as if it had been built before register
    model.config._attn_implementation = "cp_megatron"
    batch = huggingface.shard_batch(None, **make_rows(((24,),)))
    answers = [refusal(lambda: model(**batch))]
    huggingface.check(model)
    return [*answers, refusal(lambda: model(**batch))]


@needs_transformers
def test_attention_refuses_a_model_that_was_not_checked() -> None:
    ((before, after),) = run_ranks(unchecked_attention, 1)
    assert before.startswith("attention LlamaAttention: belongs to a model that was not checked")
    assert after == ""


# ---- masks used as tensors -----------------------------------------------------------------------


@pytest.mark.parametrize(
    "use",
    [
        lambda mask: mask.dtype,
        lambda mask: mask[:, :, :, :4],
        lambda mask: mask + torch.ones(2),
        lambda mask: torch.ones(2) + mask,
        lambda mask: 1.0 - mask,
        lambda mask: ~mask,
        lambda mask: mask == 0,
        lambda mask: torch.where(mask, torch.ones(2), torch.zeros(2)),
        lambda mask: torch.ones(2).masked_fill(mask, 0.0),
        lambda mask: F.pad(mask, (0, 1)),
        list,
        len,
        bool,
    ],
)
def test_a_mask_used_as_a_tensor_is_refused(use: Callable[[Any], object]) -> None:
    mask = attention_interface.WantedMask(None, "bloom")
    with pytest.raises(ConfigError, match="but bloom computes with it"):
        use(mask)


def test_a_mask_can_be_copied_and_compared() -> None:
    mask = attention_interface.WantedMask(4)
    assert deepcopy(mask) == pickle.loads(pickle.dumps(mask)) == mask
    assert not isinstance(mask, Tensor)
    assert mask is not None


# ---- mixtures of experts -------------------------------------------------------------------------


ROUTED = {"qwen3_moe": "Qwen3MoeForCausalLM", "granitemoehybrid": "GraniteMoeHybridForCausalLM"}


def answers_on_router_losses(rank: int, world_size: int) -> dict[str, str]:
    """A router's loss that the config or the call requests, before the check and after it.

    Granite's hybrid has layers with states alone, so that no attention hears of the request.
    """
    huggingface.register()
    batch = huggingface.shard_batch(dist.group.WORLD, **make_rows(((24,),)))
    answers = {}
    for family, name in ROUTED.items():
        model = family_table.build(family, name, "cp_megatron")
        answers[f"{family}, off"] = refusal(lambda model=model: model(**batch))  # type: ignore[misc]
        answers[f"{family}, call"] = refusal(
            lambda model=model: model(**batch, output_router_logits=True)  # type: ignore[misc]
        )
        model.config.output_router_logits = True
        answers[f"{family}, config"] = refusal(lambda model=model: model(**batch))  # type: ignore[misc]
        asked = family_table.build(family, name, "cp_megatron")
        asked.config.output_router_logits = True
        answers[f"{family}, check"] = refusal(lambda asked=asked: huggingface.check(asked))  # type: ignore[misc]
    return answers


@needs_transformers
def test_the_loss_of_routers_is_refused_wherever_it_is_requested() -> None:
    for answers in run_ranks(answers_on_router_losses, 2, timeout=200):
        assert len(answers) == 8
        for name, answer in answers.items():
            start = "" if name.endswith("off") else "output_router_logits True: is not supported"
            assert answer.startswith(start), (name, answer)
            assert bool(answer) == bool(start), (name, answer)


def errors_of_experts(rank: int, world_size: int) -> dict[str, float]:
    """The largest of logits and gradients in float32, by how transformers computes the experts."""
    huggingface.register()
    errors = {}
    for way in ("eager", "batched_mm", "grouped_mm"):
        sharded, whole = (
            family_table.build("qwen3_moe", ROUTED["qwen3_moe"], attention).float()
            for attention in ("cp_megatron", "eager")
        )
        sharded.set_experts_implementation(way)
        row = family_table.ROWS["seven packed"]
        found, expected = sharded_row(sharded, row), whole_row(whole, row)
        errors[way] = family_table.error_of(found, expected)
    return errors


@needs_transformers
def test_experts_are_exact_in_every_way_that_transformers_has() -> None:
    for errors in run_ranks(errors_of_experts, 2, timeout=200):
        assert max(errors.values()) < 1e-5, errors
