"""``xtrace formats``: which inputs can be read, and what each can and cannot show."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, Annotated, Any, TextIO

import typer

from xtrace.cli.options import Output

if TYPE_CHECKING:
    from xtrace.ingest.base import Reader, Shows

NAME = "formats"

#: Heading on the terminal -> field of Shows.
_COLUMNS = {
    "op": "op",
    "sub": "subop",
    "args": "arguments",
    "rip": "rip",
    "who": "who",
    "time": "time",
    "mem": "memory",
    "ret": "result",
}
_WIDTH = 80


def command(
    name: Annotated[str | None, typer.Argument(metavar="NAME", help="One format, in full.")] = None,
    format_: Annotated[str, typer.Option("--format", metavar="text|json", help="Form of the output.")] = "text",
    output: Output = None,
) -> int:
    """List the formats that can be read, and what each can show: proved, inferred or unobservable."""
    import json

    from xtrace.cli.common import choose_format
    from xtrace.cli.options import opened
    from xtrace.errors import UsageError
    from xtrace.ingest import registry

    choose_format(format_)
    readers = []
    for each in registry.names() if name is None else (name,):
        try:
            readers.append(registry.reader(each))
        except UsageError:
            if name is not None or each in registry.BUILTIN:
                raise
    for plugin, why in registry.skipped().items():
        print(f"xtrace: plug-in reader {plugin} skipped: {why}", file=sys.stderr)
    with opened(output) as out:
        if format_ == "json":
            json.dump({"schema_version": 1, "formats": [_object(r) for r in readers]}, out, indent=1)
            out.write("\n")
        elif name is None:
            _table(readers, out)
        else:
            _one(readers[0], out)
    return 0


def _object(reader: Reader) -> dict[str, Any]:
    shows = reader.shows
    fields = [*_COLUMNS.values(), "proved", "inferred", "unobservable"]
    return {
        "name": reader.name,
        "title": reader.title,
        "follow": bool(getattr(reader, "streams", False)),
        "shows": {f: getattr(shows, f) or None for f in fields},
        "evidence": _evidence(shows),
    }


def _evidence(shows: Shows) -> dict[str, dict[str, list[str]]]:
    from xtrace.analyze.observable import evidence

    return evidence(shows.registers, fields=shows.fields, samples=shows.samples)


def _table(readers: list[Reader], out: TextIO) -> None:
    from xtrace.cli.common import wrap

    wide = max(len(r.name) for r in readers)
    out.write(f"{'name':<{wide}}  {'  '.join(_COLUMNS)}  what it is\n")
    for r in readers:
        marks = "  ".join(f"{_mark(getattr(r.shows, f)):<{len(h)}}" for h, f in _COLUMNS.items())
        left = f"{r.name:<{wide}}  {marks}  "
        out.write(wrap(r.title, left, " " * len(left), _WIDTH) + "\n")
    out.write("\n+ recorded   ~ in part or for some   - never   ('xtrace formats NAME' for more)\n")


def _mark(text: str) -> str:
    if not text:
        return "-"
    return "+" if text.startswith(("yes", "all", "every")) else "~"


def _one(reader: Reader, out: TextIO) -> None:
    from xtrace.cli.common import wrap

    shows = reader.shows
    out.write(wrap(f"{reader.name}: {reader.title}", "", "  ", _WIDTH) + "\n")
    names = {
        "op": "hypercall",
        "sub": "sub-operation",
        "args": "arguments",
        "who": "domain, vCPU",
        "mem": "guest memory",
        "ret": "result",
    }
    for heading, field in _COLUMNS.items():
        text = getattr(shows, field) or "never"
        out.write(wrap(text, f"  {names.get(heading, heading):<14}", " " * 16) + "\n")
    for field in ("proved", "inferred", "unobservable"):
        if text := getattr(shows, field):
            out.write(wrap(text, f"  {field:<14}", " " * 16) + "\n")
    out.write(f"  follow        {'yes' if getattr(reader, 'streams', False) else 'no: it needs the whole input'}\n")
    out.write("\nContinuations of a 64-bit PV guest, hypercall by hypercall, of what is recorded\nat best (from the facts):\n")
    found = _evidence(shows)
    for kind in ("proved", "inferred", "unobservable"):
        words = []
        for hypercall, by in found.items():
            if kind in by:
                only = len(by) > 1  # the hypercall's other sub-operations fare otherwise
                words.append(f"{hypercall} ({', '.join(by[kind])})" if only else hypercall)
        out.write(wrap(", ".join(words) or "none", f"  {kind:<14}", " " * 16) + "\n")
