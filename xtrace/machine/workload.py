"""What a simulated host does: a small TOML file of domains, their vCPUs and the calls that they make.

See docs/simulate.md. Every key but the domains' calls may be left out; a key that is not known is an error.
"""

from __future__ import annotations

import difflib
import os
import tomllib
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from xtrace.config import CALLERS, ROLES
from xtrace.errors import InputError, UsageError
from xtrace.replay import facts

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

__all__ = ("MULTICALL", "Domain", "Kind", "Workload", "read")

#: __HYPERVISOR_multicall.
MULTICALL: Final = 13

#: Who issues the calls of a domain with a given role.
_ISSUER: Final = {"guest": "guest", "device_model": "device_model", "stub": "device_model", "control": "control"}

_MAX_DOMID: Final = 0x7FF0

#: Most units of a call: the machine keeps each of them.
_MOST: Final = 1 << 16


@dataclass(frozen=True, slots=True)
class Kind:
    """One kind of call that a domain makes.

    Attributes:
        number: hypercall number.
        operation: Xen's constant; None: any operation of it that may continue, drawn anew for each call.
        weight: how often, against the others of its list.
        total: fewest and most units asked for.
        swapped: where the order of the work hangs on the operands: begin at the far end.
        entries: of a multicall: the kinds of calls in it.
    """

    number: int
    operation: str | None
    weight: float
    total: tuple[int, int]
    swapped: bool = False
    entries: tuple[Kind, ...] = ()


@dataclass(frozen=True, slots=True)
class Domain:
    """A domain: number, ABI, role, how many vCPUs, whether it goes along in a migration, and what it calls."""

    domid: int
    caller: str
    role: str
    name: str | None
    vcpus: int
    migrates: bool
    calls: tuple[Kind, ...]

    @property
    def issuer(self) -> str:
        """Who issues its calls: guest, device_model or control."""
        return _ISSUER[self.role]


@dataclass(frozen=True, slots=True)
class Workload:
    """A workload; probabilities are of one chance each.

    Attributes:
        name: for the report.
        calls: logical calls made in all, those inside multicalls not counted.
        pcpus: physical CPUs of each host.
        tsc_khz: TSC frequency.
        preempt: that an event comes in while an entry runs (where Xen looks for it decides what becomes of it).
        switch: that a pCPU takes another vCPU before the next entry.
        park: that a preempted call is a user task's that sleeps, while its vCPU runs other calls.
        wake: that a vCPU takes up a sleeping task of its domain instead of making a new call.
        lost: that the recorder begins to lose records, for each record.
        lost_records: fewest and most records lost then.
        cooperative: a migration waits until every vCPU is out of Xen, so that only sleeping tasks' calls are caught.
        domains: in the order of the file.
    """

    name: str
    calls: int
    pcpus: int
    tsc_khz: int
    preempt: float
    switch: float
    park: float
    wake: float
    lost: float
    lost_records: tuple[int, int]
    cooperative: bool
    domains: tuple[Domain, ...]


_TOP: Final = ("workload", "domain")
_WORKLOAD: Final = (
    "name", "calls", "pcpus", "tsc_khz", "preempt", "switch", "park", "wake", "lost", "lost_records", "cooperative",
)  # fmt: skip
_DOMAIN: Final = ("id", "caller", "role", "name", "vcpus", "migrates", "call")
_CALL: Final = ("hypercall", "operation", "weight", "total", "overlapping", "entry")
_ENTRY: Final = ("hypercall", "operation", "weight", "total", "overlapping")


def read(path: str | os.PathLike[str]) -> Workload:
    """Read a workload file.

    Raises:
        InputError: it cannot be read or is not TOML.
        UsageError: a key is unknown or missing, or has a bad value; the message names the file and the key.
    """
    where = os.fspath(path)
    try:
        doc = tomllib.loads(Path(path).read_bytes().decode("utf-8-sig"))
    except FileNotFoundError as exc:
        raise InputError(where, "no such file") from exc
    except IsADirectoryError as exc:
        raise InputError(where, "is a directory, not a file") from exc
    except OSError as exc:
        raise InputError(where, f"cannot be read ({exc.strerror or exc})") from exc
    except UnicodeDecodeError as exc:
        raise InputError(where, "is not UTF-8 text", offset=exc.start) from exc
    except tomllib.TOMLDecodeError as exc:
        raise InputError(where, f"is not TOML: {exc}") from exc
    top = _Table(where, "", doc, _TOP)
    w = _Table(where, "workload.", top.table("workload"), _WORKLOAD)
    out = Workload(
        name=w.text("name") or Path(path).name.removesuffix(".toml"),
        calls=w.whole("calls", 200, 1, 1_000_000),
        pcpus=w.whole("pcpus", 2, 1, 256),
        tsc_khz=w.whole("tsc_khz", 2_600_000, 10_000, 20_000_000),
        preempt=w.chance("preempt", 0.4, 0.99),
        switch=w.chance("switch", 0.2),
        park=w.chance("park", 0.2),
        wake=w.chance("wake", 0.3),
        lost=w.chance("lost", 0.0, 0.5),
        lost_records=w.span("lost_records", (4, 32), 1, 1_000_000),
        cooperative=w.flag("cooperative", False),
        domains=tuple(_domain(where, k, row) for k, row in enumerate(top.tables("domain"))),
    )
    if not out.domains:
        raise UsageError(f"{where}: there is no [[domain]]: nobody makes a call")
    numbers = [d.domid for d in out.domains]
    for n in numbers:
        if numbers.count(n) > 1:
            raise UsageError(f"{where}: domain {n} is there twice")
    return out


