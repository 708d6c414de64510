"""What real releases did (samples/resume), and the same done by the machine: guests built from the rows, one entry each."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

import pyarrow as pa

from xtrace import release
from xtrace.machine.guest import Guest
from xtrace.machine.host import Entry, Host
from xtrace.machine.ongoing import Nested, Plain, Stop
from xtrace.replay import factfiles, facts

SAMPLES = Path(__file__).parents[2] / "samples" / "resume"

#: Where the rows' "B" lies.
BASE = 0x100000

#: Fields of the rows under the names of the fact files.
NAMES = {"nr@4": "nr", "nr@16": "nr", "first_pfn@8": "first_pfn", "hvmmem_type@2": "hvmmem_type"}

MULTICALL = 13

#: Hypercalls whose structure begins with a command and an interface version.
VERSIONED = (7, 35, 36, 49)

#: The operation that the first word of an id stands for.
FAMILIES = {
    "dec": "XENMEM_decrease_reservation",
    "pop": "XENMEM_populate_physmap",
    "inc": "XENMEM_increase_reservation",
    "xchg": "XENMEM_exchange",
    "atp": "XENMEM_add_to_physmap",
    "batch": "XENMEM_add_to_physmap_batch",
}


@dataclass
class Row:
    """One experiment."""

    id: str
    target: str
    version: str
    caller: str
    op: int
    args: list[int]
    before: dict[str, Any]
    after: dict[str, Any]
    ret: int
    errno: str | None
    items: int | None
    said: str
    number: int = field(default=0)

    @property
    def family(self) -> str:
        return self.id.split("-")[0]


def number(value: Any) -> int | None:
    """Return a number of a row; ``B+0x100`` counts from BASE."""
    if isinstance(value, int):
        return value
    if not isinstance(value, str):
        return None
    try:
        if value.startswith("B+"):
            return BASE + int(value[2:], 0)
        return 1 << int(value[2:]) if value.startswith("2^") else int(value, 0)
    except ValueError:
        return None


@cache
def rows() -> tuple[Row, ...]:
    """Return every experiment that is one call with one answer."""
    out: list[Row] = []
    for path in sorted(SAMPLES.glob("*.jsonl.zst")):
        text = pa.CompressedInputStream(pa.OSFile(str(path)), "zstd").read().decode()
        for line in text.splitlines():
            r = json.loads(line)
            if r["ret"] is None or "-versions-" in r["id"]:
                continue  # one row for many calls, each with another interface version; or statistics
            version = release.parse(r["target"]).releases[0].version
            args = [number(a) or 0 for a in r["args"]] + [0, 0]
            out.append(
                Row(
                    r["id"],
                    r["target"],
                    version,
                    r["caller"],
                    r["op"],
                    args,
                    r["memory_before"],
                    r["memory_after"],
                    r["ret"],
                    r["errno"],
                    r["items_processed"],
                    r["what_happened"],
                    len(out),
                )
            )
    return tuple(out)


def guest(r: Row) -> Guest:
    """Return the guest of a row: privileged, with the registers and the structure that the row says."""
    memory = {NAMES.get(k, k): n for k, v in r.before.items() if (n := number(v)) is not None}
    words = r.before.get("words")
    if r.op in VERSIONED:
        if words:  # uint32_t cmd, interface_version: words of 64 bits, or of 32
            head = int(words[0], 0)
            memory["cmd"] = head & 0xFFFFFFFF
            memory.setdefault("interface_version", head >> 32 if r.caller == "pv64" else int(words[1], 0))
        elif r.id.startswith("hd-"):  # made by the recorder's own functions, which know the version
            memory.setdefault("cmd", 2)  # destroydomain
            version = factfiles.interface_version("XEN_DOMCTL_INTERFACE_VERSION", r.version)
            memory.setdefault("interface_version", version or 0)
    if facts.command_at(r.op) == "mem.op" and words and "op" not in memory:
        memory["op"] = int(words[0], 0) & 0xFFFFFFFF
    g = Guest(r.caller, "control", r.op, FAMILIES.get(r.family, "?"), 0, list(r.args), memory)
    g.origin = {f"arg{k}": v for k, v in enumerate(g.args)}
    call = facts.lookup(r.version, r.caller, r.op)
    if call.status == "modelled" and call.dispatch is not None:
        b = call.by_number.get(g.get(call.command_at or "arg0") & call.dispatch.mask)
        if b is not None:
            g.layout = layout(r, b.params.get("layout"))
    done = r.before.get("really_done_before")
    if r.op != MULTICALL and "dec" in r.id.split("-")[:2] and done is not None:
        g.stops = dict.fromkeys(range(done), "progress")  # frames that are gone already
    elif r.id == "atp-407-overlap-fwd":
        g.stops = dict.fromkeys(range(r.before["really_moved_before"]), "-EACCES")  # no page stands there any more
    elif "relocate" in r.id:
        top = "top" in r.id  # overlapping, and what is left is the lower part
        memory["src_gfn"] = BASE + (0 if top else 16)
        memory["dst_gfn"] = BASE + (128 if top else 0x1000 + 16)
    elif r.family == "dec":
        g.stops = {64: "progress"}  # no more frames stand in the list
    return g


def layout(r: Row, here: str | None) -> str | None:
    """Return the layout that the structure has: two operations of hvm_op got another one."""
    if here is not None and r.op == 34 and here.startswith("xen_hvm_modified_memory"):
        if "modmem-7-old" in r.id or r.id.endswith("-7old"):
            return "xen_hvm_modified_memory-24"
        if "modmem" in r.id or r.id.startswith("hvm-7"):
            return "xen_hvm_modified_memory-16"
    if here is not None and here.startswith("xen_hvm_set_mem_type"):
        return "xen_hvm_set_mem_type-16"
    return here


def enter(r: Row) -> tuple[Guest, Entry]:
    """Execute the row's hypercall once on the row's release, undisturbed."""
    g = guest(r)
    return g, Host(r.version).enter(g)


def sub_call(r: Row, op: int, args: list[int], memory: dict[str, int] | None = None) -> Plain:
    """Return a call that stands in an entry of the row's multicall."""
    g = Guest(r.caller, "control", op, "?", 0, args + [0] * (6 - len(args)), dict(memory or {}))
    g.origin = {f"arg{k}": v for k, v in enumerate(g.args)}
    g.inside = True
    return Plain(g, op, None)


def batch(r: Row, inner: list[Plain]) -> Nested:
    """Return the row's multicall with what is known of its entries."""
    g = guest(r)
    g.operation, g.total = "multicall", g.args[1]
    return Nested(g, inner, MULTICALL)


__all__ = ("BASE", "FAMILIES", "MULTICALL", "Row", "Stop", "batch", "enter", "guest", "rows", "sub_call")
