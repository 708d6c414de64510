"""Reader of xtrace's own text log: one ``key=value`` record a line after the marker ``xtrace: ``.

Anything that can print a line can write it (a Xen printk, a bpftrace printf, a test kernel's console); the grammar
stands in docs/xtrace-log.md. Whatever precedes the marker on a line is skipped, lines without it are noise.

Rows keep the order of the file. Within a pCPU that is time order; a console or a trace buffer that mixes pCPUs writes
them nearly in order, and nothing here waits for a record that may still come, so that memory stays bounded.
"""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Final

import numpy as np
import polars as pl

from xtrace import schema
from xtrace.ingest.ahead import blocks_ahead
from xtrace.ingest.base import Ledger, Observed, ReadOptions, Shows
from xtrace.ingest.clock import Clock, nanoseconds
from xtrace.ingest.event_columns import Columns
from xtrace.ingest.lines import MAX_LINE, RawBlock, block_bytes, split
from xtrace.ingest.xtrace_log_fast import Plain, plain
from xtrace.ingest.xtrace_log_general import judged, marked, taken_apart
from xtrace.ingest.xtrace_log_grammar import CUT_IDS, KEY_ID, KINDS, LIMITS, Records, memory, merged
from xtrace.ingest.xtrace_log_headers import BadLineError, Updates, domain, header, pairs_of, show

if TYPE_CHECKING:
    from collections.abc import Iterator

    from numpy.typing import NDArray

    from xtrace.ingest.source import Source

__all__ = ("READER",)

_SNIFF: Final = re.compile(
    rb"(?m)(?:^|[^A-Za-z0-9_.\-/])xtrace:[ \t]+(?:header|domain|" + "|".join(KINDS).encode() + rb")(?=[ \t\r\n]|\Z)"
)

#: Who calls: for each caller, and the unknown one after them.
_HVM: Final = np.array([c in ("hvm64", "hvm32", "pvh64") for c in (*schema.CALLERS, "")])
_NARROW: Final = np.array([c in ("pv32", "hvm32", "arm32") for c in (*schema.CALLERS, "")])
#: Number of a kind's word on the line -> number of the kind.
_KIND_OF: Final = np.array([schema.KINDS.index("hypercall" if k == "call" else k) for k in KINDS], dtype=np.uint8)
_VMMCALL: Final = np.uint8(schema.KINDS.index("vmmcall"))
_CALL, _LOST = (np.uint8(list(KINDS).index(k)) for k in ("call", "lost"))
_IS_ENTRY: Final = np.array([k in ("hypercall", "vmmcall", "subcall") for k in schema.KINDS])
#: Column -> key, where one is the other.
_COLUMNS: Final = {
    "pcpu": "pcpu",
    "domid": "dom",
    "vcpu": "vcpu",
    "op": "op",
    **{f"arg{n}": f"a{n}" for n in range(6)},
    "rip": "rip",
    "on_insn": "on_insn",
}
_WHOLE: Final = tuple(KEY_ID[f"a{n}"] for n in range(6))

_MAX_NOTED_KEYS: Final = 256


