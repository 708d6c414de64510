"""Findings: one row per continuation and set of targets of equal result, for every target at once."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import polars as pl

from xtrace.analyze import judging, outcomes, rules, surface, wording
from xtrace.analyze.exposure import KINDS, caught, exit_bits, expose, that_count
from xtrace.replay.states import States
from xtrace.schema import ARGS, FINDINGS, empty

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    import numpy.typing as npt

    from xtrace.analyze.exposure import Exposure

__all__ = ("Context", "Tally", "judge_continuations")


@dataclass(frozen=True, slots=True)
class Context:
    """Against what continuations are judged.

    Attributes:
        sources: releases that may have left them; more than one when nothing says which.
        targets: releases asked to resume them, in version order.
        rollback: those of the targets that were added by default and do not count for the exit status.
        roles: role of each domain, as far as known.
        issuer: set to override what role and guard say (``decode``).
        chunk: rows judged at once, so that memory stays bounded; never changes a result.
        migration: kinds of migration that were asked about; empty: all of them.
    """

    sources: Sequence[str]
    targets: Sequence[str]
    rollback: frozenset[str]
    roles: Mapping[int | None, str | None]
    issuer: str | None = None
    chunk: int = 1 << 17
    migration: frozenset[str] = frozenset()


@dataclass(slots=True)
class Tally:
    """Outcome counts and exit bits for each target; ``by_kind``: bits if one kind of migration alone were asked about."""

    counts: dict[str, dict[str, int]]
    bits: dict[str, int]
    by_kind: dict[str, dict[str, int]]

    @classmethod
    def of(cls, targets: Sequence[str]) -> Tally:
        """Start counting."""
        return cls({t: {} for t in targets}, dict.fromkeys(targets, 0), {t: dict.fromkeys(KINDS, 0) for t in targets})

    def add(self, targets: Sequence[str], name: str, n: int, bits: int, by_kind: Mapping[str, int]) -> None:
        """Count ``n`` continuations with one result."""
        for t in targets:
            self.counts[t][name] = self.counts[t].get(name, 0) + n
            self.bits[t] |= bits
            for kind, more in by_kind.items():
                self.by_kind[t][kind] |= more

    def merge(self, other: Tally) -> None:
        """Take over what another counted at the same targets."""
        for t, bits in other.bits.items():
            self.bits[t] |= bits
            for kind, more in other.by_kind[t].items():
                self.by_kind[t][kind] |= more
            for name, n in other.counts[t].items():
                self.counts[t][name] = self.counts[t].get(name, 0) + n


@dataclass(slots=True)
class _Result:
    """What one class of targets does with every row, agreed upon by all possible sources."""

    targets: list[str]
    judged: judging.Judged
    outcome: npt.NDArray[np.int8]
    errno: npt.NDArray[np.int16]
    harmless: npt.NDArray[np.bool_]


def judge_continuations(frame: pl.DataFrame, context: Context, tally: Tally, *, everything: bool = False) -> pl.DataFrame:
    """Judge continuations against every target.

    Args:
        frame: rows of ``schema.CONTINUATIONS`` with an ``input`` column; caller must not be null.
        context: sources, targets and roles.
        tally: counted into.
        everything: also return clean resumes and harmless restarts.

    Returns:
        Rows of ``schema.FINDINGS``, ordered by input and seq.
    """
    parts = []
    role = frame.get_column("domid").replace_strict(
        {k: v for k, v in context.roles.items() if k is not None},
        default=context.roles.get(None),
        return_dtype=pl.String,
    )
    frame = frame.with_columns(role.alias("role"))
    for (number, caller, role_), group in frame.group_by("op", "caller", "role", maintain_order=True):
        for rows in group.iter_slices(context.chunk):
            parts.append(
                _judge_group(
                    rows,
                    int(str(number)),
                    str(caller),
                    None if role_ is None else str(role_),
                    context,
                    tally,
                    everything,
                )
            )
    if not parts:
        return empty(FINDINGS)
    return pl.concat(parts).sort("input", "seq", maintain_order=True)


def _judge_group(
    rows: pl.DataFrame, number: int, caller: str, role: str | None, context: Context, tally: Tally, everything: bool
) -> pl.DataFrame:
    states = States.from_frame(rows)
    issued = States.from_frame(rows, prefix="issued_")
    sides = [
        judging.read_source(group[0], caller, number, states, issued) for group in judging.classes(number, caller, context.sources)
    ]
    results = [_agree(sides, targets, role, context) for targets in judging.classes(number, caller, context.targets)]
    side = sides[-1]
    caveats = side.caveats()
    # Rows whose results are equal at every class of targets are handled together.
    columns = [(r.outcome.astype(np.int64) << 20) | (r.errno.astype(np.int64) << 1) | r.harmless for r in results]
    settled = _not_parked(rows)
    keys = np.stack([*columns, caveats.astype(np.int64), side.guard_of.astype(np.int64), settled.astype(np.int64)], axis=1)
    _, first, inverse = np.unique(keys, axis=0, return_index=True, return_inverse=True)
    parts = []
    for p, i in enumerate(first):
        members = np.flatnonzero(inverse.reshape(-1) == p)
        parts += _pattern(
            rows, members, int(i), sides, side, results, outcomes.CAVEATS[caveats[i]], role, context, tally, everything,
            parked=False if settled[i] else None,
        )  # fmt: skip
    return pl.concat(parts) if parts else empty(FINDINGS)


def _not_parked(rows: pl.DataFrame) -> npt.NDArray[np.bool_]:
    """Say which continuations are known not to be a sleeping task's; null (not known) counts like one that is."""
    if "parked" not in rows.columns:
        return np.zeros(len(rows), bool)
    return (~rows.get_column("parked")).fill_null(value=False).to_numpy()


