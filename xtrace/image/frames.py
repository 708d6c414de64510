"""Saved register frames in a guest's memory that stand on a hypercall instruction (layouts/frames.toml).

An event that interrupts a kernel's own code leaves a frame on the kernel stack: the registers, then what the processor (or
Xen, for a PV guest) pushes. A task that Xen's event took out of a preempted hypercall, and that the kernel then put to sleep,
is found by that frame: its rip is the hypercall instruction.

All pages are looked at as arrays of words. A frame is taken for one when

* its code selector is the kernel's, its flags are possible (bit 1 set, reserved bits clear, interrupts on: an event came);
* 64 bits: its rsp points to the frame's own end (the processor and Xen push onto the interrupted stack, aligned to 16 bytes),
  which also gives the frame's address; that address must lead back, through page tables, to the page where it was found;
* 32 bits: kernel code's frame holds no esp; the address is that of the kernel's mapping of all memory;
* the bytes at its rip, through page tables, are a hypercall instruction.

Frames of user code are not looked for: Xen takes no hypercall from there (a 64-bit PV guest's ``syscall`` in user mode is a call
to its own kernel). Nothing is said here of whether the frame is still in use: see `xtrace.image.tasks`.
"""

from __future__ import annotations

import tomllib
from dataclasses import dataclass, field, replace
from functools import cache
from importlib.resources import files
from typing import TYPE_CHECKING, Any, Final

import numpy as np

from xtrace.image.base import PAGE, PAGE_SHIFT, Vcpu
from xtrace.image.insn import stand
from xtrace.image.memory import pv_space

if TYPE_CHECKING:
    import numpy.typing as npt

    from xtrace.image.base import Image
    from xtrace.image.memory import Memory, Space

    U64 = npt.NDArray[np.uint64]
    Rows = npt.NDArray[np.intp]

__all__ = ("Frame", "FrameLayout", "Scan", "frame_layouts", "kernel_spaces", "scan", "switch_routine")

#: Frames on the instruction that are looked at one by one; different values of rip whose code is read; frames over a page's edge.
MOST_FRAMES: Final = 256
MOST_CODE: Final = 4096
MOST_EDGES: Final = 1 << 14

#: Page tables that kernel addresses are looked up in.
MOST_SPACES: Final = 8

#: rflags: bits 3, 5, 15 and 22 and above are always 0, bit 1 is always 1; IF.
_CLEAR: Final = ~0x3F7FD7 & 0xFFFFFFFFFFFFFFFF
_SET: Final = 0x202

#: An address below is taken for none.
_LOWEST: Final = 0x1000


@cache
def _table() -> dict[str, Any]:
    """Return layouts/frames.toml."""
    return tomllib.loads(files("xtrace.image").joinpath("layouts", "frames.toml").read_text(encoding="utf-8"))


@dataclass(frozen=True, slots=True)
class FrameLayout:
    """One kind of frame: names of its words, and how to recognise it; see layouts/frames.toml."""

    caller: str
    word: int
    registers: tuple[str, ...]
    code: tuple[int, ...]
    stack: tuple[int, ...]
    code_mask: int
    bases: tuple[int, ...]

    @property
    def size(self) -> int:
        """Bytes of a frame."""
        return len(self.registers) * self.word

    @property
    def mask(self) -> int:
        """All bits of a word."""
        return (1 << 8 * self.word) - 1


@cache
def frame_layouts(caller: str) -> tuple[FrameLayout, ...]:
    """Return the frames that kernels of one ABI leave."""

    def layout(t: dict[str, Any]) -> FrameLayout:
        words, code, stack, bases = (tuple(t[k]) for k in ("registers", "code", "stack", "bases"))
        return FrameLayout(caller, int(t["word"]), words, code, stack, int(t["code_mask"]), bases)

    return tuple(layout(t) for t in _table()["frame"] if t["caller"] == caller)


