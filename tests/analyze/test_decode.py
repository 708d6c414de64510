"""One continuation, both sides: the worked examples, from the command line."""

from __future__ import annotations

import json
import subprocess
import sys
from typing import Any

import pytest


def xtrace(*args: str, stdin: str | None = None) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-m", "xtrace", *args], capture_output=True, text=True, input=stdin, timeout=120)


def decode(*args: str) -> dict[str, Any]:
    done = xtrace("decode", "--format", "json", *args)
    assert done.stdout, done.stderr
    answer: dict[str, Any] = json.loads(done.stdout)
    answer["exit"] = done.returncode
    return answer


def test_worked_example_forward() -> None:
    a = decode(
        "--from",
        "3.3.0",
        "--to",
        "3.4.0",
        "--caller",
        "pv64",
        "memory_op",
        "0x51",
        "0x7ffe0000",
        "--mem",
        "nr_extents=64",
    )
    assert (a["outcome"], a["errno"], a["code"], a["exit"]) == ("misdirected", "-EINVAL", "XT001", 8)
    s, t = a["source_decode"], a["target_decode"]
    assert (s["subop"], s["progress"], s["remaining"], s["total"], s["unit"]) == (
        "XENMEM_decrease_reservation",
        5,
        59,
        64,
        "extents",
    )
    assert (t["subop"], t["progress"]) == ("XENMEM_get_pod_target", 1)


def test_worked_example_privileged() -> None:
    a = decode("--from", "3.3.0", "--to", "3.4.0", "--caller", "pv64", "--issuer", "control", "memory_op", "0x51", "0x7ffe0000")
    # A privileged caller is not stopped: the structure is read as another, and no errno must follow.
    assert (a["outcome"], a["errno"]) == ("misdirected", None)


def test_worked_example_back() -> None:
    a = decode(
        "--from",
        "3.4.0",
        "--to",
        "3.3.0",
        "--caller",
        "pv64",
        "memory_op",
        "0x141",
        "0x7ffe0000",
        "--mem",
        "nr_extents=64",
    )
    assert (a["outcome"], a["errno"], a["exit"]) == ("skips", None, 8)
    assert a["target_decode"]["progress"] - a["source_decode"]["progress"] == 15


def test_add_to_physmap_4_3_to_4_4() -> None:
    structure = ["--mem", "space=3", "--mem", "size=48", "--mem", "idx=16", "--mem", "gpfn=116"]
    a = decode("--from", "4.3.0", "--to", "4.4.0", "--caller", "hvm64", "memory_op", "7", "0x7ffe0000", *structure)
    # 4.3 moved the structure on; 4.4 goes on with what the structure says.
    assert a["outcome"] == "resumes"
    a = decode(
        "--from",
        "4.4.0",
        "--to",
        "4.3.0",
        "--caller",
        "hvm64",
        "memory_op",
        "0x407",
        "0x7ffe0000",
        "--mem",
        "space=3",
        "--mem",
        "size=64",
    )
    assert (a["outcome"], a["harmless"], a["source_decode"]["progress"]) == ("restarts", False, 16)
    assert a["target_decode"]["progress"] == 0


@pytest.mark.parametrize("name", ["modified_memory", "set_mem_type"])
def test_hvmop_4_5_to_4_4(name: str) -> None:
    number = {"modified_memory": 7, "set_mem_type": 8}[name]
    a = decode(
        "--from",
        "4.5.0",
        "--to",
        "4.4.4",
        "--caller",
        "hvm64",
        "--issuer",
        "device_model",
        "hvm_op",
        hex(number | 0x100),
        "0x7ffe0000",
        "--mem",
        "nr=1024",
    )
    assert a["source_decode"]["subop"] == f"HVMOP_{name}"
    assert a["source_decode"]["progress"] == 256
    assert (a["outcome"], a["errno"]) == ("refused", "-ENOSYS")


def test_hvmop_4_4_to_4_5() -> None:
    """set_mem_type goes on from the advanced structure; modified_memory's structure was re-laid in between."""
    structure = ["--mem", "domid=3", "--mem", "first_pfn=0x1200", "--mem", "nr=512"]
    common = ["--from", "4.4.4", "--to", "4.5.0", "--caller", "hvm64", "--issuer", "device_model", "hvm_op"]
    a = decode(*common, "8", "0x7ffe0000", *structure)
    assert (a["outcome"], a["source_decode"]["subop"]) == ("resumes", "HVMOP_set_mem_type")
    assert a["caveats"] == ["domids"]
    a = decode(*common, "7", "0x7ffe0000", *structure)
    assert (a["outcome"], a["errno"], a["source_decode"]["subop"]) == ("refused", "-EINVAL", "HVMOP_modified_memory")


def test_hvmop_gone() -> None:
    a = decode("--from", "4.8.0", "--to", "4.9.0", "--caller", "hvm64", "--issuer", "device_model", "hvm_op", "8", "0x7ffe0000")
    assert (a["outcome"], a["errno"]) == ("absent", "-ENOSYS")
    a = decode(
        "--from",
        "4.8.0",
        "--to",
        "4.9.0",
        "--caller",
        "hvm64",
        "--issuer",
        "device_model",
        "hvm_op",
        "0x108",
        "0x7ffe0000",
    )
    assert (a["outcome"], a["errno"]) == ("refused", "-ENOSYS")


