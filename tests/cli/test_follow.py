"""``xtrace analyze --follow``: real files that grow, real pipes, real signals."""

from __future__ import annotations

import contextlib
import json
import os
import queue
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import IO, TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

HEAD = "xtrace: header release=3.3.0\nxtrace: domain id=1 caller=pv64 role=guest\n"
FIRST = "xtrace: call tsc=1 pcpu=0 dom=1 vcpu=0 op=12 a0=0x1 a1=0x1000\n"
AGAIN = "xtrace: call tsc=2 pcpu=0 dom=1 vcpu=0 op=12 a0=0x51 a1=0x1000\n"
BINARY = Path(__file__).parents[2] / "samples" / "eras" / "pv64-3.3.0.xentrace"
EXIT_BREAK = 8 | 4  # and the surface asks for a review


#: Seconds after which nothing is waited for any more; far above what is needed on a busy machine.
LONG = 60.0


class Running:
    """``xtrace analyze --follow`` as a process, whose output is read with a limit of time."""

    def __init__(self, *args: str, pipe: bool = False) -> None:
        self.process = subprocess.Popen(
            [sys.executable, "-m", "xtrace", "analyze", "--follow", *args],
            stdin=subprocess.PIPE if pipe else subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
        )  # fmt: skip
        self._lines: queue.Queue[str] = queue.Queue()
        self._rest: dict[str, list[str]] = {"out": [], "err": []}
        self._threads = [
            threading.Thread(target=self._read, args=(stream, name), daemon=True)
            for stream, name in ((self.process.stdout, "out"), (self.process.stderr, "err"))
        ]
        for thread in self._threads:
            thread.start()

    def _read(self, stream: IO[bytes], name: str) -> None:
        for line in stream:
            self._rest[name].append(line.decode())
            if name == "out":
                self._lines.put(line.decode())

    def line(self) -> str:
        """Return the next line of output."""
        try:
            return self._lines.get(timeout=LONG)
        except queue.Empty:
            pytest.fail(f"nothing was told; on stderr: {self._rest['err']}")

    def write(self, data: bytes, *, last: bool = False) -> None:
        """Write to its standard input."""
        assert self.process.stdin is not None
        self.process.stdin.write(data)
        self.process.stdin.flush()
        if last:
            self.process.stdin.close()

    def end(self, signal_: int | None = None) -> tuple[int, str, str]:
        """Wait for its end; return exit status, all output, all errors."""
        if signal_ is not None:
            self.process.send_signal(signal_)
        status = self.process.wait(LONG)
        for thread in self._threads:
            thread.join(LONG)
        return status, "".join(self._rest["out"]), "".join(self._rest["err"])


@pytest.fixture
def start() -> Iterator[Callable[..., Running]]:
    """Start processes; whatever happens they are gone afterwards."""
    running: list[Running] = []

    def started(*args: str, **kw: bool) -> Running:
        running.append(Running(*args, **kw))
        return running[-1]

    yield started
    for one in running:
        one.process.kill()
        one.process.wait()
        for stream in (one.process.stdin, one.process.stdout, one.process.stderr):
            if stream is not None:
                with contextlib.suppress(OSError):
                    stream.close()


TO = ("--to", "3.4.0")


def test_findings_appear_before_the_trace_ends(tmp_path: Path, start: Callable[..., Running]) -> None:
    path = tmp_path / "growing.log"
    path.write_text(HEAD + FIRST)
    run = start(str(path), *TO, "--format", "jsonl")
    with path.open("a") as out:
        out.write(AGAIN[:20])  # half a line is waited for, not judged
        out.flush()
        time.sleep(0.6)
        out.write(AGAIN[20:])
        out.flush()
        found = json.loads(run.line())
        assert (found["type"], found["code"], found["line"]) == ("finding", "XT001", 4)
        assert run.process.poll() is None  # it still follows
        out.write(FIRST.replace("tsc=1", "tsc=3"))
    status, text, err = run.end(signal.SIGINT)  # what has come by then is still read
    rows = [json.loads(line) for line in text.splitlines()]
    assert [r["type"] for r in rows] == ["finding", "input", "surface", "summary"]
    assert rows[1]["hypercalls"] == 3
    assert rows[-1]["summary"]["exit_status"] == status == EXIT_BREAK
    assert "read as xtrace-log" in err


