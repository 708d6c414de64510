"""Files that are no trace but known: what to do with them, in one sentence (layouts/refused.toml)."""

from __future__ import annotations

import tomllib
from functools import cache
from pathlib import Path

__all__ = ("why",)


@cache
def _known() -> tuple[tuple[tuple[tuple[int, bytes], ...], str], ...]:
    """Return (bytes that must stand where, what to say) in order."""
    table = tomllib.loads((Path(__file__).parent / "layouts" / "refused.toml").read_text(encoding="utf-8"))
    return tuple(
        (tuple((int(b["at"]), bytes.fromhex(b["hex"])) for b in entry["bytes"]), str(entry["text"])) for entry in table["known"]
    )


def why(head: bytes) -> str | None:
    """Return what a file that no reader recognises is and what to do with it, or None.

    Args:
        head: its first bytes.

    Returns:
        A clause that follows the file's name: "is … : run …".
    """
    for marks, text in _known():
        if all(head[at : at + len(magic)] == magic for at, magic in marks):
            return text
    return None
