"""The report for a terminal: verdict first, then what it rests on, readable at 80 columns and plain when piped."""

from __future__ import annotations

import textwrap
from typing import TYPE_CHECKING, Any, TextIO

import polars as pl

from xtrace import release
from xtrace.analyze import harm, rules, suppress
from xtrace.analyze.exposure import KINDS
from xtrace.report import common, ledger
from xtrace.schema import ARGS

if TYPE_CHECKING:
    from rich.console import Console

    from xtrace.pipeline import Result

__all__ = ("write_text",)

_COLOURS = {"safe": "green", "review": "yellow", "breaks": "red"}

#: What findings share when they are shown as one.
_KEY = (
    "code", "outcome", "hypercall", "subop", "caller", "domid", "evidence", "errno", "harmless", "in_exit", "issuer",
    "migrates", "bits", "source",
)  # fmt: skip


def write_text(result: Result, out: TextIO, *, verbose: bool = False, width: int | None = None) -> None:
    """Write the report.

    Args:
        result: what was found.
        out: where to.
        verbose: one line for every finding instead of the first example of each kind.
        width: columns; taken from the terminal if there is one, else 100.
    """
    from rich.console import Console

    console = Console(file=out, width=width or (None if out.isatty() else 100), highlight=False, soft_wrap=not out.isatty())
    verdict = common.summary(result)["verdict"]
    console.print(_safe(common.sentence(result)), style=f"bold {_COLOURS.get(verdict, 'yellow')}")
    for line in result.assumptions:
        console.print("assumed: " + _safe(line))
    for line in result.notes:
        console.print("note: " + _safe(line))
    console.print()
    if any(i.entries for i in result.inputs):  # else "safe" in each row would be said of nothing
        _targets(result, console)
    _path(result, console)
    _findings(result, console, verbose)
    _surface(result, console)
    _suppressed(result, console)
    _blind(result, console)
    _ledger(result, console)
    _trace(result, console)
    _advice(result, console)


def _safe(text: str) -> str:
    from rich.markup import escape

    return escape(common.clean(text))


def _targets(result: Result, console: Console) -> None:
    from rich.table import Table

    proved, inferred = result.proved, result.inferred
    console.print(f"{result.calls:,} calls; continuations: {proved:,} proved, {inferred:,} inferred.", style="dim")
    table = Table(box=None, pad_edge=False, show_edge=False)
    for name in ("target", "verdict", "continuations seen", "calls that could break"):
        table.add_column(name, overflow="fold")
    for g in common.target_groups(result):
        counts = ", ".join(f"{k} {v:,}" for k, v in g["outcomes"].items()) or "none"
        if g["suppressed"]:
            counts += f" ({g['suppressed']:,} suppressed)"
        name = release.fold_text(g["targets"]) + (" (rollback)" if g["rollback"] else "")
        table.add_row(name, g["verdict"], counts, ", ".join(g["surface"]) or "none", style=_COLOURS[g["verdict"]])
    console.print(table)


def _path(result: Result, console: Console) -> None:
    """Show every pair of hosts: neighbours by the number of the hop, others as a call in flight over several."""
    if result.path is None:
        return
    from rich.table import Table

    hosts = result.path.hosts
    console.print()
    console.print("Hop by hop, and what was left on a host before the last:", style="bold")
    table = Table(box=None, pad_edge=False, show_edge=False)
    for name in ("hop", "left by", "resumed at", "verdict", "continuations", "calls that could break"):
        table.add_column(name, overflow="fold")
    number = 0
    for leg in sorted(result.path.legs, key=lambda leg: (hosts.index(leg.host), -hosts.index(leg.left))):
        number += leg.hop
        counts = ", ".join(f"{k} {v:,}" for k, v in sorted(leg.outcomes.items())) or "none"
        verdict = common.verdict_of(leg.bits)
        table.add_row(
            str(number) if leg.hop else "", leg.left, leg.host, verdict, counts, ", ".join(leg.surface) or "none",
            style=_COLOURS[verdict],
        )  # fmt: skip
    console.print(table)


def _advice(result: Result, console: Console) -> None:
    if not result.advice:
        return
    console.print()
    console.print("What to do:", style="bold")
    for one in result.advice:
        _wrapped(f"- {one.text}", console, 2)


