"""Several inputs that make up one recording (one file a pCPU, or pieces of one that was rotated), put in order of time."""

from __future__ import annotations

from dataclasses import fields, replace
from typing import TYPE_CHECKING, Final

import polars as pl

from xtrace import schema
from xtrace.errors import InputError
from xtrace.ingest.base import Ledger, Observed

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from xtrace.ingest.base import Recording

__all__ = ("Together",)

_KEY: Final = "_key"


class Together:
    """Recordings read at once, their events merged by time (see ``xtrace.ingest.base.Recording``).

    Events of one input keep their order. Time is the TSC where every input has it, else ``time_ns``; an event without
    either stands with the one before it. ``input`` says which recording an event came from; ``offset`` and ``line`` count in
    that one. Of each input no more than one batch waits.

    Args:
        recordings: opened inputs.
        paths: their names, for errors.

    Raises:
        InputError: while reading, where an input has no time at all.
    """

    def __init__(self, recordings: Sequence[Recording], paths: Sequence[str]) -> None:
        self.format = "+".join(dict.fromkeys(r.format for r in recordings))
        self.recordings, self.paths = recordings, paths
        self.ledger, self.observed = Ledger(), Observed()

    def batches(self) -> Iterator[pl.DataFrame]:
        """Yield frames of ``schema.EVENTS`` in order of time over all inputs."""
        feeds = [r.batches() for r in self.recordings]
        first = [next((b for b in feed if len(b)), None) for feed in feeds]
        clock = self._clock(first)
        last = [0] * len(feeds)
        held = [None if b is None else self._keyed(b, i, clock, last) for i, b in enumerate(first)]
        seq = 0
        while any(h is not None for h in held):
            # Nothing more can come from before the least of the last events that the inputs have shown. Equal times go by
            # input: the first input that stands there gives all it has, later ones keep theirs until it has gone on.
            ends = [(int(h[_KEY][-1]), i) for i, h in enumerate(held) if h is not None]
            safe, turn = min(ends)
            ripe: list[pl.DataFrame] = []
            for i, h in enumerate(held):
                if h is None:
                    continue
                n = int((h[_KEY] <= safe).sum() if i <= turn else (h[_KEY] < safe).sum())
                ripe.append(h[:n])
                held[i] = h[n:] if n < len(h) else self._next(feeds[i], i, clock, last)
            batch = pl.concat(ripe).sort(_KEY, maintain_order=True).drop(_KEY)
            batch = batch.with_columns(seq=pl.int_range(seq, seq + pl.len(), dtype=pl.UInt64))
            seq += len(batch)
            if len(batch):
                yield batch.select(schema.EVENTS.names())
        self._account()

    def _next(self, feed: Iterator[pl.DataFrame], index: int, clock: str, last: list[int]) -> pl.DataFrame | None:
        batch = next((b for b in feed if len(b)), None)
        return None if batch is None else self._keyed(batch, index, clock, last)

    def _clock(self, first: Sequence[pl.DataFrame | None]) -> str:
        some = [h for h in first if h is not None]
        for name in ("tsc", "time_ns"):
            if all(h[name].null_count() < len(h) for h in some):
                return name
        bare = next(i for i, h in enumerate(first) if h is not None and h["tsc"].null_count() == len(h))
        raise InputError(
            self.paths[bare], "has no time stamps that the other inputs share; they cannot be put together", exit_bits=16
        )

    def _keyed(self, batch: pl.DataFrame, index: int, clock: str, last: list[int]) -> pl.DataFrame:
        """Add the key of order: time, never below what that input showed before."""
        key = pl.col(clock).cast(pl.UInt64, strict=False).forward_fill().fill_null(last[index])
        out = batch.with_columns(pl.max_horizontal(key, pl.lit(last[index], pl.UInt64)).cum_max().alias(_KEY))
        last[index] = int(out[_KEY][-1])
        return out.with_columns(input=pl.lit(index, pl.UInt32))

    def _account(self) -> None:
        """Sum up what the inputs lost and showed."""
        for r, path in zip(self.recordings, self.paths, strict=True):
            for f in fields(Ledger):
                mine, theirs = getattr(self.ledger, f.name), getattr(r.ledger, f.name)
                if f.name == "problems":
                    theirs = [replace(p, text=f"{path}: {p.text}") for p in theirs]
                setattr(self.ledger, f.name, (mine or theirs) if isinstance(theirs, bool) else mine + theirs)
            seen, other = self.observed, r.observed
            for name in ("release", "arch", "tsc_khz", "layout"):
                if getattr(seen, name) is None:
                    setattr(seen, name, getattr(other, name))
            for domid, d in other.domains.items():
                seen.domains.setdefault(domid, d)
            for event, n in other.event_ids.items():
                seen.event_ids[event] = seen.event_ids.get(event, 0) + n
            for form, at in other.forms.items():
                seen.forms.setdefault(form, at)
            for peak, value in other.peaks.items():
                seen.peaks[peak] = max(value, seen.peaks.get(peak, value))
            seen.pcpus = max(seen.pcpus, other.pcpus)
            firsts = [t for t in (seen.first_tsc, other.first_tsc) if t is not None]
            lasts = [t for t in (seen.last_tsc, other.last_tsc) if t is not None]
            seen.first_tsc, seen.last_tsc = min(firsts, default=None), max(lasts, default=None)
