"""``xtrace decode``: one continuation, read by both sides."""

from __future__ import annotations

import json
import sys
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping
    from typing import TextIO

NAME = "decode"

#: Lines of a batch judged together; never changes a result.
_CHUNK = 4096


def command(
    hypercall: Annotated[str | None, typer.Argument(metavar="HYPERCALL", help="Name or number.")] = None,
    arguments: Annotated[
        list[str] | None, typer.Argument(metavar="ARG…", help="Registers arg0, arg1, …; ? for one that is not known.")
    ] = None,
    source: Annotated[str | None, typer.Option("--from", metavar="RELEASE", help="Release that left it.")] = None,
    to: Annotated[str | None, typer.Option("--to", metavar="RELEASE", help="Release asked to resume it.")] = None,
    caller: Annotated[str | None, typer.Option("--caller", metavar="KIND", help="Caller ABI: pv64, hvm64, …")] = None,
    mem: Annotated[
        list[str] | None,
        typer.Option("--mem", metavar="FIELD=VALUE", help="Guest memory behind it, Xen's field names."),
    ] = None,
    issued: Annotated[
        list[str] | None, typer.Option("--issued", metavar="ARG", help="Registers of the call as first made, in order.")
    ] = None,
    issued_mem: Annotated[
        list[str] | None, typer.Option("--issued-mem", metavar="FIELD=VALUE", help="Guest memory as first made.")
    ] = None,
    issuer: Annotated[str, typer.Option("--issuer", metavar="WHO", help="guest, device_model or control.")] = "guest",
    format_: Annotated[str, typer.Option("--format", metavar="text|json", help="Form of the answer.")] = "text",
    batch: Annotated[
        str | None, typer.Option("--batch", metavar="FILE", help="Judge JSON lines from FILE (- is standard input).")
    ] = None,
) -> int:
    """Read one continuation at its source and at a target, and say what becomes of it.

    The registers are those left behind: rdi rsi rdx r10 r8 r9 (64-bit), ebx ecx edx esi edi ebp (32-bit).
    """
    from xtrace.errors import UsageError

    if batch is not None:
        if hypercall is not None:
            raise UsageError("--batch takes its continuations from FILE, not from the command line")
        return _batch(batch)
    if format_ not in ("text", "json"):
        raise UsageError(f"--format {format_}: there are text and json")
    for name, value in (("HYPERCALL", hypercall), ("--from", source), ("--to", to), ("--caller", caller)):
        if value is None:
            raise UsageError(f"{name} is missing")
    row: dict[str, Any] = {
        "caller": caller,
        "source": source,
        "target": to,
        "op": hypercall,
        "args": list(arguments or ()),
        "guest_memory": _fields(mem, "--mem"),
        "issuer": issuer,
    }
    if issued or issued_mem:
        row["issued"] = {"args": list(issued or ()), "guest_memory": _fields(issued_mem, "--issued-mem")}

    from xtrace.analyze import single
    from xtrace.report import common

    request = single.request(row)
    found = single.judge_many([request]).row(0, named=True)
    answer = common.single(found)
    if format_ == "json":
        print(json.dumps(answer, indent=1))
    else:
        _text(answer, request)
    return int(found["bits"])


def _fields(values: list[str] | None, option: str) -> dict[str, str]:
    from xtrace.errors import UsageError

    out = {}
    for text in values or ():
        name, eq, value = text.partition("=")
        if not eq or not name:
            raise UsageError(f"{option} {text}: write FIELD=VALUE, such as nr_extents=64")
        out[name] = value
    return out


def _text(a: Mapping[str, Any], request: Any) -> None:
    from xtrace.analyze import rules
    from xtrace.cli import common
    from xtrace.replay import facts

    def side(d: Mapping[str, Any]) -> str:
        name = d["subop"] or d["hypercall"]
        if d["subop"] is None and d["unit"] is None and d["home"] == "none":
            name = "no operation"
        parts = [name]
        for key in ("progress", "remaining", "total"):
            if d[key] is not None:
                parts.append(f"{key} {d[key]:,}")
        if d["unit"]:
            parts.append(d["unit"])
        if d["home"]:
            parts.append(f"kept in {d['home']}")
        text = ", ".join(parts)
        return text + (f"\n          inside: {side(d['inner'])}" if d["inner"] else "")

    errno = f", {a['errno']}" if a["errno"] else ""
    harmless = " (harmless)" if a["harmless"] and a["outcome"] in ("restarts", "lost") else ""
    print(f"{a['outcome']}{harmless}{errno}: {a['text']}")
    print(f"  {a['source']:>8}  {side(a['source_decode'])}")
    print(f"  {a['target']:>8}  {side(a['target_decode'])}")
    for release, read in ((a["source"], a["source_decode"]), (a["target"], a["target_decode"])):
        call = facts.lookup(release, request.caller, request.op)
        b = call.behaviour(read["subop"] or read["hypercall"])
        if b is not None and b.breaks_own:
            # What a release does wrong to its own continuations is told, as the outcome is that of a sound one.
            print(common.wrap(f"{release} may mishandle its own: {b.breaks_own}", "  ", "    ", 120))
    if a["caveats"]:
        print(f"  caveats: {', '.join(a['caveats'])}")
    if a["code"]:
        rule = rules.get(a["code"])
        print(f"  {rule.code}: {rule.title}. {rule.what_to_do}")


def _batch(path: str) -> int:
    """Judge JSON lines, in order; a bad line is answered with its error and does not stop the others."""
    import contextlib
    from pathlib import Path

    from xtrace.errors import InputError

    bad = False
    try:
        with contextlib.ExitStack() as stack:
            lines: TextIO = sys.stdin if path == "-" else stack.enter_context(Path(path).open(encoding="utf-8", errors="replace"))
            for chunk in _chunks(lines):
                for answer in _answers(chunk):
                    bad |= "error" in answer
                    sys.stdout.write(json.dumps(answer) + "\n")
                sys.stdout.flush()
    except (FileNotFoundError, IsADirectoryError, PermissionError) as exc:
        raise InputError(path, (exc.strerror or str(exc)).lower()) from exc
    return 3 if bad else 0


def _chunks(lines: TextIO) -> Iterator[list[str]]:
    chunk: list[str] = []
    for line in lines:
        if line.strip():
            chunk.append(line)
        if len(chunk) >= _CHUNK:
            yield chunk
            chunk = []
    if chunk:
        yield chunk


def _answers(chunk: list[str]) -> list[dict[str, Any]]:
    from xtrace.analyze import single
    from xtrace.errors import XtraceError
    from xtrace.report import common

    answers: list[dict[str, Any]] = []
    requests, places = [], []
    for line in chunk:
        row: Any = None
        try:
            row = json.loads(line)
            if not isinstance(row, dict):
                raise ValueError("not an object")
            requests.append(single.request(row))
            places.append(len(answers))
            answers.append({"id": row.get("id")})
        except (XtraceError, ValueError, RecursionError) as exc:
            answers.append({"id": row.get("id") if isinstance(row, dict) else None, "error": str(exc)})
    for place, found in zip(places, single.judge_many(requests).iter_rows(named=True), strict=True):
        answers[place].update(common.single(found))
    return answers
