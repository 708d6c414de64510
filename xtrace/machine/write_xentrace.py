"""Records as the binary that ``xentrace`` writes, as far as that records things.

It holds no stopped vCPUs, no returns, no guest memory, and few arguments (``__trace_hypercall``). Which records a release
writes is data: ``xentrace_forms.toml``.
"""

from __future__ import annotations

import struct
import tomllib
from functools import cache
from importlib import resources
from typing import TYPE_CHECKING, Any, Final

from xtrace import release as releases_mod
from xtrace.errors import UsageError

if TYPE_CHECKING:
    from xtrace.machine.recording import Record, Recording

__all__ = ("render", "sidecar")

#: TRC_TRACE_CPU_CHANGE with two extra words and no time: pCPU, bytes that follow.
_WINDOW: Final = 0x2001F003

#: Arguments that ``__trace_hypercall`` appends, each as 32 bits, by hypercall number.
_RECORDED: Final = {1: (1,), 13: (1,), 20: (0, 2), 24: (0, 1), 26: (1,), 29: (0,)}

_LOW: Final = 0xFFFFFFFF
_SUSPEND: Final = 2  # SHUTDOWN_suspend
_VMCALL: Final = 0x12  # EXIT_REASON_VMCALL

#: Run states: running, runnable.
_STOPS, _RUNS = 0x21011, 0x21101

#: xentrace looks at the buffers of every pCPU in turn, this often (ms).
_POLL: Final = 10


