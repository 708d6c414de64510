"""xtrace's text log: the vectorised reader against a slow one, hostile input, and the examples of its own document."""

from __future__ import annotations

import io
import re
import tracemalloc
from dataclasses import replace
from pathlib import Path
from unittest import mock

import numpy as np
import polars as pl
import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from xtrace import schema
from xtrace.ingest import keyvalue, xtrace_log, xtrace_log_fast
from xtrace.ingest.base import Domain, ReadOptions
from xtrace.ingest.hypercalls import HYPERCALLS
from xtrace.ingest.lines import MAX_LINE
from xtrace.ingest.source import Source
from xtrace.ingest.xtrace_log import READER

DOC = Path(__file__).parents[2] / "docs" / "xtrace-log.md"


class Bytes:
    """A Source over bytes in memory."""

    damage = None

    def __init__(self, data):
        self.file, self.size, self.path = io.BytesIO(data), len(data), "-"


def read(data, batch_rows=1 << 20, tsc_khz=None):
    recording = READER.open(Bytes(data), ReadOptions(batch_rows=batch_rows, tsc_khz=tsc_khz))
    frame = pl.concat([schema.empty(schema.EVENTS), *recording.batches()])
    assert frame.schema == schema.EVENTS
    return frame, recording


def rows(data, *columns):
    frame, _ = read(data)
    return frame.select(columns).rows() if len(columns) > 1 else frame[columns[0]].to_list()


# -- the slow reference ------------------------------------------------------------------------------------------------

LIMIT = {
    "tsc": 2**64,
    "time_ns": 2**63,
    "pcpu": 2**16,
    "dom": 2**16,
    "vcpu": 2**16,
    "op": 2**32,
    "rip": 2**64,
    "on_insn": 2,
    "n": 2**63,
}


def number(text):
    if re.fullmatch(r"0[xX][0-9a-fA-F]{1,16}", text):
        return int(text, 16)
    return int(text) if re.fullmatch(r"[0-9]{1,20}", text) and int(text) < 2**64 else None


class Reject(Exception):
    pass


def slow_record(words):
    if not words or words[0] not in {*schema.KINDS, "call"} - {"vmexit", "vmentry"}:
        raise Reject
    row = {"word": words[0], "cut": 0, "memory": None, "unknown": []}
    for word in words[1:]:
        key, equals, text = word.partition("=")
        if not equals or not key:
            raise Reject
        if re.fullmatch(r"mem\.[a-z_][a-z0-9_]*(\.[a-z0-9_]+)*", key):
            sign, value = (-1 if text.startswith("-") else 1), number(text.removeprefix("-"))
            if value is None or (sign < 0 and value > 2**63):
                raise Reject
            row["memory"] = row["memory"] or []
            if key[4:] in [item["field"] for item in row["memory"]]:
                raise Reject
            row["memory"].append({"field": key[4:], "value": sign * value % 2**64})
            continue
        column = key
        if m := re.fullmatch(r"a([0-5])(~?)", key):
            column, value = f"arg{m[1]}", number(text)
            if value is None or (m[2] and value >= 2**32):
                raise Reject
            row["cut"] |= bool(m[2]) << int(m[1])
        elif key == "caller":
            value = text if text in schema.CALLERS else None
        elif key == "op":
            value = number(text)
            value = HYPERCALLS.get(text.removeprefix("__HYPERVISOR_")) if value is None else value
        elif key == "result":
            value = number(text.removeprefix("-"))
            if value is not None:
                if text.startswith("-"):
                    value = None if value > 2**63 else -value
                elif value >= 2**63:
                    value -= 2**64
        elif key in LIMIT:
            value = number(text)
        else:
            row["unknown"].append(key)
            continue
        if value is None or (key in LIMIT and value >= LIMIT[key]) or column in row:
            raise Reject
        row[column] = value
    if row["word"] in ("call", "hypercall", "vmmcall", "subcall") and "op" not in row:
        raise Reject
    return row


