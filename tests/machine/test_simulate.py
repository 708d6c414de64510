"""Simulated traces: the same bytes for a seed, everything in the truth is found, and judged as it comes out."""

from __future__ import annotations

import contextlib
import io
import json
import re
import shutil
import struct
import subprocess
import sys
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import polars as pl
import pytest
from everything import domains

from xtrace import pipeline
from xtrace.analyze import findings
from xtrace.errors import InputError, UsageError
from xtrace.machine import workload as workloads
from xtrace.machine import write_log, write_xentrace
from xtrace.machine.simulate import simulate
from xtrace.machine.truth import Simulation, truth
from xtrace.replay import facts
from xtrace.replay.callers import CallerFill
from xtrace.replay.stitch import Stitcher

ROOT = Path(__file__).parents[2]
FILES = sorted((ROOT / "docs" / "workloads").glob("*.toml"))
MIXED = next(f for f in FILES if f.stem == "mixed")
LOSSY = next(f for f in FILES if f.stem == "balloon-lossy")


def everything(source: str, *callers: str) -> workloads.Workload:
    """Return a workload of every operation that leaves continuations at a release, for some callers."""
    who = domains(source, callers, (2, 40))
    return workloads.Workload("everything", 200, 3, 2_600_000, 0.6, 0.2, 0.3, 0.2, 0.0, (1, 2), False, who)


def written(s: Simulation, path: Path) -> dict[str, Any]:
    """Write the first host's log; return the truth."""
    rendered = [write_log.render(r) for r in s.recordings]
    path.write_bytes(rendered[0][0])
    text = json.dumps(truth(s, [path.name, "other"], "line", [where for _, where in rendered]))
    return dict(json.loads(text))


def judged(path: Path, t: dict[str, Any]) -> dict[int, dict[str, Any]]:
    """Return what stitching and judging make of every continuation of a log, by line."""
    stitcher = Stitcher(t["source"])
    parts = [stitcher.feed(CallerFill().fill(b)).continuations for b in pipeline.events(path)]
    rows = pl.concat(parts).with_columns(input=pl.lit(0, dtype=pl.UInt32))
    roles = {d["id"]: d["role"] for d in t["domains"]} | {None: None}
    target = t["target"] or t["source"]
    context = findings.Context((t["source"],), (target,), frozenset(), roles)
    table = findings.judge_continuations(rows, context, findings.Tally.of((target,)), everything=True)
    return {r["line"]: r for r in table.iter_rows(named=True)}


def continuations(t: dict[str, Any]) -> list[tuple[dict[str, Any], dict[str, Any]]]:
    return [(c, k) for c in t["calls"] for k in c["continuations"] if k["host"] == 0]


def relative(source: str, call: dict[str, Any]) -> bool:
    """Say whether only the operands move: a re-entry that cannot be linked to its call then looks like a shorter call."""
    for b in facts.lookup(source, call["caller"], call["op"]).by_number.values():
        if b.operation == call["operation"].partition("/")[0]:
            return b.codec == "advanced" or (b.codec == "guest_structure" and b.params.get("index") is None)
    return False


def check(path: Path, t: dict[str, Any]) -> Counter[str]:
    """Hold every continuation of the truth against what is read out of the log."""
    found, seen = judged(path, t), Counter[str]()
    for call, k in continuations(t):
        if k["line"] is None:
            seen["lost"] += 1
            continue
        row = found[k["line"]]
        what = f"{path.name}: {call['caller']} {call['hypercall']} {call['operation']} {k}, read as {row['source_decode']}"
        assert row["evidence"] == "proved" or not k["intact"], what
        read = row["source_decode"]["progress"]
        if read is not None:
            fits = {k["progress"]}
            if relative(t["source"], call):
                # What was done before the vCPU took it up does not show in a re-entry.
                fits |= {k["progress"] - other["progress"] for other in call["continuations"]}
            assert read in fits, what
            seen["progress"] += 1
            seen["exact"] += read == k["progress"]
            seen["awake"] += not k["base"]
            seen["exact awake"] += not k["base"] and read == k["progress"]
        inner = row["source_decode"]["inner"]
        if k["inner"] is not None:
            assert inner is not None, what
            assert inner["progress"] in (None, k["inner"]["progress"]), what
            seen["inner"] += 1
        if k["at_target"] is not None and row["outcome"] != "undecidable":
            assert row["outcome"] == k["at_target"]["outcome"], what
            assert row["errno"] in (None, k["at_target"]["errno"]), what
        seen["found"] += 1
        seen[row["outcome"]] += 1
        seen["parked"] += k["parked"]
        seen["intact"] += k["intact"]
    return seen


