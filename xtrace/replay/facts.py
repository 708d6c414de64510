"""The fact files of ``xtrace/replay/abi``, looked up by release, caller and hypercall.

Nothing here knows what any release does; it only finds the entry that speaks about it. See ``abi/FORMAT.md``.
"""

from __future__ import annotations

import tomllib
from functools import cache
from importlib import resources
from typing import TYPE_CHECKING, Any, Final

from xtrace import release as releases_mod
from xtrace.errors import FactError
from xtrace.replay.behaviour import U64, Behaviour, Check, Dispatch, Hypercall, Special, Status

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping


__all__ = (
    "Behaviour",
    "Check",
    "Dispatch",
    "Hypercall",
    "Special",
    "command_hypercalls",
    "files",
    "hypercall_names",
    "is_command",
    "lookup",
    "mark",
    "modelled_releases",
    "operation_label",
    "operation_names",
)


#: Files of the data folder that are not one hypercall's facts.
_OTHER: Final = frozenset({"releases.toml", "tables.toml", "numbers.toml", "never.toml", "trace_events.toml"})

#: Prefix of the constants that arg0 of a hypercall without a file of its own may hold.
_PREFIX: Final = {
    "vcpu_op": "VCPUOP_", "sched_op": "SCHEDOP_", "event_channel_op": "EVTCHNOP_", "physdev_op": "PHYSDEVOP_",
    "xen_version": "XENVER_", "kexec_op": "KEXEC_CMD_", "console_io": "CONSOLEIO_",
}  # fmt: skip


def _read(name: str) -> dict[str, Any]:
    text = resources.files("xtrace.replay").joinpath("abi", name).read_text("utf-8")
    try:
        return tomllib.loads(text)
    except tomllib.TOMLDecodeError as exc:
        raise FactError(f"abi/{name}: {exc}") from exc


@cache
def files() -> dict[int, str]:
    """Return the fact file of each hypercall number that has one."""
    out: dict[int, str] = {}
    for entry in resources.files("xtrace.replay").joinpath("abi").iterdir():
        if entry.name.endswith(".toml") and entry.name not in _OTHER:
            head = _load(entry.name)["hypercall"]
            if head["number"] in out:
                raise FactError(f"abi/{entry.name}: hypercall {head['number']} stands in {out[head['number']]} too")
            out[head["number"]] = entry.name
    return out


@cache
def _load(name: str) -> dict[str, Any]:
    return _read(name)


@cache
def _never() -> dict[str, Any]:
    return _load("never.toml")


def _tables() -> list[dict[str, Any]]:
    rows: list[dict[str, Any]] = _load("tables.toml").get("hypercall", [])
    return rows


@cache
def _numbers() -> dict[str, list[tuple[int, frozenset[str]]]]:
    """Return constant name -> [(number, releases)], from the generated table."""
    out: dict[str, list[tuple[int, frozenset[str]]]] = {}
    for row in _load("numbers.toml").get("constant", []):
        spans = releases_mod.expand(tuple(row["releases"]))
        out.setdefault(row["name"], []).append((row["number"], spans))
    return out


@cache
def hypercall_names() -> dict[int, str]:
    """Return hypercall number -> Xen's name, the newest one where it was renamed."""
    out: dict[int, str] = {}
    for row in _tables():
        out[int(row["number"])] = row["name"]
    for number, name in files().items():
        out[number] = _load(name)["hypercall"]["name"]
    return out


@cache
def modelled_releases() -> frozenset[str]:
    """Return the releases that every fact file speaks about."""
    parts = [releases_mod.expand(tuple(_load(name)["model"]["releases"])) for name in files().values()]
    return frozenset.intersection(*parts) if parts else frozenset()


@cache
def is_command(name: str) -> bool:
    """Say whether arg0 of the hypercall described by file ``name`` names a sub-operation."""
    return bool(_load(name)["hypercall"].get("command", False))


