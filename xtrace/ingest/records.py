"""From records to rows of ``schema.EVENTS``: which become events, and what their words mean."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from typing import TYPE_CHECKING, Any, Final

import numpy as np
import polars as pl
import pyarrow as pa

from xtrace.ingest.attribute import HVM32, HVM64, Batch, Pcpus, pack
from xtrace.ingest.layout import ACTIONS
from xtrace.schema import CALLERS, EVENTS, KINDS

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

    from numpy.typing import NDArray

__all__ = ("Rows", "Tally", "concat", "extract", "frame", "take", "tally")

#: Extracted events as columns of equal length. Always: segment, tsc, pcpu (dense), offset, code, flags, extra, who,
#: w0, w1, w2. Only where needed (0 elsewhere): w3 to w6, rip, mode, since.
Rows = dict[str, "NDArray[Any]"]

_CODE: Final = {name: code for code, name in enumerate(ACTIONS)}
_V1_32, _V1_64, _V2, _SUBCALL = (_CODE[n] for n in ("v1_32", "v1_64", "v2", "subcall"))
_VMMCALL, _SHUTDOWN, _LOST, _GAP = (_CODE[n] for n in ("vmmcall", "shutdown", "lost", "gap"))

_CALL: Final = np.isin(np.arange(len(ACTIONS)), [_V1_32, _V1_64, _V2, _SUBCALL, _VMMCALL])
_EVENT: Final = _CALL | np.isin(np.arange(len(ACTIONS)), [_SHUTDOWN, _LOST, _GAP])
_KIND: Final = np.zeros(len(ACTIONS), dtype=np.uint8)
for _code, _kind in (
    (_V1_32, "hypercall"),
    (_V1_64, "hypercall"),
    (_V2, "hypercall"),
    (_SUBCALL, "subcall"),
    (_VMMCALL, "vmmcall"),
    (_SHUTDOWN, "suspend"),
    (_LOST, "lost"),
    (_GAP, "lost"),
):
    _KIND[_code] = KINDS.index(_kind)

_OTHER: Final = np.isin(np.arange(len(ACTIONS)), [_SHUTDOWN, _LOST, _GAP])

#: SHUTDOWN_suspend (``RELEASE-4.22.0:xen/include/public/sched.h``).
_SUSPEND: Final = 2

# Bits of the flags column: there was a TSC; the vCPU is known; the rip is known.
_TIMED: Final = 1
_KNOWN: Final = 2
_RIP: Final = 4
_SINCE: Final = 8  # lost: when dropping began is known

_NULLS: Final = 1 << 19

_NUMBER: Final = 0xFFFFF  # TRC_PV_HYPERCALL_V2: bits 19..0 are the hypercall's number, 31..20 say which arguments follow


def extract(
    b: Batch, pcpus: Pcpus, offsets: NDArray[np.int64], needs: NDArray[np.uint8], dom_era: Callable[[], bool | None]
) -> tuple[Rows, NDArray[np.int64]]:
    """Turn the rows of a batch into events.

    Args:
        b: the batch; ``pcpus`` is brought up to date with it.
        pcpus: what is known of each pCPU.
        offsets: file offset of each row's record.
        needs: fewest extra words by code.
        dom_era: says whether HVM records of this file carry a dom/vcpu word (3.2, 3.3); None = it cannot tell.

    Returns:
        The events, and the rows of records that are too short for what they should say (left out).
    """
    tsc, segment, timed = pcpus.times(b)
    who, known = pcpus.identities(b)
    event = _EVENT.take(b.code)
    short = np.flatnonzero(b.extra < needs.take(b.code))
    if len(short):
        event[short] = False
    some = np.flatnonzero(b.code == _SHUTDOWN)
    if len(some):
        event[some] &= b.word(some, 2) == _SUSPEND
    at = np.flatnonzero(event)
    whole = len(at) == len(event)

    def pick(column: NDArray[Any]) -> NDArray[Any]:
        return column if whole else column.take(at)

    code = pick(b.code)
    rows: Rows = {
        "segment": pick(segment),
        "tsc": pick(tsc),
        "pcpu": pick(b.pcpus.astype(np.uint16).take(b.group)),
        "offset": pick(offsets),
        "code": code,
        "extra": pick(b.extra),
        "who": pick(who),
    }
    flags = pick(timed) * np.uint8(_TIMED)
    flags |= pick(known) * np.uint8(_KNOWN)
    rows["flags"] = flags
    for i in range(3):
        rows[f"w{i}"] = b.word(at, i)
    if len(at) and int(rows["extra"].max()) > 3:
        args = (code == _V2) | (code == _SUBCALL) | (code == _LOST)
        for i in range(3, int(np.max(rows["extra"], where=args, initial=0))):
            rows[f"w{i}"] = b.word(at, i)
    calls = np.flatnonzero(code == _VMMCALL)
    # Also where there is only something that comes between an exit of an earlier batch and a call of a later one.
    if len(calls) or b.code.max(initial=0) >= _CODE["exit32"] or pcpus.exit.any():
        _vmmcalls(rows, b, pcpus, at[calls], calls, dom_era)
    some = np.flatnonzero(_OTHER.take(code))
    if len(some):
        _others(rows, code, b.head.take(b.rows.take(at)) & 0xFFFFFFF, pcpus.before)
    return rows, short


def _vmmcalls(
    rows: Rows,
    b: Batch,
    pcpus: Pcpus,
    at: NDArray[np.int64],
    calls: NDArray[np.int64],
    dom_era: Callable[[], bool | None],
) -> None:
    """Settle which era's words the VMMCALLs have, and where they came from."""
    first, second = rows["w0"][calls], rows["w1"][calls]
    dom_word = rows["extra"][calls] >= 2
    if dom_word.any():
        era = dom_era()
        # 3.2 and 3.3: dom | vcpu << 16, eax. 3.4.0 to 4.0.1: eax and a surplus 0 (bb648dab86, 4276fde7f8).
        dom_word &= (second != 0) if era is None else era
    rip, known, mode = pcpus.exits(b, at, dom_word)
    if not len(calls):
        return
    rows["w0"][calls] = np.where(dom_word, second, first)
    rows["rip"] = np.zeros(len(rows["code"]), dtype=np.uint64)
    rows["rip"][calls] = rip
    rows["mode"] = np.zeros(len(rows["code"]), dtype=np.uint8)
    rows["mode"][calls] = mode
    rows["flags"][calls] |= (known * _RIP).astype(np.uint8)
    own = calls[dom_word]
    rows["who"][own] = pack(first[dom_word] & 0xFFFF, first[dom_word] >> 16)
    rows["flags"][own] |= _KNOWN


