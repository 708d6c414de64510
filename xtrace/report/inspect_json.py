"""``inspect --format json`` (docs/inspect.md)."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any, TextIO

from xtrace.report import common
from xtrace.schema import SCHEMA_VERSION

if TYPE_CHECKING:
    from xtrace.inspection import Inspection, TaskState, VcpuState

__all__ = ("document", "write_json")


def write_json(inspection: Inspection, out: TextIO) -> None:
    """Write one document."""
    out.write(json.dumps(document(inspection), indent=1, ensure_ascii=True) + "\n")


def document(inspection: Inspection) -> dict[str, Any]:
    """Return the whole answer as plain data; 64-bit values are hex strings."""
    image, result = inspection.image, inspection.result
    return {
        "schema_version": SCHEMA_VERSION,
        "image": {
            "path": inspection.path,
            "format": image.format,
            "version": image.version,
            "guest": image.guest,
            "xen": image.xen,
            "vcpus": len(image.vcpus),
            "pages": len(image.memory.pages),
            "name": image.name,
            "problems": [{"text": d.text, "offset": d.offset} for d in image.damage],
        },
        "sources": list(result.sources),
        "assumptions": result.assumptions,
        "notes": result.notes,
        "vcpus": [_vcpu(state) for state in inspection.vcpus],
        **_tasks(inspection),
        "targets": common.target_groups(result),
        "exit_status": inspection.bits,
        "findings": list(common.rows(result)),
        "suppressed": list(common.suppressed_rows(result)),
    }


def _vcpu(state: VcpuState) -> dict[str, Any]:
    vcpu = state.vcpu
    return {
        "vcpu": vcpu.number,
        "caller": vcpu.caller,
        "mode": vcpu.bits,
        "rip": hex(vcpu.registers["rip"]),
        "registers": {name: hex(value) for name, value in vcpu.registers.items()},
        "code": state.stand.code.hex(),
        "on_hypercall": state.on_hypercall,
        "parked": state.parked,
        "evidence": state.evidence,
        "why": state.why,
        **_call(state),
        "offset": vcpu.offset,
    }


def _call(state: VcpuState) -> dict[str, Any]:
    reading = common.decode(state.reading) or {}
    names = ("hypercall", "subop", "progress", "remaining", "total", "unit", "inner")
    return {
        "op": state.call.op if state.call is not None else None,
        **{name: reading.get(name) for name in names},
        "memory": {name: hex(value) for name, value in state.memory.items()},
    }


def _tasks(inspection: Inspection) -> dict[str, Any]:
    """Return what ``--tasks`` adds; nothing without it."""
    scan = inspection.scan
    if inspection.tasks is None or scan is None:
        return {}
    return {
        "tasks": [_task(task) for task in inspection.tasks],
        "scan": {
            "pages": scan.pages,
            "saved_frames": scan.saved,
            "on_hypercall": scan.on,
            "unreadable": scan.unreadable,
            "not_listed": scan.on - len(inspection.tasks),
            "undecided": inspection.undecided,
            "kernel_known": scan.switch,
        },
    }


def _task(task: TaskState) -> dict[str, Any]:
    frame, state, life = task.frame, task.state, task.life
    registers = state.vcpu.registers
    return {
        "stack": hex(registers["rsp"]),
        "frame": hex(frame.address),
        "caller": state.vcpu.caller,
        "rip": hex(registers["rip"]),
        "registers": {name: hex(value) for name, value in registers.items()},
        "code": state.stand.code.hex(),
        "on_hypercall": state.on_hypercall,
        "runs_on": life.runs_on,
        "live": life.live,
        "live_evidence": life.evidence,
        "parked": task.parked,
        "evidence": task.evidence,
        "why": task.why,
        **_call(state),
        "offset": state.vcpu.offset,
    }