def slow(data):
    """Read record by record; header and domain lines with valid fields only (what the strategy makes)."""
    out, stats = [], {"noise": 0, "skipped": 0, "truncated": False}
    callers, khz, clocks, offset = {}, None, {}, 0
    lines = data.split(b"\n")
    for n, raw in enumerate(lines, start=1):
        at, offset = offset, offset + len(raw) + 1
        last = n == len(lines)
        if last and not raw:
            break
        if len(raw) > MAX_LINE:
            stats["skipped"] += 1
            continue
        text = raw.decode("utf-8", "replace")
        m = re.search(r"(?:^|[^A-Za-z0-9_.\-/])xtrace:((?:[ \t].*)?)\Z", text, re.DOTALL)
        if not m:
            stats["noise"] += 1
            continue
        words = [w for w in re.split(r"[ \t\r]+", m[1]) if w]
        if last and words[-1:] != [";"]:
            stats["truncated"] = True
            continue
        words = words[:-1] if words[-1:] == [";"] else words
        if words[:1] in (["header"], ["domain"]):
            pairs = dict(w.split("=") for w in words[1:])
            khz = int(pairs.get("tsc_khz", khz or 0)) or None
            if "caller" in pairs:
                callers[int(pairs["id"])] = pairs["caller"]
            continue
        try:
            row = slow_record(words)
        except Reject:
            stats["skipped"] += 1
            continue
        row["seq"], row["line"], row["offset"] = len(out), n, at
        row.setdefault("caller", callers.get(row.get("dom")))
        row["kind"] = row.pop("word")
        if row["kind"] == "call":
            row["kind"] = "vmmcall" if row["caller"] in ("hvm64", "hvm32", "pvh64") else "hypercall"
        if row["kind"] == "lost":
            row["result"] = row.get("n")
        elif row["caller"] in ("pv32", "hvm32", "arm32") and 2**31 <= row.get("result", 0) < 2**32:
            row["result"] -= 2**32
        clock = row["pcpu"] if "pcpu" in row else (row.get("dom"), row.get("vcpu"))
        before, segment = clocks.get(clock, (None, 0))
        tsc = row.get("tsc", before)
        segment += before is not None and tsc < before
        clocks[clock] = tsc, segment
        row["tsc"], row["segment"] = tsc, segment
        if "time_ns" not in row and khz and tsc is not None and tsc // khz < 2**63 // 10**6:
            row["time_ns"] = tsc * 10**6 // khz
        row["domid"] = row.pop("dom", None)
        out.append({name: row.get(name) for name in schema.EVENTS})
        if out[-1]["on_insn"] is not None:
            out[-1]["on_insn"] = bool(out[-1]["on_insn"])
    return out, stats


# -- random logs -------------------------------------------------------------------------------------------------------

u64 = st.one_of(st.integers(0, 2**64 - 1), st.integers(0, 300), st.just(2**63))
odd = st.sampled_from(
    [
        "-1",
        "",
        "0x",
        "0x10000000000000000",
        "18446744073709551616",
        "1e5",
        "+3",
        "0x1g",
        "½",
        "9" * 30,
        "0X1F",
        "007",
        "-",
    ]
)


def printed(values):
    return values.flatmap(lambda v: st.sampled_from([str(v), hex(v)]))


def word(key, values):
    return printed(values).map(lambda text: f"{key}={text}")


