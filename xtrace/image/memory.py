"""Guest memory by virtual address: page tables walked through the image's own pages.

Paging as the processor's manuals define it: off, 2 levels (4 KiB and 4 MiB pages, PSE-36), 3 (PAE, 2 MiB), 4 and 5 levels
(2 MiB and 1 GiB). What a saved guest adds (RELEASE-4.17.0):

* HVM, PVH: tables hold guest frame numbers, as the guest sees them.
* PV in a stream: libxc has replaced the machine frames in page tables and cr3 by guest frames
  (tools/libs/guest/xg_sr_save_x86_pv.c normalise_pagetable, write_one_vcpu_basic).
* PV in a core: both are machine frames; ``.xen_p2m`` says which guest frame each is (docs/misc/dump-core-format.txt).
* 32-bit PV: cr3 is "extended", a frame rotated by 20 bits (xen/include/public/arch-x86/xen-x86_32.h xen_cr3_to_pfn), and the
  root is a page of its own whose first four entries count.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

import numpy as np

from xtrace.image.base import PAGE, PAGE_SHIFT

if TYPE_CHECKING:
    import numpy.typing as npt

    from xtrace.image.pages import Pages

__all__ = ("Memory", "Space", "hvm_space", "pv_space")

_PRESENT: Final = 1
_PSE: Final = 1 << 7
#: Bits 51..12 of an entry; the guest's no-execute and protection-key bits are above.
_FRAME: Final = 0x000FFFFFFFFFF000

_CR0_PG: Final = 1 << 31
_CR4_PSE, _CR4_PAE, _CR4_LA57 = 1 << 4, 1 << 5, 1 << 12
_EFER_LMA: Final = 1 << 10


@dataclass(frozen=True, slots=True)
class Space:
    """One set of page tables.

    Attributes:
        levels: 0 (paging off: virtual is physical), 2, 3, 4 or 5.
        root: physical address of the top table; in a machine space the frame in it is a machine frame.
        machine: entries hold machine frames, to be looked up in the image's p2m.
        large: pages of 4 MiB are on (2 levels only).
    """

    levels: int
    root: int
    machine: bool = False
    large: bool = True


def pv_space(width: int, cr3: int, *, machine: bool) -> Space:
    """Return the page tables of a PV vCPU.

    Args:
        width: bytes of a guest word, 8 or 4.
        cr3: as in the image.
        machine: it holds machine frames (a core), not guest frames (a stream).
    """
    if width == 8:
        return Space(4, cr3 & _FRAME, machine)
    low = cr3 & 0xFFFFFFFF
    return Space(3, (((low >> 12) | (low << 20)) & 0xFFFFFFFF) << PAGE_SHIFT, machine)


def hvm_space(cr0: int, cr3: int, cr4: int, efer: int) -> Space:
    """Return the page tables of an HVM vCPU, by its control registers."""
    if not cr0 & _CR0_PG:
        return Space(0, 0)
    if not cr4 & _CR4_PAE:
        return Space(2, cr3 & 0xFFFFF000, large=bool(cr4 & _CR4_PSE))
    if not efer & _EFER_LMA:
        return Space(3, cr3 & 0xFFFFFFE0)
    return Space(5 if cr4 & _CR4_LA57 else 4, cr3 & _FRAME)


class Memory:
    """The memory of a saved guest.

    Args:
        pages: by guest frame number.
        machine: (machine frames ascending, guest frame of each), for PV cores.
    """

    def __init__(self, pages: Pages, machine: tuple[npt.NDArray[np.uint64], npt.NDArray[np.int64]] | None = None) -> None:
        """Take the pages of an image."""
        self.pages, self._machine = pages, machine

    def pfn(self, mfn: int) -> int | None:
        """Return the guest frame of a machine frame."""
        if self._machine is None:
            return None
        mfns, pfns = self._machine
        at = int(np.searchsorted(mfns, np.uint64(mfn)))
        return int(pfns[at]) if at < len(mfns) and int(mfns[at]) == mfn else None

    def physical(self, address: int, n: int) -> bytes | None:
        """Return n bytes at a guest-physical address, or None if a page of them is not in the image."""
        out = []
        while n > 0:
            page = self.pages.page(address >> PAGE_SHIFT)
            if page is None:
                return None
            at = address & (PAGE - 1)
            out.append(page[at : at + n])
            n -= len(out[-1])
            address += len(out[-1])
        return b"".join(out)

    def translate(self, address: int, space: Space) -> int | None:
        """Return the guest-physical address behind a virtual one, or None where nothing is mapped or a table is missing."""
        if space.levels == 0:
            return address & 0xFFFFFFFF
        if space.levels == 2:
            return self._walk32(address & 0xFFFFFFFF, space)
        if space.levels == 3:
            if address >> 32:
                return None
        else:
            top = 9 * space.levels + PAGE_SHIFT - 1
            if (address >> top) not in (0, (1 << (64 - top)) - 1):
                return None  # not canonical: no such address
        table = self._frame(space.root, space)
        if table is None:
            return None
        if space.levels == 3:
            # Not a full page: four entries of 8 bytes, 32-byte aligned (PV: at the start of the page).
            table |= space.root & (PAGE - 1)
        for level in range(space.levels, 0, -1):
            shift = PAGE_SHIFT + 9 * (level - 1)
            entry = self._entry(table + ((address >> shift) & 0x1FF) * 8, 8)
            if entry is None or not entry & _PRESENT:
                return None
            if level == 1 or (entry & _PSE and level in (2, 3) and not (level == 3 and space.levels == 3)):
                span = (1 << shift) - 1
                base = entry & _FRAME & ~span
                if space.machine:
                    frame = self.pfn((base | (address & span)) >> PAGE_SHIFT)
                    return None if frame is None else frame << PAGE_SHIFT | (address & (PAGE - 1))
                return base | (address & span)
            found = self._frame(entry & _FRAME, space)
            if found is None:
                return None
            table = found
        return None

    def _walk32(self, address: int, space: Space) -> int | None:
        entry = self._entry(space.root + (address >> 22) * 4, 4)
        if entry is None or not entry & _PRESENT:
            return None
        if entry & _PSE and space.large:
            high = (entry >> 13) & 0xFF  # PSE-36: bits 20..13 are bits 39..32 of the address
            return (high << 32) | (entry & 0xFFC00000) | (address & 0x3FFFFF)
        entry = self._entry((entry & 0xFFFFF000) + ((address >> 12) & 0x3FF) * 4, 4)
        if entry is None or not entry & _PRESENT:
            return None
        return (entry & 0xFFFFF000) | (address & 0xFFF)

    def _frame(self, address: int, space: Space) -> int | None:
        """Return the guest-physical address of a table."""
        if not space.machine:
            return address & ~(PAGE - 1)
        pfn = self.pfn(address >> PAGE_SHIFT)
        return None if pfn is None else pfn << PAGE_SHIFT

    def _entry(self, address: int, n: int) -> int | None:
        raw = self.physical(address, n)
        return None if raw is None else int.from_bytes(raw, "little")

    def read(self, address: int, n: int, space: Space) -> bytes | None:
        """Return n bytes at a virtual address, or None if any of them is not mapped or not in the image."""
        out = []
        while n > 0:
            physical = self.translate(address, space)
            if physical is None:
                return None
            part = self.physical(physical, min(n, PAGE - (address & (PAGE - 1))))
            if part is None:
                return None
            out.append(part)
            n -= len(part)
            address += len(part)
            if space.levels in (0, 2, 3):
                address &= 0xFFFFFFFF
        return b"".join(out)