def _wrapped(text: str, console: Console, indent: int) -> None:
    """Print a paragraph, its further lines two columns deeper."""
    for line in textwrap.wrap(
        common.clean(text), 79, initial_indent=" " * indent, subsequent_indent=" " * (indent + 2), break_on_hyphens=False
    ):
        console.print(_safe(line))


def _findings(result: Result, console: Console, verbose: bool) -> None:
    groups: dict[tuple[Any, ...], dict[str, Any]] = {}
    for batch in result.store.batches():
        keyed = batch.with_columns(pl.col("targets").list.join(" ").alias("_targets"))
        for row in keyed.group_by(*_KEY, "_targets", maintain_order=True).agg(
            pl.len().alias("n"), pl.all().exclude(*_KEY, "_targets").first()
        ).iter_rows(named=True):  # fmt: skip
            key = (*(row[k] for k in _KEY), row["_targets"])
            if key in groups:
                groups[key]["n"] += row["n"]
            else:
                groups[key] = row
    if not groups:
        return
    order = {code: k for k, code in enumerate(rules.rules())}
    by_code: dict[str, list[dict[str, Any]]] = {}
    for row in groups.values():
        # The rollback line is for information; its findings are shown in the table above, and here on demand.
        if row["in_exit"] or verbose:
            by_code.setdefault(row["code"], []).append(row)
    for code in sorted(by_code, key=lambda c: order.get(c, 99)):
        rule = rules.rules()[code]
        console.print()
        console.print(f"{code} {rule.name}: {rule.title}", style="bold")
        rows = sorted(by_code[code], key=lambda r: (not r["in_exit"], r["input"], r["seq"]))
        clean = rows[0]["outcome"] in ("resumes", "restarts") and rows[0]["caveats"]
        for row in rows:
            _caveat(row, console) if clean else _one(row, console, result)
        if clean:
            _wrapped(f"harm: {harm.CAVEATS[rule.name].capitalize()}.", console, 2)
        console.print(f"  {rule.what_to_do}", style="dim")
    if verbose:
        console.print()
        for row in common.rows(result):
            place = f"line {row['line']}" if row["line"] is not None else f"byte {row['offset']}"
            console.print(f"{row['code']} {place}: {_safe(row['text'])}")


def _head(row: dict[str, Any]) -> str:
    name = row["hypercall"] + (f"/{row['subop']}" if row["subop"] else "")
    targets = release.fold_text(row["targets"]) + ("" if row["in_exit"] else " (rollback)")
    domid = "of an unknown domain" if row["domid"] is None else f"of domain {row['domid']}"
    return f"{name} {domid} at {targets}: {row['n']:,} {row['evidence']}"


def _caveat(row: dict[str, Any], console: Console) -> None:
    console.print(f"  {_safe(_head(row))}, {', '.join(row['caveats'])}")


def _one(row: dict[str, Any], console: Console, result: Result) -> None:
    who = {True: "migrates", False: "does not migrate", None: "not known whether it migrates"}[row["migrates"]]
    console.print(
        f"  {_safe(_head(row))} ({row['caller']}, issuer {row['issuer']}, {who})"
        + (f", caveats: {', '.join(row['caveats'])}" if row["caveats"] else "")
    )
    if not row["bits"]:
        console.print(f"    not caught by {', '.join(k for k in KINDS if k in result.migration)}: not counted")
    if row["source"] not in ("/".join(result.sources), *result.sources):
        console.print(f"    as {_safe(row['source'])} would leave it of a call that began on {_safe(result.sources[0])}")
    console.print(f"    {_safe(row['text'])}")
    _wrapped(f"harm: {harm.sentence(row)}", console, 4)
    place = f"line {row['line']}" if row["line"] is not None else f"byte {row['offset']:,}"
    path = result.inputs[row["input"]].path
    args = " ".join(f"{a}={v:#x}" if v is not None else f"{a}=?" for a, v in zip(ARGS, row["args"], strict=True) if v is not None)
    console.print(f"    first at {_safe(path)}: {place}: {args or 'no argument recorded'}")
    console.print(f"      source {_safe(_decoding(row['source_decode']))}")
    console.print(f"      target {_safe(_decoding(row['target_decode']))}")


