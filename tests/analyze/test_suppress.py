"""Suppressed findings are set aside, counted and shown; a slow twin takes them one by one."""

from __future__ import annotations

import datetime
import time
from pathlib import Path
from typing import Any

import polars as pl
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from xtrace.analyze import suppress, wording
from xtrace.analyze.surface import Surface
from xtrace.analyze.trace_rules import TraceFinding
from xtrace.config import suppressions
from xtrace.config.suppressions import Suppression
from xtrace.errors import UsageError
from xtrace.pipeline import Options, Result, SurfaceRow, analyze
from xtrace.report import common
from xtrace.schema import FINDINGS

SAMPLE = Path(__file__).parents[2] / "samples" / "dom0-4.17.7" / "j5_tiny_pv.xentrace"
BARE = Path(__file__).parents[2] / "samples" / "bare" / "bare-3.4.0-rc3.txt.zst"
TODAY = datetime.date(2026, 7, 1)
TARGETS = ["4.17.0", "4.17.1", "4.18.0", "4.18.1", "4.19.0"]


def read(**row: Any) -> Suppression:
    return suppressions.read("x.toml", "", [{"reason": "because", **{k.rstrip("_"): v for k, v in row.items()}}])[0]


# ── the slow twin ────────────────────────────────────────────────────────────────────────────────────────────────────


def fits(s: Suppression, row: dict[str, Any], sources: list[str]) -> bool:
    if s.codes and row["code"] not in s.codes:
        return False
    if s.hypercalls:
        names = [row["hypercall"]]
        if row["subop"] is not None:
            names.append(f"{row['hypercall']}/{row['subop']}")
        if not any(name in s.hypercalls for name in names):
            return False
    if s.domains and row["domid"] not in s.domains:
        return False
    if s.callers and row["caller"] not in s.callers:
        return False
    return not s.sources or all(source in s.sources for source in sources)


def twin(rows: list[dict[str, Any]], some: list[Suppression], sources: list[str]) -> tuple[list[Any], list[Any], list[Any]]:
    kept, taken, counts = [], [], [[0, 0] for _ in some]
    for row in rows:
        left = list(row["targets"])
        for number, s in enumerate(some):
            hit = [t for t in row["targets"] if not s.targets or t in s.targets]
            if not fits(s, row, sources) or not hit:
                continue
            counts[number][0] += 1
            mine = [t for t in left if t in hit]
            if s.expired(TODAY) or not mine:
                continue
            counts[number][1] += 1
            taken.append((row["seq"], number, mine, row["text"].replace(wording.span(row["targets"]), wording.span(mine))))
            left = [t for t in left if t not in mine]
        if left:
            kept.append((row["seq"], left, row["text"].replace(wording.span(row["targets"]), wording.span(left))))
    return kept, taken, [tuple(c) for c in counts]


def some_of(values: list[Any]) -> st.SearchStrategy[list[Any]]:
    return st.lists(st.sampled_from(values), min_size=1, max_size=2, unique=True)


HYPERCALLS = [
    ("memory_op", "XENMEM_exchange"),
    ("memory_op", "XENMEM_decrease_reservation"),
    ("memory_op", None),
    ("mmu_update", None),
]

ROW = st.fixed_dictionaries(
    {
        "code": st.sampled_from(["XT001", "XT002", "XT010"]),
        "name": st.sampled_from(HYPERCALLS),
        "domid": st.sampled_from([None, 0, 3]),
        "caller": st.sampled_from(["pv64", "hvm64"]),
        "bits": st.sampled_from([0, 4, 8]),
        "targets": st.lists(st.sampled_from(TARGETS), min_size=1, unique=True).map(sorted),
    }
)

SUPPRESS = st.fixed_dictionaries(
    {},
    optional={
        "code": some_of(["XT001", "XT002", "XT010"]),
        "hypercall": some_of(["memory_op", "memory_op/XENMEM_exchange", "mmu_update"]),
        "domain": some_of(["unknown", 0, 3]),
        "caller": some_of(["pv64", "hvm64"]),
        "from": some_of(["4.13.0", "4.13.1", "4.13"]),
        "to": some_of(["4.17", "4.18.1", "4.18..4.19"]),
        "expires": st.sampled_from([TODAY, TODAY - datetime.timedelta(1), TODAY + datetime.timedelta(1)]),
    },
).filter(lambda row: set(row) - {"expires"})


def frame(rows: list[dict[str, Any]]) -> pl.DataFrame:
    full = []
    for seq, row in enumerate(rows):
        hypercall, subop = row["name"]
        text = f"{hypercall} left after 3 units; {wording.span(row['targets'])} refuses it"
        given = {k: row[k] for k in ("code", "domid", "caller", "bits", "targets")}
        full.append({**dict.fromkeys(FINDINGS), **given, "hypercall": hypercall, "subop": subop, "seq": seq, "text": text})
    return pl.DataFrame(full, schema=FINDINGS)


