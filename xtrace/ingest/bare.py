"""Reader of what the bare guests print: every hypercall as issued, and the registers of every continuation seen parked.

The lines (samples/bare, and the truth texts of the era recordings)::

    BARE start xen=4.4.4 … hcall_insn=0xffffffff80102029 …
    CALL xen=4.4.4 n=1 name=… mode=pending op=0xc rdi=0x1 … ret=4096 … samples=1 tsc=10812465809-10823623709
    CONT n=1 i=0 tsc=10815127351 rip=… rax=0xc rdi=0x41 … pdone=0 mem=0xffffffff8048d000,0x1000,…
    V1CALL op=0x1a n=237 ret=0 tsc=11806691140-11810972612

``CALL32``/``CONT32`` are a 32-bit PV guest, ``CALLH``/``CONTH`` a 64-bit PVH one. A CALL becomes a hypercall event
(CALLH: vmmcall) at its first TSC and a return event at its second; the CONT lines that follow are the samples between.
``VnCALL`` are calls of vCPU n, printed after the others although they ran at the same time: their rows are merged in by
TSC, each vCPU from its own pass over the file, so that memory stays bounded.

What is not on a line stays null: r8 and r9 of a CALL, ebp of a CONT32 (the guest's sentinel, no argument), the pCPU,
and the arguments of a VnCALL but the count. ``mem=`` is named by the structure that the call's command points to
(layouts/bare_structs.toml); ``pdone`` is kept for mmu_update and mmuext_op, the only calls that have such a counter,
and is 0 when they are issued.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

import numpy as np
import polars as pl

from xtrace import schema
from xtrace.ingest.bare_fast import samples
from xtrace.ingest.bare_lines import (
    CONT32,
    CONT64,
    GUESTS,
    HIGH_VCPU,
    MHZ,
    REST32,
    REST64,
    SNIFF_CALL,
    SNIFF_START,
    START,
    VCALL,
    VCALL_WORD,
    WORD,
    Guest,
)
from xtrace.ingest.bare_memory import PDONE_OPS, named
from xtrace.ingest.bare_merge import merged
from xtrace.ingest.base import Domain, Ledger, Observed, ReadOptions, Shows
from xtrace.ingest.clock import nanoseconds
from xtrace.ingest.lines import LineBlock, block_bytes, line_blocks, magnitudes, raw_blocks

if TYPE_CHECKING:
    from collections.abc import Iterator

    from xtrace.ingest.source import Source

__all__ = ("READER",)

#: Calls whose second argument is a count: mmu_update, multicall, mmuext_op.
_COUNT_OPS: Final = (1, 13, 26)

#: What one line yields before it is an event; ``pos`` orders the rows of one vCPU, ``boot`` counts BARE start lines.
_ROWS: Final = pl.Schema(
    {
        "pos": pl.UInt64(),
        "boot": pl.UInt32(),
        "offset": pl.UInt64(),
        "line": pl.UInt64(),
        "tsc": pl.UInt64(),
        "time_ns": pl.Int64(),
        **{name: schema.EVENTS[name] for name in ("domid", "vcpu", "caller", "kind", "op")},
        **dict.fromkeys(schema.ARGS, schema.EVENTS["arg0"]),
        **{name: schema.EVENTS[name] for name in ("rip", "on_insn", "result", "memory")},
    }
)


def _item(name: str, value: pl.Expr) -> pl.Expr:
    return pl.struct(pl.lit(name).alias("field"), value.cast(pl.UInt64).alias("value"))


@dataclass(slots=True)
class _Pass:
    """Where one pass over the file stands; everything that is carried from block to block."""

    vcpu: int
    boot: int = 0  # BARE start lines so far
    insn: int | None = None  # hcall_insn of the last one
    khz: int = 0  # of the last "Detected" line, 0 = none
    pending: pl.DataFrame | None = None  # return row of the last CALL, until its CONT lines are over
    call: int | None = None  # number of the last CALL
    cmd: int | None = None  # its first argument
    said: int = 0  # how many samples it announced
    seen: int = 0  # CONT lines of it so far
    place: tuple[int, int] = (0, 0)  # its line and offset
    top: tuple[int, int] = (0, 0)  # boot and highest TSC so far
    ended: bool = False  # "BARE end" came after it


class _Bare:
    """An opened recording; see `Recording`."""

    format = "bare"

    def __init__(self, source: Source, options: ReadOptions) -> None:
        self._source = source
        self._options = options
        self.ledger = Ledger()
        self.observed = Observed(layout="bare")
        self._seq = 0
        self._last: tuple[int, int, int] | None = None  # boot, TSC and segment of the last row
        self._call_release: str | None = None
        self._notes: list[tuple[int, int, str]] = []  # (line, offset, text) of the block being read

    def batches(self) -> Iterator[pl.DataFrame]:
        """Yield frames of ``schema.EVENTS`` in order of TSC; each vCPU's own rows stay in the order of its lines."""
        for rows in merged([self._rows(vcpu) for vcpu in self._vcpus()]):
            yield from self._events(rows).iter_slices(self._options.batch_rows)
        if self.observed.release is None:
            self.observed.release = self._call_release
        if self._source.damage:
            self.ledger.truncated = True
            self.ledger.problem(self._source.damage, offset=self._source.size)

    def _vcpus(self) -> list[int]:
        found = {0}
        for raw, *_ in raw_blocks(self._source.file, 1 << 22):
            data = np.frombuffer(raw, dtype=np.uint8)
            begin = np.append(0, np.flatnonzero(data == 0x0A)[:-1] + 1)
            for at in begin[data[begin] == 0x56].tolist() if len(raw) else ():  # "V"
                if (m := VCALL_WORD.match(raw, at)) and 0 < int(m[1]) <= HIGH_VCPU:
                    found.add(int(m[1]))
        return sorted(found)

    # -- one vCPU ----------------------------------------------------------------------------------------------

    def _rows(self, vcpu: int) -> Iterator[pl.DataFrame]:
        """Yield the rows of one vCPU in order, with the keys of `bare_merge.merged`; the pass of vCPU 0 also fills the ledger."""
        state = _Pass(vcpu)
        for block in line_blocks(self._source.file, block_bytes(self._options)):
            rows = self._block(block, state)
            self._tell()
            if len(rows):
                yield _keyed(rows, state)
        if vcpu == 0 and state.call is not None:
            self._check_count(state.call, state.said, state.seen, state.place)
            if state.seen < state.said and not state.ended:
                self.ledger.truncated = True
            self._tell()
        if state.pending is not None:
            yield _keyed(state.pending, state)

    def _tell(self) -> None:
        for line, offset, text in sorted(self._notes):
            self.ledger.problem(text, offset=offset, line=line)
        self._notes.clear()

    def _block(self, block: LineBlock, state: _Pass) -> pl.DataFrame:
        """Turn the lines of one block into rows of the pass's vCPU, sorted by ``pos``."""
        frame = pl.DataFrame({"text": block.text, "line": block.line, "offset": block.offset, "size": block.size})
        frame = frame.with_columns(word=pl.col("text").str.extract(WORD, 1))
        main = state.vcpu == 0
        if main:
            self._unused(frame, block)
        if block.cut:
            frame = frame[:-1]  # its last number may have lost digits
        if main:
            begun = frame.filter(pl.col("word").str.starts_with("CALL"))["line"]
            ends = frame.filter(pl.col("text").str.contains(r"^BARE end\s*$"))["line"]
            if len(begun) or len(ends):
                state.ended = len(ends) > 0 and (not len(begun) or bool(ends[-1] > begun[-1]))
        frame = self._header(frame, state, main=main).filter(pl.col("word").is_not_null())
        if not main:
            rows, _ = self._vcalls(frame.filter(word=f"V{state.vcpu}CALL"), state.vcpu)
            return rows
        _, refused = self._vcalls(frame.filter(pl.col("word").str.starts_with("V")), None)
        calls = [self._calls(frame.filter(word="CALL" + key), guest) for key, guest in GUESTS.items()]
        conts = [self._conts(frame.filter(word="CONT" + key), block, guest) for key, guest in GUESTS.items()]
        refused += [bad for _, bad in calls + conts]
        self._refuse(pl.concat(refused))
        return self._group(
            pl.concat([good for good, _ in calls]).sort("line"),
            pl.concat([good for good, _ in conts]).sort("line"),
            state,
        )

    def _unused(self, frame: pl.DataFrame, block: LineBlock) -> None:
        ledger = self.ledger
        ledger.lines += len(frame) + len(block.long)
        ledger.noise_lines += int(frame["word"].is_null().sum())
        ledger.skipped_lines += len(block.long)
        for offset, line, size in block.long:
            ledger.skipped_bytes += size
            self._notes.append((line, offset, f"a line of {size} bytes is no record and was skipped"))
        if block.cut and frame["word"][-1] is not None:
            ledger.truncated = True
            ledger.skipped_bytes += int(frame["size"][-1])
            text = "the last line is cut off (no newline) and was not used"
            self._notes.append((int(frame["line"][-1]), int(frame["offset"][-1]), text))

    def _header(self, frame: pl.DataFrame, state: _Pass, *, main: bool) -> pl.DataFrame:
        """Add boot, insn and khz to every line: what the header lines before it say."""
        other = frame.filter(pl.col("word").is_null())
        starts = (
            other.filter(pl.col("text").str.starts_with("BARE"))
            .select("line", "offset", groups=pl.col("text").str.extract_groups(START))
            .unnest("groups")
            .drop_nulls("1")
            .select("line", "offset", xen="1", insn=magnitudes(pl.col("2")))
        )
        rates = (
            other.filter(pl.col("text").str.starts_with("(XEN)"))
            .select("line", groups=pl.col("text").str.extract_groups(MHZ))
            .unnest("groups")
            .drop_nulls("1")
            .select("line", khz=pl.col("1").cast(pl.UInt64) * 1000 + pl.col("2").cast(pl.UInt64))
        )
        lines = frame["line"].to_numpy()
        boots = np.searchsorted(starts["line"].to_numpy(), lines, "right")
        insns = pl.Series([state.insn, *starts["insn"]], dtype=pl.UInt64)
        khz = np.array([state.khz, *rates["khz"]], dtype=np.uint64)
        frame = frame.with_columns(
            boot=pl.Series(boots + state.boot, dtype=pl.UInt32),
            insn=insns.gather(boots),
            khz=pl.Series(khz[np.searchsorted(rates["line"].to_numpy(), lines, "right")]),
        )
        state.boot += len(starts)
        state.insn, state.khz = insns[-1], int(khz[-1])
        if main:
            if self.observed.tsc_khz is None and len(rates):
                self.observed.tsc_khz = int(rates["khz"][0])
            for line, offset, xen in starts.select("line", "offset", "xen").iter_rows():
                if self.observed.release is None:
                    self.observed.release = xen
                elif self.observed.release != xen:
                    text = f"another release, {xen[:40]}, follows {self.observed.release[:40]} in one file"
                    self._notes.append((line, offset, text))
        return frame

    def _calls(self, frame: pl.DataFrame, guest: Guest) -> tuple[pl.DataFrame, pl.DataFrame]:
        """Read CALL lines of one guest; return what is understood (columns below) and the lines that are not."""
        numbers = dict(
            zip(("op", "arg0", "arg1", "arg2", "arg3", "pdone", "t0", "t1"), ("3", "4", "5", "6", "7", "9", "11", "12"),
                strict=True)
        )  # fmt: skip
        out = _parsed(frame, guest.call, numbers).with_columns(
            xen=pl.col("1"),
            n=pl.col("2").cast(pl.Int64, strict=False),
            result=pl.col("8").cast(pl.Int64, strict=False),
            said=pl.col("10").cast(pl.Int64, strict=False),
        )
        out, bad = _judged(out, ("n", "result", "said", *numbers))
        if len(out):
            self._see(guest)
            self._call_release = self._call_release or out["xen"][0]
        return _guested(out, guest).select(
            "line", "offset", "boot", "khz", "n", "said", "result", *numbers, "domid", "caller", "kind"
        ), bad  # fmt: skip

    def _conts(self, frame: pl.DataFrame, block: LineBlock, guest: Guest) -> tuple[pl.DataFrame, pl.DataFrame]:
        """Read CONT lines of one guest, as `_calls` does."""
        names = ["tsc", "rip", "op", *schema.ARGS[: 6 if guest.word_bytes == 8 else 5], "pdone"]
        numbers = {name: str(i) for i, name in enumerate(names, start=2)}
        regs, rest = (CONT64, REST64) if guest.word_bytes == 8 else (CONT32, REST32)
        keys = ("n", "i", "tsc", *regs, *rest, "pdone", "mem")
        wanted = ("tsc", *regs, "pdone")
        plain, taken = samples(block.raw, (frame["offset"] - block.base).to_numpy(), keys, wanted)
        plain = plain.rename(dict(zip(wanted, names, strict=True)))
        head = ("line", "offset", "size", "word", "boot", "insn", "khz")
        plain = pl.concat([frame.filter(pl.Series(taken, dtype=pl.Boolean)).select(head), plain], how="horizontal")
        other = _parsed(frame.filter(~pl.Series(taken, dtype=pl.Boolean)), guest.cont, numbers).with_columns(
            n=pl.col("1").cast(pl.Int64, strict=False),
            mem=pl.col(str(len(names) + 2)).str.split(",").list.eval(magnitudes(pl.element())),
        )
        out = plain if not len(other) else pl.concat([plain, other.select(plain.columns)]).sort("line")
        out, bad = _judged(out, ("n", *numbers))
        if "arg5" not in numbers:
            out = out.with_columns(arg5=pl.lit(None, pl.UInt64))
        if len(out):
            self._see(guest)
        return _guested(out, guest).select(
            "line", "offset", "boot", "khz", "insn", "n", "tsc", "rip", "op", *schema.ARGS, "pdone", "mem",
            "domid", "caller", "width",
        ), bad  # fmt: skip

    def _vcalls(self, frame: pl.DataFrame, vcpu: int | None) -> tuple[pl.DataFrame, list[pl.DataFrame]]:
        """Read VnCALL lines; return the rows of ``vcpu`` (two a line) or, when it is null, the lines not understood."""
        numbers = {"op": "2", "count": "3", "t0": "5", "t1": "6"}
        out = _parsed(frame, VCALL, numbers).with_columns(result=pl.col("4").cast(pl.Int64, strict=False))
        out, bad = _judged(out, ("result", *numbers))
        if vcpu is None:
            return out, [bad]
        # Only the 64-bit guest has further vCPUs, and its lines say no more than this.
        out = _guested(out, GUESTS[""]).with_columns(vcpu=pl.lit(vcpu, pl.UInt32))
        first = out.with_columns(
            pos=pl.col("line") * 2,
            tsc="t0",
            arg1=pl.when(pl.col("op").is_in(_COUNT_OPS)).then("count"),
            result=pl.lit(None, pl.Int64),
        )
        last = out.with_columns(pos=pl.col("line") * 2 + 1, tsc="t1", kind=pl.lit("return", schema.EVENTS["kind"]))
        return pl.concat([self._shaped(first), self._shaped(last)]).sort("pos"), []

    def _see(self, guest: Guest) -> None:
        self.observed.domains.setdefault(guest.domid, Domain(guest.caller, guest.role))
        self.observed.arch = self.observed.arch or guest.arch

    def _refuse(self, bad: pl.DataFrame) -> None:
        self.ledger.skipped_lines += len(bad)
        for word, line, offset in bad.sort("line").head(Ledger.KEEP).select("word", "line", "offset").iter_rows():
            self._notes.append((line, offset, f"{word} line not understood"))
        self.ledger.problems_dropped += max(0, len(bad) - Ledger.KEEP)

    def _group(self, calls: pl.DataFrame, conts: pl.DataFrame, state: _Pass) -> pl.DataFrame:
        """Put each call's samples between its start and its return."""
        owner = np.searchsorted(calls["line"].to_numpy(), conts["line"].to_numpy())  # 0: the call before this block
        number = pl.Series([state.call, *calls["n"]], dtype=pl.Int64)
        issued = pl.Series([state.cmd, *calls["arg0"]], dtype=pl.UInt64)
        conts = conts.with_columns(call=number.gather(owner), cmd=issued.gather(owner)).with_columns(
            mine=(pl.col("n") == pl.col("call")).fill_null(value=False)
        )
        conts = conts.with_columns(cmd=pl.when("mine").then("cmd"))
        strays = conts.filter(~pl.col("mine"))
        for n, line, offset in strays.head(Ledger.KEEP).select("n", "line", "offset").iter_rows():
            self._notes.append((line, offset, f"sample of call n={n}, whose own line does not stand before it"))
        self.ledger.problems_dropped += max(0, len(strays) - Ledger.KEEP)
        self._check_counts(calls, np.bincount(owner[conts["mine"].to_numpy()], minlength=len(calls) + 1), state)

        pdone = pl.col("op").is_in(PDONE_OPS)
        first = calls.with_columns(
            pos=pl.col("line") * 2,
            tsc="t0",
            result=pl.lit(None, pl.Int64),
            memory=pl.when(pdone).then(pl.concat_list(_item("pdone", pl.lit(0)))),
        )
        samples = conts.with_columns(
            pos=pl.col("line") * 2,
            kind=pl.lit("sample", schema.EVENTS["kind"]),
            on_insn=pl.col("rip") == pl.col("insn"),
            memory=named(conts),
        )
        last = calls.select(
            "line", "offset", "boot", "khz", "op", "result", "domid", "caller",
            pos=pl.col("line").shift(-1) * 2 - 1,
            tsc="t1",
            kind=pl.lit("return", schema.EVENTS["kind"]),
            memory=pl.when(pdone).then(pl.concat_list(_item("pdone", pl.col("pdone")))),
        )  # fmt: skip
        parts = [self._shaped(first), self._shaped(samples), self._shaped(last)]
        if len(calls):
            if state.pending is not None:
                parts.append(state.pending.with_columns(pos=pl.lit(int(calls["line"][0]) * 2 - 1, pl.UInt64)))
            state.pending = parts[2][-1:]
            parts[2] = parts[2][:-1]
        return pl.concat(parts).sort("pos")

    def _check_counts(self, calls: pl.DataFrame, seen: np.ndarray[tuple[int], np.dtype[np.int64]], state: _Pass) -> None:
        """Compare the samples that each finished call announced with its CONT lines."""
        state.seen += int(seen[0])
        if not len(calls):
            return
        if state.call is not None:
            self._check_count(state.call, state.said, state.seen, state.place)
        done = calls.select("n", "said", "line", "offset", seen=pl.Series(seen[1:]))
        for n, said, line, offset, count in done[:-1].filter(pl.col("said") != pl.col("seen")).iter_rows():
            self._check_count(n, said, count, (line, offset))
        n, said, line, offset, count = done.row(-1)
        state.call, state.said, state.seen, state.place = n, said, count, (line, offset)
        state.cmd = int(calls["arg0"][-1])

    def _check_count(self, n: int, said: int, seen: int, place: tuple[int, int]) -> None:
        if said != seen:
            self._notes.append((*place, f"call n={n} says that it has {said} samples; {seen} lines follow"))

    def _shaped(self, frame: pl.DataFrame) -> pl.DataFrame:
        """Bring a frame to the columns of `_ROWS`; what it lacks is null, the vCPU 0."""
        frame = frame.with_columns(
            time_ns=nanoseconds(
                frame["tsc"].to_numpy(),
                np.full(len(frame), self._options.tsc_khz, dtype=np.uint64) if self._options.tsc_khz else frame["khz"].to_numpy(),
                np.ones(len(frame), dtype=bool),
            )
        )
        if "vcpu" not in frame.columns:
            frame = frame.with_columns(vcpu=pl.lit(0))
        return frame.select(
            (pl.col(name) if name in frame.columns else pl.lit(None)).cast(dtype).alias(name) for name, dtype in _ROWS.items()
        )

    # -- all vCPUs ---------------------------------------------------------------------------------------------

    def _events(self, rows: pl.DataFrame) -> pl.DataFrame:
        n = len(rows)
        boot, tsc = rows["boot"].to_numpy(), rows["tsc"].to_numpy()
        last = self._last or (int(boot[0]), int(tsc[0]), 0)
        # A new boot counts from its own reset, even if its TSC happens to be the higher one.
        step = np.empty(n, dtype=np.uint32)
        step[1:] = (tsc[1:] < tsc[:-1]) | (boot[1:] != boot[:-1])
        step[0] = int(tsc[0]) < last[1] or int(boot[0]) != last[0]
        segment = np.cumsum(step, dtype=np.uint32) + np.uint32(last[2])
        self._last = (int(boot[-1]), int(tsc[-1]), int(segment[-1]))
        frame = rows.select(
            pl.Series("seq", np.arange(self._seq, self._seq + n, dtype=np.uint64)),
            pl.Series("segment", segment),
            pl.lit(None, pl.UInt32).alias("pcpu"),
            pl.lit(0, pl.UInt8).alias("cut"),
            pl.lit(None, pl.UInt32).alias("input"),
            pl.exclude("pos", "boot", "top", "rank"),
        ).select(schema.EVENTS.names())
        self._seq += n
        kinds = dict(frame["kind"].cast(pl.String).value_counts().iter_rows())
        ledger = self.ledger
        ledger.hypercalls += kinds.get("hypercall", 0)
        ledger.vmmcalls += kinds.get("vmmcall", 0)
        ledger.samples += kinds.get("sample", 0)
        ledger.records += n - kinds.get("return", 0)
        self.observed.first_tsc = int(tsc[0]) if self.observed.first_tsc is None else self.observed.first_tsc
        self.observed.last_tsc = int(tsc[-1])
        return frame


