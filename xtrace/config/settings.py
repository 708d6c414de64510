"""Options and suppressions of a project: where they are found, and what said each.

An option is taken from the command line, else from the environment (``XTRACE_TO=4.17,4.18``), else from a file, else its
default holds. The file is ``xtrace.toml`` or, where there is none, ``pyproject.toml`` with ``[tool.xtrace]``, of the
current folder or the nearest one above; ``--config FILE`` or ``XTRACE_CONFIG`` name another, ``none`` names none::

    [options]                       # in pyproject.toml: [tool.xtrace.options]
    to = ["4.18", "4.19"]
    fail_on = ["break", "incomplete"]

    [[suppress]]                    # in pyproject.toml: [[tool.xtrace.suppress]]
    code = "XT010"
    reason = "live update only"

An ``xtrace.toml`` without settings (a sidecar) is passed by. A key that does not exist is an error in any file that is
read, and so is a value that cannot be used.
"""

from __future__ import annotations

import difflib
import os
import re
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from xtrace.config import checks, suppressions
from xtrace.config.options import OPTIONS, Value, by_name
from xtrace.config.sidecar import FOLDER_FILE, SETTINGS_KEYS, SIDECAR_KEYS
from xtrace.errors import InputError, UsageError

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from xtrace.config.suppressions import Suppression

__all__ = ("VARIABLE", "Setting", "Settings", "load", "strangers", "unused")

#: Names the settings file in the environment.
VARIABLE: Final = "XTRACE_CONFIG"

_PYPROJECT: Final = "pyproject.toml"


@dataclass(frozen=True, slots=True)
class Setting:
    """The value of an option, and what said it."""

    value: Value
    #: ``default``, ``environment`` or ``file``.
    kind: str
    #: For people: ``default``, ``XTRACE_TO``, ``/srv/xtrace.toml, line 3``.
    origin: str
    #: Line of the file, from 1; None elsewhere, or where it could not be told.
    line: int | None = None


@dataclass(frozen=True, slots=True)
class Settings:
    """What holds for commands that are started in one folder.

    Attributes:
        options: by name, every one of ``options.OPTIONS``.
        suppressions: in the order of the file.
        path: the file; None: there is none.
        passed: a second file of the same folder that has settings too, and was not read.
    """

    options: Mapping[str, Setting]
    suppressions: tuple[Suppression, ...] = ()
    path: str | None = None
    passed: str | None = None


@dataclass(frozen=True, slots=True)
class _File:
    """A file that has settings: its tables, and how their names begin in it."""

    path: Path
    tables: Mapping[str, Any]
    prefix: str
    lines: _Lines


def load(
    config: str | None = None,
    *,
    environment: Mapping[str, str] | None = None,
    folder: Path | None = None,
    choices: Mapping[str, Callable[[], tuple[str, ...]]] | None = None,
) -> Settings:
    """Gather what holds.

    Args:
        config: file named on the command line; ``none``: no file.
        environment: variables; those of this process if not given.
        folder: the current folder, if not that of this process.
        choices: more that is known of options: name -> the values that exist.

    Raises:
        InputError: a file cannot be read, or is not TOML.
        UsageError: an unknown key or a bad value; the message names the file or variable, and the key.
    """
    environment = os.environ if environment is None else environment
    named = config or environment.get(VARIABLE, "").strip() or None
    passed = None
    if named is None:
        found, passed = _search(folder)
    elif named == "none":
        found = None
    else:
        found = _named(Path(named))
    table: Mapping[str, Any] = {}
    accepted: tuple[Suppression, ...] = ()
    if found is not None:
        where = str(found.path)
        table = found.tables.get("options", {})
        if not isinstance(table, dict):
            raise UsageError(f"{where}: {found.prefix}options must be a table: [{found.prefix}options]")
        _known_options(where, found, table)
        rows = found.tables.get("suppress", [])
        count = len(rows) if isinstance(rows, list) else 0
        lines = found.lines.headers(f"[[{found.prefix}suppress]]", count)
        accepted = suppressions.read(where, found.prefix, rows, lines)
    out: dict[str, Setting] = {}
    for name, option in by_name().items():
        setting = Setting(option.default, "default", "default")
        if (value := option.from_environment(environment)) is not None:
            setting = Setting(value, "environment", option.variable)
        elif found is not None and name in table:
            line = found.lines.of(f"{found.prefix}options", name)
            where, place = (str(found.path), "") if line is None else (f"{found.path}: line {line}", f", line {line}")
            value = option.from_file(where, f"{found.prefix}options.{name}", table[name], found.path.parent)
            setting = Setting(value, "file", f"{found.path}{place}", line)
        if setting.kind != "default" and choices and name in choices:
            checks.choice(setting.origin, name, setting.value, choices[name]())
        out[name] = setting
    return Settings(out, accepted, None if found is None else str(found.path), passed)


def strangers(environment: Mapping[str, str] | None = None) -> list[str]:
    """Return a sentence for each variable whose name is almost that of an option.

    No error: the environment is not xtrace's alone.
    """
    environment = os.environ if environment is None else environment
    mine = [*(option.variable for option in OPTIONS), VARIABLE]
    out = []
    for name in sorted(environment):
        if name.startswith("XTRACE_") and name not in mine:
            short = [m.removeprefix("XTRACE_") for m in mine]
            near = difflib.get_close_matches(name.removeprefix("XTRACE_"), short, n=1, cutoff=0.7)
            if near:
                out.append(f"the variable {name} is no setting and does nothing; did you mean XTRACE_{near[0]}?")
    return out


