"""Clips on disk: every folder of frames, GIF or video file in a folder is one.

A text file of the same name beside it holds its caption, one per line.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from torch.utils.data import Dataset

from lexel.data.example import Example
from lexel.data.media import is_clip, read_clip
from lexel.data.source import Split, check_share, check_split, split_keys
from lexel.errors import LexelError


@dataclass(frozen=True)
class ClipFolderConfig:
    """root: the folder. size: side of the frames in pixels, cropped in the middle and scaled. frames: of
    every clip, from its beginning. fps: frames per second (null: as in the file; folders of frames have no
    rate). validation_share: of the clips, chosen by a hash of their names.
    Raises ValueError when a value is out of range.
    """

    root: str
    size: int = 128
    frames: int = 16
    fps: float | None = None
    validation_share: float = 0.05

    def __post_init__(self) -> None:
        check_share(self.validation_share)
        if self.size < 1 or self.frames < 1:
            raise ValueError(f"size and frames must be positive, got {self.size} and {self.frames}.")

    @property
    def image_size(self) -> tuple[int, int]:
        """(height, width) of the frames."""
        return (self.size, self.size)

    def build(self, split: Split) -> ClipFolder:
        """The "train" or "validation" split. Raises LexelError when there is no such folder or split."""
        return ClipFolder(self, split)


class ClipFolder(Dataset[Example]):
    """Map-style split of `ClipFolderConfig`. A clip that cannot be read raises LexelError when its turn
    comes."""

    def __init__(self, config: ClipFolderConfig, split: Split) -> None:
        check_split(split)
        root = Path(config.root).expanduser()
        if not root.is_dir():
            raise LexelError(f"The data folder {root} does not exist (or is no folder).")
        self.config, self.root = config, root
        names = sorted(path.name for path in root.iterdir() if is_clip(path) and path.name[0] != ".")
        self.names = split_keys(names, config.validation_share, split)

    def __len__(self) -> int:
        return len(self.names)

    def __getitem__(self, index: int) -> Example:
        path = self.root / self.names[index]
        fps = None if path.is_dir() else self.config.fps
        return Example(path.name, _captions(path), read_clip(path, self.config.frames, self.config.size, fps))


def _captions(path: Path) -> tuple[str, ...]:
    file = path.parent / f"{path.name if path.is_dir() else path.stem}.txt"
    if not file.is_file():
        return ()
    return tuple(line.strip() for line in file.read_text().splitlines() if line.strip())
