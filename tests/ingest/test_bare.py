"""The bare guests' recordings: counts of the READMEs, order, named memory, a slow reader as twin, damage."""

from __future__ import annotations

import io
import re
from collections import Counter
from pathlib import Path
from unittest import mock

import numpy as np
import polars as pl
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from xtrace import schema
from xtrace.ingest import bare, bare_fast
from xtrace.ingest.bare import READER
from xtrace.ingest.base import Domain, ReadOptions
from xtrace.ingest.source import Source

SAMPLES = Path(__file__).parents[2] / "samples"
# file, release, caller, CALL lines, CONT lines, as the captures' README counts them
BARE = [
    ("bare-3.4.0-rc3", "3.4.0-rc3", "pv64", 245, 866),
    ("bare-4.1.6.1", "4.1.6.1", "pv64", 245, 1957),
    ("bare-4.4.4", "4.4.4", "pv64", 245, 1977),
    ("bare-4.13.5", "4.13.5", "pv64", 245, 1511),
    ("bare-4.17.7", "4.17.7", "pv64", 245, 1686),
    ("bare-4.22.0", "4.22.0", "pv64", 245, 1478),
    ("bare-pdone-4.17.7", "4.17.7", "pv64", 245, 1697),
    ("bare32-3.4.0-rc3", "3.4.0-rc3", "pv32", 130, 479),
    ("bare32-4.4.4", "4.4.4", "pv32", 130, 799),
    ("bare32-4.13.5", "4.13.5", "pv32", 130, 814),
    ("bare32-pdone-4.4.4", "4.4.4", "pv32", 130, 843),
    ("barehvm64-4.17.7", "4.17.7", "hvm64", 55, 633),
]
ERAS = [
    ("smp64-3.4.0-rc3.txt.zst", "3.4.0-rc3", "pv64", 82, 277, {1: 526}),
    ("mv64-4.22.0.txt.zst", "4.22.0", "pv64", 82, 520, {1: 1400, 2: 1442, 3: 1470}),
    ("pv32-3.3.0.txt", "3.3.0-rc8-pre", "pv32", 44, 91, {}),
]
EVERY = [SAMPLES / "bare" / f"{name}.txt.zst" for name, *_ in BARE] + [SAMPLES / "eras" / name for name, *_ in ERAS]


class Bytes:
    damage = None

    def __init__(self, data):
        self.file, self.size, self.path = io.BytesIO(data), len(data), "-"


def read(source, batch_rows=1 << 20, tsc_khz=None):
    recording = READER.open(source, ReadOptions(batch_rows=batch_rows, tsc_khz=tsc_khz))
    frame = pl.concat([schema.empty(schema.EVENTS), *recording.batches()])
    assert frame.schema == schema.EVENTS
    return frame, recording


def memory(row):
    return None if row["memory"] is None else {item["field"]: item["value"] for item in row["memory"]}


@pytest.mark.parametrize(("name", "release", "caller", "calls", "conts"), BARE)
def test_counts(name, release, caller, calls, conts):
    with Source(SAMPLES / "bare" / f"{name}.txt.zst") as source:
        assert READER.sniff(source.head()) > 90
        frame, recording = read(source)
    ledger, observed = recording.ledger, recording.observed
    hvm = caller == "hvm64"
    assert (ledger.hypercalls, ledger.vmmcalls, ledger.samples) == (0 if hvm else calls, calls if hvm else 0, conts)
    assert (ledger.records, ledger.skipped_lines, ledger.truncated) == (calls + conts, 0, False)
    assert len(frame) == 2 * calls + conts
    assert observed.release == release
    expected = {1: Domain("hvm64", "guest")} if hvm else {0: Domain(caller, "control")}
    assert observed.domains == expected
    assert frame["caller"].cast(pl.String).unique().to_list() == [caller]
    assert frame["domid"].unique().to_list() == list(expected)
    assert frame["vcpu"].unique().to_list() == [0]
    assert frame["tsc"].is_sorted()
    assert frame["segment"].max() == 0
    assert frame["seq"].to_list() == list(range(len(frame)))
    samples = frame.filter(pl.col("kind") == "sample")
    assert samples["on_insn"].all()  # every recorded sample stands on the instruction
    assert frame.filter(pl.col("kind") != "sample")["on_insn"].null_count() == 2 * calls
    # The extraction of the PVH console repeated its last sample line.
    assert [p.text for p in ledger.problems] == (["call n=55 says that it has 24 samples; 25 lines follow"] if hvm else [])


