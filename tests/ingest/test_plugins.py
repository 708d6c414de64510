"""Readers that other packages bring: real packages on the path, used through the command line."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

GOOD = """
import polars as pl
from xtrace import schema
from xtrace.ingest.base import Ledger, Observed, Shows

class Recording:
    format = "toy"
    def __init__(self, source):
        self.source, self.ledger, self.observed = source, Ledger(), Observed(release="3.3.0")
    def batches(self):
        n = len(self.source.file.read().splitlines())
        self.ledger.records = self.ledger.hypercalls = n
        rows = pl.DataFrame({"seq": range(n), "offset": range(n), "op": [12] * n, "arg0": [0x51] * n, "kind": ["hypercall"] * n,
                             "domid": [1] * n, "vcpu": [0] * n, "caller": ["pv64"] * n, "cut": [0] * n, "segment": [0] * n})
        yield rows.select((pl.col(c) if c in rows.columns else pl.lit(None)).cast(t).alias(c) for c, t in schema.EVENTS.items())

class Reader:
    name, title, shows = "toy", "a toy", Shows(op="yes")
    def sniff(self, head):
        return 100 if head.startswith(b"TOY") else 0
    def open(self, source, options):
        return Recording(source)

READER = Reader()
"""


def installed(folder: Path, name: str, points: dict[str, str], code: str) -> None:
    """Lay out a package as an installer does."""
    (folder / f"{name}.py").write_text(code)
    info = folder / f"{name}-1.dist-info"
    info.mkdir()
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: 1\n")
    lines = "".join(f"{k} = {v}\n" for k, v in points.items())
    (info / "entry_points.txt").write_text(f"[xtrace.readers]\n{lines}")


def xtrace(folder: Path, *args: str, **env: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "xtrace", *args], capture_output=True, text=True, check=False,
        env={**os.environ, "PYTHONPATH": str(folder), **env},
    )  # fmt: skip


@pytest.fixture
def trace(tmp_path: Path) -> Path:
    path = tmp_path / "t"
    path.write_text("TOY\nTOY\n")
    return path


def test_a_plugin_reads(tmp_path: Path, trace: Path) -> None:
    installed(tmp_path, "toyreader", {"toy": "toyreader:READER"}, GOOD)
    done = xtrace(tmp_path, "analyze", str(trace), "--to", "3.4.0", "--format", "json")
    assert done.returncode == 8 | 4, done.stderr
    assert "read as toy, 2 records" in done.stderr
    assert {f["code"] for f in json.loads(done.stdout)["findings"]} == {"XT001"}
    assert "toy" in xtrace(tmp_path, "formats").stdout
    # And without plug-ins it is no trace.
    off = xtrace(tmp_path, "analyze", str(trace), XTRACE_PLUGINS="0")
    assert (off.returncode, "is not a trace that xtrace knows" in off.stderr) == (16, True)


BROKEN = {
    "import": ("raise RuntimeError('no luck')", "cannot be loaded (RuntimeError: no luck)"),
    "missing": ("class R: title = 'x'\nREADER = R()", "is no reader: it lacks sniff, open"),
    "nothing": ("", "cannot be loaded (AttributeError"),
    "sniff": (
        "class R:\n title='x'\n def sniff(self, head): return 1/0\n def open(self, s, o): pass\nREADER = R()",
        "its sniff() failed (ZeroDivisionError: division by zero)",
    ),
}


@pytest.mark.parametrize("how", BROKEN)
def test_a_broken_plugin_is_named_and_skipped(tmp_path: Path, how: str) -> None:
    code, says = BROKEN[how]
    installed(tmp_path, "broken", {"broken": "broken:READER"}, code)
    log = tmp_path / "t.log"
    log.write_text("xtrace: header release=3.3.0\nxtrace: call dom=1 vcpu=0 caller=pv64 op=17\n")
    done = xtrace(tmp_path, "analyze", str(log), "--to", "3.4.0")
    assert done.returncode == 0, done.stderr
    assert f"plug-in reader broken skipped: {'' if how == 'sniff' else 'broken:READER '}{says}" in done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize(
    ("body", "says"),
    [
        ("raise KeyError('x')", "the plug-in reader 'bad' failed (KeyError: 'x')"),
        ("yield 5", "the plug-in reader 'bad' yields no table of events"),
    ],
)
def test_a_plugin_that_fails_while_it_reads(tmp_path: Path, trace: Path, body: str, says: str) -> None:
    code = (
        "from xtrace.ingest.base import Ledger, Observed\n"
        "class Rec:\n format='bad'\n ledger=Ledger()\n observed=Observed()\n"
        f" def batches(self):\n  {body}\n  yield\n"
        "class R:\n title='x'\n def sniff(self, head): return 100\n def open(self, s, o): return Rec()\nREADER = R()\n"
    )
    installed(tmp_path, "bad", {"bad": "bad:READER"}, code)
    done = xtrace(tmp_path, "analyze", str(trace), "--from", "3.3.0")
    assert done.returncode == 16
    assert done.stderr == f"xtrace: {trace}: {says}\n"


def test_a_name_that_is_taken(tmp_path: Path, trace: Path) -> None:
    installed(tmp_path, "usurper", {"xentrace": "usurper:READER"}, GOOD)
    done = xtrace(tmp_path, "formats")
    assert "plug-in reader xentrace (usurper:READER) skipped: a reader of that name is there already" in done.stderr
