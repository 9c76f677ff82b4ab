"""torch's flight recorder: the last collectives of this process, to diagnose a hang."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from torch._C import _distributed_c10d as c10d


def last_collectives() -> list[dict[str, Any]]:
    """Returns the recorded collectives, oldest first; empty if none are recorded.

    TORCH_FR_BUFFER_SIZE, read at the first process group, limits their number.
    """
    try:
        dump = c10d._dump_fr_trace_json  # type: ignore[attr-defined]
        entries = json.loads(dump(True))["entries"]
    except (AttributeError, KeyError, ValueError, RuntimeError):
        return []
    return [entry for entry in entries if isinstance(entry, dict)]


def last_collective() -> str:
    """Formats the newest collective: ``gloo:all_reduce #118 of default_pg``."""
    entries = last_collectives()
    if not entries:
        return ""
    newest = entries[-1]
    group = newest.get("process_group") or [""]
    number = newest.get("p2p_seq_id" if newest.get("is_p2p") else "collective_seq_id", "?")
    return f"{newest.get('profiling_name', '?')} #{number} of {group[-1]}"


def write_flight(path: Path) -> None:
    """Writes the recorded collectives as JSON, one object per line.

    Raises:
        OSError: the file cannot be written.
    """
    path.write_text("".join(json.dumps(entry) + "\n" for entry in last_collectives()))
