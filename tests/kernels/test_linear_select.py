"""Which kernel a recurrence takes, and the reason that is given."""

from __future__ import annotations

from typing import Any

import pytest

from cp_megatron.kernels import linear_select
from cp_megatron.kernels.linear_select import select_linear_kernel

WANTED = {"device": "cuda", "dtype": "bfloat16", "head_dim": 128, "deterministic": False}


def chosen(name: str = "auto", **changes: Any) -> tuple[str, str]:
    choice = select_linear_kernel(name, **{**WANTED, **changes})  # type: ignore[arg-type]
    return choice.name, choice.reason


@pytest.fixture
def installed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(linear_select, "is_installed", lambda traits: traits.name == "fla")


@pytest.mark.usefixtures("installed")
def test_fla_is_taken_where_it_can() -> None:
    for dtype in ("bfloat16", "float16"):
        assert chosen(dtype=dtype)[0] == "fla"
    assert chosen("flash_attn")[0] == "fla"
    for change, reason in (
        ({"name": "reference"}, "asked for"),
        ({"dtype": "float64"}, "not in float64"),
        ({"device": "cpu"}, "not on cpu"),
        ({"head_dim": 257}, "above its largest, 256"),
        ({"deterministic": True}, "deterministic"),
    ):
        name, text = chosen(**change)  # type: ignore[arg-type]
        assert name == "reference"
        assert reason in text


def test_the_reason_says_how_to_install_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(linear_select, "is_installed", lambda traits: False)
    name, text = chosen()
    assert name == "reference"
    assert "pip install -e '.[linear]'" in text


@pytest.mark.usefixtures("installed")
def test_an_old_version_is_not_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    for found, name in (("0.5.3", "reference"), ("0.6.0", "fla"), ("1.0", "fla")):
        monkeypatch.setattr(linear_select, "version", lambda _, found=found: found)
        assert chosen()[0] == name
    monkeypatch.setattr(linear_select, "version", lambda _: "0.5.3")
    assert "needs flash-linear-attention 0.6 or newer, not 0.5.3" in chosen()[1]
