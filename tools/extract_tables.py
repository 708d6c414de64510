"""Read Xen's sources at every release tag and write the generated tables of ``xtrace/replay/abi``.

Usage::

    python tools/extract_tables.py --xen-git DIR [--out DIR] [--only releases,tables,numbers] [--check]

DIR is a clone (bare or not) of Xen with all tags. Needs Python 3.11 and git, nothing else. Three files are written:

``releases.toml``   every release: version, tag, commit, date
``tables.toml``     hypercall numbers: names in the public header, and who finds them in its hypercall table
``numbers.toml``    sub-operation numbers and interface versions of the public headers

Nothing is guessed. A line of a hypercall table that the parser does not understand makes that whole table ``unknown``
for that release; a constant whose value is not a plain number after the preprocessor conditions are settled is listed
as ``unknown`` too. Conditions that depend on how Xen was configured (``CONFIG_X``) are kept as text.
"""

from __future__ import annotations

import argparse
import re
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

ABI = Path(__file__).resolve().parent.parent / "xtrace" / "replay" / "abi"

#: The tags that stand for the releases of 3.x, which has no release tags (DESIGN, section 2).
TAGS_3X = {
    "3.0.2": "3.0.2-branched",
    "3.0.3": "3.0.3-branched",
    "3.0.4": "3.0.4-branched",
    "3.1.0": "3.1.0-branched",
    "3.2.0": "3.2.0-rc6",
    "3.3.0": "3.3.0-branched",
    "3.4.0": "3.4.0-rc3",
}

#: The snapshot of the development branch that stands for the release to come: version, commit. Moved by hand.
SNAPSHOT = ("4.23-unstable", "c447b7308b1330ec6dcfef37220736c28f41daa0")


# ── git ──────────────────────────────────────────────────────────────────────────────────────────────────────────────


class Git:
    """A Xen repository, read through one ``git cat-file --batch`` process."""

    def __init__(self, path: str) -> None:
        self.path = path
        self._batch = subprocess.Popen(["git", "-C", path, "cat-file", "--batch"], stdin=subprocess.PIPE, stdout=subprocess.PIPE)
        self._blobs: dict[str, str] = {}
        self._trees: dict[tuple[str, str], str | None] = {}

    def run(self, *args: str) -> str:
        return subprocess.run(["git", "-C", self.path, *args], check=True, capture_output=True, text=True).stdout

    def show(self, tag: str, path: str) -> str | None:
        """Return the text of ``path`` at ``tag``, or None if there is no such file."""
        assert self._batch.stdin is not None and self._batch.stdout is not None
        self._batch.stdin.write(f"{tag}:{path}\n".encode())
        self._batch.stdin.flush()
        head = self._batch.stdout.readline().split()
        if head[-1] in (b"missing", b"ambiguous"):
            return None
        data = self._batch.stdout.read(int(head[2]) + 1)[:-1]
        return data.decode("utf-8", "replace") if head[1] == b"blob" else None

    def close(self) -> None:
        if self._batch.stdin is not None:
            self._batch.stdin.close()
        self._batch.wait()


@dataclass(frozen=True)
class Release:
    version: str
    tag: str
    commit: str
    date: str
    also: tuple[str, ...] = ()  # other tags of the same commit

    @property
    def key(self) -> tuple[int, ...]:
        return tuple(int(n) for n in self.version.partition("-")[0].split("."))


def read_releases(git: Git) -> list[Release]:
    """Return every release in version order; exits if two spellings of one tag name different commits."""
    fmt = "%(refname:strip=2)%09%(objectname)%09%(*objectname)"
    commits = {}
    for line in git.run("for-each-ref", f"--format={fmt}", "refs/tags").splitlines():
        tag, obj, peeled = line.split("\t")
        commits[tag] = peeled or obj
    tags: dict[str, list[str]] = {v: [t] for v, t in TAGS_3X.items() if t in commits}
    missing = sorted(set(TAGS_3X) - set(tags))
    if missing:
        sys.exit(f"no tag for {', '.join(missing)} in {git.path}")
    for tag in sorted(commits, key=lambda t: (not t.startswith("RELEASE-"), t)):
        match = re.fullmatch(r"(?:xen-)?RELEASE-(4(?:\.\d+){2,3})", tag, re.IGNORECASE)
        if match:
            tags.setdefault(match[1], []).append(tag)
    out = []
    for version, names in tags.items():
        if len({commits[t] for t in names}) > 1:
            sys.exit(f"{version}: {' and '.join(names)} are different commits")
        date = git.run("log", "-1", "--format=%cd", "--date=format:%Y-%m-%d", commits[names[0]]).strip()
        out.append(Release(version, names[0], commits[names[0]], date, tuple(names[1:])))
    version, commit = SNAPSHOT
    if version.partition("-")[0] + ".0" not in tags:
        date = git.run("log", "-1", "--format=%cd", "--date=format:%Y-%m-%d", commit).strip()
        out.append(Release(version, commit, commit, date))
    return sorted(out, key=lambda r: r.key)


