"""Which stages are finished, which can continue, and why one starts over.

A stage folder holds `settings.json` (written when training starts) and `done.json` (written last). Both carry
the resolved settings and the fingerprints of what the stage was fed; equal ones mean equal weights. An option
that an older record lacks counts as its default.
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import inspect
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


class Options(dict[str, Any]):
    """JSON data of something with options, and what each option is unless told otherwise (`defaults`)."""

    def __init__(self, values: Mapping[str, Any], defaults: Mapping[str, Any]) -> None:
        super().__init__(values)
        self.defaults = dict(defaults)


def plain(value: Any) -> Any:
    """`value` as JSON data: dataclasses become `Options` that name their class, partials name their
    function."""
    if isinstance(value, Options):
        return value
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        fields = {f.name: plain(getattr(value, f.name)) for f in dataclasses.fields(value)}
        return Options({"class": type(value).__name__, **fields}, field_defaults(type(value)))
    if isinstance(value, functools.partial):
        call = f"{value.func.__module__}.{value.func.__qualname__}"
        return Options({"call": call, **plain(value.keywords)}, argument_defaults(value.func))
    if isinstance(value, Mapping):
        return {str(key): plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain(item) for item in value]
    return value if isinstance(value, (int, float, str, bool, type(None))) else str(value)


def field_defaults(cls: type) -> dict[str, Any]:
    """The defaults of a dataclass's fields, as JSON data."""
    found = {}
    for field in dataclasses.fields(cls):
        if field.default is not dataclasses.MISSING:
            found[field.name] = plain(field.default)
        elif field.default_factory is not dataclasses.MISSING:
            found[field.name] = plain(field.default_factory())
    return found


def argument_defaults(function: Any) -> dict[str, Any]:
    """The defaults of a function's (or a class's) arguments, as JSON data."""
    if dataclasses.is_dataclass(function):
        return field_defaults(function)  # type: ignore[arg-type]
    arguments = inspect.signature(function).parameters.values()
    return {a.name: plain(a.default) for a in arguments if a.default is not inspect.Parameter.empty}


def digest(settings: Mapping[str, Any]) -> str:
    """16 hex digits of the settings."""
    return hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()[:16]


def differences(old: Mapping[str, Any], new: Mapping[str, Any], prefix: str = "") -> list[str]:
    """One phrase ``name: old → new`` per setting that differs."""
    found = []
    defaults = new.defaults if isinstance(new, Options) else {}
    for key in sorted({*old, *new}):
        before, after = old.get(key, defaults.get(key, _MISSING)), new.get(key, _MISSING)
        if isinstance(before, dict) and isinstance(after, dict):
            if isinstance(defaults.get(key), dict) and not isinstance(after, Options):
                after = Options(after, defaults[key])
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
        return done if done is not None and self._fits(done) else None

    def resumable(self) -> bool:
        """Whether an unfinished run with these very settings was begun here."""
        begun = read_json(self.folder / SETTINGS_FILE)
        return begun is not None and self._fits(begun)

    def _fits(self, content: Mapping[str, Any]) -> bool:
        """Whether a record was written with these settings, its missing options taken at their defaults."""
        if content.get("hash") == self.digest:
            return True
        return "settings" in content and not differences(content["settings"], self.settings)

    def reason(self) -> str | None:
        """Why the folder's contents cannot be used, or None when nothing was there (or it fits)."""
        old = read_json(self.folder / DONE_FILE) or read_json(self.folder / SETTINGS_FILE)
        if old is None or self._fits(old):
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
