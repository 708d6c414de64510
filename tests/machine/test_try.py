"""``xtrace try``: the worked examples of DESIGN §1, derived by execution."""

from __future__ import annotations

import json
from typing import Any

import pytest

from xtrace.cli.app import run


@pytest.fixture
def attempt(capsys: pytest.CaptureFixture[str]) -> Any:
    def call(*words: str) -> tuple[int, str, str]:
        status = run(["try", *words])
        out, err = capsys.readouterr()
        return status, out, err

    return call


DECREASE = ("memory_op", "XENMEM_decrease_reservation", "--extents", "64", "--preempt-at", "5")


def test_forth_it_is_misdirected(attempt: Any) -> None:
    status, out, _ = attempt("--from", "3.3.0", "--to", "3.4.0", *DECREASE)
    assert status == 8
    assert "left: rdi 0x51" in out
    assert "enters XENMEM_get_pod_target" in out
    assert "3.4.0: 5 extents done once, 59 never (5–63)" in out
    assert out.endswith("misdirected, -EINVAL\n")
    assert not [line for line in out.splitlines() if len(line) > 80]


def test_back_it_skips(attempt: Any) -> None:
    status, out, _ = attempt("--from", "3.4.0", "--to", "3.3.0", *DECREASE, "--format", "json")
    assert status == 8
    answer = json.loads(out)
    assert answer["outcome"] == "skips"
    assert answer["at_target"]["never"] == list(range(5, 20))
    assert answer["at_source"]["never"] == []
    assert answer["at_source"]["states"][0]["args"][0] == "0x141"


def test_two_preemptions(attempt: Any) -> None:
    """What 4.4 kept in the structure goes on in 4.5, which keeps what it does itself in op."""
    words = ("--from", "4.4.4", "--to", "4.5.0", "--caller", "hvm64", "hvm_op", "HVMOP_set_mem_type", "--pages", "1000")
    status, out, _ = attempt(*words, "--preempt-at", "100", "--preempt-again", "256", "--format", "json")
    assert status == 0
    answer = json.loads(out)
    first, second = answer["at_target"]["states"][:2]
    assert (first["args"][0], first["memory"]["nr"]) == ("0x8", "0x384")
    assert (second["args"][0], second["memory"]["nr"]) == ("0x108", "0x384")
    assert answer["at_target"]["never"] == answer["at_target"]["twice"] == []


def test_work_that_turned_round(attempt: Any) -> None:
    words = ("--from", "4.20.3", "--to", "4.20.4", "memory_op", "XENMEM_add_to_physmap", "--pages", "100", "--preempt-at", "10")
    assert attempt(*words)[0] == 0
    status, out, _ = attempt(*words, "--overlapping")
    assert status == 8
    assert out.endswith("wrong_result\n")


def test_where_xen_does_not_look(attempt: Any) -> None:
    status, out, _ = attempt("--from", "4.22.0", "--to", "4.21.2", "memory_op", "XENMEM_maximum_ram_page")
    assert status == 0
    assert "It is not preempted there" in out


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["--to", "4.5.0", "memory_op", "1"], "--from is missing"),
        (["--from", "4.4.4", "--to", "4.5.0", "memory_op"], "needs an operation"),
        (["--from", "4.4.4", "--to", "4.5.0", "memory_op", "XENMEM_exchagne"], "did you mean XENMEM_exchange?"),
        (["--from", "4.4.4", "--to", "4.5.0", "--caller", "hvm64", "mmu_update"], "not in the hvm64 hypercall table"),
        (["--from", "4.4.4", "--to", "4.5.0", "memory_op", "1", "--issuer", "me"], "no issuer is called 'me'"),
    ],
)
def test_wrong_use(attempt: Any, words: list[str], says: str) -> None:
    status, out, err = attempt(*words)
    assert (status, out) == (3, "")
    assert says in err
    assert len(err.splitlines()) == 1
