"""Events tables as text: CSV with a header line, and NDJSON, one object a line (see ``events_table``).

Both are read in blocks of whole lines, by a fast parser where it agrees with the lines (one row for each), else line by line;
a line that is no row, or whose values do not fit, is skipped and named. No row spans lines.
"""

from __future__ import annotations

import csv
import json
from typing import TYPE_CHECKING, Any, Final

import polars as pl

from xtrace import schema
from xtrace.errors import InputError
from xtrace.ingest.ahead import blocks_ahead
from xtrace.ingest.base import Ledger, Observed, ReadOptions
from xtrace.ingest.events_fit import OFFSET, ROW, Fit
from xtrace.ingest.lines import MAX_LINE, LineBlock, RawBlock, block_bytes, block_of

if TYPE_CHECKING:
    from collections.abc import Iterator

    import pyarrow as pa

    from xtrace.ingest.source import Source

__all__ = ("TextTable",)

Refused = list[tuple[int, int | None, str]]

_DROP: Final = "_drop"
#: So many unknown columns are named.
_MAX_NAMED: Final = 20
#: More digits, sign included, are beyond 64 bits.
_DIGITS: Final = 21
# A line of CSV: cells without a quote, or in quotes.
_CELL: Final = r'(?:[^",]*|"(?:[^"]|"")*")'
_LINE: Final = rf"^{_CELL}(?:,{_CELL})*$"
_NOTHING: Final = '(?:^|,)""(?:,|$)'
_QUOTED: Final = r'"(?:[^"]|"")*"'


