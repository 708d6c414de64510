"""Text recordings whose blocks are read ahead of their turn as far as each says something by itself."""

from __future__ import annotations

from typing import TYPE_CHECKING

from xtrace.ingest.ahead import ahead
from xtrace.ingest.source import is_live
from xtrace.ingest.text import Found, TextRecording, lines_of

if TYPE_CHECKING:
    from collections.abc import Iterator

    import polars as pl

    from xtrace.ingest.lines import LineBlock

__all__ = ("AheadRecording",)


class AheadRecording(TextRecording):
    """A text recording that finds what a block says by itself (:meth:`prepare`) in the background, and then reads it in turn.

    A format fills in ``prepare`` and calls :meth:`prepared` from ``read``. A growing input is read block by block, so that
    nothing waits for what comes next.
    """

    def __post_init__(self) -> None:
        """Nothing is ready yet."""
        super().__post_init__()
        self._ready: tuple[int, int, Found] | None = None

    def prepare(self, lines: pl.DataFrame) -> Found:
        """Find what whole lines say, whatever came before; called from several threads at once."""
        raise NotImplementedError

    def prepared(self, lines: pl.DataFrame) -> Found:
        """Return what :meth:`prepare` says of the lines that ``read`` was given."""
        if self._ready is not None and len(lines):
            first, n, found = self._ready
            if (first, n) == (int(lines["line"][0]), len(lines)):
                return found
        return self.prepare(lines)  # the last line is cut off and was left out, or nothing was done ahead

    def blocks(self) -> Iterator[LineBlock]:
        """Yield the input's blocks of lines, in order, each with the next ones being worked on."""
        for block, found in ahead(super().blocks(), lambda block: self.prepare(lines_of(block)), live=is_live(self.source)):
            self._ready = (int(block.line[0]), len(block.text), found) if len(block.text) else None
            yield block
        self._ready = None
