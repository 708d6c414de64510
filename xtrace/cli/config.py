"""``xtrace config``: which options and suppressions hold here, and what says so."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any, TextIO

import typer

from xtrace.cli.options import Output

if TYPE_CHECKING:
    from xtrace.analyze.suppress import Used
    from xtrace.config.settings import Settings

NAME = "config"

_WIDTH = 80


def command(
    context: typer.Context,
    format_: Annotated[str, typer.Option("--format", metavar="text|json", help="Form of the output.")] = "text",
    output: Output = None,
) -> int:
    """Show every option that can be written down, its value here and what says so, and the suppressions.

    A command line goes before the environment (XTRACE_TO=4.17,4.18), the environment before a file: xtrace.toml or
    [tool.xtrace] of pyproject.toml, of this folder or the nearest one above, or what --config FILE names (none: no file).

    Exit status: 0, or 3 if an option or a suppression cannot be used.
    """
    from xtrace.analyze.suppress import Suppressor
    from xtrace.cli.common import choose_format
    from xtrace.cli.given import given
    from xtrace.cli.options import opened

    choose_format(format_)
    settings = given(context).settings
    used = Suppressor(settings.suppressions).used
    with opened(output) as out:
        (_json if format_ == "json" else _text)(settings, used, out)
    return 0


def _text(settings: Settings, used: list[Used], out: TextIO) -> None:
    from xtrace.config.options import shown
    from xtrace.report.common import clean

    def fold(text: str, first: str, rest: str) -> None:
        import textwrap

        lines = textwrap.wrap(
            clean(text), _WIDTH, initial_indent=first, subsequent_indent=rest, break_on_hyphens=False, break_long_words=False
        )
        print("\n".join(lines), file=out)

    fold(f"file: {settings.path or 'none'}", "", "  ")
    if settings.passed is not None:
        fold(f"not read: {settings.passed} ({settings.path} goes before it)", "", "  ")
    print(f"\n{'option':<14}{'value':<34}said by", file=out)
    for name, s in settings.options.items():
        value, origin = clean(shown(s.value)), s.origin
        if s.kind == "file":
            origin = "the file" if s.line is None else f"the file, line {s.line}"
        if len(value) < 34:
            print(f"{name:<14}{value:<34}{origin}", file=out)
        else:
            print(f"{name:<14}{origin}", file=out)
            fold(value, " " * 14, " " * 14)
    print("\nsuppressions" if used else "\nno suppressions", file=out)
    for u in used:
        s_ = u.suppression
        place = "" if s_.line is None else f", line {s_.line}"
        until = "" if s_.expires is None else f", until {s_.expires}"
        fold(f"{s_.selectors}{place}{until}{' (expired: does not count)' if u.expired else ''}", "  ", "    ")
        fold(s_.reason, "    ", "    ")


def _json(settings: Settings, used: list[Used], out: TextIO) -> None:
    import json

    from xtrace.config.options import by_name
    from xtrace.schema import SCHEMA_VERSION

    options = by_name()
    document: dict[str, Any] = {
        "schema_version": SCHEMA_VERSION,
        "file": settings.path,
        "passed": settings.passed,
        "options": {
            name: {
                "value": list(s.value) if isinstance(s.value, tuple) else s.value,
                "kind": s.kind,
                "origin": s.origin,
                "line": s.line,
                "variable": options[name].variable,
                "flag": options[name].flag,
                "commands": list(options[name].commands),
            }
            for name, s in settings.options.items()
        },
        "suppressions": [
            {
                "line": u.suppression.line,
                "selectors": dict(u.suppression.said),
                "reason": u.suppression.reason,
                "expires": None if u.suppression.expires is None else u.suppression.expires.isoformat(),
                "expired": u.expired,
            }
            for u in used
        ],
    }
    json.dump(document, out, indent=1)
    out.write("\n")
