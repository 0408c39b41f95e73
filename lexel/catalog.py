"""The vocabulary of published checkpoints: where a file lies, how its tensors are named, what it is.

A *system* is one published architecture with its reference arguments; a *row* (`Published`) is one checkpoint
of it; a *layout* says under which name a file keeps each of our tensors. The systems themselves stand beside
their networks, one file per family (`lexel/tokenizers/*.py`).
"""

from __future__ import annotations

import re
from collections.abc import Callable, Container, Iterable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from lexel.checkpoints import (
    dotless_copy,
    read_copy,
    read_files,
    read_header,
    save_checkpoint,
    weight_file,
)
from lexel.errors import LexelError
from lexel.hub import CONFIG_FILE, mismatches, read_config, resolve_folder


@dataclass(frozen=True)
class Layout:
    """How one kind of file names our tensors.

    name: what the layout is called. prefix: stands before every name in the file; keys without it belong to
    other networks of the file and are not looked at.
    rules: regular expression and replacement, applied in order to each of our names; the result is the
    name in the file (without prefix). No rules: the names are the same.
    ignored: regular expression of file keys that hold nothing of ours, and why; they may be missing. (Keys
    that the model at hand does have are read all the same: optional parts.)
    zeros: file keys the reference insists on but inference never reads (usage counters), with their shapes:
    ignored on reading, written as zeros.
    pointwise: regular expression of our linear weights ``[o, i]`` that the file keeps as ``[o, i, 1, 1]``.
    fused: regular expression of file names that hold several of our tensors (those whose name becomes this
    one), one behind the other along the first axis in the order of our state dict, or in that of `order`:
    parts of our names, one in each.
    lacks: regular expression of our tensors that such files do not hold at all (a decoder's); the model is
    then built without them, see `System.as_stored`, so that nothing is ever drawn by random weights.
    """

    name: str = "published"
    prefix: str = ""
    rules: tuple[tuple[str, str], ...] = ()
    ignored: Mapping[str, str] = field(default_factory=dict)
    zeros: Mapping[str, tuple[int, ...]] = field(default_factory=dict)
    pointwise: str = ""
    fused: str = ""
    order: tuple[str, ...] = ()
    lacks: str = ""

    def name_of(self, key: str) -> str:
        """Our tensor's name in the file."""
        for pattern, replacement in self.rules:
            key = re.sub(pattern, replacement, key)
        return self.prefix + key

    def names(self, model: nn.Module) -> dict[str, str]:
        """Our name → name in the file, for every tensor of `model` that such a file holds.
        Raises ValueError when two tensors would share a name that is not `fused`: a mistake in the rules."""
        names = {key: self.name_of(key) for key in model.state_dict() if not _matches(self.lacks, key)}
        own = [name for name in names.values() if not _matches(self.fused, name)]
        if len(set(own)) != len(own):
            raise ValueError(f"layout {self.name} gives two tensors one name.")
        return names

    def _parts(self, model: nn.Module) -> dict[str, list[str]]:
        """Name in the file → ours that it holds, one but where they are fused."""
        parts: dict[str, list[str]] = {}
        for key, name in self.names(model).items():
            parts.setdefault(name, []).append(key)
        for keys in parts.values():
            keys.sort(key=lambda key: next((i for i, part in enumerate(self.order) if part in key), 0))
        return parts

    def shapes(self, model: nn.Module) -> dict[str, tuple[int, ...]]:
        """Name in the file → shape, of every tensor a complete file holds (`zeros` included)."""
        own = model.state_dict()
        shapes = {
            name: self._stored_shape([own[key] for key in keys], keys[0])
            for name, keys in self._parts(model).items()
        }
        return shapes | {self.prefix + key: shape for key, shape in self.zeros.items()}

    def is_idle(self, name: str) -> bool:
        """Whether a file key holds nothing of ours."""
        if not name.startswith(self.prefix):
            return True
        bare = name.removeprefix(self.prefix)
        return bare in self.zeros or any(re.fullmatch(pattern, bare) for pattern in self.ignored)

    def load(self, model: nn.Module, state: Mapping[str, Tensor], source: str) -> None:
        """Fill `model` from a file's tensors, cast to the model's dtype.
        Raises LexelError that lists missing, unknown and wrongly shaped keys of `source`."""
        parts, own = self._parts(model), model.state_dict()
        expected = {
            name: self._stored_shape([own[key] for key in keys], keys[0]) for name, keys in parts.items()
        }
        found = {
            name: tuple(value.shape)
            for name, value in state.items()
            if name in expected or not self.is_idle(name)
        }
        if problems := mismatches(expected, found):
            raise LexelError(f"{source} does not fit ({self.name} layout): {problems}.")
        ours = {}
        for name, keys in parts.items():
            pieces = state[name].split([len(own[key]) for key in keys]) if len(keys) > 1 else [state[name]]
            for key, piece in zip(keys, pieces):
                ours[key] = piece.reshape(own[key].shape).to(own[key].dtype)
        model.load_state_dict(ours)

    def export(self, model: nn.Module) -> dict[str, Tensor]:
        """The model's tensors under the file's names and shapes."""
        own, state = model.state_dict(), {}
        for name, keys in self._parts(model).items():
            values = [own[key] for key in keys]
            joined = torch.cat(values) if len(values) > 1 else values[0]
            state[name] = joined.reshape(self._stored_shape(values, keys[0]))
        return state | {self.prefix + key: torch.zeros(shape) for key, shape in self.zeros.items()}

    def _stored_shape(self, values: list[Tensor], key: str) -> tuple[int, ...]:
        """Of our tensors that the file keeps as one, the first of them named `key`."""
        if _matches(self.pointwise, key):
            return (*values[0].shape, 1, 1)
        if len(values) > 1:
            return (sum(map(len, values)), *values[0].shape[1:])
        return tuple(values[0].shape)


