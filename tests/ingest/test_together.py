"""Several inputs that make up one recording."""

from __future__ import annotations

import random
import struct
from itertools import pairwise
from pathlib import Path

import polars as pl
import pytest

from xtrace import schema
from xtrace.errors import InputError
from xtrace.ingest import registry
from xtrace.ingest.base import ReadOptions
from xtrace.ingest.source import Source
from xtrace.ingest.together import Together
from xtrace.pipeline import Options, analyze

SAMPLES = Path(__file__).parent.parent.parent / "samples"


def opened(paths: list[Path], rows: int = 1 << 18) -> Together:
    recordings = []
    for path in paths:
        source = Source(path)
        recordings.append(registry.detect(source).open(source, ReadOptions(rows)))
    return Together(recordings, [str(p) for p in paths])


def read(paths: list[Path], rows: int = 1 << 18) -> pl.DataFrame:
    return pl.concat([schema.empty(schema.EVENTS), *opened(paths, rows).batches()])


@pytest.fixture(scope="module")
def by_pcpu(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[Path]]:
    """A recording with scheduling records of two pCPUs, whole and as one file for each pCPU."""
    with Source(SAMPLES / "eras" / "smp64-4.4.4.xentrace.zst") as source:
        data = source.file.read()
    parts: dict[int, bytes] = {}
    at = 0
    while at < len(data):
        magic, pcpu, size = struct.unpack_from("<III", data, at)
        assert magic == 0x2001F003
        parts[pcpu] = parts.get(pcpu, b"") + data[at : at + 12 + size]
        at += 12 + size
    folder = tmp_path_factory.mktemp("parts")
    whole = folder / "whole"
    whole.write_bytes(data)
    files = []
    for pcpu, part in sorted(parts.items()):
        files.append(folder / f"cpu{pcpu}")
        files[-1].write_bytes(part)
    assert len(files) == 2
    return whole, files


def test_one_file_a_pcpu_is_the_whole(by_pcpu: tuple[Path, list[Path]]) -> None:
    whole, parts = by_pcpu
    with Source(whole) as source:
        want = pl.concat(registry.detect(source).open(source, ReadOptions()).batches())
    got = read(parts)
    assert got["input"].to_list() == got["pcpu"].to_list()
    places = ["offset", "input"]
    assert got.drop(places).equals(want.drop(places))


@pytest.mark.parametrize("rows", [1, 7, 1000])
def test_batches_do_not_matter(tmp_path: Path, rows: int) -> None:
    """Many equal times: the order among them must not depend on what was read when."""
    rng = random.Random(7)
    parts = []
    for i in range(3):
        times = sorted(rng.choices(range(40), k=60))
        parts.append(tmp_path / f"p{i}")
        lines = [f"xtrace: call tsc={t} pcpu={i} dom={i} vcpu=0 op=12 a0={n}\n" for n, t in enumerate(times)]
        parts[-1].write_text("xtrace: header release=4.17.7\n" + "".join(lines))
    want = read(parts)
    assert len(want) == 180
    assert read(parts, rows).equals(want)
    order = list(zip(want["tsc"], want["input"], want["arg0"], strict=True))
    assert order == sorted(order)


def test_findings_name_their_file(tmp_path: Path) -> None:
    call = "xtrace: call tsc={} pcpu={} dom=1 vcpu={} caller=pv64 op=12 a0={:#x} a1=0x1000\n"
    a, b = tmp_path / "a", tmp_path / "b"
    a.write_text("xtrace: header release=3.3.0\n" + call.format(10, 0, 0, 0x1) + call.format(30, 0, 0, 0x1))
    b.write_text("xtrace: header release=3.3.0\n" + call.format(20, 1, 0, 0x51))
    result = analyze([a, b], Options(targets=["3.4.0"], one_recording=True))
    assert [i.path for i in result.inputs] == [str(a), str(b)]
    found = result.findings
    assert found["input"].unique().to_list() == [1]
    assert found["line"].unique().to_list() == [2]
    # The re-entry belongs to the call that began in the other file.
    assert result.calls == 2
    assert [i.ledger.hypercalls for i in result.inputs] == [2, 1]


def test_without_a_clock_nothing_can_be_merged(tmp_path: Path) -> None:
    a, b = tmp_path / "a", tmp_path / "b"
    a.write_text("xtrace: call tsc=5 pcpu=0 dom=1 vcpu=0 op=12\n")
    b.write_text("xtrace: call pcpu=0 dom=1 vcpu=0 op=12\n")
    with pytest.raises(InputError, match="has no time stamps") as caught:
        read([a, b])
    assert caught.value.path == str(b)


def test_pieces_of_a_rotated_trace(by_pcpu: tuple[Path, list[Path]], tmp_path: Path) -> None:
    data = by_pcpu[0].read_bytes()
    cuts, at = [0], 0
    while at < len(data):
        at += 12 + struct.unpack_from("<I", data, at + 8)[0]
        cuts.append(at)
    middle = cuts[len(cuts) // 2]
    pieces = []
    for i, (begin, end) in enumerate(pairwise([0, middle, len(data)])):
        pieces.append(tmp_path / f"piece{i}")
        pieces[-1].write_bytes(data[begin:end])
    with Source(by_pcpu[0]) as source:
        want = pl.concat(registry.detect(source).open(source, ReadOptions()).batches())
    got = read(pieces)
    assert len(got) == len(want)
    assert (got["tsc"].diff().drop_nulls() >= 0).all()
