"""Options that several commands share."""

from __future__ import annotations

from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, cast

import typer

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from contextlib import AbstractContextManager
    from typing import BinaryIO, TextIO

__all__ = ("Callers", "From", "HostInfo", "InputFormat", "Output", "TscKhz", "opened", "parse_callers", "progress", "whole")

From = Annotated[str | None, typer.Option("--from", metavar="RELEASE", help="Xen release that wrote the trace.")]
Callers = Annotated[
    list[str] | None,
    typer.Option("--caller", metavar="KIND|d3=KIND", help="Caller ABI (pv64, pv32, hvm64, …), for all or one domain."),
]
TscKhz = Annotated[int | None, typer.Option("--tsc-khz", metavar="N", min=1, help="TSC frequency of the host.")]
HostInfo = Annotated[str | None, typer.Option("--host-info", metavar="FILE", help="Text of 'xl info' or 'xl dmesg'.")]
InputFormat = Annotated[
    str | None,
    typer.Option(
        "--input-format", metavar="NAME", help="Read the input as this format (see 'xtrace formats'); default: by content."
    ),
]
Output = Annotated[str | None, typer.Option("--output", "-o", metavar="FILE", help="Write there instead of stdout.")]


def parse_callers(values: list[str] | None) -> dict[int | None, str]:
    """Turn ``pv64`` and ``d3=hvm64`` into caller by domain (None: all)."""
    from xtrace.errors import UsageError
    from xtrace.schema import CALLERS

    out: dict[int | None, str] = {}
    for text in values or ():
        who, eq, kind = text.rpartition("=")
        key: int | None = None
        if eq:
            digits = who.removeprefix("d")
            if not digits.isdigit() or int(digits) > 0xFFFF:
                raise UsageError(f"--caller {text}: {who!r} is no domain; write d3=pv64")
            key = int(digits)
        if kind not in CALLERS:
            raise UsageError(f"--caller {text}: no caller is called {kind!r}; there are {', '.join(CALLERS)}")
        out[key] = kind
    return out


@contextmanager
def whole(target: Path) -> Iterator[BinaryIO]:
    """Yield a file for writing bytes that appears at ``target`` whole or not at all."""
    import os
    import tempfile

    with tempfile.NamedTemporaryFile(dir=target.parent, prefix=f".{target.name}.", delete=False) as tmp:
        unfinished = Path(tmp.name)
        try:
            yield cast("BinaryIO", tmp)
            tmp.flush()
            os.fsync(tmp.fileno())
        except BaseException:
            unfinished.unlink()
            raise
    mask = os.umask(0)
    os.umask(mask)
    unfinished.chmod(0o666 & ~mask)
    unfinished.replace(target)


def opened(path: str | None) -> AbstractContextManager[TextIO]:
    """Return standard output, or a file that appears whole or not at all."""
    import io
    import sys

    @contextmanager
    def text(name: str) -> Iterator[TextIO]:
        with whole(Path(name)) as raw:
            out = io.TextIOWrapper(raw, encoding="utf-8")
            yield out
            out.flush()
            out.detach()  # the file is closed by whom it belongs to

    @contextmanager
    def standard() -> Iterator[TextIO]:
        yield sys.stdout
        sys.stdout.flush()

    return standard() if path is None or path == "-" else text(path)


@contextmanager
def progress(title: str) -> Iterator[Callable[[int, int], None] | None]:
    """Yield a callback (done, total) that draws a bar on a terminal, or None."""
    import sys

    if not sys.stderr.isatty():
        yield None
        return
    from rich.console import Console
    from rich.progress import BarColumn, DownloadColumn, Progress, TimeRemainingColumn, TransferSpeedColumn

    bar = Progress(
        "{task.description}", BarColumn(), DownloadColumn(), TransferSpeedColumn(), TimeRemainingColumn(),
        console=Console(stderr=True), transient=True,
    )  # fmt: skip
    with bar:
        task = bar.add_task(title)
        yield lambda done, total: bar.update(task, completed=done, total=total)
