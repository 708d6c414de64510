"""The files of ``xtrace/replay/abi`` as they stand: parts of hypercalls, generated tables, and which of them covers what.

Nothing here says what a release does; :mod:`xtrace.replay.facts` looks entries up. See ``abi/FORMAT.md``.
"""

from __future__ import annotations

import tomllib
from functools import cache
from importlib import resources
from typing import TYPE_CHECKING, Any, Final

from xtrace import release as releases_mod
from xtrace.errors import FactError

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Mapping

__all__ = (
    "constant_number",
    "constants",
    "covers",
    "documents",
    "expand",
    "files",
    "has_caller",
    "hypercall_names",
    "in_table",
    "interface_version",
    "load",
    "only",
    "part",
)

#: Files of the data folder that are not one hypercall's facts.
OTHER: Final = frozenset(
    {"releases.toml", "tables.toml", "numbers.toml", "never.toml", "trace_events.toml", "sites.toml", "fixes.toml"}
)


@cache
def load(name: str) -> dict[str, Any]:
    """Return one file of the data folder.

    Raises:
        FactError: it is not there or no TOML.
    """
    try:
        return tomllib.loads(resources.files("xtrace.replay").joinpath("abi", name).read_text("utf-8"))
    except (OSError, ValueError) as exc:  # TOMLDecodeError and UnicodeDecodeError are ValueErrors
        raise FactError(f"abi/{name}: {exc}") from exc


@cache
def files() -> dict[int, tuple[str, ...]]:
    """Return the fact files of each hypercall number that has any: ``NAME.toml`` first, then its parts."""
    numbers = {row["name"]: int(row["number"]) for row in _table_rows("hypercall")}
    out: dict[int, list[str]] = {}
    for entry in resources.files("xtrace.replay").joinpath("abi").iterdir():
        if entry.name.endswith(".toml") and entry.name not in OTHER:
            name = entry.name.removesuffix(".toml").partition("-")[0]
            if name not in numbers:
                raise FactError(f"abi/{entry.name}: no hypercall is called {name}")
            out.setdefault(numbers[name], []).append(entry.name)
    return {n: tuple(sorted(names, key=lambda f: ("-" in f, f))) for n, names in sorted(out.items())}


def documents(number: int) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yield (name, content) of each fact file of a hypercall."""
    for name in files().get(number, ()):
        yield name, load(name)


@cache
def part(release: str, caller: str, number: int) -> str | None:
    """Return the fact file that speaks about ``release`` and ``caller``; None if no part does.

    Raises:
        FactError: two parts do.
    """
    found = [name for name, doc in documents(number) if covers({}, release, caller, doc["model"])]
    if len(found) > 1:
        raise FactError(f"abi: {' and '.join(found)} both speak about {caller} at {release}")
    return found[0] if found else None


@cache
def expand(spans: tuple[str, ...]) -> frozenset[str]:
    """Return the versions that spans cover; see ``release.expand``."""
    return releases_mod.expand(spans)


def covers(row: Mapping[str, Any], release: str, caller: str, model: Mapping[str, Any]) -> bool:
    """Say whether an entry speaks about ``release`` and ``caller``; what it leaves out stands in ``model``."""
    callers = row.get("callers", model.get("callers", ()))
    return caller in callers and release in expand(tuple(row.get("releases", model.get("releases", ()))))


def only(rows: Iterable[Mapping[str, Any]], what: str) -> Mapping[str, Any] | None:
    """Return the single entry, or None.

    Raises:
        FactError: there are several.
    """
    found = list(rows)
    if len(found) > 1:
        raise FactError(f"{what}: {len(found)} entries speak about the same release and caller")
    return found[0] if found else None


# ── generated tables ─────────────────────────────────────────────────────────────────────────────────────────────────


def _table_rows(kind: str) -> list[dict[str, Any]]:
    rows: list[dict[str, Any]] = load("tables.toml").get(kind, [])
    return rows


@cache
def hypercall_names() -> dict[int, str]:
    """Return hypercall number -> Xen's name, the newest one where it was renamed."""
    out = {int(row["number"]): str(row["name"]) for row in _table_rows("hypercall")}
    for number, names in files().items():
        out[number] = names[0].removesuffix(".toml").partition("-")[0]
    return out


@cache
def _present() -> dict[tuple[int, str], frozenset[str]]:
    out: dict[tuple[int, str], frozenset[str]] = {}
    for row in _table_rows("present"):
        for caller in row["callers"]:
            key = (int(row["number"]), str(caller))
            out[key] = out.get(key, frozenset()) | expand(tuple(row["releases"]))
    return out


@cache
def _tables() -> dict[str, frozenset[str]]:
    out: dict[str, frozenset[str]] = {}
    for row in _table_rows("table"):
        out[row["caller"]] = out.get(row["caller"], frozenset()) | expand(tuple(row["releases"]))
    return out


def in_table(release: str, caller: str, number: int) -> bool | None:
    """Say whether a hypercall has a handler in a caller's table; None where that table was not read, or there is none."""
    if release not in _tables().get(caller, frozenset()):
        caller = f"{caller}_on_x86_32"  # before the compat layer a 32-bit caller is one of the 32-bit build
    if release in _present().get((number, caller), frozenset()):
        return True
    return False if release in _tables().get(caller, frozenset()) else None


def has_caller(release: str, caller: str) -> bool:
    """Say whether a release has a hypercall table for a caller at all (PVHv1 went with 4.7, Arm came with 4.2)."""
    return any(release in _tables().get(c, frozenset()) for c in (caller, f"{caller}_on_x86_32"))


@cache
def constants() -> dict[str, list[tuple[int, frozenset[str]]]]:
    """Return constant name -> [(number, releases)], from the generated table."""
    out: dict[str, list[tuple[int, frozenset[str]]]] = {}
    for row in load("numbers.toml").get("constant", []):
        out.setdefault(row["name"], []).append((int(row["number"]), expand(tuple(row["releases"]))))
    return out


def constant_number(name: str, release: str) -> int | None:
    """Return the value of a public constant at a release; None where its headers do not define it."""
    return next((number for number, spans in constants().get(name, ()) if release in spans), None)


@cache
def interface_version(name: str, release: str) -> int | None:
    """Return the value of an interface version, such as ``XEN_DOMCTL_INTERFACE_VERSION``, at a release."""
    for row in load("numbers.toml").get("interface", []):
        if row["name"] == name and release in expand(tuple(row["releases"])):
            return int(row["number"])
    return None
