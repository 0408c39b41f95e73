"""Saving, loading and publishing models in the hub's conventions.

Every Lexel model is a folder holding `config.json` (its dataclass config and a `model_type`) and
`model.safetensors`. Weights are never unpickled, and a config is data: its `model_type` is looked
up in an explicit table, no class name is ever read from a file.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import types
import typing
from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar, TypeVar

import torch
from huggingface_hub import ModelHubMixin, snapshot_download
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from lexel.errors import LexelError

CONFIG_FILE = "config.json"
WEIGHTS_FILE = "model.safetensors"
LISTED = 20  # of the keys that do not fit
T = TypeVar("T", bound="Pretrained")


def decode_config(cls: type, values: dict[str, Any]) -> Any:
    """Build the config dataclass `cls` from plain JSON `values`; nested dataclasses and tuples are
    restored from their annotations. Raises LexelError on a key the dataclass does not have."""
    hints = typing.get_type_hints(cls)
    known = {f.name for f in dataclasses.fields(cls)}
    if unknown := sorted(set(values) - known):
        raise LexelError(
            f"{cls.__name__} has no option {', '.join(unknown)}; it has: {', '.join(sorted(known))}."
        )
    return cls(**{name: _decode(hints[name], value) for name, value in values.items()})


def _decode(hint: Any, value: Any) -> Any:
    options = typing.get_args(hint) if typing.get_origin(hint) in (typing.Union, types.UnionType) else (hint,)
    if isinstance(value, dict):
        for option in options:
            if dataclasses.is_dataclass(option):
                return decode_config(typing.cast(type, option), value)
    if isinstance(value, list | tuple):
        inner = next((inner for option in options for inner in typing.get_args(option)), None)
        return tuple(_decode(inner, x) for x in value)
    return value


def write_atomically(path: Path, write: typing.Callable[[Path], None]) -> None:
    """Let `write` fill a temporary file beside `path`, then rename it: a full disk or a kill leaves the
    previous file whole. Raises LexelError naming the path when the system refuses."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        write(temporary)
        with temporary.open("rb") as file:
            os.fsync(file.fileno())
        temporary.chmod(0o644)  # safetensors writes files that only their owner may read
        temporary.replace(path)
    except (OSError, SafetensorError) as error:
        reason = getattr(error, "strerror", None) or error
        raise LexelError(f"could not write {path}: {reason}; what was there before is kept.") from error
    finally:
        temporary.unlink(missing_ok=True)


def resolve_folder(name: str | Path, what: str = "model") -> Path:
    """A local folder as it is, else the hub's snapshot of that repository id.
    Raises LexelError when neither exists."""
    path = Path(name).expanduser()
    if path.is_dir():
        return path
    if path.exists() or path.is_absolute() or str(name).count("/") != 1 or str(name).startswith("."):
        raise LexelError(
            f"{what} folder {name} does not exist; give a local folder or a hub id like user/name."
        )
    try:
        return Path(snapshot_download(str(name)))
    except Exception as error:  # the hub client raises a wide family: offline, not found, gated, bad name
        raise LexelError(
            f"{what} {name} is neither a local folder nor reachable on the hub ({type(error).__name__})."
        ) from error


def read_config(folder: Path) -> dict[str, Any]:
    """The parsed `config.json` of a model folder. Raises LexelError when missing or not JSON."""
    path = folder / CONFIG_FILE
    try:
        return json.loads(path.read_text())
    except FileNotFoundError:
        raise LexelError(f"{folder} holds no {CONFIG_FILE}; is it a Lexel model folder?") from None
    except json.JSONDecodeError as error:
        raise LexelError(f"{path} is not valid JSON ({error}).") from None


