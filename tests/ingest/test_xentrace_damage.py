"""Damaged windowed files: what was not touched is kept, nothing is invented, losses are marked; and the other byte order."""

from __future__ import annotations

import struct
import tempfile
from collections import Counter
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
import polars as pl
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from xtrace.ingest.base import ReadOptions
from xtrace.ingest.source import Source, compressed
from xtrace.ingest.xentrace import READER, XentraceRecording

SAMPLES = Path(__file__).parents[2] / "samples" / "eras"
MAGIC = 0x2001F003
CALLS = ("hypercall", "subcall", "vmmcall")
WHAT = ("pcpu", "tsc", "kind", "op", "arg0", "arg1", "arg2", "rip")


def read(data: bytes, *, chunk: int = 1 << 22) -> tuple[XentraceRecording, pl.DataFrame]:
    with tempfile.NamedTemporaryFile() as file:
        file.write(data)
        file.flush()
        with Source(file.name) as source:
            recording = XentraceRecording(source, ReadOptions(), chunk=chunk)
            frames = list(recording.batches())
    return recording, pl.concat(frames) if frames else pl.DataFrame()


@dataclass(frozen=True, repr=False)
class Window:
    """A window of a sample: its header and records, and whether it was touched."""

    pcpu: int
    records: tuple[bytes, ...]
    header: bytes | None = None  # None: the right one
    before: bytes = b""  # bytes that came in before the header
    touched: bool = False
    damage: dict[int, bytes] = field(default_factory=dict)  # record -> what stands in its place

    def parts(self) -> list[tuple[bytes, bool]]:
        """Bytes, and whether they are a true record."""
        size = sum(len(r) for r in self.records)
        header = struct.pack("<III", MAGIC, self.pcpu, size) if self.header is None else self.header
        body = [(self.damage.get(i, r), i not in self.damage) for i, r in enumerate(self.records)]
        return [(self.before, False), (header, False), *body]


def load(name: str) -> list[Window]:
    path = SAMPLES / f"{name}.xentrace"
    with Source(path if path.exists() else path.with_name(path.name + ".zst")) as source:
        data = source.file.read()
    out, at = [], 0
    while at < len(data):
        _, pcpu, size = struct.unpack_from("<III", data, at)
        end, at = at + 12 + size, at + 12
        records = []
        while at < end:
            (head,) = struct.unpack_from("<I", data, at)
            n = 4 + 8 * (head >> 31) + 4 * (head >> 28 & 7)
            records.append(data[at : at + n])
            at += n
        # Small windows, so that there are many of them.
        out += [Window(pcpu, tuple(records[i : i + 25])) for i in range(0, min(len(records), 300), 25)]
    return out[:40]


REAL = {name: load(name) for name in ("pv32-3.3.0", "lost64-3.4.0-rc3", "smp64-4.4.4", "smp64-4.22.0")}


def join(windows: list[Window]) -> tuple[bytes, set[int]]:
    """The file, and where its true records are."""
    out, places = bytearray(), set()
    for window in windows:
        for part, true in window.parts():
            if true:
                places.add(len(out))
            out += part
    return bytes(out), places


def events_of(windows: list[Window]) -> Counter:
    """Calls and suspends of windows as their own records tell them (no time inherited, no identity)."""
    data, _ = join(windows)
    return counted(read(data)[1]) if data else Counter()


def counted(frame: pl.DataFrame) -> Counter:
    if not frame.width:
        return Counter()
    return Counter(frame.filter(pl.col("kind").is_in(CALLS)).select(WHAT).iter_rows())


