"""Records of a fixed size (Xen 3.0, 3.1): against the slow twin, in both widths and byte orders, whole and damaged."""

from __future__ import annotations

import tempfile
from collections import Counter
from pathlib import Path

import fixed_twin as twin
import numpy as np
import polars as pl
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from xtrace import schema
from xtrace.ingest import fixed as fixed_module
from xtrace.ingest import registry
from xtrace.ingest.base import ReadOptions
from xtrace.ingest.fixed import Shape, guess
from xtrace.ingest.source import Source
from xtrace.ingest.xentrace_fixed import READER, FixedRecording
from xtrace.replay import identify

SAMPLES = Path(__file__).parents[2] / "samples"

word = st.one_of(
    st.integers(0, 40), st.integers(0, (1 << 64) - 1), st.sampled_from([0x40001, 0x12, 0x81, 2, 0x7FFF, 0x8000, 1 << 32 | 5])
)
event = st.sampled_from(
    [0x1F001, 0x2F001, 0x2F007, 0x2F00A, 0x2F00A, 0x2F00E, 0x81001, 0x81002, 0x82012, 0x82012, 0x84001, 0xAF001, 0x10F002]
)


@st.composite
def records(draw: st.DrawFn, least: int = 2, most: int = 40, back: bool = True) -> list[twin.Record]:
    clocks = {p: draw(st.integers(0, 1 << 40)) for p in draw(st.sets(st.sampled_from([0, 1, 7, 255]), min_size=1))}
    out: list[twin.Record] = []
    for _ in range(draw(st.integers(least, most))):
        cpu = draw(st.sampled_from(sorted(clocks)))
        # The head must look like records of ascending time.
        step = draw(st.sampled_from([0, 1, 1, 5, 300, -7] if back and len(out) >= 16 else [0, 1, 5, 300]))
        clocks[cpu] = max(clocks[cpu] + step, 0)
        e = draw(event)
        data = tuple(draw(st.lists(word, max_size=5)))
        if e == 0x82012 and draw(st.booleans()):
            data = (draw(st.integers(1, 9)) << 16 | draw(st.integers(0, 3)), draw(word))
        if e == 0x2F00A and draw(st.booleans()):
            data = (0x7FFF, 0, draw(st.integers(0, 9)), draw(st.integers(0, 3)))
        out.append((cpu, clocks[cpu], e, data))
    return out


def read(data: bytes, *, chunk: int = 1 << 22, rows: int = 1 << 20) -> tuple[FixedRecording, list[dict]]:
    with tempfile.NamedTemporaryFile() as file:
        file.write(data)
        file.flush()
        with Source(file.name) as source:
            recording = FixedRecording(source, ReadOptions(batch_rows=rows), chunk=chunk)
            frames = list(recording.batches())
    for frame in frames:
        assert dict(frame.schema) == dict(schema.EVENTS)
    return recording, pl.concat(frames).to_dicts() if frames else []


forms = {"wide": st.booleans(), "order": st.sampled_from(["little", "big"])}


@settings(max_examples=300, deadline=None, suppress_health_check=list(HealthCheck))
@given(recs=records(), chunk=st.sampled_from([64, 100, 1 << 12, 1 << 22]), rows=st.integers(1, 50), **forms)
def test_whole_files(recs: list[twin.Record], wide: bool, order: str, chunk: int, rows: int) -> None:
    data = twin.write(recs, wide=wide, order=order)
    recording, events = read(data, chunk=chunk, rows=rows)
    expected = twin.read(recs, wide=wide)
    assert [{name: row[name] for name in expected[0]} for row in events] == expected if expected else not events
    assert [row["seq"] for row in events] == list(range(len(events)))
    ledger, seen = recording.ledger, recording.observed
    assert ledger.records == len(recs)
    assert seen.event_ids == dict(Counter(r[2] for r in recs))
    kinds = Counter(row["kind"] for row in expected)
    assert (ledger.vmmcalls, ledger.hypercalls, ledger.lost_events) == (kinds["vmmcall"], 0, kinds["lost"])
    assert ledger.skipped_bytes == 0
    assert not ledger.truncated
    assert seen.pcpus == len({r[0] for r in recs})
    stride = 60 if wide else 36
    for (event_id, words, tsc), at in seen.forms.items():
        assert (words, tsc) == (10 if wide else 5, True)
        assert at == (0 if event_id == 0 else stride * next(i for i, r in enumerate(recs) if r[2] == event_id))
    assert seen.layout == f"3.0-3.1, {stride}-byte records" + (", big-endian" if order == "big" else "")


