"""Work on the next blocks of an input while this one is still being used."""

from __future__ import annotations

from collections import deque
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, Final, TypeVar

from xtrace.ingest.lines import raw_blocks
from xtrace.ingest.source import is_live

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator
    from concurrent.futures import Future

    from xtrace.ingest.lines import RawBlock
    from xtrace.ingest.source import Source

__all__ = ("ahead", "blocks_ahead")

#: Blocks that are worked on ahead of the one in use; so many are held at most.
AHEAD: Final = 2

#: Blocks of fewer bytes are not worth another thread.
_LEAST: Final = 1 << 16

B = TypeVar("B")
R = TypeVar("R")


def ahead(blocks: Iterable[B], work: Callable[[B], R], *, live: bool = False) -> Iterator[tuple[B, R]]:
    """Yield each block and what ``work`` makes of it, in order.

    The blocks are taken by the caller's thread, ``work`` runs in others and must touch nothing that is shared (NumPy and
    Polars leave Python's lock to others while they work on arrays).

    Args:
        blocks: the input.
        work: what to do with each.
        live: each block is given at once and nothing is done in the background. For an input that still grows
            (``source.is_live``): its next block may never come.
    """
    if live:
        for block in blocks:
            yield block, work(block)
        return
    with ThreadPoolExecutor(AHEAD) as pool:
        under_way: deque[tuple[B, Future[R]]] = deque()
        try:
            for block in blocks:
                under_way.append((block, pool.submit(work, block)))
                if len(under_way) > AHEAD:
                    first, done = under_way.popleft()
                    yield first, done.result()
            while under_way:
                first, done = under_way.popleft()
                yield first, done.result()
        finally:
            for _, future in under_way:
                future.cancel()


def blocks_ahead(source: Source, size: int, work: Callable[[RawBlock], R]) -> Iterator[tuple[RawBlock, R]]:
    """Yield the blocks of whole lines of a text (``lines.raw_blocks``) and what ``work`` makes of each, in order.

    The next ones are worked on meanwhile, unless the text still grows or the blocks are small.
    """
    return ahead(raw_blocks(source.file, size), work, live=size < _LEAST or is_live(source))
