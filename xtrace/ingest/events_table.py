"""Reader of events tables: ``schema.EVENTS`` as Parquet, Arrow IPC (file and stream), CSV or NDJSON.

``xtrace ingest`` writes them; so may anything else that has a trace in columns. A column that a table lacks was not
recorded; one that is none of ``schema.EVENTS`` is named and ignored; ``kind`` must be there. Integers may be of any width
and enumerations plain or dictionary strings, as long as every value fits (``events_fit``, also for the order of rows).

What a table proves is what its rows hold, no more: ``line`` and ``offset`` are places in the trace that it was made from.
Parquet and Arrow tables of ``xtrace ingest`` carry that trace's account (``carried``): its release, its layouts, what was lost
while it was read. A CSV or NDJSON table, or one that another tool rewrote, does not: then ``--from`` must say the release, and
that nothing was skipped before the table was made cannot be known.

Tables are read batch by batch (row groups, record batches, blocks of lines). Of a file that is cut, what stands before the cut
is used: Arrow (a file without its footer is read as the stream that it is), CSV, NDJSON; a Parquet file is nothing without
its footer.

Sources: the Arrow columnar format, "IPC Streaming Format" and "IPC File Format" (continuation 0xFFFFFFFF, ``ARROW1``);
the Parquet file format (``PAR1``, footer at the end).
"""

from __future__ import annotations

import csv
import json
import os
from typing import TYPE_CHECKING, Any, Final

import polars as pl

from xtrace import schema
from xtrace.errors import InputError
from xtrace.ingest import carried, events_text
from xtrace.ingest.base import Ledger, Observed, ReadOptions, Shows
from xtrace.ingest.events_fit import ROW, Fit

if TYPE_CHECKING:
    from collections.abc import Iterator

    import pyarrow as pa

    from xtrace.ingest.source import Source

__all__ = ("READER",)

_PARQUET: Final = b"PAR1"
_ARROW: Final = b"ARROW1"
_STREAM: Final = b"\xff\xff\xff\xff"
#: The first message of an Arrow stream is its schema: a small flatbuffer that holds the names of the columns.
_MAX_SCHEMA: Final = 1 << 20
#: An Arrow file is this much magic and padding, then a stream.
_ARROW_HEAD: Final = 8
#: Rows decoded at once.
_ROWS: Final = 1 << 16
#: A header of a Parquet file with longer texts, or more of anything, is not believed.
_MAX_THRIFT: Final = 1 << 24
_MAX_ITEMS: Final = 1 << 20
#: This many columns of a table must be those of an events table, for a text to be taken for one.
_KNOWN: Final = 3


class _Unclosed:
    """A binary file that pyarrow may "close": the source closes its own file, and may be read again before."""

    closed = False

    def __init__(self, file: Any, start: int = 0) -> None:
        self._file, self._at, self._start = file, 0, start
        self._size = file.seek(0, os.SEEK_END) - start

    def read(self, size: int = -1) -> bytes:
        left = max(0, self._size - self._at)
        self._file.seek(self._at + self._start)
        data: bytes = self._file.read(left if size < 0 else min(size, left))
        self._at += len(data)
        return data

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        self._at = offset + {os.SEEK_SET: 0, os.SEEK_CUR: self._at, os.SEEK_END: self._size}[whence]
        return self._at

    def tell(self) -> int:
        return self._at

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def flush(self) -> None:
        pass

    def close(self) -> None:
        pass


