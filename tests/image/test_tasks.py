"""Parked tasks in built and real images: found, told from remnants, and never where they are not (docs/inspect.md)."""

from __future__ import annotations

import json
import os
import time
import tracemalloc
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.image.build import CODE, FRAME, PAGE, SELECTOR, Guest, Kernel, caught, core, parked, save
from tests.image.test_samples import expected, whole
from xtrace.cli.app import run
from xtrace.errors import InputError
from xtrace.image import frames as frames_mod
from xtrace.image import tasks as tasks_mod
from xtrace.image.frames import Scan, scan
from xtrace.image.opening import open_image
from xtrace.image.tasks import find_tasks
from xtrace.ingest.source import Source
from xtrace.inspection import Inspection, inspect
from xtrace.pipeline import Options
from xtrace.report.inspect_json import document

KINDS = [("pv64", 4), ("hvm64", 4), ("hvm64", 5), ("pv32", "pae"), ("hvm32", "pae"), ("hvm32", 2)]

#: Offsets in the stack of the frame and of a saved stack pointer below it.
AT, BELOW = {8: 0x2FF8, 4: 0x1800}, {8: 0x2800, 4: 0x1400}


def at(kind: str) -> tuple[int, int]:
    word = 8 if kind.endswith("64") else 4
    return AT[word], BELOW[word]


def looked(guest: Guest, tmp_path: Path, options: Options | None = None, image: bytes | None = None) -> Inspection:
    path = tmp_path / "image"
    path.write_bytes(image if image is not None else save(guest))
    return inspect(path, options, tasks=True)


def only(found: Inspection) -> dict[str, Any]:
    tasks = document(found)["tasks"]
    assert len(tasks) == 1
    task: dict[str, Any] = tasks[0]
    return task


def scanned(data: bytes, tmp_path: Path) -> Scan:
    path = tmp_path / "scanned"
    path.write_bytes(data)
    with Source(path) as source:
        return scan(open_image(source))


# -- a task that is there --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("kind", "paging"), KINDS)
def test_parked_task(kind: str, paging: int | str, tmp_path: Path) -> None:
    kernel = parked(kind, paging, *at(kind))
    found = looked(kernel.guest, tmp_path)
    task = only(found)
    assert int(task["frame"], 16) == kernel.stack + at(kind)[0]
    assert (task["live"], task["live_evidence"], task["parked"], task["evidence"]) == (True, "proved", True, "proved")
    assert (task["hypercall"], task["subop"], task["progress"], task["total"]) == ("memory_op", "XENMEM_populate_physmap", 5, 64)
    assert task["on_hypercall"] is True
    assert task["runs_on"] is None
    assert int(task["rip"], 16) == CODE[paging]
    assert int(task["stack"], 16) == kernel.stack + at(kind)[0] + len(FRAME[kernel.guest.word]) * kernel.guest.word
    scan_ = document(found)["scan"]
    assert (scan_["saved_frames"], scan_["on_hypercall"], scan_["undecided"]) == (1, 1, 0)


def test_in_a_core(tmp_path: Path) -> None:
    """Machine frames in the page tables, and pages in another place in the file."""
    kernel = parked("pv64", 4, *at("pv64"))
    data = core(kernel.guest)
    task = only(looked(kernel.guest, tmp_path, image=data))
    assert (task["live"], task["parked"], task["progress"]) == (True, True, 5)
    where = task["offset"]
    assert int.from_bytes(data[where + 80 : where + 88], "little") == 12  # rax on the page where it begins


def test_findings_name_the_task(tmp_path: Path) -> None:
    kernel = parked("pv64", 4, *at("pv64"))
    kernel.guest.vcpus[0] |= {"rip": CODE[4]}  # the vCPU stands on the instruction, too, and made no call yet
    found = looked(kernel.guest, tmp_path, Options(source="3.3.0", targets=("3.4.0",)))
    rows = document(found)["findings"]
    assert {row["offset"] for row in rows} == {only(found)["offset"]}
    assert {row["vcpu"] for row in rows} == {None}


