"""xenalyze's text: real dumps against the binaries they were made from, a twin in plain Python, damage."""

from __future__ import annotations

import io
import re
from typing import TYPE_CHECKING, Any, cast

import polars as pl
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from text_against_binary import BINARY, DATA, ROOT, pairs, read, unexplained

from xtrace import schema
from xtrace.ingest import registry
from xtrace.ingest.base import ReadOptions
from xtrace.ingest.source import Source
from xtrace.ingest.xenalyze_text import READER, XenalyzeRecording

if TYPE_CHECKING:
    from pathlib import Path

PAIRS = pairs("xenalyze-dump.txt")

#: Why the text may say less than the binary.
FACTS = {
    # V1: eip is printed the same from the 32-bit and the 64-bit record, so a small one does not prove the ABI.
    "caller": lambda b: b["caller_text"].is_null() & (b["caller"] == "pv32") & (b["rip"] < 1 << 32),
    # lost_records prints a raw first_tsc, but nothing that ties it to the printed times.
    "arg0": lambda b: (b["kind"] == "lost") & b["arg0_text"].is_null(),
}


class _Memory(Source):
    """A text in memory as a source."""

    def __init__(self, data: bytes) -> None:
        self.path, self.damage, self.file, self.size = "memory", None, io.BytesIO(data), len(data)


def events(data: bytes, rows: int = 1 << 20) -> tuple[pl.DataFrame, Any]:
    recording = READER.open(_Memory(data), ReadOptions(batch_rows=rows))
    frames = list(recording.batches())
    return (pl.concat(frames) if frames else schema.empty(schema.EVENTS)), recording.ledger


def text_of(path: Path) -> bytes:
    with Source(path) as source:
        return cast("bytes", source.file.read())


@pytest.mark.parametrize(("text", "binary"), PAIRS, ids=[t.name for t, _ in PAIRS])
def test_the_binary_and_the_text_give_the_same_events(text: Path, binary: Path) -> None:
    a, _ = read(BINARY, binary)
    b, ledger = read(READER, text)
    # Where two pCPUs have one TSC, or a record is lost, the tool's order is its own: compared is that of each pCPU.
    assert unexplained(a, b, FACTS) == {}
    assert ledger.skipped_lines == 0
    assert not ledger.truncated
    assert not ledger.problems
    # Ticks since the first record, to within the rounding of the tool's nanoseconds.
    order = [frame.sort("pcpu", maintain_order=True)["tsc"].cast(pl.Int64) for frame in (a, b)]
    first = int(order[0].min())  # type: ignore[arg-type]
    shift = order[0] - first - order[1]
    assert int(shift.max()) - int(shift.min()) <= 4  # type: ignore[arg-type]


def test_there_are_real_pairs_of_every_sort() -> None:
    names = {text.name.split(".xenalyze")[0] for text, _ in PAIRS}
    assert {"pv32-3.3.0", "pv64-4.1.6.1", "pv64-4.22.0", "lost64-4.4.4", "j5_tiny_pv", "j4_pvh_hvm"} <= names


def test_hvm_calls_take_rip_from_their_exit() -> None:
    frame, ledger = read(READER, DATA / "j4_pvh_hvm.xenalyze-dump.txt.zst")
    assert ledger.vmmcalls == 16
    assert frame["rip"].null_count() == 0
    assert frame["caller"].unique().to_list() == ["hvm64"]


# --- a twin ----------------------------------------------------------------------------------------------------------

HEAD = re.compile(
    r"^[\] !](?: {0,2}(\d{1,10})\.(\d{9})| {14}) ([-|.l 0-9]*)x[-|.l 0-9]* d(?:(\d{1,5})v(\d{1,5})|\?v\?)( +)(\S.*?)\s*$", re.ASCII
)
GRANT = [
    "map_grant_ref", "unmap_grant_ref", "setup_table", "dump_table", "transfer", "copy", "query_size", "unmap_and_replace",
    "set_version", "get_status_frames", "get_version", "swap_grant_ref",
]  # fmt: skip
SCHED = ["yield", "block", "shutdown", "poll", "remote_shutdown", "shutdown_code", "watchdog"]
VCPU = [
    "initialise", "up", "down", "is_up", "get_runstate_info", "register_runstate_memory_area", "set_periodic_timer",
    "stop_periodic_timer", "set_singleshot_timer", "stop_singleshot_timer", "register_vcpu_info", "send_nmi", "get_physid",
    "register_vcpu_time_memory_area", "register_runstate_phys_area", "register_vcpu_time_phys_area",
]  # fmt: skip


