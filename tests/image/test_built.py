"""Images built to the specification: every kind of guest, container and paging, parked and not."""

from __future__ import annotations

import struct
from pathlib import Path

import build
import pytest

from xtrace.inspection import VcpuState, inspect
from xtrace.pipeline import Options


def look(tmp_path: Path, data: bytes, **options: object) -> VcpuState:
    path = tmp_path / "image"
    path.write_bytes(data)
    found = inspect(path, Options(**options))  # type: ignore[arg-type]
    assert found.image.damage == []
    return found.vcpus[0]


KINDS = [("pv64", 4), ("pv32", "pae"), ("hvm64", 4), ("hvm64", 5), ("hvm32", "pae"), ("hvm32", 2), ("hvm32", 0)]


@pytest.mark.parametrize("version", [2, 3])
@pytest.mark.parametrize(("kind", "paging"), KINDS)
def test_parked_in_every_stream(tmp_path: Path, kind: str, paging: int | str, version: int) -> None:
    word = 8 if kind.endswith("64") else 4
    guest = build.caught(kind, paging, args=(25 << 6 | 1, -1), data=build.reservation(word, 64))
    xen = (4, 17) if version == 3 else (4, 12)
    for data in (build.libxc(guest, version=version, xen=xen, stale=True), build.save(guest, version=version, xen=xen)):
        state = look(tmp_path, data)
        assert state.on_hypercall is True
        assert (state.parked, state.evidence) == (True, "proved")
        assert state.vcpu.caller == kind
        assert state.reading is not None
        assert (state.reading["subop"], state.reading["progress"], state.reading["total"]) == (
            "XENMEM_decrease_reservation",
            25,
            64,
        )
        assert state.memory["domid"] == 0x7FF0


@pytest.mark.parametrize(("kind", "paging"), KINDS)
def test_parked_in_a_core(tmp_path: Path, kind: str, paging: int | str) -> None:
    word = 8 if kind.endswith("64") else 4
    guest = build.caught(kind, paging, args=(25 << 6 | 1, -1), data=build.reservation(word, 64))
    path = tmp_path / "core"
    path.write_bytes(build.core(guest))
    found = inspect(path)
    assert found.image.xen == "4.17.7"
    assert found.image.format == "core"
    if (kind, paging) == ("hvm64", 4):
        assert "does not record the mode" in found.vcpus[0].why
    assert found.vcpus[0].vcpu.caller == kind
    assert found.vcpus[0].reading is not None
    assert found.vcpus[0].reading["progress"] == 25


@pytest.mark.parametrize("cpu_size", [1016, 1024, 1032])
def test_hvm_cpu_records_of_every_era(tmp_path: Path, cpu_size: int) -> None:
    guest = build.caught("hvm64", 4, args=(25 << 6 | 1, -1), data=build.reservation(8, 64))
    assert look(tmp_path, build.libxc(guest, cpu_size=cpu_size)).parked is True


@pytest.mark.parametrize(
    ("kind", "paging", "large"), [("hvm64", 4, 2), ("hvm64", 4, 3), ("hvm64", 5, 2), ("hvm32", "pae", 2), ("hvm32", 2, 2)]
)
def test_code_on_a_large_page(tmp_path: Path, kind: str, paging: int | str, large: int) -> None:
    guest = build.caught(kind, paging, args=(25 << 6 | 1, 0), large=large)
    state = look(tmp_path, build.libxc(guest))
    assert state.on_hypercall is True
    assert state.parked is True


def test_a_real_amd_and_intel_instruction(tmp_path: Path) -> None:
    for insn, name in ((b"\x0f\x01\xc1", "vmcall"), (b"\x0f\x01\xd9", "vmmcall")):
        guest = build.caught("hvm64", 4, args=(0x41, 0))
        guest.write(build.CODE[4], insn, 0x11)
        assert look(tmp_path, build.libxc(guest)).stand.insn == name


@pytest.mark.parametrize(("kind", "paging"), KINDS)
def test_past_and_elsewhere_are_not_parked(tmp_path: Path, kind: str, paging: int | str) -> None:
    size = len(build.INSN[kind])
    for at, where in ((size, "past"), (-1, "elsewhere"), (size + 1, "elsewhere")):
        guest = build.caught(kind, paging, args=(25 << 6 | 1, -1), at_insn=at)
        state = look(tmp_path, build.libxc(guest))
        assert (state.stand.where, state.on_hypercall, state.parked, state.evidence) == (where, False, False, "proved")
        assert state.reading is None


@pytest.mark.parametrize(("kind", "paging"), KINDS)
def test_user_mode_makes_no_hypercall(tmp_path: Path, kind: str, paging: int | str) -> None:
    guest = build.caught(kind, paging, args=(25 << 6 | 1, -1), user=True)
    state = look(tmp_path, build.libxc(guest))
    assert (state.stand.where, state.on_hypercall, state.parked) == ("user", False, False)


