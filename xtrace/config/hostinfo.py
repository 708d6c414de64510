"""What a host says about itself: the plain text of ``xl info`` or ``xl dmesg``."""

from __future__ import annotations

import math
import os
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

from xtrace.config.checks import KHZ, checked_release, why
from xtrace.errors import InputError

__all__ = ("HostInfo", "HostLine", "read_host_info")

#: Host info beyond this is not read: no console ring is that large.
_HOST_INFO_BYTES: Final = 64 << 20


@dataclass(frozen=True, slots=True)
class HostLine:
    """A line of host info that a value was taken from."""

    #: Line number, from 1.
    number: int
    #: The line without surrounding space.
    text: str


@dataclass(frozen=True, slots=True)
class HostInfo:
    """What a host says about itself.

    Attributes:
        path: the file that says it.
        release: Xen's version as the host reports it (``4.17.7``, ``4.13.5-9.40.1``); ``xtrace.release.parse`` takes it
            (checked).
        build: the vendor's fuller name of the build where there is one (``Debian 4.17.7+13-g2445b30a44-0+deb12u1``).
        tsc_khz: TSC frequency in kHz, as Xen measured it at boot.
        pcpus: number of physical CPUs that Xen brought up.
        lines: the line that each of ``release``, ``tsc_khz`` and ``pcpus`` was taken from, by attribute name.
    """

    path: str
    release: str | None = None
    build: str | None = None
    tsc_khz: int | None = None
    pcpus: int | None = None
    lines: dict[str, HostLine] = field(default_factory=dict)


#: ``xl info``: ``xen_version            : 4.17.7``
_PAIR: Final = re.compile(r"(\w+)\s*:\s*(.*?)\s*")
#: ``xl dmesg``: ``(XEN) Xen version 4.17.7 (Debian 4.17.7+13-…) (builder) (compiler) debug=n date``
_VERSION: Final = re.compile(r"\bXen version:? (\d[^\s()]*)(?: \((\w[^()@]*)\))?")
#: ``(XEN) Detected 2596.122 MHz processor.``
_DETECTED: Final = re.compile(r"\bDetected (\d+(?:\.\d+)?) MHz processor")
_BROUGHT_UP: Final = re.compile(r"\bBrought up (\d+) CPUs?\b")


def read_host_info(path: str | os.PathLike[str]) -> HostInfo:
    """Read what ``xl info`` or ``xl dmesg`` printed.

    The first line that gives a value is taken: ``xen_version`` (or ``xen_major``, ``xen_minor``, ``xen_extra``) or
    ``Xen version …``; ``cpu_mhz`` or ``Detected … MHz processor``; ``nr_cpus`` or ``Brought up … CPUs``.

    Raises:
        InputError: the file cannot be read, gives neither version nor frequency, or names two different versions.
        UnknownRelease: it names a version that is no Xen release and near to none; the message names file and line.
    """
    where = os.fspath(path)
    try:
        with Path(path).open("rb") as file:
            text = file.read(_HOST_INFO_BYTES).decode("utf-8", "replace")
    except OSError as exc:
        raise InputError(where, why(exc)) from exc
    found = _Found(where)
    for number, line in enumerate(text.splitlines(), 1):
        found.line(HostLine(number, line.strip()))
    return found.result()


class _Found:
    """Gathers the values of a host-info text line by line."""

    def __init__(self, where: str) -> None:
        self.where = where
        self.values: dict[str, str | int] = {}
        self.lines: dict[str, HostLine] = {}
        self.parts: dict[str, tuple[str, HostLine]] = {}  # xen_major, xen_minor, xen_extra

    def line(self, line: HostLine) -> None:
        """Take what one line says."""
        pair = _PAIR.fullmatch(line.text)
        if pair:
            self._pair(pair[1], pair[2], line)
        if match := _VERSION.search(line.text):
            self._release(match[1], line)
            # The parentheses after it name a vendor's build, or else who compiled it.
            if match[2] and re.search(r"\d\.\d", match[2]):
                self.values.setdefault("build", match[2])
        if match := _DETECTED.search(line.text):
            self._mhz(match[1], line)
        if match := _BROUGHT_UP.search(line.text):
            self._take("pcpus", int(match[1]), line)

    def _pair(self, key: str, value: str, line: HostLine) -> None:
        if key == "xen_version" and value:
            self._release(value, line)
        elif key in ("xen_major", "xen_minor", "xen_extra"):
            self.parts.setdefault(key, (value, line))
        elif key == "cpu_mhz":
            self._mhz(value, line)
        elif key == "nr_cpus" and value.isascii() and value.isdigit():
            self._take("pcpus", int(value), line)

    def _take(self, name: str, value: str | int, line: HostLine) -> None:
        if name not in self.values:
            self.values[name], self.lines[name] = value, line

    def _release(self, text: str, line: HostLine) -> None:
        known = self.values.get("release")
        if known is not None and known != text:
            before = self.lines["release"].number
            raise InputError(self.where, f"says Xen {text}, but line {before} says Xen {known}", line=line.number)
        self._take("release", text, line)

    def _mhz(self, text: str, line: HostLine) -> None:
        try:
            khz = float(text) * 1000
        except ValueError:
            return
        if math.isfinite(khz) and round(khz) in KHZ:
            self._take("tsc_khz", round(khz), line)

    def result(self) -> HostInfo:
        """Return what was found."""
        if "release" not in self.values and len(self.parts) == 3:
            major, minor, extra = (self.parts[f"xen_{part}"] for part in ("major", "minor", "extra"))
            self._take("release", f"{major[0]}.{minor[0]}{extra[0]}", extra[1])
        if not {"release", "tsc_khz"} & self.values.keys():
            raise InputError(
                self.where,
                "has neither a Xen version nor a processor frequency; the text of xl info or xl dmesg has both",
            )
        values: dict[str, Any] = dict(self.values)
        if "release" in values:
            checked_release(f"{self.where}: line {self.lines['release'].number}", values["release"])
        return HostInfo(path=self.where, lines=self.lines, **values)
