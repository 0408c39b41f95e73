"""What commands print and write."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any


def save_picture(pixels: Any, path: Path) -> None:
    """Write pixels as a PNG, whole or not at all."""
    from lexel.data.images import to_image

    write_png(to_image(pixels), path)


def write_png(picture: Any, path: Path) -> None:
    """Write a Pillow image as a PNG, whole or not at all."""
    from lexel.hub import write_atomically

    write_atomically(path, lambda temporary: picture.save(temporary, format="PNG"))


def show(arguments: argparse.Namespace, values: dict[str, Any], text: str) -> None:
    """Print `values` as JSON where --json asks for it, else `text`."""
    print(json.dumps(values, indent=2, ensure_ascii=False) if arguments.json else text)
