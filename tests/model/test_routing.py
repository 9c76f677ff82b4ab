"""Routing against the routers of transformers, against literal cases, and with broken scores."""

from __future__ import annotations

import importlib
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from cp_megatron.model.routing import RouterChoice, route
from cp_megatron.spec import RoutingSpec

EXPERTS, TOPK, HIDDEN, TOKENS = 16, 4, 8, 50


@dataclass(frozen=True, kw_only=True)
class Family:
    """A router of transformers.

    Attributes:
        name: the module of the family.
        prefix: how the names of its classes begin.
        router: how the name of the router's class ends.
        routing: fields of our ``RoutingSpec``.
        fields: fields of its config.
    """

    name: str
    prefix: str
    router: str = "TopKRouter"
    routing: dict[str, Any] = field(default_factory=dict)
    fields: dict[str, Any] = field(default_factory=dict)

    def made(self) -> nn.Module:
        module = importlib.import_module(f"transformers.models.{self.name}")
        numbers = {"num_experts": EXPERTS, "num_local_experts": EXPERTS, "hidden_size": HIDDEN}
        numbers |= {
            "n_routed_experts": EXPERTS,
            "num_experts_per_tok": TOPK,
            "num_attention_heads": 1,
        }
        config = getattr(module, f"{self.prefix}Config")(**numbers, **self.fields)
        code = importlib.import_module(f"transformers.models.{self.name}.modeling_{self.name}")
        router: nn.Module = getattr(code, self.prefix + self.router)(config)
        return router

    def spec(self) -> RoutingSpec:
        return RoutingSpec(num_experts=EXPERTS, topk=TOPK, **self.routing)


GROUPED = {"num_groups": 4, "group_topk": 2, "group_num_scores": 2}
GROUP_FIELDS = {"n_group": 4, "topk_group": 2}
SIGMOID = {"score_function": "sigmoid", "scaling": 2.5}
FAMILIES = {
    "qwen3 normalized": Family(
        name="qwen3_moe", prefix="Qwen3Moe", fields={"norm_topk_prob": True}
    ),
    "qwen3": Family(
        name="qwen3_moe",
        prefix="Qwen3Moe",
        routing={"pre_softmax": True},
        fields={"norm_topk_prob": False},
    ),
    "mixtral": Family(name="mixtral", prefix="Mixtral"),
    "gpt-oss": Family(name="gpt_oss", prefix="GptOss"),
    "deepseek v2": Family(
        name="deepseek_v2",
        prefix="DeepseekV2",
        router="TopkRouter",
        routing={"pre_softmax": True, "scaling": 16.0},
        fields={"topk_method": "greedy", "routed_scaling_factor": 16.0},
    ),
    "deepseek v2 groups": Family(
        name="deepseek_v2",
        prefix="DeepseekV2",
        router="TopkRouter",
        routing={"pre_softmax": True, **GROUPED, "group_num_scores": 1},
        fields={
            "topk_method": "group_limited_greedy",
            "routed_scaling_factor": 1.0,
            **GROUP_FIELDS,
        },
    ),
    "deepseek v3": Family(
        name="deepseek_v3",
        prefix="DeepseekV3",
        router="TopkRouter",
        routing={**SIGMOID, **GROUPED},
        fields={"routed_scaling_factor": 2.5, **GROUP_FIELDS},
    ),
    "glm4": Family(
        name="glm4_moe",
        prefix="Glm4Moe",
        router="TopkRouter",
        routing={**SIGMOID, "normalizes": False},
        fields={
            "routed_scaling_factor": 2.5,
            "norm_topk_prob": False,
            "n_group": 1,
            "topk_group": 1,
        },
    ),
    "olmoe": Family(
        name="olmoe",
        prefix="Olmoe",
        routing={"pre_softmax": True},
        fields={"norm_topk_prob": False},
    ),
    "granite": Family(name="granitemoe", prefix="GraniteMoe"),
}


