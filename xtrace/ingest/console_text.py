"""Lines with their neighbours, and the damage that mail does to them: what the readers of console text share.

A record of a console is several lines (a register dump), or one that a mail program folded into two. `WindowedRecording`
holds lines back until everything that may belong to a line has been read, so what comes out does not depend on where a
block ends; at most `AHEAD` + `BEHIND` lines are held. Of a log that still grows they are decided when nothing comes for a
while; if more comes after all, what was told is provisional.

Damage undone, all of it seen on xen-devel: ``> `` quoting, lines folded behind a blank (the value stands alone on the next
line), quoted-printable (``=3D``, ``=20``, ``=A0``, a soft break ``=`` at the end of a line, in the middle of a number too).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar, Final

import numpy as np
import polars as pl
import pyarrow as pa

from xtrace.ingest.base import Ledger
from xtrace.ingest.source import is_live
from xtrace.ingest.text import Found, TextRecording

if TYPE_CHECKING:
    from collections.abc import Iterator

    from numpy.typing import NDArray


__all__ = ("AHEAD", "BEHIND", "NOTHING", "Part", "View", "WindowedRecording", "joined", "stamps")

#: Lines behind a line that may belong to it: 32 entries of a multicall (MC_BATCH of Linux), each folded in three.
AHEAD: Final = 96
#: Lines before a line that may belong to it: the heading of a register dump, folded or with an answer in between.
BEHIND: Final = 12

#: More of a line than this is not looked at; records are shorter.
_MOST: Final = 400
_SOFT: Final = ["=\r\n", "=\n", "=3D", "=20", "=09", "=A0"]
_PLAIN: Final = ["", "", "=", " ", " ", " "]
#: What no console prints: without one of these ``id=20`` is domain 20.
_QUOTED: Final = ["=\r\n", "=\n", "=3D", ":=20\r\n", ":=20\n"]


@dataclass(slots=True)
class View:
    """Lines, of which those from ``low`` to before ``high`` are to be decided now; the others are their neighbours.

    Attributes:
        lines: ``text``, ``line``, ``offset``, and ``hit`` (the line holds one of the recording's literals).
        hits: int64[n], rows that are hit.
        text: their text.
    """

    lines: pl.DataFrame
    low: int
    high: int
    hits: NDArray[np.intp]
    text: pl.Series

    def having(self, literal: str) -> NDArray[np.intp]:
        """Return the rows that contain a literal, which must be one of the recording's."""
        found: NDArray[np.intp] = self.hits[self.text.str.contains(literal, literal=True).to_numpy()]  # type: ignore[assignment, unused-ignore]
        return found

    def due(self, rows: NDArray[np.intp]) -> NDArray[np.bool_]:
        """Say which rows are to be decided now."""
        return (rows >= self.low) & (rows < self.high)

    def places(self, rows: NDArray[np.intp]) -> pl.DataFrame:
        """Return ``line``, ``offset``, ``text`` of some rows."""
        return self.lines.select("line", "offset", "text")[rows]


@dataclass(slots=True)
class Part:
    """What one subject made of a view.

    Attributes:
        rows: events, with ``line`` and ``offset`` and ``place`` (line that they are ordered by).
        records: lines understood; a dump of many lines is one.
        bad: lines that are records and were not understood.
    """

    rows: pl.DataFrame
    records: int
    bad: pl.DataFrame


#: No lines.
NOTHING: Final = pl.DataFrame(schema={"line": pl.UInt64, "offset": pl.UInt64, "text": pl.String})


@dataclass
class WindowedRecording(TextRecording):
    """A text recording whose records may span lines; a format fills in :meth:`decide`."""

    #: A line without any of these is no part of a record's first line.
    literals: ClassVar[tuple[str, ...]] = ()
    #: A last line without a newline is taken for a cut record if it matches.
    cut_pattern: ClassVar[str] = ""

    def __post_init__(self) -> None:
        """Start with nothing held."""
        super().__post_init__()
        self._held: pl.DataFrame | None = None
        self._low = 0  # rows of _held that are decided
        self._early = False  # lines were decided before those behind them had come
        #: What was given may differ from what a reading of the whole gives.
        self.provisional = False

    def decide(self, view: View) -> Part:
        """Read the rows of a view that are due, in order."""
        raise NotImplementedError

    def batches(self) -> Iterator[pl.DataFrame]:
        """Yield frames of ``schema.EVENTS``."""
        yield from super().batches()
        self.ledger.problems.sort(key=lambda p: (p.line is None, p.line or 0))

    def read(self, lines: pl.DataFrame) -> Found:
        """Take a block of lines; see `TextRecording`."""
        pause = is_live(self.source) and not len(lines)
        if pause and self._held is not None and self._held["hit"][self._low :].any():
            self._early = True
        elif self._early and len(lines):
            self.provisional = True
        part = self._advance(lines, last=pause)
        return Found(part.rows, part.bad if len(part.bad) else None, part.records)

    def finish(self) -> pl.DataFrame | None:
        """Decide what was held."""
        if self._held is None:
            return None
        part = self._advance(self._held[:0].drop("hit"), last=True)
        ledger, bad = self.ledger, len(part.bad)
        ledger.records += part.records
        ledger.skipped_lines += bad
        ledger.noise_lines -= part.records + bad
        for line, offset, text in part.bad.head(Ledger.KEEP).iter_rows():
            ledger.problem(f"not understood: {text.strip()[:59]}", offset=offset, line=line)
        ledger.problems_dropped += max(0, bad - Ledger.KEEP)
        return part.rows

    def _advance(self, lines: pl.DataFrame, *, last: bool) -> Part:
        new = lines.select("text", "line", "offset").with_columns(
            hit=pl.col("text").str.contains_any(list(self.literals)),
        )
        whole = new if self._held is None else pl.concat([self._held, new])
        high = len(whole) if last else max(len(whole) - AHEAD, self._low)
        hits = np.flatnonzero(whole["hit"].to_numpy())
        part = self.decide(View(whole, self._low, high, hits, whole["text"].gather(hits)))
        keep = max(high - BEHIND, 0)
        self._held, self._low = whole[keep:], high - keep
        return part

    def _cut(self, last: pl.DataFrame) -> list[tuple[int, int, str]]:
        if not last["text"].str.contains(self.cut_pattern)[0]:
            self.ledger.noise_lines += 1
            return []
        self.ledger.truncated = True
        self.ledger.skipped_bytes += int(last["size"][0])
        return [(int(last["line"][0]), int(last["offset"][0]), "the last line is cut off (no newline) and was not used")]


def joined(lines: pl.DataFrame, first: NDArray[np.intp], end: NDArray[np.intp], at_most: int = 1 << 20) -> pl.Series:
    r"""Return the text of lines ``first`` to before ``end`` as one string each, folded lines still apart (``\n``).

    Args:
        lines: a view's lines.
        first: int64[n]. end: int64[n].
        at_most: longer results are cut.

    Returns:
        String[n], quoted-printable undone.
    """
    count = np.maximum(end - first, 0)
    bounds = np.concatenate([[0], np.cumsum(count)])
    rows = np.arange(bounds[-1]) + np.repeat(first - bounds[:-1], count)
    texts = lines["text"].gather(rows).str.slice(0, _MOST)
    lists = pa.LargeListArray.from_arrays(pa.array(bounds, pa.int64()), texts.to_arrow().cast(pa.large_string()))
    text = pl.Series("text", pl.from_arrow(lists)).list.join("\n").str.slice(0, at_most)
    quoted = text.str.contains_any(_QUOTED)
    if not quoted.any():
        return text
    return text.to_frame("t").select(pl.when(quoted).then(pl.col("t").str.replace_many(_SOFT, _PLAIN)).otherwise("t"))["t"]


def stamps(text: pl.Series) -> pl.DataFrame:
    """Read the time stamps of lines.

    ``(XEN) [0000001234abcdef] `` is the TSC itself, ``(XEN) [  123.456789] `` and Linux's ``[  123.456789] `` are seconds of
    uptime (printk_start_of_line, RELEASE-4.17.0:xen/drivers/char/console.c:828); a date (``[2024-02-15 02:19:45]``) is
    not on the clock of the machine and is left out.

    Returns:
        ``tsc`` (UInt64) and ``time_ns`` (Int64), null where the line has none.
    """
    seconds = pl.col("t").str.extract_groups(r"\[ *([0-9]{1,9})\.([0-9]{6})\] ")
    return (
        text.to_frame("t")
        .with_columns(
            raw=pl.col("t").str.extract(r"\(XEN\) \[([0-9a-f]{16})\] ", 1).str.to_integer(base=16, dtype=pl.UInt64, strict=False),
            whole=seconds.struct.field("1").cast(pl.Int64, strict=False),
            part=seconds.struct.field("2").cast(pl.Int64, strict=False),
        )
        .select(tsc="raw", time_ns=pl.col("whole") * 10**9 + pl.col("part") * 1000)
    )
