"""What a recorder on a simulated host writes down: records in time order, windows in which it loses them."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    import random
    from collections.abc import Mapping

    from xtrace.machine.workload import Domain

__all__ = ("Record", "Recording", "instruction")

#: Where a guest's hypercall page lies, the distance between its entries, the offset of the instruction in one, its length.
_PAGE: Final = {
    "pv64": (0xFFFF_FFFF_8100_1000, 32, 8, 2),
    "pv32": (0xC010_1000, 32, 5, 2),
    "hvm64": (0xFFFF_FFFF_8100_1000, 32, 5, 3),
    "hvm32": (0xC010_1000, 32, 5, 3),
    "pvh64": (0xFFFF_FFFF_8100_1000, 32, 5, 3),
    "arm64": (0xFFFF_0000_0810_1000, 32, 4, 4),
    "arm32": (0xC010_1000, 32, 4, 4),
}


def instruction(caller: str, op: int) -> tuple[int, int]:
    """Return the address of a caller's hypercall instruction for ``op``, and that of the one behind it."""
    page, step, offset, size = _PAGE[caller]
    at = page + op * step + offset
    return at, at + size


@dataclass(slots=True)
class Record:
    """One record; ``kind`` as in docs/xtrace-log.md.

    Attributes:
        before: of ``schedule``: (domain, vCPU) that ran on the pCPU until then; None: none did.
        count, since: of ``lost``: how many, and the TSC of the first of them.
    """

    kind: str
    tsc: int
    pcpu: int
    domid: int
    vcpu: int
    op: int | None = None
    args: tuple[int, ...] = ()
    memory: Mapping[str, int] = field(default_factory=dict)
    rip: int | None = None
    on_insn: bool | None = None
    result: int | None = None
    count: int | None = None
    since: int | None = None
    before: tuple[int, int] | None = None


class Recording:
    """The records of one host.

    Args:
        release: what the host runs.
        domains: whose records there may be.
        tsc_khz: TSC frequency.
        draw: random numbers for the losses alone, so that they change nothing else.
        lost: probability that a loss begins with a record.
        lost_records: fewest and most records of one.
    """

    def __init__(
        self,
        release: str,
        domains: tuple[Domain, ...],
        tsc_khz: int,
        draw: random.Random,
        lost: float,
        lost_records: tuple[int, int],
    ) -> None:
        """Start empty."""
        self.release, self.domains, self.tsc_khz = release, domains, tsc_khz
        self.records: list[Record] = []
        self._draw, self._chance, self._span = draw, lost, lost_records
        self._due: dict[int, int] = {}  # by pCPU: records still to lose
        self._gone: dict[int, list[int]] = {}  # by pCPU: TSCs of the records lost so far, not told yet

    def add(self, record: Record) -> int | None:
        """Write a record, or lose it; return its place among ``records``."""
        p = record.pcpu
        if not self._due.get(p) and self._chance and self._draw.random() < self._chance:
            self._due[p] = self._draw.randint(*self._span)
        if self._due.get(p):
            self._due[p] -= 1
            self._gone.setdefault(p, []).append(record.tsc)
            return None
        self._tell(record)
        self.records.append(record)
        return len(self.records) - 1

    def _tell(self, record: Record) -> None:
        gone = self._gone.pop(record.pcpu, None)
        if gone:
            # Its time is that of the record that found room again; it names who runs until that one.
            who = record.before if record.kind == "schedule" and record.before is not None else (record.domid, record.vcpu)
            self.records.append(Record("lost", record.tsc, record.pcpu, *who, count=len(gone), since=gone[0]))

    def cut(self, first: int, last: int) -> bool:
        """Say whether records were lost between two places, or one of them was (None is passed as −1)."""
        return first < 0 or last < 0 or any(r.kind == "lost" for r in self.records[first:last])
