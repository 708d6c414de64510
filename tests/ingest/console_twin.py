"""A slow reader of console logs, line by line with ``re``; and writers of dumps in Xen's formats."""

from __future__ import annotations

import re

WIDE = ("rax", "rbx", "rcx", "rdx", "rsi", "rdi", "rbp", "r8", "r9", "r10", "r11")
NARROW = ("rax", "rbx", "rcx", "rdx", "rsi", "rdi", "rbp")
GIB4 = 1 << 32


def undo(text):
    if not re.search(r"=\r?\n|=3D|:=20\r?\n", text):
        return text
    return re.sub(r"=\r?\n|=3D|=20|=09|=A0", lambda m: {"=3D": "=", "=20": " ", "=09": " ", "=A0": " "}.get(m[0], ""), text)


def join(lines, first, end):
    return undo("\n".join(line[:400] for line in lines[first:end]))


def walls_of(lines, literal):
    return [i for i, t in enumerate(lines) if literal in t or "Xen version " in t or "Linux version " in t]


def hexes(text, name, digits):
    m = re.search(rf"\b{name}:[\s>]+([0-9a-f]{digits})\b", text)
    return int(m[1], 16) if m else None


def number(text, bits):
    return int(text) if text is not None and int(text) < 1 << bits else None


def dumps(lines):
    """Yield (row of the context line, event or None where it was not understood)."""
    walls = walls_of(lines, "CONTEXT: ")
    for i in [i for i, t in enumerate(lines) if "CONTEXT: " in t]:
        floor = max([w + 1 for w in walls if w < i], default=0)
        after = min([w for w in walls if w > i], default=len(lines))
        head = join(lines, max(i - 7, floor), i + 1)
        tail = undo("\n".join(t[:400] for t in lines[i + 1 : min(i + 25, after)])[:2000])
        m = re.search(
            r"FLAGS:\s+([0-9a-f]{8,16})\s[\s\S]*?CONTEXT:\s+(hypervisor|pv\s+guest|hvm\s+guest|guest|hvm)\b"
            r"(?:\s+\(d(\d{1,5})v(\d{1,5})\))?",
            head + "\n" + tail[:80],
        )
        if not m or m[2] == "hypervisor":
            continue
        kind = "hvm" if m[2].startswith("hvm") else "pv"
        regs, width = {r: hexes(tail, r, "{16}") for r in WIDE}, 64
        if regs["rax"] is None:
            width = 32
            regs |= {r: hexes(tail, "e" + r[1:], "{8}") for r in NARROW}
        p = re.search(r"[RE]IP:\s+([0-9a-f]{4}):\[<([0-9a-f]{8,16})>\]", head)
        needed = WIDE if width == 64 else NARROW
        if not p or len(p[2]) != width // 4 or any(regs[r] is None for r in needed):
            yield i, None
            continue
        cs, rip, flags = int(p[1], 16), int(p[2], 16), int(m[1], 16)
        extra = {x: hexes(tail, x, "{8,16}") for x in ("rsp", "cr0", "cr4", "fsb", "gsb", "gss")}
        off = (extra["cr0"] is not None and not extra["cr0"] >> 31 & 1) or (extra["cr4"] is not None and not extra["cr4"] & 32)
        high = rip >= GIB4 or any((extra[x] or 0) >= GIB4 for x in ("rsp", "fsb", "gsb", "gss"))
        caller = None
        if kind == "pv" and width == 64 and cs == 0xE033:
            caller = "pv64"
        elif kind == "pv" and cs & 3 == 1:
            caller = "pv32"
        elif kind == "hvm" and (off or width == 32):
            caller = "hvm32"
        elif kind == "hvm" and high:
            caller = "hvm64"
        if caller is None:
            continue
        if caller in ("pv32", "hvm32"):
            rip, regs = rip % GIB4, {k: v and v % GIB4 for k, v in regs.items()}
        if caller == "pv64":
            on = regs["rcx"] == rip + 2 and (regs["r11"] ^ flags) & ~0x3000 == 0 and regs["rax"] < GIB4
        else:
            ring = 1 if caller == "pv32" else 0
            on = None if cs & 3 == ring and rip & 0xFFF == regs["rax"] % GIB4 * 32 + 5 else False
        who = (m[3], m[4])
        if who[0] is None:
            above = join(lines, max(i - 12, floor), i + 1)
            patterns = (
                r"Dumping CPU\d{1,5} guest state \(d(\d{1,5}):?v(\d{1,5})\):",
                r"Dumping Dom(\d{1,5}) vcpu#(\d{1,5}) state:",
                r"Domain (\d{1,5}) \(vcpu#(\d{1,5})\) crashed on cpu#\d{1,5}:",
            )
            for pattern in patterns:
                if found := re.findall(pattern, above):
                    who = found[-1]
                    break
        cpu = re.search(r"CPU:\s+(\d{1,6})\b", head)
        order = ("rdi", "rsi", "rdx", "r10", "r8", "r9") if "64" in caller else ("rbx", "rcx", "rdx", "rsi", "rdi", "rbp")
        yield (
            i,
            {
                "kind": "sample",
                "caller": caller,
                "domid": number(who[0], 16),
                "vcpu": number(who[1], 32),
                "pcpu": int(cpu[1]) if cpu else None,
                "op": regs["rax"] % GIB4,
                **{f"arg{k}": regs[r] for k, r in enumerate(order)},
                "rip": rip,
                "on_insn": on,
                "result": None,
            },
        )


