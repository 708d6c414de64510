"""What was measured on real releases (captures' README, "Measured differences") holds in the facts."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import polars as pl
import pytest

from xtrace.pipeline import Options, open_input
from xtrace.replay import facts
from xtrace.replay import hypervisor as hv
from xtrace.replay.behaviour import Behaviour
from xtrace.replay.hypervisor import Hypervisor
from xtrace.replay.states import States

DOM0 = Path(__file__).parents[2] / "samples" / "dom0-4.17.7"

#: Releases that were booted, for 64-bit PV, and those of them that do an item before they look for an event.
LOOK_FIRST = ("3.4.0", "4.1.6.1")
ITEM_FIRST = ("4.2.5", "4.4.4", "4.13.5", "4.17.7", "4.22.0")


def behaviour(release: str, caller: str, number: int, name: str | None = None) -> Behaviour:
    call = facts.lookup(release, caller, number)
    b = next(iter(call.by_number.values())) if name is None else call.behaviour(name)
    assert b is not None, (release, caller, number, name)
    return b


@pytest.mark.parametrize("release", [*LOOK_FIRST, *ITEM_FIRST])
def test_where_xen_looks_first(release: str) -> None:
    for name in ("XENMEM_populate_physmap", "XENMEM_decrease_reservation", "XENMEM_increase_reservation"):
        b = behaviour(release, "pv64", 12, name)
        assert (b.codec, b.params["shift"]) == ("shifted_index", 6)
        # 4.22 stops inside the first extent too, of a domain that is being built.
        built = release == "4.22.0" and name == "XENMEM_populate_physmap"
        assert b.first == (0 if release in LOOK_FIRST or built else 1)
    for number in (1, 26):
        b = behaviour(release, "pv64", number)
        assert b.codec == "count_flag"
        assert b.params["flag"] == 0x80000000
        # With nothing done it is left only by an item that is preempted itself.
        assert b.params["check_from"] == (0 if release in LOOK_FIRST else 1)


@pytest.mark.parametrize("release", [*LOOK_FIRST, *ITEM_FIRST])
def test_progress_homes_of_64_bit_callers(release: str) -> None:
    exchange = behaviour(release, "pv64", 12, "XENMEM_exchange")
    assert (exchange.codec, exchange.params["index"]) == ("guest_structure", "mem.nr_exchanged")
    multicall = behaviour(release, "pv64", 13)
    assert (multicall.codec, multicall.params["size"], multicall.params.get("flag")) == ("advanced", 64, None)
    for name, size in (("unmap_grant_ref", 24), ("map_grant_ref", 32), ("copy", 40), ("transfer", 24)):
        b = behaviour(release, "pv64", 20, f"GNTTABOP_{name}")
        if b.codec != "none":  # 3.4 refuses more than 512 entries and preempts nothing
            assert (b.params["size"], b.params["pointer"], b.params["count"]) == (size, 1, 2)
    console = behaviour(release, "pv64", 18, "CONSOLEIO_write")
    assert (console.params["count"], console.params["pointer"], console.params["size"]) == (1, 2, 1)
    traps = behaviour(release, "pv64", 0)
    assert (traps.params["pointer"], traps.params["size"], traps.params.get("count")) == (0, 16, None)
    assert traps.first == (0 if release in LOOK_FIRST else 1)


@pytest.mark.parametrize("release", ["3.4.0", "4.4.4", "4.13.5"])
def test_progress_homes_of_32_bit_callers(release: str) -> None:
    assert behaviour(release, "pv32", 13).params["size"] == 32
    assert behaviour(release, "pv32", 0).params["size"] == 8
    for name, size in (("unmap_grant_ref", 24), ("map_grant_ref", 32), ("copy", 24), ("transfer", 16)):
        b = behaviour(release, "pv32", 20, f"GNTTABOP_{name}")
        if b.codec != "none":
            assert b.params["size"] == size
    # The chunks in which the 32-bit layer translates lose what lies behind them inside a multicall.
    assert behaviour(release, "pv32", 26).breaks_own
    if release != "3.4.0":
        assert behaviour(release, "pv32", 26).params["chunk"] == 341


def test_32_bit_exchange_breaks_its_own() -> None:
    for release in ("4.2.5", "4.4.4"):  # -14 on the recorded 4.2 to 4.4 line, past the first few
        b = behaviour(release, "pv32", 12, "XENMEM_exchange")
        assert b.breaks_own
        left = States.of([[11, 0x1000]], {"nr_exchanged": [10], "in.nr_extents": [64]})
        assert Hypervisor(release, "pv32").resume(12, left).errno_of(0) == "-EFAULT"
    assert behaviour("4.13.5", "pv32", 12, "XENMEM_exchange").breaks_own


def test_the_null_form() -> None:
    """From 4.1.6.1 on clearing an L4 entry leaves mmu_update(NULL, 0x80000000, NULL, 0); 3.4 leaves no such form."""
    created = {r: [s.name for s in behaviour(r, "pv64", 1).specials if s.creates] for r in ("3.4.0", "4.1.6.1", "4.17.7")}
    assert not created["3.4.0"]
    assert created["4.1.6.1"]
    assert created["4.17.7"]


def test_hvm_keeps_what_pv_keeps() -> None:
    for name in ("XENMEM_add_to_physmap", "XENMEM_add_to_physmap_batch"):
        b = behaviour("4.17.7", "hvm64", 12, name)
        assert (b.codec, b.params["shift"]) == ("shifted_index", 6)


#: ftrace of a Linux dom0: file -> samples by hypercall (samples/README-text.md).
PARKED = {
    "j3_hcload_parked.txt.zst": {12: 262, 13: 119, 26: 59, 20: 47, 18: 23, 36: 9},
    "j5_tiny_parked.txt": {12: 26, 26: 14, 20: 12, 13: 8},
    "j4_pvh_parked.txt": {36: 20, 1: 4},
    "j3_save_all_parked.txt": {36: 7, 1: 2},
}


@pytest.mark.parametrize("name", PARKED)
def test_samples_of_a_linux_dom0(name: str) -> None:
    """Each is decoded, domctl included as far as registers go: its command stands in memory, its registers stay as issued."""
    source, recording = open_input(DOM0 / name, Options())
    with source:
        events = pl.concat(list(recording.batches())).filter(pl.col("kind") == "sample")
    assert dict(events.group_by("op").len().iter_rows()) == PARKED[name]
    for (op,), part in events.group_by("op"):
        number = int(str(op))
        states = States.from_frame(part)
        xen = Hypervisor("4.17.7", "pv64")
        read = xen.decode(number, states)
        assert (read.status == (hv.UNRECORDED if number == 36 else hv.MODELLED)).all()
        if number == 36:
            # Every domctl that can be left is left with its registers unchanged: what is seen is what was issued.
            for b in facts.lookup("4.17.7", "pv64", 36).by_number.values():
                assert b.codec in ("none", "restart", "hypervisor", "redirect", "guest_structure")
        elif number == 12:
            again = xen.preempt(12, states, read.progress.value)
            assert (again.args[0].value == states.args[0].value).all()
        elif number in (1, 26):
            assert np.array_equal(read.marked, (states.args[1].value & np.uint64(0x80000000)) != 0)