@cache
def command_hypercalls() -> frozenset[int]:
    """Return the numbers of the hypercalls whose arg0 names a sub-operation."""
    own = {number for number, name in files().items() if is_command(name)}
    return frozenset(own | {int(r["number"]) for r in _never().get("never", []) if r.get("command")})


def operation_label(number: int, operation: int | None) -> str | None:
    """Return Xen's constant for a sub-operation number of any release; the number itself if none is known."""
    if operation is None:
        return None
    own = operation_names(number).get(operation)
    if own is not None:
        return own
    prefix = _PREFIX.get(hypercall_names().get(number, ""))
    if prefix is not None:
        for name, rows in _numbers().items():
            if name.startswith(prefix) and any(n == operation for n, _ in rows):
                return name
    return str(operation)


@cache
def operation_names(number: int) -> dict[int, str]:
    """Return sub-operation number -> Xen's constant over all releases, for a hypercall with a fact file."""
    if number not in files():
        return {}
    doc = _load(files()[number])
    return {int(o["number"]): str(o["name"]) for o in doc.get("operation", []) if "number" in o}


@cache
def _expand(spans: tuple[str, ...]) -> frozenset[str]:
    return releases_mod.expand(spans)


def _covers(row: Mapping[str, Any], release: str, caller: str, model: Mapping[str, Any]) -> bool:
    callers = row.get("callers", model.get("callers", ()))
    return caller in callers and release in _expand(tuple(row.get("releases", model.get("releases", ()))))


def _only(rows: Iterable[Mapping[str, Any]], what: str) -> Mapping[str, Any] | None:
    found = list(rows)
    if len(found) > 1:
        raise FactError(f"{what}: {len(found)} entries speak about the same release and caller")
    return found[0] if found else None


@cache
def lookup(release: str, caller: str, number: int) -> Hypercall:
    """Return the facts of hypercall ``number`` at ``release`` (a version such as ``4.4.1``) for ``caller``.

    Always answers: what no file speaks about has the status ``unknown``.

    Raises:
        FactError: two entries speak about the same release, caller and operation.
    """
    name = hypercall_names().get(number, f"hypercall_{number}")
    if number not in files():
        return _other(release, caller, number, name)
    path = files()[number]
    doc = _load(path)
    head, model = doc["hypercall"], doc["model"]
    where = f"abi/{path}: {release}, {caller}"

    def facts(status: Status, why: str, **kw: Any) -> Hypercall:
        return Hypercall(
            name=head["name"],
            number=number,
            release=release,
            caller=caller,
            status=status,
            command=bool(head.get("command", False)),
            parameters=tuple(head.get("parameters", ())),
            dispatch=kw.get("dispatch"),
            by_number=kw.get("by_number", {}),
            absent_errno=kw.get("absent_errno", "-ENOSYS"),
            known_numbers=operation_names(number),
            never_operations=None,
            why=why,
        )

    if not _covers({}, release, caller, model):
        return facts("unknown", f"{head['name']} is not modelled for {caller} at {release}")
    present = _only((r for r in doc.get("present", []) if _covers(r, release, caller, model)), f"{where}, present")
    if present is None:
        absent = _only((r for r in doc.get("absent", []) if _covers(r, release, caller, model)), f"{where}, absent")
        errno = (absent or {}).get("absent_errno", "-ENOSYS")
        return facts("absent", f"{head['name']} is not in the {caller} hypercall table of {release}", absent_errno=errno)
    dispatch = None
    if head.get("command"):
        row = _only((r for r in doc.get("dispatch", []) if _covers(r, release, caller, model)), f"{where}, dispatch")
        if row is None:
            return facts("unknown", f"how {head['name']} is dispatched at {release} is not known")
        dispatch = Dispatch(
            mask=int(row.get("mask", U64 if int(row.get("width", 64)) == 64 else 0xFFFFFFFF)),
            shift=row.get("shift"),
            width=int(row.get("width", 64)),
            unmatched=str(row.get("unmatched", "-ENOSYS")),
            cites=tuple(row.get("cite", ())),
            checks=tuple(_check(c) for c in row.get("requires", ())),
            command_bits=row.get("command_bits"),
            command_bits_except=tuple(row.get("command_bits_except", ())),
            guard=str(row.get("guard", "any")),
            guard_errno=str(row.get("guard_errno", "-EPERM")),
            sign_extend=bool(row.get("sign_extend", False)),
        )
    by_number: dict[int, Behaviour] = {}
    for i, op in enumerate(doc.get("operation", [])):
        rows = ((j, r) for j, r in enumerate(op.get("behaviour", [])) if _covers(r, release, caller, model))
        found = list(rows)
        if len(found) > 1:
            raise FactError(f"{where}, {op['name']}: {len(found)} behaviours")
        if found:
            j, row = found[0]
            behaviour = _behaviour(op, row, caller, (path, i, j))
            if behaviour.number in by_number:
                raise FactError(f"{where}: number {behaviour.number} stands for two operations")
            by_number[behaviour.number] = behaviour
    return facts("modelled", "", dispatch=dispatch, by_number=by_number)


