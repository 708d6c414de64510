"""Time every reader of text against a loop over lines with Python's ``re``, ``grep -c`` and ``wc -l``, on the same file.

Each file is a sample laid end to end, its times shifted so that time goes on, until it has as many lines as asked for (or lines
made up here after the format's own pattern, where there is no recording that is long enough). The programs then read it in turn,
each in a process of its own on the cores that it is given (`taskset`); printed are seconds, lines and MB a second, the CPU
seconds of all threads, the highest resident memory, and how many times as fast as each of the others the reader is. Other
programs on the machine make all of it slower, the CPU seconds least. The loop only finds the fields and keeps none.

    python benchmarks/ingest_text.py [--case NAME ...] [--lines 2000000] [--cores 0,1] [--rounds 3] [--dir DIR]

The aim is 2 million lines a second on two cores, so at most one CPU second for a million lines, evenly on both. A core takes
apart 40 to 120 MB a second where every line is a record: what a format needs for a line decides. Million lines a second (and CPU
seconds for a million lines) on two free cores, 1 to 2 million lines each, in one or two rounds:

* reached: boot logs of a console (45 bytes a line) 4.7 (0.3), xenalyze (60) 2.6 (0.6), xentrace_format (67) 2.0 (0.8).
* below, though the CPU seconds would do (what is not spread over both cores counts twice): ftrace of all ``xen:`` events (117) 1.7
  (0.9), mixed consoles (51) 1.7 (0.6), trace-cmd report (115) 1.4 (1.1), xenctx (46) 1.4 (0.8).
* below: KVM's tracepoint (127, each with seven numbers) 1.2 (1.5), QEMU's log (128, two events a line) 0.9 (1.9), xtrace's own
  log (115, a dozen words that all become columns) 0.8 (2.0), tables as CSV (107, 24 cells checked one by one) 0.8 (2.1). Two
  million would be 250 MB a second with every word a column.
* well below: NDJSON (335) 0.5 (3.3), ftrace with all registers (210, ten patterns a line) 0.5 (3.6), a bare guest's console (271,
  the guest's memory in hex) 0.1 (9). Such files are short (a probe's filter leaves thousands of lines), and a table exists as
  Parquet or Arrow, where nothing is parsed.
"""

from __future__ import annotations

import argparse
import os
import random
import re
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Callable

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from xtrace.ingest.source import Source  # noqa: E402


def mixed_console() -> str:
    """Kernel and hypervisor messages, and now and then a crash with its register dump."""
    rng = random.Random(1)
    folder = ROOT / "samples" / "console"
    dumps = [(folder / name).read_text() for name in ("crash-pv64-4.19.txt", "crash-pvh-4.20.txt", "driver-domain-4.18.txt")]
    out = []
    for n in range(60_000):
        out.append(f"[{n / 7:12.6f}] xenbr0: port {rng.randrange(16)}(vif{rng.randrange(9)}.0) entered blocking state")
        out.append(f"(XEN) [{n / 7:12.6f}] HVM{rng.randrange(9)} save: CPU")
        if not n % 60:
            out += rng.choice(dumps).splitlines()
    return "\n".join(out) + "\n"


def xtrace_log() -> str:
    """Calls with an argument's memory, samples and returns, as docs/xtrace-log.md has them, behind a console's stamps."""
    rng = random.Random(2)
    tsc, out = 0x9A3F0011, ["xtrace: header release=4.4.1 arch=x86_64 tsc_khz=2600000"]
    for n in range(300_000):
        tsc += rng.randrange(1 << 14)
        who = f"pcpu={rng.randrange(4)} dom={rng.randrange(8)} vcpu={rng.randrange(2)}"
        args = f"a0={rng.randrange(64):#x} a1={0xFFFFFFFF80000000 | rng.getrandbits(31):#x}"
        at = f"(XEN) [{n / 1000:12.6f}] xtrace:"
        op = rng.choice(("memory_op", "mmuext_op", "grant_table_op", "26"))
        out.append(f"{at} call tsc={tsc:#x} {who} op={op} {args} mem.nr_extents={rng.randrange(1024)}")
        if rng.getrandbits(1):
            out.append(f"{at} sample tsc={tsc + 9:#x} {who} op=12 {args} rip=0xffffffff80102029 on_insn=1")
        out.append(f"{at} return tsc={tsc + 99:#x} {who} op=12 result={rng.choice((0, 64, -22))}")
    return "\n".join(out) + "\n"


