"""Finding where the records of an xentrace binary begin.

A record's size stands in its own header word (``struct t_rec``, ``RELEASE-4.22.0:xen/include/public/trace.h``: bit 31 = a TSC
follows, bits 30..28 = number of extra words), so each boundary depends on the one before it. To do that for many records at
once the words are cut into blocks and all blocks are walked side by side, one record of each per step. Where a block's first
record begins is guessed from a word shortly before it that looks like a header. Guesses are then *checked* against the end of
the block before, and wrong ones are walked anew, so the result is exact for any input; input made to defeat the guess costs a
table of all ten possible entries of each block.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

import numpy as np

if TYPE_CHECKING:
    from numpy.typing import NDArray

__all__ = ("MAX_WORDS", "PAD", "SIZES", "walk")

#: Longest record: header, TSC and seven words.
MAX_WORDS: Final = 10

#: Record size in words by the top four bits of its header.
SIZES: Final = np.array([1, 2, 3, 4, 5, 6, 7, 8, 3, 4, 5, 6, 7, 8, 9, 10], dtype=np.int64)

_STEPS = 16  # records between two looks at which blocks are done

#: Words that must be readable (any content) behind the last piece.
PAD: Final = (_STEPS + 2) * MAX_WORDS

#: Words a block. Not a multiple of a page's 1,024, so that the blocks' cursors do not fall into the same cache set.
BLOCK: Final = 16 * 37

_LEAD = MAX_WORDS  # words before a block that are searched for a likely header: that many hold at least one

#: Records that may be walked one by one to mend wrong guesses; beyond that the table is cheaper.
_MEND_RECORDS = 4096


def walk(
    words: NDArray[np.uint32],
    starts: NDArray[np.int64],
    ends: NDArray[np.int64],
    marks: NDArray[np.bool_],
    likely: NDArray[np.bool_],
    block: int = BLOCK,
) -> tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.int64]]:
    """Find every whole record of each piece; the first record of a piece begins at its first word.

    Args:
        words: the buffer, at least ``PAD`` words longer than the last piece.
        starts: first word of each piece, ascending; shape (pieces,).
        ends: word behind each piece; pieces do not overlap and are not empty.
        marks: scratch of at least ``len(words)`` flags.
        likely: by bits 27..12 of a word, whether it looks like a header. Only the speed depends on it.
        block: words a block (at least ``MAX_WORDS``).

    Returns:
        The header positions of all records that end inside their piece, ascending; how many of them lie in each piece; and
        per piece the word behind its last whole record (its end, unless a record sticks out of it).
    """
    counts = np.maximum((ends - starts) // block, 1)
    piece = np.repeat(np.arange(len(starts)), counts)
    first = np.cumsum(counts) - counts  # first block of each piece
    lows = starts[piece] + (np.arange(len(piece)) - first[piece]) * block
    highs = lows + block
    highs[first + counts - 1] = ends
    inner = np.ones(len(piece), dtype=np.bool_)  # blocks that follow another of the same piece
    inner[first] = False

    top = int(ends[-1])
    marks[: top + 1] = False
    begin = lows.copy()
    begin[inner] = _approach(words, lows[inner], likely)
    leave = _lockstep(words, marks, begin, highs)
    wrong = np.flatnonzero(inner[1:] & (leave[:-1] != begin[1:])) + 1
    if len(wrong) and not _mend(words, marks, wrong.tolist(), (lows, highs, inner), (begin, leave)):
        _exhaust(words, marks, lows, highs, inner)

    pos = np.flatnonzero(marks[:top])
    edges = np.searchsorted(pos, np.append(starts, top))
    n = np.diff(edges)
    last = pos[edges[1:] - 1]  # a piece holds at least one header: its first word
    stop = last + SIZES.take(words.take(last) >> 28)
    out = stop > ends
    if out.any():
        keep = np.ones(len(pos), dtype=np.bool_)
        keep[edges[1:][out] - 1] = False
        pos, n = pos[keep], n - out
        stop = np.where(out, last, stop)
    return pos, n, stop


def _approach(words: NDArray[np.uint32], lows: NDArray[np.int64], likely: NDArray[np.bool_]) -> NDArray[np.int64]:
    """Guess each block's first header: from a likely header shortly before the block, walk to the first one in it."""
    reach = np.arange(-_LEAD, 0)
    looks = likely.take(words.take(lows[:, None] + reach, mode="clip") << 4 >> 16)
    found = lows + reach.take(looks.argmax(axis=1))
    np.maximum(found, 0, out=found)
    live = np.flatnonzero(found < lows)
    pos, low = found[live], lows[live]
    while len(live):
        for _ in range(4):
            pos += np.where(pos < low, SIZES.take(words.take(pos) >> 28), 0)
        found[live] = pos
        ahead = pos < low
        live, pos, low = live[ahead], pos[ahead], low[ahead]
    out: NDArray[np.int64] = found
    return out


