"""Entries become calls: against the truth of real recordings, small labelled logs, and whatever the batch size."""

from __future__ import annotations

import json
from collections import defaultdict
from pathlib import Path

import numpy as np
import polars as pl
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from xtrace.pipeline import Options, analyze, open_input
from xtrace.replay.callers import CallerFill
from xtrace.replay.stitch import Stitcher
from xtrace.report import common
from xtrace.schema import EVENTS, empty

SAMPLES = Path(__file__).parents[2] / "samples"


def sample(name: str) -> Path:
    return next(p for p in SAMPLES.rglob(f"{name}*") if p.name.removesuffix(".zst") == name)


def stitched(
    path: Path, release: str, rows: int = 1 << 18, caller: str | None = None
) -> tuple[Stitcher, pl.DataFrame, pl.DataFrame]:
    source, recording = open_input(path, Options(batch_rows=rows))
    with source:
        stitcher, fill = Stitcher(release), CallerFill(caller)
        parts = [stitcher.feed(fill.fill(b)) for b in recording.batches()]
        parts = parts or [stitcher.feed(empty(EVENTS))]
    return stitcher, pl.concat([p.entries for p in parts]), pl.concat([p.continuations for p in parts])


#: flagged top + flagged sub of the captures' README: what the records themselves prove.
PROVED = {
    ("pv64-3.3.0", "3.3.0"): 0,
    ("pv64-4.1.6.1", "4.1.6.1"): 0,
    ("pv64-4.4.4", "4.4.4"): 215 + 188,
    ("pv64-4.13.5", "4.13.5"): 176 + 157,
    ("pv64-4.22.0", "4.22.0"): 193 + 156,
    ("smp64-4.4.4", "4.4.4"): 266 + 185,
    ("mv64-4.22.0", "4.22.0"): 4234 + 399,
    ("lost64-4.4.4", "4.4.4"): 193 + 118,
    ("j5_tiny_pv", "4.17.7"): 25 + 11,
    ("j3_hcload_pv", "4.17.7"): 109 + 33,
    ("j3_save_all", "4.17.7"): 112 + 1,
}


@pytest.mark.parametrize(("name", "release"), PROVED)
def test_flags_prove(name: str, release: str) -> None:
    stitcher, _, rows = stitched(sample(f"{name}.xentrace"), release)
    assert stitcher.proved == PROVED[name, release]
    assert rows.get_column("evidence").eq("proved").sum() == stitcher.proved


@pytest.mark.parametrize(("name", "proved"), [("pv32-4.4.4", 71 + 82), ("pv32-4.22.0", 65 + 68)])
def test_flags_prove_for_32_bit_callers(name: str, proved: int) -> None:
    stitcher, _, _ = stitched(sample(f"{name}.xentrace"), name.split("-")[1], caller="pv32")
    assert stitcher.proved == proved


def test_inferred_reentries_are_reentries() -> None:
    """Where vCPUs move, every inferred re-entry lies inside a call that the truth knows, past its first entry."""
    source, recording = open_input(sample("mv64-4.22.0.txt"), Options())
    with source:
        truth = pl.concat(list(recording.batches()))
    spans: dict[tuple[int, int], list[tuple[int, int]]] = defaultdict(list)
    begun: dict[int, tuple[int, int]] = {}
    for kind, vcpu, op, tsc in truth.select("kind", "vcpu", "op", "tsc").iter_rows():
        if kind == "hypercall":
            begun[vcpu] = (op, tsc)
        elif kind == "return" and vcpu in begun:
            op, start = begun.pop(vcpu)
            spans[vcpu, op].append((start, tsc))
    _, entries, rows = stitched(sample("mv64-4.22.0.xentrace"), "4.22.0")
    known = {v: max(t for (w, _), s in spans.items() if w == v for t in s[-1]) for v in {w for w, _ in spans}}
    checked = 0
    for vcpu, op, kind, tsc in rows.filter(pl.col("evidence") == "inferred").select("vcpu", "op", "kind", "tsc").iter_rows():
        if tsc > known[vcpu]:
            continue  # the log holds the first 1,500 calls of the extra vCPUs
        outer = 13 if kind == "subcall" else op
        inside = [s for s in spans[vcpu, outer] if s[0] <= tsc <= s[1]]
        assert inside, (vcpu, op, tsc)
        if kind != "subcall":
            own = entries.filter((pl.col("vcpu") == vcpu) & (pl.col("op") == op) & (pl.col("kind") == "hypercall")).get_column(
                "tsc"
            )
            assert own.to_numpy()[np.searchsorted(own.to_numpy(), inside[0][0])] < tsc
        checked += 1
    assert checked > 500


