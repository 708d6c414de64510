"""Output of xenctx: formats, the bytes at the instruction pointer, the vectorised reader against a slow one."""

from __future__ import annotations

import io
import json
import random
import re
from pathlib import Path

import polars as pl
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from xtrace import pipeline, schema
from xtrace.ingest import registry
from xtrace.ingest.base import ReadOptions
from xtrace.ingest.source import Source
from xtrace.ingest.xenctx import READER

SAMPLES = Path(__file__).parents[2] / "samples"
FILES = sorted((SAMPLES / "console").glob("xenctx-*.txt"))


class Bytes:
    damage = None

    def __init__(self, data):
        self.file, self.size, self.path = io.BytesIO(data), len(data), "-"


def read(text, batch_rows=1 << 20):
    recording = READER.open(Bytes(text.encode()), ReadOptions(batch_rows=batch_rows))
    return pl.concat([schema.empty(schema.EVENTS), *recording.batches()]), recording


def wide(regs, code, cs=0xE033, vcpu=None, every=False):
    """Write what print_ctx_64 and print_code do (RELEASE-4.17.0:tools/xentrace/xenctx.c:405, :780)."""
    r = dict.fromkeys(("rbx", "rbp", "r8", "r9", "r10", "r11", "r12", "r13", "r14", "r15", "rsp"), 0) | regs
    out = [] if vcpu is None else [f"vcpu{vcpu}:"]
    out += [f"rip: {r['rip']:016x} xen_hypercall_pv+0x3", f"flags: {r['rflags']:08x} i z p", f"rsp: {r['rsp']:016x}"]
    for names in (
        ("rax", "rcx", "rdx"),
        ("rbx", "rsi", "rdi"),
        ("rbp", " r8", " r9"),
        ("r10", "r11", "r12"),
        ("r13", "r14", "r15"),
    ):
        out.append("\t".join(f"{n}: {r[n.strip()]:016x}" for n in names))
    out += [
        f" cs: {cs:04x}\t ss: e02b\t ds: 0000\t es: 0000",
        " fs: 0000 @ 0000000000000000",
        " gs: 0000 @ 0000000000000000/0000000000000000",
    ]
    if every:
        out += ["", *(f"cr{k}: {0:016x}" for k in (0, 2, 3, 4)), "", *(f"dr{k}: {0:016x}" for k in (0, 1, 2, 3, 6, 7))]
    if code:
        data = ["cc"] * 21 + [code[i : i + 2] for i in range(0, len(code), 2)]
        data[21] = f"<{data[21]}>"
        out += [f"Code (instr addr {r['rip']:08x})", " ".join(data) + " ", "", ""]
    return "\n".join([*out, "", "Stack:", f" {0:016x} {1:016x}", "", ""])


def narrow(regs, code, cs=0xE019, vcpu=None):
    """Write what print_ctx_32 does (:362)."""
    r = {"esp": 0} | regs
    out = [] if vcpu is None else [f"vcpu{vcpu}:"]
    out += [f"cs:eip: {cs:04x}:{r['eip']:08x} foo+0x5", "flags: 00000246 i z p", f"ss:esp: e021:{r['esp']:08x}"]
    out += ["\t".join(f"{n}: {r[n]:08x}" for n in names) for names in (("eax", "ebx", "ecx", "edx"), ("esi", "edi", "ebp"))]
    out += [" ds:     e021\t es:     e021\t fs:     0000\t gs:     0000", f"Code (instr addr {r['eip']:08x})"]
    data = ["cc"] * 21 + [code[i : i + 2] for i in range(0, len(code), 2)]
    data[21] = f"<{data[21]}>"
    return "\n".join([*out, " ".join(data) + " ", "", "", "", ""])


def images():
    for item in json.loads((SAMPLES / "images" / "expected.json").read_text()):
        for v in item["vcpus"]:
            yield item["file"], item["guest"], {k: int(x, 16) for k, x in v["regs"].items()}, v["bytes_at_rip"], v["meaning"]


@pytest.mark.parametrize(
    ("name", "guest", "regs", "code", "meaning"), list(images()), ids=lambda x: x if isinstance(x, str) and "." in x else ""
)
def test_real_registers(name, guest, regs, code, meaning):
    if "32" in guest:
        regs = {"e" + k[1:]: v for k, v in regs.items() if k.startswith("r")}
        text = narrow(regs, code, cs=0x8, vcpu=3)
        caller = "hvm32"
    else:
        text = wide(regs, code, cs=0xE033 if "PV " in guest else 0x8, vcpu=3, every=True)
        caller = "pv64" if "PV " in guest else "hvm64"
    frame, recording = read(text)
    row = frame.row(0, named=True)
    assert (row["caller"], row["vcpu"], row["on_insn"]) == (caller, 3, meaning["parked"])
    assert (row["domid"], row["pcpu"], row["tsc"]) == (None, None, None)
    assert not recording.ledger.problems
    if meaning["parked"]:
        assert row["op"] == meaning["op"]
        assert row["arg0"] == regs.get("rdi", regs.get("ebx"))


