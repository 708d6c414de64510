"""What the tests of both xentrace text readers share: one recording read as binary and as text."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING

import polars as pl

from xtrace import schema
from xtrace.ingest.base import ReadOptions
from xtrace.ingest.source import Source
from xtrace.ingest.xentrace import READER as BINARY

if TYPE_CHECKING:
    from collections.abc import Callable

    from xtrace.ingest.base import Ledger, Reader

ROOT = Path(__file__).parent.parent.parent
DATA = Path(__file__).parent / "data"

#: Columns that the text can carry. Times are compared by each reader's own rule.
COLUMNS = ("pcpu", "domid", "vcpu", "caller", "kind", "op", *schema.ARGS, "cut", "rip", "result")


def pairs(ending: str) -> list[tuple[Path, Path]]:
    """Find texts of one kind with the binary beside them; XTRACE_CAPTURES=DIR adds those too large to keep here."""
    folders = [ROOT / "samples" / "eras", ROOT / "samples" / "dom0-4.17.7", DATA]
    if os.environ.get("XTRACE_CAPTURES"):
        folders += [Path(os.environ["XTRACE_CAPTURES"]) / name for name in ("eras", "dom0-4.17.7")]
    found: dict[str, tuple[Path, Path]] = {}
    for folder in folders:
        for text in sorted(folder.glob(f"*.{ending}*")):
            base = text.name.split(f".{ending}")[0]
            binary = next(
                (folder / f"{base}.xentrace{end}" for end in ("", ".zst") if (folder / f"{base}.xentrace{end}").exists()), None
            )
            if binary:
                found.setdefault(base, (text, binary))
    return list(found.values())


def read(reader: Reader, path: Path, rows: int = 1 << 20) -> tuple[pl.DataFrame, Ledger]:
    """Read a whole recording."""
    with Source(path) as source:
        recording = reader.open(source, ReadOptions(batch_rows=rows))
        frames = list(recording.batches())
    return (pl.concat(frames) if frames else schema.empty(schema.EVENTS)), recording.ledger


def unexplained(
    binary: pl.DataFrame, text: pl.DataFrame, facts: dict[str, Callable[[pl.DataFrame], pl.Series]]
) -> dict[str, list[tuple[object, ...]]]:
    """Compare the events of each pCPU, in order; return the differences that no fact explains.

    Args:
        binary, text: events of one recording. facts: column -> which rows of both frames side by side (the text's columns end
            in ``_text``) may differ there.
    """
    a, b = (frame.sort("pcpu", maintain_order=True) for frame in (binary, text))
    assert len(a) == len(b)
    both = pl.concat([a, b.rename(lambda name: f"{name}_text")], how="horizontal")
    out = {}
    for name in COLUMNS:
        differ = both[name].cast(pl.String).ne_missing(both[f"{name}_text"].cast(pl.String))
        if name in facts:
            differ &= ~facts[name](both).fill_null(value=False)
        if differ.any():
            out[name] = both.filter(differ).select("offset", "line_text", name, f"{name}_text", "op").head(3).rows()
    return out


__all__ = ("BINARY", "COLUMNS", "DATA", "ROOT", "pairs", "read", "unexplained")
