"""Judging continuations given by hand: ``xtrace decode``, one or many."""

from __future__ import annotations

import difflib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import polars as pl

from xtrace import release
from xtrace.analyze import findings
from xtrace.errors import UnknownHypercall, UsageError
from xtrace.replay import facts
from xtrace.schema import ARGS, CALLERS, CONTINUATIONS, FINDINGS

__all__ = ("Request", "flatten", "hypercall_number", "judge_many", "number", "request")

_U64 = (1 << 64) - 1
_ISSUERS = ("guest", "device_model", "control", "unknown")


@dataclass(frozen=True, slots=True)
class Request:
    """One continuation, and between which releases it travels."""

    source: str
    target: str
    caller: str
    op: int
    args: tuple[int | None, ...]
    memory: Mapping[str, int] = field(default_factory=dict)
    issuer: str = "guest"
    issued_args: tuple[int | None, ...] | None = None
    issued_memory: Mapping[str, int] = field(default_factory=dict)


def number(value: Any, what: str) -> int:
    """Turn a number or a decimal or hex string into an unsigned 64-bit value (negative ones wrap, as registers do).

    Raises:
        UsageError: it is none.
    """
    try:
        if isinstance(value, bool) or not isinstance(value, int | str):
            raise ValueError
        got = value if isinstance(value, int) else int(value.strip(), 0)
    except ValueError:
        raise UsageError(f"{what}: {value!r} is not a number") from None
    if not -(1 << 63) <= got <= _U64:
        raise UsageError(f"{what}: {value!r} does not fit into 64 bits")
    return got & _U64


def hypercall_number(value: Any) -> int:
    """Return the number of a hypercall given by number or by Xen's name.

    Raises:
        UnknownHypercall: no Xen release has it.
    """
    names = facts.hypercall_names()
    if isinstance(value, int) and not isinstance(value, bool):
        got = value
    else:
        text = str(value).strip()
        plain = text.removeprefix("__HYPERVISOR_")
        for n, name in names.items():
            if name == plain:
                return n
        try:
            got = int(text, 0)
        except ValueError:
            near = difflib.get_close_matches(plain, list(names.values()), n=1)
            hint = f"; did you mean {near[0]}?" if near else ""
            raise UnknownHypercall(f"no Xen release has a hypercall called {text!r}{hint}") from None
    if not 0 <= got < 64:
        raise UnknownHypercall(f"no Xen release has a hypercall number {got}")
    return got


def flatten(memory: Any, what: str = "guest_memory") -> dict[str, int]:
    """Turn nested guest memory into flat names: ``entry`` = {op, args, result, memory} and dotted fields.

    Raises:
        UsageError: it is no object of numbers.
    """
    out: dict[str, int] = {}

    def walk(prefix: str, node: Any) -> None:
        if node is None:
            return
        if isinstance(node, Mapping):
            for key, value in node.items():
                walk(f"{prefix}.{key}" if prefix else str(key), value)
        elif isinstance(node, Sequence) and not isinstance(node, str) and prefix.endswith("args"):
            for k, value in enumerate(node):
                walk(f"{prefix[:-1]}{k}", value)
        elif prefix.endswith("entry.op"):
            out[prefix] = hypercall_number(node)
        else:
            out[prefix] = number(node, f"{what}.{prefix}")

    if memory is not None and not isinstance(memory, Mapping):
        raise UsageError(f"{what} is not an object")
    walk("", memory or {})
    return out


def _args(values: Any, what: str, op: int) -> tuple[int | None, ...]:
    if not isinstance(values, Sequence) or isinstance(values, str):
        raise UsageError(f"{what} is not a list")
    if len(values) > 6:
        raise UsageError(f"{what} has {len(values)} values; a hypercall has at most six")
    constants = {name: n for n, name in facts.operation_names(op).items()}
    out: list[int | None] = []
    for k, v in enumerate(values):
        if k == 0 and isinstance(v, str) and v in constants:
            out.append(constants[v])
        else:
            out.append(None if v is None or v == "?" else number(v, f"{what}[{k}]"))
    return tuple(out)


