"""The parser behind sites.toml: a file that holds what is awkward in Xen's sources, and the census itself."""

from __future__ import annotations

import os
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

from xtrace import release
from xtrace.replay.sites import CALLS, REWINDS, call_sites, in_scope

ROOT = Path(__file__).parents[2]
ABI = ROOT / "xtrace" / "replay" / "abi"

SOURCE = """\
/* hypercall_create_continuation(in a comment) */
unsigned long hypercall_create_continuation(unsigned int op, const char *format, ...);

static inline int nothing(void) { return 0; }
int hypercall_xlat_continuation(unsigned int *id, unsigned int nr,
                                unsigned int mask, ...);

#define AGAIN(op) \\
    hypercall_create_continuation(op, "h", arg)

unsigned long hypercall_create_continuation(
    unsigned int op, const char *format, ...)
{
    return op;
}

static long __attribute__((noinline))
do_thing(unsigned long cmd, XEN_GUEST_HANDLE_PARAM(void) arg)
{
    for ( ; ; )
    {
        if ( preempted )
            return hypercall_create_continuation(
                __HYPERVISOR_thing, "lh", cmd, arg);
#ifdef CONFIG_A
        if ( a ) {
            rc = hypercall_create_continuation(1, "h", arg); /* '}' */
#else
        if ( b ) {
#endif
        }
out:
        printk("hypercall_create_continuation(");
    }
}

DO(other)(int cmd)
{
    BUG_ON(!hypercall_xlat_continuation(&left, 4, 0x01, nat_ops, cmp_uops));
    return hypercall_create_continuation(2, "h", arg);
}

int viridian_hypercall(struct cpu_user_regs *regs)
{
    return HVM_HCALL_preempted;
}

int hvm_hypercall(struct cpu_user_regs *regs)
{
    return curr->hcall_preempted ? HVM_HCALL_preempted : HVM_HCALL_completed;
}
"""


def test_parser() -> None:
    path = "xen/common/thing.c"
    assert call_sites(path, SOURCE) == [("AGAIN", 1), ("do_thing", 2), ("do_other", 2)]
    assert call_sites(path, SOURCE, CALLS["create"]) == [("AGAIN", 1), ("do_thing", 2), ("do_other", 1)]
    assert call_sites(path, SOURCE, CALLS["xlat"]) == [("do_other", 1)]
    assert call_sites(path, SOURCE, REWINDS) == [("viridian_hypercall", 1)]
    assert call_sites(path, "") == []


@pytest.mark.parametrize(
    ("path", "wanted"),
    [
        ("xen/arch/x86/mm.c", True),
        ("xen/include/asm-x86/hypercall.h", True),
        ("xen/arch/ppc/stubs.c", False),
        ("xen/arch/riscv/stubs.c", False),
        ("xen/include/asm-ia64/hypercall.h", False),
        ("xen/arch/powerpc/shadow.c", False),
        ("xen/arch/x86/x86_64/entry.S", False),
        ("tools/misc/xen.c", False),
    ],
)
def test_scope(path: str, wanted: bool) -> None:
    assert in_scope(path) == wanted
    assert bool(call_sites(path, SOURCE)) == wanted


def test_sites() -> None:
    """Each row is well formed, and a function has one number of calls at a release."""
    rows = tomllib.loads((ABI / "sites.toml").read_text())["site"]
    seen: set[tuple[str, str, str, str]] = set()
    for row in rows:
        assert row["kind"] in {*CALLS, "rewind"}
        assert in_scope(row["path"])
        assert row["calls"] > 0
        for version in release.expand(tuple(row["releases"])):
            key = (version, row["kind"], row["path"], row["function"])
            assert key not in seen
            seen.add(key)
    # Every release has at least those that were there from the start.
    for r in release.releases():
        for site in ("xen/common/memory.c:do_memory_op", "xen/common/multicall.c:do_multicall"):
            assert (r.version, "create", *site.split(":")) in seen


@pytest.mark.skipif("XTRACE_XEN_GIT" not in os.environ, reason="XTRACE_XEN_GIT names no Xen repository: not run")
def test_against_xen() -> None:
    command = [sys.executable, str(ROOT / "tools" / "extract_sites.py"), "--xen-git", os.environ["XTRACE_XEN_GIT"], "--check"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
