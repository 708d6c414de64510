"""Console logs: the vectorised reader against a slow one, blocks, damage, what the log says of its host."""

from __future__ import annotations

import io
import random
from pathlib import Path

import console_twin as twin
import polars as pl
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from xtrace import schema
from xtrace.ingest import registry
from xtrace.ingest.base import ReadOptions
from xtrace.ingest.console import READER
from xtrace.ingest.source import Source

SAMPLES = Path(__file__).parents[2] / "samples"
LOGS = sorted(p for p in (SAMPLES / "console").glob("*.txt") if not p.name.startswith("xenctx"))
REGS = {"rip": 0xFFFFFFFF8010202B, "rflags": 0x246, "rax": 0xC, "rcx": 0xFFFFFFFF8010202D, "rdx": 0, "rsi": 0x1000, "rdi": 0x146,
        "r11": 0x246}  # fmt: skip
COLUMNS = ("kind", "caller", "domid", "vcpu", "pcpu", "op", *schema.ARGS, "rip", "on_insn", "result", "memory")


class Bytes:
    damage = None

    def __init__(self, data):
        self.file, self.size, self.path = io.BytesIO(data), len(data), "-"


def read(data, batch_rows=1 << 20, tsc_khz=None):
    recording = READER.open(Bytes(data), ReadOptions(batch_rows=batch_rows, tsc_khz=tsc_khz))
    frame = pl.concat([schema.empty(schema.EVENTS), *recording.batches()])
    assert frame.schema == schema.EVENTS
    return frame, recording


def slow(data):
    """Return rows (line, columns) in order, and lines that were not understood."""
    lines = data.decode("utf-8", "replace").split("\n")[:-1]
    rows, bad = [], []
    for n, part in enumerate((twin.dumps, twin.progress, twin.multicalls)):
        anchor = 0
        for i, event in part(lines):
            # The entries of a multicall follow its first line.
            first = n < 2 or "multicall(s) failed" in lines[i]
            anchor = i if first or (event["kind"] == "hypercall" and n < 2) else anchor
            if event is None:
                bad.append(i + 1)
                continue
            place = i
            if n == 2 and "multicall(s) failed" not in lines[i]:
                place = max(k for k in range(i) if "multicall(s) failed: cpu " in lines[k])
            rows.append((place, len(rows), i + 1, tuple(event.get(c) for c in COLUMNS)))
    return [(line, row) for _, _, line, row in sorted(rows, key=lambda r: r[:2])], sorted(bad)


def check(data, rows=(1, 100, 1 << 20)):
    want, bad = slow(data)
    first = None
    for batch_rows in rows:
        frame, recording = read(data, batch_rows)
        got = list(zip(frame["line"], frame.select(*COLUMNS).rows(), strict=True))
        got = [(line, tuple(None if x == [] else x for x in row)) for line, row in got]
        assert got == want
        ledger = recording.ledger
        assert ledger.skipped_lines == len(bad)
        assert ledger.records + ledger.noise_lines + ledger.skipped_lines == ledger.lines
        if first is None:
            first = (frame, ledger, recording.observed)
        else:
            assert frame.equals(first[0])
            assert (ledger, recording.observed) == first[1:]
    return want


@pytest.mark.parametrize("path", LOGS, ids=lambda p: p.name)
def test_the_slow_reader_agrees_on_every_sample(path):
    assert check(path.read_bytes())


def test_all_samples_in_one_log():
    data = b"".join(p.read_bytes() for p in LOGS)
    assert len(check(data + (SAMPLES / "host" / "xl_dmesg.txt").read_bytes() + data)) == 2 * sum(
        len(slow(p.read_bytes())[0]) for p in LOGS
    )