def _agree(sides: list[judging.Side], targets: list[str], role: str | None, context: Context) -> _Result:
    """Judge at one class of targets; where the possible sources disagree, nothing can be decided."""
    judged = [_judge_at(s, targets[0], role, context) for s in sides]
    last = judged[-1]
    outcome, errno, harmless = last.outcome.copy(), last.errno.copy(), last.harmless.copy()
    for other in judged[:-1]:
        differs = other.outcome != outcome
        outcome[differs] = outcomes.CODE["undecidable"]
        errno[differs | (other.errno != errno)] = 0
        harmless &= other.harmless
    blind = np.isin(sides[-1].decoded.status, surface.OPEN)
    if blind.any():
        # Unrecorded registers: judge the set of states that the source could have left (DESIGN §5).
        name, text = _of_the_sets(sides, targets[0])
        outcome[blind] = outcomes.CODE[name]
        errno[blind] = outcomes.ERRNOS.code(text)
    return _Result(targets, last, outcome, errno, harmless)


def _of_the_sets(sides: list[judging.Side], target: str) -> tuple[str, str | None]:
    """Judge by the sets of states of all possible sources; the first that disagrees settles it."""
    said: tuple[str, str | None] | None = None
    for side in reversed(sides):
        got = surface.of_the_set(side.release, side.caller, side.number, target)
        if got[0] == "undecidable" or (said is not None and got != said):
            return "undecidable", None
        said = got
    assert said is not None
    return said


def _judge_at(side: judging.Side, target: str, role: str | None, context: Context) -> judging.Judged:
    if context.issuer is not None:
        return judging.judge_at(side, target, context.issuer)
    groups = judging.issuers(side, role)
    if len(groups) == 1:
        return judging.judge_at(side, target, groups[0][0])
    out: judging.Judged | None = None
    for issuer, rows in groups:
        got = judging.judge_at(judging.take(side, rows), target, issuer)
        if out is None:
            out = judging.judge_at(side, target, "unknown")
        out.outcome[rows], out.errno[rows], out.harmless[rows] = got.outcome, got.errno, got.harmless
    assert out is not None
    return out


