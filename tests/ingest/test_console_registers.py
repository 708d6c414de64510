"""Register dumps: every format of Xen's, what a dump proves, and parked vCPUs through the whole analysis."""

from __future__ import annotations

import io
import json
from pathlib import Path

import console_twin as twin
import polars as pl
import pytest

from xtrace import pipeline, schema
from xtrace.ingest.base import ReadOptions
from xtrace.ingest.console import READER

SAMPLES = Path(__file__).parents[2] / "samples"
INSN = 0xFFFFFFFF8010202B
#: pv-populate of samples/images/expected.json: parked in populate_physmap, 2510 of 4096 extents done.
PARKED = {"rip": INSN, "rflags": 0x246, "rax": 0xC, "rcx": INSN + 2, "rdx": 0x13D109, "rsi": 0xFFFFFFFF801140E0, "rdi": 0x27386,
          "r11": 0x246, "rbx": 0x1111, "rbp": 0x2222}  # fmt: skip


class Bytes:
    damage = None

    def __init__(self, data):
        self.file, self.size, self.path = io.BytesIO(data), len(data), "-"


def read(text):
    recording = READER.open(Bytes(text.encode()), ReadOptions())
    return pl.concat([schema.empty(schema.EVENTS), *recording.batches()]), recording


def row(text):
    frame, _ = read(text)
    assert len(frame) == 1
    return frame.row(0, named=True)


def images():
    """Return (name, vCPU, registers, meaning) of the vCPUs of real images."""
    for item in json.loads((SAMPLES / "images" / "expected.json").read_text()):
        for v in item["vcpus"]:
            yield item["file"], item["guest"], {k: int(x, 16) for k, x in v["regs"].items()}, v["meaning"]


@pytest.mark.parametrize(("name", "guest", "regs", "meaning"), list(images()), ids=lambda x: x if isinstance(x, str) else "")
def test_real_registers(name, guest, regs, meaning):
    pv = "PV " in guest
    text = twin.wide_dump(
        regs,
        context="pv guest (d1v0)" if pv else "hvm guest (d1v0)",
        cs=0xE033 if pv else 0x10,
        cr0=0x11 if "32" in guest else 0x80000011,
        cr4=0x20,
    )
    frame, recording = read(text)
    if not pv:
        # These guests have no hypercall page, and the console shows no code: nothing may be concluded.
        assert frame["on_insn"].to_list() in ([], [False])
        assert recording.ledger.problems
        return
    got = frame.row(0, named=True)
    assert got["on_insn"] is meaning["parked"]
    assert (got["caller"], got["domid"], got["vcpu"], got["rip"]) == ("pv64", 1, 0, regs["rip"])
    assert recording.ledger.samples == (1 if meaning["parked"] else 0)
    if meaning["parked"]:
        assert got["op"] == meaning["op"]


@pytest.mark.parametrize(
    ("heading", "context", "who"),
    [
        ("*** Dumping CPU3 guest state (d5v2): ***", "pv guest (d5v2)", (5, 2)),  # 4.5 on
        ("*** Dumping CPU3 guest state (d5:v2): ***", "pv guest", (5, 2)),  # 4.1 to 4.4
        ("*** Dumping CPU3 guest state: ***", "pv guest", (None, None)),  # to 4.0
        ("*** Dumping Dom0 vcpu#2 state: ***", "pv guest", (0, 2)),  # key 0
        ("Domain 5 (vcpu#2) crashed on cpu#3:", "pv guest", (5, 2)),
        ("Domain 4 (vcpu#0) crashed on cpu#3:", "pv guest (d5v2)", (5, 2)),
        ("", "guest", (None, None)),  # 3.0
        ("", "pv guest (d70000v2)", (None, 2)),
    ],
)
def test_headings(heading, context, who):
    for cpu in (3, None):
        got = row(twin.wide_dump(PARKED, context=context, heading=heading, cpu=cpu))
        assert (got["domid"], got["vcpu"], got["pcpu"], got["caller"], got["on_insn"]) == (*who, cpu, "pv64", True)


