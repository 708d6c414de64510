"""The whole table of continuations: every hypercall, caller, operation and release, folded into spans that are alike."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from xtrace import release
from xtrace.analyze import compare
from xtrace.replay import facts
from xtrace.replay.codecs import codec
from xtrace.replay.factfiles import in_table, load

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Sequence

    from xtrace.replay.behaviour import Behaviour, Hypercall

__all__ = ("Row", "rows", "viridian")


@dataclass(frozen=True, slots=True)
class Row:
    """One operation (or hypercall) in one span of releases, for callers that see it alike.

    ``status``: ``continues``, ``never``, ``absent`` (not in the caller's table), ``unknown``.
    """

    hypercall: str
    number: int
    operation: str | None
    operation_number: int | None
    callers: tuple[str, ...]
    releases: tuple[str, ...]  # spans, FORMAT.md
    status: str
    home: str | None = None
    encoding: str | None = None
    command: str | None = None  # how the command word is split
    unit: str | None = None
    total: str | None = None
    first: int | None = None
    stride: int | None = None
    limit: str | None = None
    past_end: str | None = None
    checks: str | None = None
    checks_before: str | None = None  # made before the operation is looked at
    guard: str | None = None
    caveats: tuple[str, ...] = ()
    held: str | None = None
    special_forms: str | None = None
    breaks_own: str | None = None
    note: str | None = None
    commit: str | None = None
    cites: tuple[str, ...] = ()


def rows(numbers: Iterable[int] | None = None, callers: Sequence[str] | None = None) -> Iterator[Row]:
    """Yield the table by hypercall, operation and release.

    Args:
        numbers: hypercall numbers; None for 0 to 63.
        callers: None for all.
    """
    from dataclasses import replace

    from xtrace.schema import CALLERS

    order = {r.version: i for i, r in enumerate(release.releases())}
    for number in range(64) if numbers is None else numbers:
        found: dict[Row, dict[str, list[str]]] = {}
        for caller in CALLERS if callers is None else callers:
            for r in release.releases():
                if in_table(r.version, caller, number) is None:
                    continue  # there are no such callers at that release
                for row in _rows_of(facts.lookup(r.version, caller, number)):
                    found.setdefault(row, {}).setdefault(caller, []).append(r.version)
        out = []
        for row, kinds in found.items():
            spans: dict[tuple[str, ...], list[str]] = {}
            for caller, versions in kinds.items():
                spans.setdefault(tuple(release.spans(versions)), []).append(caller)
            out += [replace(row, callers=tuple(cs), releases=s) for s, cs in spans.items()]
        yield from sorted(
            out,
            key=lambda w: (
                -1 if w.operation_number is None else w.operation_number, w.operation or "",
                order[w.releases[0].partition("..")[0]], w.callers,
            ),
        )  # fmt: skip
    if numbers is None:
        yield from (row for row in viridian() if callers is None or set(row.callers) & set(callers))


def viridian() -> Iterator[Row]:
    """Yield Hyper-V's hypercalls, which HVM guests may use beside Xen's: bit 31 of eax is set."""
    for row in load("never.toml")["viridian"]:
        for name, code in zip(row["names"], row["codes"], strict=True):
            restarts = row["codec"] == "restart"
            yield Row(
                "viridian", facts.VIRIDIAN, name, code, tuple(row["callers"]), tuple(row["releases"]),
                "continues" if restarts else "never", home="none" if restarts else None,
                encoding="registers as issued, nothing done yet" if restarts else None, first=0 if restarts else None,
                guard="any", note=row.get("note"), commit=row.get("commit"), cites=tuple(row["cite"]),
            )  # fmt: skip


def _rows_of(call: Hypercall) -> Iterator[Row]:
    if call.status != "modelled":
        status = "never" if call.status == "never" and call.never_operations is None else call.status
        if status == "never" and call.never_operations is not None:
            status = "unknown"
        yield Row(call.name, call.number, None, None, (), (), status)
        return
    for b in call.by_number.values():
        yield _row(call, b)


def _row(call: Hypercall, b: Behaviour) -> Row:
    name, number = (b.operation, b.number) if call.command else (None, None)
    if b.codec == "none" and not any(s.creates for s in b.specials):
        return Row(call.name, call.number, name, number, (), (), "never", guard=b.guard)
    bits = b.codec in ("shifted_index", "masked_offset")
    # Registers as issued carry no number of units.
    still = b.codec in ("hypervisor", "restart", "redirect", "unknown")
    return Row(
        call.name,
        call.number,
        name,
        number,
        (),
        (),
        "unknown" if b.codec == "unknown" else "continues",
        home=codec(b.codec).home,
        encoding=compare.encoding_text(b),
        command=compare.dispatch_text(call.dispatch) if bits else None,
        unit=b.unit,
        total=b.total,
        first=None if still else b.first,
        stride=b.stride,
        limit=compare.limit_text(b) or None,
        past_end=b.past_end,
        checks=compare.checks_text(None, b) or None,
        checks_before=compare.checks_text(call.dispatch, None) or None,
        guard=b.guard,
        caveats=b.caveats,
        held=b.held,
        special_forms=compare.specials_text(b) or None,
        breaks_own=b.breaks_own,
        note=b.note,
        commit=b.commit,
        cites=b.cites,
    )
