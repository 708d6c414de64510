"""Findings of a trace that is still being written, one a line as they appear."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, TextIO

from xtrace import release
from xtrace.report import common

if TYPE_CHECKING:
    import polars as pl

__all__ = ("Live",)


class Live:
    """Writes new findings.

    Args:
        out: where to.
        form: ``text`` (the first of each kind), or ``jsonl`` (all of them).
    """

    def __init__(self, out: TextIO, form: str) -> None:
        """Begin with nothing told."""
        self._out, self._form = out, form
        self._told: set[tuple[object, ...]] = set()

    def __call__(self, rows: pl.DataFrame) -> None:
        """Write what is new in ``rows`` (``schema.FINDINGS``)."""
        if not len(rows):
            return
        for row in rows.iter_rows(named=True):
            if self._form == "jsonl":
                self._out.write(json.dumps({"type": "finding", **common.finding(row)}) + "\n")
                continue
            kind = (
                row["code"],
                row["hypercall"],
                row["subop"],
                row["domid"],
                row["caller"],
                row["evidence"],
                tuple(row["targets"]),
            )
            if kind in self._told or not row["in_exit"]:
                continue
            self._told.add(kind)
            place = f"line {row['line']}" if row["line"] is not None else f"byte {row['offset']}"
            text = f"{row['code']} at {release.fold_text(row['targets'])}, {row['evidence']}, {place}: {row['text']}"
            self._out.write(common.clean(text) + "\n")
        self._out.flush()
