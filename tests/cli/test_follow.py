"""``xtrace analyze --follow``: real files that grow, real pipes, real signals."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

HEAD = "xtrace: header release=3.3.0\nxtrace: domain id=1 caller=pv64 role=guest\n"
FIRST = "xtrace: call tsc=1 pcpu=0 dom=1 vcpu=0 op=12 a0=0x1 a1=0x1000\n"
AGAIN = "xtrace: call tsc=2 pcpu=0 dom=1 vcpu=0 op=12 a0=0x51 a1=0x1000\n"
EXIT_BREAK = 8 | 4  # and the surface asks for a review


def started(*args: str, **kw: object) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-m", "xtrace", "analyze", "--follow", "--to", "3.4.0", *args],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, **kw,  # type: ignore[call-overload]
    )  # fmt: skip


def test_findings_appear_before_the_trace_ends(tmp_path: Path) -> None:
    path = tmp_path / "growing.log"
    path.write_text(HEAD + FIRST)
    run = started(str(path), "--format", "jsonl")
    assert run.stdout is not None
    with path.open("a") as out:
        out.write(AGAIN[:20])  # half a line is waited for, not judged
        out.flush()
        time.sleep(0.6)
        out.write(AGAIN[20:])
        out.flush()
        found = json.loads(run.stdout.readline())
        assert (found["type"], found["code"], found["line"]) == ("finding", "XT001", 4)
        assert run.poll() is None  # it still follows
        out.write(FIRST.replace("tsc=1", "tsc=3"))
    time.sleep(0.6)
    run.send_signal(signal.SIGINT)
    rest, err = run.communicate(timeout=30)
    rows = [json.loads(line) for line in rest.splitlines()]
    assert [r["type"] for r in rows] == ["input", "surface", "summary"]
    assert rows[0]["hypercalls"] == 3
    assert rows[-1]["summary"]["exit_status"] == run.returncode == EXIT_BREAK
    assert "read as xtrace-log" in err


def test_a_pipe_is_judged_as_it_comes(tmp_path: Path) -> None:
    run = started("-", stdin=subprocess.PIPE)
    assert run.stdin is not None
    assert run.stdout is not None
    run.stdin.write(HEAD + FIRST + AGAIN)
    run.stdin.flush()
    assert run.stdout.readline().startswith("XT001 at 3.4.0, proved, line 4:")
    rest, _ = run.communicate("", timeout=30)  # the pipe ends, and so does it
    assert rest.startswith("From 3.3.0: breaks at 3.4.0")
    assert run.returncode == EXIT_BREAK


def test_a_named_pipe(tmp_path: Path) -> None:
    path = tmp_path / "fifo"
    os.mkfifo(path)
    run = started(str(path))
    path.write_text(HEAD + FIRST + AGAIN)
    out, _ = run.communicate(timeout=30)
    assert run.returncode == EXIT_BREAK
    assert out.startswith("XT001")


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
def test_what_cannot_be_followed(tmp_path: Path, args: tuple[str, ...], content: bytes, status: int, says: str) -> None:
    path = tmp_path / "t"
    path.write_bytes(content)
    run = started(str(path), "--idle", "0.3", *args)
    _, err = run.communicate(timeout=30)
    assert run.returncode == status
    assert says in err
    assert len(err.strip().splitlines()) == 1


def test_idle_goes_with_follow(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "xtrace", "analyze", "--idle", "1", "x"], capture_output=True, text=True, check=False
    )
    assert (done.returncode, "--idle goes with --follow" in done.stderr) == (3, True)
