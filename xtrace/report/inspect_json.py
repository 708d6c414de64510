"""``inspect --format json`` (docs/inspect.md)."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any, TextIO

from xtrace.report import common
from xtrace.schema import SCHEMA_VERSION

if TYPE_CHECKING:
    from xtrace.inspection import Inspection, VcpuState

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
        "targets": common.target_groups(result),
        "exit_status": inspection.bits,
        "findings": list(common.rows(result)),
    }


def _vcpu(state: VcpuState) -> dict[str, Any]:
    vcpu = state.vcpu
    reading = common.decode(state.reading) or {}
    inner = reading.get("inner")
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
        "op": state.call.op if state.call is not None else None,
        "hypercall": reading.get("hypercall"),
        "subop": reading.get("subop"),
        "progress": reading.get("progress"),
        "remaining": reading.get("remaining"),
        "total": reading.get("total"),
        "unit": reading.get("unit"),
        "inner": inner,
        "memory": {name: hex(value) for name, value in state.memory.items()},
        "offset": vcpu.offset,
    }
