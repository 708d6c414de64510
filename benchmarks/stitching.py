"""How many re-entries of real traces are recovered, and how many of those claimed are true: ``python benchmarks/stitching.py DIR``.

DIR holds the era recordings ``SET-RELEASE.xentrace[.zst]`` with the truth ``SET-RELEASE.txt[.zst]`` beside each (samples/eras has
some). The truth is every call that the guest made, with its span on the trace's own clock: of the records of that hypercall on
that vCPU inside the span the first is the call, all others are re-entries. Records outside every span are not counted. Where
records were lost (lost64) the first of a span may be a re-entry that is counted as false.
"""

from __future__ import annotations

import re
import sys
from collections import Counter
from pathlib import Path

import numpy as np
import polars as pl

from xtrace import release
from xtrace.ingest.source import Source
from xtrace.pipeline import Options, open_input
from xtrace.replay.callers import CallerFill
from xtrace.replay.stitch import Stitcher

_CALL = re.compile(rb"^(?:V(\d)CALL|CALL(?:32)?) .*?\bop=(0x[0-9a-f]+) .*\btsc=(\w+)-(\w+)", re.MULTILINE)


def truth(path: Path) -> pl.DataFrame:
    """Return vcpu, op, begin, end of every call."""
    with Source(path) as source:
        data = source.file.read()
    rows = [(int(m[1] or 0), int(m[2], 16), int(m[3], 0), int(m[4], 0)) for m in _CALL.finditer(data)]
    return pl.DataFrame(rows, schema={"vcpu": pl.UInt32, "op": pl.UInt32, "begin": pl.UInt64, "end": pl.UInt64}, orient="row")


def entries(path: Path, version: str) -> pl.DataFrame:
    """Return the stitched entries of a trace."""
    caller = "pv32" if path.name.startswith("pv32") else "pv64"
    source, recording = open_input(path, Options())
    stitcher, fill = Stitcher(version), CallerFill(everyone=caller)
    with source:
        return pl.concat([stitcher.feed(fill.fill(b)).entries for b in recording.batches()])


def labelled(rows: pl.DataFrame, calls: pl.DataFrame) -> pl.DataFrame:
    """Add ``true`` to the entries inside a call of their hypercall: whether each is a re-entry."""
    parts = []
    for (vcpu, op), own in calls.sort("begin").group_by("vcpu", "op"):
        mine = rows.filter((pl.col("vcpu") == vcpu) & (pl.col("op") == op) & pl.col("kind").is_in(["hypercall", "vmmcall"])).sort(
            "tsc"
        )
        if not len(mine):
            continue
        at = np.searchsorted(own["begin"].to_numpy(), mine["tsc"].to_numpy(), side="right") - 1
        inside = (at >= 0) & (mine["tsc"].to_numpy() <= own["end"].to_numpy()[np.maximum(at, 0)])
        mine = mine.with_columns(span=pl.Series(at)).filter(pl.Series(inside))
        parts.append(mine.with_columns(true=pl.col("span").is_duplicated() & ~pl.col("span").is_first_distinct()))
    return pl.concat(parts)


def main(folder: Path) -> None:
    """Print one line a recording."""
    print(f"{'recording':<24}{'re-entries':>11}{'found':>8}{'recall':>8}   precision by what shows it (claimed)")
    total: Counter[str] = Counter()
    right: Counter[str] = Counter()
    for path in sorted(folder.glob("*.xentrace*")):
        name, _, rest = path.name.partition(".xentrace")
        beside = [*folder.glob(f"{name}.txt"), *folder.glob(f"{name}.txt.zst")]
        if not beside:
            continue
        version = release.parse(name.split("-", 1)[1]).releases[-1].version
        rows = labelled(entries(path, version), truth(beside[0]))
        claimed = rows.filter(pl.col("reentry") | pl.col("marked"))
        said = claimed.with_columns(pl.when("marked").then(pl.lit("explicit")).otherwise(pl.col("by").cast(pl.String)).alias("by"))
        line = []
        for (by,), part in sorted(said.group_by("by"), key=lambda kv: str(kv[0])):
            n, ok = len(part), int(part["true"].sum())
            total[str(by)] += n
            right[str(by)] += ok
            line.append(f"{by} {ok / n:.3f} ({n:,})")
        real = int(rows["true"].sum())
        found = int(claimed["true"].sum())
        total["re-entries"] += real
        right["re-entries"] += found
        shown = name + (" (text)" if "txt" in rest else "")
        print(f"{shown:<24}{real:>11,}{found:>8,}{found / max(real, 1):>8.2f}   {', '.join(line)}")
    print()
    for key in total:
        what = "recall" if key == "re-entries" else f"precision of {key}"
        print(f"{what}: {right[key]:,} of {total[key]:,}, {right[key] / max(total[key], 1):.4f}")


if __name__ == "__main__":
    main(Path(sys.argv[1] if len(sys.argv) > 1 else "samples/eras"))
