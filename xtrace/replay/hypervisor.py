"""The modelled hypervisor: what one Xen release makes of a call or a continuation, for whole columns at once."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

import numpy as np

from xtrace.replay import facts
from xtrace.replay.codecs import CODECS, Progress, codec
from xtrace.replay.states import Column

if TYPE_CHECKING:
    import numpy.typing as npt

    from xtrace.replay.behaviour import Behaviour, Check, Dispatch, Hypercall, Special
    from xtrace.replay.states import Mask, States

__all__ = (
    "ABSENT",
    "ENDS",
    "ENTERS",
    "MODELLED",
    "NEVER",
    "REFUSED",
    "SPECIAL",
    "UNKNOWN",
    "UNMATCHED",
    "UNRECORDED",
    "Decoded",
    "Hypervisor",
    "Resumed",
)

#: Status of a decoded state.
MODELLED: Final = 0  # an operation is decoded, see ``which``
NEVER: Final = 1  # the hypercall (or this sub-operation) never leaves a continuation
UNKNOWN: Final = 2  # the model has no facts for it
ABSENT: Final = 3  # the hypercall is not in this caller's table
UNMATCHED: Final = 4  # the command names no operation of this release
UNRECORDED: Final = 5  # the trace did not record the command word

#: Disposition of a resumed state.
ENTERS: Final = 0  # the operation's handler goes on with ``decoded.index`` units skipped
REFUSED: Final = 1  # it returns ``errno`` (null: a value that is no error) and does nothing
ENDS: Final = 2  # it returns the progress it was given, or success, and does nothing
SPECIAL: Final = 3  # a special form; ``decoded.specials`` says what follows

_I8 = np.int8


@dataclass(frozen=True, slots=True)
class Decoded:
    """How a release reads n states of one hypercall."""

    hypercall: Hypercall
    status: npt.NDArray[np.int8]
    number: npt.NDArray[np.int64]  # of the sub-operation; −1 where none is named
    behaviours: tuple[Behaviour, ...]
    which: npt.NDArray[np.int16]  # index into behaviours, −1
    index: Column
    progress: Column
    remaining: Column
    total: Column
    marked: Mask  # the registers or memory show a continuation by themselves
    specials: tuple[Special, ...]
    special: npt.NDArray[np.int16]  # index into specials, −1
    inside: Column  # sub-operation number inside the structure, where the operation has one
    descending: Column  # 1: the work starts from the far end (unknown where that depends on what was not recorded)

    def take(self, rows: npt.NDArray[np.intp]) -> Decoded:
        """Return the rows chosen."""
        return Decoded(
            self.hypercall, self.status[rows], self.number[rows], self.behaviours, self.which[rows], self.index.take(rows),
            self.progress.take(rows), self.remaining.take(rows), self.total.take(rows), self.marked[rows], self.specials,
            self.special[rows], self.inside.take(rows), self.descending.take(rows),
        )  # fmt: skip

    def behaviour(self, i: int) -> Behaviour | None:
        """Return the behaviour that row i is decoded to."""
        return self.behaviours[self.which[i]] if self.which[i] >= 0 else None

    def operation(self, i: int) -> str | None:
        """Return Xen's name of the sub-operation of row i; null for hypercalls without a command."""
        if not self.hypercall.command:
            return None
        b = self.behaviour(i)
        if b is not None:
            return b.operation
        return self.hypercall.known_numbers.get(int(self.number[i])) if self.number[i] >= 0 else None

    def home(self, i: int) -> str:
        """Return the progress home of row i."""
        if self.special[i] >= 0:
            return "hypervisor"
        b = self.behaviour(i)
        return codec(b.codec).home if b is not None else "none"


@dataclass(frozen=True, slots=True)
class Resumed:
    """What a release does with n continuations."""

    decoded: Decoded
    disposition: npt.NDArray[np.int8]
    errnos: tuple[str, ...]
    errno: npt.NDArray[np.int16]  # index into errnos, −1
    doubt: Mask  # a check reads something that the trace did not record
    idle: Mask  # a test ends it at once, with success
    before: Mask  # refused before the operation was looked at (a guard, an interface version): no handler is entered

    def errno_of(self, i: int) -> str | None:
        """Return the errno that must follow for row i, such as ``-EINVAL``."""
        return self.errnos[self.errno[i]] if self.errno[i] >= 0 else None