def _one_release(text: Any, what: str) -> str:
    if not isinstance(text, str):
        raise UsageError(f"{what} names no release")
    chosen = release.parse(text)
    if len(chosen.releases) != 1:
        raise UsageError(f"{what}: {text} is a series; name one point release of it, such as {chosen.releases[-1].version}")
    return chosen.releases[0].version


def request(row: Mapping[str, Any]) -> Request:
    """Build a request from the JSON object of ``decode --batch`` (docs/json.md).

    Raises:
        UsageError: a key is missing, unknown or has a bad value.
    """
    known = {"id", "caller", "source", "target", "op", "args", "guest_memory", "issuer", "issued"}
    for key in row:
        if key not in known:
            near = difflib.get_close_matches(str(key), sorted(known), n=1)
            raise UsageError(f"unknown key {key!r}" + (f"; did you mean {near[0]}?" if near else ""))
    for key in ("caller", "source", "target", "op", "args"):
        if key not in row:
            raise UsageError(f"{key} is missing")
    caller = row["caller"]
    if caller not in CALLERS:
        raise UsageError(f"no caller is called {caller!r}; there are {', '.join(CALLERS)}")
    issuer = row.get("issuer") or "guest"
    if issuer not in _ISSUERS:
        raise UsageError(f"no issuer is called {issuer!r}; there are {', '.join(_ISSUERS)}")
    issued = row.get("issued")
    if issued is not None and not isinstance(issued, Mapping):
        raise UsageError("issued is not an object")
    op = hypercall_number(row["op"])
    return Request(
        source=_one_release(row["source"], "source"),
        target=_one_release(row["target"], "target"),
        caller=caller,
        op=op,
        args=_args(row["args"], "args", op),
        memory=flatten(row.get("guest_memory")),
        issuer=issuer,
        issued_args=_args(issued["args"], "issued.args", op) if issued and issued.get("args") is not None else None,
        issued_memory=flatten(issued.get("guest_memory"), "issued.guest_memory") if issued else {},
    )


def _memory(fields: Mapping[str, int]) -> list[dict[str, Any]] | None:
    return [{"field": k, "value": v} for k, v in fields.items()] or None


def judge_many(requests: Sequence[Request]) -> pl.DataFrame:
    """Judge continuations; one row of ``schema.FINDINGS`` for each, in order, resumes included."""
    groups: dict[tuple[str, str, str], list[int]] = {}
    for k, r in enumerate(requests):
        groups.setdefault((r.source, r.target, r.issuer), []).append(k)
    parts = []
    for (source, target, issuer), members in groups.items():
        frame = pl.DataFrame([_row(k, requests[k]) for k in members], schema={**CONTINUATIONS, "input": pl.UInt32()})
        context = findings.Context((source,), (target,), frozenset(), {None: None}, issuer)
        parts.append(findings.judge_continuations(frame, context, findings.Tally.of((target,)), everything=True))
    if not parts:
        return pl.DataFrame(schema=FINDINGS)
    return pl.concat(parts).sort("seq")


def _row(k: int, r: Request) -> dict[str, Any]:
    args = [*r.args, None, None, None, None, None, None][:6]
    issued = [*(r.issued_args or ()), None, None, None, None, None, None][:6]
    return {
        "call": None,
        "seq": k,
        "offset": None,
        "line": None,
        "tsc": None,
        "domid": None,
        "vcpu": None,
        "caller": r.caller,
        "kind": "sample",
        "op": r.op,
        **dict(zip(ARGS, args, strict=True)),
        "cut": 0,
        "rip": None,
        "memory": _memory(r.memory),
        "evidence": "proved",
        "issued_seq": None,
        **{f"issued_{a}": v for a, v in zip(ARGS, issued, strict=True)},
        "issued_memory": _memory(r.issued_memory),
        "input": 0,
    }