class Spans:
    """Folds sets of releases into the span syntax of FORMAT.md."""

    def __init__(self, releases: list[Release]) -> None:
        self.order = [r.version for r in releases]

    def fold(self, versions: set[str]) -> list[str]:
        out, i, n = [], 0, len(self.order)
        while i < n:
            if self.order[i] not in versions:
                i += 1
                continue
            j = i
            while j + 1 < n and self.order[j + 1] in versions:
                j += 1
            if j == n - 1:
                out.append(f"{self.order[i]}..")
            elif j == i:
                out.append(self.order[i])
            else:
                out.append(f"{self.order[i]}..{self.order[j]}")
            i = j + 1
        return out


def _strings(items: list[str] | tuple[str, ...]) -> str:
    return "[" + ", ".join(f'"{i}"' for i in items) + "]"


def _banner(what: str, releases: list[Release]) -> str:
    newest = [r for r in releases if r.version != SNAPSHOT[0]][-1]
    return (
        f"# generated by tools/extract_tables.py, do not edit\n"
        f"# {what}\n"
        f"# source: the git history of Xen (xen-project/xen), newest release {newest.tag}, commit {newest.commit}\n"
    )


def releases_toml(git: Git, releases: list[Release]) -> str:
    lines = [
        _banner("every release of Xen that xtrace knows, in version order; date is that of the commit", releases),
        "# There are no release tags between 3.0.0 and 4.0.0: the tags nearest to the release stand for 3.x.",
        "# `also` lists further tags of the same commit. There is no tag for 4.6.2.",
        "# released = false: a snapshot of the development branch, pinned to one commit.",
    ]
    for r in releases:
        lines += ["", "[[release]]", f'version = "{r.version}"', f'tag = "{r.tag}"', f'commit = "{r.commit}"']
        lines.append(f"date = {r.date}")
        if r.version == SNAPSHOT[0]:
            lines.append("released = false")
        if r.also:
            lines.append(f"also = {_strings(r.also)}")
    return "\n".join(lines) + "\n"


# ── a small preprocessor ─────────────────────────────────────────────────────────────────────────────────────────────

#: A condition: True, False, or what is left open: ("sym", text), ("not", c), ("and", (c, …)), ("or", (c, …)).
Cond = bool | tuple  # type: ignore[type-arg]

_TOKEN = re.compile(r"\s*(?:(defined)\b\s*\(?\s*(\w+)\s*\)?|(&&|\|\||==|!=|<=|>=|[<>!()])|(0[xX][0-9a-fA-F]+|\d+)[uUlL]*|(\w+))")


def c_not(c: Cond) -> Cond:
    if isinstance(c, bool):
        return not c
    return c[1] if c[0] == "not" else ("not", c)


def _join(kind: str, parts: list[Cond]) -> Cond:
    dominant = kind == "or"
    flat: list[Cond] = []
    for part in parts:
        for p in part[1] if not isinstance(part, bool) and part[0] == kind else (part,):
            if p is dominant:
                return dominant
            if not isinstance(p, bool) and p not in flat:
                flat.append(p)
    if any(c_not(p) in flat for p in flat):
        return dominant
    # a || (!a && b) is a || b; a && (!a || b) is a && b
    other = "and" if kind == "or" else "or"
    out: list[Cond] = []
    for p in flat:
        if not isinstance(p, bool) and p[0] == other:
            p = _join(other, [q for q in p[1] if c_not(q) not in flat])
        out.append(p)
    if out != flat:
        return _join(kind, out)
    return not dominant if not flat else flat[0] if len(flat) == 1 else (kind, tuple(flat))


def c_and(*parts: Cond) -> Cond:
    return _join("and", list(parts))


def c_or(*parts: Cond) -> Cond:
    return _join("or", list(parts))


def c_text(c: Cond) -> str:
    """Write a condition in C's operators: ``CONFIG_GRANT_TABLE || CONFIG_PV_SHIM``."""
    if isinstance(c, bool):
        return str(c).lower()
    if c[0] == "sym":
        return str(c[1])
    if c[0] == "not":
        inner = c_text(c[1])
        return f"!{inner}" if c[1][0] == "sym" else f"!({inner})"
    glue = " && " if c[0] == "and" else " || "
    return glue.join(f"({c_text(p)})" if p[0] in ("and", "or") else c_text(p) for p in c[1])


