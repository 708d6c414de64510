"""Cites are checked against a Xen tree: a real one where XTRACE_XEN_GIT names it, and a small one with wrong facts always."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from xtrace.replay import drift
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


XEN_SOURCE = """\
long do_memory_op(unsigned long cmd)
{
    if ( hypercall_preempt_check() )
        return hypercall_create_continuation(__HYPERVISOR_memory_op, "lh", cmd, arg);
    return 0;
}

long do_new_op(void)
{
    /* hypercall_create_continuation() in a comment is no call */
    return 0;
}
"""


@pytest.fixture
def xen(tmp_path: Path) -> Path:
    """A repository with one release tag and a patch on top: a new call site, a second call, a number changed and one new."""

    def git(*args: str) -> None:
        name = ["-c", "user.name=t", "-c", "user.email=t@example.org"]
        subprocess.run(["git", "-C", str(tmp_path), *name, *args], check=True, capture_output=True)

    source, header = tmp_path / "xen/common/memory.c", tmp_path / "xen/include/public/memory.h"
    for path in (source, header):
        path.parent.mkdir(parents=True)
    git("init", "-q")
    source.write_text(XEN_SOURCE)
    header.write_text("#define XENMEM_exchange 11\n#define XENMEM_claim_pages 24\n")
    git("add", "-A")
    git("commit", "-qm", "release")
    git("tag", "RELEASE-4.22.0")
    call = 'return hypercall_create_continuation(__HYPERVISOR_memory_op, "lh", cmd, arg);'
    patched = XEN_SOURCE.replace("is no call */\n    return 0;", f"is no call */\n    {call}")
    source.write_text(patched.replace(call, f"{call}\n    if ( more )\n        {call}", 1))
    header.write_text("#define XENMEM_exchange 12\n#define XENMEM_foreigncopy 29 /* proposed */\n")
    git("commit", "-qam", "patch")
    git("tag", "PATCH")
    return tmp_path


def problems(repository: Path, tag: str | None) -> list[str]:
    with XenTree(str(repository)) as t:
        return [f"{c.file} {c.cite}: {c.problem}" for c in verify(t, tag) if c.problem]


def test_a_call_site_that_no_entry_claims(xen: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(verify_mod, "cites", lambda: iter([]))
    monkeypatch.setattr(drift, "claims", lambda: {"xen/common/memory.c:do_memory_op": "memory_op.toml"})
    assert problems(xen, None) == []
    monkeypatch.setattr(drift, "claims", dict)
    (found,) = problems(xen, None)
    assert "do_memory_op: creates continuations (1 calls) and no entry claims it" in found


def test_a_patch_is_guarded(xen: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(verify_mod, "cites", lambda: iter([]))
    monkeypatch.setattr(drift, "claims", lambda: {"xen/common/memory.c:do_memory_op": "memory_op.toml"})
    monkeypatch.setattr(drift, "_counts", lambda version: {"xen/common/memory.c:do_memory_op": 1})
    found = problems(xen, "PATCH")
    assert any("do_new_op: creates continuations (1 calls) and no entry claims it" in f for f in found)
    assert any("do_memory_op: 2 calls create continuations, 1 at" in f for f in found)
    assert any("XENMEM_exchange: = 12, was 11" in f for f in found)
    assert any("XENMEM_foreigncopy: = 29 is new" in f for f in found)
    assert any("XENMEM_claim_pages: is gone, was 24" in f for f in found)
    assert len(found) == 5
    assert problems(xen, "RELEASE-4.22.0") == []


REAL = pytest.mark.skipif("XTRACE_XEN_GIT" not in os.environ, reason="XTRACE_XEN_GIT names no Xen repository: not run")


@REAL
def test_against_xen() -> None:
    with XenTree(os.environ["XTRACE_XEN_GIT"]) as t:
        checked = list(verify(t))
    assert len(checked) > 1500
    assert [c for c in checked if c.problem] == []


@REAL
def test_seeded_faults_are_caught_in_the_real_history(monkeypatch: pytest.MonkeyPatch) -> None:
    """A shift changed, a tag off by one, a claim dropped: each is found, and nothing else is."""
    real, claimed = list(verify_mod.cites()), drift.claims()

    def seeded() -> Iterator[tuple[str, str, dict[str, Any]]]:
        for file, name, cite in real:
            if (file, name) == ("memory_op.toml", "MEMOP_EXTENT_SHIFT-6"):
                yield file, name, {**cite, "expect": "SHIFT 7"}
                yield file, f"{name}-early", {**cite, "tag": "3.3.0-branched", "also": []}
            else:
                yield file, name, cite

    monkeypatch.setattr(verify_mod, "cites", seeded)
    site = "xen/common/memory.c:acquire_resource"
    assert site in claimed
    monkeypatch.setattr(drift, "claims", lambda: {k: v for k, v in claimed.items() if k != site})
    with XenTree(os.environ["XTRACE_XEN_GIT"]) as t:
        found = {(c.cite, (c.problem or "")[:20]) for c in verify(t) if c.problem}
    assert {c for c, _ in found} == {"MEMOP_EXTENT_SHIFT-6", "MEMOP_EXTENT_SHIFT-6-early", "acquire_resource"}