def _pattern(
    rows: pl.DataFrame,
    members: npt.NDArray[np.intp],
    i: int,
    sides: list[judging.Side],
    side: judging.Side,
    results: list[_Result],
    caveats: tuple[str, ...],
    role: str | None,
    context: Context,
    tally: Tally,
    everything: bool,
    parked: bool | None = None,
) -> list[pl.DataFrame]:
    """Make the findings of rows that share every result."""
    groups: dict[tuple[str, str | None, bool, bool], list[_Result]] = {}
    for r in results:
        for counted in (True, False):
            targets = [t for t in r.targets if (t not in context.rollback) is counted]
            if targets:
                key = (outcomes.NAMES[r.outcome[i]], outcomes.ERRNOS[r.errno[i]], bool(r.harmless[i]), counted)
                groups.setdefault(key, []).append(_Result(targets, r.judged, r.outcome, r.errno, r.harmless))
    part = rows[members]
    guard = side.guards[side.guard_of[i]]
    exposure = expose(role, guard, side.caller, parked=parked)
    seen_by = caught(exposure.kinds, context.migration)
    shown = that_count(caveats, exposure.kinds, context.migration)
    if context.issuer is not None:
        issuer = context.issuer
    else:
        issuer = exposure.issuer
    out = []
    order = {t: k for k, t in enumerate(context.targets)}
    for (name, errno, harmless, counted), same in groups.items():
        targets = sorted((t for r in same for t in r.targets), key=order.__getitem__)
        clean = name == "resumes" or (name == "restarts" and harmless)
        proved = part.get_column("evidence") == "proved"
        bits = [_bits(name, harmless, caveats, e, exposure, context.migration) for e in ("proved", "inferred")]
        here = [e for e, some in (("proved", proved.any()), ("inferred", not proved.all())) if some]
        alone = {kind: _any_bits(name, harmless, caveats, here, exposure, frozenset((kind,))) for kind in KINDS}
        counted_as = name if not (clean and shown) else shown[0]
        if not seen_by and not clean:
            counted_as = "not_caught"
        tally.add(targets, counted_as, len(part), _any_bits(name, harmless, caveats, here, exposure, context.migration), alone)
        if clean and not shown and not everything:
            continue
        code = rules.by_name().get(shown[0] if clean and shown else name, "")
        sources = [r for s in sides for r in [s.release]]
        judged = same[0].judged
        frame = part.select(
            pl.lit(code).alias("code"),
            pl.lit(name).alias("outcome"),
            pl.lit(pl.Series([list(shown)], dtype=pl.List(pl.String))).first().alias("caveats"),
            "evidence",
            pl.lit(issuer).alias("issuer"),
            pl.lit(exposure.migrates, dtype=pl.Boolean).alias("migrates"),
            pl.lit(pl.Series([list(exposure.kinds)], dtype=pl.List(pl.String))).first().alias("kinds"),
            pl.lit(context.sources[-1] if len(context.sources) == 1 else "/".join(sources)).alias("source"),
            pl.lit(pl.Series([targets], dtype=pl.List(pl.String))).first().alias("targets"),
            pl.lit(side.decoded.hypercall.name).alias("hypercall"),
            pl.lit(None, dtype=pl.String).alias("subop"),
            pl.col("caller").cast(pl.String),
            "domid",
            "vcpu",
            "input",
            "offset",
            "line",
            "seq",
            pl.concat_list(ARGS).alias("args"),
            pl.lit(errno, dtype=pl.String).alias("errno"),
            pl.lit(None, dtype=pl.String).alias("text"),
            pl.lit(harmless).alias("harmless"),
            pl.when(pl.col("evidence") == "proved").then(bits[0]).otherwise(bits[1]).cast(pl.UInt8).alias("bits"),
            pl.lit(counted).alias("in_exit"),
        ).with_columns(
            side.reading().gather(members).alias("source_decode"),
            judged.reading().gather(members).alias("target_decode"),
        )
        frame = frame.with_columns(subop=pl.col("source_decode").struct.field("subop"))
        out.append(frame.with_columns(text=wording.sentence(name, harmless, targets)).select(FINDINGS.names()).cast(FINDINGS))
    return out


def _bits(name: str, harmless: bool, caveats: tuple[str, ...], evidence: str, exposure: Exposure, migration: frozenset[str]) -> int:
    """Return the exit bits of one result, as far as the migrations asked about catch it."""
    return exit_bits(
        name,
        harmless=harmless,
        caveats=bool(that_count(caveats, exposure.kinds, migration)),
        evidence=evidence,
        migrates=exposure.migrates,
        kinds=exposure.kinds,
        migration=migration,
    )


def _any_bits(
    name: str, harmless: bool, caveats: tuple[str, ...], evidence: Sequence[str], exposure: Exposure, migration: frozenset[str]
) -> int:
    """Return the exit bits of rows that differ in their evidence alone."""
    out = 0
    for e in evidence:
        out |= _bits(name, harmless, caveats, e, exposure, migration)
    return out