small = st.integers(0, 3)
good = st.one_of(
    word("tsc", st.one_of(u64, st.integers(0, 50))),
    word("time_ns", st.integers(0, 2**63 - 1)),
    word("pcpu", small),
    word("dom", small),
    word("vcpu", small),
    word("op", st.integers(0, 60)),
    st.sampled_from(["op=memory_op", "op=__HYPERVISOR_multicall", "op=bogus_op", "op=arch_3"]),
    st.sampled_from([f"caller={c}" for c in schema.CALLERS]),
    st.integers(0, 5).flatmap(lambda n: word(f"a{n}", u64)),
    st.integers(0, 5).flatmap(lambda n: word(f"a{n}~", st.integers(0, 2**32 - 1))),
    word("rip", u64),
    word("on_insn", st.integers(0, 1)),
    st.one_of(u64, st.just(0xFFFFFFEA)).map(lambda v: f"result={v}"),
    st.integers(-(2**63), 0).map(lambda v: f"result={v}"),
    word("n", st.integers(0, 2**40)),
    st.sampled_from(["mem.nr_extents", "mem.in.nr_extents", "mem.entry.arg0", "mem.pdone"]).flatmap(lambda key: word(key, u64)),
    st.just("mem.entry.result=-14"),
)
keys = st.sampled_from(["tsc", "pcpu", "dom", "op", "a0", "a1~", "result", "rip", "on_insn", "mem.x", "mem.", "foo", "", "n"])
bad = st.one_of(st.tuples(keys, odd).map("=".join), st.sampled_from([";", "word", "=", "a9=1", "xtrace:", "mem.A=1", "\x00=\x00"]))
kinds = st.sampled_from([*xtrace_log.KINDS, "call", "sample", "return", "vmexit", "calls", ""])
prefix = st.sampled_from(["", "(XEN) [  12.3] ", "é(d1) ", "my", "a.", "[1]", "\t", "xtrace:x ", "\x00"])
record = st.builds(
    lambda p, k, ws, sep, tail: p + sep.join(["xtrace:", k, *ws]) + tail,
    prefix,
    kinds,
    st.lists(st.one_of(good, good, good, good, good, bad), max_size=7),
    st.sampled_from([" ", "  ", " \t"]),
    st.sampled_from(["", "", " ;", " ", "\r"]),
).map(str.encode)
clean = st.builds(
    lambda k, p, t, op: f"xtrace: {k} pcpu={p} tsc={t} op={op}".encode(),
    st.sampled_from(list(xtrace_log.KINDS)),
    small,
    st.integers(0, 100),
    st.integers(0, 50),
)
header = st.sampled_from(
    [
        b"xtrace: header release=4.4.1 tsc_khz=2600000",
        b"(XEN) xtrace: domain id=1 caller=pv32",
        b"xtrace: domain id=1 caller=hvm64 role=guest",
        b"xtrace: domain id=2 caller=pv64 name=web1 ;",
    ]
)
noise = st.one_of(st.binary(max_size=40).map(lambda b: b.replace(b"\n", b"")), st.just(b"(XEN) booting"))
logs = st.builds(
    lambda lines, end, cut: (b"\n".join(lines) + end)[: cut or None],
    st.lists(st.one_of(record, record, clean, header, noise), max_size=25),
    st.sampled_from([b"\n", b""]),
    st.one_of(st.just(0), st.integers(-20, -1)),
)