def _call(rng: random.Random) -> tuple[int, int, int, int]:
    return rng.choice((12, 24, 29, 32)), rng.randrange(16), 0xFFFFFFFF80000000 | rng.getrandbits(31), rng.randrange(4)


def qemu_log() -> str:
    """QEMU's log of its trace events, with stamps."""
    rng, out = random.Random(3), []
    for n in range(300_000):
        op, *a = _call(rng)
        out.append(
            f"4711@{1690000000 + n // 1000}.{n % 1000:03d}456:kvm_xen_hypercall xen_hypercall: cpu {rng.randrange(4)} cpl 0 "
            f"input {op} a0 {a[0]:#x} a1 {a[1]:#x} a2 {a[2]:#x} ret {rng.choice((0, 0xFFFFFFFFFFFFFFDA)):#x}"
        )
    return "\n".join(out) + "\n"


def kvm_trace() -> str:
    """ftrace of KVM's tracepoints."""
    rng, out = random.Random(4), []
    for n in range(300_000):
        op, *a = _call(rng)
        at = f"       CPU {rng.randrange(2)}/KVM-4713    [{rng.randrange(8):03d}] d....  {1234 + n / 1000:.6f}:"
        out.append(f"{at} kvm_xen_hypercall: cpl 0 nr {op:#x} a0 {a[0]:#x} a1 {a[1]:#x} a2 {a[2]:#x} a3 0x0 a4 0x0 a5 0x0")
        if rng.getrandbits(1):
            out.append(f"{at} kvm_exit: reason VMCALL rip 0x{rng.getrandbits(32):x} info 0 0")
    return "\n".join(out) + "\n"


def events(form: str) -> str:
    """An events table as ``xtrace ingest`` writes it."""
    with tempfile.TemporaryDirectory() as folder:
        log, table = Path(folder) / "log.txt", Path(folder) / f"table.{form}"
        log.write_text(xtrace_log())
        command = [sys.executable, "-m", "xtrace", "ingest", str(log), "-o", str(table)]
        subprocess.run(command, env={**os.environ, "PYTHONPATH": str(ROOT)}, check=True, capture_output=True)
        return table.read_text()


@dataclass(frozen=True)
class Case:
    """One text to read.

    Attributes:
        name: what it is called here.
        format: name of the reader.
        sample: file below samples/, or what makes the text.
        peer: pattern with which a plain loop finds the fields of a hypercall's line; also what ``grep -c -E`` counts.
        time: pattern whose group 1 is a line's time, to be shifted; "" lays the sample end to end unchanged.
        step: what to add for each copy, at least the span of the sample's times.
        once: the text is used as it is made, not laid end to end (rows are numbered).
        share: how many of the lines asked for, of formats with long lines.
    """

    name: str
    format: str
    sample: str | Callable[[], str]
    peer: str
    time: str = ""
    step: float = 0
    once: bool = False
    share: float = 1


_MULTICALL = r"^.*\[([0-9]+)\]( +\S+)? +([0-9.]+): +(xen_mc_(entry|flush|extend_args)): +(.*)$"
_XTRACE = r"^.*xtrace: (call|sample|return) tsc=(\S+) pcpu=(\S+) dom=(\S+) vcpu=(\S+) op=(\S+) (.*)$"

