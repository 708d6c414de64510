"""An xentrace binary read while it grows, against the same bytes read as a whole: real ones, damaged ones, any pieces."""

from __future__ import annotations

import random
import struct
from dataclasses import asdict
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING

import polars as pl
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from xtrace import schema
from xtrace.ingest.base import ReadOptions
from xtrace.ingest.source import Source
from xtrace.ingest.xentrace import READER
from xtrace.ingest.xentrace_live import GrowingXentrace

if TYPE_CHECKING:
    from collections.abc import Iterable

SAMPLES = Path(__file__).parents[2] / "samples"
ALL = sorted(p for p in SAMPLES.glob("*/*.xentrace*") if "format" not in p.name)
TINY = SAMPLES / "dom0-4.17.7" / "j5_tiny_pv.xentrace"


class Steps(Source):
    """A file that grows whenever it is waited for; None is a pause."""

    live = True

    def __init__(self, path: Path, steps: Iterable[int | None]) -> None:
        super().__init__(path)
        self.full, self._steps = self.size, iter([*steps, self.size])
        self.size = min(next(s for s in self._steps if s is not None), self.full)

    def wait(self, beyond: int, patience: float | None = None) -> bool | None:
        while self.size <= beyond:
            step = next(self._steps, False)
            if step is None or step is False:
                return step
            self.size = min(step, self.full)
        return True


@cache
def content(path: Path) -> bytes:
    with Source(path) as source:
        return source.file.read()


def windows(data: bytes) -> list[tuple[int, int, int]]:
    """Return (start, end, pCPU) of each window."""
    out, at = [], 0
    while at + 12 <= len(data):
        _, pcpu, size = struct.unpack_from("<III", data, at)
        out.append((at, at + 12 + size, pcpu))
        at += 12 + size
    return out


def joined(batches: Iterable[pl.DataFrame]) -> pl.DataFrame:
    return pl.concat([schema.empty(schema.EVENTS), *batches])


def compared(path: Path, steps: list[int | None], **how: int) -> tuple[GrowingXentrace, list[pl.DataFrame]]:
    """Read a file both ways; where nothing is provisional they must agree."""
    with Source(path) as source:
        whole = READER.open(source, ReadOptions())
        events = joined(whole.batches())
    with Steps(path, steps) as source:
        live = GrowingXentrace(source, ReadOptions(), **how)
        batches = list(live.batches())
    got = joined(batches)
    assert got.schema == schema.EVENTS
    assert len(got) == 0 or got["seq"].to_list() == list(range(len(got)))
    if not live.provisional:
        assert got.equals(events)
        assert asdict(live.ledger) == asdict(whole.ledger)
        assert asdict(live.observed) == asdict(whole.observed)
    return live, batches


@pytest.mark.parametrize("path", ALL, ids=lambda p: p.name)
def test_real_recordings(tmp_path: Path, path: Path) -> None:
    data = content(path)
    plain = tmp_path / "t"
    plain.write_bytes(data)
    rng = random.Random(path.name)
    cuts = sorted(rng.randrange(13, len(data)) for _ in range(20))
    live, batches = compared(plain, [*cuts])
    assert not live.provisional
    assert len(batches) > 2


def test_an_idle_pcpu_is_not_waited_for(tmp_path: Path) -> None:
    """pCPU 1 stops after its first window; what pCPU 0 says two rounds ago is told all the same."""
    data = content(TINY)
    some = windows(data)
    kept = [w for i, w in enumerate(some) if w[2] == 0 or i == 1]
    plain = tmp_path / "t"
    plain.write_bytes(b"".join(data[a:z] for a, z, _ in kept))
    ends = [z for _, z, _ in windows(plain.read_bytes())]
    live, batches = compared(plain, [*ends])
    assert not live.provisional
    told = joined(batches[:-1])["offset"].max()
    assert isinstance(told, int)
    assert told > ends[-4]


def test_an_unknown_pcpu_may_come(tmp_path: Path) -> None:
    """Nothing of the first round is told before a later one shows that it was complete."""
    data = content(TINY)
    plain = tmp_path / "t"
    plain.write_bytes(data)
    first = windows(data)[0][1]
    live, _ = compared(plain, [first, first + 12, *(z for _, z, _ in windows(data))])
    assert not live.provisional


def test_what_comes_late_is_provisional(tmp_path: Path) -> None:
    """After a pause all is told; a window of the same round that comes then is late."""
    data = content(TINY)
    plain = tmp_path / "t"
    plain.write_bytes(data)
    third = windows(data)[2][1]
    live, batches = compared(plain, [third, None])
    assert live.provisional
    assert len(joined(batches)) > 0


def test_two_recordings_in_one(tmp_path: Path) -> None:
    """Every TSC steps back in the middle."""
    data = content(TINY) * 2
    plain = tmp_path / "t"
    plain.write_bytes(data)
    live, batches = compared(plain, [z for _, z, _ in windows(data)])
    assert not live.provisional
    assert joined(batches)["segment"].max() == 1


@settings(max_examples=30, deadline=None)
@given(st.data())
def test_damage_and_pieces(tmp_path_factory: pytest.TempPathFactory, draw: st.DataObject) -> None:
    data = bytearray(content(draw.draw(st.sampled_from([SAMPLES / "eras" / "pv32-3.3.0.xentrace", TINY]))))
    place = st.integers(0, len(data) - 1)
    how = draw.draw(st.sampled_from(["whole", "cut", "flip", "lose", "insert"]))
    at = draw.draw(place)
    if how == "cut":
        del data[max(at, 13) :]
    elif how == "flip":
        data[at] ^= draw.draw(st.integers(1, 255))
    elif how == "lose":
        del data[max(at, 13) : at + draw.draw(st.integers(1, 5000))]
    elif how == "insert":
        data[at:at] = data[: draw.draw(st.integers(1, 5000))]
    plain = tmp_path_factory.mktemp("live") / "t"
    plain.write_bytes(data)
    steps = sorted(draw.draw(st.lists(place, max_size=12)))
    pauses = draw.draw(st.sets(st.integers(0, 12), max_size=2))
    mixed: list[int | None] = [x for i, s in enumerate(steps) for x in ((s, None) if i in pauses else (s,))]
    chunk, step = draw.draw(st.sampled_from([512, 4096, 1 << 22])), draw.draw(st.sampled_from([2000, 9000, 1 << 24]))
    live, _ = compared(plain, mixed, chunk=chunk, step=step)
    if how in ("whole", "cut") and not pauses:
        assert not live.provisional