def _others(rows: Rows, code: NDArray[Any], events: NDArray[Any], before: NDArray[np.uint64]) -> None:
    """Put the event id of shutdown and lost records into w0, the count of the latter into w1, when it began into since.

    Shutdown records name the vCPU that shuts down, whoever runs. A gap began with the record before it (``before``).
    """
    some = np.flatnonzero(code == _SHUTDOWN)
    if len(some):
        rows["who"][some] = pack(rows["w0"][some], rows["w1"][some])
        rows["flags"][some] |= _KNOWN
        rows["w0"][some] = events[some]
    some = np.flatnonzero((code == _LOST) & (rows["extra"] >= 4))
    gaps = np.flatnonzero(code == _GAP)
    if len(some) or len(gaps):
        rows["since"] = np.zeros(len(code), dtype=np.uint64)
        if len(some):
            # From 3.4 (5c55dc3c8b): count, did | vid << 16, first_tsc low, high.
            rows["since"][some] = rows["w2"][some] | rows["w3"][some].astype(np.uint64) << np.uint64(32)
        rows["since"][gaps] = before
        rows["flags"][some] |= _SINCE
        rows["flags"][gaps] |= (rows["flags"][gaps] & _TIMED) * np.uint8(_SINCE)
    some = np.flatnonzero(code == _LOST)
    if len(some):
        rows["w1"][some] = rows["w0"][some]
        rows["w0"][some] = events[some]


def concat(parts: Iterable[Rows]) -> Rows:
    """Join rows; a column that some lack is 0 there."""
    parts = [part for part in parts if len(part["code"])] or list(parts)[:1]
    if len(parts) == 1:
        return parts[0]
    names = {name: column.dtype for part in parts for name, column in part.items()}
    return {
        name: np.concatenate([p[name] if name in p else np.zeros(len(p["code"]), dtype) for p in parts])
        for name, dtype in names.items()
    }


def take(rows: Rows, order: NDArray[np.int64]) -> Rows:
    """Return the rows ``order``."""
    return {name: column.take(order) for name, column in rows.items()}


@dataclass(frozen=True, slots=True)
class Tally:
    """How many events of each kind there are (names as in ``Ledger``)."""

    hypercalls: int
    subcalls: int
    vmmcalls: int
    lost_events: int
    lost_records: int
    unattributed: int
    seen: frozenset[int]  # codes


