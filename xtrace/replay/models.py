"""Proposed hypervisors: a TOML file that inherits a release and overrides facts, usable wherever a release is.

See docs/models.md. The model gets a name and takes part as a version of its own; what it does not override is its parent's.
"""

from __future__ import annotations

import difflib
import tomllib
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from xtrace import release as releases_mod
from xtrace.errors import InputError, UsageError
from xtrace.replay import factfiles, facts

if TYPE_CHECKING:
    from collections.abc import Iterator

    from xtrace.replay.behaviour import Behaviour, Hypercall

__all__ = ("Model", "load", "registered")

_TOP: Final = frozenset({"model", "override"})
_MODEL: Final = frozenset({"name", "parent", "note"})
_OVERRIDE: Final = frozenset({"hypercall", "callers", "operation", "number", "dispatch", "set", "remove", "absent", "note"})
_DISPATCH: Final = frozenset(
    {
        "mask",
        "shift",
        "width",
        "sign_extend",
        "unmatched",
        "requires",
        "command_bits",
        "command_bits_except",
        "guard",
        "guard_errno",
    }
)

#: Parameters that belong to a codec: another codec does not inherit them.
_OF_CODEC: Final = frozenset(
    {
        "arg", "shift", "mask", "pointer", "size", "count", "count_width", "flag", "done", "index", "base", "total_is", "advance",
        "reduce", "to_hypercall", "to_operation", "also_restarts", "held", "held_effect",
    }
)  # fmt: skip

#: Keys of an operation that an override may give with a new one.
_OPERATION: Final = frozenset({"unit", "fields", "struct", "guard"})


@dataclass(frozen=True)
class Model:
    """A proposed hypervisor: ``name``, the release it inherits, and its overrides as they stand in the file."""

    name: str
    parent: str
    path: str
    overrides: tuple[dict[str, Any], ...]

    def hypercalls(self) -> frozenset[str]:
        """Return the names of the hypercalls that it says something about."""
        return frozenset(o["hypercall"] for o in self.overrides)

    def lookup(self, caller: str, number: int) -> Hypercall:
        """Return the facts of a hypercall as this model has them."""
        call = facts.lookup(self.parent, caller, number)
        for o in self.overrides:
            if o["hypercall"] == call.name and caller in o.get("callers", (caller,)):
                call = self._apply(call, o)
        return replace(call, release=self.name)

    def _apply(self, call: Hypercall, o: dict[str, Any]) -> Hypercall:
        where = f"{self.path}: {call.name}"
        if o.get("absent"):
            return replace(call, status="absent", dispatch=None, by_number={}, why=f"{call.name} is taken away by {self.name}")
        if call.status != "modelled":
            raise UsageError(f"{where}: is {call.status} for {call.caller} at {self.parent}; there is nothing to override")
        if "dispatch" in o:
            call = replace(call, dispatch=facts.override_dispatch(call.dispatch, o["dispatch"], self.parent))
        if "operation" not in o and "set" not in o:
            return call
        by_number = dict(call.by_number)
        wanted = [o["operation"]] if "operation" in o else [b.operation for b in by_number.values()]
        for name in wanted:
            before = next((b for b in by_number.values() if b.operation == name), None)
            if before is None and "number" not in o:
                near = difflib.get_close_matches(name, [b.operation for b in by_number.values()], n=1)
                hint = f"; did you mean {near[0]}?" if near else " (a new one needs a number)"
                raise UsageError(f"{where}: {self.parent} has no operation {name!r} for {call.caller}{hint}")
            if before is not None:
                del by_number[before.number]
            if not o.get("remove"):
                b = self._behaviour(call, before, name, o)
                by_number[b.number] = b
        return replace(call, by_number=by_number)

    def _behaviour(self, call: Hypercall, before: Behaviour | None, name: str, o: dict[str, Any]) -> Behaviour:
        op, row = facts.raw(before) if before is not None else ({"name": name}, {"cite": [], "codec": "none"})
        changes = o.get("set", {})
        if changes.get("codec", row.get("codec")) != row.get("codec"):
            row = {k: v for k, v in row.items() if k not in _OF_CODEC}
        number = o.get("number", before.number if before is not None else 0)
        op = {**op, "name": name, "number": number, **{k: v for k, v in changes.items() if k in _OPERATION}}
        row = {k: v for k, v in row.items() if k not in ("releases", "callers")} | changes
        return facts.build(op, row, self.parent, call.caller, call.command_at, (self.name, name, repr(sorted(changes.items()))))


