"""Writes saved guests to the specification, field by field and slowly; shares nothing with the reader.

docs/specs/libxc-migration-stream.pandoc, libxl-migration-stream.pandoc, docs/misc/dump-core-format.txt, and the public
headers of Xen 4.17. A `Guest` has pages and page tables; `save`, `libxc` and `core` write it.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass, field

PAGE = 4096
P = 1  # present
RW_US = 6
PSE = 1 << 7

INSN = {"pv64": b"\x0f\x05", "pv32": b"\xcd\x82", "hvm64": b"\x0f\x01\xd9", "hvm32": b"\x0f\x01\xc1"}
ARG_NAMES = {8: ("rdi", "rsi", "rdx", "r10", "r8", "r9"), 4: ("rbx", "rcx", "rdx", "rsi", "rdi", "rbp")}


@dataclass
class Guest:
    """A guest under construction.

    ``kind``: pv64, pv32, hvm64, hvm32. ``paging``: 0, 2, "pae", 4, 5 (PV: 4 or "pae").
    """

    kind: str
    paging: int | str = 4
    pages: dict[int, bytearray] = field(default_factory=dict)
    types: dict[int, int] = field(default_factory=dict)  # page type of page tables in a PV stream
    next_table: int = 0x40
    root: int = 0
    vcpus: list[dict[str, int]] = field(default_factory=list)

    def __post_init__(self) -> None:
        if self.paging:
            self.root = self._table({4: 4, 5: 5, "pae": 3, 2: 2}[self.paging])

    @property
    def word(self) -> int:
        return 8 if self.kind.endswith("64") else 4

    def _table(self, level: int) -> int:
        pfn = self.next_table
        self.next_table += 1
        self.pages[pfn] = bytearray(PAGE)
        self.types[pfn] = level
        return pfn

    def page(self, pfn: int) -> bytearray:
        return self.pages.setdefault(pfn, bytearray(PAGE))

    def map(self, vaddr: int, pfn: int, large: int = 0) -> None:
        """Map one page (large: level at which a large page ends the walk)."""
        if not self.paging:
            assert vaddr >> 12 == pfn
            return
        if self.paging == 2:
            index = vaddr >> 22 & 0x3FF
            top = self.pages[self.root]
            if large:
                low, high = pfn << 12 & 0xFFC00000, pfn >> 20
                struct.pack_into("<I", top, index * 4, low | high << 13 | PSE | RW_US | P)
                return
            (entry,) = struct.unpack_from("<I", top, index * 4)
            if not entry:
                entry = self._table(1) << 12 | RW_US | P
                struct.pack_into("<I", top, index * 4, entry)
            struct.pack_into("<I", self.pages[entry >> 12], (vaddr >> 12 & 0x3FF) * 4, pfn << 12 | RW_US | P)
            return
        levels = 3 if self.paging == "pae" else int(self.paging)
        table = self.root
        for level in range(levels, 0, -1):
            index = vaddr >> (12 + 9 * (level - 1)) & 0x1FF
            if level == 1 or level == large:
                flags = RW_US | P | (PSE if level > 1 else 0) | 1 << 63
                struct.pack_into("<Q", self.pages[table], index * 8, pfn << 12 | flags)
                return
            (entry,) = struct.unpack_from("<Q", self.pages[table], index * 8)
            if not entry:
                flags = P if self.paging == "pae" and level == 3 else RW_US | P
                entry = self._table(level - 1) << 12 | flags
                struct.pack_into("<Q", self.pages[table], index * 8, entry)
            table = entry >> 12 & 0xFFFFFFFFFF

    def write(self, vaddr: int, data: bytes, pfn: int, *, large: int = 0, mapped: bool = True) -> None:
        """Put data at a virtual address, on the page ``pfn`` (a large page: on its first frames)."""
        at = vaddr & (PAGE - 1)
        assert at + len(data) <= PAGE
        self.page(pfn)[at : at + len(data)] = data
        if mapped:
            self.map(vaddr, pfn, large)

    def vcpu(self, number: int = 0, *, user: bool = False, **registers: int) -> None:
        self.vcpus.append({"number": number, "user": int(user), **registers})


# -- vCPU contexts ---------------------------------------------------------------------------------------------------


def pv64_context(r: dict[str, int], cr3: int) -> bytes:
    out = bytearray(5168)
    flags = 1 << 5 | (0 if r["user"] else 1 << 2)
    struct.pack_into("<Q", out, 512, flags)
    names = ["r15", "r14", "r13", "r12", "rbp", "rbx", "r11", "r10", "r9", "r8", "rax", "rcx", "rdx", "rsi", "rdi"]
    struct.pack_into("<15Q", out, 520, *(r.get(n, 0) for n in names))
    struct.pack_into("<Q", out, 648, r["rip"])
    struct.pack_into("<H", out, 656, 0xE033)
    struct.pack_into("<Q", out, 664, r.get("rflags", 0x246))
    struct.pack_into("<Q", out, 672, r.get("rsp", 0))
    struct.pack_into("<9Q", out, 4976, r.get("kernel_sp", 0), 0x80050033, r.get("user_cr3", 0), 0, cr3, 0x660, 0, 0, 0)
    return bytes(out)


def pv32_context(r: dict[str, int], cr3: int) -> bytes:
    out = bytearray(2800)
    struct.pack_into("<I", out, 512, 1 << 5 | (0 if r["user"] else 1 << 2))
    struct.pack_into("<7I", out, 516, *(r.get(n, 0) for n in ("rbx", "rcx", "rdx", "rsi", "rdi", "rbp", "rax")))
    struct.pack_into("<I", out, 548, r["rip"])
    struct.pack_into("<H", out, 552, 0xE019)
    struct.pack_into("<II", out, 556, r.get("rflags", 0x1246), r.get("rsp", 0))
    struct.pack_into("<9I", out, 2712, r.get("kernel_sp", 0), 0x80050033, 0, 0, cr3, 0x660, 0, 0, 0)
    return bytes(out)


def control(guest: Guest) -> tuple[int, int, int, int]:
    """Return cr0, cr3, cr4 and efer of an HVM guest."""
    cr3 = guest.root << 12
    return {
        0: (0x11, 0, 0, 0),
        2: (0x80000011, cr3, 0x10, 0),
        "pae": (0x80000011, cr3, 0x30, 0),
        4: (0x80000011, cr3, 0x20, 0x500),
        5: (0x80000011, cr3, 0x1020, 0x500),
    }[guest.paging]


def hvm_cpu(guest: Guest, r: dict[str, int], size: int = 1032) -> bytes:
    out = bytearray(1032)
    names = ["rax", "rbx", "rcx", "rdx", "rbp", "rsi", "rdi", "rsp", *(f"r{k}" for k in range(8, 16)), "rip", "rflags"]
    struct.pack_into("<18Q", out, 512, *(r.get(n, 0x46 if n == "rflags" else 0) for n in names))
    cr0, cr3, cr4, efer = control(guest)
    struct.pack_into("<4Q", out, 656, cr0, 0, cr3, cr4)
    struct.pack_into("<Q", out, 808, r.get("cs_base", 0))
    struct.pack_into("<QQ", out, 832, r.get("fs_base", 0), r.get("gs_base", 0))
    dpl = 3 << 5 if r["user"] else 0
    mode = 1 << 9 if guest.word == 8 else 1 << 10
    struct.pack_into("<I", out, 888, r.get("cs_attr", 0x89B | dpl | mode))
    struct.pack_into("<I", out, 908, 0xC93 | dpl)
    struct.pack_into("<Q", out, 992, efer)
    return bytes(out[:size])


def hvm_context(guest: Guest, cpu_size: int) -> bytes:
    def entry(code: int, instance: int, body: bytes) -> bytes:
        return struct.pack("<HHI", code, instance, len(body)) + body

    out = entry(1, 0, struct.pack("<IIQII", 0x54381286, 1, 0, 0, 0))
    for r in guest.vcpus:
        out += entry(2, r["number"], hvm_cpu(guest, r, cpu_size)) + entry(14, r["number"], bytes(240))
    return out + entry(0, 0, b"")


# -- streams ---------------------------------------------------------------------------------------------------------


def record(kind: int, body: bytes = b"") -> bytes:
    return struct.pack("<II", kind, len(body)) + body + bytes(-len(body) % 8)


def page_data(guest: Guest, pfns: list[int], *, table_types: bool, invalid: tuple[int, ...] = ()) -> bytes:
    words = [pfn | (guest.types.get(pfn, 0) if table_types else 0) << 60 for pfn in pfns] + [p | 0xF << 60 for p in invalid]
    head = struct.pack("<II", len(words), 0) + b"".join(struct.pack("<Q", w) for w in words)
    return record(1, head + b"".join(bytes(guest.pages[p]) for p in pfns))


def libxc(
    guest: Guest, *, version: int = 3, xen: tuple[int, int] = (4, 17), batch: int = 4, cpu_size: int = 1032, end: bool = True,
    stale: bool = False,
) -> bytes:  # fmt: skip
    """Write a libxc stream; ``stale`` sends every page twice, first with other contents (as a live migration does)."""
    pv = guest.kind.startswith("pv")
    out = b"\xff" * 8 + b"XENF" + struct.pack(">IHHI", version, 0, 0, 0)
    out += struct.pack("<IHHII", 1 if pv else 2, 12, 0, *xen)
    if pv:
        out += record(2, struct.pack("<BBHI", guest.word, 4 if guest.word == 8 else 3, 0, 0))
    if version >= 3:
        out += record(0x11, bytes(24)) + record(0x12, bytes(16)) + record(0x10)
    if pv:
        out += record(3, struct.pack("<IIQ", 0, 511, 0x7))
    pfns = sorted(guest.pages)
    if stale:
        other = Guest(guest.kind, 0, {p: bytearray(b"\xee" * PAGE) for p in pfns})
        out += page_data(other, pfns, table_types=False)
    for k in range(0, len(pfns), batch):
        out += page_data(guest, pfns[k : k + batch], table_types=pv, invalid=(0xF0000 + k,))
    out += record(8, bytes(24))
    if pv:
        out += record(7, bytes(PAGE))
        for r in guest.vcpus:
            cr3 = guest.root << 12
            body = pv64_context(r, cr3) if guest.word == 8 else pv32_context(r, (cr3 | guest.root >> 20) & 0xFFFFFFFF)
            out += record(4, struct.pack("<II", r["number"], 0) + body) + record(5, struct.pack("<II", r["number"], 0) + bytes(128))
    else:
        out += record(0xA, struct.pack("<II", 0, 0)) + record(9, hvm_context(guest, cpu_size))
    return out + (record(0) if end else b"")


def libxl(inner: bytes) -> bytes:
    out = b"LibxlFmt" + struct.pack(">II", 2, 0) + record(1) + inner
    return out + record(2, struct.pack("<II", 2, 0) + b"a\0b\0") + record(0)


def save(guest: Guest, config: bytes = b'{"c_info": {"type": "pv", "name": "built"}}\0', **how: object) -> bytes:
    extra = struct.pack("<I", len(config)) + config
    head = b"Xen saved domain, xl format\n \0 \r" + struct.pack("<IIII", 0x01020304, 3, 0, len(extra)) + extra
    return head + libxl(libxc(guest, **how))  # type: ignore[arg-type]


# -- cores -----------------------------------------------------------------------------------------------------------

MFN = 0x123400  # machine frame of guest frame 0 in a PV core


def core(guest: Guest, extra: bytes = b".7", spare: int = 2) -> bytes:
    """Write a core; PV page tables and cr3 hold machine frames, the last ``spare`` pages have no number."""
    pv = guest.kind.startswith("pv")
    pfns = sorted(guest.pages)
    pages = {p: bytes(guest.pages[p]) for p in pfns}
    if pv:
        for pfn in guest.types:
            raw = bytearray(pages[pfn])
            for k in range(512):
                (entry,) = struct.unpack_from("<Q", raw, 8 * k)
                if entry & P:
                    frame = (entry >> 12 & 0xFFFFFFFFFF) + MFN
                    struct.pack_into("<Q", raw, 8 * k, entry & ~(0xFFFFFFFFFF << 12) | frame << 12)
            pages[pfn] = bytes(raw)
    contexts = b""
    for r in guest.vcpus:
        if not pv:
            body = bytearray(pv64_context({**r, "user": 1}, 0))
            cr0, cr3, cr4, _ = control(guest)
            struct.pack_into("<Q", body, 512, 1 << 5)
            struct.pack_into("<H", body, 656, 0x13 if r["user"] else 0x10)
            struct.pack_into("<8Q", body, 4984, cr0, 0, 0, cr3, cr4, 0, 0, 0)
            contexts += bytes(body)
        elif guest.word == 8:
            contexts += pv64_context(r, guest.root + MFN << 12)
        else:
            mfn = guest.root + MFN
            contexts += pv32_context(r, (mfn << 12 | mfn >> 20) & 0xFFFFFFFF).ljust(5168, b"\0")
    note = struct.pack("<III4s", 4, 0, 0x2000000, b"Xen\0")
    note += struct.pack("<III4s", 4, 32, 0x2000001, b"Xen\0")
    count = len(pfns) + spare
    note += struct.pack("<4Q", 0xF00FEBED if pv else 0xF00FEBEE, len(guest.vcpus), count, PAGE)
    version = bytearray(struct.pack("<QQ16s", 4, 17, extra) + bytes(144 + 1024 + 64 + 16))
    struct.pack_into("<Q", version, len(version) - (8 if guest.word == 8 or not pv else 12), PAGE)
    note += struct.pack("<III4s", 4, len(version), 0x2000002, b"Xen\0") + bytes(version)
    note += struct.pack("<III4sQ", 4, 8, 0x2000003, b"Xen\0", 1)
    body = b"".join(pages[p] for p in pfns) + bytes(PAGE * spare)
    if pv:
        table = b"".join(struct.pack("<QQ", p, p + MFN) for p in pfns) + b"\xff" * 16 * spare
    else:
        table = b"".join(struct.pack("<Q", p) for p in pfns) + b"\xff" * 8 * spare
    names = [b"", b".shstrtab", b".note.Xen", b".xen_prstatus", b".xen_pages", b".xen_p2m" if pv else b".xen_pfn"]
    strings = b"\0".join(names) + b"\0"
    at = 64 + 64 * len(names)
    places = {}
    for name, data in ((b".note.Xen", note), (b".xen_prstatus", contexts)):
        places[name] = (at, len(data))
        at += len(data)
    pad = -at % PAGE
    at += pad
    for name, data in ((b".xen_pages", body), (names[5], table), (b".shstrtab", strings)):
        places[name] = (at, len(data))
        at += len(data)
    sizes = {b".xen_prstatus": 5168, b".xen_pages": PAGE, b".xen_p2m": 16, b".xen_pfn": 8}
    headers = bytes(64)
    for name in names[1:]:
        offset, size = places[name]
        kind = 7 if name == b".note.Xen" else 1
        title = strings.index(b"\0" + name + b"\0") + 1
        headers += struct.pack("<IIQQQQIIQQ", title, kind, 0, 0, offset, size, 0, 0, 8, sizes.get(name, 0))
    elf = b"\x7fELF\x02\x01\x01".ljust(16, b"\0")
    elf += struct.pack("<HHIQQQIHHHHHH", 4, 62, 1, 0, 0, 64, 0, 64, 56, 0, 64, len(names), 1)
    return elf + headers + note + contexts + bytes(pad) + body + table + strings


# -- whole guests ----------------------------------------------------------------------------------------------------

#: Where code and data stand, by paging.
CODE = {4: 0xFFFFFFFF80100FF0, 5: 0xFF11000000100FF0, "pae": 0xC0100FF0, 2: 0xC0100FF0, 0: 0x10FF0}
DATA = {4: 0xFFFFFFFF80200100, 5: 0xFF11000000200100, "pae": 0xC0200100, 2: 0xC0200100, 0: 0x20100}


def reservation(word: int, nr: int, order: int = 0, domid: int = 0x7FF0) -> bytes:
    return struct.pack("<QQIIH6x" if word == 8 else "<IIIIH2x", 0x1000, nr, order, 0, domid)


def caught(
    kind: str, paging: int | str, *, op: int = 12, args: tuple[int, ...] = (), data: bytes = b"", at_insn: int = 0, large: int = 0,
    user: bool = False, executed: bool = True, **registers: int,
) -> Guest:  # fmt: skip
    """Return a guest whose vCPU 0 stands ``at_insn`` bytes from a hypercall instruction; -1 in args is the data's address."""
    guest = Guest(kind, paging)
    code, where = CODE[paging], DATA[paging]
    size = 0x400 if paging == 2 else {2: 0x200, 3: 0x40000}.get(large, 1)
    code_pfn = (0x40000 + (code >> 12) % size) if large else code >> 12 & 0xFF if not paging else 0x11
    if large:
        guest.map(code, 0x40000, large)
        guest.write(code, INSN[kind], code_pfn, mapped=False)
    else:
        guest.write(code, INSN[kind], code_pfn)
    if not large:  # a large page may cover both
        guest.write(where, data, where >> 12 & 0xFF if not paging else 0x12)
    names = ARG_NAMES[guest.word]
    for name, value in zip(names, args, strict=False):
        registers.setdefault(name, where if value == -1 else value)
    rip = code + at_insn
    registers.setdefault("rflags", 0x1246)
    if kind == "pv64" and executed:
        registers.setdefault("rcx", code + 2)
        registers.setdefault("r11", 0x246)
    guest.vcpu(0, user=user, rip=rip, rax=op, **registers)
    return guest


