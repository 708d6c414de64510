"""What real releases answered to foreign continuations contradicts nothing in the model (samples/resume/README.md)."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest

from xtrace import release
from xtrace.replay import factfiles, facts
from xtrace.replay import hypervisor as hv
from xtrace.replay.hypervisor import Hypervisor
from xtrace.replay.states import States

SAMPLES = Path(__file__).parents[2] / "samples" / "resume"

#: Rows whose -ENOSYS comes from what the structure holds, not from how the continuation is read.
CONTENT = (
    "mem-memory_map-",  # no map was set for that domain
    "mem-machphys_compat-",  # with 4 bits: XENMEM_memory_map again
    "mmuext-req",  # a request of the list whose own cmd the release does not know
)

#: Rows refused for what they name before the test that the model knows of is made.
NAMED = {
    "vcpu-14-v3": "-ENOENT",  # the domain has no such vCPU
    "hd-domctl23": "-EINVAL",  # the domain is not shut down for a soft reset
    "evt14-dom5000": "-ESRCH",
    "evt-reset_cont_dom5000-plain": "-ESRCH",
}

RESERVATION = ("XENMEM_decrease_reservation", "XENMEM_populate_physmap", "XENMEM_increase_reservation")


def rows() -> list[dict[str, Any]]:
    out = []
    for path in sorted(SAMPLES.glob("*.jsonl.zst")):
        text = pa.CompressedInputStream(pa.OSFile(str(path)), "zstd").read().decode()
        out += [json.loads(line) for line in text.splitlines()]
    return out


def number(value: Any) -> int | None:
    try:
        return int(value, 0) if isinstance(value, str) else value if isinstance(value, int) else None
    except ValueError:
        return None


ROWS = [r for r in rows() if r["op"] in facts.files() and r["ret"] is not None]


@pytest.mark.parametrize("caller", ["pv64", "pv32"])
@pytest.mark.parametrize("target", sorted({r["target"] for r in ROWS}))
def test_real_answers(target: str, caller: str) -> None:
    version = release.parse(target).releases[0].version
    seen: Counter[str] = Counter()
    for r in (r for r in ROWS if r["target"] == target and r["caller"] == caller):
        if "-versions-" in r["id"]:
            continue  # one row for many calls, each with another interface version
        memory = {k: [number(v)] for k, v in r["memory_before"].items() if number(v) is not None}
        words = r["memory_before"].get("words")
        if facts.command_at(r["op"]) == "mem.cmd" and words and "cmd" not in memory:
            head = int(words[0], 0)  # uint32_t cmd, interface_version: words of 64 bits, or of 32
            memory["cmd"] = [head & 0xFFFFFFFF]
            memory.setdefault("interface_version", [head >> 32 if caller == "pv64" else int(words[1], 0)])
        states = States.of([[number(a) for a in r["args"]]], memory)
        got = Hypervisor(version, caller).resume(r["op"], states, "control")
        disposition, where = got.disposition[0], (r["id"], target, r["what_happened"])
        if disposition == hv.REFUSED:
            if r["memory_before"].get("domid") == "self" and r["errno"] == "-ESRCH":
                continue  # acquire_resource of oneself is refused before the index is looked at: no call gets that far
            if r["errno"] == NAMED.get(r["id"], ""):
                continue
            # A refusal that the model claims is the one that the hypervisor gave.
            assert got.errno_of(0) in (None, r["errno"]), where
            seen["refused"] += 1
            continue
        if not r["id"].startswith(CONTENT):
            assert r["errno"] != "-ENOSYS", where
        seen["entered"] += 1
        read = got.decoded
        family = r["id"].split("-")[0] in ("dec", "pop", "inc")
        if family and read.operation(0) in RESERVATION and read.total.known[0] and "start" not in r["id"]:
            index, total = int(read.index.value[0]), int(read.total.value[0])
            if disposition == hv.ENDS:
                assert r["ret"] == index, where
            elif "already gone" in r["what_happened"]:
                # Begun too early, at a frame given back before: it stops there and returns that index.
                assert r["ret"] == index, where
                assert index < r["memory_before"]["really_done_before"], where
            else:
                assert r["ret"] == total, where
                assert r["items_processed"] is None or r["items_processed"] <= total - index, where
            seen["measured"] += 1
    assert seen["refused"] > 50
    assert seen["measured"] > 30


def test_interface_versions_are_those_that_xen_accepts() -> None:
    """Each version from 0 to 0x22 was tried: the only one not refused with -EACCES is the one in numbers.toml."""
    checked = 0
    for r in rows():
        name = {36: "XEN_DOMCTL_INTERFACE_VERSION", 35: "XEN_SYSCTL_INTERFACE_VERSION"}.get(r["op"])
        accepted = r["memory_after"].get("versions_not_refused_with_EACCES")
        if name is None or not accepted or len(accepted) > 1:
            continue
        version = release.parse(r["target"]).releases[0].version
        assert int(next(iter(accepted)), 16) == factfiles.interface_version(name, version), (r["id"], version)
        checked += 1
    assert checked > 100