@dataclass(frozen=True)
class Published:
    """One published checkpoint.

    name: what `load_published` calls it. repository, file: where the hub keeps it (an empty file: the
    repository's own config and weights). arguments: its hyper-parameters under the reference's names, on top
    of the system's. parameters: counted by building it. tokens: of one picture at `size` pixels.
    codebook: codes and width. code_licence, weight_licence; source: paper and repository. rfid: the
    published reconstruction FID on ImageNet 256; psnr: the published PSNR in dB and of which pictures (""
    where none was stated). Of language models: fid, the published FID (FVD for clips) of what they draw;
    tokenizer: the published name of the one whose codes they read ("" where none is listed), and
    tokenizer_arguments: what to give it beside its own, such as how its codes are cut into parts.
    """

    name: str
    repository: str
    file: str
    arguments: Mapping[str, Any]
    parameters: int
    tokens: str
    codebook: str
    code_licence: str
    weight_licence: str
    source: str
    rfid: str = ""
    size: int = 256
    psnr: str = ""
    fid: str = ""
    tokenizer: str = ""
    tokenizer_arguments: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class System:
    """One published architecture.

    name: as its fixture folder is called. arguments: the reference's own hyper-parameters with their
    published defaults. configure: such arguments → our config dataclass, which has `build()`.
    layouts: of its files; the first is what `export_published` writes. nestings: dictionary keys under which
    a `.pt` may keep the tensors, tried in this order (a flat file is always accepted); container: the key
    that `export_published` nests them under ("" for a flat file). as_stored: our config and a file's keys →
    the config of what the file holds, for parts that some files lack. flatten: a config in the reference's
    own nesting → its arguments; reads_config: the `config.json` beside a folder's weights, or else the header
    of a safetensors file, is such a config, which is read, as data, on top of the row's arguments.
    dotless_ema: the file holds a second, averaged copy as ``model_ema.<name without dots>`` (SEED-Voken); key
    "ema" (the default) reads that one, "raw" the other. opens, writes: read a checkpoint (a folder or hub id)
    and write one, for systems whose checkpoints are folders in a format of their own, transformers'; options:
    what of `config` is passed to `opens` as keywords.
    files: of checkpoints of several files, the name of each within the folder or repository, and its address
    where it is published elsewhere (else ""). Their tensors are read as one state dict in which each is
    called ``file:key``; those are the names that `layouts` and `as_stored` see. optional: of them, files that
    may be missing; `as_stored` then builds the network without those parts. fit: our config and a file's
    tensors → the same tensors, those resized that a config may want larger or smaller (a ViT's positions).
    """

    name: str
    arguments: Mapping[str, Any]
    configure: Callable[[Mapping[str, Any]], Any]
    rows: tuple[Published, ...]
    layouts: tuple[Layout, ...] = (Layout(),)
    nestings: tuple[str, ...] = ("ema", "model", "state_dict")
    container: str = "model"
    dotless_ema: bool = False
    as_stored: Callable[[Any, Container[str]], Any] = lambda config, names: config
    flatten: Callable[[Mapping[str, Any]], Mapping[str, Any]] = dict
    reads_config: bool = False
    opens: Callable[..., Any] | None = None
    writes: Callable[[Any, str | Path], None] | None = None
    options: tuple[str, ...] = ()
    files: Mapping[str, str] = field(default_factory=dict)
    optional: tuple[str, ...] = ()
    fit: Callable[[Any, Mapping[str, Tensor]], Mapping[str, Tensor]] = lambda config, state: state

    def known(self, config: Mapping[str, Any]) -> dict[str, Any]:
        """What a reference's config file says of the network; the rest of it (data, training) is left out."""
        return {name: value for name, value in self._flat(config).items() if name in self.arguments}

    def stored_config(self, path: Path) -> dict[str, Any]:
        """The arguments that lie beside the weights of the folder `path`, or in the header of its safetensors
        file; empty without them. Raises LexelError when the config cannot be read."""
        if not self.reads_config:
            return {}
        if (path / CONFIG_FILE).is_file():
            return self.known(read_config(path))
        header = read_header(weight_file(path))
        return self.known(header) if header else {}

    def config(self, *overrides: Mapping[str, Any] | None) -> Any:
        """Our config for the reference's defaults with `overrides` on top, later ones winning.
        Raises LexelError for an argument that the reference does not have or a value it cannot take."""
        arguments = dict(self.arguments)
        for override in (self._flat(override or {}) for override in overrides):
            if unknown := sorted(set(override) - set(self.arguments)):
                raise LexelError(
                    f"{self.name} has no argument {', '.join(unknown)}; it has: "
                    f"{', '.join(sorted(self.arguments))}."
                )
            arguments |= override
        try:
            return self.configure(arguments)
        except (ValueError, TypeError, KeyError) as error:
            raise LexelError(f"{self.name} cannot be built with these arguments: {error}") from error

    def _flat(self, config: Mapping[str, Any]) -> Mapping[str, Any]:
        try:
            return dict(self.flatten(config))
        except (AttributeError, TypeError, KeyError, ValueError) as error:
            raise LexelError(f"{self.name}: this is no config of the reference's: {error}") from error

    def layout_for(self, model: nn.Module, state: Mapping[str, Any]) -> Layout:
        """The layout, with or without its prefix, whose names occur most among a file's keys."""
        options = [*self.layouts, *(replace(layout, prefix="") for layout in self.layouts if layout.prefix)]
        return max(options, key=lambda layout: sum(name in state for name in layout.names(model).values()))