class TextTable:
    """An opened CSV or NDJSON table; see `Recording`."""

    format = "events"

    def __init__(self, source: Source, options: ReadOptions, *, json: bool) -> None:
        self._source, self._options, self._json = source, options, json
        self.ledger, self.observed = Ledger(), Observed()
        self._fit = Fit(source.path, options, self.ledger, self.observed, carried=False, unit="line")
        self._header: list[str] | None = None
        self._named: set[str] = set()

    def batches(self) -> Iterator[pl.DataFrame]:
        """Yield frames of ``schema.EVENTS``."""
        for _, (block, lines, frame) in blocks_ahead(self._source, block_bytes(self._options), self._parsed):
            refused: Refused = [
                (line, at, f"a line of {size} bytes is no row (more than {MAX_LINE}) and was skipped")
                for at, line, size in block.long
            ]
            self.ledger.skipped_bytes += sum(size for _, _, size in block.long)
            self.ledger.lines += len(block.text) + len(block.long)
            if block.cut:
                whole = self._whole(_numbered(block), block)
                lines = whole.filter(~_empty(whole))
                self.ledger.noise_lines += len(whole) - len(lines)
            else:
                self.ledger.noise_lines += len(block.text) - len(lines)
            frame = self._objects(lines, frame, refused) if self._json else self._cells(lines, frame, refused)
            events = self._fit.events(frame, refused)
            if len(events):
                yield from events.iter_slices(max(self._options.batch_rows, 1))
        if self._source.damage:
            self.ledger.truncated = True
            self.ledger.problem(self._source.damage, offset=self._source.size)

    def _parsed(self, raw: RawBlock) -> tuple[LineBlock, pl.DataFrame, pl.DataFrame | None]:
        """Return a block's lines, those that are not empty, and what a fast parser makes of them, if it may be asked already.

        Runs in other threads: changes nothing. The columns are known as soon as the first block was read.
        """
        block, header = block_of(raw), self._header
        lines = _numbered(block)
        lines = lines.filter(~_empty(lines))
        if block.cut or header is None:
            return block, lines, None
        data = block.raw if len(lines) == len(block.text) and block.raw.isascii() and b"\r" not in block.raw else None
        if self._json:
            return block, lines, _fast_objects(lines["text"], data)
        return block, lines, _fast_cells(lines["text"], _columns(header), data)

    def _whole(self, lines: pl.DataFrame, block: LineBlock) -> pl.DataFrame:
        """Leave out a last line without newline: its last number may have lost digits. An object that is closed has not."""
        if not len(lines) or (self._json and lines["text"][-1].rstrip().endswith("}")) or not lines["text"][-1].strip():
            return lines
        self.ledger.truncated = True
        self.ledger.skipped_bytes += int(block.size[-1])
        self.ledger.problem(
            "the last line is cut off (no newline) and was not used", offset=int(block.offset[-1]), line=int(block.line[-1])
        )
        return lines[:-1]

    def _ignore(self, names: list[str], line: int) -> None:
        for name in names:
            if name not in self._named and len(self._named) < _MAX_NAMED:
                self._named.add(name)
                self.ledger.problem(f"the column `{name[:60]}` is none of an events table and was ignored", line=line)

    # -- CSV ---------------------------------------------------------------------------------------------------

    def _cells(self, lines: pl.DataFrame, cells: pl.DataFrame | None, refused: Refused) -> pl.DataFrame:
        if self._header is None and len(lines):
            self._header = self._head(lines["text"][0], int(lines[ROW][0]))
            lines = lines[1:]
        header = self._header or ["kind"]
        columns = _columns(header)
        if cells is None:
            cells = _fast_cells(lines["text"], columns)
        if cells is None:
            rows: list[list[str | None]] = []
            good: list[bool] = []
            for line, offset, one in lines.select(ROW, OFFSET, "text").iter_rows():
                try:
                    row = next(csv.reader([one], strict=True))
                    why = "" if len(row) == len(columns) else f"{len(row)} values, where the header has {len(columns)} columns"
                except (csv.Error, StopIteration):
                    row, why = [], "quotes that do not match"
                good.append(not why)
                if why:
                    refused.append((line, offset, f"no row of the table: {why}"))
                else:
                    rows.append([cell or None for cell in row])
            cells = pl.DataFrame(rows, schema=dict.fromkeys(columns, pl.String), orient="row")
            lines = lines.filter(pl.Series(good, dtype=pl.Boolean))
        return cells.select(name for name in columns if name in schema.EVENTS).with_columns(lines[ROW], lines[OFFSET])

    def _head(self, text: str, line: int) -> list[str]:
        try:
            names = next(csv.reader([text.removeprefix("\ufeff")], strict=True))
        except (csv.Error, StopIteration):
            names = []
        if "kind" not in names:
            raise InputError(self._source.path, "is no events table: no column kind in its header", line=line, exit_bits=16)
        for name in names:
            if name in schema.EVENTS and names.count(name) > 1:
                raise InputError(self._source.path, f"has the column {name} twice", line=line, exit_bits=16)
        self._ignore([name for name in names if name not in schema.EVENTS], line)
        return names

    # -- NDJSON ------------------------------------------------------------------------------------------------

    def _objects(self, lines: pl.DataFrame, frame: pl.DataFrame | None, refused: Refused) -> pl.DataFrame:
        if self._header is None and len(lines):
            self._header = _names(lines["text"][0].removeprefix("\ufeff"))
            self._ignore([name for name in self._header if name not in schema.EVENTS], int(lines[ROW][0]))
        if frame is None:
            frame = _fast_objects(lines["text"])
        if frame is not None:
            return frame.with_columns(lines[ROW], lines[OFFSET])
        rows, good = [], []
        for line, offset, one in lines.select(ROW, OFFSET, "text").iter_rows():
            row, why = _object(one.removeprefix("\ufeff") if line == 1 else one)
            good.append(row is not None)
            if row is None:
                refused.append((line, offset, f"no row of the table: {why}"))
            else:
                rows.append([row.get(name) for name in schema.EVENTS])
        frame = pl.DataFrame(rows, schema=_WIDE, orient="row")
        return frame.with_columns(lines.filter(pl.Series(good, dtype=pl.Boolean)).select(ROW, OFFSET).get_columns())


#: What the slow parser of objects gives: words as they are, numbers of any size within 128 bits.
_WIDE: Final[dict[str, Any]] = {
    name: pl.String
    if isinstance(dtype, pl.Enum)
    else pl.Boolean
    if dtype == pl.Boolean
    else pl.List(pl.Struct({"field": pl.String, "value": pl.Int128}))
    if name == "memory"
    else pl.Int128
    for name, dtype in schema.EVENTS.items()
}


def _numbered(block: LineBlock) -> pl.DataFrame:
    return pl.DataFrame({"text": block.text.str.strip_suffix("\r"), ROW: block.line, OFFSET: block.offset})


def _empty(lines: pl.DataFrame) -> pl.Series:
    return lines["text"].str.strip_chars() == ""


def _columns(header: list[str]) -> list[str]:
    return [name if name in schema.EVENTS else f"{_DROP}{i}" for i, name in enumerate(header)]


def _fast_cells(text: pl.Series, columns: list[str], data: bytes | None = None) -> pl.DataFrame | None:
    """Parse lines of CSV at once; None where that does not give one full row for each. ``data``: the same lines, each ended."""
    if not len(text):
        return pl.DataFrame(schema=dict.fromkeys(columns, pl.String))
    quoted = text.str.contains('"', literal=True)
    some = text.filter(quoted)
    if not some.str.contains(_LINE).all():
        return None  # an open quote would take the next lines with it
    for part in (text.filter(~quoted), some.str.replace_all(_QUOTED, "")):
        if bool((part.str.count_matches(",", literal=True) != len(columns) - 1).any()):
            return None
    try:
        frame = pl.read_csv(
            data or text.str.join("\n").item().encode(), has_header=False, schema=dict.fromkeys(columns, pl.String), quote_char='"'
        )
    except pl.exceptions.PolarsError:
        return None
    if len(some) and some.str.contains(_NOTHING).any():
        frame = frame.with_columns(pl.when(pl.col(pl.String) != "").then(pl.col(pl.String)).name.keep())
    return frame if len(frame) == len(text) else None


