"""Lines of ``key=value`` words taken apart with NumPy: a whole block at once, no Python object a word.

Bytes are compared eight at a time: the 64-bit little-endian number at a byte holds that byte and the seven after it, so a key of
up to eight bytes is one number, and eight digits are read with a handful of operations ("SIMD within a register").
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

import numpy as np

if TYPE_CHECKING:
    from collections.abc import Sequence

    from numpy.typing import NDArray

    U64 = NDArray[np.uint64]
    Ints = NDArray[np.intp]
    Flags = NDArray[np.bool_]

__all__ = ("Bytes", "Names", "packed")

#: Bytes before and after the text that may be read and mean nothing.
PAD: Final = 32
#: Names up to so many bytes are told apart.
LONGEST: Final = 32
_SLOT_BITS: Final = 12

_LOW: Final = np.array([(1 << 8 * n) - 1 for n in range(9)], dtype=np.uint64)  # keeps the first n bytes
_HIGH: Final = np.array([((1 << 64) - 1) ^ ((1 << 8 * (8 - n)) - 1) for n in range(9)], dtype=np.uint64)  # … the last n
_ZEROS: Final = np.uint64(0x3030303030303030)
_MIX: Final = [np.uint64(c) for c in (0x9E3779B97F4A7C15, 0xC2B2AE3D27D4EB4F, 0x165667B19E3779F9, 0xD6E8FEB86659FD93)]


def _u(value: int) -> np.uint64:
    return np.uint64(value)


def packed(word: str) -> int:
    """Return the first eight bytes of a word as the number that they are in memory."""
    return int.from_bytes(word.encode()[:8], "little")


class Bytes:
    """A text that can be read eight bytes at a time from any place.

    Args:
        raw: the text. Places count from the start of ``data``, where the text begins after :data:`PAD` bytes, the last
            of which is a newline.

    Attributes:
        data: uint8[n]. words: uint64[n], the eight bytes from each place on.
    """

    def __init__(self, raw: bytes) -> None:
        whole = b"\xff" * (PAD - 1) + b"\n" + raw + b"\xff" * PAD
        self.data: NDArray[np.uint8] = np.frombuffer(whole, dtype=np.uint8)
        self.words: U64 = np.ndarray((len(whole) - 7,), dtype="<u8", buffer=whole, strides=(1,))

    def head(self, start: Ints, size: Ints) -> U64:
        """Return the first eight bytes of words (bytes beyond their size are 0)."""
        return self.words[start] & _LOW[np.minimum(size, 8)]

    def aligned(self, start: Ints, size: Ints) -> tuple[U64, U64]:
        """Return the eight bytes from each place on; and words of up to eight bytes at the high end of a number (else 0)."""
        word = self.words[start]
        return word, word << (_u(64) - (size.view(np.uint64) << _u(3)))

    def numbers(self, start: Ints, end: Ints) -> tuple[U64, Flags]:
        """Read numbers as ``lines.magnitudes`` does, but for decimal ones of 20 digits.

        Args:
            start, end: intp[n], no end before its start.

        Returns:
            The values, and whether each is one.
        """
        size = end - start
        word = self.words[start]
        # Most are short: decimal digits that the word holds all of, moved to its high end. A shift by 64 and more gives 0.
        digits = word ^ _ZEROS
        digits <<= _u(64) - (size.view(np.uint64) << _u(3))
        value, good = _decimal8(digits)
        good &= (size > 0) & (size <= 8)
        if bool(good.all()):
            return value, good
        other = np.flatnonzero(~good)
        hexed = (word[other] & _u(0xDFFF)) == _u(0x5830)  # 0x or 0X
        which = other if hexed.all() else other[hexed]
        if len(which):
            value[which], good[which] = self._hex(end[which], size[which] - 2)
        which = other[~hexed & (size[other] > 8)]
        if len(which):
            value[which], good[which] = self._decimal(end[which], size[which])
        return value, good

    def _hex(self, end: Ints, size: Ints) -> tuple[U64, Flags]:
        value, good = _hex8(self._digits(end, np.minimum(size, 8)))
        high, fine = _hex8(self._digits(end - 8, np.clip(size - 8, 0, 8)))
        value |= high << _u(32)
        return value, good & fine & (size > 0) & (size <= 16)

    def _decimal(self, end: Ints, size: Ints) -> tuple[U64, Flags]:
        value, good = _decimal8(self._digits(end, np.minimum(size, 8)) ^ _ZEROS)
        scale = 1
        for done in (8, 16):
            scale *= 10**8
            high, fine = _decimal8(self._digits(end - done, np.clip(size - done, 0, 8)) ^ _ZEROS)
            value += high * _u(scale)
            good &= fine
        return value, good & (size > 0) & (size <= 19)

    def _digits(self, end: Ints, size: Ints) -> U64:
        """Return the last digits before ``end``, up to eight, with leading zeros."""
        keep = _HIGH[size]
        digits = self.words[end - 8] ^ _ZEROS
        digits &= keep
        digits ^= _ZEROS
        return digits


# In place wherever that saves an array: fetching memory costs more than the arithmetic.


def _hex8(x: U64) -> tuple[U64, Flags]:
    """Read eight hex digits; ``x`` is used up."""
    letter = x >> _u(6)
    letter &= _u(0x0101010101010101)
    digit = letter * _u(9)
    digit += x & _u(0x0F0F0F0F0F0F0F0F)
    # A digit printed again, as a small letter, must be what was read.
    letter <<= _u(5)
    x |= letter
    again = digit + _u(0x0606060606060606)
    again >>= _u(4)
    again &= _u(0x0101010101010101)
    again *= _u(39)
    again += digit
    again += _ZEROS
    again ^= x
    again |= digit & _u(0x1010101010101010)
    return _joined(digit, 16), again == 0


def _decimal8(digit: U64) -> tuple[U64, Flags]:
    """Read eight decimal digits (0 to 9, not "0" to "9"); ``digit`` is used up."""
    wrong = digit + _u(0x7676767676767676)
    wrong |= digit
    wrong &= _u(0x8080808080808080)
    return _joined(digit, 10), wrong == 0


def _joined(digit: U64, base: int) -> U64:
    """Join eight digits, the first the most significant: pairs, then the four pairs in one lane. ``digit`` is used up."""
    pair = digit >> _u(8)
    digit *= _u(base)
    pair += digit
    lanes = _u(0x000000FF000000FF)
    np.right_shift(pair, _u(16), out=digit)
    digit &= lanes
    digit *= _u(1 + (base**4 << 32))
    pair &= lanes
    pair *= _u(base**2 + (base**6 << 32))
    pair += digit
    pair >>= _u(32)
    return pair


class Names:
    """A few distinct names among many words.

    Args:
        text: where they stand.
        start, size: intp[n], their places.

    Attributes:
        code: intp[n], number of each name; -1 where the word is too long, or there are too many names to tell apart.
        names: the names by number.
    """

    def __init__(self, text: Bytes, start: Ints, size: Ints) -> None:
        parts = [text.words[start + 8 * i] & _LOW[np.clip(size - 8 * i, 0, 8)] for i in range(LONGEST // 8)]
        mixed = np.zeros(len(start), dtype=np.uint64)
        for part, by in zip(parts, _MIX, strict=True):
            mixed = (mixed ^ part) * by
            mixed ^= mixed >> _u(29)
        slot = (mixed >> _u(64 - _SLOT_BITS)).astype(np.intp)
        # The word that stands for its slot; others of the slot must be the same, byte for byte.
        stands = np.zeros(1 << _SLOT_BITS, dtype=np.intp)
        stands[slot] = np.arange(len(start))
        one = stands[slot]
        same = size <= LONGEST
        for part in parts:
            same &= part == part[one]
        same &= size == size[one]
        chosen = np.zeros(len(start), dtype=bool)
        chosen[one[same]] = True
        those = np.flatnonzero(chosen)
        number = np.full(len(start), -1, dtype=np.intp)
        number[those] = np.arange(len(those))
        self.code: Ints = np.where(same, number[one], -1)
        self.names: Sequence[str] = [
            bytes(text.data[at : at + n]).decode("utf-8", "replace")
            for at, n in zip(start[those].tolist(), size[those].tolist(), strict=True)
        ]
