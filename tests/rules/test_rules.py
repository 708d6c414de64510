"""Each rule has traces that show it (``xtrace/analyze/rules/XT…``); what they yield stands beside them.

After a wanted change: ``XTRACE_UPDATE=1 python -m pytest tests/rules`` writes ``expected.json`` and ``docs/rules.md`` anew.
A new case needs a log, a ``[[case]]`` in ``rule.toml``, and that.
"""

from __future__ import annotations

import json
import os
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from xtrace.analyze import rules
from xtrace.analyze.exposure import exit_bits
from xtrace.cli.app import run
from xtrace.errors import FactError, UsageError
from xtrace.release import get as release_of

ROOT = Path(__file__).parents[2]
FOLDER = Path(rules.__file__).parent
CASES = [case for rule in rules.rules().values() for case in rule.cases]
UPDATE = bool(os.environ.get("XTRACE_UPDATE"))


def ids() -> dict[str, str]:
    lines = (Path(__file__).parent / "ids.txt").read_text().splitlines()
    return dict(line.split() for line in lines if line and not line.startswith("#"))


def shortened(document: dict[str, Any]) -> dict[str, Any]:
    """What an example is there to show; wording and decodings are tested elsewhere."""
    verdicts = [(r, t) for r in document["surface"] for t in r["targets"] if t["code"]]
    return {
        "findings": [{k: f[k] for k in ("code", "line", "evidence", "errno", "targets")} for f in document["findings"]],
        "surface": [{"code": t["code"], "hypercall": r["hypercall"], "subop": r["subop"]} for r, t in verdicts],
        "trace": [{k: f[k] for k in ("code", "line", "text", "exit_bits")} for f in document["trace"]],
    }


def codes(shown: dict[str, Any]) -> set[str]:
    return {row["code"] for part in shown.values() for row in part}


@pytest.mark.parametrize("case", CASES, ids=lambda c: f"{c.code}-{c.name}")
def test_case(case: rules.Case, capsys: pytest.CaptureFixture[str]) -> None:
    log = FOLDER / case.code / f"{case.name}.log"
    status = run(["analyze", str(log), *shlex.split(case.args), "--format", "json"])
    shown = shortened(json.loads(capsys.readouterr().out))
    assert (case.code in codes(shown)) == case.name.startswith("bad"), codes(shown)
    assert status == case.status
    path = FOLDER / case.code / "expected.json"
    expected = json.loads(path.read_text()) if path.exists() else {}
    if UPDATE:
        path.write_text(json.dumps({**expected, case.name: shown}, indent=1) + "\n")
        return
    assert shown == expected[case.name]


def test_no_case_is_forgotten() -> None:
    for rule in rules.rules().values():
        names = [c.name for c in rule.cases]
        assert len(set(names)) == len(names)
        assert all(n.startswith(("bad", "good")) for n in names)
        if rule.retired is None and rule.no_case is None:
            assert {n.split("-")[0] for n in names} == {"bad", "good"}, rule.code
        files = {p.name for p in (FOLDER / rule.code).iterdir()}
        logs = {f"{n}.log" for n in names}
        assert files == logs | {"rule.toml"} | ({"expected.json"} if logs else set())
        if logs:
            assert set(json.loads((FOLDER / rule.code / "expected.json").read_text())) == set(names)


def test_codes_are_never_reused() -> None:
    """What was published once keeps its number and its name; what is new is added to the list."""
    assert {code: rule.name for code, rule in rules.rules().items()} == ids()
    assert len(set(ids().values())) == len(ids())


@pytest.mark.parametrize("rule", [r for r in rules.rules().values() if r.kind in ("outcome", "caveat")], ids=lambda r: r.code)
def test_severity_is_what_the_exit_status_says(rule: rules.Rule) -> None:
    caveat = rule.kind == "caveat"
    outcome = "resumes" if caveat else rule.name

    def bits(evidence: str, migrates: bool | None) -> int:
        return exit_bits(outcome, harmless=False, caveats=caveat, evidence=evidence, migrates=migrates)

    s = rule.severity
    assert (s.proved, s.proved, s.proved_stays) == tuple(bits("proved", m) for m in (True, None, False))
    assert {bits("inferred", m) for m in (True, None, False)} == {s.inferred}
    assert s.always is None


def test_trace_rules_say_which_bit() -> None:
    for rule in rules.rules().values():
        if rule.kind == "trace":
            own = json.loads((FOLDER / rule.code / "expected.json").read_text())["bad"]["trace"]
            assert {row["exit_bits"] for row in own if row["code"] == rule.code} == {rule.severity.always}


def test_the_page_is_current(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["explain", "--all", "--format", "markdown"]) == 0
    page = capsys.readouterr().out
    path = ROOT / "docs" / "rules.md"
    if UPDATE:
        path.write_text(page)
    assert page == path.read_text()