@pytest.mark.parametrize(("name", "release", "caller", "calls", "conts", "more"), ERAS)
def test_truth_texts(name, release, caller, calls, conts, more):
    with Source(SAMPLES / "eras" / name) as source:
        assert READER.sniff(source.head()) > 90
        frame, recording = read(source)
    ledger, observed = recording.ledger, recording.observed
    assert (ledger.hypercalls, ledger.samples, ledger.skipped_lines) == (calls + sum(more.values()), conts, 0)
    assert not ledger.problems
    assert observed.release == release
    assert observed.tsc_khz in range(2_590_000, 2_610_000)  # "(XEN) Detected … MHz processor"
    assert frame["tsc"].is_sorted()
    assert frame["segment"].max() == 0
    first = frame.filter(pl.col("kind") == "hypercall")
    assert dict(first["vcpu"].value_counts().iter_rows()) == {0: calls, **more}
    assert frame["time_ns"].null_count() == 0
    others = first.filter(pl.col("vcpu") > 0)
    assert others["memory"].null_count() == len(others)
    assert others.select("arg0", "arg2").null_count().row(0) == (len(others), len(others))
    assert others["arg1"].null_count() == 0  # mmuext_op and multicall: the count


# -- the slow reference ------------------------------------------------------------------------------------------------

REGS = {"64": "rdi rsi rdx r10 r8 r9", "32": "ebx ecx edx esi edi"}


def slow_memory(op, cmd, narrow, words, pdone):
    w = [int(x, 16) for x in words.split(",")]

    def reservation(base, prefix=""):
        if narrow:
            values = w[base], w[base + 1], w[base + 2], w[base + 3], w[base + 4] & 0xFFFF
        else:
            values = w[base], w[base + 1], w[base + 2] & 0xFFFFFFFF, w[base + 2] >> 32, w[base + 3] & 0xFFFF
        names = "extent_start", "nr_extents", "extent_order", "mem_flags", "domid"
        return {prefix + name: value for name, value in zip(names, values, strict=True)}

    if op in (1, 26):
        return {"pdone": pdone}
    if op == 13:
        return dict(zip(["entry.op", "entry.result", *(f"entry.arg{i}" for i in range(6))], w, strict=False))
    if op == 12 and cmd in (0, 1, 6):
        return reservation(0)
    if op == 12 and cmd == 11:
        half = 5 if narrow else 4
        return {**reservation(0, "in."), **reservation(half, "out."), "nr_exchanged": w[2 * half]}
    if op == 12 and cmd == 7:
        low = {"domid": w[0] & 0xFFFF, "size": w[0] >> 16 & 0xFFFF, "space": w[0] >> 32}
        return {**low, "idx": w[1], "gpfn": w[2]}
    if op == 12 and cmd == 23:
        names = "domid", "space", "size", "foreign_domid"
        low = {name: w[0] >> 16 * i & 0xFFFF for i, name in enumerate(names)}
        return {**low, "idxs": w[1], "gpfns": w[2], "errs": w[3]}
    return None