def recs_of(n: int, cpus: int = 2, seed: int = 1) -> list[twin.Record]:
    """A recording as 3.1 makes it: pCPUs polled in turn, HVM guests' calls among switches."""
    rng = np.random.default_rng(seed)
    clocks = [1000] * cpus
    out: list[twin.Record] = []
    while len(out) < n:
        for cpu in range(cpus):
            for _ in range(int(rng.integers(1, 9))):
                clocks[cpu] += int(rng.integers(50, 5000))
                dom, vcpu = int(rng.integers(1, 6)), int(rng.integers(0, 2))
                match int(rng.integers(0, 4)):
                    case 0:
                        out.append((cpu, clocks[cpu], 0x2F00A, (0x7FFF, cpu, dom, vcpu)))
                    case 1:
                        out.append((cpu, clocks[cpu], 0x81002, (dom << 16 | vcpu, 0xFFFFFFFF80001185, 0x12)))
                        out.append((cpu, clocks[cpu] + 9, 0x82012, (dom << 16 | vcpu, int(rng.integers(0, 38)))))
                    case 2:
                        out.append((cpu, clocks[cpu], 0x81001, (dom << 16 | vcpu,)))
                    case _:
                        out.append((cpu, clocks[cpu], 0x2F00E, (dom, 12345)))
                clocks[cpu] = max(clocks[cpu], out[-1][1])
    return out[:n]


# --- damage -----------------------------------------------------------------------------------------------------------


def true_calls(recs: list[twin.Record], wide: bool) -> set[tuple]:
    return {(r["tsc"], r["pcpu"], r["op"], r["domid"], r["vcpu"]) for r in twin.read(recs, wide=wide) if r["kind"] == "vmmcall"}


def no_inventions(events: list[dict], recs: list[twin.Record], wide: bool) -> int:
    """Every call is one that was written; returns how many there are."""
    calls = [(r["tsc"], r["pcpu"], r["op"], r["domid"], r["vcpu"]) for r in events if r["kind"] == "vmmcall"]
    assert set(calls) <= true_calls(recs, wide)
    assert len(set(calls)) == len(calls)
    return len(calls)


@settings(max_examples=150, deadline=None)
@given(at=st.integers(0, 400 * 60 - 1), gone=st.integers(1, 700), seed=st.integers(0, 5), **forms)
def test_bytes_lost_in_the_middle(at: int, gone: int, seed: int, wide: bool, order: str) -> None:
    recs = recs_of(400, seed=seed)
    whole = twin.write(recs, wide=wide, order=order)
    at = min(at, len(whole) - 1)
    data = whole[:at] + whole[at + gone :]
    stride = 60 if wide else 36
    recording, events = read(data, chunk=4096)
    n = no_inventions(events, recs, wide)
    # At most the records touched, one on each side and, close to the end, fewer than four behind are given up.
    left = gone // stride + 4 + (4 if at + gone > len(whole) - 6 * stride else 0)
    assert n >= len(true_calls(recs, wide)) - left
    if gone % stride and 0 < at < len(whole) - gone:
        assert recording.ledger.skipped_bytes > 0
        assert recording.ledger.problems
        assert recording.ledger.skipped_bytes + recording.ledger.records * stride == len(data)


@settings(max_examples=100, deadline=None)
@given(at=st.integers(0, 300 * 60), junk=st.binary(min_size=1, max_size=200), **forms)
def test_bytes_that_came_in(at: int, junk: bytes, wide: bool, order: str) -> None:
    recs = recs_of(300)
    whole = twin.write(recs, wide=wide, order=order)
    at = min(at, len(whole))
    recording, events = read(whole[:at] + junk + whole[at:], chunk=4096)
    n = no_inventions(events, recs, wide)
    assert n >= len(true_calls(recs, wide)) - 8
    assert recording.ledger.skipped_bytes >= len(junk)


