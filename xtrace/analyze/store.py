"""Rows of a table, however many: in memory while they are few, in temporary Arrow files beyond that."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import TYPE_CHECKING

import polars as pl

from xtrace.schema import empty

if TYPE_CHECKING:
    from collections.abc import Iterator

__all__ = ("FrameStore",)


class FrameStore:
    """An append-only table.

    Args:
        schema: its columns.
        limit: rows kept in memory before they are written to a temporary folder, which goes with the store.
    """

    def __init__(self, schema: pl.Schema, limit: int = 100_000) -> None:
        """Start empty."""
        self.schema = schema
        self._limit, self._rows, self.count = limit, 0, 0
        self._parts: list[pl.DataFrame] = []
        self._folder: tempfile.TemporaryDirectory[str] | None = None
        self._files: list[Path] = []

    def add(self, frame: pl.DataFrame) -> None:
        """Append rows."""
        if not len(frame):
            return
        self._parts.append(frame)
        self._rows += len(frame)
        self.count += len(frame)
        if self._rows >= self._limit:
            self._spill()

    def _spill(self) -> None:
        if self._folder is None:
            self._folder = tempfile.TemporaryDirectory(prefix="xtrace-rows-")
        path = Path(self._folder.name) / f"{len(self._files):06d}.arrow"
        pl.concat(self._parts).write_ipc(path, compression="zstd")
        self._files.append(path)
        self._parts, self._rows = [], 0

    def batches(self) -> Iterator[pl.DataFrame]:
        """Yield the rows in the order in which they were added."""
        for path in self._files:
            yield pl.read_ipc(path)
        yield from self._parts

    def frame(self) -> pl.DataFrame:
        """Return all rows at once."""
        return pl.concat([empty(self.schema), *self.batches()])