REGS = {"rip": 0xFFFFFFFF8010202B, "rflags": 0x246, "rax": 0xC, "rcx": 0xFFFFFFFF8010202D, "rdx": 0, "rsi": 0x1000, "rdi": 0x27386,
        "r11": 0x246}  # fmt: skip
EREGS = {"eip": 0xC1002185, "eax": 12, "ebx": 0x146, "ecx": 1, "edx": 2, "esi": 3, "edi": 4, "ebp": 5}


@pytest.mark.parametrize(
    ("text", "caller", "on"),
    [
        (wide(REGS, "0f05c3c3"), "pv64", True),
        (wide(REGS, ""), "pv64", True),  # the page of the code could not be mapped
        (wide(REGS, "9090c3c3"), "pv64", False),
        (wide(REGS | {"rcx": 5}, "0f05c3c3"), "pv64", False),  # not made yet
        (wide(REGS, "0f05c3c3", cs=0x33), None, None),  # a system call of user mode
        (wide(REGS, "0f05c3c3", cs=0x10), "hvm64", False),
        (wide(REGS, "0f01c1c3", cs=0x10), "hvm64", True),
        (wide(REGS, "0f01d9c3", cs=0x10), "hvm64", True),
        (wide(REGS, "0f01d9c3"), "pv64", False),
        (narrow(EREGS, "cd82c3c3"), "pv32", True),
        (narrow(EREGS, "cd80c3c3"), "pv32", False),
        (narrow(EREGS, "cd82c3c3", cs=0x10), "hvm32", False),
        (narrow(EREGS, "0f01d9c3", cs=0x10), "hvm32", True),
        (narrow(EREGS, "cd82c3c3", cs=0x73), None, None),
    ],
)
def test_the_bytes_decide(text, caller, on):
    frame, _ = read(text)
    assert frame.select("caller", "on_insn").rows() == ([(caller, on)] if caller else [])


def test_old_layouts():
    old = wide(REGS, "0f05c3c3").replace("Code (instr addr ffffffff8010202b)", "Code:")
    assert read(old)[0]["on_insn"].to_list() == [True]
    first = "eip: c1002185 \nesp: c1371fa8\neax: 0000000c\tebx: 00000146\tecx: 00000001\tedx: 00000002\n"
    first += "esi: 00000003\tedi: 00000004\tebp: 00000005\n cs: 0000e019\t ds: 0000e021\t fs: 00000000\t gs: 00000000\n"
    frame, _ = read(first + "Code:\n" + "cc " * 21 + "<cd> 82 c3 \n\n")
    assert frame.select("caller", "arg0", "arg5", "on_insn").rows() == [("pv32", 0x146, 5, True)]


def slow(text):
    lines = text.split("\n")[:-1]
    start = r"^[> \t]*(?:rip: ([0-9a-f]{8,16})|(?:cs:eip: ([0-9a-f]{4}):|eip: )([0-9a-f]{8}))(?:\s|$)"
    at = [i for i, t in enumerate(lines) if re.search(start, t)]
    for n, i in enumerate(at):
        end = min([i + 40, len(lines), *at[n + 1 : n + 2]])
        body = "\n" + "\n".join(t[:400] for t in lines[i:end])[:3000]
        m = re.search(start, lines[i])
        long = m[1] is not None
        regs = {"rip": int(m[1] or m[3], 16)}
        for r in ("ax", "bx", "cx", "dx", "si", "di", "bp"):
            found = re.search(rf"[\s>][re]{r}:[\s>]+([0-9a-f]{{4,16}})\b", body)
            regs["r" + r] = int(found[1], 16) if found else None
        for r in ("r8", "r9", "r10", "r11") if long else ():
            found = re.search(rf"[\s>]{r}:[\s>]+([0-9a-f]{{4,16}})\b", body)
            regs[r] = int(found[1], 16) if found else None
        found = re.search(r"[\s>]cs:[\s>]+([0-9a-f]{4,16})\b", body)
        regs["cs"] = int(m[2], 16) if m[2] else int(found[1], 16) if found else None
        if long:
            found = re.search(r"\bflags: ([0-9a-f]{8})\b", body)
            regs["flags"] = int(found[1], 16) if found else None
        yield i + 1, long, None if None in regs.values() else regs