def slow(text):
    out, insn = [], None
    for n, line in enumerate(text.split("\n"), start=1):
        kind = line.split(" ")[0]
        kv = dict(re.findall(r" (\w+)=(\S+)", line))
        if re.match(r"BARE\S* .*hcall_insn", line):
            insn = int(kv["hcall_insn"], 16)
        narrow = kind.endswith("32")
        regs = REGS["32" if narrow else "64"].split()
        base = dict.fromkeys(("arg0", "arg1", "arg2", "arg3", "arg4", "arg5", "rip", "on_insn", "result"))
        base |= {"line": n, "vcpu": 0, "caller": "pv32" if narrow else "hvm64" if kind.endswith("H") else "pv64"}
        if re.fullmatch(r"CALL(32|H)?", kind):
            op, ends = int(kv["op"], 0), [int(x, 0) for x in kv["tsc"].split("-")]
            args = {f"arg{i}": int(kv[reg], 0) for i, reg in enumerate(regs[:4])}
            counted = op in (1, 26)
            cmd = args["arg0"]
            entry = "vmmcall" if kind == "CALLH" else "hypercall"
            out.append(base | args | {"kind": entry, "op": op, "tsc": ends[0], "memory": {"pdone": 0} if counted else None})
            back = {"kind": "return", "op": op, "tsc": ends[1], "result": int(kv["ret"])}
            out.append(base | back | {"memory": {"pdone": int(kv["pdone"])} if counted else None})
        elif re.fullmatch(r"CONT(32|H)?", kind):
            op = int(kv["eax" if narrow else "rax"], 0)
            rip = int(kv["eip" if narrow else "rip"], 0)
            args = {f"arg{i}": int(kv[reg], 0) for i, reg in enumerate(regs)}
            named = slow_memory(op, cmd, narrow, kv["mem"], int(kv["pdone"]))
            row = {
                "kind": "sample",
                "op": op,
                "tsc": int(kv["tsc"], 0),
                "rip": rip,
                "on_insn": rip == insn,
                "memory": named,
            }
            out.insert(len(out) - 1, base | args | row)
        elif m := re.fullmatch(r"V(\d)CALL", kind):
            op, ends = int(kv["op"], 0), [int(x, 0) for x in kv["tsc"].split("-")]
            base["vcpu"] = int(m[1])
            out.append(base | {"kind": "hypercall", "op": op, "tsc": ends[0], "arg1": int(kv["n"]), "memory": None})
            out.append(base | {"kind": "return", "op": op, "tsc": ends[1], "result": int(kv["ret"]), "memory": None})
    return sorted(out, key=lambda row: (row["tsc"], row["vcpu"]))


@pytest.mark.parametrize("path", EVERY, ids=lambda path: path.name)
def test_agrees_with_the_slow_reader(path):
    with Source(path) as source:
        frame, _ = read(source)
        source.file.seek(0)
        expected = slow(source.file.read().decode())
    assert len(frame) == len(expected)
    for row, want in zip(frame.iter_rows(named=True), expected, strict=True):
        got = {name: row[name] for name in want} | {"memory": memory(row)}
        assert got == want


@pytest.mark.parametrize("path", [EVERY[0], EVERY[11], EVERY[12], EVERY[13]], ids=lambda path: path.name)
@pytest.mark.parametrize("batch_rows", [37, 1000])
def test_batches_do_not_matter(path, batch_rows):
    with Source(path) as source:
        whole, first = read(source)
        parts, second = read(source, batch_rows)
    assert whole.equals(parts)
    assert first.ledger == second.ledger
    assert first.observed == second.observed


def test_offsets_point_to_the_line():
    with Source(SAMPLES / "bare" / "bare-4.4.4.txt.zst") as source:
        frame, _ = read(source)
        source.file.seek(0)
        data = source.file.read()
    lines = data.split(b"\n")
    for offset, line, kind in frame.select("offset", "line", "kind").iter_rows():
        assert data[offset:].startswith(b"CONT" if kind == "sample" else b"CALL")
        assert data[offset:].split(b"\n", 1)[0] == lines[line - 1]


def test_progress_of_an_exchange_is_in_memory():
    with Source(SAMPLES / "bare" / "bare-4.4.4.txt.zst") as source:
        frame, _ = read(source)
    samples = list(frame.filter(kind="sample", op=12, arg0=11).iter_rows(named=True))
    assert samples
    for row in samples:
        fields = memory(row)
        assert 0 < fields["nr_exchanged"] <= fields["in.nr_extents"] == 2048
        assert fields["in.domid"] == fields["out.domid"] == 0x7FF0