class _Expr:
    """Evaluates the expression of an #if as far as ``known`` settles it. ``known[X] is None``: X is not defined."""

    def __init__(self, text: str, known: dict[str, int | None]) -> None:
        self.known = known
        self.tokens: list[tuple[str, str]] = []
        pos = 0
        text = text.strip()
        while pos < len(text):
            m = _TOKEN.match(text, pos)
            if not m:
                raise ValueError(text)
            pos = m.end()
            if m[1]:
                self.tokens.append(("defined", m[2]))
            elif m[3]:
                self.tokens.append(("op", m[3]))
            elif m[4]:
                self.tokens.append(("num", m[4]))
            else:
                self.tokens.append(("name", m[5]))
        self.i = 0

    def _op(self, *ops: str) -> str | None:
        if self.i < len(self.tokens) and self.tokens[self.i][0] == "op" and self.tokens[self.i][1] in ops:
            self.i += 1
            return self.tokens[self.i - 1][1]
        return None

    def parse(self) -> Cond:
        out = self._or()
        if self.i != len(self.tokens):
            raise ValueError("trailing tokens")
        return self._truth(out)

    @staticmethod
    def _truth(v: object) -> Cond:
        if isinstance(v, int) and not isinstance(v, bool):
            return v != 0
        if isinstance(v, str):
            return ("sym", v)
        return v  # type: ignore[return-value]

    def _or(self) -> object:
        out = self._and()
        while self._op("||"):
            out = c_or(self._truth(out), self._truth(self._and()))
        return out

    def _and(self) -> object:
        out = self._cmp()
        while self._op("&&"):
            out = c_and(self._truth(out), self._truth(self._cmp()))
        return out

    def _cmp(self) -> object:
        left = self._unary()
        op = self._op("==", "!=", "<=", ">=", "<", ">")
        if not op:
            return left
        right = self._unary()
        if isinstance(left, int) and isinstance(right, int):
            return {
                "==": left == right,
                "!=": left != right,
                "<=": left <= right,
                ">=": left >= right,
                "<": left < right,
                ">": left > right,
            }[op]
        return ("sym", f"{left} {op} {right}")

    def _unary(self) -> object:
        if self._op("!"):
            return c_not(self._truth(self._unary()))
        if self._op("("):
            out = self._or()
            if not self._op(")"):
                raise ValueError("no )")
            return out
        kind, text = self.tokens[self.i]
        self.i += 1
        if kind == "defined":
            if text in self.known:
                return self.known[text] is not None
            return ("sym", text if text.startswith("CONFIG_") else f"defined({text})")
        if kind == "num":
            return int(text, 0)
        if kind == "name":
            value = self.known.get(text)
            return value if value is not None else 0 if text in self.known else text
        raise ValueError(text)


def strip_comments(text: str) -> str:
    """Blank comments out, keeping line ends."""
    blank = lambda m: re.sub(r"[^\n]", " ", m[0])  # noqa: E731
    text = re.sub(r"/\*.*?\*/", blank, text, flags=re.DOTALL)
    return re.sub(r"//[^\n]*", "", text)


def preprocess(text: str, known: dict[str, int | None]) -> list[tuple[str, Cond]]:
    """Return the lines that ``known`` does not rule out, each with what its presence still depends on.

    ``#define`` lines are kept (joined over continuations), other directives are consumed. An expression that cannot be
    read stays open as text.
    """
    text = strip_comments(text).replace("\\\n", " ")
    out: list[tuple[str, Cond]] = []
    stack: list[tuple[Cond, Cond]] = []  # (this branch, any branch so far)
    for line in text.split("\n"):
        m = re.match(r"\s*#\s*(if|ifdef|ifndef|elif|else|endif)\b(.*)", line)
        if not m:
            here = c_and(*(s[0] for s in stack)) if stack else True
            if here is not False and line.strip():
                out.append((line.strip(), here))
            continue
        word, rest = m[1], m[2].strip()
        if word == "endif":
            if stack:
                stack.pop()
            continue
        if word in ("ifdef", "ifndef"):
            name = rest.split()[0]
            # a header's own include guard
            cond: Cond = False if re.fullmatch(r"_*\w*_H_*", name) and name not in known else _evaluate(f"defined({name})", known)
            if word == "ifndef":
                cond = c_not(cond)
            stack.append((cond, cond))
        elif word == "if":
            cond = _evaluate(rest, known)
            stack.append((cond, cond))
        else:
            _, before = stack.pop()
            cond = _evaluate(rest, known) if word == "elif" else True
            stack.append((c_and(c_not(before), cond), c_or(before, cond)))
    return out


def _evaluate(text: str, known: dict[str, int | None]) -> Cond:
    try:
        return _Expr(text, known).parse()
    except (ValueError, IndexError):
        return ("sym", " ".join(text.split()))


# ── hypercall numbers ────────────────────────────────────────────────────────────────────────────────────────────────

#: What holds when Xen itself includes a public header. Its interface version is always the newest.
IN_XEN: dict[str, int | None] = {
    "__XEN__": 1,
    "__XEN_TOOLS__": 1,
    "__XEN_INTERFACE_VERSION__": 0x7FFFFFFF,
    "__XEN_LATEST_INTERFACE_VERSION__": 0x7FFFFFFF,
    "__ASSEMBLY__": None,
    "__DOXYGEN__": None,
    "DOXYGEN": None,
    "__i386__": None,
    "__x86_64__": 1,
    "__ia64__": None,
    "__powerpc__": None,
    "__arm__": None,
    "__aarch64__": None,
}

_DEFINE = re.compile(r"#\s*define\s+(\w+)(?:\s+(.*))?$")


def plain_number(text: str) -> int | None:
    text = text.strip()
    while text.startswith("(") and text.endswith(")"):
        text = text[1:-1].strip()
    m = re.fullmatch(r"(0[xX][0-9a-fA-F]+|\d+)[uUlL]*", text)
    if not m:
        return None
    digits = m[1]
    return int(digits, 8) if re.fullmatch(r"0\d+", digits) else int(digits, 0)


