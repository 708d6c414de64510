"""``--format json`` and ``--format jsonl``."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, TextIO

from xtrace.report import common

if TYPE_CHECKING:
    from xtrace.pipeline import Result

__all__ = ("write_json", "write_jsonl")


def write_json(result: Result, out: TextIO) -> None:
    """Write one document (docs/json.md); findings are written as they are read, not gathered first."""
    head = json.dumps(common.head(result), indent=1, ensure_ascii=True)
    out.write(head[: head.rindex("}")].rstrip())
    for key, found in (("findings", common.rows(result)), ("suppressed", common.suppressed_rows(result))):
        out.write(f',\n "{key}": [')
        comma = "\n"
        for row in found:
            out.write(comma + "  " + json.dumps(row))
            comma = ",\n"
        out.write("]" if comma == "\n" else "\n ]")
    out.write("\n}\n")


def write_jsonl(result: Result, out: TextIO, *, told: bool = False) -> None:
    """Write one object a line: inputs, findings, suppressed ones, surface rows, trace findings, and the summary last.

    Where findings that were told already do not hold (``Result.revised``), a line of its own says so and all are written.

    ``type`` says which.

    Args:
        result: what was found.
        out: where to.
        told: the findings were written already, as they appeared.
    """
    if told and result.revised:
        out.write(json.dumps({"type": "revised"}) + "\n")
        told = False
    head = common.head(result)
    for item in head.pop("inputs"):
        out.write(json.dumps({"type": "input", **item}) + "\n")
    for row in () if told else common.rows(result):
        out.write(json.dumps({"type": "finding", **row}) + "\n")
    for row in common.suppressed_rows(result):
        out.write(json.dumps({"type": "suppressed", **row}) + "\n")
    for row in head.pop("surface"):
        out.write(json.dumps({"type": "surface", **row}) + "\n")
    for row in head.pop("trace"):
        out.write(json.dumps({"type": "trace", **row}) + "\n")
    out.write(json.dumps({"type": "summary", **head}) + "\n")
