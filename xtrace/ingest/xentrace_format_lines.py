"""Lines of ``xentrace_format`` text, turned back into the words of the records that they were printed from."""

from __future__ import annotations

import re
import tomllib
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import numpy as np
import polars as pl

from xtrace.ingest.layout import ACTIONS, load

if TYPE_CHECKING:
    from numpy.typing import NDArray

__all__ = ("STRIDE", "Lines", "Words", "hypercall_pages")

WORDS: Final = tuple(f"w{i}" for i in range(7))
#: Words of the longest record: header, TSC, seven extra words.
STRIDE: Final = 3 + len(WORDS)

_CODE: Final = {name: code for code, name in enumerate(ACTIONS)}

# From 3.1 on; 3.0 with tabs; and VM exits of 3.0 with six blanks.
_STARTS: Final = r"^CPU[0-9]{1,5}(?:  [0-9]{1,20} \(\+ *-?[0-9]+\)(?:  |$)|\t[0-9]{1,20}\t\t| {6}[0-9]{1,20}\s)"
_UNKNOWN: Final = r"^  unknown \(0x0{8}([0-9a-f]{8})\)  \[((?: 0x[0-9a-f]{8}){5,7}) \]$"
#: Exit codes of a hypercall: VMX EXIT_REASON_VMCALL, SVM VMEXIT_VMMCALL.
_VMCALLS: Final = ["exitcode = 0x00000012", "exitcode = 0x00000081"]
#: A line of 3.3 and 3.4 prints rip's upper half as eax. No hypercall has so high a number: NR_hypercalls is 64, and V1 records are
#: written behind that check (RELEASE-4.2.0:xen/arch/x86/x86_64/entry.S, xen/include/asm-x86/config.h).
_HYPERCALLS: Final = 64
# Stubs of a 64-bit hypercall page are 32 bytes, rip behind the syscall at +10; iret's at +11
# (3.3.0-branched:xen/arch/x86/x86_64/traps.c hypercall_page_initialise_ring3_kernel).
_STUB, _BEHIND = 32, 10
_IRET, _BEHIND_IRET = 23, 11
_PAGE: Final = 4096
#: So many different stubs of a page must have been used before it is taken for a hypercall page.
_STUBS: Final = 3
#: From the blank before "(+" to the bracket that closes behind a step of eight digits or fewer.
_STEP: Final = 11
#: A line that has one of these and fits no template is damaged.
_STRICT: Final = ["hypercall  [", "VMMCALL", "lost_records", "unknown ("]
_NIBBLES: Final = np.uint64(0x0F0F0F0F0F0F0F0F)
_PAIRS: Final = np.uint64(0x000000FF000000FF)
_FOURS: Final = np.uint64(0x0000FFFF0000FFFF)
_LOW: Final = np.uint64(0xFFFFFFFF)
#: By how many of eight bytes are wanted: a mask of the last ones, which stand at the top of a little-endian word.
_LAST: Final = np.array([(0xFFFFFFFFFFFFFFFF << 8 * (8 - n)) & 0xFFFFFFFFFFFFFFFF for n in range(9)], dtype=np.uint64)
#: So many texts are remembered; the same ones come again and again.
_REMEMBERED: Final = 1 << 16

_SHAPE: Final = pl.Schema(
    {
        "tail": pl.String(),
        "code": pl.UInt8(),
        "event": pl.UInt32(),
        "extra": pl.UInt32(),
        **dict.fromkeys(WORDS, pl.UInt32()),
        "opless": pl.Boolean(),
        "bad": pl.Boolean(),
    }
)


@cache
def _layout() -> dict[str, Any]:
    with (Path(__file__).parent / "layouts" / "xentrace_format.toml").open("rb") as file:
        return tomllib.load(file)


@cache
def _wanted() -> str:
    """Return what a line must contain to be read: names, and the ids of records that a formats file did not know."""
    ids = "|".join(f"{event:06x}" for event in sorted(load().names))
    return "|".join([*map(re.escape, _layout()["names"]["any"]), rf"unknown \(0x0{{10}}(?:{ids})\)"])


@dataclass(slots=True)
class Words:
    """Lines as records.

    Attributes:
        grid: uint32[n + 1, STRIDE], the words of each: header (with the bit that says that there is a TSC), TSC low and high (0
            where there is none), seven extra words; and one row of zeros.
        code: uint8[n], index into ``layout.ACTIONS``; 0 = only counted.
        record: bool[n], the line is a record.
        opless: bool[n], a hypercall whose number is not in the text.
    """

    grid: NDArray[np.uint32]
    code: NDArray[np.uint8]
    record: NDArray[np.bool_]
    opless: NDArray[np.bool_]


