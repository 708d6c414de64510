"""Return addresses on a kernel stack, followed without symbols: whether what stands there belongs to one chain of calls.

A return address is preceded by its call, and a direct call names the function that it entered. So the next return address
down the stack must lie in that function, or in one that it jumps to instead of calling it. A chain that is whole from where the
stack pointer was saved up to a frame shows that everything between is in use: the way an unwinder goes, with the code in place
of its tables. Indirect calls break the chain; then nothing is shown.
"""

from __future__ import annotations

from bisect import bisect_left, insort
from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    from collections.abc import Sequence

    from xtrace.image.memory import Memory, Space

__all__ = ("Code",)

#: A function is taken to be no longer than this: what is longer breaks a chain, which then proves nothing.
_LONGEST: Final = 0x1000

#: Jumps out of a function are looked for in this much of it, and so many are kept.
_BODY: Final = 0x400
_MOST_JUMPS: Final = 64

#: Reads and comparisons for one image.
_MOST_STEPS: Final = 1 << 17

#: Direct calls and jumps reach this far.
_REACH: Final = 1 << 31


class Code:
    """The code of a guest's kernel.

    Args:
        memory: of the guest.
        space: its page tables. word: bytes of an address.
    """

    def __init__(self, memory: Memory, space: Space, word: int) -> None:
        """Take the memory; the source must be open."""
        self._memory, self._space, self.word = memory, space, word
        self._mask = (1 << 8 * word) - 1
        self._targets: dict[int, int | None] = {}
        self._jumps: dict[int, list[int]] = {}
        self._steps = _MOST_STEPS

    @property
    def spent(self) -> bool:
        """Whether the work allowed for one image is done: what follows says nothing any more."""
        return self._steps <= 0

    def read(self, address: int, n: int) -> bytes | None:
        """Return n bytes of code, or None."""
        if address < 0 or self.spent:
            return None
        self._steps -= 1
        return self._memory.read(address, n, self._space)

    def called(self, back: int) -> int | None:
        """Return the function that was entered by the direct call before a return address; None if there is none."""
        if back not in self._targets:
            code = self.read(back - 5, 5)
            direct = code is not None and code[0] == 0xE8
            self._targets[back] = self._near(back, code[1:]) if direct and code is not None else None
        return self._targets[back]

    def is_return(self, back: int) -> bool:
        """Say whether a call, direct or not, stands before an address."""
        if self.called(back) is not None:
            return True
        code = self.read(back - 7, 7)
        # ff /2 with a register (ff d0), with a base and 8 or 32 bits (ff 50, ff 90), with an absolute address (ff 14 25, ff 15).
        return code is not None and (
            (code[5] == 0xFF and code[6] & 0xF8 == 0xD0)
            or (code[4] == 0xFF and code[5] & 0xF8 == 0x50)
            or (code[1] == 0xFF and (code[2] & 0xF8 == 0x90 or code[2] == 0x15))
            or (code[0] == 0xFF and code[1] == 0x14)
        )

    def _near(self, behind: int, rel: bytes) -> int:
        return (behind + int.from_bytes(rel, "little", signed=True)) & self._mask

    def jumps(self, function: int) -> list[int]:
        """Return where a function may jump to; bytes that only look like a jump are among them."""
        if function not in self._jumps:
            code = self.read(function, _BODY) or self.read(function, 0x1000 - (function & 0xFFF)) or b""
            out = []
            for at in range(len(code) - 5):
                if code[at] == 0xE9:
                    out.append(self._near(function + at + 5, code[at + 1 : at + 5]))
                elif code[at] == 0x0F and code[at + 1] & 0xF0 == 0x80 and at + 6 <= len(code):
                    out.append(self._near(function + at + 6, code[at + 2 : at + 6]))
            self._jumps[function] = [j for j in out if not function <= j < function + _BODY][:_MOST_JUMPS]
        return self._jumps[function]

    def leads(self, inner: int, stack: Sequence[int]) -> bool:
        """Say whether the last word of a stretch of stack is a return address that calls led from down to ``inner``.

        Args:
            inner: an address in the innermost function.
            stack: words by ascending address.
        """
        reached = [inner]
        last = False
        for back in stack:
            last = False
            # Return addresses are kernel code like the innermost one: near enough for a direct call.
            function = self.called(back) if -_REACH < back - inner < _REACH else None
            if function is None or self.spent:
                continue
            self._steps -= 1
            last = _within(reached, function) or any(_within(reached, j) for j in self.jumps(function))
            if last:
                insort(reached, back)
        return last


def _within(reached: Sequence[int], function: int) -> bool:
    """Say whether one of the addresses, ascending, is in a function."""
    at = bisect_left(reached, function)
    return at < len(reached) and reached[at] < function + _LONGEST