class Hypervisor:
    """One Xen release as one kind of caller sees it.

    Args:
        release: a version known to ``xtrace.release``, such as ``4.4.1``.
        caller: one of ``schema.CALLERS``.
    """

    def __init__(self, release: str, caller: str) -> None:
        """Name the release and the caller; facts are looked up when needed."""
        self.release, self.caller = release, caller

    def hypercall(self, number: int) -> Hypercall:
        """Return the facts about hypercall ``number``."""
        return facts.lookup(self.release, self.caller, number)

    def decode(self, number: int, states: States, issued: States | None = None) -> Decoded:
        """Read ``states`` as calls or continuations of hypercall ``number``.

        Args:
            number: hypercall number.
            states: n states.
            issued: the same n calls as first made, where known; relative progress can be told only with it.
        """
        call = self.hypercall(number)
        n = len(states)
        status = np.full(n, UNKNOWN, _I8)
        op = np.full(n, -1, np.int64)
        which = np.full(n, -1, np.int16)
        special = np.full(n, -1, np.int16)
        index, progress = Column.full(n, 0), Column.unknown(n)
        remaining, total = Column.unknown(n), Column.unknown(n)
        inside, descending = Column.unknown(n), Column.full(n, 0)
        marked = np.zeros(n, bool)
        behaviours: list[Behaviour] = []
        specials: list[Special] = []

        def result() -> Decoded:
            return Decoded(
                call, status, op, tuple(behaviours), which, index, progress, remaining, total, marked,
                tuple(specials), special, inside, descending,
            )  # fmt: skip

        if call.status == "absent":
            status[:] = ABSENT
            if call.command_at:
                word = states.at(call.command_at)
                op[word.known] = word.value[word.known].astype(np.int64)
            return result()
        if call.status == "unknown":
            return result()
        if call.status == "never":
            self._never(call, states, status, op)
            return result()
        if call.dispatch is None:
            op[:] = 0 if call.by_number else -1
            groups = [(next(iter(call.by_number.values())), np.arange(n))] if call.by_number else []
            status[:] = MODELLED
        else:
            at = call.command_at or "arg0"
            word = states.at(at)
            word = Column(call.dispatch.word(word.value), word.known)
            states = states.replace({at: word})
            value = word.value & np.uint64(call.dispatch.mask)
            status[:] = np.where(word.known, UNMATCHED, UNRECORDED).astype(_I8)
            # A number beyond 2^62 cannot name an operation; keep it out of the signed column.
            op[word.known] = np.minimum(value[word.known], np.uint64(1 << 62)).astype(np.int64)
            groups = []
            asked = set(np.unique(value[word.known]).tolist())
            for b in call.by_number.values():
                if b.number not in asked:
                    continue
                rows = np.flatnonzero(word.known & (value == np.uint64(b.number)))
                if b.command_bits == "unmatched":
                    # The whole word is compared: a number with bits above it names nothing.
                    bits = (word.value[rows] & np.uint64(call.dispatch.progress_bits())) != 0
                    op[rows[bits]] = np.minimum(word.value[rows[bits]], np.uint64(1 << 62)).astype(np.int64)
                    rows = rows[~bits]
                if len(rows):
                    groups.append((b, rows))
                    status[rows] = UNKNOWN if b.codec == "unknown" else MODELLED
        onward = {b.params.get("to_operation") for b in call.by_number.values() if b.codec == "redirect"}
        for b, rows in groups:
            which[rows] = len(behaviours)
            behaviours.append(b)
            part = states.take(rows)
            first = None if issued is None else issued.take(rows)
            read = codec(b.codec).decode(b, part, first)
            # Known not to be a kind that continues: bits and fields mean nothing to it.
            idle = _idle(b, part)
            if idle.any():
                read = _choose(idle, CODECS["none"].decode(b, part, first), read)
            for column, got in ((index, read.index), (progress, read.progress), (remaining, read.remaining),
                                (total, read.total)):  # fmt: skip
                column.value[rows], column.known[rows] = got.value, got.known
            marked[rows] = read.marked
            if b.number in onward and b.codec != "redirect":
                marked[rows] = True  # a number that only Xen issues, to go on with another
            if b.codec in ("none", "hypervisor", "restart") and call.dispatch is not None and call.dispatch.shift is not None:
                # Not used by this operation, but this is what stands where progress stands.
                stray = part.at(call.command_at or "arg0").value >> np.uint64(call.dispatch.shift)
                shown = stray != 0
                progress.value[rows[shown]], progress.known[rows[shown]] = stray[shown], True
            if b.inner is not None:
                column = part.at(b.inner)
                inside.value[rows], inside.known[rows] = column.value, column.known
            if b.order == "descending":
                far = _holds(b.order_when, part)
                descending.value[rows], descending.known[rows] = far.value, far.known
            for form in b.specials:
                hit = rows[_matches(form, part) & (special[rows] < 0)]
                special[hit] = len(specials)
                specials.append(form)
                if form.creates:
                    marked[hit] = True
        return result()

    @staticmethod
    def _never(call: Hypercall, states: States, status: npt.NDArray[np.int8], op: npt.NDArray[np.int64]) -> None:
        word = states.at(call.command_at or "arg0")
        if call.command:
            op[word.known] = (word.value[word.known] & np.uint64(0xFFFFFFFF)).astype(np.int64)
        if call.never_operations is None:
            status[:] = NEVER
        else:
            listed = np.isin(op, np.fromiter(call.never_operations, np.int64, len(call.never_operations)))
            status[:] = np.where(listed, NEVER, np.where(word.known, UNKNOWN, UNRECORDED)).astype(_I8)

    def preempt(self, number: int, issued: States, progress: npt.NDArray[np.uint64]) -> States:
        """Return the registers and memory that this release leaves when it preempts n calls.

        Args:
            number: hypercall number.
            issued: the n calls as made.
            progress: units done before the preemption, counted from the call as issued.
        """
        read = self.decode(number, issued)
        out = issued
        for k, b in enumerate(read.behaviours):
            rows = np.flatnonzero(read.which == k)
            changes = codec(b.codec).preempt(b, issued.take(rows), progress[rows])
            whole: dict[str, Column] = {}
            for location, column in changes.items():
                before = out.at(location)
                value, known = before.value.copy(), before.known.copy()
                value[rows], known[rows] = column.value, column.known
                whole[location] = Column(value, known)
            out = out.replace(whole)
        return out

    def resume(self, number: int, states: States, issuer: str = "guest", issued: States | None = None) -> Resumed:
        """Say what this release does with n continuations of hypercall ``number``.

        Args:
            number: hypercall number.
            states: registers and memory as the source left them.
            issuer: ``guest``, ``device_model`` or ``control``: a privileged caller passes guards that stop a guest.
                ``unknown`` is let through: a refusal is only claimed where it must follow.
            issued: the calls as first made, for the progress shown only.
        """
        read = self.decode(number, states, issued)
        n = len(states)
        disposition = np.full(n, ENTERS, _I8)
        errno = np.full(n, -1, np.int16)
        doubt = np.zeros(n, bool)
        errnos: list[str] = []
        stopped_before, idle = np.zeros(n, bool), np.zeros(n, bool)

        def refuse(rows: npt.NDArray[np.intp], text: str) -> None:
            if not text.startswith("-E"):
                disposition[rows] = ENDS
                return
            disposition[rows] = REFUSED
            if text not in errnos:
                errnos.append(text)
            errno[rows] = errnos.index(text)

        call = read.hypercall
        if call.status == "absent":
            refuse(np.arange(n), call.absent_errno)
        if call.dispatch is not None:
            refuse(np.flatnonzero(read.status == UNMATCHED), call.dispatch.unmatched)
            at = call.command_at or "arg0"
            word = states.at(at)
            states = states.replace({at: Column(call.dispatch.word(word.value), word.known)})
            for text, hit, unsure in _before_dispatch(call.dispatch, at, states, read, issuer):
                doubt |= unsure & ~stopped_before
                refuse(np.flatnonzero(hit & ~stopped_before), text)
                stopped_before |= hit
            errno[(read.status == UNMATCHED) & doubt & ~stopped_before] = -1
        for k, b in enumerate(read.behaviours):
            rows = np.flatnonzero(read.which == k)
            open_ = (disposition[rows] == ENTERS) & ~stopped_before[rows]  # rows that no check has stopped yet

            for text, hit, unsure, ends_early in _checks(call, b, states.take(rows), read, rows, issuer):
                doubt[rows[open_ & unsure]] = True
                stopped = open_ & hit
                if stopped.any():
                    refuse(rows[stopped], text)
                    idle[rows[stopped]] |= text == "ok" and ends_early
                    # A test before it that cannot be told may have stopped it with another errno.
                    errno[rows[stopped & doubt[rows] & ~unsure]] = -1
                    open_ &= ~hit
            for s, form in enumerate(read.specials):
                if form.issuers and issuer not in form.issuers:
                    continue
                hit = rows[read.special[rows] == s]
                if len(hit):
                    disposition[hit] = SPECIAL
                    if form.errno:
                        refuse(hit, form.errno)
        return Resumed(read, disposition, tuple(errnos), errno, doubt, idle, stopped_before)