@dataclass(frozen=True, slots=True)
class _Table:
    """Texts that were read: ``tails`` gives each its row in the others."""

    tails: pl.DataFrame
    head: NDArray[np.uint32]
    words: NDArray[np.uint32]
    code: NDArray[np.uint8]
    opless: NDArray[np.bool_]
    bad: NDArray[np.bool_]

    @staticmethod
    def of(parsed: pl.DataFrame) -> _Table:
        head = parsed["event"].to_numpy() | parsed["extra"].to_numpy() << np.uint32(28)
        words = np.stack([parsed[name].to_numpy() for name in WORDS], axis=1)
        code, opless, bad = (parsed[name].to_numpy() for name in ("code", "opless", "bad"))
        return _Table(parsed.select("tail", row=pl.int_range(pl.len())), head, words, code, opless, bad)

    def plus(self, more: _Table) -> _Table:
        shifted = more.tails.with_columns(pl.col("row") + len(self.head))
        arrays = (np.concatenate([getattr(self, n), getattr(more, n)]) for n in ("head", "words", "code", "opless", "bad"))
        return _Table(pl.concat([self.tails, shifted]), *arrays)


class Lines:
    """Reads lines of one text.

    Args:
        packing: "low" or "high": which half of an HVM record's identity word is the domain; None = the text does not show it.
        timed: the times are TSCs.
        pages: the guests' hypercall pages (`hypercall_pages`).
    """

    def __init__(self, *, packing: str | None, timed: bool, pages: pl.Series) -> None:
        """Know no text yet."""
        self.packing, self.timed, self.pages = packing, timed, pages
        self._known = _Table.of(pl.DataFrame(schema=_SHAPE))

    def read(self, text: pl.Series, data: NDArray[np.uint8], start: NDArray[np.int64]) -> Words:
        """Read lines; may be called from several threads at once.

        Args:
            text: the lines.
            data: the bytes that hold them. start: int64[n], where each begins there.
        """
        n = len(text)
        # One row of padding: words may be taken behind the last record's.
        out = Words(np.zeros((n + 1, STRIDE), np.uint32), np.zeros(n, np.uint8), np.ones(n, np.bool_), np.zeros(n, np.bool_))
        frame = text.to_frame("text")
        column = pl.col("text").str
        frame = frame.select(
            "text",
            record=column.contains(_STARTS),
            wanted=column.contains(_wanted()),
            point=column.find(" (+", literal=True),
        )
        grid, record = out.grid[:n], frame["record"].to_numpy()
        tsc = _tscs(frame, data, start)
        grid[:, 1], grid[:, 2] = tsc & np.uint64(0xFFFFFFFF), tsc >> np.uint64(32)
        if self.timed:
            grid[:, 0] = (tsc != 0).astype(np.uint32) << np.uint32(31)
        out.record[:] = record
        wanted = record & frame["wanted"].to_numpy()
        at = slice(None) if wanted.all() else np.flatnonzero(wanted)
        found, table = self._found(frame[at] if isinstance(at, np.ndarray) else frame, data, start[at])
        if not len(found):
            return out
        grid[at, 0] |= table.head.take(found)
        grid[at, 3:] = table.words.take(found, axis=0)
        out.code[at] = table.code.take(found)
        if table.opless.any():
            out.opless[at] = table.opless.take(found)
        if table.bad.any():
            out.record[at] &= ~table.bad.take(found)
        return out

    def _found(self, frame: pl.DataFrame, data: NDArray[np.uint8], start: NDArray[np.int64]) -> tuple[NDArray[np.int64], _Table]:
        """Look the rest of each line up; lines that no template fits are only counted, or are damaged."""
        column = pl.col("text").str
        # The step is at least eight wide: nearly always the bracket closes eight bytes behind " (+".
        point = frame["point"].fill_null(0).to_numpy().astype(np.int64)
        end = pl.lit(pl.Series(point + _STEP))
        if (data.take(np.minimum(start + point + _STEP, len(data) - 1)) != ord(")")).any():
            end = column.find(")", literal=True)
        tail = column.slice(end + 1)
        if frame["point"].null_count():
            tail = pl.when(pl.col("point").is_null()).then(column.replace(r"^CPU[0-9]+\s+[0-9]+", "")).otherwise(tail)
        frame = frame.select(tail=tail)
        tails = frame["tail"].unique()
        if tails.str.contains("VMEXIT ", literal=True).any():
            # The fields of other exits would make each of them a text of its own.
            wordy = pl.col("tail").str.contains("VMEXIT ", literal=True) & ~pl.col("tail").str.contains_any(_VMCALLS)
            frame = frame.select(tail=pl.when(wordy).then(pl.lit("  VMEXIT")).otherwise("tail"))
            tails = frame["tail"].unique()
        known = self._known  # another thread may put a new one there at any time
        fresh = tails.to_frame("tail").join(known.tails, on="tail", how="anti")["tail"]
        if len(fresh):
            if len(known.tails) > _REMEMBERED:
                known, fresh = _Table.of(pl.DataFrame(schema=_SHAPE)), tails
            self._known = known = known.plus(_Table.of(self._parse(fresh)))
        found = frame.join(known.tails, on="tail", how="left", maintain_order="left")
        return found["row"].to_numpy(), known

    def _parse(self, tails: pl.Series) -> pl.DataFrame:
        """Read distinct texts by the templates."""
        parts = [pl.DataFrame(schema=_SHAPE)]
        frame = tails.to_frame("tail")
        for line in _layout()["line"]:
            part = frame.filter(pl.col("tail").str.contains(line["match"]))
            if len(part):
                parts.append(self._words(part, line))
        part = frame.filter(pl.col("tail").str.contains(_UNKNOWN))
        if len(part):
            parts.append(_unknown(part))
        found = pl.concat(parts)
        rest = frame.join(found, on="tail", how="anti").with_columns(bad=pl.col("tail").str.contains_any(_STRICT))
        zeros = {name: pl.lit(0) for name in ("code", "event", "extra", *WORDS)}
        rest = rest.select("tail", **zeros, opless=pl.lit(value=False), bad="bad").cast(_SHAPE)
        return pl.concat([found, rest])

    def _words(self, part: pl.DataFrame, line: dict[str, Any]) -> pl.DataFrame:
        """Read the words of one template."""
        words: list[pl.Expr] = []
        for spec in line["words"]:
            group, _, which = spec.partition(".")
            value = pl.col("tail").str.extract(line["match"], int(group)).str.to_integer(base=16, dtype=pl.UInt64)
            value = {"": value, "low": value & 0xFFFFFFFF, "high": value // (1 << 32), "op": value & 0xFFFFF}[which]
            words.append(value)
        action, opless = line["action"], pl.lit(value=False)
        if action == "v1_64":
            words, opless = _rip(words, self.pages)
        named = "dom:vcpu" in line["match"] and action in ("vmmcall", "exit32", "exit64")
        if named and self.packing is None:
            # Whose it was cannot be told from the word, so what comes from it is not used either.
            action, words = ("vmmcall", words[1:]) if action == "vmmcall" else ("exit_other", [])
        elif named and self.packing == "high":
            words[0] = words[0] // (1 << 16) + (words[0] & 0xFFFF) * (1 << 16)
        return _shaped(part, action, pl.lit(line["event"]), pl.lit(len(words)), words, opless)


def _shaped(
    part: pl.DataFrame, action: str | pl.Expr, event: pl.Expr, extra: pl.Expr, words: list[pl.Expr], opless: pl.Expr
) -> pl.DataFrame:
    code = pl.lit(_CODE[action]) if isinstance(action, str) else action
    full = [*words, *(pl.lit(0) for _ in range(len(WORDS) - len(words)))]
    named = dict(zip(WORDS, full, strict=True))
    return part.select("tail", code=code, event=event, extra=extra, **named, opless=opless, bad=pl.lit(value=False)).cast(_SHAPE)


def _rip(words: list[pl.Expr], pages: pl.Series) -> tuple[list[pl.Expr], pl.Expr]:
    """Settle a 64-bit hypercall line: rip's halves, the number, and whether the number is not in it."""
    low, high, eax = words
    wrong = (high == 0) & ((eax >= _HYPERCALLS) | (eax == 0))
    stub = ((eax * (1 << 32) + low) // _PAGE).is_in(pages.implode())
    number = (low % _PAGE) // _STUB
    op = pl.when(wrong).then(pl.when(stub).then(number).otherwise(0)).otherwise(eax)
    return [low, pl.when(wrong).then(eax).otherwise(high), op], wrong & ~stub


def hypercall_pages(sites: set[tuple[int, int]] | None) -> pl.Series:
    """Find the pages that are hypercall pages as far as a whole text shows.

    Call sites of other code look like a stub's in one case of 32 (recordings have such), so all sites of a page must,
    and at least `_STUBS` different ones.

    Args:
        sites: upper and lower half of rip of all lines that print them apart; None = too many to tell.

    Returns:
        UInt64 page numbers (rip // 4096).
    """
    pages: dict[int, list[int]] = {}
    for high, low in sites or ():
        if high >= _HYPERCALLS or high == 0:
            pages.setdefault((high << 32 | low) // _PAGE, []).append(low % _PAGE)
    good = [page for page, places in pages.items() if len(places) >= _STUBS and all(map(_is_stub, places))]
    return pl.Series("page", good, dtype=pl.UInt64)


def _is_stub(place: int) -> bool:
    number, rest = divmod(place, _STUB)
    return number < _HYPERCALLS and (rest == _BEHIND or (number == _IRET and rest == _BEHIND_IRET))


def _unknown(part: pl.DataFrame) -> pl.DataFrame:
    """Read the words of records that the formats file did not know; how many there were is in their meaning only."""
    layout = load()
    groups = part.select("tail", g=pl.col("tail").str.extract_groups(_UNKNOWN)).unnest("g")
    split = pl.col("2").str.strip_chars_start(" ").str.split(" ")
    frame = groups.select(
        "tail",
        event=pl.col("1").str.to_integer(base=16, dtype=pl.UInt32),
        **{
            name: split.list.get(i, null_on_oob=True)
            .str.slice(2)
            .str.to_integer(base=16, dtype=pl.UInt64, strict=False)
            .fill_null(0)
            for i, name in enumerate(WORDS)
        },
    )
    event = frame["event"].to_numpy().astype(np.int64) & 0xFFFFFFF
    code = layout.codes[layout.rows[event >> 12] + (event & 0xFFF)]
    code = np.where(np.isin(event, list(layout.names)), code, 0).astype(np.uint8)
    extra = layout.needs[code].astype(np.int64)
    word = frame["w0"].to_numpy()
    ours = (code == _CODE["v2"]) | (code == _CODE["subcall"])
    bits = sum(((word >> np.uint64(20 + 2 * i)) & np.uint64(3)).astype(np.int64) for i in range(6))
    extra = np.where(ours, np.minimum(1 + bits, 7), extra)
    # 3.2.0's 64-bit exit has four words; the record that has this id from 4.19.0 on has two (320e644616).
    old = (code == _CODE["exit_81003"]) & ((frame["w2"] | frame["w3"]).to_numpy() != 0)
    extra = np.where(old, 4, extra)
    # A surplus word is no identity: this line's words are those of the record, zeros behind.
    frame = frame.with_columns(code=pl.Series(code), extra=pl.Series(extra))
    return _shaped(frame, pl.col("code"), pl.col("event"), pl.col("extra"), [pl.col(w) for w in WORDS], pl.lit(value=False))


def _tscs(frame: pl.DataFrame, data: NDArray[np.uint8], start: NDArray[np.int64]) -> NDArray[np.uint64]:
    """Read the times of lines: ``CPU<n>  <tsc> (+``, ``point`` at the last blank; older ones one by one."""
    n = len(frame)
    tsc = np.zeros(n, dtype=np.uint64)
    if not n:
        return tsc
    good = (frame["record"] & frame["point"].is_not_null()).to_numpy()
    point = frame["point"].fill_null(0).to_numpy().astype(np.int64)
    # Where the digits begin: behind CPU, one to five digits, two blanks.
    digits = np.ones(n, dtype=np.int64)
    for k in range(1, 5):
        more = good & (digits == k) & (data.take(np.where(good, start + 3 + k, 0)) != ord(" "))
        if not more.any():
            break
        digits += more
    begin, width = start + 5 + digits, np.where(good, point - 5 - digits, 0)
    easy = good & (width <= 16) & (start >= 0)
    at = slice(None) if easy.all() else np.flatnonzero(easy)
    # The sixteen bytes before the blank, eight at a time, what is no digit of the number taken for 0.
    chunks = np.ndarray(len(data) - 7, "<u8", data, strides=(1,))
    tail, digits_here = begin[at] + width[at], width[at]
    low = _eight(chunks[tail - 8], np.minimum(digits_here, 8))
    more = digits_here > 8
    if more.any():
        low += _eight(chunks[tail - 16], np.maximum(digits_here - 8, 0)) * np.uint64(10**8)
    tsc[at] = low
    for row in np.flatnonzero(good & ~easy).tolist():  # no machine runs so long
        tsc[row] = int(data[begin[row] : begin[row] + width[row]].tobytes()) & 0xFFFFFFFFFFFFFFFF
    rest = np.flatnonzero((frame["record"] & frame["point"].is_null()).to_numpy())
    if len(rest):
        old = frame["text"].gather(rest).str.extract(r"^CPU[0-9]+\s+([0-9]+)", 1).cast(pl.UInt64, strict=False)
        tsc[rest] = old.fill_null(0).to_numpy()
    return tsc


def _eight(word: NDArray[np.uint64], digits: NDArray[np.int64]) -> NDArray[np.uint64]:
    """Read the last ``digits`` (0 to 8) of eight characters, little-endian words, as decimal numbers."""
    value = word & _NIBBLES
    value &= _LAST.take(digits)
    value = value * np.uint64(10) + (value >> np.uint64(8))  # pairs, in every second byte
    value = ((value & _PAIRS) * np.uint64(100) + ((value >> np.uint64(16)) & _PAIRS)) & _FOURS
    out: NDArray[np.uint64] = (value & _LOW) * np.uint64(10**4) + (value >> np.uint64(32))
    return out