def log(tmp_path: Path, *lines: str, release: str = "4.4.4") -> Path:
    path = tmp_path / "x.log"
    head = [f"header release={release}", "domain id=3 caller=pv64 role=guest"]
    path.write_text("".join(f"xtrace: {line}\n" for line in [*head, *lines]))
    return path


W = "dom=3 vcpu=0"


@pytest.mark.parametrize(
    ("lines", "calls", "proved", "inferred"),
    [
        # Twice the same call is two calls: nothing shows a continuation.
        ([f"hypercall {W} op=12 a0=1 a1=0x1000", f"hypercall {W} op=12 a0=1 a1=0x1000"], 2, 0, 0),
        # Continuation bits, the same structure.
        ([f"hypercall {W} op=12 a0=1 a1=0x1000", f"hypercall {W} op=12 a0=0x141 a1=0x1000"], 1, 1, 0),
        # Another structure: a continuation all the same, of a call that was not seen.
        ([f"hypercall {W} op=12 a0=1 a1=0x1000", f"hypercall {W} op=12 a0=0x141 a1=0x2000"], 2, 1, 0),
        # Count down by 4, pointer up by 4 elements of 40 bytes.
        ([f"hypercall {W} op=20 a0=5 a1=0x1000 a2=9", f"hypercall {W} op=20 a0=5 a1=0x10a0 a2=5"], 1, 0, 1),
        # Count down, the pointer elsewhere: another call.
        ([f"hypercall {W} op=20 a0=5 a1=0x1000 a2=9", f"hypercall {W} op=20 a0=5 a1=0x9000 a2=5"], 2, 0, 0),
        # Without pointers only neighbours count, and unmap moves in batches of 32.
        ([f"hypercall {W} op=20 a0=1 a2~=96", f"hypercall {W} op=20 a0=1 a2~=64"], 1, 0, 1),
        ([f"hypercall {W} op=20 a0=1 a2~=96", f"hypercall {W} op=20 a0=1 a2~=90"], 2, 0, 0),
        ([f"hypercall {W} op=20 a0=1 a2~=96", f"hypercall {W} op=29 a0=0", f"hypercall {W} op=20 a0=1 a2~=64"], 3, 0, 0),
        # A smaller call after a small one is another call.
        ([f"hypercall {W} op=20 a0=5 a2~=5", f"hypercall {W} op=20 a0=5 a2~=3"], 2, 0, 0),
        # iret ends the upcall that interrupted it.
        ([f"hypercall {W} op=20 a0=1 a2~=96", f"hypercall {W} op=23", f"hypercall {W} op=20 a0=1 a2~=64"], 2, 0, 1),
        # Another vCPU, lost records, a return in between: nothing is stitched across.
        ([f"hypercall {W} op=20 a0=1 a2~=96", "hypercall dom=3 vcpu=1 op=20 a0=1 a2~=64"], 2, 0, 0),
        ([f"hypercall {W} op=20 a0=1 a2~=96", "lost n=5", f"hypercall {W} op=20 a0=1 a2~=64"], 2, 0, 0),
        ([f"hypercall {W} op=20 a0=1 a2~=96", f"return {W} op=20 result=0", f"hypercall {W} op=20 a0=1 a2~=64"], 2, 0, 0),
        # A multicall of 4 whose second entry was preempted: 1 done, 2 seen to run, 3 left, and the second runs again.
        (
            [
                f"hypercall {W} op=13 a1~=4",
                f"subcall {W} op=17",
                f"subcall {W} op=12",
                f"hypercall {W} op=13 a1~=3",
                f"subcall {W} op=12",
                f"subcall {W} op=17",
            ],
            1,
            0,
            2,
        ),
        # Two multicalls, each run to its end.
        ([f"hypercall {W} op=13 a1~=2", f"subcall {W} op=17", f"subcall {W} op=17", f"hypercall {W} op=13 a1~=1"], 2, 0, 0),
        # The registers of a stopped vCPU, and then an entry with the same ones; an upcall's iret may lie between.
        (
            [
                f"hypercall {W} op=12 a0=1 a1=0x1000",
                f"sample {W} op=12 a0=1 a1=0x1000 on_insn=1",
                f"hypercall {W} op=23",
                f"hypercall {W} op=12 a0=1 a1=0x1000",
            ],
            2,
            1,
            1,
        ),
        # Others, or after another call: that task sleeps.
        (
            [
                f"hypercall {W} op=12 a0=1 a1=0x1000",
                f"sample {W} op=12 a0=1 a1=0x1000 on_insn=1",
                f"hypercall {W} op=12 a0=1 a1=0x2000",
            ],
            2,
            1,
            0,
        ),
        (
            [
                f"hypercall {W} op=12 a0=1 a1=0x1000",
                f"sample {W} op=12 a0=1 a1=0x1000 on_insn=1",
                f"hypercall {W} op=17",
                f"hypercall {W} op=12 a0=1 a1=0x1000",
            ],
            3,
            1,
            0,
        ),
        # A stopped vCPU on the instruction of a call in progress, and one that is elsewhere.
        ([f"hypercall {W} op=12 a0=1 a1=0x1000", f"sample {W} op=12 a0=1 a1=0x1000 on_insn=1"], 1, 1, 0),
        ([f"hypercall {W} op=12 a0=1 a1=0x1000", f"sample {W} op=12 a0=1 a1=0x1000 on_insn=0"], 1, 0, 0),
        # On an instruction, but of no call seen: it may not have been executed yet.
        ([f"sample {W} op=12 a0=1 a1=0x1000 on_insn=1"], 0, 0, 1),
        # A redirect that only Xen issues; a domctl behind it is a new one.
        ([f"hypercall {W} op=36 a0=0x1000", f"hypercall {W} op=49 a0=0x1000"], 1, 1, 0),
        ([f"hypercall {W} op=36 a0=0x1000", f"hypercall {W} op=49 a0=0x1000", f"hypercall {W} op=36 a0=0x1000"], 2, 1, 0),
    ],
)  # fmt: skip
def test_small_logs(tmp_path: Path, lines: list[str], calls: int, proved: int, inferred: int) -> None:
    for rows in (1, 2, 1 << 18):
        stitcher, _, _ = stitched(log(tmp_path, *lines), "4.4.4", rows)
        assert (stitcher.calls, stitcher.proved, stitcher.inferred) == (calls, proved, inferred), rows


