"""The facts about hypercalls, looked up by release, caller and number.

Nothing here knows what any release does; it only finds the entry that speaks about it. See ``abi/FORMAT.md``.
"""

from __future__ import annotations

from dataclasses import replace
from functools import cache
from typing import TYPE_CHECKING, Any, Final

from xtrace import release as releases_mod
from xtrace.errors import FactError
from xtrace.replay.behaviour import U64, Behaviour, Check, Dispatch, Hypercall, Special, Status
from xtrace.replay.factfiles import (
    constant_number,
    constants,
    covers,
    documents,
    files,
    has_caller,
    hypercall_names,
    in_table,
    interface_version,
    load,
    only,
    part,
)

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping


__all__ = (
    "VIRIDIAN",
    "Behaviour",
    "Check",
    "Dispatch",
    "Hypercall",
    "Special",
    "build",
    "command_at",
    "command_hypercalls",
    "files",
    "hypercall_names",
    "lookup",
    "modelled_releases",
    "operation_label",
    "operation_names",
    "overlay",
    "override_dispatch",
    "raw",
)


#: Set in eax: one of the hypercalls that Hyper-V's interface gives to an HVM guest, not one of Xen's.
VIRIDIAN: Final = 1 << 31

#: Prefix of the constants that arg0 of a hypercall without a file of its own may hold.
_PREFIX: Final = {
    "vcpu_op": "VCPUOP_", "sched_op": "SCHEDOP_", "event_channel_op": "EVTCHNOP_", "physdev_op": "PHYSDEVOP_",
    "xen_version": "XENVER_", "kexec_op": "KEXEC_CMD_", "console_io": "CONSOLEIO_",
}  # fmt: skip


@cache
def modelled_releases(caller: str = "pv64") -> frozenset[str]:
    """Return the releases at which every hypercall in a caller's table that may continue has facts."""
    return frozenset(
        r.version
        for r in releases_mod.releases()
        if in_table(r.version, caller, 12) is not None
        and all(part(r.version, caller, n) or not in_table(r.version, caller, n) for n in files())
    )


@cache
def command_at(number: int) -> str | None:
    """Return where the sub-operation of a hypercall is named: ``arg0``, ``mem.cmd``; None if it has none."""
    for _, doc in documents(number):
        command = doc["hypercall"].get("command", False)
        return command if isinstance(command, str) else "arg0" if command else None
    return "arg0" if any(r["number"] == number and r.get("command") for r in load("never.toml").get("never", [])) else None


@cache
def command_hypercalls() -> frozenset[int]:
    """Return the numbers of the hypercalls with sub-operations."""
    rows = load("never.toml").get("never", [])
    return frozenset(n for n in {*files(), *(int(r["number"]) for r in rows)} if command_at(n) is not None)


def operation_label(number: int, operation: int | None) -> str | None:
    """Return Xen's constant for a sub-operation number of any release; the number itself if none is known."""
    if operation is None:
        return None
    own = operation_names(number).get(operation)
    if own is not None:
        return own
    prefix = _PREFIX.get(hypercall_names().get(number, ""))
    if prefix is not None:
        for name, rows in constants().items():
            if name.startswith(prefix) and any(n == operation for n, _ in rows):
                return name
    return str(operation)


@cache
def operation_names(number: int) -> dict[int, str]:
    """Return sub-operation number -> Xen's constant over all releases, for a hypercall with fact files."""
    out: dict[int, str] = {}
    for _, doc in documents(number):
        for op in doc.get("operation", []):
            if "number" in op:
                out[int(op["number"])] = str(op["name"])
        for group in doc.get("group", []):
            for name in group["names"]:
                for n, _ in constants().get(name, ()):
                    out.setdefault(n, str(name))
    return out


#: Versions that are no release: (caller, number) -> facts, by name (models.py).
_OVERLAYS: dict[str, Callable[[str, int], Hypercall]] = {}


def overlay(name: str, look: Callable[[str, int], Hypercall]) -> None:
    """Let ``look`` answer for the version ``name``."""
    _OVERLAYS[name] = look
    lookup.cache_clear()


