"""``inspect`` for a terminal: is this guest caught in the middle of something? Then each vCPU, then what would break."""

from __future__ import annotations

import textwrap
from typing import TYPE_CHECKING, Any, TextIO

from xtrace import release
from xtrace.report import common

if TYPE_CHECKING:
    from collections.abc import Iterator

    from xtrace.inspection import Inspection, VcpuState

__all__ = ("sentence", "write_text")

_WIDTH = 80

#: Tasks shown; the others are counted (JSON has more).
_MOST_TASKS = 20


def write_text(inspection: Inspection, out: TextIO) -> None:
    """Write the report; no line is longer than 80 columns."""
    for line in _lines(inspection):
        out.write(line.rstrip() + "\n")


def _wrap(text: str, first: str = "", rest: str = "") -> list[str]:
    clean = common.clean(text)
    return textwrap.wrap(clean, _WIDTH, initial_indent=first, subsequent_indent=rest, break_on_hyphens=False) or [first]


def _lines(inspection: Inspection) -> Iterator[str]:
    image, result = inspection.image, inspection.result
    yield from _wrap(sentence(inspection))
    name = f" ({image.name})" if image.name else ""
    xen = f"Xen {image.xen}" if image.xen else "a Xen not named"
    yield from _wrap(f"{inspection.path}: {image.guest} guest{name}, {image.format} image by {xen}")
    for text in (*(f"assumed: {a}" for a in result.assumptions), *(f"note: {n}" for n in result.notes)):
        yield from _wrap(text, "", "  ")
    yield ""
    yield f"{'vCPU':<5}{'rip':<19}{'parked':<8}{'evidence':<14}what"
    for state in inspection.vcpus:
        yield from _vcpu(state)
    if inspection.tasks is not None:
        yield from _tasks(inspection)
    parked = any(s.parked for s in inspection.vcpus) or any(t.parked for t in inspection.tasks or ())
    if parked or any(g["surface"] for g in common.target_groups(inspection.result)):
        yield ""
        yield from _targets(inspection)
    yield from _findings(inspection)
    if accepted := common.suppressed(result):
        yield ""
        yield from _wrap(f"suppressed, and not counted for the exit status: {accepted}", "", "  ")
        for used in result.suppressions:
            if used.taken or used.surface_taken:
                yield from _wrap(f"{used.suppression.reason} ({used.suppression.where})", "  ", "    ")
    if image.damage:
        yield ""
        for d in image.damage:
            yield from _wrap(f"incomplete: byte {d.offset}: {d.text}", "", "  ")


def sentence(inspection: Inspection) -> str:
    """Return the first line that a user reads."""
    states = inspection.vcpus
    parked = [s for s in states if s.parked]
    blind = [s for s in states if s.parked is None]
    total = f"{len(states)} vCPU{'s' if len(states) != 1 else ''}"
    tasks = [t for t in inspection.tasks or () if t.parked]
    if parked or tasks:
        held = [(f"vCPU {s.vcpu.number}", s) for s in parked]
        held += [(f"the task with the stack at {t.frame.address:#x}", t.state) for t in tasks]
        what = "; ".join(f"{who} in {_what(state)}" for who, state in held[:4])
        more = f" and {len(held) - 4} more" if len(held) > 4 else ""
        also = f" and {_tasks_text(len(tasks))}" if tasks else ""
        return f"Caught inside a hypercall: {len(parked)} of {total}{also}: {what}{more}."
    if blind:
        return f"Cannot be told for {len(blind)} of {total} whether it is inside a hypercall; the others are not."
    tail = ", but the image is incomplete" if inspection.image.damage else ""
    if inspection.undecided:
        return f"Not caught inside a hypercall: none of {total}{tail}; for {_tasks_text(inspection.undecided)} it cannot be told."
    none = ""
    if inspection.scan is not None:
        none = " and no task of its kernel" if inspection.scan.switch else "; its tasks cannot be told"
    return f"Not caught inside a hypercall: none of {total}{none}{tail}."


