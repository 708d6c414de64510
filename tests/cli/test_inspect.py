"""``xtrace inspect`` on the command line."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from xtrace.cli.app import run

SAMPLES = Path(__file__).resolve().parents[2] / "samples" / "images"

KEYS = {"vcpu", "rip", "registers", "on_hypercall", "parked", "evidence", "hypercall", "subop", "progress", "total", "inner"}


def test_json(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["inspect", str(SAMPLES / "pv-mc-mem.save.zst"), "--format", "json"]) == 4
    doc = json.loads(capsys.readouterr().out)
    assert doc["schema_version"] == 1
    assert doc["image"].items() >= {"format": "xl-save", "guest": "pv64", "xen": "4.17", "vcpus": 1}.items()
    (vcpu,) = doc["vcpus"]
    assert set(vcpu) >= KEYS
    assert vcpu["rip"] == vcpu["registers"]["rip"] == "0xffffffff8010202b"
    assert (vcpu["parked"], vcpu["evidence"], vcpu["hypercall"], vcpu["progress"], vcpu["total"]) == (
        True,
        "proved",
        "multicall",
        9,
        16,
    )
    assert (vcpu["inner"]["hypercall"], vcpu["inner"]["progress"]) == ("memory_op", 448)
    finding = doc["findings"][0]
    assert {"code", "outcome", "evidence", "exposure", "source_decode", "target_decode", "text"} <= set(finding)
    assert doc["exit_status"] == 4


@pytest.mark.parametrize("name", ["pv-populate.core", "pv-mc-mem.save", "pvh-mc-ver.save", "pv-fresh.save", "pvh32-populate.save"])
def test_text_fits_a_terminal(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    run(["inspect", str(SAMPLES / f"{name}.zst")])
    out = capsys.readouterr().out
    assert max(map(len, out.splitlines())) <= 80
    assert out.splitlines()[0].startswith(("Caught inside a hypercall: 1 of 1", "Not caught inside a hypercall"))


def test_exit_status(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    image = str(SAMPLES / "pv-populate.core.zst")
    assert run(["inspect", image]) == 4  # machine frames
    assert run(["inspect", image, "--to", "3.3"]) & 8
    assert run(["inspect", image, "--to", "3.3", "--fail-on", "never"]) == 0
    assert run(["inspect", image, "--from", "4.12", "--to", "4.13"]) == 4
    assert run(["inspect", str(SAMPLES / "pvh-idle.save.zst")]) == 0
    assert run(["inspect", image, "--to", "9.9.9"]) == 3
    assert run(["inspect", image, "--format", "xml"]) == 3
    assert run(["inspect", str(tmp_path / "none")]) == 1
    (tmp_path / "empty").write_bytes(b"")
    assert run(["inspect", str(tmp_path / "empty")]) == 16
    (tmp_path / "text").write_bytes(b"hello")
    assert run(["inspect", str(tmp_path / "text")]) == 16
    assert "not a saved guest" in capsys.readouterr().err


def test_a_cut_image_shows_what_was_read(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    import pyarrow as pa

    raw = pa.CompressedInputStream(pa.OSFile(str(SAMPLES / "pv-populate.save.zst")), "zstd").read()
    (tmp_path / "cut").write_bytes(raw[:-20])
    assert run(["inspect", str(tmp_path / "cut")]) == 4 | 16
    got = capsys.readouterr()
    assert "2,510" in got.out
    assert f"{tmp_path / 'cut'}: byte " in got.err
    assert run(["inspect", str(tmp_path / "cut"), "--fail-on", "break"]) == 0
    capsys.readouterr()
    (tmp_path / "half").write_bytes(raw[: len(raw) // 2])
    assert run(["inspect", str(tmp_path / "half")]) == 16
    got = capsys.readouterr()
    assert got.err.count("\n") == 1
    assert "the file ends inside" in got.err


def test_standard_input_and_output_file(tmp_path: Path) -> None:
    data = (SAMPLES / "pv-populate.save.zst").read_bytes()
    words = [sys.executable, "-m", "xtrace", "inspect", "-", "--format", "json", "-o", str(tmp_path / "out.json")]
    done = subprocess.run(words, input=data, capture_output=True, timeout=60)
    assert done.returncode == 4, done.stderr
    assert json.loads((tmp_path / "out.json").read_text())["vcpus"][0]["progress"] == 2510


def test_sidecar_names_the_release(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    image = tmp_path / "guest.save.zst"
    image.write_bytes((SAMPLES / "pv-populate.save.zst").read_bytes())
    (tmp_path / "guest.save.zst.xtrace.toml").write_text('release = "4.17.7"\n')
    run(["inspect", str(image), "--format", "json"])
    assert json.loads(capsys.readouterr().out)["sources"] == ["4.17.7"]


def test_suppressions_hold_for_images_too(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "xtrace.toml").write_text('[[suppress]]\ncode = "XT010"\nreason = "live update only"\n')
    monkeypatch.chdir(tmp_path)
    args = ["inspect", str(SAMPLES / "pv-populate.save.zst"), "--from", "4.17.7", "--to", "4.18"]
    assert run(args) == 0
    out = capsys.readouterr().out
    assert "suppressed, and not counted for the exit status: 1 finding" in out
    assert "live update only" in out
    assert run([*args, "--format", "json"]) == 0
    answer = json.loads(capsys.readouterr().out)
    assert answer["findings"] == []
    assert [row["code"] for row in answer["suppressed"]] == ["XT010"]
    assert run([*args, "--config", "none"]) == 4