def _parsed(frame: pl.DataFrame, pattern: str, numbers: dict[str, str]) -> pl.DataFrame:
    """Add the groups of ``pattern`` (columns "1", "2", …) and, as UInt64, those of them that are numbers."""
    frame = frame.with_columns(groups=pl.col("text").str.extract_groups(pattern)).unnest("groups")
    return frame.with_columns(magnitudes(pl.col(group)).alias(name) for name, group in numbers.items())


def _judged(frame: pl.DataFrame, needed: tuple[str, ...]) -> tuple[pl.DataFrame, pl.DataFrame]:
    """Split into lines where every needed column is there (op within 32 bits), and word, line, offset of the others."""
    good = pl.all_horizontal(*(pl.col(name).is_not_null() for name in needed), pl.col("op") <= 0xFFFFFFFF)
    good = good.fill_null(value=False)
    return frame.filter(good), frame.filter(~good).select("word", "line", "offset")


def _guested(frame: pl.DataFrame, guest: Guest) -> pl.DataFrame:
    return frame.with_columns(
        domid=pl.lit(guest.domid, pl.UInt16),
        caller=pl.lit(guest.caller, schema.EVENTS["caller"]),
        kind=pl.lit(guest.kind, schema.EVENTS["kind"]),
        width=pl.lit(guest.word_bytes, pl.Int64),
    )


