"""Cores of ``xl dump-core``: ELF files with sections of Xen's own (docs/misc/dump-core-format.txt, tools/libs/guest/xg_core.c).

``.xen_prstatus`` is an array of ``vcpu_guest_context`` (5168 bytes each, whatever the guest; 2800 from a 32-bit toolstack of
old); vCPUs that never came up are left out, so an entry's place is not always its number. A core does not say how wide a PV
guest's words are: for a 32-bit guest, libxc moves the last field of the version note down by four bytes
(elfnote_dump_xen_version), which tells.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Final

import numpy as np

from xtrace.image.base import PAGE, Damage, Damaged, Image
from xtrace.image.memory import Memory, hvm_space
from xtrace.image.pages import PageIndex
from xtrace.image.registers import context_size, hvm_core_vcpu, pv_vcpu

if TYPE_CHECKING:
    import numpy.typing as npt

    from xtrace.image.base import File, Vcpu

__all__ = ("ELF", "open_core")

ELF: Final = b"\x7fELF"
_CLASS64, _LITTLE, _CORE = 2, 1, 4
_EM_386: Final = 3
_SHT_NOTE: Final = 7

_NOTE_HEADER, _NOTE_VERSION = 0x2000001, 0x2000002
_MAGIC_PV, _MAGIC_HVM = 0xF00FEBED, 0xF00FEBEE
_VERSION_SIZE: Final = 1280  # struct xen_dumpcore_elfnote_xen_version_desc of a 64-bit toolstack

#: VGCF_online: a vCPU that is up.
_ONLINE: Final = 1 << 5

_MOST_SECTIONS: Final = 256
_MOST_VCPUS: Final = 8192
_MOST_NOTES: Final = 1 << 16
_INVALID: Final = np.uint64(0xFFFFFFFFFFFFFFFF)
_BLOCK: Final = 1 << 16  # entries of the p2m read at once


@dataclass(slots=True)
class _Notes:
    magic: int | None = None
    xen: str | None = None
    width: int | None = None
    damage: list[Damage] = field(default_factory=list)
    sections: dict[str, tuple[int, int, int]] = field(default_factory=dict)  # name -> offset, size, entry size


def open_core(file: File) -> Image:
    """Open a core; every vCPU that can be read is in the image, with the damage after it.

    Raises:
        Damaged: nothing of it can be used.
    """
    notes = _Notes()
    machine_code = _sections(file, notes)
    for name in (".note.Xen", ".xen_prstatus", ".xen_pages"):
        if name not in notes.sections:
            raise Damaged(f"an ELF core without the section {name}: not one of xl dump-core", 0)
    _notes(file, notes)
    if notes.magic is None:
        raise Damaged("the core has no header note of Xen", notes.sections[".note.Xen"][0])
    hvm = notes.magic == _MAGIC_HVM
    width = notes.width or (4 if machine_code == _EM_386 else 8)
    index, machine, damage = _pages(file, notes, hvm)
    memory = Memory(index.pages(file), machine)
    guest = "hvm" if hvm else f"pv{width * 8}"
    image = Image("core", 1, guest, notes.xen, memory)
    try:
        _vcpus(file, notes, image, hvm, width)
    except Damaged as exc:
        if not image.vcpus:
            raise
        image.damage.append(exc.damage)
    image.damage += notes.damage + damage
    return image


def _sections(file: File, notes: _Notes) -> int:
    head = file.read(0, 64, "the ELF header")
    if head[4] != _CLASS64 or head[5] != _LITTLE:
        raise Damaged("an ELF file that is not 64-bit little-endian: not a core of xl dump-core", 4)
    kind, code = file.unpack("<HH", 16, "the ELF header")
    if kind != _CORE:
        raise Damaged("an ELF file that is no core", 16)
    (at,) = file.unpack("<Q", 40, "the ELF header")
    size, count, names = file.unpack("<HHH", 58, "the ELF header")
    if size < 64 or not 0 < count <= _MOST_SECTIONS:
        raise Damaged("an ELF core without sections: not one of xl dump-core", 58)
    if names >= count:
        raise Damaged("the ELF header names a section for the section names that does not exist", 62)
    table = []
    for k in range(count):
        name, kind, _, _, offset, length, _, _, _, entry = file.unpack("<IIQQQQIIQQ", at + k * size, "the section headers")
        table.append((name, kind, offset, length, entry))
    _, _, offset, length, _ = table[names]
    try:
        text = file.read(offset, min(length, 1 << 16), "the section names")
    except Damaged as exc:
        # They are written last: what the sections hold can be told from their headers.
        notes.damage.append(exc.damage)
        text = b""
    for name, kind, where, length, entry in table[1:]:
        title = text[name:].split(b"\0", 1)[0].decode("ascii", "replace") if text else _title(kind, length, entry)
        notes.sections[title] = (where, length, entry)
    return code


def _title(kind: int, length: int, entry: int) -> str:
    """Return the name of a section by its type and entry size (xg_core.c xc_domain_dumpcore_via_callback)."""
    if kind == _SHT_NOTE:
        return ".note.Xen"
    if entry == PAGE:
        return ".xen_shared_info" if length == PAGE else ".xen_pages"
    return {16: ".xen_p2m", 8: ".xen_pfn"}.get(entry, ".xen_prstatus" if entry else "")


def _notes(file: File, notes: _Notes) -> None:
    offset, size, _ = notes.sections[".note.Xen"]
    data = file.read(offset, min(size, _MOST_NOTES), "the notes")
    at = 0
    while at + 12 <= len(data):
        name, length, kind = (int.from_bytes(data[at + k : at + k + 4], "little") for k in (0, 4, 8))
        body = at + 12 + (name + 3 & ~3)
        value = data[body : body + length]
        if len(value) != length:
            raise Damaged("a note of the core is longer than its section", offset + at)
        if kind == _NOTE_HEADER and length >= 32:
            magic, page = int.from_bytes(value[:8], "little"), int.from_bytes(value[24:32], "little")
            if magic not in (_MAGIC_PV, _MAGIC_HVM):
                raise Damaged(f"the core's header note has the unknown magic number {magic:#x}", offset + body)
            if page != PAGE:
                raise Damaged(f"the core has pages of {page} bytes, not of 4096", offset + body + 24)
            notes.magic = magic
        elif kind == _NOTE_VERSION and length >= 32:
            _version(value, notes)
        at = body + (length + 3 & ~3)


def _version(value: bytes, notes: _Notes) -> None:
    major, minor = int.from_bytes(value[:8], "little"), int.from_bytes(value[8:16], "little")
    extra = value[16:32].split(b"\0", 1)[0].decode("ascii", "replace")
    # XENVER_extraversion is what follows major.minor: ".7", ".0-rc3", "-unstable".
    text = f"{major}.{minor}{extra}" if extra[:1] in (".", "-") else f"{major}.{minor}"
    notes.xen = text if text.isascii() and text.isprintable() else f"{major}.{minor}"
    if len(value) == _VERSION_SIZE:
        usual, moved = int.from_bytes(value[-8:], "little"), int.from_bytes(value[-12:-4], "little")
        notes.width = 8 if usual == PAGE else 4 if moved == PAGE else None


def _pages(file: File, notes: _Notes, hvm: bool) -> tuple[
    PageIndex, tuple[npt.NDArray[np.uint64], npt.NDArray[np.int64]] | None, list[Damage]
]:  # fmt: skip
    """Index the pages: the k-th entry of .xen_p2m or .xen_pfn names the frame of the k-th page."""
    index, damage = PageIndex(), []
    name, words = (".xen_pfn", 1) if hvm else (".xen_p2m", 2)
    if name not in notes.sections:
        return index, None, [Damage(f"the core has no section {name}: its pages have no numbers", 0)]
    offset, size, _ = notes.sections[name]
    pages, held, _ = notes.sections[".xen_pages"]
    count = size // (8 * words)
    if offset + count * 8 * words > file.size:
        damage.append(Damage(f"the file ends inside the section {name}", file.size))
        count = max(0, (file.size - offset) // (8 * words))
    elif pages + held > file.size:
        damage.append(Damage("the file ends inside the section .xen_pages", file.size))
    count = min(count, held // PAGE)
    mfns, pfns = [], []
    for first in range(0, count, _BLOCK):
        n = min(_BLOCK, count - first)
        raw = np.frombuffer(file.read(offset + first * 8 * words, n * 8 * words, name), "<u8").reshape(n, words)
        offsets = pages + PAGE * np.arange(first, first + n, dtype=np.int64)
        real = (raw[:, 0] < np.uint64(1 << 52)) & (offsets + PAGE <= file.size)
        pfn = raw[real, 0].astype(np.int64)
        index.add(pfn, offsets[real])
        if not hvm:
            mfns.append(raw[real, 1])
            pfns.append(pfn)
    if hvm:
        return index, None, damage
    frames = np.concatenate([*mfns, np.zeros(0, np.uint64)])
    guests = np.concatenate([*pfns, np.zeros(0, np.int64)])
    order = np.argsort(frames, kind="stable")
    return index, (frames[order], guests[order]), damage


def _vcpus(file: File, notes: _Notes, image: Image, hvm: bool, width: int) -> None:
    offset, size, entry = notes.sections[".xen_prstatus"]
    kind = "pv64" if hvm or width == 8 else "pv32"
    need = context_size(kind)
    if entry < need or entry > 1 << 16:
        raise Damaged(f"a vCPU context of {entry} bytes in the core: {need} are needed", offset)
    for number in range(min(size // entry, _MOST_VCPUS)):
        at = offset + number * entry
        data = file.read(at, need, "the vCPU contexts (.xen_prstatus)")
        vcpu: Vcpu
        if hvm:
            vcpu = hvm_core_vcpu(number, data, at)
            told = vcpu.registers
            if vcpu.space.levels == 3 and image.memory.read(vcpu.code, 1, vcpu.space) is None:
                # Nothing there as PAE: small addresses in long mode.
                long = hvm_space(told["cr0"], told["cr3"], told["cr4"], 1 << 10)
                if image.memory.read(told["rip"], 1, long) is not None:
                    vcpu = replace(vcpu, caller="hvm64", bits=64, space=long)
        else:
            vcpu = pv_vcpu(number, data, width, at, machine=True)
        if vcpu.registers["flags"] & _ONLINE or number == 0:
            image.vcpus.append(vcpu)