def tally(rows: Rows) -> Tally:
    """Count events by kind."""
    code, known = rows["code"], rows["flags"] & _KNOWN
    seen = np.bincount(code, minlength=len(ACTIONS)).tolist()
    blank = 0 if known.all() else int(np.count_nonzero(_CALL.take(code) & (known == 0)))
    lost = int(rows["w1"][code == _LOST].sum(dtype=np.uint64)) if seen[_LOST] else 0
    return Tally(
        hypercalls=seen[_V1_32] + seen[_V1_64] + seen[_V2],
        subcalls=seen[_SUBCALL],
        vmmcalls=seen[_VMMCALL],
        lost_events=seen[_LOST],
        lost_records=lost,
        unattributed=blank,
        seen=frozenset(c for c, n in enumerate(seen) if n),
    )


@cache
def _nulls(name: str) -> pl.Series:
    """Return a column of nulls, long enough for most frames, to be sliced."""
    return pl.repeat(None, _NULLS, dtype=EVENTS[name], eager=True).alias(name)


def _null(name: str, n: int) -> pl.Series:
    return _nulls(name).head(n) if n <= _NULLS else pl.repeat(None, n, dtype=EVENTS[name], eager=True).alias(name)


def frame(rows: Rows, counts: Tally, numbers: NDArray[np.uint32], seq: int, tsc_khz: int | None) -> pl.DataFrame:
    """Build a frame of ``schema.EVENTS``.

    Args:
        rows: events in their final order.
        counts: ``tally`` of them.
        numbers: pCPU number by dense number.
        seq: number of the first one.
        tsc_khz: TSC frequency, if known.
    """
    n = len(rows["code"])
    code, flags, w0, w1, w2 = (rows[name] for name in ("code", "flags", "w0", "w1", "w2"))
    seen = counts.seen
    timed, known = (flags & _TIMED) != 0, (flags & _KNOWN) != 0
    op, rip, has_rip, caller = w0, None, None, None
    arguments: dict[str, pl.Series] = {}

    v1 = _V1_32 in seen or _V1_64 in seen
    if v1 or _VMMCALL in seen:
        rip = rows.get("rip", np.zeros(0, dtype=np.uint64)).copy() if "rip" in rows else np.zeros(n, dtype=np.uint64)
        has_rip, caller = (flags & _RIP) != 0, np.full(n, 255, dtype=np.uint8)
    if _VMMCALL in seen and caller is not None:
        caller[rows["mode"] == HVM32] = CALLERS.index("hvm32")
        caller[rows["mode"] == HVM64] = CALLERS.index("hvm64")
    if v1 and rip is not None and has_rip is not None and caller is not None:
        wide, narrow = code == _V1_64, code == _V1_32
        op = np.where(wide, w2, np.where(narrow, w1, w0))
        np.copyto(rip, w0, where=narrow)
        np.copyto(rip, w0 | (w1.astype(np.uint64) << np.uint64(32)), where=wide)
        has_rip |= wide | narrow
        # 0x20f101 is written for 64-bit PV guests only, 0x20f001 for 32-bit ones (06a73c9f93).
        caller[wide], caller[narrow] = CALLERS.index("pv64"), CALLERS.index("pv32")
    if _V2 in seen or _SUBCALL in seen:
        op, arguments = _arguments(rows, op)
    result = None
    if _LOST in seen:
        result = _column("result", w1.astype(np.int64), code == _LOST)
    if "since" in rows:
        since = _column("arg0", rows["since"], (flags & _SINCE) != 0)
        arguments["arg0"] = since if "arg0" not in arguments else pl.select(pl.coalesce(since, arguments["arg0"])).to_series()
    if "cut" not in arguments:
        arguments["cut"] = pl.repeat(0, n, dtype=pl.UInt8, eager=True).alias("cut")

    who = rows["who"]
    columns: dict[str, pl.Series] = {
        "seq": pl.Series("seq", np.arange(seq, seq + n, dtype=np.uint64)),
        "offset": pl.Series("offset", rows["offset"].astype(np.uint64)),
        "tsc": _column("tsc", rows["tsc"], timed),
        "pcpu": pl.Series("pcpu", numbers.take(rows["pcpu"])),
        "segment": pl.Series("segment", rows["segment"]),
        "domid": _column("domid", (who >> 16).astype(np.uint16), known),
        "vcpu": _column("vcpu", who & np.uint32(0xFFFF), known),
        "kind": pl.Series("kind", _KIND.take(code).astype(np.uint32)).cat.to(EVENTS["kind"]),
        "op": _column("op", op, code != _GAP) if _GAP in seen else pl.Series("op", op),
        **arguments,
    }
    if tsc_khz:
        columns["time_ns"] = _column("time_ns", _nanoseconds(rows["tsc"], tsc_khz), timed)
    if caller is not None and rip is not None and has_rip is not None:
        columns["caller"] = _column("caller", caller.astype(np.uint32), caller != 255).cat.to(EVENTS["caller"])
        columns["rip"] = _column("rip", rip, has_rip)
    if result is not None:
        columns["result"] = result
    return pl.DataFrame([columns[name] if name in columns else _null(name, n) for name in EVENTS])


