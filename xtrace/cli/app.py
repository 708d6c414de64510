"""The command line: commands are registered here, errors become exit statuses here, and nowhere else."""

from __future__ import annotations

import os
import sys
from typing import Annotated

import typer

from xtrace.cli import abi, analyze, config, decode, explain, formats, identify, ingest, inspect, record, replay, simulate, try_

__all__ = ("app", "run")

app = typer.Typer(
    name="xtrace",
    help="Replay recorded Xen hypercalls and find the continuations that would break on another release.",
    epilog="--model FILE.toml, with any command: a proposed hypervisor whose name can be given as a release (docs/models.md). "
    "--config FILE: take options and suppressions from it (docs/config.md; 'xtrace config' shows them).",
    no_args_is_help=True,
    add_completion=True,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)


def _version(value: bool) -> None:
    if value:
        from xtrace import __version__
        from xtrace.release import releases

        known = releases()
        typer.echo(f"xtrace {__version__} (Xen {known[0].version} to {known[-1].version})")
        raise typer.Exit


@app.callback()
def _main(
    version: Annotated[
        bool,
        typer.Option("--version", callback=_version, is_eager=True, help="Show the version and the releases known."),
    ] = False,
) -> None:
    pass


for module in (analyze, inspect, record, ingest, replay, identify, decode, try_, simulate, explain, formats, config):
    app.command(module.NAME)(module.command)
app.add_typer(abi.app, name=abi.NAME)


def run(args: list[str] | None = None) -> int:
    """Run the command line; return the exit status (DESIGN §5)."""
    from xtrace.cli.given import Given
    from xtrace.errors import XtraceError

    given = Given()
    try:
        rest = _models(sys.argv[1:] if args is None else args)
        rest, files = _taken(rest, "--config")
        given = Given(files[-1] if files else None, off=bool({"-h", "--help"} & set(rest)))
        code = app(args=rest, standalone_mode=False, obj=given, default_map=given)
        given.tell()
        sys.stdout.flush()
    except XtraceError as exc:
        given.tell()
        _say(str(exc))
        return exc.exit_bits
    except SystemExit as exc:
        # The command-line parser meets a broken pipe before we do, and calls it a failure.
        if isinstance(exc.__context__, BrokenPipeError):
            return _reader_went_away()
        raise
    except Exception as exc:
        if isinstance(exc, BrokenPipeError):
            return _reader_went_away()
        status = _click_status(exc)
        if status is not None:
            return status
        if isinstance(exc, OSError):
            _say(f"{exc.filename or 'output'}: {exc.strerror or exc}")
            return 1
        raise
    except KeyboardInterrupt:
        _say("interrupted")
        return 130
    return int(code) if isinstance(code, int) else 0


def _reader_went_away() -> int:
    """Nothing is wrong where the reader has seen enough (`| head`), and nothing more can be written."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    return 0


def _models(args: list[str]) -> list[str]:
    """Load what ``--model FILE`` names, wherever it stands: a model is usable wherever a release is."""
    rest, paths = _taken(args, "--model")
    if paths:
        from xtrace.replay.models import load

        for path in paths:
            load(path)
    return rest


def _taken(args: list[str], option: str) -> tuple[list[str], list[str]]:
    """Take an option with a file out of a command line, wherever it stands before ``--``.

    Returns:
        The other arguments, and the files in order.
    """
    rest: list[str] = []
    files: list[str] = []
    it = iter(args)
    for arg in it:
        if arg == "--":
            return [*rest, arg, *it], files
        if arg != option and not arg.startswith(option + "="):
            rest.append(arg)
            continue
        path = arg.partition("=")[2] if "=" in arg else next(it, None)
        if not path:
            from xtrace.errors import UsageError

            raise UsageError(f"{option} needs a FILE")
        files.append(path)
    return rest, files


def _click_status(exc: Exception) -> int | None:
    """Return the exit status for an error of the command-line parser, or None for another."""
    # typer may carry its own copy of click: go by name, not by class.
    names = {c.__name__ for c in type(exc).__mro__}
    if "Abort" in names:
        _say("interrupted")
        return 130
    if "Exit" in names:
        return int(getattr(exc, "exit_code", 0))
    if "NoArgsIsHelpError" in names:
        typer.echo(str(getattr(exc, "message", "")) or str(exc))
        return 3
    if "ClickException" in names:
        message = exc.format_message() if hasattr(exc, "format_message") else str(exc)
        _say(message)
        return 3
    return None


def _say(text: str) -> None:
    from xtrace.report.common import clean

    print(f"xtrace: {clean(text)}", file=sys.stderr)