def _behaviour(op: Mapping[str, Any], row: Mapping[str, Any], caller: str, ident: tuple[Any, ...]) -> Behaviour:
    caveats = row.get("caveats", op.get("caveats", ()))
    if isinstance(caveats, dict):
        caveats = caveats.get(caller, ())
    checks = tuple(_check(c) for c in row.get("requires", ()))
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
        )
        for s in row.get("special", ())
    )
    known = {"releases", "callers", "special", "requires", "cite", "commit"}
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
        continues_when=_check({"errno": "", **row["continues_when"]}) if "continues_when" in row else None,
        order_when=row.get("order_when"),
        inner=row["inner"] if isinstance(row.get("inner"), str) else None,
        inner_operations={int(k): str(v) for k, v in row.get("inner_operations", {}).items()},
        inner_continues=tuple(row["inner_continues"]) if "inner_continues" in row else None,
        inner_unmatched=str(row.get("inner_unmatched", "-ENOSYS")),
        domids_unless=tuple(sorted((k, int(v)) for k, v in row.get("domids_unless", {}).items())),
        ident=ident,
    )


@cache
def mark(release: str, caller: str, number: int) -> tuple[int, int] | None:
    """Return (argument, flag bit) that shows a continuation by itself where its encoding is not modelled; None without one."""
    if number not in files():
        return None
    row = _only(
        (r for r in _load(files()[number]).get("mark", []) if _covers(r, release, caller, {})), f"abi/{files()[number]}, mark"
    )
    return None if row is None else (_argument(row["arg"]), int(row["flag"]))


def _check(c: Mapping[str, Any]) -> Check:
    return Check(
        at=c["at"],
        errno=c["errno"],
        maximum=c.get("max"),
        minimum=c.get("min"),
        equals=c.get("equals"),
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
    why = f"{name} is not modelled yet"
    operations: set[int] | None = set()
    command = False
    for row in _never().get("never", []):
        if row["number"] != number or not _covers(row, release, caller, {}):
            continue
        command = command or bool(row.get("command", False))
        status, why = "never", f"{name} never leaves a continuation at {release}"
        if "operations" not in row:
            operations = None
            break
        assert operations is not None
        for constant in row["operations"]:
            operations |= {n for n, spans in _numbers().get(constant, ()) if release in spans}
    return Hypercall(
        name=name,
        number=number,
        release=release,
        caller=caller,
        status=status,
        command=command,
        parameters=(),
        dispatch=None,
        by_number={},
        absent_errno="-ENOSYS",
        known_numbers={},
        never_operations=None if operations is None or status != "never" else frozenset(operations),
        why=why,
    )