def hypercall_numbers(git: Git, tag: str) -> dict[str, int]:
    """Return name -> number as Xen itself is compiled with at ``tag``."""
    text = git.show(tag, "xen/include/public/xen.h")
    assert text is not None, tag
    out: dict[str, int] = {}
    for source in (text, git.show(tag, "xen/include/public/arch-x86/xen-mca.h") or ""):
        for line, _ in preprocess(source, IN_XEN):
            m = _DEFINE.match(line)
            if not m or not m[1].startswith("__HYPERVISOR_") or not m[2]:
                continue
            name, value = m[1][13:], m[2].strip()
            number = plain_number(value)
            if number is None and value.startswith("__HYPERVISOR_"):
                number = out.get(value[13:])
            if number is not None and number < 64:
                out[name] = number
    # Xen's own name for arch_1, not in a public header.
    private = git.show(tag, "xen/arch/x86/include/asm/hypercall.h") or ""
    if re.search(r"#define __HYPERVISOR_paging_domctl_cont __HYPERVISOR_arch_1\b", private):
        out["paging_domctl_cont"] = out["arch_1"]
    return out


# ── hypercall tables ─────────────────────────────────────────────────────────────────────────────────────────────────

X86: dict[str, int | None] = {
    "__x86_64__": 1,
    "__i386__": None,
    "CONFIG_X86": 1,
    "CONFIG_X86_64": 1,
    "CONFIG_X86_32": None,
    "CONFIG_ARM": None,
    "CONFIG_COMPAT": 1,
    "CPPCHECK": None,
    "CONFIG_PAGING_LEVELS": 4,
}
X86_32: dict[str, int | None] = {
    **X86,
    "__x86_64__": None,
    "__i386__": 1,
    "CONFIG_X86_64": None,
    "CONFIG_X86_32": 1,
    "CONFIG_COMPAT": None,
    "CONFIG_PAGING_LEVELS": 3,
}
ARM: dict[str, int | None] = {
    "CONFIG_X86": None,
    "CONFIG_X86_64": None,
    "CONFIG_ARM": 1,
    "CONFIG_COMPAT": None,
    "CONFIG_PV": None,
    "CPPCHECK": None,
}
PV, PV32, HVM = {"CONFIG_PV": 1}, {"CONFIG_PV": 1, "CONFIG_PV32": 1}, {"CONFIG_HVM": 1}

#: Callers, what is known when one exists, the column of a two-column C table, the column name of hypercall-defs.c.
CALLERS = ("pv64", "pv32", "hvm64", "hvm32", "pvh64", "pv32_on_x86_32", "hvm32_on_x86_32", "arm64", "arm32")


@dataclass
class Found:
    """One caller's hypercall table at one release."""

    path: str
    symbol: str
    entries: dict[int, Cond]  # number -> condition
    handlers: dict[int, str]
    problem: str | None = None


def asm_table(git: Git, tag: str, path: str, symbol: str, known: dict[str, int | None], arch_0: int | None) -> Found | None:
    """Read a table of .quad/.long lines."""
    text = git.show(tag, path)
    if text is None or f"ENTRY({symbol})" not in text:
        return None
    found = Found(path, symbol, {}, {})
    lines = preprocess(text, known)
    missing: dict[str, Cond] = {}  # handler -> condition under which it is do_ni_hypercall
    for line, cond in lines:
        m = re.match(r"#\s*define\s+(\w+)\s+(?:do|compat)_ni_hypercall\b", line)
        if m:
            missing[m[1]] = c_or(missing.get(m[1], False), cond)
    start = next(i for i, (line, _) in enumerate(lines) if line.replace(" ", "").startswith(f"ENTRY({symbol})"))
    number, i = 0, start + 1
    while i < len(lines):
        line, cond = lines[i]
        i += 1
        m = re.match(r"\.(?:quad|long)\s+(\w+)$", line)
        if m:
            if cond is not True:
                found.problem = f"conditional line {line!r}"
                return found
            if not m[1].endswith("_ni_hypercall"):
                found.entries[number] = c_not(missing.get(m[1], False))
                found.handlers[number] = m[1]
            number += 1
            continue
        m = re.match(r"\.rept\s+(\w+)-\(\(\.-" + symbol + r"\)/[48]\)$", line)
        if m and re.match(r"\.(?:quad|long)\s+\w+_ni_hypercall$", lines[i][0]) and lines[i + 1][0] == ".endr":
            if m[1] == "NR_hypercalls":
                return found
            if m[1] != "__HYPERVISOR_arch_0" or arch_0 is None:
                found.problem = f"does not understand {line!r}"
                return found
            number = arch_0
            i += 2
            continue
        found.problem = f"does not understand {line!r}"
        return found
    found.problem = "the table has no end"
    return found


