"""Examples in the README and in the rules are run; their output is what stands there.

After a wanted change: ``XTRACE_UPDATE=1 python -m pytest tests/test_docs.py`` writes the new output.
"""

from __future__ import annotations

import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from xtrace.analyze import rules

ROOT = Path(__file__).parents[1]
README = ROOT / "README.md"
EXAMPLE = re.compile(r"<!-- example: status (\d+) -->\n```console\n\$ xtrace (.*)\n((?:.*\n)*?)```\n")


def run(words: list[str]) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-m", "xtrace", *words], capture_output=True, text=True, timeout=120, cwd=ROOT)


def examples() -> list[tuple[str, str, str]]:
    return EXAMPLE.findall(README.read_text())


def test_there_are_examples() -> None:
    assert len(examples()) >= 3


@pytest.mark.parametrize("example", examples(), ids=lambda e: e[1][:40])
def test_readme(example: tuple[str, str, str]) -> None:
    status, command, shown = example
    done = run(shlex.split(command))
    assert done.returncode == int(status), done.stderr
    wanted = "\n".join(line.rstrip() for line in done.stdout.splitlines()) + "\n"
    if os.environ.get("XTRACE_UPDATE"):
        README.write_text(README.read_text().replace(f"$ xtrace {command}\n{shown}", f"$ xtrace {command}\n{wanted}"))
        return
    assert shown == wanted


def test_python_example() -> None:
    code = re.search(r"```python\n(.*?)```", README.read_text(), re.S)
    assert code
    done = subprocess.run([sys.executable, "-c", code[1]], capture_output=True, text=True, timeout=120, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    assert "XT" in done.stdout


@pytest.mark.parametrize("rule", [r for r in rules.rules().values() if r.example], ids=lambda r: r.code)
def test_each_rule_shows_itself(rule: rules.Rule) -> None:
    """The example of a rule really yields its code."""
    done = run(shlex.split(rule.example))
    assert done.returncode in (4, 8), done.stderr
    assert f"  {rule.code}: {rule.title}" in done.stdout


def test_rules_are_stable() -> None:
    """Codes are never reused: this list only grows."""
    names = {code: r.name for code, r in rules.rules().items()}
    assert names["XT001"] == "misdirected"
    assert list(names)[:11] == [f"XT{k:03d}" for k in range(1, 12)]
    assert len(set(names.values())) == len(names)


def test_the_gate_runs_what_the_readme_says() -> None:
    gate = (ROOT / ".ci" / "run").read_text()
    command = re.search(r"\.venv/bin/(python -m pytest.*)", README.read_text())
    assert command
    assert command[1] in gate


def test_nothing_points_outside() -> None:
    """The project does not depend on, or speak of, the place where it was made."""
    for path in [*ROOT.rglob("*.py"), *ROOT.rglob("*.md"), *ROOT.rglob("*.toml")]:
        if ".venv" in path.parts or path == Path(__file__):
            continue
        assert "/work/" not in path.read_text(errors="replace"), path