class _Table:
    """An opened Parquet or Arrow table; see `Recording`."""

    format = "events"

    def __init__(self, source: Source, options: ReadOptions) -> None:
        import pyarrow as pa

        self._source, self._options = source, options
        self._errors = (pa.ArrowException, OSError, ValueError, MemoryError, EOFError, OverflowError, IndexError, KeyError,
                        TypeError, NotImplementedError)  # fmt: skip
        head = source.head()[:_ARROW_HEAD]
        self._cut = ""  # why the table ends early
        if head.startswith(_PARQUET):
            self._what, batches, form, metadata = "Parquet file", *self._parquet()
        elif head.startswith(_ARROW):
            self._what, batches, form, metadata = "Arrow file", *self._file()
        else:
            self._what, batches, form, metadata = "Arrow stream", *self._stream(0)
        self._raw = batches
        said = metadata.get(carried.VERSION_KEY.encode(), b"1")
        if not said.isdigit() or int(said[:9]) > schema.SCHEMA_VERSION:
            raise self._error(f"is of a later version of the tables than {schema.SCHEMA_VERSION}, which this xtrace reads")
        account = carried.unpack(metadata[carried.KEY.encode()]) if carried.KEY.encode() in metadata else None
        self.ledger, self.observed = account or (Ledger(), Observed())
        # Counted anew, as rows may have been taken out since.
        self.ledger.hypercalls = self.ledger.subcalls = self.ledger.vmmcalls = self.ledger.samples = 0
        if carried.KEY.encode() in metadata and account is None:
            self.ledger.problem("the account of the trace that the table was made from is damaged and was not used", offset=0)
        try:
            self._names = self._columns(form)
        except self._errors as exc:  # names that are no UTF-8
            raise self._error(f"is {_a(self._what)} that is damaged ({_said(exc)})") from exc
        self._fit = Fit(source.path, options, self.ledger, self.observed, carried=account is not None, unit="row")

    def batches(self) -> Iterator[pl.DataFrame]:
        """Yield frames of ``schema.EVENTS``."""
        row = 1
        for batch in self._raw:
            for at in range(0, batch.num_rows, _ROWS):
                part = batch.slice(at, _ROWS)
                events = self._fit.events(self._frame(part, row))
                row += part.num_rows
                if len(events):
                    yield from events.iter_slices(max(self._options.batch_rows, 1))
        for why in filter(None, (self._cut, self._source.damage)):
            self.ledger.truncated = True
            self.ledger.problem(why, offset=self._source.size)

    def _error(self, why: str) -> InputError:
        return InputError(self._source.path, why, exit_bits=16)

    # -- containers: batches, schema, metadata -----------------------------------------------------------------

    def _parquet(self) -> tuple[Iterator[pa.RecordBatch], pa.Schema, dict[bytes, bytes]]:
        import pyarrow as pa
        import pyarrow.parquet as pq

        try:
            file = pq.ParquetFile(
                pa.PythonFile(_Unclosed(self._source.file), mode="r"), buffer_size=1 << 20, pre_buffer=False,
                thrift_string_size_limit=_MAX_THRIFT, thrift_container_size_limit=_MAX_ITEMS,
            )  # fmt: skip
            form, metadata = file.schema_arrow, file.metadata.metadata or {}
        except self._errors as exc:
            raise self._error(f"is a Parquet file that is cut or damaged ({_said(exc)})") from exc

        def batches() -> Iterator[pa.RecordBatch]:
            try:
                yield from file.iter_batches(batch_size=_ROWS, columns=self._names, use_threads=True)
            except self._errors as exc:
                self._cut = f"the Parquet file is damaged from here on ({_said(exc)})"

        return batches(), form, metadata

    def _file(self) -> tuple[Iterator[pa.RecordBatch], pa.Schema, dict[bytes, bytes]]:
        import pyarrow as pa

        try:
            file = pa.ipc.open_file(pa.PythonFile(_Unclosed(self._source.file), mode="r"))
            form, metadata = file.schema, dict(file.schema.metadata or {})
            if file.num_record_batches:
                # The account stands at the last batch: it was not known before.
                metadata.update(file.get_batch_with_custom_metadata(file.num_record_batches - 1)[1] or {})
        except self._errors as exc:
            batches, form, metadata = self._stream(_ARROW_HEAD)
            self._cut = f"the Arrow file has no footer that can be read ({_said(exc)}); its batches were read one after another"
            return batches, form, metadata

        def batches_() -> Iterator[pa.RecordBatch]:
            try:
                for i in range(file.num_record_batches):
                    yield file.get_batch(i)
            except self._errors as exc:
                self._cut = f"the Arrow file is damaged from here on ({_said(exc)})"

        return batches_(), form, metadata

    def _stream(self, start: int) -> tuple[Iterator[pa.RecordBatch], pa.Schema, dict[bytes, bytes]]:
        import pyarrow as pa

        try:
            stream = pa.ipc.open_stream(pa.PythonFile(_Unclosed(self._source.file, start), mode="r"))
        except self._errors as exc:
            raise self._error(f"is an Arrow table that is cut or damaged ({_said(exc)})") from exc

        def batches() -> Iterator[pa.RecordBatch]:
            try:
                while True:
                    yield stream.read_next_batch()
            except StopIteration:
                # A stream may end without its end mark; a cut between two messages looks the same.
                pass
            except self._errors as exc:
                self._cut = self._cut or f"the Arrow stream is cut or damaged from here on ({_said(exc)})"

        return batches(), stream.schema, dict(stream.schema.metadata or {})

    # -- columns -----------------------------------------------------------------------------------------------

    def _columns(self, form: pa.Schema) -> list[str]:
        """Return the columns to read; check their types."""
        names = [str(name) for name in form.names]
        known = [name for name in names if name in schema.EVENTS]
        if "kind" not in known:
            raise self._error(f"is {_a(self._what)} without the column kind: no events table")
        for name in known:
            if names.count(name) > 1:
                raise self._error(f"has the column {name} twice")
            if not _suits(name, form.field(name).type):
                raise self._error(
                    f"its column {name} holds {str(form.field(name).type)[:60]}, where an events table has {_wanted(name)}"
                )
        _ignored(self.ledger, [name for name in names if name not in schema.EVENTS])
        return known

    def _frame(self, batch: pa.RecordBatch, row: int) -> pl.DataFrame:
        """Turn a batch, whose first row is number ``row``, into a frame of plain types, and trust nothing in it."""
        import pyarrow as pa

        try:
            batch = batch.select(self._names)
            batch.validate(full=True)
            arrays = [column.cast(pa.large_string()) if pa.types.is_dictionary(column.type) else column for column in batch.columns]
            frame = pl.from_arrow(pa.Table.from_arrays(arrays, names=self._names))
        except (*self._errors, pl.exceptions.PolarsError) as exc:
            self.ledger.skipped_lines += batch.num_rows
            self.ledger.problem(f"row {row} and the {batch.num_rows - 1} after it are damaged and were skipped ({_said(exc)})")
            return pl.DataFrame(schema={"kind": pl.String, ROW: pl.UInt64})
        assert isinstance(frame, pl.DataFrame)
        return frame.with_columns(pl.int_range(row, row + len(frame), dtype=pl.UInt64).alias(ROW))