def c_table(
    git: Git, tag: str, path: str, symbol: str, known: dict[str, int | None], column: int, numbers: dict[str, int]
) -> Found | None:
    """Read a C table of designated initialisers; ``column`` 0 native, 1 compat, -1 the table has one column."""
    text = git.show(tag, path)
    if text is None:
        return None
    lines = preprocess(text, known)
    opening = re.compile(r"\b" + symbol + r"\s*\[\s*\w*\s*\]\s*=\s*\{\s*$")
    starts = [i for i, (line, _) in enumerate(lines) if opening.search(line)]
    if not starts:
        return None
    found = Found(path, symbol, {}, {})
    if len(starts) > 1:
        found.problem = "the table is there more than once"
        return found
    macros: dict[str, str] = {}
    for line, _ in lines[: starts[0]]:
        m = re.match(r"#\s*define\s+(\w+)\(\s*\w+[^)]*\)\s*(.*__HYPERVISOR_.*)", line)
        if m:
            macros[m[1]] = m[2]
        m = re.match(r"#\s*undef\s+(\w+)", line)
        if m:
            macros.pop(m[1], None)
    for line, cond in lines[starts[0] + 1 :]:
        if line.startswith("};"):
            return found
        m = re.match(r"(\w+)\(\s*(\w+)(?:\s*,\s*\d+)?\s*\),?$", line)
        if m and m[1] in macros:
            name, body = m[2], macros[m[1]]
        else:
            m = re.match(r"\[\s*__HYPERVISOR_(\w+)\s*\]\s*=\s*(.*?),?$", line)
            if not m:
                found.problem = f"does not understand {line!r}"
                return found
            name, body = m[1], m[2]
        # the initialiser, after the `=` of the macro's body
        value = body.partition("=")[2] if "__HYPERVISOR_" in body else body
        cells = value.strip().strip("{}").split(",")
        if column == 1 and len(cells) != 2:  # column 0 stands alone where Xen is built without CONFIG_PV32
            found.problem = f"{name}: not two columns in {value!r}"
            return found
        cell = cells[max(column, 0)]
        if name not in numbers:
            found.problem = f"{name} has no number"
            return found
        if "deprecated" in cell:
            continue
        found.entries[numbers[name]] = c_or(found.entries.get(numbers[name], False), cond)
        handler = re.sub(r"\bx\b|\b_name\b", name, cell.replace("##", "").replace("&", ""))
        found.handlers[numbers[name]] = re.sub(r"\(\w+\s*\*?\s*\)|\s", "", handler)
    found.problem = "the table has no end"
    return found


def defs_table(git: Git, tag: str, known: dict[str, int | None], column: str, numbers: dict[str, int]) -> Found | None:
    """Read the table of xen/include/hypercall-defs.c (4.17 and later)."""
    path = "xen/include/hypercall-defs.c"
    text = git.show(tag, path)
    if text is None:
        return None
    found = Found(path, f"table: {column}", {}, {})
    columns: list[str] | None = None
    for line, cond in preprocess(text, known):
        if line.startswith("table:"):
            columns = line.split()[1:]
            continue
        if columns is None:
            continue
        cells = line.split()
        if len(cells) != len(columns) + 1 or cells[0] not in numbers:
            found.problem = f"does not understand {line!r}"
            return found
        cell = cells[1 + columns.index(column)].partition(":")[0]
        if cell not in ("-", "dep"):
            number = numbers[cells[0]]
            found.entries[number] = c_or(found.entries.get(number, False), cond)
            found.handlers[number] = f"{cell}_{cells[0]}"
    if columns is None:
        return None
    return found


def read_tables(git: Git, tag: str, numbers: dict[str, int]) -> dict[str, Found]:
    """Return each caller's hypercall table at ``tag``; a caller without one is left out."""
    x86 = "xen/arch/x86"
    arch_0 = numbers.get("arch_0")
    hvm = (f"{x86}/hvm/hvm.c", f"{x86}/hvm/hypercall.c")
    tries: dict[str, list[Found | None]] = {c: [] for c in CALLERS}

    def defs(caller: str, column: str, known: dict[str, int | None]) -> None:
        tries[caller].append(defs_table(git, tag, known, column, numbers))

    for caller, column, known in (("pv64", 0, PV), ("pv32", 1, PV32)):
        defs(caller, caller, {**X86, **known})
        for path in (f"{x86}/pv/hypercall.c", f"{x86}/hypercall.c"):
            tries[caller].append(c_table(git, tag, path, "pv_hypercall_table", {**X86, **known}, column, numbers))
    tries["pv64"].append(asm_table(git, tag, f"{x86}/x86_64/entry.S", "hypercall_table", X86, arch_0))
    tries["pv32"].append(asm_table(git, tag, f"{x86}/x86_64/compat/entry.S", "compat_hypercall_table", X86, arch_0))
    tries["pv32_on_x86_32"].append(asm_table(git, tag, f"{x86}/x86_32/entry.S", "hypercall_table", X86_32, arch_0))
    for caller, column in (("hvm64", 0), ("hvm32", 1)):
        defs(caller, caller, {**X86, **HVM})
        for path in hvm:
            tries[caller].append(c_table(git, tag, path, "hvm_hypercall_table", {**X86, **HVM}, column, numbers))
            one = f"hvm_hypercall{caller[3:]}_table"
            tries[caller].append(c_table(git, tag, path, one, {**X86, **HVM}, -1, numbers))
    for name in ("hvm_hypercall_table", "hvm_hypercall32_table"):
        if git.show(tag, f"{x86}/x86_32/entry.S") is not None:
            tries["hvm32_on_x86_32"].append(c_table(git, tag, hvm[0], name, {**X86_32, **HVM}, -1, numbers))
    tries["pvh64"].append(c_table(git, tag, hvm[0], "pvh_hypercall64_table", {**X86, **HVM}, -1, numbers))
    for caller, bits in (("arm64", 1), ("arm32", None)):
        known = {**ARM, "CONFIG_ARM_64": bits, "CONFIG_ARM_32": None if bits else 1}
        if bits and git.show(tag, "xen/arch/arm/arm64/entry.S") is None:
            continue  # no 64-bit Arm yet
        defs(caller, "arm", known)
        tries[caller].append(c_table(git, tag, "xen/arch/arm/traps.c", "arm_hypercall_table", known, -1, numbers))
    out = {}
    for caller, results in tries.items():
        there = [r for r in results if r is not None]
        if len(there) > 1:
            there[0].problem = f"two tables: {there[0].path} and {there[1].path}"
        if there:
            out[caller] = there[0]
    return out