@pytest.mark.parametrize(("chain", "evidence", "broken"), [(True, "proved", 8), (False, "inferred", 0)])
def test_the_weaker_evidence_decides(chain: bool, evidence: str, broken: int, tmp_path: Path) -> None:
    """Progress in the registers is proof, but of a call in progress only if the frame is proved to be in use."""
    kernel = parked("hvm64", 4, *at("hvm64"), rdi=5 << 4 | 1)
    if not chain:
        kernel.poke(kernel.sleep(BELOW[8]) + 32, 0)
    found = looked(kernel.guest, tmp_path, Options(source="3.3.0", targets=("3.4.0",)))
    task = only(found)
    assert (task["live"], task["live_evidence"], task["parked"], task["evidence"]) == (True, evidence, True, evidence)
    rows = document(found)["findings"]
    assert rows
    assert {row["evidence"] for row in rows} == {evidence}
    assert found.bits & 8 == broken
    assert (found.result.proved, found.result.inferred) == ((1, 0) if chain else (0, 1))


@pytest.mark.parametrize("jump", [True, False])
def test_a_jump_in_place_of_a_call(jump: bool, tmp_path: Path) -> None:
    """A function that ends in a jump to another leaves no return address of its own."""
    kernel = parked("pv64", 4, *at("pv64"))
    kernel.call(0x400, 0xE00)
    if jump:
        kernel.put_code(0xE20, b"\x0f\x85" + (0x300 - 0xE26).to_bytes(4, "little", signed=True))
    assert only(looked(kernel.guest, tmp_path))["live_evidence"] == ("proved" if jump else "inferred")


def test_fresh(tmp_path: Path) -> None:
    """An interrupt before the instruction was executed: a task, but in no call."""
    kernel = parked("pv64", 4, *at("pv64"), rcx=0x1234, rdi=6)
    task = only(looked(kernel.guest, tmp_path))
    assert (task["live"], task["parked"], task["evidence"]) == (True, False, "proved")


# -- remnants --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("kind", "paging"), KINDS)
def test_below_the_saved_pointer(kind: str, paging: int | str, tmp_path: Path) -> None:
    kernel = parked(kind, paging, at(kind)[0], at(kind)[0] + 0x300)
    found = looked(kernel.guest, tmp_path)
    task = only(found)
    assert (task["live"], task["live_evidence"], task["parked"]) == (False, "proved", False)
    assert document(found)["findings"] == []
    assert found.bits == 0


@pytest.mark.parametrize(("kind", "paging"), KINDS)
def test_no_saved_pointer(kind: str, paging: int | str, tmp_path: Path) -> None:
    kernel = parked(kind, paging, *at(kind))
    kernel.guest.page(0x28)[:] = bytes(PAGE)
    found = looked(kernel.guest, tmp_path)
    task = only(found)
    assert (task["live"], task["parked"], task["evidence"]) == (None, None, "unobservable")
    assert document(found)["findings"] == []
    assert found.bits == 4
    assert document(found)["scan"]["undecided"] == 1


def test_pointers_that_disagree(tmp_path: Path) -> None:
    """The structure of a task that is gone may still point into the stack that another one has now."""
    kernel = parked("pv64", 4, *at("pv64"))
    old = bytes(kernel.guest.pages[0x28])
    kernel.sleep(AT[8] + 0x300)
    kernel.guest.write(kernel.task + 0x1000, old, 0x29)
    task = only(looked(kernel.guest, tmp_path))
    assert (task["live"], task["parked"]) == (None, None)
    assert "disagree" in task["why"]


def test_no_stack_any_more(tmp_path: Path) -> None:
    kernel = parked("pv64", 4, *at("pv64"))
    for k in range(4):
        kernel.guest.map(kernel.stack + (k << 12), 0x38 + k)
        kernel.guest.page(0x38 + k)
    task = only(looked(kernel.guest, tmp_path))
    assert (task["live"], task["live_evidence"], task["parked"]) == (False, "proved", False)


def test_nothing_was_called_with_it(tmp_path: Path) -> None:
    kernel = parked("pv64", 4, *at("pv64"))
    kernel.poke(kernel.stack + AT[8] - 8, 0)
    task = only(looked(kernel.guest, tmp_path))
    assert (task["live"], task["live_evidence"], task["parked"]) == (False, "inferred", False)


def test_an_unknown_kernel(tmp_path: Path) -> None:
    kernel = parked("pv64", 4, *at("pv64"))
    kernel.put_code(0x100, bytes(32))
    found = looked(kernel.guest, tmp_path)
    assert only(found)["live"] is None
    assert document(found)["scan"]["kernel_known"] is False
    assert found.bits & 16


# -- a stack that a vCPU runs on -------------------------------------------------------------------------------------


