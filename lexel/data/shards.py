"""WebDataset tar shards as a map-style data set.

Why map-style and not a stream with a shuffle buffer: a stream splits by whole shards, its shuffle is only as
wide as its buffer, and none of the usual ones resumes exactly in the middle of an epoch (webdataset 1.0 has
no state at all; `datasets` streaming loses what its shuffle buffer held, 26 of 200 samples in a trial with a
buffer of 32). Here the members of every (uncompressed) tar are listed once, from their headers alone, and a
sample is a seek and a read. Then the one `ResumableSampler` shuffles globally, splits by node (disjoint
strides) and by worker (whole batches), and resumes at any batch without losing or repeating a sample. The
price is random instead of sequential reading: on disks that mind, tokenize once with `lexel tokenize` and
train on codes.

No file stays open between samples, so nothing is shared wrongly by forked, spawned or threaded readers.
"""

from __future__ import annotations

import json
import tarfile
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

from torch.utils.data import Dataset

from lexel.data.example import Example
from lexel.data.images import load_image, read_pixels, varied_pixels, verify_image
from lexel.data.problems import Problems
from lexel.data.source import (
    PictureSourceConfig,
    Split,
    check_split,
    clean_captions,
    split_keys,
    verify_all,
)
from lexel.data.store import Store, is_url
from lexel.errors import LexelError

_PICTURES = ("jpg", "jpeg", "png", "webp")
_BLOCK = 512  # a tar ends with zero blocks of this size


@dataclass(frozen=True)
class ShardsConfig(PictureSourceConfig):
    """WebDataset tars: members ``<key>.jpg|jpeg|png|webp`` with ``<key>.txt`` (the caption) or ``<key>.json``
    (captions under `caption_column`) beside them; ``<key>`` ends at the first dot of the file name.

    root: a folder of ``*.tar``, local or of an object store (a URL; its tars are copied to this machine
    first, see `Store`); the other options are those of `PictureSourceConfig`. With on_error="skip" a
    truncated tar keeps the samples before the damage, and what is missing is named.
    """

    def folder(self, split: Split) -> tuple[Path, float | None]:
        """As `PictureSourceConfig.folder`; a URL is one split's or, with `validation_share`, both splits'."""
        if not is_url(self.root):
            return super().folder(split)
        check_split(split)
        url = self.validation_root if self.validation_root and split == "validation" else self.root
        store = Store(url)
        for name in sorted(store.names):
            if name.endswith(".tar"):
                store.bring(name)
        return store.folder, None if self.validation_root else self.validation_share

    def build(self, split: Split) -> ShardsDataset:
        """The samples of one split. LexelError for a missing folder or when no usable sample is left."""
        return ShardsDataset(self, split)


@dataclass(frozen=True)
class Member:
    """Where a file's bytes lie."""

    tar: Path
    offset: int
    size: int

    def read(self) -> bytes:
        """The file's content."""
        with self.tar.open("rb") as file:
            file.seek(self.offset)
            return file.read(self.size)


@dataclass
class _Sample:
    picture: Member | None = None
    texts: dict[str, Member] = field(default_factory=dict)


class ShardsDataset(Dataset[Example]):
    """See `ShardsConfig`. Keys are ``<tar name>/<sample key>``; `problems` tells what was left out."""

    def __init__(self, config: ShardsConfig, split: Split) -> None:
        self.config = config
        root, share = config.folder(split)
        self.problems = Problems(str(root), config.on_error)
        tars = sorted(root.rglob("*.tar"))
        if not tars:
            where = self.config.root if is_url(self.config.root) else root
            raise LexelError(f"{where} holds no .tar shard (compressed ones must be unpacked to .tar first).")
        samples: dict[str, _Sample] = {}
        for tar in tars:
            name = tar.relative_to(root).with_suffix("").as_posix()
            samples |= {f"{name}/{key}": sample for key, sample in index_tar(tar, self.problems).items()}
        self.items: list[tuple[str, tuple[str, ...], Member]] = []
        for key in split_keys(list(samples), share, split):
            self._add(key, samples[key])
        if config.verify:
            self.items = self._verified()
        self.problems.report()
        if not self.items:
            raise LexelError(
                f"{root} holds no usable sample for the {split} split ({len(samples)} in {len(tars)} tars, "
                f"{len(self.problems)} skipped); expected <key>.jpg with <key>.txt or <key>.json."
            )

    def __len__(self) -> int:
        return len(self.items)

    def __getitem__(self, index: int) -> Example:
        key, captions, picture = self.items[index]
        return Example(key, captions, read_pixels(picture.read(), self.config.size, key))

    def varied(self, index: int, seed: int) -> Example:
        """The example with its picture varied as the config says (`crop`, `flip`)."""
        key, captions, picture = self.items[index]
        config, image = self.config, load_image(picture.read(), key)
        return Example(key, captions, varied_pixels(image, config.size, config.crop, config.flip, seed))

    def _add(self, key: str, sample: _Sample) -> None:
        if sample.picture is None:
            self.problems.add("missing file", key, f"no picture ({', '.join(_PICTURES)}) in the tar")
            return
        captions = _captions(sample, self.config.caption_column)
        if captions:
            self.items.append((key, captions, sample.picture))
        else:
            self.problems.add(
                "empty caption", key, f"no .txt, and no {self.config.caption_column!r} in a .json"
            )

    def _verified(self) -> list[tuple[str, tuple[str, ...], Member]]:
        good = []
        for item, error in verify_all(self.items, lambda item: verify_image(item[2].read(), item[0])):
            if error is None:
                good.append(item)
            else:
                self.problems.add("broken picture", item[0], str(error).rstrip("."))
        return good


def index_tar(path: Path, problems: Problems) -> dict[str, _Sample]:
    """The samples of one tar by key, reading only headers. What a truncated or damaged tar still holds whole
    is returned, the damage noted in `problems`."""
    samples: dict[str, _Sample] = {}
    for info in _members(path, problems):
        folder, _, file_name = info.name.rpartition("/")
        stem, _, extension = file_name.partition(".")
        if not info.isfile() or not stem:
            continue
        sample = samples.setdefault(f"{folder}/{stem}" if folder else stem, _Sample())
        member = Member(path, info.offset_data, info.size)
        if extension.lower() in _PICTURES:
            sample.picture = member
        elif extension.lower() in ("txt", "json"):
            sample.texts[extension.lower()] = member
    return samples


def _members(path: Path, problems: Problems) -> Iterator[tarfile.TarInfo]:
    """The whole members of a tar; notes where it breaks off."""
    length = path.stat().st_size
    last: tarfile.TarInfo | None = None
    try:
        with tarfile.open(path, "r:") as tar:
            for info in tar:
                if info.offset_data + info.size > length:
                    raise tarfile.ReadError(f"{info.name} is cut off")
                last = info
                yield info
            # A cut between two members, or a damaged header, ends the loop without complaint.
            if Member(path, tar.offset, _BLOCK).read() != bytes(_BLOCK):
                raise tarfile.ReadError("its end mark is missing")
    except (tarfile.TarError, OSError, EOFError, ValueError) as error:
        where = f"after {last.name}" if last else "before the first member"
        problems.add("truncated tar", str(path), f"{error}, {where}")


def _captions(sample: _Sample, column: str) -> tuple[str, ...]:
    if "txt" in sample.texts:
        return clean_captions(sample.texts["txt"].read().decode("utf-8", errors="replace"))
    if "json" in sample.texts:
        try:
            row = json.loads(sample.texts["json"].read())
        except ValueError:
            return ()
        return clean_captions(row.get(column)) if isinstance(row, dict) else ()
    return ()
