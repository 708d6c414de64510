"""The rule codes, as data: one folder a code, with the rule, example traces and what they yield.

``XT001/rule.toml`` declares the rule; beside it stand a log for each ``[[case]]`` (``bad.log`` yields the code, ``good.log`` does
not) and ``expected.json``, what ``analyze`` makes of them (the tests hold it against what it makes). A code is never reused:
a rule that goes keeps its folder, with ``retired = "why"``.
"""

from __future__ import annotations

import difflib
import tomllib
from dataclasses import dataclass
from functools import cache
from importlib import resources
from typing import TYPE_CHECKING, Any, Final

from xtrace.errors import FactError, UsageError

if TYPE_CHECKING:
    from collections.abc import Mapping
    from importlib.resources.abc import Traversable

__all__ = ("KINDS", "Case", "Reference", "Rule", "Severity", "by_name", "get", "rules")

#: What a rule is about: a continuation's outcome, a caveat on one, a call that was seen, the trace itself, a suppression.
KINDS: Final = ("outcome", "caveat", "surface", "trace", "suppression")


@dataclass(frozen=True, slots=True)
class Severity:
    """How loud a finding is: in words, and as exit bits.

    Attributes:
        words: for people.
        proved: held by a domain that migrates, or is not known not to. proved_stays: held by one that does not. inferred: by any.
        always: of rules that are not about a continuation, where these make no difference.
    """

    words: str
    proved: int | None = None
    proved_stays: int | None = None
    inferred: int | None = None
    always: int | None = None


@dataclass(frozen=True, slots=True)
class Reference:
    """Where the rule comes from: a commit of Xen (and the advisory that it belongs to), or a place in its sources.

    Attributes:
        text: what is to be found there.
        commit: abbreviated hash. since: the first release of the main line with it. xsa: number of the security advisory.
        tag, path, symbol: a place in a release's sources.
    """

    text: str
    commit: str | None = None
    since: str | None = None
    xsa: int | None = None
    tag: str | None = None
    path: str | None = None
    symbol: str | None = None

    @property
    def place(self) -> str:
        """The reference itself, for readers."""
        if self.commit is None:
            return f"{self.tag}:{self.path} ({self.symbol})"
        return f"xen.git {self.commit}" + (f" (XSA-{self.xsa})" if self.xsa else "") + f", in {self.since}"


@dataclass(frozen=True, slots=True)
class Case:
    """An example trace.

    Attributes:
        code: of the rule. name: ``bad…`` yields it, ``good…`` does not.
        args: what ``analyze`` is given beside the trace.
        status: its exit status.
        text: what is shown, in a sentence.
    """

    code: str
    name: str
    args: str
    status: int
    text: str

    @property
    def command(self) -> str:
        """The command line that shows it."""
        args = f" {self.args}" if self.args else ""
        return f"xtrace explain {self.code} --example {self.name} | xtrace analyze -{args}"

    def log(self) -> str:
        """Return the trace."""
        return _folder().joinpath(self.code, f"{self.name}.log").read_text("utf-8")


@dataclass(frozen=True, slots=True)
class Rule:
    """One code: what it is called, why it matters, what to do, how loud it is, and what shows it.

    Attributes:
        code, name: both stable; the name is that of the outcome or caveat, where it is one.
        example: arguments of a command line without a trace (``decode …``) that shows it; "" where there is none.
        cases: traces that do. no_case: why there is none.
        retired: why the code is not used any more; None: it is.
    """

    code: str
    name: str
    kind: str
    title: str
    why: str
    what_to_do: str
    severity: Severity
    example: str = ""
    references: tuple[Reference, ...] = ()
    cases: tuple[Case, ...] = ()
    no_case: str | None = None
    retired: str | None = None


def _folder() -> Traversable:
    return resources.files("xtrace.analyze.rules")


@cache
def rules() -> dict[str, Rule]:
    """Return code -> rule, in order; retired ones too.

    Raises:
        FactError: a rule's file is malformed.
    """
    found = sorted((f for f in _folder().iterdir() if f.name.startswith("XT")), key=lambda f: f.name)
    return {f.name: parse(f.name, f.joinpath("rule.toml").read_text("utf-8")) for f in found}


def parse(code: str, text: str) -> Rule:
    """Read one rule from its file.

    Raises:
        FactError: it is no TOML, or has a key missing or too many.
    """
    try:
        row: dict[str, Any] = tomllib.loads(text)
        cases = tuple(Case(code, **case) for case in row.pop("case", ()))
        references = tuple(Reference(**reference) for reference in row.pop("reference", ()))
        rule = Rule(code, severity=Severity(**row.pop("severity")), cases=cases, references=references, **row)
    except (tomllib.TOMLDecodeError, TypeError, KeyError) as exc:
        raise FactError(f"rule {code}: {exc}") from None
    if rule.kind not in KINDS:
        raise FactError(f"rule {code}: kind is {rule.kind!r}; there are {', '.join(KINDS)}")
    return rule


@cache
def by_name() -> Mapping[str, str]:
    """Return outcome or caveat name -> code."""
    return {rule.name: code for code, rule in rules().items() if rule.retired is None}


def get(code: str) -> Rule:
    """Return one rule, by its code or its name.

    Raises:
        UsageError: no such code.
    """
    known = rules()
    names = {rule.name: rule for rule in known.values()}
    found = known.get(code.upper()) or names.get(code.lower())
    if found is not None:
        return found
    digits = code.upper().removeprefix("XT").lstrip("0")
    written = f"XT{digits.zfill(3)}" if digits.isdecimal() else ""
    near = difflib.get_close_matches(code.upper(), known, 3) + difflib.get_close_matches(code.lower(), names, 1)
    near = [written] if written in known else list(dict.fromkeys(near))
    span = f"there are {next(iter(known))} to {list(known)[-1]}, see 'xtrace explain'"
    raise UsageError(f"no rule is called {code!r}; " + (f"did you mean {' or '.join(near)}?" if near else span))