def _tasks_text(n: int) -> str:
    return f"{n:,} task{'s' if n != 1 else ''}"


def _what(state: VcpuState) -> str:
    reading = state.reading
    if reading is None:
        return "no hypercall"

    def one(r: dict[str, Any]) -> str:
        text = str(r["subop"] or r["hypercall"])
        if r["progress"] is not None and r["total"] is not None:
            text += f", {r['progress']:,} of {r['total']:,} {r['unit'] or 'units'} done"
        elif r["remaining"] is not None:
            text += f", {r['remaining']:,} {r['unit'] or 'units'} left"
        return text

    text = one(reading)
    inner = reading.get("inner")
    if inner and inner["hypercall"]:
        text += f" (inside it {one(inner)})"
    return text


def _vcpu(state: VcpuState) -> Iterator[str]:
    parked = {True: "yes", False: "no", None: "unknown"}[state.parked]
    head = f"{state.vcpu.number:<5}{state.vcpu.registers['rip']:<#19x}{parked:<8}{state.evidence:<14}"
    what = _what(state) if state.call is not None and state.reading is not None else "-"
    yield from _wrap(what, head, " " * 46)
    yield from _wrap(state.why, " " * 5, " " * 5)


def _tasks(inspection: Inspection) -> Iterator[str]:
    scan, tasks = inspection.scan, inspection.tasks
    assert scan is not None
    assert tasks is not None
    yield ""
    text = f"Tasks: {scan.pages:,} pages hold {scan.saved:,} saved frame{'s' if scan.saved != 1 else ''} of kernel code"
    yield from _wrap(f"{text}, {scan.on:,} on a hypercall instruction.", "", "  ")
    if scan.unreadable:
        yield from _wrap(f"{scan.unreadable:,} are not known: their code could not be read.", "  ", "  ")
    if not tasks:
        return
    yield f"{'frame':<19}{'in use':<8}{'parked':<8}{'evidence':<14}what"
    names = {True: "yes", False: "no", None: "unknown"}
    for task in sorted(tasks, key=lambda t: (not t.parked, not t.undecided, t.life.live is False))[:_MOST_TASKS]:
        head = f"{task.frame.address:<#19x}{names[task.life.live]:<8}{names[task.parked]:<8}{task.evidence:<14}"
        what = _what(task.state) if task.life.live is not False and task.state.reading is not None else "-"
        yield from _wrap(what, head, " " * 49)
        yield from _wrap(task.why, " " * 5, " " * 5)
    if scan.on > _MOST_TASKS:
        yield f"  and {scan.on - min(len(tasks), _MOST_TASKS):,} more"


def _targets(inspection: Inspection) -> Iterator[str]:
    result = inspection.result
    yield from _wrap(f"Left by {release.fold_text(result.sources)}, and resumed at:", "", "  ")
    for g in common.target_groups(result):
        counts = ", ".join(f"{k} {v:,}" for k, v in g["outcomes"].items()) or "no continuation"
        if g["surface"]:
            counts += f"; calls that could break if they were caught: {', '.join(g['surface'])}"
        name = release.fold_text(g["targets"]) + (" (rollback)" if g["rollback"] else "")
        yield from _wrap(f"{name}: {g['verdict']} ({counts})", "  ", "    ")


def _findings(inspection: Inspection) -> Iterator[str]:
    seen: set[tuple[str, str, str]] = set()
    frames = {t.frame.vcpu.offset: t.frame.address for t in inspection.tasks or ()}
    for row in common.rows(inspection.result):
        whose = f"vCPU {row['vcpu']}"
        if row["vcpu"] is None and row["offset"] in frames:
            whose = f"task at {frames[row['offset']]:#x}"
        key = (row["code"], row["text"], whose)
        if row["rollback"] or key in seen:
            continue
        seen.add(key)
        yield ""
        who = f"{row['code']} {whose}, {release.fold_text(row['targets'])} ({row['evidence']}): "
        caveats = f"; caveats: {', '.join(row['caveats'])}" if row["caveats"] else ""
        yield from _wrap(who + row["text"] + caveats, "", "  ")