#: A further text is one more line here.
CASES = (
    Case(
        "xenalyze",
        "xenalyze",
        "dom0-4.17.7/j5_tiny_pv.xenalyze-dump.txt.zst",
        r"^[] !] *([0-9]+\.[0-9]+) ([-|.x]+) d([0-9]+)v([0-9]+)( +)hypercall +([0-9a-f]+) ?(.*)$",
        r"^[\] !]( {14}| {0,2}\d+\.\d{9}) ",
        0.5,
    ),
    Case(
        "xentrace-format",
        "xentrace-format",
        "dom0-4.17.7/j5_tiny_pv.xentrace_format.txt.zst",
        r"^CPU([0-9]+)  ([0-9]+) \(\+ *([0-9]+)\)( +)hypercall  \[ op = 0x([0-9a-f]+) \]$",
        r"^CPU\d+  (\d+) ",
        1_000_000_000,
    ),
    Case("ftrace", "linux-trace", "linux/j3_xen_tracepoints_head.txt.zst", _MULTICALL),
    Case("trace-cmd", "linux-trace", "linux/j3_trace_cmd_report.txt.zst", _MULTICALL),
    Case(
        "ftrace-registers",
        "linux-trace",
        "dom0-4.17.7/j3_hcload_parked.txt.zst",
        r"^.*\[([0-9]+)\] \S+ +([0-9.]+): up: .* ip=(\S+) ax=(\S+) (.*)$",
        share=0.5,
    ),
    Case("xtrace-log", "xtrace-log", xtrace_log, _XTRACE),
    Case("kvm", "kvm-xen", kvm_trace, r"^.*\[([0-9]+)\].* ([0-9.]+): kvm_xen_hypercall: cpl ([0-9]+) nr (\S+) (.*)$"),
    Case(
        "qemu", "kvm-xen", qemu_log, r"^[0-9]+@([0-9.]+):kvm_xen_hypercall .*: cpu ([0-9]+) cpl 0 input ([0-9]+) (.*)$", share=0.5
    ),
    Case("console", "console", mixed_console, r"^\(XEN\) (rax|rbp): +([0-9a-f]+) .*$"),
    Case("console-boot", "console", "host/xl_dmesg.txt", r"^\(XEN\) (rax|rbp): +([0-9a-f]+) .*$"),
    Case("xenctx", "xenctx", "console/xenctx-unikernel-4.4.txt", r"^(rip|rax|rdi): +([0-9a-f]+).*$"),
    Case(
        "bare",
        "bare",
        "bare/bare-4.4.4.txt.zst",
        r"^CONT n=([0-9]+) i=[0-9]+ tsc=(\S+) rip=(\S+) rax=(\S+) .* mem=(\S+)$",
        share=0.2,
    ),
    Case(
        "events-csv", "events", lambda: events("csv"), r"^([0-9]+),([0-9]*),.*,(hypercall|return|sample),([0-9]*),(.*)$", once=True
    ),
    Case(
        "events-ndjson",
        "events",
        lambda: events("ndjson"),
        r'^\{"seq":([0-9]+),.*"kind":"([a-z]+)","op":([0-9]+),(.*)\}$',
        once=True,
    ),
)

READ = """
import resource, sys, time
from xtrace.ingest.base import ReadOptions
from xtrace.ingest.registry import reader
from xtrace.ingest.source import Source
known = reader(sys.argv[2])  # loads it
start, cpu = time.perf_counter(), time.process_time()
with Source(sys.argv[1]) as source:
    recording = known.open(source, ReadOptions())
    events = sum(batch.height for batch in recording.batches())
print(time.perf_counter() - start, time.process_time() - cpu, recording.ledger.lines, events,
      resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)
"""

LOOP = """
import re, sys, time
start = time.perf_counter()
pattern = re.compile(sys.argv[2])
calls = 0
with open(sys.argv[1], errors="replace") as file:
    for line in file:
        if match := pattern.match(line):
            fields = match.groups()
            calls += 1
print(time.perf_counter() - start, calls)
"""


