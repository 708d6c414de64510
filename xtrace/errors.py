"""What can go wrong, as one small tree.

::

    XtraceError
    ├── InputError      a trace, sidecar or host-info file cannot be used (exit bit 1, or 16 when it was read but incomplete)
    ├── InputErrors     several of them, and nothing else to report
    ├── UsageError      an option, release or hypercall name is wrong (exit bits 3)
    │   ├── UnknownRelease
    │   ├── UnknownHypercall    no Xen release has a hypercall of that name or number
    │   └── UnknownSubOperation
    └── FactError       the tables in ``xtrace/replay/abi`` contradict themselves

Only ``xtrace.cli`` prints an error and turns it into an exit status.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Sequence

__all__ = (
    "FactError",
    "InputError",
    "InputErrors",
    "UnknownHypercall",
    "UnknownRelease",
    "UnknownSubOperation",
    "UsageError",
    "XtraceError",
)


class XtraceError(Exception):
    """Base of every error that xtrace raises on purpose."""

    #: Bits of the exit status that this error stands for.
    exit_bits = 1


class InputError(XtraceError):
    """An input cannot be used.

    Args:
        path: the file, or ``-`` for standard input.
        message: one clause saying what is wrong.
        offset: byte in the (decompressed) stream where it went wrong.
        line: line number (from 1) for text.
        exit_bits: 1 when nothing could be read (missing, a directory, no permission), 16 when it was read and is not a
            usable trace (empty, unrecognised, cut).
    """

    def __init__(
        self,
        path: str,
        message: str,
        *,
        offset: int | None = None,
        line: int | None = None,
        exit_bits: int = 1,
    ) -> None:
        """Build the one sentence that the user reads."""
        self.path, self.message, self.offset, self.line = path, message, offset, line
        self.exit_bits = exit_bits
        where = f"{path}: line {line}" if line is not None else path
        if offset is not None:
            where += f": byte {offset}"
        super().__init__(f"{where}: {message}")


class InputErrors(XtraceError):
    """Several inputs, none of which can be used."""

    def __init__(self, errors: Sequence[InputError]) -> None:
        """Gather the sentences, one a line."""
        self.errors = tuple(errors)
        self.exit_bits = 0
        for e in errors:
            self.exit_bits |= e.exit_bits
        super().__init__("\n".join(str(e) for e in errors))


class UsageError(XtraceError):
    """The caller asked for something that does not exist."""

    exit_bits = 3


class UnknownRelease(UsageError):
    """No such Xen release."""


class UnknownHypercall(UsageError):
    """No Xen release has this hypercall."""


class UnknownSubOperation(UsageError):
    """No Xen release has this sub-operation."""


class FactError(XtraceError):
    """A fact file is malformed or contradicts another."""
