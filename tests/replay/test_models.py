"""Proposed hypervisors: inherited facts, overrides, wrong files, and ``abi check``."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from xtrace import release
from xtrace.cli.app import run
from xtrace.errors import UsageError
from xtrace.replay import facts
from xtrace.replay.models import load

DOCS = Path(__file__).parents[2] / "docs" / "models"


def write(tmp_path: Path, text: str) -> str:
    path = tmp_path / "m.toml"
    path.write_text(text)
    return str(path)


HEAD = '[model]\nname = "proposal"\nparent = "4.22.0"\n'


def test_what_is_not_overridden_is_inherited(tmp_path: Path) -> None:
    operation = '[[override]]\nhypercall = "memory_op"\noperation = "XENMEM_exchange"\nset = { command_bits = "ignored" }\n'
    load(write(tmp_path, HEAD + operation))
    mine, parent = facts.lookup("proposal", "pv64", 12), facts.lookup("4.22.0", "pv64", 12)
    assert mine.release == "proposal"
    assert mine.behaviour("XENMEM_exchange").command_bits == "ignored"  # type: ignore[union-attr]
    assert parent.behaviour("XENMEM_exchange").command_bits != "ignored"  # type: ignore[union-attr]
    same = {n: b for n, b in mine.by_number.items() if b.operation != "XENMEM_exchange"}
    assert same == {n: b for n, b in parent.by_number.items() if b.operation != "XENMEM_exchange"}
    assert facts.lookup("proposal", "pv64", 20).by_number == facts.lookup("4.22.0", "pv64", 20).by_number
    assert release.parse("proposal").note == "proposal is a model laid over 4.22.0"
    assert release.fold(["4.22.0", "proposal"]) == ["4.22.0", "proposal"]


def test_an_operation_may_be_new_or_gone(tmp_path: Path) -> None:
    new = (
        '[[override]]\nhypercall = "memory_op"\noperation = "XENMEM_foreigncopy"\nnumber = 29\n'
        'set = { codec = "guest_structure", index = "mem.done", total = "mem.nr", unit = "frames", guard = "control" }\n'
    )
    gone = '[[override]]\nhypercall = "memory_op"\noperation = "XENMEM_exchange"\nremove = true\n'
    load(write(tmp_path, HEAD + new + gone))
    call = facts.lookup("proposal", "pv64", 12)
    assert call.by_number[29].operation == "XENMEM_foreigncopy"
    assert call.by_number[29].guard == "control"
    assert call.behaviour("XENMEM_exchange") is None


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("[model]\nname = 'x'\n", "parent is missing"),
        ("[modle]\n", "unknown key 'modle'; did you mean model?"),
        (HEAD + "[[override]]\nhypercall = 'memroy_op'\n", "did you mean memory_op?"),
        (HEAD + "[[override]]\nhypercall = 'memory_op'\nset = { shfit = 8 }\n", "unknown key 'shfit'; did you mean shift?"),
        (HEAD + "[[override]]\nhypercall = 'memory_op'\ndispatch = { maks = 8 }\n", "did you mean mask?"),
        (HEAD + "[[override]]\nhypercall = 'memory_op'\noperation = 'XENMEM_exchagne'\n", "did you mean XENMEM_exchange?"),
        (HEAD + "[[override]]\nhypercall = 'memory_op'\ncallers = ['pv46']\n", "no caller is called 'pv46'"),
    ],
)
def test_wrong_files(tmp_path: Path, text: str, says: str) -> None:
    with pytest.raises(UsageError) as caught:
        load(write(tmp_path, text))
    assert says in str(caught.value)


@pytest.fixture
def xtrace(capsys: pytest.CaptureFixture[str]) -> Any:
    def call(*words: str) -> tuple[int, str, str]:
        status = run(list(words))
        out, err = capsys.readouterr()
        return status, out, err

    return call


def test_check_of_a_moved_shift(xtrace: Any) -> None:
    status, out, _ = xtrace("abi", "check", str(DOCS / "memory-op-shift-8.toml"), "--format", "json")
    assert status & 8
    changes = {(c["operation"], c["caller"]): c for c in json.loads(out)["changes"]}
    change = changes["XENMEM_decrease_reservation", "pv64"]
    assert {"redoes", "refused"} <= {f["outcome"] for f in change["forth"]}
    assert {f["outcome"] for f in change["back"]} == {"skips"}


def test_check_warns_of_bits_that_mean_nothing(xtrace: Any) -> None:
    """The rule of 2014 (4ef6b5f16c8a): what stood in the tree before the lock-down accepted any bits above the number."""
    status, out, _ = xtrace("abi", "check", str(DOCS / "hvmop-mask-first.toml"))
    assert status & 4
    assert "unused bits" in out
    assert "HVMOP_set_param" in out
    assert not [line for line in out.splitlines() if len(line) > 80 and " " in line.strip()]


def test_check_warns_of_progress_that_outgrows_its_field(xtrace: Any, tmp_path: Path) -> None:
    wide = (
        '[[override]]\nhypercall = "memory_op"\noperation = "XENMEM_decrease_reservation"\ncallers = ["pv32"]\n'
        "set = { max_total = 0xffffffff }\n"
    )
    status, out, _ = xtrace("abi", "check", write(tmp_path, HEAD + wide), "--format", "json")
    assert status & 4
    assert {w["kind"] for w in json.loads(out)["warnings"]} == {"overflow"}


def test_a_model_is_usable_wherever_a_release_is(xtrace: Any) -> None:
    model = ("--model", str(DOCS / "memory-op-shift-8.toml"))
    words = (
        "--from",
        "4.22.0",
        "--to",
        "memory-op-shift-8",
        "--caller",
        "pv64",
        "memory_op",
        "0x141",
        "0x1000",
        "--mem",
        "nr_extents=64",
    )
    status, out, _ = xtrace("decode", *words, *model)
    assert status == 8
    assert "redoes" in out or "refused" in out
    status, out, _ = xtrace(*model, "try", *words[:4], "memory_op", "XENMEM_decrease_reservation", "--preempt-at", "5")
    assert status == 8
    status, out, _ = xtrace("abi", "diff", "memory-op-shift-8", "4.22.0", "--hypercall", "memory_op", "--caller", "pv64", *model)
    assert "XENMEM_decrease_reservation" in out
    assert xtrace("decode", "--model")[0] == 3
    assert xtrace("abi", "versions", "--model", "/no/such.toml")[0] == 1
