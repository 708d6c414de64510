"""vCPUs out of the records that hold them: PV ``vcpu_guest_context`` and HVM ``hvm_hw_cpu`` (layouts/x86.toml)."""

from __future__ import annotations

import tomllib
from dataclasses import dataclass
from functools import cache
from importlib.resources import files
from typing import TYPE_CHECKING, Final

from xtrace.image.base import Vcpu
from xtrace.image.memory import Space, hvm_space, pv_space

if TYPE_CHECKING:
    from collections.abc import Mapping

__all__ = ("context_size", "hvm_core_vcpu", "hvm_vcpu", "pv_vcpu")

#: VGCF_in_kernel of vcpu_guest_context.flags (RELEASE-4.17.0 xen/include/public/arch-x86/xen.h:173).
_IN_KERNEL: Final = 1 << 2
_CR0_PE, _CR0_PG = 1, 1 << 31
_CR4_PAE: Final = 1 << 5
_EFER_LMA: Final = 1 << 10
_VM86: Final = 1 << 17
#: The segment attributes of hvm_hw_cpu: L and D/B (RELEASE-4.17.0 xen/arch/x86/include/asm/x86_emulate.h segment_register).
_L, _DB = 1 << 9, 1 << 10


@dataclass(frozen=True, slots=True)
class _Layout:
    size: int
    fields: Mapping[str, tuple[int, int]]


@cache
def _layouts() -> dict[str, _Layout]:
    text = files("xtrace.image").joinpath("layouts", "x86.toml").read_text(encoding="utf-8")
    return {
        name: _Layout(int(t["size"]), {f: (int(at), int(n)) for f, (at, n) in t["fields"].items()})
        for name, t in tomllib.loads(text).items()
    }


def context_size(kind: str) -> int:
    """Return the bytes of a record of ``pv64``, ``pv32`` or ``hvm`` that must be there."""
    return _layouts()[kind].size


def _registers(kind: str, data: bytes) -> dict[str, int]:
    return {name: int.from_bytes(data[at : at + n], "little") for name, (at, n) in _layouts()[kind].fields.items()}


def pv_vcpu(number: int, data: bytes, width: int, offset: int, *, machine: bool) -> Vcpu:
    """Read a ``vcpu_guest_context``.

    Args:
        number: of the vCPU.
        data: the record, at least `context_size` bytes.
        width: bytes of a guest word, 8 or 4.
        offset: where the record stands in the file.
        machine: cr3 and page tables hold machine frames (a core).
    """
    kind = "pv64" if width == 8 else "pv32"
    registers = _registers(kind, data)
    kernel = bool(registers["flags"] & _IN_KERNEL)
    root = registers["cr3"]
    if width == 8 and not kernel and registers["cr1"]:
        root = registers["cr1"]  # a 64-bit PV guest's user half has tables of its own
    return Vcpu(number, kind, width * 8, kernel, registers, pv_space(width, root, machine=machine), 0, offset)


def hvm_vcpu(number: int, data: bytes, offset: int) -> Vcpu:
    """Read an ``hvm_hw_cpu``; the mode follows from cr0, efer and the code segment."""
    registers = _registers("hvm", data)
    cr0, efer, attr = registers["cr0"], registers["efer"], registers["cs_attr"]
    space = hvm_space(cr0, registers["cr3"], registers["cr4"], efer)
    flat = bool(cr0 & _CR0_PE) and not registers["rflags"] & _VM86
    if flat and efer & _EFER_LMA and attr & _L:
        bits = 64
    else:
        bits = 32 if flat and attr & _DB else 16
    # Real and virtual-8086 mode make no hypercalls (RELEASE-4.17.0 xen/arch/x86/hvm/hypercall.c hvm_hypercall).
    kernel = flat and (registers["ss_attr"] >> 5) & 3 == 0
    return Vcpu(
        number, "hvm64" if bits == 64 else "hvm32", bits, kernel, registers, space, registers["cs_base"], offset
    )  # fmt: skip


def hvm_core_vcpu(number: int, data: bytes, offset: int) -> Vcpu:
    """Read the ``vcpu_guest_context`` that stands for an HVM vCPU in a core.

    It has neither efer nor segment attributes (RELEASE-4.17.0 xen/arch/x86/domctl.c arch_get_info_guest), so long mode is
    taken for PAE paging with a register that no 32-bit guest can hold, or with page tables beyond 4 GiB.
    """
    registers = _registers("pv64", data)
    cr0, cr4 = registers["cr0"], registers["cr4"]
    wide = any(registers[r] >> 32 for r in ("rip", "rsp", "rax", "rbx", "rcx", "rdx", "rsi", "rdi", "rbp", "cr3"))
    high = any(registers[f"r{k}"] for k in range(8, 16))
    long = bool(cr0 & _CR0_PG and cr4 & _CR4_PAE and (wide or high))
    space: Space = hvm_space(cr0, registers["cr3"], cr4, _EFER_LMA if long else 0)
    bits = 64 if long else 32
    kernel = bool(cr0 & _CR0_PE) and not registers["rflags"] & _VM86 and registers["cs"] & 3 == 0
    return Vcpu(number, "hvm64" if long else "hvm32", bits, kernel, registers, space, 0, offset, mode_told=False)
