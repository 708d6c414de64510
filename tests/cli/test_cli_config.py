"""Settings on the command line: what each command takes, ``xtrace config``, and suppressions that change an exit status."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import typer.main

from xtrace.cli.app import app
from xtrace.config.options import OPTIONS

SAMPLES = Path(__file__).parents[2] / "samples"
TRACE = SAMPLES / "dom0-4.17.7" / "j5_tiny_pv.xentrace"

#: Options of analyze that belong to one run and are not written down.
ONE_RUN = {"--one-recording", "--follow", "--idle", "--output", "--verbose", "--help", "--path"}

SETTINGS = """\
[options]
from = "4.17.7"
to = "4.18"
caller = "pv64"
"""

ALL = """
[[suppress]]
code = ["XT008", "XT010", "XT021"]
domain = "unknown"
from = "4.17"
to = "4.18"
reason = "a test machine"
"""


def xtrace(folder: Path, *args: str | Path, **variables: str) -> subprocess.CompletedProcess[str]:
    environment = {k: v for k, v in os.environ.items() if not k.startswith("XTRACE_")}
    done = subprocess.run(
        [sys.executable, "-m", "xtrace", *map(str, args)], capture_output=True, text=True, timeout=120, cwd=folder,
        env={**environment, **variables},
    )  # fmt: skip
    assert "Traceback" not in done.stderr
    return done


def write(folder: Path, text: str, name: str = "xtrace.toml") -> None:
    (folder / name).write_text(text, encoding="utf-8")


def analysed(folder: Path, *args: str | Path, **variables: str) -> tuple[int, dict[str, Any], str]:
    done = xtrace(folder, "analyze", TRACE, "--format", "json", *args, **variables)
    return done.returncode, json.loads(done.stdout), done.stderr


# ── suppressions ─────────────────────────────────────────────────────────────────────────────────────────────────────


def test_a_suppression_changes_the_exit_status(tmp_path: Path) -> None:
    write(tmp_path, SETTINGS)
    status, before, _ = analysed(tmp_path)
    assert (status, before["summary"]["verdict"], before["suppressed"], before["suppressions"]) == (4, "review", [], [])
    write(tmp_path, SETTINGS + ALL)
    status, after, _ = analysed(tmp_path)
    assert (status, after["summary"]["verdict"], after["summary"]["exit_status"]) == (0, "safe", 0)
    assert after["findings"] == []
    assert [{k: v for k, v in f.items() if k != "suppressed"} for f in after["suppressed"]] == before["findings"]
    assert after["suppressed"][0]["suppressed"] == {"index": 0, "reason": "a test machine"}
    (said,) = after["suppressions"]
    assert (said["suppressed"], said["surface_suppressed"], said["code"], said["line"]) == (len(before["findings"]), 1, None, 6)
    marked = [t["suppressed"] for row in after["surface"] for t in row["targets"] if t["code"] == "XT021"]
    assert marked == [{"index": 0, "reason": "a test machine"}]
    text = xtrace(tmp_path, "analyze", TRACE)
    assert text.returncode == 0
    assert "a test machine" in text.stdout
    assert f"suppressed: {len(before['findings'])} findings and 1 surface verdict." in text.stdout.splitlines()[0]


def test_json_lines(tmp_path: Path) -> None:
    write(tmp_path, SETTINGS + ALL.replace(', "XT021"', ""))
    done = xtrace(tmp_path, "analyze", TRACE, "--format", "jsonl")
    assert done.returncode == 4
    kinds = [json.loads(line)["type"] for line in done.stdout.splitlines()]
    assert kinds.count("finding") == 0
    assert kinds.count("suppressed") > 10
    assert kinds[-1] == "summary"


def test_expired_and_unmatched_are_said(tmp_path: Path) -> None:
    other = '\n[[suppress]]\nhypercall = "hvm_op"\nreason = "no such guest"\n'
    write(tmp_path, SETTINGS + ALL + "expires = 2020-01-31\n" + other)
    status, document, _ = analysed(tmp_path)
    assert status == 4
    assert [s["code"] for s in document["suppressions"]] == ["XT036", "XT035"]
    assert document["suppressions"][0]["matched"] == len(document["findings"])
    notes = "\n".join(document["notes"])
    assert f"XT036 A suppression has expired: {tmp_path / 'xtrace.toml'}: line 6: code XT008|XT010|XT021" in notes
    assert "its last day was 2020-01-31; it no longer takes the" in notes
    assert "XT035 A suppression fits nothing: " in notes
    assert "line 14: hypercall hvm_op: nothing in this run fits it" in notes
    for code in ("XT035", "XT036"):
        assert code in xtrace(tmp_path, "explain", code).stdout


def test_an_incomplete_trace_cannot_be_accepted(tmp_path: Path) -> None:
    cut = tmp_path / "cut.xentrace"
    cut.write_bytes(TRACE.read_bytes()[:40_001])
    write(tmp_path, SETTINGS + ALL)
    assert xtrace(tmp_path, "analyze", cut).returncode == 16
    write(tmp_path, SETTINGS + ALL.replace("XT008", "XT030"))
    done = xtrace(tmp_path, "analyze", cut)
    assert done.returncode == 3
    assert "XT030 cannot be suppressed" in done.stderr


@pytest.mark.parametrize(
    ("text", "says"),
    [
        (ALL.replace("XT008", "XT999"), "line 6: suppress.code: no rule is called 'XT999'"),
        ('[[suppress]]\nhypercall = "memery_op"\nreason = "x"', "did you mean 'memory_op'?"),
        (ALL.replace("reason", "reson"), "no key is called 'suppress.reson'; did you mean 'reason'?"),
        ('[[suppress]]\ncode = "XT008"', "suppress has no reason"),
        ("format_ = 1", "no key is called 'options.format_'; did you mean 'format'?"),
        ('input_format = "xentrase"', "input_format cannot be 'xentrase'; did you mean 'xentrace'?"),
    ],
)
def test_malformed(tmp_path: Path, text: str, says: str) -> None:
    write(tmp_path, SETTINGS + text)
    for command in ("analyze", TRACE), ("config",):
        done = xtrace(tmp_path, *command)
        assert done.returncode == 3
        assert says in done.stderr
        assert str(tmp_path / "xtrace.toml") in done.stderr
        assert not done.stdout
    # What takes no settings does not care, and help is always there.
    assert xtrace(tmp_path, "explain", "XT001").returncode == 0
    assert xtrace(tmp_path, "analyze", "--help").returncode == 0


# ── options ──────────────────────────────────────────────────────────────────────────────────────────────────────────


def test_what_goes_first(tmp_path: Path) -> None:
    write(tmp_path, SETTINGS.replace("4.18", "4.19"))
    place = tmp_path / "xtrace.toml"
    for args, variables, series, note in (
        ((), {}, "4.19", f"--to 4.19, as {place}, line 3 says"),
        ((), {"XTRACE_TO": "4.20,4.21"}, "4.20", "--to 4.20, 4.21, as XTRACE_TO says"),
        (("--to", "4.22"), {"XTRACE_TO": "4.20"}, "4.22", None),
        (("--config", "none", "--from", "4.17.7", "--to", "4.18"), {}, "4.18", None),
        (("--config=none", "--from", "4.17.7"), {"XTRACE_TO": "4.21"}, "4.21", "--to 4.21, as XTRACE_TO says"),
    ):
        _, document, _ = analysed(tmp_path, *args, **variables)
        assert document["summary"]["targets"][0]["targets"][0].startswith(series)
        assert [n for n in document["notes"] if n.startswith("--to")] == ([note] if note else [])


def test_what_said_the_release_is_told(tmp_path: Path) -> None:
    write(tmp_path, SETTINGS)
    for args, variables, origin in (
        ((), {}, f"{tmp_path / 'xtrace.toml'}, line 2"),
        ((), {"XTRACE_FROM": "4.17.7"}, "XTRACE_FROM"),
        (("--from", "4.17.7"), {}, "--from"),
    ):
        assert analysed(tmp_path, *args, **variables)[1]["inputs"][0]["source_from"] == origin


def test_fail_on_and_format(tmp_path: Path) -> None:
    write(tmp_path, SETTINGS + 'fail_on = ["break", "incomplete"]\nformat = "json"\n')
    done = xtrace(tmp_path, "analyze", TRACE)
    assert done.returncode == 0
    assert json.loads(done.stdout)["summary"]["verdict"] == "review"
    assert xtrace(tmp_path, "analyze", TRACE, "--fail-on", "review").returncode == 4


def test_both_files(tmp_path: Path) -> None:
    write(tmp_path, SETTINGS)
    write(tmp_path, '[tool.xtrace.options]\nto = "4.22"', "pyproject.toml")
    _, document, stderr = analysed(tmp_path)
    assert document["summary"]["targets"][0]["targets"][0] == "4.18.0"
    assert f"settings are taken from {tmp_path / 'xtrace.toml'}; those of {tmp_path / 'pyproject.toml'} are not read" in stderr
    (tmp_path / "xtrace.toml").unlink()
    _, document, stderr = analysed(tmp_path, "--from", "4.17.7")
    assert document["summary"]["targets"][0]["targets"][0] == "4.22.0"
    assert "not read" not in stderr


def test_settings_beside_a_trace_that_do_not_count_are_said(tmp_path: Path) -> None:
    there = tmp_path / "there"
    here = tmp_path / "here"
    there.mkdir()
    here.mkdir()
    (there / "t.xentrace").write_bytes(TRACE.read_bytes())
    write(there, SETTINGS + ALL)
    done = xtrace(here, "analyze", there / "t.xentrace", "--from", "4.17.7", "--to", "4.18", "--caller", "pv64")
    assert done.returncode == 4
    assert f"note: the settings in {there / 'xtrace.toml'} do not count here" in done.stdout
    done = xtrace(here, "analyze", there / "t.xentrace", "--config", there / "xtrace.toml")
    assert done.returncode == 0
    assert "do not count" not in done.stdout


def test_other_commands(tmp_path: Path) -> None:
    write(tmp_path, '[options]\ncaller = "pv64"\ntsc_khz = 2596122\ninput_format = "xentrace"\n')
    done = xtrace(tmp_path, "replay", TRACE, "--at", "4.17.7")
    assert done.returncode == 0
    assert f"xtrace: --caller pv64, as {tmp_path / 'xtrace.toml'}, line 2 says" in done.stderr
    assert "--tsc-khz" in xtrace(tmp_path, "ingest", TRACE, "-o", tmp_path / "e.csv").stderr
    assert xtrace(tmp_path, "identify", TRACE, XTRACE_CALLER="pv46").returncode == 3


# ── xtrace config ────────────────────────────────────────────────────────────────────────────────────────────────────


def test_config_text(tmp_path: Path) -> None:
    write(tmp_path, SETTINGS + ALL + "expires = 2020-01-31\n")
    write(tmp_path, "[tool.xtrace.options]\n", "pyproject.toml")
    done = xtrace(tmp_path, "config", XTRACE_FAIL_ON="break", XTRACE_TOO="4.18")
    assert done.returncode == 0
    lines = done.stdout.splitlines()
    assert f"file: {tmp_path / 'xtrace.toml'}" in " ".join(lines)
    for name, value, origin in (
        ("from", "4.17.7", "the file, line 2"),
        ("fail_on", "break", "XTRACE_FAIL_ON"),
        ("tsc_khz", "not set", "default"),
    ):
        assert [name, *value.split(), *origin.split()] in [line.split() for line in lines]
    assert "(expired: does not count)" in " ".join(done.stdout.split())
    assert "a test machine" in done.stdout
    assert "not read:" in done.stdout
    assert "did you mean XTRACE_TO?" in done.stderr
    assert all(len(line) <= 80 for line in lines if str(tmp_path) not in line)


def test_config_json(tmp_path: Path) -> None:
    write(tmp_path, SETTINGS + ALL)
    done = xtrace(tmp_path, "config", "--format", "json", XTRACE_TO="4.18,4.19")
    document = json.loads(done.stdout)
    assert document["file"] == str(tmp_path / "xtrace.toml")
    assert document["options"]["to"] == {
        "value": ["4.18", "4.19"],
        "kind": "environment",
        "origin": "XTRACE_TO",
        "line": None,
        "variable": "XTRACE_TO",
        "flag": "--to",
        "commands": ["analyze", "inspect"],
    }
    assert list(document["options"]) == [o.name for o in OPTIONS]
    assert document["suppressions"][0]["expired"] is False
    assert xtrace(tmp_path, "config", "--format", "xml").returncode == 3
    assert xtrace(tmp_path, "config", "--config").returncode == 3
    assert xtrace(tmp_path, "config", "--config", "missing").returncode == 1


def test_the_table_agrees_with_the_commands() -> None:
    commands = typer.main.get_command(app).commands  # type: ignore[attr-defined]
    for option in OPTIONS:
        for name in option.commands:
            (parameter,) = [p for p in commands[name].params if option.flag in p.opts]
            assert parameter.name == option.parameter
            assert bool(parameter.multiple) == option.several
            if name == "analyze":
                assert (parameter.default or None) == option.default
    flags = {o.flag for o in OPTIONS}
    missing = {p.opts[0] for p in commands["analyze"].params if p.opts[0].startswith("--")} - flags - ONE_RUN
    assert not missing, f"{missing} can be neither written down nor belongs to one run"
    for name, command in commands.items():
        for parameter in getattr(command, "params", ()):
            assert "--config" not in parameter.opts, name