# -- a kernel with tasks ---------------------------------------------------------------------------------------------

#: The kernel stack of the task, on these frames; its structure and the per-CPU data.
STACK_PFN, TASK_PFN, CPU_PFN = 0x20, 0x28, 0x30
FIELD = 0x518  # thread.sp in the task's structure

SWITCH = {
    8: bytes.fromhex("55534154415541564157 4889a7 18050000 488ba6 18050000"),
    4: bytes.fromhex("555357569c 89a0 18050000 8ba2 18050000"),
}
PUSHED = {8: 6, 4: 5}

FRAME = {
    8: [
        "r15",
        "r14",
        "r13",
        "r12",
        "rbp",
        "rbx",
        "r11",
        "r10",
        "r9",
        "r8",
        "rax",
        "rcx",
        "rdx",
        "rsi",
        "rdi",
        "orig",
        "rip",
        "cs",
        "rflags",
        "rsp",
        "ss",
    ],
    4: ["rbx", "rcx", "rdx", "rsi", "rdi", "rbp", "rax", "ds", "es", "fs", "gs", "orig", "rip", "cs", "rflags"],
}
SELECTOR = {"pv64": (0xE030, 0xE02B), "hvm64": (0x10, 0x18), "pv32": (0x61, 0), "hvm32": (0x60, 0)}


