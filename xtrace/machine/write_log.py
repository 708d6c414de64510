"""Records as xtrace's own text log (docs/xtrace-log.md)."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from xtrace.machine.recording import Record, Recording

__all__ = ("render",)


def render(recording: Recording) -> tuple[bytes, list[int | None]]:
    """Return the log, and the line number (from 1) of each record."""
    callers = {d.caller for d in recording.domains}
    arch = "arm64" if callers and all(c.startswith("arm") for c in callers) else "x86_64"
    lines = [f"xtrace: header release={recording.release} arch={arch} tsc_khz={recording.tsc_khz} ;"]
    for d in recording.domains:
        name = "" if d.name is None else f" name={d.name}"
        lines.append(f"xtrace: domain id={d.domid} caller={d.caller} role={d.role}{name} ;")
    head = len(lines)
    lines += [_line(r) for r in recording.records]
    where: list[int | None] = [head + 1 + i for i in range(len(recording.records))]
    return ("\n".join(lines) + "\n").encode(), where


def _line(r: Record) -> str:
    words = [f"xtrace: {r.kind} tsc={r.tsc:#x} pcpu={r.pcpu} dom={r.domid} vcpu={r.vcpu}"]
    if r.op is not None:
        words.append(f"op={r.op}")
    words += [f"a{i}={v:#x}" for i, v in enumerate(r.args)]
    if r.rip is not None:
        words.append(f"rip={r.rip:#x}")
    if r.on_insn is not None:
        words.append(f"on_insn={int(r.on_insn)}")
    if r.result is not None:
        words.append(f"result={r.result}")
    if r.count is not None:
        words.append(f"n={r.count}")
    words += [f"mem.{k}={v:#x}" for k, v in r.memory.items()]
    return " ".join(words) + " ;"
