"""What an events table carries beside its rows: the account of the trace that it was made from, as one JSON text.

The rows of a table do not say which release wrote the trace, which record layouts ruled others out, or what was lost while
it was read; Parquet and Arrow IPC have room for it (key :data:`KEY`), CSV and NDJSON have not.
"""

from __future__ import annotations

import dataclasses
import json
from typing import TYPE_CHECKING, Any, Final

from xtrace import schema
from xtrace.ingest.base import Domain, Ledger, Observed, Problem

if TYPE_CHECKING:
    from xtrace.ingest.base import Recording

__all__ = ("KEY", "VERSION_KEY", "pack", "unpack")

#: Metadata key of the account.
KEY: Final = "xtrace_account"
#: Metadata key of ``schema.SCHEMA_VERSION``.
VERSION_KEY: Final = "xtrace_schema_version"

#: A longer account is not believed; the writer's own has a few kilobytes.
_MAX_TEXT: Final = 1 << 22


def pack(recording: Recording) -> str:
    """Return the account of a recording whose batches are exhausted."""
    ledger, observed = dataclasses.asdict(recording.ledger), dataclasses.asdict(recording.observed)
    observed["domains"] = [[domid, d["caller"], d["role"], d["name"]] for domid, d in observed["domains"].items()]
    observed["event_ids"] = [[event, n] for event, n in recording.observed.event_ids.items()]
    observed["forms"] = [[*form, offset] for form, offset in recording.observed.forms.items()]
    observed["peaks"] = [[*place, *value] for place, value in recording.observed.peaks.items()]
    return json.dumps({"format": recording.format, "ledger": ledger, "observed": observed})


def unpack(text: str | bytes) -> tuple[Ledger, Observed] | None:
    """Return the account in a text, or None if it is none (damaged, or somebody else's)."""
    try:
        if len(text) > _MAX_TEXT:
            return None
        whole = json.loads(text)
        ledger, observed = Ledger(), Observed()
        _plain(ledger, whole["ledger"])
        _plain(observed, whole["observed"])
        ledger.problems = [
            Problem(_str(p["text"]), _opt(p["offset"]), _opt(p["line"])) for p in whole["ledger"]["problems"][: Ledger.KEEP]
        ]
        ledger.unparsed = [(_int(line), _str(said)) for line, said in whole["ledger"]["unparsed"][: Ledger.SHOWN]]
        said = whole["observed"]
        for domid, caller, role, name in said["domains"]:
            if caller is not None and caller not in schema.CALLERS:
                return None
            observed.domains[_int(domid)] = Domain(caller, _opt_str(role), _opt_str(name))
        observed.event_ids = {_int(event): _int(n) for event, n in said["event_ids"]}
        observed.forms = {(_int(e), _int(w), bool(t)): _int(at) for e, w, t, at in said["forms"]}
        observed.peaks = {(_int(e), _int(w)): (_int(v), _int(at)) for e, w, v, at in said["peaks"]}
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError):
        return None
    return ledger, observed


def _plain(target: Ledger | Observed, said: dict[str, Any]) -> None:
    """Take the fields that are numbers, words or yes and no; a field that is not said keeps its default."""
    kinds = {"int": _int, "bool": _bool, "str | None": _opt_str, "int | None": _opt}
    for field in dataclasses.fields(target):
        read = kinds.get(str(field.type))
        if read is not None and field.name in said:
            setattr(target, field.name, read(said[field.name]))


def _int(value: object) -> int:
    if type(value) is not int or not 0 <= value < 1 << 64:
        raise ValueError(value)
    return value


def _bool(value: object) -> bool:
    if type(value) is not bool:
        raise ValueError(value)
    return value


def _opt(value: object) -> int | None:
    return None if value is None else _int(value)


def _str(value: object) -> str:
    if type(value) is not str:
        raise ValueError(value)
    return value


def _opt_str(value: object) -> str | None:
    return None if value is None else _str(value)