@settings(max_examples=400, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@example(b"(XEN) booting\nxtrace: domain id=2 caller=pv64 name=web1 ;\nxtrace: call\nxtrace: return tsc=9 dom=2\n", 1)
@given(logs, st.integers(1, 30))
def test_agrees_with_the_slow_reader(data, batch_rows):
    expected, stats = slow(data)
    frame, recording = read(data, batch_rows)
    assert frame.to_dicts() == expected
    ledger = recording.ledger
    assert (ledger.noise_lines, ledger.skipped_lines, ledger.truncated) == (
        stats["noise"],
        stats["skipped"],
        stats["truncated"],
    )
    assert ledger.records == len(expected)
    assert ledger.samples == sum(row["kind"] == "sample" for row in expected)
    assert ledger.lost_records == sum(row["result"] or 0 for row in expected if row["kind"] == "lost")


@settings(max_examples=100, deadline=None)
@given(logs, st.integers(1, 30))
def test_batches_do_not_matter(data, batch_rows):
    whole, first = read(data)
    parts, second = read(data, batch_rows)
    assert whole.equals(parts)
    assert first.ledger == second.ledger
    assert first.observed == second.observed


@settings(max_examples=200, deadline=None)
@given(st.binary(max_size=300))
def test_any_bytes(data):
    read(data, 3)
    READER.sniff(data)


# -- the fast path and the general one -------------------------------------------------------------------------------

ordered = st.builds(
    lambda p, k, ws, tail: (p + " ".join(["xtrace:", k, *ws]) + tail).encode(),
    st.sampled_from(["", "", "(XEN) [  12.3] ", "a=b ", "xtrace "]),
    st.sampled_from([*xtrace_log.KINDS]),
    st.lists(st.one_of(good, good, good, good, bad), max_size=6, unique_by=lambda word: word.split("=")[0]),
    st.sampled_from(["", " ;", " ;", "; ", " ; "]),
)


def nothing(raw, longest, *, cut):
    """As `plain`, and no line is."""
    whole = xtrace_log_fast.plain(raw, longest, cut=cut)
    none = xtrace_log_fast.plain(b"\n" * len(whole.size), longest, cut=cut)
    return replace(whole, taken=none.taken, records=none.records)


@settings(max_examples=200, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(st.lists(st.one_of(ordered, ordered, record, header, noise), max_size=25).map(b"\n".join), st.sampled_from([1, 40, 1 << 19]))
def test_fast_and_general_agree(data, part):
    with mock.patch.object(xtrace_log_fast, "_PART", part):
        fast, first = read(data + b"\n")
    with mock.patch.object(xtrace_log, "plain", nothing):
        general, second = read(data + b"\n")
    assert fast.equals(general)
    assert (first.ledger, first.observed) == (second.ledger, second.observed)


def test_plain_lines_are_taken():
    lines = [
        b"xtrace: call tsc=0x9a3f0011 pcpu=0 dom=3 vcpu=1 op=memory_op a0=0x1 a1=0xFFFFFFFF80208c60 mem.nr_extents=64",
        b"(XEN) [  12.3] xtrace: sample tsc=12345678901234567 op=12 a1~=0x80208c60 caller=pvh64 on_insn=1 result=-22 ;",
        b"xtrace: lost",
        b"xtrace: hypercall op=__HYPERVISOR_multicall mem.entry.memory.nr_extents=-1 mem.b=2 ;",
    ]
    assert xtrace_log_fast.plain(b"\n".join(lines) + b"\n", MAX_LINE, cut=False).taken.all()
    for i, line in enumerate(lines):
        doubtful = (
            line.replace(b" ", b"  "),
            line + b"\r",
            line + b" cookie=7",
            line + b" tsc=1 tsc=2",
            line.replace(b"xtr", b"_xtr"),
        )
        for other in doubtful:
            block = b"\n".join([*lines[:i], other, *lines[i + 1 :]]) + b"\n"
            assert xtrace_log_fast.plain(block, MAX_LINE, cut=False).taken.tolist() == [j != i for j in range(len(lines))], other


@settings(max_examples=300, deadline=None)
@given(st.lists(st.one_of(printed(u64), odd, st.text("0123456789abcdefxXgG-", max_size=24)), min_size=1))
def test_numbers_at_once(texts):
    raw = "\n".join(texts).encode() + b"\n"
    text = keyvalue.Bytes(raw)
    ends = np.flatnonzero(text.data == 10)
    value, fine = text.numbers(ends[:-1] + 1, ends[1:])
    for one, got, ok in zip(texts, value.tolist(), fine.tolist(), strict=True):
        expected = number(one)
        assert (got if ok else None) == expected or (not ok and len(one) == 20)  # 20 digits are left to others


def test_names_at_once():
    words = [b"nr_extents", b"in.nr_extents", b"nr_extents", b"x" * 32, b"z" * 33, b"x" * 31 + b"y", b"", b"a", b"nr_extent"]
    text = keyvalue.Bytes(b" ".join(words) + b"\n")
    size = np.array([len(w) for w in words])
    start = np.cumsum(size + 1) - size - 1 + keyvalue.PAD
    names = keyvalue.Names(text, start, size)
    assert [names.names[c].encode() if c >= 0 else None for c in names.code.tolist()] == [
        w if len(w) <= 32 else None for w in words
    ]


# -- single points -----------------------------------------------------------------------------------------------------

FULL = (
    b"(XEN) booting\n"
    b"xtrace: header release=4.4.1 arch=x86_64 tsc_khz=2600000\n"
    b"xtrace: domain id=3 caller=pv64 role=guest name=web1\n"
    b"(XEN) [  12.3] xtrace: call tsc=2600000 pcpu=0 dom=3 vcpu=1 op=memory_op a0=1 a1=0xffffffff80208c60"
    b" mem.nr_extents=64\n"
    b"xtrace: sample tsc=5200000 pcpu=0 dom=3 vcpu=1 op=12 a0=0x51 a1~=0x80208c60 rip=0xffffffff80102029 on_insn=1\n"
    b"xtrace: return tsc=7800000 pcpu=0 dom=3 vcpu=1 op=12 result=-22\n"
)


def test_a_whole_log():
    frame, recording = read(FULL)
    call, sample, ret = frame.to_dicts()
    assert call["kind"] == "hypercall"
    assert (call["line"], call["offset"], call["caller"], call["op"]) == (4, FULL.index(b"(XEN) [  12.3]"), "pv64", 12)
    assert call["memory"] == [{"field": "nr_extents", "value": 64}]
    assert (call["time_ns"], call["arg2"], call["cut"]) == (1_000_000, None, 0)
    assert (sample["arg1"], sample["cut"], sample["on_insn"]) == (0x80208C60, 2, True)
    assert (ret["result"], ret["op"], ret["arg0"], ret["memory"]) == (-22, 12, None, None)
    observed = recording.observed
    assert (observed.release, observed.arch, observed.tsc_khz, observed.pcpus) == ("4.4.1", "x86_64", 2600000, 1)
    assert observed.domains == {3: Domain("pv64", "guest", "web1")}
    assert (observed.first_tsc, observed.last_tsc) == (2600000, 7800000)
    ledger = recording.ledger
    assert (ledger.records, ledger.hypercalls, ledger.samples, ledger.noise_lines) == (3, 1, 1, 1)
    assert not ledger.problems


def test_the_callers_frequency_wins():
    assert read(FULL, tsc_khz=1300000)[0]["time_ns"].to_list() == [2_000_000, 4_000_000, 6_000_000]


def test_call_follows_the_caller():
    data = (
        b"xtrace: call op=12 dom=1\nxtrace: domain id=1 caller=hvm64\nxtrace: call op=12 dom=1\n"
        b"xtrace: call op=12 caller=arm64\nxtrace: hypercall op=12 caller=hvm64\n"
    )
    assert rows(data, "kind", "caller") == [
        ("hypercall", None),
        ("vmmcall", "hvm64"),
        ("hypercall", "arm64"),
        ("hypercall", "hvm64"),
    ]


def test_segments_and_inherited_tsc():
    data = b"".join(
        b"xtrace: sample " + words + b"\n"
        for words in (
            b"pcpu=0",
            b"pcpu=0 tsc=5",
            b"pcpu=1 tsc=3",
            b"pcpu=0",
            b"pcpu=0 tsc=4",
            b"pcpu=1 tsc=3",
            b"tsc=1",
        )
    )
    assert rows(data, "tsc", "segment") == [(None, 0), (5, 0), (3, 0), (5, 0), (4, 1), (3, 0), (1, 0)]


def test_unattributed_and_lost():
    _, recording = read(b"xtrace: call op=1\nxtrace: call op=1 vcpu=0\nxtrace: lost n=5\nxtrace: lost\n")
    ledger = recording.ledger
    assert (ledger.unattributed, ledger.lost_events, ledger.lost_records) == (1, 2, 5)


def test_unknown_key_is_noted_once():
    frame, recording = read(b"xtrace: call op=1 cookie=7\nxtrace: call op=1 cookie=7 jar=x\n", 1)
    assert len(frame) == 2
    assert [(p.text, p.line) for p in recording.ledger.problems] == [
        ("unknown key `cookie` was ignored", 1),
        ("unknown key `jar` was ignored", 2),
    ]


@pytest.mark.parametrize(
    ("words", "why"),
    [
        ("call op=bogus_op", "`op=bogus_op` is no hypercall that is known; give its number"),
        ("call tsc=5", "a call without op="),
        ("call op=1 tsc=-5", "`tsc=-5` cannot be negative"),
        ("call op=1 op=2", "`op` is given twice"),
        ("call op=1 a1=1 a1~=1", "is given twice"),
        ("call op=1 a1~=0x100000000", "out of range"),
        ("call op=1 tsc=99999999999999999999", "`tsc=99999999999999999999` is not a value"),
        ("call op=4294967296", "out of range"),
        ("call op=1 vcpu=65536", "out of range"),
        ("sample on_insn=2", "out of range"),
        ("return result=-9223372036854775809", "out of range"),
        ("call op=1 xtrace: call", "`xtrace:` is not key=value"),
        ("call op=1 a0=", "`a0=` is not a value"),
        ("call op=1 a0=1\x00", "is not a value"),
        ("call op=1 a0=0x1ffffffffffffffff", "is not a value"),
        ("call op=1 caller=pv", "is not a value"),
        ("loaded", "`loaded` is no kind of record"),
        ("", "nothing follows the marker"),
        ("header release", "is not key=value"),
        ("header tsc_khz=0", "is not a number from 1"),
        ("domain caller=pv64", "no id="),
        ("domain id=70000", "is not a number from 0 to 65535"),
        ("domain id=1 caller=pv", "is none of"),
    ],
)
def test_a_line_that_is_not_understood(words, why):
    data = b"noise\nxtrace: " + words.encode() + b"\nxtrace: call op=1\n"
    frame, recording = read(data)
    assert frame["op"].to_list() == [1]
    assert recording.ledger.skipped_lines == 1
    (problem,) = recording.ledger.problems
    assert why in problem.text
    assert (problem.line, problem.offset) == (2, 6)


def test_many_bad_lines_are_counted_not_kept():
    _, recording = read(b"xtrace: nonsense\n" * 1000, 7)
    ledger = recording.ledger
    assert (ledger.skipped_lines, len(ledger.problems), ledger.problems_dropped) == (1000, ledger.KEEP, 980)
    assert [p.line for p in ledger.problems] == list(range(1, 21))


def test_release_said_twice():
    _, recording = read(b"xtrace: header release=4.4.1\nxtrace: header release=4.5.0\n")
    assert recording.observed.release == "4.4.1"
    assert "4.5.0" in recording.ledger.problems[0].text


def test_marker_is_a_word():
    data = b"myxtrace: call op=1\na.xtrace: call op=1\n[x]xtrace: call op=2\nxtrace:call op=3\n(XEN)xtrace:\tcall op=4\n"
    frame, recording = read(data)
    assert frame["op"].to_list() == [2, 4]
    assert recording.ledger.noise_lines == 3


def test_last_line_without_newline():
    cut = b"xtrace: call op=12 a0=0x1"
    frame, recording = read(b"xtrace: call op=1\n" + cut)
    assert frame["op"].to_list() == [1]
    assert recording.ledger.truncated
    assert recording.ledger.skipped_bytes == len(cut)
    frame, recording = read(cut + b" ;")
    assert frame["arg0"].to_list() == [1]
    assert not recording.ledger.truncated
    assert not read(b"xtrace: call op=1\n(XEN) hal")[1].ledger.truncated


def test_every_cut():
    whole, _ = read(FULL)
    for end in range(len(FULL) + 1):
        frame, _ = read(FULL[:end], 2)
        assert frame.equals(whole[: len(frame)])  # a cut invents nothing


def test_long_line():
    record = b"xtrace: call op=1 a0="
    fits = record + b"0" * (MAX_LINE - len(record) - 2) + b" ;"
    data = b"x" * (10 << 20) + b" xtrace: call op=9\nxtrace: call op=2\n" + fits + b"\n" + fits + b" \nxtrace: call op=3\n"
    for batch_rows in (1 << 20, 1000, 1):
        frame, recording = read(data, batch_rows)
        assert frame["op"].to_list() == [2, 3]  # 65k digits are no number
        assert (recording.ledger.skipped_lines, len(recording.ledger.problems)) == (3, 3)
        assert recording.ledger.problems[0].text.startswith(f"a line of {(10 << 20) + 18} bytes")


def test_endless_line_needs_little_memory():
    class Endless(io.RawIOBase):
        left = 400

        def seek(self, *_):
            return 0

        def read(self, size=-1):
            self.left -= 1
            return b"A" * size if self.left > 0 else b""

    source = Bytes(b"")
    source.file = Endless()
    tracemalloc.start()
    recording = READER.open(source, ReadOptions())
    assert list(recording.batches()) == []
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 64 << 20  # 1.6 GB went by
    assert recording.ledger.skipped_lines == 1


def test_invalid_utf8_and_nul():
    data = b"\xff\xfe\x00 xtrace: call op=1 k\xff=\xff\nxtrace: call op=\xff\nxtrace: call op=2\n"
    frame, recording = read(data)
    assert frame.select("op", "offset").rows() == [(1, 0), (2, data.rindex(b"xtrace"))]
    assert recording.ledger.skipped_lines == 1


def test_sniff():
    assert READER.sniff(FULL) > 90
    assert READER.sniff(b"boot\n(XEN) xtrace: lost\n") > 90
    for other in (b"", b"ftrace: call op=1\n", b"xtrace: started\n", b"xtrace: callback\n", bytes(range(256)) * 8):
        assert READER.sniff(other) == 0


def test_the_documents_examples(tmp_path):
    text = DOC.read_text(encoding="utf-8")
    blocks = re.findall(r"```xtrace-log\n(.*?)```", text, re.DOTALL)
    assert len(blocks) == 3
    first = "".join(line[4:] + "\n" for line in text.split("\n") if line.startswith(("    xtrace: ", "    (XEN)")))
    for block, records in zip((first, *blocks), (3, 2, 1, 7), strict=True):
        path = tmp_path / "example.log"
        path.write_text(block, encoding="utf-8")
        with Source(path) as source:
            assert READER.sniff(source.head()) > 90
            recording = READER.open(source, ReadOptions())
            assert sum(len(frame) for frame in recording.batches()) == records
            assert not recording.ledger.problems


def test_the_document_names_every_key_and_kind():
    text = DOC.read_text(encoding="utf-8")
    grammar = text[text.index("## Grammar") : text.index("| kind |")]
    for key in xtrace_log.LIMITS:
        assert f'"{key}=' in grammar or f'"{key.rstrip("~")}"' in grammar, key
    for kind in (*xtrace_log.KINDS, *schema.CALLERS):
        assert f'"{kind}"' in grammar, kind
