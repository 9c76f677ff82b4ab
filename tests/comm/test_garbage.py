"""Garbage collection pauses for imports, and does not search what they leave."""

from __future__ import annotations

import gc

import pytest

from cp_megatron.comm.garbage import collection_paused


def test_imports_are_not_collected_and_not_searched_afterwards() -> None:
    before = gc.get_freeze_count()
    with collection_paused():
        assert not gc.isenabled()
        kept = [[number] for number in range(1000)]
    try:
        assert gc.isenabled()
        assert gc.get_freeze_count() >= before + len(kept)
    finally:
        gc.unfreeze()


@pytest.mark.parametrize("enabled", [True, False])
def test_collection_is_as_before_when_an_import_fails(enabled: bool) -> None:
    (gc.enable if enabled else gc.disable)()
    try:
        with pytest.raises(ImportError), collection_paused():
            raise ImportError
        assert gc.isenabled() is enabled
    finally:
        gc.enable()
        gc.unfreeze()