def _decoding(d: dict[str, Any]) -> str:
    def one(x: dict[str, Any]) -> str:
        def number(key: str) -> str:
            return "?" if x[key] is None else f"{x[key]:,}"

        text = x["subop"] or x["hypercall"] or "no operation"
        if x["unit"]:
            text += f", {number('progress')} of {number('total')} {x['unit']} done, {number('remaining')} left"
        return str(text)

    text = one(d)
    if d.get("inner") and d["inner"]["hypercall"]:
        text += "; inside: " + one(d["inner"])
    return text


def _surface(result: Result, console: Console) -> None:
    found: dict[tuple[str, str, str], dict[str, None]] = {}  # verdict, what breaks, the call -> targets
    for r in result.surface:
        name = f"{r.hypercall}/{r.subop}" if r.subop else r.hypercall
        who = "unknown domain" if r.domid is None else f"domain {r.domid}"
        for v in r.verdicts:
            counted = [t for t in v.targets if t not in result.targets.rollback]
            if not v.open or not r.caught or not counted:
                continue
            parts = list(dict.fromkeys([*v.breaking, *v.unknown]))
            detail = _some(parts) if parts and parts != [name.split("/")[-1]] else ""
            call = f"{name} ({who}, {r.calls:,} calls)"
            found.setdefault((v.verdict, detail, call), {}).update(dict.fromkeys(counted))
    lines: dict[str, list[str]] = {}
    for (verdict, detail, call), targets in found.items():
        text = f"{_OPEN[verdict]} at {release.fold_text([t for t in result.targets.versions if t in targets])}"
        lines.setdefault(text + (f" ({detail})" if detail else ""), []).append(call)
    if not lines:
        return
    console.print()
    console.print("What was called and could break if it were caught:", style="bold")
    for text, calls in lines.items():
        _wrapped(f"{text}:", console, 2)
        _wrapped(", ".join(calls), console, 4)


#: Verdict of the surface -> how a line about it begins.
_OPEN = {
    "breaks": "XT020 could break",
    "undecidable": "XT021 could break, sub-operation not recorded",
    "unknown": "XT022 not modelled",
}


def _some(names: list[str], most: int = 4) -> str:
    return ", ".join(names) if len(names) <= most + 1 else f"{', '.join(names[:most])} and {len(names) - most} more"


def _suppressed(result: Result, console: Console) -> None:
    used = [(u, suppress.counted(u.taken, u.surface_taken)) for u in result.suppressions]
    if not any(count for _, count in used):
        return
    console.print()
    console.print("Suppressed, and counted neither for the verdict nor for the exit status:", style="bold")
    for u, count in used:
        if count:
            s = u.suppression
            until = f", until {s.expires}" if s.expires else ""
            console.print("  " + _safe(f"{count}: {s.reason}"))
            console.print("    " + _safe(f"{s.selectors} ({s.where}{until})"))


def _blind(result: Result, console: Console) -> None:
    if not result.blind:
        return
    console.print()
    console.print("What could not be seen:", style="bold")
    for b in result.blind:
        what = f"{b['hypercall']}: " if b["hypercall"] else ""
        calls = f" ({b['calls']:,} calls)" if b["calls"] is not None else ""
        console.print("  " + _safe(f"{what}{b['what']}{calls}: {b['why']}"))


def _ledger(result: Result, console: Console) -> None:
    for i in result.inputs:
        said = ledger.lines(i)
        if not said and not i.ledger.problems:
            continue
        console.print()
        console.print(f"Losses of {_safe(i.path)}:", style="bold")
        for line in (*said, *ledger.found(i, 5)):
            console.print("  " + _safe(line))


def _trace(result: Result, console: Console) -> None:
    if not result.trace:
        return
    console.print()
    console.print("What is wrong with the input itself:", style="bold")
    for f in result.trace:
        place = f"line {f.line}: " if f.line is not None else f"byte {f.offset:,}: " if f.offset is not None else ""
        more = f" ({f.count:,} such)" if f.count is not None and f.count > 1 and f.code != "XT030" else ""
        _wrapped(f"{f.code} {result.inputs[f.input].path}: {place}{f.text}{more}", console, 2)
    for code in dict.fromkeys(f.code for f in result.trace):
        _wrapped(f"{code}: {rules.get(code).what_to_do}", console, 2)