def test_tally_by_op():
    with Source(SAMPLES / "bare" / "bare32-4.4.4.txt.zst") as source:
        frame, _ = read(source)
    samples = frame.filter(pl.col("kind") == "sample")
    assert Counter(samples["op"]) == {0: 3, 1: 69, 18: 39, 20: 226, 26: 75, 12: 148, 13: 239}
    assert samples["arg5"].null_count() == len(samples)  # ebp is the guest's sentinel


@settings(max_examples=60, deadline=None)
@given(st.lists(st.tuples(st.floats(0, 1, exclude_max=True), st.sampled_from(b"0123456789abcxX=, \t\r-\x00\xffq")), max_size=12))
@example([(0.4296875, 48), (0.4197269607732706, 48)])
@example([(0.46875, 9)])
@example([(0.908203125, 88)])
def test_samples_at_once_agree_with_the_regular_expressions(flips):
    data = bytearray(
        START + call(samples=3) + cont() + cont(mem="0x1,0x2") + cont(tsc=160) + call(2, op="0x1a") + cont(2, rax="0x1a")
    )
    for place, byte in flips:
        at = int(place * len(data))
        if data[at] != 10:
            data[at] = byte

    def none(raw, start, keys, numbers):
        frame, _ = bare_fast.samples(raw, start[:0], keys, numbers)
        return frame, np.zeros(len(start), dtype=bool)

    for lines in (1, 1 << 11):
        with mock.patch.object(bare_fast, "_LINES", lines):
            fast, first = read(Bytes(bytes(data)))
        with mock.patch.object(bare, "samples", none):
            slowly, second = read(Bytes(bytes(data)))
        assert fast.equals(slowly)
        assert (first.ledger, first.observed) == (second.ledger, second.observed)


# -- damage ------------------------------------------------------------------------------------------------------------

START = b"BARE start xen=4.4.4 nr_pages=32768 hcall_insn=0xffffffff80102029 pt_base=0x0 mfn_list=0x0\n"


def call(n=1, op="0xc", samples=1, tsc="100-200", word="CALL", xen="4.4.4"):
    return (
        f"{word} xen={xen} n={n} name=grant_table_op.copy (self) mode=pending op={op} rdi=0x1 rsi=0x2 rdx=0x3 r10=0x4"
        f" ret=-14 retraw=0xfffffff2 pdone=5 samples={samples} tsc={tsc}\n"
    ).encode()


def cont(n=1, rip="0xffffffff80102029", tsc=150, rax="0xc", mem="0x1,0x2,0x3,0x4,0x5,0x6,0x7,0x8,0x9"):
    return (
        f"CONT n={n} i=0 tsc={tsc} rip={rip} rax={rax} rdi=0x41 rsi=0x2 rdx=0x3 r10=0x4 r8=0x5 r9=0x6 rcx=0x0 r11=0x0"
        f" rbx=0x1111 rbp=0x2222 cs=0xe030 rflags=0x246 pdone=3 mem={mem}\n"
    ).encode()


def test_cuts():
    data = START + call() + cont() + b"V1CALL op=0xd n=4 ret=0 tsc=120-130\n" + call(2, tsc="300-400", samples=0)
    whole, _ = read(Bytes(data))
    assert len(whole) == 7
    assert read(Bytes(data), 1)[0].equals(whole)
    breaks = [i for i, byte in enumerate(data) if byte == 10]
    near = {i + d for i in breaks for d in range(-12, 12) if 0 <= i + d < len(data)}
    for end in sorted(near | set(range(0, len(data), 5))):  # every one takes a minute
        frame, recording = read(Bytes(data[:end]))
        assert set(frame.drop("seq").select("line", "kind", "tsc").rows()) <= set(whole.select("line", "kind", "tsc").rows())
        last = data[:end].rsplit(b"\n", 1)[-1]
        if re.match(rb"(CALL|CONT|V1CALL) ", last):
            assert recording.ledger.truncated