def _arguments(rows: Rows, op: NDArray[Any]) -> tuple[NDArray[Any], dict[str, pl.Series]]:
    """Split the words of V2 and sub-call records into number and arguments.

    Bits 20 + 2i and 21 + 2i of word 0 say how argument i was recorded: 0 not, 1 as 32 bits, 2 as 64 (never used so far).
    From 4.17 the record is written before any test of the number, so a number with bits 20 to 31 set looks like argument
    bits (``RELEASE-4.17.0:xen/arch/x86/pv/hypercall.c``). It has no argument words, so the word count gives it away:
    arguments are read only where bits and count agree, and a lone word that does not is the number as the guest gave it.
    """
    code, w0, extra = rows["code"], rows["w0"], rows["extra"]
    bits = (w0 >> 20).astype(np.uint16)
    fits = _TOTAL.take(bits) == extra
    ours = (code == _V2) | (code == _SUBCALL)
    agree = ours & fits
    number = np.where(ours & (fits | (extra > 1)), w0 & np.uint32(_NUMBER), op).astype(np.uint32, copy=False)
    used = np.flatnonzero(np.bincount(bits[agree] if not agree.all() else bits, minlength=1 << 12))
    out: dict[str, pl.Series] = {}
    for i in range(6):
        with_it = used[_WIDTH[i, used] > 0]
        if not len(with_it):
            continue
        places, widths = np.unique(_PLACE[i, with_it]).tolist(), np.unique(_WIDTH[i, with_it]).tolist()
        value = rows[f"w{places[0]}"].astype(np.uint64)  # what stands where there is none is masked
        for place in places[1:]:
            np.copyto(value, rows[f"w{place}"], where=(_PLACE[i] == place).take(bits))
        for place in places if 2 in widths else ():
            high = rows[f"w{place + 1}"].astype(np.uint64) << np.uint64(32)
            np.bitwise_or(value, high, out=value, where=((_PLACE[i] == place) & (_WIDTH[i] == 2)).take(bits))
        out[f"arg{i}"] = _column(f"arg{i}", value, agree & (_WIDTH[i] > 0).take(bits))
    out["cut"] = pl.Series("cut", _CUT.take(bits) * agree)
    return number, out


# By the twelve argument bits: width in words of each argument, the word it begins at, and the words of the whole record
# (none where a field is 3, which Xen reserves).
_FIELD: Final = np.arange(1 << 12)
_WIDTH: Final = np.stack([(_FIELD >> (2 * i)) & 3 for i in range(6)])
_PLACE: Final = 1 + np.cumsum(_WIDTH, axis=0) - _WIDTH
_CUT: Final = ((_WIDTH == 1) << np.arange(6)[:, None]).sum(axis=0).astype(np.uint8)
_TOTAL: Final = np.where((_WIDTH == 3).any(axis=0), 15, 1 + _WIDTH.sum(axis=0)).astype(np.uint8)


def _nanoseconds(tsc: NDArray[Any], khz: int) -> NDArray[np.int64]:
    """Convert without overflow: an hour of cycles times a million does not fit 64 bits."""
    cycles = tsc.view(np.int64)
    whole, rest = np.divmod(cycles, khz)
    out: NDArray[np.int64] = whole * 1_000_000 + rest * 1_000_000 // khz
    return out


_ARROW: Final = {
    np.dtype(np.uint8): pa.uint8(),
    np.dtype(np.uint16): pa.uint16(),
    np.dtype(np.uint32): pa.uint32(),
    np.dtype(np.uint64): pa.uint64(),
    np.dtype(np.int64): pa.int64(),
}


def _column(name: str, values: NDArray[Any], valid: NDArray[np.bool_]) -> pl.Series:
    """Make a series that is null where ``valid`` is not."""
    if valid.all():
        return pl.Series(name, values)
    bitmap = pa.py_buffer(np.packbits(valid, bitorder="little"))
    data = pa.py_buffer(np.ascontiguousarray(values))
    series = pl.from_arrow(pa.Array.from_buffers(_ARROW[values.dtype], len(values), [bitmap, data]))
    assert isinstance(series, pl.Series)
    return series.alias(name)