def _keyed(rows: pl.DataFrame, state: _Pass) -> pl.DataFrame:
    """Add the keys by which `bare_merge.merged` orders: never falling within one vCPU, so that its rows keep their order."""
    boot, top = state.top
    rows = rows.with_columns(boot=pl.col("boot").clip(lower_bound=boot).cum_max()).with_columns(
        top=pl.max_horizontal("tsc", pl.when(pl.col("boot") == boot).then(pl.lit(top, pl.UInt64)).otherwise(0))
        .cum_max()
        .over("boot"),
        rank=pl.lit(state.vcpu, pl.UInt32),
    )
    state.top = (int(rows["boot"][-1]), int(rows["top"][-1]))
    return rows


class _Reader:
    """Console output of the bare guests; see `Reader`."""

    name = "bare"
    title = "output of the bare test guests (CALL and CONT lines)"
    shows = Shows(
        op="yes",
        subop="yes",
        arguments="yes, up to four as issued; all in samples",
        rip="samples only",
        who="yes",
        time="yes, TSC",
        memory="the words behind a sample",
        result="yes",
        proved="registers of samples, which stand on the instruction of a recorded call",
        unobservable="re-entries between samples",
        registers={"*": (0, 1, 2, 3)},
        samples=True,
        fields=True,
    )

    def sniff(self, head: bytes) -> int:
        """Say how sure this reader is: 95 for a BARE start line, 85 for a CALL line."""
        if SNIFF_START.search(head):
            return 95
        return 85 if SNIFF_CALL.search(head) else 0

    def open(self, source: Source, options: ReadOptions) -> _Bare:
        """Open ``source``; nothing is read before the batches are."""
        return _Bare(source, options)


READER: Final = _Reader()
