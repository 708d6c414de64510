"""Which saved frames are in use: the parked tasks of a saved guest, told from what is left over on its stacks.

Stacks are used again and again; a frame below the stack pointer of its stack is dead, however whole it looks. What tells, for a
frame that stands on a hypercall instruction (`xtrace.image.frames`):

* No stack is there any more: its address leads nowhere, or to another page. Dead, proved.
* A vCPU runs on that stack (its own stack pointer, the kernel stack that a PV guest registered with Xen, the stack's end in an HVM
  guest's per-CPU data). In user mode nothing on its kernel stack is in use. In the kernel its stack pointer decides; on an
  interrupt's stack the word at that one's end, which is where Linux links to the interrupted one.
* The task sleeps: its stack pointer is saved in its structure. It is found without symbols: a word in memory that points into
  the stack, to registers pushed by the kernel's switch routine. That routine shows itself: before the return address
  pushed ahead of those registers there is a call to code that pushes just so many registers, stores the stack pointer at a fixed
  offset, and loads another from the same offset (layouts/frames.toml). Below that pointer: dead, proved.

A frame above the stack pointer may still be a remnant inside a function's own variables. ``proved`` live takes a whole chain
of calls from the switch (or the vCPU's rip) up to the word below the frame (`xtrace.image.callchain`); ``inferred`` takes at
least a return address there, for whatever the interrupt called with that frame is not over while it is in use.
Where nothing tells, ``live`` is None: a stack whose pointer was not found, or several that contradict each other.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

import numpy as np

from xtrace.image.base import PAGE
from xtrace.image.callchain import Code
from xtrace.image.frames import Frame, Scan, kernel_spaces, scan, switch_routine

if TYPE_CHECKING:
    from collections.abc import Sequence

    import numpy.typing as npt

    from xtrace.image.base import Image, Vcpu

    U64 = npt.NDArray[np.uint64]

__all__ = ("Life", "Tasks", "find_tasks")

#: Size of a stack, and what it is aligned to, by bytes of a word (Linux arch/x86/include/asm/page_64_types.h, page_32_types.h
#: THREAD_SIZE; every kernel with a switch routine that is known here has it).
_STACKS: Final = {8: 0x4000, 4: 0x2000}

#: Saved pointers kept for one stack; stacks that are judged.
_MOST_SLOTS: Final = 16
_MOST_STACKS: Final = 64

#: Per-CPU data that is searched for the end of the running task's stack.
_PER_CPU: Final = 0x60000

#: Bytes that may be left free at a stack's end (Linux TOP_OF_KERNEL_STACK_PADDING).
_SPARE: Final = 16

#: push of a register, pushf
_PUSH: Final = frozenset((*range(0x50, 0x58), 0x9C))


@dataclass(frozen=True, slots=True)
class Life:
    """Whether a saved frame is in use.

    Attributes:
        live: None if it cannot be told.
        evidence: of that (DESIGN §2). why: one clause.
        runs_on: the vCPU that runs on this stack; None if none does or it is not known.
    """

    live: bool | None
    evidence: str
    why: str
    runs_on: int | None = None


@dataclass(slots=True)
class Tasks:
    """The frames on a hypercall instruction, each with what is known of it; ``scan`` counts the rest."""

    scan: Scan
    found: list[tuple[Frame, Life]]


@dataclass(frozen=True, slots=True)
class _Slot:
    """A saved stack pointer: registers pushed by the switch routine, whose return address is ``back``."""

    pointer: int
    back: int
    above: int  # first word above that return address


def find_tasks(image: Image) -> Tasks:
    """Find the saved frames of an image and say which are in use; its source must be open."""
    found = scan(image)
    if not found.frames:
        return Tasks(found, [])
    return Tasks(found, _Lives(image, found.frames).all())


class _Lives:
    """Judges the frames of one image."""

    def __init__(self, image: Image, frames: Sequence[Frame]) -> None:
        self._image, self._frames = image, frames
        layout = frames[0].layout
        self._word, self._mask, self._stack = layout.word, layout.mask, _STACKS[layout.word]
        self._memory = image.memory
        self._space = next((f.vcpu.space for f in frames), kernel_spaces(image)[0])
        self._code = Code(self._memory, self._space, self._word)
        self._switches: dict[int, int] = {}  # switch routine -> registers that it pushes; 0: it is none
        self._per_cpu: dict[int, U64] = {}

    def all(self) -> list[tuple[Frame, Life]]:
        pointers = self._pointers()
        out = []
        for frame in self._frames:
            life = self._life(frame, pointers)
            if self._code.spent and life.evidence != "proved":
                life = Life(None, "unobservable", "there is too much to follow in this image", life.runs_on)
            out.append((frame, life))
        return out

    def _floor(self, frame: Frame) -> int:
        return frame.address & ~(self._stack - 1)

    def _life(self, frame: Frame, pointers: dict[int, tuple[list[int], bool]]) -> Life:
        if not frame.mapped:
            return Life(False, "proved", "no stack is mapped at its address any more")
        floor = self._floor(frame)
        if floor not in pointers:
            return Life(None, "unobservable", f"there are more than {_MOST_STACKS} stacks with such frames")
        unsure = None
        for vcpu in self._image.vcpus:
            runs = self._runs(vcpu, frame)
            if runs:
                return self._running(vcpu, frame)
            if runs is None and unsure is None:
                unsure = vcpu.number
        if unsure is not None:
            return Life(None, "unobservable", f"it is not known which task vCPU {unsure} runs")
        return self._sleeping(frame, *pointers[floor])

    # -- a stack that a vCPU runs on ---------------------------------------------------------------------------------

    def _runs(self, vcpu: Vcpu, frame: Frame) -> bool | None:
        """Say whether a vCPU's current task has the stack of a frame."""
        r, floor = vcpu.registers, self._floor(frame)
        if vcpu.kernel is not False and floor <= r["rsp"] & self._mask < floor + self._stack:
            return True
        if vcpu.caller.startswith("pv"):
            # Linux registers the end of each task's stack when it switches to it (stack_switch).
            return floor < r["kernel_sp"] & self._mask <= floor + self._stack
        words = self._cpu_data(vcpu)
        if not len(words):
            return None
        # The end of the stack, less what some kernels leave free there.
        gap = words.dtype.type(floor + self._stack & self._mask) - words
        return bool((gap <= words.dtype.type(_SPARE)).any())

    def _cpu_data(self, vcpu: Vcpu) -> U64:
        """Return the words of a vCPU's per-CPU data: what its segment register for the kernel points to."""
        if vcpu.number not in self._per_cpu:
            names = ("gs_base", "shadow_gs", "gs_base_kernel", "gs_base_user") if self._word == 8 else ("fs_base",)
            low = 1 << (8 * self._word - 1)
            parts: list[bytes] = []
            for base in dict.fromkeys(vcpu.registers.get(n, 0) & self._mask for n in names):
                for at in range(base & ~(PAGE - 1), (base & ~(PAGE - 1)) + _PER_CPU, PAGE):
                    page = self._memory.read(at, PAGE, self._space) if base >= low and at <= self._mask else None
                    if page is None:
                        break
                    parts.append(page)
            self._per_cpu[vcpu.number] = np.frombuffer(b"".join(parts), f"<u{self._word}")
        return self._per_cpu[vcpu.number]

    def _running(self, vcpu: Vcpu, frame: Frame) -> Life:
        n, rsp = vcpu.number, vcpu.registers["rsp"] & self._mask
        if vcpu.kernel is False:
            return Life(False, "proved", f"its task runs on vCPU {n} in user mode: nothing on its kernel stack is in use", n)
        floor = self._floor(frame)
        if floor <= rsp < floor + self._stack:
            if rsp > frame.address:
                return Life(False, "proved", f"it is below the stack pointer of vCPU {n}, which runs on that stack", n)
            life = self._above(frame, rsp, vcpu.registers["rip"] & self._mask, f"vCPU {n} runs on that stack")
            return Life(life.live, life.evidence, life.why, n)
        # On the stack of an interrupt: its last word links to the interrupted one (Linux asm/irq_stack.h).
        top = (rsp | (self._stack - 1)) + 1 - self._word
        raw = self._memory.read(top, self._word, self._space)
        link = int.from_bytes(raw, "little") if raw is not None else 0
        if not floor <= link < floor + self._stack:
            return Life(None, "unobservable", f"its task runs on vCPU {n}, whose stack pointer is elsewhere", n)
        if link > frame.address:
            return Life(False, "proved", f"it is below the stack pointer that vCPU {n} left when it took an interrupt", n)
        life = self._above(frame, link, None, f"vCPU {n} left that stack for an interrupt's")
        return Life(life.live, life.evidence, life.why, n)

    # -- a stack whose task sleeps -----------------------------------------------------------------------------------

    def _sleeping(self, frame: Frame, pointers: list[int], more: bool) -> Life:
        slots = [slot for pointer in pointers if (slot := self._slot(pointer)) is not None]
        if not slots:
            return Life(None, "unobservable", "no saved stack pointer of that stack was found")
        lives = [self._slept(frame, slot) for slot in slots]
        if len({life.live for life in lives}) > 1 or more:
            return Life(None, "unobservable", "several saved stack pointers lead into that stack, and they disagree")
        return min(lives, key=lambda life: life.evidence == "proved")

    def _slept(self, frame: Frame, slot: _Slot) -> Life:
        if slot.pointer > frame.address:
            return Life(False, "proved", "it is below the saved stack pointer of the task that has that stack")
        return self._above(frame, slot.above, slot.back, "the task that has that stack sleeps further down")

    def _above(self, frame: Frame, pointer: int, inner: int | None, what: str) -> Life:
        """Judge a frame that is above its stack's pointer.

        Args:
            frame: it.
            pointer: lowest word of the stack that may hold a return address.
            inner: an address in the innermost function; None if it is on another stack.
            what: why that is its stack's pointer.
        """
        n = (frame.address - pointer) // self._word
        raw = self._memory.read(pointer, n * self._word, self._space) if n > 0 else None
        if raw is None:
            return Life(None, "unobservable", "the stack below it is not in the image")
        stack = np.frombuffer(raw, f"<u{self._word}").tolist()
        if not self._code.is_return(stack[-1]):
            return Life(False, "inferred", f"{what}, and nothing was called with it: no return address is below it")
        if inner is not None and self._code.leads(inner, stack):
            return Life(True, "proved", f"{what}, and a whole chain of calls leads there from it")
        return Life(True, "inferred", f"{what}, and a return address is below it")

    def _slot(self, pointer: int) -> _Slot | None:
        """Return what a word points to, if it is registers pushed by the kernel's switch routine."""
        raw = self._memory.read(pointer, 16 * self._word, self._space) if pointer % self._word == 0 else None
        if raw is None:
            return None
        for n, back in enumerate(np.frombuffer(raw, f"<u{self._word}").tolist()):
            routine = self._code.called(back)
            if routine is not None:
                if self._pushed(routine) != n or n == 0:
                    return None
                return _Slot(pointer, back, pointer + (n + 1) * self._word)
        return None

    def _pushed(self, routine: int) -> int:
        """Return how many registers a switch routine pushes before it stores the stack pointer; 0 if it is none."""
        if routine not in self._switches:
            self._switches[routine] = _switch(self._code.read(routine, 48) or b"", self._word)
        return self._switches[routine]

    def _pointers(self) -> dict[int, tuple[list[int], bool]]:
        """Return the saved stack pointers that lead into each stack (by its lowest address), and whether there are more."""
        floors = sorted({self._floor(f) for f in self._frames if f.mapped})[:_MOST_STACKS]
        if not floors:
            return {}
        dtype = np.dtype(f"<u{self._word}")
        starts = np.array(floors, dtype)
        # Each word of a stack is looked at once, however many point to it.
        tried = np.zeros((len(floors), self._stack // self._word), bool)
        kept: list[list[int]] = [[] for _ in floors]
        low, span = dtype.type(floors[0]), dtype.type((floors[-1] - floors[0] + self._stack) & self._mask)
        for _, data in self._memory.pages.blocks():
            flat = data.view(dtype).reshape(-1)
            near = np.unique(flat[(flat - low) < span])
            at = np.searchsorted(starts, near, side="right") - 1
            offset = near - starts[at]
            inside = (offset < self._stack) & (offset % self._word == 0)
            at, offset = at[inside], (offset[inside] // self._word).astype(np.intp)
            fresh = ~tried[at, offset]
            tried[at, offset] = True
            for k, word in zip(at[fresh].tolist(), offset[fresh].tolist(), strict=True):
                pointer = floors[k] + word * self._word
                if len(kept[k]) <= _MOST_SLOTS and self._slot(pointer) is not None:
                    kept[k].append(pointer)
        return {floor: (found[:_MOST_SLOTS], len(found) > _MOST_SLOTS) for floor, found in zip(floors, kept, strict=True)}


def _switch(code: bytes, word: int) -> int:
    """Return how many registers a switch routine pushes before it stores the stack pointer; 0 if the code is none."""
    found = switch_routine(code, word)
    if found is None:
        return 0
    before = code[: found[0]].removeprefix(b"\xf3\x0f\x1e\xfa" if word == 8 else b"\xf3\x0f\x1e\xfb")  # endbr
    n = k = 0
    while k < len(before):
        if word == 8 and before[k] == 0x41:  # r8 to r15
            k += 1
        if k == len(before) or before[k] not in _PUSH:
            return 0
        n, k = n + 1, k + 1
    return n
