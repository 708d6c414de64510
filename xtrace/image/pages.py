"""The pages of an image by guest frame number: an index of file offsets; the pages themselves are read when they are needed."""

from __future__ import annotations

from itertools import pairwise
from typing import TYPE_CHECKING, Final

import numpy as np

from xtrace.image.base import PAGE, Damaged

if TYPE_CHECKING:
    from collections.abc import Iterator

    import numpy.typing as npt

    from xtrace.image.base import File

    I64 = npt.NDArray[np.int64]

__all__ = ("PageIndex", "Pages")

#: Entries gathered before they are folded into the index.
_FOLD: Final = 1 << 20

#: Pages kept in memory.
_KEEP: Final = 512


class PageIndex:
    """Builds `Pages`; of a page that was sent several times the last one counts (live migration, checkpoints)."""

    def __init__(self) -> None:
        """Start empty."""
        self._parts: list[tuple[I64, I64]] = []
        self._pending = 0

    def add(self, pfns: I64, offsets: I64) -> None:
        """Add pages; an offset of −1 says that the frame has no contents (any more)."""
        self._parts.append((pfns, offsets))
        self._pending += len(pfns)
        if self._pending >= _FOLD:
            self._fold()

    def _fold(self) -> None:
        if not self._parts:
            return
        pfns = np.concatenate([p for p, _ in self._parts])[::-1]
        offsets = np.concatenate([o for _, o in self._parts])[::-1]
        unique, first = np.unique(pfns, return_index=True)
        offsets = offsets[first]
        held = offsets >= 0
        self._parts, self._pending = [(unique[held], offsets[held])], 0

    def pages(self, file: File) -> Pages:
        """Return the pages added so far."""
        self._fold()
        none = np.zeros(0, np.int64)
        pfns, offsets = self._parts[0] if self._parts else (none, none)
        return Pages(file, pfns, offsets)


class Pages:
    """Pages of 4096 bytes.

    Attributes:
        pfns: guest frame numbers that have contents, ascending (int64).
        offsets: byte of each in the decompressed file (int64).
    """

    def __init__(self, file: File, pfns: I64, offsets: I64) -> None:
        """Take an index: 16 bytes a page."""
        self._file, self.pfns, self.offsets = file, pfns, offsets
        self._kept: dict[int, bytes] = {}

    def __len__(self) -> int:
        return len(self.pfns)

    def blocks(self, n: int = 512) -> Iterator[tuple[I64, npt.NDArray[np.uint8]]]:
        """Yield all pages, in the order of the file: their frame numbers and their contents, at most n pages at a time.

        Pages that a cut image does not hold are left out.
        """
        order = np.argsort(self.offsets, kind="stable")
        for start in range(0, len(order), n):
            part = order[start : start + n]
            at = self.offsets[part]
            out = np.zeros((len(part), PAGE), np.uint8)
            kept = np.ones(len(part), bool)
            # Pages that stand behind each other are read at once.
            edges = np.flatnonzero(np.diff(at) != PAGE) + 1
            for a, b in pairwise((0, *edges.tolist(), len(part))):
                try:
                    data = self._file.read(int(at[a]), (b - a) * PAGE, "a page")
                except Damaged:
                    kept[a:b] = False
                    continue
                out[a:b] = np.frombuffer(data, np.uint8).reshape(-1, PAGE)
            if kept.all():
                yield self.pfns[part], out
            elif kept.any():
                yield self.pfns[part[kept]], out[kept]

    def page(self, pfn: int) -> bytes | None:
        """Return the contents of a frame, or None where the image has none."""
        kept = self._kept.get(pfn)
        if kept is not None:
            return kept
        if not 0 <= pfn < 1 << 52:
            return None
        at = int(np.searchsorted(self.pfns, pfn))
        if at == len(self.pfns) or self.pfns[at] != pfn:
            return None
        try:
            data = self._file.read(int(self.offsets[at]), PAGE, "a page")
        except Damaged:
            return None  # an image that was cut: the index may name what is not there
        if len(self._kept) >= _KEEP:
            self._kept.clear()
        self._kept[pfn] = data
        return data
