"""Cut and damaged images: one clear sentence, what was read before still stands, no traceback, no waiting."""

from __future__ import annotations

import random
import struct
import time
from pathlib import Path

import build
import pytest

from xtrace.errors import XtraceError
from xtrace.image.opening import open_image
from xtrace.ingest.source import Source
from xtrace.inspection import inspect
from xtrace.pipeline import Options


def images() -> dict[str, bytes]:
    pv = build.caught("pv64", 4, args=(25 << 6 | 1, -1), data=build.reservation(8, 64))
    pv.vcpu(1, rip=build.CODE[4] + 2)
    hvm = build.caught("hvm64", 4, args=(25 << 6 | 1, -1), data=build.reservation(8, 64))
    pv32 = build.caught("pv32", "pae", args=(25 << 6 | 1, -1), data=build.reservation(4, 64))
    return {
        "xl": build.save(pv),
        "hvm": build.libxc(hvm),
        "pv32": build.libxc(pv32),
        "core": build.core(pv),
        "hvmcore": build.core(hvm),
    }


IMAGES = images()


def opened(path: Path, data: bytes) -> tuple[int, int]:
    """Return how many vCPUs and problems there are, or (0, 1) for an error with a place."""
    path.write_bytes(data)
    try:
        found = inspect(path, Options(targets=("4.22.0",)))
    except XtraceError as exc:
        assert exc.exit_bits == 16, exc
        assert "byte" in str(exc)
        assert "\n" not in str(exc)
        return 0, 1
    return len(found.vcpus), len(found.image.damage)


