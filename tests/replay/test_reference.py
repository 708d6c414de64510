"""The vectorised decoding against a slow, obvious one, and decode(preempt(call, p)) == p."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from xtrace import release, schema
from xtrace.analyze import representatives
from xtrace.replay import factfiles, facts
from xtrace.replay import hypervisor as hv
from xtrace.replay.hypervisor import Hypervisor
from xtrace.replay.states import States

RELEASES = [r.version for r in release.releases()]


def slow_decode(version: str, caller: str, op: int, args: list[int | None]) -> tuple[str | None, int | None]:
    """Sub-operation and absolute progress, one state at a time."""
    call = facts.lookup(version, caller, op)
    if call.status != "modelled":
        return None, None
    if call.dispatch is None:
        return next(iter(call.by_number.values())).operation, 0
    word = args[0] if call.command_at == "arg0" else None
    if word is None:
        return None, None
    if call.dispatch.width == 32:
        word &= 0xFFFFFFFF
        if call.dispatch.sign_extend and word >> 31:
            word |= 0xFFFFFFFF00000000
    b = call.by_number.get(word & call.dispatch.mask)
    if b is None:
        return None, None
    if b.command_bits == "unmatched" and word & call.dispatch.progress_bits():
        return None, None  # the whole word is compared: with bits above it the number names nothing
    if b.codec == "shifted_index":
        return b.operation, word >> b.params["shift"]
    if b.codec == "masked_offset":
        return b.operation, word - (word & b.params["mask"])
    return b.operation, 0


word = st.one_of(
    st.integers(0, 0xFFF),
    st.integers(0, (1 << 64) - 1),
    st.builds(lambda b, n: b << 6 | n, st.integers(0, 300), st.integers(0, 63)),
)
registers = st.lists(st.one_of(st.none(), word), min_size=6, max_size=6)


@settings(max_examples=150, deadline=None)
@given(
    st.sampled_from(RELEASES),
    st.sampled_from(schema.CALLERS),
    st.sampled_from(sorted(facts.files())),
    st.lists(registers, min_size=1, max_size=8),
)
def test_vectorised_equals_reference(version: str, caller: str, op: int, states: list[list[int | None]]) -> None:
    read = Hypervisor(version, caller).decode(op, States.of(states))
    for i, args in enumerate(states):
        operation, index = slow_decode(version, caller, op, args)
        b = read.behaviour(i)
        assert (b.operation if b else None) == operation
        # What only guest memory tells (a field as index, a kind that does not continue) is not in the registers.
        if b is not None and b.codec != "guest_structure" and b.continues_when is None:
            assert read.index.item(i) == index


@settings(max_examples=60, deadline=None)
@given(
    st.sampled_from(RELEASES),
    st.sampled_from(schema.CALLERS),
    st.sampled_from(sorted(facts.files())),
    st.lists(registers, min_size=2, max_size=9),
)
def test_rows_are_independent(version: str, caller: str, op: int, states: list[list[int | None]]) -> None:
    xen = Hypervisor(version, caller)
    whole = xen.resume(op, States.of(states))
    for i, args in enumerate(states):
        one = xen.resume(op, States.of([args]))
        assert (whole.disposition[i], whole.errno_of(i)) == (one.disposition[0], one.errno_of(0))


def cases() -> list[Any]:
    """Every behaviour that continues, for each caller, at the first and last release of its span."""
    out = []
    order = {r.version: i for i, r in enumerate(release.releases())}
    for number in facts.files():
        for _, doc in factfiles.documents(number):
            model = doc["model"]
            rows = [(o["name"], b) for o in doc.get("operation", []) for b in o.get("behaviour", [])]
            rows += [(name, g) for g in doc.get("group", []) for name in g["names"][:1]]
            for name, row in rows:
                if row["codec"] in ("none", "hypervisor", "restart", "redirect", "unknown"):
                    continue
                versions = sorted(factfiles.expand(tuple(row.get("releases", model["releases"]))), key=order.__getitem__)
                for caller in row.get("callers", model["callers"]):
                    there = [
                        v for v in versions if factfiles.covers(row, v, caller, model) and factfiles.in_table(v, caller, number)
                    ]
                    for version in dict.fromkeys([*there[:1], *there[-1:]]):
                        out.append(pytest.param(version, caller, number, str(name), id=f"{version}-{caller}-{name}"))
    return out


@pytest.mark.parametrize(("version", "caller", "op", "name"), cases())
def test_decode_of_preempt(version: str, caller: str, op: int, name: str) -> None:
    """decode(preempt(call, p)) == p for every encoding; where it is not, the facts say from which progress on, or how it breaks."""
    xen = Hypervisor(version, caller)
    call = facts.lookup(version, caller, op)
    b = call.behaviour(name)
    assert b is not None
    states, progress = representatives.calls(b, None, () if call.dispatch is None else call.dispatch.checks)
    assert len(progress)
    left = xen.preempt(op, states, progress)
    read = xen.decode(op, left, states)
    assert (read.status == hv.MODELLED).all()
    fits = np.ones(len(progress), bool) if b.max_progress is None else progress <= np.uint64(b.max_progress)
    same = read.progress.known & (read.progress.value == progress)
    assert same[fits].all() or b.breaks_own, (progress[fits & ~same][:5], read.progress.value[fits & ~same][:5])
    total = states.at(b.total) if b.total else None
    if total is not None and not b.params.get("reduce") and not b.params.get("total_is"):
        known = read.total.known & fits
        assert (read.total.value[known] == total.value[known]).all()
    # Where more than that is read back wrongly, it must not be by chance that the facts name a bound.
    if b.max_progress is not None and (~fits).any():
        assert not same[~fits].all()


def test_every_release_is_in_the_property() -> None:
    """Each caller that has a hypercall table has cases, and the ends of the table are among them."""
    seen = {(c.values[0], c.values[1]) for c in cases()}
    assert {caller for _, caller in seen} == set(schema.CALLERS)
    assert {"3.0.2", "4.23-unstable"} <= {version for version, _ in seen}
