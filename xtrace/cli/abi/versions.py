"""``xtrace abi versions``: the releases that xtrace knows."""

from __future__ import annotations

NAME = "versions"


def command() -> int:
    """List every release known, with its date, tag and commit, and the callers that are modelled there."""
    from xtrace.release import releases
    from xtrace.replay.facts import modelled_releases
    from xtrace.schema import CALLERS

    known = {c: modelled_releases(c) for c in CALLERS}
    for r in releases():
        modelled = " ".join(c for c in CALLERS if r.version in known[c]) or "not modelled"
        tag = r.tag if r.released else "(unreleased)"
        print(f"{r.version:13} {r.date} {tag:16} {r.commit[:12]} {modelled}")
    return 0
