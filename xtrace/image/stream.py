"""``xl save`` files and libxl streams: what stands around the libxc stream.

The xl header: RELEASE-4.17.0 tools/xl/xl.h save_file_header, xl_vmcontrol.c create_domain (flags, optional data). The libxl
stream: docs/specs/libxl-migration-stream.pandoc. Files of 4.5 and older (xl without XL_MANDATORY_FLAG_STREAMv2, xm's
"LinuxGuestRecord", bare legacy libxc) are recognised to be refused by name.
"""

from __future__ import annotations

import json
import struct
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

from xtrace.image.base import Damaged
from xtrace.image.libxc import Libxc

if TYPE_CHECKING:
    from xtrace.image.base import File

__all__ = ("LIBXL", "XL", "XM", "Config", "Libxl", "is_legacy_libxc", "legacy", "xl_header")

XL: Final = b"Xen saved domain, xl format\n \0 \r"
LIBXL: Final = b"LibxlFmt"
XM: Final = b"LinuxGuestRecord"

_JSON, _STREAM_V2 = 1, 2
_BYTE_ORDER: Final = 0x01020304
_MOST_CONFIG: Final = 4 << 20

_END, _LIBXC_CONTEXT, _CHECKPOINT_END = 0, 1, 4
_LAST_TYPE: Final = 5
_OPTIONAL: Final = 1 << 31
_MOST_RECORDS: Final = 1 << 18


@dataclass(frozen=True, slots=True)
class Config:
    """What the guest's configuration in an xl header says of it; None: nothing."""

    name: str | None = None
    type: str | None = None


def legacy(what: str, offset: int) -> Damaged:
    """Return the error for a format of Xen 4.5 and older."""
    return Damaged(
        f"{what} of Xen 4.5 or older (the legacy format), which xtrace does not read; "
        "Xen 4.6 and later convert it (convert-legacy-stream)",
        offset,
    )


def is_legacy_libxc(head: bytes) -> bool:
    """Say whether a file begins like a PV guest saved by a 64-bit libxc of 4.5 or older: p2m size, ~0, extended info."""
    return (
        len(head) >= 24 and head[4:8] == b"\0" * 4 and head[:4] != b"\0" * 4
        and head[8:16] == b"\xff" * 8 and head[20:24] in (b"vcpu", b"extv")
    )  # fmt: skip


def xl_header(file: File) -> tuple[int, Config]:
    """Read the header of an xl save file.

    Returns:
        where the libxl stream begins, and what the configuration says.

    Raises:
        Damaged: it cannot be used.
    """
    order, mandatory, _, extra = struct.unpack("<IIII", file.read(len(XL), 16, "the xl header"))
    if order != _BYTE_ORDER:
        raise Damaged("the xl header is not in the byte order of an x86 host", len(XL))
    if not mandatory & _STREAM_V2:
        raise legacy("an xl save file", len(XL) + 4)
    if mandatory & ~(_JSON | _STREAM_V2):
        raise Damaged(f"the xl header has flags that are not known ({mandatory:#x})", len(XL) + 4)
    begin = len(XL) + 16
    if begin + extra > file.size:
        raise Damaged("the file ends inside the configuration in the xl header", file.size)
    config = Config()
    if mandatory & _JSON and 4 <= extra <= _MOST_CONFIG:
        (size,) = file.unpack("<I", begin, "the xl header")
        config = _config(file.read(begin + 4, min(size, extra - 4), "the xl header"))
    return begin + extra, config


def _config(data: bytes) -> Config:
    try:
        info = json.loads(data.rstrip(b"\0"))["c_info"]
        name, kind = info.get("name"), info.get("type")
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        return Config()
    return Config(name if isinstance(name, str) else None, kind if isinstance(kind, str) else None)


class Libxl:
    """Reads a libxl stream with the libxc stream inside it.

    Attributes:
        libxc: the inner stream as far as it was read, or None.
    """

    def __init__(self, file: File, offset: int) -> None:
        """Read the header.

        Raises:
            Damaged: it is none that can be read.
        """
        ident, version, options = struct.unpack(">8sII", file.read(offset, 16, "the libxl header"))
        if ident != LIBXL:
            raise Damaged("no libxl stream stands where one should", offset)
        if version != 2:
            raise Damaged(f"version {version} of the libxl stream is not known (2 is)", offset + 8)
        if options & 1:
            raise Damaged("the libxl stream is big-endian, which no x86 host writes", offset + 12)
        self._file, self._at = file, offset + 16
        self.libxc: Libxc | None = None

    def run(self) -> None:
        """Read to the END record.

        Raises:
            Damaged: what follows cannot be read; everything before it was taken.
        """
        for _ in range(_MOST_RECORDS):
            kind, length = self._file.unpack("<II", self._at, "a libxl record (no END record was seen)")
            start, self._at = self._at, self._at + 8 + (length + 7 & ~7)
            if kind == _END:
                if self.libxc is None:
                    raise Damaged("the libxl stream holds no libxc stream", start)
                return
            if kind == _LIBXC_CONTEXT:
                self.libxc = Libxc(self._file, self._at)
                self._libxc()
            elif kind == _CHECKPOINT_END and self.libxc is not None and not self.libxc.ended:
                # Remus, COLO: the next round of memory and contexts.
                self.libxc.at = self._at
                self._libxc()
            elif kind > _LAST_TYPE and not kind & _OPTIONAL:
                raise Damaged(f"a libxl record of the unknown type {kind:#x}", start)
            if self._at > self._file.size:
                raise Damaged(f"the file ends inside a libxl record of type {kind:#x}", self._file.size)
        raise Damaged(f"there are more than {_MOST_RECORDS:,} libxl records", self._at)

    def _libxc(self) -> None:
        assert self.libxc is not None
        self.libxc.run()
        self._at = self.libxc.at