@settings(max_examples=100, deadline=None)
@given(at=st.lists(st.integers(0, 299), min_size=1, max_size=10), **forms)
def test_an_event_id_that_was_flipped_costs_its_record_and_its_neighbours(at: list[int], wide: bool, order: str) -> None:
    recs = recs_of(300)
    data = bytearray(twin.write(recs, wide=wide, order=order))
    stride = 60 if wide else 36
    for i in at:
        data[i * stride + 12 : i * stride + 16] = b"\xff\xff\xff\xff"
    recording, events = read(bytes(data), chunk=4096)
    # Nothing says whether bytes were changed, lost or came in, so what borders on the damage may be damaged too.
    gone = {i + d for i in at for d in (-1, 0, 1)}
    if all(b - a > 6 for a, b in zip(sorted(set(at)), [*sorted(set(at))[1:], 300], strict=True)) and 0 not in at:
        assert recording.ledger.records == 300 - len(gone)
        assert recording.ledger.skipped_bytes == stride * len(gone)
        kept = [r for i, r in enumerate(recs) if i not in gone]
        assert no_inventions(events, recs, wide) == len(true_calls(kept, wide))
        # No pCPU misses anything that has no record before the damage.
        assert max(at) < 20 or any(r["kind"] == "lost" and r["op"] is None for r in events)