def command(names: list[str], text: str) -> int | None:
    if m := re.fullmatch(r"unknown \((-?\d{1,10})\)", text, re.ASCII):
        return word(m[1])
    return names.index(text) if text in names else None


def word(text: str) -> int | None:
    value = int(text)
    return value & 0xFFFFFFFF if -(1 << 31) <= value < 1 << 32 else None


def twin(line: str) -> dict[str, Any] | None:
    """Read one hypercall line of 4.3 and later, or of V1, the slow way; None: no such record."""
    m = HEAD.match(line)
    if not m:
        return None
    seconds, ns, columns, dom, vcpu, gap, body = m.groups()
    out: dict[str, Any] = {"pcpu": len(columns), "kind": "subcall" if len(gap) == 2 else "hypercall", "cut": 0}
    out["tsc"] = ((int(seconds or 0) * 10**9 + int(ns or 0)) * 2457 + 1023) // 1024
    known = dom is not None and int(dom) < 32768
    out["domid"], out["vcpu"] = (int(dom), int(vcpu)) if known else (None, None)
    if v1 := re.fullmatch(r"hypercall +([0-9a-f]{1,8})(?: \(\S+\))? eip ([0-9a-f]{1,16})", body):
        out |= {"op": int(v1[1], 16), "rip": int(v1[2], 16), "kind": "hypercall"}
        return out
    call = re.fullmatch(r"hypercall +([0-9a-f]{1,5})(?: \(\S+\))?(?: (.*))?", body)
    if not call or len(gap) > 2:
        return None
    op, rest = int(call[1], 16), call[2] or ""
    out["op"] = op
    forms = {
        1: r"(\d{1,10}) updates( \(preempted\))?", 13: r"(-?\d{1,10}) calls", 26: r"(-?\d{1,10}) ops",
        20: r"(\S+|unknown \(-?\d+\)) (-?\d{1,10}) ops", 24: r"(\S+|unknown \(-?\d+\)) vcpu (-?\d{1,10})", 29: r"(.*)",
    }  # fmt: skip
    if op not in forms:
        return out if not rest else None  # undecoded arguments: no Xen records any
    f = re.fullmatch(forms[op], rest, re.ASCII)
    if not f:
        return None
    if op in (1, 13, 26):
        value = word(f[1])
        if value is None:
            return None
        out |= {"arg1": value | (1 << 31 if op == 1 and f[2] else 0), "cut": 2}
    elif op == 29:
        out |= {"arg0": command(SCHED, f[1]), "cut": 1}
    else:
        names, place, cut = (GRANT, "arg2", 5) if op == 20 else (VCPU, "arg1", 3)
        out |= {"arg0": command(names, f[1]), place: word(f[2]), "cut": cut}
        if out[place] is None:
            return None
    if op in (20, 24, 29) and out["arg0"] is None:
        return None
    return out


def expected(text: str) -> list[dict[str, Any]]:
    rows = []
    for number, line in enumerate(text.split("\n")[:-1], 1):
        row = twin(line)
        if row:
            rows.append({"line": number, **row})
    return rows


def check(data: bytes) -> None:
    frame, _ = events(data)
    calls = frame.filter(pl.col("kind").is_in(["hypercall", "subcall"]))
    want = expected(data.decode("utf-8", "replace"))
    assert calls["line"].to_list() == [row["line"] for row in want]
    for name in ("tsc", "pcpu", "domid", "vcpu", "kind", "op", "arg0", "arg1", "arg2", "cut", "rip"):
        assert calls[name].to_list() == [row.get(name) for row in want], name


SMALL = ("samples/eras/pv64-4.22.0", "samples/eras/pv32-4.4.4", "samples/eras/pv64-4.1.6.1", "samples/dom0-4.17.7/j5_tiny_pv")


@pytest.mark.parametrize("name", SMALL)
def test_real_dumps_against_the_twin(name: str) -> None:
    check(text_of(ROOT / f"{name}.xenalyze-dump.txt.zst"))