@pytest.mark.parametrize(("kind", "paging"), KINDS)
@pytest.mark.parametrize("where", ["user", "above", "below"])
def test_running(kind: str, paging: int | str, where: str, tmp_path: Path) -> None:
    """What a task's structure says of its stack is out of date while it runs."""
    kernel = parked(kind, paging, *at(kind))
    end, frame = kernel.stack + kernel.size, at(kind)[0]
    vcpu = kernel.guest.vcpus[0]
    vcpu |= {"kernel_sp": end, "rip": kernel.code + 0x318, "user": int(where == "user")}
    vcpu["rsp"] = {"user": 0x7000, "above": end - 0x40, "below": kernel.stack + frame - 0x40}[where]
    word = kernel.guest.word
    kernel.guest.page(0x30)[0x40 : 0x40 + word] = end.to_bytes(word, "little")
    task = only(looked(kernel.guest, tmp_path))
    assert task["runs_on"] == 0
    assert (task["live"], task["live_evidence"]) == (where == "below", "proved")
    assert task["parked"] is (where == "below")


def test_on_an_interrupts_stack(tmp_path: Path) -> None:
    kernel = parked("hvm64", 4, *at("hvm64"))
    kernel.guest.page(0x30)[0x40:0x48] = (kernel.stack + kernel.size).to_bytes(8, "little")
    other = kernel.stack + 0x80000
    kernel.guest.vcpus[0]["rsp"] = other - 0x100
    assert only(looked(kernel.guest, tmp_path))["live"] is None
    for link, live in ((BELOW[8], True), (AT[8] + 0x400, False)):
        kernel.guest.write(other - 8, (kernel.stack + link).to_bytes(8, "little"), 0x39)
        task = only(looked(kernel.guest, tmp_path))
        assert (task["live"], task["runs_on"]) == (live, 0)
    assert task["live_evidence"] == "proved"


def test_not_known_what_a_vcpu_runs(tmp_path: Path) -> None:
    kernel = parked("hvm64", 4, *at("hvm64"))
    kernel.guest.vcpus[0]["gs_base"] = 0
    assert only(looked(kernel.guest, tmp_path))["live"] is None


# -- finding frames --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("kind", "paging"), KINDS)
def test_at_every_place(kind: str, paging: int | str, tmp_path: Path) -> None:
    """Over the edge of a page, too, whose two pages are nowhere near each other."""
    word, size = (8, 168) if kind.endswith("64") else (4, 60)
    for place in range(PAGE - size - 2 * word, PAGE + 2 * word, word):
        kernel = Kernel(caught(kind, paging, op=0), paging)
        address = kernel.frame(place, rax=12)
        got = scanned(save(kernel.guest), tmp_path)
        assert [(f.address, f.mapped, f.vcpu.registers["rax"]) for f in got.frames] == [(address, True, 12)], place
        assert (got.saved, got.on) == (1, 1)


@pytest.mark.parametrize(
    "change",
    [{"rip": 0x100}, {"rflags": 0x46}, {"rflags": 0x400246}, {"cs": 0xE033}, {"ss": 0x2B}, {"rsp": 0}],
    ids=lambda c: next(iter(c)),
)
def test_no_frame(change: dict[str, int], tmp_path: Path) -> None:
    kernel = Kernel(caught("pv64", 4, op=0), 4)
    kernel.frame(0x2000, rax=12, **change)
    assert scanned(save(kernel.guest), tmp_path).frames == []


def test_elsewhere_is_counted(tmp_path: Path) -> None:
    kernel = Kernel(caught("pv64", 4, op=0), 4)
    kernel.frame(0x2000, rip=CODE[4] + 2)
    kernel.frame(0x1000, rip=0xFFFFFFFF90000000)
    got = scanned(save(kernel.guest), tmp_path)
    assert (got.saved, got.on, got.unreadable, got.frames) == (2, 0, 1, [])