def test_pages_fit_a_terminal(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["explain", "--all"]) == 0
    for line in capsys.readouterr().out.splitlines():
        assert len(line) <= 80, line


def test_as_data(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["explain", "--format", "json"]) == 0
    rows = json.loads(capsys.readouterr().out)
    assert [row["code"] for row in rows] == list(rules.rules())
    assert run(["explain", "xt004", "--format", "json"]) == 0
    one = json.loads(capsys.readouterr().out)
    assert one == next(row for row in rows if row["code"] == "XT004")
    assert one["cases"][0]["log"].startswith("xtrace: header")


def test_an_example_is_a_trace() -> None:
    """The command line that a page shows does what the page says."""
    case = rules.get("XT004").cases[0]
    left, right = (shlex.split(part) for part in case.command.split("|"))
    log = subprocess.run([sys.executable, "-m", *left], capture_output=True, timeout=60, cwd=ROOT)
    done = subprocess.run([sys.executable, "-m", *right], input=log.stdout, capture_output=True, timeout=60, cwd=ROOT)
    assert done.returncode == case.status, done.stderr
    assert b"XT004 restarts" in done.stdout


@pytest.mark.parametrize(
    ("asked", "hint"),
    [("XT4", "XT004"), ("4", "XT004"), ("XT0O4", "XT004"), ("misdirect", "misdirected"), ("XT999", "XT009"), ("", "XT001 to")],
)
def test_near_misses(asked: str, hint: str) -> None:
    with pytest.raises(UsageError, match=hint) as caught:
        rules.get(asked)
    assert caught.value.exit_bits == 3


@pytest.mark.parametrize(
    ("args", "words"),
    [
        (["XT001", "--all"], "--all"),
        (["--example", "bad"], "code"),
        (["XT001", "--example", "ugly"], "bad and good"),
        (["XT035", "--example", "bad"], "suppressions"),
        (["XT001", "--format", "xml"], "xml"),
    ],
)
def test_wrong_use(args: list[str], words: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["explain", *args]) == 3
    out = capsys.readouterr()
    assert words in out.err
    assert not out.out


@pytest.mark.parametrize(
    "text",
    [
        "name = ",
        'name = "x"',
        'name = "x"\nkind = "odd"\ntitle = ""\nwhy = ""\nwhat_to_do = ""\n[severity]\nwords = ""',
        'name = "x"\nkind = "trace"\ntitle = ""\nwhy = ""\nwhat_to_do = ""\ncolour = "red"\n[severity]\nwords = ""',
        'name = "x"\nkind = "trace"\ntitle = ""\nwhy = ""\nwhat_to_do = ""\n[severity]\nloud = 1',
    ],
)
def test_malformed_rules(text: str) -> None:
    with pytest.raises(FactError, match="XT999"):
        rules.parse("XT999", text)


def test_a_retired_rule_says_so() -> None:
    from xtrace.report import rules_markdown, rules_text

    text = 'name = "x"\nkind = "trace"\ntitle = "X"\nwhy = "W."\nwhat_to_do = "D."\n'
    text += 'retired = "Folded into XT001."\n[severity]\nwords = "S."'
    rule = rules.parse("XT998", text)
    assert "  Folded into XT001." in list(rules_text.lines(rule))
    assert any("(retired)" in line for line in rules_text.listing([rule]))
    assert any("*Retired.* Folded" in line for line in rules_markdown.page([rule]))


def test_wrong_result_is_shown() -> None:
    """An example of every outcome is known: should one go, its rule must say why there is none."""
    assert all(r.cases for r in rules.rules().values() if r.kind in ("outcome", "caveat", "surface", "trace"))


@pytest.mark.parametrize("rule", rules.rules().values(), ids=lambda r: r.code)
def test_references(rule: rules.Rule) -> None:
    """With XTRACE_XEN_GIT: the commits exist, name their advisory and are in the release that is said to be the first."""
    for r in rule.references:
        assert (r.commit is None) == (r.path is not None) == (r.tag is not None)
        if r.since:
            release_of(r.since)
    git = os.environ.get("XTRACE_XEN_GIT")
    if not git:
        pytest.skip("XTRACE_XEN_GIT names no Xen tree")

    def ask(*args: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(["git", "-C", git, *args], capture_output=True, text=True, timeout=60, errors="replace")

    for r in rule.references:
        if r.commit is None:
            shown = ask("show", f"{r.tag}:{r.path}")
            assert shown.returncode == 0
            assert r.symbol is not None
            assert r.symbol in shown.stdout
            continue
        message = ask("log", "-1", "--format=%B", r.commit)
        assert message.returncode == 0, r.commit
        if r.xsa:
            assert f"XSA-{r.xsa}" in message.stdout
        tags = ask("tag", "--contains", r.commit).stdout.split()
        if f"RELEASE-{r.since}" in ask("tag", "-l", f"RELEASE-{r.since}").stdout.split():
            assert f"RELEASE-{r.since}" in tags, r.commit
