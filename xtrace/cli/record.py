"""``xtrace record``: how to make a good recording. It prints recipes and runs nothing."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from collections.abc import Iterator

    from xtrace.recipes import Made

NAME = "record"

_WIDTH = 80


def command(
    recipe: Annotated[str | None, typer.Argument(metavar="[RECIPE]", help="A recipe; all of them without one.")] = None,
    release: Annotated[
        str | None, typer.Option("--release", metavar="RELEASE", help="Xen release to record on; without it the newest.")
    ] = None,
    guest: Annotated[
        str | None, typer.Option("--guest", metavar="pv|hvm", help="What is recorded; hvm stands for PVH, too.")
    ] = None,
    seconds: Annotated[int, typer.Option("--seconds", metavar="N", min=1, max=10_000_000, help="How long to record.")] = 60,
    script: Annotated[bool, typer.Option("--script", help="Print nothing but the script, to be piped to sh.")] = False,
    format_: Annotated[str, typer.Option("--format", metavar="text|json", help="Form of the output.")] = "text",
) -> int:
    """Print recipes for a good recording: what to run, what it costs, what it will show and what not. Nothing is run."""
    from xtrace.errors import UsageError

    if format_ not in ("text", "json"):
        raise UsageError(f"--format {format_}: there are text and json")
    if recipe is None:
        if script:
            raise UsageError("--script needs a recipe; xtrace record lists them")
        return _list(format_)
    if script and format_ != "text":
        raise UsageError("--script prints the script alone; leave out --format")

    from xtrace.recipes import make

    made = make(recipe, release, guest, seconds)
    if made.note:
        print(f"xtrace: {made.note}", file=sys.stderr)
    if script:
        sys.stdout.write(made.script.strip() + "\n")
    elif format_ == "json":
        _dump(_document(made))
    else:
        for line in _text(made, release):
            print(line.rstrip())
    return 0


def _list(format_: str) -> int:
    from xtrace.recipes import load

    known = load().values()
    if format_ == "json":
        _dump({"recipes": [{"id": r.id, "title": r.title, "guests": list(r.guests)} for r in known]})
        return 0
    for r in known:
        print(f"{r.id:<12}{r.title}")
    print("\nxtrace record NAME prints one; with --script only what to pipe to sh.")
    return 0


def _text(made: Made, named: str | None) -> Iterator[str]:
    from xtrace import release
    from xtrace.cli.common import wrap

    recipe = made.recipe
    yield from wrap(f"{recipe.id}: {recipe.title}", "", "  ").splitlines()
    about = []
    if recipe.depends_on_release:
        about.append(f"Xen {release.fold_text(made.releases)}" + ("" if named else " (name another with --release)"))
    if made.guest:
        about.append(f"{made.guest} guests" + (" (or --guest hvm)" if made.guest == "pv" and "hvm" in recipe.guests else ""))
    if about:
        yield f"For {', '.join(about)}."
    for title, sentences in (
        ("Needs", recipe.needs), ("Costs", recipe.costs), ("Shows", recipe.shows), ("Does not show", recipe.hides),
    ):  # fmt: skip
        yield f"\n{title}"
        for sentence in sentences:
            yield wrap(sentence, "  - ", "    ")
    yield "\nScript"
    yield ""
    yield from made.script.strip().splitlines()
    yield "\nThen"
    yield ""
    yield from (made.fill(line) for line in recipe.then)
    for line in recipe.lines:
        if line.get("guest") in (None, made.guest):
            yield "\nWhat comes out, as far as xtrace reads it (each is one line)"
            for text in line["text"].strip("\n").splitlines():
                yield wrap(text.strip(), "  ", "      ")
    yield "\nWhere this comes from"
    for text, source in recipe.figures:
        yield wrap(f"{text} [{source}]", "  - ", "    ")
    for fact in made.facts:
        value = fact.value or ""
        shown = f"{fact.name} {value}: " if value.strip() and "\n" not in value and len(value) < 24 else f"{fact.name}: "
        yield wrap(f"{shown}{fact.cite}", "  - ", "    ")


def _document(made: Made) -> dict[str, Any]:
    from xtrace import release

    recipe = made.recipe
    return {
        "id": recipe.id,
        "title": recipe.title,
        "releases": list(made.releases) if recipe.depends_on_release else None,
        "releases_folded": release.fold(made.releases) if recipe.depends_on_release else None,
        "guest": made.guest,
        "seconds": made.seconds,
        "needs": list(recipe.needs),
        "costs": list(recipe.costs),
        "shows": list(recipe.shows),
        "does_not_show": list(recipe.hides),
        "script": made.script.strip() + "\n",
        "then": [made.fill(line) for line in recipe.then],
        "lines": [
            {"format": line["format"], "text": line["text"].strip("\n")}
            for line in recipe.lines
            if line.get("guest") in (None, made.guest)
        ],
        "facts": [
            {
                "name": f.name,
                "value": f.value,
                "releases": release.fold(release.expand(f.spans)) if f.spans else None,
                "cite": f.cite,
            }
            for f in made.facts
        ],
        "figures": [{"text": text, "source": source} for text, source in recipe.figures],
    }


def _dump(document: dict[str, Any]) -> None:
    import json

    json.dump(document, sys.stdout, indent=2, ensure_ascii=False)
    sys.stdout.write("\n")
