"""What every image format yields: vCPUs, memory, where it is damaged; and the bounded reading that they share."""

from __future__ import annotations

import struct
from dataclasses import dataclass, field
from typing import IO, TYPE_CHECKING, Final

if TYPE_CHECKING:
    from collections.abc import Mapping

    from xtrace.image.memory import Memory, Space

__all__ = ("PAGE", "PAGE_SHIFT", "Damage", "Damaged", "File", "Image", "Vcpu")

PAGE_SHIFT: Final = 12
PAGE: Final = 1 << PAGE_SHIFT


@dataclass(frozen=True, slots=True)
class Damage:
    """One thing that is wrong with an image: a clause, and the byte of the decompressed file where it stands."""

    text: str
    offset: int


class Damaged(Exception):
    """An image cannot be read beyond some point; what was read before it still stands."""

    def __init__(self, text: str, offset: int) -> None:
        """Say what is wrong and at which byte."""
        super().__init__(text)
        self.damage = Damage(text, offset)


@dataclass(frozen=True, slots=True)
class Vcpu:
    """One online vCPU as the image holds it.

    Attributes:
        number: of the vCPU (in a core: its place among the online ones).
        caller: ABI of the hypercalls it makes in the mode it is in (``schema.CALLERS``).
        bits: 64, 32 or 16: the mode its code runs in.
        mode_told: false where the image does not record the mode, so that it was concluded from the registers.
        kernel: it runs in its guest's kernel (None: not recorded). Only a kernel makes hypercalls.
        registers: raw values by name, always under the 64-bit names (``rip``, ``rax`` … ``rflags``, ``cs``, ``cr3``, …).
        space: page tables of the code that it runs.
        code_base: base of the code segment, added to rip outside 64-bit mode.
        offset: byte of its record in the decompressed file.
    """

    number: int
    caller: str
    bits: int
    kernel: bool | None
    registers: Mapping[str, int]
    space: Space
    code_base: int
    offset: int
    mode_told: bool = True

    @property
    def code(self) -> int:
        """Linear address of the instruction that it stands on."""
        rip = self.registers["rip"]
        return rip if self.bits == 64 else (rip + self.code_base) & 0xFFFFFFFF


@dataclass(slots=True)
class Image:
    """An opened image.

    Attributes:
        format: ``xl-save``, ``libxl``, ``libxc`` or ``core``.
        version: of the libxc stream (2, 3), of the core format (1).
        guest: ``pv64``, ``pv32``, ``hvm`` or ``pvh`` (a stream alone cannot tell PVH from HVM).
        xen: release as the image says: a series (``4.17``) in streams, mostly a point release in cores. None: not known.
        name: the guest's name, if the image has its configuration.
        vcpus: online vCPUs in order.
        damage: what was wrong; empty for an image that was read to its end.
    """

    format: str
    version: int
    guest: str
    xen: str | None
    memory: Memory
    vcpus: list[Vcpu] = field(default_factory=list)
    name: str | None = None
    damage: list[Damage] = field(default_factory=list)


class File:
    """Reads of an exact size from a seekable file; never more memory than what is asked for and there."""

    def __init__(self, file: IO[bytes], size: int) -> None:
        """Take a file of ``size`` bytes."""
        self.file, self.size = file, size

    def read(self, offset: int, n: int, what: str) -> bytes:
        """Return n bytes.

        Raises:
            Damaged: the file ends before.
        """
        if offset < 0 or offset + n > self.size:
            raise Damaged(f"the file ends inside {what}", self.size)
        self.file.seek(offset)
        data = self.file.read(n)
        if len(data) != n:
            raise Damaged(f"the file ends inside {what}", offset + len(data))
        return data

    def unpack(self, layout: str, offset: int, what: str) -> tuple[int, ...]:
        """Return the numbers of a `struct` layout."""
        return struct.unpack(layout, self.read(offset, struct.calcsize(layout), what))
