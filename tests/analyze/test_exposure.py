"""Exposure: DESIGN's text line by line, against a slow twin, and through the judging of whole frames."""

from __future__ import annotations

import itertools
from typing import Any

import polars as pl
import pytest
from hypothesis import given
from hypothesis import strategies as st

from xtrace.analyze import exposure, findings
from xtrace.analyze.exposure import KINDS, ROLES, exit_bits, expose, guard_of, that_count
from xtrace.errors import UsageError
from xtrace.replay import facts
from xtrace.schema import CALLERS, CONTINUATIONS, OUTCOMES

GUARDS = (None, "any", "device_model", "control")


def twin(role: str | None, guard: str | None, caller: str, parked: bool | None) -> tuple[str, bool | None, list[str]]:
    """The rules as they stand in docs/exposure.md, one after the other."""
    issuer = "unknown"
    if role in ("guest", "driver"):
        issuer = "guest"
    if role in ("device_model", "stub"):
        issuer = "device_model"
    if role in ("control", "hardware"):
        issuer = "control"
    if role is None and guard == "device_model":
        issuer = "device_model"
    if role is None and guard == "control":
        issuer = "control"
    migrates: bool | None = None
    if role is not None:
        migrates = issuer == "guest"
    if issuer in ("control", "device_model") or caller.startswith("arm"):
        migrates = False
    if migrates is False:
        return issuer, migrates, ["live_update"]
    kinds = ["cooperative", "non_cooperative", "live_update", "fork_restore"]
    if parked is False:
        kinds.remove("cooperative")
    if caller.startswith("pv"):
        kinds = [k for k in kinds if k in ("cooperative", "live_update")]
    return issuer, migrates, kinds


@pytest.mark.parametrize("role", [None, *ROLES])
@pytest.mark.parametrize("guard", GUARDS)
def test_exposure_is_what_the_rules_say(role: str | None, guard: str | None) -> None:
    for caller, parked in itertools.product(CALLERS, (None, True, False)):
        got = expose(role, guard, caller, parked=parked)
        assert (got.issuer, got.migrates, list(got.kinds)) == twin(role, guard, caller, parked)


def test_whether_it_is_parked_matters_only_when_it_is_known_not_to_be() -> None:
    for caller in CALLERS:
        assert expose("guest", "any", caller) == expose("guest", "any", caller, parked=True)
        assert "cooperative" not in expose("guest", "any", caller, parked=False).kinds


def test_the_guard_that_was_surely_passed() -> None:
    console = facts.lookup("4.17.7", "pv64", 18)
    write = console.behaviour("CONSOLEIO_write")
    assert write is not None
    assert console.dispatch is not None
    assert console.dispatch.guard == "control"
    assert "any" in console.dispatch.guards_also
    assert guard_of(console.dispatch, write) == "any"  # a debug build lets everybody through
    domctl = facts.lookup("4.17.7", "pv64", 36)
    pause = domctl.behaviour("XEN_DOMCTL_pausedomain")
    assert pause is not None
    assert guard_of(domctl.dispatch, pause) == "control"
    hvm = facts.lookup("4.4.4", "hvm64", 34)
    dirty = hvm.behaviour("HVMOP_modified_memory")
    assert dirty is not None
    assert guard_of(hvm.dispatch, dirty) == "device_model"


def slow_bits(
    outcome: str, harmless: bool, caveats: tuple[str, ...], evidence: str, migrates: bool | None, kinds: tuple[str, ...],
    migration: set[str],
) -> int:  # fmt: skip
    """Exit status of DESIGN §5 and what --migration changes, told step by step."""
    catching = [k for k in kinds if not migration or k in migration]
    if not catching:
        return 0
    counts = []
    for caveat in caveats:
        if not migration:
            counts.append(caveat)
        elif caveat == "machine_frames" and any(k in ("cooperative", "non_cooperative") for k in catching):
            counts.append(caveat)  # the host changes
        elif caveat == "domids" and any(k != "live_update" for k in catching):
            counts.append(caveat)  # numbers change
    broken = outcome in ("misdirected", "skips", "redoes", "refused", "absent", "wrong_result")
    broken = broken or (outcome == "restarts" and not harmless)
    if broken and evidence == "proved" and (migrates is not False or "live_update" in migration):
        return 8
    if broken or outcome in ("lost", "undecidable", "unknown") or counts:
        return 4
    return 0


