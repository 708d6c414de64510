"""Replay recorded Xen hypercalls and find the continuations that would break on another release.

>>> import xtrace
>>> result = xtrace.analyze("trace.xentrace", source="4.4.4", targets=["4.5.0"])  # doctest: +SKIP
>>> result.findings  # a Polars frame  # doctest: +SKIP
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import os
    from collections.abc import Mapping, Sequence

    from xtrace.pipeline import Result

__all__ = ("__version__", "analyze")

__version__ = "0.1.0"


def analyze(
    path: str | os.PathLike[str] | Sequence[str | os.PathLike[str]],
    source: str | None = None,
    targets: Sequence[str] = (),
    **options: Any,
) -> Result:
    """Analyse one trace (or several of one host) and return what would break.

    Args:
        path: a trace file, or several.
        source: Xen release that wrote it, such as ``4.5.0``; None: from the sidecar or the trace itself.
        targets: releases or series to judge against; empty: the same release and every later one.
        options: further fields of :class:`xtrace.pipeline.Options` (callers, tsc_khz, host_info, keep_calls, …).

    Returns:
        A result with Polars tables: ``findings``, ``calls_table`` (with ``keep_calls=True``), and the summary's figures.

    Raises:
        xtrace.errors.InputError: the trace cannot be used.
        xtrace.errors.UsageError: a release, caller or other name does not exist.
    """
    import os as _os

    from xtrace.pipeline import Options
    from xtrace.pipeline import analyze as run

    paths: Mapping[str, Any] | Sequence[Any] = [path] if isinstance(path, str | _os.PathLike) else list(path)
    return run(list(paths), Options(source=source, targets=tuple(targets), **options))
