"""A user's folder of pictures with captions, in the hub's image-folder convention, or class sub-folders."""

from __future__ import annotations

import csv
import json
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch.utils.data import Dataset

from lexel.data.example import Example
from lexel.data.images import EXTENSIONS, load_image, read_pixels, varied_pixels, verify_image
from lexel.data.problems import Problems
from lexel.data.source import PictureSourceConfig, Split, clean_captions, split_keys, verify_all
from lexel.errors import LexelError


@dataclass(frozen=True)
class FolderConfig(PictureSourceConfig):
    """Pictures in a folder (options: `PictureSourceConfig`), with captions from one of

    * ``metadata.jsonl``: one ``{"file_name": …, "text": …}`` per line (the hub's image-folder convention);
      a list of captions, or several lines for one file, gives several captions;
    * ``metadata.csv`` with the same columns;
    * class sub-folders: ``<root>/<class>/…`` is captioned by `class_template`;
    * none of these: pictures without captions (enough for a tokenizer).
    """

    class_template: str = "a photo of a {}"

    def build(self, split: Split) -> FolderDataset:
        """The pictures of one split. LexelError for a missing folder or when no usable picture is left."""
        return FolderDataset(self, split)


class FolderDataset(Dataset[Example]):
    """See `FolderConfig`. Keys are paths relative to the root; `problems` tells what was left out."""

    def __init__(self, config: FolderConfig, split: Split) -> None:
        self.config = config
        root, share = config.folder(split)
        self.root = root
        self.problems = Problems(str(root), config.on_error)
        listing = _listing(root, config, self.problems)
        keys = split_keys(list(listing), share, split)
        good = _verified(keys, root, self.problems) if config.verify else keys
        self.problems.report()
        if not good:
            raise LexelError(
                f"{root} holds no usable picture for the {split} split ({len(listing)} listed, "
                f"{len(self.problems)} skipped); expected {', '.join(EXTENSIONS)} files with captions in "
                "metadata.jsonl or class sub-folders."
            )
        self.items = [(key, listing[key]) for key in good]

    def __len__(self) -> int:
        return len(self.items)

    def __getitem__(self, index: int) -> Example:
        key, captions = self.items[index]
        return Example(key, captions, read_pixels(self.root / key, self.config.size))

    def varied(self, index: int, seed: int) -> Example:
        """The example with its picture varied as the config says (`crop`, `flip`)."""
        key, captions = self.items[index]
        config, image = self.config, load_image(self.root / key)
        return Example(key, captions, varied_pixels(image, config.size, config.crop, config.flip, seed))


def _verified(keys: Sequence[str], root: Path, problems: Problems) -> list[str]:
    good = []
    for key, error in verify_all(keys, lambda key: verify_image(root / key)):
        if error is None:
            good.append(key)
        else:
            problems.add("broken picture", key, str(error).rstrip("."))
    return good


def _listing(root: Path, config: FolderConfig, problems: Problems) -> dict[str, tuple[str, ...]]:
    """Every picture that exists → its captions, sorted by path."""
    for name, reader in (("metadata.jsonl", _read_jsonl), ("metadata.csv", _read_csv)):
        if (root / name).is_file():
            return _from_rows(reader(root / name, problems), root, config.caption_column, problems)
    listing: dict[str, tuple[str, ...]] = {}
    for path in sorted(root.rglob("*")):
        relative = path.relative_to(root)
        hidden = any(part.startswith(".") for part in relative.parts)
        if path.suffix.lower() in EXTENSIONS and not hidden and path.is_file():
            words = relative.parts[0].replace("_", " ").replace("-", " ")
            is_class = len(relative.parts) > 1
            listing[relative.as_posix()] = (config.class_template.format(words),) if is_class else ()
    return listing


def _from_rows(
    rows: Iterable[tuple[str, dict[str, Any]]], root: Path, column: str, problems: Problems
) -> dict[str, tuple[str, ...]]:
    listing: dict[str, tuple[str, ...]] = {}
    for place, row in rows:
        key = row.get("file_name")
        captions = clean_captions(row.get(column))
        if not isinstance(key, str) or not key:
            problems.add("bad metadata line", place, "it has no file_name")
        elif column not in row:
            problems.add(
                "empty caption", key, f"no column {column!r}; the line has {', '.join(map(str, row))}"
            )
        elif not captions:
            problems.add("empty caption", key, f"{column} is empty")
        elif not (root / key).is_file():
            problems.add("missing file", key, "metadata names it, but it does not exist")
        else:
            listing[key] = listing.get(key, ()) + captions
    return dict(sorted(listing.items()))


def _read_jsonl(path: Path, problems: Problems) -> Iterator[tuple[str, dict[str, Any]]]:
    for number, line in enumerate(path.read_bytes().split(b"\n"), 1):
        place = f"{path.name}:{number}"
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except ValueError as error:
            problems.add("bad metadata line", place, f"not JSON ({error})")
            continue
        if isinstance(row, dict):
            yield place, row
        else:
            problems.add("bad metadata line", place, "not a JSON object")


def _read_csv(path: Path, problems: Problems) -> Iterator[tuple[str, dict[str, Any]]]:
    text = path.read_text(encoding="utf-8-sig", errors="replace")
    reader = csv.DictReader(text.splitlines(keepends=True))
    try:
        for row in reader:
            yield f"{path.name}:{reader.line_num}", dict(row)
    except csv.Error as error:
        problems.add("bad metadata line", f"{path.name}:{reader.line_num}", f"not CSV from here on ({error})")
