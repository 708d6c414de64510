"""What the readers of text share: blocks of lines in, events out, and an account of every line."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, ClassVar, TypeVar

import numpy as np
import polars as pl

from xtrace import schema
from xtrace.ingest.ahead import blocks_ahead
from xtrace.ingest.base import Ledger, Observed, ReadOptions
from xtrace.ingest.clock import Clock, nanoseconds
from xtrace.ingest.lines import LineBlock, block_bytes, block_of

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from xtrace.ingest.lines import RawBlock
    from xtrace.ingest.source import Source

__all__ = ("Found", "TextRecording", "lines_of")

S = TypeVar("S")


@dataclass(slots=True)
class Found:
    """What a reader made of one block of lines.

    Attributes:
        rows: events, one row each: ``line`` and ``offset`` (UInt64) and whatever columns of ``schema.EVENTS`` the format
            can fill; ``seq``, ``segment`` and a null ``time_ns`` are filled in by `TextRecording`. Several rows may come
            from one line; rows of one line keep their order.
        bad: lines that are records of the format and could not be understood: ``line``, ``offset``, ``text``.
        records: record lines understood, where that differs from the number of lines with a row.
        noise: lines that are no records (``line``, ``text``), the first few are shown; may be left out.
    """

    rows: pl.DataFrame
    bad: pl.DataFrame | None = None
    records: int | None = None
    noise: pl.DataFrame | None = None


def lines_of(block: LineBlock) -> pl.DataFrame:
    """Return a block as a frame of ``text``, ``line``, ``offset`` and ``size``."""
    return pl.DataFrame({"text": block.text, "line": block.line, "offset": block.offset, "size": block.size})


@dataclass
class TextRecording:
    """An opened text input (see ``xtrace.ingest.base.Recording``); a format fills in :meth:`read`.

    Lines that end the input without a newline are not used where they are records: their last number may have lost digits.
    Time order is the order of the file, unless the format merges; a TSC that steps back starts a new segment of its clock.
    """

    source: Source
    options: ReadOptions
    ledger: Ledger = field(default_factory=Ledger)
    observed: Observed = field(default_factory=Observed)

    #: Name of the format.
    format: ClassVar[str] = ""
    #: Columns that say which clock a row follows: rows of other values do not step back from one another.
    clock: ClassVar[tuple[str, ...]] = ("pcpu",)

    def __post_init__(self) -> None:
        """Start at the first line."""
        self._seq = 0
        self._clock = Clock()
        self._pcpus: set[int] = set()
        if self.observed.layout is None:
            self.observed.layout = self.format

    def read(self, lines: pl.DataFrame) -> Found:
        """Read whole lines (``text``, ``line``, ``offset``, ``size``), in order; called once for each block."""
        raise NotImplementedError

    def finish(self) -> pl.DataFrame | None:
        """Return rows that were held back until the end of the input, as in ``Found.rows``."""
        return None

    def blocks(self) -> Iterator[LineBlock]:
        """Yield the input's blocks of lines, in order."""
        return (block for _, block in blocks_ahead(self.source, block_bytes(self.options), block_of))

    def blocks_split(self, size: int, split: Callable[[pl.DataFrame], S]) -> Iterator[tuple[LineBlock, S]]:
        """Yield the input's blocks of lines, each with what ``split`` makes of them; a last line that is cut off is left out.

        Args:
            size: bytes to read at once.
            split: called with :func:`lines_of` a block, in other threads, so it must change nothing.
        """

        def work(raw: RawBlock) -> tuple[LineBlock, S]:
            block = block_of(raw)
            lines = lines_of(block)
            return block, split(lines[:-1] if block.cut else lines)

        return (done for _, done in blocks_ahead(self.source, size, work))

    def batches(self) -> Iterator[pl.DataFrame]:
        """Yield frames of ``schema.EVENTS``."""
        for block in self.blocks():
            frame = self._events(block)
            if len(frame):
                yield from frame.iter_slices(max(self.options.batch_rows, 1))
        last = self.finish()
        if last is not None and len(last):
            yield from self._assemble(last).iter_slices(max(self.options.batch_rows, 1))
        if self.source.damage:
            self.ledger.truncated = True
            self.ledger.problem(self.source.damage, offset=self.source.size)

    def _events(self, block: LineBlock) -> pl.DataFrame:
        ledger = self.ledger
        notes = [(line, at, f"a line of {size} bytes is no record and was skipped") for at, line, size in block.long]
        ledger.skipped_lines += len(block.long)
        ledger.skipped_bytes += sum(size for _, _, size in block.long)
        ledger.lines += len(block.text) + len(block.long)
        lines = lines_of(block)
        if block.cut and len(lines):
            lines, last = lines[:-1], lines[-1:]
            notes += self._cut(last)
        found = self.read(lines)
        bad = found.bad
        n_bad, more = 0, 0
        if bad is not None and len(bad):
            n_bad = len(bad)
            ledger.skipped_lines += n_bad
            first = bad.sort("line").head(Ledger.KEEP)
            notes += [
                (line, at, f"not understood: {_shown(text)}")
                for line, at, text in first.select("line", "offset", "text").iter_rows()
            ]
            more = n_bad - len(first)
        records = found.rows["line"].n_unique() if found.records is None else found.records
        ledger.records += records
        ledger.noise_lines += len(lines) - records - n_bad
        if found.noise is not None and len(ledger.unparsed) < Ledger.SHOWN:
            some = found.noise.filter(pl.col("text").str.contains(r"\S")).head(Ledger.SHOWN - len(ledger.unparsed))
            ledger.unparsed += [(line, _shown(text)) for line, text in some.select("line", "text").iter_rows()]
        for line, at, text in sorted(notes):
            ledger.problem(text, offset=at, line=line)
        ledger.problems_dropped += more
        return self._assemble(found.rows)

    def _cut(self, last: pl.DataFrame) -> list[tuple[int, int, str]]:
        """Account for a last line without a newline: a record that is cut, or noise."""
        found = type(self)(self.source, self.options).read(last)
        if len(found.rows) or found.records or (found.bad is not None and len(found.bad)):
            self.ledger.truncated = True
            self.ledger.skipped_bytes += int(last["size"][0])
            return [(int(last["line"][0]), int(last["offset"][0]), "the last line is cut off (no newline) and was not used")]
        self.ledger.noise_lines += 1
        return []

    def _assemble(self, rows: pl.DataFrame) -> pl.DataFrame:
        """Complete rows to ``schema.EVENTS``: order, clock, time, and their part of the ledger."""
        n = len(rows)
        have = set(rows.columns)
        rows = rows.with_columns(
            (pl.lit(None) if name not in have else pl.col(name)).cast(dtype).alias(name)
            for name, dtype in schema.EVENTS.items()
            if name not in ("seq", "segment")
        )
        if n:
            group = _group(rows, self.clock)
            tsc, segment = self._clock.advance(group, rows["tsc"])
        else:
            tsc, segment = rows["tsc"], pl.Series("segment", [], dtype=pl.UInt32)
        khz = np.full(n, self.options.tsc_khz or self.observed.tsc_khz or 0, dtype=np.uint64)
        times = nanoseconds(tsc.fill_null(0).to_numpy(), khz, tsc.is_not_null().to_numpy())
        rows = rows.with_columns(
            tsc=tsc, segment=segment, seq=np.arange(self._seq, self._seq + n, dtype=np.uint64), cut=pl.col("cut").fill_null(0)
        ).with_columns(time_ns=pl.coalesce("time_ns", times))
        self._seq += n
        self._tally(rows)
        return rows.select(schema.EVENTS.names()).cast(dict(schema.EVENTS))  # type: ignore[arg-type]

    def _tally(self, rows: pl.DataFrame) -> None:
        ledger, seen = self.ledger, self.observed
        kinds = dict(rows["kind"].cast(pl.String).value_counts().iter_rows())
        ledger.hypercalls += kinds.get("hypercall", 0)
        ledger.vmmcalls += kinds.get("vmmcall", 0)
        ledger.subcalls += kinds.get("subcall", 0)
        ledger.samples += kinds.get("sample", 0)
        if lost := kinds.get("lost", 0):
            ledger.lost_events += lost
            ledger.lost_records += int(rows.filter(pl.col("kind") == "lost")["result"].cast(pl.Int128).sum() or 0)
        entries = pl.col("kind").is_in(["hypercall", "vmmcall", "subcall"])
        ledger.unattributed += rows.select((entries & pl.col("domid").is_null() & pl.col("vcpu").is_null()).sum()).item()
        self._pcpus.update(rows["pcpu"].unique().drop_nulls().to_list())
        seen.pcpus = len(self._pcpus)
        known = rows["tsc"].drop_nulls()
        if len(known):
            low, high = int(known.min()), int(known.max())  # type: ignore[arg-type]
            seen.first_tsc = low if seen.first_tsc is None else min(low, seen.first_tsc)
            seen.last_tsc = high if seen.last_tsc is None else max(high, seen.last_tsc)


def _group(rows: pl.DataFrame, columns: tuple[str, ...]) -> pl.Series:
    """Number the clock of each row from the values of one or two columns (32 bits each; null is a clock of its own)."""
    out = pl.lit(0, pl.UInt64)
    for name in columns:
        out = out * (1 << 32) + pl.col(name).cast(pl.UInt64).fill_null((1 << 32) - 1)
    return rows.select(out.alias("group")).to_series()


def _shown(text: str) -> str:
    """Return the start of a line for a message."""
    text = text.strip()
    return text if len(text) <= 60 else text[:59] + "…"
