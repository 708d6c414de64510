"""``xtrace record``: recipes are made for every release, their scripts run, and what they promise is what xtrace reads."""

from __future__ import annotations

import json
import os
import shutil
import struct
import subprocess
from pathlib import Path

import polars as pl
import pytest

from xtrace import config, recipes
from xtrace.cli.app import run
from xtrace.errors import UsageError
from xtrace.ingest import registry
from xtrace.ingest.base import ReadOptions
from xtrace.ingest.source import Source
from xtrace.release import releases

SAMPLES = Path(__file__).resolve().parents[2] / "samples"
IDS = tuple(recipes.load())
#: The one line that cannot be broken: bpftrace knows no string in two parts.
LONG = "xtrace: sample time_ns=%llu"


def variants() -> list[tuple[str, str | None]]:
    return [(r.id, guest) for r in recipes.load().values() for guest in r.guests or (None,)]


def made_for_all(name: str, guest: str | None) -> list[recipes.Made]:
    out = []
    for release in releases():
        try:
            out.append(recipes.make(name, release.version, guest))
        except UsageError as exc:
            assert "cannot be used with Xen" in str(exc)
    return out


def sh(script: str, folder: Path, **env: str) -> subprocess.CompletedProcess[str]:
    """Run a script with the stubs in ``folder/bin`` before everything else."""
    words = {**os.environ, "PATH": f"{folder / 'bin'}:{os.environ['PATH']}", **env}
    return subprocess.run(["sh", "-c", script], cwd=folder, env=words, capture_output=True, text=True, timeout=60)


def stub(folder: Path, name: str, body: str) -> None:
    path = folder / "bin" / name
    path.parent.mkdir(exist_ok=True)
    path.write_text(f"#!/bin/sh\n{body}\n")
    path.chmod(0o755)


def events(path: Path) -> pl.DataFrame:
    with Source(str(path)) as source:
        return pl.concat(list(registry.detect(source).open(source, ReadOptions()).batches()))


# ── the command ──────────────────────────────────────────────────────────────────────────────────────────────────────