@given(
    st.sampled_from([*OUTCOMES, "undecidable", "unknown"]), st.booleans(),
    st.lists(st.sampled_from(["machine_frames", "domids"]), unique=True), st.sampled_from(["proved", "inferred"]),
    st.sampled_from([None, *ROLES]), st.sampled_from(CALLERS), st.sampled_from([None, True, False]),
    st.sets(st.sampled_from(KINDS)),
)  # fmt: skip
def test_exit_bits(
    outcome: str, harmless: bool, caveats: list[str], evidence: str, role: str | None, caller: str, parked: bool | None,
    migration: set[str],
) -> None:  # fmt: skip
    e = expose(role, "any", caller, parked=parked)
    some = that_count(tuple(caveats), e.kinds, migration)
    got = exit_bits(
        outcome, harmless=harmless, caveats=bool(some), evidence=evidence, migrates=e.migrates, kinds=e.kinds, migration=migration
    )
    assert got == slow_bits(outcome, harmless, tuple(caveats), evidence, e.migrates, e.kinds, migration)


def test_kinds_are_parsed() -> None:
    assert exposure.parse_kinds(["live-update", " cooperative"]) == {"live_update", "cooperative"}
    with pytest.raises(UsageError, match="--migration teleport: there are cooperative"):
        exposure.parse_kinds(["teleport"])


# ── through the judging ──────────────────────────────────────────────────────────────────────────────────────────────


def state(**row: Any) -> dict[str, Any]:
    """Return a decrease_reservation of 64 extents that 3.3.0 left after 5, which 3.4.0 misreads."""
    memory = [{"field": "nr_extents", "value": 64}]
    return {
        "seq": 0, "domid": 3, "vcpu": 0, "caller": "pv64", "kind": "sample", "op": 12, "arg0": 0x51, "arg1": 0x1000, "cut": 0,
        "memory": memory, "evidence": "proved", "input": 0, **row,
    }  # fmt: skip


def judged(rows: list[dict[str, Any]], role: str | None, *migration: str) -> tuple[pl.DataFrame, findings.Tally]:
    schema = {**CONTINUATIONS, **({"parked": pl.Boolean()} if any("parked" in r for r in rows) else {})}
    frame = pl.DataFrame([{c: r.get(c) for c in schema} for r in rows], schema=schema)
    context = findings.Context(("3.3.0",), ("3.4.0",), frozenset(), {None: None, 3: role}, migration=frozenset(migration))
    tally = findings.Tally.of(context.targets)
    return findings.judge_continuations(frame, context, tally), tally


def test_parked_narrows_what_catches_it() -> None:
    rows = [state(seq=k, parked=p) for k, p in enumerate((None, True, False))]
    found, tally = judged(rows, "guest", "cooperative")
    assert found.get_column("kinds").to_list() == [["cooperative", "live_update"]] * 2 + [["live_update"]]
    assert found.get_column("bits").to_list() == [8, 8, 0]
    assert tally.counts["3.4.0"] == {"misdirected": 2, "not_caught": 1}
    assert tally.bits["3.4.0"] == 8
    assert judged(rows[2:], "guest", "cooperative")[1].bits["3.4.0"] == 0
    assert judged(rows[2:], "guest")[1].bits["3.4.0"] == 8


@pytest.mark.parametrize(
    ("role", "migration", "bits"),
    [
        ("guest", (), 8), ("guest", ("live_update",), 8), ("guest", ("non_cooperative",), 0), (None, (), 8),
        ("control", (), 4), ("control", ("cooperative",), 0), ("control", ("live_update",), 8), ("stub", ("fork_restore",), 0),
        ("control", ("cooperative", "live_update"), 8),
    ],
)  # fmt: skip
def test_a_break_counts_by_who_is_caught(role: str | None, migration: tuple[str, ...], bits: int) -> None:
    found, tally = judged([state()], role, *migration)
    assert found.get_column("bits").to_list() == [bits]
    assert tally.bits["3.4.0"] == bits


def test_bits_of_each_kind_alone_are_those_of_asking_for_it() -> None:
    rows = [state(), state(seq=1, domid=4), state(seq=2, evidence="inferred"), state(seq=3, arg0=1)]
    for role in (None, *ROLES):
        _, whole = judged(rows, role)
        for kind in KINDS:
            assert whole.by_kind["3.4.0"][kind] == judged(rows, role, kind)[1].bits["3.4.0"]


@pytest.mark.parametrize(
    ("migration", "caveats"),
    [((), ["machine_frames", "domids"]), (("cooperative",), ["machine_frames", "domids"]), (("live_update",), None)],
)
def test_a_live_update_keeps_frames_and_numbers(migration: tuple[str, ...], caveats: list[str] | None) -> None:
    memory = [{"field": "nr_extents", "value": 64}, {"field": "domid", "value": 9}]
    frame = pl.DataFrame(
        [{c: state(arg0=0x141, memory=memory).get(c) for c in CONTINUATIONS}], schema=CONTINUATIONS
    )  # fmt: skip
    context = findings.Context(("4.4.4",), ("4.5.0",), frozenset(), {None: "guest"}, migration=frozenset(migration))
    found = findings.judge_continuations(frame, context, findings.Tally.of(("4.5.0",)))
    assert (found.get_column("caveats").to_list() == [caveats]) if caveats else found.is_empty()
