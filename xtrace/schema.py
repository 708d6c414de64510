"""The tables that flow between the rooms, each with its columns, types and meaning.

Tables travel as Polars frames (Arrow memory). A null means *not recorded*; it never stands for zero. Enumerations are
small integers with names (Arrow dictionaries once written).
"""

from __future__ import annotations

from typing import Final

import polars as pl

__all__ = (
    "ARGS",
    "BY",
    "CALLERS",
    "CALLS",
    "CONTINUATIONS",
    "EVENTS",
    "EVIDENCE",
    "FINDINGS",
    "INNER",
    "KINDS",
    "MEMORY",
    "OUTCOMES",
    "READING",
    "SCHEMA_VERSION",
    "empty",
)

#: Version of the tables and of ``analyze --format json`` (see docs/json.md).
SCHEMA_VERSION: Final = 1

#: ABI of the calling vCPU.
CALLERS: Final = ("pv64", "pv32", "hvm64", "hvm32", "pvh64", "arm64", "arm32")

#: What an event is. ``hypercall`` is a PV entry record, ``vmmcall`` an HVM one, ``subcall`` an entry of a multicall being
#: started, ``sample`` the registers of a stopped vCPU, ``return`` the end of a call (text logs only).
KINDS: Final = (
    "hypercall",
    "vmmcall",
    "subcall",
    "return",
    "sample",
    "vmexit",
    "vmentry",
    "schedule",
    "suspend",
    "resume",
    "lost",
)

#: How a trace shows a thing (DESIGN: proved, inferred, unobservable).
EVIDENCE: Final = ("proved", "inferred", "unobservable")

#: What ties an entry to the one before it, strongest first: its own content (flag, continuation bits, redirect, a register
#: sample), arithmetic between the two (count, pointer), or the sequence of records alone.
BY: Final = ("explicit", "arithmetic", "sequence")

#: In the order in which they are tried: the first that applies is the verdict.
OUTCOMES: Final = (
    "absent",
    "misdirected",
    "refused",
    "skips",
    "redoes",
    "restarts",
    "lost",
    "wrong_result",
    "resumes",
)

#: Registers arg0…arg5 in Xen's order: rdi rsi rdx r10 r8 r9 (64-bit), ebx ecx edx esi edi ebp (32-bit).
ARGS: Final = ("arg0", "arg1", "arg2", "arg3", "arg4", "arg5")

#: Guest memory behind a call: Xen's own field names (``nr_extents``, ``in.nr_extents``, ``entry.op``, ``pdone``).
MEMORY: Final = pl.List(pl.Struct({"field": pl.String, "value": pl.UInt64}))

_FIELDS: Final = {
    "hypercall": pl.String(),
    "subop": pl.String(),
    "progress": pl.UInt64(),
    "remaining": pl.UInt64(),
    "unit": pl.String(),
    "total": pl.UInt64(),
    "home": pl.String(),
}

#: A decoding without a further one inside.
INNER: Final = pl.Struct(_FIELDS)

#: A decoding: hypercall, sub-operation, progress, remaining, unit, total, progress home, the call inside a multicall.
READING: Final = pl.Struct({**_FIELDS, "inner": INNER})

_CALLER = pl.Enum(CALLERS)
_KIND = pl.Enum(KINDS)
_EVIDENCE = pl.Enum(EVIDENCE)
_BY = pl.Enum(BY)

