"""Verdicts that real experiments and Xen's sources contradicted."""

from __future__ import annotations

from typing import Any

import pytest

from xtrace.analyze.single import judge_many, request


def decode(source: str, target: str, op: str, args: list[Any], **row: Any) -> dict[str, Any]:
    asked = request({"caller": "pv64", "source": source, "target": target, "op": op, "args": args, **row})
    return judge_many([asked]).row(0, named=True)


@pytest.mark.parametrize("target", ["4.5.0", "4.7.6", "4.8.0", "4.13.5", "4.22.0"])
@pytest.mark.parametrize("issuer", ["guest", "control"])
def test_a_command_with_bits_below_arch_memory_op_names_nothing(target: str, issuer: str) -> None:
    # arch_memory_op(cmd) switches on the whole cmd since 4ef6b5f16c8a: 0x51 enters no handler (dec-s4-n5-t64).
    a = decode("3.3.0", target, "memory_op", ["0x51", "0x1000"], guest_memory={"nr_extents": 64}, issuer=issuer)
    assert (a["outcome"], a["errno"]) == ("refused", "-ENOSYS")


def test_a_command_without_bits_still_enters_the_other_handler() -> None:
    # inc-s4-n1-t64: 0x10 is XENMEM_set_pod_target.
    a = decode("3.3.0", "4.22.0", "memory_op", ["0x10", "0x1000"], guest_memory={"nr_extents": 64}, issuer="control")
    assert (a["outcome"], a["errno"]) == ("misdirected", None)
    a = decode("3.3.0", "4.4.4", "memory_op", ["0x51", "0x1000"], guest_memory={"nr_extents": 64}, issuer="control")
    assert (a["outcome"], a["errno"]) == ("misdirected", None)


@pytest.mark.parametrize(("source", "command"), [("4.2.5", "0x7"), ("4.13.5", "0x407"), ("4.22.0", "0x407")])
@pytest.mark.parametrize("target", ["3.3.0", "3.4.0", "4.1.6.1"])
def test_no_range_of_frames_before_4_2(source: str, command: str, target: str) -> None:
    # atp-7-advanced-s16of64, atp-407-s16of64: XENMAPSPACE_gmfn_range is unknown to them, -EINVAL.
    memory = {"space": 3, "size": 64, "idx": 0x100, "gpfn": 0x510, "domid": 1}
    a = decode(source, target, "memory_op", [command, "0x1000"], guest_memory=memory, issuer="control")
    assert (a["outcome"], a["errno"]) == ("refused", "-EINVAL")


def test_a_refusal_is_never_called_harmless() -> None:
    # hd-acq-nr64-start32 on 4.13.5: -E2BIG, where a shorter list would start again harmlessly.
    a = decode("4.22.0", "4.13.5", "memory_op", ["0x81c", "0x1000"], guest_memory={"nr_frames": 64}, issuer="control")
    assert (a["outcome"], a["errno"]) == ("refused", "-E2BIG")
    assert not a["harmless"]
    a = decode("4.22.0", "4.13.5", "memory_op", ["0x5c", "0x1000"], guest_memory={"nr_frames": 4}, issuer="control")
    assert (a["outcome"], a["harmless"]) == ("restarts", True)


@pytest.mark.parametrize(
    ("source", "target", "outcome"),
    [
        ("4.17.0", "4.16.7", "skips"),
        ("4.16.7", "4.16.7", "skips"),
        ("4.16.7", "4.17.0", "resumes"),
        ("4.17.0", "4.17.0", "resumes"),
    ],
)
def test_an_int_command_with_bit_31_is_read_back_enormous(source: str, target: str, outcome: str) -> None:
    # hvm_memory_op(int cmd, ...) until 5168b6ee9139: 0x80000001 becomes 0xffffffff80000001, a start far beyond the list.
    memory = {"nr_extents": 0x3000000}
    a = decode(source, target, "memory_op", ["0x80000001", "0x1000"], caller="hvm64", guest_memory=memory)
    assert (a["outcome"], a["errno"]) == (outcome, None)
    a = decode(source, target, "memory_op", ["0x80000001", "0x1000"], caller="pv64", guest_memory=memory)
    assert a["outcome"] == "resumes"
