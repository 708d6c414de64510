"""The vectorised decoding against a slow, obvious one, and decode(preempt(call, p)) == p."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from xtrace import release
from xtrace.replay import facts
from xtrace.replay import hypervisor as hv
from xtrace.replay.facts import Behaviour
from xtrace.replay.hypervisor import Hypervisor
from xtrace.replay.states import States

RELEASES = [r.version for r in release.releases() if r.version in facts.modelled_releases()]
CALLERS = ("pv64", "hvm64")


def slow_decode(version: str, caller: str, op: int, args: list[int | None]) -> tuple[str | None, int | None]:
    """Sub-operation and absolute progress, one state at a time."""
    call = facts.lookup(version, caller, op)
    if call.status != "modelled":
        return None, None
    if call.dispatch is None:
        return next(iter(call.by_number.values())).operation, 0
    word = args[0]
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
    st.sampled_from(CALLERS),
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
    st.sampled_from(CALLERS),
    st.sampled_from(sorted(facts.files())),
    st.lists(registers, min_size=2, max_size=9),
)
def test_rows_are_independent(version: str, caller: str, op: int, states: list[list[int | None]]) -> None:
    xen = Hypervisor(version, caller)
    whole = xen.resume(op, States.of(states))
    for i, args in enumerate(states):
        one = xen.resume(op, States.of([args]))
        assert (whole.disposition[i], whole.errno_of(i)) == (one.disposition[0], one.errno_of(0))


def issued(b: Behaviour, command: bool, total: int) -> tuple[list[int | None], dict[str, list[int | None]]]:
    args: list[int | None] = [0x10000 * k for k in range(6)]
    memory: dict[str, list[int | None]] = {}

    def put(location: str, value: int) -> None:
        if location.startswith("arg"):
            args[int(location[3:])] = value
        else:
            memory[location.removeprefix("mem.")] = [value]

    if command:
        put("arg0", b.number)
    if b.params.get("count") is not None:
        put(f"arg{b.params['count']}", total)
    if b.total:
        put(b.total, total)
    for name in b.params.get("advance", {}):
        put(f"mem.{name.removeprefix('mem.')}", 0x1000)
    for name in b.params.get("reduce", {}):
        put(f"mem.{name.removeprefix('mem.')}", total)
    if b.params.get("base"):
        put(str(b.params["base"]), 0x40)
    if b.params.get("done"):
        put(str(b.params["done"]), 0)
    if b.continues_when is not None and b.continues_when.equals is not None:
        put(b.continues_when.at, b.continues_when.equals)
    return args, memory


def cases() -> list[Any]:
    """One case for each behaviour that continues, at the first and last release of its span."""
    out, seen = [], set()
    for version in RELEASES:
        for caller in CALLERS:
            for op in facts.files():
                call = facts.lookup(version, caller, op)
                for b in call.by_number.values():
                    if b.codec not in ("none", "hypervisor", "restart") and (caller, b.ident) not in seen:
                        seen.add((caller, b.ident))
                        out.append(pytest.param(version, caller, op, b, id=f"{version}-{caller}-{b.operation}"))
    return out


@pytest.mark.parametrize(("version", "caller", "op", "b"), cases())
def test_decode_of_preempt(version: str, caller: str, op: int, b: Behaviour) -> None:
    xen = Hypervisor(version, caller)
    command = facts.lookup(version, caller, op).command
    for total in (2, 64, 1000, 60000):
        args, memory = issued(b, command, total)
        step = b.stride if b.codec in ("shifted_index", "masked_offset") else 1
        progress = np.array(
            [p for p in {b.first, 1, 2, 5, total // 2, total - 1} if p >= b.first and p < total and p % step == 0],
            np.uint64,
        )
        if not len(progress):
            continue
        call = States.of([args] * len(progress), {k: v * len(progress) for k, v in memory.items()})
        left = xen.preempt(op, call, progress)
        read = xen.decode(op, left, call)
        assert read.progress.known.all()
        assert (read.progress.value == progress).all()
        assert (read.total.value == total).all() or not read.total.known.any()
        assert (read.status == hv.MODELLED).all()
