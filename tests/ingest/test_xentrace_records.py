"""The xentrace reader, record by record and damage by damage, on traces made for the purpose."""

from __future__ import annotations

import struct
from pathlib import Path

import polars as pl
import pytest

from xtrace import schema
from xtrace.ingest.base import ReadOptions
from xtrace.ingest.source import Source
from xtrace.ingest.xentrace import READER, XentraceRecording

SAMPLES = Path(__file__).parents[2] / "samples"


def path_of(folder: str, name: str) -> Path:
    plain = SAMPLES / folder / f"{name}.xentrace"
    return plain if plain.exists() else plain.with_name(plain.name + ".zst")


def read(path: Path, **options: int) -> tuple[XentraceRecording, pl.DataFrame]:
    recording = READER.open(Source(path), ReadOptions(**options))
    frames = list(recording.batches())
    return recording, pl.concat(frames) if frames else schema.empty(schema.EVENTS)


@pytest.mark.parametrize(
    ("name", "layout", "caller"),
    [
        ("pv64-3.3.0", "3.2-3.3", "pv64"),
        ("pv32-3.3.0", "3.2-3.3", "pv32"),
        ("pv64-4.1.6.1", "3.4-4.2", "pv64"),
        ("pv32-3.4.0-rc3", "3.4-4.2", "pv32"),
        ("pv64-4.22.0", "4.3-4.22", None),
    ],
)
def test_layout_and_caller(name: str, layout: str, caller: str | None) -> None:
    recording, events = read(path_of("eras", name))
    assert recording.observed.layout == layout
    assert events.filter(pl.col("kind") == "hypercall")["caller"].unique().to_list() == [caller]
    assert events["rip"].null_count() == (events.height if caller is None else 0)
    assert dict(events.schema) == dict(schema.EVENTS)


def test_vmmcalls_come_from_their_exits() -> None:
    _, events = read(path_of("dom0-4.17.7", "j4_pvh"))
    calls = events.filter(pl.col("kind") == "vmmcall")
    assert calls["rip"].null_count() == 0
    assert set(calls["caller"].unique().to_list()) <= {"hvm64", "hvm32"}
    # One instruction makes nearly all calls: xen_hypercall_hvm of the guest's kernel.
    assert calls["rip"].value_counts(sort=True)["count"][0] > 2000


def test_order_and_sequence() -> None:
    _, events = read(path_of("eras", "mv64-4.4.4"))
    assert events["seq"].to_list() == list(range(events.height))
    assert events.select("segment", "tsc", "pcpu", "offset").sort(
        "segment", "tsc", "pcpu", "offset"
    ).equals(events.select("segment", "tsc", "pcpu", "offset"))  # fmt: skip