@cache
def lookup(release: str, caller: str, number: int) -> Hypercall:
    """Return the facts of hypercall ``number`` at ``release`` (a version such as ``4.4.1``) for ``caller``.

    Always answers: what no file speaks about has the status ``unknown``.

    Raises:
        FactError: two entries speak about the same release, caller and operation.
    """
    name = hypercall_names().get(number, f"hypercall_{number}")
    if release in _OVERLAYS:
        return _OVERLAYS[release](caller, number)
    if "+" in release:
        return replace(lookup(releases_mod.facts_of(release, name), caller, number), release=release)
    if number & VIRIDIAN and caller in ("hvm64", "hvm32"):
        return _viridian(release, caller, number)
    if number not in files():
        return _other(release, caller, number, name)
    path = part(release, caller, number)
    at = command_at(number)

    def answer(status: Status, why: str, **kw: Any) -> Hypercall:
        return Hypercall(
            name=name,
            number=number,
            release=release,
            caller=caller,
            status=status,
            command=at is not None,
            command_at=at,
            parameters=() if path is None else tuple(load(path)["hypercall"].get("parameters", ())),
            dispatch=kw.get("dispatch"),
            by_number=kw.get("by_number", {}),
            absent_errno=kw.get("absent_errno", "-ENOSYS"),
            known_numbers=operation_names(number),
            never_operations=None,
            why=why,
            reaches=_reaches(release, caller, number) if status == "absent" else None,
        )

    if path is None:
        if not has_caller(release, caller):
            return answer("absent", f"there are no {caller} callers at {release}")
        if in_table(release, caller, number) is False:
            return answer("absent", f"{name} is not in the {caller} hypercall table of {release}")
        return answer("unknown", f"{name} is not modelled for {caller} at {release}")
    doc = load(path)
    model = doc["model"]
    where = f"abi/{path}: {release}, {caller}"

    def one(kind: str) -> Mapping[str, Any] | None:
        return only((r for r in doc.get(kind, []) if covers(r, release, caller, model)), f"{where}, {kind}")

    if one("present") is None:
        errno = (one("absent") or {}).get("absent_errno", "-ENOSYS")
        return answer("absent", f"{name} is not in the {caller} hypercall table of {release}", absent_errno=errno)
    dispatch = None
    if at is not None:
        row = one("dispatch")
        if row is None:
            return answer("unknown", f"how {name} is dispatched at {release} is not known")
        dispatch = _dispatch(row, release)
    by_number: dict[int, Behaviour] = {}
    for behaviour in _behaviours(path, release, caller, at):
        if behaviour.number in by_number:
            raise FactError(f"{where}: number {behaviour.number} stands for two operations")
        by_number[behaviour.number] = behaviour
    return answer("modelled", "", dispatch=dispatch, by_number=by_number)


def _viridian(release: str, caller: str, number: int) -> Hypercall:
    """Answer for Hyper-V's hypercalls: of those that restart nothing has been done, and the registers are as issued."""
    known = any(covers(row, release, caller, {}) for row in load("never.toml").get("viridian", []))
    status: Status = "never" if known else "absent"
    why = "a Hyper-V hypercall restarts as issued, if at all" if known else f"{release} has no Hyper-V hypercalls for {caller}"
    return Hypercall(
        "viridian", number, release, caller, status, False, None, (), None, {}, "HV_STATUS_INVALID_HYPERCALL_CODE", {}, None, why
    )  # fmt: skip


def _reaches(release: str, caller: str, number: int) -> str | None:
    """Return the hypercall that a number beyond the table ends up in, where a release masks numbers instead of refusing them."""
    row = only(
        (r for r in load("never.toml").get("number_mask", []) if covers(r, release, caller, {})), "abi/never.toml, number_mask"
    )
    if row is None or number <= int(row["mask"]):
        return None
    reached = number & int(row["mask"])
    return hypercall_names().get(reached) if in_table(release, caller, reached) else None


def _dispatch(row: Mapping[str, Any], release: str) -> Dispatch:
    return Dispatch(
        mask=int(row.get("mask", U64 if int(row.get("width", 64)) == 64 else 0xFFFFFFFF)),
        shift=row.get("shift"),
        width=int(row.get("width", 64)),
        unmatched=str(row.get("unmatched", "-ENOSYS")),
        cites=tuple(row.get("cite", ())),
        checks=tuple(_check(c, release) for c in row.get("requires", ())),
        command_bits=row.get("command_bits"),
        command_bits_except=tuple(row.get("command_bits_except", ())),
        guard=str(row.get("guard", "any")),
        guard_errno=str(row.get("guard_errno", "-EPERM")),
        guards_also=_guards_also(row),
        sign_extend=bool(row.get("sign_extend", False)),
    )