LINES = [
    b"   0.000002000 x| d3v1 hypercall  1 (mmu_update) 5 updates",
    b"   0.000003000 x| d3v1 hypercall  1 (mmu_update) 0 updates (preempted)",
    b"   0.000009002 x| d3v1 hypercall 1a (mmuext_op) -2147483644 ops",
    b"   0.000005001 |x d3v1  hypercall  1 (mmu_update) 7 updates",
    b"   0.000011002 x| d32768v0 hypercall 14 (grant_table_op) unknown (8197) 6 ops",
    b"   0.000012002 x| d?v? hypercall 18 (vcpu_op) is_up vcpu 1",
    b" 1234.000013003 -- x| d3v1 hypercall 1d (sched_op) shutdown",
    b"   0.000016003 x| d3v1 hypercall 31",
    b"                x d3v1 hypercall  1 (mmu_update) eip ffffffff8100103a",
    b"   0.000003000 x d3v1 hypercall  6 (sched_op(compat)) eip c010118a",
    b"Unknown hvm event: 84011",
    b"  [w2h] d14v2 Starting vec 243",
    b"WARNING: hypercall  1 of nobody",
    b"   0.000006001 x d3v1 hypercall fffff",
    b"",
]


@settings(max_examples=100, deadline=None)
@given(st.lists(st.sampled_from(LINES), max_size=12), st.data())
def test_mutated_lines_against_the_twin(lines: list[bytes], data: st.DataObject) -> None:
    text = bytearray(b"\n".join([*lines, b""]))
    for _ in range(data.draw(st.integers(0, 4))):
        if text:
            at = data.draw(st.integers(0, len(text) - 1))
            text[at] = data.draw(st.sampled_from(b" x|-.d0v9a(\n\0\xff]p"))
    if text and not text.endswith(b"\n"):
        text += b"\n"
    # Generic lines and HVM's are not the twin's business.
    check(bytes(text))


# --- single lines ------------------------------------------------------------------------------------------------------


def row(line: bytes) -> dict[str, Any]:
    frame, ledger = events(line + b"\n")
    assert ledger.skipped_lines == 0
    assert len(frame) == 1
    return {
        k: v for k, v in frame.row(0, named=True).items() if v is not None and k not in ("seq", "line", "offset", "segment", "tsc")
    }


@pytest.mark.parametrize(
    ("line", "want"),
    [
        (
            b"   0.000011044 |x d4v0 lost_records count 17 d4v0 (cur d4v0) first_tsc 1000026500",
            {"pcpu": 1, "domid": 4, "vcpu": 0, "kind": "lost", "op": 0x1F001, "result": 17},
        ),
        (
            b"   0.000025006 x| d32767v0 sched_shutdown d3v1, reason = 2",
            {"pcpu": 0, "domid": 3, "vcpu": 1, "kind": "suspend", "op": 0x28007},
        ),
        (
            b"   0.000025006 x| d32767v0 sched_shutdown_code d3v1, reason = 2",
            {"pcpu": 0, "domid": 3, "vcpu": 1, "kind": "suspend", "op": 0x28010},
        ),
        (
            b"]  0.000025006 x| d3v1   28007(2:8:7) 3 [ 3 1 2 ]",
            {"pcpu": 0, "domid": 3, "vcpu": 1, "kind": "suspend", "op": 0x28007},
        ),
        (  # a sub-call of an HVM guest's multicall, which the tool does not expect there
            b"]  0.000025006 x| d3v1  20200e(20:2:e) 2 [ 40001a 80000005 ]",
            {"pcpu": 0, "domid": 3, "vcpu": 1, "kind": "subcall", "op": 26, "arg1": 0x80000005, "cut": 2},
        ),
        (  # argument bits without words are a guest's own number
            b"]  0.000025006 x| d3v1  20100d(20:1:d) 1 [ ffffffff ]",
            {"pcpu": 0, "domid": 3, "vcpu": 1, "kind": "hypercall", "op": 0xFFFFFFFF},
        ),
        (b"   0.000012002 x d4v0 vmcall 29", {"pcpu": 0, "domid": 4, "vcpu": 0, "kind": "vmmcall", "op": 41}),
        (  # arguments that no Xen records so far: 32 bits, none, 64 bits
            b"   0.000012002 x d4v0 hypercall  c (memory_op) 00000051 ?? 0000000000004096",
            {"pcpu": 0, "domid": 4, "vcpu": 0, "kind": "hypercall", "op": 12, "arg0": 0x51, "arg2": 4096, "cut": 1},
        ),
    ],
)
def test_lines(line: bytes, want: dict[str, Any]) -> None:
    assert row(line) == {"cut": 0, **want}


