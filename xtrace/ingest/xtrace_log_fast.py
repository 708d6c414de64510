"""The plain lines of xtrace's own text log, a block at once with NumPy.

A plain line has one marker at its start or after a blank, a known kind, ``key=value`` words with one blank between them, each
key known and given once, each value a number within its limit (or a name that is known), perhaps a last ``;``. Of such lines
every record is read here exactly as `xtrace_log_general` would; every other line (damage, noise, headers, unknown keys, two
blanks) is left to it. So nothing here reports anything: what is doubtful is not taken.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

import numpy as np

from xtrace.ingest.hypercalls import HYPERCALLS
from xtrace.ingest.keyvalue import PAD, Bytes, Names, packed
from xtrace.ingest.xtrace_log_grammar import CALLER_ID, ENTRIES, KEY_ID, KINDS, LIMITS, MEM, SIGNED, Records, one_after_another

if TYPE_CHECKING:
    from numpy.typing import NDArray

__all__ = ("Plain", "plain")

_FIELD: Final = re.compile(r"[a-z_][a-z0-9_]*(?:\.[a-z0-9_]+)*")
_MARKER: Final = b"xtrace:"
_MARKER_WORD: Final = np.uint64(packed("xtrace:"))
_MARKER_MASK: Final = np.uint64((1 << 8 * len(_MARKER)) - 1)
_MEM_WORD: Final = np.uint64(packed("mem."))
_MEM_MASK: Final = np.uint64(0xFFFFFFFF)
_SPACE, _TAB, _NEWLINE, _EQUALS, _COLON, _MINUS, _END = (np.uint8(ord(c)) for c in " \t\n=:-;")
_UNKNOWN: Final = MEM + 1

#: Value slot of each key: a1 and a1~ are one argument.
_SLOT: Final = np.array([KEY_ID[key.rstrip("~")] for key in LIMITS], dtype=np.intp)
_LIMIT: Final = np.array([*LIMITS.values(), (1 << 64) - 1, 0], dtype=np.uint64)
_MAY_BE_NEGATIVE: Final = np.isin(np.arange(MEM + 2), SIGNED)
#: No log has more names of fields; a block that seems to is left to the other reader.
_MAX_NAMES: Final = 4096


def _hash(names: list[str]) -> tuple[np.uint64, NDArray[np.uint8], NDArray[np.uint64]]:
    """Find a multiplier whose products differ in their highest byte for every name of up to eight bytes.

    Returns:
        The multiplier; by that byte the number of each name, and the name at the high end of a number.
    """
    keys = [packed(name) << 8 * (8 - len(name)) if len(name) <= 8 else 0 for name in names]
    by, some = 0x9E3779B97F4A7C15, [key for key in keys if key]
    while len({(key * by & ((1 << 64) - 1)) >> 56 for key in some}) < len(some):
        by = (by * 0xD1342543DE82EF95 + 2) & ((1 << 64) - 1) | 1
    ids, words = np.full(256, _UNKNOWN, dtype=np.uint8), np.full(256, (1 << 64) - 1, dtype=np.uint64)
    for i, key in enumerate(keys):
        if key:
            at = (key * by & ((1 << 64) - 1)) >> 56
            ids[at], words[at] = i, key
    return np.uint64(by), ids, words


_BY, _IDS, _KEYS = _hash(list(LIMITS))
_KIND_BY, _KIND_IDS, _KIND_WORDS = _hash(list(KINDS))
_LONG_KINDS: Final = [(i, name) for i, name in enumerate(KINDS) if len(name) > 8]

_NONE: Final = np.zeros(0, dtype=np.intp)
#: Bytes read at once: the arrays of more do not stay in a processor's cache.
_PART: Final = 1 << 19


@dataclass(slots=True)
class Plain:
    """The plain lines of a block.

    Attributes:
        start: intp[n], byte of each line of the block, from the block's first. size: intp[n], without the newline.
        taken: bool[n], the plain ones.
        records: theirs.
    """

    start: NDArray[np.intp]
    size: NDArray[np.intp]
    taken: NDArray[np.bool_]
    records: Records


def plain(raw: bytes, longest: int, *, cut: bool) -> Plain:
    """Read the plain lines of a block.

    Args:
        raw: whole lines, each with its newline.
        longest: lines of more bytes are not taken.
        cut: neither is the last line.
    """
    parts, begin = [], 0
    while begin < len(raw):
        end = len(raw) if len(raw) - begin <= _PART else raw.rfind(b"\n", begin, begin + _PART) + 1
        if end <= begin:  # a line longer than that
            end = raw.index(b"\n", begin) + 1
        parts.append((begin, _part(raw[begin:end], longest, cut=cut and end == len(raw))))
        begin = end
    if len(parts) == 1:
        return parts[0][1]
    return Plain(
        np.concatenate([_NONE, *(part.start + at for at, part in parts)]),
        np.concatenate([_NONE, *(part.size for _, part in parts)]),
        np.concatenate([_NONE.astype(bool), *(part.taken for _, part in parts)]),
        one_after_another([(part.records, len(part.size)) for _, part in parts]),
    )


def _part(raw: bytes, longest: int, *, cut: bool) -> Plain:
    text = Bytes(raw)
    data = text.data
    # Tokens: every blank, newline, other control character and "=". What stands between two is a segment, and belongs to
    # the token after it.
    token = np.flatnonzero((data <= _SPACE) | (data == _EQUALS))
    what = data[token]
    equals = what == _EQUALS
    newline = np.flatnonzero(what == _NEWLINE)  # the first is that of the padding
    n = len(newline) - 1
    first = token[newline[:-1]] + 1
    size = token[newline[1:]] - first
    many = np.diff(newline)  # tokens of each line
    good = size <= longest
    if cut and n:
        good[-1] = False
    odd = (what < _SPACE) & (what != _TAB) & (what != _NEWLINE) | (equals & np.append(equals[1:], False))
    line_of = np.repeat(np.arange(n), many)  # of the tokens after the first
    if odd.any():
        good[line_of[np.flatnonzero(odd[1:])]] = False

    mark, one = _markers(text, token, newline)
    good &= one
    lines = np.flatnonzero(good)
    head = mark[lines] + 1  # token after the kind
    kind, known = _kinds(text, token, head)
    # The rest of the line must be "=", blank, "=", blank … and perhaps the end mark.
    sign = np.flatnonzero(equals)
    of = line_of[sign - 1]
    after = sign > mark[of]
    if not after.all():
        sign, of = sign[after], of[after]
    last = newline[lines + 1]
    pairs = np.bincount(of, minlength=n)[lines]
    end = (token[last] - token[last - 1] == 2) & (data[token[last] - 1] == _END) & ~equals[last - 1] & (last > head)
    fits = known & (last - head == 2 * pairs + end)
    if not fits.all():
        good[lines[~fits]] = False

    # Words: places of key and value, and the line of each.
    if len(lines) < n or not fits.all():
        mine = good[of]
        sign, of = sign[mine], of[mine]
    begin = token[sign - 1] + 1
    at = token[sign]
    start, stop = at + 1, token[sign + 1]
    word, keyed = text.aligned(begin, at - begin)
    slot = ((keyed * _BY) >> np.uint64(56)).astype(np.uint8)
    key = _IDS[slot]
    key[_KEYS[slot] != keyed] = _UNKNOWN
    key[(word & _MEM_MASK) == _MEM_WORD] = MEM
    value, fine = _values(text, key, start, stop)

    memory = np.flatnonzero(key == MEM)
    names = Names(text, begin[memory] + 4, at[memory] - begin[memory] - 4)
    if len(names.names) > _MAX_NAMES:
        names.code[:] = -1
        names.names = []
    proper = np.array([_FIELD.fullmatch(name) is not None for name in names.names] + [False])
    fine[memory] &= proper[names.code]
    good[of[~fine]] = False

    plainly = np.flatnonzero(key < MEM)
    # The same key twice; entries without op.
    there = np.zeros(n * MEM, dtype=bool)
    where = _SLOT[key[plainly]] * n + of[plainly]
    there[where] = True
    if int(np.count_nonzero(there)) != len(where):
        good[where[_repeated(where)] % n] = False
    twice = _repeated(of[memory] * len(proper) + names.code)
    good[of[memory][twice]] = False
    kinds = np.zeros(n, dtype=np.uint8)
    kinds[lines] = kind
    without = (kinds < len(ENTRIES)) & ~there[KEY_ID["op"] * n : (KEY_ID["op"] + 1) * n]
    good &= ~without

    rows = np.flatnonzero(good)
    if len(rows) < n:
        plainly = plainly[good[of[plainly]]]
        keep = good[of[memory]]
        memory, names.code = memory[keep], names.code[keep]
        of = (np.cumsum(good) - 1)[of]
    records = Records(
        rows, kinds[rows], of[plainly], key[plainly], value[plainly], of[memory], names.code, value[memory], list(names.names)
    )
    return Plain(first - PAD, size, good, records)


def _markers(text: Bytes, token: NDArray[np.intp], newline: NDArray[np.intp]) -> tuple[NDArray[np.intp], NDArray[np.bool_]]:
    """Return the token that ends each line's marker, and whether the line holds ``xtrace:`` once, as a word before a blank."""
    n = len(newline) - 1
    mark, one = np.zeros(n, dtype=np.intp), np.zeros(n, dtype=bool)
    colon = np.flatnonzero(text.data == _COLON)
    colon = colon[(text.words[colon + 1 - len(_MARKER)] & _MARKER_MASK) == _MARKER_WORD]
    first, last = token[newline[:-1]], token[newline[1:]]
    if len(colon) == n and bool((colon > first).all()) and bool((colon < last).all()):
        line = np.arange(n)
    else:
        line = np.searchsorted(last, colon)
        once = np.bincount(line, minlength=n)[line] == 1
        colon, line = colon[once], line[once]
    before, after = text.data[colon - len(_MARKER)], text.data[colon + 1]
    word = (before <= _SPACE) & ((after == _SPACE) | (after == _TAB))
    if not word.all():
        colon, line = colon[word], line[word]
    # Nearly always the first word of its line.
    end = newline[line] + 1
    if bool((token[end] != colon + 1).any()):
        end = np.searchsorted(token, colon + 1)
    mark[line], one[line] = end, True
    return mark, one