def test_key_d_in_xen():
    host = PARKED | {"rip": 0xFFFF82D04022C07E}
    text = twin.wide_dump(host, context="hypervisor (d1v0)", cs=0xE008, heading="*** Dumping CPU0 host state: ***")
    text += twin.wide_dump(PARKED, heading="*** Dumping CPU0 guest state (d1v0): ***")
    frame, recording = read(text)
    assert frame["rip"].to_list() == [INSN]
    assert not recording.ledger.problems


@pytest.mark.parametrize(
    ("change", "on"),
    [
        ({}, True),
        ({"rflags": 0x1246}, True),  # xc_vcpu_getcontext's virtual IOPL
        ({"rcx": INSN}, False),  # behind the call: it is being executed, or over
        ({"rcx": INSN + 1}, False),
        ({"rcx": 1}, False),
        ({"rcx": 0, "rip": 0xFFFFFFFFFFFFFFFE}, False),
        ({"r11": 0x247}, False),
        ({"rax": 0x10000000C}, False),
    ],
)
def test_what_proves_the_instruction(change, on):
    assert row(twin.wide_dump(PARKED | change))["on_insn"] is on
    # In user mode of Linux the same registers are a system call that is restarted.
    frame, recording = read(twin.wide_dump(PARKED | change, cs=0x33))
    assert len(frame) == 0
    assert "do not show the guest's ABI" in recording.ledger.problems[0].text


def test_pv32_on_64():
    regs = PARKED | {"rip": 0xC1002185, "rcx": 0xC1371FD0, "rbx": 0x146, "rsi": 3, "rdi": 4, "rbp": 5, "rdx": 2}
    got = row(twin.wide_dump(regs, cs=0xE019))
    assert [got[a] for a in schema.ARGS] == [0x146, 0xC1371FD0, 2, 3, 4, 5]
    # eax 12 and an address where a hypercall page would have call 12: it may stand there.
    assert (got["caller"], got["rip"], got["on_insn"]) == ("pv32", 0xC1002185, None)
    assert row(twin.wide_dump(regs, cs=0x61))["on_insn"] is None  # Linux's own selector
    assert row(twin.wide_dump(regs | {"rip": 0xC1002187}, cs=0xE019))["on_insn"] is False
    assert row(twin.wide_dump(regs | {"rax": 13}, cs=0xE019))["on_insn"] is False


def test_32_bit_xen():
    regs = {"eip": 0xC1002185, "eax": 12, "ebx": 0x146, "ecx": 1, "edx": 2, "esi": 3, "edi": 4, "ebp": 5}
    got = row(twin.narrow_dump(regs, heading="*** Dumping CPU1 guest state (d2:v1): ***", cpu=1))
    assert (got["caller"], got["domid"], got["vcpu"], got["pcpu"]) == ("pv32", 2, 1, 1)
    assert [got[a] for a in schema.ARGS] == [0x146, 1, 2, 3, 4, 5]
    assert (got["op"], got["rip"], got["on_insn"]) == (12, 0xC1002185, None)
    assert row(twin.narrow_dump(regs, context="hvm guest", cs=0x8))["caller"] == "hvm32"
    frame, _ = read(twin.narrow_dump(regs, context="hypervisor", cs=0xE008))
    assert len(frame) == 0


@pytest.mark.parametrize(
    ("change", "cr0", "cr4", "caller"),
    [
        ({"rip": 0xFFFFFFFFC08EEDE5}, 0x80050033, 0x20, "hvm64"),
        ({"rip": 0x1000, "rsp": 0xFFFF888100000000}, 0x80050033, 0x20, "hvm64"),
        ({"rip": 0x1000}, 0x11, 0, "hvm32"),
        ({"rip": 0x1000}, 0x80000011, 0, "hvm32"),
        ({"rip": 0x1000}, 0x80000011, 0x20, None),
    ],
)
def test_width_of_an_hvm_vcpu(change, cr0, cr4, caller):
    frame, _ = read(twin.wide_dump(PARKED | change, context="hvm guest (d1v0)", cs=0x10, cr0=cr0, cr4=cr4))
    assert frame["caller"].to_list() == ([caller] if caller else [])


