"""What a command line did not say, and the environment or a file does: the settings of ``xtrace.config.settings``.

They are read when a command first asks for an option that they may hold, so that what has no use for them never fails
because of them.
"""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Sequence

    import typer

    from xtrace.config.settings import Setting, Settings

__all__ = ("Given", "given")


class Given:
    """The settings of one command line.

    Args:
        file: what ``--config`` names; None: nothing.
        off: take nothing from anywhere (``--help``, which must work whatever a file says).
    """

    def __init__(self, file: str | None = None, *, off: bool = False) -> None:
        """Read nothing yet."""
        self._file, self._off = file, off
        self._settings: Settings | None = None
        #: Options that settings said something of and the command line did not, by name.
        self.used: dict[str, Setting] = {}
        #: The report tells of them.
        self.told = False

    @property
    def settings(self) -> Settings:
        """Return the settings.

        Raises:
            InputError: a file cannot be read.
            UsageError: an unknown key or a bad value.
        """
        if self._settings is None:
            from xtrace.config import settings
            from xtrace.report.common import clean

            self._settings = settings.load(self._file, choices={"input_format": _formats})
            lines = settings.strangers()
            if self._settings.passed is not None:
                lines.append(f"settings are taken from {self._settings.path}; those of {self._settings.passed} are not read")
            for line in lines:
                print(f"xtrace: {clean(line)}", file=sys.stderr)
        return self._settings

    def get(self, command: str, _default: object = None) -> _Defaults | None:
        """Return what the command-line parser asks for defaults (its ``default_map``)."""
        from xtrace.config.options import OPTIONS

        names = {option.parameter: option.name for option in OPTIONS if command in option.commands}
        return _Defaults(self, names) if names and not self._off else None

    def default(self, name: str) -> Any:
        """Return what the settings say of an option; None if nothing."""
        setting = self.settings.options[name]
        if setting.kind == "default":
            return None
        self.used[name] = setting
        return list(setting.value) if isinstance(setting.value, tuple) else setting.value

    def notes(self, traces: Sequence[str]) -> list[str]:
        """Return what a report must say of settings: the options they gave, and files beside the traces that do not count."""
        from xtrace.config import settings

        self.told = True
        found = {settings.unused(trace, self.settings.path): None for trace in traces}
        return self._lines() + [
            f"the settings in {path} do not count here; start xtrace in that folder, or name the file with --config"
            for path in found
            if path is not None
        ]

    def origin(self, name: str) -> str:
        """Return what said an option: a setting, or the command line."""
        from xtrace.config.options import by_name

        return self.used[name].origin if name in self.used else by_name()[name].flag

    def tell(self) -> None:
        """Say on standard error which options the settings gave, unless a report says so."""
        if self.used and not self.told:
            from xtrace.report.common import clean

            for line in self._lines():
                print(f"xtrace: {clean(line)}", file=sys.stderr)
        self.told = True

    def _lines(self) -> list[str]:
        from xtrace.config.options import by_name, shown

        options = by_name()
        return [f"{options[name].flag} {shown(s.value)}, as {s.origin} says" for name, s in self.used.items()]


class _Defaults:
    """The defaults of one command, by the name of the parameter."""

    def __init__(self, given: Given, names: dict[str, str]) -> None:
        self._given, self._names = given, names

    def get(self, parameter: str, default: Any = None) -> Any:
        """Return the value that a parameter has without the command line; ``default`` if nothing says one."""
        if parameter not in self._names:
            return default
        value = self._given.default(self._names[parameter])
        return default if value is None else value


def _formats() -> tuple[str, ...]:
    from xtrace.ingest import registry

    return tuple(registry.names())


def given(context: typer.Context) -> Given:
    """Return the settings of the command line that is running."""
    return context.obj if isinstance(context.obj, Given) else Given(off=True, file="none")