def tables_toml(git: Git, releases: list[Release], verbose: bool) -> str:
    spans = Spans(releases)
    names: dict[tuple[int, str], set[str]] = {}
    present: dict[tuple[int, str, str], set[str]] = {}  # number, caller, condition
    sources: dict[tuple[str, str, str], set[str]] = {}  # caller, path, symbol
    unknown: dict[tuple[str, str], set[str]] = {}  # caller, why
    for r in releases:
        numbers = hypercall_numbers(git, r.tag)
        for name, number in numbers.items():
            names.setdefault((number, name), set()).add(r.version)
        for caller, found in read_tables(git, r.tag, numbers).items():
            if found.problem:
                unknown.setdefault((caller, f"{found.path}: {found.problem}"), set()).add(r.version)
                print(f"{r.tag}: {caller}: {found.path}: {found.symbol}: {found.problem}", file=sys.stderr)
                continue
            sources.setdefault((caller, found.path, found.symbol), set()).add(r.version)
            mine = {n: [k for k, v in numbers.items() if v == n] for n in found.entries}
            for number, cond in found.entries.items():
                if cond is False:
                    continue
                text = "" if cond is True else c_text(cond)
                present.setdefault((number, caller, text), set()).add(r.version)
                handler = found.handlers[number]
                if verbose and not any(handler.endswith(k) for k in mine[number]):
                    print(f"{r.tag}: {caller}: {number} {mine[number]} is {handler}", file=sys.stderr)
    first = {v: i for i, v in enumerate(spans.order)}
    out = [
        _banner(
            "hypercall numbers 0 to 63: their names, and the callers in whose hypercall table they are",
            releases,
        )
    ]
    out += [
        "# hypercall: Xen's name without __HYPERVISOR_, and the releases whose public headers (xen/include/public)",
        "#   define it, as Xen itself sees them (newest interface version). Several names of one number stand in the",
        "#   order in which they came; the last one is today's. Numbers that no header names are left out.",
        "#   paging_domctl_cont is Xen's own name for arch_1 (xen/arch/x86/include/asm/hypercall.h).",
        "# present: the number is in that caller's hypercall table with a handler of its own (not do_ni_hypercall, not",
        "#   Arm's do_deprecated_hypercall). condition: only if Xen was configured so. A handler may still refuse all.",
        "# table: where each caller's table was read. Not present in a release listed here = absent there. A release",
        "#   listed neither here nor under unknown has no such caller or no hypercall table for it.",
        "# unknown: the script could not read that caller's table; nothing is said about it there.",
        "# pv32 and hvm32 are 32-bit callers of a 64-bit Xen; *_on_x86_32 are those of a 32-bit Xen (none after 4.2).",
        "",
        "hypercall = [",
    ]

    def age(item: tuple[tuple[int, str], set[str]]) -> tuple[int, int, bool, int]:
        (number, name), versions = item
        return number, max(first[v] for v in versions), not name.startswith("arch_"), min(first[v] for v in versions)

    for (number, name), versions in sorted(names.items(), key=age):
        out.append(f'  {{ number = {number}, name = "{name}", releases = {_strings(spans.fold(versions))} }},')
    out += ["]", "", "present = ["]
    grouped: dict[tuple[int, int, str, tuple[str, ...]], list[str]] = {}
    for (number, caller, cond), versions in present.items():
        begin = min(first[v] for v in versions)
        grouped.setdefault((number, begin, cond, tuple(spans.fold(versions))), []).append(caller)
    for (number, _, cond, where), callers in sorted(grouped.items(), key=lambda kv: (kv[0][0], _order(kv[1]), kv[0])):
        callers = [c for c in CALLERS if c in callers]
        text = f', condition = "{cond}"' if cond else ""
        out.append(f"  {{ number = {number}, callers = {_strings(callers)}, releases = {_strings(where)}{text} }},")
    out += ["]", "", "table = ["]
    for (caller, path, symbol), versions in sorted(
        sources.items(), key=lambda kv: (CALLERS.index(kv[0][0]), min(first[v] for v in kv[1]))
    ):
        where = _strings(spans.fold(versions))
        out.append(f'  {{ caller = "{caller}", path = "{path}", symbol = "{symbol}", releases = {where} }},')
    out += ["]", "", "unknown = ["]
    for (caller, why), versions in sorted(unknown.items()):
        quoted = why.replace("\\", "\\\\").replace('"', '\\"')
        out.append(f'  {{ caller = "{caller}", releases = {_strings(spans.fold(versions))}, why = "{quoted}" }},')
    out.append("]")
    return "\n".join(out) + "\n"


def _order(callers: list[str]) -> tuple[int, ...]:
    return tuple(sorted(CALLERS.index(c) for c in callers))


# ── sub-operation numbers ────────────────────────────────────────────────────────────────────────────────────────────