class _Log:
    """An opened log; see `Recording`."""

    format = "xtrace-log"

    def __init__(self, source: Source, options: ReadOptions) -> None:
        self._source = source
        self._options = options
        self.ledger = Ledger()
        self.observed = Observed(layout="xtrace-log")
        self._seq = 0
        self._clock = Clock()
        self._khz = 0  # 0: unknown
        self._callers = np.full(LIMITS["dom"] + 1, -1, dtype=np.int16)  # by domain: caller of its last header line
        self._pcpus: set[int] = set()
        self._noted: set[str] = set()

    def batches(self) -> Iterator[pl.DataFrame]:
        """Yield frames of ``schema.EVENTS`` in the order of the file."""
        for block, lines in blocks_ahead(self._source, block_bytes(self._options), _plain):
            frame = self._events(block, lines)
            if frame is not None:
                yield from frame.iter_slices(self._options.batch_rows)
        if self._source.damage:
            self.ledger.truncated = True
            self.ledger.problem(self._source.damage, offset=self._source.size)

    # -- one block ---------------------------------------------------------------------------------------------

    def _events(self, block: RawBlock, plain: Plain) -> pl.DataFrame | None:
        raw, base, number, long, cut = block
        notes: list[tuple[int, int, str]] = []  # (line, offset, text), noted in the order of the lines at the end
        fits = plain.size <= MAX_LINE
        if not fits.all():
            far = np.flatnonzero(~fits).tolist()
            long = [*long, *((base + int(plain.start[i]), number + i, int(plain.size[i])) for i in far)]
        more = self._long(long, notes)
        self.ledger.lines += int(fits.sum()) + len(long)
        records, updates = plain.records, self._no_updates()
        try:
            rest = np.flatnonzero(~plain.taken & fits)
            if len(rest):
                text = split(raw)[0].gather(rest)
                frame = pl.DataFrame({"at": rest, "text": text, "line": rest.astype(np.uint64) + np.uint64(number)}).with_columns(
                    offset=plain.start[rest].astype(np.uint64) + np.uint64(base), size=plain.size[rest].astype(np.uint64)
                )
                lines = self._marked(frame, len(plain.size) - 1 if cut else -1, notes)
                general, refused = self._general(lines, updates, notes)
                records, more = merged(records, general), more + refused
            if not len(records.line):
                return None
            line = records.line.astype(np.uint64) + np.uint64(number)
            offset = plain.start[records.line].astype(np.uint64) + np.uint64(base)
            return self._assemble(records, line, offset, updates)
        finally:
            for dom, caller in zip(updates.caller_dom, updates.caller, strict=True):
                self._callers[dom] = caller
            for at, offset_, why in sorted(notes):
                self.ledger.problem(why, offset=offset_, line=at)
            self.ledger.problems_dropped += more

    def _general(self, lines: pl.DataFrame, updates: Updates, notes: list[tuple[int, int, str]]) -> tuple[Records, int]:
        """Read lines that are not plain; return their records, and how many refused ones were not noted."""
        self._headers(lines, updates, notes)
        lines = lines.filter(~pl.col("kind").is_in(["header", "domain"]).fill_null(value=False))
        words, bad = judged(lines)
        more = self._refuse(lines, bad, notes)
        lines = lines.with_row_index("row").join(bad, on="row", how="anti", maintain_order="left")
        words = words.join(bad, on="row", how="anti", maintain_order="left")
        self._unknown(lines, words, notes)
        return taken_apart(lines, words), more

    def _long(self, long: list[tuple[int, int, int]], notes: list[tuple[int, int, str]]) -> int:
        for offset, line, size in long[: Ledger.KEEP]:
            notes.append((line, offset, f"a line of {size} bytes is no record (more than {MAX_LINE}) and was skipped"))
        self.ledger.skipped_lines += len(long)
        self.ledger.skipped_bytes += sum(size for _, _, size in long)
        return len(long[Ledger.KEEP :])

    def _marked(self, frame: pl.DataFrame, cut: int, notes: list[tuple[int, int, str]]) -> pl.DataFrame:
        """Return the lines with a marker (kind, and the words after it); line ``cut`` of the block has no newline."""
        lines = marked(frame)
        self.ledger.noise_lines += len(frame) - len(lines)
        if len(lines) < len(frame) and len(self.ledger.unparsed) < Ledger.SHOWN:
            noise = frame.join(lines, on="at", how="anti", maintain_order="left").filter(pl.col("text").str.contains(r"\S"))
            for line, text in noise.head(Ledger.SHOWN - len(self.ledger.unparsed)).select("line", "text").iter_rows():
                self.ledger.unparsed.append((line, text.strip()[:60]))
        if len(lines) and lines["at"][-1] == cut and not lines["ended"][-1]:
            # Its last value may have lost digits: 0x1 of 0x1000 would be believed.
            line, offset, size = (int(lines[name][-1]) for name in ("line", "offset", "size"))
            notes.append((line, offset, "the last line is cut off (no newline, no final `;`) and was not used"))
            self.ledger.truncated = True
            self.ledger.skipped_bytes += size
            lines = lines[:-1]
        return lines.with_columns(kind=pl.col("words").list.get(1, null_on_oob=True), words=pl.col("words").list.slice(2))

    def _no_updates(self) -> Updates:
        return Updates([0], [self._khz], [], [], [])

    def _headers(self, lines: pl.DataFrame, updates: Updates, notes: list[tuple[int, int, str]]) -> None:
        """Read header and domain lines (few, so one at a time) and add what they change from which line on."""
        for kind, line, offset, words in (
            lines.filter(pl.col("kind").is_in(["header", "domain"])).select("kind", "line", "offset", "words").iter_rows()
        ):
            try:
                pairs = pairs_of(words)
                (header if kind == "header" else domain)(pairs, line, self.observed, updates)
            except BadLineError as exc:
                self.ledger.skipped_lines += 1
                notes.append((line, offset, f"{kind} line not understood: {exc}"))
                continue
            known = ("release", "arch", "tsc_khz") if kind == "header" else ("id", "caller", "role", "name")
            strange = [key for key in pairs if key not in known and self._note(key)]
            notes.extend((line, offset, f"unknown key {show(key)} was ignored") for key in strange)
        self._khz = updates.khz[-1]

    def _refuse(self, lines: pl.DataFrame, bad: pl.DataFrame, notes: list[tuple[int, int, str]]) -> int:
        """Count the lines that are not understood and note the first few; return how many are left unnoted."""
        self.ledger.skipped_lines += len(bad)
        first = bad.sort("row").head(Ledger.KEEP)
        places = lines.with_row_index("row").select("row", "line", "offset")
        for line, offset, why in first.join(places, on="row").select("line", "offset", "why").iter_rows():
            notes.append((line, offset, f"record not understood: {why}"))
        return len(bad) - len(first)

    def _unknown(self, lines: pl.DataFrame, words: pl.DataFrame, notes: list[tuple[int, int, str]]) -> None:
        strange = words.filter(pl.col("id").is_null()).unique("key", keep="first", maintain_order=True)
        if len(self._noted) >= _MAX_NOTED_KEYS or not len(strange):
            return
        places = lines.select("row", "line", "offset")
        for key, line, offset in (
            strange.head(_MAX_NOTED_KEYS * 2).join(places, on="row", maintain_order="left").select("key", "line", "offset")
        ).iter_rows():
            if self._note(key):
                notes.append((line, offset, f"unknown key {show(key)} was ignored"))

    def _note(self, key: str) -> bool:
        if key in self._noted or len(self._noted) >= _MAX_NOTED_KEYS:
            return False
        self._noted.add(key)
        return True

    def _assemble(self, records: Records, line: NDArray[np.uint64], offset: NDArray[np.uint64], updates: Updates) -> pl.DataFrame:
        n = len(line)
        # One row a key, one column a record; each value is written once.
        values, there = np.zeros((len(LIMITS), n), dtype=np.uint64), np.zeros((len(LIMITS), n), dtype=bool)
        place = records.key.astype(np.intp) * n + records.at
        values.reshape(-1)[place], there.reshape(-1)[place] = records.value, True
        cut = np.zeros(n, dtype=np.uint8)
        for bit, (key, whole) in enumerate(zip(CUT_IDS, _WHOLE, strict=True)):
            if there[key].any():
                values[whole] |= values[key]
                there[whole] |= there[key]
                cut |= there[key] * np.uint8(1 << bit)
        caller, called = self._callers_of(line, values, there, updates)
        kind, result, ended = self._kinds(records.kind, caller, called, values, there)
        self._count(kind, result, values, there)
        tsc, segment = self._clock.advance(self._groups(values, there), _masked("tsc", values, there))
        if tsc.null_count() < n:
            known = tsc.drop_nulls()
            self.observed.first_tsc = known[0] if self.observed.first_tsc is None else self.observed.first_tsc
            self.observed.last_tsc = known[-1]
        times, timed = self._times(tsc, line, values, there, updates)

        columns = Columns(n)
        columns.put("seq", np.arange(self._seq - n, self._seq, dtype=np.uint64))
        columns.put("offset", offset)
        columns.put("line", line)
        columns.put("time_ns", times, timed)
        columns.put("caller", caller, called)
        columns.put("kind", kind)
        columns.put("cut", cut)
        columns.put("result", result, ended)
        for name, key_ in _COLUMNS.items():
            columns.put(name, values[KEY_ID[key_]], there[KEY_ID[key_]])
        return columns.frame(tsc=tsc, segment=segment, memory=memory(records, n))

    def _callers_of(
        self, line: NDArray[np.uint64], values: NDArray[np.uint64], there: NDArray[np.bool_], updates: Updates
    ) -> tuple[NDArray[np.uint8], NDArray[np.bool_]]:
        """Return the caller of each record, and whether there is one: its own, else that of the domain line before it."""
        mine, domid = there[KEY_ID["caller"]], values[KEY_ID["dom"]]
        before = self._callers[domid]
        if updates.caller:
            known = pl.DataFrame(
                {
                    "line": pl.Series(updates.caller_line, dtype=pl.UInt64),
                    "domid": pl.Series(updates.caller_dom, dtype=pl.UInt64),
                    "said": pl.Series(updates.caller, dtype=pl.Int16),
                }
            )
            asked = pl.DataFrame({"line": line, "domid": domid})
            joined = asked.join_asof(known, on="line", by="domid", strategy="backward", check_sortedness=False)
            said = joined["said"].fill_null(-1).to_numpy()
            before = np.where(said >= 0, said, before)
        said_before = there[KEY_ID["dom"]] & (before >= 0)
        caller = np.where(mine, values[KEY_ID["caller"]].astype(np.int16), before).astype(np.uint8)
        return caller, mine | said_before

    @staticmethod
    def _kinds(
        word: NDArray[np.uint8],
        caller: NDArray[np.uint8],
        called: NDArray[np.bool_],
        values: NDArray[np.uint64],
        there: NDArray[np.bool_],
    ) -> tuple[NDArray[np.uint8], NDArray[np.int64], NDArray[np.bool_]]:
        """Return the kind of each record (number in ``schema.KINDS``), its result, and whether there is one."""
        of = np.where(called, caller, len(schema.CALLERS))
        kind = np.where((word == _CALL) & _HVM[of], _VMMCALL, _KIND_OF[word])
        result, has = values[KEY_ID["result"]].view(np.int64), there[KEY_ID["result"]]
        # A 32-bit caller's eax, printed as unsigned, is the same -14 as one printed signed.
        unsigned = _NARROW[of] & (result >= 1 << 31) & (result < 1 << 32)
        if unsigned.any():
            result = np.where(unsigned, result - (1 << 32), result)
        lost = word == _LOST
        if lost.any():
            result = np.where(lost, values[KEY_ID["n"]].view(np.int64), result)
            has = np.where(lost, there[KEY_ID["n"]], has)
        return kind, result, has

    @staticmethod
    def _groups(values: NDArray[np.uint64], there: NDArray[np.bool_]) -> pl.Series:
        """Which clock a row follows: its pCPU; without one its vCPU, whose own records are in order at least."""
        domid, vcpu = (np.where(there[KEY_ID[k]], values[KEY_ID[k]], np.uint64(1 << 16)) for k in ("dom", "vcpu"))
        other = domid * np.uint64(1 << 24) + vcpu + np.uint64(1 << 48)
        return pl.Series(np.where(there[KEY_ID["pcpu"]], values[KEY_ID["pcpu"]], other))

    def _times(
        self,
        tsc: pl.Series,
        line: NDArray[np.uint64],
        values: NDArray[np.uint64],
        there: NDArray[np.bool_],
        updates: Updates,
    ) -> tuple[NDArray[np.int64], NDArray[np.bool_]]:
        """Return the time of each record, and whether there is one: its own, else counted from its TSC."""
        own, said = values[KEY_ID["time_ns"]].view(np.int64), there[KEY_ID["time_ns"]]
        if self._options.tsc_khz:
            khz = np.full(len(line), self._options.tsc_khz, dtype=np.uint64)
        else:
            since = np.array(updates.khz_line, dtype=np.uint64)
            khz = np.array(updates.khz, dtype=np.uint64)[np.searchsorted(since, line, "right") - 1]
        if said.all() or not khz.any():
            return own, said
        counted = nanoseconds(tsc.fill_null(0).to_numpy(), khz, tsc.is_not_null().to_numpy())
        known = counted.is_not_null().to_numpy()
        return np.where(said, own, counted.fill_null(0).to_numpy()), said | known

    def _count(
        self, kind: NDArray[np.uint8], result: NDArray[np.int64], values: NDArray[np.uint64], there: NDArray[np.bool_]
    ) -> None:
        ledger, observed = self.ledger, self.observed
        self._seq += len(kind)
        ledger.records += len(kind)
        kinds = dict(zip(schema.KINDS, np.bincount(kind, minlength=len(schema.KINDS)).tolist(), strict=True))
        ledger.hypercalls += kinds["hypercall"]
        ledger.vmmcalls += kinds["vmmcall"]
        ledger.subcalls += kinds["subcall"]
        ledger.samples += kinds["sample"]
        if kinds["lost"]:
            ledger.lost_events += kinds["lost"]
            lost = np.flatnonzero(kind == schema.KINDS.index("lost"))
            ledger.lost_records += sum(values[KEY_ID["n"]][lost].tolist())  # 0 where it is not said
        unknown = ~(there[KEY_ID["dom"]] | there[KEY_ID["vcpu"]]) & _IS_ENTRY[kind]
        ledger.unattributed += int(np.count_nonzero(unknown))
        pcpu = values[KEY_ID["pcpu"]].view(np.int64)[there[KEY_ID["pcpu"]]]
        if len(pcpu):
            self._pcpus.update(np.flatnonzero(np.bincount(pcpu)).tolist())
        observed.pcpus = len(self._pcpus)


