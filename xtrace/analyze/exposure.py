"""How loud a finding is: who issued the call, whether its domain migrates, and which migrations catch it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

__all__ = ("BREAKS", "EXIT_BREAK", "EXIT_FAILED", "EXIT_INCOMPLETE", "EXIT_REVIEW", "ROLES", "Exposure", "expose")

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

#: Roles whose domains are not migrated: the toolstack and the hardware stay, a stub domain is re-created at the target.
_STAYS: Final = frozenset({"control", "hardware", "stub", "device_model"})


@dataclass(frozen=True, slots=True)
class Exposure:
    """``issuer`` (guest, device_model, control, unknown), ``migrates`` (null: not known), kinds of migration."""

    issuer: str
    migrates: bool | None
    kinds: tuple[str, ...]


def expose(role: str | None, guard: str | None, caller: str | None) -> Exposure:
    """Derive the exposure of a call.

    Args:
        role: role of the calling domain as the sidecar, the recording or (domain 0) Xen itself says; None if nothing does.
        guard: who may issue the sub-operation in the source release: ``any``, ``device_model``, ``control``; None unknown.
        caller: ABI of the caller.
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
        migrates = None
    if migrates is False:
        kinds: tuple[str, ...] = ("live_update",)
    elif (caller or "").startswith("pv") and caller != "pvh64":
        # A PV guest takes part in every migration of its own; a fork needs a hardware-assisted guest.
        kinds = ("cooperative", "live_update")
    else:
        kinds = ("cooperative", "non_cooperative", "live_update", "fork_restore")
    return Exposure(issuer, migrates, kinds)


def exit_bits(outcome: str, *, harmless: bool, caveats: bool, evidence: str, migrates: bool | None) -> int:
    """Return the exit bits that one finding stands for."""
    if outcome in BREAKS and not (outcome == "restarts" and harmless):
        return EXIT_BREAK if evidence == "proved" and migrates is not False else EXIT_REVIEW
    if outcome in ("lost", "undecidable", "unknown") or caveats:
        return EXIT_REVIEW
    return 0
