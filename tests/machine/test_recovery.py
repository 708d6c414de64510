"""What happened in a simulation is recovered from its trace: all of it where the trace permits it, and nothing false is proved."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from types import ModuleType

import pytest

from xtrace.replay import stitch

FILE = Path(__file__).parents[2] / "benchmarks" / "simulated.py"


@pytest.fixture(scope="module")
def bench() -> ModuleType:
    """Return the benchmark, which measures what is asserted here."""
    spec = importlib.util.spec_from_file_location("benchmark_simulated", FILE)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


CONDITIONS = [(0.0, 0.0), (0.25, 0.0), (0.0, 0.01), (0.25, 0.01)]


@pytest.mark.parametrize(("park", "lost"), CONDITIONS)
@pytest.mark.parametrize("form", ["log", "entries", "xentrace"])
@pytest.mark.parametrize("source", ["4.1.6.1", "4.17.7"])
def test_calls_are_recovered(bench: ModuleType, source: str, form: str, park: float, lost: float) -> None:
    score = bench.run(source, ("pv64", "pv32", "hvm64"), 150, 2, park, lost, form)
    n = score.counts
    assert n["claimed proved"] == n["true proved"], score.wrong
    assert n["whole permitted calls"] == n["permitted calls"] > 80, score.wrong
    # A task that sleeps leaves its vCPU to others' calls, with structures at the same address: some look like the rest of it.
    assert n["true inferred"] >= 0.93 * n["claimed inferred"], score.wrong
    if not park:
        assert n["claimed inferred"] == n["true inferred"], score.wrong
        assert n["true links"] == n["links"]
    if form == "log":
        # A stopped vCPU is there for every preemption that was not lost.
        assert n["proved stopped vCPUs"] + n["inferred stopped vCPUs"] == n["real stopped vCPUs"] > 100
        if not park and not lost:
            assert n["whole calls"] == n["calls"]
            assert not n["missed re-entries"]


def test_a_wrong_stitcher_is_seen(bench: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    real = stitch._evidence

    def careless(*args: object, **more: object) -> object:
        proved, inferred = real(*args, **more)  # type: ignore[arg-type]
        return proved | (args[2] & (args[1] == 12)), inferred  # type: ignore[operator]

    monkeypatch.setattr(stitch, "_evidence", careless)
    score = bench.run("4.17.7", ("pv64",), 100, 1, 0.0, 0.0, "entries")
    assert score.counts["claimed proved"] > score.counts["true proved"]
    assert score.wrong