def _lockstep(
    words: NDArray[np.uint32], marks: NDArray[np.bool_], pos: NDArray[np.int64], highs: NDArray[np.int64]
) -> NDArray[np.int64]:
    """Mark the headers from each ``pos`` up to its ``high``; return where each walk left (the first header at or behind)."""
    leave = np.maximum(pos, highs)
    live = np.flatnonzero(pos < highs)
    if len(live) < len(pos):
        pos, highs = pos[live], highs[live]
    dummy = len(marks) - 1
    far = np.iinfo(np.int64).max
    while len(pos):
        path = np.empty((_STEPS + 1, len(pos)), dtype=np.int64)
        head = np.empty(len(pos), dtype=np.uint32)
        size = np.empty(len(pos), dtype=np.int64)
        path[0] = pos
        for step in range(_STEPS):
            # mode="clip" spares NumPy a bounds-checked copy; every position is in range thanks to PAD.
            words.take(path[step], out=head, mode="clip")
            np.right_shift(head, 28, out=head)
            SIZES.take(head, out=size, mode="clip")
            np.add(path[step], size, out=path[step + 1])
        pos = path[_STEPS]
        done = pos >= highs
        if done.any():
            over = path >= highs
            leave[live[done]] = np.where(over, path, far).min(axis=0)[done]
            np.copyto(path, dummy, where=over)
            marks[path[:_STEPS].ravel()] = True
            going = ~done
            live, pos, highs = live[going], pos[going], highs[going]
        else:
            marks[path[:_STEPS].ravel()] = True
    marks[dummy] = False
    return leave


def _mend(
    words: NDArray[np.uint32],
    marks: NDArray[np.bool_],
    wrong: list[int],
    blocks: tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.bool_]],
    edges: tuple[NDArray[np.int64], NDArray[np.int64]],
) -> bool:
    """Walk blocks that were guessed wrongly from their true entry until the guessed walk is met; False = too many."""
    lows, highs, inner = blocks
    begin, leave = edges
    budget = _MEND_RECORDS
    for k in wrong:
        while k < len(lows) and inner[k] and begin[k] != leave[k - 1]:
            at, high = int(leave[k - 1]), int(highs[k])
            begin[k] = at
            path = []
            while at < high and not marks[at]:
                path.append(at)
                at += int(SIZES[words[at] >> 28])
            marks[int(lows[k]) : min(at, high)] = False
            marks[path] = True
            budget -= len(path)
            if budget < 0:
                return False
            if at < high:
                break
            leave[k] = at
            k += 1
    return True


def _exhaust(
    words: NDArray[np.uint32],
    marks: NDArray[np.bool_],
    lows: NDArray[np.int64],
    highs: NDArray[np.int64],
    inner: NDArray[np.bool_],
) -> None:
    """Walk every block from each of its ten possible entries, then hop from block to block."""
    pos = (lows[:, None] + np.arange(MAX_WORDS)).ravel()
    high = np.repeat(highs, MAX_WORDS)
    live = np.flatnonzero(pos < high)
    while len(live):
        at = pos[live]
        for _ in range(_STEPS):
            at = np.where(at < high[live], at + SIZES.take(words.take(at) >> 28), at)
        pos[live] = at
        live = live[at < high[live]]
    table = pos.reshape(len(lows), MAX_WORDS).tolist()
    entries: list[int] = []
    leave = 0
    for exits, low, follows in zip(table, lows.tolist(), inner.tolist(), strict=True):
        entry = leave if follows else low
        entries.append(entry)
        leave = exits[entry - low]
    marks[int(lows[0]) : int(highs[-1])] = False
    _lockstep(words, marks, np.array(entries, dtype=np.int64), highs)