def progress(lines):
    walls = walls_of(lines, "Could not allocate order=")
    for i in [i for i, t in enumerate(lines) if "Could not allocate order=" in t]:
        end = min([w for w in walls if w > i] + [i + 3, len(lines)])
        m = re.search(
            r"(?::\d{1,6}:d(\d{1,5})(?:v(\d{1,5}))? )?Could not allocate order=\d{1,3}[\s>]+extent:[\s>]+id=\d{1,5}[\s>]+(?:mem)?"
            r"flags=(0x)?[0-9a-f]{1,8}[\s>]+\((\d{1,10})[\s>]+of[\s>]+(\d{1,10})\)",
            join(lines, i, end),
        )
        if not m or int(m[4]) > int(m[5]):
            yield i, None
            continue
        who = {"domid": number(m[1], 16), "vcpu": number(m[2], 32), "op": 12}
        yield i, {**who, "kind": "hypercall", "arg0": 6 if m[3] else None, "memory": [{"field": "nr_extents", "value": int(m[5])}]}
        yield i, {**who, "kind": "return", "result": int(m[4])}


def multicalls(lines):
    walls = walls_of(lines, "multicall(s) failed: cpu ")
    for i in [i for i, t in enumerate(lines) if "multicall(s) failed: cpu " in t]:
        end = min([w for w in walls if w > i] + [i + 96, len(lines)])
        m = re.search(r"\b(\d{1,4})(?: of (\d{1,4}))? multicall\(s\) failed: cpu (\d{1,5})\b", lines[i])
        if not m:
            yield i, None
            continue
        total, calls = m[2] and int(m[2]), []
        rows = [k for k in range(i + 1, end) if ": op=" in lines[k]]
        for n, k in enumerate(rows):
            stop = min(k + 3, rows[n + 1] if n + 1 < len(rows) else end, end)
            text = re.sub(r"\n[> \t]*[^>\spac0-9a-f][\s\S]*$", "", join(lines, k, stop))
            c = re.search(
                r"\bcall +(\d{1,4})(?:/(\d{1,4}))?: op=(\d{1,10})(?:[\s>]+arg=\[([0-9a-f]{1,16})\])?[\s>]+result=(-?\d{1,19})\b"
                r"(?:[^\n]*?[\s>]+(?:caller=[^\n]*?[\s>]+)?pars=((?:[0-9a-f]{1,16}\b[\s>]*){1,6}))?",
                text,
            )
            if not c or int(c[3]) >= GIB4 or not -(1 << 63) <= int(c[5]) < 1 << 63:
                continue
            args = [int(w, 16) for w in re.split(r"[\s>]+", c[6].strip(" \n\t>"))] if c[6] else [int(c[4], 16)] if c[4] else []
            total = total if total is not None else c[2] and int(c[2])
            calls.append((int(c[1]), k, int(c[3]), args, int(c[5])))
        vcpu = int(m[3])
        wide = any(a >= GIB4 for c in calls for a in c[3])
        if m[2] is not None and total == 1:
            if not calls:
                yield i, None
            for _, k, op, args, result in sorted(calls, key=lambda c: c[0]):
                caller = "pv64" if any(a >= GIB4 for a in args) else None
                named = {f"arg{j}": a for j, a in enumerate(args)}
                yield k, {"vcpu": vcpu, "caller": caller, "kind": "hypercall", "op": op, **named}
                yield k, {"vcpu": vcpu, "caller": caller, "kind": "return", "op": op, "result": result}
            continue
        caller = "pv64" if wide else None
        yield i, {"vcpu": vcpu, "caller": caller, "kind": "hypercall", "op": 13, "arg1": total}
        for _, k, op, args, result in sorted(calls, key=lambda c: c[0]):
            own = "pv64" if any(a >= GIB4 for a in args) else None
            named = {f"arg{j}": a for j, a in enumerate(args)}
            yield k, {"vcpu": vcpu, "caller": own, "kind": "subcall", "op": op, "result": result, **named}
        yield i, {"vcpu": vcpu, "caller": caller, "kind": "return", "op": 13, "result": 0}


