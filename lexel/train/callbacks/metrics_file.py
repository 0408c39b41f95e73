"""`metrics.csv`: one row per reported step, kept across an interruption."""

from __future__ import annotations

import csv
import io
from pathlib import Path
from typing import Any

from lightning.pytorch.loggers.logger import Logger
from lightning.pytorch.utilities import rank_zero_only

from lexel.hub import write_atomically


class MetricsFile(Logger):
    """A Lightning logger that appends rows to a CSV file whose first column is `step`.

    Lightning's `CSVLogger` deletes the file when a run is resumed; this one drops only the rows after the
    step that the run is resumed from (`rewind`). A metric first seen later gets a new column.
    """

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.path = path
        self._columns = ["step"]

    @property
    def name(self) -> str:
        """The file's name."""
        return self.path.stem

    @property
    def version(self) -> str:
        """Always one file per run."""
        return "0"

    @rank_zero_only
    def log_hyperparams(self, params: Any, *args: Any, **kwargs: Any) -> None:
        """Settings are in `settings.json` already."""

    @rank_zero_only
    def log_metrics(self, metrics: dict[str, float], step: int | None = None) -> None:
        """Append one row; a row of the same step is not merged (training and validation are separate
        rows)."""
        row = {"step": step, **metrics}
        if new := [key for key in row if key not in self._columns]:
            self._columns += new
            self._write(self.rows())
        with self.path.open("a", newline="", encoding="utf-8") as file:
            csv.DictWriter(file, self._columns).writerow(row)

    @rank_zero_only
    def rewind(self, step: int) -> None:
        """Forget what an interrupted run reported after `step`."""
        rows = [row for row in self.rows() if int(row["step"]) <= step]
        self._columns = list(rows[0]) if rows else ["step"]
        self._write(rows)

    def rows(self) -> list[dict[str, str]]:
        """The rows so far (empty cells are empty strings)."""
        if not self.path.is_file():
            return []
        with self.path.open(newline="", encoding="utf-8") as file:
            # A kill may have cut the last line short: without its line break it is not a row yet.
            whole = "".join(line for line in file if line.endswith("\n"))
        return list(csv.DictReader(io.StringIO(whole), restval=""))

    def _write(self, rows: list[dict[str, str]]) -> None:
        def write(path: Path) -> None:
            with path.open("w", newline="", encoding="utf-8") as file:
                writer = csv.DictWriter(file, self._columns)
                writer.writeheader()
                writer.writerows(rows)

        write_atomically(self.path, write)
