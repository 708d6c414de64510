"""What a user says about a trace: the sidecar.

The *sidecar* is a TOML file, ``TRACE.xtrace.toml`` beside the trace or ``xtrace.toml`` in the trace's folder or one
above it (the nearest wins; they are not merged)::

    release = "4.17.7"          # what xl info says, or any text that xtrace.release.parse takes
    tsc_khz = 2596122           # TSC frequency in kHz

    [domains.0]                 # by domain number, as in the trace
    role = "control"            # guest, device_model, control (toolstack, hardware domain) or stub
    caller = "pv64"             # pv64, pv32, hvm64, hvm32, pvh64, arm64, arm32
    name = "Domain-0"           # any text

Every key may be left out. An ``xtrace.toml`` may hold settings as well (``[options]`` and ``[[suppress]]``, see
``xtrace.config.settings``): those count where xtrace is started, the keys above where the trace lies. One that holds
nothing but settings is no sidecar: it hides none in a folder above.
"""

from __future__ import annotations

import os
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final

from xtrace.config import checks
from xtrace.config.checks import CALLERS, MAX_DOMID, ROLES
from xtrace.errors import InputError, UsageError

__all__ = ("FOLDER_FILE", "SETTINGS_KEYS", "SIDECAR_KEYS", "DomainInfo", "Sidecar", "find_sidecar", "load_sidecar", "read_sidecar")

#: One file of this name serves a folder and what lies below it.
FOLDER_FILE: Final = "xtrace.toml"
#: What such a file may hold about traces, and beside it.
SIDECAR_KEYS: Final = ("release", "tsc_khz", "domains")
SETTINGS_KEYS: Final = ("options", "suppress")

_SUFFIX: Final = ".xtrace.toml"
_COMPRESSED: Final = (".zst", ".gz", ".bz2", ".lz4")


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


def find_sidecar(trace: str | os.PathLike[str]) -> Path | None:
    """Return the sidecar of a trace, or None. Standard input (``-``) has none.

    The first that exists of ``TRACE.xtrace.toml`` (for ``x.xentrace.zst`` also ``x.xentrace.xtrace.toml``) beside the
    trace, then ``xtrace.toml`` in its folder and in every folder above, unless it holds nothing but settings.
    """
    if os.fspath(trace) == "-":
        return None
    path = Path(trace).absolute()
    beside = [path.name] + ([path.stem] if path.suffix in _COMPRESSED else [])
    # "/" has no name; what is wrong with it is said where it is opened.
    candidates = [path.with_name(name + _SUFFIX) for name in beside if name]
    there = next((c for c in candidates if c.is_file()), None)
    folders = (folder / FOLDER_FILE for folder in path.parents)
    return there or next((f for f in folders if f.is_file() and not _only_settings(f)), None)


def _only_settings(path: Path) -> bool:
    """Say whether a file holds settings and nothing about traces; what is wrong with a file is said by who reads it."""
    try:
        keys = checks.toml(str(path), checks.read_toml(path)).keys()
    except InputError:
        return False
    return bool(keys) and keys <= set(SETTINGS_KEYS)


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
    where = os.fspath(path)
    doc = checks.toml(where, checks.read_toml(Path(path)))
    if Path(path).name == FOLDER_FILE:
        checks.known(where, "", doc, (*SIDECAR_KEYS, *SETTINGS_KEYS))
    elif wrong := next((key for key in doc if key in SETTINGS_KEYS), None):
        raise UsageError(f"{where}: {wrong!r} does not belong to one trace; settings go into {FOLDER_FILE} or pyproject.toml")
    checks.known(where, "", {key: doc[key] for key in doc if key not in SETTINGS_KEYS}, SIDECAR_KEYS)
    version = checks.text(where, "release", doc.get("release"))
    if version is not None:
        checks.checked_release(f"{where}: release", version)
    domains = doc.get("domains", {})
    if not isinstance(domains, dict):
        raise UsageError(f"{where}: domains must be a table such as [domains.0]")
    return Sidecar(
        path=where,
        release=version,
        tsc_khz=checks.khz(where, doc.get("tsc_khz")),
        domains=dict(_domain(where, key, value) for key, value in domains.items()),
    )


def _domain(where: str, key: str, value: object) -> tuple[int, DomainInfo]:
    at = f"domains.{key}"
    if not re.fullmatch(r"[0-9]{1,5}", key) or int(key) >= MAX_DOMID:
        raise UsageError(f"{where}: {at}: {key!r} is not a domain number (0 to {MAX_DOMID - 1})")
    if not isinstance(value, dict):
        raise UsageError(f"{where}: {at} must be a table with caller, role or name")
    checks.known(where, f"{at}.", value, ("caller", "role", "name"))
    return int(key), DomainInfo(
        caller=checks.choice(where, f"{at}.caller", value.get("caller"), CALLERS),
        role=checks.choice(where, f"{at}.role", value.get("role"), ROLES),
        name=checks.text(where, f"{at}.name", value.get("name")),
    )
