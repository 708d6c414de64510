"""How loud a finding is: who issued the call, whether its domain migrates, and which migrations catch it.

The rules and their reasons stand in docs/exposure.md. Nothing is guessed: what neither the guard of the sub-operation, nor a
sidecar, nor the trace says is ``unknown`` or null, and counts as if it could happen.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

from xtrace.errors import UsageError

if TYPE_CHECKING:
    from collections.abc import Collection, Iterable

    from xtrace.replay.behaviour import Behaviour, Dispatch

__all__ = (
    "BREAKS",
    "EXIT_BREAK",
    "EXIT_FAILED",
    "EXIT_INCOMPLETE",
    "EXIT_REVIEW",
    "KINDS",
    "MOVES_HOST",
    "ROLES",
    "Exposure",
    "caught",
    "exit_bits",
    "expose",
    "guard_of",
    "parse_kinds",
    "that_count",
)

#: Bits of the exit status (DESIGN §5).
EXIT_FAILED: Final = 1
EXIT_REVIEW: Final = 4
EXIT_BREAK: Final = 8
EXIT_INCOMPLETE: Final = 16

#: Outcomes that break the guest. A restart counts only where it is harmful.
BREAKS: Final = frozenset({"absent", "misdirected", "refused", "skips", "redoes", "wrong_result", "restarts"})

#: What a sidecar may say about a domain, and who then issues its hypercalls.
ROLES: Final = {
    "guest": "guest",
    "driver": "guest",
    "device_model": "device_model",
    "stub": "device_model",
    "control": "control",
    "hardware": "control",
}

#: Kinds of migration, in the order in which they are shown.
KINDS: Final = ("cooperative", "non_cooperative", "live_update", "fork_restore")

#: Those after which the domain runs on another host. A live update replaces Xen below its domains; a fork, and a snapshot
#: restored beside what it was taken of, stay on the host: machine frames are the same memory there.
MOVES_HOST: Final = frozenset({"cooperative", "non_cooperative"})

#: Those after which every domain has the number that it had. A fork has a new one.
_KEEPS_NUMBERS: Final = frozenset({"live_update"})

#: Roles whose domains are not migrated: the toolstack and the hardware stay, a stub domain is re-created at the target.
_STAYS: Final = frozenset({"control", "hardware", "stub", "device_model"})

#: How hard a guard is to pass.
_STRENGTH: Final = {"any": 0, "device_model": 1, "control": 2}


@dataclass(frozen=True, slots=True)
class Exposure:
    """``issuer`` (guest, device_model, control, unknown), ``migrates`` (null: not known), kinds of migration."""

    issuer: str
    migrates: bool | None
    kinds: tuple[str, ...]


def guard_of(dispatch: Dispatch | None, b: Behaviour) -> str:
    """Return what a continuation proves of its issuer: the guard that was surely passed in the source release.

    Of guards that another build or domain has instead (``guards_also``) the weakest is sure; of the hypercall's and the
    sub-operation's, one after the other, the strongest.
    """
    own = min((b.guard, *b.guards_also), key=_strength)
    if dispatch is None:
        return own
    return max(own, min((dispatch.guard, *dispatch.guards_also), key=_strength), key=_strength)


def _strength(guard: str) -> int:
    return _STRENGTH.get(guard, 0)


def expose(role: str | None, guard: str | None, caller: str | None, *, parked: bool | None = None) -> Exposure:
    """Derive the exposure of a call.

    Args:
        role: role of the calling domain as the sidecar, the recording or (domain 0) Xen itself says; None if nothing does.
        guard: who may issue the sub-operation in the source release (:func:`guard_of`): ``any``, ``device_model``,
            ``control``; None unknown.
        caller: ABI of the caller.
        parked: whether the vCPU ran something else while the continuation was in flight; None: not known, and then a
            cooperative migration may catch it.
    """
    if role is not None:
        issuer = ROLES.get(role, "unknown")
    elif guard in ("device_model", "control"):
        # The call got as far as a continuation, so its issuer passed the guard.
        issuer = guard
    else:
        issuer = "unknown"
    migrates: bool | None
    if role in _STAYS or (caller or "").startswith("arm"):
        migrates = False
    elif role is not None:
        migrates = True
    else:
        # Only a domain that stays on its host passes these guards.
        migrates = False if issuer in ("device_model", "control") else None
    if migrates is False:
        return Exposure(issuer, migrates, ("live_update",))
    # Of a guest whose kernel stops every CPU before the move, only a sleeping task can still be inside a call.
    kinds = ("cooperative",) if parked is not False else ()
    if (caller or "").startswith("pv"):
        # A PV guest takes part in every migration of its own; a fork needs a hardware-assisted guest.
        return Exposure(issuer, migrates, (*kinds, "live_update"))
    return Exposure(issuer, migrates, (*kinds, "non_cooperative", "live_update", "fork_restore"))


def parse_kinds(values: Iterable[str]) -> frozenset[str]:
    """Return the kinds that ``--migration`` names.

    Raises:
        UsageError: there is no such kind.
    """
    out = set()
    for value in values:
        kind = value.strip().replace("-", "_")
        if kind not in KINDS:
            raise UsageError(f"--migration {value}: there are {', '.join(KINDS)}")
        out.add(kind)
    return frozenset(out)


def caught(kinds: Collection[str], migration: Collection[str]) -> bool:
    """Say whether one of the migrations asked about (none: any) catches what these kinds catch."""
    return not migration or bool(set(kinds) & set(migration))


def that_count(caveats: tuple[str, ...], kinds: Collection[str], migration: Collection[str]) -> tuple[str, ...]:
    """Return the caveats that matter to the migrations asked about; all of them if none was named."""
    if not migration:
        return caveats
    those = set(kinds) & set(migration)
    matters = {"machine_frames": bool(those & MOVES_HOST), "domids": bool(those - _KEEPS_NUMBERS)}
    return tuple(c for c in caveats if matters.get(c, True))


def exit_bits(
    outcome: str,
    *,
    harmless: bool,
    caveats: bool,
    evidence: str,
    migrates: bool | None,
    kinds: Collection[str] = (),
    migration: Collection[str] = (),
) -> int:
    """Return the exit bits that one finding stands for.

    Args:
        outcome: what becomes of the continuation at the target.
        harmless: of a restart.
        caveats: whether one that matters rides on it.
        evidence: how the trace shows it.
        migrates: whether its domain does; None: not known.
        kinds: migrations that catch it.
        migration: those that were asked about; none: all of them.
    """
    if not caught(kinds, migration):
        return 0
    if outcome in BREAKS and not (outcome == "restarts" and harmless):
        # A live update takes the domains along that migrate nowhere.
        moves = migrates is not False or "live_update" in migration
        return EXIT_BREAK if evidence == "proved" and moves else EXIT_REVIEW
    if outcome in ("lost", "undecidable", "unknown") or caveats:
        return EXIT_REVIEW
    return 0
