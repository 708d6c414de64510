"""Cut a piece out of an xentrace binary by time: ``python tools/cut_xentrace.py IN OUT --from TSC --to TSC``.

Records between the two time stamps are kept as they are, on every pCPU; a record without a time stamp goes with the one before
it. Each window header is written with the bytes that are left of its window; windows that are empty then are left out. A
piece needs a scheduling record of each pCPU before the first call that matters, or nothing says which vCPU made it.
"""

from __future__ import annotations

import argparse
import struct
from pathlib import Path

from xtrace.ingest.source import Source

_WINDOW = 0x1F003


def cut(data: bytes, low: int, high: int) -> bytes:
    """Return the windows of ``data`` with the records from ``low`` to ``high`` only."""
    out: list[bytes] = []
    kept = bytearray()
    pcpu: int | None = None
    now: dict[int | None, int] = {}

    def close() -> None:
        if kept:
            out.append(struct.pack("<III", 0x20000000 | _WINDOW, pcpu or 0, len(kept)) + kept)
            kept.clear()

    at = 0
    while at + 4 <= len(data):
        (head,) = struct.unpack_from("<I", data, at)
        size = 4 + 8 * (head >> 31) + 4 * (head >> 28 & 7)
        if head & 0xFFFFFFF == _WINDOW:
            close()
            (pcpu,) = struct.unpack_from("<I", data, at + 4)
        else:
            if head >> 31:
                (now[pcpu],) = struct.unpack_from("<Q", data, at + 4)
            if low <= now.get(pcpu, 0) <= high:
                kept += data[at : at + size]
        at += size
    close()
    return b"".join(out)


def main() -> None:
    """Read IN, write OUT."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("source", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("--from", dest="low", type=int, default=0)
    parser.add_argument("--to", dest="high", type=int, default=(1 << 64) - 1)
    given = parser.parse_args()
    with Source(given.source) as source:
        given.out.write_bytes(cut(source.file.read(), given.low, given.high))


if __name__ == "__main__":
    main()