@given(st.randoms(use_true_random=False), st.integers(0, 10))
@settings(max_examples=40, deadline=None)
def test_the_slow_reader_agrees(rng: random.Random, harm: int):
    text = "".join(
        rng.choice([*(p.read_text() for p in FILES), wide(REGS, "0f05c3", vcpu=1), narrow(EREGS, "cd82c3")]) for _ in range(3)
    )
    lines = text.split("\n")
    for _ in range(harm):
        at = rng.randrange(len(lines))
        match rng.randrange(4):
            case 0:
                del lines[at : at + 2]
                lines = lines or [""]
            case 1:
                lines.insert(at, rng.choice(lines))
            case 2:
                lines[at] = lines[at][: rng.randrange(len(lines[at]) + 1)]
            case 3:
                lines[at : at + 1] = [lines[at][:30] + " ", "> " + lines[at][30:]]
    text = "\n".join(lines) + "\n"
    want = list(slow(text))
    first, recording = read(text)
    again, other = read(text, rng.choice([1, 7]))
    assert first.equals(again)
    assert recording.ledger == other.ledger
    ledger = recording.ledger
    assert ledger.skipped_lines == sum(regs is None for _, _, regs in want)
    assert ledger.records + ledger.noise_lines + ledger.skipped_lines == ledger.lines
    good = {line: (long, regs) for line, long, regs in want if regs is not None}
    assert set(first["line"]) <= set(good)
    for row in first.iter_rows(named=True):
        long, regs = good[row["line"]]
        order = (
            ("rdi", "rsi", "rdx", "r10", "r8", "r9")
            if row["caller"] in ("pv64", "hvm64")
            else ("rbx", "rcx", "rdx", "rsi", "rdi", "rbp")
        )
        assert long is (row["caller"] in ("pv64", "hvm64"))
        mask = (1 << 64) - 1 if long else 0xFFFFFFFF
        assert [row[a] for a in schema.ARGS] == [regs[r] & mask for r in order]
        assert (row["rip"], row["op"]) == (regs["rip"] & mask, regs["rax"] & 0xFFFFFFFF)
    # What is missing is a vCPU in user mode, or in a ring that says nothing.
    for line in set(good) - set(first["line"]):
        long, regs = good[line]
        assert regs["cs"] & 3 in ((1, 2, 3) if long else (2, 3))


def test_samples():
    seen = {p.name: read(p.read_text())[0].select("vcpu", "caller", "on_insn").rows() for p in FILES}
    assert seen == {
        "xenctx-hvm-realmode.txt": [(0, "hvm32", False)],
        "xenctx-pv64.quoted.txt": [(0, "pv64", False), (1, "pv64", False)],
        "xenctx-unikernel-4.4.txt": [(0, "pv64", False)],
    }
    for path in FILES:
        with Source(path) as source:
            assert registry.detect(source).name == "xenctx"
        result = pipeline.analyze([path], pipeline.Options(source="4.17.7", targets=("3.3.0",)))
        assert (result.proved, result.inferred, result.bits) == (0, 0, 16)


def test_a_parked_vcpu_through_the_analysis(tmp_path):
    path = tmp_path / "ctx"
    path.write_text(wide(REGS | {"rax": 0x11, "rip": 5}, "c3", vcpu=0) + wide(REGS, "0f05c3c3", vcpu=1))
    result = pipeline.analyze([path], pipeline.Options(source="4.17.7", targets=("3.3.0",)))
    assert (result.proved, result.inferred) == (1, 0)
    found = result.findings.row(0, named=True)
    assert (found["vcpu"], found["source_decode"]["subop"], found["source_decode"]["progress"]) == (
        1,
        "XENMEM_populate_physmap",
        2510,
    )


def test_every_cut():
    text = wide(REGS, "0f05c3c3", vcpu=1)
    whole, _ = read(text)
    for end in range(0, len(text), 7):
        frame, recording = read(text[:end])
        # Without the bytes it is rcx alone that speaks.
        assert frame.drop("on_insn").equals(whole[: len(frame)].drop("on_insn"))
        assert recording.ledger.records + recording.ledger.noise_lines <= recording.ledger.lines


@given(st.binary(max_size=400))
@settings(max_examples=30, deadline=None)
def test_any_bytes(data):
    for rows in (1, 1 << 20):
        recording = READER.open(
            Bytes(wide(REGS, "0f05").encode() + data + b"\nrip: 0000000000000000\n"), ReadOptions(batch_rows=rows)
        )
        for _ in recording.batches():
            pass


def test_sniff():
    assert READER.sniff(wide(REGS, "0f05").encode()) == 90
    for other in (b"", b"rip: 1\n", b"xtrace: call op=1\n", bytes(range(256))):
        assert READER.sniff(other) == 0
