"""The slow, obvious twin of the xentrace reader: one record at a time, everything in memory, no cleverness."""

from __future__ import annotations

import struct
from collections import Counter
from dataclasses import dataclass, field

MAGIC = 0x2001F003
GAP = -1
MAGIC_BYTES = struct.pack("<I", MAGIC)
COLUMNS = (
    "offset", "tsc", "pcpu", "segment", "domid", "vcpu", "caller", "kind", "op",
    "arg0", "arg1", "arg2", "arg3", "arg4", "arg5", "cut", "rip", "result",
)  # fmt: skip
RUNS = {0x21001, 0x21101, 0x21201, 0x21301, 0x21002}
STOPS = {0x21011, 0x21021, 0x21031}
NEW_SCHED = {
    0x21000 | old << 8 | new << 4 | 1 for old in range(4) for new in range(4) if old != new
} | {0x21001, 0x21002} | {0x28000 | n for n in (*range(1, 7), 7, *range(9, 18))}  # fmt: skip
OLD_SCHED = {0x2F000 | n for n in (*range(1, 8), *range(9, 16))}


@dataclass
class Result:
    events: list[dict] = field(default_factory=list)
    ids: Counter = field(default_factory=Counter)
    skipped: int = 0
    truncated: bool = False


@dataclass
class Window:
    start: int
    end: int
    pcpu: int
    after_loss: bool = False


@dataclass
class Record:
    offset: int
    event: int
    tsc: int | None
    words: tuple[int, ...]


def plausible(data: bytes, at: int) -> bool:
    if at + 12 > len(data):
        return False
    word, pcpu, size = struct.unpack_from("<III", data, at)
    return word == MAGIC and pcpu < 16384 and size % 4 == 0


def windows(data: bytes, result: Result) -> list[Window]:
    out: list[Window] = []
    seen: set[int] = set()
    missing: set[int] = set()
    at = 0

    def add(start: int, end: int, pcpu: int) -> None:
        out.append(Window(start, end, pcpu, end > start and pcpu in missing))
        if end > start:
            seen.add(pcpu)
            missing.discard(pcpu)

    while at < len(data):
        if plausible(data, at):
            start = at + 12
            pcpu, size = struct.unpack_from("<II", data, at + 4)
            due = start + size
            if due == len(data) or plausible(data, due):
                add(start, due, pcpu)
                at = due
                continue
            found = search(data, start)
            end = len(data) if found is None else found
            whole = min(due, end)
            words = (whole - start) // 4 * 4
            add(start, start + words, pcpu)
            if due > end or words != whole - start:
                missing.add(pcpu)
            result.skipped += whole - start - words + end - whole
            gap = end - whole
            if found is None and (due > len(data) or (gap < 12 and MAGIC_BYTES.startswith(data[whole : whole + 4]))):
                result.truncated = True
            if end > whole:
                missing |= seen
            at = end
        else:
            found = search(data, at)
            missing |= seen
            end = len(data) if found is None else found
            result.skipped += end - at
            if found is None and end - at < 12 and MAGIC_BYTES.startswith(data[at : at + 4]):
                result.truncated = True
            at = end
    return out


def search(data: bytes, at: int) -> int | None:
    cut = None
    while (at := data.find(MAGIC_BYTES, at)) >= 0:
        if plausible(data, at):
            due = at + 12 + struct.unpack_from("<I", data, at + 8)[0]
            if due > len(data):
                cut = at if cut is None else cut
            elif due == len(data) or plausible(data, due):
                return at
        at += 1
    return cut


def possible(event: int) -> bool:
    cls = event >> 16
    return cls != 0 and cls & (cls - 1) == 0 and event >> 12 & 0xF != 0 and event != 0x1F003


def records(data: bytes, start: int, end: int, result: Result | None = None) -> tuple[list[Record], int]:
    """Whole records, and where the window's reading stopped."""
    out, at = [], start
    while at < end:
        (head,) = struct.unpack_from("<I", data, at)
        timed, n, event = head >> 31, head >> 28 & 7, head & 0xFFFFFFF
        size = 4 + 8 * timed + 4 * n
        if at + size > end or not possible(event):
            # One that sticks out is not even looked at: its words may be another window's.
            if result is not None:
                result.skipped += end - at
            break
        tsc = struct.unpack_from("<Q", data, at + 4)[0] if timed else None
        out.append(Record(at, event, tsc, struct.unpack_from(f"<{n}I", data, at + 4 + 8 * timed)))
        at += size
    return out, at


