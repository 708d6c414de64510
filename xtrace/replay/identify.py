"""Which releases a trace can come from: those that nothing in it rules out, with the records that ruled out the others.

Evidence, strongest first: trace records and their layouts (``identify_records``), then what calls and continuations show
(``identify_calls``): something succeeded that a release lacks or refuses, or a continuation that it could not have left. That
something is missing from a trace never proves anything: it may have been masked away, or nobody asked for it.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from xtrace import release
from xtrace.replay import identify_records
from xtrace.replay.identify_calls import Calls

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

    import polars as pl

__all__ = ("Evidence", "Identification", "Identifier", "possible")


@dataclass(frozen=True, slots=True)
class Evidence:
    """One thing that a trace shows and that some releases cannot have done.

    Attributes:
        kind: ``record`` (what the tracing code wrote) or ``call`` (what the hypervisor did).
        what: what the trace shows. why: what keeps the releases from it.
        releases: those that it rules out.
        seq, offset, line: the first record that shows it, as far as the format has them.
    """

    kind: str
    what: str
    why: str
    releases: frozenset[str]
    seq: int | None = None
    offset: int | None = None
    line: int | None = None

    @property
    def place(self) -> str:
        """The record's place, for readers."""
        if self.line is not None:
            return f"line {self.line:,}"
        return f"byte {self.offset:,}" if self.offset is not None else "no place"


@dataclass(frozen=True, slots=True)
class Identification:
    """What is left of the known releases, and why.

    Attributes:
        known: every release looked at, in order. left: those that nothing rules out, in order.
        evidence: all of it, strongest first. A release may be ruled out several times.
    """

    known: tuple[str, ...]
    left: tuple[str, ...]
    evidence: tuple[Evidence, ...]

    def ruled_out(self) -> list[tuple[tuple[str, ...], Evidence]]:
        """Return each release that is ruled out once, with the first evidence against it."""
        out: list[tuple[tuple[str, ...], Evidence]] = []
        gone: set[str] = set()
        for e in self.evidence:
            new = tuple(v for v in self.known if v in e.releases and v not in gone)
            if new:
                out.append((new, e))
                gone.update(new)
        return out

    def against(self, version: str) -> Evidence | None:
        """Return the strongest evidence against one release."""
        return next((e for e in self.evidence if version in e.releases), None)

    def contradiction(self) -> str:
        """Say in one clause why nothing is left: the two things that no one release can have done."""
        everything = set(self.known)
        for i, a in enumerate(self.evidence):
            for b in self.evidence[:i]:
                if a.releases | b.releases >= everything:
                    return (
                        f"its records contradict each other: no one release can have written both {b.what} ({b.place}) "
                        f"and {a.what} ({a.place})"
                    )
        parts = [f"{release.fold_text(gone)} by {e.what} ({e.place})" for gone, e in self.ruled_out()]
        return f"its records contradict each other: every release is ruled out, {'; '.join(parts)}"


@dataclass(slots=True)
class Identifier:
    """Takes a trace batch by batch.

    Args:
        callers: caller ABI by domain, as the user or a sidecar says; the key None is for all domains. Where nothing says, each
            caller that is possible must rule a release out.
        suspects: releases that are of interest, if not all are: what rules out others is then told in part.
    """

    callers: Mapping[int | None, str] = field(default_factory=dict)
    suspects: frozenset[str] = frozenset()
    _calls: Calls = field(init=False)

    def __post_init__(self) -> None:
        self._calls = Calls(_known(), self.callers, self.suspects)

    def feed(self, events: pl.DataFrame) -> None:
        """Look at one batch of ``schema.EVENTS``, in time order."""
        self._calls.feed(events)

    def conclude(
        self,
        event_ids: Iterable[int] = (),
        forms: Mapping[tuple[int, int, bool], int] | None = None,
        peaks: Mapping[tuple[int, int], tuple[int, int]] | None = None,
    ) -> Identification:
        """Put everything together.

        Args:
            event_ids: trace event ids seen.
            forms: (event id, extra words, has a TSC) -> byte of the first such record.
            peaks: (event id, word) -> largest value and the byte of the first record that holds it.
        """
        known = _known()
        records = identify_records.judge(known, event_ids, forms or {}, peaks or {})
        records += identify_records.numbers(known, event_ids, self._calls.numbers)
        records += identify_records.subcalls(known, event_ids, self._calls.hvm_subcall)
        found = [Evidence("record", f.what, f.why, f.releases, f.seq, f.offset, f.line) for f in records]
        found += [Evidence("call", f.what, f.why, f.releases, f.seq, f.offset, f.line) for f in self._calls.findings()]
        gone = frozenset[str]().union(*(e.releases for e in found))
        return Identification(known, tuple(v for v in known if v not in gone), tuple(found))


def _known() -> tuple[str, ...]:
    return tuple(r.version for r in release.releases())


def possible(event_ids: Iterable[int]) -> tuple[str, ...]:
    """Return the releases that write all of ``event_ids``, in order; empty if they contradict each other."""
    return Identifier().conclude(event_ids).left