def test_a_call_does_not_take_another_vcpus_exit() -> None:
    exit_ = b"]  0.000003042 |x d4v0 vmexit exit_reason VMCALL eip ffffffff81234567\n"
    call = b"   0.000003042 |x d4v%d vmcall  c (memory_op)\n"
    assert events(exit_ + call % 0)[0]["rip"].to_list() == [0xFFFFFFFF81234567]
    assert events(exit_ + call % 1)[0]["rip"].to_list() == [None]
    entry = b"]  0.000005042 |x d4v0 vmentry cycles 4800 \n"
    assert events(exit_ + entry + call % 0)[0]["rip"].to_list() == [None]
    assert events(exit_ + exit_.replace(b"VMCALL", b"HLT") + call % 0)[0]["rip"].to_list() == [None]


def test_time_above_a_thousand_seconds_keeps_the_columns() -> None:
    data = b"".join(b" %3d.000000001 -x d3v1 hypercall  c (memory_op)\n" % t for t in (998, 999, 1000, 123456))
    frame, _ = events(data)
    assert frame["pcpu"].to_list() == [1] * 4
    assert frame["tsc"].to_list() == [((t * 10**9 + 1) * 2457 + 1023) // 1024 for t in (998, 999, 1000, 123456)]


# --- blocks and damage ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["samples/eras/pv32-3.3.0", "samples/eras/lost64-4.4.4", "tests/ingest/data/j4_pvh_hvm"])
def test_where_a_block_ends_never_shows(name: str) -> None:
    path = ROOT / f"{name}.xenalyze-dump.txt.zst"
    data = text_of(path)[60_000:100_000]
    data = data[data.find(b"\n") + 1 : data.rfind(b"\n") + 1]
    whole, ledger = events(data)
    for rows in (1, 7, 300):
        part, other = events(data, rows)
        assert part.equals(whole)
        assert other == ledger


@settings(max_examples=40, deadline=None)
@given(st.data())
def test_damage_never_raises_and_every_line_is_accounted_for(data: st.DataObject) -> None:
    text = bytearray(SAMPLE)
    for _ in range(data.draw(st.integers(0, 6))):
        at = data.draw(st.integers(0, len(text) - 1))
        kind = data.draw(st.sampled_from(["flip", "cut", "insert"]))
        if kind == "flip":
            text[at] = data.draw(st.integers(0, 255))
        elif kind == "cut":
            del text[at : at + data.draw(st.integers(1, 300))]
        else:
            text[at:at] = data.draw(st.sampled_from([b"\n", b"\0" * 50, b"\xff\xfe", b"x" * 70_000, b" d3v1 hypercall 1"]))
    if data.draw(st.booleans()):
        lines = bytes(text).split(b"\n")
        data.draw(st.randoms()).shuffle(lines)
        text = bytearray(b"\n".join(lines))
    frame, ledger = events(bytes(text))
    assert ledger.records + ledger.noise_lines + ledger.skipped_lines + int(ledger.truncated) == ledger.lines
    assert len(frame) <= ledger.records


SAMPLE = text_of(ROOT / "samples/eras/lost64-4.4.4.xenalyze-dump.txt.zst")[300_000:340_000]


def test_a_cut_record_is_not_used() -> None:
    data = b"   0.000002000 x d3v1 hypercall  1 (mmu_update) 5 updates\n   0.000003000 x d3v1 hypercall  1 (mmu_update) 12 upd"
    frame, ledger = events(data)
    assert frame["arg1"].to_list() == [5]
    assert ledger.truncated


def test_a_damaged_record_is_skipped_and_shown() -> None:
    data = (
        b"   0.0000020x0 x d3v1 hypercall  1 (mmu_update) 5 updates\n   0.000003000 x d3v1 hypercall  1 (mmu_update) many updates\n"
    )
    frame, ledger = events(data)
    assert len(frame) == 0
    assert ledger.skipped_lines == 2
    assert [p.line for p in ledger.problems] == [1, 2]


# --- which file ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("text", [t for t, _ in PAIRS], ids=lambda t: t.name)
def test_dumps_are_recognised(text: Path) -> None:
    with Source(text) as source:
        assert registry.detect(source).name == "xenalyze"


def test_other_samples_are_not_taken() -> None:
    for path in sorted((ROOT / "samples").rglob("*")):
        if path.is_file() and "xenalyze" not in path.name and path.suffix != ".md":
            with Source(path) as source:
                assert READER.sniff(source.head()) == 0, path


def test_the_format_knows_its_own_text() -> None:
    assert isinstance(READER.open(_Memory(b"x\n"), ReadOptions()), XenalyzeRecording)
    assert READER.sniff(b"scan_for_new_pcpu: Activating pcpu 0 at offset 0\n") == 60
    assert READER.sniff(LINES[0] + b"\n") == 90
