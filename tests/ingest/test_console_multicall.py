"""Linux's dumps of failed multicalls: old and new wording, one call that is none, folding, analysis."""

from __future__ import annotations

import io
from pathlib import Path

import polars as pl
import pytest

from xtrace import pipeline, schema
from xtrace.ingest.base import ReadOptions
from xtrace.ingest.console import READER

SAMPLES = Path(__file__).parents[2] / "samples" / "console"
PTR = 0xFFFF888267E25AD0


class Bytes:
    damage = None

    def __init__(self, data):
        self.file, self.size, self.path = io.BytesIO(data), len(data), "-"


def read(text):
    recording = READER.open(Bytes(text.encode()), ReadOptions())
    return pl.concat([schema.empty(schema.EVENTS), *recording.batches()]), recording


def short(frame):
    return [
        (r["kind"], r["op"], [r[a] for a in schema.ARGS if r[a] is not None], r["result"], r["line"])
        for r in frame.iter_rows(named=True)
    ]


def test_one_call_is_no_multicall():
    frame, _ = read((SAMPLES / "multicall-6.9.folded.txt").read_text())
    assert short(frame) == [("hypercall", 1, [PTR, 1, 0, 0x7FF0], None, 6), ("return", 1, [], -1, 6)]
    assert frame.select("vcpu", "caller", "domid", "pcpu").row(0) == (4, "pv64", None, None)
    assert frame["time_ns"][0] == 44_575_695_000
    frame, _ = read((SAMPLES / "multicall-6.13.qp.txt").read_text())
    assert short(frame) == [("hypercall", 1, [0xFFFF88817FE1FAF0], None, 4), ("return", 1, [], -16, 4)]


def test_several():
    text = (
        "[    1.0] 2 of 3 multicall(s) failed: cpu 7\n"
        "[    1.000001]   call  1: op=14 result=-22 caller=foo+0x1/0x2 [mod] pars=ffff888000001000 8000000000000067 2 \n"
        "[    1.000002]   call  3: op=26 result=-1 caller=xen_flush+0x4e/0xd0 pars=ffff888267e25ad0 1 0 7ff0 args=1 2 3\n"
        "[    1.000003] something else: op=7\n"
    )
    frame, recording = read(text)
    assert short(frame) == [
        ("hypercall", 13, [3], None, 1),
        ("subcall", 14, [0xFFFF888000001000, 0x8000000000000067, 2], -22, 2),
        ("subcall", 26, [PTR, 1, 0, 0x7FF0], -1, 3),
        ("return", 13, [], 0, 1),
    ]
    assert frame["arg1"][0] == 3
    assert frame["arg0"][0] is None
    assert (recording.ledger.records, recording.ledger.noise_lines) == (3, 1)


def test_numbers_that_look_like_quoted_printable():
    frame, _ = read("1 of 1 multicall(s) failed: cpu 20\n  call  1: op=20 arg=[ffff88817fe1fa20] result=-20\n")
    assert short(frame) == [("hypercall", 20, [0xFFFF88817FE1FA20], None, 2), ("return", 20, [], -20, 2)]


def test_the_first_wording():
    # MC_DEBUG of 2.6: all entries are listed, with the number of them.
    text = (
        "1 multicall(s) failed: cpu 0\nPid: 1, comm: init\nCall Trace:\n [<c01070d6>] ? xen_mc_flush+0x6\n"
        "  call  1/2: op=14 arg=[c1000000] result=0\tC xen_set_pte\n  call  2/2: op=26 arg=[c15f2f80] result=-22\tC xen_pin\n"
    )
    frame, _ = read(text)
    assert short(frame) == [
        ("hypercall", 13, [2], None, 1),
        ("subcall", 14, [0xC1000000], 0, 5),
        ("subcall", 26, [0xC15F2F80], -22, 6),
        ("return", 13, [], 0, 1),
    ]
    # 32-bit addresses do not prove the caller.
    assert frame["caller"].null_count() == 4
    frame, _ = read((SAMPLES / "multicall-2.6.txt").read_text())
    assert [r[:3] for r in short(frame)] == [("hypercall", 13, []), ("return", 13, [])] * 3


@pytest.mark.parametrize(
    "text",
    [
        "1 of 1 multicall(s) failed: cpu 0\n",  # and not which call
        "x of 1 multicall(s) failed: cpu 0\n1 of 1 multicall(s) failed: cpu 0\n  call  1: op=99999999999 result=-1\n",
        "1 of 1 multicall(s) failed: cpu 0\n  call  1: op=1 result=-99999999999999999999\n",
        "1 of 1 multicall(s) failed: cpu 0\n(XEN) Xen version 4.17.7 (a) b\n  call  1: op=1 arg=[1] result=-1\n",
    ],
)
def test_not_understood(text):
    frame, recording = read(text)
    assert "hypercall" not in frame.filter(pl.col("op") == 1)["kind"].to_list()
    assert recording.ledger.skipped_lines == 1


def test_entries_far_behind_or_alone_are_noise():
    far = "1 of 2 multicall(s) failed: cpu 0\n" + "x\n" * 100 + "  call  1: op=1 arg=[1] result=-1\n"
    frame, _ = read(far + "  call  9: op=1 arg=[1] result=-1\n")
    assert [r[1] for r in short(frame)] == [13, 13]


def test_smaller_multicalls_that_follow_are_no_continuation(tmp_path):
    path = tmp_path / "dmesg"
    text = "".join(
        f"1 of {n} multicall(s) failed: cpu 0\n  call  1: op=1 arg=[ffff888000000000] result=-22\n" for n in range(300, 2, -1)
    )
    path.write_text(text)
    result = pipeline.analyze([path], pipeline.Options(source="4.17.7", targets=("4.18.0",)))
    assert (result.proved, result.inferred, result.calls) == (0, 0, 298)
