"""What a trace does not say, from the two files that can: the sidecar and a host's own description of itself.

The *sidecar* is a TOML file, ``TRACE.xtrace.toml`` beside the trace or ``xtrace.toml`` in the trace's folder or one
above it (the nearest wins; they are not merged)::

    release = "4.17.7"          # what xl info says, or any text that xtrace.release.parse takes
    tsc_khz = 2596122           # TSC frequency in kHz

    [domains.0]                 # by domain number, as in the trace
    role = "control"            # guest, device_model, control (toolstack, hardware domain) or stub
    caller = "pv64"             # pv64, pv32, hvm64, hvm32, pvh64, arm64, arm32
    name = "Domain-0"           # any text

Every key may be left out. *Host info* is the plain text of ``xl info`` or ``xl dmesg`` (or both in one file).
"""

from __future__ import annotations

import difflib
import math
import os
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from xtrace import release
from xtrace.errors import InputError, UnknownRelease, UsageError

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

__all__ = (
    "CALLERS",
    "ROLES",
    "DomainInfo",
    "HostInfo",
    "HostLine",
    "Sidecar",
    "find_sidecar",
    "load_sidecar",
    "read_host_info",
    "read_sidecar",
)

#: ABIs of a calling vCPU: the list of ``xtrace.schema.CALLERS``, kept here so that this module loads no data frames.
CALLERS: Final = ("pv64", "pv32", "hvm64", "hvm32", "pvh64", "arm64", "arm32")

#: What a domain can be. ``control``: the toolstack's or hardware domain. ``stub``: a device model in its own domain.
ROLES: Final = ("guest", "device_model", "control", "stub")

_SUFFIX: Final = ".xtrace.toml"
_FOLDER_FILE: Final = "xtrace.toml"
_COMPRESSED: Final = (".zst", ".gz", ".bz2", ".lz4")

#: Domain numbers end below DOMID_FIRST_RESERVED; xentrace writes 32767 and 32768 for the idle domain.
_MAX_DOMID: Final = 0x8000

#: TSC frequencies that are believed, in kHz: 10 MHz to 20 GHz.
_KHZ: Final = range(10_000, 20_000_001)

#: Host info beyond this is not read: no console ring is that large.
_HOST_INFO_BYTES: Final = 64 << 20


@dataclass(frozen=True, slots=True)
class DomainInfo:
    """What the user says about one domain; None: nothing."""

    caller: str | None = None
    role: str | None = None
    name: str | None = None


@dataclass(frozen=True, slots=True)
class Sidecar:
    """What the user says about a trace.

    Attributes:
        path: the file that says it.
        release: text that ``xtrace.release.parse`` accepts (checked), as written.
        tsc_khz: TSC frequency in kHz.
        domains: by domain number.
    """

    path: str
    release: str | None = None
    tsc_khz: int | None = None
    domains: dict[int, DomainInfo] = field(default_factory=dict)


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


# ── the sidecar ──────────────────────────────────────────────────────────────────────────────────────────────────────


def find_sidecar(trace: str | os.PathLike[str]) -> Path | None:
    """Return the sidecar of a trace, or None. Standard input (``-``) has none.

    The first that exists of ``TRACE.xtrace.toml`` (for ``x.xentrace.zst`` also ``x.xentrace.xtrace.toml``) beside the
    trace, then ``xtrace.toml`` in its folder and in every folder above.
    """
    if os.fspath(trace) == "-":
        return None
    path = Path(trace).absolute()
    beside = [path.name] + ([path.stem] if path.suffix in _COMPRESSED else [])
    # "/" has no name; what is wrong with it is said where it is opened.
    candidates = [path.with_name(name + _SUFFIX) for name in beside if name]
    candidates += [folder / _FOLDER_FILE for folder in path.parents]
    return next((c for c in candidates if c.is_file()), None)


def load_sidecar(trace: str | os.PathLike[str]) -> Sidecar | None:
    """Return what the sidecar of a trace says, or None if it has none.

    Raises:
        InputError: the sidecar cannot be read or is not TOML.
        UsageError: it has an unknown key or a bad value; the message names the file.
    """
    path = find_sidecar(trace)
    return None if path is None else read_sidecar(path)


