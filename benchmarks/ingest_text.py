"""Time the readers of text against a loop over lines with Python's ``re`` and against ``grep -c``, on the same file.

Each file is a sample laid end to end, its times shifted so that time goes on, until it has two million lines. The programs then
read it in turn, each in a process of its own on the cores that it is given (`taskset`); printed are seconds, lines a second,
their ratio and the highest resident memory. Other programs on the machine make it slower: CPU seconds are printed too.

    python benchmarks/ingest_text.py [--format NAME ...] [--lines 2000000] [--cores 0,1] [--rounds 3] [--dir DIR]
"""

from __future__ import annotations

import argparse
import os
import re
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from xtrace.ingest.source import Source  # noqa: E402


@dataclass(frozen=True)
class Case:
    """One text to read.

    Attributes:
        format: name of the reader.
        sample: file below samples/.
        peer: pattern with which a plain loop finds the fields of a hypercall's line; also what ``grep -c -E`` counts.
        time: pattern whose group 1 is a line's time, to be shifted; "" lays the sample end to end unchanged.
        step: what to add for each copy, at least the span of the sample's times.
    """

    format: str
    sample: str
    peer: str
    time: str = ""
    step: float = 0


#: A further text is one more line here.
CASES = (
    Case(
        "xenalyze",
        "dom0-4.17.7/j5_tiny_pv.xenalyze-dump.txt.zst",
        r"^[] !] *([0-9]+\.[0-9]+) ([-|.x]+) d([0-9]+)v([0-9]+)( +)hypercall +([0-9a-f]+) ?(.*)$",
        r"^[\] !]( {14}| {0,2}\d+\.\d{9}) ",
        0.5,
    ),
    Case(
        "xentrace-format",
        "dom0-4.17.7/j5_tiny_pv.xentrace_format.txt.zst",
        r"^CPU([0-9]+)  ([0-9]+) \(\+ *([0-9]+)\)( +)hypercall  \[ op = 0x([0-9a-f]+) \]$",
        r"^CPU\d+  (\d+) ",
        1_000_000_000,
    ),
    Case(
        "linux-trace",
        "linux/j3_xen_tracepoints_head.txt.zst",
        r"^.*\[([0-9]+)\] \S+ +([0-9.]+): (xen_mc_(?:entry|flush|extend_args)): (.*)$",
    ),
    Case(
        "bare",
        "bare/bare-4.4.4.txt.zst",
        r"^CONT n=([0-9]+) i=[0-9]+ tsc=([0-9]+) rip=(\S+) rax=(\S+) .* mem=(\S+)$",
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
    with Source(ROOT / "samples" / case.sample) as source:
        text = source.file.read().decode("utf-8", "replace")
    part = text.split("\n")[:-1]
    spots = [re.match(case.time, line) if case.time else None for line in part]
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
    done = subprocess.run([*on, *command], env=env, capture_output=True, text=True, check=True)
    seconds = time.perf_counter() - start
    found = [float(word) for word in done.stdout.split()]
    return found if len(found) > 1 else [seconds, *found]


def main() -> None:
    """Run the benchmark."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--format", action="append", choices=[case.format for case in CASES])
    parser.add_argument("--lines", type=int, default=2_000_000)
    parser.add_argument("--cores", default="0,1")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--dir", type=Path, help="where to put the files (default: the temporary directory)")
    args = parser.parse_args()
    for case in CASES:
        if args.format and case.format not in args.format:
            continue
        with tempfile.TemporaryDirectory(dir=args.dir) as folder:
            file = Path(folder) / "big.txt"
            build(case, file, args.lines)
            ours, loop, grep = [], [], []
            for _ in range(args.rounds):
                ours.append(run([sys.executable, "-c", READ, str(file), case.format], args.cores))
                loop.append(run([sys.executable, "-c", LOOP, str(file), case.peer], args.cores))
                if shutil.which("grep"):
                    grep.append(run(["grep", "-c", "-E", case.peer, str(file)], args.cores))
            seconds, lines = statistics.median(r[0] for r in ours), ours[0][2]
            print(f"{case.format}: {file.stat().st_size / 1e6:.0f} MB, {lines / 1e6:.2f} M lines, {ours[0][3]:.0f} events")
            cpu, peak = statistics.median(r[1] for r in ours), max(r[4] for r in ours) / 1024
            print(f"  xtrace  {seconds:6.2f} s  {lines / seconds / 1e6:5.2f} M lines/s  CPU {cpu:.2f} s  peak {peak:.0f} MiB")
            for name, times in (("re loop", loop), ("grep -c", grep)):
                if times:
                    other = statistics.median(r[0] for r in times)
                    print(
                        f"  {name} {other:6.2f} s  {lines / other / 1e6:5.2f} M lines/s  "
                        f"xtrace is {other / seconds:.2f} times as fast; it finds {times[0][1]:.0f}"
                    )


if __name__ == "__main__":
    main()