@st.composite
def damage(draw: st.DrawFn) -> tuple[list[Window], list[Window]]:
    """The windows as they are, and as they came out."""
    name = draw(st.sampled_from(sorted(REAL)))
    whole = REAL[name][: draw(st.integers(3, 20))]
    bent = list(whole)
    for _ in range(draw(st.integers(1, 4))):
        i = draw(st.integers(0, len(bent) - 1))
        w = bent[i]
        size = sum(len(r) for r in w.records)
        match draw(st.sampled_from(["header gone", "wrong size", "bytes came in", "header bent", "record bent", "bytes gone"])):
            case "header gone":
                bent[i] = replace(w, header=b"", touched=True)
            case "wrong size":
                wrong = draw(st.integers(0, (1 << 32) - 1).filter(lambda n, size=size: n != size))
                bent[i] = replace(w, header=struct.pack("<III", MAGIC, w.pcpu, wrong), touched=True)
            case "bytes came in":
                bent[i] = replace(w, before=draw(st.binary(min_size=1, max_size=50)))
            case "header bent":
                bent[i] = replace(w, header=draw(st.binary(min_size=12, max_size=12)), touched=True)
            case "record bent":
                k = draw(st.integers(0, len(w.records) - 1))
                r = bytearray(w.records[k])
                r[draw(st.integers(0, len(r) - 1))] ^= 1 << draw(st.integers(0, 7))
                bent[i] = replace(w, damage={**w.damage, k: bytes(r)}, touched=True)
            case "bytes gone":
                k = draw(st.integers(0, len(w.records) - 1))
                r = w.records[k]
                bent[i] = replace(w, damage={**w.damage, k: r[: draw(st.integers(0, len(r) - 1))]}, touched=True)
    return whole, bent


@settings(max_examples=120, deadline=None)
@given(both=damage(), chunk=st.sampled_from([512, 1 << 22]))
def test_nothing_is_invented_and_what_was_not_touched_is_kept(both: tuple[list[Window], list[Window]], chunk: int) -> None:
    whole, bent = both
    data, places = join(bent)
    assume(compressed(data[:16]) is None)  # that would be opened as such
    recording, frame = read(data, chunk=chunk)
    ledger = recording.ledger
    calls = frame.filter(pl.col("kind").is_in(CALLS)) if frame.width else frame
    if frame.width:
        # A record with a flipped bit stands where it stood; no other place may give an event.
        bent_at = set()
        at = 0
        for window in bent:
            parts = window.parts()
            for part, _ in parts[:2]:
                at += len(part)
            for part, true in parts[2:]:
                if not true:
                    bent_at.add(at)
                at += len(part)
        assert set(calls["offset"].to_list()) <= places | bent_at
    # A window is found by its header, and its header by what follows: another header, or the end of the file.
    kept = [
        w for w, after in zip(bent, [*bent[1:], None], strict=True)
        if not w.touched and (after is None or (after.header is None and not after.before))
    ]  # fmt: skip
    missing = events_of(kept) - counted(frame)
    # Without a time of its own a record takes that of the record before, which may be gone.
    assert not [row for row in missing if row[1] is not None and row[2] != "vmmcall"]
    changed = any(w.touched or w.before for w in bent)
    if not changed:
        assert counted(frame) == events_of(whole)
    assert ledger.skipped_bytes <= len(data)
    if ledger.skipped_bytes:
        assert ledger.problems


@settings(max_examples=60, deadline=None)
@given(name=st.sampled_from(sorted(REAL)), order=st.randoms(use_true_random=False))
def test_shuffled_windows_give_the_same_calls(name: str, order: object) -> None:
    windows = list(REAL[name])
    order.shuffle(windows)
    recording, frame = read(join(windows)[0])
    # Time that a record has not of its own may differ.
    own = [i for i, column in enumerate(WHAT) if column not in ("tsc", "rip")]

    def plain(counts: Counter) -> Counter:
        out: Counter = Counter()
        for row, n in counts.items():
            out[tuple(row[i] for i in own)] += n
        return out

    assert plain(counted(frame)) == plain(events_of(REAL[name]))
    assert recording.ledger.skipped_bytes == 0


# --- losses are marked ------------------------------------------------------------------------------------------------


def call(tsc: int, op: int = 12) -> bytes:
    return struct.pack("<IQI", 0x9020100D, tsc, op)


def runs(tsc: int, who: int) -> bytes:
    return struct.pack("<IQI", 0x90021101, tsc, who)


def window(pcpu: int, *records: bytes, size: int | None = None) -> bytes:
    payload = b"".join(records)
    return struct.pack("<III", MAGIC, pcpu, len(payload) if size is None else size) + payload


def told(data: bytes) -> list[tuple]:
    return read(data)[1].select("kind", "pcpu", "arg0", "tsc", "domid").rows()


def test_damage_inside_a_window_stands_between_its_neighbours() -> None:
    data = (
        window(0, runs(1, 3 << 16), call(5), bytes(4), call(6))
        + window(1, call(7))
        + window(0, call(9), runs(10, 3 << 16), call(11))
    )
    assert told(data) == [
        ("hypercall", 0, None, 5, 3),
        ("hypercall", 1, None, 7, None),
        ("lost", 0, 5, 9, None),
        ("hypercall", 0, None, 9, None),  # who runs is unknown until a record says so
        ("hypercall", 0, None, 11, 3),
    ]


