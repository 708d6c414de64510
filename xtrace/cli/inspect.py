"""``xtrace inspect``: is a saved guest caught in the middle of a hypercall, and would it break elsewhere."""

from __future__ import annotations

import sys
from typing import Annotated

import typer

from xtrace.cli.options import From, Output

NAME = "inspect"


def command(
    context: typer.Context,
    image: Annotated[str, typer.Argument(metavar="IMAGE", help="xl save file, libxl or libxc stream, xl dump-core; - is stdin.")],
    source: From = None,
    to: Annotated[
        list[str] | None,
        typer.Option("--to", metavar="RELEASE", help="Release or series to judge against; several times for more."),
    ] = None,
    tasks: Annotated[
        bool, typer.Option("--tasks", help="Search the guest's memory for tasks that sleep inside a hypercall, too.")
    ] = False,
    format_: Annotated[str, typer.Option("--format", metavar="text|json", help="Form of the report.")] = "text",
    output: Output = None,
    fail_on: Annotated[
        str, typer.Option("--fail-on", metavar="break,review,incomplete|never", help="Exit bits to keep.")
    ] = "break,review,incomplete",
) -> int:
    """Say whether a saved guest's vCPUs are inside a hypercall, and what would become of it at other releases.

    Exit status, a mask: 0 clean, 1 cannot be read, 3 wrong use, 4 review, 8 a break, 16 the image is incomplete.
    """
    from xtrace.cli import common, options
    from xtrace.cli.analyze import _keep
    from xtrace.cli.given import given

    keep = _keep(fail_on)
    common.choose_format(format_)

    from xtrace.inspection import inspect
    from xtrace.pipeline import Options
    from xtrace.report import inspect_json, inspect_text
    from xtrace.report.common import clean

    said = given(context)
    chosen = Options(
        source=source, targets=tuple(to or ()), suppressions=said.settings.suppressions, said_by=said.origin("from"),
        notes=said.notes([image]),
    )  # fmt: skip
    found = inspect(image, chosen, tasks=tasks)
    for error in found.result.failed:
        print(f"xtrace: {clean(str(error))}", file=sys.stderr)
    with options.opened(output) as out:
        if format_ == "json":
            inspect_json.write_json(found, out)
        else:
            inspect_text.write_text(found, out)
    return found.bits & (keep | 1)