@pytest.mark.parametrize("path", FILES, ids=lambda p: p.stem)
def test_the_same_seed_gives_the_same_bytes(path: Path) -> None:
    w = workloads.read(path)

    def run(seed: int) -> list[bytes]:
        s = simulate(w, "4.4.4", seed, "4.17.7", 60)
        return [render(r)[0] for r in s.recordings for render in (write_log.render, write_xentrace.render)]

    assert run(7) == run(7)
    assert run(7) != run(8)


@pytest.mark.parametrize("source", ["4.1.6.1", "4.4.4", "4.13.5", "4.22.0"])
def test_every_continuation_is_found_and_proved(source: str, tmp_path: Path) -> None:
    for seed in range(2):
        s = simulate(everything(source, "pv64", "pv32", "hvm64"), source, seed)
        seen = check(tmp_path / "trace.log", written(s, tmp_path / "trace.log"))
        assert seen["intact"] == seen["found"] > 60
        assert seen["parked"] > 10
        assert seen["inner"] > 3
        assert seen["exact"] > 40
        assert seen["exact awake"] >= 0.9 * seen["awake"]


@pytest.mark.parametrize(
    ("source", "target", "callers"),
    [
        ("3.3.0", "3.4.0", ("pv64", "pv32")),
        ("3.4.0", "3.3.0", ("pv64", "pv32")),
        ("4.4.4", "4.5.0", ("pv64", "hvm64", "pvh64")),
        ("4.5.0", "4.4.4", ("hvm64", "hvm32")),
        ("4.8.5", "4.9.0", ("hvm64", "arm64")),
        ("4.22.0", "4.12.0", ("pv64", "hvm64", "arm32")),
        ("4.17.7", "4.17.7", ("pv64", "hvm64")),
    ],
)
def test_findings_are_what_execution_shows(source: str, target: str, callers: tuple[str, ...], tmp_path: Path) -> None:
    w = everything(source, *callers)
    s = simulate(w, source, 5, target, 100)
    t = written(s, tmp_path / "trace.log")
    seen = check(tmp_path / "trace.log", t)
    assert seen["found"] > 40
    if (source, target) == ("3.3.0", "3.4.0"):
        assert seen["misdirected"] + seen["absent"] + seen["refused"] > 5
    if (source, target) == ("3.4.0", "3.3.0"):
        assert seen["skips"]


