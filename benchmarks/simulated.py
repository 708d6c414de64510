"""How much of a simulated host is recovered: ``python benchmarks/simulated.py [--seeds N] [RELEASE …]``.

Every hypercall of the model that may leave a continuation is made by guests of several kinds, alone and inside multicalls;
preempted at random, with vCPUs that move between pCPUs, tasks that sleep inside a call and resume on any vCPU, and a recorder
that loses records. What the stitcher makes of the trace is held against what happened, for each form the trace can have:

* ``log``: everything, as xtrace-log can (docs/xtrace-log.md);
* ``entries``: the same log without stopped vCPUs and without returns, as a recorder of entries would write it;
* ``xentrace``: the binary of that release, with the few arguments that it records.

Printed for each form: of the *continuations claimed* (entries, sub-calls, stopped vCPUs) how many are true, by evidence and by
what shows it; of the true re-entries among the records how many are found, as proved and as inferred; of the links (this entry goes
on with that call) how many join entries of one call; and how many calls come out whole, out of those where the trace permits it
(see `permits`) and out of all.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from collections import Counter
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Final

import polars as pl

from xtrace import config
from xtrace.machine import workload as workloads
from xtrace.machine import write_log, write_xentrace
from xtrace.machine.recording import Record, Recording
from xtrace.machine.simulate import simulate
from xtrace.pipeline import Options, open_input
from xtrace.replay.callers import CallerFill
from xtrace.replay.links import PAGING_DOMCTL_CONT
from xtrace.replay.stitch import Stitcher

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "tests" / "machine"))

from everything import domains

if TYPE_CHECKING:
    from xtrace.machine.truth import Call, Simulation

FORMS: Final = ("log", "entries", "xentrace")

#: What is asked of every workload, and what happens to it: (name, sleeping tasks, records lost).
CONDITIONS: Final = (("undisturbed", 0.0, 0.0), ("sleeping tasks", 0.25, 0.0), ("lost records", 0.0, 0.01), ("both", 0.25, 0.01))


def everything(source: str, callers: tuple[str, ...], calls: int, park: float, lost: float) -> workloads.Workload:
    """Return a workload of every operation that may leave a continuation at a release, for some callers."""
    who = domains(source, callers, (2, 100), without={PAGING_DOMCTL_CONT})  # which Xen alone issues
    return workloads.Workload("everything", calls, 3, 2_600_000, 0.6, 0.2, park, 0.3, lost, (1, 12), cooperative=False, domains=who)


@dataclass
class Score:
    """Counts of one run, or of several."""

    counts: Counter[str] = field(default_factory=Counter)
    wrong: list[str] = field(default_factory=list)  # claims that are not true, and calls that should have come out whole

    def add(self, key: str, n: int = 1) -> None:
        """Count something."""
        self.counts[key] += n


def measure(s: Simulation, form: str, folder: Path, score: Score) -> None:
    """Write what was simulated in one form, read it, and hold what comes out against what happened."""
    recording = s.recordings[0]
    kept = list(range(len(recording.records)))
    if form == "entries":
        kept = [i for i, r in enumerate(recording.records) if r.kind not in ("sample", "return")]
        recording = _with(recording, [recording.records[i] for i in kept])
    write = write_xentrace if form == "xentrace" else write_log
    data, where = write.render(recording)
    path = folder / ("trace.xentrace" if form == "xentrace" else "trace.log")
    path.write_bytes(data)
    if form == "xentrace":
        Path(f"{path}.xtrace.toml").write_bytes(write_xentrace.sidecar(recording))
    at = {kept[i]: place for i, place in enumerate(where) if place is not None}
    _hold(s, form, at, *_read(path, s.source), score)


def _with(recording: Recording, records: list[Record]) -> Recording:
    out = object.__new__(Recording)
    out.release, out.domains, out.tsc_khz, out.records = recording.release, recording.domains, recording.tsc_khz, records
    return out


def _read(path: Path, source: str) -> tuple[pl.DataFrame, pl.DataFrame]:
    """Return entries and continuations, both with ``place``."""
    sidecar = config.load_sidecar(path)
    known = {k: d.caller for k, d in sidecar.domains.items() if d.caller} if sidecar is not None else {}
    opened, recording = open_input(path, Options())
    stitcher, fill = Stitcher(source), CallerFill(domains={k: v for k, v in known.items() if k is not None})
    with opened:
        parts = [stitcher.feed(fill.fill(b)) for b in recording.batches()]
    place = pl.coalesce("line", "offset").alias("place")
    return tuple(pl.concat([getattr(p, t) for p in parts]).with_columns(place) for t in ("entries", "continuations"))  # type: ignore[return-value]


def _hold(s: Simulation, form: str, at: dict[int, int], entries: pl.DataFrame, continuations: pl.DataFrame, score: Score) -> None:
    of: dict[int, tuple[int, int]] = {}  # place of an entry -> call, number of the entry
    samples: set[int] = set()
    for c in s.calls:
        for i, ran in enumerate(c.ran):
            if ran[0].host == 0 and (place := at.get(-1 if ran[0].record is None else ran[0].record)) is not None:
                of[place] = c.number, i
        samples |= {at[k.where.record] for k in c.left if k.where.host == 0 and k.where.record in at}
    resumed = _resumed(s, at)
    claimed: dict[int, str] = {}
    for place, kind, evidence, by in continuations.select("place", "kind", "evidence", "by").iter_rows():
        true = place in (samples if kind == "sample" else resumed if kind == "subcall" else {p for p in (place,) if of[p][1] > 0})
        claimed[place] = evidence
        for key in (evidence, f"{evidence} {kind if kind in ('sample', 'subcall') else 'entry'}", f"by {by}"):
            score.add(f"claimed {key}")
            score.add(f"true {key}", int(true))
        if not true:
            score.wrong.append(f"{s.source} {form} {place}: {evidence} ({by}) {kind}")
    for what, places in (("re-entries", {p for p, (_, i) in of.items() if i}), ("stopped vCPUs", samples), ("sub-calls", resumed)):
        score.add(f"real {what}", len(places))
        for place in places:
            score.add(f"{claimed.get(place, 'missed')} {what}")
    groups: dict[int, list[int]] = {}
    for place, call, again in (
        entries.filter(pl.col("kind").is_in(["hypercall", "vmmcall"])).select("place", "call", "reentry").iter_rows()
    ):
        if again:
            score.add("links")
            before = groups.get(call)  # null only where the call began before the trace
            score.add("true links", int(before is not None and of[before[-1]][0] == of[place][0]))
        groups.setdefault(call, []).append(place)
    found = {tuple(g) for g in groups.values()}
    lost = [(r.since or 0, r.tsc) for r in s.recordings[0].records if r.kind == "lost"]
    asleep = _asleep(s)
    for c in s.calls:
        mine = tuple(at[r[0].record] for r in c.ran if r[0].host == 0 and r[0].record in at)
        if not mine:
            continue
        whole = mine in found
        score.add("calls")
        score.add("whole calls", int(whole))
        if permits(c, form, lost, asleep):
            score.add("permitted calls")
            score.add("whole permitted calls", int(whole))
            if not whole:
                score.wrong.append(f"{s.source} {form} {mine[0]}: {c.domain.caller} {c.operation} of {len(mine)} entries not whole")


def _asleep(s: Simulation) -> list[tuple[int, int, int, int, int]]:
    """Return domain, hypercall, call, begin and end (TSC) of every sleep of a task inside a call; hypercall as it goes on."""
    return [
        (c.domain.domid, c.left[i].op, c.number, c.left[i].tsc, c.ran[i + 1][3])
        for c in s.calls
        for i in range(min(len(c.left), len(c.ran) - 1))
        if c.left[i].parked
    ]


def permits(c: Call, form: str, lost: list[tuple[int, int]], asleep: list[tuple[int, int, int, int, int]]) -> bool:
    """Say whether a trace has what tells that these entries are one call, and that others are not of it.

    Every entry is recorded and nothing is lost from the first to the last one; no task of the domain sleeps inside a call of the
    same hypercall meanwhile (all of a simulated guest's structures lie at one address). Each preemption leaves a stopped vCPU in
    the trace, as a log has them; of the other forms, which do not show a call's end either, only calls of one entry are asked for,
    and no task may wake later on.
    """
    if any(r[0].host or r[0].record is None for r in c.ran) or (len(c.ran) > 1 and form != "log"):
        return False
    begin, end = c.ran[0][3], c.ran[-1][3]
    if any(since <= end and tsc >= begin for since, tsc in lost) or any(k.where.record is None for k in c.left):
        return False
    return not any(
        domid == c.domain.domid and op in {c.work.op, *(k.op for k in c.left)} and (first <= end or form != "log") and last >= begin
        for domid, op, _, first, last in asleep
    )


def _resumed(s: Simulation, at: dict[int, int]) -> set[int]:
    """Return the places of sub-calls that run again: the first one behind a multicall that was preempted inside that entry."""
    # It begins one tick after its multicall, whose own record may be lost.
    again = {
        (c.domain.domid, ran[1], ran[3] + 1)
        for c in s.calls
        if c.work.op == workloads.MULTICALL
        for i, ran in enumerate(c.ran)
        if i and ran[0].host == 0 and c.left[i - 1].inner is not None
    }
    return {
        at[i]
        for i, r in enumerate(s.recordings[0].records)
        if r.kind == "subcall" and i in at and (r.domid, r.vcpu, r.tsc) in again
    }


def run(source: str, callers: tuple[str, ...], calls: int, seeds: int, park: float, lost: float, form: str) -> Score:
    """Simulate and measure several seeds."""
    score = Score()
    workload = everything(source, callers, calls, park, lost)
    with tempfile.TemporaryDirectory() as folder:
        for seed in range(seeds):
            measure(simulate(replace(workload), source, seed), form, Path(folder), score)
    return score


def _share(a: int, b: int) -> str:
    return f"{a / b:.3f} ({a:,}/{b:,})" if b else "-"


def main() -> None:
    """Print one block for each condition."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("releases", nargs="*", default=["3.4.0", "4.1.6.1", "4.4.4", "4.13.5", "4.17.7", "4.22.0"])
    parser.add_argument("--calls", type=int, default=400)
    parser.add_argument("--seeds", type=int, default=4)
    given = parser.parse_args()
    for condition, park, lost in CONDITIONS:
        print(f"{condition}:")
        for form in FORMS:
            total = Score()
            for source in given.releases:
                callers = ("pv64", "pv32", "hvm64") if source != "3.4.0" or form != "xentrace" else ("pv64", "pv32")
                one = run(source, callers, given.calls, given.seeds, park, lost, form)
                total.counts += one.counts
                total.wrong += one.wrong
            n = total.counts
            print(f"  {form}")
            for evidence in ("proved", "inferred"):
                parts = [
                    f"{k} {_share(n[f'true {evidence} {k}'], n[f'claimed {evidence} {k}'])}"
                    for k in ("entry", "subcall", "sample") if n[f"claimed {evidence} {k}"]
                ]  # fmt: skip
                print(
                    f"    precision, {evidence:<9} {_share(n[f'true {evidence}'], n[f'claimed {evidence}']):<24} {', '.join(parts)}"
                )
            by = [
                f"{b} {_share(n[f'true by {b}'], n[f'claimed by {b}'])}"
                for b in ("explicit", "arithmetic", "sequence")
                if n[f"claimed by {b}"]
            ]
            print(f"    precision, by shown  {', '.join(by)}")
            for what in ("re-entries", "sub-calls", "stopped vCPUs"):
                if real := n[f"real {what}"]:
                    proved, inferred = (_share(n[f"{e} {what}"], real) for e in ("proved", "inferred"))
                    print(f"    recall of {what:<14} proved {proved}, inferred {inferred}")
            print(f"    links within one call {_share(n['true links'], n['links'])}")
            permitted, whole = _share(n["whole permitted calls"], n["permitted calls"]), _share(n["whole calls"], n["calls"])
            print(f"    calls whole: where permitted {permitted}, of all {whole}")
            for line in total.wrong[:5]:
                print(f"      {line}")


if __name__ == "__main__":
    main()