def test_user_half_of_a_64_bit_pv_guest_has_tables_of_its_own(tmp_path: Path) -> None:
    guest = build.caught("pv64", 4, user=True)
    table = build.Guest("pv64", 4, guest.pages, guest.types, guest.next_table)
    table.write(0x400000, b"\x90\x90\x0f\x05", 0x13)
    guest.pages, guest.types = table.pages, table.types
    guest.vcpus[0] |= {"rip": 0x400002, "user_cr3": table.root << 12 | 1}
    state = look(tmp_path, build.libxc(guest))
    assert (state.stand.where, state.stand.code[:2]) == ("user", b"\x0f\x05")


def test_fresh_call_is_no_continuation(tmp_path: Path) -> None:
    """A PV call not yet executed, by rcx; also when its structure still holds another call's progress."""
    guest = build.caught("pv64", 4, args=(6, -1), data=build.reservation(8, 64), executed=False)
    assert (look(tmp_path, build.libxc(guest)).parked, look(tmp_path, build.libxc(guest)).evidence) == (False, "proved")
    stale = bytes(64) + struct.pack("<Q", 7)
    guest = build.caught("pv64", 4, args=(11, -1), data=stale, executed=False)
    assert look(tmp_path, build.libxc(guest)).parked is False
    guest = build.caught("pv64", 4, args=(11, -1), data=stale)
    state = look(tmp_path, build.libxc(guest))
    assert (state.parked, state.evidence) == (True, "proved")
    assert state.reading is not None
    assert state.reading["progress"] == 7


def test_executed_without_progress_is_inferred(tmp_path: Path) -> None:
    guest = build.caught("pv64", 4, args=(6, -1), data=build.reservation(8, 64))
    state = look(tmp_path, build.libxc(guest))
    assert (state.parked, state.evidence) == (True, "inferred")


def test_on_its_way_back_to_the_instruction(tmp_path: Path) -> None:
    """Xen's SYSRET to a rewound rip leaves rip in rcx."""
    guest = build.caught("pv64", 4, args=(6, -1), data=build.reservation(8, 64))
    guest.vcpus[0] |= {"rcx": guest.vcpus[0]["rip"]}
    state = look(tmp_path, build.libxc(guest))
    assert (state.parked, state.evidence) == (True, "inferred")


def test_flags_that_changed_since_tell_nothing(tmp_path: Path) -> None:
    guest = build.caught("pv64", 4, args=(6, -1), data=build.reservation(8, 64), r11=0x202)
    assert (look(tmp_path, build.libxc(guest)).parked, look(tmp_path, build.libxc(guest)).evidence) == (None, "unobservable")


@pytest.mark.parametrize(("kind", "paging"), [("pv32", "pae"), ("hvm64", 4), ("hvm32", 0)])
def test_nothing_tells_for_the_others(tmp_path: Path, kind: str, paging: int | str) -> None:
    guest = build.caught(kind, paging, args=(6, -1), data=build.reservation(8 if kind == "hvm64" else 4, 64))
    path = tmp_path / "image"
    path.write_bytes(build.libxc(guest))
    found = inspect(path)
    assert (found.vcpus[0].parked, found.vcpus[0].evidence) == (None, "unobservable")
    assert len(found.result.findings) == 0


def test_a_call_that_is_never_left(tmp_path: Path) -> None:
    state = look(tmp_path, build.libxc(build.caught("hvm64", 4, op=17)))
    assert (state.parked, state.evidence) == (False, "inferred")
    state = look(tmp_path, build.libxc(build.caught("hvm64", 4, op=0x1234)))
    assert (state.on_hypercall, state.parked, state.reading) == (True, False, None)


def entry(word: int, op: int, result: int, *args: int) -> bytes:
    return struct.pack("<8Q" if word == 8 else "<8I", op, result, *(*args, 0, 0, 0, 0, 0, 0)[:6])


@pytest.mark.parametrize(("kind", "paging"), [("pv64", 4), ("pv32", "pae"), ("hvm64", 5), ("hvm32", 0)])
def test_multicall(tmp_path: Path, kind: str, paging: int | str) -> None:
    word = 8 if kind.endswith("64") else 4
    size = 8 * word
    at = build.DATA[paging]
    done = [entry(word, 17, 0x40011, 0)] * 3
    inner = entry(word, 12, 12, 5 << 6 | 6, at + 6 * size)
    rest = [entry(word, 17, 0, 0)] * 2
    data = b"".join([*done, inner, *rest]) + build.reservation(word, 32)
    guest = build.caught(kind, paging, op=13, args=(at + 3 * size, 3), data=data)
    state = look(tmp_path, build.libxc(guest))
    assert (state.parked, state.evidence) == (True, "proved")
    assert state.reading is not None
    assert (state.reading["progress"], state.reading["total"]) == (3, 6)
    assert state.reading["inner"]["subop"] == "XENMEM_populate_physmap"
    assert (state.reading["inner"]["progress"], state.reading["inner"]["total"]) == (5, 32)


