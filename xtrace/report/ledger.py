"""The loss ledger of an input: what was not read, not recorded or not known, for every report alike."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from xtrace.replay import facts

if TYPE_CHECKING:
    from xtrace.pipeline import Input

__all__ = ("found", "ledger", "lines", "read_as")


def ledger(item: Input) -> dict[str, Any]:
    """Return the ``losses`` object of docs/json.md."""
    led, lost = item.ledger, item.losses
    return {
        "skipped_bytes": led.skipped_bytes,
        "skipped_lines": led.skipped_lines,
        "noise_lines": led.noise_lines,
        "unparsed": [{"line": line, "text": text} for line, text in led.unparsed],
        "places": [{"text": p.text, "offset": p.offset, "line": p.line} for p in led.problems],
        "places_dropped": led.problems_dropped,
        "lost_records": led.lost_records,
        "lost_events": led.lost_events,
        "lost_ticks": lost.ticks,
        "lost_seconds": _seconds(item, lost.ticks),
        "lost_spans": [
            {
                "pcpu": s.pcpu,
                "first_tsc": s.first_tsc,
                "last_tsc": s.last_tsc,
                "records": s.records,
                "offset": s.offset,
                "line": s.line,
            }
            for s in lost.spans
        ],
        "without_arguments": {facts.hypercall_names().get(op, str(op)): n for op, n in sorted(lost.without_arguments.items())},
        "unknown_vcpus": lost.unknown_vcpus,
        "nameless": led.nameless,
        "truncated": led.truncated,
    }


def lines(item: Input) -> list[str]:
    """Return the ledger as sentences; none where nothing was lost."""
    led, lost, out = item.ledger, item.losses, []
    if led.skipped_bytes:
        out.append(f"{led.skipped_bytes:,} bytes belong to no record and were skipped")
    if led.lost_events:
        text = f"the recorder lost {led.lost_records:,} records in {led.lost_events:,} places"
        took = _seconds(item, lost.ticks)
        if took is not None:
            text += f", {took:.3g} s of its pCPUs' time in all"
        elif lost.ticks is not None:
            text += f", {lost.ticks:,} TSC ticks of its pCPUs in all"
        out.append(text)
        first = lost.spans[0] if lost.spans else None
        if first is not None and first.last_tsc is not None:
            where = "" if first.pcpu is None else f"pCPU {first.pcpu}, "
            begin = "" if first.first_tsc is None else f"TSC {first.first_tsc} to "
            out.append(f"the first: {where}{begin}{first.last_tsc}")
    if led.skipped_lines:
        out.append(f"{led.skipped_lines:,} lines look like records and were not understood")
    if led.noise_lines:
        out.append(f"{led.noise_lines:,} of {led.lines or led.noise_lines:,} lines are no records of this format")
        out += [f"line {line}: {text}" for line, text in led.unparsed[:3]]
    if lost.without_arguments:
        most = sorted(lost.without_arguments.items(), key=lambda kv: (-kv[1], kv[0]))
        names = ", ".join(f"{facts.hypercall_names().get(op, op)} {n:,}" for op, n in most[:6])
        more = f" and {len(most) - 6} more" if len(most) > 6 else ""
        out.append(f"{sum(lost.without_arguments.values()):,} calls without any argument recorded: {names}{more}")
    if lost.unknown_vcpus:
        out.append(f"{lost.unknown_vcpus:,} calls of an unknown domain or vCPU")
    if led.nameless:
        out.append(f"{led.nameless:,} entries whose hypercall's number is not in it")
    if led.truncated:
        out.append("it ends inside a record")
    return out


def read_as(item: Input) -> str:
    """Return the sentence that announces how an input was read."""
    led = item.ledger
    if led.lines:
        share = 100 * (led.noise_lines + led.skipped_lines) / led.lines
        shown = f"{share:.1f}" if share == 0 or share >= 0.05 else "less than 0.1"
        parts = [f"{item.format} text", f"{led.lines:,} lines", f"{shown} % unparsed"]
    else:
        parts = [item.format, f"{led.records:,} records"]
    for name in ("hypercalls", "subcalls", "vmmcalls", "samples", "lost_records"):
        n = getattr(led, name)
        if n:
            parts.append(f"{n:,} {name.replace('_', ' ')}")
    return f"{item.path}: read as {', '.join(parts)}"


def _seconds(item: Input, ticks: int | None) -> float | None:
    if ticks is None or not item.tsc_khz:
        return None
    return ticks / (item.tsc_khz * 1000)


def found(item: Input, most: int) -> list[str]:
    """Return the first problems met in an input, a line each with its place; the others are counted."""
    led = item.ledger
    out = [f"{f'line {p.line}' if p.line is not None else f'byte {p.offset}'}: {p.text}" for p in led.problems[:most]]
    more = len(led.problems[most:]) + led.problems_dropped
    return [*out, f"{more:,} more problem{'' if more == 1 else 's'}"] if more else out
