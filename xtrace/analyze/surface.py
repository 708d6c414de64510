"""The surface: every continuation that a call which was seen could have left on the source, preempted or not.

A few seconds of trace rarely catch a preemption. What an operator wants to know is what this guest *does* that could
break if it were caught; so each hypercall and sub-operation seen is judged by a set of representative continuations.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from typing import TYPE_CHECKING, Final

import polars as pl

from xtrace.analyze import judging
from xtrace.analyze.representatives import fates
from xtrace.replay import facts
from xtrace.replay import hypervisor as hv
from xtrace.replay.hypervisor import may_issue

if TYPE_CHECKING:
    from collections.abc import Iterable


__all__ = ("CODES", "SEEN", "Surface", "collect", "judge", "merge", "of_the_set")

#: What is kept of the calls seen: one row for each domain, caller, hypercall and sub-operation.
SEEN: Final = pl.Schema(
    {
        "domid": pl.UInt16(),
        "caller": pl.String(),
        "op": pl.UInt32(),
        "number": pl.Int64(),
        "calls": pl.UInt32(),
        "total": pl.UInt64(),  # largest number of units asked for; null if any call did not record it
        "untotalled": pl.UInt32(),
        "input": pl.UInt32(),
        "offset": pl.UInt64(),
    }
)


def collect(entries: pl.DataFrame, index: int) -> pl.DataFrame:
    """Count the calls of one batch of stitched entries of input ``index``."""
    calls = entries.select(
        "domid", "caller", "op", "number", "arg0", "total", "offset", "kind", "reentry", "call", "on_insn"
    ).filter(
        (pl.col("kind").is_in(["hypercall", "vmmcall", "subcall"]) & ~pl.col("reentry"))
        # A stopped vCPU whose call was not seen to begin shows that the call is made, unless it stands elsewhere.
        | ((pl.col("kind") == "sample") & pl.col("call").is_null() & pl.col("on_insn").fill_null(value=True))
    )
    return (
        calls.with_columns(
            number=pl.coalesce(
                "number", pl.when(pl.col("op").is_in(_commands("arg0"))).then((pl.col("arg0") & 0xFFFFFFFF).cast(pl.Int64))
            ).mul(pl.when(pl.col("op").is_in(_commands())).then(1))
        )
        .group_by("domid", "caller", "op", "number", maintain_order=True)
        .agg(
            calls=pl.len().cast(pl.UInt32),
            total=pl.col("total").max(),
            untotalled=pl.col("total").is_null().sum().cast(pl.UInt32),
            input=pl.lit(index, dtype=pl.UInt32).first(),
            offset=pl.col("offset").first(),
        )
        .with_columns(pl.col("caller").cast(pl.String))
        .select(SEEN.names())
        .cast(SEEN)
    )


def merge(parts: Iterable[pl.DataFrame]) -> pl.DataFrame:
    """Add up what several batches saw."""
    whole = pl.concat([pl.DataFrame(schema=SEEN), *parts])
    return whole.group_by("domid", "caller", "op", "number", maintain_order=True).agg(
        pl.col("calls").sum(), pl.col("total").max(), pl.col("untotalled").sum(), pl.col("input").first(),
        pl.col("offset").first(),
    )  # fmt: skip


def _commands(at: str | None = None) -> list[int]:
    """Return the hypercalls with sub-operations; those that name it at one place only."""
    return sorted(n for n in facts.command_hypercalls() if at is None or facts.command_at(n) == at)


@dataclass(frozen=True, slots=True)
class Surface:
    """What could become of one hypercall (and sub-operation) at one class of targets.

    ``verdict``: ``safe`` (every continuation resumes, restarts harmlessly, or leaves what the target rebuilds), ``breaks``
    (some do not), ``undecidable`` (the sub-operation is not known, and some break), ``unknown`` (not modelled). ``outcomes``
    counts representative states.
    """

    targets: tuple[str, ...]
    verdict: str
    outcomes: dict[str, int]
    breaking: tuple[str, ...]  # sub-operations (or the hypercall's name) of which some continuation breaks
    caveats: tuple[str, ...]
    unknown: tuple[str, ...]
    suppressed: int | None = None  # number of the suppression that took it

    @property
    def open(self) -> bool:
        """Say whether it counts: not safe, and not suppressed."""
        return self.verdict != "safe" and self.suppressed is None


#: Verdict -> code of its rule.
CODES: Final = {"breaks": "XT020", "undecidable": "XT021", "unknown": "XT022"}


def judge(
    source: str, caller: str, op: int, number: int | None, total: int | None, targets: list[str], issuer: str
) -> list[Surface]:
    """Judge what a call could leave behind, against every target.

    Args:
        source: release that would leave it.
        caller: ABI of the caller.
        op: hypercall number.
        number: sub-operation number; None if the hypercall has none or the trace does not say.
        total: most units asked for; None if not recorded.
        targets: releases asked to resume it.
        issuer: who makes the call.

    Returns:
        One entry for each class of targets with equal facts.
    """
    call = facts.lookup(source, caller, op)
    if call.status == "never" and (call.never_operations is None or number in call.never_operations):
        return [Surface(tuple(targets), "safe", {}, (), (), ())]
    if call.status != "modelled":
        if call.status == "absent":
            return [Surface(tuple(targets), "safe", {}, (), (), ())]
        return [Surface(tuple(targets), "unknown", {}, (), (), (call.name,))]
    if call.command and number is not None:
        behaviours = [b for k, b in call.by_number.items() if k == number]
    else:
        behaviours = list(call.by_number.values())
    # Who may not make the call at the source leaves no continuation of it.
    behaviours = [b for b in behaviours if b.codec != "none" and not b.never_left and may_issue(issuer, b.guard)]
    if any(b.codec == "unknown" for b in behaviours):
        return [Surface(tuple(targets), "unknown", {}, (), (), tuple(b.operation for b in behaviours if b.codec == "unknown"))]
    if not behaviours:
        return [Surface(tuple(targets), "safe", {}, (), (), ())]
    named = (call.command and number is not None) or not call.command
    out = []
    for group in judging.classes(op, caller, targets):
        seen: dict[str, int] = {}
        breaking: list[str] = []
        unknown: list[str] = []
        caveats: list[str] = []
        for b in behaviours:
            name = b.operation
            sub: dict[str, int] = {}
            for fate in fates(source, caller, op, b, group[0], issuer, total):
                key = "resumes" if fate.outcome == "restarts" and fate.harmless else fate.outcome
                sub[key] = sub.get(key, 0) + fate.count
            if not sub:
                unknown.append(name)  # no state was found that its own release goes on with: nothing is said
            for key, n in sub.items():
                seen[key] = seen.get(key, 0) + n
            if "unknown" in sub:
                unknown.append(name)
            if set(sub) - {"resumes", "unknown", "lost"}:
                breaking.append(name)
            caveats += b.caveats
        verdict = "safe"
        if unknown:
            verdict = "unknown"
        if breaking:
            verdict = "breaks" if named else "undecidable"
        out.append(Surface(tuple(group), verdict, seen, tuple(breaking), tuple(dict.fromkeys(caveats)), tuple(unknown)))
    return out


def continues(source: str, caller: str, op: int) -> bool:
    """Say whether any sub-operation of a hypercall may leave a continuation."""
    call = facts.lookup(source, caller, op)
    if call.status == "modelled":
        return any(b.codec != "none" for b in call.by_number.values())
    return call.status == "unknown" or call.never_operations is not None


@cache
def of_the_set(source: str, caller: str, op: int, target: str) -> tuple[str, str | None]:
    """Judge a continuation whose arguments were not recorded: by the set of states that the source could have left.

    Returns:
        (outcome, errno) if all of them come to the same, ``resumes`` if all go on, ``undecidable`` if some break.
    """
    call = facts.lookup(source, caller, op)
    if call.status != "modelled":
        verdicts = {s.verdict for s in judge(source, caller, op, None, None, [target], "unknown")}
        return ("resumes" if verdicts == {"safe"} else "undecidable"), None
    seen: set[tuple[str, str | None]] = set()
    for b in call.by_number.values():
        if b.codec == "unknown":
            return "undecidable", None
        if b.codec != "none" and not b.never_left:
            for fate in fates(source, caller, op, b, target, "unknown"):
                clean = fate.outcome == "resumes" or fate.harmless
                seen.add(("resumes", None) if clean else (fate.outcome, fate.errno))
        if len(seen) > 1:
            return "undecidable", None
    return next(iter(seen), ("resumes", None))


#: Statuses of a decoded state for which the set of possible states is judged instead.
OPEN: Final = (hv.UNRECORDED,)
