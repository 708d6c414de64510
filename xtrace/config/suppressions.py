"""Suppressions: findings that somebody has looked at and accepts, written down with the reason.

::

    [[suppress]]
    code = "XT005"                       # one or a list, as for every selector
    hypercall = "memory_op/XENMEM_exchange"      # or "memory_op": all of its sub-operations
    domain = 3                           # by number; "unknown" where the trace does not say
    caller = "pv64"
    from = "4.13"                        # a release, a series or a range
    to = "4.17..4.19"
    reason = "drained by the toolstack before it moves (ticket 4711)"
    expires = 2027-01-31                 # the last day on which it counts

At least one selector and the reason must be there. A finding must fit every selector that is given.
"""

from __future__ import annotations

import datetime
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final

from xtrace.config import checks
from xtrace.errors import UsageError

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

__all__ = ("SELECTORS", "Suppression", "read")

#: What a suppression chooses findings by.
SELECTORS: Final = ("code", "hypercall", "domain", "caller", "from", "to")

_KEYS: Final = (*SELECTORS, "reason", "expires")


@dataclass(frozen=True, slots=True)
class Suppression:
    """One ``[[suppress]]``; an empty selector is one that was not given.

    Attributes:
        reason: why the findings are accepted.
        codes: codes of rules.
        hypercalls: Xen's names, ``hypercall`` or ``hypercall/sub-operation``.
        domains: numbers; None for a domain that the trace does not tell.
        callers: ABIs of the caller.
        sources: versions that wrote the trace: all that are possible must be among them.
        targets: versions at which the findings are accepted.
        expires: the last day on which it counts.
        said: the selectors as they were written, by key.
        path: the file that says it.
        line: of its header, from 1; None if not known.
    """

    reason: str
    codes: tuple[str, ...] = ()
    hypercalls: tuple[str, ...] = ()
    domains: tuple[int | None, ...] = ()
    callers: tuple[str, ...] = ()
    sources: tuple[str, ...] = ()
    targets: tuple[str, ...] = ()
    expires: datetime.date | None = None
    said: tuple[tuple[str, str], ...] = ()
    path: str = ""
    line: int | None = None

    def expired(self, today: datetime.date) -> bool:
        """Say whether its last day is over."""
        return self.expires is not None and self.expires < today

    @property
    def where(self) -> str:
        """Return its place, as an error names it."""
        return self.path if self.line is None else f"{self.path}: line {self.line}"

    @property
    def selectors(self) -> str:
        """Return what it chooses, as it was written."""
        return ", ".join(f"{key} {value}" for key, value in self.said)


def read(where: str, prefix: str, rows: object, lines: Sequence[int | None] = ()) -> tuple[Suppression, ...]:
    """Check the ``[[suppress]]`` tables of a file.

    Args:
        where: the file.
        prefix: ``tool.xtrace.`` in a file that has other tables.
        rows: what TOML has under ``suppress``.
        lines: line of each header.

    Raises:
        UsageError: one cannot be used; the message names file, line and key.
    """
    if not isinstance(rows, list) or not all(isinstance(row, dict) for row in rows):
        raise UsageError(f"{where}: {prefix}suppress must be tables with two brackets: [[{prefix}suppress]]")
    places = [*lines, *[None] * len(rows)]
    return tuple(_one(where, places[k], row) for k, row in enumerate(rows))


def _one(path: str, line: int | None, row: Mapping[str, Any]) -> Suppression:
    where = path if line is None else f"{path}: line {line}"
    checks.known(where, "suppress.", row, _KEYS)
    reason = checks.text(where, "suppress.reason", row.get("reason"), "drained before it moves")
    if reason is None:
        raise UsageError(f"{where}: suppress has no reason; say why these findings are accepted")
    if not any(key in row for key in SELECTORS):
        raise UsageError(f"{where}: suppress chooses nothing; give at least one of {', '.join(SELECTORS)}")
    return Suppression(
        reason=" ".join(reason.split()),
        codes=_texts(where, "code", row, "XT005"),
        hypercalls=_texts(where, "hypercall", row, "memory_op"),
        domains=_domains(where, row),
        callers=tuple(str(checks.choice(where, "suppress.caller", c, checks.CALLERS)) for c in _items(where, "caller", row)),
        sources=_versions(where, "from", row),
        targets=_versions(where, "to", row),
        expires=_date(where, row.get("expires")),
        said=tuple((key, "|".join(map(str, _items(where, key, row)))) for key in SELECTORS if key in row),
        path=path,
        line=line,
    )


def _items(where: str, key: str, row: Mapping[str, Any]) -> list[Any]:
    """Return the one value, or the several of a list."""
    if key not in row:
        return []
    value = row[key]
    if value == []:
        raise UsageError(f"{where}: suppress.{key} is an empty list, which would choose nothing; leave it out to choose all")
    return value if isinstance(value, list) else [value]


def _texts(where: str, key: str, row: Mapping[str, Any], such: str) -> tuple[str, ...]:
    return tuple(str(checks.text(where, f"suppress.{key}", item, such)) for item in _items(where, key, row))


def _domains(where: str, row: Mapping[str, Any]) -> tuple[int | None, ...]:
    out: list[int | None] = []
    for item in _items(where, "domain", row):
        if item == "unknown":
            out.append(None)
        elif isinstance(item, bool) or not isinstance(item, int) or not 0 <= item < checks.MAX_DOMID:
            raise UsageError(
                f'{where}: suppress.domain must be a domain number (0 to {checks.MAX_DOMID - 1}) or "unknown", not {item!r}'
            )
        else:
            out.append(item)
    return tuple(out)


def _versions(where: str, key: str, row: Mapping[str, Any]) -> tuple[str, ...]:
    out: dict[str, None] = {}
    for name in _texts(where, key, row, "4.17"):
        chosen = checks.checked_release(f"{where}: suppress.{key}", name)
        if not chosen.exact and chosen.versions != (name,):
            # What is judged "as the nearest" must not be accepted unseen.
            raise UsageError(f"{where}: suppress.{key} must name known releases exactly: {chosen.note}")
        out.update(dict.fromkeys(chosen.versions))
    return tuple(out)


def _date(where: str, value: object) -> datetime.date | None:
    if value is None:
        return None
    if isinstance(value, datetime.datetime) or not isinstance(value, datetime.date):
        raise UsageError(f"{where}: suppress.expires must be a date without quotes, such as 2027-01-31, not {str(value)!r}")
    return value
