"""torch's flight recorder: the last collectives of this process, for who asks why it hung."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from torch._C import _distributed_c10d as c10d


def last_collectives() -> list[dict[str, Any]]:
    """The recorded collectives, oldest first; empty where none are kept.

    How many are kept is said by TORCH_FR_BUFFER_SIZE before the first process group.
    """
    try:
        dump = c10d._dump_fr_trace_json  # type: ignore[attr-defined]
        entries = json.loads(dump(True))["entries"]
    except (AttributeError, KeyError, ValueError, RuntimeError):
        return []
    return [entry for entry in entries if isinstance(entry, dict)]


def last_collective() -> str:
    """The newest of them in words: ``gloo:all_reduce of default_pg, its number 118``."""
    entries = last_collectives()
    if not entries:
        return ""
    newest = entries[-1]
    group = newest.get("process_group") or [""]
    number = newest.get("p2p_seq_id" if newest.get("is_p2p") else "collective_seq_id", "?")
    return f"{newest.get('profiling_name', '?')} of {group[-1]}, its number {number}"


def write_flight(path: Path) -> None:
    """Writes them as JSON, one object per line.

    Raises:
        OSError: as the file system does.
    """
    path.write_text("".join(json.dumps(entry) + "\n" for entry in last_collectives()))