def unused(trace: str | os.PathLike[str], used: str | None) -> str | None:
    """Return the nearest file in the folders of a trace that has settings which do not count, because xtrace started elsewhere."""
    if os.fspath(trace) == "-":
        return None
    for folder in Path(trace).absolute().parents:
        path = folder / FOLDER_FILE
        if not _is_file(path):
            continue
        if used is not None and Path(used).exists() and path.samefile(used):
            return None
        try:
            doc = checks.toml(str(path), checks.read_toml(path))
        except InputError:
            continue  # said by who reads it as a sidecar
        if doc.keys() & set(SETTINGS_KEYS):
            return str(path)
    return None


# ── finding and opening the file ─────────────────────────────────────────────────────────────────────────────────────


def _search(folder: Path | None) -> tuple[_File | None, str | None]:
    """Return the nearest file that has settings, and the one beside it that is passed by."""
    try:
        start = (folder or Path.cwd()).absolute()
    except FileNotFoundError:
        return None, None  # the current folder was removed
    for each in (start, *start.parents):
        own = _folder_file(each / FOLDER_FILE) if _is_file(each / FOLDER_FILE) else None
        project = _pyproject(each / _PYPROJECT) if _is_file(each / _PYPROJECT) else None
        if own is not None:
            return own, None if project is None else str(project.path)
        if project is not None:
            return project, None
    return None, None


def _is_file(path: Path) -> bool:
    try:
        return path.is_file()
    except OSError:
        return False


def _named(path: Path) -> _File:
    """Open the file that the user named; it must have settings, or say that it has none by being empty."""
    path = path.expanduser()
    if path.name == _PYPROJECT:
        found = _pyproject(path)
        if found is None:
            raise UsageError(f"{path}: there is no [tool.xtrace] in it")
        return found
    return _folder_file(path, named=True) or _File(path, {}, "", _Lines(""))


def _folder_file(path: Path, *, named: bool = False) -> _File | None:
    """Read an ``xtrace.toml``; None if it has no settings."""
    data = checks.read_toml(path)
    doc = checks.toml(str(path), data)
    misplaced = next((key for key in doc if key in by_name() and key not in SIDECAR_KEYS), None)
    if misplaced is not None:
        raise UsageError(f"{path}: {misplaced!r} is an option and belongs under [options]")
    checks.known(str(path), "", doc, (*SIDECAR_KEYS, *SETTINGS_KEYS))
    if not named and not doc.keys() & set(SETTINGS_KEYS):
        return None
    return _File(path, doc, "", _Lines(data.decode("utf-8-sig")))


def _pyproject(path: Path) -> _File | None:
    """Read ``[tool.xtrace]`` of a ``pyproject.toml``; None if it has none."""
    data = checks.read_toml(path)
    if b"xtrace" not in data:
        return None  # nor is it ours to say what else may be wrong with it
    tool = checks.toml(str(path), data).get("tool")
    tables = tool.get("xtrace") if isinstance(tool, dict) else None
    if tables is None:
        return None
    if not isinstance(tables, dict):
        raise UsageError(f"{path}: tool.xtrace must be a table: [tool.xtrace.options]")
    for key in tables:
        if key in by_name() and key != "tsc_khz":
            raise UsageError(f"{path}: 'tool.xtrace.{key}' is an option and belongs under [tool.xtrace.options]")
        if key in SIDECAR_KEYS:
            raise UsageError(f"{path}: 'tool.xtrace.{key}' tells of a trace and belongs into {FOLDER_FILE} beside it")
    checks.known(str(path), "tool.xtrace.", tables, SETTINGS_KEYS)
    return _File(path, tables, "tool.xtrace.", _Lines(data.decode("utf-8-sig")))


def _known_options(where: str, found: _File, table: Mapping[str, Any]) -> None:
    for key in table:
        dashed = key.replace("-", "_")
        if key not in by_name():
            words = f"did you mean {dashed!r}?" if dashed in by_name() else checks.hint(dashed, by_name())
            raise UsageError(f"{where}: no key is called '{found.prefix}options.{key}'; {words}")


# ── lines ────────────────────────────────────────────────────────────────────────────────────────────────────────────


class _Lines:
    """Where the statements of a TOML file stand. tomllib does not tell; a line that cannot be told for certain is None."""

    def __init__(self, text: str) -> None:
        self._lines = text.splitlines()

    def _starts(self, index: int) -> Mapping[str, Any] | None:
        """Return what the lines before one say, if a statement can start there (not inside of a text or list)."""
        import tomllib

        try:
            return tomllib.loads("\n".join(self._lines[:index]))
        except (tomllib.TOMLDecodeError, RecursionError):
            return None

    def headers(self, header: str, count: int) -> list[int]:
        """Return the lines on which the tables of one name begin; none of them unless there are ``count``."""
        found = [k + 1 for k, line in enumerate(self._lines) if _plain(line) == header]
        return found if len(found) == count else []

    def of(self, table: str, key: str) -> int | None:
        """Return the line on which a key is given below the header of its table."""
        here = False
        for k, line in enumerate(self._lines):
            if _plain(line).startswith("["):
                here = _plain(line) == f"[{table}]"
            elif here and re.match(rf"\s*[\"']?{re.escape(key)}[\"']?\s*=", line) and self._first(k, [*table.split("."), key]):
                return k + 1
        return None

    def _first(self, index: int, path: list[str]) -> bool:
        """Say whether the statement that starts on a line gives a key."""
        before = self._starts(index)
        if before is None or _has(before, path):
            return False
        ends = (self._starts(end) for end in range(index + 1, len(self._lines) + 1))
        return _has(next((after for after in ends if after is not None), None), path)


def _plain(line: str) -> str:
    return "".join(line.partition("#")[0].split())


def _has(doc: Any, path: list[str]) -> bool:
    for key in path:
        if not isinstance(doc, dict) or key not in doc:
            return False
        doc = doc[key]
    return True