def test_list(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["record"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines[: len(IDS)]] == list(IDS)
    assert max(map(len, lines)) <= 80
    assert run(["record", "--format", "json"]) == 0
    assert [r["id"] for r in json.loads(capsys.readouterr().out)["recipes"]] == list(IDS)


@pytest.mark.parametrize(("name", "guest"), variants())
def test_text_json_and_script(name: str, guest: str | None, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["record", name, "--seconds", "17", *(["--guest", guest] if guest else [])]
    assert run(words) == 0
    text = capsys.readouterr().out
    for title in ("Needs", "Costs", "Shows", "Does not show", "Script", "Then"):
        assert f"\n{title}\n" in text
    assert "@" not in text.replace('"$@"', "")
    assert all(len(line) <= 80 or LONG in line for line in text.splitlines())
    assert run([*words, "--script"]) == 0
    script = capsys.readouterr().out
    assert script in text
    assert run([*words, "--format", "json"]) == 0
    assert json.loads(capsys.readouterr().out)["script"] == script
    assert all(ord(c) < 128 or c == "…" for c in script)


@pytest.mark.parametrize(("name", "guest"), variants())
def test_every_release(name: str, guest: str | None) -> None:
    """Each release has one recipe, or a reason; every script is one for sh, and for bash."""
    made = made_for_all(name, guest)
    assert made
    for script in {m.script for m in made}:
        assert not recipes._HOLE.search(script)
        for shell in ("sh", "bash"):
            if shutil.which(shell):
                subprocess.run([shell, "-n"], input=script, text=True, check=True, timeout=20)
    for m in made:
        for fact in m.facts:
            assert fact.cite
            assert fact.guest in (None, m.guest)


def test_wrong_use(capsys: pytest.CaptureFixture[str]) -> None:
    for words, said in (
        (["xentrac"], "did you mean xentrace?"),
        (["xentrace", "--guest", "arm"], "there are pv and hvm"),
        (["printk", "--release", "3.2"], "cannot be used with Xen 3.2.0: before 3.4.0"),
        (["xentrace", "--release", "3.0.4"], "use the recipe printk"),
        (["xentrace", "--release", "4.15", "--guest", "hvm"], "4.15.0; 4.15.1–4.15.7"),
        (["xentrace", "--release", "9.9"], "9.9"),
        (["xentrace", "--format", "xml"], "text and json"),
        (["--script"], "needs a recipe"),
        (["xentrace", "--script", "--format", "json"], "leave out --format"),
    ):
        assert run(["record", *words]) == 3, words
        err = capsys.readouterr().err
        assert said in err
        assert err.count("\n") == 1


def test_a_series_whose_recipes_agree(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["record", "xentrace", "--release", "4.2"]) == 0
    assert "For Xen 4.2, pv guests" in capsys.readouterr().out


# ── xentrace: what the masks let through ─────────────────────────────────────────────────────────────────────────────


def passes(mask: int, event: int) -> bool:
    """Say what Xen's filter says (RELEASE-4.17.0:xen/common/trace.c __trace_var)."""
    if not mask & event or not (mask >> 16) & (event >> 16):
        return False
    return bool((mask >> 12) & (event >> 12) & 0xF)


def filtered(data: bytes, mask: int) -> bytes:
    """Return what would have been recorded with this mask."""
    out = bytearray()
    at = 0
    while at < len(data):
        _, pcpu, size = struct.unpack_from("<3I", data, at)
        at, end = at + 12, at + 12 + size
        window = bytearray()
        while at < end:
            (head,) = struct.unpack_from("<I", data, at)
            length = 4 + 8 * (head >> 31) + 4 * (head >> 28 & 7)
            event = head & 0xFFFFFFF
            if event in (0x1F001, 0x1F002) or passes(mask, event):
                window += data[at : at + length]
            at += length
        if window:
            out += struct.pack("<3I", 0x2001F003, pcpu, len(window)) + window
    return bytes(out)


def mask_of(release: str, guest: str) -> int:
    return int(next(f.value or "" for f in recipes.make("xentrace", release, guest).facts if f.name == "mask"), 16)


CALLS = pl.col("kind").cast(pl.String).is_in(["hypercall", "vmmcall", "subcall"])
SAME = ("tsc", "pcpu", "domid", "vcpu", "kind", "op", "arg0", "arg1", "arg2", "rip")


@pytest.mark.parametrize(
    ("sample", "release", "guest"),
    [
        ("eras/smp64-3.4.0-rc3.xentrace.zst", "3.4.0", "pv"),
        ("eras/pv64-3.3.0.xentrace", "3.3.0", "pv"),
        ("eras/smp64-4.1.6.1.xentrace.zst", "4.1.6.1", "pv"),
        ("eras/smp64-4.22.0.xentrace.zst", "4.22.0", "pv"),
        ("eras/mv64-4.22.0.xentrace.zst", "4.22.0", "pv"),
    ],
)
def test_the_mask_is_enough(sample: str, release: str, guest: str, tmp_path: Path) -> None:
    """With the mask a recording has the same hypercalls, of the same vCPUs, as the whole; without SCHED nobody made them."""
    data = Source(str(SAMPLES / sample)).file.read()
    (tmp_path / "all").write_bytes(data)
    (tmp_path / "mask").write_bytes(filtered(data, mask_of(release, guest)))
    (tmp_path / "pv").write_bytes(filtered(data, 0x0020F000))
    whole, masked, alone = (events(tmp_path / n).filter(CALLS).select(SAME) for n in ("all", "mask", "pv"))
    assert len(whole) > 1000
    assert masked.equals(whole)
    assert masked["domid"].null_count() < len(masked) / 100
    assert alone["domid"].null_count() == len(alone)
    assert (tmp_path / "mask").stat().st_size <= len(data)


def test_the_mask_of_an_hvm_guest(tmp_path: Path) -> None:
    data = Source(str(SAMPLES / "dom0-4.17.7/j4_pvh.xentrace.zst")).file.read(4 << 20)
    data = data[: _whole(data)]
    (tmp_path / "all").write_bytes(data)
    (tmp_path / "mask").write_bytes(filtered(data, mask_of("4.17.7", "hvm")))
    assert events(tmp_path / "mask").filter(CALLS).select(SAME).equals(events(tmp_path / "all").filter(CALLS).select(SAME))
    assert not passes(0x0002F000, 0x20100D)  # "-e sched" has no hypercalls


def _whole(data: bytes) -> int:
    at = 0
    while at + 12 <= len(data) and at + 12 + (size := struct.unpack_from("<I", data, at + 8)[0]) <= len(data):
        at += 12 + size
    return at


def test_the_figures(tmp_path: Path) -> None:
    """What the recipe says a hypercall costs is what the samples say."""
    text = " ".join(t for t, _ in recipes.recipe("xentrace").figures)
    three = (0x0020F000, 0x00223000, 0x0022F000)
    for sample, masks, said in (
        ("mv64-4.22.0", three, "{} bytes each for PV records alone (0x0020f000), {} with mask 0x00223000, {} with all"),
        ("mv64-4.4.4", three, "{}, {} and {} bytes"),
        ("smp64-4.22.0", (0x0FFFF000, 0x00223000), "{} bytes a hypercall; {} with"),
    ):
        data = Source(str(SAMPLES / f"eras/{sample}.xentrace.zst")).file.read()
        (tmp_path / "t").write_bytes(data)
        calls = len(events(tmp_path / "t").filter(CALLS))
        sizes = [round(len(filtered(data, m)) / calls) for m in masks]
        assert said.format(*sizes) in text


@pytest.mark.parametrize(
    ("release", "guest"), [("4.22.0", "pv"), ("4.17.7", "hvm"), ("4.2.5", "pv"), ("3.3.0", "pv"), ("3.2.0", "pv")]
)
def test_xentrace_is_called_right(release: str, guest: str, tmp_path: Path) -> None:
    made = recipes.make("xentrace", release, guest, seconds=1)
    stub(tmp_path, "xentrace", 'echo "$@" > called; for out; do :; done; : > "$out"')
    for tool in ("xl", "xm"):
        stub(tmp_path, tool, f"cat {SAMPLES / 'host/xl_info.txt'}")
    done = sh(made.script, tmp_path)
    assert done.returncode == 0, done.stderr
    called = (tmp_path / "called").read_text().split()
    assert f"--evt-mask={mask_of(release, guest):#010x}" in called
    assert called[-1] == "hypercalls.xentrace"
    assert config.read_host_info(tmp_path / "hypercalls.xentrace.host.txt").tsc_khz == 2596122


# ── the sidecar ──────────────────────────────────────────────────────────────────────────────────────────────────────

XL_LIST = """\
Name                                        ID   Mem VCPUs\tState\tTime(s)
Domain-0                                     0  1024     2     r-----      83.7
web one                                      3   512     1     -b----       1.2
db"2\\                                       12  2048     4     r-----     999.0
(null)                                       4     0     1     --ps-d       0.1
"""


@pytest.mark.parametrize("release", ["4.17.7", "3.4.0"])
def test_the_sidecar_loads(release: str, tmp_path: Path) -> None:
    (tmp_path / "list").write_text(XL_LIST)
    for tool in ("xl", "xm"):
        stub(tmp_path, tool, f"[ $1 = info ] && cat {SAMPLES / 'host/xl_info.txt'} || cat list")
    done = sh(recipes.make("sidecar", release).script, tmp_path, TRACE="t.xentrace")
    assert done.returncode == 0, done.stderr
    said = config.load_sidecar(tmp_path / "t.xentrace")
    assert said is not None
    assert (said.release, said.tsc_khz) == ("4.17.7", 2596122)
    assert {d: (i.name, i.role, i.caller) for d, i in said.domains.items()} == {
        0: ("Domain-0", "control", None),
        3: ("web one", "guest", None),
        12: ("db2", "guest", None),
        4: ("(null)", "guest", None),
    }
    text = (tmp_path / "t.xentrace.xtrace.toml").read_text().replace('# caller = "pv64"', 'caller = "pv64"')
    (tmp_path / "t.xentrace.xtrace.toml").write_text(text)  # the line to fill in is right, too
    assert {i.caller for i in config.read_sidecar(tmp_path / "t.xentrace.xtrace.toml").domains.values()} == {"pv64"}


# ── ftrace ───────────────────────────────────────────────────────────────────────────────────────────────────────────


def fake_tracefs(folder: Path, trace: str, symbols: dict[str, int]) -> dict[str, str]:
    """Lay out the files that the script touches; ``mkdir`` of the instance finds it filled, ``rmdir`` does nothing."""
    tracefs = folder / "tracefs"
    (tracefs / "ready/events/xtrace/up").mkdir(parents=True)
    (tracefs / "ready/events/xen").mkdir(parents=True)
    (tracefs / "instances").mkdir()
    (tracefs / "kprobe_events").write_text("")
    (tracefs / "ready/trace").write_text(trace)
    (folder / "kallsyms").write_text("".join(f"{at:016x} T {name}\n" for name, at in symbols.items()))
    stub(folder, "mkdir", f'exec /bin/cp -r {tracefs}/ready "$1"')
    stub(folder, "rmdir", ":")
    stub(folder, "uname", "echo 6.1.0-50-amd64")
    return {"TRACEFS": str(tracefs), "KALLSYMS": str(folder / "kallsyms")}


OBJDUMP = """\
cat <<'EOF'

/proc/kcore:     file format elf64-x86-64

Disassembly of section load2:

ffffffff81a39070 <load2+0xa39070>:
ffffffff81a39070:\t51                   \tpush   %rcx
ffffffff81a39071:\t41 53                \tpush   %r11
ffffffff81a39073:\t0f 05                \tsyscall
ffffffff81a39075:\t41 5b                \tpop    %r11
EOF"""


def test_ftrace_with_a_hypercall_function(tmp_path: Path) -> None:
    trace = (SAMPLES / "dom0-4.17.7/j3_save_all_parked.txt").read_text()
    env = fake_tracefs(tmp_path, trace, {"__xen_pv_evtchn_do_upcall": 0xFFFFFFFF81022390, "xen_hypercall_pv": 0xFFFFFFFF81A39070})
    stub(tmp_path, "objdump", OBJDUMP)
    done = sh(recipes.make("ftrace", seconds=1).script, tmp_path, **env)
    assert done.returncode == 0, done.stderr
    instance = tmp_path / "tracefs/instances/xtrace"
    assert (instance / "events/xtrace/up/filter").read_text() == "ip == 0xffffffff81a39073\n"
    assert (instance / "trace_clock").read_text() == "x86-tsc\n"
    first = (tmp_path / "tracefs/kprobe_events").read_text().splitlines()[0].split()
    assert first[:2] == ["p:xtrace/up", "__xen_pv_evtchn_do_upcall"]
    # struct pt_regs of x86-64, in order (linux arch/x86/include/asm/ptrace.h)
    order = {f"r{15 - k}": 8 * k for k in range(4)} | {"bp": 32, "bx": 40} | {f"r{11 - k}": 48 + 8 * k for k in range(4)}
    order |= {name: 80 + 8 * k for k, name in enumerate(("ax", "cx", "dx", "si", "di", "orig_ax", "ip", "cs", "flags", "sp"))}
    fields = ("ip", "ax", "di", "si", "dx", "r10", "r8", "r9", "sp", "flags")
    assert first[2:] == [f"{name}=+{order[name]}(%di):x64" for name in fields]
    got = events(tmp_path / "parked.txt")
    wanted = events(SAMPLES / "dom0-4.17.7/j3_save_all_parked.txt")
    assert len(got) == 9
    assert got["on_insn"].to_list() == [True] * 9
    assert got.select(SAME).equals(wanted.select(SAME))


def test_ftrace_with_a_hypercall_page(tmp_path: Path) -> None:
    """In older kernels each operation has its own instruction: only those frames that stand on theirs are kept."""
    page = 0xFFFFFFFF81001000
    line = (
        "  xl-163     [001] d.h.. 121396761{n}: up: (xen_evtchn_do_upcall+0x0/0x30) ip={ip:#x} ax={op:#x}"
        " di=0x51 si=0x0 dx=0x0 r10=0x0 r8=0x0 r9=0x0 sp=0x8 flags=0x246\n"
    )
    places = ((12, 8, 12), (12, 10, 12), (36, 8, 36), (36, 8, 12), (26, 8, 26), (48, 8, 0x1000000C))
    frames = [(page + 32 * stub_of + at, op) for stub_of, at, op in places]
    trace = "# tracer: nop\n" + "".join(line.format(n=801 + n, ip=ip, op=op) for n, (ip, op) in enumerate(frames))
    env = fake_tracefs(tmp_path, trace, {"xen_evtchn_do_upcall": 0xFFFFFFFF81400000, "hypercall_page": page})
    done = sh(recipes.make("ftrace", seconds=1).script, tmp_path, **env)
    assert done.returncode == 0, done.stderr
    instance = tmp_path / "tracefs/instances/xtrace"
    assert (instance / "events/xtrace/up/filter").read_text() == f"ip >= {page:#x} && ip <= {page + 4095:#x}\n"
    got = events(tmp_path / "parked.txt")
    assert got["on_insn"].to_list() == [True] * 3
    assert got["op"].to_list() == [12, 36, 26]


def test_ftrace_refuses_kernels_whose_probe_point_has_no_registers(tmp_path: Path) -> None:
    env = fake_tracefs(tmp_path, "# tracer: nop\n", {"__xen_pv_evtchn_do_upcall": 0xFFFFFFFF81022390})
    stub(tmp_path, "uname", "echo 5.10.0-28-amd64")
    for name in ("ftrace", "bpftrace"):
        done = sh(recipes.make(name, seconds=1).script, tmp_path, **env)
        assert done.returncode == 1
        assert "not given the registers" in done.stderr
    assert (tmp_path / "tracefs/kprobe_events").read_text() == ""


def test_tracepoints(tmp_path: Path) -> None:
    trace = (
        "# tracer: nop\n sh-125 [001] d..1. 68968259999: xen_mc_entry: op 26(mmuext_op) args [ffff88803e71ead0, 1, 0, 7ff0, 0, 0]\n"
    )
    env = fake_tracefs(tmp_path, trace, {})
    done = sh(recipes.make("tracepoints", seconds=1).script, tmp_path, **env)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "xen-events.txt").read_text() == trace


# ── bpftrace, printk, the rest ───────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(("name", "guest"), variants())
def test_what_is_promised_is_read(name: str, guest: str | None, tmp_path: Path) -> None:
    """The lines that a recipe says will come out yield the registers that it says they hold."""
    for line in recipes.recipe(name).lines:
        if line.get("guest") not in (None, guest):
            continue
        path = tmp_path / "t"
        path.write_text(line["text"].strip("\n") + "\n")
        with Source(str(path)) as source:
            assert registry.detect(source).name == line["format"]
        (row,) = events(path).filter(pl.col("kind") == "sample").iter_rows(named=True)
        assert (row["op"], row["rip"], row["on_insn"]) == (line["op"], line["rip"], line["on_insn"])
        assert [row[f"arg{n}"] for n in range(6)] == line["args"]


@pytest.mark.parametrize("guest", ["pv", "hvm"])
@pytest.mark.parametrize("new", [True, False])
def test_bpftrace_prints_the_log(guest: str, new: bool, tmp_path: Path) -> None:
    """The program's own format, filled in, is a line of the log."""
    (tmp_path / "kallsyms").write_text("0 T xen_hypercall_pv\n0 T xen_hypercall_intel\n0 T xen_hypercall_amd\n" if new else "")
    stub(tmp_path, "bpftrace", 'printf "%s" "$2" > program')
    stub(tmp_path, "uname", "echo 6.1.0")
    done = sh(recipes.make("bpftrace", guest=guest, seconds=5).script, tmp_path, KALLSYMS=str(tmp_path / "kallsyms"))
    assert done.returncode == 0, done.stderr
    program = (tmp_path / "program").read_text()
    assert "interval:s:5 { exit(); }" in program
    assert ('kaddr("hypercall_page")' in program) is not new
    form = next(line for line in program.splitlines() if LONG in line).split('"')[1]
    values = iter([30241983112, 1, 12, 0x5C01, 1, 2, 3, 4, 5, 0xFFFFFFFF81A39073])
    for spec in ("%llu", "%u", "%llu", *["%llx"] * 7):
        form = form.replace(spec, f"{next(values):x}" if spec == "%llx" else str(next(values)), 1)
    (tmp_path / "log").write_text(form.replace("\\n", "\n"))
    (row,) = events(tmp_path / "log").iter_rows(named=True)
    assert [row[k] for k in ("time_ns", "vcpu", "op", "rip")] == [30241983112, 1, 12, 0xFFFFFFFF81A39073]
    assert [row[f"arg{n}"] for n in range(6)] == [0x5C01, 1, 2, 3, 4, 5]
    assert row["caller"] == f"{guest}64"
    assert row["on_insn"] is True


FUNCTION = """\
unsigned long hypercall_create_continuation(
    unsigned int op, const char *format, ...)
{
    if ( in_multicall )
    {
        for ( i = 0; i < 6; i++ )
            args[i] = i;
    }
    else
    {
        if ( wide )
        {
            for ( i = 0; i < 6; i++ )
            {
                switch ( i )
                {
                case 0: regs->rdi = i; break;
                case 1: regs->rsi = i; break;
                }
            }
        }
        else
        {
            for ( i = 0; i < 6; i++ )
            {
                switch ( i )
                {
                case 0: regs->@bx = i; break;
                case 1: regs->@cx = i; break;
                }
            }
        }
    }
    return op;
}
"""

C_BEFORE = """\
#include <stdbool.h>
#include <stdio.h>
#define printk printf
struct { int vcpu_id; struct { unsigned short domain_id; } *domain; } vcpu_, *current = &vcpu_;
struct regs {
#define REG(r) union { unsigned long r##_; unsigned long r; }
    unsigned long rdi, rsi, rdx, r10, r8, r9, rbx, rcx, rbp, rip, ebx, ecx, edx, esi, edi, ebp, eip;
} *regs;
static bool in_multicall, wide, hvm;
static unsigned long args[6];
static int i;
#define is_hvm_vcpu(v) (hvm)
#define is_pv_vcpu(v) (!hvm)
static unsigned long long get_cycles(void) { return 0x5d21e9a230ULL; }
static unsigned int smp_processor_id(void) { return 1; }
"""

C_AFTER = """\
int main(int argc, char **argv)
{
    struct regs r = { 0 };
    struct { unsigned short domain_id; } d = { 3 };
    regs = &r; current->domain = (void *)&d; wide = argc < 2;
    r.rip = 0xffffffff81a39075; r.eip = 0x1075;
    return (int)hypercall_create_continuation(12, "") - 12;
}
"""


@pytest.mark.skipif(not shutil.which("cc"), reason="needs a C compiler")
@pytest.mark.parametrize("release", ["3.4.0", "4.4.0", "4.8.5", "4.13.0", "4.17.7", "4.22.0"])
def test_printk_compiles_and_is_read(release: str, tmp_path: Path) -> None:
    """In a function of the same shape the lines compile without a warning, and what they print is read."""
    made = recipes.make("printk", release)
    facts = {f.name: f.value or "" for f in made.facts}
    source = tmp_path / facts["file"]
    source.parent.mkdir(parents=True)
    source.write_text(C_BEFORE + FUNCTION.replace("@", facts["e"]) + C_AFTER)
    done = sh(made.script, tmp_path)
    assert done.returncode == 0, done.stderr
    patched = source.read_text()
    assert patched.count('printk("xtrace') == 2
    cc = ["cc", "-Wall", "-Werror", "-Wno-unused-variable", "-x", "c", str(source), "-o", str(tmp_path / "t")]
    subprocess.run(cc, check=True, timeout=60)
    for words, caller in (([], "pv64"), (["x"], "pv32")):
        out = subprocess.run([str(tmp_path / "t"), *words], capture_output=True, text=True, check=True, timeout=20).stdout
        (tmp_path / "log").write_text(f"(XEN) {out.lstrip()}")
        (row,) = events(tmp_path / "log").iter_rows(named=True)
        assert [row[k] for k in ("op", "pcpu", "domid", "caller", "on_insn", "tsc")] == [12, 1, 3, caller, True, 0x5D21E9A230]
        assert None not in [row[f"arg{n}"] for n in range(6)]
        if caller == "pv64":
            assert row["rip"] == 0xFFFFFFFF81A39075 - (2 if facts["rewound"] else 0)


def test_printk_says_when_the_function_looks_different(tmp_path: Path) -> None:
    source = tmp_path / "xen/arch/x86/hypercall.c"
    source.parent.mkdir(parents=True)
    source.write_text("int nothing;\n")
    done = sh(recipes.make("printk").script, tmp_path)
    assert done.returncode != 0
    assert "looks different" in done.stderr
    assert source.read_text() == "int nothing;\n"


def test_the_guest_goes_on_whatever_happens(tmp_path: Path) -> None:
    for works in (True, False):
        stub(tmp_path, "xl", 'echo "$@" >> called; ' + ("[ $1 != dump-core ]" if not works else ":"))
        (tmp_path / "called").unlink(missing_ok=True)
        done = sh(recipes.make("image").script, tmp_path, DOMAIN="web1")
        assert (done.returncode == 0) is works
        assert (tmp_path / "called").read_text() == "pause web1\ndump-core web1 web1.core\nunpause web1\n"


def test_qemu(tmp_path: Path) -> None:
    stub(tmp_path, "timeout", 'echo "$@" > called')
    done = sh(recipes.make("qemu", seconds=9).script, tmp_path)
    assert done.returncode == 0, done.stderr
    called = (tmp_path / "called").read_text()
    assert called.startswith("9 qemu-system-x86_64 -accel kvm,xen-version=0x")
    assert "-trace kvm_xen_hypercall -D xen-hypercalls.log" in called


def test_damaged_recipes_are_named() -> None:
    from xtrace.errors import FactError

    whole = b'id = "x"\ntitle = "x"\norder = 1\nscript = ""\n'
    assert recipes._read("x.toml", whole).id == "x"
    for raw in (b"id = 3", b"\xff", whole + b"what = 1\n", whole + b'[[fact]]\nname = "f"\n'):
        with pytest.raises(FactError, match=r"recipes/x\.toml"):
            recipes._read("x.toml", raw)


def test_docs_name_every_recipe() -> None:
    text = (SAMPLES.parent / "docs/record.md").read_text()
    for name in IDS:
        assert f"`{name}`" in text


def test_ftrace_says_when_it_cannot_find_the_instruction(tmp_path: Path) -> None:
    env = fake_tracefs(tmp_path, "# tracer: nop\n", {"__xen_pv_evtchn_do_upcall": 0xFFFFFFFF81022390})
    done = sh(recipes.make("ftrace", seconds=1).script, tmp_path, **env)
    assert done.returncode == 1
    assert "no hypercall function" in done.stderr
    (tmp_path / "kallsyms").write_text("ffffffff81a39070 T xen_hypercall_pv\n")
    stub(tmp_path, "objdump", "exit 1")
    done = sh(recipes.make("ftrace", seconds=1).script, tmp_path, **env)
    assert done.returncode == 1
    assert "set INSN" in done.stderr
