"""The libxc part of a migration stream: guest memory and vCPU contexts, versions 2 (4.6 to 4.13) and 3 (4.14 and later).

Record types and layouts: docs/specs/libxc-migration-stream.pandoc of RELEASE-4.17.0 and RELEASE-4.6.0 (version 3 adds
STATIC_DATA_END and the policy records; nothing that is read here differs). HVM context entries:
xen/include/public/hvm/save.h hvm_save_descriptor, arch-x86/hvm/save.h.

Only headers and page frame numbers are read; page contents stay in the file.
"""

from __future__ import annotations

import struct
from typing import TYPE_CHECKING, Final

import numpy as np

from xtrace.image.base import PAGE, PAGE_SHIFT, Damaged
from xtrace.image.pages import PageIndex
from xtrace.image.registers import context_size, hvm_vcpu, pv_vcpu

if TYPE_CHECKING:
    from xtrace.image.base import File, Vcpu

__all__ = ("ID", "MARKER", "Libxc")

MARKER: Final = b"\xff" * 8
ID: Final = b"XENF"
_VERSIONS: Final = (2, 3)

_END, _PAGE_DATA, _PV_INFO, _P2M, _VCPU_BASIC = range(5)
_HVM_CONTEXT, _CHECKPOINT = 9, 0xE
_LAST_TYPE: Final = 0x12
_OPTIONAL: Final = 1 << 31

_PV, _HVM = 1, 2

#: Page types of PAGE_DATA: 0 to 4 and 9 to 12 come with contents, 13 to 15 without, the others do not exist.
_HAS_DATA: Final = np.array([1, 1, 1, 1, 1, 0, 0, 0, 0, 1, 1, 1, 1, 0, 0, 0], bool)
_EXISTS: Final = np.array([1, 1, 1, 1, 1, 0, 0, 0, 0, 1, 1, 1, 1, 1, 1, 1], bool)

#: Records other than pages that a stream may have: a guest has at most 8192 vCPUs with a handful each.
_MOST_RECORDS: Final = 1 << 18

#: An HVM context is at most this long: 8192 vCPUs of about 5 KiB, some tens of entries each.
_MOST_CONTEXT: Final = 64 << 20

#: vCPUs of a guest (MAX_VIRT_CPUS), and pages of one PAGE_DATA record (libxc: 1024, MAX_BATCH_SIZE).
_MOST_VCPUS: Final = 8192
_MOST_PAGES: Final = 1 << 20

_HVM_END, _HVM_CPU = 0, 2


