"""Reading other people's checkpoint files: tensors only, whatever they are wrapped in.

Nothing is ever unpickled beyond tensors and plain containers. Handles nesting (``{"model": …}``,
``{"ema": …}``), DataParallel and compile prefixes, sharded safetensors, and SEED-Voken's dotless EMA copies.
"""

from __future__ import annotations

import argparse
import ast
import json
import pickle
import warnings
import zipfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from lexel.errors import LexelError
from lexel.hub import write_atomically

WEIGHT_SUFFIXES = (".safetensors", ".pt", ".pth", ".bin", ".ckpt", ".th")
# What a folder's weight file is called, most likely first.
FOLDER_NAMES = ("model.safetensors", "pytorch_model.bin", "diffusion_pytorch_model.safetensors")
WRAPPERS = ("module.", "_orig_mod.")
EMA_PREFIX = "model_ema."
# Plain records that training scripts leave in their files; harmless to construct.
SAFE_CLASSES = (argparse.Namespace,)
YAML_WORDS = {"true": True, "false": False, "null": None}


def read_checkpoint(
    path: str | Path,
    *,
    key: str | None = None,
    nestings: Sequence[str] = ("ema", "model", "state_dict"),
    dotless_ema: bool = False,
) -> dict[str, Tensor]:
    """The flat tensors of a local file, or of the weight file of a folder, on the CPU.

    key: the dictionary key to read where a file holds several; None tries `nestings` in order, and takes a
    flat file as it is. dotless_ema: see `lexel.catalog.System`.
    Raises LexelError for a missing, truncated, unreadable or hostile file, a key that is not there, and an
    entry that is no tensor, naming it.
    """
    return read_copy(path, key=key, nestings=nestings, dotless_ema=dotless_ema)[0]


def read_copy(
    path: str | Path, *, key: str | None, nestings: Sequence[str], dotless_ema: bool
) -> tuple[dict[str, Tensor], str]:
    """As `read_checkpoint`, and in words which of a file's copies of the weights these are."""
    path = weight_file(Path(path).expanduser())
    content: Any = read_safetensors(path) if path.suffix == ".safetensors" else _read_torch(path)
    half = key in ("ema", "raw") and dotless_ema
    nested, name = _unnest(content, None if half else key, nestings, path)
    state = _unwrap(_tensors(nested, path))
    copy = f"under {name!r}" if name else "at the top"
    if not dotless_ema:
        return state, copy
    averaged = key != "raw" and any(name.startswith(EMA_PREFIX) for name in state)
    return _choose_ema(state, key, path), f"{copy}, {'averaged (EMA)' if averaged else 'raw'}"


def read_files(
    paths: Mapping[str, Path], *, key: str | None, nestings: Sequence[str]
) -> tuple[dict[str, Tensor], str]:
    """The tensors of several files as one state dict, each called ``name:key`` by the name of its file in
    `paths`, and in words which copies they are. Raises LexelError as `read_checkpoint` does."""
    state: dict[str, Tensor] = {}
    copies = []
    for name, path in paths.items():
        tensors, copy = read_copy(path, key=key, nestings=nestings, dotless_ema=False)
        state |= {f"{name}:{own}": value for own, value in tensors.items()}
        copies.append(f"{name} {copy}")
    return state, ", ".join(copies)


def weight_file(path: Path) -> Path:
    """The file itself, or the one that holds a folder's weights (an index for sharded ones).
    Raises LexelError when there is none or the choice is not clear."""
    if path.is_file():
        return path
    if not path.is_dir():
        raise LexelError(f"checkpoint {path} does not exist.")
    for name in FOLDER_NAMES:
        for candidate in (path / name, path / f"{name}.index.json"):
            if candidate.is_file():
                return candidate
    found = sorted(file for file in path.iterdir() if file.suffix in WEIGHT_SUFFIXES)
    if len(found) != 1:
        what = ", ".join(file.name for file in found) or "none"
        raise LexelError(f"{path} should hold one weight file ({', '.join(FOLDER_NAMES)}, …), found: {what}.")
    return found[0]


def read_safetensors(path: Path) -> dict[str, Tensor]:
    """Tensors of one safetensors file. Raises LexelError when it is damaged."""
    try:
        return load_file(path)
    except (SafetensorError, OSError) as error:
        raise LexelError(f"{path} is not a readable safetensors file ({error}).") from error


def read_header(path: Path) -> dict[str, Any]:
    """What the header of a safetensors file says beside its tensors: strings, read as Python or YAML literals
    where they are ones (never evaluated). Empty for another or a damaged file."""
    if path.suffix != ".safetensors":
        return {}
    try:
        with safe_open(path, "pt") as file:
            header = dict(file.metadata() or {})
    except (SafetensorError, OSError):
        return {}
    return {name: _literal(text) for name, text in header.items() if name != "format"}


def _literal(text: str) -> Any:
    if text in YAML_WORDS:
        return YAML_WORDS[text]
    try:
        return ast.literal_eval(text)
    except (ValueError, SyntaxError, MemoryError, RecursionError):
        return text