def dense(choice: RouterChoice) -> Tensor:
    """[n, E]: the weights, at the places of their experts."""
    n, num_experts = choice.probabilities.shape
    return choice.weights.new_zeros(n, num_experts).scatter(1, choice.experts, choice.weights)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("family", FAMILIES.values(), ids=FAMILIES.keys())
def test_routers_of_transformers(family: Family, dtype: torch.dtype) -> None:
    """Experts, weights and the gradient of the router's weight. Most take a softmax in float32."""
    generator = torch.Generator().manual_seed(3)
    router = family.made().to(dtype)
    for tensor in [*router.parameters(), *router.buffers()]:
        tensor.data.normal_(generator=generator)
    x = torch.randn(TOKENS, HIDDEN, generator=generator, dtype=dtype)
    _, weights, experts = router(x)
    theirs = weights.new_zeros(TOKENS, EXPERTS).scatter(1, experts, weights)
    bias = getattr(router, "e_score_correction_bias", None)
    parameters = dict(router.named_parameters())
    mine = nn.functional.linear(x, parameters["weight"], parameters.get("bias"))
    choice = route(mine, family.spec(), bias)
    assert torch.equal(choice.experts.sort(1).values, experts.sort(1).values)
    torch.testing.assert_close(dense(choice), theirs.to(dtype), rtol=3e-6, atol=1e-6)
    torch.testing.assert_close(choice.probabilities.sum(1), torch.ones(TOKENS, dtype=dtype))
    probe = torch.randn(TOKENS, EXPERTS, generator=generator, dtype=dtype)
    results = (dense(choice) * probe).sum(), (theirs * probe).sum()
    ours, expected = (torch.autograd.grad(result, parameters["weight"])[0] for result in results)
    assert (ours - expected).norm() <= 1e-5 * expected.norm()


def routed(rows: list[list[float]], bias: list[float] | None = None, **spec: Any) -> RouterChoice:
    logits = torch.tensor(rows, dtype=torch.float64)
    biases = None if bias is None else torch.tensor(bias)
    return route(logits, RoutingSpec(num_experts=len(rows[0]), **spec), biases)


def logarithms(*numbers: float) -> list[float]:
    return torch.tensor(numbers, dtype=torch.float64).log().tolist()


def odds(*scores: float) -> list[float]:
    """The logits whose sigmoids are these scores."""
    return torch.tensor(scores, dtype=torch.float64).logit().tolist()


def test_the_softmax_of_the_chosen_logits() -> None:
    choice = routed([logarithms(1, 6, 3, 2)], topk=2)
    assert choice.experts.tolist() == [[1, 2]]
    torch.testing.assert_close(choice.weights, torch.tensor([[6 / 9, 3 / 9]]).double())
    torch.testing.assert_close(choice.probabilities * 12, torch.tensor([[1, 6, 3, 2]]).double())


def test_the_softmax_of_all_logits() -> None:
    choice = routed([logarithms(1, 6, 3, 2)], topk=2, pre_softmax=True, scaling=12.0)
    torch.testing.assert_close(choice.weights, torch.tensor([[6, 3]]).double())


def test_biases_change_the_choice_and_not_the_weights() -> None:
    scores, bias = odds(0.1, 0.6, 0.3, 0.2), [0.45, 0.0, 0.0, 0.5]
    choice = routed([scores], bias, topk=2, score_function="sigmoid", normalizes=False)
    assert choice.experts.tolist() == [[3, 1]]
    torch.testing.assert_close(choice.weights, torch.tensor([[0.2, 0.6]]).double())
    torch.testing.assert_close(choice.probabilities * 12, torch.tensor([[1, 6, 3, 2]]).double())
    shared = routed([scores], bias, topk=2, score_function="sigmoid", scaling=4.0)
    torch.testing.assert_close(shared.weights, torch.tensor([[1, 3]]).double())


@pytest.mark.parametrize(("num_scores", "expected"), [(1, [0, 1]), (2, [2, 3])])
def test_groups_are_ranked_by_their_best_scores(num_scores: int, expected: list[int]) -> None:
    """The best expert alone decides for the first group, two together for the second."""
    scores = odds(0.9, 0.1, 0.6, 0.7, 0.5, 0.5)
    groups: dict[str, Any] = {"num_groups": 3, "group_topk": 1}
    groups["group_num_scores"] = num_scores
    choice = routed([scores], topk=2, score_function="sigmoid", **groups)
    assert sorted(choice.experts[0].tolist()) == expected


