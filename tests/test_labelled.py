"""Traces that were labelled by hand: ``tests/labelled/NAME``, one folder a trace; see the README there.

Every folder is found by itself: adding one needs no Python.
"""

from __future__ import annotations

import csv
import os
import re
import tomllib
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Final

import polars as pl
import pytest
from polars.testing import assert_frame_equal

from xtrace import pipeline, release
from xtrace.analyze import findings, surface
from xtrace.cli.app import run
from xtrace.ingest.hypercalls import HYPERCALLS
from xtrace.replay.stitch import Stitched, Stitcher
from xtrace.schema import EVENTS

FOLDER = Path(__file__).parent / "labelled"
NAMES = sorted(p.name for p in FOLDER.iterdir() if p.is_dir() and not p.name.startswith("__"))
UPDATE = bool(os.environ.get("XTRACE_UPDATE"))
DRAFT: Final = "# draft: written by xtrace itself. Hold every line against the truth, then remove this one."

#: Label file -> columns that a draft has.
FILES: Final = {
    "calls.csv": ("entries", "op", "domid", "vcpu", "samples", "result", "evidence", "by"),
    "continuations.csv": (
        "place", "kind", "vcpu", "hypercall", "subop", "progress", "total",
        "inner_hypercall", "inner_subop", "inner_progress", "issued", "evidence", "by",
    ),
    "findings.csv": ("code", "place", "hypercall", "subop", "outcome", "errno", "targets", "evidence", "bits"),
    "windows.csv": ("place", "begin_low", "begin_high", "end", "parked"),
}  # fmt: skip
KEYS: Final = {"findings.csv": ("code", "place", "hypercall", "subop", "domid", "targets")}
CASE_KEYS: Final = {"why", "origin", "trace", "status", "options", "says", "silent", "only", "xfail", "figures"}

Row = dict[str, Any]


@dataclass
class Seen:
    """What one run of ``xtrace analyze`` came to."""

    status: int = -1
    text: str = ""
    result: pipeline.Result | None = None
    parts: list[Stitched] = field(default_factory=list)

    @property
    def entries(self) -> pl.DataFrame:
        return pl.concat([p.entries for p in self.parts])

    def continuations(self) -> pl.DataFrame:
        """Return the continuations with what their source's decoding says of them."""
        assert self.result is not None
        rows = pl.concat([p.continuations for p in self.parts], how="diagonal").with_columns(pl.col("input").fill_null(0))
        sources = self.result.sources
        context = findings.Context(sources, sources[-1:], frozenset(), {None: None})
        judged = findings.judge_continuations(rows, context, findings.Tally.of(sources[-1:]), everything=True)
        outer = judged.select("input", "seq", pl.col("source_decode")).unnest("source_decode")
        inner = judged.select(pl.col("source_decode").struct.field("inner")).to_series().struct.unnest()
        said = pl.concat([outer.drop("inner"), inner.rename(lambda c: f"inner_{c}")], how="horizontal")
        assert not set(said.columns) & set(rows.columns) - {"input", "seq"}
        return rows.join(said, on=["input", "seq"], how="left", maintain_order="left")


# ── what xtrace found, as rows that a label can be held against ──────────────────────────────────────────────────────


def calls_of(seen: Seen) -> list[Row]:
    assert seen.result is not None
    table = seen.result.calls_table
    assert table is not None
    of: dict[int, list[Row]] = defaultdict(list)
    for row in seen.entries.drop_nulls("call").iter_rows(named=True):
        of[row["call"]].append(row)
    out = []
    for row in table.iter_rows(named=True):
        mine = of[row["call"]]
        entries = [r for r in mine if r["kind"] in ("hypercall", "vmmcall")]
        assert len(entries) == row["entries"]
        row["entries"] = [place(r) for r in entries]
        row["samples"] = [place(r) for r in mine if r["kind"] == "sample"]
        row["subcalls"] = [place(r) for r in mine if r["kind"] == "subcall"]
        row["pcpus"] = [r["pcpu"] for r in entries]
        row["by_entry"] = [r["by"] for r in entries[1:]]
        row["place"] = row["entries"][0]
        out.append(row)
    return out


def continuations_of(seen: Seen) -> list[Row]:
    places = {r["seq"]: place(r) for r in seen.entries.select("seq", "line", "offset").iter_rows(named=True)}
    out = []
    for row in seen.continuations().iter_rows(named=True):
        row["place"], row["issued"] = place(row), places.get(row["issued_seq"])
        out.append(row)
    return out


def findings_of(seen: Seen) -> list[Row]:
    result = seen.result
    assert result is not None
    out = []
    for row in result.findings.iter_rows(named=True):
        row["place"], row["targets"] = place(row), release.fold_text(row["targets"])
        out.append(row)
    for item in result.surface:
        for v in item.verdicts:
            if item.caught and v.open:
                out.append(dict.fromkeys(result.findings.columns) | {
                    "code": surface.CODES[v.verdict], "place": None, "outcome": v.verdict, "hypercall": item.hypercall,
                    "subop": item.subop, "domid": item.domid, "caller": item.caller, "targets": release.fold_text(v.targets),
                    "bits": 4, "caveats": list(v.caveats),
                })  # fmt: skip
    for f in result.trace:
        out.append(dict.fromkeys(result.findings.columns) | {
            "code": f.code, "place": f.line if f.line is not None else f.offset, "bits": f.bits, "text": f.text, "count": f.count,
        })  # fmt: skip
    return out


