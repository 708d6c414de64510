"""A fleet path: what was seen on the first host, at every hop and over the whole chain of hosts.

At every host a continuation may be one last left by *any* host before it: it stays untouched while its task sleeps, or the
host goes on with it and preempts it again. So each pair of an earlier and a later host is judged, not neighbours alone:

* what the first host left, as the trace holds it, at every later one (a call in flight over several hops);
* what a host between would leave: the calls that were seen, made there (the surface), and the continuations that were seen,
  gone on with there by one step and preempted again. Nobody saw those: their evidence is never better than inferred.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, cast

import numpy as np
import polars as pl

from xtrace import release as releases_mod
from xtrace.analyze import judging
from xtrace.analyze.chain import drive
from xtrace.analyze.exposure import expose
from xtrace.analyze.surface import OPEN
from xtrace.errors import UsageError
from xtrace.replay import hypervisor as hv
from xtrace.replay.hypervisor import Hypervisor
from xtrace.replay.reading import MULTICALL
from xtrace.replay.states import States, nullable
from xtrace.schema import ARGS, MEMORY

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

__all__ = ("Leg", "Path", "driven", "hosts_of")


@dataclass(frozen=True, slots=True)
class Leg:
    """What one host makes of what an earlier one left last.

    ``hop``: the two are neighbours; else the call was in flight over every host between. ``outcomes``: continuations, as in a
    report's targets. ``surface``: calls whose continuations could break. ``bits``: exit bits of both.
    """

    left: str
    host: str
    hop: bool
    outcomes: Mapping[str, int]
    surface: tuple[str, ...]
    bits: int


@dataclass(frozen=True, slots=True)
class Path:
    """The hosts in the order in which the domains meet them, and each pair of them."""

    hosts: tuple[str, ...]
    legs: tuple[Leg, ...]

    @property
    def bits(self) -> int:
        """Return the exit bits of all legs: the worst counts."""
        out = 0
        for leg in self.legs:
            out |= leg.bits
        return out


def hosts_of(path: Sequence[str]) -> tuple[str, ...]:
    """Return the releases of ``--path``, point releases all of them.

    Raises:
        UsageError: fewer than two, or a series where a host runs one point release.
        UnknownRelease: one is no Xen release.
    """
    out = []
    for text in path:
        chosen = releases_mod.parse(text.strip())
        if len(chosen.releases) != 1:
            raise UsageError(f"--path: {text} is a series; name one point release of it, such as {chosen.releases[-1].version}")
        out.append(chosen.releases[0].version)
    if len(out) < 2:
        raise UsageError("--path names two releases or more, the one that wrote the trace first: 4.13.5,4.15.7,4.17.7")
    return tuple(out)


def driven(frame: pl.DataFrame, left: str, host: str, roles: Mapping[int | None, str | None]) -> pl.DataFrame:
    """Return what ``host`` leaves of continuations that it goes on with for one step.

    Args:
        frame: rows of ``schema.CONTINUATIONS`` that ``left`` left.
        left: release.
        host: release.
        roles: role of each domain.

    Returns:
        Rows of the same schema with other registers and memory. One whose registers were not recorded stays as it is: what
        ``host`` would leave of it is not known either. One that the host finishes, or does not resume, leaves nothing here.
    """
    parts = []
    for (number, caller, domid), rows in frame.group_by("op", "caller", "domid", maintain_order=True):
        if number is None or caller is None:
            continue
        role = roles.get(cast("int | None", domid), roles.get(None))
        parts.append(_driven(rows, int(str(number)), str(caller), role, left, host))
    if not parts:
        return frame.clear()
    return pl.concat(parts).with_columns(pl.lit("inferred").cast(frame.schema["evidence"]).alias("evidence")).sort(
        "seq", maintain_order=True
    )  # fmt: skip


def _driven(rows: pl.DataFrame, number: int, caller: str, role: str | None, left: str, host: str) -> pl.DataFrame:
    states = States.from_frame(rows)
    side = judging.read_source(left, caller, number, states, States.from_frame(rows, prefix="issued_"))
    judged = judging.judge_at(side, host, expose(role, None, caller).issuer)
    blind = rows.filter(pl.Series(np.isin(side.decoded.status, OPEN)))
    good = np.flatnonzero((judged.outcome == judging.RESUMES) & (side.decoded.status == hv.MODELLED))
    if not len(good):
        return blind
    going = states.take(good)
    if number == MULTICALL:
        # The entry that it stood in is done by then; what the next one holds is not known.
        going = States(going.args, {k: v for k, v in going.memory.items() if not k.startswith("entry")}, going.cut)
    keep, again = drive(Hypervisor(host, caller), number, going)
    if not len(keep):
        return blind
    out = rows[good[keep]].with_columns(
        *(nullable(name, column.value, column.known) for name, column in zip(ARGS, again.args, strict=True)),
        _memory(again).alias("memory"),
    )
    return pl.concat([blind, out.cast(rows.schema)])


def _memory(states: States) -> pl.Series:
    """Return the fields of guest memory as a column of (field, value) lists."""
    n = len(states)
    if not states.memory:
        return pl.Series([None] * n, dtype=MEMORY)
    long = pl.concat(
        pl.DataFrame(
            {
                "row": np.flatnonzero(column.known).astype(np.uint32),
                "field": pl.Series([name], dtype=pl.String).new_from_index(0, int(column.known.sum())),
                "value": column.value[column.known],
            }
        )
        for name, column in states.memory.items()
    )
    lists = long.group_by("row", maintain_order=True).agg(pl.struct("field", "value").alias("memory"))
    index = pl.DataFrame({"row": pl.int_range(n, eager=True, dtype=pl.UInt32)})
    return index.join(lists, on="row", how="left", maintain_order="left").get_column("memory").cast(MEMORY)
