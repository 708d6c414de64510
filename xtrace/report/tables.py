"""Tables as files: Parquet, Arrow IPC and CSV, written batch by batch and appearing whole or not at all."""

from __future__ import annotations

import contextlib
import json
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

import polars as pl

from xtrace.schema import EVENTS, SCHEMA_VERSION

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

__all__ = ("writer",)


@contextlib.contextmanager
def writer(path: str, schema: pl.Schema = EVENTS) -> Iterator[Callable[[pl.DataFrame], None]]:
    """Yield a function that appends frames of ``schema`` to a file whose ending names its format."""
    import os

    target = Path(path)
    fd, name = tempfile.mkstemp(dir=target.parent, prefix=f".{target.name}.")
    os.close(fd)
    tmp = Path(name)
    try:
        with {".parquet": _parquet, ".arrow": _arrow, ".csv": _csv}[target.suffix](tmp, schema) as put:
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
def _parquet(path: Path, schema: pl.Schema) -> Iterator[Callable[[pl.DataFrame], None]]:
    import pyarrow.parquet as pq

    form = _arrow_schema(schema)
    with pq.ParquetWriter(path, form, compression="zstd") as out:
        yield lambda frame: out.write_table(frame.to_arrow(compat_level=pl.CompatLevel.oldest()).cast(form))


@contextlib.contextmanager
def _arrow(path: Path, schema: pl.Schema) -> Iterator[Callable[[pl.DataFrame], None]]:
    import pyarrow as pa

    form = _arrow_schema(schema)
    # Dictionaries (kind, caller) are the same in every batch: replacement is never needed, deltas are allowed.
    options = pa.ipc.IpcWriteOptions(compression="zstd", unify_dictionaries=True)
    with pa.OSFile(str(path), "wb") as sink, pa.ipc.new_file(sink, form, options=options) as out:
        yield lambda frame: out.write_table(frame.to_arrow(compat_level=pl.CompatLevel.oldest()).cast(form))


@contextlib.contextmanager
def _csv(path: Path, schema: pl.Schema) -> Iterator[Callable[[pl.DataFrame], None]]:
    first = True
    with path.open("wb") as out:

        def put(frame: pl.DataFrame) -> None:
            nonlocal first
            flat = frame.with_columns(
                pl.col(name).map_elements(_object, return_dtype=pl.String) for name, t in schema.items() if t.is_nested()
            )
            flat.write_csv(out, include_header=first)
            first = False

        yield put
        if first:
            pl.DataFrame(schema={k: pl.String if t.is_nested() else t for k, t in schema.items()}).write_csv(out)


def _object(fields: Any) -> str | None:
    """Guest memory as a JSON object; CSV has no nested columns."""
    if fields is None:
        return None
    return json.dumps({f["field"]: f["value"] for f in fields})