def load_state(model: nn.Module, system: System, state: Mapping[str, Tensor], path: Path | str) -> None:
    """Fill `model` from the tensors of a file, in whichever of the system's layouts it is written.
    Raises LexelError as `Layout.load` does."""
    system.layout_for(model, state).load(model, state, str(path))


def find(name: str, systems: Iterable[System], what: str) -> tuple[System, Published]:
    """The system and row of the published checkpoint `name`; what: "tokenizer", say, for the error.
    Raises LexelError when there is none of that name."""
    rows = {row.name: (system, row) for system in systems for row in system.rows}
    if name not in rows:
        raise LexelError(f"there is no published {what} {name!r}; there are: {', '.join(rows)}.")
    return rows[name]


def load(
    system: System,
    row: Published,
    path: str | Path | None = None,
    config: Mapping[str, Any] | None = None,
    key: str | None = None,
) -> Any:
    """The network of a row with its published weights, in eval mode and float32; arguments and errors as for
    `lexel.tokenizers.load_published`."""
    if system.opens is not None:
        if key or set(config or {}) - set(system.options):
            allowed = (
                f", and of config {', '.join(system.options)} alone" if system.options else " nor config"
            )
            raise LexelError(f"{row.name} is a folder with a config.json of its own; give no key{allowed}.")
        return system.opens(row.repository if path is None else path, **(config or {}))
    fetched = _fetch_files(system, row) if system.files and path is None else {}
    file = Path(row.repository) if fetched else Path(path) if path is not None else _fetch(row)
    wanted = system.config(row.arguments, system.stored_config(file), config)
    found = read_files(fetched, key=key, nestings=system.nestings) if fetched else read(system, file, key)
    state = found[0]
    stored = system.as_stored(wanted, state)
    built = stored.build()
    load_state(built, system, system.fit(stored, state), file)
    return built.eval()