class Libxc:
    """Reads one stream from its image header on.

    Attributes:
        version: of the stream. guest_type: 1 PV, 2 HVM. xen: (major, minor) that wrote it. width: of a PV guest's word.
        vcpus: by number. index: pages so far. ended: the END record was read.
    """

    def __init__(self, file: File, offset: int) -> None:
        """Read both headers.

        Raises:
            Damaged: they are not those of a stream that can be read.
        """
        self.file = file
        marker, ident, version, options = struct.unpack(">8s4sIH6x", file.read(offset, 24, "the libxc header"))
        if marker != MARKER or ident != ID:
            raise Damaged("no libxc stream stands where one should", offset)
        if version not in _VERSIONS:
            raise Damaged(f"version {version} of the libxc stream is not known (2 and 3 are)", offset + 12)
        if options & 1:
            raise Damaged("the libxc stream is big-endian, which no x86 host writes", offset + 16)
        self.version = version
        self.guest_type, shift, major, minor = file.unpack("<IH2xII", offset + 24, "the libxc domain header")
        if self.guest_type not in (_PV, _HVM):
            raise Damaged(f"the libxc stream is of a guest of type {self.guest_type}, neither x86 PV nor x86 HVM", offset + 24)
        if shift != PAGE_SHIFT:
            raise Damaged(f"the libxc stream has pages of 2^{shift} bytes, not of 4096", offset + 28)
        self.xen = (major, minor)
        self.at = offset + 40
        self.width: int | None = None
        self.vcpus: dict[int, Vcpu] = {}
        self.index = PageIndex()
        self.ended = False
        self._records = 0

    @property
    def hvm(self) -> bool:
        """Whether the guest is HVM or PVH."""
        return self.guest_type == _HVM

    def run(self) -> bool:
        """Read records up to END or a checkpoint, where the stream that this one is embedded in goes on.

        Returns:
            whether it was END.

        Raises:
            Damaged: what follows cannot be read; everything before it was taken.
        """
        while True:
            kind, length = self.file.unpack("<II", self.at, "a libxc record (no END record was seen)")
            start, self.at = self.at, self.at + 8 + (length + 7 & ~7)
            if kind == _PAGE_DATA:
                self._page_data(start + 8, length)
                continue
            self._records += 1
            if self._records > _MOST_RECORDS:
                raise Damaged(f"there are more than {_MOST_RECORDS:,} records that hold no pages", start)
            if kind == _END:
                self.ended = True
                return True
            if kind == _CHECKPOINT:
                return False
            if kind == _PV_INFO:
                self._pv_info(start + 8, length)
            elif kind == _VCPU_BASIC:
                self._vcpu_basic(start + 8, length)
            elif kind == _HVM_CONTEXT:
                self._hvm_context(start + 8, length)
            elif kind > _LAST_TYPE and not kind & _OPTIONAL:
                raise Damaged(f"a libxc record of the unknown type {kind:#x}", start)
            if self.at > self.file.size:
                raise Damaged(f"the file ends inside a libxc record of type {kind:#x}", self.file.size)

    def _page_data(self, body: int, length: int) -> None:
        if length < 8:
            raise Damaged("a PAGE_DATA record without a count", body)
        (count,) = self.file.unpack("<I", body, "a PAGE_DATA record")
        if not 0 < count <= min((length - 8) // 8, _MOST_PAGES):
            raise Damaged(f"a PAGE_DATA record of {length} bytes says that it lists {count} pages", body)
        words = np.frombuffer(self.file.read(body + 8, 8 * count, "the page list of a PAGE_DATA record"), "<u8")
        types = (words >> np.uint64(60)).astype(np.int64)
        if not _EXISTS[types].all():
            bad = int(np.flatnonzero(~_EXISTS[types])[0])
            raise Damaged(f"a page of the unknown type {int(types[bad]):#x}", body + 8 + 8 * bad)
        has = _HAS_DATA[types]
        held = int(has.sum())
        first = body + 8 + 8 * count
        if 8 + 8 * count + PAGE * held != length:
            raise Damaged(f"a PAGE_DATA record of {length} bytes lists {held} pages with contents", body)
        offsets = np.full(count, -1, np.int64)
        offsets[has] = first + PAGE * np.arange(held, dtype=np.int64)
        whole = offsets + PAGE <= self.file.size
        self.index.add((words & np.uint64((1 << 52) - 1)).astype(np.int64)[whole], offsets[whole])
        if first + PAGE * held > self.file.size:
            raise Damaged("the file ends inside the pages of a PAGE_DATA record", self.file.size)

    def _pv_info(self, body: int, length: int) -> None:
        if length < 2:
            raise Damaged("an X86_PV_INFO record that is too short", body)
        width, levels = self.file.unpack("<BB", body, "the X86_PV_INFO record")
        if (width, levels) not in ((8, 4), (4, 3)):
            raise Damaged(f"a PV guest with words of {width} bytes and {levels} levels of page tables", body)
        self.width = width

    def _vcpu_basic(self, body: int, length: int) -> None:
        if self.width is None:
            raise Damaged("a vCPU of a PV guest before its X86_PV_INFO record", body)
        need = context_size("pv64" if self.width == 8 else "pv32")
        if length < 8 + need:
            raise Damaged(f"an X86_PV_VCPU_BASIC record of {length} bytes: {8 + need} are needed", body)
        (number,) = self.file.unpack("<I", body, "an X86_PV_VCPU_BASIC record")
        data = self.file.read(body + 8, need, "an X86_PV_VCPU_BASIC record")
        self._keep(pv_vcpu(number, data, self.width, body + 8, machine=False))

    def _keep(self, vcpu: Vcpu) -> None:
        if vcpu.number >= _MOST_VCPUS:
            raise Damaged(f"a vCPU of the number {vcpu.number}: no guest has as many", vcpu.offset)
        self.vcpus[vcpu.number] = vcpu

    def _hvm_context(self, body: int, length: int) -> None:
        end = body + length
        at = body
        if length > _MOST_CONTEXT:
            raise Damaged(f"an HVM_CONTEXT record of {length} bytes is too long to be one", body)
        for _ in range(_MOST_RECORDS):
            if at + 8 > end:
                break
            code, instance, size = self.file.unpack("<HHI", at, "the HVM_CONTEXT record")
            at += 8
            if code == _HVM_END:
                return
            if at + size > end:
                raise Damaged("an entry of the HVM_CONTEXT record is longer than the record", at - 8)
            if code == _HVM_CPU:
                need = context_size("hvm")
                if size < need:
                    raise Damaged(f"a CPU entry of {size} bytes in the HVM_CONTEXT record: {need} are needed", at - 8)
                self._keep(hvm_vcpu(instance, self.file.read(at, need, "the HVM_CONTEXT record"), at))
            at += size
        raise Damaged("the HVM_CONTEXT record has no end", end)