_MODELS: dict[str, Model] = {}


def registered(name: str) -> Model | None:
    """Return the model of this name, if it was loaded."""
    return _MODELS.get(name)


def load(path: str) -> Model:
    """Read a model file and make its name usable as a version.

    Raises:
        InputError: the file cannot be read, or is no TOML.
        UsageError: a key is unknown, missing or makes no sense; the message has a hint.
        UnknownRelease: its parent is no release.
    """
    try:
        doc = tomllib.loads(Path(path).read_text("utf-8"))
    except OSError as exc:
        raise InputError(path, (exc.strerror or str(exc)).lower()) from exc
    except ValueError as exc:
        raise InputError(path, f"is not TOML: {exc}") from exc
    _known(doc, _TOP, path)
    head = doc.get("model")
    if not isinstance(head, dict):
        raise UsageError(f"{path}: a [model] with name and parent is missing")
    _known(head, _MODEL, f"{path}: [model]")
    for key in ("name", "parent"):
        if not isinstance(head.get(key), str):
            raise UsageError(f"{path}: [model] {key} is missing")
    name = head["name"]
    chosen = releases_mod.parse(head["parent"])
    if len(chosen.releases) != 1 or chosen.releases[0].version in _MODELS:
        raise UsageError(f"{path}: parent {head['parent']} is not one release")
    overrides = doc.get("override", [])
    for k, o in enumerate(overrides):
        _check(o, f"{path}: override {k + 1}")
    model = Model(name, chosen.releases[0].version, path, tuple(overrides))
    releases_mod.register(name, model.parent)
    _MODELS[name] = model
    facts.overlay(name, model.lookup)
    # What it overrides must hold together for every caller that it speaks about: say so now, not in the middle of a report.
    numbers = {n: number for number, n in factfiles.hypercall_names().items()}
    for o in overrides:
        for caller in o.get("callers", _callers(model.parent, numbers[o["hypercall"]])):
            model.lookup(caller, numbers[o["hypercall"]])
    return model


def _callers(version: str, number: int) -> Iterator[str]:
    from xtrace.schema import CALLERS

    return (c for c in CALLERS if facts.lookup(version, c, number).status == "modelled")


@cache
def _behaviour_keys() -> frozenset[str]:
    """Return every key that any fact file gives a behaviour."""
    out: set[str] = set()
    for number in factfiles.files():
        for _, doc in factfiles.documents(number):
            for op in doc.get("operation", []):
                for row in op.get("behaviour", []):
                    out |= set(row)
            for row in doc.get("group", []):
                out |= set(row)
    return frozenset(out - {"releases", "callers", "cite", "names"}) | _OPERATION


def _check(o: Any, where: str) -> None:
    from xtrace.schema import CALLERS

    if not isinstance(o, dict):
        raise UsageError(f"{where} is not a table")
    _known(o, _OVERRIDE, where)
    names = set(factfiles.hypercall_names().values())
    if o.get("hypercall") not in names:
        near = difflib.get_close_matches(str(o.get("hypercall")), names, n=1)
        raise UsageError(f"{where}: no hypercall is called {o.get('hypercall')!r}" + (f"; did you mean {near[0]}?" if near else ""))
    if "set" in o:
        _known(o["set"], _behaviour_keys(), f"{where}: set")
    if "dispatch" in o:
        _known(o["dispatch"], _DISPATCH, f"{where}: dispatch")
    for caller in o.get("callers", ()):
        if caller not in CALLERS:
            raise UsageError(f"{where}: no caller is called {caller!r}; there are {', '.join(CALLERS)}")


def _known(row: Any, keys: frozenset[str], where: str) -> None:
    if not isinstance(row, dict):
        raise UsageError(f"{where} is not a table")
    for key in row:
        if key not in keys:
            near = difflib.get_close_matches(key, sorted(keys), n=1)
            raise UsageError(f"{where}: unknown key {key!r}" + (f"; did you mean {near[0]}?" if near else ""))
