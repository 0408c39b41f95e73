"""Folders of an object store (s3://, gs://, hf://, …) read through fsspec, file by file, on use."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

from lexel.errors import LexelError
from lexel.hub import write_atomically
from lexel.machine import cache_folder


def is_url(folder: str | Path) -> bool:
    """Whether a folder is named by a URL, not by a local path."""
    return "://" in str(folder)


def join(folder: str | Path, name: str) -> str | Path:
    """A sub-folder of a local folder or of a URL."""
    return f"{str(folder).rstrip('/')}/{name}" if is_url(folder) else Path(folder) / name


VERSIONS = (
    "ETag",
    "etag",
    "md5Hash",
    "checksum",
    "mtime",
    "LastModified",
    "last_modified",
    "updated",
    "created",
)
"""What stores call that which changes when a file does."""


class Store:
    """The files directly in one folder of an object store, copied to ``cache_folder()/store`` when asked for.

    The folder is listed when it is opened; a copy is made once per machine and listing (under another name,
    then renamed, so that processes may ask for the same file) and kept, so that a folder which was written
    again is read again. The protocol's fsspec package must be installed (s3fs, gcsfs, …). Raises LexelError
    for a URL that cannot be opened or listed.
    """

    def __init__(self, url: str) -> None:
        self.url = url.rstrip("/")
        system, path = self._open()
        try:
            found = system.ls(path, detail=True)
        except Exception as error:  # every store has errors of its own
            raise LexelError(f"{self.url} cannot be listed ({type(error).__name__}: {error}).") from error
        files = {str(info["name"]).rstrip("/").rsplit("/", 1)[-1]: info for info in found}
        self.names = frozenset(files)
        versions = {name: [info.get("size"), *map(info.get, VERSIONS)] for name, info in files.items()}
        key = hashlib.sha256(repr((self.url, sorted(versions.items()))).encode()).hexdigest()
        self.folder = cache_folder() / "store" / key[:16]

    def bring(self, name: str) -> Path:
        """The local copy of a file. Raises LexelError when it cannot be read."""
        target = self.folder / name
        if target.is_file():
            return target
        system, path = self._open()
        target.parent.mkdir(parents=True, exist_ok=True)

        def download(temporary: Path) -> None:
            try:
                system.get_file(f"{path}/{name}", str(temporary))
            except Exception as error:
                raise LexelError(f"{self.url}/{name} cannot be read ({type(error).__name__}).") from error

        write_atomically(target, download)
        return target

    def _open(self) -> tuple[Any, str]:
        from fsspec.core import url_to_fs

        try:
            return url_to_fs(self.url)
        except (ImportError, ValueError) as error:
            raise LexelError(f"{self.url} cannot be opened: {error}") from error
