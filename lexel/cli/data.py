"""What DATA on the command line means."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from lexel.errors import LexelError

SHAPES = "shapes"


def data_config(name: str, size: tuple[int, int]) -> Any:
    """The data source config that DATA on the command line means, at a picture size (h, w).
    Raises LexelError for a folder that does not exist or holds nothing."""
    if name == SHAPES:
        from lexel.data.shapes import ShapesConfig

        return ShapesConfig(size=size[0])
    from lexel.data import FolderConfig, ShardsConfig
    from lexel.data.store import is_url

    if is_url(name):
        return ShardsConfig(root=name, size=size)
    folder = Path(name).expanduser()
    if not folder.is_dir():
        raise LexelError(f"data folder {name} does not exist; give a folder, or 'shapes'.")
    shards = next(folder.rglob("*.tar"), None) is not None
    return (ShardsConfig if shards else FolderConfig)(root=str(folder), size=size)