def test_hvm_hypercall_page():
    regs = PARKED | {"rip": 0xFFFFFFFF81002185}
    assert row(twin.wide_dump(regs, context="hvm guest (d1v0)", cs=0x10))["on_insn"] is None
    assert row(twin.wide_dump(regs, context="hvm guest (d1v0)", cs=0x33))["on_insn"] is False
    assert row(twin.wide_dump(regs | {"rip": 0xFFFFFFFF81002188}, context="hvm guest (d1v0)", cs=0x10))["on_insn"] is False


def test_a_dump_that_lacks_a_line():
    lines = twin.wide_dump(PARKED).splitlines(keepends=True)
    for missing in range(len(lines)):
        frame, recording = read("".join(lines[:missing] + lines[missing + 1 :]))
        needed = any(w in lines[missing] for w in ("RIP:", "rax:", "rdx:", "rbp:", "r9:"))
        assert (len(frame), recording.ledger.skipped_lines) == ((0, 1) if needed else (0 if "CONTEXT" in lines[missing] else 1, 0))
    # Nothing is taken from the next dump.
    frame, _ = read("".join(x for x in lines if "rdx:" not in x) + twin.wide_dump(PARKED | {"rdi": 1}))
    assert frame["arg0"].to_list() == [1]


def log(tmp_path, text):
    path = tmp_path / "console.log"
    path.write_text(text)
    return path


def test_a_parked_vcpu_through_the_analysis(tmp_path):
    text = twin.wide_dump(PARKED, heading="*** Dumping CPU0 guest state (d1v0): ***")
    result = pipeline.analyze([log(tmp_path, text)], pipeline.Options(source="4.17.7", targets=("4.18.0", "3.3.0")))
    assert (result.proved, result.inferred) == (1, 0)
    found = result.findings.filter(pl.col("source_decode").is_not_null()).row(0, named=True)
    read_ = found["source_decode"]
    assert (read_["subop"], read_["progress"]) == ("XENMEM_populate_physmap", 2510)
    assert (found["domid"], found["vcpu"], found["caller"]) == (1, 0, "pv64")


def test_a_parked_multicall_is_inferred(tmp_path):
    regs = PARKED | {"rax": 0xD, "rdi": 0xFFFFFFFF80155240, "rsi": 7}  # pv-mc-mem: no mark of its own
    result = pipeline.analyze([log(tmp_path, twin.wide_dump(regs))], pipeline.Options(source="4.17.7", targets=("4.18.0",)))
    assert (result.proved, result.inferred) == (0, 1)


@pytest.mark.parametrize(
    "change",
    [
        {"rcx": INSN},  # pv-done: the arguments of its last continuation are still there
        {"rip": INSN + 2},
        {"rip": 0xFFFFFFFF81000000},  # pv-spin: looks like a continuation, in ordinary code
        {"rax": 0x23456789C},
    ],
)
def test_no_alarm_for_a_vcpu_elsewhere(tmp_path, change):
    for text in (twin.wide_dump(PARKED | change), twin.wide_dump(PARKED | change, context="hvm guest (d1v0)", cs=0x10)):
        result = pipeline.analyze([log(tmp_path, text)], pipeline.Options(source="4.17.7", targets=("3.3.0",)))
        assert (result.proved, result.inferred, len(result.findings), result.surface) == (0, 0, 0, [])
        # Nor is it clean: no hypercall was seen.
        assert result.bits == 16


def test_the_real_dumps_raise_no_alarm():
    for path in sorted((SAMPLES / "console").glob("crash-*.txt")) + sorted((SAMPLES / "console").glob("key-d-*.txt")):
        result = pipeline.analyze([path], pipeline.Options(source="4.17.7", targets=("3.3.0",)))
        assert (result.proved, result.inferred, result.surface, result.bits) == (0, 0, [], 16), path
