"""Every register set that real Xen releases left is decoded and given back exactly (samples/README-text.md)."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import polars as pl
import pytest

from xtrace import release
from xtrace.pipeline import Options, open_input
from xtrace.replay import hypervisor as hv
from xtrace.replay.callers import CallerFill
from xtrace.replay.hypervisor import Hypervisor
from xtrace.replay.states import States
from xtrace.replay.stitch import Stitcher

SAMPLES = Path(__file__).parents[2] / "samples" / "bare"

#: file -> calls, samples: the table in the captures' own README.
FILES = {
    "bare-3.4.0-rc3": (245, 866),
    "bare-4.1.6.1": (245, 1957),
    "bare-4.4.4": (245, 1977),
    "bare-4.13.5": (245, 1511),
    "bare-4.17.7": (245, 1686),
    "bare-4.22.0": (245, 1478),
    "bare-pdone-4.17.7": (245, 1697),
    "barehvm64-4.17.7": (55, 633),
    "bare32-3.4.0-rc3": (130, 479),
    "bare32-4.4.4": (130, 799),
    "bare32-4.13.5": (130, 814),
    "bare32-pdone-4.4.4": (130, 843),
}


def stitched(name: str, rows: int = 1 << 20) -> tuple[str, Stitcher, pl.DataFrame, pl.DataFrame]:
    path = next(SAMPLES.glob(f"{name}.txt*"))
    source, recording = open_input(path, Options(batch_rows=rows))
    with source:
        batches = list(recording.batches())
    version = release.parse(recording.observed.release or "").releases[0].version
    stitcher, fill = Stitcher(version), CallerFill()
    parts = [stitcher.feed(fill.fill(b)) for b in batches]
    return version, stitcher, pl.concat([p.entries for p in parts]), pl.concat([p.continuations for p in parts])


@pytest.mark.parametrize("name", FILES)
def test_counts(name: str) -> None:
    _, stitcher, _, rows = stitched(name)
    assert (stitcher.calls, len(rows)) == FILES[name]
    # Each sample stands on the hypercall instruction inside a recorded call.
    assert stitcher.proved == FILES[name][1]
    assert stitcher.inferred == 0


@pytest.mark.parametrize("name", FILES)
def test_registers_come_back(name: str) -> None:
    version, _, _, rows = stitched(name)
    checked = 0
    for (op, caller), part in rows.group_by("op", "caller"):
        xen = Hypervisor(version, str(caller))
        seen, issued = States.from_frame(part), States.from_frame(part, prefix="issued_")
        read = xen.decode(int(str(op)), seen, issued)
        assert (read.status == hv.MODELLED).all(), (op, "not modelled")
        # The NULL forms of mmu_update and mmuext_op are not made from the issued registers.
        plain = np.flatnonzero(read.special < 0)
        assert read.progress.known[plain].all(), (op, "progress is not known")
        both = plain[read.total.known[plain]]
        assert (read.progress.value[both] <= read.total.value[both]).all(), (op, "progress beyond the total")
        left = xen.preempt(int(str(op)), issued, read.progress.value)
        for k in range(6):
            a, b = left.args[k], seen.args[k]
            same = (a.value == b.value) | ~a.known | ~b.known
            bad = plain[~same[plain]]
            assert not len(bad), (name, op, f"arg{k}", part.row(int(bad[0]), named=True)["line"] if len(bad) else None)
        for field, column in left.memory.items():
            was = seen.at(f"mem.{field}")
            same = (column.value == was.value) | ~column.known | ~was.known
            assert same[plain].all(), (name, op, field)
        checked += len(plain)
    assert checked > 0.9 * FILES[name][1]


@pytest.mark.parametrize("name", FILES)
def test_progress_goes_up_to_what_was_returned(name: str) -> None:
    version, _, entries, rows = stitched(name)
    returned = dict(entries.filter(pl.col("kind") == "return").select("call", "result").iter_rows())
    seen = 0
    for (op, caller), part in rows.group_by("op", "caller"):
        read = Hypervisor(version, str(caller)).decode(
            int(str(op)), States.from_frame(part), States.from_frame(part, prefix="issued_")
        )
        progress = part.select("call", "seq").with_columns(
            p=pl.Series(read.progress.value), known=pl.Series(read.progress.known)
        ).filter("known").sort("seq")  # fmt: skip
        back = progress.filter(pl.col("p").cast(pl.Int64).diff().over("call") < 0)
        assert not len(back), (op, back)
        for k, b in enumerate(read.behaviours):
            if b.operation in ("XENMEM_decrease_reservation", "XENMEM_populate_physmap", "XENMEM_increase_reservation"):
                at = np.flatnonzero(read.which == k)
                for call, p, total in zip(part["call"][at], read.progress.value[at], read.total.value[at], strict=True):
                    # The call returns how many extents it did: all of them here.
                    assert p <= returned[call] <= total
                    seen += 1
    assert seen


@pytest.mark.parametrize("rows", [1, 7, 1000])
def test_batches_do_not_matter(rows: int) -> None:
    _, whole, entries, continuations = stitched("barehvm64-4.17.7")
    _, again, entries2, continuations2 = stitched("barehvm64-4.17.7", rows)
    assert (again.calls, again.proved, again.inferred) == (whole.calls, whole.proved, whole.inferred)
    assert continuations2.equals(continuations)
    assert entries2.drop("subs", "epoch", "multi").equals(entries.drop("subs", "epoch", "multi"))
