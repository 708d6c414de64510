"""``analyze --path`` and ``--migration``, harm and advice as a user sees them."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from xtrace import pipeline
from xtrace.report import common

LOG = """\
xtrace: header release=3.3.0 tsc_khz=1000
xtrace: domain id=0 caller=pv64 role=control
xtrace: domain id=3 caller=pv64 role=guest
xtrace: call tsc=1 pcpu=0 dom={dom} vcpu=0 op=12 a0=0x1 a1=0x1000 mem.nr_extents=64
xtrace: sample tsc=2 pcpu=0 dom={dom} vcpu=0 op=12 a0={state} a1=0x1000 on_insn=1 mem.nr_extents=64
"""
BREAK, REVIEW, USAGE = 8, 4, 3


def analyze(path: Path, *args: str, env: dict[str, str] | None = None) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "xtrace", "analyze", str(path), *args],
        capture_output=True, text=True, timeout=120, check=False, cwd=path.parent, env={**os.environ, **(env or {})},
    )  # fmt: skip


@pytest.fixture
def guest(tmp_path: Path) -> Path:
    path = tmp_path / "guest.log"
    path.write_text(LOG.format(dom=3, state="0x51"))
    return path


@pytest.fixture
def toolstack(tmp_path: Path) -> Path:
    path = tmp_path / "toolstack.log"
    path.write_text(LOG.format(dom=0, state="0x51"))
    return path


def document(done: subprocess.CompletedProcess[str]) -> dict[str, Any]:
    out: dict[str, Any] = json.loads(done.stdout)
    assert out["summary"]["exit_status"] == done.returncode
    return out


def test_text_says_harm_and_what_to_do(guest: Path) -> None:
    done = analyze(guest, "--to", "3.4.0")
    assert done.returncode == BREAK | REVIEW
    text = " ".join(done.stdout.split())
    assert "harm: 5 of 64 extents were given back to Xen; the other 59 are not" in text
    assert text.endswith(
        "What to do: - Drain memory_op/XENMEM_decrease_reservation, issued by the guest's balloon driver: leave its memory target "
        "alone (xl mem-set, autoballoon) from well before the move until it is over."
    )
    ours = done.stdout[done.stdout.index("What to do:") :]
    assert all(len(line) <= 80 for line in ours.splitlines())


def test_json_has_harm_advice_and_path(guest: Path) -> None:
    found = document(analyze(guest, "--to", "3.4.0", "--format", "json"))
    assert found["path"] is None
    assert found["migration"] == []
    assert found["findings"][0]["harm"].startswith("5 of 64 extents")
    assert found["findings"][0]["exit_bits"] == BREAK
    (one,) = found["advice"]
    assert one["kind"] == "drain"
    assert one["operations"] == ["memory_op/XENMEM_decrease_reservation"]


@pytest.mark.parametrize(
    ("kinds", "of_guest", "of_toolstack"),
    [
        ((), BREAK | REVIEW, REVIEW),
        (("cooperative",), BREAK | REVIEW, 0),
        (("non_cooperative",), 0, 0),  # a PV guest takes part in its own migration
        (("live_update",), BREAK | REVIEW, BREAK | REVIEW),
        (("live-update", "cooperative"), BREAK | REVIEW, BREAK | REVIEW),
        (("fork_restore",), 0, 0),
    ],
)
def test_migration_narrows(guest: Path, toolstack: Path, kinds: tuple[str, ...], of_guest: int, of_toolstack: int) -> None:
    for path, bits in ((guest, of_guest), (toolstack, of_toolstack)):
        found = common.document(pipeline.analyze([path], pipeline.Options(targets=("3.4.0",), migration=kinds)))
        assert found["summary"]["exit_status"] == bits
        assert found["findings"][0]["code"] == "XT001"  # it is shown, counted or not
        assert found["findings"][0]["exit_bits"] == (bits & BREAK or bits & REVIEW)
        if kinds and not bits:
            assert found["summary"]["verdict"] == "safe"
            assert found["summary"]["targets"][0]["outcomes"] == {"not_caught": 1}


def test_what_is_not_caught_is_shown_as_such(toolstack: Path) -> None:
    done = analyze(toolstack, "--to", "3.4.0", "--migration", "cooperative")
    assert done.returncode == 0
    assert "not caught by cooperative: not counted" in done.stdout
    assert "counted is what a migration of kind cooperative catches" in done.stdout.splitlines()[0]


def test_a_path_is_shown_hop_by_hop(guest: Path) -> None:
    done = analyze(guest, "--path", "3.3.0,3.4.0,4.17.7")
    assert done.returncode == BREAK | REVIEW
    assert done.stdout.splitlines()[0].startswith("Along 3.3.0, 3.4.0, 4.17.7: breaks from 3.3.0 to 3.4.0, 3.3.0 to 4.17.7; safe")
    table = done.stdout[done.stdout.index("Hop by hop") :].splitlines()[2:]
    assert table[0].split()[:4] == ["1", "3.3.0", "3.4.0", "breaks"]
    rows = [line.split()[:3] for line in table[:8]]
    assert ["2", "3.4.0", "4.17.7"] in rows
    assert ["3.3.0", "4.17.7", "breaks"] in rows
    found = document(analyze(guest, "--path", "3.3.0,3.4.0,4.17.7", "--format", "json"))
    assert found["path"]["hosts"] == ["3.3.0", "3.4.0", "4.17.7"]
    assert [(leg["left"], leg["host"], leg["hop"], leg["verdict"]) for leg in found["path"]["legs"]] == [
        ("3.3.0", "3.4.0", True, "breaks"), ("3.3.0", "4.17.7", False, "breaks"), ("3.4.0", "4.17.7", True, "safe"),
    ]  # fmt: skip
    assert found["inputs"][0]["source_from"] == "--path"


@pytest.mark.parametrize(
    "args",
    [
        ("--path", "3.3.0,3.4.0", "--to", "4.5.0"), ("--path", "3.3.0"), ("--path", "3.3.0,4.5"), ("--path", "3.3.0,,3.4.0"),
        ("--path", "3.3.0,x"), ("--path", "3.3.0,3.4.0", "--from", "4.5.0"), ("--migration", "teleport"),
        ("--path", "3.3.0,3.4.0", "--follow"),
    ],
)  # fmt: skip
def test_wrong_use(guest: Path, args: tuple[str, ...]) -> None:
    done = analyze(guest, *args)
    assert done.returncode == USAGE
    assert done.stdout == ""
    assert "Traceback" not in done.stderr
    assert len(done.stderr.strip().splitlines()) == 1


def test_a_path_goes_before_targets_of_the_environment(guest: Path) -> None:
    found = document(analyze(guest, "--path", "3.3.0,3.4.0", "--format", "json", env={"XTRACE_TO": "4.5"}))
    assert [t for g in found["summary"]["targets"] for t in g["targets"]] == ["3.4.0"]