@dataclass(frozen=True)
class Family:
    """Constants of one public header that number the sub-operations of one hypercall."""

    prefix: str
    header: str
    hypercall: str
    names: str = "[a-z]"  # how the rest of the name begins: Xen writes sub-operations small, their flags in capitals
    but: str = ""  # names that look like it and are not
    of: str = ""  # the sub-operation whose own commands these are


FAMILIES = (
    Family("XENMEM_", "memory.h", "memory_op", but=r"(paging|access|sharing)_op_|resource_|rsrc_"),
    Family("XENMEM_paging_op_", "memory.h", "memory_op", of="XENMEM_paging_op"),
    Family("XENMEM_access_op_", "memory.h", "memory_op", of="XENMEM_access_op"),
    Family("XENMEM_sharing_op_", "memory.h", "memory_op", of="XENMEM_sharing_op"),
    Family("GNTTABOP_", "grant_table.h", "grant_table_op", but="error_msgs"),
    Family("HVMOP_", "hvm/hvm_op.h", "hvm_op", but=r"altp2m_"),
    Family("HVMOP_altp2m_", "hvm/hvm_op.h", "hvm_op", of="HVMOP_altp2m"),
    Family("MMUEXT_", "xen.h", "mmuext_op", names="[A-Z]"),
    Family("EVTCHNOP_", "event_channel.h", "event_channel_op"),
    Family("SCHEDOP_", "sched.h", "sched_op"),
    Family("VCPUOP_", "vcpu.h", "vcpu_op"),
    Family("PHYSDEVOP_", "physdev.h", "physdev_op", names="[a-zA-Z]", but="DBGP_|IRQ_NEEDS_|IRQ_SHARED"),
    Family("DOM0_", "dom0_ops.h", "dom0_op", names="[A-Z]", but="(SHADOW_CONTROL|PERFCCONTROL)_OP_|TBUF_"),
    Family("XEN_DOMCTL_", "domctl.h", "domctl", but="vmtrace_(?!op$)"),
    Family("XEN_DOMCTL_SHADOW_OP_", "domctl.h", "domctl", names="[A-Z]", of="XEN_DOMCTL_shadow_op"),
    Family("XEN_SYSCTL_", "sysctl.h", "sysctl", but="cpu_(featureset|policy)_|pm_op_"),
    Family("XEN_SYSCTL_pm_op_", "sysctl.h", "sysctl", of="XEN_SYSCTL_pm_op"),
    Family("XENPF_", "platform.h", "platform_op"),
    Family("XEN_DMOP_", "hvm/dm_op.h", "dm_op", but="no_gfns"),
    Family("CONSOLEIO_", "xen.h", "console_io"),
    Family("KEXEC_CMD_", "kexec.h", "kexec_op"),
    Family("XENVER_", "version.h", "xen_version"),
    Family("CALLBACKOP_", "callback.h", "callback_op"),
    Family("XENNMI_", "nmi.h", "nmi_op"),
    Family("XENOPROF_", "xenoprof.h", "xenoprof_op", but="last_op"),
    Family("XENPMU_", "pmu.h", "xenpmu_op"),
    Family("XEN_HYPFS_OP_", "hypfs.h", "hypfs_op"),
    Family("XEN_ARGO_OP_", "argo.h", "argo_op"),
    Family("VMASST_CMD_", "xen.h", "vm_assist"),
)

INTERFACES = (
    ("XEN_DOMCTL_INTERFACE_VERSION", "domctl.h"),
    ("XEN_SYSCTL_INTERFACE_VERSION", "sysctl.h"),
    ("XENPF_INTERFACE_VERSION", "platform.h"),
    ("DOM0_INTERFACE_VERSION", "dom0_ops.h"),
    ("__XEN_LATEST_INTERFACE_VERSION__", "xen-compat.h"),
)


def header_constants(text: str) -> dict[str, set[tuple[int | None, str]]]:
    """Return name -> {(number, text of the definition)} over the branches that Xen itself may see."""
    known = {k: v for k, v in IN_XEN.items() if k != "__XEN_LATEST_INTERFACE_VERSION__"}
    raw: dict[str, set[str]] = {}
    for line, _ in preprocess(text, known):
        undef = re.match(r"#\s*undef\s+(\w+)", line)
        if undef:
            raw.pop(undef[1], None)
        m = _DEFINE.match(line)
        if m and m[2]:
            raw.setdefault(m[1], set()).add(m[2].strip())

    def value(text: str, depth: int = 0) -> int | None:
        number = plain_number(text)
        if number is None and depth < 4 and len(raw.get(text, ())) == 1:
            return value(next(iter(raw[text])), depth + 1)
        return number

    return {name: {(value(t), t) for t in texts} for name, texts in raw.items()}


