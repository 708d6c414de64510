"""``xtrace identify`` on the command line."""

from __future__ import annotations

import json
import struct
from pathlib import Path

import pytest

from xtrace.cli.app import run

SAMPLES = Path(__file__).resolve().parents[2] / "samples"


def written(path: Path, *records: bytes) -> Path:
    """Write a window of records of pCPU 0."""
    body = b"".join(records)
    path.write_bytes(struct.pack("<3I", 0x2001F003, 0, len(body)) + body)
    return path


V1 = struct.pack("<6I", 0xB020F101, 1000, 0, 0x8100102A, 0xFFFFFFFF, 12)
V2 = struct.pack("<4I", 0x9020100D, 2000, 0, 12)


def test_text(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["identify", str(SAMPLES / "eras/smp64-4.4.4.xentrace.zst")]) == 0
    out = capsys.readouterr().out
    assert "4.3–4.6" in out.splitlines()[0] + out.splitlines()[1]
    assert "TRC_PV_HYPERCALL_V2 (0x20100d)" in out
    assert "byte 12:" in out
    assert max(map(len, out.splitlines())) <= 80


def test_json(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["identify", "--format", "json", str(SAMPLES / "bare/bare-4.1.6.1.txt.zst")]) == 0
    doc = json.loads(capsys.readouterr().out)
    assert doc["named"] == "4.1.6.1"
    assert doc["named_is_left"] is True
    assert "4.1.6.1" in doc["left"]
    assert "4.1.6–4.1.6.1" in doc["left_folded"]
    assert doc["ruled_out"]
    for row in doc["ruled_out"]:
        assert row["releases"]
        assert row["line"] is not None
        assert row["seq"] is not None
        assert row["what"]
        assert row["why"]


@pytest.mark.parametrize("command", ["identify", "analyze"])
def test_a_trace_that_contradicts_itself(command: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = written(tmp_path / "t", V1, V2)
    assert run([command, str(path)]) == 16
    err = capsys.readouterr().err.splitlines()
    assert err == [
        f"xtrace: {path}: its records contradict each other: no one release can have written both "
        "TRC_PV_HYPERCALL (0x20f101) (byte 12) and TRC_PV_HYPERCALL_V2 (0x20100d) (byte 36)"
    ]


def test_a_header_that_is_not_true(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "log"
    path.write_text(
        "xtrace: header release=4.8.5 arch=x86_64\n"
        "xtrace: call dom=1 vcpu=0 caller=pv64 op=41 a0=1 a1=0 a2=0\n"
        "xtrace: return dom=1 vcpu=0 op=41 result=0\n"
    )
    assert run(["identify", str(path)]) == 4
    assert "names 4.8.5, which is not among them" in capsys.readouterr().out


def test_analyze_judges_what_is_left(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "log"
    path.write_text(
        "xtrace: call dom=1 vcpu=0 caller=pv64 op=xen_version a0=0 a1=0\n"
        "xtrace: return dom=1 vcpu=0 caller=pv64 op=17 result=0x4000d\n"
    )
    run(["analyze", "--to", "4.14", str(path)])
    assert "judged for each of 4.13 " in capsys.readouterr().out


def test_a_lossy_trace_says_so(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["identify", str(SAMPLES / "eras/lost64-4.4.4.xentrace.zst")]) == 16
    assert "lost" in capsys.readouterr().err


def test_wrong_use(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["identify", "--format", "xml", str(SAMPLES / "bare/bare-4.4.4.txt.zst")]) == 3
    assert "there are text and json" in capsys.readouterr().err