def render(recording: Recording) -> tuple[bytes, list[int | None]]:
    """Return the binary, and the byte offset of each record (null for what it does not hold).

    Raises:
        UsageError: the release does not record the hypercalls of some domain.
    """
    out = bytearray()
    where: list[int | None] = [None] * len(recording.records)
    writer = _Writer(recording)
    period = recording.tsc_khz * _POLL
    waiting: dict[int, list[tuple[int, bytes]]] = {}

    def flush() -> None:
        for pcpu in sorted(waiting):
            size = sum(len(data) for _, data in waiting[pcpu])
            if size:
                out.extend(struct.pack("<III", _WINDOW, pcpu, size))
            for k, data in waiting[pcpu]:
                if k >= 0:
                    where[k] = len(out)
                out.extend(data)
        waiting.clear()

    poll = None
    for k, record in enumerate(recording.records):
        if poll is None or record.tsc >= poll:
            flush()
            poll = (record.tsc // period + 1) * period
        for data, own in writer.record(record):
            waiting.setdefault(record.pcpu, []).append((k if own else -1, data))
    flush()
    return bytes(out), where


def sidecar(recording: Recording) -> bytes:
    """Return what the binary does not say of itself, as ``TRACE.xtrace.toml`` (``xtrace.config``)."""
    lines = [f'release = "{recording.release}"', f"tsc_khz = {recording.tsc_khz}"]
    for d in recording.domains:
        lines += ["", f"[domains.{d.domid}]", f'caller = "{d.caller}"', f'role = "{d.role}"']
        if d.name is not None:
            lines.append(f'name = "{d.name}"')
    return ("\n".join(lines) + "\n").encode()


class _Writer:
    """Turns records into bytes, as one release does for each caller."""

    def __init__(self, recording: Recording) -> None:
        """Look up the forms; refuse callers that the release does not record."""
        release = _release(recording.release)
        self.caller = {d.domid: d.caller for d in recording.domains}
        self.forms: dict[tuple[str, str], int] = {}
        for row in _forms():
            if release not in releases_mod.expand(tuple(row["releases"])):
                continue
            for caller in self.caller.values():
                if caller in row.get("callers", (caller,)):
                    events = row["events"]
                    self.forms[row["name"], caller] = events if isinstance(events, int) else events[caller]
        for domid, caller in self.caller.items():
            if not any((form, caller) in self.forms for form in ("v1", "v2", "vmmcall")):
                raise UsageError(
                    f"xentrace of {recording.release} does not record hypercalls of domain {domid} ({caller}) in a form that "
                    "can be written; use the text log"
                )

    def record(self, r: Record) -> list[tuple[bytes, bool]]:
        """Return (bytes, the record itself and not what leads up to it) of one record; none for what is not recorded."""
        caller = self.caller[r.domid]
        if r.kind == "call":
            return self._call(r, caller)
        if r.kind == "subcall" and ("subcall", caller) in self.forms:
            return [(self._arguments(r, self.forms["subcall", caller]), True)]
        if r.kind == "schedule":
            return self._schedule(r, caller)
        if r.kind == "suspend":
            return [(_bytes(self.forms["shutdown", caller], r.tsc, r.domid, r.vcpu, _SUSPEND), True)]
        if r.kind == "lost":
            return [(self._lost(r, caller), True)]
        return []

    def _call(self, r: Record, caller: str) -> list[tuple[bytes, bool]]:
        assert r.op is not None and r.rip is not None
        if ("v2", caller) in self.forms:
            return [(self._arguments(r, self.forms["v2", caller]), True)]
        wide = caller.endswith("64")
        rip = (r.rip & _LOW, r.rip >> 32) if wide else (r.rip & _LOW,)
        if ("v1", caller) in self.forms:
            return [(_bytes(self.forms["v1", caller], r.tsc, *rip, r.op), True)]
        # The exit stands at the instruction, not behind it.
        at = r.rip - 3
        words = (at & _LOW, at >> 32) if wide else (at & _LOW,)
        out = _bytes(self.forms["exit", caller], r.tsc, _VMCALL, *words)
        return [(out, False), (_bytes(self.forms["vmmcall", caller], r.tsc, r.op), True)]

    def _arguments(self, r: Record, event: int) -> bytes:
        """TRC_PV_HYPERCALL_V2_ARG_32(i): bit 20 + 2i of the first word."""
        assert r.op is not None
        used = [i for i in _RECORDED.get(r.op, ()) if i < len(r.args)]
        word = r.op | sum(1 << (20 + 2 * i) for i in used)
        return _bytes(event, r.tsc, word, *(r.args[i] & _LOW for i in used))

    def _schedule(self, r: Record, caller: str) -> list[tuple[bytes, bool]]:
        who = r.domid << 16 | r.vcpu
        before = r.before if r.before is not None else (0x7FFF, r.pcpu)  # the idle domain
        if ("switch", caller) in self.forms:
            return [(_bytes(self.forms["switch", caller], r.tsc, *before, r.domid, r.vcpu), True)]
        stops = _bytes(_STOPS, r.tsc, before[0] << 16 | before[1])
        return [(stops, False), (_bytes(_RUNS, r.tsc, who), True)]

    def _lost(self, r: Record, caller: str) -> bytes:
        assert r.count is not None and r.since is not None
        if ("lost", caller) in self.forms:
            return struct.pack("<II", 1 << 28 | self.forms["lost", caller], r.count)
        return _bytes(self.forms["lost_who", caller], r.tsc, r.count, r.domid | r.vcpu << 16, r.since & _LOW, r.since >> 32)


def _bytes(event: int, tsc: int, *words: int) -> bytes:
    return struct.pack(f"<IQ{len(words)}I", 1 << 31 | len(words) << 28 | event, tsc, *words)


def _release(name: str) -> str:
    """Return the release whose recorder a version with fixes, or a model, has."""
    if releases_mod.is_model(name):
        from xtrace.replay.models import registered

        model = registered(name)
        assert model is not None
        return _release(model.parent)
    return name.partition("+")[0]


@cache
def _forms() -> tuple[dict[str, Any], ...]:
    text = resources.files("xtrace.machine").joinpath("xentrace_forms.toml").read_text("utf-8")
    return tuple(tomllib.loads(text)["form"])