def raw(b: Behaviour) -> tuple[dict[str, Any], dict[str, Any]]:
    """Return the operation and the behaviour of a fact file that a behaviour was read from."""
    path, *place = b.ident
    doc = load(path)
    if place[0] == "group":
        group = doc["group"][place[1]]
        return {**group, "name": place[2], "number": b.number}, dict(group)
    op = doc["operation"][place[0]]
    return op, dict(op["behaviour"][place[1]])


def build(
    op: Mapping[str, Any], row: Mapping[str, Any], release: str, caller: str, at: str | None, ident: tuple[Any, ...]
) -> Behaviour:
    """Return the behaviour that an entry of a fact file, or of a model laid over it, stands for."""
    return _behaviour(op, row, release, caller, at, ident)


def override_dispatch(before: Dispatch | None, row: Mapping[str, Any], release: str) -> Dispatch:
    """Return a dispatch with some of its facts changed."""
    new = _dispatch(row, release)
    names = {"requires": "checks"}
    kept = {} if before is None else {names.get(k, k): getattr(new, names.get(k, k)) for k in row}
    return new if before is None else replace(before, **kept)


def _guards_also(row: Mapping[str, Any]) -> tuple[str, ...]:
    return tuple(str(row[k]) for k in ("guard_debug_build", "guard_console_domain") if k in row)


def _behaviours(path: str, release: str, caller: str, at: str | None) -> Iterator[Behaviour]:
    """Yield the behaviour of each operation that a part implements at a release."""
    doc = load(path)
    model = doc["model"]
    for i, op in enumerate(doc.get("operation", [])):
        found = [(j, r) for j, r in enumerate(op.get("behaviour", [])) if covers(r, release, caller, model)]
        if len(found) > 1:
            raise FactError(f"abi/{path}: {release}, {caller}, {op['name']}: {len(found)} behaviours")
        for j, row in found:
            yield _behaviour(op, row, release, caller, at, (path, i, j))
    for i, group in enumerate(doc.get("group", [])):
        if covers(group, release, caller, model):
            for name in group["names"]:
                number = constant_number(name, release)
                if number is not None:
                    # What a group says of its operations and of their behaviour stands in one entry.
                    op = {**group, "name": name, "number": number}
                    yield _behaviour(op, group, release, caller, at, (path, "group", i, name))


