"""Which kernel is taken, every refusal, and what it says works instead."""

from __future__ import annotations

import importlib.util
import re
from importlib.machinery import ModuleSpec
from typing import Any

import pytest

from cp_megatron.errors import ConfigError
from cp_megatron.kernels.select import KernelChoice, select_kernel

CPU: dict[str, Any] = {"device": "cpu", "dtype": "float32", "head_dim": 64}
GPU: dict[str, Any] = {"device": "cuda", "dtype": "bfloat16", "head_dim": 64}


@pytest.fixture(params=[False, True], ids=["without flash_attn", "with flash_attn"])
def installed(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> bool:
    """Whether the optional package can be found, on any machine."""
    original = importlib.util.find_spec

    def find(name: str, package: str | None = None) -> ModuleSpec | None:
        if name != "flash_attn":
            return original(name, package)
        return ModuleSpec(name, None) if request.param else None

    monkeypatch.setattr(importlib.util, "find_spec", find)
    return bool(request.param)


def refusal(name: str, **wanted: Any) -> str:
    with pytest.raises(ConfigError) as caught:
        select_kernel(name, **wanted)
    assert caught.value.flag == "--kernel"
    return str(caught.value)


def test_auto_takes_the_first_that_can(installed: bool) -> None:
    assert select_kernel("auto", **CPU).name == "cpu"
    assert select_kernel("auto", **CPU | {"dtype": "float64"}).name == "cpu"
    assert select_kernel("auto", **CPU | {"head_dim": 1024}).name == "reference"
    assert select_kernel("auto", **GPU).name == ("flash_attn" if installed else "cuda")
    for wanted in ({"dtype": "float32"}, {"head_dim": 65}, {"head_dim": 264}):
        assert select_kernel("auto", **GPU | wanted).name == "reference"


def test_auto_says_what_it_passed_over(installed: bool) -> None:
    choice = select_kernel("auto", **GPU | {"head_dim": 20})
    assert "eager PyTorch" in choice.reason
    assert "not cuda: head dim 20 must be a multiple of 8" in choice.reason
    if not installed:
        assert "not flash_attn: needs the package flash_attn" in choice.reason


def test_a_name_is_taken_and_said(installed: bool) -> None:
    expected = "asked for: eager PyTorch, quadratic memory, the oracle"
    assert select_kernel("reference", **CPU) == KernelChoice(name="reference", reason=expected)
    assert select_kernel("cuda", **GPU).name == "cuda"


REFUSED = [
    ("triton", CPU, "is no kernel (works: auto, reference, cpu, cuda, flash_attn)"),
    ("cuda", CPU, "runs on cuda, not on cpu (works: --kernel auto or --kernel reference or"),
    ("cpu", GPU, "runs on cpu, not on cuda"),
    ("flash_attn", CPU, "runs on cuda, not on cpu"),
    ("cuda", GPU | {"dtype": "float64"}, "computes in bfloat16, not in float64"),
    ("cpu", CPU | {"dtype": "float16"}, "computes in float64, float32, bfloat16, not in float16"),
    ("cpu", CPU | {"head_dim": 513}, "head dim 513 is above its largest, 512"),
    ("cuda", GPU | {"head_dim": 264}, "head dim 264 is above its largest, 256"),
    ("cuda", GPU | {"head_dim": 12}, "head dim 12 must be a multiple of 8"),
    ("cpu", CPU | {"attention_dropout": 0.1}, "has no attention dropout (works: --attention-drop"),
    ("reference", CPU | {"attention_dropout": 0.1}, "(works: --attention-dropout 0)"),
    ("auto", CPU | {"attention_dropout": 0.1}, "not reference: has no attention dropout"),
]


@pytest.mark.parametrize(("name", "wanted", "message"), REFUSED)
def test_every_refusal(name: str, wanted: dict[str, Any], message: str, installed: bool) -> None:
    assert re.search(re.escape(message), refusal(name, **wanted))


def test_what_is_offered_instead_works(installed: bool) -> None:
    for name, wanted, _ in REFUSED:
        for other in re.findall(r"--kernel (\w+)", refusal(name, **wanted)[len("--kernel ") :]):
            select_kernel(other, **wanted)


def test_the_package_must_be_installed(installed: bool) -> None:
    if installed:
        assert select_kernel("flash_attn", **GPU).name == "flash_attn"
        assert "head dim 12 must be" in refusal("flash_attn", **GPU | {"head_dim": 12})
        return
    message = refusal("flash_attn", **GPU)
    assert "needs the package flash_attn, which is not installed" in message
    assert message.endswith("or --kernel cuda or pip install -e '.[cuda]')")