def _matches(form: Special, s: States) -> Mask:
    """Return the rows that have a special form, as far as they were recorded.

    Where a recorder wrote the count alone, the count tells: no list ends with a flagged count of 0.
    """
    fits, told = np.ones(len(s), bool), np.zeros(len(s), bool)
    for location, value in form.match:
        column = s.at(location)
        same = column.value == np.uint64(value & 0xFFFFFFFFFFFFFFFF)
        fits &= ~column.known | same
        told |= column.known & same & (value != 0)
    for location, value in form.match_min:
        column = s.at(location)
        fits &= ~column.known | (column.value >= np.uint64(value))
    return fits & told


def _idle(b: Behaviour, s: States) -> Mask:
    """Return the rows of which it is known that they are of a kind that does not continue."""
    idle = np.zeros(len(s), bool)
    if b.continues_when is not None:
        idle |= _fails(b.continues_when, s)
    if b.inner is not None and b.inner_continues is not None:
        inside = s.at(b.inner)
        numbers = [n for n, name in b.inner_operations.items() if name in b.inner_continues]
        idle |= inside.known & ~np.isin(inside.value, np.array(numbers, np.uint64))
    return idle


def _fails(c: Check, s: States) -> Mask:
    """Return the rows of which it is known that they fail a test."""
    column = s.at(c.at)
    value = column.value & np.uint64(0xFFFFFFFF) if c.width == 32 else column.value
    bad = np.zeros(len(s), bool)
    if c.maximum is not None:
        bad |= value > np.uint64(c.maximum)
    if c.minimum is not None:
        bad |= value < np.uint64(c.minimum)
    if c.equals is not None:
        bad |= value != np.uint64(c.equals)
    if c.not_equals is not None:
        bad |= value == np.uint64(c.not_equals)
    if c.zero_bits:
        bad |= (value & np.uint64(c.zero_bits)) != 0
    return bad & column.known