def test_experts_of_unused_groups_are_not_chosen_even_if_all_scores_are_negative() -> None:
    """A bias can make them negative, so that 0 would be above them."""
    groups: dict[str, Any] = {"num_groups": 2, "group_topk": 1, "group_num_scores": 1}
    bias = [-3.0, -3.0, -2.0, -2.0]
    choice = routed([odds(0.9, 0.9, 0.1, 0.1)], bias, topk=2, score_function="sigmoid", **groups)
    assert sorted(choice.experts[0].tolist()) == [2, 3]


@pytest.mark.parametrize("family", FAMILIES.values(), ids=FAMILIES.keys())
def test_a_kept_choice_is_used_again(family: Family) -> None:
    generator = torch.Generator().manual_seed(4)
    logits = torch.randn(TOKENS, EXPERTS, generator=generator, dtype=torch.float64)
    spec = family.spec()
    first = route(logits, spec)
    again = route(logits, spec, experts=first.experts)
    assert all(map(torch.equal, first, again))
    # Rounding may change a score, but not which experts computed the token.
    moved = route(-logits, spec, experts=first.experts)
    assert torch.equal(moved.experts, first.experts)


@pytest.mark.parametrize("normalizes", [True, False])
@pytest.mark.parametrize("pre_softmax", [True, False])
@pytest.mark.parametrize("score_function", ["softmax", "sigmoid"])
def test_gradients_of_weights_and_probabilities(
    score_function: str, pre_softmax: bool, normalizes: bool
) -> None:
    spec = RoutingSpec(
        num_experts=6,
        topk=2,
        score_function=score_function,  # type: ignore[arg-type]
        pre_softmax=pre_softmax,
        normalizes=normalizes,
        scaling=1.5,
    )
    logits = torch.randn(5, 6, generator=torch.Generator().manual_seed(5), dtype=torch.float64)
    torch.autograd.gradcheck(lambda x: route(x, spec)[1:], logits.requires_grad_())


@pytest.mark.parametrize(("given", "wide", "dtype"), [
    (torch.bfloat16, "fp32", torch.float32),
    (torch.bfloat16, "model", torch.float32),
    (torch.float32, "fp64", torch.float64),
    (torch.float64, "fp32", torch.float64),
])  # fmt: skip
def test_scores_have_at_least_float32(given: torch.dtype, wide: Any, dtype: torch.dtype) -> None:
    logits = torch.randn(3, 4, generator=torch.Generator().manual_seed(6)).to(given)
    choice = route(logits, RoutingSpec(num_experts=4, topk=2, dtype=wide))
    assert {choice.weights.dtype, choice.probabilities.dtype} == {dtype}


@pytest.mark.parametrize("broken", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("family", FAMILIES.values(), ids=FAMILIES.keys())
def test_scores_that_are_not_finite_make_the_weights_of_their_token_nan(
    family: Family, broken: float
) -> None:
    logits = torch.randn(4, EXPERTS, generator=torch.Generator().manual_seed(7))
    logits[2, 5] = broken
    spec = family.spec()
    for kept in (None, torch.arange(TOPK).expand(4, TOPK)):
        choice = route(logits, spec, experts=kept)
        assert choice.weights.isnan().all(1).tolist() == [False, False, True, False]
        assert choice.weights[[0, 1, 3]].isfinite().all()
        assert choice.experts.min() >= 0 and choice.experts.max() < EXPERTS  # noqa: PT018


@pytest.mark.parametrize("broken", [float("nan"), float("inf"), -float("inf")])
def test_biases_that_are_not_finite_make_the_weights_nan(broken: float) -> None:
    choice = routed([[0.0, 1.0]], [0.0, broken], topk=1, score_function="sigmoid")
    assert choice.weights.isnan().all()