def test_a_wrong_reading_is_seen(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """The truth comes from execution, the findings from decoding: a fault in one of them shows."""
    from xtrace.replay import codecs

    s = simulate(workloads.read(LOSSY), "3.4.0", 0, "3.3.0", 100)
    t = written(s, tmp_path / "trace.log")
    assert check(tmp_path / "trace.log", t)["skips"]
    monkeypatch.setattr(codecs.ShiftedIndex, "_read", lambda self, b, states: codecs.Column.full(len(states), 0))
    with pytest.raises(AssertionError):
        check(tmp_path / "trace.log", t)


def test_the_move(tmp_path: Path) -> None:
    """What was in flight goes on at the target, in its own trace; what stays behind stays."""
    w = workloads.read(MIXED)
    caught = []
    for seed in range(4):
        s = simulate(w, "4.4.4", seed, "4.5.0", 150)
        t = json.loads(json.dumps(truth(s, ["a", "b"], "line", [write_log.render(r)[1] for r in s.recordings])))
        for call, k in continuations(t):
            if k["caught"]:
                after = call["entries"][k["entry"] + 1]
                assert after["host"] == 1
                assert after["release"] == "4.5.0"
                assert call["domid"] != 0
                caught.append(call)
        assert all(e["host"] == 0 for c in t["calls"] if c["domid"] == 0 for e in c["entries"])
        assert all(c["ended"] for c in t["calls"])
        assert {r.domid for r in s.recordings[1].records} == {1, 2}
        assert sum(r.kind == "suspend" for r in s.recordings[0].records) == 2
    assert len(caught) > 3
    # 4.4 and 4.5 agree on what these leave: nothing is done twice or left out.
    assert all(c["items"]["once"] == c["total"] for c in caught)


def test_a_cooperative_move_catches_sleeping_tasks_only() -> None:
    w = workloads.read(LOSSY)
    caught = [k for seed in range(5) for c in simulate(w, "3.3.0", seed, "3.4.0", 100).calls for k in c.left if k.caught]
    assert caught
    assert all(k.parked for k in caught)
    broken = [k for k in caught if k.verdict is not None and k.verdict.outcome == "misdirected"]
    assert broken


def test_lost_windows(tmp_path: Path) -> None:
    w = workloads.read(LOSSY)
    s = simulate(replace(w, lost=0.02), "4.4.4", 2, "4.5.0", 150)
    t = written(s, tmp_path / "trace.log")
    seen = check(tmp_path / "trace.log", t)
    assert seen["lost"]
    assert 0 < seen["intact"] < seen["found"]
    result = pipeline.analyze([tmp_path / "trace.log"], pipeline.Options(targets=("4.5.0",)))
    told = sum(r.count or 0 for r in s.recordings[0].records if r.kind == "lost")
    assert result.inputs[0].ledger.lost_records == told > 0
    assert result.bits & 16


def test_analyze_and_replay_read_it(tmp_path: Path) -> None:
    s = simulate(workloads.read(MIXED), "4.4.4", 1, "4.17.7", 150)
    path = tmp_path / "trace.log"
    t = written(s, path)
    result = pipeline.analyze([path], pipeline.Options(targets=("4.17.7",)))
    assert result.sources == ("4.4.4",)
    assert not result.assumptions
    assert result.proved >= len(continuations(t))
    run = pipeline.replay(path, "4.4.4")
    rows = sum(len(b) for b in run.batches())
    assert rows
    assert run.account.divergence is None


@pytest.mark.parametrize(
    ("source", "callers"),
    [
        ("3.3.0", ("pv64", "pv32")),
        ("4.1.6.1", ("pv64", "hvm64")),
        ("4.4.4", ("pv64", "pv32")),
        ("4.22.0", ("pv64", "hvm64", "hvm32")),
    ],
)
def test_the_binary_is_read_back(source: str, callers: tuple[str, ...], tmp_path: Path) -> None:
    s = simulate(everything(source, *callers), source, 3)
    recording = s.recordings[0]
    data, where = write_xentrace.render(recording)
    path = tmp_path / "trace.xentrace"
    path.write_bytes(data)
    (tmp_path / "trace.xentrace.xtrace.toml").write_bytes(write_xentrace.sidecar(recording))
    events = pl.concat(list(pipeline.events(path)))
    wanted = [(r, at) for r, at in zip(recording.records, where, strict=True) if at is not None and r.kind != "schedule"]
    assert len(wanted) == len(events) > 100
    hvm = {d.domid for d in recording.domains if "hvm" in d.caller}
    for (r, at), e in zip(wanted, events.iter_rows(named=True), strict=True):
        kind = ("vmmcall" if r.domid in hvm else "hypercall") if r.kind == "call" else r.kind
        assert (e["kind"], e["op"], e["domid"], e["vcpu"]) == (kind, r.op, r.domid, r.vcpu)
        assert (e["tsc"], e["pcpu"], e["offset"]) == (r.tsc, r.pcpu, at)
        for k, value in enumerate(r.args):
            assert e[f"arg{k}"] in (None, value & 0xFFFFFFFF)
    assert events.get_column("pcpu").n_unique() == 3
    result = pipeline.analyze([path], pipeline.Options(targets=(source,)))
    assert result.sources == (source,)
    assert not result.inputs[0].incomplete


def test_binary_windows_add_up() -> None:
    recording = simulate(replace(workloads.read(LOSSY), lost=0.02), "4.4.4", 1).recordings[0]
    data, _ = write_xentrace.render(recording)
    at, lost = 0, 0
    while at < len(data):
        head, _, size = struct.unpack_from("<III", data, at)
        assert head == 0x2001F003
        end = at + 12 + size
        at += 12
        while at < end:
            (word,) = struct.unpack_from("<I", data, at)
            lost += word & 0xFFFFFFF == 0x1F001
            at += 4 + 8 * (word >> 31) + 4 * (word >> 28 & 7)
        assert at == end
    assert lost == sum(r.kind == "lost" for r in recording.records) > 0


@pytest.mark.skipif(shutil.which("xenalyze") is None, reason="xenalyze is not installed")
@pytest.mark.parametrize("source", ["4.1.6.1", "4.4.4", "4.17.7"])
def test_xenalyze_reads_it(source: str, tmp_path: Path) -> None:
    recording = simulate(everything(source, "pv64", "hvm64"), source, 1).recordings[0]
    path = tmp_path / "trace.xentrace"
    path.write_bytes(write_xentrace.render(recording)[0])
    done = subprocess.run(["xenalyze", "--dump-all", str(path)], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    wanted = Counter((r.kind, r.domid) for r in recording.records)
    found = Counter(re.findall(r"d(\d)v\d( {1,2}hypercall| vmcall) ", done.stdout))
    assert found["0", " hypercall"] == wanted["call", 0] > 50
    assert found["1", " vmcall"] == wanted["call", 1] > 20
    _, places = write_xentrace.render(recording)
    # It does not show those of HVM guests.
    records = zip(recording.records, places, strict=True)
    assert found["0", "  hypercall"] == sum(r.kind == "subcall" and not r.domid and at is not None for r, at in records)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("", "no [[domain]]"),
        ("[workload]\npcpu = 2", "did you mean 'pcpus'?"),
        ("[workloads]\n", "did you mean 'workload'?"),
        ("[workload]\npreempt = 2", "probability from 0 to 0.99"),
        ("[workload]\ncalls = true", "whole number"),
        ("[workload]\nlost_records = [5, 1]", "fewest, most"),
        ("[[domain]]\nid = 1", "caller is missing"),
        ("[[domain]]\ncaller = 'pv64'", "id is missing"),
        ("[[domain]]\nid = 1\ncaller = 'pv46'", "did you mean 'pv64'?"),
        ("[[domain]]\nid = 1\ncaller = 'pv64'\nrole = 'gest'", "did you mean 'guest'?"),
        ("[[domain]]\nid = 1\ncaller = 'pv64'", "no [[domain.call]]"),
        ("[[domain]]\nid = 1\ncaller = 'pv64'\n[[domain.call]]\nhypercall = 'memery_op'", "did you mean 'memory_op'?"),
        ("[[domain]]\nid = 1\ncaller = 'pv64'\n[[domain.call]]\nhypercall = 'memory_op'\ntotals = 3", "did you mean 'total'?"),
        ("[[domain]]\nid = 1\ncaller = 'pv64'\n[[domain.call]]\nhypercall = 'memory_op'\nweight = 0", "above 0"),
        ("[[domain]]\nid = 1\ncaller = 'pv64'\n[[domain.call]]\nhypercall = 'multicall'", "needs calls in it"),
        (
            "[[domain]]\nid = 1\ncaller = 'pv64'\n[[domain.call]]\nhypercall = 'multicall'\n[[domain.call.entry]]\nhypercall = 13",
            "multicall inside a multicall",
        ),
        ("[[domain]]\nid = 1\ncaller = 'pv64'\n[[domain.call]]\nhypercall = 12\n" * 2, "domain 1 is there twice"),
    ],
)
def test_bad_workloads(text: str, words: str, tmp_path: Path) -> None:
    path = tmp_path / "w.toml"
    path.write_text(text)
    with pytest.raises(UsageError) as got:
        workloads.read(path)
    assert words in str(got.value)
    assert str(got.value).startswith(str(path))
    assert "\n" not in str(got.value)