@settings(max_examples=80, deadline=None)
@given(cut=st.integers(1, 100 * 60), **forms)
def test_cut_anywhere(cut: int, wide: bool, order: str) -> None:
    recs = recs_of(100)
    stride = 60 if wide else 36
    data = twin.write(recs, wide=wide, order=order)[:cut]
    if len(data) < 2 * stride:
        return
    recording, events = read(data)
    assert recording.ledger.records == len(data) // stride
    assert recording.ledger.skipped_bytes == len(data) % stride
    assert recording.ledger.truncated == bool(len(data) % stride)
    assert no_inventions(events, recs, wide) == len(true_calls(recs[: len(data) // stride], wide))


@settings(max_examples=200, deadline=None)
@given(data=st.binary(min_size=1, max_size=3000), small=st.booleans())
def test_anything_ends(data: bytes, small: bool) -> None:
    with pytest.MonkeyPatch.context() as patch:
        if small:
            patch.setattr(fixed_module, "_BLOCK", 120)
            patch.setattr(fixed_module, "_STEP_MIN", 16)
        recording, events = read(b"\0" + data)
    assert recording.ledger.skipped_bytes <= len(data) + 1
    assert not events or recording.ledger.records


def test_bytes_lost_inside_a_record_do_not_hide_the_next_four() -> None:
    """The next record begins before the place where one was due; found by fuzzing."""
    recs = [(0, 100 + i, 0x2F00A, (0x7FFF, 0, 3, i)) for i in range(5)]
    data = twin.write(recs, wide=False)
    data = data[:20] + data[22:]
    assert guess(data)[0] == 15
    recording, _ = read(data)
    # The first and the second of five border on the damage.
    assert recording.ledger.records == 3
    assert recording.ledger.skipped_bytes == 2 * 36 - 2


def test_a_loss_is_marked_and_nobody_is_known_behind_it() -> None:
    switch = (0, 100, 0x2F00A, (0x7FFF, 0, 3, 1))
    suspend = (0, 200, 0x2F007, (3, 1, 2))
    rest = [(0, 300 + i, 0x2F00E, (3, 5)) for i in range(3)]
    lost = (0, 400, 0x1F001, (17,))
    tail = [(0, 500 + i, 0x2F00E, (3, 5)) for i in range(5)]
    recs = [switch, suspend, *rest, lost, *tail]
    data = twin.write(recs)
    _, events = read(data[: 6 * 60] + b"\x55" * 7 + data[6 * 60 :])
    # The record before the damage may have been cut into, so the loss of 17 records is not taken; the damage is a loss itself.
    assert [(e["kind"], e["op"], e["tsc"], e["arg0"], e["domid"]) for e in events] == [
        ("suspend", 0x2F007, 200, None, 3), ("lost", None, 501, 302, None)
    ]  # fmt: skip
    recording, events = read(data)
    assert [(e["kind"], e["result"], e["domid"]) for e in events] == [("suspend", None, 3), ("lost", 17, None)]
    assert recording.ledger.lost_records == 17


def test_small_blocks_of_the_first_pass() -> None:
    recs = recs_of(200)
    whole = twin.write(recs)
    data = whole[:1000] + whole[1010:4000] + b"abc" + whole[4000:]
    expected = read(data)
    with pytest.MonkeyPatch.context() as patch:
        for block in (60, 120, 1000):
            patch.setattr(fixed_module, "_BLOCK", block)
            patch.setattr(fixed_module, "_STEP_MIN", 16)
            got = read(data, chunk=64)
            assert got[1] == expected[1]
            assert got[0].ledger == expected[0].ledger


# --- recognition ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("wide", [True, False])
@pytest.mark.parametrize("order", ["little", "big"])
def test_sniff(wide: bool, order: str) -> None:
    data = twin.write(recs_of(50), wide=wide, order=order)
    assert guess(data) == (90, Shape(wide, order))
    assert guess(b"\x55" * 11 + data) == (15, Shape(wide, order))
    assert guess(data[: 60 if wide else 36]) == (40, Shape(wide, order))
    assert guess(data[:30])[0] == 0


def test_other_formats_are_not_claimed() -> None:
    for path in sorted(SAMPLES.rglob("*")):
        if path.is_file():
            with Source(path) as source:
                assert READER.sniff(source.head()) == 0, path
    for head in (b"", b"\0" * 4096, b"CPU0  1000 (+ 0)  VMMCALL\n" * 40, b"\x7fELF" + bytes(500), bytes(range(256)) * 20):
        assert READER.sniff(head) == 0


@pytest.mark.parametrize("wide", [True, False])
def test_by_the_registry(wide: bool, tmp_path: Path) -> None:
    path = tmp_path / "old"
    path.write_bytes(twin.write(recs_of(50), wide=wide))
    with Source(path) as source:
        assert registry.detect(source) is READER


# --- what it says -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("recs", "left"),
    [
        ([(0, 1, 0x2F00A, (0x7FFF, 0, 3, 1)), (0, 2, 0x2F00E, (3, 5))], "3.0.2 3.0.3 3.0.4 3.1.0"),
        ([(0, 1, 0x1F001, (7,)), (0, 2, 0x2F00E, (3, 5))], "3.0.3 3.0.4 3.1.0"),
        ([(0, 1, 0xAF001, (3,)), (0, 2, 0x2F00E, (3, 5))], "3.0.2 3.0.3"),
        ([(0, 1, 0x10F001, (3,)), (0, 2, 0x2F00E, (3, 5))], "3.0.4 3.1.0"),
        ([(0, 1, 0x81001, (0, 0, 0)), (0, 2, 0x81002, (12, 1, 2, 3, 4))], "3.0.2 3.0.3 3.0.4 3.1.0"),
        ([(0, 1, 0x81001, (4 << 16 | 1,)), (0, 2, 0x2F00E, (3, 5))], "3.1.0"),
        ([(0, 1, 0x82001, (30, 1, 2, 3, 4)), (0, 2, 0x2F00E, (3, 5))], "3.0.4 3.1.0"),
        ([(0, 1, 0x82012, (4 << 16 | 1, 12)), (0, 2, 0x2F00E, (3, 5))], "3.1.0"),
        ([(0, 1, 0x82012, (30, 12, 0, 0, 5)), (0, 2, 0x2F00E, (3, 5))], "3.0.4 3.1.0"),
        ([(0, 1, 0x84001, (3, 14, 5)), (0, 2, 0x2F00E, (3, 5))], "3.0.2 3.0.3 3.0.4"),
        ([(0, 1, 0x2F008, ()), (0, 2, 0x2F00E, (3, 5))], "3.0.2"),
        ([(0, 1, 0x2F002, (3, 0)), (0, 2, 0x2F00E, (3, 5))], "3.0.2 3.0.3"),
    ],
)
@pytest.mark.parametrize("wide", [True, False])
def test_identify(recs: list[twin.Record], left: str, wide: bool) -> None:
    recording, _ = read(twin.write(recs, wide=wide))
    seen = recording.observed
    found = identify.Identifier().conclude(seen.event_ids, seen.forms, seen.peaks)
    assert " ".join(found.left) == left
    assert all("(0x0)" not in e.what for e in found.evidence)


def test_the_ledger_says_what_cannot_be_there() -> None:
    recording, _ = read(twin.write([(0, 1, 0x2F00A, (0x7FFF, 0, 3, 1)), (0, 2, 0x2F00E, (3, 5))]))
    assert [p.text for p in recording.ledger.problems] == [
        "there is no record of a hypercall: xentrace before Xen 3.2 records those of HVM guests, from 3.1 on, and no others"
    ]


def test_without_a_hypercall_it_is_incomplete(tmp_path: Path) -> None:
    from xtrace import pipeline

    path = tmp_path / "t"
    path.write_bytes(twin.write([(0, 1, 0x2F00A, (0x7FFF, 0, 3, 1)), (0, 2, 0x2F00E, (3, 5))]))
    result = pipeline.analyze([path])
    assert result.bits == 16
    assert result.sources == ("3.0.2", "3.0.3", "3.0.4", "3.1.0")
    path.write_bytes(twin.write(recs_of(300)))
    result = pipeline.analyze([path])
    assert result.sources == ("3.1.0",)
    assert result.inputs[0].entries > 10
