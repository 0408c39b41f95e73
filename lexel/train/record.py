"""Which stages are finished, which can continue, and why one starts over.

A stage folder holds `settings.json` (written when training starts) and `done.json` (written last). Both carry
the resolved settings and the fingerprints of what the stage was fed; equal ones mean equal weights.
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import json
import os
import shutil
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lexel.errors import LexelError
from lexel.hub import write_atomically

SETTINGS_FILE = "settings.json"
DONE_FILE = "done.json"
_MISSING = "(not set)"


def plain(value: Any) -> Any:
    """`value` as JSON data: dataclasses become dicts that name their class, partials name their function."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        fields = {f.name: plain(getattr(value, f.name)) for f in dataclasses.fields(value)}
        return {"class": type(value).__name__, **fields}
    if isinstance(value, functools.partial):
        return {"call": f"{value.func.__module__}.{value.func.__qualname__}", **plain(value.keywords)}
    if isinstance(value, Mapping):
        return {str(key): plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain(item) for item in value]
    return value if isinstance(value, (int, float, str, bool, type(None))) else str(value)


def digest(settings: Mapping[str, Any]) -> str:
    """16 hex digits of the settings."""
    return hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()[:16]


def differences(old: Mapping[str, Any], new: Mapping[str, Any], prefix: str = "") -> list[str]:
    """One phrase ``name: old → new`` per setting that differs."""
    found = []
    for key in sorted({*old, *new}):
        before, after = old.get(key, _MISSING), new.get(key, _MISSING)
        if isinstance(before, dict) and isinstance(after, dict):
            found += differences(before, after, f"{prefix}{key}.")
        elif before != after:
            found.append(f"{prefix}{key}: {before} → {after}")
    return found


@dataclasses.dataclass(frozen=True)
class StageRecord:
    """The bookkeeping of one stage. folder: where it lives; settings: JSON data that decides its result."""

    name: str
    folder: Path
    settings: Mapping[str, Any]

    @property
    def digest(self) -> str:
        """Hash of the settings."""
        return digest(self.settings)

    def finished(self) -> dict[str, Any] | None:
        """`done.json` if the stage finished with these very settings, else None."""
        done = read_json(self.folder / DONE_FILE)
        return done if done is not None and done.get("hash") == self.digest else None

    def resumable(self) -> bool:
        """Whether an unfinished run with these very settings was begun here."""
        begun = read_json(self.folder / SETTINGS_FILE)
        return begun is not None and begun.get("hash") == self.digest

    def reason(self) -> str | None:
        """Why the folder's contents cannot be used, or None when nothing was there (or it fits)."""
        old = read_json(self.folder / DONE_FILE) or read_json(self.folder / SETTINGS_FILE)
        if old is None or old.get("hash") == self.digest:
            return None
        changed = differences(old.get("settings", {}), self.settings)
        more = f" and {len(changed) - 4} more" if len(changed) > 4 else ""
        return ", ".join(changed[:4]) + more

    def begin(self, *, keep_previous: bool = True) -> str | None:
        """Prepare the folder for work. Contents that belong to other settings are moved to
        ``<folder>.previous`` (an older one is deleted) or deleted, and the reason is returned."""
        reason = self.reason()
        if reason is not None:
            previous = self.folder.with_name(self.folder.name + ".previous")
            shutil.rmtree(previous, ignore_errors=True)
            self.folder.rename(previous)
            if not keep_previous:
                shutil.rmtree(previous)
        self.folder.mkdir(parents=True, exist_ok=True)
        self._write(SETTINGS_FILE, {})
        return reason

    def finish(self, **facts: Any) -> None:
        """Write `done.json`: the stage needs no more work. `facts` (seconds, metrics) are stored along."""
        self._write(DONE_FILE, facts)

    def wait(self, poll_seconds: float = 0.5) -> None:
        """Block until another process has finished the stage (followers of a distributed run). Ends the
        process if the one that started it is gone: then nobody will finish the stage."""
        parent = os.getppid()
        while self.finished() is None:
            if os.getppid() != parent:
                raise SystemExit(1)
            time.sleep(poll_seconds)

    def _write(self, name: str, facts: Mapping[str, Any]) -> None:
        content = {"hash": self.digest, **facts, "settings": self.settings}
        text = json.dumps(content, indent=2, sort_keys=True) + "\n"
        write_atomically(self.folder / name, lambda path: _write_text(path, text))


def read_json(path: Path) -> dict[str, Any] | None:
    """The object in a JSON file, None when there is no such file. LexelError when it is damaged."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return None
    except ValueError as error:
        raise LexelError(f"{path} is not valid JSON ({error}); delete it to start the stage over.") from None


def _write_text(path: Path, text: str) -> None:
    path.write_text(text, encoding="utf-8")