def test_unreadable_workloads(tmp_path: Path) -> None:
    for content in (b"= =", b"\xff"):
        (tmp_path / "w.toml").write_bytes(content)
        with pytest.raises(InputError):
            workloads.read(tmp_path / "w.toml")
    with pytest.raises(InputError, match="no such file"):
        workloads.read(tmp_path / "none.toml")


def xtrace(*args: str | Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "xtrace", "simulate", *map(str, args)]
    return subprocess.run(command, capture_output=True, text=True, timeout=120, cwd=ROOT)


def test_command(tmp_path: Path) -> None:
    trace = tmp_path / "trace.log"
    first = xtrace(MIXED, "--on", "4.4.4", "--migrate-to", "4.5.0", "--at", "100", "--seed", "4", "-o", trace)
    assert first.returncode == 0, first.stderr
    assert max(map(len, first.stdout.replace(str(tmp_path), "").splitlines())) <= 80
    names = {"trace.log", "trace.to-4.5.0.log", "trace.log.truth.json"}
    assert {p.name for p in tmp_path.iterdir()} == names
    before = {p: p.read_bytes() for p in tmp_path.iterdir()}
    again = xtrace(MIXED, "--on", "4.4.4", "--migrate-to", "4.5.0", "--at", "100", "--seed", "5", "-o", trace)
    assert again.returncode == 3
    assert "--force" in again.stderr
    assert {p: p.read_bytes() for p in tmp_path.iterdir()} == before
    forced = xtrace(MIXED, "--on", "4.4.4", "--migrate-to", "4.5.0", "--at", "100", "--seed", "4", "-o", trace, "--force")
    assert forced.returncode == 0
    assert {p: p.read_bytes() for p in tmp_path.iterdir()} == before
    binary = xtrace(MIXED, "--on", "4.17.7", "-o", tmp_path / "t.xentrace")
    assert binary.returncode == 0, binary.stderr
    assert (tmp_path / "t.xentrace").read_bytes()[:4] == b"\x03\xf0\x01\x20"
    assert (tmp_path / "t.xentrace.xtrace.toml").exists()
    nowhere = xtrace(MIXED, "--on", "4.17.7", "-o", tmp_path / "none" / "t.log")
    assert nowhere.returncode == 1
    assert "no such folder" in nowhere.stderr