def _holds(condition: str | None, s: States) -> Column:
    """Evaluate ``mem.A > mem.B and mem.A < mem.B + mem.C`` for every row; unknown where a part was not recorded."""
    n = len(s)
    value, known = np.ones(n, bool), np.ones(n, bool)
    for clause in (condition or "").split(" and ") if condition else ():
        left, sign, *right = clause.split()
        a = s.at(left)
        total, sure = np.zeros(n, np.uint64), a.known.copy()
        for term in right[::2]:
            column = s.at(term)
            total, sure = total + column.value, sure & column.known
        value &= (a.value > total) if sign == ">" else (a.value < total)
        known &= sure
    return Column(value.astype(np.uint64), known)


def _choose(rows: Mask, a: Progress, b: Progress) -> Progress:
    def pick(x: Column, y: Column) -> Column:
        return Column(np.where(rows, x.value, y.value), np.where(rows, x.known, y.known))

    return Progress(
        pick(a.index, b.index), pick(a.progress, b.progress), pick(a.remaining, b.remaining), pick(a.total, b.total),
        np.where(rows, a.marked, b.marked),
    )  # fmt: skip


def _before_dispatch(d: Dispatch, at: str, s: States, read: Decoded, issuer: str) -> list[tuple[str, Mask, Mask]]:
    """Return (result, rows stopped, rows that cannot be told) of what is tested whatever the command names."""
    no = np.zeros(len(s), bool)
    out = []
    if not any(may_issue(issuer, g) for g in (d.guard, *d.guards_also)):
        out.append((d.guard_errno, np.ones(len(s), bool), no))
    for c in d.checks:
        made = ~np.isin(read.number, np.array(c.spares, np.int64))
        known = s.at(c.at).known
        out.append((c.errno, _fails(c, s) & made, ~known & made))
    if d.command_bits is not None:
        word = s.at(at)
        stray = word.known & ((word.value & np.uint64(d.progress_bits())) != 0)
        spared = np.isin(read.number, np.array(d.command_bits_except, np.int64))
        out.append((d.command_bits, stray & ~spared, no))
    return out


