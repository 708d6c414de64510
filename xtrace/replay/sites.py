"""Where Xen creates continuations: the calls in one C source file, each with the function that it stands in.

``tools/extract_sites.py`` runs this over every release and writes ``abi/sites.toml``; whoever checks that each call site is
claimed by a fact file runs it over a tree of his own.
"""

from __future__ import annotations

import re
from collections import Counter
from typing import Final

__all__ = ("CALLS", "REWINDS", "call_sites", "in_scope")

#: What makes a continuation: it rewrites the caller's registers (or, of a 32-bit caller, one that is there already).
CALLS: Final = {
    "create": re.compile(r"\bhypercall_create_continuation\s*\("),
    "xlat": re.compile(r"\bhypercall_xlat_continuation\s*\("),
}

#: What has a hypercall executed again without either: registers as they were. Viridian's hypercalls do it so; the
#: functions in ``_DISPATCH`` only pass on what ``hypercall_create_continuation`` asked for.
REWINDS: Final = re.compile(r"\breturn\b[^;]*\bHVM_HCALL_preempted\b")

_DISPATCH: Final = frozenset({"hvm_do_hypercall", "hvm_hypercall"})

#: Ports that are out of scope, and the stubs of those that run no guests.
_OTHER_PORTS: Final = re.compile(r"(?:^|/)(?:asm-)?(?:ia64|powerpc|ppc|riscv)(?:/|$)")

_NOT_CODE: Final = re.compile(r"/\*.*?\*/|//[^\n]*|\"(?:\\.|[^\"\\\n])*\"|'(?:\\.|[^'\\\n])+'", re.S)
_DIRECTIVE: Final = re.compile(r"^[ \t]*#(?:[^\n]*\\\n)*[^\n]*", re.M)
_MACRO: Final = re.compile(r"[ \t]*#[ \t]*define[ \t]+(\w+)")
_HEADER: Final = re.compile(r"^(?=[A-Za-z_])[^\n;{}()=]*?\b(\w+)\s*\(", re.M)
_NEXT_GROUP: Final = re.compile(r"\s*(?:(\w+)\s*)?\(")
_BODY: Final = re.compile(r"(?:\s+|\w+(?:\s*\([^(){};]*\))?)*\{")


def in_scope(path: str) -> bool:
    """Say whether a path is C source of the hypervisor that xtrace models."""
    return path.startswith("xen/") and path.endswith((".c", ".h")) and not _OTHER_PORTS.search(path)


def call_sites(path: str, text: str, what: re.Pattern[str] | None = None) -> list[tuple[str, int]]:
    """Return (function, number of calls in it) of a C source file, in the order in which they stand there.

    Declarations and definitions of what is called are no calls. A call in a macro counts under the macro's name. Branches
    of ``#if`` all count: what Xen was configured for is not asked.

    Args:
        path: where the file is in Xen's tree; a file out of scope has none.
        text: its content.
        what: what to look for; default: both functions of ``CALLS``.
    """
    if not in_scope(path):
        return []
    code = _NOT_CODE.sub(_blank, text)
    plain = _DIRECTIVE.sub(_blank, code)
    places: list[tuple[int, str]] = []
    for pattern in (what,) if what is not None else CALLS.values():
        for directive in _DIRECTIVE.finditer(code):
            macro = _MACRO.match(directive[0])
            if macro is not None:
                places += [(directive.start() + m.start(), macro[1]) for m in pattern.finditer(directive[0], macro.end())]
        for call in pattern.finditer(plain):
            function = _enclosing(plain, call.start())
            if function is not None and not (pattern is REWINDS and function in _DISPATCH):
                places.append((call.start(), function))
    # A Counter keeps the order of first mention.
    return list(Counter(name for _, name in sorted(places)).items())


def _blank(match: re.Match[str]) -> str:
    return re.sub(r"[^\n]", " ", match[0])


def _enclosing(code: str, at: int) -> str | None:
    """Return the name of the function whose body holds the place ``at``; None outside of any.

    Xen closes functions with a brace in the first column; that is relied on, because branches of ``#if`` may hold unequal
    numbers of braces.
    """
    closed = code.rfind("\n}", 0, at)
    start = 0 if closed < 0 else closed + 2
    name = None
    for head in _HEADER.finditer(code, start, at):
        called, end = head[1], _closing(code, head.end() - 1)
        # DO(xen_version)(…), and attributes with arguments before the name.
        while (more := _NEXT_GROUP.match(code, end)) is not None:
            if more[1] is not None:
                called = more[1]
            elif called in ("DO", "COMPAT", "compat"):
                called = called.lower() + "_" + code[head.end() : end - 1].strip()
            end = _closing(code, more.end() - 1)
        body = _BODY.match(code, end)
        if body is not None and body.end() <= at:
            # One that stands on a single line is over at its end.
            line = code[body.end() - 1 :].partition("\n")[0]
            over = line.count("{") == line.count("}") and body.end() - 1 + len(line) <= at
            name = None if over else called
    return name


def _closing(code: str, opening: int) -> int:
    """Return the place after the bracket that closes the one at ``opening``."""
    depth = 0
    for i in range(opening, len(code)):
        depth += {"(": 1, ")": -1}.get(code[i], 0)
        if depth == 0:
            return i + 1
    return len(code)
