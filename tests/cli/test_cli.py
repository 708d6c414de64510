"""The command line as a user meets it: exit status, one clear sentence, nothing lost."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest

ROOT = Path(__file__).parents[2]
SAMPLES = ROOT / "samples"
BARE = SAMPLES / "bare" / "bare-4.4.4.txt.zst"


def xtrace(*args: str | Path, stdin: bytes | None = None, **kw: Any) -> subprocess.CompletedProcess[bytes]:
    command = [sys.executable, "-m", "xtrace", *map(str, args)]
    return subprocess.run(command, capture_output=True, input=stdin, timeout=300, **kw)


def sentence(done: subprocess.CompletedProcess[bytes]) -> str:
    """The one sentence on stderr; there must be no traceback."""
    text = done.stderr.decode()
    assert "Traceback" not in text
    return text


def plain(path: Path) -> bytes:
    return bytes(pa.CompressedInputStream(pa.OSFile(str(path)), "zstd").read())


def tiny() -> Path:
    return next((SAMPLES / "dom0-4.17.7").glob("j5_tiny_pv.xentrace"))


@pytest.mark.parametrize(
    ("args", "status", "words"),
    [
        (["analyze", "/no/such/file"], 1, "/no/such/file: no such file"),
        (["analyze", "/"], 1, "is a directory"),
        (["analyze", str(BARE), "--to", "4.99.0"], 3, "4.99.0"),
        (["analyze", str(BARE), "--from", "banana"], 3, "banana"),
        (["analyze", str(BARE), "--caller", "pv63"], 3, "pv63"),
        (["analyze", str(BARE), "--caller", "dx=pv64"], 3, "dx"),
        (["analyze", str(BARE), "--format", "xml"], 3, "xml"),
        (["analyze", str(BARE), "--fail-on", "sometimes"], 3, "sometimes"),
        (["analyze", str(BARE), "--host-info", "/no/such"], 1, "/no/such"),
        (["analyze", "--wat"], 3, "--wat"),
        (["analyze"], 3, "TRACE"),
        (["wat"], 3, "wat"),
        (["decode", "--from", "4.4.4", "--to", "4.5.0", "--caller", "pv64", "memery_op", "1"], 3, "memory_op"),
        (["decode", "--from", "4.4.4", "--to", "4.5.0", "--caller", "pv64", "memory_op", "0xzz"], 3, "0xzz"),
        (["decode", "--from", "4.4", "--to", "4.5.0", "--caller", "pv64", "memory_op", "1"], 3, "series"),
        (["ingest", str(BARE), "-o", "x.txt"], 3, "x.txt"),
        (["explain", "XT999"], 3, "XT999"),
        (["replay", str(BARE), "--at", "4.4"], 3, "series"),
    ],
)  # fmt: skip
def test_wrong_use(args: list[str], status: int, words: str) -> None:
    done = xtrace(*args)
    assert done.returncode == status, done.stderr
    text = sentence(done)
    assert words in text
    assert not done.stdout


def test_no_permission(tmp_path: Path) -> None:
    path = tmp_path / "secret"
    path.write_bytes(b"x")
    path.chmod(0)
    if os.access(path, os.R_OK):
        pytest.skip("this user may read everything")
    done = xtrace("analyze", path)
    assert done.returncode == 1
    assert "no permission" in sentence(done)


@pytest.mark.parametrize("content", [b"", b"\x00" * 4096, random.Random(1).randbytes(4096), b"hello world\n" * 50])
def test_not_a_trace(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "trace"
    path.write_bytes(content)
    done = xtrace("analyze", path, "--from", "4.17.7")
    assert done.returncode & 16
    assert not done.returncode & 3
    assert str(path) in sentence(done)
    assert "byte 0" in sentence(done)


@pytest.mark.parametrize("share", [0.001, 0.3, 0.5, 0.999])
def test_a_cut_trace_is_still_judged(tmp_path: Path, share: float) -> None:
    whole = tiny().read_bytes() if tiny().suffix != ".zst" else plain(tiny())
    path = tmp_path / "cut.xentrace"
    path.write_bytes(whole[: int(len(whole) * share) | 1])
    done = xtrace("analyze", path, "--from", "4.17.7", "--format", "json")
    assert done.returncode & 16
    assert "byte" in sentence(done)
    answer = json.loads(done.stdout)
    assert answer["inputs"][0]["truncated"]
    if share > 0.1:
        assert answer["inputs"][0]["hypercalls"] > 100


def test_one_bad_input_costs_only_itself(tmp_path: Path) -> None:
    done = xtrace("analyze", tmp_path / "missing", BARE, "--to", "4.4.4", "--format", "json")
    assert done.returncode & 1
    assert "missing" in sentence(done)
    assert json.loads(done.stdout)["calls"] == 245


def test_json_contract() -> None:
    done = xtrace("analyze", BARE, "--to", "4.3", "--format", "json")
    answer = json.loads(done.stdout)
    assert answer["schema_version"] == 1
    assert {"inputs", "calls", "continuations", "surface", "blind", "summary", "findings"} <= set(answer)
    one = answer["inputs"][0]
    keys = {
        "path",
        "format",
        "records",
        "hypercalls",
        "subcalls",
        "vmmcalls",
        "lost_records",
        "skipped_bytes",
        "source",
        "domains",
    }
    assert keys <= set(one)
    assert (one["source"], one["hypercalls"]) == ("4.4.4", 245)
    assert one["domains"]["0"] == {"caller": "pv64", "role": "control"}
    assert answer["continuations"] == {"proved": 1977, "inferred": 0}
    for target in answer["summary"]["targets"]:
        assert {"targets", "verdict", "outcomes"} <= set(target)
    finding = answer["findings"][0]
    assert {
        "code", "outcome", "caveats", "evidence", "exposure", "source", "targets", "hypercall", "subop", "caller", "domid", "vcpu",
        "input", "offset", "line", "seq", "args", "source_decode", "target_decode", "errno", "text",
    } <= set(finding)  # fmt: skip
    assert set(finding["exposure"]) == {"issuer", "migrates", "kinds"}
    for f in answer["findings"]:
        assert all(a is None or a.startswith("0x") for a in f["args"])
        assert f["caveats"] or f["outcome"] not in ("resumes",)
    assert done.returncode == answer["summary"]["exit_status"]


def test_jsonl_says_the_same() -> None:
    whole = json.loads(xtrace("analyze", BARE, "--to", "4.5.0", "--format", "json").stdout)
    lines = [json.loads(x) for x in xtrace("analyze", BARE, "--to", "4.5.0", "--format", "jsonl").stdout.splitlines()]
    assert [x["type"] for x in lines].count("finding") == len(whole["findings"])
    assert lines[-1]["type"] == "summary"
    assert lines[-1]["summary"] == whole["summary"]


def test_exit_status_is_the_same_in_every_format_and_can_be_narrowed() -> None:
    codes = {f: xtrace("analyze", BARE, "--to", "3.3.0", "--format", f).returncode for f in ("text", "json", "jsonl")}
    assert len(set(codes.values())) == 1
    assert codes["text"] & 4
    assert xtrace("analyze", BARE, "--to", "3.3.0", "--fail-on", "never").returncode == 0
    assert xtrace("analyze", BARE, "--to", "3.3.0", "--fail-on", "incomplete").returncode == 0


def test_stdin_and_compression() -> None:
    from_file = json.loads(xtrace("analyze", BARE, "--from", "4.4.4", "--to", "4.5.0", "--format", "json").stdout)
    for data in (BARE.read_bytes(), plain(BARE)):
        piped = json.loads(xtrace("analyze", "-", "--from", "4.4.4", "--to", "4.5.0", "--format", "json", stdin=data).stdout)
        assert piped["findings"] == from_file["findings"]


def test_assumptions_are_said_first() -> None:
    done = xtrace("analyze", tiny(), "--tsc-khz", "2596122")
    lines = done.stdout.decode().splitlines()
    said = [x for x in lines[:5] if x.startswith("assumed:")]
    assert any("which release" in x for x in said)
    assert any("pv64" in x for x in said)


LOG = "xtrace: header release=4.17.7\nxtrace: domain id=3 caller=pv64 role=guest\n"


@pytest.mark.parametrize(
    ("lines", "args", "status", "first"),
    [
        # A guest that migrates, nothing continued, equal encodings: clean, and said so.
        ("hypercall dom=3 vcpu=0 op=12 a0=6 a1=0x1000", ["--to", "4.18"], 0, "Safe from 4.17.7 to 4.18"),
        # The same with lost records is not called safe.
        ("hypercall dom=3 vcpu=0 op=12 a0=6 a1=0x1000\nlost n=5", ["--to", "4.18"], 16, "incomplete"),
        # A proved break, held by a guest.
        ("hypercall dom=3 vcpu=0 op=12 a0=0x141 a1=0x1000 mem.nr_extents=64", ["--to", "3.3.0"], 8, "breaks at 3.3.0"),
        # The same of dom0, which does not migrate.
        ("hypercall dom=0 vcpu=0 caller=pv64 op=12 a0=0x141 a1=0x1000 mem.nr_extents=64", ["--to", "3.3.0"], 4, "reviewed"),
        # Arguments that the trace does not hold: safe if no state could break, not otherwise.
        ("hypercall dom=3 vcpu=0 op=12", ["--to", "4.18"], 0, "Safe"),
        ("hypercall dom=3 vcpu=0 op=12", ["--to", "3.3.0"], 4, "reviewed"),
    ],
)
def test_verdicts(tmp_path: Path, lines: str, args: list[str], status: int, first: str) -> None:
    path = tmp_path / "x.log"
    path.write_text(LOG + "".join(f"xtrace: {line}\n" for line in lines.splitlines()))
    done = xtrace("analyze", path, *args)
    assert done.returncode & 24 == status & 24, done.stdout
    assert done.returncode in (status, status | 4)
    assert first in done.stdout.decode().splitlines()[0]
    if status == 16:
        assert "Safe" not in done.stdout.decode().splitlines()[0]


def test_sidecar(tmp_path: Path) -> None:
    path = tmp_path / "t.xentrace"
    path.write_bytes(tiny().read_bytes())
    (tmp_path / "t.xentrace.xtrace.toml").write_text(
        'release = "4.17.7"\ntsc_khz = 2596122\n[domains.0]\ncaller = "pv64"\nrole = "control"\n'
    )
    answer = json.loads(xtrace("analyze", path, "--format", "json").stdout)
    assert answer["inputs"][0]["source"] == "4.17.7"
    assert answer["inputs"][0]["tsc_khz"] == 2596122
    (tmp_path / "t.xentrace.xtrace.toml").write_text('relase = "4.17.7"\n')
    done = xtrace("analyze", path)
    assert done.returncode == 3
    assert "release" in sentence(done)


def test_host_info() -> None:
    done = xtrace("analyze", tiny(), "--host-info", SAMPLES / "host" / "xl_info.txt", "--format", "json")
    one = json.loads(done.stdout)["inputs"][0]
    assert (one["source"], one["tsc_khz"]) == ("4.17.7", 2596122)


@pytest.mark.parametrize("ending", ["parquet", "arrow", "csv"])
def test_ingest(tmp_path: Path, ending: str) -> None:
    import polars as pl

    from xtrace.schema import EVENTS

    out = tmp_path / f"events.{ending}"
    done = xtrace("ingest", BARE, "-o", out)
    assert done.returncode == 0, done.stderr
    read = {"parquet": pl.read_parquet, "arrow": pl.read_ipc, "csv": pl.read_csv}[ending]
    frame = read(out)
    assert frame.columns == EVENTS.names()
    assert len(frame) == 245 * 2 + 1977
    assert not list(tmp_path.glob(".*"))


def test_replay_explains_its_own_release_and_not_another() -> None:
    done = xtrace("replay", BARE, "--at", "4.4.4")
    assert done.returncode == 0
    assert "every record that the model covers is explained" in done.stderr.decode()
    assert any("XENMEM_decrease_reservation" in x and "continuation, proved" in x for x in done.stdout.decode().splitlines())
    done = xtrace("replay", BARE, "--at", "3.3.0")
    assert done.returncode & 4
    assert "first record that cannot be explained" in done.stderr.decode()


def test_broken_pipe_is_quiet() -> None:
    command = f"{sys.executable} -m xtrace replay {BARE} --at 4.4.4 | head -1"
    done = subprocess.run(["bash", "-o", "pipefail", "-c", command], capture_output=True, timeout=60)
    assert b"Traceback" not in done.stderr
    assert b"Broken" not in done.stderr


def test_interrupt() -> None:
    child = subprocess.Popen(
        [sys.executable, "-m", "xtrace", "analyze", "-", "--from", "4.17.7"],
        stdin=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )
    time.sleep(1.5)
    child.send_signal(signal.SIGINT)
    _, err = child.communicate(timeout=30)
    assert child.returncode == 130
    assert b"Traceback" not in err


def test_start_up_is_light() -> None:
    heavy = "('polars', 'pyarrow', 'numpy')"
    code = f"import sys; from xtrace.cli.app import run; run(['--version']); sys.exit(any(m in sys.modules for m in {heavy}))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, timeout=60)
    assert done.returncode == 0, done.stderr


def test_same_input_same_bytes() -> None:
    runs = {xtrace("analyze", BARE, "--format", "json", env={**os.environ, "PYTHONHASHSEED": str(k)}).stdout for k in (1, 2)}
    assert len(runs) == 1


def test_hostile_strings_do_not_reach_the_terminal(tmp_path: Path) -> None:
    path = tmp_path / "evil\x1b[31m.log"
    path.write_text("xtrace: header release=4.4.4\nxtrace: hypercall tsc=1 dom=1 vcpu=0 caller=pv64 op=12 a0=0x41 wat\x1b[2J=1\n")
    done = xtrace("analyze", path)
    assert b"\x1b" not in done.stdout + done.stderr


def test_a_reader_that_has_seen_enough_is_no_failure() -> None:
    command = f"{sys.executable} -m xtrace abi export | head -1 >/dev/null; exit ${{PIPESTATUS[0]}}"
    done = subprocess.run(["bash", "-c", command], capture_output=True, timeout=120)
    assert done.returncode == 0
    assert done.stderr == b""
