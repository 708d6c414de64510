"""Time the xentrace reader against ``xenalyze --summary`` on a file of a gigabyte and more.

The file is a sample laid end to end, the TSCs of each copy shifted so that time goes on on every pCPU. Both programs then read
it in turn, each in a process of its own; printed are seconds, records a second, their ratio and the highest resident memory.

    python benchmarks/ingest_xentrace.py [--sample FILE ...] [--gigabytes 1] [--dir DIR] [--rounds 3]
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
from pathlib import Path

import numpy as np

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from xtrace.ingest.base import Ledger  # noqa: E402
from xtrace.ingest.layout import load  # noqa: E402
from xtrace.ingest.source import Source  # noqa: E402
from xtrace.ingest.walk import PAD, walk  # noqa: E402
from xtrace.ingest.windows import Cursor, scan  # noqa: E402

#: Samples that xenalyze reads to the end when they are laid end to end: all classes of records; hypercalls only; HVM.
DEFAULT = ("eras/smp64-4.4.4.xentrace.zst", "dom0-4.17.7/j3_hcload_pv.xentrace.zst", "dom0-4.17.7/j4_pvh.xentrace.zst")

_LOST = 0xC001F001  # header of a lost-records entry; its words 2 and 3 are a TSC too

READ = """
import resource, sys, time
from xtrace.ingest.base import ReadOptions
from xtrace.ingest.source import Source
from xtrace.ingest.xentrace import READER
start = time.perf_counter()
with Source(sys.argv[1]) as source:
    recording = READER.open(source, ReadOptions())
    events = sum(batch.height for batch in recording.batches())
seconds = time.perf_counter() - start
print(recording.ledger.records, events, seconds, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)
"""


def build(sample: Path, target: Path, size: int) -> int:
    """Lay ``sample`` end to end until ``target`` has ``size`` bytes; return the records of one copy."""
    with Source(sample) as source:
        words = np.frombuffer(source.file.read(), dtype="<u4").copy()
        index = scan(source.file.fileno(), source.size, Ledger())
        places, likely = [], load().likely
        records = index.count
        padded = np.concatenate([words, np.zeros(PAD + 1, dtype=np.uint32)])
        for pcpu in index.pcpus:
            cursor = Cursor(index, pcpu, 1 << 20)
            while not cursor.done:
                offset, length, _ = cursor.take(1 << 40)
                start = offset // 4
                pos, _, _ = walk(padded, start, start + length // 4, np.zeros(len(padded), dtype=np.bool_), likely)
                records += len(pos)
                head = words[pos]
                places.append(pos[head >= 1 << 31] + 1)
                places.append(pos[head == _LOST] + 5)
                cursor.settle(len(offset))
    at = np.concatenate(places)
    tsc = words[at] | (words[at + 1].astype(np.uint64) << np.uint64(32))
    span = np.uint64(int(tsc.max()) - int(tsc.min()) + 100_000)
    with target.open("wb") as file:
        for copy in range(-(-size // words.nbytes)):
            moved = tsc + span * np.uint64(copy)
            words[at], words[at + 1] = moved & np.uint64(0xFFFFFFFF), moved >> np.uint64(32)
            file.write(words.tobytes())
    return records


def ours(trace: Path) -> tuple[int, int, float, int]:
    """Read ``trace`` once: records, events, seconds, peak KiB."""
    env = {**os.environ, "PYTHONPATH": str(ROOT), "POLARS_MAX_THREADS": "1", "OMP_NUM_THREADS": "1"}
    done = subprocess.run([sys.executable, "-c", READ, str(trace)], env=env, capture_output=True, text=True, check=True)
    records, events, seconds, peak = done.stdout.split()
    return int(records), int(events), float(seconds), int(peak)


def theirs(trace: Path) -> tuple[float, float]:
    """Let xenalyze summarise ``trace`` once: seconds, and the part of the file that its own volume summary accounts for.

    At a joint of the file the run states may not fit together; xenalyze gives up there on some samples, and then its time
    says nothing.
    """
    start = time.perf_counter()
    command = ["xenalyze", "--summary", str(trace)]
    # Its warnings (standard error) can be larger than the trace.
    done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, check=False)
    seconds = time.perf_counter() - start
    volumes = re.findall(r"^ (?:gen|sched|dom0op|hvm|mem|pv|shadow|hw) *: +(\d+)$", done.stdout.decode(), re.MULTILINE)
    return seconds, sum(map(int, volumes)) / trace.stat().st_size


def main() -> None:
    """Run the benchmark."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--sample", type=Path, action="append", help="trace to lay end to end (may be given again)")
    parser.add_argument("--gigabytes", type=float, default=1.0)
    parser.add_argument("--dir", type=Path, help="where to put the file (default: the temporary directory)")
    parser.add_argument("--rounds", type=int, default=3)
    args = parser.parse_args()
    samples = args.sample or [ROOT / "samples" / name for name in DEFAULT]
    for sample in samples:
        with tempfile.TemporaryDirectory(dir=args.dir) as folder:
            trace = Path(folder) / "big.xentrace"
            build(sample, trace, int(args.gigabytes * 1e9))
            size = trace.stat().st_size
            print(f"{sample.name}: {size / 1e9:.2f} GB", flush=True)
            mine, other, peak, records, events, part = [], [], 0, 0, 0, 0.0
            for _ in range(args.rounds):
                records, events, seconds, rss = ours(trace)
                mine.append(seconds)
                peak = max(peak, rss)
                if shutil.which("xenalyze"):
                    spent, part = theirs(trace)
                    other.append(spent)
            best = statistics.median(mine)
            print(f"  xtrace    {best:6.2f} s  {records / best / 1e6:5.1f} M records/s  {size / best / 1e6:5.0f} MB/s  "
                  f"{events} events of {records} records  peak {peak / 1024:.0f} MiB")  # fmt: skip
            if other:
                theirs_best = statistics.median(other)
                print(f"  xenalyze  {theirs_best:6.2f} s  {records / theirs_best / 1e6:5.1f} M records/s  "
                      f"xtrace is {theirs_best / best:.2f} times as fast; xenalyze read {part:.0%} of the file")  # fmt: skip


if __name__ == "__main__":
    main()
