"""Files that are no trace but known: what to do with them, in one sentence."""

from __future__ import annotations

__all__ = ("why",)


def why(head: bytes) -> str | None:
    """Return what a file that no reader recognises is and what to do with it, or None."""
    return None