class Pretrained(ModelHubMixin):
    """Mixin of every Lexel network: `save_pretrained`, `from_pretrained`, `push_to_hub`, `fingerprint`.

    A subclass is an `nn.Module` built as ``cls(config)`` that sets `self.config` and declares its
    `config_class` and `model_type`; former_types: names under which folders of earlier versions know it.
    """

    model_type: ClassVar[str]
    former_types: ClassVar[tuple[str, ...]] = ()
    config_class: ClassVar[type]
    config: Any

    def save_pretrained(
        self, save_directory: str | Path, *, dtype: torch.dtype | None = None, **_: Any
    ) -> None:
        """Write `config.json` and `model.safetensors`; `dtype` casts floating weights (e.g. bfloat16)."""
        folder = Path(save_directory)
        config = {"model_type": self.model_type, **dataclasses.asdict(self.config)}
        state = {key: _stored(value, dtype) for key, value in _module(self).state_dict().items()}
        write_atomically(
            folder / WEIGHTS_FILE, lambda path: save_file(state, path, metadata={"format": "pt"})
        )
        write_atomically(
            folder / CONFIG_FILE, lambda path: _write_text(path, json.dumps(config, indent=2) + "\n")
        )

    @classmethod
    def from_pretrained(cls: type[T], name: str | Path, **_: Any) -> T:  # type: ignore[override]
        """Load from a local folder or a hub id, in eval mode and float32.

        Raises LexelError for a missing folder, another `model_type`, an unknown config key, or weights
        whose names or shapes do not match, listing them."""
        folder = resolve_folder(name)
        values = read_config(folder)
        found = values.pop("model_type", None)
        if found not in (cls.model_type, *cls.former_types):
            raise LexelError(f"{folder} holds a {found!r} model, not {cls.model_type!r}.")
        model = cls(decode_config(cls.config_class, values))
        load_weights(_module(model), folder / WEIGHTS_FILE)
        return _module(model).eval()  # type: ignore[return-value]

    def fingerprint(self) -> str:
        """16 hex digits of the config and every weight: equal exactly when the networks are. Options left at
        their defaults do not count, so that a later version's new option orphans nothing."""
        digest = hashlib.sha256(json.dumps(_changed(self.config), sort_keys=True).encode())
        for key, value in sorted(_module(self).state_dict().items()):
            digest.update(key.encode())
            digest.update(value.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().tobytes())
        return digest.hexdigest()[:16]


def load_weights(model: nn.Module, path: Path, optional: str | None = None) -> None:
    """Load a safetensors file into `model`, floats cast to the model's dtype. optional: beginning of the
    names of tensors that the file may lack; the model then keeps its own. Raises LexelError listing missing,
    unknown or wrongly shaped keys, or a damaged file."""
    try:
        state = load_file(path)
    except FileNotFoundError:
        raise LexelError(f"{path} does not exist; the model folder is incomplete.") from None
    except SafetensorError as error:
        raise LexelError(f"{path} is not a readable safetensors file ({error}).") from error
    own = model.state_dict()
    if optional is not None:
        state = {key: value for key, value in own.items() if key.startswith(optional)} | state
    expected = {key: tuple(value.shape) for key, value in own.items()}
    if problems := mismatches(expected, {key: tuple(value.shape) for key, value in state.items()}):
        raise LexelError(f"{path} does not fit its config: {problems}.")
    model.load_state_dict({key: value.to(own[key].dtype) for key, value in state.items()})


def mismatches(expected: Mapping[str, tuple[int, ...]], found: Mapping[str, tuple[int, ...]]) -> str:
    """What keeps tensors of the `found` names and shapes from filling those `expected`, as a phrase that
    lists the first twenty; empty when they fit."""
    problems = [f"missing {key}" for key in expected if key not in found]
    problems += [f"unknown {key}" for key in found if key not in expected]
    problems += [
        f"{key} is {list(found[key])}, expected {list(shape)}"
        for key, shape in expected.items()
        if key in found and found[key] != shape
    ]
    more = f"; and {len(problems) - LISTED} more" if len(problems) > LISTED else ""
    return "; ".join(problems[:LISTED]) + more


def _changed(config: Any) -> dict[str, Any]:
    """The fields of a config dataclass that differ from their defaults, nested ones likewise."""
    changed: dict[str, Any] = {}
    for field in dataclasses.fields(config):
        value = getattr(config, field.name)
        default = field.default if field.default_factory is dataclasses.MISSING else field.default_factory()
        if value != default:
            changed[field.name] = _changed(value) if dataclasses.is_dataclass(value) else value
    return changed


def _module(model: Any) -> nn.Module:
    return typing.cast(nn.Module, model)


def _stored(value: Tensor, dtype: torch.dtype | None) -> Tensor:
    value = value.detach().cpu()
    return (
        (value.to(dtype) if dtype is not None and value.is_floating_point() else value).contiguous().clone()
    )


def _write_text(path: Path, text: str) -> None:
    path.write_text(text, encoding="utf-8")