def test_damage_at_the_end_of_a_pcpu_stands_behind_its_last_record() -> None:
    data = window(0, call(5), bytes(4), call(6)) + window(1, call(7))
    assert told(data) == [("hypercall", 0, None, 5, None), ("lost", 0, 5, 5, None), ("hypercall", 1, None, 7, None)]


def test_a_missing_header_may_have_cost_any_pcpu() -> None:
    gone = window(1, call(6), call(8))[12:]
    data = window(0, call(5)) + window(1, call(4)) + gone + window(0, call(9)) + window(1, call(10)) + window(2, call(11))
    assert told(data) == [
        ("hypercall", 1, None, 4, None),
        ("hypercall", 0, None, 5, None),
        ("lost", 0, 5, 9, None),
        ("hypercall", 0, None, 9, None),
        ("lost", 1, 4, 10, None),
        ("hypercall", 1, None, 10, None),
        ("hypercall", 2, None, 11, None),  # nothing of it was seen before, so nothing can be stitched across
    ]


@pytest.mark.parametrize("size", [0, 4, 16, 20, 48, 10_000, 0xFFFFFFFC, 17])
def test_a_wrong_window_size(size: int) -> None:
    data = window(0, call(5), call(6), size=size) + window(1, call(7)) + window(0, call(8))
    recording, frame = read(data)
    calls = frame.filter(pl.col("kind") == "hypercall").select("pcpu", "tsc").rows()
    assert set(calls) >= {(1, 7), (0, 8)}
    assert set(calls) <= {(0, 5), (0, 6), (1, 7), (0, 8)}
    assert recording.ledger.problems


def test_a_header_that_a_guest_made_up_is_not_taken() -> None:
    """Seven words of a guest's choice (HVMOP_xentrace) in a damaged stretch."""
    forged = struct.pack("<8I", 0x7800F001, MAGIC, 0, 0xFFFFFFFC, 0x1020100D, 1, 2, 3)
    data = window(0, call(5)) + b"\x55" * 5 + forged + window(1, call(7)) + window(0, call(8))
    recording, frame = read(data)
    assert frame.filter(pl.col("kind") == "hypercall")["op"].to_list() == [12, 12, 12]
    assert recording.ledger.skipped_bytes == 5 + len(forged)


def test_a_call_is_not_stitched_across_damage() -> None:
    from xtrace.replay.callers import CallerFill
    from xtrace.replay.stitch import Stitcher

    # mmu_update: a count with bit 31 set continues a call that was issued before.
    first = struct.pack("<IQII", 0xA020100D, 5, 0x00400001, 9)
    again = struct.pack("<IQII", 0xA020100D, 9, 0x00400001, 0x80000004)
    who = runs(1, 0)

    def calls(data: bytes) -> list[int | None]:
        entries = Stitcher("4.17.0").feed(CallerFill(everyone="pv64").fill(read(data)[1])).entries
        return entries.filter(pl.col("kind") == "hypercall")["call"].to_list()

    a, b = calls(window(0, who, first) + window(0, runs(6, 0), again))
    assert a == b
    # Who runs is told anew behind the damage, so that only the loss keeps them apart.
    a, b = calls(window(0, who, first, bytes(4)) + window(0, runs(6, 0), again))
    assert a != b


# --- the other byte order ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", sorted(REAL))
@pytest.mark.parametrize("chunk", [64, 1 << 22])
def test_big_endian(name: str, chunk: int) -> None:
    data = join(REAL[name])[0]
    turned = np.frombuffer(data, dtype="<u4").astype(">u4").tobytes()
    assert READER.sniff(turned) == 100
    recording, frame = read(data)
    other, again = read(turned, chunk=chunk)
    assert again.equals(frame)
    assert other.ledger == recording.ledger
    assert other.observed.layout == f"{recording.observed.layout}, big-endian"
    assert other.observed.event_ids == recording.observed.event_ids
    # and damaged
    assert READER.sniff(b"\x55" * 40 + turned) == 20
    assert read(b"\x55" * 40 + turned[:-3])[1].equals(read(b"\x55" * 40 + data[:-3])[1])
