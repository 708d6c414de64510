"""The xentrace reader against its slow twin: random streams, damage, cuts, and sizes of rounds and blocks."""

from __future__ import annotations

import struct
import tempfile
from collections import Counter
from pathlib import Path

import numpy as np
import polars as pl
import pytest
import xentrace_twin as twin
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from xtrace import schema
from xtrace.errors import InputError
from xtrace.ingest import source as source_module
from xtrace.ingest import walk as walk_module
from xtrace.ingest import windows as windows_module
from xtrace.ingest.base import ReadOptions
from xtrace.ingest.layout import load
from xtrace.ingest.source import Source
from xtrace.ingest.walk import MAX_WORDS, PAD, SIZES, walk
from xtrace.ingest.xentrace import XentraceRecording

SAMPLES = Path(__file__).parents[2] / "samples"

word = st.one_of(
    st.integers(0, 40), st.integers(0, 0xFFFFFFFF), st.sampled_from([0x2001F003, 0x80000000, 0x12, 0x81, 2, 0xFFFFFFFF])
)
event = st.one_of(
    st.sampled_from(
        [
            0x20100D, 0x20100D, 0x20200E, 0x20F101, 0x20F001, 0x201001, 0x82012, 0x82012, 0x81002, 0x81003, 0x81102, 0x81103,
            0x81402, 0x81001, 0x21101, 0x21011, 0x21021, 0x21211, 0x21002, 0x2F00A, 0x2F00E, 0x28007, 0x28010, 0x2F007, 0x1F001,
            0x1F002, 0x10F005, 0x802008, 0x28F00A, 0x401F003,
        ]
    ),
    st.builds(lambda c, s, n: 1 << (16 + c) | s << 12 | n, st.integers(0, 11), st.integers(1, 15), st.integers(0, 4095)),
)  # fmt: skip
argument_bits = st.sampled_from([0, 0x00400001, 0x01100014, 0x00500018, 0x0010001D, 0x00A00001, 0x00C00001, 0xFFF00000, 0x00100000])


@st.composite
def record(draw: st.DrawFn) -> tuple[int, bool, list[int]]:
    words = draw(st.lists(word, max_size=7))
    e = draw(event)
    if e in (0x20100D, 0x20200E) and words and draw(st.booleans()):
        words[0] = draw(argument_bits)
    return e, draw(st.integers(0, 3)) > 0, words


@st.composite
def trace(draw: st.DrawFn) -> bytes:
    clocks = {p: draw(st.integers(0, 1000)) for p in draw(st.sets(st.sampled_from([0, 1, 2, 7, 4095]), min_size=1))}
    out = []
    for _ in range(draw(st.integers(0, 12))):
        pcpu = draw(st.sampled_from(sorted(clocks)))
        payload = []
        for e, timed, words in draw(st.lists(record(), max_size=12)):
            if timed:
                clocks[pcpu] = max(clocks[pcpu] + draw(st.sampled_from([0, 1, 1, 5, 300, -7])), 0)
            payload.append(struct.pack("<I", e | len(words) << 28 | timed << 31))
            if timed:
                payload.append(struct.pack("<Q", clocks[pcpu]))
            payload.append(struct.pack(f"<{len(words)}I", *words))
        data = b"".join(payload)
        out.append(struct.pack("<III", twin.MAGIC, pcpu, len(data)) + data)
    return b"".join(out)


