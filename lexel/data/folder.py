"""A user's folder of pictures with captions, in the hub's image-folder convention, or class sub-folders."""

from __future__ import annotations

import csv
import hashlib
import json
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, TypeVar

from torch.utils.data import Dataset

from lexel.data.example import Example
from lexel.data.images import EXTENSIONS, read_pixels, verify_image
from lexel.data.problems import OnError, Problems
from lexel.errors import LexelError

Split = Literal["train", "validation"]
_VALIDATION_NAMES = ("validation", "valid", "val", "test")
_THREADS = 8
T = TypeVar("T")


@dataclass(frozen=True)
class FolderConfig:
    """Pictures in a folder, with captions from one of

    * ``metadata.jsonl``: one ``{"file_name": …, "text": …}`` per line (the hub's image-folder convention);
      a list of captions, or several lines for one file, gives several captions;
    * ``metadata.csv`` with the same columns;
    * class sub-folders: ``<root>/<class>/…`` is captioned by `class_template`;
    * none of these: pictures without captions (enough for a tokenizer).

    root: the folder; with sub-folders ``train`` and ``validation`` (or valid, val, test) these are the splits.
    size: pictures become this many pixels high and wide (a number or ``(h, w)``). validation_root: a second
    folder, else `validation_share` of the pictures, chosen by a hash of their names (so that a picture keeps
    its split when others come or go), is held out. on_error: "skip" counts, names and leaves out broken
    pictures, empty captions and missing files; "raise" refuses them. verify: decode every picture once when
    the data set is built; without it a broken picture is met, and raises, only when its turn comes.
    """

    root: str
    size: int | tuple[int, int] = 64
    validation_share: float = 0.05
    validation_root: str | None = None
    on_error: OnError = "skip"
    caption_column: str = "text"
    class_template: str = "a photo of a {}"
    verify: bool = True

    def __post_init__(self) -> None:
        object.__setattr__(self, "size", check_size(self.size))
        if not 0 <= self.validation_share < 1:
            raise ValueError(f"validation_share must lie in [0, 1), got {self.validation_share}.")

    @property
    def image_size(self) -> tuple[int, int]:
        """(h, w) of the examples' pictures."""
        return image_size(self.size)

    def build(self, split: Split) -> FolderDataset:
        """The pictures of one split. LexelError for a missing folder or when no usable picture is left."""
        return FolderDataset(self, split)


class FolderDataset(Dataset[Example]):
    """See `FolderConfig`. Keys are paths relative to the root; `problems` tells what was left out."""

    def __init__(self, config: FolderConfig, split: Split) -> None:
        self.config = config
        root, chosen = choose_root(config.root, config.validation_root, split)
        self.root = root
        self.problems = Problems(str(root), config.on_error)
        listing = _listing(root, config, self.problems)
        keys = chosen(list(listing), config.validation_share)
        if config.verify:
            good = _verified(keys, root, self.problems)
        else:
            good = keys
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


def check_size(size: Any) -> int | tuple[int, int]:
    """A picture size from a config: a positive number, or ``(h, w)`` (a list from YAML is fine). ValueError
    otherwise."""
    values = (size,) if isinstance(size, int) else tuple(size)
    if len(values) not in (1, 2) or not all(isinstance(v, int) and v > 0 for v in values):
        raise ValueError(f"size must be a positive number of pixels or (height, width), got {size}.")
    return values[0] if len(values) == 1 else values


def image_size(size: int | tuple[int, int]) -> tuple[int, int]:
    """(h, w) of a size that may be one number."""
    return (size, size) if isinstance(size, int) else size


def choose_root(
    root: str, validation_root: str | None, split: Split
) -> tuple[Path, Callable[[Sequence[str], float], list[str]]]:
    """Where a split lies, and the function (keys, share) → keys that picks it there. LexelError for a folder
    that does not exist and for an unknown split."""
    if split not in ("train", "validation"):
        raise LexelError(f"The splits are train and validation, got {split!r}.")
    train = Path(root).expanduser()
    held_out = Path(validation_root).expanduser() if validation_root else None
    if held_out is None and (train / "train").is_dir():
        held_out = next((train / name for name in _VALIDATION_NAMES if (train / name).is_dir()), None)
        train = train / "train" if held_out else train
    path = held_out if held_out and split == "validation" else train
    if not path.is_dir():
        raise LexelError(f"The data folder {path} does not exist (or is no folder).")
    if held_out:
        return path, lambda keys, share: list(keys)
    return path, lambda keys, share: split_keys(keys, share, split)


def split_keys(keys: Sequence[str], share: float, split: Split) -> list[str]:
    """The keys of one split, in their order. A key is held out when its hash falls below `share`; of two or
    more keys at least one is held out if share > 0, and at least one is not."""
    places = {key: int.from_bytes(hashlib.sha256(key.encode()).digest()[:8], "big") / 2**64 for key in keys}
    held_out = {key for key, place in places.items() if place < share}
    if len(keys) > 1 and share > 0:
        by_place = sorted(keys, key=places.__getitem__)
        held_out = (held_out | {by_place[0]}) - {by_place[-1]}
    return [key for key in keys if (key in held_out) == (split == "validation")]


def clean_captions(value: Any) -> tuple[str, ...]:
    """The non-empty captions in a text or a list of texts, stripped; () for anything else."""
    values = [value] if isinstance(value, str) else value if isinstance(value, list) else []
    return tuple(v.strip() for v in values if isinstance(v, str) and v.strip())


def verify_all(items: Iterable[T], check: Callable[[T], None]) -> Iterator[tuple[T, LexelError | None]]:
    """Run `check` (which raises LexelError) over items in threads (picture decoders release Python's lock);
    yields (item, error or None) in order."""

    def attempt(item: T) -> tuple[T, LexelError | None]:
        try:
            check(item)
        except LexelError as error:
            return item, error
        return item, None

    with ThreadPoolExecutor(_THREADS) as pool:
        yield from pool.map(attempt, items)


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
    listing = {}
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
            problems.add("empty caption", key, f"no column {column!r}; the line has {', '.join(map(str, row))}")
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
    for number, row in enumerate(csv.DictReader(text.splitlines(keepends=True)), 2):
        yield f"{path.name}:{number}", dict(row)