def test_time_needs_a_frequency() -> None:
    path = path_of("eras", "pv64-4.22.0")
    events = read(path, tsc_khz=2_596_122)[1]
    assert events["time_ns"].to_list() == [t * 10**6 // 2_596_122 for t in events["tsc"].to_list()]
    assert read(path)[1]["time_ns"].null_count() == events.height


def test_batches_are_of_about_the_size_asked_for() -> None:
    recording = READER.open(Source(path_of("eras", "pv64-4.22.0")), ReadOptions(batch_rows=100))
    sizes = [batch.height for batch in recording.batches()]
    assert sum(sizes) == 4128
    assert max(sizes) < 200


# --- single records ---------------------------------------------------------------------------------------------------


def rec(event: int, *words: int, tsc: int | None = None) -> bytes:
    head = event | len(words) << 28 | (tsc is not None) << 31
    return struct.pack("<I", head) + (struct.pack("<Q", tsc) if tsc is not None else b"") + struct.pack(f"<{len(words)}I", *words)


def window(pcpu: int, *records: bytes) -> bytes:
    payload = b"".join(records)
    return struct.pack("<III", 0x2001F003, pcpu, len(payload)) + payload


@pytest.fixture
def of(tmp_path: Path):  # noqa: ANN201
    def make(*parts: bytes) -> tuple[XentraceRecording, list[dict]]:
        file = tmp_path / "made.xentrace"
        file.write_bytes(b"".join(parts))
        recording, events = read(file)
        return recording, events.to_dicts()

    return make


EXIT64 = rec(0x81102, 0x12, 0x81234567, 0xFFFFFFFF, tsc=5)


def test_arguments_are_read_only_where_bits_and_count_agree(of) -> None:  # noqa: ANN001
    _, rows = of(
        window(
            0,
            rec(0x20100D, 0x01100014, 5, 9, tsc=1),  # grant_table_op: arg0, arg2
            rec(0x20100D, 0x0010000C, tsc=2),  # 4.17: a number with bit 20 set, not memory_op with an argument
            rec(0x20100D, 0x0040001A, 7, 8, tsc=3),  # a word too many
            rec(0x20100D, 0x00A00001, 1, 2, 3, 4, tsc=4),  # 64-bit arg0 and arg1
            rec(0x20100D, 0x00C00001, 1, 2, tsc=5),  # reserved field
        )
    )
    got = [(r["op"], [r[f"arg{i}"] for i in range(6)], r["cut"]) for r in rows]
    none = [None] * 6
    assert got == [
        (0x14, [5, None, 9, None, None, None], 0b101),
        (0x0010000C, none, 0),
        (0x1A, none, 0),
        (0x1, [1 | 2 << 32, 3 | 4 << 32, None, None, None, None], 0),
        (0x1, none, 0),
    ]


@pytest.mark.parametrize(
    ("before", "call", "expected"),
    [
        # 4.0.2 on
        (EXIT64, rec(0x82012, 12), (12, "hvm64", 0xFFFFFFFF81234567, None)),
        (rec(0x81002, 0x81, 0xC0100185, tsc=5), rec(0x82012, 12), (12, "hvm32", 0xC0100185, None)),
        (rec(0x81003, 0x81, 0xC0100185, tsc=5), rec(0x82012, 12), (12, "hvm32", 0xC0100185, None)),  # SVM, 4.19
        (rec(0x81103, 0x81, 5, 6, tsc=5), rec(0x82012, 12), (12, "hvm64", 5 | 6 << 32, None)),
        # 3.4.0 to 4.0.1: a surplus 0
        (rec(0x81102, 0x12, 5, 6, 0, tsc=5), rec(0x82012, 12, 0), (12, "hvm64", 5 | 6 << 32, None)),
        # 3.2, 3.3: dom | vcpu << 16 first
        (rec(0x81102, 0x10004, 0x12, 5, 6, tsc=5), rec(0x82012, 0x10004, 12), (12, "hvm64", 5 | 6 << 32, (4, 1))),
        (rec(0x81003, 0x10004, 0x12, 5, 6, tsc=5), rec(0x82012, 0x10004, 12), (12, "hvm64", 5 | 6 << 32, (4, 1))),
        (rec(0x81102, 0x10004, 0x12, 5, 0, tsc=5), rec(0x82012, 0x10004, 12), (12, None, 5, (4, 1))),
        (rec(0x81002, 0x10004, 0x12, 5, tsc=5), rec(0x82012, 0x10004, 12), (12, None, 5, (4, 1))),
        # no proof: another reason, an entry or a loss in between, no exit at all
        (rec(0x81102, 0x1E, 5, 6, tsc=5), rec(0x82012, 12), (12, None, None, None)),
        (EXIT64 + rec(0x81001, tsc=6), rec(0x82012, 12), (12, None, None, None)),
        (EXIT64 + rec(0x1F001, 3, 4, 0, 0, tsc=6), rec(0x82012, 12), (12, None, None, (4, 0))),
        (EXIT64 + rec(0x8200F, 7), rec(0x82012, 12), (12, "hvm64", 0xFFFFFFFF81234567, None)),
        (b"", rec(0x82012, 12), (12, None, None, None)),
    ],
)
def test_vmmcall(of, before: bytes, call: bytes, expected: tuple) -> None:  # noqa: ANN001
    _, rows = of(window(0, before, call))
    row = rows[-1]
    who = None if row["domid"] is None else (row["domid"], row["vcpu"])
    assert (row["op"], row["caller"], row["rip"], who) == expected
    assert row["kind"] == "vmmcall"


def test_vmmcall_of_number_0_is_told_by_the_scheduling_records(of) -> None:  # noqa: ANN001
    old = window(0, rec(0x2F00A, 0, 0, 4, 1, tsc=1), rec(0x82012, 0x10004, 0))
    assert of(old)[1][-1]["op"] == 0
    new = window(0, rec(0x21101, 4 << 16 | 1, tsc=1), rec(0x82012, 0x10004, 0))
    assert of(new)[1][-1]["op"] == 0x10004


def test_who_is_running(of) -> None:  # noqa: ANN001
    call = rec(0x20100D, 12, tsc=9)
    recording, rows = of(
        window(0, call, rec(0x21101, 3 << 16 | 1, tsc=10), rec(0x20100D, 12, tsc=11), rec(0x21211, 5 << 16, tsc=12)),
        window(1, rec(0x20100D, 12, tsc=11)),
        window(
            0,
            rec(0x20100D, 12, tsc=13),  # a wake-up of d5v0 logged here changes nothing
            rec(0x21021, 3 << 16 | 1, tsc=14),
            rec(0x20100D, 12, tsc=15),
            rec(0x21002, 6 << 16, tsc=16),
            rec(0x20100D, 12, tsc=17),
            rec(0x1F001, 17, 7 | 2 << 16, 0, 0, tsc=18),
            rec(0x20100D, 12, tsc=19),
            rec(0x28007, 7, 2, 2, tsc=20),
            rec(0x28007, 7, 2, 0, tsc=21),
        ),
    )
    assert [(r["kind"], r["pcpu"], r["domid"], r["vcpu"]) for r in rows] == [
        ("hypercall", 0, None, None),
        ("hypercall", 0, 3, 1),
        ("hypercall", 1, None, None),
        ("hypercall", 0, 3, 1),
        ("hypercall", 0, None, None),
        ("hypercall", 0, 6, 0),
        ("lost", 0, 7, 2),
        ("hypercall", 0, 7, 2),
        ("suspend", 0, 7, 2),
    ]
    assert recording.ledger.unattributed == 3
    assert (recording.ledger.lost_records, recording.ledger.lost_events, rows[6]["result"]) == (17, 1, 17)
    assert [r["op"] for r in rows[-3:]] == [0x1F001, 12, 0x28007]


def test_up_to_3_3_a_loss_makes_everyone_unknown(of) -> None:  # noqa: ANN001
    call = rec(0x20F101, 0x8100102A, 0xFFFFFFFF, 12, tsc=9)
    _, rows = of(window(0, rec(0x2F00A, 32767, 0, 3, 1, tsc=1), call, rec(0x1F001, 5), call))
    assert [(r["kind"], r["domid"], r["vcpu"]) for r in rows] == [
        ("hypercall", 3, 1), ("lost", None, None), ("hypercall", None, None)
    ]  # fmt: skip
    assert rows[0]["rip"] == 0xFFFFFFFF8100102A


def test_a_tsc_that_steps_back_begins_a_segment(of) -> None:  # noqa: ANN001
    _, rows = of(
        window(0, rec(0x20100D, 1, tsc=100), rec(0x20100D, 2, tsc=50), rec(0x82012, 3)),
        window(1, rec(0x82012, 9), rec(0x20100D, 4, tsc=60), rec(0x20100D, 5, tsc=120)),
        window(0, rec(0x20100D, 6, tsc=70)),
    )
    assert [(r["op"], r["segment"], r["tsc"]) for r in rows] == [
        (9, 0, None), (4, 0, 60), (1, 0, 100), (5, 0, 120), (2, 1, 50), (3, 1, 50), (6, 1, 70)
    ]  # fmt: skip


# --- damage -----------------------------------------------------------------------------------------------------------

CALL = rec(0x20100D, 12, tsc=7)


def problems(recording: XentraceRecording) -> list[tuple[str, int | None]]:
    return [(p.text, p.offset) for p in recording.ledger.problems]


def test_a_short_last_window(of) -> None:  # noqa: ANN001
    data = window(0, CALL, CALL, CALL)
    recording, rows = of(data[:-3])
    assert len(rows) == 2
    assert recording.ledger.truncated
    assert recording.ledger.skipped_bytes == 13
    assert problems(recording) == [("the file ends 3 bytes before the window of pCPU 0 does", len(data) - 3)]


def test_an_impossible_header_costs_the_rest_of_its_window(of) -> None:  # noqa: ANN001
    recording, rows = of(window(0, CALL, b"\0\0\0\0", CALL), window(0, CALL))
    # Behind the damage a loss is marked: nobody can say what was skipped.
    assert [(r["kind"], r["offset"]) for r in rows] == [("hypercall", 12), ("lost", 12 + 36), ("hypercall", 12 + 36 + 12)]
    assert recording.ledger.skipped_bytes == 20
    assert problems(recording) == [("0x00000000 is no record header; the rest of the window is skipped", 28)]


def test_a_record_that_sticks_out(of) -> None:  # noqa: ANN001
    recording, rows = of(window(0, CALL, CALL[:8]), window(0, CALL))
    assert [r["kind"] for r in rows] == ["hypercall", "lost", "hypercall"]
    assert recording.ledger.skipped_bytes == 8
    assert problems(recording) == [("a record sticks out of its window", 28)]


def test_lost_bytes_are_found_by_the_next_header(of) -> None:  # noqa: ANN001
    first = window(0, CALL, CALL)
    recording, rows = of(first[:-6], window(1, CALL), window(0, CALL))
    assert [(r["kind"], r["pcpu"]) for r in rows] == [("hypercall", 0), ("lost", 0), ("hypercall", 0), ("hypercall", 1)]
    assert ("a window header stands 6 bytes before the end of the window of pCPU 0", 38) in problems(recording)
    assert recording.ledger.skipped_bytes == 10


def test_surplus_bytes_are_skipped(of) -> None:  # noqa: ANN001
    recording, rows = of(window(0, CALL), b"\x55" * 9, window(1, CALL))
    assert len(rows) == 2
    assert problems(recording) == [("no window header where one is due; 9 bytes skipped", 28)]
    assert recording.ledger.skipped_bytes == 9


def test_a_damaged_head(of) -> None:  # noqa: ANN001
    data = b"\xff" * 40 + window(0, CALL) + window(1, CALL)
    assert READER.sniff(data) == 20
    assert READER.sniff(window(0, CALL)) == 100
    assert READER.sniff(b"CPU0  1000 (+ 0) hypercall") == 0
    recording, rows = of(data)
    assert len(rows) == 2
    assert recording.ledger.skipped_bytes == 40


def test_a_header_claim_allocates_nothing(of) -> None:  # noqa: ANN001
    recording, rows = of(struct.pack("<III", 0x2001F003, 16383, 0xFFFFFFFC) + CALL)
    assert len(rows) == 1
    assert recording.ledger.truncated
    assert recording.observed.pcpus == 1


def test_short_records_are_no_events(of) -> None:  # noqa: ANN001
    recording, rows = of(window(0, rec(0x20F101, 1, 2, tsc=3), CALL))
    assert len(rows) == 1
    assert problems(recording) == [("record 0x20f101 (TRC_PV_HYPERCALL | TRC_64_FLAG) has only 2 words", 12)]


def test_an_empty_or_foreign_file_is_not_ours() -> None:
    assert READER.sniff(b"") == 0
    assert READER.sniff(bytes(65536)) == 0