def test_multicall_on_hvm_by_its_results_only(tmp_path: Path) -> None:
    def at(results: tuple[int, int], current: int) -> VcpuState:
        data = b"".join([entry(8, 17, r) for r in (*results, current, 0)])
        guest = build.caught("hvm64", 4, op=13, args=(build.DATA[4] + 128, 2), data=data)
        return look(tmp_path, build.libxc(guest))

    assert (at((5, 5), 0).parked, at((5, 5), 0).evidence) == (True, "inferred")
    # Results of an earlier round, or entries of another call: cannot be told.
    assert at((0, 0), 0).parked is None
    assert at((5, 5), 5).parked is None
    assert at((0, 0), 0).reading["progress"] is None  # type: ignore[index]


def test_mmuext_flag_and_done_counter(tmp_path: Path) -> None:
    guest = build.caught("pv64", 4, op=26, args=(0xFFFFFFFF80300000, 0x80000010, -1, 0x7FF0), data=struct.pack("<I", 48))
    state = look(tmp_path, build.libxc(guest))
    assert (state.parked, state.evidence) == (True, "proved")
    assert state.reading is not None
    assert (state.reading["progress"], state.reading["remaining"], state.reading["total"]) == (48, 16, 64)


def test_dm_op_through_its_buffers(tmp_path: Path) -> None:
    where = build.DATA[4]
    data = struct.pack("<QQ", where + 64, 24).ljust(64, b"\0") + struct.pack("<IIIHHQ", 12, 0, 77, 1, 0, 0x1000)
    guest = build.caught("pv64", 4, op=41, args=(3, 1, where), data=data)
    state = look(tmp_path, build.libxc(guest))
    assert state.memory == {"op": 12, "nr": 77, "mem_type": 1, "first_pfn": 0x1000}


def test_memory_that_is_not_there(tmp_path: Path) -> None:
    """The structure cannot be read: progress is known, the total is not."""
    guest = build.caught("hvm64", 4, args=(25 << 6 | 1, 0xFFFF800000000000))
    state = look(tmp_path, build.libxc(guest))
    assert state.parked is True
    assert state.reading is not None
    assert (state.reading["progress"], state.reading["total"]) == (25, None)


def test_code_that_is_not_there(tmp_path: Path) -> None:
    guest = build.caught("hvm64", 4)
    guest.vcpus[0]["rip"] = 0xFFFFFFFF90000000
    path = tmp_path / "image"
    path.write_bytes(build.libxc(guest))
    found = inspect(path)
    state = found.vcpus[0]
    assert (state.on_hypercall, state.parked, state.evidence) == (None, None, "unobservable")
    assert found.bits & 16


def test_several_vcpus_and_the_series(tmp_path: Path) -> None:
    guest = build.caught("hvm64", 4, args=(25 << 6 | 1, -1), data=build.reservation(8, 64))
    guest.vcpu(3, rip=build.CODE[4] + 3, rax=0)
    path = tmp_path / "image"
    path.write_bytes(build.save(guest, xen=(4, 13)))
    found = inspect(path)
    assert [(s.vcpu.number, s.parked) for s in found.vcpus] == [(0, True), (3, False)]
    assert found.result.sources[0] == "4.13.0"
    assert len(found.result.sources) > 3
    assert inspect(path, Options(source="4.13.2")).result.sources == ("4.13.2",)


def test_a_release_that_is_not_known(tmp_path: Path) -> None:
    guest = build.caught("hvm64", 4, args=(25 << 6 | 1, -1), data=build.reservation(8, 64))
    path = tmp_path / "image"
    path.write_bytes(build.libxc(guest, xen=(99, 1)))
    found = inspect(path, Options(targets=("4.22.0",)))
    assert found.vcpus[0].parked is True
    assert len(found.result.sources) > 20
    assert any("99.1" in note for note in found.result.notes)
    path.write_bytes(build.libxc(guest, xen=(0, 2)))  # a converted legacy stream
    found = inspect(path, Options(targets=("4.22.0",), source="4.4.4"))
    assert found.image.xen is None
    assert found.result.sources == ("4.4.4",)


def test_findings_are_those_of_analyze(tmp_path: Path) -> None:
    guest = build.caught("pv64", 4, args=(25 << 6 | 1, -1), data=build.reservation(8, 64))
    path = tmp_path / "image"
    path.write_bytes(build.libxc(guest))
    found = inspect(path, Options(targets=("3.3.0",)))
    assert found.bits & 8
    row = found.result.findings.row(0, named=True)
    assert (row["outcome"], row["evidence"], row["issuer"], row["migrates"]) == ("skips", "proved", "guest", True)
