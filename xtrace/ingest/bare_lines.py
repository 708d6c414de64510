"""What the lines of the bare guests look like, as patterns, and the three guests that print them (see `bare`)."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Final

__all__ = (
    "CONT32",
    "CONT64",
    "GUESTS",
    "HIGH_VCPU",
    "MHZ",
    "REST32",
    "REST64",
    "SNIFF_CALL",
    "SNIFF_START",
    "START",
    "VCALL",
    "VCALL_WORD",
    "WORD",
    "Guest",
)

N: Final = r"(0x[0-9a-fA-F]{1,16}|[0-9]{1,20})"
HIGH_VCPU: Final = 63
WORD: Final = r"^(CALL32|CALLH|CALL|CONT32|CONTH|CONT|V(?:[1-9]|[1-5][0-9]|6[0-3])CALL)(?:[ \r]|$)"
START: Final = r"^BARE(?:32| PVH64)? start xen=(\S+)(?: \S+)*? hcall_insn=(0x[0-9a-fA-F]{1,16})(?:[ \r]|$)"
MHZ: Final = r"^\(XEN\) (?:\[[^\]]*\] )?Detected ([0-9]{1,6})\.([0-9]{3}) MHz processor"
SNIFF_START: Final = re.compile(rb"(?m)^BARE(?:32| PVH64)? start xen=")
SNIFF_CALL: Final = re.compile(rb"(?m)^CALL(?:32|H)? xen=\S+ n=[0-9]+ name=")

VCALL_WORD: Final = re.compile(rb"V([0-9]{1,2})CALL ")

REGS64: Final = ("rdi", "rsi", "rdx", "r10")
REGS32: Final = ("ebx", "ecx", "edx", "esi")


def _fields(names: tuple[str, ...]) -> str:
    return "".join(f" {name}={N}" for name in names)


def _call(word: str, regs: tuple[str, ...]) -> str:
    return (
        rf"^{word} xen=(\S+) n=([0-9]{{1,18}}) name=.*? mode=\S+ op={N}{_fields(regs)}"
        rf" ret=(-?[0-9]{{1,19}}) retraw=\S+ pdone={N} samples=([0-9]{{1,18}}) tsc={N}-{N}\s*$"
    )


def _cont(word: str, regs: tuple[str, ...], rest: tuple[str, ...]) -> str:
    # What follows the arguments (other registers) must be there, but no event has a place for it.
    other = "".join(rf" {name}=\S+" for name in rest)
    return rf"^{word} n=([0-9]{{1,18}}) i=[0-9]+ tsc={N}{_fields(regs)}{other} pdone={N} mem=([0-9a-fA-Fx,]+)\s*$"


CONT64: Final = ("rip", "rax", "rdi", "rsi", "rdx", "r10", "r8", "r9")
CONT32: Final = ("eip", "eax", "ebx", "ecx", "edx", "esi", "edi")
REST64: Final = ("rcx", "r11", "rbx", "rbp", "cs", "rflags")
REST32: Final = ("ebp", "cs", "eflags")


@dataclass(frozen=True, slots=True)
class Guest:
    """One of the three guests: the words its lines begin with, and what they prove."""

    caller: str
    domid: int
    role: str
    kind: str
    call: str
    cont: str
    arch: str | None
    word_bytes: int


#: What follows CALL or CONT -> guest. A PV guest runs as dom0, the PVH guest as the first domU (console "(d1)").
GUESTS: Final = {
    "": Guest("pv64", 0, "control", "hypercall", _call("CALL", REGS64), _cont("CONT", CONT64, REST64), "x86_64", 8),
    "32": Guest("pv32", 0, "control", "hypercall", _call("CALL32", REGS32), _cont("CONT32", CONT32, REST32), None, 4),
    "H": Guest("hvm64", 1, "guest", "vmmcall", _call("CALLH", REGS64), _cont("CONTH", CONT64, REST64), "x86_64", 8),
}
VCALL: Final = rf"^V([0-9]+)CALL op={N} n={N} ret=(-?[0-9]{{1,19}}) tsc={N}-{N}\s*$"