@settings(max_examples=150, deadline=None)
@given(
    st.lists(ROW, max_size=12),
    st.lists(SUPPRESS, max_size=4),
    st.lists(st.sampled_from(["4.13.0", "4.13.1", "4.14.0"]), min_size=1, unique=True),
)
def test_as_the_twin(rows: list[dict[str, Any]], tables: list[dict[str, Any]], sources: list[str]) -> None:
    some = [read(**table) for table in tables]
    table = frame(rows)
    suppressor = suppress.Suppressor(some, TODAY)
    kept, taken = suppressor.split(table, sources)
    assert kept.schema == FINDINGS
    assert taken.schema == suppress.SUPPRESSED
    want_kept, want_taken, counts = twin(list(table.iter_rows(named=True)), some, sources)
    assert kept.select("seq", "targets", "text").rows() == want_kept
    assert taken.select("seq", "suppressed", "targets", "text").rows() == want_taken
    assert [(u.matched, u.taken) for u in suppressor.used] == counts
    bits: dict[str, int] = {}
    for _, targets, _ in (k for k in want_kept):
        bits |= dict.fromkeys(targets, 0) | bits
    for seq, targets, _ in want_kept:
        for t in targets:
            bits[t] |= rows[seq]["bits"]
    assert suppress.bits(kept) == bits


@settings(max_examples=40, deadline=None)
@given(st.lists(ROW, max_size=12), st.lists(SUPPRESS, max_size=3), st.integers(1, 5))
def test_batches_change_nothing(rows: list[dict[str, Any]], tables: list[dict[str, Any]], size: int) -> None:
    table = frame(rows)
    whole, pieces = (suppress.Suppressor([read(**t) for t in tables], TODAY) for _ in range(2))
    at_once = whole.split(table, ["4.13.0"])
    parts = [pieces.split(part, ["4.13.0"]) for part in table.iter_slices(size)]
    for k in range(2):
        joined = pl.concat([at_once[k].clear(), *(p[k] for p in parts)])
        assert joined.rows() == at_once[k].rows()
    assert [(u.matched, u.taken) for u in whole.used] == [(u.matched, u.taken) for u in pieces.used]


def test_many_findings_take_a_moment() -> None:
    rows = [
        {"code": "XT010", "name": HYPERCALLS[k % 4], "domid": k % 4, "caller": "pv64", "bits": 4, "targets": TARGETS}
        for k in range(64)
    ]
    table = pl.concat([frame(rows)] * 1024).rechunk()
    some = [read(code="XT010", domain=1, to="4.18"), read(hypercall="memory_op/XENMEM_exchange"), read(code="XT001")]
    begin = time.perf_counter()
    kept, taken = suppress.Suppressor(some, TODAY).split(table, ["4.13.0"])
    took = time.perf_counter() - begin
    assert len(table) == 65_536
    assert len(kept) + len(taken) >= len(table)
    assert took < 5, f"{len(table) / took:,.0f} rows a second"


# ── names ────────────────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(
    ("row", "says"),
    [
        ({"code": "XT0010"}, "no rule is called 'XT0010'; did you mean 'XT010'?"),
        ({"code": "banana"}, "no rule is called 'banana'"),
        ({"code": "XT035"}, "XT035 cannot be suppressed: it tells of suppressions themselves"),
        ({"code": "XT030"}, "XT030 cannot be suppressed: it says that the trace is incomplete"),
        ({"hypercall": "memery_op"}, "no Xen release has a hypercall called 'memery_op'; did you mean 'memory_op'?"),
        (
            {"hypercall": "memory_op/XENMEM_exchnge"},
            "memory_op has no sub-operation 'XENMEM_exchnge'; did you mean 'XENMEM_exchange'?",
        ),
        ({"hypercall": "memory_op/"}, "memory_op has no sub-operation ''"),
        ({"hypercall": "XENMEM_exchange"}, "no Xen release has a hypercall called 'XENMEM_exchange'"),
    ],
)
def test_names_that_do_not_exist(row: dict[str, Any], says: str) -> None:
    with pytest.raises(UsageError) as caught:
        suppress.Suppressor([read(**row)], TODAY)
    assert says in str(caught.value)
    assert str(caught.value).startswith("x.toml: suppress.")


# ── the surface, and the traces themselves ───────────────────────────────────────────────────────────────────────────


def surface(*verdicts: tuple[list[str], str]) -> SurfaceRow:
    made = tuple(Surface(tuple(ts), v, {}, (), (), ()) for ts, v in verdicts)
    return SurfaceRow(3, "pv64", "event_channel_op", "EVTCHNOP_reset", 7, None, None, made)


def test_surface_verdicts_are_divided() -> None:
    row = surface((["4.17.0"], "safe"), (["4.18.0", "4.18.1", "4.19.0"], "breaks"))
    suppressor = suppress.Suppressor([read(code="XT020", domain=3, to="4.18")], TODAY)
    (got,) = suppressor.split_surface([row], ["4.13.0"])
    assert [(v.targets, v.verdict, v.suppressed, v.open) for v in got.verdicts] == [
        (("4.17.0",), "safe", None, False),
        (("4.19.0",), "breaks", None, True),
        (("4.18.0", "4.18.1"), "breaks", 0, False),
    ]
    assert (suppressor.used[0].surface_matched, suppressor.used[0].surface_taken) == (1, 1)


