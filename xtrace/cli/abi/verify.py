"""``xtrace abi verify``: the facts against Xen's sources."""

from __future__ import annotations

import sys
from typing import Annotated

import typer

NAME = "verify"


def command(
    xen_git: Annotated[str, typer.Option("--xen-git", metavar="DIR", help="A Xen repository with its release tags.")],
    tag: Annotated[
        str | None, typer.Option("--tag", metavar="REV", help="Check what holds today at this tag, branch or commit instead.")
    ] = None,
) -> int:
    """Check every cite against Xen's sources: file, symbol and value at the ends of its range.

    Also lists what Xen has and the table has not: a place that creates continuations and that no entry claims, one that is
    claimed and gone, a constant renumbered or new in the public headers. With --tag it is a guard for a patch or a new release.

    Exit status: 0 all hold, 8 some do not.
    """
    from xtrace.errors import InputError
    from xtrace.release import releases
    from xtrace.replay.verify import verify
    from xtrace.replay.xentree import XenTree

    done = bad = 0
    with XenTree(xen_git) as tree:
        if tag is not None and not tree.is_commit(tag):
            raise InputError(xen_git, f"has no revision {tag}")
        if not any(tree.is_commit(r.tag) for r in releases()):
            raise InputError(xen_git, "holds none of Xen's release tags: fetch them (git fetch --tags)")
        for c in verify(tree, tag):
            done += 1
            if c.problem is not None:
                bad += 1
                print(f"{c.file}: {c.cite} at {c.tag}: {c.problem}")
    print(f"xtrace: {done:,} checks, {bad:,} do not hold", file=sys.stderr)
    return 8 if bad else 0
