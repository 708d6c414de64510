"""The fixed-size records of Xen 3.0 and 3.1: a writer, and a slow, obvious reader of undamaged files."""

from __future__ import annotations

import struct
from collections.abc import Iterable

#: cpu, tsc, event, data words (up to five)
Record = tuple[int, int, int, tuple[int, ...]]


def write(records: Iterable[Record], *, wide: bool = True, order: str = "little", padding: int = 0xDEADBEEF) -> bytes:
    sign = "<" if order == "little" else ">"
    out = []
    for cpu, tsc, event, data in records:
        d = (*data, 0, 0, 0, 0, 0)[:5]
        if wide:
            out.append(struct.pack(f"{sign}IQII5Q", cpu, tsc, event, padding, *d))
        else:
            out.append(struct.pack(f"{sign}IQI5I", cpu, tsc, event, *(x & 0xFFFFFFFF for x in d)))
    return b"".join(out)


def read(records: list[Record], *, wide: bool = True) -> list[dict]:
    """Events in order, as dictionaries of what the records say."""
    stride = 60 if wide else 36
    mask = (1 << 64 if wide else 1 << 32) - 1
    state: dict[int, dict] = {}
    out = []
    for i, (cpu, tsc, event, data) in enumerate(records):
        d = tuple(x & mask for x in (*data, 0, 0, 0, 0, 0)[:5])
        s = state.setdefault(cpu, {"tsc": None, "segment": 0, "who": None, "exit": None})
        s["segment"] += s["tsc"] is not None and tsc < s["tsc"]
        s["tsc"] = tsc
        if event == 0x2F00A:
            s["who"] = (d[2], d[3]) if d[2] <= 0x7FFF and d[3] <= 0xFFFF else None
        if event == 0x1F001:
            s["who"] = None
        if event == 0x81002:
            s["exit"] = d
        elif event in (0x81001, 0x2F00A, 0x1F001):
            s["exit"] = None
        who = s["who"] or (None, None)
        row = {
            "offset": i * stride, "tsc": tsc, "pcpu": cpu, "segment": s["segment"], "domid": who[0], "vcpu": who[1],
            "kind": None, "op": event, "rip": None, "result": None,
            "caller": None,
        }  # fmt: skip
        dom, vcpu = d[0] >> 16, d[0] & 0xFFFF
        if event == 0x82012 and 0 < dom <= 0x7FFF and vcpu < 64 and not any(d[2:]):
            row |= {"kind": "vmmcall", "op": d[1] & 0xFFFFFFFF, "domid": dom, "vcpu": vcpu}
            # The exit's reason is 32 bits wide.
            if s["exit"] is not None and s["exit"][2] & 0xFFFFFFFF in (0x12, 0x81):
                row["rip"] = s["exit"][1]
                row["caller"] = "hvm64" if s["exit"][1] > 0xFFFFFFFF else None
        elif event == 0x2F007 and d[0] <= 0x7FFF and d[1] <= 0xFFFF and d[2] == 2:
            row |= {"kind": "suspend", "domid": d[0], "vcpu": d[1]}
        elif event == 0x1F001:
            row |= {"kind": "lost", "result": min(d[0], 0xFFFFFFFF)}
        if row["kind"]:
            out.append(row)
    out.sort(key=lambda r: (r["segment"], r["tsc"], r["pcpu"]))
    return out