def _plain(block: RawBlock) -> Plain:
    return plain(block[0], MAX_LINE, cut=block[4])


def _masked(key: str, values: NDArray[np.uint64], there: NDArray[np.bool_]) -> pl.Series:
    """Return the values of a key; null where a record has none."""
    series, has = pl.Series(key, values[KEY_ID[key]]), there[KEY_ID[key]]
    return series if has.all() else pl.select(pl.when(pl.Series(has)).then(series).alias(key)).to_series()


class _Reader:
    """xtrace's own text log; see `Reader`."""

    name = "xtrace-log"
    title = "xtrace text log (docs/xtrace-log.md)"
    shows = Shows(
        op="yes",
        subop="yes, where arg0 is written",
        arguments="yes, those that are written",
        rip="yes, where written",
        who="yes, where written",
        time="TSC or nanoseconds, where written",
        memory="fields that are written",
        result="yes, in return lines",
        proved="progress in the registers or fields; a sample on the instruction of a call in progress",
        inferred="counts and pointers from one entry to the next",
        registers={"*": (0, 1, 2, 3, 4, 5)},
        samples=True,
        fields=True,
    )

    streams = True

    def sniff(self, head: bytes) -> int:
        """Say how sure this reader is: 95 if a known kind of line follows the marker anywhere in ``head``."""
        return 95 if _SNIFF.search(head) else 0

    def open(self, source: Source, options: ReadOptions) -> _Log:
        """Open ``source``; nothing is read before the batches are."""
        return _Log(source, options)


READER: Final = _Reader()
