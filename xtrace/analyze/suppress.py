"""Suppressing: findings that were accepted with a reason are set aside, counted and shown, never dropped.

A suppression (``xtrace.config.suppressions``) fits a finding if every selector that it gives does. What it fits is taken
out of the findings *at the targets it names*: a finding at 4.17 to 4.19 that is accepted for 4.18 is still a finding at
4.17 and 4.19. Where several fit, the first in the file takes it. One whose last day is over takes nothing.

An input that cannot be read (exit bit 1) or is incomplete (16) cannot be accepted so.
"""

from __future__ import annotations

import datetime
import difflib
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Final, Protocol, TypeVar

import polars as pl

from xtrace.analyze import rules, wording
from xtrace.analyze.surface import CODES, Surface
from xtrace.errors import UsageError
from xtrace.replay import facts
from xtrace.replay.factfiles import documents
from xtrace.schema import FINDINGS

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from xtrace.analyze.trace_rules import TraceFinding
    from xtrace.config.suppressions import Suppression

__all__ = ("EXPIRED", "SUPPRESSED", "UNMATCHED", "Suppressor", "Used", "bits")

#: Findings that were taken, and the number of the suppression that took each, from 0.
SUPPRESSED: Final = pl.Schema({**FINDINGS, "suppressed": pl.UInt32()})

#: Codes of what is said about suppressions themselves.
UNMATCHED: Final = "XT035"
EXPIRED: Final = "XT036"

#: Codes that no suppression takes: what was lost or cut stays so, and suppressions do not speak of themselves.
_FIXED: Final = {
    **dict.fromkeys(("XT030", "XT031", "XT037"), "says that the trace is incomplete; --fail-on leaves that out of the exit status"),
    **dict.fromkeys((UNMATCHED, EXPIRED), "tells of suppressions themselves"),
}

#: Surface verdicts that are not safe, as ``split`` takes them.
_SURFACE: Final = pl.Schema(
    {
        "row": pl.UInt32(),
        "verdict": pl.UInt32(),
        "code": pl.String(),
        "hypercall": pl.String(),
        "subop": pl.String(),
        "caller": pl.String(),
        "domid": pl.UInt16(),
        "targets": pl.List(pl.String()),
    }
)


class _Seen(Protocol):
    """A hypercall that was seen, and what could become of its continuations (a dataclass)."""

    @property
    def verdicts(self) -> tuple[Surface, ...]: ...


Row = TypeVar("Row", bound=_Seen)


@dataclass(slots=True)
class Used:
    """What became of one suppression.

    Attributes:
        suppression: as it was read.
        expired: its last day is over: it took nothing.
        matched: findings that it fits, whether or not it took them.
        taken: findings that it took.
        surface_matched: surface verdicts that it fits.
        surface_taken: surface verdicts that it took.
    """

    suppression: Suppression
    expired: bool
    matched: int = 0
    taken: int = 0
    surface_matched: int = 0
    surface_taken: int = 0

    @property
    def code(self) -> str | None:
        """Return the code of what must be said about it, if anything."""
        if self.expired:
            return EXPIRED
        return None if self.matched or self.surface_matched else UNMATCHED

    @property
    def note(self) -> str | None:
        """Return what must be said about it in one sentence."""
        code, s = self.code, self.suppression
        if code is None:
            return None
        head = f"{code} {rules.get(code).title}: {s.where}: {s.selectors}"
        if code == UNMATCHED:
            return f"{head}: nothing in this run fits it"
        count = counted(self.matched, self.surface_matched)
        return f"{head}: its last day was {s.expires}; " + (
            f"it no longer takes the {count} that fit it" if count else "nothing fits it"
        )


