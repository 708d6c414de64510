"""Traces that grow while they are analysed: findings are told before the end, and the end is that of the whole."""

from __future__ import annotations

import struct
import threading
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

import polars as pl
import pytest

from tests.ingest.console_twin import wide_dump
from xtrace.errors import InputError, UsageError
from xtrace.ingest.source import Source
from xtrace.pipeline import Options, Result, analyze, follow

if TYPE_CHECKING:
    from collections.abc import Iterator

SAMPLES = Path(__file__).parents[1] / "samples"
#: Seconds after which nothing is waited for any more; far above what is needed on a busy machine.
LONG = 60.0
INSN = 0xFFFFFFFF8100118A
REGISTERS = {
    "rip": INSN, "rflags": 0x246, "rax": 12, "rcx": INSN + 2, "rdx": 0, "rsi": 0x1000, "rdi": 5 << 6 | 1, "r11": 0x246,
    **dict.fromkeys(("rbx", "rbp", "rsp", "r8", "r9", "r10", "r12", "r13", "r14", "r15"), 0),
}  # fmt: skip


class Growing:
    """A file that is followed in the background; used as a context, it is always stopped."""

    def __init__(self, path: Path, first: bytes, options: Options, idle: float | None = None) -> None:
        self.path, self.options, self.idle = path, options, idle
        path.write_bytes(first)
        self.rows: list[pl.DataFrame] = []
        self.result: Result | None = None
        self.error: Exception | None = None
        self._told, self._begun, self._stop = threading.Event(), threading.Event(), threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True)

    def _run(self) -> None:
        try:
            self.result = follow(self.path, self.options, found=self._found, stopped=self._stop.is_set, idle=self.idle)
        except Exception as exc:  # noqa: BLE001 (told to the test)
            self.error = exc
        self._begun.set()
        self._told.set()

    def _found(self, rows: pl.DataFrame) -> None:
        self._begun.set()
        if len(rows):
            self.rows.append(rows)
            self._told.set()

    def __enter__(self) -> Growing:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join(LONG)

    def told(self) -> pl.DataFrame:
        """Return what was told by now, once something was."""
        assert self._told.wait(LONG), "nothing was told"
        assert self.error is None
        assert self._thread.is_alive(), "it ended"
        return pl.concat(self.rows)

    def begun(self) -> None:
        """Wait until something was read."""
        assert self._begun.wait(LONG)
        assert self._thread.is_alive(), "it ended"

    def write(self, data: bytes) -> None:
        with self.path.open("ab") as out:
            out.write(data)

    def end(self, *, stop: bool = True) -> Result:
        if stop:
            self._stop.set()
        self._thread.join(LONG)
        assert not self._thread.is_alive(), "it does not end"
        if self.error is not None:
            raise self.error
        assert self.result is not None
        return self.result


def sample(name: str) -> bytes:
    with Source(SAMPLES / name) as source:
        return source.file.read()


def ends(data: bytes) -> Iterator[int]:
    """Yield where each window of an xentrace binary ends."""
    at = 0
    while at + 12 <= len(data):
        at += 12 + struct.unpack_from("<I", data, at + 8)[0]
        yield at


def same(result: Result, path: Path, options: Options) -> None:
    """Check that a result is that of the whole file."""
    whole = analyze([path], options)
    assert result.findings.equals(whole.findings)
    assert asdict(result.inputs[0].ledger) == asdict(whole.inputs[0].ledger)
    assert asdict(result.inputs[0].observed) == asdict(whole.inputs[0].observed)
    assert (result.surface, result.sources, result.bits) == (whole.surface, whole.sources, whole.bits)
    assert (result.calls, result.proved, result.inferred) == (whole.calls, whole.proved, whole.inferred)


LOG = b"""xtrace: header release=3.3.0
xtrace: domain id=1 caller=pv64 role=guest
xtrace: call tsc=1 pcpu=0 dom=1 vcpu=0 op=12 a0=0x1 a1=0x1000
xtrace: call tsc=2 pcpu=0 dom=1 vcpu=0 op=12 a0=0x51 a1=0x1000
"""
XENALYZE = b"""  0.036267544 x d0v0 hypercall  1 (mmu_update) 4096 updates
]  0.036267550 x d0v0 hypercall  1 (mmu_update) 4096 updates
]  0.036617297 x d0v0 hypercall  1 (mmu_update) 4095 updates (preempted)
"""
FTRACE = b"""# tracer: nop
#
          hcload-134     [000] d.h..  65636049760: up: (__xen_pv_evtchn_do_upcall+0x0/0x30) ip=0xffffffff81a39073 """ + (
    b"ax=0xc di=0xfa06 si=0x7fa98063b000 dx=0x0 r10=0x0 r8=0x0 r9=0x0 sp=0xffffc90040453dc0\n"
)
CONSOLE = b"(XEN) Xen version 4.17.0 (x@y) (gcc) debug=n\n" + wide_dump(REGISTERS, context="pv guest (d1v0)").encode()