@given(st.randoms(use_true_random=False), st.integers(0, 12))
@settings(max_examples=40, deadline=None)
def test_the_slow_reader_agrees_on_damaged_samples(rng: random.Random, harm: int):
    lines = b"".join(rng.choice(LOGS).read_bytes() for _ in range(3)).split(b"\n")
    for _ in range(harm):
        at = rng.randrange(len(lines))
        match rng.randrange(6):
            case 0:
                del lines[at : at + rng.randrange(1, 4)]
                lines = lines or [b""]
            case 1:
                lines.insert(at, lines[rng.randrange(len(lines))])
            case 2:
                part = lines[at : at + 6]
                rng.shuffle(part)
                lines[at : at + 6] = part
            case 3:
                text = bytearray(lines[at] or b"x")
                text[rng.randrange(len(text))] = rng.randrange(32, 127)
                lines[at] = bytes(text)
            case 4:
                lines[at : at + 1] = [lines[at][: len(lines[at]) // 2], b"> " + lines[at][len(lines[at]) // 2 :]]
            case 5:
                lines.insert(
                    at, rng.choice([b"(XEN) Xen version 4.17.7 (a@b) (gcc) debug=n", b"", b"[    0.000000] Linux version 6.1"])
                )
    check(b"\n".join(lines) + b"\n", rows=(rng.choice([1, 3, 40]), 1 << 20))


def test_every_cut():
    data = (
        twin.wide_dump(REGS, prefix="").encode() + b"(XEN) :1:d0v1 Could not allocate order=9 extent: id=1 memflags=0xc0 (3 of 4)\n"
    )
    whole, _ = read(data)
    assert whole["kind"].to_list() == ["sample", "hypercall", "return"]
    for end in range(0, len(data), 3):
        frame, recording = read(data[:end])
        assert len(frame) <= 3
        assert frame.select(COLUMNS).equals(whole[: len(frame)].select(COLUMNS))
        ledger = recording.ledger
        cut = 1 if ledger.truncated else 0
        assert ledger.records + ledger.noise_lines + ledger.skipped_lines + cut == ledger.lines
    _, recording = read(data[:-1])
    assert recording.ledger.truncated
    assert recording.ledger.problems[-1].text == "the last line is cut off (no newline) and was not used"


@given(st.binary(max_size=600))
@settings(max_examples=40, deadline=None)
def test_any_bytes(data):
    read(data, 1)
    read(twin.wide_dump(REGS).encode() + data + b"\nCONTEXT: pv guest\n: op=\n")


def test_long_lines_and_noughts():
    data = b"(XEN) CONTEXT: " + b"rax: " * 300_000 + b"\n\x00\xff\xfeCONTEXT: pv guest\n" + twin.wide_dump(REGS).encode()
    for rows in (64, 1 << 20):
        frame, recording = read(data, rows)
        assert len(frame) == 1
        assert recording.ledger.skipped_lines == 1


def test_time_stamps():
    dump = twin.wide_dump(REGS, prefix="(XEN) [00000012480ee15b] ") + twin.wide_dump(REGS, prefix="(XEN) [  123.456789] ")
    dump += twin.wide_dump(REGS, prefix="(XEN) [2024-02-15 02:19:45.123] ")
    frame, _ = read(dump.encode())
    assert frame["tsc"][0] == 0x12480EE15B
    assert frame["time_ns"].to_list() == [None, 123_456_789_000, None]
    assert read(dump.encode(), tsc_khz=2_000_000)[0]["time_ns"][0] == 0x12480EE15B // 2


def test_prefixes_of_other_programs():
    for prefix in ("", "(d1) ", "Nov 25 04:09:39 host kernel: (XEN) ", "> > (XEN) ", "[   12.345678] (XEN) ", "\t(XEN) "):
        frame, _ = read(twin.wide_dump(REGS, prefix=prefix).encode())
        assert frame.select("op", "arg0", "rip", "on_insn").rows() == [(12, 0x146, REGS["rip"], True)], prefix
    assert len(read(twin.wide_dump(REGS).replace("\n", "\r\n").encode())[0]) == 1


BANNER = "(XEN) Xen version {} (root@host) (gcc) debug=n Wed Nov  4 16:52:28 UTC 2026\n"


def test_a_boot_is_a_segment():
    data = BANNER.format("4.17.7") + twin.wide_dump(REGS) + BANNER.format("4.17.7") + twin.wide_dump(REGS) + twin.wide_dump(REGS)
    for rows in (1, 1 << 20):
        frame, recording = read(data.encode(), rows)
        assert frame["segment"].to_list() == [1, 2, 2]
        assert recording.observed.release == "4.17.7"
    cut = twin.wide_dump(REGS).splitlines(keepends=True)
    # A dump that a reset cuts short is not completed from the next boot.
    frame, recording = read(("".join(cut[:5]) + BANNER.format("4.17.7") + "".join(cut[5:])).encode())
    assert (len(frame), recording.ledger.skipped_lines) == (0, 1)


def test_blocks_end_anywhere():
    part = (
        BANNER.format("4.17.7")
        + "x\n" * 150
        + twin.wide_dump(REGS, context="pv guest", heading="*** Dumping Dom0 vcpu#1 state: ***")
    )
    part += "x\n" * 90 + "1 of 2 multicall(s) failed: cpu 0\n" + "x\n" * 90 + "  call  1: op=1 arg=[1] result=-1\n"
    frame, first = read((part * 3).encode())
    assert frame["segment"].to_list() == [1, 1, 1, 1, 2, 2, 2, 2, 3, 3, 3, 3]
    assert frame["vcpu"].to_list() == [1, 0, 0, 0] * 3
    for rows in (1, 2, 7, 30):
        again, recording = read((part * 3).encode(), rows)
        assert again.equals(frame)
        assert (recording.ledger, recording.observed) == (first.ledger, first.observed)


@pytest.mark.parametrize(
    ("named", "release"),
    [
        (["4.17.7"], "4.17.7"),
        (["4.13.4-9.24.1"], None),
        (["4.18-unstable"], None),
        (["4.8.5-16.fc25"], None),
        (["4.17.7", "4.18.0"], None),
        (["4.17.7", "4.17.7-rc1"], None),
    ],
)
def test_release(named, release):
    for form in (BANNER, "(XEN) ----[ Xen-{}  x86_64  debug=n  Not tainted ]----\n"):
        _, recording = read("".join(form.format(n) for n in named).encode())
        assert recording.observed.release == release
        assert len(recording.ledger.problems) == (len(named) > 1)


def test_the_hosts_own_console():
    frame, recording = read((SAMPLES / "host" / "xl_dmesg.txt").read_bytes())
    assert len(frame) == 0
    assert (recording.observed.release, recording.observed.tsc_khz) == ("4.17.7", 2596122)
    assert recording.ledger.noise_lines == recording.ledger.lines == 195


def test_domains():
    data = twin.wide_dump(REGS) + twin.wide_dump(REGS, context="pv guest (d2v0)", cs=0xE019)
    data += twin.wide_dump(REGS, context="pv guest (d3v0)") + twin.wide_dump(REGS, context="pv guest (d3v1)", cs=0xE019)
    _, recording = read(data.encode())
    assert {k: d.caller for k, d in recording.observed.domains.items()} == {1: "pv64", 2: "pv32"}


@pytest.mark.parametrize("path", LOGS, ids=lambda p: p.name)
def test_samples_are_recognised(path):
    with Source(path) as source:
        assert registry.detect(source).name == "console"


def test_sniff():
    assert READER.sniff(b"(XEN) Freed 664kB init memory\n") == 50
    for other in (b"", b"host : a\nrelease : 6.1\n", b"xtrace: call op=1\n", bytes(range(256))):
        assert READER.sniff(other) == 0
