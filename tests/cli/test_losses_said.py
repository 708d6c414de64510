"""Every command that reads a trace says what was lost, left out, or is not what it was said to be."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from xtrace.cli.app import run

ROOT = Path(__file__).parents[2]
LOSSY = ROOT / "samples" / "eras" / "lost64-3.4.0-rc3.xentrace"
LOG = """xtrace: header release=4.17.7
xtrace: domain id=1 caller=pv64 role=guest
xtrace: call tsc=1 pcpu=0 dom=1 vcpu=0 op=12 a0=0x1 a1=0x1000
"""


@pytest.mark.parametrize("command", ["ingest", "identify", "replay", "analyze"])
def test_lost_records(command: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    more = {"ingest": ["-o", str(tmp_path / "out.parquet")], "replay": ["--at", "3.4.0"], "analyze": ["--from", "3.4.0"]}
    status = run([command, str(LOSSY), *more.get(command, [])])
    assert status & 16
    out, err = capsys.readouterr()
    assert "records lost" in out + err or "lost records" in out + err or "the recorder lost" in out + err


def test_identify_has_the_ledger_in_json(capsys: pytest.CaptureFixture[str]) -> None:
    run(["identify", str(LOSSY), "--format", "json"])
    answer = json.loads(capsys.readouterr().out)
    assert answer["losses"]["lost_records"] > 0
    assert answer["unsourced"] is False


def test_a_table_of_text_cannot_be_identified(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source = tmp_path / "t.log"
    source.write_text(LOG)
    table = tmp_path / "t.csv"
    assert run(["ingest", str(source), "-o", str(table)]) == 0
    capsys.readouterr()
    run(["identify", str(table)])
    out = " ".join(capsys.readouterr().out.split())
    assert "name the release with --from" in out


def test_replay_counts_what_it_leaves_out(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    table = tmp_path / "t.ndjson"
    source = tmp_path / "t.log"
    source.write_text(LOG)
    assert run(["ingest", str(source), "-o", str(table)]) == 0
    rows = [json.loads(line) for line in table.read_text().splitlines()]
    rows.append({**rows[-1], "seq": rows[-1]["seq"] + 1, "tsc": 2, "op": None})
    table.write_text("".join(json.dumps(row) + "\n" for row in rows))
    capsys.readouterr()
    status = run(["replay", str(table), "--at", "4.17.7", "--caller", "pv64"])
    assert status & 16
    assert "left out: 1 entry whose hypercall's number is not recorded" in capsys.readouterr().err


def test_a_forced_format_against_the_content_is_said(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "trace"
    shutil.copy(LOSSY, path)
    status = run(["analyze", str(path), "--input-format", "console", "--from", "3.4.0"])
    assert status & 16
    assert "by its content it is xentrace, but --input-format says console" in capsys.readouterr().err


def test_nothing_is_called_safe_where_there_is_nothing(capsys: pytest.CaptureFixture[str]) -> None:
    status = run(["analyze", str(ROOT / "samples" / "console" / "key-d-4.18.qp.txt"), "--from", "4.18"])
    out = capsys.readouterr().out
    assert status == 16
    assert out.startswith("Nothing to judge")
    assert "safe" not in out