def save_checkpoint(state: Mapping[str, Tensor], path: str | Path, container: str = "") -> None:
    """Write tensors as safetensors, or (any other of `WEIGHT_SUFFIXES`) as a torch file nested under
    `container`. Raises LexelError for another ending or when the system refuses."""
    path = Path(path)
    if path.suffix not in WEIGHT_SUFFIXES:
        raise LexelError(f"{path.name} must end in one of {', '.join(WEIGHT_SUFFIXES)}.")
    plain = {name: value.detach().cpu().contiguous().clone() for name, value in state.items()}
    if path.suffix == ".safetensors":
        write_atomically(path, lambda target: save_file(plain, target, metadata={"format": "pt"}))
    else:
        write_atomically(path, lambda target: torch.save({container: plain} if container else plain, target))


def dotless_copy(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The averaged copy that a file with `dotless_ema` keeps beside `state`: the same values, and
    its counters."""
    copy = {EMA_PREFIX + name.replace(".", ""): value for name, value in state.items()}
    counters = {"decay": torch.tensor(0.999), "num_updates": torch.tensor(-1, dtype=torch.int)}
    return copy | {EMA_PREFIX + name: value for name, value in counters.items()}


def _read_torch(path: Path) -> Any:
    if path.name.endswith(".index.json"):
        return _read_shards(path)
    try:
        with torch.serialization.safe_globals(list(SAFE_CLASSES)), warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)  # about pickle protocols: it fails or it does not
            # Mapped where the format allows it: of a large checkpoint only what is used gets into memory.
            return torch.load(path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path))
    except pickle.UnpicklingError as error:
        reason = str(error).splitlines()
        named = next((line for line in reason if "GLOBAL" in line or "global" in line), reason[0])
        raise LexelError(
            f"{path} holds more than tensors and was not opened, because that could run code: {named.strip()}"
        ) from error
    except (RuntimeError, EOFError, OSError, ValueError, KeyError, AttributeError) as error:
        first = (str(error).splitlines() or [type(error).__name__])[0]
        raise LexelError(
            f"{path} is not a readable torch checkpoint; it may be truncated ({first})."
        ) from error


def _read_shards(index: Path) -> dict[str, Tensor]:
    try:
        names = sorted(set(json.loads(index.read_text())["weight_map"].values()))
    except (json.JSONDecodeError, KeyError, AttributeError) as error:
        raise LexelError(f"{index} is not an index of weight files ({error}).") from error
    state: dict[str, Tensor] = {}
    for name in names:
        if Path(name).name != name:
            raise LexelError(f"{index} points outside its own folder: {name!r}.")
        shard = index.parent / name
        if not shard.is_file():
            raise LexelError(f"{index} lists {name}, which is not beside it.")
        state |= read_safetensors(shard) if shard.suffix == ".safetensors" else _read_torch(shard)
    return state


def _unnest(
    content: Any, key: str | None, nestings: Sequence[str], path: Path
) -> tuple[Mapping[Any, Any], str]:
    """The entries that hold the tensors, and the key they stand under ("" for a flat file)."""
    if not isinstance(content, Mapping):
        raise LexelError(f"{path} holds a {type(content).__name__}, not a dictionary of tensors.")
    nested = [str(name) for name, value in content.items() if isinstance(value, Mapping)]
    if key is not None:
        if key not in nested:
            there = ", ".join(nested) or "none: it is flat"
            raise LexelError(f"{path} has no entry {key!r}; entries that hold tensors: {there}.")
        return content[key], key
    for name in nestings:
        if name in nested:
            return content[name], name
    if any(isinstance(value, Tensor) for value in content.values()):
        return content, ""
    raise LexelError(
        f"{path} holds no tensors under {', '.join(nestings)} or at the top; it has: "
        f"{', '.join(map(str, list(content)[:10])) or 'nothing'}."
    )


def _tensors(state: Mapping[Any, Any], path: Path) -> dict[str, Tensor]:
    for name, value in state.items():
        if not isinstance(value, Tensor):
            raise LexelError(f"{path}: {name!r} is a {type(value).__name__}, expected a tensor.")
    return {str(name): value for name, value in state.items()}


def _unwrap(state: dict[str, Tensor]) -> dict[str, Tensor]:
    for prefix in WRAPPERS:
        if state and all(name.startswith(prefix) for name in state):
            state = {name.removeprefix(prefix): value for name, value in state.items()}
    return state


def _choose_ema(state: dict[str, Tensor], key: str | None, path: Path) -> dict[str, Tensor]:
    """Raw names with the averaged values where there are any, unless key is "raw"."""
    raw = {name: value for name, value in state.items() if not name.startswith(EMA_PREFIX)}
    averaged = {name for name in state if name.startswith(EMA_PREFIX)}
    if key == "raw" or (key is None and not averaged):
        return raw
    if key == "ema" and not averaged:
        raise LexelError(f"{path} has no averaged weights ({EMA_PREFIX}…); use key='raw'.")
    chosen = dict(raw)
    for name in raw:
        dotless = EMA_PREFIX + name.replace(".", "")
        if dotless in averaged:
            chosen[name] = state[dotless]
    return chosen
