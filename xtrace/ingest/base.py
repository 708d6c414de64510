"""What every reader gives and gets: a source of bytes in, batches of events and a ledger of losses out."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

    import polars as pl

    from xtrace.ingest.source import Source

__all__ = ("Domain", "Ledger", "Observed", "Problem", "ReadOptions", "Reader", "Recording", "Shows")


@dataclass(frozen=True, slots=True)
class Problem:
    """One thing that was wrong with an input, and where."""

    text: str
    offset: int | None = None
    line: int | None = None


@dataclass(slots=True)
class Ledger:
    """What was read and what was not. Counts are final once the batches are exhausted.

    ``records`` counts every record header of the file, window headers included (text: every record line that was
    understood); ``hypercalls`` PV entry records, ``subcalls`` multicall entries, ``vmmcalls`` HVM entries.
    """

    records: int = 0
    lines: int = 0  # text: lines of any sort
    hypercalls: int = 0
    subcalls: int = 0
    vmmcalls: int = 0
    samples: int = 0
    lost_records: int = 0  # as the recorder counted them
    lost_events: int = 0  # how often it said so
    skipped_bytes: int = 0  # bytes that belong to no record (damage, an incomplete tail)
    skipped_lines: int = 0  # text: lines that look like records and are not understood
    noise_lines: int = 0  # text: lines that are something else (console output)
    unattributed: int = 0  # hypercall records whose domain and vCPU are unknown
    nameless: int = 0  # entries whose hypercall's number the input does not hold
    truncated: bool = False  # the input ends inside a record or window
    problems: list[Problem] = field(default_factory=list)  # the first few, with their place
    problems_dropped: int = 0
    unparsed: list[tuple[int, str]] = field(default_factory=list)  # the first few noise lines: line number, start of its text

    #: More problems than this are counted, not kept.
    KEEP = 20
    #: So many noise lines are kept to be shown.
    SHOWN = 5

    def problem(self, text: str, *, offset: int | None = None, line: int | None = None) -> None:
        """Note one problem; only the first few are kept."""
        if len(self.problems) < self.KEEP:
            self.problems.append(Problem(text, offset, line))
        else:
            self.problems_dropped += 1


@dataclass(slots=True)
class Domain:
    """What an input itself says about a domain (null: it does not say)."""

    caller: str | None = None
    role: str | None = None
    name: str | None = None


@dataclass(slots=True)
class Observed:
    """What the reader saw; it concludes nothing. Complete once the batches are exhausted."""

    release: str | None = None  # as the input's own header says
    arch: str | None = None
    tsc_khz: int | None = None
    domains: dict[int, Domain] = field(default_factory=dict)
    layout: str | None = None  # name of the record layout era
    event_ids: dict[int, int] = field(default_factory=dict)  # trace event id -> number of records
    #: (trace event id, extra words, has a TSC) -> byte of the first record of that form
    forms: dict[tuple[int, int, bool], int] = field(default_factory=dict)
    #: (trace event id, extra word) -> largest value seen there, and the byte of the first record that holds it
    peaks: dict[tuple[int, int], tuple[int, int]] = field(default_factory=dict)
    pcpus: int = 0
    first_tsc: int | None = None
    last_tsc: int | None = None
    unsourced: bool = False  # a table of events without its trace's account: which record layouts that had is not known


@dataclass(frozen=True, slots=True)
class ReadOptions:
    """How to read."""

    batch_rows: int = 1 << 20  # aim for this many events a batch; never changes a result
    tsc_khz: int | None = None


@dataclass(frozen=True, slots=True)
class Shows:
    """What a format can show at best (``xtrace formats``); each text is a word or a short clause, "" is never.

    Attributes:
        op: which hypercall.
        subop: its sub-operation, for hypercalls that have some.
        arguments: argument registers.
        rip: instruction pointer.
        who: domain and vCPU.
        time: time stamps.
        memory: guest memory behind a call.
        result: what a call returned.
        proved: how a continuation shows itself by the record's own content.
        inferred: what the sequence of records can show.
        unobservable: what no file of this format can show.
        partial: which hypercalls even a complete recording holds, where that is not all of them; a sentence.
        registers: hypercall -> numbers of the argument registers that are recorded; ``*`` stands for all others. From it
            and the fact files follows, for each hypercall, what its continuations show themselves by.
        samples: registers of stopped vCPUs: what stands in them is whatever Xen left there.
        fields: guest memory is recorded.
    """

    op: str = ""
    subop: str = ""
    arguments: str = ""
    rip: str = ""
    who: str = ""
    time: str = ""
    memory: str = ""
    result: str = ""
    proved: str = ""
    inferred: str = ""
    unobservable: str = ""
    partial: str = ""
    registers: Mapping[str, tuple[int, ...]] = field(default_factory=dict)
    samples: bool = False
    fields: bool = False


class Recording(Protocol):
    """An opened input. Iterate ``batches`` once; ledger and observed fill while it runs.

    One whose input still grows (``source.is_live``) may have ``provisional`` (bool, false if left out): what it gave differs,
    or may differ, from what a reading of the whole gives.
    """

    format: str
    ledger: Ledger
    observed: Observed

    def batches(self) -> Iterator[pl.DataFrame]:
        """Yield frames of ``schema.EVENTS`` in time order. Damage is noted in the ledger, not raised."""
        ...


class Reader(Protocol):
    """One trace format.

    ``streams``: whether it reads an input once, from front to back, so that one that still grows can be followed
    (left out: it does not).
    """

    name: str
    title: str
    shows: Shows

    def sniff(self, head: bytes) -> int:
        """Say how sure this reader is of the first bytes of a file (up to 64 KiB): 0 no, 100 certain."""
        ...

    def open(self, source: Source, options: ReadOptions) -> Recording:
        """Open ``source``; raises InputError only if nothing at all can be read."""
        ...
