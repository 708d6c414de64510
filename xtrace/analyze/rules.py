"""The rule codes, declared as data in ``rules.toml``."""

from __future__ import annotations

import tomllib
from dataclasses import dataclass
from functools import cache
from importlib import resources

from xtrace.errors import UsageError

__all__ = ("Rule", "by_name", "get", "rules")


@dataclass(frozen=True, slots=True)
class Rule:
    """One code: what it is called, why it matters, what to do, and a command line that shows it."""

    code: str
    name: str
    title: str
    why: str
    what_to_do: str
    example: str


@cache
def rules() -> dict[str, Rule]:
    """Return code -> rule, in order."""
    text = resources.files("xtrace.analyze").joinpath("rules.toml").read_text("utf-8")
    return {code: Rule(code, **{k: row[k] for k in ("name", "title", "why", "what_to_do", "example")})
            for code, row in tomllib.loads(text).items()}  # fmt: skip


@cache
def by_name() -> dict[str, str]:
    """Return outcome or caveat name -> code."""
    return {rule.name: code for code, rule in rules().items()}


def get(code: str) -> Rule:
    """Return one rule.

    Raises:
        UsageError: no such code.
    """
    try:
        return rules()[code.upper()]
    except KeyError:
        raise UsageError(f"no rule is called {code!r}; there are {', '.join(rules())}") from None