@pytest.mark.parametrize(
    ("text", "release", "more"),
    [
        (LOG, None, b"xtrace: call tsc=3 pcpu=0 dom=1 vcpu=0 op=12 a0=0x91 a1=0x1000\n"),
        (b"] " + XENALYZE, "4.22.0", b"]  0.037283070 x d0v0 hypercall  1 (mmu_update) 2227 updates (preempted)\n"),
        (FTRACE, "4.17.0", FTRACE.splitlines(keepends=True)[-1].replace(b"di=0xfa06", b"di=0x2c5c6")),
        (CONSOLE, None, b"(XEN) [VT-D] a line\n" * 100 + wide_dump(REGISTERS, context="pv guest (d2v1)").encode()),
    ],
    ids=["xtrace-log", "xenalyze", "ftrace", "console"],
)
def test_text_is_told_as_it_comes(tmp_path: Path, text: bytes, release: str | None, more: bytes) -> None:
    path, options = tmp_path / "growing", Options(source=release, targets=("4.22.0",), callers={None: "pv64"})
    with Growing(path, text[:-7], options) as run:
        run.write(text[-7:])  # a line that was not whole
        assert len(run.told()) == 1
        run.write(more)
        same(run.end(), path, options)


@pytest.mark.parametrize("name", ["eras/pv64-3.3.0.xentrace", "dom0-4.17.7/j5_tiny_pv.xentrace"])
def test_a_binary_is_told_as_it_comes(tmp_path: Path, name: str) -> None:
    """Everything that two rounds of windows settle is told while the third one is being written, in the middle of a window."""
    data = sample(name)
    cuts = list(ends(data))
    cut = cuts[len(cuts) // 2] + 100
    path, options = tmp_path / "growing", Options(source="3.3.0", targets=("3.4.0",), callers={None: "pv64"})
    with Growing(path, data[:cut], options) as run:
        told = run.told()
        assert 0 < len(told) < len(analyze([_written(tmp_path / "all", data)], options).findings)
        for low, high in zip([cut, *cuts[len(cuts) // 2 + 1 :]], [*cuts[len(cuts) // 2 + 1 :], len(data)], strict=True):
            run.write(data[low:high])
        result = run.end()
        assert not result.revised
        assert pl.concat(run.rows).equals(result.findings)
        same(result, path, options)


def _written(path: Path, data: bytes) -> Path:
    path.write_bytes(data)
    return path


def test_a_binary_that_ends_inside_a_window(tmp_path: Path) -> None:
    data = sample("dom0-4.17.7/j5_tiny_pv.xentrace")[:70001]
    path, options = tmp_path / "growing", Options(source="4.17.0", targets=("4.22.0",), callers={None: "pv64"})
    with Growing(path, data[:40000], options) as run:
        run.told()
        run.write(data[40000:])
        result = run.end()
    assert result.inputs[0].ledger.truncated
    assert not result.revised
    same(result, path, options)


def test_what_is_damaged_is_read_again(tmp_path: Path) -> None:
    data = bytearray(sample("dom0-4.17.7/j5_tiny_pv.xentrace"))
    at = list(ends(bytes(data)))[3]
    data[at + 3] ^= 0xFF
    path, options = tmp_path / "growing", Options(source="4.17.0", targets=("4.22.0",), callers={None: "pv64"})
    with Growing(path, bytes(data[:40000]), options) as run:
        run.told()
        run.write(bytes(data[40000:]))
        result = run.end()
    assert result.revised
    assert any("read again" in note for note in result.notes)
    assert result.inputs[0].ledger.skipped_bytes
    same(result, path, options)


def test_the_release_is_asked_again_at_the_end(tmp_path: Path) -> None:
    """The first window of a binary leaves more releases possible than all of it."""
    data = sample("eras/pv32-4.1.6.1.xentrace")
    path, options = tmp_path / "growing", Options(targets=("4.22.0",))
    with Growing(path, data[: next(ends(data))], options, idle=3.0) as run:
        run.begun()
        run.write(data[next(ends(data)) :])
        result = run.end(stop=False)
        assert result.revised
        same(result, path, options)


def test_roles_that_are_told_late_count(tmp_path: Path) -> None:
    path, options = tmp_path / "growing", Options(targets=("3.4.0",))
    with Growing(path, LOG, options) as run:
        run.told()
        run.write(b"xtrace: domain id=1 caller=pv64 role=control\n")
        result = run.end()
    assert result.revised
    same(result, path, options)


@pytest.mark.parametrize(
    ("name", "says"),
    [
        ("bare/bare-4.4.4.txt.zst", "read as bare, which needs the whole input"),
        ("dom0-4.17.7/j5_tiny_pv.xentrace_format.txt.zst", "read as xentrace-format, which needs the whole input"),
    ],
)
def test_what_needs_the_whole_input(tmp_path: Path, name: str, says: str) -> None:
    path = _written(tmp_path / "t", sample(name))
    with pytest.raises(UsageError, match=says):
        follow(path, found=lambda _: None, idle=0.1)


def test_what_is_no_trace(tmp_path: Path) -> None:
    path = _written(tmp_path / "t", b"nothing of the kind\n")
    with pytest.raises(InputError, match="is not a trace"):
        follow(path, found=lambda _: None, idle=0.1)


def test_recognised_by_what_comes_later(tmp_path: Path) -> None:
    path, options = tmp_path / "growing", Options(targets=("3.4.0",))
    with Growing(path, LOG[:5], options) as run:
        run.write(LOG[5:])
        assert run.told()["code"].to_list() == ["XT001"]
        same(run.end(), path, options)