def place(row: Mapping[str, Any]) -> int | None:
    """Return the line of a text, the offset of a binary."""
    where = row["line"] if row["line"] is not None else row["offset"]
    return None if where is None else int(where)


TABLES: Final[dict[str, Callable[[Seen], list[Row]]]] = {
    "calls.csv": calls_of,
    "continuations.csv": continuations_of,
    "findings.csv": findings_of,
    "windows.csv": continuations_of,
}


# ── labels ───────────────────────────────────────────────────────────────────────────────────────────────────────────


def labels(path: Path) -> tuple[list[str], list[dict[str, str]]]:
    """Read a label file: commas, spaces as one likes, # begins a comment."""
    lines = [line.split("#", 1)[0] for line in path.read_text().splitlines()]
    rows = [[cell.strip() for cell in row] for row in csv.reader(line for line in lines if line.strip())]
    assert rows, f"{path.name} is empty: write at least the names of the columns"
    names, body = rows[0], rows[1:]
    for row in body:
        assert len(row) == len(names), f"{path.name}: {row} has {len(row)} cells, the head has {len(names)}"
    return names, [dict(zip(names, row, strict=True)) for row in body]


def word(value: Any) -> str:
    """Return how a value is written in a label."""
    if value is None:
        return "-"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, list):
        return " ".join(map(word, value)) or "-"
    return str(value)


def same(label: str, name: str, value: Any) -> bool:
    """Hold one cell against a value."""
    if label == "*":
        return True
    if name == "op" and label in HYPERCALLS:
        return bool(value == HYPERCALLS[label])
    if isinstance(value, list):
        words = [] if label == "-" else label.split()
        return len(words) == len(value) and all(same(a, "", b) for a, b in zip(words, value, strict=True))
    if isinstance(value, int) and not isinstance(value, bool) and re.fullmatch(r"-?(0x[0-9a-fA-F]+|\d+)", label):
        return int(label, 0) == value
    return label == word(value)


def chosen(rows: Iterable[Row], only: Mapping[str, Any]) -> list[Row]:
    """Return the rows that a label file speaks of."""
    out = list(rows)
    for name, wanted in only.items():
        if name == "places":
            low, high = wanted
            out = [r for r in out if r["place"] is not None and low <= r["place"] <= high]
        else:
            options = [HYPERCALLS.get(str(w), w) for w in (wanted if isinstance(wanted, list) else [wanted])]
            out = [r for r in out if r[name] in options]
    return out


def differences(file: str, names: list[str], wanted: list[dict[str, str]], rows: list[Row]) -> list[str]:
    """Say in words where the labels and what was found part."""
    if unknown := sorted({n for n in names if n != "note" and any(n not in r for r in rows)}):
        return [f"{file}: the result has no column {', '.join(unknown)}"]
    keys = KEYS.get(file, ("place",))
    left = list(rows)
    out = []
    for label in wanted:
        own = {k: label[k] for k in keys if k in label}
        if file == "calls.csv":
            own = {"place": label["entries"].split()[0]}
        hits = [r for r in left if all(same(v, k, r[k]) for k, v in own.items())]
        what = ", ".join(f"{k} {v}" for k, v in own.items())
        if not hits:
            out.append(f"{file}: not found: {what} ({', '.join(f'{k}={v}' for k, v in label.items() if k != 'note')})")
            continue
        row = min(hits, key=lambda r: sum(not same(v, k, r[k]) for k, v in label.items() if k != "note"))
        left.remove(row)
        out += [
            f"{file}: {what}: {k} is labelled {v}, found {word(row[k])}"
            for k, v in label.items()
            if k != "note" and not same(v, k, row[k])
        ]
    shown = [n for n in names if n != "note"]
    out += [f"{file}: not labelled: {', '.join(f'{n}={word(r[n])}' for n in shown)}" for r in left]
    return out


def draft(path: Path, rows: list[Row]) -> None:
    """Write a first draft of a label file."""
    names = [n for n in FILES[path.name] if not rows or n in rows[0]]
    cells = [names, *([word(r[n]) for n in names] for r in rows)]
    widths = [max(len(row[i]) for row in cells) for i in range(len(names))]
    lines = [", ".join(c.ljust(w) for c, w in zip(row, widths, strict=True)).rstrip() for row in cells]
    path.write_text("\n".join([DRAFT, *lines]) + "\n")


# ── the test ─────────────────────────────────────────────────────────────────────────────────────────────────────────


