"""The fence around readers that others wrote: what they do wrong becomes one sentence and never a traceback."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import polars as pl

from xtrace import schema
from xtrace.errors import InputError, UsageError, XtraceError
from xtrace.ingest.base import Ledger, Observed, Shows

if TYPE_CHECKING:
    from collections.abc import Iterator
    from importlib.metadata import EntryPoint

    from xtrace.ingest.base import ReadOptions, Recording
    from xtrace.ingest.source import Source

__all__ = ("guarded",)


def guarded(point: EntryPoint, skipped: dict[str, str]) -> Guarded:
    """Load a plug-in reader and fence it in.

    Args:
        point: its entry point.
        skipped: told why, where it cannot be used.

    Raises:
        UsageError: it cannot be used.
    """
    try:
        plugin = point.load()
        missing = [n for n in ("title", "sniff", "open") if not hasattr(plugin, n)]
    except Exception as exc:  # whatever somebody else's module does while it is imported
        why = f"{point.value} cannot be loaded ({_said(exc)})"
    else:
        if not missing:
            return Guarded(point.name, plugin, skipped)
        why = f"{point.value} is no reader: it lacks {', '.join(missing)}"
    skipped[point.name] = why
    raise UsageError(f"the plug-in reader {point.name!r} cannot be used: {why}")


class Guarded:
    """A plug-in reader whose exceptions are caught (see ``xtrace.ingest.base.Reader``)."""

    def __init__(self, name: str, plugin: Any, skipped: dict[str, str]) -> None:
        self.name, self._plugin, self._skipped = name, plugin, skipped
        self.title = str(plugin.title)
        shows = getattr(plugin, "shows", None)
        self.shows = shows if isinstance(shows, Shows) else Shows()

    def sniff(self, head: bytes) -> int:
        """Ask the plug-in; 0 and a note where it fails."""
        try:
            return int(self._plugin.sniff(head))
        except Exception as exc:
            self._skipped[self.name] = f"its sniff() failed ({_said(exc)})"
            return 0

    def open(self, source: Source, options: ReadOptions) -> Recording:
        """Open through the plug-in."""
        try:
            return _Recording(self.name, source.path, self._plugin.open(source, options))
        except XtraceError:
            raise
        except Exception as exc:
            raise InputError(source.path, f"the plug-in reader {self.name!r} failed ({_said(exc)})", exit_bits=16) from exc


class _Recording:
    """What a plug-in opened; checked batch by batch."""

    def __init__(self, name: str, path: str, inner: Any) -> None:
        self.format = name
        self._path, self._inner = path, inner
        self.ledger: Ledger = inner.ledger if isinstance(inner.ledger, Ledger) else Ledger()
        self.observed: Observed = inner.observed if isinstance(inner.observed, Observed) else Observed()

    def batches(self) -> Iterator[pl.DataFrame]:
        """Yield the plug-in's frames, if they are what they should be."""
        try:
            for frame in self._inner.batches():
                if not isinstance(frame, pl.DataFrame) or frame.schema != schema.EVENTS:
                    raise InputError(self._path, f"the plug-in reader {self.format!r} yields no table of events", exit_bits=16)
                yield frame
        except XtraceError:
            raise
        except Exception as exc:
            raise InputError(self._path, f"the plug-in reader {self.format!r} failed ({_said(exc)})", exit_bits=16) from exc


def _said(exc: BaseException) -> str:
    text = str(exc).strip().splitlines()
    return f"{type(exc).__name__}: {text[0]}" if text else type(exc).__name__