def wide_dump(regs, context="pv guest (d1v0)", cs=0xE033, heading="", prefix="(XEN) ", cpu=0, cr0=0x80050033, cr4=0x2660):
    """Write a dump as a 64-bit Xen does (_show_registers, RELEASE-4.17.0:xen/arch/x86/x86_64/traps.c:77)."""
    r = dict.fromkeys(("rbx", "r8", "r9", "r10", "r11", "r12", "r13", "r14", "r15", "rbp", "rsp"), 0) | regs
    lines = [heading] if heading else []
    if cpu is not None:
        lines += ["----[ Xen-4.17.7  x86_64  debug=n  Not tainted ]----", f"CPU:    {cpu}"]
    lines += [
        f"RIP:    {cs:04x}:[<{r['rip']:016x}>]",
        f"RFLAGS: {r['rflags']:016x}   EM: 1   CONTEXT: {context}",
        f"rax: {r['rax']:016x}   rbx: {r['rbx']:016x}   rcx: {r['rcx']:016x}",
        f"rdx: {r['rdx']:016x}   rsi: {r['rsi']:016x}   rdi: {r['rdi']:016x}",
        f"rbp: {r['rbp']:016x}   rsp: {r['rsp']:016x}   r8:  {r['r8']:016x}",
        f"r9:  {r['r9']:016x}   r10: {r['r10']:016x}   r11: {r['r11']:016x}",
        f"r12: {r['r12']:016x}   r13: {r['r13']:016x}   r14: {r['r14']:016x}",
        f"r15: {r['r15']:016x}   cr0: {cr0:016x}   cr4: {cr4:016x}",
        f"cr3: {0x101000:016x}   cr2: {0:016x}",
        f"fsb: {0:016x}   gsb: {0:016x}   gss: {0:016x}",
        f"ds: 0000   es: 0000   fs: 0000   gs: 0000   ss: e02b   cs: {cs:04x}",
    ]
    return "".join(prefix + line + "\n" for line in lines)


def narrow_dump(regs, context="pv guest", cs=0xE019, heading="", prefix="(XEN) ", cpu=0):
    """Write a dump as a 32-bit Xen does (_show_registers, RELEASE-4.2.0:xen/arch/x86/x86_32/traps.c:39)."""
    r = {"esp": 0} | regs
    lines = [heading] if heading else []
    lines += [
        "----[ Xen-4.1.6  x86_32p  debug=n  Not tainted ]----",
        f"CPU:    {cpu}",
        f"EIP:    {cs:04x}:[<{r['eip']:08x}>]",
        f"EFLAGS: 00000246   EM: 1   CONTEXT: {context}",
        f"eax: {r['eax']:08x}   ebx: {r['ebx']:08x}   ecx: {r['ecx']:08x}   edx: {r['edx']:08x}",
        f"esi: {r['esi']:08x}   edi: {r['edi']:08x}   ebp: {r['ebp']:08x}   esp: {r['esp']:08x}",
        "cr0: 8005003b   cr4: 000006f0   cr3: 00101000   cr2: 00000000",
        f"ds: e021   es: e021   fs: e021   gs: e021   ss: e021   cs: {cs:04x}",
    ]
    return "".join(prefix + line + "\n" for line in lines)