def test_progress_is_counted_from_the_first_entry(tmp_path: Path) -> None:
    path = log(
        tmp_path,
        f"hypercall {W} op=20 a0=5 a1=0x1000 a2=9",
        f"hypercall {W} op=20 a0=5 a1=0x10a0 a2=5",
        f"hypercall {W} op=20 a0=5 a1=0x10f0 a2=3",
    )
    for rows in (1, 1 << 18):
        result = analyze([path], Options(targets=["4.5.0"], batch_rows=rows))
        progress = [f["source_decode"]["progress"] for f in common.rows(result)]
        assert progress == [4, 6]


VCPU, FEW = st.integers(0, 1), st.integers(0, 6)
entry = st.one_of(
    st.builds(lambda v, n, p: f"hypercall dom=3 vcpu={v} op=20 a0=5 a1={0x1000 + 40 * p:#x} a2={n}", VCPU, FEW, FEW),
    st.builds(lambda v, p: f"hypercall dom=3 vcpu={v} op=12 a0={p << 6 | 1} a1=0x1000", VCPU, FEW),
    st.builds(lambda v, n, f: f"hypercall dom=3 vcpu={v} op=1 a1~={n | f << 31:#x}", VCPU, FEW, VCPU),
    st.builds(lambda v, n: f"hypercall dom=3 vcpu={v} op=13 a1~={n}", VCPU, FEW),
    st.builds(lambda v, o: f"subcall dom=3 vcpu={v} op={o}", VCPU, st.sampled_from([12, 17])),
    st.builds(lambda v: f"return dom=3 vcpu={v} op=12 result=0", VCPU),
    st.builds(lambda v: f"hypercall dom=3 vcpu={v} op=23", VCPU),
    st.just("lost n=1"),
)


@settings(max_examples=60, deadline=None)
@given(st.lists(entry, max_size=30), st.sampled_from([1, 2, 3, 7]))
def test_batches_never_change_a_result(tmp_path_factory: pytest.TempPathFactory, lines: list[str], rows: int) -> None:
    path = log(tmp_path_factory.mktemp("log"), *lines)
    whole, entries, found = stitched(path, "4.4.4")
    parts, entries2, found2 = stitched(path, "4.4.4", rows)
    assert (whole.calls, whole.proved, whole.inferred) == (parts.calls, parts.proved, parts.inferred)
    assert found2.equals(found)
    drop = ["subs", "epoch", "multi", "irets"]
    assert entries2.drop(drop).equals(entries.drop(drop))


@pytest.mark.parametrize("name", ["j5_tiny_pv", "lost64-4.4.4", "smp64-4.22.0"])
@pytest.mark.parametrize("rows", [997, 1 << 14])
def test_analysis_does_not_depend_on_batches(name: str, rows: int) -> None:
    path = sample(f"{name}.xentrace")
    texts = []
    for n in (rows, 1 << 18):
        result = analyze([path], Options(source="4.17.7", targets=["4.18", "4.22.0"], batch_rows=n))
        texts.append(json.dumps(common.document(result), indent=1).splitlines())
    assert [(a, b) for a, b in zip(*texts, strict=False) if a != b][:5] == []
    assert len(texts[0]) == len(texts[1])
