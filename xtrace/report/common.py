"""What every report is fed: findings and verdicts as plain data, the same for all formats."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from xtrace import release
from xtrace.analyze import harm, rules, suppress
from xtrace.analyze.exposure import EXIT_BREAK, EXIT_REVIEW, KINDS
from xtrace.analyze.surface import CODES
from xtrace.report import ledger
from xtrace.schema import SCHEMA_VERSION

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

    from xtrace.analyze import fleet
    from xtrace.pipeline import Result

#: DOMID_IDLE: a pCPU that runs no guest.
_IDLE = 0x7FFF

__all__ = ("clean", "document", "finding", "sentence", "summary", "target_groups")

#: Keys of a decoding, in the order in which they are written.
_DECODE = ("hypercall", "subop", "progress", "remaining", "unit", "total", "home")


def clean(text: str) -> str:
    """Return ``text`` with control characters made visible: strings in a trace may come from an attacker."""
    return "".join(c if c.isprintable() or c == " " else f"\\x{ord(c):02x}" for c in text)


def verdict_of(bits: int) -> str:
    """Return the one-word verdict for exit bits."""
    if bits & EXIT_BREAK:
        return "breaks"
    return "review" if bits & EXIT_REVIEW else "safe"


def target_groups(result: Result) -> list[dict[str, Any]]:
    """Group the targets that fare alike, in order of their first release."""
    groups: dict[tuple[Any, ...], dict[str, Any]] = {}
    for t in result.targets.versions:
        counts = result.tally.counts[t]
        verdict = verdict_of(result.target_bits(t))
        bad = sorted(
            {f"{r.hypercall}/{r.subop}" if r.subop else r.hypercall
             for r in result.surface for v in r.verdicts if t in v.targets and v.open and r.caught}
        )  # fmt: skip
        hidden = result.suppressed_at.get(t, 0)
        key = (verdict, tuple(sorted(counts.items())), tuple(bad), t in result.targets.rollback, hidden)
        group = groups.setdefault(
            key, {"targets": [], "verdict": verdict, "outcomes": dict(sorted(counts.items())), "surface": bad,
                  "rollback": t in result.targets.rollback, "suppressed": hidden}
        )  # fmt: skip
        group["targets"].append(t)
    return list(groups.values())


def seconds(result: Result) -> float | None:
    """Return the longest time that an input spans, or None without a clock."""
    best = None
    for i in result.inputs:
        o = i.observed
        if i.tsc_khz and o.first_tsc is not None and o.last_tsc is not None:
            best = max(best or 0.0, (o.last_tsc - o.first_tsc) / (i.tsc_khz * 1000))
    return best


def sentence(result: Result) -> str:
    """Return the first line a user reads."""
    groups = [g for g in target_groups(result) if not g["rollback"]]
    source = release.fold_text(result.sources)
    n = len({r.domid for r in result.surface} - {None, _IDLE})
    what = f"what {n} domain{'s' if n != 1 else ''} did" if n else "what unknown domains did"
    took = seconds(result)
    if took is not None:
        what += f" in {took:.1f} s"
    hidden = sum(1 for b in result.blind if b["what"] == "sub-operation")
    tail = f"; the sub-operations of {hidden} hypercall{'s' if hidden != 1 else ''} could not be seen" if hidden else ""
    partial = any(b["what"] == "hypercall" for b in result.blind)
    tail += "; not every hypercall was recorded" if partial else ""
    accepted = suppressed(result)
    tail += f"; suppressed: {accepted}" if accepted else ""
    if not any(i.entries for i in result.inputs):
        return f"Nothing to judge: there is no hypercall in {len(result.inputs)} input(s)."
    if result.migration:
        tail += f"; counted is what a migration of kind {', '.join(k for k in KINDS if k in result.migration)} catches"
    doubts = dict.fromkeys(f.code for f in result.trace if f.bits & EXIT_REVIEW)
    if doubts:
        tail += f"; in doubt: {', '.join(f'{code} ({rules.get(code).title})' for code in doubts)}"
    if result.path is not None:
        return _along(result.path, what, tail)
    by: dict[str, list[str]] = {}
    for g in groups:
        by.setdefault(g["verdict"], []).extend(g["targets"])
    lost = [why for i in result.inputs for why in i.incomplete]
    if lost:
        tail += f"; the trace is incomplete: {', '.join(dict.fromkeys(lost))}"
    words = {"breaks": "breaks at", "review": "to be reviewed for", "safe": "safe to"}
    if set(by) == {"safe"} and (lost or doubts or partial):
        return f"From {source}: nothing seen that would break at {release.fold_text(by['safe'])}, for {what}{tail}."
    if set(by) == {"safe"}:
        return f"Safe from {source} to {release.fold_text(by['safe'])} for {what}{tail}."
    parts = [f"{words[v]} {release.fold_text(by[v])}" for v in ("breaks", "review", "safe") if v in by]
    return f"From {source}: {', '.join(parts)}, for {what}{tail}."


def _along(path: fleet.Path, what: str, tail: str) -> str:
    """Return the first line of a fleet path."""
    by: dict[str, list[str]] = {}
    for leg in path.legs:
        by.setdefault(verdict_of(leg.bits), []).append(f"{leg.left} to {leg.host}")
    name = ", ".join(path.hosts)
    if set(by) == {"safe"}:
        return f"Safe along {name} for {what}{tail}."
    words = {"breaks": "breaks from", "review": "to be reviewed from", "safe": "safe from"}
    parts = [f"{words[v]} {', '.join(by[v])}" for v in words if v in by]
    return f"Along {name}: {'; '.join(parts)}; for {what}{tail}."


def path(result: Result) -> dict[str, Any] | None:
    """Return the fleet path of docs/json.md; None without one."""
    if result.path is None:
        return None
    legs = [
        {
            "left": leg.left,
            "host": leg.host,
            "hop": leg.hop,
            "verdict": verdict_of(leg.bits),
            "outcomes": dict(sorted(leg.outcomes.items())),
            "surface": list(leg.surface),
        }
        for leg in result.path.legs
    ]
    return {"hosts": list(result.path.hosts), "legs": legs}


def advice(result: Result) -> list[dict[str, Any]]:
    """Return what to do."""
    return [
        {
            "kind": a.kind,
            "text": a.text,
            "targets": list(a.targets),
            "through": a.through,
            "operations": list(a.operations),
            "migration": list(a.migration),
        }
        for a in result.advice
    ]


def suppressed(result: Result) -> str:
    """Return how much was suppressed, as text; empty if nothing was."""
    used = result.suppressions
    return suppress.counted(sum(u.taken for u in used), sum(u.surface_taken for u in used))


def summary(result: Result) -> dict[str, Any]:
    """Return the summary object of docs/json.md."""
    bits = 0
    for t in result.counted:
        bits |= result.target_bits(t)
    if result.path is not None:
        bits |= result.path.bits
    for wrong in result.trace:
        bits |= wrong.bits
    verdict = verdict_of(bits)
    if not any(i.entries for i in result.inputs):
        verdict = "incomplete"
    return {
        "verdict": verdict,
        "sentence": sentence(result),
        "exit_status": result.bits,
        "targets": target_groups(result),
    }


def decode(d: Mapping[str, Any] | None) -> dict[str, Any] | None:
    """Return a decoding as JSON."""
    if d is None:
        return None
    inner = d.get("inner")
    out = {k: d[k] for k in _DECODE}
    out["inner"] = None if inner is None or inner["hypercall"] is None else {**{k: inner[k] for k in _DECODE}, "inner": None}
    return out


def finding(row: Mapping[str, Any]) -> dict[str, Any]:
    """Return one finding as JSON; 64-bit values are hex strings."""
    return {
        "code": row["code"],
        "outcome": row["outcome"],
        "caveats": row["caveats"],
        "evidence": row["evidence"],
        "exposure": {"issuer": row["issuer"], "migrates": row["migrates"], "kinds": row["kinds"]},
        "source": row["source"],
        "targets": row["targets"],
        "hypercall": row["hypercall"],
        "subop": row["subop"],
        "caller": row["caller"],
        "domid": row["domid"],
        "vcpu": row["vcpu"],
        "input": row["input"],
        "offset": row["offset"],
        "line": row["line"],
        "seq": row["seq"],
        "args": [None if a is None else hex(a) for a in row["args"]],
        "source_decode": decode(row["source_decode"]),
        "target_decode": decode(row["target_decode"]),
        "errno": row["errno"],
        "harmless": row["harmless"],
        "rollback": not row["in_exit"],
        "exit_bits": row["bits"],
        "text": row["text"],
        "harm": harm.sentence(row),
    }


def single(row: Mapping[str, Any]) -> dict[str, Any]:
    """Return the answer of ``decode``: a finding with one target."""
    out = finding(row)
    targets = out.pop("targets")
    out["seq"] = out["input"] = None
    del out["rollback"], out["exit_bits"]
    return {**out, "target": targets[0]}


def inputs(result: Result) -> list[dict[str, Any]]:
    """Return what was read."""
    out = []
    for i in result.inputs:
        led = i.ledger
        out.append(
            {
                "path": i.path,
                "format": i.format,
                "lines": led.lines,
                "records": led.records,
                "hypercalls": led.hypercalls,
                "subcalls": led.subcalls,
                "vmmcalls": led.vmmcalls,
                "samples": led.samples,
                "lost_records": led.lost_records,
                "skipped_bytes": led.skipped_bytes,
                "skipped_lines": led.skipped_lines,
                "noise_lines": led.noise_lines,
                "unattributed": led.unattributed,
                "truncated": led.truncated,
                "incomplete": i.incomplete,
                "problems": [{"text": p.text, "offset": p.offset, "line": p.line} for p in led.problems],
                "losses": ledger.ledger(i),
                "source": i.sources[0] if len(i.sources) == 1 else None,
                "sources": list(i.sources),
                "source_from": i.source_origin,
                "tsc_khz": i.tsc_khz,
                "domains": {
                    "unknown" if d is None else str(d): {"caller": c, "role": r}
                    for d, (c, r) in sorted(i.domains.items(), key=lambda kv: (kv[0] is None, kv[0] or 0))
                    if c is not None or d != 0
                },
            }
        )
    return out


def surface_rows(result: Result) -> list[dict[str, Any]]:
    """Return the surface table."""
    return [
        {
            "domid": r.domid,
            "caller": r.caller,
            "role": r.role,
            "hypercall": r.hypercall,
            "subop": r.subop,
            "calls": r.calls,
            "units": r.total,
            "targets": [
                {
                    "targets": list(v.targets),
                    "verdict": v.verdict,
                    "code": CODES.get(v.verdict),
                    "suppressed": reason(result, v.suppressed),
                    "outcomes": v.outcomes,
                    "breaking": list(v.breaking),
                    "unknown": list(v.unknown),
                    "caveats": list(v.caveats),
                }
                for v in r.verdicts
            ],
        }
        for r in result.surface
    ]


def reason(result: Result, index: int | None) -> dict[str, Any] | None:
    """Return which suppression took something, and why; None for none."""
    return None if index is None else {"index": index, "reason": result.suppressions[index].suppression.reason}


def suppressions(result: Result) -> list[dict[str, Any]]:
    """Return what became of each suppression."""
    out = []
    for used in result.suppressions:
        s = used.suppression
        out.append(
            {
                "path": s.path,
                "line": s.line,
                "selectors": dict(s.said),
                "reason": s.reason,
                "expires": None if s.expires is None else s.expires.isoformat(),
                "expired": used.expired,
                "code": used.code,
                "matched": used.matched,
                "suppressed": used.taken,
                "surface_matched": used.surface_matched,
                "surface_suppressed": used.surface_taken,
            }
        )
    return out


def suppressed_rows(result: Result) -> Iterator[dict[str, Any]]:
    """Yield the suppressed findings one by one, however many there are."""
    for batch in result.suppressed.batches():
        for row in batch.iter_rows(named=True):
            yield {**finding(row), "suppressed": reason(result, row["suppressed"])}


def trace(result: Result) -> list[dict[str, Any]]:
    """Return what is wrong with the inputs themselves."""
    return [
        {
            "code": f.code,
            "input": f.input,
            "text": f.text,
            "count": f.count,
            "offset": f.offset,
            "line": f.line,
            "seq": f.seq,
            "exit_bits": f.bits,
        }
        for f in result.trace
    ]


def head(result: Result) -> dict[str, Any]:
    """Return the document without its findings."""
    return {
        "schema_version": SCHEMA_VERSION,
        "inputs": inputs(result),
        "assumptions": result.assumptions,
        "notes": result.notes,
        "calls": result.calls,
        "continuations": {"proved": result.proved, "inferred": result.inferred},
        "migration": [k for k in KINDS if k in result.migration],
        "path": path(result),
        "advice": advice(result),
        "surface": surface_rows(result),
        "blind": result.blind,
        "trace": trace(result),
        "suppressions": suppressions(result),
        "summary": summary(result),
    }


def rows(result: Result) -> Iterator[dict[str, Any]]:
    """Yield the findings one by one, however many there are."""
    for batch in result.store.batches():
        for row in batch.iter_rows(named=True):
            yield finding(row)


def document(result: Result) -> dict[str, Any]:
    """Return the whole of ``analyze --format json``."""
    return {**head(result), "findings": list(rows(result)), "suppressed": list(suppressed_rows(result))}