def _arrow_schema() -> pa.Schema:
    import pyarrow as pa

    fields = []
    for name, dtype in schema.EVENTS.items():
        if name == "memory":
            form = pa.list_(pa.struct([("field", pa.string()), ("value", pa.uint64())]))
        elif isinstance(dtype, pl.Enum):
            form = pa.string()
        elif dtype == pl.Boolean:
            form = pa.bool_()
        else:
            form = pa.int64() if dtype == pl.Int64 else pa.uint64()
        fields.append((name, form))
    return pa.schema(fields)


def _fast_objects(text: pl.Series, data: bytes | None = None) -> pl.DataFrame | None:
    """Parse lines of JSON at once; None where that does not give one row for each. ``data``: the same lines, each ended."""
    import pyarrow as pa
    import pyarrow.json as pj

    if not len(text):
        return pl.DataFrame(schema=schema.EVENTS)
    # The parser does not care for lines. Where each begins and ends like an object, and there are as many rows as lines, each
    # line is one: a newline inside an object would have to stand between } and { without a comma, or in a string.
    shaped = (text.str.starts_with("{") & text.str.ends_with("}")).all()
    if not shaped:
        return None
    data = data or text.str.join("\n").item().encode()
    try:
        table = pj.read_json(
            pa.BufferReader(data),
            read_options=pj.ReadOptions(block_size=len(data) + 1, use_threads=False),
            parse_options=pj.ParseOptions(
                explicit_schema=_arrow_schema(), unexpected_field_behavior="ignore", newlines_in_values=False
            ),
        )
        table.validate(full=True)
        frame = pl.from_arrow(table)
    except (pa.ArrowException, ValueError, OSError, pl.exceptions.PolarsError):
        return None
    return frame if isinstance(frame, pl.DataFrame) and len(frame) == len(text) else None


class _Pairs(list[tuple[str, Any]]):
    """The members of an object, as they stand."""


def _object(text: str) -> tuple[dict[str, Any] | None, str]:
    """Parse one line; return the values by column of ``schema.EVENTS``, or why it is no row."""
    try:
        pairs = json.loads(text, object_pairs_hook=_Pairs, parse_int=_integer)
    except (ValueError, RecursionError):
        return None, "no JSON"
    if not isinstance(pairs, _Pairs):
        return None, "no object"
    row: dict[str, Any] = {}
    for name, value in pairs:
        if name not in schema.EVENTS:
            continue
        if name in row:
            return None, f"column {name} is there twice"
        if not (value is None or _fits(name, value)):
            return None, f"column {name} holds `{str(value)[:40]}`"
        row[name] = (
            [{k: dict(item).get(k) for k in ("field", "value")} for item in value]
            if name == "memory" and value is not None
            else value
        )
    return row, ""


def _names(text: str) -> list[str]:
    """Return the names of the columns of one line."""
    try:
        pairs = json.loads(text, object_pairs_hook=_Pairs, parse_int=_integer)
    except (ValueError, RecursionError):
        return []
    return [name for name, _ in pairs] if isinstance(pairs, _Pairs) else []


def _fits(name: str, value: object) -> bool:
    dtype = schema.EVENTS[name]
    if name == "memory":
        return isinstance(value, list) and all(isinstance(item, _Pairs) and _is_field(item) for item in value)
    if isinstance(dtype, pl.Enum):
        return _is_text(value)
    return type(value) is (bool if dtype == pl.Boolean else int)


def _is_field(item: _Pairs) -> bool:
    known = [(name, value) for name, value in item if name in ("field", "value")]
    said = dict(known)
    # What lacks one of them is judged with the other values, as in other forms of tables.
    field, value = said.get("field"), said.get("value")
    return len(known) == len(said) and (field is None or _is_text(field)) and (value is None or type(value) is int)


def _is_text(value: object) -> bool:
    """Say whether a value is a string; half a surrogate pair is none."""
    return isinstance(value, str) and not any("\ud800" <= c <= "\udfff" for c in value)


def _integer(text: str) -> int | float:
    """Read an integer; one that no column can hold is none."""
    return int(text) if len(text) <= _DIGITS else float("inf")