@pytest.mark.parametrize(
    ("args", "words"),
    [
        (("-o", "x"), "--on is missing"),
        (("--on", "4.4.4"), "-o is missing"),
        (("--on", "4.4", "-o", "x"), "is a series"),
        (("--on", "4.4.4", "--at", "3", "-o", "x"), "go together"),
        (("--on", "4.4.4", "--at", "0", "--migrate-to", "4.5.0", "-o", "x"), "--at 0"),
        (("--on", "4.4.4", "--format", "xml", "-o", "x"), "--format xml"),
        (("--on", "4.4.4", "-o", "-"), "needs a file"),
        (("--on", "3.3.0", "-o", "x"), "GNTTABOP_copy"),
    ],
)
def test_wrong_use(args: tuple[str, ...], words: str, tmp_path: Path) -> None:

    from xtrace.cli.app import run

    err = io.StringIO()
    with contextlib.redirect_stderr(err), contextlib.chdir(tmp_path):
        status = run(["simulate", str(MIXED), *args])
    assert status == 3, err.getvalue()
    assert words in err.getvalue()
    assert not list(tmp_path.iterdir())


def test_xentrace_records_no_arm_calls() -> None:
    recording = simulate(everything("4.17.7", "arm64"), "4.17.7").recordings[0]
    with pytest.raises(UsageError, match="arm64"):
        write_xentrace.render(recording)


def test_documented() -> None:
    page = (ROOT / "docs" / "simulate.md").read_text()
    for path in FILES:
        assert path.name in page
    for key in (*workloads._TOP, *workloads._WORKLOAD, *workloads._DOMAIN, *workloads._CALL):
        assert f"`{key}`" in page, key
