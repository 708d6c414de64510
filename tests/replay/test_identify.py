"""Which releases a trace can come from: the true one is never ruled out, and what rules out the others is named."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
import pytest

from xtrace import release
from xtrace.pipeline import Options, open_input
from xtrace.replay import identify_calls, identify_pairs
from xtrace.replay.factfiles import expand, load
from xtrace.replay.identify import Identification, Identifier, possible
from xtrace.replay.states import States

SAMPLES = Path(__file__).resolve().parents[2] / "samples"
CAPTURES = sorted(p for folder in ("bare", "eras", "dom0-4.17.7") for p in (SAMPLES / folder).iterdir())


def run(path: Path, *, rows: int | None = None, callers: dict[int | None, str] | None = None) -> Identification:
    source, recording = open_input(path, Options())
    seen = Identifier(callers or {})
    with source:
        for batch in recording.batches():
            for part in batch.iter_slices(rows) if rows else (batch,):
                seen.feed(part)
    observed = recording.observed
    return seen.conclude(observed.event_ids, observed.forms, observed.peaks)


def true_release(path: Path) -> str:
    named = re.search(r"-(\d[\w.-]*?)\.(?:txt|xentrace)", path.name) or re.search(r"-(\d.*)", path.parent.name)
    assert named is not None
    return release.parse(named[1]).releases[0].version


def log(tmp_path: Path, *lines: str) -> Path:
    path = tmp_path / "log"
    path.write_text("".join(f"xtrace: {line}\n" for line in ("domain id=1 caller=pv64", *lines)))
    return path


@pytest.mark.parametrize("path", CAPTURES, ids=lambda p: p.name)
def test_the_true_release_is_kept(path: Path) -> None:
    found = run(path)
    against = found.against(true_release(path))
    assert against is None, against
    assert set(found.left).isdisjoint(v for gone, _ in found.ruled_out() for v in gone)
    assert len(found.left) + sum(len(gone) for gone, _ in found.ruled_out()) == len(found.known)
    assert all(e.offset is not None or e.line is not None for e in found.evidence)


@pytest.mark.parametrize(
    ("name", "left"),
    [
        ("eras/pv64-3.3.0.xentrace", ["3.2.0", "3.3.0"]),
        ("eras/smp64-4.4.4.xentrace.zst", ["4.3.0..4.6.6"]),
        ("eras/pv64-4.13.5.xentrace.zst", ["4.11.4", "4.12.3..4.12.4", "4.13.1.."]),
        ("bare/bare-4.1.6.1.txt.zst", ["4.1.6..4.1.6.1", "4.2.3..4.2.4", "4.3.0..4.3.2", "4.4.0"]),
        ("bare/barehvm64-4.17.7.txt.zst", ["4.15.1.."]),
    ],
)
def test_what_is_left(name: str, left: list[str]) -> None:
    assert set(run(SAMPLES / name).left) == expand(tuple(left))


@pytest.mark.parametrize(
    "name", ["bare/bare32-3.4.0-rc3.txt.zst", "eras/pv64-4.4.4.xentrace.zst", "dom0-4.17.7/j5_tiny_pv.xentrace"]
)
def test_batches_never_change_a_result(name: str) -> None:
    assert run(SAMPLES / name) == run(SAMPLES / name, rows=61)


def test_progress_at_bit_4_is_not_progress_at_bit_6(tmp_path: Path) -> None:
    found = run(
        log(
            tmp_path,
            "call dom=1 vcpu=0 op=memory_op a0=0x1 a1=0x7000 mem.nr_extents=64",
            "sample dom=1 vcpu=0 op=12 a0=0x51 a1=0x7000 on_insn=1 mem.nr_extents=64",
            "return dom=1 vcpu=0 op=12 result=64",
        )
    )
    assert "3.3.0" in found.left
    assert "3.4.0" not in found.left
    against = found.against("4.4.0")
    assert against is not None
    assert (against.line, against.what) == (3, "XENMEM_decrease_reservation(arg0=0x1) left with arg0 0x1 → 0x51")
    # 20 of 64 at bit 4, 5 of 64 at bit 6: both can be.
    found = run(
        log(
            tmp_path,
            "call dom=1 vcpu=0 op=memory_op a0=0x1 a1=0x7000 mem.nr_extents=64",
            "sample dom=1 vcpu=0 op=12 a0=0x141 a1=0x7000 on_insn=1 mem.nr_extents=64",
            "return dom=1 vcpu=0 op=12 result=64",
        )
    )
    assert {"3.3.0", "3.4.0", "4.4.0"} <= set(found.left)
    # Of 16 extents 20 cannot be done.
    found = run(
        log(
            tmp_path,
            "call dom=1 vcpu=0 op=memory_op a0=0x1 a1=0x7000 mem.nr_extents=16",
            "sample dom=1 vcpu=0 op=12 a0=0x141 a1=0x7000 on_insn=1 mem.nr_extents=16",
            "return dom=1 vcpu=0 op=12 result=16",
        )
    )
    assert "3.3.0" not in found.left
    assert "3.4.0" in found.left


def test_a_call_that_fails_proves_nothing_and_one_that_succeeds_does(tmp_path: Path) -> None:
    def left(result: int) -> set[str]:
        lines = ("call dom=1 vcpu=0 op=41 a0=0x1 a1=0 a2=0", f"return dom=1 vcpu=0 op=41 result={result}")
        return set(run(log(tmp_path, *lines)).left)

    assert left(-38) == set(possible(()))
    assert "4.8.5" not in left(0)  # dm_op is of 4.9
    assert "4.9.0" in left(0)


def test_a_number_of_items_that_is_refused(tmp_path: Path) -> None:
    found = run(log(tmp_path, "call dom=1 vcpu=0 op=20 a0=1 a1=0x9000 a2=4096", "return dom=1 vcpu=0 op=20 result=0"))
    against = found.against("3.3.0")
    assert against is not None
    assert "refused" in against.why
    assert "4.0.0" in found.left


def test_what_the_hypervisor_says_of_itself(tmp_path: Path) -> None:
    lines = ["call dom=1 vcpu=0 op=xen_version a0=0 a1=0", "return dom=1 vcpu=0 op=17 result=0x4000d"]
    assert set(run(log(tmp_path, *lines)).left) == {r.version for r in release.series("4.13")}
    other = ["call dom=1 vcpu=0 op=xen_version a0=0 a1=0", "return dom=1 vcpu=0 op=17 result=0x40004"]
    found = run(log(tmp_path, *lines, *other))
    assert not found.left
    said = found.contradiction()
    assert "line 3" in said
    assert "line 5" in said


def test_stopped_before_it_ran(tmp_path: Path) -> None:
    """A vCPU may be stopped on the instruction before the call runs: once is chance, again and again is not."""
    call = (
        "call dom=1 vcpu=0 op=memory_op a0=0x1 a1=0x7000 mem.nr_extents=64",
        "sample dom=1 vcpu=0 op=12 a0=0x1 a1=0x7000 on_insn=1 mem.nr_extents=64",
        "return dom=1 vcpu=0 op=12 result=64",
    )
    assert "4.13.5" in run(log(tmp_path, *call, *call)).left
    found = run(log(tmp_path, *call, *call, *call))
    assert "4.13.5" not in found.left
    assert "4.1.0" in found.left


def test_what_nothing_explains_is_no_evidence(tmp_path: Path) -> None:
    """Registers that no release leaves for that call belong to another one."""
    found = run(
        log(
            tmp_path,
            "call dom=1 vcpu=0 op=memory_op a0=0x1 a1=0x7000",
            "sample dom=1 vcpu=0 op=12 a0=0x6 a1=0x8000 on_insn=1",
            "return dom=1 vcpu=0 op=12 result=0",
        )
    )
    assert not any("left with" in e.what for e in found.evidence)


def test_the_multicall_form_of_a_dropped_table(tmp_path: Path) -> None:
    """A flagged count of nothing is left by releases that drop old page tables so (XSA-45)."""
    found = run(log(tmp_path, "sample dom=1 vcpu=0 op=mmu_update a0=0 a1=0x80000000 a2=0 on_insn=1"))
    assert "4.1.5" not in found.left
    assert {"4.1.6", "4.3.0", "4.22.0"} <= set(found.left)


@pytest.mark.parametrize(
    ("forms", "peaks", "left"),
    [
        ({(0x20F101, 3, True): 12}, {}, ["3.2.0..4.2.5"]),
        ({(0x2800E, 3, True): 12}, {}, ["4.8.0.."]),
        ({(0x2800E, 2, True): 12}, {}, ["3.4.0..4.7.6"]),
        ({(0x2800E, 5, True): 12}, {}, ["3.4.0.."]),  # a form that is not listed proves nothing
        ({(0x22202, 2, False): 12}, {}, ["4.3.0..4.6.6"]),
        ({(0x81102, 4, True): 12}, {}, ["3.3.0..4.0.1"]),
        ({(0x10F005, 4, False): 12}, {(0x10F005, 3): (0x3F, 40)}, ["4.0.0.."]),
        ({(0x10F005, 4, False): 12}, {(0x10F005, 2): (0x90001, 40)}, ["4.0.0..4.17.7"]),
        ({(0x1F001, 1, False): 12}, {}, ["3.2.0..3.3.0"]),
        ({(0xABCDE, 1, False): 12}, {}, ["3.0.2.."]),
    ],
)
def test_records(forms: dict[tuple[int, int, bool], int], peaks: dict[tuple[int, int], tuple[int, int]], left: list[str]) -> None:
    found = Identifier().conclude([e for e, _, _ in forms], forms, peaks)
    assert set(found.left) == expand(tuple(left))


def test_records_that_contradict_each_other_are_named() -> None:
    found = Identifier().conclude([0x20F101, 0x20100D], {(0x20F101, 3, True): 12, (0x20100D, 1, True): 36}, {})
    assert found.left == ()
    assert found.contradiction() == (
        "its records contradict each other: no one release can have written both TRC_PV_HYPERCALL (0x20f101) (byte 12) "
        "and TRC_PV_HYPERCALL_V2 (0x20100d) (byte 36)"
    )


def test_numbers_that_are_recorded() -> None:
    """Up to 4.16 a number is tested before it is recorded."""
    seen = Identifier()
    seen._calls.numbers[999] = (0, 24, None)
    assert set(seen.conclude([0x20100D]).left) == expand(("4.17.0..",))
    seen = Identifier()
    seen._calls.numbers[41] = (0, 24, None)  # dm_op is of 4.9; up to 4.7 the handler is not looked at
    assert set(seen.conclude([0x20100D]).left) == expand(("4.3.0..4.7.6", "4.9.0.."))
    assert set(seen.conclude([]).left) == set(possible(()))


@pytest.mark.parametrize("name", ["bare/bare-4.17.7.txt.zst", "bare/barehvm64-4.17.7.txt.zst"])
@pytest.mark.parametrize("version", ["3.3.0", "4.1.6.1", "4.22.0"])
def test_whole_columns_and_single_rows_agree(name: str, version: str, monkeypatch: pytest.MonkeyPatch) -> None:
    kept: list[tuple[str, int, States, States]] = []
    whole = identify_pairs.judge_pairs

    def spy(v: str, caller: str, number: int, call: States, found: States) -> tuple[np.ndarray, np.ndarray]:
        if not any(k[0] == caller and k[1] == number for k in kept):
            kept.append((caller, number, call, found))
        return whole(v, caller, number, call, found)

    monkeypatch.setattr(identify_calls.pairs, "judge_pairs", spy)
    run(SAMPLES / name)
    assert len(kept) >= 3
    for caller, number, call, found in kept:
        codes, why = whole(version, caller, number, call, found)
        for i in range(0, len(call), 7):
            row = np.array([i])
            one = whole(version, caller, number, call.take(row), found.take(row))
            assert (one[0][0], one[1][0]) == (codes[i], why[i]), (number, i)


def test_the_table_of_records() -> None:
    doc = load("trace_events.toml")
    for table in ("record", "fixed"):
        ids = [i for row in doc[table] for i in row["ids"]]
        assert len(ids) == len(set(ids))
    used: set[str] = set()
    for row in (*doc["record"], *doc["fixed"], *doc["numbers"], *doc["subcalls"]):
        spans = expand(tuple(row["releases"]))
        used |= set(row["cite"])
        forms = [expand(tuple(f["releases"])) for f in row.get("forms", ())]
        assert not forms or frozenset().union(*forms) == spans, row["name"]
        assert all(expand(tuple(p["releases"])) <= spans for p in row.get("peaks", ())), row["name"]
    assert used == set(doc["cite"])
    tags = {t for r in release.releases() for t in (r.tag, *r.also)}
    for name, cite in doc["cite"].items():
        assert {cite["tag"], *cite.get("also", [])} <= tags, name
        assert cite.get("expect") or cite.get("lacks"), name