@dataclass(frozen=True, slots=True)
class Frame:
    """One saved frame on a hypercall instruction.

    Attributes:
        address: where it stands in the kernel's address space.
        mapped: that address leads to the page where the frame was found; if not, no stack is there any more.
        vcpu: its registers, as a stopped vCPU would have them; ``number`` is −1, ``offset`` the frame's in the file.
    """

    layout: FrameLayout
    address: int
    mapped: bool
    vcpu: Vcpu

    @property
    def end(self) -> int:
        """Address behind it."""
        return self.address + self.layout.size


@dataclass(slots=True)
class Scan:
    """What was found.

    Attributes:
        pages: looked at.
        saved: frames of interrupted kernel code, wherever they stand.
        unreadable: of those, frames whose code is not in the image, not mapped, or was not looked up.
        on: of those, frames on a hypercall instruction.
        frames: the first `MOST_FRAMES` of them.
        switch: the kernel puts tasks to sleep in a way that is known here (layouts/frames.toml); if not, no frame can be told to be
            in use, and that none was found says nothing.
    """

    pages: int = 0
    saved: int = 0
    unreadable: int = 0
    on: int = 0
    frames: list[Frame] = field(default_factory=list)
    switch: bool = False


def switch_routine(code: bytes, word: int, start: int = 0) -> tuple[int, int] | None:
    """Find the instructions that store a task's stack pointer and load the next one's.

    Returns:
        where they begin, and the offset of the field in a task's structure; None if there are none.
    """
    for entry in _table()["switch"]:
        store, load = bytes.fromhex(entry["store"]), bytes.fromhex(entry["load"])
        at = code.find(store, start) if entry["word"] == word else -1
        while at >= 0:
            behind = at + len(store) + 4
            field_ = code[behind - 4 : behind]
            # The same field of the two tasks.
            if code[behind : behind + len(load) + 4] == load + field_:
                return at, int.from_bytes(field_, "little")
            at = code.find(store, at + 1)
    return None


def kernel_spaces(image: Image) -> list[Space]:
    """Return the page tables that the vCPUs' kernels run on; kernel addresses mean the same in all of them."""
    out: list[Space] = []
    for vcpu in image.vcpus:
        space = vcpu.space
        if vcpu.caller.startswith("pv"):
            out.append(pv_space(8 if vcpu.caller == "pv64" else 4, vcpu.registers["cr3"], machine=space.machine))
        elif vcpu.kernel is False and space.levels >= 4:
            # With page table isolation the user's top table is the second of two pages (Linux arch/x86/mm/pti.c).
            out += [replace(space, root=space.root & ~PAGE), space]
        else:
            out.append(space)
        if len(out) >= 4 * MOST_SPACES:
            break
    return list(dict.fromkeys(out))[:MOST_SPACES]


def kernel_callers(image: Image) -> list[str]:
    """Return the ABI of the guest's kernels: a 64-bit one may have been stopped in a 32-bit program."""
    if image.guest.startswith("pv") and image.guest != "pvh":
        return [image.guest]
    return ["hvm64" if any(v.space.levels >= 4 for v in image.vcpus) else "hvm32"]


def scan(image: Image) -> Scan:
    """Look through all pages of an image; its source must be open.

    Memory that is needed does not grow with the image, nor with what a hostile one holds; time grows with the image only.
    """
    found = Scan(pages=len(image.memory.pages))
    spaces = kernel_spaces(image)
    for caller in kernel_callers(image):
        for layout in frame_layouts(caller):
            _Scanner(image.memory, spaces, layout, found).run()
    return found