@pytest.mark.parametrize(
    "row",
    [
        {"code": "XT021"},
        {"domain": 4},
        {"caller": "pv32"},
        {"hypercall": "event_channel_op/EVTCHNOP_reset_cont"},
        {"from_": "4.14"},
    ],
)
def test_surface_verdicts_that_do_not_fit(row: dict[str, Any]) -> None:
    rows = [surface((["4.18.0"], "breaks"))]
    suppressor = suppress.Suppressor([read(**row)], TODAY)
    assert suppressor.split_surface(rows, ["4.13.0"]) == rows
    assert suppressor.used[0].code == suppress.UNMATCHED


def test_findings_about_the_trace() -> None:
    found = [TraceFinding("XT032", 0, "it contradicts", 4), TraceFinding("XT030", 0, "lost", 16)]
    suppressor = suppress.Suppressor([read(from_="4.13"), read(domain=0)], TODAY)
    assert [f.bits for f in suppressor.accept(found, ["4.13.0"])] == [0, 16]
    assert suppressor.accept(found, ["4.13.0"])[0].text == "it contradicts (suppressed: because)"
    assert [u.code for u in suppressor.used] == [None, suppress.UNMATCHED]
    assert suppress.Suppressor([read(from_="4.13")], TODAY).accept(found, ["4.13.0", "4.14.0"]) == found


# ── whole analyses ───────────────────────────────────────────────────────────────────────────────────────────────────


def analysed(*some: Suppression, path: Path = SAMPLE, source: str = "4.17.7", to: str = "4.18", **kw: Any) -> Result:
    return analyze([path], Options(source=source, targets=[to], callers={None: "pv64"}, suppressions=some, today=TODAY, **kw))


def test_one_that_fits_nothing_changes_nothing() -> None:
    plain, with_one = analysed(), analysed(read(code="XT006"))
    assert plain.bits == with_one.bits == 4
    assert plain.tally.bits == with_one.tally.bits
    assert plain.tally.counts == with_one.tally.counts
    assert plain.findings.equals(with_one.findings)
    assert [n for n in with_one.notes if n not in plain.notes] == [
        "XT035 A suppression fits nothing: x.toml: code XT006: nothing in this run fits it"
    ]


def test_expired_ones_do_not_count() -> None:
    yesterday = TODAY - datetime.timedelta(1)
    all_of_it = ["XT008", "XT010", "XT020", "XT021", "XT022"]
    for last, bits, code in ((TODAY, 0, None), (yesterday, 4, "XT036")):
        got = analysed(read(code=all_of_it, expires=last))
        assert (got.bits, got.suppressions[0].code) == (bits, code)
        assert any(f"its last day was {last}; it no longer takes the" in n for n in got.notes) == (code is not None)


def test_outcomes_are_counted_all_the_same() -> None:
    plain, got = analysed(), analysed(read(code=["XT008", "XT010"]))
    assert got.tally.counts == plain.tally.counts
    assert len(got.findings) == 0
    assert got.suppressed.count == len(plain.findings) == got.suppressed_at["4.18.0"]
    (group,) = common.target_groups(got)
    assert group["suppressed"] == got.suppressed.count
    assert "; suppressed: " in common.sentence(got)


def test_only_the_targets_that_are_named() -> None:
    got = analysed(read(code=["XT008", "XT010", "XT021"], to="4.18.0..4.18.2"))
    assert {t: got.target_bits(t) for t in ("4.18.0", "4.18.2", "4.18.3")} == {"4.18.0": 0, "4.18.2": 0, "4.18.3": 4}
    assert got.bits == 4
    assert set(got.findings["targets"].explode()) == {f"4.18.{k}" for k in range(3, 7)}
    assert "4.18.3 to 4.18.6" in got.findings["text"].str.join("\n")[0]
    assert "4.18.0" not in got.findings["text"].str.join("\n")[0]


@pytest.mark.parametrize("rows", [256, 1 << 18])
def test_a_batch_boundary_changes_nothing(rows: int) -> None:
    got = analysed(read(code="XT002"), path=BARE, source="3.4.0", to="3.3.0", batch_rows=rows)
    whole = analysed(read(code="XT002"), path=BARE, source="3.4.0", to="3.3.0")
    assert got.suppressed.frame().equals(whole.suppressed.frame())
    assert got.findings.equals(whole.findings)
    assert got.suppressed.count
    assert got.bits == whole.bits


def test_document() -> None:
    document = common.document(analysed(read(code="XT008", domain="unknown")))
    assert {f["code"] for f in document["suppressed"]} == {"XT008"}
    assert document["suppressed"][0]["suppressed"] == {"index": 0, "reason": "because"}
    assert "XT008" not in {f["code"] for f in document["findings"]}
    assert document["suppressions"][0] == {
        "path": "x.toml",
        "line": None,
        "selectors": {"code": "XT008", "domain": "unknown"},
        "reason": "because",
        "expires": None,
        "expired": False,
        "code": None,
        "matched": len(document["suppressed"]),
        "suppressed": len(document["suppressed"]),
        "surface_matched": 0,
        "surface_suppressed": 0,
    }
