"""The slow, obvious reading of Linux tracing text: one line after the other, plain regular expressions."""

from __future__ import annotations

import re
from collections import defaultdict

NARGS = {1: 4, 2: 2, 3: 2, 5: 1, 10: 2, 12: 2, 14: 3, 20: 3, 22: 4, 26: 4}
BYTES = {1: 16, 26: 24}
HEAD = re.compile(r"^(.*)\[(\d{1,5})\](?: +[^ ]+)? +(\d{1,20})(?:\.(\d{1,9}))?: +(?:\d+ +)?(?:[\w-]+:)?([\w-]+): +(.*)$")
ENTRY = re.compile(r"op (\d{1,10})(?:\([a-z0-9_]*\))? args \[([0-9a-f]{1,16}(?:, [0-9a-f]{1,16}){5})\]\s*")
FLUSH = re.compile(r"flushing (\d{1,10}) hypercalls, (\d{1,9}) arg bytes, \d+ callbacks\s*")
EXTEND = re.compile(r"extending op (\d{1,10})(?:\([a-z0-9_]*\))? by (\d{1,9}) bytes res (OK|BAD_OP|NO_SPACE|\?\?\?)\s*")
ALLOC = re.compile(r"alloc entry (\d{1,9}) arg bytes\s*")
FRAME = re.compile(r"(?:\(\S+\) )?ip=(\S+) ax=(\S+) di=(\S+) si=(\S+) dx=(\S+) r10=(\S+) r8=(\S+) r9=(\S+)(?: .*)?")
LOST = re.compile(r"CPU:(\d+) \[LOST (\d+) EVENTS\]")


def twin(text: str) -> list[tuple]:
    """Return (line, kind, vcpu, stamp, op, arg0 … arg5, rip, result) of every event of a 64-bit PV kernel's trace."""
    out = []
    queue, place, seen = defaultdict(list), {}, False
    for number, line in enumerate(text.split("\n")[:-1], 1):
        if lost := LOST.match(line):
            queue[int(lost[1])] = []
            out.append((number, "lost", int(lost[1]), None, None, *[None] * 6, None, int(lost[2])))
            continue
        m = HEAD.match(line) if not line.startswith("#") else None
        if not m:
            continue
        cpu, stamp, event, fields = int(m[2]), (m[3], m[4]), m[5], m[6]
        if event == "xen_mc_entry_alloc" and (f := ALLOC.fullmatch(fields)):
            place[cpu] = int(f[1])
        elif event == "xen_mc_entry" and (f := ENTRY.fullmatch(fields)):
            if int(f[1]) < 1 << 32:
                args = [int(w, 16) for w in f[2].split(", ")]
                queue[cpu].append({"line": number, "op": int(f[1]), "args": args, "own": place.pop(cpu, None), "n": {}, "more": {}})
                seen = True
        elif event == "xen_mc_extend_args" and (f := EXTEND.fullmatch(fields)):
            if queue[cpu] and queue[cpu][-1]["op"] == int(f[1]) and int(f[1]) in BYTES:
                last = queue[cpu][-1]
                last["n"][f[3]] = last["n"].get(f[3], 0) + 1
                last["more"][f[3]] = last["more"].get(f[3], 0) + int(f[2])
        elif event == "xen_mc_flush" and (f := FLUSH.fullmatch(fields)):
            n, size = int(f[1]), int(f[2])
            if n < 1 << 32:
                out += issued(number, cpu, stamp, n, size, queue.pop(cpu, []), seen=seen)
        elif f := FRAME.fullmatch(fields):
            out.append((number, "sample", cpu, stamp, int(f[2], 0), *(int(f[i], 0) for i in range(3, 9)), int(f[1], 0), None))
    return out


def issued(number: int, cpu: int, stamp: tuple, n: int, size: int, queued: list[dict], *, seen: bool) -> list[tuple]:
    """Return the rows of one flush."""
    entries = queued[-n:] if n else []
    out = []
    if len(entries) < n and (n > 1 or seen):
        out.append((number, "lost", cpu, stamp, None, *[None] * 6, None, n - len(entries)))
    if n > 1:
        out.append((number, "hypercall", cpu, stamp, 13, None, n, *[None] * 4, None, None))
    left = size - sum(
        (BYTES.get(e["op"], 0) * e["args"][1] if e["own"] is None else e["own"]) + e["more"].get("OK", 0) for e in entries
    )
    doubt = sum(e["more"].get("NO_SPACE", 0) for e in entries)
    for e in entries:
        op, args = e["op"], list(e["args"])
        if op in BYTES:
            args[1] += e["n"].get("OK", 0)
            if len(entries) == n and left and left == doubt:
                args[1] += e["n"].get("NO_SPACE", 0)
            elif len(entries) < n or left:
                tells = n == 1 and e["own"] is not None and left > 0 and left % BYTES[op] == 0
                args[1] = args[1] + left // BYTES[op] if tells else None
        count = NARGS.get(op, max((i + 1 for i, a in enumerate(e["args"]) if a), default=0))
        args = [a if i < count else None for i, a in enumerate(args)]
        out.append((e["line"], "hypercall" if n == 1 else "subcall", cpu, stamp, op, *args, None, None))
    return out
