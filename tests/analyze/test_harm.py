"""Harm in words: exact sentences for known cases, and no sentence that says more than the finding and the facts do."""

from __future__ import annotations

import re
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from xtrace.analyze import harm, single
from xtrace.replay import facts
from xtrace.replay.factfiles import documents


def found(source: str, target: str, caller: str, op: Any, args: list[Any], memory: dict[str, Any] | None = None) -> dict[str, Any]:
    row = {"caller": caller, "source": source, "target": target, "op": op, "args": args, "guest_memory": memory or {}}
    return single.judge_many([single.request(row)]).row(0, named=True)


CASES = [
    ("3.3.0", "3.4.0", "pv64", "memory_op", [0x51, 1], {"nr_extents": 64}, "misdirected",
     "5 of 64 extents were given back to Xen; the other 59 are not (they still belong to the domain); 3.4.0 runs "
     "XENMEM_get_pod_target instead, whose structure is a xen_pod_target, not the caller's xen_memory_reservation; the caller "
     "gets -EINVAL."),
    ("3.3.0", "3.4.0", "pv32", "memory_op", [0x51, 1], {"nr_extents": 6}, "refused",
     "5 of 6 extents were given back to Xen; the other one is not; the caller gets -ENOSYS for a call that is half done."),
    ("3.4.0", "3.3.0", "pv64", "memory_op", [0x141, 1], {"nr_extents": 64}, "skips",
     "15 extents are never given back to Xen (they still belong to the domain), and no errno tells the caller."),
    # The target takes more for done than there is: what is skipped is what was left.
    ("3.4.0", "3.3.0", "pv64", "memory_op", [0x141, 1], {"nr_extents": 8}, "skips",
     "3 extents are never given back to Xen (they still belong to the domain), and no errno tells the caller."),
    ("3.3.0", "3.4.0", "pv64", "memory_op", [0x81, 1], {"nr_extents": 64}, "redoes",
     "Xen is asked a second time to give back 6 extents, and what that does is not known; no errno tells the caller."),
    ("4.4.0", "4.3.0", "hvm64", "memory_op", [0x407, 1], {"size": 64, "space": 3}, "restarts",
     "Xen is asked a second time to move 16 pages, which is not harmless; no errno tells the caller."),
    ("4.17.7", "4.18.0", "hvm64", "memory_op", [0x141, 1], {"nr_extents": 64, "domid": 0x7FF0}, "resumes",
     "None: it goes on where it stopped."),
]  # fmt: skip


@pytest.mark.parametrize(("source", "target", "caller", "op", "args", "memory", "outcome", "text"), CASES)
def test_known_cases(
    source: str, target: str, caller: str, op: str, args: list[int], memory: dict[str, int], outcome: str, text: str
) -> None:
    row = found(source, target, caller, op, args, memory)
    assert row["outcome"] == outcome
    assert harm.sentence(row) == text


def test_a_harmless_restart_says_so() -> None:
    row = found("4.1.4", "4.13.0", "hvm64", "hvm_op", [7, 1], {"domid": 1, "first_pfn": 16, "nr": 64})
    row |= {"outcome": "restarts", "harmless": True}
    assert harm.sentence(row).startswith("Harmless, it restarts: ")


def test_lost_work_names_what_was_held() -> None:
    row = found("4.17.7", "4.18.0", "pv64", "mmu_update", [0, 0x80000000, 0, 0])
    assert row["outcome"] == "lost"
    held = next(b.held for b in facts.lookup("4.17.7", "pv64", 1).by_number.values())
    assert held is not None
    assert held in harm.sentence(row)
    assert harm.sentence(row).startswith("Harmless: ") is row["harmless"]


def test_what_is_not_known_is_said() -> None:
    row = found("3.3.0", "3.4.0", "pv64", "memory_op", [None, 1])
    assert row["outcome"] == "undecidable"
    assert harm.sentence(row) == "Not known: the trace does not record what decides it."


def test_a_call_inside_a_multicall_is_the_one_that_is_harmed() -> None:
    row = found("3.3.0", "3.4.0", "pv64", "multicall", [0x1000, 3], {"entry": {"op": 12, "args": [0x51, 1],
                "memory": {"nr_extents": 64}}})  # fmt: skip
    assert row["source_decode"]["inner"]["subop"] == "XENMEM_decrease_reservation"
    assert row["outcome"] == "misdirected"
    said = harm.sentence(row)
    assert "given back to Xen" in said
    assert "that entry of the multicall gets" in said


def test_every_nature_is_of_an_operation_and_cited() -> None:
    names = facts.hypercall_names().values()
    for key, nature in harm.natures().items():
        hypercall, _, operation = key.partition("/")
        assert hypercall in names
        assert nature.did
        assert nature.do
        assert len(nature.cite) == 3
        if operation:
            number = {name: n for n, name in facts.hypercall_names().items()}[hypercall]
            known = {str(o["name"]) for _, doc in documents(number) for o in doc.get("operation", [])}
            assert operation in known


def test_every_operation_with_a_unit_has_words_of_its_own() -> None:
    """Units are counted, so that what becomes of them can be said."""
    without = set()
    for number in facts.files():
        for _, doc in documents(number):
            name = facts.hypercall_names()[number]
            for op in doc.get("operation", []):
                rows = [r for r in op.get("behaviour", []) if r["codec"] not in ("none", "unknown", "hypervisor")]
                if rows and any(r.get("unit", op.get("unit")) for r in rows) and harm.nature(name, op["name"]) == harm.Nature():
                    without.add(f"{name}/{op['name']}")
    assert without <= {"dm_op/XEN_DMOP_map_mem_type_to_ioreq_server"}  # what it does to a frame has no short word


RELEASES = ("3.3.0", "3.4.0", "4.1.4", "4.4.4", "4.5.0", "4.13.5", "4.17.7", "4.22.0")


@settings(max_examples=150, deadline=None)
@given(
    st.sampled_from(RELEASES), st.sampled_from(RELEASES), st.sampled_from(["pv64", "pv32", "hvm64", "pvh64"]),
    st.sampled_from([0, 1, 12, 13, 18, 20, 26, 32, 34, 36, 41]),
    st.lists(st.none() | st.integers(0, 0x2000), min_size=4, max_size=4),
    st.dictionaries(st.sampled_from(["nr_extents", "nr", "first_pfn", "cmd", "size", "domid"]), st.integers(0, 300)),
)  # fmt: skip
def test_any_finding_has_one_or_two_plain_sentences(
    source: str, target: str, caller: str, op: int, args: list[int | None], memory: dict[str, int]
) -> None:
    row = found(source, target, caller, op, args, memory)
    said = harm.sentence(row)
    assert said
    assert said[0].isupper() or said[0].isdigit()
    assert said.endswith(".")
    assert "None" not in said.replace("None: it", "")
    assert "  " not in said
    if row["errno"] and row["outcome"] in ("absent", "refused", "misdirected"):
        assert row["errno"] in said
    for n in re.findall(r"(\d[\d,]*) of (\d[\d,]*) ", said):
        done, total = (int(x.replace(",", "")) for x in n)
        assert done <= total