def _domain(where: str, k: int, row: Mapping[str, Any]) -> Domain:
    t = _Table(where, f"domain[{k}].", row, _DOMAIN)
    domid = t.whole("id", None, 0, _MAX_DOMID)
    role = t.choice("role", ROLES) or ("guest" if domid else "control")
    caller = t.choice("caller", CALLERS)
    if caller is None:
        raise UsageError(f"{where}: domain[{k}].caller is missing; there are {', '.join(CALLERS)}")
    calls = tuple(_kind(where, f"domain[{k}].call[{i}].", r, _CALL) for i, r in enumerate(t.tables("call")))
    if not calls:
        raise UsageError(f"{where}: domain[{k}] has no [[domain.call]]")
    return Domain(domid, caller, role, t.text("name"), t.whole("vcpus", 1, 1, 128), t.flag("migrates", role == "guest"), calls)


def _kind(where: str, prefix: str, row: Mapping[str, Any], keys: tuple[str, ...]) -> Kind:
    t = _Table(where, prefix, row, keys)
    name = row.get("hypercall")
    if name is None:
        raise UsageError(f"{where}: {prefix}hypercall is missing")
    number = _hypercall(f"{where}: {prefix}hypercall", name)
    entries = tuple(_kind(where, f"{prefix}entry[{i}].", r, _ENTRY) for i, r in enumerate(t.tables("entry")))
    if entries and number != MULTICALL:
        raise UsageError(f"{where}: {prefix}entry: only a multicall has entries")
    if number == MULTICALL and "entry" not in keys:
        raise UsageError(f"{where}: {prefix}hypercall: Xen refuses a multicall inside a multicall")
    if number == MULTICALL and not entries:
        raise UsageError(f"{where}: {prefix}entry is missing: a multicall needs calls in it")
    weight = row.get("weight", 1)
    if isinstance(weight, bool) or not isinstance(weight, int | float) or not 0 < weight <= 1e6:
        raise UsageError(f"{where}: {prefix}weight must be above 0, not {weight!r}")
    total = t.span("total", (2, 8) if entries else (2, 64), 1, _MOST)
    return Kind(number, t.text("operation"), float(weight), total, t.flag("overlapping", False), entries)


def _hypercall(where: str, value: object) -> int:
    names = facts.hypercall_names()
    if isinstance(value, int) and not isinstance(value, bool) and value in names:
        return value
    plain = str(value).removeprefix("__HYPERVISOR_")
    for n, name in names.items():
        if name == plain:
            return n
    near = difflib.get_close_matches(plain, list(names.values()), n=1)
    hint = f"; did you mean {near[0]!r}?" if near else ""
    raise UsageError(f"{where}: no Xen release has a hypercall called {value!r}{hint}")


@dataclass(frozen=True, slots=True)
class _Table:
    """One table of the file, and where it stands; keys that it may not have are refused at once."""

    where: str
    prefix: str
    row: Mapping[str, Any]
    keys: tuple[str, ...]

    def __post_init__(self) -> None:
        for key in self.row:
            if key not in self.keys:
                raise UsageError(f"{self.where}: no key is called {self.prefix + key!r}; {_hint(key, self.keys)}")

    def _bad(self, key: str, what: str) -> UsageError:
        return UsageError(f"{self.where}: {self.prefix}{key} must be {what}, not {self.row[key]!r}")

    def table(self, key: str) -> Mapping[str, Any]:
        value = self.row.get(key, {})
        if not isinstance(value, dict):
            raise self._bad(key, f"a table: [{self.prefix}{key}]")
        return value

    def tables(self, key: str) -> list[Mapping[str, Any]]:
        value = self.row.get(key, [])
        if not isinstance(value, list) or not all(isinstance(v, dict) for v in value):
            raise self._bad(key, f"tables: [[{key}]]")
        return value

    def text(self, key: str) -> str | None:
        value = self.row.get(key)
        if value is not None and (not isinstance(value, str) or not value.strip()):
            raise self._bad(key, "text in quotes")
        if key == "name" and value is not None and len(value.split()) != 1:
            raise self._bad(key, "a word without blanks")
        return value

    def choice(self, key: str, choices: tuple[str, ...]) -> str | None:
        value = self.text(key)
        if value is not None and value not in choices:
            raise UsageError(f"{self.where}: {self.prefix}{key} cannot be {value!r}; {_hint(value, choices)}")
        return value

    def flag(self, key: str, default: bool) -> bool:
        value = self.row.get(key, default)
        if not isinstance(value, bool):
            raise self._bad(key, "true or false")
        return value

    def whole(self, key: str, default: int | None, low: int, high: int) -> int:
        value = self.row.get(key, default)
        if value is None:
            raise UsageError(f"{self.where}: {self.prefix}{key} is missing")
        if not _is_whole(value) or not low <= value <= high:
            raise self._bad(key, f"a whole number from {low} to {high}")
        return int(value)

    def chance(self, key: str, default: float, most: float = 1.0) -> float:
        value = self.row.get(key, default)
        if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value <= most:
            raise self._bad(key, f"a probability from 0 to {most:g}")
        return float(value)

    def span(self, key: str, default: tuple[int, int], low: int, high: int) -> tuple[int, int]:
        value = self.row.get(key, list(default))
        both = [value, value] if _is_whole(value) else value
        if (
            not isinstance(both, list)
            or len(both) != 2
            or not all(_is_whole(v) for v in both)
            or not low <= both[0] <= both[1] <= high
        ):
            raise self._bad(key, f"a number, or [fewest, most], from {low} to {high}")
        return both[0], both[1]


def _is_whole(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _hint(word: str, words: Iterable[str]) -> str:
    choices = list(words)
    near = difflib.get_close_matches(word.lower(), choices, n=1, cutoff=0.5)
    return f"did you mean {near[0]!r}?" if near else f"there are {', '.join(choices)}"
