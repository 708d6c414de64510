"""Opening an image: what it is goes by its first bytes."""

from __future__ import annotations

from typing import TYPE_CHECKING

from xtrace.errors import InputError
from xtrace.image import stream
from xtrace.image.base import Damage, Damaged, File, Image
from xtrace.image.core import ELF, open_core
from xtrace.image.libxc import ID, MARKER, Libxc
from xtrace.image.memory import Memory

if TYPE_CHECKING:
    from xtrace.ingest.source import Source

__all__ = ("open_image",)


def open_image(source: Source) -> Image:
    """Open a saved guest; the source must stay open while its memory is read.

    Returns:
        The image with at least one vCPU; what was wrong after that is in ``damage``.

    Raises:
        InputError: it is no image, or no vCPU could be read (exit bit 16).
    """
    file = File(source.file, source.size)
    try:
        image = _open(file, source.head())
        if not image.vcpus:
            raise Damaged("it holds no vCPU", source.size)
    except Damaged as exc:
        text = exc.damage.text + (f"; {source.damage}" if source.damage else "")
        raise InputError(source.path, text, offset=exc.damage.offset, exit_bits=16) from exc
    if source.damage:
        image.damage.append(Damage(source.damage, source.size))
    return image


def _open(file: File, head: bytes) -> Image:
    if head.startswith(ELF):
        return open_core(file)
    if head.startswith(stream.XM):
        raise stream.legacy("an xm save file", 0)
    if stream.is_legacy_libxc(head):
        raise stream.legacy("a save file", 0)
    if head.startswith(stream.XL):
        at, config = stream.xl_header(file)
        return _libxl(file, at, "xl-save", config)
    if head.startswith(stream.LIBXL):
        return _libxl(file, 0, "libxl", stream.Config())
    if head.startswith(MARKER + ID):
        return _libxc(Libxc(file, 0))
    if stream.XL.startswith(head[: len(stream.XL)]) or (MARKER + ID).startswith(head[:12]) or stream.LIBXL.startswith(head[:8]):
        raise Damaged("the file ends inside its header", len(head))
    raise Damaged("not a saved guest: neither an xl save file, a libxl or libxc stream, nor a core of xl dump-core", 0)


def _libxl(file: File, at: int, format_: str, config: stream.Config) -> Image:
    outer = stream.Libxl(file, at)
    try:
        outer.run()
        damage = []
    except Damaged as exc:
        if outer.libxc is None or not outer.libxc.vcpus:
            raise
        damage = [exc.damage]
    assert outer.libxc is not None
    return _image(format_, outer.libxc, config, damage)


def _libxc(libxc: Libxc) -> Image:
    damage = []
    try:
        while not libxc.run():
            pass  # a checkpoint: the next round of records
    except Damaged as exc:
        if not libxc.vcpus:
            raise
        damage = [exc.damage]
    return _image("libxc", libxc, stream.Config(), damage)


def _image(format_: str, libxc: Libxc, config: stream.Config, damage: list[Damage]) -> Image:
    memory = Memory(libxc.index.pages(libxc.file))
    guest = ("pvh" if config.type == "pvh" else "hvm") if libxc.hvm else f"pv{(libxc.width or 8) * 8}"
    major, minor = libxc.xen
    # A converted legacy stream says 0 and the converter's version.
    xen = f"{major}.{minor}" if major else None
    vcpus = [libxc.vcpus[k] for k in sorted(libxc.vcpus)]
    return Image(format_, libxc.version, guest, xen, memory, vcpus, config.name, damage)