def _suits(name: str, form: pa.DataType) -> bool:
    """Say whether a column of that Arrow type can be fitted to ``schema.EVENTS``."""
    from pyarrow import types

    dtype = schema.EVENTS[name]
    if types.is_null(form):
        return name != "kind"
    if name == "memory":
        if not (types.is_list(form) or types.is_large_list(form)):
            return _text(form)
        inner = form.value_type
        if not types.is_struct(inner) or inner.num_fields != 2 or {inner.field(i).name for i in range(2)} != {"field", "value"}:
            return False
        return _text(inner.field("field").type) and bool(types.is_integer(inner.field("value").type))
    if isinstance(dtype, pl.Enum):
        return _text(form) or bool(types.is_dictionary(form) and _text(form.value_type))
    if dtype == pl.Boolean:
        return bool(types.is_boolean(form))
    return bool(types.is_integer(form))


def _text(form: pa.DataType) -> bool:
    from pyarrow import types

    return bool(types.is_string(form) or types.is_large_string(form) or types.is_string_view(form))


def _wanted(name: str) -> str:
    dtype = schema.EVENTS[name]
    if name == "memory":
        return "lists of {field: string, value: uint64}"
    if isinstance(dtype, pl.Enum):
        return "strings"
    return "booleans" if dtype == pl.Boolean else f"integers ({dtype})"


def _ignored(ledger: Ledger, names: list[str]) -> None:
    for name in names:
        ledger.problem(f"the column `{name[:60]}` is none of an events table and was ignored")


def _a(what: str) -> str:
    return f"an {what}" if what.startswith("A") else f"a {what}"


def _said(exc: BaseException) -> str:
    """Return what a library says, in a few words."""
    text = str(exc).strip().splitlines()
    words = text[0] if text else type(exc).__name__
    return words if len(words) <= 120 else words[:119] + "…"


class _Reader:
    """Events tables; see `Reader`."""

    name = "events"
    title = "events table: Parquet, Arrow IPC, CSV or NDJSON (schema.EVENTS)"
    shows = Shows(
        op="yes",
        subop="where the table has its argument",
        arguments="those that the table has",
        rip="where the table has it",
        who="domain and vCPU",
        time="TSC; nanoseconds where they were known",
        memory="where the table has it",
        result="of return rows",
        proved="as the trace that it was made from",
        inferred="as the trace that it was made from",
        unobservable="what that trace did not record; CSV and NDJSON: the release, its record layouts, what was lost before",
        registers={"*": (0, 1, 2, 3, 4, 5)},
        samples=True,
        fields=True,
    )

    def sniff(self, head: bytes) -> int:
        """Say how sure this reader is: a table's columns stand at its beginning, but for Parquet (its end)."""
        if head.startswith(_PARQUET):
            return 90
        if head.startswith(_ARROW):
            return 95
        if head.startswith(_STREAM):
            size = int.from_bytes(head[4:8], "little")
            return 95 if 0 < size <= _MAX_SCHEMA and b"kind" in head[: 8 + size] else 0
        return 95 if _columns_of(head) else 0

    def open(self, source: Source, options: ReadOptions) -> _Table | events_text.TextTable:
        """Open ``source``.

        Raises:
            InputError: the table cannot be read at all, or is no events table.
        """
        head = source.head()
        if head.startswith((_PARQUET, _ARROW, _STREAM)):
            return _Table(source, options)
        line = _first(head)
        return events_text.TextTable(source, options, json=line.lstrip().startswith("{"))


def _first(head: bytes) -> str:
    return head.split(b"\n", 1)[0].decode("utf-8", "replace").removeprefix("\ufeff").rstrip("\r")


def _columns_of(head: bytes) -> list[str]:
    """Return the names of the columns of a CSV or NDJSON events table, none if it is none."""
    line = _first(head)
    names: list[str] = []
    if line.lstrip().startswith("{"):
        try:
            row = json.loads(line)
        except (ValueError, RecursionError):
            return []
        if isinstance(row, dict) and row.get("kind") in schema.KINDS:
            names = list(row)
    elif "kind" in line and "," in line:
        try:
            names = next(csv.reader([line], strict=True))
        except (csv.Error, StopIteration):
            return []
    return names if "kind" in names and sum(name in schema.EVENTS for name in names) >= _KNOWN else []


READER: Final = _Reader()
