"""Tables as files: Parquet, Arrow IPC, CSV and NDJSON, written batch by batch and appearing whole or not at all.

Parquet and Arrow files carry texts beside the table: the version of its schema, and what the caller adds at the end (of a
Parquet file in its key-value metadata, of an Arrow file as the metadata of a last, empty record batch).
"""

from __future__ import annotations

import contextlib
import json
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, TypeAlias

import polars as pl

from xtrace.schema import EVENTS, SCHEMA_VERSION

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    Put: TypeAlias = Callable[[pl.DataFrame], None]
    Closing: TypeAlias = Callable[[], dict[str, str]]

__all__ = ("ENDINGS", "writer")

#: Endings of file names, one or two for each format.
ENDINGS: Final = (".parquet", ".arrow", ".csv", ".ndjson", ".jsonl")


def _nothing() -> dict[str, str]:
    return {}


@contextlib.contextmanager
def writer(
    path: str, schema: pl.Schema = EVENTS, closing: Callable[[], dict[str, str]] = _nothing
) -> Iterator[Callable[[pl.DataFrame], None]]:
    """Yield a function that appends frames of ``schema`` to a file whose ending names its format.

    Args:
        path: the file; one of :data:`ENDINGS` ends it.
        schema: columns of every frame.
        closing: asked once everything is written: texts by key that the file carries, where its format can.
    """
    import os

    target = Path(path)
    fd, name = tempfile.mkstemp(dir=target.parent, prefix=f".{target.name}.")
    os.close(fd)
    tmp = Path(name)
    try:
        with _FORMATS[target.suffix](tmp, schema, closing) as put:
            yield put
        mask = os.umask(0)
        os.umask(mask)
        tmp.chmod(0o666 & ~mask)
        tmp.replace(target)
    except BaseException:
        tmp.unlink(missing_ok=True)
        raise


def _arrow_schema(schema: pl.Schema) -> Any:
    table = pl.DataFrame(schema=schema).to_arrow(compat_level=pl.CompatLevel.oldest())
    return table.schema.with_metadata({"xtrace_schema_version": str(SCHEMA_VERSION)})


@contextlib.contextmanager
def _parquet(path: Path, schema: pl.Schema, closing: Closing) -> Iterator[Put]:
    import pyarrow.parquet as pq

    form = _arrow_schema(schema)
    with pq.ParquetWriter(path, form, compression="zstd") as out:
        yield lambda frame: out.write_table(frame.to_arrow(compat_level=pl.CompatLevel.oldest()).cast(form))
        out.add_key_value_metadata(closing())


@contextlib.contextmanager
def _arrow(path: Path, schema: pl.Schema, closing: Closing) -> Iterator[Put]:
    import pyarrow as pa

    form = _arrow_schema(schema)
    # Dictionaries (kind, caller) are the same in every batch: replacement is never needed, deltas are allowed.
    options = pa.ipc.IpcWriteOptions(compression="zstd", unify_dictionaries=True)
    last = pa.RecordBatch.from_arrays([pa.array([], type=field.type) for field in form], schema=form)
    with pa.OSFile(str(path), "wb") as sink, pa.ipc.new_file(sink, form, options=options) as out:

        def put(frame: pl.DataFrame) -> None:
            nonlocal last
            table = frame.to_arrow(compat_level=pl.CompatLevel.oldest()).cast(form)
            out.write_table(table)
            last = next((batch.slice(0, 0) for batch in table.to_batches()), last)

        yield put
        if texts := closing():
            out.write_batch(last, custom_metadata=texts)


@contextlib.contextmanager
def _csv(path: Path, schema: pl.Schema, closing: Closing) -> Iterator[Put]:
    first = True
    with path.open("wb") as out:

        def put(frame: pl.DataFrame) -> None:
            nonlocal first
            flat = frame.with_columns(_objects(frame[name]) for name, t in schema.items() if t.is_nested())
            flat.write_csv(out, include_header=first)
            first = False

        yield put
        if first:
            pl.DataFrame(schema={k: pl.String if t.is_nested() else t for k, t in schema.items()}).write_csv(out)


@contextlib.contextmanager
def _ndjson(path: Path, schema: pl.Schema, closing: Closing) -> Iterator[Put]:
    with path.open("wb") as out:

        def put(frame: pl.DataFrame) -> None:
            if len(frame):
                frame.write_ndjson(out)

        yield put


_FORMATS: Final = {".parquet": _parquet, ".arrow": _arrow, ".csv": _csv, ".ndjson": _ndjson, ".jsonl": _ndjson}


def _objects(memory: pl.Series) -> pl.Series:
    """Guest memory as JSON objects; CSV has no nested columns."""
    fields = pl.element().struct.field("field")
    odd = memory.drop_nulls().list.eval(fields.str.contains(r"[^A-Za-z0-9_.]").any()).list.any().any()
    if odd:
        return memory.map_elements(_object, return_dtype=pl.String)
    items = memory.list.eval(pl.format('"{}": {}', fields, pl.element().struct.field("value"))).list.join(", ")
    text = pl.concat_str(pl.lit("{"), items, pl.lit("}"))
    return pl.select(pl.when(memory.is_not_null()).then(text).alias(memory.name)).to_series()


def _object(fields: Any) -> str:
    return json.dumps({f["field"]: f["value"] for f in fields})
