"""Reading a Xen git tree: files at tags, and the definition of a symbol in one, for checking cites."""

from __future__ import annotations

import re
import subprocess
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, TYPE_CHECKING

from xtrace.errors import InputError

if TYPE_CHECKING:
    from types import TracebackType

__all__ = ("XenTree", "definition")


@dataclass(slots=True)
class XenTree:
    """A Xen repository (bare or not), read through one ``git cat-file --batch``.

    Raises:
        InputError: ``folder`` is no git repository, or git is not there.
    """

    folder: str
    _cat: subprocess.Popen[bytes] | None = None
    _seen: dict[tuple[str, str], str | None] = field(default_factory=dict)

    def __enter__(self) -> XenTree:
        if not Path(self.folder).is_dir():
            raise InputError(self.folder, "no such folder")
        command = ["git", "-C", self.folder]
        try:
            done = subprocess.run([*command, "rev-parse", "--git-dir"], capture_output=True, check=False)
        except FileNotFoundError as exc:
            raise InputError(self.folder, "git is not installed") from exc
        if done.returncode:
            raise InputError(self.folder, "is not a git repository")
        self._cat = subprocess.Popen([*command, "cat-file", "--batch"], stdin=subprocess.PIPE, stdout=subprocess.PIPE)
        return self

    def __exit__(self, kind: type[BaseException] | None, exc: BaseException | None, tb: TracebackType | None) -> None:
        if self._cat is not None:
            pipe: IO[bytes] | None = self._cat.stdin
            if pipe is not None:
                pipe.close()
            self._cat.wait()

    def _ask(self, name: str) -> tuple[str, bytes] | None:
        """Return (type, content) of an object, or None if there is none."""
        cat = self._cat
        assert cat is not None
        assert cat.stdin is not None
        assert cat.stdout is not None
        cat.stdin.write(f"{name}\n".encode())
        cat.stdin.flush()
        head = cat.stdout.readline().split()
        if len(head) != 3:
            return None
        data = cat.stdout.read(int(head[2]))
        cat.stdout.read(1)
        return head[1].decode(), data

    def file(self, tag: str, path: str) -> str | None:
        """Return the text of a file at a tag, or None if it is not there."""
        key = (tag, path)
        if key not in self._seen:
            if len(self._seen) > 64:
                self._seen.clear()
            got = self._ask(f"{tag}:{path}")
            self._seen[key] = got[1].decode("utf-8", "replace") if got is not None and got[0] == "blob" else None
        return self._seen[key]

    def grep(self, rev: str, word: str, folder: str = "xen") -> list[str]:
        """Return the paths below ``folder`` whose text holds ``word`` at a revision; empty if there is no such revision."""
        command = ["git", "-C", self.folder, "grep", "-l", "-F", "-e", word, rev, "--", folder]
        done = subprocess.run(command, capture_output=True, check=False)
        return [line.partition(":")[2] for line in done.stdout.decode("utf-8", "replace").splitlines()]

    def is_commit(self, name: str) -> bool:
        """Say whether a commit (or tag of one) exists."""
        got = self._ask(f"{name}^{{commit}}")
        return got is not None


def _function(text: str, name: str) -> str | None:
    """Return the C functions called ``name`` (there may be several under #ifdef), from name to closing brace."""
    out = []
    # do_xen_version is written DO(xen_version) where it is compiled for 32-bit callers too.
    spelled = rf"(?:\b{name}|\b(?:DO|COMPAT|compat)\({name.removeprefix('do_')}\))"
    for found in re.finditer(rf"^(?![#\s]).*?{spelled}\s*\(", text, re.M):
        depth, i, start = 0, 0, found.end() - 1
        # Past the parameter list: a definition goes on with a brace, a declaration or a call does not.
        for i in range(start, len(text)):
            depth += {"(": 1, ")": -1}.get(text[i], 0)
            if depth == 0:
                break
        after = re.match(r"\)[^;{}()]*(?:__\w+\([^)]*\)[^;{}()]*)*\{", text[i:])
        if after is None:
            continue
        end = re.compile(r"^\}(?!\))", re.M).search(text, i)
        out.append(text[found.start() : end.end() if end else len(text)])
    return "\n".join(out) or None


def definition(text: str, symbol: str, path: str) -> str | None:
    """Return what defines ``symbol`` in a file: a macro, function, structure, enumeration, table or row of one."""
    name = re.escape(symbol)
    if symbol.startswith(("struct ", "union ", "enum ")):
        found = re.search(rf"{name}\s*\{{.*?^\}}", text, re.S | re.M)
        return found[0] if found else None
    if path.endswith("Kconfig"):
        found = re.search(rf"^config {name}$.*?(?=^config |\Z)", text, re.S | re.M)
        return found[0] if found else None
    if path.endswith("hypercall-defs.c"):
        rows = [line for line in text.splitlines() if re.match(rf"{name}\b", line)]
        if symbol == "table":
            rows = text[text.rfind("\ntable:") :].splitlines()
        return "\n".join(rows) or None
    macros = re.findall(rf"^[ \t]*#[ \t]*define[ \t]+{name}\b(?:.*\\\n)*.*", text, re.M)
    if macros:
        return "\n".join(macros)
    body = _function(text, name)
    if body is not None:
        return body
    for pattern in (
        rf"(?:struct|union) {name}\s*\{{.*?^\}};?",
        rf"enum {name}\s*\{{.*?\}}",
        rf"typedef (?:struct|enum|union)[^;]*?\{{(?:(?!typedef).)*?\}}\s*{name};",
        rf"\b{name}\s*\[[^\n]*?\]\s*=\s*\{{.*?^\}};",
        rf"(?:ENTRY|GLOBAL)\({name}\).*?(?=^(?:ENTRY|GLOBAL)\(|\Z)",
    ):
        several = [m[0] for m in re.finditer(pattern, text, re.S | re.M)]  # several under #ifdef
        if several:
            return "\n".join(several)
    # An enumerator, a label, a variable: the lines that name it.
    rows = [line for line in text.splitlines() if re.search(rf"\b{name}\b", line)]
    return "\n".join(rows) or None
