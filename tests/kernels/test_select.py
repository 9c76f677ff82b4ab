"""The choice of a kernel, every refusal, and the alternatives that a refusal names."""

from __future__ import annotations

import importlib
import re
from pathlib import Path
from typing import Any, get_args

import pytest

from cp_megatron.config.schema import KernelName
from cp_megatron.errors import ConfigError
from cp_megatron.kernels import select
from cp_megatron.kernels.load_kernel import load_kernel
from cp_megatron.kernels.select import (
    KERNEL_NAMES,
    TRAITS,
    KernelChoice,
    KernelTraits,
    candidates,
    select_kernel,
)

CPU: dict[str, Any] = {"device": "cpu", "dtype": "float32", "head_dim": 64}
GPU: dict[str, Any] = {"device": "cuda", "dtype": "bfloat16", "head_dim": 64}
AMPERE, HOPPER, BLACKWELL = (8, 0), (9, 0), (10, 0)


def install(monkeypatch: pytest.MonkeyPatch, *generations: int) -> None:
    """Pretends that exactly these generations of FlashAttention are installed."""

    def installed(traits: KernelTraits) -> bool:
        return traits.package is None or int(traits.name[-1]) in generations

    monkeypatch.setattr(select, "is_installed", installed)


@pytest.fixture(params=[False, True], ids=["without flash_attn", "with flash_attn"])
def installed(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> bool:
    """Whether FlashAttention 2 can be found."""
    install(monkeypatch, *[2] * request.param)
    return bool(request.param)


def refusal(name: str, **wanted: Any) -> str:
    with pytest.raises(ConfigError) as caught:
        select_kernel(name, **wanted)
    assert caught.value.flag == "--kernel"
    return str(caught.value)


def test_auto_takes_the_first_capable_kernel(installed: bool) -> None:
    assert select_kernel("auto", **CPU).name == "cpu"
    assert select_kernel("auto", **CPU | {"dtype": "float64"}).name == "cpu"
    assert select_kernel("auto", **CPU | {"head_dim": 1024}).name == "reference"
    for wanted in ({}, {"head_dim": 65}, {"window": True}, {"deterministic": True}):
        first = "flash_attn" if installed else "cuda"
        assert select_kernel("auto", **GPU | wanted).name == first
    for wanted in ({"dtype": "float32"}, {"head_dim": 264}, {"attention_dropout": 0.1}):
        assert select_kernel("auto", **GPU | wanted).name == "reference"


@pytest.mark.parametrize(
    ("generations", "capability", "expected"),
    [
        ((), HOPPER, "cudnn"),
        ((2,), HOPPER, "cudnn"),
        ((2, 4), HOPPER, "flash_attn_4"),
        ((3, 4), HOPPER, "flash_attn_3"),
        ((3,), BLACKWELL, "cudnn"),
        ((4,), BLACKWELL, "flash_attn_4"),
        ((2,), AMPERE, "flash_attn_2"),
        ((), AMPERE, "cuda"),
    ],
)
def test_auto_takes_the_fastest_kernel_for_rows_that_look_alike(
    generations: tuple[int, ...],
    capability: tuple[int, int],
    expected: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    install(monkeypatch, *generations)
    wanted = {**GPU, "capability": capability, "repeats": True}
    assert select_kernel("auto", **wanted).name == expected
    first, *others = candidates(**wanted)
    assert first == expected
    assert {"cuda", "cudnn"} <= {first, *others}
    packed = select_kernel("auto", **wanted | {"repeats": False}).name
    assert packed != "cudnn"
    for lacking in ({"window": True}, {"deterministic": True}):
        assert select_kernel("auto", **wanted | lacking).name != "cudnn"
    assert candidates(**wanted | {"attention_dropout": 0.1}) == ["reference"]
    assert "cudnn" not in candidates(**wanted | {"repeats": False})
    assert select_kernel("auto", **wanted | {"head_dim": 192}).name != "cudnn"


def test_auto_reports_what_it_passed_over(installed: bool) -> None:
    choice = select_kernel("auto", **GPU | {"attention_dropout": 0.1})
    assert "eager PyTorch, slow, quadratic memory" in choice.reason
    why = "has no attention dropout that is the same on every layout and number of ranks"
    assert f"not cuda: {why}" in choice.reason
    if installed:
        assert f"not flash_attn: flash_attn_2 {why}" in choice.reason
    else:
        assert "not flash_attn: needs the package flash_attn" in choice.reason


def test_a_softcap_takes_a_kernel_that_has_it(installed: bool) -> None:
    choice = select_kernel("auto", **CPU | {"softcap": 50.0})
    assert choice.name == "reference"
    assert choice.reason.endswith("not cpu: has no softcap of the scores")
    taken = select_kernel("auto", **GPU | {"softcap": 50.0}).name
    assert taken == ("flash_attn" if installed else "reference")


def test_a_name_is_taken_and_reported(installed: bool) -> None:
    expected = "asked for: eager PyTorch, slow, quadratic memory, the oracle"
    assert select_kernel("reference", **CPU) == KernelChoice(name="reference", reason=expected)
    assert select_kernel("cuda", **GPU).name == "cuda"
    assert select_kernel("cudnn", **GPU).name == "cudnn"
    assert select_kernel("cudnn", **GPU | {"head_dim": 256, "capability": HOPPER}).name == "cudnn"
    assert select_kernel("reference", **CPU | {"attention_dropout": 0.1}).name == "reference"


REFUSED = [
    (
        "triton",
        CPU,
        "is not a kernel (works: auto, reference, cpu, cuda, cudnn, flash_attn, flash_attn_2, "
        "flash_attn_3, flash_attn_4)",
    ),
    ("cuda", CPU, "runs on cuda, not on cpu (works: --kernel auto or --kernel reference or"),
    ("cpu", GPU, "runs on cpu, not on cuda"),
    ("flash_attn", CPU, "runs on cuda, not on cpu"),
    ("flash_attn_3", CPU, "runs on cuda, not on cpu"),
    ("cuda", GPU | {"dtype": "float64"}, "computes in bfloat16, not in float64"),
    ("cpu", CPU | {"dtype": "float16"}, "computes in float64, float32, bfloat16, not in float16"),
    ("cpu", CPU | {"head_dim": 513}, "head dim 513 is above its largest, 512"),
    ("cuda", GPU | {"head_dim": 264}, "head dim 264 is above its largest, 256"),
    ("cudnn", GPU | {"head_dim": 136}, "head dim 136 is above its largest, 128"),
    ("cudnn", GPU | {"window": True}, "has no sliding windows (works: --kernel auto or"),
    ("cudnn", GPU | {"deterministic": True}, "its backward is not deterministic (works: --kernel"),
    ("cpu", CPU | {"attention_dropout": 0.1}, "has no attention dropout that is the same on"),
    ("cuda", GPU | {"attention_dropout": 0.1}, "--kernel reference or --attention-dropout 0)"),
    ("cpu", CPU | {"softcap": 50.0}, "no softcap of the scores (works: --kernel auto or --kernel"),
    ("cuda", GPU | {"softcap": 50.0}, "has no softcap of the scores (works: --kernel auto or"),
    ("cudnn", GPU | {"softcap": 50.0}, "has no softcap of the scores (works: --kernel auto or"),
]


@pytest.mark.parametrize(("name", "wanted", "message"), REFUSED)
def test_every_refusal(name: str, wanted: dict[str, Any], message: str, installed: bool) -> None:
    assert re.search(re.escape(message), refusal(name, **wanted))


def test_the_alternatives_work(installed: bool) -> None:
    for name, wanted, _ in REFUSED:
        for other in re.findall(r"--kernel (\w+)", refusal(name, **wanted)[len("--kernel ") :]):
            select_kernel(other, **wanted)


def test_the_package_must_be_installed(installed: bool) -> None:
    if installed:
        assert select_kernel("flash_attn", **GPU).name == "flash_attn"
        assert select_kernel("flash_attn_2", **GPU).name == "flash_attn_2"
        assert "flash_attn_2 head dim 264 is" in refusal("flash_attn", **GPU | {"head_dim": 264})
    else:
        message = refusal("flash_attn", **GPU)
        assert "needs the package flash_attn, which is not installed" in message
        assert message.endswith("or --kernel cudnn or pip install -e '.[cuda]')")
    message = refusal("flash_attn_4", **GPU)
    assert "needs the package flash_attn.cute.interface, which is not installed" in message
    assert message.endswith("pip install flash-attn-4)")


@pytest.mark.parametrize(
    ("there", "capability", "wanted", "taken"),
    [
        ((2, 3, 4), AMPERE, {}, 2),
        ((2, 3, 4), HOPPER, {}, 3),
        ((2, 4), HOPPER, {}, 4),
        ((2, 3, 4), HOPPER, {"head_dim": 256, "deterministic": True}, 4),
        ((2, 3), HOPPER, {"head_dim": 256, "deterministic": True}, 2),
        ((2, 3, 4), BLACKWELL, {}, 4),
        ((2, 3, 4), BLACKWELL, {"head_dim": 192}, 2),
        ((2, 3), BLACKWELL, {}, 2),
        ((2, 3, 4), (12, 0), {}, 2),
    ],
)
def test_flash_attn_is_the_newest_capable_generation(
    there: tuple[int, ...],
    capability: tuple[int, int],
    wanted: dict[str, Any],
    taken: int,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    install(monkeypatch, *there)
    for name in ("auto", "flash_attn"):
        choice = select_kernel(name, **GPU | wanted, capability=capability)
        assert choice.name == f"flash_attn_{taken}"
        assert f"FlashAttention {taken}" in choice.reason


def test_a_generation_on_the_wrong_device(monkeypatch: pytest.MonkeyPatch) -> None:
    install(monkeypatch, 3, 4)
    message = refusal("flash_attn_3", **GPU, capability=BLACKWELL)
    assert "needs compute capability 9, the device has 10.0" in message
    assert "--kernel flash_attn" in message
    message = refusal("flash_attn", **GPU, capability=AMPERE)
    assert "flash_attn_4 needs compute capability 9 or 10 or 11, the device has 8.0" in message
    wide = GPU | {"head_dim": 256, "deterministic": True}
    message = refusal("flash_attn_3", **wide, capability=HOPPER)
    assert "is deterministic up to head dim 192 only" in message


def test_packages_are_found_without_importing_them(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Generation 4 is part of generation 2's package, with or without generation 2."""
    monkeypatch.syspath_prepend(str(tmp_path))
    bomb = "raise AssertionError('imported')"
    for file in ("flash_attn_interface.py", "flash_attn/cute/interface.py"):
        path = tmp_path / file
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(bomb)
        (path.parent / "__init__.py").write_text(bomb)
    (tmp_path / "flash_attn" / "__init__.py").unlink(missing_ok=True)
    found = {name: select.is_installed(TRAITS[name]) for name in select.FLASH_ATTENTION}
    assert found == {"flash_attn_4": True, "flash_attn_3": True, "flash_attn_2": False}
    (tmp_path / "flash_attn" / "__init__.py").write_text(bomb)
    (tmp_path / "flash_attn" / "flash_attn_interface.py").write_text(bomb)
    importlib.invalidate_caches()
    assert select.is_installed(TRAITS["flash_attn_2"])


def test_every_name_has_a_row_and_a_kernel() -> None:
    assert set(KERNEL_NAMES) - {"flash_attn"} == set(TRAITS)
    assert get_args(KernelName) == ("auto", *KERNEL_NAMES)
    for name, traits in TRAITS.items():
        if traits.package is None:
            assert load_kernel(name) is load_kernel(name)
