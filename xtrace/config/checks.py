"""What every file that a user writes is checked with: TOML that parses, keys that exist, values of the right kind.

Each message names the file and the key, and says what was probably meant.
"""

from __future__ import annotations

import difflib
from typing import TYPE_CHECKING, Any, Final

from xtrace import release
from xtrace.errors import InputError, UnknownRelease, UsageError

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence
    from pathlib import Path

__all__ = (
    "CALLERS",
    "KHZ",
    "MAX_DOMID",
    "MIGRATIONS",
    "ROLES",
    "checked_release",
    "choice",
    "hint",
    "khz",
    "known",
    "read_toml",
    "text",
    "toml",
    "why",
)

#: ABIs of a calling vCPU: the list of ``xtrace.schema.CALLERS``, kept here so that this module loads no data frames.
CALLERS: Final = ("pv64", "pv32", "hvm64", "hvm32", "pvh64", "arm64", "arm32")

#: What a domain can be. ``control``: the toolstack's or hardware domain. ``stub``: a device model in its own domain.
ROLES: Final = ("guest", "device_model", "control", "stub")

#: Kinds of migration: the list of ``xtrace.analyze.exposure.KINDS``.
MIGRATIONS: Final = ("cooperative", "non_cooperative", "live_update", "fork_restore")

#: Domain numbers end below DOMID_FIRST_RESERVED; xentrace writes 32767 and 32768 for the idle domain.
MAX_DOMID: Final = 0x8000

#: TSC frequencies that are believed, in kHz: 10 MHz to 20 GHz.
KHZ: Final = range(10_000, 20_000_001)

#: No file that a person writes is longer.
_MAX_BYTES: Final = 4 << 20


def read_toml(path: Path) -> bytes:
    """Read a file that a person wrote.

    Raises:
        InputError: it cannot be read, or is too long for that.
    """
    try:
        with path.open("rb") as file:
            data = file.read(_MAX_BYTES + 1)
    except OSError as exc:
        raise InputError(str(path), why(exc)) from exc
    if len(data) > _MAX_BYTES:
        raise InputError(str(path), f"is longer than {_MAX_BYTES >> 20} MiB")
    return data


def toml(where: str, data: bytes) -> dict[str, Any]:
    """Parse a TOML file.

    Raises:
        InputError: it is not UTF-8 or not TOML.
    """
    import tomllib

    try:
        return tomllib.loads(data.decode("utf-8-sig"))
    except UnicodeDecodeError as exc:
        raise InputError(where, "is not UTF-8 text", offset=exc.start) from exc
    except tomllib.TOMLDecodeError as exc:
        raise InputError(where, f"is not TOML: {exc}") from exc
    except RecursionError as exc:
        raise InputError(where, "is not TOML that can be used: it is nested too deep") from exc


def known(where: str, prefix: str, table: Mapping[str, Any], keys: Sequence[str]) -> None:
    """Refuse keys that do not exist.

    Raises:
        UsageError: naming the key and the one that was probably meant.
    """
    for key in table:
        if key not in keys:
            raise UsageError(f"{where}: no key is called {prefix + key!r}; {hint(key, keys)}")


def hint(word: str, words: Iterable[str]) -> str:
    """Say which of the words was probably meant, else name them all."""
    choices = list(words)
    near = difflib.get_close_matches(word.lower(), choices, n=1, cutoff=0.5)
    return f"did you mean {near[0]!r}?" if near else f"there are {', '.join(choices)}"


def text(where: str, at: str, value: object, such: str = "4.17.7") -> str | None:
    """Return text that is not blank; None stays None.

    Raises:
        UsageError: it is something else.
    """
    if value is None:
        return None
    if not isinstance(value, str) or not value.strip():
        raise UsageError(f'{where}: {at} must be text in quotes, such as "{such}", not {value!r}')
    return value


def choice(where: str, at: str, value: object, choices: Sequence[str]) -> str | None:
    """Return text that is one of ``choices``; None stays None.

    Raises:
        UsageError: it is something else.
    """
    word = text(where, at, value, choices[0])
    if word is not None and word not in choices:
        raise UsageError(f"{where}: {at} cannot be {word!r}; {hint(word, choices)}")
    return word


def khz(where: str, value: object, at: str = "tsc_khz") -> int | None:
    """Return the frequency of a TSC in kHz; None stays None.

    Raises:
        UsageError: it is no whole number, or no frequency that a TSC has.
    """
    if value is None:
        return None
    if not isinstance(value, int) or isinstance(value, bool):
        raise UsageError(f"{where}: {at} must be a whole number of kHz, such as 2596122, not {value!r}")
    if value not in KHZ:
        meant = next((f"; did you mean {n}?" for n in (value * 1000, value // 1000) if n in KHZ), "")
        raise UsageError(f"{where}: {at} = {value} cannot be the frequency of a TSC in kHz{meant}")
    return value


def checked_release(at: str, name: str) -> release.Selection:
    """Return what a text names.

    Raises:
        UnknownRelease: nothing; the message begins with ``at``.
    """
    try:
        return release.parse(name)
    except UnknownRelease as exc:
        raise UnknownRelease(f"{at}: {exc}") from exc


def why(exc: OSError) -> str:
    """Say in a clause why a file cannot be read."""
    if isinstance(exc, FileNotFoundError):
        return "no such file"
    if isinstance(exc, PermissionError):
        return "no permission to read it"
    if isinstance(exc, IsADirectoryError):
        return "is a directory, not a file"
    return f"cannot be read ({exc.strerror or exc})"