def arguments(case: Mapping[str, Any], folder: Path) -> list[str]:
    """Return the command line of a case."""
    given = case["trace"]
    out = ["analyze", *(str(folder / t) for t in (given if isinstance(given, list) else [given]))]
    for name, value in case.get("options", {}).items():
        flag = "--" + name.replace("_", "-")
        if value is True:
            out.append(flag)
        else:
            for one in value if isinstance(value, list) else [value]:
                out += [flag, str(one)]
    return out


def analyzed(arguments: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], rows: int = 0) -> Seen:
    """Run a command line and keep the tables behind its report."""
    seen, real = Seen(), pipeline.analyze

    class Kept(Stitcher):
        def feed(self, events: pl.DataFrame) -> Stitched:
            out = super().feed(events)
            seen.parts.append(out)
            return out

    def kept(paths: Any, options: pipeline.Options) -> pipeline.Result:
        seen.result = real(paths, replace(options, keep_calls=True, batch_rows=rows or options.batch_rows))
        return seen.result

    with monkeypatch.context() as m:
        m.setattr(pipeline, "Stitcher", Kept)
        m.setattr(pipeline, "analyze", kept)
        seen.status = run(arguments)
    seen.text = " ".join(capsys.readouterr().out.split())
    return seen


def read_case(folder: Path) -> dict[str, Any]:
    case = tomllib.loads((folder / "case.toml").read_text())
    assert set(case) <= CASE_KEYS, f"case.toml has unknown keys: {sorted(set(case) - CASE_KEYS)}"
    assert {"why", "origin", "trace"} <= set(case), "case.toml needs why, origin and trace"
    return case


@pytest.mark.parametrize("name", NAMES)
def test_labels(
    name: str, request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = FOLDER / name
    case = read_case(folder)
    if "xfail" in case:
        request.node.add_marker(pytest.mark.xfail(reason=case["xfail"], strict=True, raises=AssertionError))
    seen = analyzed(arguments(case, folder), monkeypatch, capsys)
    wrong: list[str] = []
    if "status" not in case:
        wrong.append(f"case.toml: no status; it is {seen.status}")
    elif seen.status != case["status"]:
        wrong.append(f"exit status is labelled {case['status']}, found {seen.status}")
    wrong += [f"the report does not say {words!r}" for words in case.get("says", []) if words not in seen.text]
    wrong += [f"the report says {words!r}" for words in case.get("silent", []) if words in seen.text]
    assert seen.result is not None, wrong
    figures = {"calls": seen.result.calls, "proved": seen.result.proved, "inferred": seen.result.inferred}
    for key, value in case.get("figures", {}).items():
        if figures[key] != value:
            wrong.append(f"{key} are labelled {value}, found {figures[key]}")
    only = case.get("only", {})
    for file, rows_of in TABLES.items():
        path, part = folder / file, only.get(file.removesuffix(".csv"), {})
        if not path.exists():
            assert not part, f"case.toml narrows {file}, which is not there"
            if UPDATE and file != "windows.csv":
                draft(path, chosen(rows_of(seen), part))
                wrong.append(f"{file}: a draft was written")
            continue
        if DRAFT in path.read_text():
            wrong.append(f"{file} is a draft")
        wrong += differences(file, *labels(path), chosen(rows_of(seen), part))
    assert not wrong, "\n" + "\n".join([case["why"], *wrong])
    if len(seen.entries) < 2000:
        # Where one batch ends never changes a result.
        again = analyzed(arguments(case, folder), monkeypatch, capsys, rows=13)
        assert (again.status, again.text) == (seen.status, seen.text)
        names = [*EVENTS.names(), "call", "reentry", "by", "marked", "number", "total"]
        assert_frame_equal(again.entries.select(names), seen.entries.select(names))


def test_folders_are_whole() -> None:
    """Every folder has a case, a trace and labels, and nothing else."""
    for name in NAMES:
        case = read_case(FOLDER / name)
        given = case["trace"]
        traces = set(given if isinstance(given, list) else [given])
        files = {p.name for p in (FOLDER / name).iterdir()}
        assert traces <= files
        assert {"calls.csv", "continuations.csv"} <= files, name
        sidecars = {f"{t}.xtrace.toml" for t in traces}
        assert files <= traces | sidecars | {*FILES, "case.toml"}, name


def test_a_wrong_label_is_seen() -> None:
    rows = [{"place": 3, "progress": 5, "subop": None, "code": "XT001", "targets": "3.4.0"}]
    names = ["place", "progress", "subop", "note"]
    good = [{"place": "3", "progress": "0x5", "subop": "-", "note": "x"}]
    assert not differences("continuations.csv", names, good, rows)
    assert differences("continuations.csv", names, [good[0] | {"progress": "6"}], rows)
    assert differences("continuations.csv", names, [good[0] | {"subop": "x"}], rows)
    assert differences("continuations.csv", names, [], rows)
    assert differences("continuations.csv", names, good * 2, rows)
    assert differences("continuations.csv", [*names, "end"], [], rows) == ["continuations.csv: the result has no column end"]