def test_a_pipe_is_judged_as_it_comes(start: Callable[..., Running]) -> None:
    run = start("-", *TO, pipe=True)
    run.write((HEAD + FIRST + AGAIN).encode())
    assert run.line().startswith("XT001 at 3.4.0, proved, line 4:")
    run.write(b"", last=True)  # the pipe ends, and so does it
    status, text, _ = run.end()
    assert text.splitlines()[1].startswith("From 3.3.0: breaks at 3.4.0")
    assert status == EXIT_BREAK


def test_what_a_recorder_writes_last_is_read(start: Callable[..., Running]) -> None:
    """Ctrl-C reaches both ends of a pipe, and the recorder writes what it still has."""
    run = start("-", *TO, "--format", "jsonl", pipe=True)
    run.write((HEAD + FIRST + AGAIN).encode())
    run.line()
    run.process.send_signal(signal.SIGINT)
    time.sleep(0.3)
    run.write(FIRST.replace("tsc=1", "tsc=3").encode(), last=True)
    _, text, _ = run.end()
    assert json.loads(text.splitlines()[1])["hypercalls"] == 3


def test_a_named_pipe(tmp_path: Path, start: Callable[..., Running]) -> None:
    path = tmp_path / "fifo"
    os.mkfifo(path)
    run = start(str(path), *TO)
    thread = threading.Thread(target=path.write_text, args=(HEAD + FIRST + AGAIN,), daemon=True)
    thread.start()
    status, text, _ = run.end()
    assert status == EXIT_BREAK
    assert text.startswith("XT001")


def test_the_binary_from_a_pipe(start: Callable[..., Running]) -> None:
    """As ``xentrace -D /dev/stdout | xtrace analyze --follow -``: windows come in pieces, and the pipe ends in one."""
    data = BINARY.read_bytes()[:-5]
    run = start("-", "--from", "3.3.0", *TO, "--caller", "pv64", "--format", "jsonl", pipe=True)
    run.write(data[:30_000])
    first = json.loads(run.line())
    assert first["type"] == "finding"
    assert first["offset"] < 30_000
    run.write(data[30_000:], last=True)
    status, text, _ = run.end()
    rows = [json.loads(line) for line in text.splitlines()]
    assert "revised" not in {r["type"] for r in rows}
    item = next(r for r in rows if r["type"] == "input")
    assert (item["format"], item["truncated"]) == ("xentrace", True)
    assert rows[-1]["summary"]["exit_status"] == status
    assert status & 16


def test_what_was_told_is_replaced_where_it_does_not_hold(tmp_path: Path, start: Callable[..., Running]) -> None:
    path = tmp_path / "growing.log"
    path.write_text(HEAD + FIRST + AGAIN)
    run = start(str(path), *TO, "--format", "jsonl")
    assert json.loads(run.line())["exposure"]["issuer"] == "guest"
    with path.open("a") as out:
        out.write("xtrace: domain id=1 caller=pv64 role=control\n")
    _, text, _ = run.end(signal.SIGINT)
    rows = [json.loads(line) for line in text.splitlines()]
    assert [r["type"] for r in rows] == ["finding", "revised", "input", "finding", "surface", "summary"]
    assert rows[3]["exposure"]["issuer"] == "control"


@pytest.mark.parametrize(
    ("args", "content", "status", "says"),
    [
        ((), b"", 16, "nothing was written to it"),
        ((), b"\x1f\x8b\x08\x00abcd", 16, "is compressed (gzip)"),
        (("--from", "nonsense"), HEAD.encode(), 3, "nonsense"),
        (("other",), HEAD.encode(), 3, "--follow takes one trace"),
        (("--input-format", "bare"), HEAD.encode(), 3, "needs the whole input"),
    ],
)
def test_what_cannot_be_followed(
    tmp_path: Path, start: Callable[..., Running], args: tuple[str, ...], content: bytes, status: int, says: str
) -> None:
    path = tmp_path / "t"
    path.write_bytes(content)
    got, _, err = start(str(path), *TO, "--idle", "0.3", *args).end()
    assert got == status
    assert says in err
    assert len(err.strip().splitlines()) == 1


def test_idle_goes_with_follow(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "xtrace", "analyze", "--idle", "1", "x"], capture_output=True, text=True, check=False
    )
    assert (done.returncode, "--idle goes with --follow" in done.stderr) == (3, True)