def twin(guest: Guest, kind: str, paging: int | str) -> set[int]:
    """Return the offsets of frames on the instruction, page by page and word by word (frames within one page only)."""
    word, names = guest.word, FRAME[guest.word]
    out = set()
    for pfn, page in guest.pages.items():
        values = [int.from_bytes(page[k : k + word], "little") for k in range(0, PAGE, word)]
        for first in range(len(values) - len(names) + 1):
            r = dict(zip(names, values[first : first + len(names)], strict=True))
            selector = r["cs"] & (0xFFFFFF00FFFFFFFF if kind == "pv64" else 0xFFFFFFFF if word == 8 else 0xFFFF)
            if selector != SELECTOR[kind][0] or r["rip"] != CODE[paging]:
                continue
            if not r["rflags"] & 2 or not r["rflags"] & 0x200 or r["rflags"] & ~0x3F7FD7:
                continue
            end = (first + len(names)) * word
            if word == 8 and ((r["rsp"] - end) % PAGE not in (0, 8) or r["ss"] & 0xFFFF not in (SELECTOR[kind][1], 0x18)):
                continue
            out.add((pfn << 12) + first * word)
    return out


@pytest.mark.parametrize(("kind", "paging"), [("pv64", 4), ("pv32", "pae"), ("hvm32", 2)])
@pytest.mark.parametrize("block", [1, 3, 512])
def test_twin(kind: str, paging: int | str, block: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Frames with flipped words, at any place: those that the slow version finds, whatever is read at once."""
    draw = np.random.default_rng(5)
    kernel = Kernel(caught(kind, paging, op=0), paging)
    word, names = kernel.guest.word, FRAME[kernel.guest.word]
    size = len(names) * word
    for page in range(4 if word == 8 else 2):
        for place in range(0, PAGE - size, size + word):
            address = kernel.frame(page * PAGE + place, rax=12)
            if draw.random() < 0.6:
                k = int(draw.integers(0, len(names)))
                kernel.poke(address + k * word, int(draw.integers(0, 1 << 31)))
    monkeypatch.setattr(type(open_image_pages(kernel, tmp_path)), "blocks", _sized(block))
    got = scanned(save(kernel.guest), tmp_path)
    slow = twin(kernel.guest, kind, paging)
    fast = set()
    for f in got.frames:
        k, offset = divmod(f.address - kernel.stack, PAGE)
        fast.add((kernel.pfns[k] << 12) + offset)
    assert fast == slow
    assert got.on == len(slow) > 5


def open_image_pages(kernel: Kernel, tmp_path: Path) -> Any:
    path = tmp_path / "pages"
    path.write_bytes(save(kernel.guest))
    with Source(path) as source:
        return open_image(source).memory.pages


def _sized(block: int) -> Any:
    from xtrace.image.pages import Pages

    whole_ = Pages.blocks
    return lambda self: whole_(self, block)


# -- hostile ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("fill", ["frames", "stacks", "rips", "edges", "random"])
def test_hostile(fill: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Pages full of fakes: time, memory and output stay bounded, and what was left out is said."""
    draw = np.random.default_rng(7)
    kernel = parked("pv64", 4, *at("pv64"))
    kernel.guest.page(0x28)[:] = bytes(PAGE)
    names = FRAME[8]
    for n in range(1500):
        pfn, base = 0x1000 + n, 0xFFFFC90010000000 + n * (0x4000 if fill == "stacks" else PAGE)
        if fill == "random":
            kernel.guest.page(pfn)[:] = draw.bytes(PAGE)
        else:
            words = np.zeros(512, np.uint64)
            for first in range(1, 512 - len(names), len(names)):
                end = base + (first + len(names)) * 8
                rip = CODE[4] if fill != "rips" else 0xFFFFFFFF90000000 + n * 64 + first
                words[first : first + len(names)] = [CODE[4]] * 10 + [12, 0, 0, 0, 0, 0, rip, 0xE030, 0x246, end, 0xE02B]
            if fill == "edges":
                words[:3] = [0x246, base + 24, 0xE02B]
            kernel.guest.page(pfn)[:] = words.tobytes()
        if fill != "random" and n < 400:
            kernel.guest.map(base, pfn)
    started = time.process_time()
    found = looked(kernel.guest, tmp_path)
    assert time.process_time() - started < 20
    doc = document(found)
    assert len(doc["tasks"]) <= frames_mod.MOST_FRAMES
    assert doc["scan"]["on_hypercall"] == len(doc["tasks"]) + doc["scan"]["not_listed"]
    assert found.bits & 4
    if fill != "random":
        assert doc["scan"]["not_listed"] + doc["scan"]["unreadable"] > 1000
    assert not any(task["parked"] for task in doc["tasks"])


def test_memory_is_bounded(tmp_path: Path) -> None:
    path = tmp_path / "big"
    guest = caught("pv64", 4, op=0)
    for n in range(6000):
        guest.page(0x1000 + n)[:] = bytes(PAGE)
    path.write_bytes(save(guest, batch=1024))
    with Source(path) as source:
        image = open_image(source)
        tracemalloc.start()
        find_tasks(image)
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
    assert peak < 24 << 20


def test_cut(tmp_path: Path) -> None:
    kernel = parked("pv64", 4, *at("pv64"))
    data = core(kernel.guest)
    for n in range(1, len(data), 4099):
        path = tmp_path / "cut"
        path.write_bytes(data[:n])
        with Source(path) as source:
            try:
                image = open_image(source)
            except InputError:
                continue
            find_tasks(image)


@pytest.mark.parametrize(("kind", "paging"), KINDS)
def test_flipped(kind: str, paging: int | str, tmp_path: Path) -> None:
    """Any byte of it may be wrong: tables, code, stack, registers."""
    draw = np.random.default_rng(11)
    data = np.frombuffer(save(parked(kind, paging, *at(kind)).guest), np.uint8)
    for n in (1, 3, 30, 300) * 10:
        wrong = data.copy()
        wrong[draw.integers(0, len(data), n)] = draw.integers(0, 256, n)
        path = tmp_path / "flipped"
        path.write_bytes(wrong.tobytes())
        with Source(path) as source:
            try:
                image = open_image(source)
            except InputError:
                continue
            for frame, life in find_tasks(image).found:
                assert frame.vcpu.registers["rip"]
                assert life.live is not None or life.evidence == "unobservable"


# -- output ----------------------------------------------------------------------------------------------------------


def test_text(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "image"
    kernel = parked("pv64", 4, *at("pv64"))
    path.write_bytes(save(kernel.guest))
    assert run(["inspect", str(path), "--tasks", "--from", "3.3.0", "--to", "3.4.0"]) & 12
    text = capfd.readouterr().out
    assert all(len(line) <= 80 for line in text.splitlines())
    assert text.startswith("Caught inside a hypercall: 0 of 1 vCPU and 1 task: the task with the stack at")
    assert f"task at {kernel.stack + AT[8]:#x}" in text


def test_without_tasks_nothing_changes(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "image"
    path.write_bytes(save(parked("pv64", 4, *at("pv64")).guest))
    run(["inspect", str(path), "--format", "json"])
    doc = json.loads(capfd.readouterr().out)
    assert "tasks" not in doc
    assert "scan" not in doc
    assert doc["findings"] == []


# -- real images -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("path", "row"), expected(), ids=lambda x: x.name if isinstance(x, Path) else "")
def test_no_false_alarm(path: Path, row: dict[str, Any], tmp_path: Path) -> None:
    image = whole(path, tmp_path)
    found, plain = inspect(image, tasks=True), inspect(image)
    doc = document(found)
    assert doc["tasks"] == []
    assert doc["scan"]["kernel_known"] == row["guest"].startswith("Linux")
    # The bare guests have no tasks; nothing is said of them.
    assert found.bits == plain.bits | (0 if doc["scan"]["kernel_known"] else 16)
    assert doc["findings"] == document(plain)["findings"]


@pytest.mark.skipif(not os.environ.get("XTRACE_CAPTURES"), reason="XTRACE_CAPTURES names no folder")
@pytest.mark.parametrize("name", ["lin.save.zst", "lin-idle.core.patch.zst"])
def test_every_sleeping_task_is_found(name: str, tmp_path: Path) -> None:
    """Of a real Linux: one saved pointer for each stack; no other word of all memory is taken for one."""
    image = whole(Path(os.environ["XTRACE_CAPTURES"]) / "images" / name, tmp_path)
    with Source(image) as source:
        opened = open_image(source)
        space = frames_mod.kernel_spaces(opened)[0]
        layout = frames_mod.frame_layouts("pv64")[0]
        vcpu = frames_mod.Vcpu(-1, "pv64", 64, True, {}, space, 0, 0)
        stacks = [0xFFFFC90040000000 + k * 0x4000 for k in range(0x800000 // 0x4000)]
        frames = [frames_mod.Frame(layout, floor, True, vcpu) for floor in stacks]
        lives = tasks_mod._Lives(opened, frames)
        counts = []
        for k in range(0, len(stacks), tasks_mod._MOST_STACKS):
            lives._frames = frames[k : k + tasks_mod._MOST_STACKS]
            counts += [len(pointers) for pointers, _ in lives._pointers().values()]
    assert max(counts) == 1
    assert sum(counts) > 40
