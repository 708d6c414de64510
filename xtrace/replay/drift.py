"""What a Xen tree has and the table has not: continuations that no entry claims, constants renumbered or new.

Every place that creates a continuation must be claimed by the fact file of its hypercall (``sites`` in FORMAT.md), so that
a new one, of a patch or a new release, cannot go unseen.
"""

from __future__ import annotations

import re
from functools import cache
from typing import TYPE_CHECKING, Final

from xtrace import release
from xtrace.replay.factfiles import documents, files, load
from xtrace.replay.sites import CALLS, call_sites, in_scope

if TYPE_CHECKING:
    from collections.abc import Iterator

    from xtrace.replay.xentree import XenTree

__all__ = ("Drift", "claims", "constants", "sites")

#: (where, what, problem or None)
Drift = tuple[str, str, str | None]

_WORDS: Final = tuple(f"hypercall_{kind}_continuation" for kind in CALLS)
_DEFINE: Final = re.compile(r"^[ \t]*#[ \t]*define[ \t]+(\w+)[ \t]+\(?(0[xX][0-9a-fA-F]+|\d+)[uUlL]*\)?[ \t]*(?:/\*.*)?$", re.M)
_HYPERCALLS: Final = ("__HYPERVISOR_", "xen.h")


def claims() -> dict[str, str]:
    """Return ``path:function`` -> the fact file that accounts for the continuations created there."""
    out: dict[str, str] = {}
    for number in files():
        for name, doc in documents(number):
            for site in doc["hypercall"].get("sites", ()):
                out.setdefault(site, name)
    return out


@cache
def _sites(path: str, text: str) -> list[tuple[str, int]]:
    return call_sites(path, text)


def _found(tree: XenTree, rev: str) -> dict[str, int]:
    out: dict[str, int] = {}
    for path in sorted({p for word in _WORDS for p in tree.grep(rev, word)}):
        if in_scope(path):
            for function, count in _sites(path, tree.file(rev, path) or ""):
                out[f"{path}:{function}"] = out.get(f"{path}:{function}", 0) + count
    return out


def sites(tree: XenTree, rev: str | None = None) -> Iterator[Drift]:
    """Check that every place that creates continuations is claimed by a fact file.

    Args:
        tree: a Xen repository.
        rev: one revision, where the number of calls in each function is compared with the newest known too; None for
            every release, where a claim that no release bears out is reported as well.
    """
    claimed = claims()
    known = release.releases()
    if rev is not None:
        before = _counts(known[-1].version)
        for site, count in _found(tree, rev).items():
            problem = None
            if site not in claimed:
                problem = f"creates continuations ({count} calls) and no entry claims it"
            elif before.get(site) != count:
                problem = f"{count} calls create continuations, {before.get(site, 0)} at {known[-1]}"
            yield site.partition(":")[0], site.partition(":")[2], problem
        return
    seen: set[str] = set()
    complete = True
    for r in known:
        complete &= tree.is_commit(r.tag)
        found = _found(tree, r.tag)
        seen |= set(found)
        for site, count in found.items():
            wrong = None if site in claimed else f"creates continuations ({count} calls) and no entry claims it"
            yield f"{site.partition(':')[0]} at {r.version}", site.partition(":")[2], wrong
    for site, name in claimed.items():
        if complete and site not in seen:
            yield name, site, "is claimed, and creates no continuation at any release"


def _counts(version: str) -> dict[str, int]:
    out: dict[str, int] = {}
    for row in load("sites.toml").get("site", ()):
        if version in release.expand(tuple(row["releases"])):
            out[f"{row['path']}:{row['function']}"] = out.get(f"{row['path']}:{row['function']}", 0) + int(row["calls"])
    return out


def constants(tree: XenTree, rev: str) -> Iterator[Drift]:
    """Compare the numbers in the public headers with those of the newest known revision that the tree has."""
    base = next((r for r in reversed(release.releases()) if tree.is_commit(r.tag)), None)
    if base is None:
        return
    families = [(str(f["prefix"]), str(f["header"])) for f in load("numbers.toml")["family"]]
    for prefix, header in dict.fromkeys([_HYPERCALLS, *families]):
        path = f"xen/include/public/{header}"
        old, new = (_defines(tree.file(at, path) or "", prefix) for at in (base.tag, rev))
        for name, value in new.items():
            problem = None
            if name not in old:
                problem = f"= {value} is new: not in the table"
            elif old[name] != value:
                problem = f"= {value}, was {old[name]} at {base}"
            yield path, name, problem
        for name in old.keys() - new.keys():
            yield path, name, f"is gone, was {old[name]} at {base}"


def _defines(text: str, prefix: str) -> dict[str, int]:
    return {m[1]: int(m[2], 0) for m in _DEFINE.finditer(text) if m[1].startswith(prefix)}
