"""`GrowingSource`: what it waits for and when it ends; and the one rule for readers that could work ahead."""

from __future__ import annotations

import threading
import time
from pathlib import Path

import pytest

from tests.ingest.console_twin import wide_dump
from xtrace.ingest.ahead import ahead
from xtrace.ingest.base import ReadOptions
from xtrace.ingest.console import READER as CONSOLE
from xtrace.ingest.follow import GrowingSource
from xtrace.ingest.lines import raw_blocks
from xtrace.ingest.source import Source, is_live

REGISTERS = dict.fromkeys(
    ("rax", "rbx", "rdx", "rsi", "rdi", "rbp", "rsp", "r8", "r9", "r10", "r12", "r13", "r14", "r15"), 0
) | {"rip": 0xFFFFFFFF8100118A, "rcx": 0xFFFFFFFF8100118C, "rflags": 0x246, "r11": 0x246}  # fmt: skip


def test_patience_and_idle(tmp_path: Path) -> None:
    path = tmp_path / "t"
    path.write_bytes(b"ab\n")
    with GrowingSource(path, idle=1.0) as source:
        assert is_live(source)
        assert source.wait(2) is True
        begun = time.monotonic()
        answers = []
        while (answer := source.wait(3, 0.3)) is None:  # asking again does not begin the idle time anew
            answers.append(answer)
        assert answer is False
        assert len(answers) >= 2
        assert time.monotonic() - begun < 20


def test_what_comes_after_the_stop_is_not_read(tmp_path: Path) -> None:
    path, stop = tmp_path / "t", threading.Event()
    path.write_bytes(b"one\n")
    with GrowingSource(path, stopped=stop.is_set) as source:
        stop.set()
        assert source.wait(0) is True  # what was there is
        path.write_bytes(b"one\ntwo\n")
        assert source.wait(4) is False
        assert source.file.read(100) == b"one\n"
        with source.snapshot() as now:
            assert now.size == 4
            assert not is_live(now)


def test_a_pause_is_an_empty_block(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("xtrace.ingest.follow.PATIENCE", 0.2)
    path = tmp_path / "t"
    path.write_bytes(b"one\ntw")
    with GrowingSource(path, idle=0.7) as source:
        blocks = list(raw_blocks(source.file, 100))
    assert blocks[0][0] == b"one\n"
    assert blocks[1][0] == b""
    assert blocks[-1][0] == b"tw\n"
    assert blocks[-1][4]


def test_live_blocks_are_given_at_once() -> None:
    taken = []

    def blocks():
        for i in range(9):
            taken.append(i)
            yield i

    for live in (True, False):
        taken.clear()
        first = next(ahead(blocks(), str, live=live))
        assert first == (0, "0")
        assert (len(taken) == 1) is live


def test_sources_that_do_not_grow(tmp_path: Path) -> None:
    path = tmp_path / "t"
    path.write_bytes(b"abc")
    with Source(path) as source:
        assert not is_live(source)
        assert (source.wait(2), source.wait(3)) == (True, False)


def test_a_dump_that_went_on_after_a_pause_is_provisional(tmp_path: Path) -> None:
    """A console that is quiet for a while is decided; where a record goes on behind the pause, that is said."""
    text = wide_dump(REGISTERS, context="pv guest (d1v0)").encode()
    half = text.index(b"\n", len(text) // 2) + 1

    class Paused(Source):
        live = True

    for parts, provisional in (([text], False), ([text[:half], text[half:]], True)):
        path = tmp_path / "t"
        path.write_bytes(text)
        with Paused(path) as source:
            reads = [r for part in parts for r in (part, None)] + [b""]
            source.file.close()
            source.file = Reads(reads)  # type: ignore[assignment]
            recording = CONSOLE.open(source, ReadOptions())
            told = sum(len(batch) for batch in recording.batches())
        assert recording.provisional is provisional
        if not provisional:
            assert told == 1


class Reads:
    """A file whose reads give what was laid down."""

    def __init__(self, reads: list[bytes | None]) -> None:
        self._reads = iter(reads)

    def seek(self, *_: int) -> int:
        return 0

    def read(self, _: int) -> bytes | None:
        return next(self._reads)

    def close(self) -> None:
        pass
