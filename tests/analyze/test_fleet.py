"""What a host leaves of a continuation that it goes on with, against the abstract guest that really executes it."""

from __future__ import annotations

import polars as pl
import pytest

from xtrace.analyze import fleet
from xtrace.machine.guest import Guest, issue
from xtrace.machine.host import Host
from xtrace.replay import facts
from xtrace.schema import ARGS, CONTINUATIONS

#: Caller, hypercall, sub-operation, host that left it, host that goes on with it.
JOURNEYS = [
    ("pv64", 12, "XENMEM_decrease_reservation", "3.4.0", "4.17.7"),
    ("hvm64", 12, "XENMEM_populate_physmap", "4.4.4", "4.13.5"),
    ("pv32", 12, "XENMEM_increase_reservation", "4.5.0", "4.22.0"),
    ("pv64", 1, "mmu_update", "4.4.4", "4.17.7"),
    ("pv64", 26, "mmuext_op", "4.4.4", "4.17.7"),
    ("hvm64", 20, "GNTTABOP_copy", "4.4.4", "4.13.5"),
    ("pv64", 20, "GNTTABOP_unmap_grant_ref", "4.13.5", "4.22.0"),
    ("pv64", 13, "multicall", "4.4.4", "4.17.7"),
    ("hvm64", 41, "XEN_DMOP_set_mem_type", "4.11.4", "4.17.7"),
    ("hvm64", 12, "XENMEM_add_to_physmap_batch", "4.5.0", "4.17.7"),
]


def row(g: Guest, seq: int) -> dict[str, object]:
    args = {name: value for name, value in zip(ARGS, g.args, strict=True)}  # noqa: C416
    return {
        "seq": seq, "domid": 3, "vcpu": 0, "caller": g.caller, "kind": "sample", "op": g.number, **args, "cut": 0,
        "memory": [{"field": k, "value": v} for k, v in g.memory.items()], "evidence": "proved",
    }  # fmt: skip


@pytest.mark.parametrize(("caller", "number", "operation", "left", "host"), JOURNEYS)
def test_one_step_more(caller: str, number: int, operation: str, left: str, host: str) -> None:
    call = facts.lookup(left, caller, number)
    b = call.behaviour(operation)
    assert b is not None
    step = facts.lookup(host, caller, number).behaviour(operation)
    assert step is not None
    total = 96 * max(b.stride, step.stride)
    rows, want = [], []
    for seq, stop in enumerate(sorted({max(b.stride, step.stride) * k for k in (1, 2, 5, 60)})):
        g = issue(call, b, total, {"any": "guest"}.get(b.guard, b.guard))
        assert Host(left).enter(g, stop).kind == "preempted"
        rows.append(row(g, seq))
        if Host(host, 1).enter(g, step.stride).kind == "preempted":
            want.append(row(g, seq))
    assert want
    frame = pl.DataFrame([{c: r.get(c) for c in CONTINUATIONS} for r in rows], schema=CONTINUATIONS)
    got = fleet.driven(frame, left, host, {None: None})
    assert got.get_column("seq").to_list() == [r["seq"] for r in want]
    assert got.get_column("evidence").unique().to_list() == ["inferred"]
    for mine, theirs in zip(got.iter_rows(named=True), want, strict=True):
        assert [mine[a] for a in ARGS] == [theirs[a] for a in ARGS]
        fields = {f["field"]: f["value"] for f in mine["memory"] or []}
        assert fields == {f["field"]: f["value"] for f in theirs["memory"]}  # type: ignore[attr-defined]


def test_what_was_not_recorded_stays_so() -> None:
    blind = {"seq": 0, "domid": 3, "vcpu": 0, "caller": "pv64", "kind": "hypercall", "op": 12, "evidence": "inferred"}
    frame = pl.DataFrame([{c: blind.get(c) for c in CONTINUATIONS}], schema=CONTINUATIONS)
    assert fleet.driven(frame, "4.4.4", "4.5.0", {None: None}).select(ARGS).row(0) == (None,) * 6


def test_what_the_host_never_preempts_leaves_nothing() -> None:
    memory = [{"field": k, "value": v} for k, v in (("domid", 5), ("first_pfn", 0x110), ("nr", 0x300))]
    state = {"seq": 0, "domid": 3, "caller": "pv64", "kind": "sample", "op": 34, "arg0": 7, "arg1": 0x1000, "cut": 0,
             "memory": memory, "evidence": "proved"}  # fmt: skip
    frame = pl.DataFrame([{c: state.get(c) for c in CONTINUATIONS}], schema=CONTINUATIONS)
    assert fleet.driven(frame, "4.1.4", "4.2.0", {None: "stub"}).is_empty()
    assert len(fleet.driven(frame, "4.1.4", "4.2.5", {None: "stub"})) == 1
