"""Recipes for good recordings: what to run, what it needs and costs, what it will show and will not.

A recipe is data, one TOML file beside this module::

    id, title, order            order: place in the list
    guests                      guests it can be made for: "pv", "hvm"; the first is the default. Empty: makes no difference
    needs, costs, shows, hides  sentences
    script                      text for sh, with @name@ where a fact goes; @seconds@ is how long to record
    then                        what to do with what comes out

    [[fact]]     name, value, cite and, where it does not hold everywhere, releases (spans) and guest. ``absent`` in place of
                 ``value`` is why there is no recipe for those.
    [[figure]]   text and source: a number, and where it was measured
    [[line]]     what will come out, as a reader of xtrace reads it: format, text, and the event in it (op, args, rip, on_insn)

No release is named in code: facts are looked up, as everywhere.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from functools import cache
from importlib import resources
from typing import Any, Final

from xtrace import release as releases_mod
from xtrace.errors import FactError, UsageError

__all__ = ("GUESTS", "Made", "Recipe", "load", "make", "recipe")

#: Kinds of guest that a recipe can be made for.
GUESTS: Final = ("pv", "hvm")

_HOLE: Final = re.compile(r"@([a-z_0-9]+)@")
_KEYS: Final = {
    "id": str, "title": str, "order": int, "guests": list, "needs": list, "costs": list, "shows": list, "hides": list,
    "script": str, "then": list, "fact": list, "figure": list, "line": list,
}  # fmt: skip


@dataclass(frozen=True, slots=True)
class Fact:
    """A value that goes into the script, for some releases and guests."""

    name: str
    value: str | None
    cite: str
    absent: str | None
    guest: str | None
    spans: tuple[str, ...]  # empty: all releases


@dataclass(frozen=True, slots=True)
class Recipe:
    """One recipe as its file has it."""

    id: str
    title: str
    order: int
    guests: tuple[str, ...]
    needs: tuple[str, ...]
    costs: tuple[str, ...]
    shows: tuple[str, ...]
    hides: tuple[str, ...]
    script: str
    then: tuple[str, ...]
    facts: tuple[Fact, ...]
    #: (text, source)
    figures: tuple[tuple[str, str], ...]
    #: Lines that will come out: the tables of ``[[line]]``.
    lines: tuple[dict[str, Any], ...]

    @property
    def depends_on_release(self) -> bool:
        """Return whether a fact in it differs between releases."""
        return any(f.spans for f in self.facts)


@dataclass(frozen=True, slots=True)
class Made:
    """A recipe made for a release and a guest.

    Attributes:
        recipe: what it was made from.
        releases: versions it holds for.
        guest: ``pv`` or ``hvm``; None where it makes no difference.
        seconds: how long it records.
        script: text for sh.
        facts: those that the script was made with.
        note: what must be said aloud about the release, or None.
    """

    recipe: Recipe
    releases: tuple[str, ...]
    guest: str | None
    seconds: int
    script: str
    facts: tuple[Fact, ...]
    note: str | None = field(default=None)

    def fill(self, text: str) -> str:
        """Return a text of the recipe with its holes filled."""
        return _fill(text, self.facts, self.seconds)


@cache
def load() -> dict[str, Recipe]:
    """Return all recipes by id, in the order of the list.

    Raises:
        FactError: a file is not as described above.
    """
    found = [_read(f.name, f.read_bytes()) for f in resources.files(__name__).iterdir() if f.name.endswith(".toml")]
    return {r.id: r for r in sorted(found, key=lambda r: r.order)}


def recipe(name: str) -> Recipe:
    """Return one recipe.

    Raises:
        UsageError: there is none of that name.
    """
    import difflib

    known = load()
    if name not in known:
        near = difflib.get_close_matches(name, known, n=1)
        hint = f"did you mean {near[0]}?" if near else f"there are {', '.join(known)}"
        raise UsageError(f"no recipe is called {name!r}; {hint}")
    return known[name]


def make(name: str, release: str | None = None, guest: str | None = None, seconds: int = 60) -> Made:
    """Make a recipe for a release (any text that ``xtrace.release.parse`` takes; the newest without one) and a guest.

    Raises:
        UsageError: no such recipe or guest, the releases named need different recipes, or there is none for them.
        UnknownRelease: the text names no release.
    """
    chosen = recipe(name)
    if guest is not None and guest not in GUESTS:
        raise UsageError(f"--guest {guest}: there are {' and '.join(GUESTS)}")
    if guest is not None and chosen.guests and guest not in chosen.guests:
        raise UsageError(f"the recipe {name} is for {' and '.join(chosen.guests)} guests, not for {guest}")
    if seconds < 1:
        raise UsageError(f"--seconds {seconds}: record for at least one second")
    said = guest or (chosen.guests[0] if chosen.guests else None)
    named = releases_mod.parse(release or releases_mod.newest().version)
    versions = tuple(releases_mod.base(v) for v in named.versions)
    facts = tuple(_fact(chosen, hole, versions, said) for hole in _holes(chosen))
    for fact in facts:
        if fact.absent:
            raise UsageError(f"the recipe {name} cannot be used with Xen {releases_mod.fold_text(versions)}: {fact.absent}")
    return Made(chosen, versions, said, seconds, _fill(chosen.script, facts, seconds), facts, named.note)


def _holes(chosen: Recipe) -> list[str]:
    """Return the names of the facts that the recipe uses, those inside other facts included."""
    names = dict.fromkeys(n for text in (chosen.script, *chosen.then) for n in _HOLE.findall(text))
    for fact in chosen.facts:
        names.update(dict.fromkeys(_HOLE.findall(fact.value or "")))
    return [n for n in names if n != "seconds"]


def _fact(chosen: Recipe, name: str, versions: tuple[str, ...], guest: str | None) -> Fact:
    """Return the fact that holds for all these releases."""
    fit: dict[str, Fact] = {}
    for version in versions:
        holding = [f for f in chosen.facts if f.name == name and f.guest in (None, guest) and _holds(f, version)]
        if len(holding) != 1:
            raise FactError(f"recipes/{chosen.id}.toml: {len(holding)} facts called {name} hold for {version} and {guest}")
        fit[version] = holding[0]
    if len({id(f) for f in fit.values()}) > 1:
        parts = "; ".join(releases_mod.fold_text(v for v in versions if fit[v] is f) for f in dict.fromkeys(fit.values()))
        raise UsageError(f"the recipe {chosen.id} differs between these releases; name one of them, or a part: {parts}")
    return fit[versions[0]]


def _holds(fact: Fact, version: str) -> bool:
    return not fact.spans or version in releases_mod.expand(fact.spans)


def _fill(text: str, facts: tuple[Fact, ...], seconds: int) -> str:
    """Put the facts in their holes; a fact may have holes of its own, one deep."""
    values = {f.name: f.value or "" for f in facts} | {"seconds": str(seconds)}
    for _ in range(2):
        text = _HOLE.sub(lambda m: values.get(m[1], m[0]), text)
    return text


def _read(name: str, raw: bytes) -> Recipe:
    import tomllib

    try:
        doc = tomllib.loads(raw.decode())
    except ValueError as exc:
        raise FactError(f"recipes/{name} cannot be used: {exc}") from exc
    unknown = doc.keys() - _KEYS.keys()
    wrong = [k for k in ("id", "title", "order", "script") if not isinstance(doc.get(k), _KEYS[k])]
    wrong += [k for k, v in doc.items() if k in _KEYS and not isinstance(v, _KEYS[k])]
    if unknown or wrong:
        raise FactError(f"recipes/{name}: keys missing, unknown or of a wrong type: {', '.join(sorted({*unknown, *wrong}))}")
    texts = {k: tuple(doc.get(k, ())) for k in ("guests", "needs", "costs", "shows", "hides", "then")}
    try:
        facts = tuple(
            Fact(f["name"], f.get("value"), f["cite"], f.get("absent"), f.get("guest"), tuple(f.get("releases", ())))
            for f in doc.get("fact", ())
        )
        figures = tuple((f["text"], f["source"]) for f in doc.get("figure", ()))
    except KeyError as exc:
        raise FactError(f"recipes/{name}: a fact or figure lacks {exc}") from exc
    return Recipe(
        id=doc["id"], title=doc["title"], order=doc["order"], script=doc["script"], facts=facts, figures=figures,
        lines=tuple(doc.get("line", ())), **texts,
    )  # fmt: skip
