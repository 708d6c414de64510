"""Files that are known and not read."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from xtrace.errors import InputError
from xtrace.ingest import refused, registry
from xtrace.ingest.source import Source


@pytest.mark.parametrize(
    ("head", "says"),
    [
        (b"\x17\x08\x44tracing6\0\0\x08", "trace-cmd report FILE | xtrace analyze -"),
        (b"PERFILE2h\0\0\0\0\0\0\0", "perf script -i FILE | xtrace analyze -"),
        (b"Xen saved domain, xl format\n \0 \r", "xtrace inspect FILE"),
        (b"LibxlFmt\0\0\0\2\0\0\0\0", "xtrace inspect FILE"),
        (b"\xff" * 8 + b"XENF\0\0\0\2\0\0\0\0", "xtrace inspect FILE"),
        (b"\x7fELF\2\1\1" + bytes(9) + b"\4\0\x3e\0", "xtrace inspect FILE"),
        (b"\xff" * 8 + bytes.fromhex("b429a40acb77b1f2") + b"\4", "simpletrace.py"),
        (bytes.fromhex("d4c3b2a102000400"), "pcap"),
        (bytes.fromhex("571dd175") + bytes(20), "CTF"),
    ],
)
def test_known(head: bytes, says: str, tmp_path: Path) -> None:
    assert says in (refused.why(head) or "")
    (tmp_path / "f").write_bytes(head)
    with Source(tmp_path / "f") as source, pytest.raises(InputError, match=re.escape(says)) as caught:
        registry.detect(source)
    assert caught.value.exit_bits == 16


def test_unknown() -> None:
    for head in (b"", b"\x7fELF\2\1\1" + bytes(9) + b"\2\0\x3e\0", b"hello", b"\xff" * 64):
        assert refused.why(head) is None
