"""Pages and page tables against slow twins that read the same bytes one by one."""

from __future__ import annotations

import io
import random
import struct

import build
import pytest

from xtrace.image.base import Damaged, File
from xtrace.image.behind import finished_entries
from xtrace.image.libxc import Libxc
from xtrace.image.memory import Memory
from xtrace.image.opening import _open
from xtrace.image.registers import context_size


def slow_pages(data: bytes) -> dict[int, int]:
    """Walk a libxc stream word by word: frame -> offset of the contents that count."""
    out: dict[int, int] = {}
    at = 40
    while True:
        kind, length = struct.unpack_from("<II", data, at)
        at += 8
        if kind == 0:
            return out
        if kind == 1:
            (count,) = struct.unpack_from("<I", data, at)
            where = at + 8 + 8 * count
            for k in range(count):
                (word,) = struct.unpack_from("<Q", data, at + 8 + 8 * k)
                pfn, type_ = word & (1 << 52) - 1, word >> 60
                if type_ in (13, 14, 15):
                    out.pop(pfn, None)
                else:
                    out[pfn] = where
                    where += 4096
        at += length + 7 & ~7


@pytest.mark.parametrize("fold", [1, 7, 1 << 20])
def test_the_last_contents_of_a_page_count(fold: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("xtrace.image.pages._FOLD", fold)
    rng = random.Random(fold)
    data = b"\xff" * 8 + b"XENF" + struct.pack(">IHHI", 3, 0, 0, 0) + struct.pack("<IHHII", 2, 12, 0, 4, 17)
    for _ in range(30):
        pfns = rng.sample(range(40), rng.randrange(1, 12))
        types = [rng.choice((0, 0, 0, 13, 14, 15, 4, 9)) for _ in pfns]
        body = struct.pack("<II", len(pfns), 0) + b"".join(struct.pack("<Q", p | t << 60) for p, t in zip(pfns, types, strict=True))
        for t in types:
            if t < 13:
                body += struct.pack("<Q", rng.getrandbits(64)) * 512
        data += build.record(1, body)
    data += build.record(0)
    libxc = Libxc(File(io.BytesIO(data), len(data)), 0)
    assert libxc.run()
    pages = libxc.index.pages(libxc.file)
    want = slow_pages(data)
    assert dict(zip(pages.pfns.tolist(), pages.offsets.tolist(), strict=True)) == want
    for pfn in range(41):
        assert pages.page(pfn) == (data[want[pfn] : want[pfn] + 4096] if pfn in want else None)


@pytest.mark.parametrize(
    ("kind", "paging"), [("pv64", 4), ("pv32", "pae"), ("hvm64", 4), ("hvm64", 5), ("hvm32", "pae"), ("hvm32", 2)]
)
def test_every_mapped_page_and_no_other(kind: str, paging: int | str) -> None:
    rng = random.Random(str((kind, paging)))
    guest = build.Guest(kind, paging)
    bits = {4: 47, 5: 56}.get(paging, 32)  # type: ignore[call-overload]
    mapped = {}
    for k in range(40):
        vpn = rng.getrandbits(bits - 12)
        mapped[vpn] = bytes(rng.getrandbits(8) for _ in range(64)) * 64
        guest.write(vpn << 12, mapped[vpn], 0x10000 + k)
    # Two neighbours, to be read across.
    guest.write(0x5000, b"a" * 4096, 0x20001)
    guest.write(0x6000, b"b" * 4096, 0x20000)
    guest.vcpu(0, rip=0x5000)
    for data in (build.libxc(guest), build.core(guest)):
        image = _open(File(io.BytesIO(data), len(data)), data[:4096])
        space, memory = image.vcpus[0].space, image.memory
        if kind == "hvm64" and data.startswith(b"\x7fELF"):
            continue  # a core does not say whether small addresses are in long mode; test_built has the case
        for vpn, page in mapped.items():
            assert memory.read(vpn << 12, 4096, space) == page
            assert memory.read(vpn << 12 | 0xFFF, 1, space) == page[-1:]
        assert memory.read(0x5FFE, 4, space) == b"aabb"
        assert memory.read(0x6FFE, 4, space) is None
        for _ in range(200):
            vpn = rng.getrandbits(bits - 12)
            if vpn not in mapped and vpn not in (5, 6):
                assert memory.translate(vpn << 12, space) is None
        assert memory.translate(1 << 63, space) is None
        assert memory.translate(-8, space) is None or paging in (2, "pae")


def slow_entries(memory: Memory, vcpu: object, address: int, size: int) -> int:
    n = 0
    while True:
        raw = memory.read(address - size * (n + 1), size, vcpu.space)  # type: ignore[attr-defined]
        if raw is None or not 0 < int.from_bytes(raw[: size // 8], "little") < 64:
            return n
        n += 1


@pytest.mark.parametrize(("kind", "paging", "size"), [("hvm64", 4, 64), ("hvm32", 0, 32)])
def test_entries_are_counted_back_over_pages(kind: str, paging: int | str, size: int) -> None:
    rng = random.Random(size)
    for trial in range(20):
        first = 0x20000 + rng.randrange(0, 200) * (8 if trial % 2 else 64)
        count = rng.randrange(0, 300)
        word = "<8Q" if size == 64 else "<8I"
        area = bytearray(0x8000)
        for k in range(count):
            struct.pack_into(word, area, first - 0x20000 + k * size, rng.randrange(1, 40), rng.choice((0, 0, 1)), 0, 0, 0, 0, 0, 0)
        guest = build.Guest(kind, paging)
        for page in range(8):
            guest.write(0x20000 + page * 4096, bytes(area[page * 4096 : page * 4096 + 4096]), 0x20 + page)
        guest.vcpu(0, rip=0x20000)
        data = build.libxc(guest)
        image = _open(File(io.BytesIO(data), len(data)), data[:4096])
        end = first + count * size
        got, shown = finished_entries(image.memory, image.vcpus[0], end)
        assert got == slow_entries(image.memory, image.vcpus[0], end, size) == count
        results = [struct.unpack_from(word, area, first - 0x20000 + k * size)[:2] for k in range(count)]
        assert shown is any(r and r != op for op, r in results)


def test_layouts_hold_what_the_headers_say() -> None:
    assert (context_size("pv64"), context_size("pv32")) == (5168, 2800)


def test_reads_stop_at_the_end_of_the_file() -> None:
    file = File(io.BytesIO(b"abc"), 3)
    with pytest.raises(Damaged) as caught:
        file.read(1, 1 << 62, "something")
    assert caught.value.damage.offset == 3