def read_sidecar(path: str | os.PathLike[str]) -> Sidecar:
    """Read one sidecar file.

    Raises:
        InputError: it cannot be read or is not TOML.
        UsageError: it has an unknown key or a bad value; the message names the file.
    """
    import tomllib

    where = os.fspath(path)
    try:
        doc = tomllib.loads(Path(path).read_bytes().decode("utf-8-sig"))
    except OSError as exc:
        raise InputError(where, _why(exc)) from exc
    except UnicodeDecodeError as exc:
        raise InputError(where, "is not UTF-8 text", offset=exc.start) from exc
    except tomllib.TOMLDecodeError as exc:
        raise InputError(where, f"is not TOML: {exc}") from exc
    _known(where, "", doc, ("release", "tsc_khz", "domains"))
    version = _text(where, "release", doc.get("release"))
    if version is not None:
        _checked_release(f"{where}: release", version)
    domains = doc.get("domains", {})
    if not isinstance(domains, dict):
        raise UsageError(f"{where}: domains must be a table such as [domains.0]")
    return Sidecar(
        path=where,
        release=version,
        tsc_khz=_khz(where, doc.get("tsc_khz")),
        domains=dict(_domain(where, key, value) for key, value in domains.items()),
    )


def _domain(where: str, key: str, value: object) -> tuple[int, DomainInfo]:
    at = f"domains.{key}"
    if not re.fullmatch(r"[0-9]{1,5}", key) or int(key) >= _MAX_DOMID:
        raise UsageError(f"{where}: {at}: {key!r} is not a domain number (0 to {_MAX_DOMID - 1})")
    if not isinstance(value, dict):
        raise UsageError(f"{where}: {at} must be a table with caller, role or name")
    _known(where, f"{at}.", value, ("caller", "role", "name"))
    return int(key), DomainInfo(
        caller=_choice(where, f"{at}.caller", value.get("caller"), CALLERS),
        role=_choice(where, f"{at}.role", value.get("role"), ROLES),
        name=_text(where, f"{at}.name", value.get("name")),
    )


def _known(where: str, prefix: str, table: Mapping[str, Any], keys: tuple[str, ...]) -> None:
    for key in table:
        if key not in keys:
            raise UsageError(f"{where}: no key is called {prefix + key!r}; {_hint(key, keys)}")


def _hint(word: str, words: Iterable[str]) -> str:
    choices = list(words)
    near = difflib.get_close_matches(word.lower(), choices, n=1, cutoff=0.5)
    return f"did you mean {near[0]!r}?" if near else f"there are {', '.join(choices)}"


def _text(where: str, at: str, value: object) -> str | None:
    if value is None:
        return None
    if not isinstance(value, str) or not value.strip():
        raise UsageError(f'{where}: {at} must be text in quotes, such as "4.17.7", not {value!r}')
    return value


def _choice(where: str, at: str, value: object, choices: tuple[str, ...]) -> str | None:
    text = _text(where, at, value)
    if text is not None and text not in choices:
        raise UsageError(f"{where}: {at} cannot be {text!r}; {_hint(text, choices)}")
    return text


def _khz(where: str, value: object) -> int | None:
    if value is None:
        return None
    if not isinstance(value, int) or isinstance(value, bool):
        raise UsageError(f"{where}: tsc_khz must be a whole number of kHz, such as 2596122, not {value!r}")
    if value not in _KHZ:
        meant = next((f"; did you mean {n}?" for n in (value * 1000, value // 1000) if n in _KHZ), "")
        raise UsageError(f"{where}: tsc_khz = {value} cannot be the frequency of a TSC in kHz{meant}")
    return value


def _checked_release(at: str, text: str) -> None:
    try:
        release.parse(text)
    except UnknownRelease as exc:
        raise UnknownRelease(f"{at}: {exc}") from exc


# ── host info ────────────────────────────────────────────────────────────────────────────────────────────────────────

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
        raise InputError(where, _why(exc)) from exc
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
        if math.isfinite(khz) and round(khz) in _KHZ:
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
            _checked_release(f"{self.where}: line {self.lines['release'].number}", values["release"])
        return HostInfo(path=self.where, lines=self.lines, **values)


def _why(exc: OSError) -> str:
    if isinstance(exc, FileNotFoundError):
        return "no such file"
    if isinstance(exc, PermissionError):
        return "no permission to read it"
    if isinstance(exc, IsADirectoryError):
        return "is a directory, not a file"
    return f"cannot be read ({exc.strerror or exc})"