@pytest.mark.parametrize("name", IMAGES)
def test_cut_anywhere(name: str, tmp_path: Path) -> None:
    whole = IMAGES[name]
    vcpus, problems = opened(tmp_path / "image", whole)
    assert problems == 0
    cuts = {*range(1, 200, 7), *range(200, len(whole), len(whole) // 50), *range(len(whole) - 120, len(whole), 5)}
    seen = set()
    for n in sorted(cuts):
        got, wrong = opened(tmp_path / "image", whole[:n])
        assert wrong > 0, n
        assert got <= vcpus
        seen.add(got)
    assert seen & {0} and max(seen) > 0  # noqa: PT018


@pytest.mark.parametrize("name", IMAGES)
def test_flipped_bits(name: str, tmp_path: Path) -> None:
    whole = IMAGES[name]
    rng = random.Random(name)
    # The headers and contexts are what can go wrong; most of the pages are zero.
    places = [*range(0, 600), *range(len(whole) - 14000, len(whole))]
    start = time.perf_counter()
    for _ in range(70):
        data = bytearray(whole)
        for _ in range(rng.choice((1, 1, 2, 8))):
            data[rng.choice(places) if rng.random() < 0.7 else rng.randrange(len(whole))] ^= 1 << rng.randrange(8)
        opened(tmp_path / "image", bytes(data))
    assert time.perf_counter() - start < 60


def test_page_tables_that_point_anywhere(tmp_path: Path) -> None:
    rng = random.Random(5)
    for kind, paging in (("hvm64", 4), ("hvm64", 5), ("hvm32", "pae"), ("hvm32", 2), ("pv64", 4)):
        for _ in range(15):
            guest = build.caught(kind, paging, args=(25 << 6 | 1, -1))
            for pfn in guest.types:
                for k in range(0, 4096, 8):
                    if rng.random() < 0.5:
                        struct.pack_into(
                            "<Q", guest.pages[pfn], k, rng.getrandbits(64) if rng.random() < 0.3 else guest.root << 12 | 7
                        )
            opened(tmp_path / "image", build.libxc(guest))


def test_every_number_and_mode(tmp_path: Path) -> None:
    """Registers that ask for anything."""
    rng = random.Random(6)
    for kind, paging in (("pv64", 4), ("pv32", "pae"), ("hvm64", 4), ("hvm32", 0)):
        guest = build.caught(kind, paging, data=bytes(rng.getrandbits(8) for _ in range(3000)))
        first = guest.vcpus.pop()
        names = build.ARG_NAMES[guest.word]
        for op in range(66):
            args = {n: rng.choice((0, 1, build.DATA[paging], build.DATA[paging] + 64, (1 << 8 * guest.word) - 1)) for n in names}
            guest.vcpu(**{**first, "number": op, "rax": op, **args, "user": False})
        assert opened(tmp_path / "image", build.libxc(guest)) == (66, 0)


def claims() -> dict[str, bytes]:
    head = b"\xff" * 8 + b"XENF" + struct.pack(">IHHI", 3, 0, 0, 0) + struct.pack("<IHHII", 2, 12, 0, 4, 17)
    huge = 0xFFFFFFF8
    elf = bytearray(IMAGES["core"])
    struct.pack_into("<Q", elf, 64 + 5 * 64 + 32, 1 << 62)  # size of .xen_p2m
    names = bytearray(IMAGES["core"])
    struct.pack_into("<Q", names, 64 + 64 + 32, 1 << 62)  # size of .shstrtab
    return {
        "record": head + struct.pack("<II", 0x80000001, huge),
        "pages": head + struct.pack("<IIII", 1, huge, 0xFFFFFFFF, 0),
        "context": head + struct.pack("<II", 9, huge) + struct.pack("<HHI", 2, 0, huge),
        "list": head + struct.pack("<IIII", 1, 16 + 4096, 1 << 20, 0) + bytes(4096),
        "no page": head + struct.pack("<IIII", 1, 8, 0, 0),
        "type": head + struct.pack("<IIIIQ", 1, 16, 1, 0, 5 << 60),
        "unknown": head + struct.pack("<II", 0x77, 0),
        "xl": b"Xen saved domain, xl format\n \0 \r" + struct.pack("<IIII", 0x01020304, 3, 0, 0xFFFFFFFF),
        "p2m": bytes(elf),
        "names": bytes(names),
    }


@pytest.mark.parametrize("name", claims())
def test_what_is_claimed_is_not_allocated(name: str, tmp_path: Path) -> None:
    import tracemalloc

    (tmp_path / "image").write_bytes(claims()[name])
    tracemalloc.start()
    try:
        opened(tmp_path / "image", claims()[name])
        assert tracemalloc.get_traced_memory()[1] < 32 << 20
    finally:
        tracemalloc.stop()


def test_records_without_end(tmp_path: Path) -> None:
    head = b"\xff" * 8 + b"XENF" + struct.pack(">IHHI", 3, 0, 0, 0) + struct.pack("<IHHII", 2, 12, 0, 4, 17)
    start = time.perf_counter()
    assert opened(tmp_path / "image", head + struct.pack("<II", 0x80000001, 0) * 1_000_000) == (0, 1)
    assert opened(tmp_path / "image", head + build.record(9, bytes(16) + struct.pack("<HHI", 7, 0, 0) * 1_000_000)) == (0, 1)
    assert time.perf_counter() - start < 20


LEGACY = {
    "xl of 4.5": b"Xen saved domain, xl format\n \0 \r" + struct.pack("<IIII", 0x01020304, 0, 0, 0),
    "xm": b"LinuxGuestRecord" + struct.pack("<I", 100),
    "libxc of 4.5": struct.pack("<QQI4s", 0x8000, 0xFFFFFFFFFFFFFFFF, 100, b"vcpu") + bytes(100),
}


@pytest.mark.parametrize("name", LEGACY)
def test_legacy_is_named(name: str, tmp_path: Path) -> None:
    (tmp_path / "image").write_bytes(LEGACY[name])
    with Source(tmp_path / "image") as source, pytest.raises(XtraceError, match="legacy format") as caught:
        open_image(source)
    assert caught.value.exit_bits == 16


@pytest.mark.parametrize(
    ("data", "text"),
    [
        (b"nothing of the sort", "not a saved guest"),
        (b"\x7fELF\x02\x01\x01" + bytes(100), "no core"),
        (b"\xff" * 8 + b"XENF" + struct.pack(">IHHI", 4, 0, 0, 0), "version 4"),
        (b"\xff" * 8 + b"XENF" + struct.pack(">IHHI", 3, 1, 0, 0), "big-endian"),
        (b"LibxlFmt" + struct.pack(">II", 7, 0), "version 7"),
    ],
)
def test_what_is_refused(data: bytes, text: str, tmp_path: Path) -> None:
    (tmp_path / "image").write_bytes(data)
    with Source(tmp_path / "image") as source, pytest.raises(XtraceError, match=text):
        open_image(source)
