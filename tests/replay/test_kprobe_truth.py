"""What a kprobe in dom0 saw parked is found in the xentrace of the same run (benchmarks/kprobe_truth.py prints all of it)."""

from __future__ import annotations

import importlib.util
import sys
from collections import Counter
from pathlib import Path

ROOT = Path(__file__).parents[2]
SAMPLES = ROOT / "samples" / "dom0-4.17.7"


def test_the_samples_are_found() -> None:
    spec = importlib.util.spec_from_file_location("benchmark_kprobe_truth", ROOT / "benchmarks" / "kprobe_truth.py")
    assert spec is not None
    assert spec.loader is not None
    bench = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = bench
    spec.loader.exec_module(bench)
    found, figures = bench.held(SAMPLES / "j5_tiny_pv.xentrace", SAMPLES / "j5_tiny_parked.txt", "4.17.7")
    assert figures == {"outside the trace": 4}
    # Every one that the record itself shows is proved; none is missed of those that arithmetic can tell.
    assert found[26] == Counter({"samples": 14, "proved explicit": 14})
    assert found[13]["inferred arithmetic"] + found[13]["by its sub-call"] == found[13]["samples"] == 8
    # memory_op's and grant_table_op's show where an upcall's iret lands.
    assert found[12]["inferred sequence"] >= 18
    assert sum(c["not told"] for c in found.values()) <= 6