class Suppressor:
    """Takes findings out of tables, and keeps account.

    Args:
        suppressions: in the order of the file.
        today: the day that is compared with ``expires``; the current one in UTC if not given.

    Raises:
        UsageError: one names a code, hypercall or sub-operation that does not exist; the message names its place.
    """

    def __init__(self, suppressions: Iterable[Suppression], today: datetime.date | None = None) -> None:
        """Check the names; nothing was taken yet."""
        today = today or datetime.datetime.now(datetime.UTC).date()
        self.used = [Used(_checked(s), s.expired(today)) for s in suppressions]

    def __bool__(self) -> bool:
        return bool(self.used)

    def split(self, frame: pl.DataFrame, sources: Sequence[str]) -> tuple[pl.DataFrame, pl.DataFrame]:
        """Take what is suppressed out of findings.

        Args:
            frame: rows of ``schema.FINDINGS``.
            sources: versions that may have written the trace they come from.

        Returns:
            What is left (``FINDINGS``) and what was taken (``SUPPRESSED``), in the order of ``frame``; the targets of a row
            that is split are divided between the two.
        """
        kept, taken = self._split(frame, sources)
        for used, count in zip(self.used, self._counts(frame, taken, sources), strict=True):
            used.matched += count[0]
            used.taken += count[1]
        return (
            _reworded(kept).select(FINDINGS.names()).cast(FINDINGS),
            _reworded(taken).select(SUPPRESSED.names()).cast(SUPPRESSED),
        )

    def accept(self, found: Iterable[TraceFinding], sources: Sequence[str]) -> list[TraceFinding]:
        """Take the exit bits of findings about the traces themselves that are suppressed, and say so in their text.

        They are about no hypercall, domain, caller or target: a suppression that selects one of those does not fit them.
        """
        out = []
        for one in found:
            for used in self.used:
                s = used.suppression
                elsewhere = s.hypercalls or s.domains or s.callers or s.targets
                if elsewhere or one.code in _FIXED or (s.codes and one.code not in s.codes) or not _of_source(s, sources):
                    continue
                used.matched += 1
                if one.bits and not used.expired:
                    used.taken += 1
                    one = replace(one, bits=0, text=f"{one.text} (suppressed: {s.reason})")
            out.append(one)
        return out

    def split_surface(self, rows: Sequence[Row], sources: Sequence[str]) -> list[Row]:
        """Mark the surface verdicts that are suppressed; one whose targets are divided becomes two.

        Args:
            rows: hypercalls that were seen, with what could become of their continuations.
            sources: versions that may have written the traces.
        """
        out = list(rows)
        if not self.used:
            return out
        names = ("hypercall", "subop", "caller", "domid")
        flat = [(n, k, v) for n, row in enumerate(rows) for k, v in enumerate(row.verdicts) if v.verdict != "safe"]
        frame = pl.DataFrame(
            [(n, k, CODES[v.verdict], *(getattr(rows[n], name) for name in names), list(v.targets)) for n, k, v in flat],
            schema=_SURFACE,
            orient="row",
        )
        kept, taken = self._split(frame, sources)
        for used, count in zip(self.used, self._counts(frame, taken, sources), strict=True):
            used.surface_matched += count[0]
            used.surface_taken += count[1]
        new: dict[tuple[int, int], list[Surface]] = {}
        for part in (kept.with_columns(suppressed=pl.lit(None, pl.UInt32)), taken):
            for n, k, targets, number in part.select("row", "verdict", "targets", "suppressed").iter_rows():
                one = replace(rows[n].verdicts[k], targets=tuple(targets), suppressed=number)
                new.setdefault((n, k), []).append(one)
        for n, row in enumerate(rows):
            verdicts = (new.get((n, k), [v]) for k, v in enumerate(row.verdicts))
            out[n] = replace(row, verdicts=tuple(v for some in verdicts for v in some))  # type: ignore[type-var]
        return out

    def _split(self, frame: pl.DataFrame, sources: Sequence[str]) -> tuple[pl.DataFrame, pl.DataFrame]:
        left = frame.rechunk().with_row_index("_row").with_columns(pl.col("targets").alias("_before"), _gone=pl.lit(value=False))
        taken = [left.clear().with_columns(suppressed=pl.lit(None, pl.UInt32))]
        for number, used in enumerate(self.used):
            s = used.suppression
            if used.expired or not _of_source(s, sources):
                continue
            mine = left.filter(~pl.col("_gone") & _fits(s))
            if s.targets:
                mine = mine.with_columns(_at(s, inside=True)).filter(pl.col("targets").list.len() > 0)
            if not len(mine):
                continue
            taken.append(mine.with_columns(suppressed=pl.lit(number, pl.UInt32)))
            hit = pl.col("_row").is_in(mine.get_column("_row").implode())
            if s.targets:
                left = left.with_columns(targets=pl.when(hit).then(_at(s, inside=False)).otherwise("targets"))
                hit &= pl.col("targets").list.len() == 0
            left = left.with_columns(_gone=pl.col("_gone") | hit)
        out = pl.concat(taken).sort("_row", "suppressed")
        return left.filter(~pl.col("_gone")).drop("_row", "_gone"), out.drop("_row", "_gone")

    def _counts(self, frame: pl.DataFrame, taken: pl.DataFrame, sources: Sequence[str]) -> list[tuple[int, int]]:
        """Return how many rows each suppression fits, and how many it took."""
        by = dict(taken.group_by("suppressed").len().iter_rows())
        out = []
        for number, used in enumerate(self.used):
            s, n = used.suppression, 0
            if _of_source(s, sources):
                fit = frame.filter(_fits(s))
                if s.targets:
                    fit = fit.filter(_at(s, inside=True).list.len() > 0)
                n = len(fit)
            out.append((n, int(by.get(number, 0))))
        return out


