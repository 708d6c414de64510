"""Which releases a trace can come from: those that write every kind of record seen in it.

A thin first version: event ids only. Absence of an id proves nothing (it may have been masked away).
"""

from __future__ import annotations

import tomllib
from functools import cache
from importlib import resources
from typing import TYPE_CHECKING

from xtrace import release

if TYPE_CHECKING:
    from collections.abc import Iterable

__all__ = ("possible",)


@cache
def _events() -> tuple[tuple[frozenset[int], frozenset[str]], ...]:
    text = resources.files("xtrace.replay").joinpath("abi", "trace_events.toml").read_text("utf-8")
    return tuple((frozenset(row["ids"]), release.expand(tuple(row["releases"]))) for row in tomllib.loads(text)["event"])


def possible(event_ids: Iterable[int]) -> tuple[str, ...]:
    """Return the releases that write all of ``event_ids``, in order; empty if they contradict each other."""
    seen = frozenset(event_ids)
    left = {r.version for r in release.releases()}
    for ids, spans in _events():
        if seen & ids:
            left &= spans
    return tuple(r.version for r in release.releases() if r.version in left)