def test_missing_samples_at_the_end_mean_truncated():
    assert read(Bytes(START + call(samples=2) + cont()))[1].ledger.truncated
    _, recording = read(Bytes(START + call(samples=2) + cont() + b"BARE end\n"))
    assert not recording.ledger.truncated
    assert recording.ledger.problems[0].text == "call n=1 says that it has 2 samples; 1 lines follow"


def test_stray_sample_keeps_registers_but_no_names():
    frame, recording = read(Bytes(START + cont(7)))
    assert frame.select("kind", "op", "arg0", "on_insn").rows() == [("sample", 12, 0x41, True)]
    assert frame["memory"].to_list() == [None]
    assert recording.ledger.problems[0].line == 2


def test_off_the_instruction_and_unknown():
    frame, _ = read(Bytes(START + call() + cont(rip="0xffffffff8010202b")))
    assert frame.filter(kind="sample")["on_insn"].to_list() == [False]
    frame, recording = read(Bytes(call() + cont()))
    assert frame.filter(kind="sample")["on_insn"].to_list() == [None]
    assert recording.observed.release == "4.4.4"


def test_short_memory_has_no_fields():
    frame, _ = read(Bytes(START + call() + cont(mem="0x1,0x2,0x3")))
    assert frame.filter(kind="sample")["memory"].to_list() == [None]


def test_done_counter_at_issue_and_return():
    frame, _ = read(Bytes(START + call(op="0x1a") + cont(rax="0x1a")))
    assert [memory(row) for row in frame.iter_rows(named=True)] == [{"pdone": 0}, {"pdone": 3}, {"pdone": 5}]


def test_two_boots_are_two_segments():
    data = START + call(tsc="100-200", samples=0) + START.replace(b"4.4.4", b"4.5.0") + call(tsc="300-400", samples=0)
    for batch_rows in (1, 100):
        frame, recording = read(Bytes(data), batch_rows)
        assert frame["segment"].to_list() == [0, 0, 1, 1]
        assert recording.observed.release == "4.4.4"
        assert "another release, 4.5.0" in recording.ledger.problems[0].text


def test_tsc_back_is_a_new_segment():
    frame, _ = read(Bytes(START + call(tsc="300-400", samples=0) + call(2, tsc="100-200", samples=0)))
    assert frame["tsc"].to_list() == [300, 400, 100, 200]
    assert frame["segment"].to_list() == [0, 0, 1, 1]


@pytest.mark.parametrize(
    "line",
    [
        call(tsc="99999999999999999999-1"),
        call(op="0x100000000"),
        call().replace(b"rdi=0x1", b"rdi=0x11111111111111111"),
        call().replace(b"rdi=0x1", b"rdi=-1"),
        call().replace(b"rdi=0x1", b"rdi=0x1\x00"),
        call().replace(b"ret=-14", b"ret=99999999999999999999"),
        cont().replace(b"mem=0x1", b"mem=q"),
        cont().replace(b"rax", b"eax"),
        b"CALL\n",
        b"V1CALL op=0x1 n=5 ret=x tsc=1-2\n",
    ],
)
def test_hostile_lines(line):
    frame, recording = read(Bytes(START + line + b"\xff\x00\n" + call(9, samples=0)))
    assert frame["line"].unique().to_list() == [4]
    assert (recording.ledger.skipped_lines, recording.ledger.noise_lines) == (1, 2)
    assert recording.ledger.problems[0].line == 2


def test_long_line_is_skipped():
    frame, recording = read(Bytes(b"C" * (10 << 20) + b"\n" + call(samples=0)), 1000)
    assert len(frame) == 2
    assert recording.ledger.skipped_lines == 1


def test_sniff():
    assert READER.sniff(call()) > 80
    for other in (b"", b"BARE\n", b"CALL me\n", b"xtrace: call op=1\n", bytes(range(256))):
        assert READER.sniff(other) == 0