class _Scanner:
    """One pass for one kind of frame."""

    def __init__(self, memory: Memory, spaces: list[Space], layout: FrameLayout, found: Scan) -> None:
        self._memory, self._spaces, self._layout, self._found = memory, spaces, layout, found
        self._code: dict[int, tuple[str, Space]] = {}
        self._edges = MOST_EDGES
        names = layout.registers
        self._rip, self._cs = names.index("rip"), names.index("cs")
        self._rsp = names.index("rsp") if "rsp" in names else None

    def run(self) -> None:
        for pfns, data in self._memory.pages.blocks():
            if not self._found.switch:
                self._found.switch = switch_routine(data.tobytes(), self._layout.word) is not None
            words = data.view(f"<u{self._layout.word}")
            rows, columns = self._candidates(words)
            if len(rows):
                self._block(pfns, words, rows, columns)

    def _candidates(self, words: U64) -> tuple[Rows, Rows]:
        """Return page and word of each code selector that may belong to a frame; the word may lie before the page (−1, −2)."""
        layout, width = self._layout, words.shape[1]
        flat = words.reshape(-1)
        selector = flat & flat.dtype.type(layout.code_mask & layout.mask)
        hit = selector == layout.code[0]
        for value in layout.code[1:]:
            hit |= selector == value
        at = np.flatnonzero(hit)
        rows, columns = at // width, at % width
        if self._rsp is not None:
            # What decides is rsp: a frame over the edge of a page is found on the page that has it.
            keep = columns + 2 < width
            rows, columns = rows[keep], columns[keep]
            every = np.arange(len(words))
            rows = np.concatenate([rows, every, every])
            columns = np.concatenate([columns, np.full(len(words), -1), np.full(len(words), -2)])
        good = self._word(words, rows, columns, 1, self._flags)
        rows, columns = rows[good], columns[good]
        if self._rsp is not None:
            good = self._own(words[rows, columns + 2], columns)
            rows, columns = rows[good], columns[good]
            good = self._word(words, rows, columns, 3, self._stack)
            rows, columns = rows[good], columns[good]
        good = self._word(words, rows, columns, -1, lambda w: w >= _LOWEST)
        return rows[good], columns[good]

    def _word(self, words: U64, rows: Rows, columns: Rows, by: int, test: Any) -> npt.NDArray[np.bool_]:
        """Test the word ``by`` words behind the selector; what is on another page passes."""
        at = columns + by
        here = (at >= 0) & (at < words.shape[1])
        out = np.ones(len(rows), bool)
        out[here] = test(words[rows[here], at[here]])
        return out

    def _flags(self, w: U64) -> npt.NDArray[np.bool_]:
        clear = w.dtype.type(_CLEAR & self._layout.mask)
        out: npt.NDArray[np.bool_] = ((w & clear) == 0) & ((w & w.dtype.type(_SET)) == _SET)
        return out

    def _stack(self, w: U64) -> npt.NDArray[np.bool_]:
        return np.isin(w & w.dtype.type(0xFFFF), self._layout.stack)

    def _own(self, rsp: U64, columns: Rows) -> npt.NDArray[np.bool_]:
        """Say whether rsp points behind the frame, as far as the page offset tells."""
        gap = (rsp - ((columns + 4) * self._layout.word).astype(rsp.dtype)) & rsp.dtype.type(PAGE - 1)
        top = rsp >> rsp.dtype.type(47)
        out: npt.NDArray[np.bool_] = ((gap == 0) | (gap == 8)) & (rsp >= _LOWEST) & ((top == 0) | (top >= 0xFF))
        return out

    def _block(self, pfns: npt.NDArray[np.int64], words: U64, rows: Rows, columns: Rows) -> None:
        found = self._found
        inside = columns >= 1
        rips = words[rows[inside], columns[inside] - 1]
        found.saved += len(rips)
        unique, inverse, counts = np.unique(rips, return_inverse=True, return_counts=True)
        where = [self._where(int(rip)) for rip in unique]
        on = np.array([w == "on" for w in where], bool)
        found.unreadable += int(counts[[w == "unreadable" for w in where]].sum())
        found.on += int(counts[on].sum())
        some = np.flatnonzero(inside)[on[inverse]][: max(MOST_FRAMES - len(found.frames), 0)]
        for k in some:
            self._take(pfns, words, int(rows[k]), int(columns[k]))
        for k in np.flatnonzero(~inside):
            if self._edges <= 0:
                found.unreadable += 1
                continue
            self._edges -= 1
            self._edge(pfns, words, int(rows[k]), int(columns[k]))

    def _where(self, rip: int) -> str:
        """Say where an address stands (`insn.Stand.where`), and remember it."""
        got = self._code.get(rip)
        if got is None:
            if len(self._code) >= MOST_CODE:
                return "unreadable"
            got = ("unreadable", self._spaces[0])
            for space in self._spaces:
                where = stand(self._memory, self._vcpu({"rip": rip}, space, 0)).where
                if where != "unreadable":
                    got = (where, space)
                    break
            self._code[rip] = got
        return got[0]

    def _vcpu(self, registers: dict[str, int], space: Space, offset: int) -> Vcpu:
        layout = self._layout
        return Vcpu(-1, layout.caller, 8 * layout.word, True, registers, space, 0, offset)

    def _addresses(self, pfn: int, words: U64, row: int, column: int) -> list[int]:
        """Return where the code selector may be in the kernel's address space."""
        layout = self._layout
        at = column * layout.word
        if self._rsp is not None:
            rsp = int(words[row, column + 2])
            behind = at + 4 * layout.word  # the frame's end on this page
            return [(rsp - ((rsp - behind) & (PAGE - 1)) - 3 * layout.word - layout.word) & layout.mask]
        return [a for b in layout.bases if (a := b + (pfn << PAGE_SHIFT) + at) <= layout.mask]

    def _read(self, pfn: int, words: U64, row: int, column: int) -> tuple[int, bool, dict[str, int] | None]:
        """Return address of a frame, whether it is mapped there, and its registers if they can be read."""
        layout = self._layout
        physical = (pfn << PAGE_SHIFT) + column * layout.word
        first = 0
        for n, address in enumerate(self._addresses(pfn, words, row, column)):
            start = address - self._cs * layout.word
            first = start if n == 0 else first
            for space in self._spaces:
                # rsp's word is on this page; the selector itself may be on the one before.
                shift = 2 * layout.word if self._rsp is not None else 0
                if start < 0 or self._memory.translate(address + shift, space) != physical + shift:
                    continue
                raw = self._memory.read(start, layout.size, space)
                if raw is not None:
                    values = np.frombuffer(raw, f"<u{layout.word}").tolist()
                    return start, True, {n: v for n, v in zip(layout.registers, values, strict=True) if n != "-"}
        return first, False, None

    def _take(self, pfns: npt.NDArray[np.int64], words: U64, row: int, column: int) -> None:
        """Keep a frame whose rip stands on the instruction."""
        layout, pfn = self._layout, int(pfns[row])
        address, mapped, registers = self._read(pfn, words, row, column)
        if registers is None:
            # What of it is on this page: enough to name it.
            registers = {name: 0 for name in layout.registers if name != "-"}
            for k, name in enumerate(layout.registers):
                if name != "-" and 0 <= column + k - self._cs < words.shape[1]:
                    registers[name] = int(words[row, column + k - self._cs])
        registers["cs"] &= 0xFFFF
        if self._rsp is None:
            registers["rsp"] = (address + layout.size) & layout.mask
        index = int(np.searchsorted(self._memory.pages.pfns, pfn))
        offset = int(self._memory.pages.offsets[index]) + (column - self._cs) * layout.word
        _, space = self._code[registers["rip"]]
        self._found.frames.append(Frame(layout, address, mapped, self._vcpu(registers, space, max(offset, 0))))

    def _edge(self, pfns: npt.NDArray[np.int64], words: U64, row: int, column: int) -> None:
        """Look at a frame whose rip is on the page before the one with its stack pointer."""
        layout, found = self._layout, self._found
        _, mapped, registers = self._read(int(pfns[row]), words, row, column)
        if not mapped or registers is None:
            return  # not a frame, or one on no stack any more: nothing of it can be read
        if registers["cs"] & layout.code_mask not in layout.code:
            return
        flags, rip = registers["rflags"], registers["rip"]
        if flags & _CLEAR & layout.mask or flags & _SET != _SET or rip < _LOWEST:
            return
        found.saved += 1
        where = self._where(rip)
        found.unreadable += where == "unreadable"
        if where == "on":
            found.on += 1
            if len(found.frames) < MOST_FRAMES:
                self._take(pfns, words, row, column)
