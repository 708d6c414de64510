"""Of the continuations that a kprobe in dom0 saw, how many does the xentrace of the same run yield, and as what?

``python benchmarks/kprobe_truth.py [DIR]`` or ``… TRACE PARKED [--from RELEASE]``. DIR (samples/dom0-4.17.7) holds xentrace
binaries, and beside each the register samples on the same clock: ``NAME_parked.txt`` or ``NAME_ftrace.txt`` (perhaps .zst), the
lines of a kprobe on the upcall handler with the interrupted registers (samples/README.md).

A sample whose instruction pointer is the hypercall instruction is a continuation: the vCPU re-enters with these registers. Its
record is the next one of that hypercall, of any vCPU (without scheduling records the trace does not say whose); where counts
are recorded it is the next one with the parked count. Two samples without a record between them were interrupted twice before
the instruction ran. What the stitcher says of that record is counted: ``proved`` and ``inferred`` by what shows it, ``by its
sub-call`` (a multicall's entry that is not told itself, but whose first sub-call is proved), ``not told``.
"""

from __future__ import annotations

import argparse
import re
from collections import Counter, defaultdict
from pathlib import Path
from typing import Final

import numpy as np
import polars as pl

from xtrace.ingest.hypercalls import HYPERCALLS
from xtrace.ingest.source import Source
from xtrace.pipeline import Options, open_input
from xtrace.replay.callers import CallerFill
from xtrace.replay.stitch import Stitcher

_SAMPLE: Final = re.compile(rb"^.*? (\d+): up: .*?\bip=(\w+) ax=(\w+) di=(\w+) si=(\w+) dx=(\w+)", re.MULTILINE)
_NAMES: Final = {v: k for k, v in HYPERCALLS.items()}
_MULTICALL: Final = 13
#: Register that holds what the recorder writes of a count, by hypercall (arg1, arg2).
_COUNT: Final = {1: "arg1", 13: "arg1", 20: "arg2", 26: "arg1"}
_COLUMNS: Final = ("proved explicit", "inferred arithmetic", "inferred sequence", "by its sub-call", "not told")


def samples(path: Path) -> list[tuple[int, int, dict[str, int]]]:
    """Return TSC, hypercall and registers of every parked vCPU."""
    with Source(path) as source:
        found = _SAMPLE.findall(source.file.read())
    return [
        (int(t), int(ax, 16), {"arg0": int(di, 16), "arg1": int(si, 16), "arg2": int(dx, 16)}) for t, _, ax, di, si, dx in found
    ]


def stitched(path: Path, release: str) -> pl.DataFrame:
    """Return hypercall and sub-call records with ``said``: what the stitcher says of each."""
    opened, recording = open_input(path, Options())
    stitcher, fill = Stitcher(release), CallerFill(everyone="pv64")
    with opened:
        parts = [stitcher.feed(fill.fill(b)) for b in recording.batches()]
    entries = pl.concat([p.entries for p in parts])
    told = pl.concat([p.continuations for p in parts]).select(
        "seq", pl.concat_str(pl.col("evidence").cast(pl.String), pl.lit(" "), pl.col("by").cast(pl.String)).alias("said")
    )
    return entries.filter(pl.col("kind").is_in(["hypercall", "subcall"])).join(told, on="seq", how="left", maintain_order="left")


def held(trace: Path, parked: Path, release: str) -> tuple[dict[int, Counter[str]], Counter[str]]:
    """Return, by hypercall, what is said of the record of each sample, and figures about the match."""
    rows = stitched(trace, release)
    tsc = rows.get_column("tsc").to_numpy()
    top = (rows.get_column("kind") == "hypercall").to_numpy()
    op, said = rows.get_column("op").to_numpy(), rows.get_column("said").to_list()
    counts = {a: rows.get_column(a).to_list() for a in ("arg1", "arg2")}
    pcpu = rows.get_column("pcpu").to_numpy()
    out: dict[int, Counter[str]] = defaultdict(Counter)
    figures: Counter[str] = Counter()
    taken: dict[int, int] = {}
    for t, number, registers in samples(parked):
        if not len(tsc) or not tsc[0] <= t <= tsc[-1]:
            figures["outside the trace"] += 1
            continue
        mine = np.flatnonzero(top & (op == number) & (tsc > t))
        name = _COUNT.get(number)
        if name is not None:
            wanted = registers[name] & 0xFFFFFFFF
            mine = np.array([i for i in mine[:16] if counts[name][i] in (None, wanted)], np.intp)
        if not len(mine):
            figures["without a record"] += 1
            out[number]["samples"] += 1
            continue
        at = int(mine[0])
        if at in taken:
            figures["of a record that another sample has"] += 1
            continue
        taken[at] = t
        out[number]["samples"] += 1
        word = said[at]
        if word is None and number == _MULTICALL:
            behind = [i for i in range(at + 1, min(at + 8, len(op))) if pcpu[i] == pcpu[at]]
            if behind and not top[behind[0]] and str(said[behind[0]]).startswith("proved"):
                word = "by its sub-call"
        out[number][word or "not told"] += 1
    return out, figures


def main() -> None:
    """Print a table for each pair."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("paths", nargs="*", type=Path, default=[Path("samples/dom0-4.17.7")])
    parser.add_argument("--from", dest="release", default="4.17.7")
    given = parser.parse_args()
    pairs = [tuple(given.paths)] if len(given.paths) == 2 else _pairs(given.paths[0])
    total: dict[int, Counter[str]] = defaultdict(Counter)
    for trace, parked in pairs:
        found, figures = held(trace, parked, given.release)
        print(f"{trace.name} ({parked.name}): {', '.join(f'{n:,} {k}' for k, n in figures.items()) or 'every sample has a record'}")
        _table(found)
        for number, counts in found.items():
            total[number] += counts
    print("all of them:")
    _table(total)


def _table(found: dict[int, Counter[str]]) -> None:
    print(f"  {'':<16}{'samples':>8}" + "".join(f"{c:>21}" for c in _COLUMNS))
    everything: Counter[str] = Counter()
    for number, counts in sorted(found.items()):
        everything += counts
        print(f"  {_NAMES.get(number, str(number)):<16}{counts['samples']:>8}" + "".join(f"{counts[c]:>21,}" for c in _COLUMNS))
    shares = "".join(f"{everything[c]:>13,} {everything[c] / max(everything['samples'], 1):>6.1%}" for c in _COLUMNS)
    print(f"  {'':<16}{everything['samples']:>8}{shares}")


def _pairs(folder: Path) -> list[tuple[Path, ...]]:
    out: list[tuple[Path, ...]] = []
    for trace in (p for p in sorted(folder.iterdir()) if p.name.endswith((".xentrace", ".xentrace.zst"))):
        name = trace.name.partition(".")[0]
        stems = {name, name.removesuffix("_pv")}
        beside = [
            p for p in sorted(folder.glob("*.txt*"))
            if p.name.partition(".")[0] in {f"{s}{end}" for s in stems for end in ("_parked", "_ftrace")}
        ]  # fmt: skip
        out += [(trace, p) for p in beside]
    return out


if __name__ == "__main__":
    main()
