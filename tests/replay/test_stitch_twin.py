"""The vectorised stitcher against a slow, obvious one: a row at a time, a dictionary for each vCPU."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import polars as pl
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from xtrace.replay import links
from xtrace.replay.stitch import Stitcher
from xtrace.schema import ARGS, EVENTS, empty

RELEASE = "4.17.7"
#: So few irets must have been seen before what follows one can be called fast; in earnest it is more.
LANDINGS = 2
ENTRIES = ("hypercall", "vmmcall")
#: What decoding says of the few hypercalls used here, written down by hand (4.17.7, 64-bit).
ELEMENT = {1: 16, 26: 24}
GRANT = {0: 32, 1: 24, 5: 40}
FLAG = 1 << 31


@dataclass
class Said:
    """What a row says by itself."""

    kind: str | None = None  # relative, flagged, absolute
    number: int = -1
    amount: int | None = None
    pointer: int | None = None
    size: int = 0
    stride: int = 1
    marked: bool = False


def read(row: dict[str, Any]) -> Said:
    op, a0, a1, a2 = row["op"], row["arg0"], row["arg1"], row["arg2"]
    if op == 49:
        return Said(marked=True)  # issued by Xen alone
    if a0 is None and a1 is None and a2 is None:
        return Said()
    if op in ELEMENT:
        if a1 is None:
            return Said("flagged", op, None, a0, ELEMENT[op])
        return Said("flagged", op, a1 & ~FLAG, a0, ELEMENT[op], marked=bool(a1 & FLAG))
    if op == 12 and a0 is not None and a0 & 63 in (0, 1, 6):
        return Said("absolute", a0 & 63, a0 >> 6, a1, 0, marked=a0 >> 6 > 0)
    if op == 13:
        return Said("relative", 13, a1, a0, 64)
    if op == 20 and a0 in GRANT:
        return Said("relative", a0, a2, a1, GRANT[a0], 32 if a0 == 1 else 1)
    return Said()


@dataclass
class Entry:
    """An entry that a later one may continue."""

    said: Said
    at: tuple[int, int]  # segment, losses so far
    op: int
    call: int
    first: int | None  # seq of the call as issued; None: it was a continuation already
    returns: int
    irets: int = 0  # since
    rip: int | None = None
    subs: int = 0  # sub-calls since
    multi: int = 0  # 2: the sub-call that was preempted runs again


@dataclass
class Vcpu:
    by_op: dict[int, Entry] = field(default_factory=dict)
    real: Entry | None = None  # last entry that was no iret
    owner: Entry | None = None  # call in progress
    last_sub: int | None = None  # op of the last sub-call
    again: bool = False  # the next sub-call is the one that was preempted
    last: tuple[str, int, tuple[int, int], int, int] | None = None  # kind, op, at, tsc, pcpu of the last entry or return
    returns: int = 0
    stood: tuple[dict[str, Any], tuple[int, int]] | None = None  # a sample on the instruction, and nothing but irets since


def follows(old: Entry, now: Entry, adjacent: bool) -> bool:
    """Say whether ``now`` continues ``old``, the previous entry of its hypercall."""
    a, b = old.said, now.said
    if old.at != now.at or old.returns != now.returns or a.kind != b.kind or a.number != b.number:
        return False
    if b.kind == "flagged":
        return b.marked and a.amount is not None and b.amount is not None and b.amount <= a.amount
    if a.amount is None or b.amount is None:
        return False
    pointed = a.pointer is not None and b.pointer is not None
    if b.kind == "absolute":
        return b.marked and b.amount >= a.amount and (not pointed or a.pointer == b.pointer)
    done = a.amount - b.amount
    if done < 0 or b.amount == 0:
        return False
    if pointed and b.pointer - a.pointer != done * b.size:  # type: ignore[operator]
        return False
    if now.op == 13:
        if done > 0 and old.subs == done:
            return True  # between two entries of the list
        if old.subs == done + 1 and b.amount > 1:
            return True  # inside one
        return done > 0 and pointed and old.subs == 0  # sub-calls are not recorded
    return done > 0 and done % b.stride == 0 and ((adjacent and a.amount >= 64) or pointed)


#: Hypercalls of the small set used here that may leave a continuation (4.17.7).
MAY = (1, 12, 13, 20, 26, 36)


def lands(old: Entry, now: Entry) -> bool:
    """Say whether ``now``, which an iret led to, may be ``old`` again: nothing in them speaks against it."""
    a, b = old.said, now.said
    if old.at != now.at or old.returns != now.returns or a.kind != b.kind or a.number != b.number or old.irets != 1:
        return False
    if old.rip is not None and now.rip is not None and old.rip != now.rip:
        return False
    pointed = a.pointer is not None and b.pointer is not None
    done = None if a.amount is None or b.amount is None else a.amount - b.amount
    if done is not None and done < 0 and b.kind is not None:
        return False
    moved = 0 if b.kind in (None, "absolute") else (done or 0) * b.size
    if pointed and done is not None and b.pointer - a.pointer != moved:  # type: ignore[operator]
        return False
    if done is None or done == 0 or b.kind is None:
        return not b.marked and b.kind != "flagged"
    return b.kind == "relative" and now.op != 13 and done % b.stride == 0


def stands(stood: tuple[dict[str, Any], tuple[int, int]] | None, row: dict[str, Any], at: tuple[int, int]) -> bool:
    """Say whether an entry repeats the registers of the stopped vCPU before it."""
    if stood is None or stood[1] != at or stood[0]["op"] != row["op"]:
        return False
    both = [(stood[0][a], row[a]) for a in ARGS if stood[0][a] is not None and row[a] is not None]
    return bool(both) and all(x == y for x, y in both)


def slow(rows: list[dict[str, Any]]) -> tuple[list[tuple[Any, ...]], list[tuple[Any, ...]], int]:
    """Return (seq, call, reentry) of each row, (seq, evidence, call, first) of the continuations, and the number of calls."""
    vcpus: dict[Any, Vcpu] = {}
    calls = losses = landings = 0
    least = 1 << 64
    entries, found = [], []
    for row in rows:
        kind, op, seq = row["kind"], row["op"], row["seq"]
        if kind == "lost":
            losses += 1
            continue
        if kind not in (*ENTRIES, "subcall", "sample", "return"):
            continue
        known = row["domid"] is not None and row["vcpu"] is not None
        v = vcpus.setdefault((row["domid"], row["vcpu"]) if known else ("pcpu", row["pcpu"]), Vcpu())
        at = (row["segment"], losses)
        owner = v.owner if v.owner is not None and v.owner.at == at else None
        said = read(row)
        call, again, evidence, first = None, False, None, None
        stood = v.stood if kind in ENTRIES and stands(v.stood, row, at) else None
        if kind == "sample":
            v.stood = (row, at) if row["on_insn"] else None
        elif kind == "return" or (kind in ENTRIES and op != 23):
            v.stood = None
        soon = False
        if kind in (*ENTRIES, "return"):
            before, v.last = v.last, (kind, op, at, row["tsc"], row["pcpu"])
            if before and before[0] in ENTRIES and before[1] == 23 and before[2] == at and before[4] == row["pcpu"]:
                gap = row["tsc"] - before[3]
                if gap > 0:
                    landings, least = landings + 1, min(least, gap)
                    soon = landings >= LANDINGS and gap // 4 <= least
        if kind in ENTRIES:
            now = Entry(said, at, op, -1, None if said.marked else seq, v.returns, rip=row["rip"])
            slot = 36 if op == 49 else op
            old = v.by_op.get(slot) if said.kind or op in MAY or op == 49 else None
            if old is not None and old.op == 49 and op == 36:
                old = None  # a domctl behind a redirected one is a new one
            if old is not None and op == 49 and v.real is old and (old.at, old.returns) == (at, v.returns):
                again = True
                now.call, now.first = old.call, old.first
            elif old is not None and stood is not None and v.real is old and (old.at, old.returns) == (at, v.returns):
                again = True
                now.call, now.first = old.call, old.first
                if op == 13:
                    now.multi = 2 if old.subs == (old.said.amount or 0) - (said.amount or 0) + 1 else 1
            elif old is not None and soon and not (said.kind and follows(old, now, v.real is old)) and lands(old, now):
                again = True
                now.call, now.first = old.call, old.first
            elif not said.kind:
                now.call, calls = calls, calls + 1
            elif old is not None and follows(old, now, v.real is old):
                again = True
                now.call, now.first = old.call, old.first
                if op == 13:
                    now.multi = 2 if old.subs == old.said.amount - said.amount + 1 else 1  # type: ignore[operator]
            else:
                now.call, calls = calls, calls + 1
            if said.kind or op in MAY or op == 49:
                v.by_op[slot] = now
            if op != 23:
                v.real = now
            else:
                for entry in v.by_op.values():
                    entry.irets += 1
            v.owner = now
            if op == 13:
                v.again = now.multi == 2
            call, first = now.call, now.first
            evidence = "proved" if said.marked else "inferred" if again else None
        elif kind == "subcall":
            if owner is not None and owner.op == 13:
                call = owner.call
            if said.marked:
                evidence = "proved"
            elif v.again and owner is not None and owner.op == 13 and v.last_sub == op:
                evidence = "inferred"
            v.again, v.last_sub = False, op
            if 13 in v.by_op:
                v.by_op[13].subs += 1
        elif kind == "return":
            call = None if owner is None else owner.call
            v.owner, v.returns = None, v.returns + 1
        else:
            call = None if owner is None else owner.call
            same = owner is not None and (owner.op == op or (owner.op, op) == (36, 49))
            first = owner.first if owner is not None and same else None
            mine, insn = owner is not None and owner.op == op, row["on_insn"]
            if insn is not False:
                if said.marked or (insn and mine):
                    evidence = "proved"
                elif insn or mine or (insn is None and row["rip"] is not None):
                    evidence = "inferred"
        entries.append((seq, call, again))
        if evidence:
            found.append((seq, evidence, call, first))
    return entries, found, calls


@st.composite
def row(draw: st.DrawFn) -> dict[str, Any]:
    kind = draw(st.sampled_from(["hypercall"] * 8 + ["subcall"] * 4 + ["sample", "return", "lost", "schedule", "vmmcall"]))
    out: dict[str, Any] = dict.fromkeys(EVENTS.names())
    out |= {"kind": kind, "caller": "pv64", "pcpu": draw(st.integers(0, 1)), "segment": int(draw(st.integers(0, 19)) == 0)}
    who = draw(st.sampled_from([(0, 0), (0, 0), (0, 1), (3, 0), (None, None)]))
    out["domid"], out["vcpu"] = who
    out["tsc"] = draw(st.sampled_from([0, 1, 2, 3, 4, 5, 9]))  # since the row before
    if kind == "lost":
        return out | {"op": 0x1F001, "result": 1}
    out["rip"] = draw(st.sampled_from([None, None, 0x1000, 0x2000]))
    op = draw(st.sampled_from([1, 12, 12, 13, 13, 13, 20, 20, 20, 17, 23, 23, 23, 26, 36, 49]))
    if kind == "subcall":
        op = draw(st.sampled_from([1, 12, 12, 17]))
    out["op"] = op
    if kind == "return":
        return out | {"result": 0}
    if kind == "sample":
        out["on_insn"] = draw(st.sampled_from([True, True, False, None]))
    full, n = draw(st.booleans()), draw(st.integers(0, 4))
    if op in ELEMENT:
        out["arg1"] = n | draw(st.sampled_from([0, FLAG]))
        out["arg0"] = 0x1000 if full else None
    elif op == 12 and full:
        out |= {"arg0": n << 6 | draw(st.sampled_from([1, 6])), "arg1": draw(st.sampled_from([0x1000, 0x1000, 0x2000]))}
    elif op == 13:
        out |= {"arg1": n, "arg0": 0x1000 + 64 * (4 - n) if full else None}
    elif op == 20:
        cmd = draw(st.sampled_from([0, 1, 5]))
        k = 32 * n if cmd == 1 else n
        out |= {"arg0": cmd, "arg2": k, "arg1": 0x1000 + GRANT[cmd] * ((128 if cmd == 1 else 4) - k) if full else None}
    return out


@st.composite
def upcall(draw: st.DrawFn) -> list[dict[str, Any]]:
    """A call, one or two irets, and perhaps the same call again right behind."""
    base = {"segment": 0, "pcpu": 0, "domid": 0, "vcpu": 0, "kind": "hypercall"}
    first = draw(row().filter(lambda r: r["kind"] == "hypercall" and r["op"] in MAY)) | base
    back = dict.fromkeys(EVENTS.names()) | base | {"caller": "pv64", "op": 23, "tsc": draw(st.integers(1, 3))}
    other = draw(row()) | base | {"op": 17, "arg0": None, "arg1": None, "arg2": None}
    again = draw(st.sampled_from([first, draw(row()) | base])) | {"tsc": draw(st.sampled_from([1, 2, 4, 9, 30]))}
    between = draw(st.sampled_from([[back], [back], [back, back], [other, back], [back, other]]))
    return [first, *between, again]


@st.composite
def stopped(draw: st.DrawFn) -> list[dict[str, Any]]:
    """A call, its vCPU stopped, something between, and perhaps the same registers again."""
    base = {"segment": 0, "pcpu": 0, "domid": 0, "vcpu": 0, "kind": "hypercall"}
    first = draw(row().filter(lambda r: r["kind"] == "hypercall" and r["op"] in MAY)) | base
    stands = draw(st.sampled_from([first, draw(row()) | base])) | {
        "kind": "sample",
        "on_insn": draw(st.sampled_from([True, False, None])),
    }
    again = draw(st.sampled_from([stands, draw(row()) | base])) | {"kind": "hypercall", "on_insn": None, "tsc": 9}
    return [first, *draw(st.lists(row(), max_size=1)), stands, *draw(st.lists(row(), max_size=2)), again]


def frame(rows: list[dict[str, Any]]) -> pl.DataFrame:
    return pl.DataFrame(rows, schema=EVENTS) if rows else empty(EVENTS)


@pytest.fixture(scope="module", autouse=True)
def few() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(links, "_LANDINGS", LANDINGS)
        yield


@pytest.mark.parametrize("size", [1, 2, 7, 1000])
@settings(max_examples=200, deadline=None)
@given(rows=st.lists(row(), max_size=24) | st.lists(upcall() | stopped(), max_size=6).map(lambda x: list(itertools.chain(*x))))
def test_twin(size: int, rows: list[dict[str, Any]]) -> None:
    at = itertools.accumulate(r["tsc"] for r in rows)
    rows = [r | {"seq": i, "offset": i, "tsc": t} for i, (r, t) in enumerate(zip(rows, at, strict=True))]
    entries, found, calls = slow(rows)
    stitcher = Stitcher(RELEASE)
    parts = [stitcher.feed(frame(rows[i : i + size])) for i in range(0, max(len(rows), 1), size)]
    got = pl.concat([p.entries for p in parts]).select("seq", "call", "reentry").rows()
    assert got == entries
    more = pl.concat([p.continuations for p in parts]).select("seq", "evidence", "call", "issued_seq").rows()
    assert more == found
    assert stitcher.calls == calls
    assert (stitcher.proved, stitcher.inferred) == tuple(sum(e == w for _, e, _, _ in found) for w in ("proved", "inferred"))


def event(kind: str, op: int, **more: Any) -> dict[str, Any]:
    base = dict.fromkeys(EVENTS.names()) | {"kind": kind, "op": op, "caller": "pv64", "pcpu": 0, "segment": 0}
    return base | {"domid": 0, "vcpu": 0} | more


COPY = {"arg0": 5, "arg1": 0x1000, "arg2": 4}
LESS = {"arg0": 5, "arg1": 0x1000 + 80, "arg2": 2}


@pytest.mark.parametrize(
    ("rows", "proved", "inferred"),
    [
        # A return ends the call, whatever comes between it and the next entry.
        ([event("hypercall", 20, **COPY), event("return", 20), event("hypercall", 23), event("hypercall", 20, **LESS)], 0, 0),
        ([event("hypercall", 20, **COPY), event("hypercall", 23), event("hypercall", 20, **LESS)], 0, 1),
        # Nothing left to do is no continuation.
        ([event("hypercall", 20, arg0=5, arg2=4), event("hypercall", 20, arg0=5, arg2=0)], 0, 0),
        ([event("hypercall", 13, arg1=1), event("subcall", 17), event("hypercall", 13, arg1=0)], 0, 0),
        # What was lost may hide the end of the call that a stopped vCPU, or a sub-call, seems to belong to.
        ([event("hypercall", 17), event("sample", 17, on_insn=True)], 1, 0),
        ([event("hypercall", 17), event("lost", 0x1F001), event("sample", 17, on_insn=True)], 0, 1),
        ([event("hypercall", 17), event("sample", 17, on_insn=True, segment=1)], 0, 1),
        ([event("hypercall", 13, arg1=4), event("subcall", 12), event("hypercall", 13, arg1=4), event("subcall", 12)], 0, 2),
        (
            [event("hypercall", 13, arg1=4), event("subcall", 12), event("hypercall", 13, arg1=4)]
            + [event("lost", 0x1F001), event("subcall", 12)],
            0,
            1,
        ),
        # The sub-call belongs to another multicall than the one that came back for it.
        (
            [event("hypercall", 13, arg1=4), event("subcall", 12), event("hypercall", 13, arg1=4)]
            + [event("hypercall", 13, arg1=3), event("subcall", 12)],
            0,
            1,
        ),
    ],
)
@pytest.mark.parametrize("size", [1, 2, 100])
def test_cases(size: int, rows: list[dict[str, Any]], proved: int, inferred: int) -> None:
    rows = [r | {"seq": i, "offset": i, "tsc": 100 * i} for i, r in enumerate(rows)]
    stitcher = Stitcher(RELEASE)
    for i in range(0, len(rows), size):
        stitcher.feed(frame(rows[i : i + size]))
    assert (stitcher.proved, stitcher.inferred) == (proved, inferred)
    assert sum(e == "proved" for _, e, _, _ in slow(rows)[1]) == proved