@dataclass
class Kernel:
    """A guest with a kernel that puts tasks to sleep; `at` is where the frame stands in the stack."""

    guest: Guest
    paging: int | str

    def __post_init__(self) -> None:
        word = self.guest.word
        self.code = CODE[self.paging] & ~0xFFF
        self.size = 0x4000 if word == 8 else 0x2000
        # 64 bits: pages in no order, as of vmalloc; 32 bits: the kernel's mapping of all memory.
        self.base = 0 if not self.paging else 0xC0000000
        vmalloc = 0xFF20000000104000 if self.paging == 5 else 0xFFFFC90000104000
        self.stack = vmalloc if word == 8 else self.base + (STACK_PFN << 12)
        self.pfns = [STACK_PFN + (k * 3 % 4 if word == 8 else k) for k in range(self.size >> 12)]
        self.task = self.stack + 0x10000 if word == 8 else self.base + (TASK_PFN << 12)
        self.cpu = self.stack + 0x20000 if word == 8 else self.base + (CPU_PFN << 12)
        for k, pfn in enumerate(self.pfns):
            self.guest.page(pfn)
            self.guest.map(self.stack + (k << 12), pfn)
        self.guest.write(self.task, bytes(0x1000), TASK_PFN)
        self.guest.write(self.cpu, bytes(0x1000), CPU_PFN)
        self.put_code(0x100, SWITCH[word])
        for caller, callee in ((0x200, 0x100), (0x300, 0x200), (0x400, 0x300)):
            self.call(caller, callee)

    def put_code(self, at: int, data: bytes) -> None:
        address = self.code + at
        pfn = 0x11 if self.paging else address >> 12
        self.guest.page(pfn)[at : at + len(data)] = data

    def call(self, caller: int, callee: int) -> None:
        """Put a call of ``callee`` 0x10 bytes into ``caller``; it returns to caller + 0x15."""
        self.put_code(caller + 0x10, b"\xe8" + struct.pack("<i", callee - (caller + 0x15)))

    def poke(self, address: int, *words: int) -> None:
        word = self.guest.word
        for k, value in enumerate(words):
            at = address + k * word - self.stack
            assert 0 <= at < self.size
            data = (value & ((1 << 8 * word) - 1)).to_bytes(word, "little")
            self.guest.page(self.pfns[at >> 12])[at & 0xFFF : (at & 0xFFF) + word] = data

    def frame(self, at: int, **registers: int) -> int:
        """Put a saved frame at an offset in the stack; -1 as an argument is where the data is."""
        word, kind = self.guest.word, self.guest.kind
        names = FRAME[word]
        address = self.stack + at
        values = {"cs": SELECTOR[kind][0], "ss": SELECTOR[kind][1], "rflags": 0x246, "rsp": address + len(names) * word}
        values["rip"] = CODE[self.paging]
        if kind == "pv64":
            values |= {"rcx": values["rip"] + 2, "r11": 0x246}
        values |= {n: DATA[self.paging] if v == -1 else v for n, v in registers.items()}
        self.poke(address, *(values.get(n, 0) for n in names))
        return address

    def sleep(self, pointer: int) -> int:
        """Put the switch's registers at an offset in the stack; the address behind its return address is returned."""
        word = self.guest.word
        address = self.stack + pointer
        self.poke(address + PUSHED[word] * word, self.code + 0x215)
        raw = address.to_bytes(word, "little")
        self.guest.page(TASK_PFN)[FIELD : FIELD + word] = raw
        return address + (PUSHED[word] + 1) * word

    def chain(self, address: int, behind: int) -> None:
        """Put the calls from the switch up to below a frame."""
        word = self.guest.word
        self.poke(behind + 4 * word, self.code + 0x315)
        self.poke(address - word, self.code + 0x415)


def parked(kind: str, paging: int | str, at: int, pointer: int, **registers: int) -> Kernel:
    """Return a guest with a task asleep in XENMEM_populate_physmap: frame and saved stack pointer at offsets in its stack."""
    guest = caught(kind, paging, op=0, data=reservation(8 if kind.endswith("64") else 4, 64), at_insn=-0x100, rflags=0x246)
    kernel = Kernel(guest, paging)
    names = ARG_NAMES[guest.word]
    address = kernel.frame(at, **{"rax": 12, names[0]: 5 << 6 | 6, names[1]: -1, **registers})
    behind = kernel.sleep(pointer)
    if pointer < at:
        kernel.chain(address, behind)
    # The vCPU runs another task.
    guest.vcpus[0] |= {
        "kernel_sp": kernel.stack + 0x80000,
        "rsp": kernel.stack + 0x7FF00,
        "gs_base": kernel.cpu,
        "fs_base": kernel.cpu,
    }
    return kernel
