"""What the continuations of each hypercall show themselves by, given which registers a recorder writes: from the facts."""

from __future__ import annotations

from typing import TYPE_CHECKING

from xtrace.replay import facts
from xtrace.replay.states import location

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from xtrace.replay.behaviour import Behaviour

__all__ = ("evidence",)

_ORDER = ("proved", "inferred", "unobservable")


def evidence(
    registers: Mapping[str, Sequence[int]], *, fields: bool = False, samples: bool = False, caller: str = "pv64"
) -> dict[str, dict[str, list[str]]]:
    """Say how continuations show in a recording, for every hypercall that can leave one.

    A progress index, flag or number that is recorded proves it; a count or pointer that is recorded lets the sequence
    show it; a stopped vCPU on the hypercall instruction whose registers do not differ from the call as issued is inferred
    at best. Everything else cannot be seen.

    Args:
        registers: hypercall -> argument registers recorded; ``*`` for all others.
        fields: guest memory is recorded.
        samples: registers of stopped vCPUs.
        caller: ABI of the caller.

    Returns:
        hypercall -> evidence (``proved``, ``inferred``, ``unobservable``) -> sub-operations (the hypercall's own name where it
        has none), over every modelled release.
    """
    names = facts.hypercall_names()
    releases = sorted(facts.modelled_releases(caller))
    goes_on = {r: _redirected_to(r, caller) for r in releases}
    out: dict[str, dict[str, list[str]]] = {}
    for number in sorted(facts.files()):
        name = names.get(number, str(number))
        recorded = {f"arg{n}" for n in registers.get(name, registers.get("*", ()))}
        best: dict[str, int] = {}
        for release in releases:
            known = facts.lookup(release, caller, number)
            if known.status != "modelled":
                continue
            for b in known.by_number.values():
                if b.codec == "none" or b.never_left:
                    continue
                onward = goes_on[release] & {(number, None), (number, b.number)}
                found = _shown(b, recorded, fields=fields, samples=samples, onward=bool(onward))
                # A sub-operation that releases treat in different ways counts as what the poorest of them shows.
                best[b.operation] = max(best.get(b.operation, 0), found)
        for operation, found in best.items():
            out.setdefault(name, {}).setdefault(_ORDER[found], []).append(operation)
    return out


def _redirected_to(release: str, caller: str) -> set[tuple[int, int | None]]:
    """Return the (hypercall, sub-operation) numbers that only Xen issues, to go on with another operation."""
    return {
        (int(b.params.get("to_hypercall", number)), b.params.get("to_operation"))
        for number in facts.files()
        for b in facts.lookup(release, caller, number).by_number.values()
        if b.codec == "redirect"
    }


def _shown(b: Behaviour, recorded: set[str], *, fields: bool, samples: bool, onward: bool) -> int:
    """Return the index in `_ORDER` of what a continuation of one operation shows; ``onward``: its number is Xen's own."""

    def seen(place: str | None) -> bool:
        return place is not None and (place in recorded or (fields and place.startswith("mem.")))

    p = b.params
    if b.codec in ("shifted_index", "masked_offset"):
        proved = seen(f"arg{p['arg']}")
    elif b.codec == "count_flag":
        proved = seen(f"arg{p['count']}")
    elif b.codec == "redirect":
        proved = p.get("to_operation") is None or seen(b.command_at)
    elif b.keeps_index:
        proved = seen(location(p["index"]))
    else:
        proved = False
    if proved or (onward and (b.command_at is None or seen(b.command_at))):
        return 0
    if b.codec == "advanced" and any(p.get(k) is not None and seen(f"arg{p[k]}") for k in ("count", "pointer")):
        return 1
    return 1 if samples else 2