def numbers_toml(git: Git, releases: list[Release]) -> str:
    spans = Spans(releases)
    first = {v: i for i, v in enumerate(spans.order)}
    rows: dict[tuple[int, str, int], set[str]] = {}  # family, name, number
    interfaces: dict[tuple[str, int], set[str]] = {}
    unknown: dict[tuple[str, str], set[str]] = {}
    clashes: set[str] = set()
    for r in releases:
        headers: dict[str, dict[str, set[tuple[int | None, str]]]] = {}
        for header in {f.header for f in FAMILIES} | {h for _, h in INTERFACES}:
            headers[header] = header_constants(git.show(r.tag, f"xen/include/public/{header}") or "")
        headers["hvm/hvm_op.h"] |= header_constants(git.show(r.tag, "xen/include/public/hvm/params.h") or "")  # 3.0.3
        here = hypercall_numbers(git, r.tag)
        for i, family in enumerate(FAMILIES):
            if family.hypercall not in here:
                continue
            pattern = re.compile(re.escape(family.prefix) + f"(?!{family.but or '$'})" + family.names + r"\w*")
            taken: dict[int, str] = {}
            for name, values in headers[family.header].items():
                if not pattern.fullmatch(name) or name.endswith("_INTERFACE_VERSION"):
                    continue
                number, text = next(iter(values))
                if name[len(family.prefix)].isupper() and re.fullmatch(r"[A-Za-z]\w*", text):
                    continue  # an old spelling: #define PHYSDEVOP_APIC_READ PHYSDEVOP_apic_read
                if len(values) > 1 or number is None:
                    text = " or ".join(sorted(t for _, t in values))
                    unknown.setdefault((name, text), set()).add(r.version)
                    continue
                rows.setdefault((i, name, number), set()).add(r.version)
                if number in taken:
                    clashes.add(f"{family.prefix}: {number} is {taken[number]} and {name}")
                taken[number] = name
        for name, header in INTERFACES:
            for number, text in headers[header].get(name, ()):
                if re.fullmatch(r"XENPF_\w+", text):
                    continue  # dom0_ops.h after 3.0.2: an old spelling
                if number is None:
                    unknown.setdefault((name, text), set()).add(r.version)
                else:
                    interfaces.setdefault((name, number), set()).add(r.version)
    for clash in sorted(clashes):
        print(f"note: {clash}", file=sys.stderr)
    out = [_banner("sub-operation numbers and interface versions in Xen's public headers", releases)]
    out += [
        "# constant: as Xen itself sees it (newest interface version); a renumbered constant has two rows. That a",
        "#   header defines a number does not say that any caller's handler implements it.",
        "# interface: the version that a caller of that hypercall must state.",
        "# family: which constants (by prefix, the longest that fits) belong to which hypercall; of: they are the",
        "#   commands of that one sub-operation. header: below xen/include/public, at each tag of releases.toml.",
        "# unknown: the script could not tell the number.",
        "",
        "constant = [",
    ]
    for (_, name, number), versions in sorted(
        rows.items(), key=lambda kv: (kv[0][0], kv[0][2], min(first[v] for v in kv[1]), kv[0][1])
    ):
        out.append(f'  {{ name = "{name}", number = {number}, releases = {_strings(spans.fold(versions))} }},')
    out += ["]", "", "interface = ["]
    for (name, number), versions in sorted(interfaces.items(), key=lambda kv: (kv[0][0], min(first[v] for v in kv[1]))):
        text = f"{number:#x}" if number > 0xFFFF and name != "XEN_DOMCTL_INTERFACE_VERSION" else str(number)
        out.append(f'  {{ name = "{name}", number = {text}, releases = {_strings(spans.fold(versions))} }},')
    out += ["]", "", "family = ["]
    for f in FAMILIES:
        of = f', of = "{f.of}"' if f.of else ""
        out.append(f'  {{ prefix = "{f.prefix}", hypercall = "{f.hypercall}", header = "{f.header}"{of} }},')
    out += ["]", "", "unknown = ["]
    for (name, text), versions in sorted(unknown.items()):
        quoted = text.replace("\\", "\\\\").replace('"', '\\"')
        out.append(f'  {{ name = "{name}", text = "{quoted}", releases = {_strings(spans.fold(versions))} }},')
    out.append("]")
    return "\n".join(out) + "\n"


# ── the command ──────────────────────────────────────────────────────────────────────────────────────────────────────


def main() -> int:
    """Write (or with --check compare) the generated files; returns 1 if --check found a difference."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--xen-git", required=True, metavar="DIR", help="clone of Xen with all release tags")
    parser.add_argument("--out", type=Path, default=ABI, metavar="DIR", help="where to write (default: xtrace/replay/abi)")
    parser.add_argument("--only", default="releases,tables,numbers", metavar="NAMES", help="comma-separated file names")
    parser.add_argument("--check", action="store_true", help="write nothing; fail if a file differs")
    parser.add_argument("--verbose", action="store_true", help="report handlers named unlike their hypercall")
    args = parser.parse_args()
    git = Git(args.xen_git)
    releases = read_releases(git)
    makers = {
        "releases": lambda: releases_toml(git, releases),
        "tables": lambda: tables_toml(git, releases, args.verbose),
        "numbers": lambda: numbers_toml(git, releases),
    }
    status = 0
    for name in args.only.split(","):
        if name not in makers:
            parser.error(f"--only: {name!r} is none of {', '.join(makers)}")
        path, text = args.out / f"{name}.toml", makers[name]()
        if args.check:
            same = path.exists() and path.read_text(encoding="utf-8") == text
            print(f"{path}: {'up to date' if same else 'DIFFERS from what Xen says'}")
            status |= not same
        else:
            path.write_text(text, encoding="utf-8")
            print(f"{path}: {len(text)} bytes")
    git.close()
    return int(status)


if __name__ == "__main__":
    sys.exit(main())
