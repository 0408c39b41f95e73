"""A fixture folder: hyper-parameters, weights, inputs and the outputs recorded from the publisher's own code.

`config.json` holds the reference's arguments, `io.safetensors` inputs and expected outputs. The weights lie
in files of the published layout, or follow from `weights.json` by a rule: each tensor is standard normal from
a seed made of the file's seed and its key, times a scale, plus an offset, or a constant; what must be exact
is in `explicit.safetensors`.
"""

from __future__ import annotations

import json
import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import save_file
from torch import Tensor

from lexel.checkpoints import WEIGHT_SUFFIXES, read_safetensors
from lexel.errors import LexelError

IO_FILE = "io.safetensors"
CONFIG_FILE = "config.json"
RULE_FILE = "weights.json"
EXPLICIT_FILE = "explicit.safetensors"


class Fixture:
    """One folder. `input` hands out a recorded tensor and notes that it was one; `scratch` is an existing
    folder for weights made by rule. Raises LexelError for a folder without the files above."""

    def __init__(self, folder: Path, scratch: Path) -> None:
        self.folder = folder
        self.scratch = scratch
        self.config: dict[str, Any] = read_json(folder / CONFIG_FILE)
        if not (folder / IO_FILE).is_file():
            raise LexelError(f"{folder} holds no {IO_FILE}; is it a fixture folder?")
        self.recorded = read_safetensors(folder / IO_FILE)
        self.inputs: set[str] = set()

    def __contains__(self, name: str) -> bool:
        return name in self.recorded

    def input(self, name: str) -> Tensor:
        """The recorded input of that name, floats as float32. Raises LexelError when there is none."""
        if name not in self.recorded:
            raise LexelError(f"{self.folder / IO_FILE} records no {name!r}.")
        self.inputs.add(name)
        value = self.recorded[name]
        return value.float() if value.is_floating_point() else value

    def weights(self) -> Path:
        """The weight file, written by rule into `scratch` where the folder holds none.
        Raises LexelError when there is no single one."""
        if (self.folder / RULE_FILE).is_file():
            return write_by_rule(self.folder, self.scratch)
        found = [
            file
            for file in sorted(self.folder.iterdir())
            if file.suffix in WEIGHT_SUFFIXES and file.name not in (IO_FILE, EXPLICIT_FILE)
        ]
        named = [file for file in found if file.stem in ("weights", "model", "pytorch_model")]
        if len(named or found) != 1:
            names = ", ".join(file.name for file in found) or "none"
            raise LexelError(f"{self.folder} needs {RULE_FILE} or one weight file, found: {names}.")
        return (named or found)[0]

    def weights_folder(self) -> Path:
        """The folder of a checkpoint of several files: this one, or `scratch` with the files written by
        rule."""
        if (self.folder / RULE_FILE).is_file():
            write_by_rule(self.folder, self.scratch)
            return self.scratch
        return self.folder


def write_by_rule(folder: Path, scratch: Path) -> Path:
    """Write the files that `weights.json` describes into `scratch`; returns the first one's path."""
    rule = read_json(folder / RULE_FILE)
    explicit = read_safetensors(folder / EXPLICIT_FILE) if (folder / EXPLICIT_FILE).is_file() else {}
    parts = rule.get("files", [rule])
    contents: dict[str, dict[str, Any]] = {}
    for part in parts:
        content = contents.setdefault(part["file"], {})
        for key in part["nesting"]:
            content = content.setdefault(key, {})
        content |= {key: tensor_by_rule(key, spec, part["seed"]) for key, spec in part["tensors"].items()}
        content |= {key: explicit[key] for key in part.get("explicit", {})}
    for name, content in contents.items():
        target = scratch / name
        target.parent.mkdir(parents=True, exist_ok=True)
        if target.suffix == ".safetensors":
            save_file({key: value.contiguous() for key, value in content.items()}, target)
        else:
            torch.save(content, target)
    return scratch / parts[0]["file"]


def tensor_by_rule(key: str, spec: Mapping[str, Any], seed: int) -> Tensor:
    """One weight, see the module docstring."""
    dtype = getattr(torch, spec.get("dtype", "float32"))
    if "fill" in spec:
        return torch.full(tuple(spec["shape"]), spec["fill"], dtype=dtype)
    draw = np.random.RandomState(zlib.crc32(f"{seed}:{key}".encode())).standard_normal(spec["shape"])
    values = np.asarray(draw).astype("float32") * np.float32(spec["scale"]) + np.float32(spec["offset"])
    return torch.from_numpy(np.asarray(values, dtype="float32").reshape(spec["shape"])).to(dtype)


def read_json(path: Path) -> dict[str, Any]:
    """Raises LexelError when missing or not a JSON object."""
    try:
        content = json.loads(path.read_text())
    except FileNotFoundError:
        raise LexelError(f"{path.parent} holds no {path.name}; is it a fixture folder?") from None
    except json.JSONDecodeError as error:
        raise LexelError(f"{path} is not valid JSON ({error}).") from None
    if not isinstance(content, dict):
        raise LexelError(f"{path} must hold a JSON object.")
    return content