def test_inside_a_multicall() -> None:
    line = {
        "id": 7, "caller": "pv64", "source": "3.3.0", "target": "3.4.0", "op": "multicall", "args": ["0x1000", 3],
        "guest_memory": {"entry": {"op": 12, "args": ["0x51", "0x7ffe0000"], "result": 12, "memory": {"nr_extents": 64}}},
    }  # fmt: skip
    done = xtrace("decode", "--batch", "-", stdin=json.dumps(line) + "\n")
    a = json.loads(done.stdout)
    assert a["outcome"] == "misdirected"
    assert a["source_decode"]["inner"]["subop"] == "XENMEM_decrease_reservation"
    assert a["target_decode"]["inner"]["subop"] == "XENMEM_get_pod_target"


def test_batch_answers_every_line_in_order() -> None:
    good = {"caller": "pv64", "source": "4.4.4", "target": "4.5.0", "op": 12, "args": [1, "0x1000"]}
    lines = [
        json.dumps({"id": "a", **good}),
        "not json",
        json.dumps({"id": "b", **good, "target": "9.9.9"}),
        json.dumps({"id": "c", **good, "wat": 1}),
        json.dumps({"id": "d", **good, "args": ["0x1ffffffffffffffff"]}),
        json.dumps([1]),
        json.dumps({"id": {"x": 1}, **good}),
    ]
    done = xtrace("decode", "--batch", "-", stdin="\n".join(lines) + "\n")
    answers = [json.loads(x) for x in done.stdout.splitlines()]
    assert len(answers) == len(lines)
    assert ["error" in a for a in answers] == [False, True, True, True, True, True, False]
    assert [a["id"] for a in answers] == ["a", None, "b", "c", "d", None, {"x": 1}]
    assert answers[0]["target"] == "4.5.0"
    assert done.returncode == 3


def test_progress_counts_from_the_issued_call() -> None:
    line = {
        "id": 1, "caller": "pv64", "source": "4.17.7", "target": "4.18.0", "op": "grant_table_op", "args": [5, 0x1000 + 40 * 9, 7],
        "issued": {"args": [5, 0x1000, 16]},
    }  # fmt: skip
    a = json.loads(xtrace("decode", "--batch", "-", stdin=json.dumps(line)).stdout)
    for side in ("source_decode", "target_decode"):
        assert (a[side]["progress"], a[side]["remaining"], a[side]["total"]) == (9, 7, 16)
    assert a["outcome"] == "resumes"
    assert a["caveats"] == ["machine_frames", "domids"]


def test_limit_of_the_target() -> None:
    # 3.4 takes at most 512 grant entries and refuses what a later release left.
    a = decode("--from", "4.4.4", "--to", "3.4.0", "--caller", "pv64", "grant_table_op", "5", "0x7f0028", "768")
    assert (a["outcome"], a["errno"]) == ("refused", "-EINVAL")


def test_unmodelled_is_unknown() -> None:
    # A 64-bit guest of an Arm Xen 4.3: what becomes of its hypercalls is not known.
    a = decode("--from", "4.3.4", "--to", "4.4.0", "--caller", "arm64", "memory_op", "0x41", "0x1000")
    assert (a["outcome"], a["exit"]) == ("unknown", 4)


def test_callers_of_32_bits() -> None:
    a = decode("--from", "3.3.0", "--to", "3.4.0", "--caller", "pv32", "memory_op", "0x51", "0x1000", "--mem", "nr_extents=64")
    assert a["source_decode"]["progress"] == 5
    # compat_memory_op looks at the number alone: get_pod_target is entered, for 32-bit callers it is not implemented there.
    assert a["outcome"] in ("misdirected", "refused")
    a = decode("--from", "4.4.4", "--to", "4.5.0", "--caller", "pv32", "memory_op", "0x141", "0x1000", "--mem", "nr_extents=64")
    assert (a["outcome"], a["source_decode"]["progress"]) == ("resumes", 5)


def test_a_number_that_is_masked_is_misdirected() -> None:
    """3.0.2 masks hypercall numbers with 31: sysctl (35) is stack_switch (3) there."""
    a = decode("--from", "4.1.0", "--to", "3.0.2", "--caller", "pv64", "sysctl", "0x1000")
    assert a["outcome"] in ("misdirected", "undecidable")


def test_old_guest_table() -> None:
    a = decode("--from", "4.17.7", "--to", "4.18.0", "--caller", "pv64", "mmu_update", "0", "0x80000000", "0", "0")
    assert (a["outcome"], a["harmless"], a["source_decode"]["home"]) == ("lost", True, "hypervisor")
    a = decode("--from", "4.3.0", "--to", "4.1.0", "--caller", "pv64", "mmu_update", "0", "0x80000000", "0", "0")
    assert (a["outcome"], a["errno"]) == ("refused", "-ESRCH")


def test_what_a_release_does_to_its_own_is_told(capsys: pytest.CaptureFixture[str]) -> None:
    from xtrace.cli.app import run

    words = ["--from", "4.7.6", "--to", "4.8.0", "--caller", "arm64", "--issuer", "device_model"]
    run(["decode", *words, "memory_op", "0x1015", "0x1000", "--mem", "nr=5000", "--mem", "op=0"])
    assert "4.7.6 may mishandle its own" in capsys.readouterr().out
