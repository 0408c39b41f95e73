"""What the sources of pictures on disk have in common: options, splits, captions and the check of
pictures."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, TypeVar

from lexel.data.problems import OnError
from lexel.errors import LexelError

Split = Literal["train", "validation"]
_VALIDATION_NAMES = ("validation", "valid", "val", "test")
_THREADS = 8
_PORTION = 1024
T = TypeVar("T")


@dataclass(frozen=True)
class PictureSourceConfig:
    """Options of a source of captioned pictures on disk.

    root: the folder; with sub-folders ``train`` and ``validation`` (or valid, val, test) these are the
    splits. size: pictures become this many pixels high and wide (a number or ``(h, w)``). validation_root: a
    second folder, else `validation_share` of the pictures, chosen by a hash of their names (so that a picture
    keeps its split when others come or go), is held out. on_error: "skip" counts, names and leaves out broken
    pictures, empty captions and missing files; "raise" refuses them. caption_column: where metadata keeps
    captions. verify: decode every picture once when the data set is built; without it a broken picture is
    met, and raises, only when its turn comes. crop, flip: how pictures vary while a tokenizer trains: a
    random part of at least this share of the shorter side (1: the centre, see `varied_pixels`), mirrored half
    of the time. Raises ValueError when a value is out of range.
    """

    root: str
    size: int | tuple[int, int] = 64
    validation_share: float = 0.05
    validation_root: str | None = None
    on_error: OnError = "skip"
    caption_column: str = "text"
    verify: bool = True
    crop: float = 1.0
    flip: bool = False

    def __post_init__(self) -> None:
        values = (self.size,) if isinstance(self.size, int) else tuple(self.size)
        if len(values) not in (1, 2) or not all(isinstance(v, int) and v > 0 for v in values):
            raise ValueError(f"size must be a positive number of pixels or (height, width), got {self.size}.")
        object.__setattr__(self, "size", values[0] if len(values) == 1 else values)
        check_share(self.validation_share)
        if not 0 < self.crop <= 1:
            raise ValueError(f"crop must be a share of the shorter side in (0, 1], got {self.crop}.")

    @property
    def varies(self) -> bool:
        """Whether training sees another variation of a picture each time."""
        return self.crop < 1 or self.flip

    @property
    def image_size(self) -> tuple[int, int]:
        """(h, w) of the examples' pictures."""
        return (self.size, self.size) if isinstance(self.size, int) else self.size

    def folder(self, split: Split) -> tuple[Path, float | None]:
        """Where a split lies, and the share of that folder that is held out (None: it has one split only).
        LexelError for a folder that does not exist and for an unknown split."""
        check_split(split)
        train = Path(self.root).expanduser()
        held_out = Path(self.validation_root).expanduser() if self.validation_root else None
        if held_out is None and (train / "train").is_dir():
            held_out = next((train / name for name in _VALIDATION_NAMES if (train / name).is_dir()), None)
            train = train / "train" if held_out else train
        path = held_out if held_out and split == "validation" else train
        if not path.is_dir():
            raise LexelError(f"The data folder {path} does not exist (or is no folder).")
        return path, None if held_out else self.validation_share


def check_share(share: float) -> None:
    """ValueError unless `share` is a validation share in [0, 1)."""
    if not 0 <= share < 1:
        raise ValueError(f"validation_share must lie in [0, 1), got {share}.")


def check_split(split: str) -> None:
    """LexelError unless `split` is one of the two."""
    if split not in ("train", "validation"):
        raise LexelError(f"The splits are train and validation, got {split!r}.")


def split_keys(keys: Sequence[str], share: float | None, split: Split) -> list[str]:
    """The keys of one split, in their order; all of them when `share` is None. A key is held out when its
    hash falls below `share`; of two or more keys at least one is held out if share > 0; at least one never
    is."""
    if share is None:
        return list(keys)
    places = {
        key: int.from_bytes(hashlib.sha256(key.encode(errors="surrogateescape")).digest()[:8], "big") / 2**64
        for key in keys
    }
    held_out = {key for key, place in places.items() if place < share}
    by_place = sorted(keys, key=places.__getitem__)
    if share > 0:
        held_out = (held_out | set(by_place[:1])) - set(by_place[-1:])
    return [key for key in keys if (key in held_out) == (split == "validation")]


def clean_captions(value: Any) -> tuple[str, ...]:
    """The non-empty captions in a text or a list of texts, stripped; () for anything else."""
    values = [value] if isinstance(value, str) else value if isinstance(value, list) else []
    return tuple(v.strip() for v in values if isinstance(v, str) and v.strip())


def verify_all(items: Sequence[T], check: Callable[[T], None]) -> Iterator[tuple[T, LexelError | None]]:
    """Run `check` (which raises LexelError) over items in threads (picture decoders release Python's lock);
    yields (item, error or None) in order."""

    def attempt(item: T) -> tuple[T, LexelError | None]:
        try:
            check(item)
        except LexelError as error:
            return item, error
        return item, None

    with ThreadPoolExecutor(_THREADS) as pool:
        # In portions: a pool queues all it is given at once, and there may be millions.
        for start in range(0, len(items), _PORTION):
            yield from pool.map(attempt, items[start : start + _PORTION])