#: One row per record that matters.
EVENTS: Final = pl.Schema(
    {
        "seq": pl.UInt64(),  # position in time order over the whole recording, from 0
        "offset": pl.UInt64(),  # byte of the record's first byte in the decompressed stream
        "line": pl.UInt64(),  # line number from 1, text formats only
        "tsc": pl.UInt64(),  # raw time stamp counter; records without one inherit the previous one of their pCPU
        "time_ns": pl.Int64(),  # since TSC 0; null without a known TSC frequency
        "pcpu": pl.UInt32(),
        "segment": pl.UInt32(),  # raised by one each time the TSC of this pCPU steps back
        "domid": pl.UInt16(),
        "vcpu": pl.UInt32(),
        "caller": _CALLER,
        "kind": _KIND,
        # hypercall number; for schedule/suspend/resume/lost: the trace event's own number, null where the format has none
        "op": pl.UInt32(),
        "arg0": pl.UInt64(),  # lost events: the TSC at which dropping began, null where that is not known
        "arg1": pl.UInt64(),
        "arg2": pl.UInt64(),
        "arg3": pl.UInt64(),
        "arg4": pl.UInt64(),
        "arg5": pl.UInt64(),
        "cut": pl.UInt8(),  # bit n set: the recorder cut argument n to its low 32 bits
        "rip": pl.UInt64(),
        "on_insn": pl.Boolean(),  # samples: rip is known to stand on the hypercall instruction
        # return events; lost events: the number of records lost, null where that is not known (damage, no count)
        "result": pl.Int64(),
        "memory": MEMORY,
        "input": pl.UInt32(),  # which of several inputs that make up one recording; null: there is one
    }
)

#: One row per logical call: a first entry, its re-entries, its return.
CALLS: Final = pl.Schema(
    {
        "call": pl.UInt64(),  # number of the call, from 0
        "seq": pl.UInt64(),  # event of the first entry
        "last_seq": pl.UInt64(),  # event of the last entry, sample or return seen of it
        "offset": pl.UInt64(),
        "line": pl.UInt64(),
        "tsc": pl.UInt64(),
        "domid": pl.UInt16(),
        "vcpu": pl.UInt32(),
        "caller": _CALLER,
        "op": pl.UInt32(),
        "entries": pl.UInt32(),  # executions of the hypercall instruction that were stitched together
        "samples": pl.UInt32(),
        "result": pl.Int64(),
        "evidence": _EVIDENCE,  # the weakest link of the chain; proved for a call of one entry
        "by": _BY,  # what the weakest link rests on; null for a call of one entry
    }
)

#: One row per continuation: the registers (and memory) left behind at one preemption.
CONTINUATIONS: Final = pl.Schema(
    {
        "call": pl.UInt64(),  # null when the call it belongs to was not seen
        "seq": pl.UInt64(),
        "offset": pl.UInt64(),
        "line": pl.UInt64(),
        "tsc": pl.UInt64(),
        "domid": pl.UInt16(),
        "vcpu": pl.UInt32(),
        "caller": _CALLER,
        "kind": _KIND,
        "op": pl.UInt32(),
        **{name: pl.UInt64() for name in ARGS},
        "cut": pl.UInt8(),
        "rip": pl.UInt64(),
        "memory": MEMORY,
        "input": pl.UInt32(),
        "evidence": _EVIDENCE,
        "by": _BY,
        "issued_seq": pl.UInt64(),  # the first entry of the call, when it was seen
        **{f"issued_{name}": pl.UInt64() for name in ARGS},
        "issued_memory": MEMORY,
    }
)

#: One row per continuation and range of targets with equal result.
FINDINGS: Final = pl.Schema(
    {
        "code": pl.String(),
        "outcome": pl.String(),  # one of OUTCOMES, "undecidable" or "unknown"
        "caveats": pl.List(pl.String()),
        "evidence": _EVIDENCE,
        "issuer": pl.String(),
        "migrates": pl.Boolean(),
        "kinds": pl.List(pl.String()),
        "source": pl.String(),
        "targets": pl.List(pl.String()),
        "hypercall": pl.String(),
        "subop": pl.String(),
        "caller": pl.String(),
        "domid": pl.UInt16(),
        "vcpu": pl.UInt32(),
        "input": pl.UInt32(),
        "offset": pl.UInt64(),
        "line": pl.UInt64(),
        "seq": pl.UInt64(),
        "args": pl.List(pl.UInt64()),
        "errno": pl.String(),
        "text": pl.String(),
        "harmless": pl.Boolean(),  # restarts, and lost work that does not matter
        "bits": pl.UInt8(),  # exit bits that this finding stands for
        "in_exit": pl.Boolean(),  # false for the rollback line, which does not count unless --to names it
        "source_decode": READING,
        "target_decode": READING,
    }
)


def empty(schema: pl.Schema) -> pl.DataFrame:
    """Return a frame of no rows with ``schema``."""
    return pl.DataFrame(schema=schema)