def _kinds(text: Bytes, token: NDArray[np.intp], head: NDArray[np.intp]) -> tuple[NDArray[np.uint8], NDArray[np.bool_]]:
    """Return the number of the kind that ends at each token, and whether it is one."""
    begin = token[head - 1] + 1
    size = token[head] - begin
    word, aligned = text.aligned(begin, size)
    slot = ((aligned * _KIND_BY) >> np.uint64(56)).astype(np.uint8)
    kind, known = _KIND_IDS[slot], _KIND_WORDS[slot] == aligned
    for i, name in _LONG_KINDS:
        this = np.flatnonzero((size == len(name)) & (word == np.uint64(packed(name))))
        rest = np.ones(len(this), dtype=bool)
        for j, letter in enumerate(name[8:].encode(), start=8):
            rest &= text.data[begin[this] + j] == np.uint8(letter)
        kind[this], known[this] = i, rest
    return kind, known


def _values(
    text: Bytes, key: NDArray[np.uint8], start: NDArray[np.intp], stop: NDArray[np.intp]
) -> tuple[NDArray[np.uint64], NDArray[np.bool_]]:
    """Read the values of known keys; also whether each is one within its limit."""
    value, fine = text.numbers(start, stop)
    minus = np.flatnonzero(~fine)
    minus = minus[_MAY_BE_NEGATIVE[key[minus]] & (text.data[start[minus]] == _MINUS)]
    if len(minus):
        number, proper = text.numbers(start[minus] + 1, stop[minus])
        value[minus], fine[minus] = ~number + np.uint64(1), proper & (number <= np.uint64(1 << 63))
    op = np.flatnonzero(~fine & (key == KEY_ID["op"]))
    if len(op):
        names = Names(text, start[op], stop[op] - start[op])
        known = [HYPERCALLS.get(name.removeprefix("__HYPERVISOR_"), -1) for name in names.names] + [-1]
        called = np.array(known, dtype=np.int64)[names.code]
        value[op], fine[op] = called.astype(np.uint64), called >= 0
    who = np.flatnonzero(key == KEY_ID["caller"])
    if len(who):
        size = stop[who] - start[who]
        word = text.head(start[who], size)
        fine[who] = False
        for name, i in CALLER_ID.items():
            this = who[(word == np.uint64(packed(name))) & (size == len(name))]
            value[this], fine[this] = i, True
    fine &= value <= _LIMIT[key]
    return value, fine & (key != _UNKNOWN)


def _repeated(values: NDArray[np.intp]) -> NDArray[np.intp]:
    """Return the places of values that are there more than once."""
    order = np.argsort(values, kind="stable")
    same = np.flatnonzero(values[order][1:] == values[order][:-1])
    return np.concatenate([order[same], order[same + 1]])