def build(case: Case, target: Path, lines: int) -> None:
    """Write ``target``: the sample again and again, with its times going on."""
    if not isinstance(case.sample, str):
        text = case.sample()
    else:
        with Source(ROOT / "samples" / case.sample) as source:
            text = source.file.read().decode("utf-8", "replace")
    if not case.time:
        target.write_text(text if case.once else text * -(-lines // text.count("\n")))
        return
    part = text.split("\n")[:-1]
    spots = [re.match(case.time, line) for line in part]
    with target.open("w") as file:
        for copy in range(-(-lines // len(part))):
            for line, spot in zip(part, spots, strict=True):
                if spot is None or (float(spot[1].strip() or 0) == 0 and (copy == 0 or not spot[1].isspace())):
                    file.write(line + "\n")
                    continue
                value = float(spot[1].strip() or 0) + copy * case.step
                shown = f"{value:13.9f}" if "." in spot[1] or spot[1].isspace() else str(int(value))
                file.write(f"{line[: spot.start(1)]}{shown}{line[spot.end(1) :]}\n")


def run(command: list[str], cores: str) -> list[float]:
    """Run one program on some cores; return the numbers that it prints (its seconds first)."""
    env = {**os.environ, "PYTHONPATH": str(ROOT), "POLARS_MAX_THREADS": str(len(cores.split(",")))}
    on = ["taskset", "-c", cores] if shutil.which("taskset") else []
    start = time.perf_counter()
    done = subprocess.run([*on, *command], env=env, capture_output=True, text=True)
    if done.returncode > (command[0] == "grep"):  # 1 of grep: no line
        sys.exit(f"{command[0]} failed: {done.stderr}")
    seconds = time.perf_counter() - start
    found = [float(word) for word in done.stdout.split() if "/" not in word]
    return found if len(found) > 1 else [seconds, *found]


def main() -> None:
    """Run the benchmark."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--case", action="append", choices=[case.name for case in CASES])
    parser.add_argument("--lines", type=int, default=2_000_000)
    parser.add_argument("--cores", default="0,1")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--dir", type=Path, help="where to put the files (default: the temporary directory)")
    args = parser.parse_args()
    for case in CASES:
        if args.case and case.name not in args.case:
            continue
        with tempfile.TemporaryDirectory(dir=args.dir) as folder:
            file = Path(folder) / "big.txt"
            build(case, file, int(args.lines * case.share))
            commands = {
                "xtrace": [sys.executable, "-c", READ, str(file), case.format],
                "re loop": [sys.executable, "-c", LOOP, str(file), case.peer],
                "grep -c": ["grep", "-c", "-E", case.peer, str(file)],
                "wc -l": ["wc", "-l", str(file)],
            }
            taken: dict[str, list[list[float]]] = {name: [] for name, command in commands.items() if shutil.which(command[0])}
            for _ in range(args.rounds):
                for name, runs in taken.items():
                    runs.append(run(commands[name], args.cores))
            ours = taken.pop("xtrace")
            seconds, cpu = (statistics.median(r[i] for r in ours) for i in (0, 1))
            lines, size, peak = ours[0][2], file.stat().st_size, max(r[4] for r in ours) / 1024
            print(
                f"{case.name}: {size / 1e6:.0f} MB, {lines / 1e6:.2f} M lines of {size / lines:.0f} bytes, {ours[0][3]:.0f} events"
            )
            print(
                f"  xtrace  {seconds:6.2f} s  {lines / seconds / 1e6:5.2f} M lines/s  {size / seconds / 1e6:4.0f} MB/s  "
                f"CPU {cpu:.2f} s ({lines / cpu / 1e6:.2f} M lines each)  peak {peak:.0f} MiB"
            )
            for name, runs in taken.items():
                other = statistics.median(r[0] for r in runs)
                print(
                    f"  {name} {other:6.2f} s  {lines / other / 1e6:5.2f} M lines/s  "
                    f"xtrace is {other / seconds:.2f} times as fast; it finds {runs[0][1]:.0f}"
                )


if __name__ == "__main__":
    main()