def bits(frame: pl.DataFrame) -> dict[str, int]:
    """Return target -> exit bits of findings."""
    out: dict[str, int] = {}
    for targets, value in frame.select("targets", "bits").unique().iter_rows():
        for target in targets:
            out[target] = out.get(target, 0) | value
    return out


def counted(findings: int, verdicts: int) -> str:
    """Return a number of findings and surface verdicts as text; empty if there are none."""
    parts = []
    if findings:
        parts.append(f"{findings:,} finding{'s' if findings != 1 else ''}")
    if verdicts:
        parts.append(f"{verdicts:,} surface verdict{'s' if verdicts != 1 else ''}")
    return " and ".join(parts)


def _of_source(s: Suppression, sources: Sequence[str]) -> bool:
    """Say whether every version that may have written the trace is accepted."""
    return not s.sources or set(sources) <= set(s.sources)


def _fits(s: Suppression) -> pl.Expr:
    """Return whether rows fit the selectors, those of releases aside."""
    tests = [pl.lit(value=True)]
    if s.codes:
        tests.append(pl.col("code").is_in(s.codes))
    if s.hypercalls:
        tests.append(pl.any_horizontal(_names(name) for name in s.hypercalls))
    if s.domains:
        known = pl.col("domid").is_in([d for d in s.domains if d is not None]).fill_null(value=False)
        tests.append(known | pl.col("domid").is_null() if None in s.domains else known)
    if s.callers:
        tests.append(pl.col("caller").cast(pl.String).is_in(s.callers))
    return pl.all_horizontal(tests).fill_null(value=False)


def _names(name: str) -> pl.Expr:
    hypercall, slash, operation = name.partition("/")
    own = (pl.col("hypercall") == hypercall).fill_null(value=False)
    return own & (pl.col("subop") == operation).fill_null(value=False) if slash else own


def _at(s: Suppression, *, inside: bool) -> pl.Expr:
    """Return the targets that a suppression names, or the others."""
    named = pl.element().is_in(s.targets)
    return pl.col("targets").list.eval(pl.element().filter(named if inside else ~named))


def _reworded(frame: pl.DataFrame) -> pl.DataFrame:
    """Let the sentences of rows that were divided name the targets that they still have."""
    whole = pl.col("_before").list.len() == pl.col("targets").list.len()
    rows = frame.with_row_index("_row")
    parts = [rows.filter(whole)]
    for (before, now), some in rows.filter(~whole).group_by("_before", "targets", maintain_order=True):
        old, new = wording.span(list(before)), wording.span(list(now))
        parts.append(some.with_columns(pl.col("text").str.replace_all(old, new, literal=True)))
    return pl.concat(parts).sort("_row").drop("_row")


def _checked(s: Suppression) -> Suppression:
    for code in s.codes:
        if code not in rules.rules():
            near = difflib.get_close_matches(code.upper(), list(rules.rules()), n=1)
            raise UsageError(
                f"{s.where}: suppress.code: no rule is called {code!r}" + (f"; did you mean {near[0]!r}?" if near else "")
            )
        if code in _FIXED:
            raise UsageError(f"{s.where}: suppress.code: {code} cannot be suppressed: it {_FIXED[code]}")
    numbers = {name: number for number, name in facts.hypercall_names().items()}
    for name in s.hypercalls:
        hypercall, slash, operation = name.partition("/")
        if hypercall not in numbers:
            raise UsageError(
                f"{s.where}: suppress.hypercall: no Xen release has a hypercall called {hypercall!r}{_near(hypercall, numbers)}"
            )
        known = _operations(numbers[hypercall])
        if slash and known and operation not in known:
            raise UsageError(
                f"{s.where}: suppress.hypercall: {hypercall} has no sub-operation {operation!r}{_near(operation, known)}"
            )
    return s


def _operations(number: int) -> set[str]:
    """Return every name that a sub-operation of a hypercall has or had; empty for a hypercall without fact files."""
    out = set(facts.operation_names(number).values())
    for _, doc in documents(number):
        out |= {str(row["name"]) for row in doc.get("operation", [])}
        out |= {str(name) for row in doc.get("group", []) for name in row["names"]}
    return out


def _near(word: str, words: Iterable[str]) -> str:
    near = difflib.get_close_matches(word, list(words), n=1)
    return f"; did you mean {near[0]!r}?" if near else ""