@st.composite
def damaged(draw: st.DrawFn) -> bytes:
    data = bytearray(draw(trace()))
    for _ in range(draw(st.integers(0, 3))):
        if not data:
            break
        at = draw(st.integers(0, len(data) - 1))
        match draw(st.sampled_from(["flip", "cut", "drop", "insert", "word"])):
            case "flip":
                data[at] ^= 1 << draw(st.integers(0, 7))
            case "cut":
                del data[at:]
            case "drop":
                del data[at : at + draw(st.integers(1, 60))]
            case "insert":
                data[at:at] = draw(st.binary(min_size=1, max_size=40))
            case "word":
                data[at // 4 * 4 : at // 4 * 4 + 4] = struct.pack("<I", draw(word))
    return bytes(data)


def fast(data: bytes, chunk: int, block: int, rows: int = 1 << 20) -> tuple[XentraceRecording, list[dict]]:
    with tempfile.NamedTemporaryFile() as file:
        file.write(data)
        file.flush()
        with Source(file.name) as source:
            recording = XentraceRecording(source, ReadOptions(batch_rows=rows), chunk=chunk, block=block)
            frames = list(recording.batches())
    for frame in frames:
        assert dict(frame.schema) == dict(schema.EVENTS)
    return recording, pl.concat(frames).to_dicts() if frames else []


def check(data: bytes, chunk: int, block: int, rows: int) -> None:
    expected = twin.read(data)
    recording, events = fast(data, chunk, block, rows)
    assert [{name: row[name] for name in twin.COLUMNS} for row in events] == expected.events
    assert [row["seq"] for row in events] == list(range(len(events)))
    ledger = recording.ledger
    assert recording.observed.event_ids == dict(expected.ids)
    assert ledger.records == sum(expected.ids.values())
    kinds = Counter(row["kind"] for row in expected.events)
    assert (ledger.hypercalls, ledger.subcalls, ledger.vmmcalls) == (kinds["hypercall"], kinds["subcall"], kinds["vmmcall"])
    assert ledger.lost_records == sum(row["result"] or 0 for row in expected.events if row["kind"] == "lost")
    assert ledger.lost_events == sum(row["kind"] == "lost" and row["op"] is not None for row in expected.events)
    calls = [row for row in expected.events if row["kind"] in ("hypercall", "subcall", "vmmcall")]
    assert ledger.unattributed == sum(row["domid"] is None for row in calls)
    assert ledger.skipped_bytes == expected.skipped
    assert ledger.truncated == expected.truncated
    assert bool(ledger.problems) >= bool(expected.skipped or expected.truncated)


sizes = {
    "chunk": st.sampled_from([64, 100, 256, 1 << 12, 1 << 22]),
    "block": st.sampled_from([10, 13, 592]),
    "rows": st.integers(1, 50),
}


@settings(max_examples=300, deadline=None, suppress_health_check=list(HealthCheck))
@given(data=trace().filter(bool), **sizes)
def test_whole_streams(data: bytes, chunk: int, block: int, rows: int) -> None:
    check(data, chunk, block, rows)


def raw(data: bytes) -> bool:
    """Say whether the reader sees the bytes as they are: what begins like a compressed file is opened as one."""
    return bool(data) and not data.startswith(tuple(source_module._MAGIC))


@pytest.mark.parametrize("magic", source_module._MAGIC)
def test_what_only_begins_like_a_compressed_file(magic: bytes, tmp_path: Path) -> None:
    path = tmp_path / "t"
    path.write_bytes(magic + b"\x00" * 7)
    with pytest.raises(InputError, match="stream is damaged or cut") as caught, Source(path) as source:
        source.file.read()
    assert caught.value.exit_bits == 16


@settings(max_examples=500, deadline=None, suppress_health_check=list(HealthCheck))
@given(data=damaged().filter(raw), **sizes)
def test_damaged_streams(data: bytes, chunk: int, block: int, rows: int) -> None:
    check(data, chunk, block, rows)


@settings(max_examples=100, deadline=None, suppress_health_check=list(HealthCheck))
@given(data=damaged().filter(raw), **sizes)
def test_small_blocks_of_the_first_pass(data: bytes, chunk: int, block: int, rows: int) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(windows_module, "_DENSE", 1)
        patch.setattr(windows_module, "_BLOCK", 64)
        patch.setattr(windows_module, "_STEP_MIN", 16)
        check(data, chunk, block, rows)


# --- real recordings, cut and bent ----------------------------------------------------------------------------------------


def sample(name: str) -> bytes:
    path = SAMPLES / "eras" / name
    with Source(path) as source:
        return source.file.read()


REAL = {name: sample(name) for name in ("pv32-3.3.0.xentrace", "pv64-3.4.0-rc3.xentrace", "lost64-3.4.0-rc3.xentrace")}


@settings(max_examples=40, deadline=None)
@given(name=st.sampled_from(sorted(REAL)), data=st.data())
def test_cut_anywhere(name: str, data: st.DataObject) -> None:
    whole = REAL[name]
    cut = data.draw(st.integers(1, len(whole) - 1))
    check(whole[:cut], 1 << 12, 592, 1 << 20)


@settings(max_examples=40, deadline=None)
@given(name=st.sampled_from(sorted(REAL)), data=st.data())
def test_bits_flipped_anywhere(name: str, data: st.DataObject) -> None:
    bent = bytearray(REAL[name])
    for at in data.draw(st.lists(st.integers(0, len(bent) * 8 - 1), min_size=1, max_size=20)):
        bent[at // 8] ^= 1 << (at % 8)
    check(bytes(bent), 1 << 14, 592, 1 << 20)


@pytest.mark.parametrize("name", ["mv64-4.4.4.xentrace.zst", "smp64-4.22.0.xentrace.zst", "lost64-4.22.0.xentrace.zst"])
def test_whole_recordings(name: str) -> None:
    check(sample(name), 1 << 16, 592, 1 << 20)


def test_random_bytes_end() -> None:
    check(np.random.default_rng(3).bytes(100_000), 1 << 12, 592, 1000)


def test_a_thousand_pcpus() -> None:
    parts = []
    for turn in range(3):
        for pcpu in range(1000):
            payload = b"".join(struct.pack("<IQII", 0xA020100D, turn * 10**6 + pcpu * 7 + i, 0x0040001A, i) for i in range(5))
            parts.append(struct.pack("<III", twin.MAGIC, pcpu, len(payload)) + payload)
    check(b"".join(parts), 1 << 12, 592, 1 << 20)


# --- the walk alone -----------------------------------------------------------------------------------------------------


def slow_walk(words: np.ndarray, start: int, end: int) -> tuple[list[int], int]:
    out, at = [], start
    while at < end:
        after = at + int(SIZES[words[at] >> 28])
        if after > end:
            break
        out.append(at)
        at = after
    return out, at


@settings(max_examples=200, deadline=None)
@given(
    seed=st.integers(0, 2**32 - 1),
    lengths=st.lists(st.integers(1, 700), min_size=1, max_size=6),
    kind=st.sampled_from(["random", "one", "traps", "long"]),
    block=st.integers(MAX_WORDS, 90),
    mend=st.sampled_from([0, 4096]),
)
def test_walk(seed: int, lengths: list[int], kind: str, block: int, mend: int) -> None:
    rng = np.random.default_rng(seed)
    total = sum(lengths) + len(lengths) * 3
    words = rng.integers(0, 2**32, total + PAD + 1, dtype=np.uint32)
    if kind == "one":
        words[:] = 0x30000000
    elif kind == "traps":  # records whose every word looks like the header of a record of the same length
        words[:] = 0xB020F101
    elif kind == "long":
        words |= np.uint32(0xF0000000)
    starts, at = [], 0
    for n in lengths:
        starts.append(at)
        at += n + int(rng.integers(0, 4))
    ends = [s + n for s, n in zip(starts, lengths, strict=True)]
    marks = rng.integers(0, 2, len(words)).astype(np.bool_)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(walk_module, "_MEND_RECORDS", mend)
        pos, counts, stops = walk(words, np.array(starts), np.array(ends), marks, load().likely, block)
    expected = [slow_walk(words, s, e) for s, e in zip(starts, ends, strict=True)]
    assert pos.tolist() == [p for got, _ in expected for p in got]
    assert counts.tolist() == [len(got) for got, _ in expected]
    assert stops.tolist() == [stop for _, stop in expected]


def test_one_pcpu_far_behind_many() -> None:
    """What waits for a slow pCPU is not sorted anew each round, and is merged rightly."""
    slow = b"".join(struct.pack("<IQI", 0x9020100D, 1000 + i, 12) for i in range(3000))
    parts = [struct.pack("<III", twin.MAGIC, 0, len(slow)) + slow]
    for pcpu in range(1, 300):
        late = b"".join(struct.pack("<IQI", 0x9020100D, 3900 + i * 50 + pcpu % 3, 29) for i in range(20))
        parts.append(struct.pack("<III", twin.MAGIC, pcpu, len(late)) + late)
    check(b"".join(parts), 1 << 10, 592, 1 << 20)
    check(b"".join(parts), 1 << 16, 592, 1 << 20)


def test_what_comes_between_an_exit_and_its_call_in_another_batch() -> None:
    """The loss stands in a round of its own, without any VM exit or call."""
    filler = b"".join(struct.pack("<IQI", 0x9010F001, 10 + i, 0) for i in range(40))
    exit_ = struct.pack("<IQIII", 0xB0081102, 5, 0x12, 7, 0)
    lost = struct.pack("<IQIIQ", 0xC001F001, 100, 3, 4, 50)
    call = struct.pack("<II", 0x10082012, 12)
    for body in (exit_ + filler + lost + filler + call, exit_ + filler + call):
        for chunk in (64, 1 << 20):
            check(struct.pack("<III", twin.MAGIC, 0, len(body)) + body, chunk, 592, 1 << 20)
