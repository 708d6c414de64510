"""Cites are checked against a Xen tree: a real one where XTRACE_XEN_GIT names it, and a small one with wrong facts always."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path
from typing import Any

import pytest

from xtrace.replay import verify as verify_mod
from xtrace.replay.verify import verify
from xtrace.replay.xentree import XenTree, definition

SOURCE = """\
#define MEMOP_EXTENT_SHIFT 6 /* cmd[:6] == start_extent */
#define MEMOP_CMD_MASK     ((1 << MEMOP_EXTENT_SHIFT) - 1)

struct thing {
    unsigned int nr;
};

static int helper(int a);

long do_thing(unsigned long cmd,
              void *arg)
{
    if ( helper(cmd) )
        return -EINVAL;
    return 0;
}

long do_other(void)
{
    return -ENOSYS;
}
"""


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    def git(*args: str) -> None:
        name = ["-c", "user.name=t", "-c", "user.email=t@example.org"]
        subprocess.run(["git", "-C", str(tmp_path), *name, *args], check=True, capture_output=True)

    git("init", "-q")
    (tmp_path / "a.c").write_text(SOURCE)
    git("add", "-A")
    git("commit", "-qm", "one")
    git("tag", "ONE")
    (tmp_path / "a.c").write_text(SOURCE.replace("SHIFT 6", "SHIFT 7"))
    git("commit", "-qam", "two")
    git("tag", "TWO")
    return tmp_path


def test_definition() -> None:
    assert definition(SOURCE, "MEMOP_EXTENT_SHIFT", "a.c") == SOURCE.splitlines()[0]
    body = definition(SOURCE, "do_thing", "a.c")
    assert body is not None
    assert "-EINVAL" in body
    assert "-ENOSYS" not in body
    assert "nr" in (definition(SOURCE, "struct thing", "a.c") or "")
    assert definition(SOURCE, "nowhere", "a.c") is None


CASES = [
    ({"symbol": "MEMOP_EXTENT_SHIFT", "expect": "6"}, None),
    ({"symbol": "MEMOP_EXTENT_SHIFT", "expect": r"SHIFT\s+4"}, "does not hold"),  # a shift changed
    ({"symbol": "MEMOP_EXTENT_SHIFT", "expect": r"SHIFT\s+6", "also": ["TWO"]}, "does not hold"),  # a range one tag too long
    ({"symbol": "do_thing", "expect": "-EINVAL"}, None),
    ({"symbol": "do_thing", "expect": "-ENOSYS"}, "does not hold"),  # it stands in the next function only
    ({"symbol": "do_gone", "expect": "x"}, "does not define"),
    ({"symbol": "do_thing", "expect": "x", "path": "b.c"}, "is not there"),
    ({"symbol": "do_thing", "lacks": "EINVAL"}, "holds"),
    ({"symbol": "do_thing", "expect": "arg", "tag": "THREE"}, "is not there"),
    ({"symbol": "do_thing", "expect": "arg", "commit": "0123456789ab"}, "no such commit"),
]


@pytest.mark.parametrize(("cite", "problem"), CASES)
def test_wrong_facts_are_caught(tree: Path, cite: dict[str, Any], problem: str | None, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = {"tag": "ONE", "path": "a.c", **cite}
    monkeypatch.setattr(verify_mod, "cites", lambda: iter([("x.toml", "c", whole)]))
    with XenTree(str(tree)) as t:
        problems = [c.problem for c in verify(t) if c.problem]
    if problem is None:
        assert not problems
    else:
        assert len(problems) == 1
        assert problem in problems[0]


@pytest.mark.skipif("XTRACE_XEN_GIT" not in os.environ, reason="XTRACE_XEN_GIT names no Xen repository: not run")
def test_against_xen() -> None:
    with XenTree(os.environ["XTRACE_XEN_GIT"]) as t:
        checked = list(verify(t))
    assert len(checked) > 1500
    assert [c for c in checked if c.problem] == []
