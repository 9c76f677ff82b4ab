"""Garbage collection pauses for imports."""

from __future__ import annotations

import gc

import pytest

from cp_megatron.comm.garbage import collection_paused


def test_imports_are_not_collected() -> None:
    with collection_paused():
        assert not gc.isenabled()
    assert gc.isenabled()


@pytest.mark.parametrize("enabled", [True, False])
def test_collection_is_as_before_when_an_import_fails(enabled: bool) -> None:
    (gc.enable if enabled else gc.disable)()
    try:
        with pytest.raises(ImportError), collection_paused():
            raise ImportError
        assert gc.isenabled() is enabled
    finally:
        gc.enable()