def read(data: bytes) -> Result:
    result = Result()
    found = windows(data, result)
    by_pcpu: dict[int, list[Record]] = {}
    early: set[int] = set()
    full = [w for w in found if w.end > w.start]
    for w in full[:64]:
        early.update(r.event for r in records(data, w.start, w.end)[0])
    dom_era = None
    later = {0x20100D, 0x20200E} | NEW_SCHED
    if bool(early & OLD_SCHED) != bool(early & later):
        dom_era = bool(early & OLD_SCHED)
    broken: dict[int, int] = {}  # pCPU whose last window had damage: where
    for w in full:
        recs, stop = records(data, w.start, w.end, result)
        mine = by_pcpu.setdefault(w.pcpu, [])
        if w.after_loss or w.pcpu in broken:
            mine.append(Record(w.start - 12, GAP, recs[0].tsc if recs else None, ()))
            broken.pop(w.pcpu, None)
        mine.extend(recs)
        if stop < w.end and not (result.truncated and sticks_out(data, stop, w.end) and w.end + 4 > len(data)):
            broken[w.pcpu] = stop
    for pcpu, at in broken.items():
        by_pcpu[pcpu].append(Record(at, GAP, None, ()))
    result.ids[0x1F003] += len(found)
    keyed = []
    for pcpu in sorted(by_pcpu):
        for event in one_pcpu(pcpu, by_pcpu[pcpu], dom_era, result.ids):
            keyed.append(((event["segment"], event["tsc"] or 0, pcpu), event))
    keyed.sort(key=lambda pair: pair[0])
    result.events = [event for _, event in keyed]
    result.ids = Counter({k: n for k, n in result.ids.items() if n})
    return result


def sticks_out(data: bytes, at: int, end: int) -> bool:
    (head,) = struct.unpack_from("<I", data, at)
    return at + 4 + 8 * (head >> 31) + 4 * (head >> 28 & 7) > end


def one_pcpu(pcpu: int, recs: list[Record], dom_era: bool | None, ids: Counter) -> list[dict]:
    out = []
    tsc, segment, who, last_exit = None, 0, None, None
    for r in recs:
        before = tsc
        ids[r.event] += r.event != GAP
        if r.tsc is not None:
            segment += tsc is not None and r.tsc < tsc
            tsc = r.tsc
        w, e = r.words, r.event
        row = dict.fromkeys(COLUMNS) | {"offset": r.offset, "tsc": tsc, "pcpu": pcpu, "segment": segment, "cut": 0}
        if e in RUNS:
            who = (w[0] >> 16, w[0] & 0xFFFF) if w else None
        elif e in STOPS:
            who = None
        elif e == 0x2F00A:
            who = (w[2] & 0xFFFF, w[3] & 0xFFFF) if len(w) >= 4 else None
        elif e == GAP:
            who = None
        elif e == 0x1F001:
            who = (w[1] & 0xFFFF, w[1] >> 16) if len(w) >= 2 else None
        if who:
            row["domid"], row["vcpu"] = who
        if e in (0x81002, 0x81003, 0x81102, 0x81103):
            last_exit = r
        elif e in RUNS | STOPS | {0x2F00A, 0x1F001, GAP, 0x81402, 0x81403, 0x81502, 0x81503, 0x81001, 0x81401}:
            last_exit = None
        if e in (0x20F001, 0x201001) and len(w) >= 2:
            out.append(row | {"kind": "hypercall", "caller": "pv32", "rip": w[0], "op": w[1]})
        elif e in (0x20F101, 0x201101) and len(w) >= 3:
            out.append(row | {"kind": "hypercall", "caller": "pv64", "rip": w[0] | w[1] << 32, "op": w[2]})
        elif e in (0x20100D, 0x20200E) and len(w) >= 1:
            out.append(row | {"kind": "hypercall" if e == 0x20100D else "subcall"} | arguments(w))
        elif e == 0x82012 and len(w) >= 1:
            out.append(row | vmmcall(w, last_exit, dom_era))
        elif e in (0x2F007, 0x28007, 0x28010) and len(w) >= 3 and w[2] == 2:
            out.append(row | {"kind": "suspend", "op": e, "domid": w[0] & 0xFFFF, "vcpu": w[1] & 0xFFFF})
        elif e == 0x1F001 and len(w) >= 1:
            since = w[2] | w[3] << 32 if len(w) >= 4 else None
            out.append(row | {"kind": "lost", "op": e, "result": w[0], "arg0": since})
        elif e == GAP:
            out.append(row | {"kind": "lost", "arg0": tsc if before is None else before})
    return out


def arguments(w: tuple[int, ...]) -> dict:
    fields = [w[0] >> (20 + 2 * i) & 3 for i in range(6)]
    if 3 in fields or sum(fields) != len(w) - 1:
        return {"op": w[0] if len(w) == 1 else w[0] & 0xFFFFF}
    out, at = {"op": w[0] & 0xFFFFF, "cut": 0}, 1
    for i, width in enumerate(fields):
        if width:
            out[f"arg{i}"] = w[at] | (w[at + 1] << 32 if width == 2 else 0)
            out["cut"] |= (width == 1) << i
        at += width
    return out


def vmmcall(w: tuple[int, ...], exit_: Record | None, dom_era: bool | None) -> dict:
    dom = len(w) >= 2 and (w[1] != 0 if dom_era is None else dom_era)
    out = {"kind": "vmmcall", "op": w[1] if dom else w[0]}
    if dom:
        out["domid"], out["vcpu"] = w[0] & 0xFFFF, w[0] >> 16
    if exit_ is None:
        return out
    x = exit_.words[1:] if dom else exit_.words
    wide = exit_.event in (0x81102, 0x81103) or (exit_.event == 0x81003 and dom)
    if len(x) < (3 if wide else 2) or x[0] not in (0x12, 0x81):
        return out
    out["rip"] = x[1] | (x[2] << 32 if wide else 0)
    if not dom:
        out["caller"] = "hvm64" if wide else "hvm32"
    elif out["rip"] > 0xFFFFFFFF:
        out["caller"] = "hvm64"
    return out
