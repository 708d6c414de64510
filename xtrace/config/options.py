"""The options that can be written down once: in a file or in the environment, for every command that takes them.

A new one is one row of ``OPTIONS``; command line, environment, file, ``xtrace config`` and the tests follow from it.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

from xtrace.config import checks
from xtrace.errors import UsageError

if TYPE_CHECKING:
    from pathlib import Path

__all__ = ("OPTIONS", "Option", "Value", "by_name", "shown")

#: What an option can be: text, a whole number, or several texts. None: not said.
Value = str | int | tuple[str, ...] | None


@dataclass(frozen=True, slots=True)
class Option:
    """One option.

    Attributes:
        name: key in the file, ``XTRACE_NAME`` in the environment, ``--na-me`` on the command line.
        commands: those that take it.
        read: checks a value; called with the file or variable, the key and the value, which in the environment is text.
        help: what it says, in a few words.
        default: what holds where nothing is said.
        several: takes a list, in the environment separated by commas.
    """

    name: str
    commands: tuple[str, ...]
    read: Callable[[str, str, object], Value]
    help: str
    default: Value = None
    several: bool = False

    @property
    def variable(self) -> str:
        """Return the name of its environment variable."""
        return f"XTRACE_{self.name.upper()}"

    @property
    def flag(self) -> str:
        """Return its name on the command line."""
        return "--" + self.name.replace("_", "-")

    @property
    def parameter(self) -> str:
        """Return the name of the commands' Python parameter, which cannot be called as a word of Python is."""
        return {"from": "source", "format": "format_"}.get(self.name, self.name)

    def from_file(self, where: str, at: str, value: object, folder: Path) -> Value:
        """Check what a file says; names of files count from the file's folder.

        Raises:
            UsageError: it cannot be used; the message names file and key.
        """
        got = self.read(where, at, value)
        return str(folder / got) if self.read is _path and isinstance(got, str) else got

    def from_environment(self, environment: Mapping[str, str]) -> Value:
        """Check what the environment says; None if nothing: an empty variable says nothing.

        Raises:
            UsageError: it cannot be used; the message names the variable.
        """
        said = environment.get(self.variable, "").strip()
        if not said:
            return None
        value: object = [word.strip() for word in said.split(",") if word.strip()] if self.several else said
        if self.read is _khz:
            value = int(said) if re.fullmatch(r"[0-9]{1,12}", said) else said
        return self.read("environment", self.variable, value)


def shown(value: Value) -> str:
    """Return a value as text."""
    if value is None:
        return "not set"
    return ", ".join(value) if isinstance(value, tuple) else str(value)


# ── the kinds of values ──────────────────────────────────────────────────────────────────────────────────────────────


def _path(where: str, at: str, value: object) -> Value:
    got = checks.text(where, at, value, "xl-info.txt")
    return None if got is None else os.path.expanduser(got)  # noqa: PTH111 - a Path would lose "./"


def _name(where: str, at: str, value: object) -> Value:
    return checks.text(where, at, value, "xentrace")


def _khz(where: str, at: str, value: object) -> Value:
    return checks.khz(where, value, at)


def _release(where: str, at: str, value: object) -> Value:
    name = checks.text(where, at, value)
    if name is not None:
        checks.checked_release(f"{where}: {at}", name)
    return name


def _several(one: Callable[[str, str, object], Value], such: str) -> Callable[[str, str, object], Value]:
    def read(where: str, at: str, value: object) -> Value:
        items = [value] if isinstance(value, str) else value
        if not isinstance(items, Sequence) or not items or not all(isinstance(i, str) for i in items):
            raise UsageError(f"{where}: {at} must be text or a list of texts, such as {such}, not {value!r}")
        return tuple(str(one(where, at, item)) for item in items)

    return read


def _caller(where: str, at: str, value: object) -> Value:
    said = checks.text(where, at, value, "pv64")
    who, equals, kind = str(said).rpartition("=")
    number = who.removeprefix("d")
    if equals and not (re.fullmatch(r"[0-9]{1,5}", number) and int(number) < checks.MAX_DOMID):
        raise UsageError(f"{where}: {at}: {who!r} is no domain; write d3=pv64")
    checks.choice(where, at, kind, checks.CALLERS)
    return said


def _one_of(*choices: str) -> Callable[[str, str, object], Value]:
    return lambda where, at, value: checks.choice(where, at, value, choices)


def _joined(*choices: str) -> Callable[[str, str, object], Value]:
    several = _several(_one_of(*choices), f'["{choices[0]}"]')

    def read(where: str, at: str, value: object) -> Value:
        words = [w.strip() for w in value.split(",")] if isinstance(value, str) else value
        got = several(where, at, words)
        return ",".join(got) if isinstance(got, tuple) else got

    return read


_READERS: Final = ("analyze", "replay", "identify", "ingest")

#: Every option that can be written down; the others belong to one run.
OPTIONS: Final = (
    Option("from", ("analyze", "inspect"), _release, "release that wrote the trace"),
    Option("to", ("analyze", "inspect"), _several(_release, '["4.18", "4.19"]'), "releases to judge against", several=True),
    Option("caller", _READERS[:3], _several(_caller, '["d0=pv64", "hvm64"]'), "caller ABI", several=True),
    Option(
        "migration",
        ("analyze",),
        _several(_one_of(*checks.MIGRATIONS), '["cooperative"]'),
        "kinds of migration that can happen",
        several=True,
    ),
    Option("tsc_khz", _READERS, _khz, "TSC frequency of the host, kHz"),
    Option("host_info", ("analyze",), _path, "text of xl info or xl dmesg"),
    Option("input_format", _READERS, _name, "format of the input"),
    Option("format", ("analyze",), _one_of("text", "json", "jsonl"), "form of the report", "text"),
    Option(
        "fail_on",
        ("analyze", "inspect"),
        _joined("break", "review", "incomplete", "never"),
        "exit bits to keep",
        "break,review,incomplete",
    ),
)


def by_name() -> dict[str, Option]:
    """Return name -> option, in order."""
    return {option.name: option for option in OPTIONS}