def read(system: System, path: str | Path, key: str | None = None) -> tuple[dict[str, Tensor], str]:
    """The tensors of a local checkpoint of the system under the names that its layouts use, and in words
    which copy of the weights they are. Raises LexelError for missing, unreadable or hostile files."""
    if not system.files:
        return read_copy(path, key=key, nestings=system.nestings, dotless_ema=system.dotless_ema)
    return read_files(locate(system, path), key=key, nestings=system.nestings)


def locate(system: System, path: str | Path) -> dict[str, Path]:
    """Name → place of the files of a checkpoint of several files. path: their folder, or one of them.
    Raises LexelError when one is missing that is not optional."""
    path = Path(path).expanduser()
    folder = path
    if path.is_file():
        within = [name for name in system.files if path.as_posix().endswith(f"/{name}")]
        folder = path.parents[within[0].count("/")] if within else path.parent
    found = {name: folder / name for name in system.files if (folder / name).is_file()}
    if missing := [name for name in system.files if name not in found and name not in system.optional]:
        raise LexelError(f"{folder} holds no {', '.join(missing)}; a checkpoint of {system.name} needs them.")
    return found


def export(model: Any, system: System, row: Published, path: str | Path) -> None:
    """Write a network's weights in the published layout of a row, as safetensors or as a torch file by the
    ending of `path`; a checkpoint of several files, into the folder `path`. Raises LexelError when the
    network is of another family."""
    wanted = type(system.config(row.arguments))
    if type(model.config) is not wanted:
        raise LexelError(
            f"{row.name} is written from a {wanted.__name__}, not a {type(model.config).__name__}."
        )
    if system.writes is not None:
        system.writes(model, path)
        return
    state = system.layouts[0].export(model)
    if system.files:
        for name in system.files:
            part = {key.removeprefix(f"{name}:"): v for key, v in state.items() if key.startswith(f"{name}:")}
            if part:
                save_checkpoint(part, Path(path) / name, system.container)
        return
    if system.dotless_ema:
        state |= dotless_copy(state)
    save_checkpoint(state, path, system.container)


def _fetch(row: Published) -> Path:
    from huggingface_hub import hf_hub_download

    if not row.file:
        return resolve_folder(row.repository, row.name)
    try:
        return Path(hf_hub_download(row.repository, row.file))
    except Exception as error:  # the hub client raises a wide family: offline, not found, gated, bad name
        raise LexelError(
            f"{row.name}: {row.file} of {row.repository} could not be fetched ({type(error).__name__}); "
            "give a local copy as path."
        ) from error


def _fetch_files(system: System, row: Published) -> dict[str, Path]:
    """Name → place of the files of a row, from the hub and the addresses that the system names."""
    from huggingface_hub import hf_hub_download

    found = {}
    for name, address in system.files.items():
        try:
            found[name] = _download(address) if address else Path(hf_hub_download(row.repository, name))
        except Exception as error:  # the hub client raises a wide family: offline, not found, gated, bad name
            if name in system.optional and type(error).__name__ == "EntryNotFoundError":
                continue
            raise LexelError(
                f"{row.name}: {address or f'{name} of {row.repository}'} could not be fetched "
                f"({type(error).__name__}); give a folder with local copies as path."
            ) from error
    return found


def _download(address: str) -> Path:
    """A file of the web, kept beside what PyTorch downloads."""
    target = Path(torch.hub.get_dir()) / "checkpoints" / address.rsplit("/", 1)[-1]
    if not target.is_file():
        target.parent.mkdir(parents=True, exist_ok=True)
        torch.hub.download_url_to_file(address, str(target))
    return target


def _matches(pattern: str, key: str) -> bool:
    return bool(pattern) and re.search(pattern, key) is not None
