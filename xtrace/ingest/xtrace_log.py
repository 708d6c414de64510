"""Reader of xtrace's own text log: one ``key=value`` record a line after the marker ``xtrace: ``.

Anything that can print a line can write it (a Xen printk, a bpftrace printf, a test kernel's console); the grammar
stands in docs/xtrace-log.md. Whatever precedes the marker on a line is skipped, lines without it are noise.

Rows keep the order of the file. Within a pCPU that is time order; a console or a trace buffer that mixes pCPUs writes
them nearly in order, and nothing here waits for a record that may still come, so that memory stays bounded.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

import numpy as np
import polars as pl

from xtrace import schema
from xtrace.ingest.base import Domain, Ledger, Observed, ReadOptions
from xtrace.ingest.clock import Clock, nanoseconds
from xtrace.ingest.hypercalls import HYPERCALLS
from xtrace.ingest.lines import DEC, HEX, MAX_LINE, LineBlock, block_bytes, line_blocks, magnitudes

if TYPE_CHECKING:
    from collections.abc import Iterator

    from numpy.typing import NDArray

    from xtrace.ingest.source import Source

__all__ = ("READER",)

# The number before the marker must not be part of a longer word: "myxtrace:", "a.xtrace:" and "/xtrace:" are not it.
_BEFORE: Final = r"(?:^|[^A-Za-z0-9_.\-/])"
_MARKER: Final = rf"(?s){_BEFORE}(xtrace:(?:[ \t].*)?)$"
_WORD: Final = r"[^ \t\r\n]+"
_FIELD: Final = r"^mem\.[a-z_][a-z0-9_]*(?:\.[a-z0-9_]+)*$"
_END: Final = ";"

#: Word on the line -> kind of event. ``call`` becomes hypercall or vmmcall by its caller.
_KINDS: Final = {
    "call": "call",
    **{k: k for k in ("hypercall", "vmmcall", "subcall", "return", "sample", "schedule", "suspend", "resume", "lost")},
}
_ENTRIES: Final = ("call", "hypercall", "vmmcall", "subcall")
_SNIFF: Final = re.compile(
    rb"(?m)(?:^|[^A-Za-z0-9_.\-/])xtrace:[ \t]+(?:header|domain|" + "|".join(_KINDS).encode() + rb")(?=[ \t\r\n]|\Z)"
)

_U64: Final = (1 << 64) - 1
_I63: Final = (1 << 63) - 1
#: Key -> largest value. Processor and domain numbers fit 16 bits in every Xen, which bounds what is remembered.
_LIMITS: Final[dict[str, int]] = {
    "tsc": _U64,
    "time_ns": _I63,
    "pcpu": 0xFFFF,
    "dom": 0xFFFF,
    "vcpu": 0xFFFF,
    "caller": len(schema.CALLERS) - 1,
    "op": 0xFFFFFFFF,
    **{f"a{n}": _U64 for n in range(6)},
    **{f"a{n}~": 0xFFFFFFFF for n in range(6)},
    "rip": _U64,
    "on_insn": 1,
    "result": _U64,
    "n": _I63,
}
_KEY_ID: Final = {key: i for i, key in enumerate(_LIMITS)}
_MEM: Final = len(_KEY_ID)  # id of every mem.FIELD key
_CUT_IDS: Final = tuple(_KEY_ID[f"a{n}~"] for n in range(6))

_CALLER_ID: Final = {name: i for i, name in enumerate(schema.CALLERS)}
_HVM: Final = ("hvm64", "hvm32", "pvh64")
_NARROW: Final = ("pv32", "hvm32", "arm32")

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
        self._callers: dict[int, int] = {}  # domain -> caller of its last header line
        self._pcpus: set[int] = set()
        self._noted: set[str] = set()

    def batches(self) -> Iterator[pl.DataFrame]:
        """Yield frames of ``schema.EVENTS`` in the order of the file."""
        for block in line_blocks(self._source.file, block_bytes(self._options)):
            frame = self._events(block)
            if frame is not None:
                yield from frame.iter_slices(self._options.batch_rows)
        if self._source.damage:
            self.ledger.truncated = True
            self.ledger.problem(self._source.damage, offset=self._source.size)

    # -- one block ---------------------------------------------------------------------------------------------

    def _events(self, block: LineBlock) -> pl.DataFrame | None:
        notes: list[tuple[int, int, str]] = []  # (line, offset, text), noted in the order of the lines at the end
        more = self._long(block, notes)
        lines = self._marked(block, notes)
        try:
            if not len(lines):
                return None
            updates = self._headers(lines, notes)
            lines = lines.filter(~pl.col("kind").is_in(["header", "domain"]).fill_null(value=False))
            if not len(lines):
                return None
            words, bad = self._words(lines)
            more += self._refuse(lines, bad, notes)
            lines = lines.with_row_index("row").join(bad, on="row", how="anti", maintain_order="left")
            if not len(lines):
                return None
            words = words.join(bad, on="row", how="anti", maintain_order="left")
            self._unknown(lines, words, notes)
            return self._assemble(lines, words, updates)
        finally:
            for line, offset, text in sorted(notes):
                self.ledger.problem(text, offset=offset, line=line)
            self.ledger.problems_dropped += more

    def _long(self, block: LineBlock, notes: list[tuple[int, int, str]]) -> int:
        for offset, line, size in block.long[: Ledger.KEEP]:
            notes.append((line, offset, f"a line of {size} bytes is no record (more than {MAX_LINE}) and was skipped"))
        self.ledger.skipped_lines += len(block.long)
        self.ledger.skipped_bytes += sum(size for _, _, size in block.long)
        return len(block.long[Ledger.KEEP :])

    def _marked(self, block: LineBlock, notes: list[tuple[int, int, str]]) -> pl.DataFrame:
        """Return the lines with a marker: line, offset, kind, words (what follows the kind, without the end mark)."""
        frame = pl.DataFrame({"text": block.text, "line": block.line, "offset": block.offset, "size": block.size})
        total = len(frame)
        frame = (
            frame.filter(pl.col("text").str.contains("xtrace:", literal=True))
            .with_columns(words=pl.col("text").str.extract(_MARKER, 1).str.extract_all(_WORD))
            .filter(pl.col("words").list.len() > 0)
            .drop("text")
            .with_columns(ended=pl.col("words").list.last() == _END)
        )
        self.ledger.noise_lines += total - len(frame)
        if block.cut and len(frame) and frame["line"][-1] == block.line[-1] and not frame["ended"][-1]:
            # Its last value may have lost digits: 0x1 of 0x1000 would be believed.
            line, offset, size = (int(frame[name][-1]) for name in ("line", "offset", "size"))
            notes.append((line, offset, "the last line is cut off (no newline, no final `;`) and was not used"))
            self.ledger.truncated = True
            self.ledger.skipped_bytes += size
            frame = frame[:-1]
        frame = frame.with_columns(words=pl.col("words").list.head(pl.col("words").list.len() - pl.col("ended")))
        return frame.select(
            "line", "offset", kind=pl.col("words").list.get(1, null_on_oob=True), words=pl.col("words").list.slice(2)
        )

    def _headers(self, lines: pl.DataFrame, notes: list[tuple[int, int, str]]) -> _Updates:
        """Read header and domain lines (few, so one at a time) and return what they change from which line on."""
        updates = _Updates([0], [self._khz], [0] * len(self._callers), list(self._callers), list(self._callers.values()))
        for kind, line, offset, words in (
            lines.filter(pl.col("kind").is_in(["header", "domain"])).select("kind", "line", "offset", "words").iter_rows()
        ):
            try:
                pairs = _pairs(words)
                self._header(pairs, line, updates) if kind == "header" else self._domain(pairs, line, updates)
            except _BadLineError as exc:
                self.ledger.skipped_lines += 1
                notes.append((line, offset, f"{kind} line not understood: {exc}"))
                continue
            known = ("release", "arch", "tsc_khz") if kind == "header" else ("id", "caller", "role", "name")
            strange = [key for key in pairs if key not in known and self._note(key)]
            notes.extend((line, offset, f"unknown key {_show(key)} was ignored") for key in strange)
        return updates

    def _header(self, pairs: dict[str, str], line: int, updates: _Updates) -> None:
        khz = _number(pairs["tsc_khz"], 1, 10**9, "tsc_khz") if "tsc_khz" in pairs else None
        for key in ("release", "arch"):
            old, new = getattr(self.observed, key), pairs.get(key)
            if old is not None and new is not None and new != old:
                raise _BadLineError(f"{key} is {_show(new)} here and was {_show(old)} before")
        if khz is not None and self.observed.tsc_khz not in (None, khz):
            raise _BadLineError(f"tsc_khz is {khz} here and was {self.observed.tsc_khz} before")
        self.observed.release = pairs.get("release", self.observed.release)
        self.observed.arch = pairs.get("arch", self.observed.arch)
        if khz is not None:
            self.observed.tsc_khz = self._khz = khz
            updates.khz_line.append(line)
            updates.khz.append(khz)

    def _domain(self, pairs: dict[str, str], line: int, updates: _Updates) -> None:
        if "id" not in pairs:
            raise _BadLineError("no id=")
        domid = _number(pairs["id"], 0, _LIMITS["dom"], "id")
        caller = pairs.get("caller")
        if caller is not None and caller not in _CALLER_ID:
            raise _BadLineError(f"caller {_show(caller)} is none of {', '.join(schema.CALLERS)}")
        domain = self.observed.domains.setdefault(domid, Domain())
        domain.role = pairs.get("role", domain.role)
        domain.name = pairs.get("name", domain.name)
        if caller is not None:
            domain.caller = caller
            self._callers[domid] = _CALLER_ID[caller]
            updates.caller_line.append(line)
            updates.caller_dom.append(domid)
            updates.caller.append(_CALLER_ID[caller])

    def _words(self, lines: pl.DataFrame) -> tuple[pl.DataFrame, pl.DataFrame]:
        """Split records into words and judge each.

        Returns:
            words: row (UInt32), key, id (UInt8, null = unknown key), value (UInt64 magnitude), neg, one row a word;
            bad: row, why (String), one row a line that is not understood.
        """
        rows = lines.with_row_index("row")
        words = (
            rows.select("row", word="words")
            .explode("word")
            .drop_nulls("word")
            .with_columns(pl.col("word").str.splitn("=", 2).struct.rename_fields(["key", "text"]).struct.unnest())
            .with_columns(
                id=pl.when(pl.col("key").str.contains(_FIELD))
                .then(pl.lit(_MEM))
                .otherwise(pl.col("key").replace_strict(_KEY_ID, default=None, return_dtype=pl.Int32))
                .cast(pl.UInt8),
                neg=pl.col("text").str.starts_with("-"),
            )
            .with_columns(value=magnitudes(pl.col("text").str.strip_prefix("-")))
        )
        name = pl.col("text").str.strip_prefix("__HYPERVISOR_")
        words = words.with_columns(
            value=pl.when(pl.col("id") == _KEY_ID["op"])
            .then(pl.coalesce("value", name.replace_strict(HYPERCALLS, default=None, return_dtype=pl.UInt64)))
            .when(pl.col("id") == _KEY_ID["caller"])
            .then(pl.col("text").replace_strict(_CALLER_ID, default=None, return_dtype=pl.UInt64))
            .otherwise("value")
        )
        limit = pl.col("id").replace_strict(
            {**{_KEY_ID[key]: limit for key, limit in _LIMITS.items()}, _MEM: _U64},
            default=None,
            return_dtype=pl.UInt64,
        )
        signed = pl.col("id").is_in([_KEY_ID["result"], _MEM])
        # a1= and a1~= are the same argument.
        same = pl.struct("row", pl.col("key").str.strip_suffix("~")).is_duplicated() & pl.col("id").is_not_null()
        shown = pl.col("word").str.slice(0, 60)
        words = words.with_columns(
            why=pl.when(pl.col("text").is_null() | (pl.col("key") == ""))
            .then(pl.format("`{}` is not key=value", shown))
            .when(same)
            .then(pl.format("`{}` is given twice", pl.col("key").str.slice(0, 60)))
            .when(pl.col("id").is_null())
            .then(None)
            .when((pl.col("id") == _KEY_ID["op"]) & pl.col("value").is_null())
            .then(pl.format("`{}` is no hypercall that is known; give its number", shown))
            .when(pl.col("value").is_null())
            .then(pl.format("`{}` is not a value", shown))
            .when(pl.col("neg") & ~signed)
            .then(pl.format("`{}` cannot be negative", shown))
            .when((pl.col("value") > limit) | (pl.col("neg") & (pl.col("value") > 1 << 63)))
            .then(pl.format("`{}` is out of range", shown))
        )
        kind = pl.col("kind")
        unknown = ~kind.is_in(list(_KINDS)).fill_null(value=False)
        whole = rows.select(
            "row",
            why=pl.when(kind.is_null())
            .then(pl.lit("nothing follows the marker"))
            .when(unknown)
            .then(pl.format("`{}` is no kind of record", kind.str.slice(0, 60)))
            .when(kind.is_in(_ENTRIES) & ~pl.col("row").is_in(words.filter(id=_KEY_ID["op"])["row"].implode()))
            .then(pl.format("a {} without op=", kind)),
        )
        bad = pl.concat([whole, words.select("row", "why")]).drop_nulls("why").unique("row", keep="first", maintain_order=True)
        return words.select("row", "key", "id", "value", "neg"), bad

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
                notes.append((line, offset, f"unknown key {_show(key)} was ignored"))

    def _note(self, key: str) -> bool:
        if key in self._noted or len(self._noted) >= _MAX_NOTED_KEYS:
            return False
        self._noted.add(key)
        return True

    def _assemble(self, lines: pl.DataFrame, words: pl.DataFrame, updates: _Updates) -> pl.DataFrame:
        n = len(lines)
        # Rows that were refused leave gaps in the row numbers.
        place = lines["row"].to_numpy()
        at = np.searchsorted(place, words["row"].to_numpy())
        ids = words["id"].fill_null(255).to_numpy()
        value = words["value"].fill_null(0).to_numpy()
        # Two's complement, as Xen's unsigned fields hold a negative errno.
        value = np.where(words["neg"].fill_null(value=False).to_numpy(), ~value + np.uint64(1), value)

        def column(key: str, dtype: pl.DataType | type[pl.DataType]) -> pl.Series:
            values, has = np.zeros(n, dtype=np.uint64), np.zeros(n, dtype=bool)
            mine = ids == _KEY_ID[key]
            values[at[mine]], has[at[mine]] = value[mine], True
            bits = values.view(np.int64) if dtype == pl.Int64 else values
            return pl.select(pl.when(pl.Series(has)).then(pl.Series(bits)).cast(dtype).alias(key)).to_series()

        cut = np.zeros(n, dtype=np.uint8)
        for bit, key_id in enumerate(_CUT_IDS):
            cut[at[ids == key_id]] |= np.uint8(1 << bit)
        args = {
            f"arg{k}": pl.select(pl.coalesce(column(f"a{k}", pl.UInt64), column(f"a{k}~", pl.UInt64))).to_series() for k in range(6)
        }
        frame = pl.DataFrame(
            {
                "seq": pl.Series(np.arange(self._seq, self._seq + n, dtype=np.uint64)),
                "offset": lines["offset"],
                "line": lines["line"],
                "tsc": column("tsc", pl.UInt64),
                "time_ns": column("time_ns", pl.Int64),
                "pcpu": column("pcpu", pl.UInt32),
                "domid": column("dom", pl.UInt16),
                "vcpu": column("vcpu", pl.UInt32),
                "caller_id": column("caller", pl.Int64),
                "word": lines["kind"],
                "op": column("op", pl.UInt32),
                **args,
                "cut": pl.Series(cut),
                "rip": column("rip", pl.UInt64),
                "on_insn": column("on_insn", pl.Boolean),
                "result": column("result", pl.Int64),
                "n": column("n", pl.Int64),
            }
        )
        frame = self._callers_of(frame, updates)
        caller = pl.col("caller")
        frame = frame.with_columns(
            kind=pl.when(pl.col("word") != "call")
            .then("word")
            .when(caller.cast(pl.String).is_in(_HVM))
            .then(pl.lit("vmmcall"))
            .otherwise(pl.lit("hypercall"))
            .cast(schema.EVENTS["kind"]),
            # A 32-bit caller's eax, printed as unsigned, is the same -14 as one printed signed.
            result=pl.when(pl.col("word") == "lost")
            .then("n")
            .when(caller.cast(pl.String).is_in(_NARROW) & pl.col("result").is_between(1 << 31, (1 << 32) - 1))
            .then(pl.col("result") - (1 << 32))
            .otherwise("result"),
            memory=self._memory(at, words, value, n),
        )
        tsc, segment = self._clock.advance(self._groups(frame), frame["tsc"])
        frame = frame.with_columns(tsc=tsc, segment=segment)
        frame = frame.with_columns(time_ns=pl.coalesce("time_ns", self._times(frame, updates)))
        self._count(frame)
        return frame.select(schema.EVENTS.names())

    def _callers_of(self, frame: pl.DataFrame, updates: _Updates) -> pl.DataFrame:
        """Add caller: the record's own, else that of the domain line before it."""
        if updates.caller:
            known = pl.DataFrame(
                {
                    "line": pl.Series(updates.caller_line, dtype=pl.UInt64),
                    "domid": pl.Series(updates.caller_dom, dtype=pl.UInt16),
                    "said": pl.Series(updates.caller, dtype=pl.Int64),
                }
            )
            frame = frame.join_asof(known, on="line", by="domid", strategy="backward", check_sortedness=False)
            frame = frame.with_columns(caller_id=pl.coalesce("caller_id", "said"))
        names = dict(enumerate(schema.CALLERS))
        return frame.with_columns(
            caller=pl.col("caller_id").replace_strict(names, default=None, return_dtype=schema.EVENTS["caller"])
        )

    @staticmethod
    def _groups(frame: pl.DataFrame) -> pl.Series:
        """Which clock a row follows: its pCPU; without one its vCPU, whose own records are in order at least."""
        domid, vcpu = (pl.col(name).cast(pl.UInt64).fill_null(1 << 16) for name in ("domid", "vcpu"))
        return frame.select(
            pl.when(pl.col("pcpu").is_not_null())
            .then(pl.col("pcpu").cast(pl.UInt64))
            .otherwise(domid * (1 << 24) + vcpu + (1 << 48))
        ).to_series()

    @staticmethod
    def _memory(at: NDArray[np.int64], words: pl.DataFrame, value: NDArray[np.uint64], n: int) -> pl.Series:
        mine = (words["id"] == _MEM).fill_null(value=False)
        found = (
            pl.DataFrame({"at": pl.Series(at, dtype=pl.Int64), "field": words["key"], "value": pl.Series(value)})
            .filter(mine)
            .group_by("at", maintain_order=True)
            .agg(memory=pl.struct(pl.col("field").str.strip_prefix("mem."), "value"))
        )
        every = pl.DataFrame({"at": pl.Series(np.arange(n), dtype=pl.Int64)})
        return every.join(found, on="at", how="left", maintain_order="left")["memory"].cast(schema.MEMORY)

    def _times(self, frame: pl.DataFrame, updates: _Updates) -> pl.Series:
        tsc = frame["tsc"].fill_null(0).to_numpy()
        if self._options.tsc_khz:
            khz = np.full(len(frame), self._options.tsc_khz, dtype=np.uint64)
        else:
            since = np.array(updates.khz_line, dtype=np.uint64)
            khz = np.array(updates.khz, dtype=np.uint64)[np.searchsorted(since, frame["line"].to_numpy(), "right") - 1]
        return nanoseconds(tsc, khz, frame["tsc"].is_not_null().to_numpy())

    def _count(self, frame: pl.DataFrame) -> None:
        ledger, observed = self.ledger, self.observed
        self._seq += len(frame)
        ledger.records += len(frame)
        kinds = dict(frame["kind"].cast(pl.String).value_counts().iter_rows())
        ledger.hypercalls += kinds.get("hypercall", 0)
        ledger.vmmcalls += kinds.get("vmmcall", 0)
        ledger.subcalls += kinds.get("subcall", 0)
        ledger.samples += kinds.get("sample", 0)
        ledger.lost_events += kinds.get("lost", 0)
        ledger.lost_records += int(frame.filter(pl.col("kind") == "lost")["result"].cast(pl.Int128).sum())
        ledger.unattributed += len(
            frame.filter(
                pl.col("kind").cast(pl.String).is_in(["hypercall", "vmmcall", "subcall"])
                & pl.col("domid").is_null()
                & pl.col("vcpu").is_null()
            )
        )
        self._pcpus.update(frame["pcpu"].unique().drop_nulls().to_list())
        observed.pcpus = len(self._pcpus)
        known = frame["tsc"].drop_nulls()
        if len(known):
            observed.first_tsc = known[0] if observed.first_tsc is None else observed.first_tsc
            observed.last_tsc = known[-1]