def _checks(
    call: Hypercall, b: Behaviour, s: States, read: Decoded, rows: npt.NDArray[np.intp], issuer: str
) -> list[tuple[str, Mask, Mask, bool]]:
    """Return (result, rows stopped, rows that cannot be told, whatever is left) for each test on entry, in Xen's order."""
    n = len(rows)
    no = np.zeros(n, bool)
    out: list[tuple[str, Mask, Mask, bool]] = []
    if call.dispatch is not None and b.codec not in ("shifted_index", "masked_offset"):
        word = s.at(call.command_at or "arg0")
        stray = word.known & ((word.value & np.uint64(call.dispatch.progress_bits())) != 0)
        if b.command_bits not in ("ignored", "unmatched"):
            out.append((b.command_bits, stray, no, False))
    if not any(may_issue(issuer, g) for g in (b.guard, *b.guards_also)):
        out.append((b.guard_errno, np.ones(n, bool), no, False))
    index = read.index.take(rows)
    resumed = read.marked[rows] | (index.known & (index.value != 0))
    for c in b.checks:
        known = s.at(c.at).known
        live = resumed if c.resumed_only else np.ones(n, bool)
        out.append((c.errno, _fails(c, s) & live, ~known & live, True))
    if b.refuses is not None:
        out.append((b.refuses, ~_idle(b, s), no, False))
    if b.inner is not None and b.inner_operations:
        inside = s.at(b.inner)
        listed = np.isin(inside.value, np.fromiter(b.inner_operations, np.uint64, len(b.inner_operations)))
        out.append((b.inner_unmatched, inside.known & ~listed, no, False))
    total = read.total.take(rows)
    if b.max_total is not None:
        over = total.known & (total.value > np.uint64(b.max_total))
        out.append((b.max_total_result or "progress", over, no, False))
    if b.past_end is not None:
        compared = total.known & index.known & (index.value != 0)
        past = compared & (index.value > total.value)
        level = compared & (index.value == total.value)
        out.append((b.past_end, past, no, False))
        out.append((b.at_end or b.past_end, level, no, False))
    return out


#: Who passes which guard.
_PASSES: Final = {
    "any": ("guest", "device_model", "control", "unknown"),
    "device_model": ("device_model", "control", "unknown"),
    "control": ("control", "unknown"),
}


def may_issue(issuer: str, guard: str) -> bool:
    """Say whether ``issuer`` may pass ``guard`` (an unknown issuer may: nothing is refused on a guess)."""
    return issuer in _PASSES.get(guard, _PASSES["any"])
