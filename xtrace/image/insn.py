"""Where a vCPU stands: on a hypercall instruction, just past one, or elsewhere; and what its registers would ask of Xen.

* 64-bit PV: ``syscall`` (0f 05) in the guest's kernel. In user mode it is a call to the guest's own kernel.
* 32-bit PV: ``int $0x82`` (cd 82).
* HVM, PVH: ``vmcall`` (0f 01 c1) and ``vmmcall`` (0f 01 d9), from the kernel, in protected or long mode.

Standing on the instruction proves nothing: a call that has not been made stands there too. Xen rewinds (PV) or does not
advance (HVM) rip for a continuation, so a vCPU just past the instruction has completed its call, whatever its registers hold.

A 64-bit PV guest shows more: SYSCALL itself writes rip + 2 into rcx and rflags into r11, and neither the continuation nor an
event delivered meanwhile changes them (RELEASE-4.17.0 xen/arch/x86/x86_64/entry.S lstar_enter, pv/hypercall.c
pv_hypercall, xen/arch/x86/hypercall.c hypercall_create_continuation). On its way back to the rewound rip Xen uses SYSRET, which
leaves rip itself in rcx (entry.S restore_all_guest), until the instruction runs again. Any other rcx proves that the
instruction has not been executed. The opposite is strong and no proof: a kernel that keeps neither register may hold the
values of an earlier call made from the same place.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    from xtrace.image.base import Vcpu
    from xtrace.image.memory import Memory

__all__ = ("Call", "Stand", "call_of", "executed", "stand")

_INSNS: Final = {
    "pv64": ((b"\x0f\x05", "syscall"),),
    "pv32": ((b"\xcd\x82", "int $0x82"),),
    "hvm64": ((b"\x0f\x01\xc1", "vmcall"), (b"\x0f\x01\xd9", "vmmcall")),
    "hvm32": ((b"\x0f\x01\xc1", "vmcall"), (b"\x0f\x01\xd9", "vmmcall")),
}
_ARGS: Final = {
    64: ("rdi", "rsi", "rdx", "r10", "r8", "r9"),
    32: ("rbx", "rcx", "rdx", "rsi", "rdi", "rbp"),
}
#: rflags bits that may differ from what SYSCALL saved: Xen merges IOPL in (arch_get_info_guest), RF is not kept.
_FLAGS: Final = 0xFFFFFFFF & ~(0x3000 | 1 << 16)


@dataclass(frozen=True, slots=True)
class Stand:
    """Where a vCPU stands.

    Attributes:
        where: ``on``, ``past``, ``elsewhere``, ``user`` (a hypercall instruction in user mode is none), ``unreadable``.
        insn: the hypercall instruction it is about, or None.
        code: up to 8 bytes at rip.
    """

    where: str
    insn: str | None
    code: bytes


@dataclass(frozen=True, slots=True)
class Call:
    """The hypercall that the registers name: number (rax, not checked) and the six arguments."""

    op: int
    args: tuple[int, ...]


def stand(memory: Memory, vcpu: Vcpu) -> Stand:
    """Say where a vCPU stands."""
    at = vcpu.code
    code = b""
    for n in (8, 4, 3, 2):
        got = memory.read(at, n, vcpu.space)
        if got is not None:
            code = got
            break
    known = _INSNS[vcpu.caller]
    if len(code) < min(len(i) for i, _ in known):
        return Stand("unreadable", None, code)
    for insn, name in known:
        if code.startswith(insn):
            return Stand("on" if vcpu.kernel is not False else "user", name, code)
    if vcpu.kernel is not False:
        for insn, name in known:
            if memory.read(at - len(insn), len(insn), vcpu.space) == insn:
                return Stand("past", name, code)
    return Stand("elsewhere", None, code)


def call_of(vcpu: Vcpu) -> Call:
    """Return what the registers would ask of Xen."""
    wide = vcpu.bits == 64
    mask = 0xFFFFFFFFFFFFFFFF if wide else 0xFFFFFFFF
    return Call(vcpu.registers["rax"] & mask, tuple(vcpu.registers.get(r, 0) & mask for r in _ARGS[64 if wide else 32]))


def executed(vcpu: Vcpu) -> bool | None:
    """Say whether the SYSCALL that a 64-bit PV vCPU stands on was executed; None where nothing tells."""
    if vcpu.caller != "pv64":
        return None
    r = vcpu.registers
    if r["rcx"] not in (r["rip"], (r["rip"] + 2) & 0xFFFFFFFFFFFFFFFF):
        return False
    return True if (r["r11"] ^ r["rflags"]) & _FLAGS == 0 else None
