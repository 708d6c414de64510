"""Checking the cites of the fact files against a real Xen tree, so that a claim can be refuted in a minute."""

from __future__ import annotations

import re
import tomllib
from dataclasses import dataclass
from importlib import resources
from typing import TYPE_CHECKING, Any

from xtrace import release
from xtrace.replay import drift
from xtrace.replay.xentree import definition

if TYPE_CHECKING:
    from collections.abc import Iterator

    from xtrace.replay.xentree import XenTree

__all__ = ("Checked", "cites", "verify")


@dataclass(frozen=True, slots=True)
class Checked:
    """One cite at one tag. ``problem`` is None where it holds."""

    file: str
    cite: str
    tag: str
    problem: str | None


def cites() -> Iterator[tuple[str, str, dict[str, Any]]]:
    """Yield (fact file, name, cite) of every cite."""
    folder = resources.files("xtrace.replay").joinpath("abi")
    for entry in sorted(folder.iterdir(), key=lambda e: e.name):
        if entry.name.endswith(".toml"):
            found = tomllib.loads(entry.read_text("utf-8")).get("cite", {})
            for name, cite in found.items():
                yield entry.name, name, cite


def verify(tree: XenTree, tag: str | None = None) -> Iterator[Checked]:
    """Check every cite at the tags that it names (the ends of its range), and what the tree has beyond the table.

    A cite that holds at the newest release is checked at the development snapshot too.

    Args:
        tree: a Xen repository.
        tag: check what holds today at this revision instead: a branch with a patch, a new release.
    """
    newest, last = release.newest(), release.releases()[-1]
    for file, name, cite in cites():
        tags = [cite["tag"], *cite.get("also", [])]
        current = newest.tag in tags or last.tag in tags
        if tag is not None:
            tags = [tag] if current else []
        elif current and tree.is_commit(last.tag):
            tags.append(last.tag)
        for t in dict.fromkeys(tags):
            yield Checked(file, name, t, _problem(tree, cite, t))
        commit = cite.get("commit")
        if commit and tag is None and not tree.is_commit(commit):
            yield Checked(file, name, commit, "no such commit")
    for where, what, problem in drift.sites(tree, tag):
        yield Checked(where, what, tag or "its tag", problem)
    if tag is not None:
        for where, what, problem in drift.constants(tree, tag):
            yield Checked(where, what, tag, problem)


def _problem(tree: XenTree, cite: dict[str, Any], tag: str) -> str | None:
    text = tree.file(tag, cite["path"])
    if text is None:
        known = {r.tag for r in release.releases()}
        if tag in known and not tree.is_commit(tag):
            return "the tree has no such tag"
        return f"{cite['path']} is not there"
    body = definition(text, cite["symbol"], cite["path"])
    if body is None:
        return f"{cite['path']} does not define {cite['symbol']}"
    if cite.get("expect") and not re.search(cite["expect"], body):
        return f"{cite['symbol']} does not hold {cite['expect']!r}"
    if cite.get("lacks") and re.search(cite["lacks"], body):
        return f"{cite['symbol']} holds {cite['lacks']!r}"
    return None