def _behaviour(
    op: Mapping[str, Any], row: Mapping[str, Any], release: str, caller: str, at: str | None, ident: tuple[Any, ...]
) -> Behaviour:
    caveats = row.get("caveats", op.get("caveats", ()))
    if isinstance(caveats, dict):
        caveats = caveats.get(caller, ())
    checks = tuple(_check(c, release) for c in row.get("requires", ()))
    specials = tuple(
        Special(
            name=s["name"],
            match=tuple(sorted((k, int(v)) for k, v in s["match"].items())),
            creates=bool(s.get("creates", False)),
            result=str(s.get("result", "resumes")),
            errno=s.get("errno"),
            meaning=str(s.get("meaning", "")),
            harmless=bool(s.get("harmless", False)),
            issuers=tuple(s.get("issuers", ())),
            cites=tuple(s.get("cite", ())),
            match_min=tuple(sorted((k, int(v)) for k, v in s.get("match_min", {}).items())),
            returns=s.get("returns"),
        )
        for s in row.get("special", ())
    )
    known = {"releases", "callers", "special", "requires", "cite", "commit", "names", "name", "number", "fields", "struct"}
    return Behaviour(
        operation=str(op["name"]),
        number=int(op.get("number", 0)),
        codec=str(row["codec"]),
        params={k: _argument(v) if k in ("arg", "pointer", "count") else v for k, v in row.items() if k not in known},
        unit=row.get("unit", op.get("unit")),
        fields=tuple(op.get("fields", ())),
        struct=op.get("struct"),
        total=row.get("total"),
        first=int(row.get("first", 1)),
        stride=int(row.get("stride", 1)),
        command_bits=str(row.get("command_bits", "ignored")),
        past_end=row.get("past_end"),
        max_total=row.get("max_total"),
        max_total_result=row.get("max_total_result"),
        checks=checks,
        guard=str(row.get("guard", op.get("guard", "any"))),
        guard_errno=str(row.get("guard_errno", op.get("guard_errno", "-EPERM"))),
        caveats=tuple(caveats),
        order=str(row.get("order", "ascending")),
        restart_harmless=row.get("restart_harmless"),
        held=row.get("held"),
        held_effect=row.get("held_effect"),
        breaks_own=row.get("breaks_own"),
        note=row.get("note"),
        specials=specials,
        cites=tuple(row.get("cite", ())),
        commit=row.get("commit"),
        at_end=row.get("at_end"),
        refuses=row.get("refuses"),
        last_total=row.get("last") == "total",
        max_progress=_by_caller(row.get("max_progress"), caller),
        continues_when=_check({"errno": "", **row["continues_when"]}, release) if "continues_when" in row else None,
        order_when=row.get("order_when"),
        orders=tuple(dict.fromkeys(r["order_when"] for r in op.get("behaviour", ()) if "order_when" in r)),
        inner=row["inner"] if isinstance(row.get("inner"), str) else None,
        inner_operations={int(k): str(v) for k, v in row.get("inner_operations", {}).items()},
        inner_continues=tuple(row["inner_continues"]) if "inner_continues" in row else None,
        inner_unmatched=str(row.get("inner_unmatched", "-ENOSYS")),
        domids_unless=tuple(sorted((k, int(v)) for k, v in row.get("domids_unless", {}).items())),
        command_at=at,
        never_left=bool(row.get("never_left", False)),
        guards_also=_guards_also(row),
        ident=ident,
    )


def _check(c: Mapping[str, Any], release: str) -> Check:
    equals = c.get("equals")
    if "interface" in c:
        equals = interface_version(c["interface"], release)
        if equals is None:
            raise FactError(f"abi/numbers.toml: no {c['interface']} at {release}")
    return Check(
        at=c["at"],
        errno=c["errno"],
        maximum=c.get("max"),
        minimum=c.get("min"),
        equals=equals,
        not_equals=c.get("not_equals"),
        spares=tuple(c.get("except", ())),
        zero_bits=int(c.get("zero_bits", 0)),
        resumed_only=c.get("when") == "resumed",
        width=int(c.get("width", 64)),
    )


def _argument(value: Any) -> Any:
    """Turn the location ``arg1`` into the number 1."""
    return int(value[3:]) if isinstance(value, str) and value.startswith("arg") else value


def _by_caller(value: Any, caller: str) -> int | None:
    return value.get(caller) if isinstance(value, dict) else value


def _other(release: str, caller: str, number: int, name: str) -> Hypercall:
    """Answer for a hypercall without a file of its own: ``never`` continues, or ``unknown``."""
    status: Status = "unknown"
    why = f"{name} is not modelled for {caller} at {release}"
    operations: set[int] | None = set()
    command = False
    there = in_table(release, caller, number)
    if not has_caller(release, caller):
        status, why = "absent", f"there are no {caller} callers at {release}"
    elif there is False:
        status, why = "absent", f"{name} is not in the {caller} hypercall table of {release}"
    for row in load("never.toml").get("never", []):
        if not there or row["number"] != number or not covers(row, release, caller, {}):
            continue
        command = command or bool(row.get("command", False))
        status, why = "never", f"{name} never leaves a continuation at {release}"
        if "operations" not in row:
            operations = None
            break
        assert operations is not None
        for constant in row["operations"]:
            operations |= {n for n, spans in constants().get(constant, ()) if release in spans}
    return Hypercall(
        name=name,
        number=number,
        release=release,
        caller=caller,
        status=status,
        command=command,
        command_at="arg0" if command else None,
        parameters=(),
        dispatch=None,
        by_number={},
        absent_errno="-ENOSYS",
        known_numbers={},
        never_operations=None if operations is None or status != "never" else frozenset(operations),
        why=why,
        reaches=_reaches(release, caller, number) if status == "absent" else None,
    )
