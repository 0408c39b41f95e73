"""What was measured or built on this machine, kept between processes.

Everything in the folder can be deleted at any time: it is then measured or built again.
"""

from __future__ import annotations

import json
import os
import platform
from functools import cache
from pathlib import Path
from typing import Any

from lexel.errors import LexelError
from lexel.hub import write_atomically


def cache_folder() -> Path:
    """``$LEXEL_CACHE``; by default ``lexel`` in ``$XDG_CACHE_HOME`` or ``~/.cache``."""
    if folder := os.environ.get("LEXEL_CACHE"):
        return Path(folder)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "lexel"


@cache
def processor() -> str:
    """The processor's name and number of cores."""
    name = platform.processor() or platform.machine()
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
        name = next(line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        pass
    return f"{name}, {os.cpu_count()} cores"


def recall(name: str) -> dict[str, Any]:
    """The record called `name` (``NAME.json``); empty when there is none or it is damaged."""
    try:
        record = json.loads((cache_folder() / f"{name}.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return record if isinstance(record, dict) else {}


def remember(name: str, entries: dict[str, Any]) -> None:
    """Add entries to the record called `name`. A folder that cannot be written to is no error: the next
    process measures again."""
    record = {**recall(name), **entries}

    def write(temporary: Path) -> None:
        temporary.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")

    try:
        cache_folder().mkdir(parents=True, exist_ok=True)
        write_atomically(cache_folder() / f"{name}.json", write)
    except (OSError, LexelError):
        return