@dataclass(slots=True)
class _Updates:
    """What header lines changed: parallel lists, each value holds from its line on (line 0: before this block)."""

    khz_line: list[int]
    khz: list[int]
    caller_line: list[int]
    caller_dom: list[int]
    caller: list[int]


class _BadLineError(Exception):
    """A header line that is not understood; its text says why."""


def _pairs(words: list[str]) -> dict[str, str]:
    pairs: dict[str, str] = {}
    for word in words:
        key, equals, value = word.partition("=")
        if not equals:
            raise _BadLineError(f"{_show(word)} is not key=value")
        if key in pairs:
            raise _BadLineError(f"{_show(key)} is given twice")
        if not value:
            raise _BadLineError(f"{_show(word)} has no value")
        pairs[key] = value
    return pairs


def _number(text: str, low: int, high: int, key: str) -> int:
    if re.search(HEX, text) or re.search(DEC, text):
        value = int(text[2:], 16) if text[:2] in ("0x", "0X") else int(text)
        if low <= value <= high:
            return value
    raise _BadLineError(f"{key}={_show(text)} is not a number from {low} to {high}")


def _show(text: str) -> str:
    return f"`{text[:60]}`"


class _Reader:
    """xtrace's own text log; see `Reader`."""

    name = "xtrace-log"
    title = "xtrace text log (docs/xtrace-log.md)"

    def sniff(self, head: bytes) -> int:
        """Say how sure this reader is: 95 if a known kind of line follows the marker anywhere in ``head``."""
        return 95 if _SNIFF.search(head) else 0

    def open(self, source: Source, options: ReadOptions) -> _Log:
        """Open ``source``; nothing is read before the batches are."""
        return _Log(source, options)


READER: Final = _Reader()
