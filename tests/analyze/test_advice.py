"""Advice, and what it is computed from: no piece of it without the judging that bears it out."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from xtrace import release
from xtrace.analyze import advice, fleet
from xtrace.analyze.advice import Advice, Seen, advise, drains
from xtrace.errors import UnknownRelease, UsageError
from xtrace.pipeline import Options, Result, analyze
from xtrace.replay import facts
from xtrace.replay.factfiles import documents


def seen(**changes: Any) -> Seen:
    """Return what an analysis of one 4.4.4 trace found at three targets, all of them safe."""
    targets = ("4.5.0", "4.6.0", "4.7.0")
    plain = Seen(
        ("4.4.4",), targets, dict.fromkeys(targets, 0), dict.fromkeys(targets, ()),
        {t: dict.fromkeys(("cooperative", "non_cooperative", "live_update", "fork_restore"), 0) for t in targets},
        frozenset(), (), False, 1, lambda version: version, lambda _left, _host: False,
    )  # fmt: skip
    return replace(plain, **changes)


def kinds(found: list[Advice]) -> list[str]:
    return [a.kind for a in found]


BROKEN: dict[str, Any] = {"bits": {"4.5.0": 0, "4.6.0": 0, "4.7.0": 8},
          "broken": {"4.5.0": (), "4.6.0": (), "4.7.0": ("memory_op/XENMEM_decrease_reservation",)},
          "by_kind": {t: dict.fromkeys(("cooperative", "live_update"), 8 if t == "4.7.0" else 0)
                      for t in ("4.5.0", "4.6.0", "4.7.0")}}  # fmt: skip


def test_all_is_well() -> None:
    assert advise(seen()) == []


def test_nothing_to_go_by() -> None:
    (one,) = advise(seen(entries=0))
    assert one.kind == "record"
    assert "xtrace record" in one.text


def test_safe_targets_are_named_where_others_are_not() -> None:
    safe, drain = advise(seen(**BROKEN))
    assert (safe.kind, safe.targets) == ("safe", ("4.5.0", "4.6.0"))
    assert "4.5.0, 4.6.0" in safe.text
    assert (drain.kind, drain.targets, drain.operations) == ("drain", ("4.7.0",), ("memory_op/XENMEM_decrease_reservation",))
    assert "balloon" in drain.text


def test_a_way_needs_both_hops() -> None:
    asked: list[tuple[str | None, str]] = []

    def way(left: str | None, host: str) -> bool:
        asked.append((left, host))
        return (left, host) in good

    good: set[tuple[str | None, str]] = {("4.6.0", "4.7.0")}
    assert "through" not in kinds(advise(seen(**BROKEN, way=way)))
    assert (None, "4.6.0") in asked
    good = {(None, "4.6.0")}
    assert "through" not in kinds(advise(seen(**BROKEN, way=way)))
    good = {(None, "4.6.0"), ("4.6.0", "4.7.0"), (None, "4.5.5"), ("4.5.5", "4.7.0")}
    one = next(a for a in advise(seen(**BROKEN, way=way)) if a.kind == "through")
    assert (one.through, one.targets) == ("4.6.0", ("4.7.0",))
    # One that breaks something itself is no way, whatever the rest says.
    worse = {**BROKEN, "broken": {**BROKEN["broken"], "4.6.0": ("mmu_update",)}, "bits": {**BROKEN["bits"], "4.6.0": 8}}
    assert [a.through for a in advise(seen(**worse, way=way)) if a.kind == "through"] == ["4.5.5"]


def test_no_way_is_looked_for_from_a_source_that_is_not_known() -> None:
    def way(_left: str | None, _host: str) -> bool:
        raise AssertionError

    found = advise(seen(**BROKEN, sources=("4.4.3", "4.4.4"), way=way))
    assert "identify" in kinds(found)


def test_the_other_order() -> None:
    found = advise(seen(**BROKEN, way=lambda left, host: (left, host) == ("4.7.0", "4.4.4")))
    (one,) = [a for a in found if a.kind == "order"]
    assert one.targets == ("4.7.0",)


def test_kinds_of_migration_that_catch_nothing() -> None:
    by = {t: {"cooperative": 0, "live_update": 8 if t == "4.7.0" else 0, "non_cooperative": 0} for t in ("4.5.0", "4.6.0", "4.7.0")}
    found = advise(seen(**{**BROKEN, "by_kind": by}))
    (one,) = [a for a in found if a.kind == "migration"]
    assert (one.targets, one.migration) == (("4.7.0",), ("cooperative",))
    assert "migration" not in kinds(advise(seen(**{**BROKEN, "by_kind": by}, migration=frozenset({"live_update"}))))


def test_what_was_not_recorded() -> None:
    (one,) = advise(seen(blind=("memory_op",)))
    assert one.kind == "record"
    assert "memory_op" in one.text
    assert "xtrace record ftrace" in one.text


def test_every_drain_is_of_operations_that_exist() -> None:
    names = {name: n for n, name in facts.hypercall_names().items()}
    told: list[str] = []
    for drain in drains():
        assert drain.issuer
        assert drain.do
        assert len(drain.cite) == 3
        for name in drain.operations:
            hypercall, slash, operation = name.partition("/")
            assert hypercall in names
            if slash:
                assert operation in {str(o["name"]) for _, doc in documents(names[hypercall]) for o in doc.get("operation", [])}
            told.append(name)
    assert len(told) == len(set(told))


# ── whole analyses ───────────────────────────────────────────────────────────────────────────────────────────────────

DOMCTL = """\
xtrace: header release=4.17.0 tsc_khz=1000
xtrace: domain id=0 caller=pv64 role=control
xtrace: call tsc=1 pcpu=0 dom=0 vcpu=0 op=domctl a0=0x1000 mem.cmd=5 mem.domain=3 mem.interface_version=0x15
"""
MODIFIED = """\
xtrace: header release=4.1.4 tsc_khz=1000
xtrace: domain id=6 caller=pv64 role=stub
xtrace: call tsc=1 pcpu=0 dom=6 vcpu=0 op=hvm_op a0=0x7 a1=0x1000 mem.domid=5 mem.first_pfn=0x10 mem.nr=0x400
xtrace: sample tsc=2 pcpu=0 dom=6 vcpu=0 op=hvm_op a0=0x7 a1=0x1000 on_insn=1 mem.domid=5 mem.first_pfn=0x110 mem.nr=0x300
"""
BALLOON = """\
xtrace: header release=3.3.0 tsc_khz=1000
xtrace: domain id=3 caller=pv64 role=guest
xtrace: call tsc=1 pcpu=0 dom=3 vcpu=0 op=12 a0=0x1 a1=0x1000 mem.nr_extents=64
xtrace: sample tsc=2 pcpu=0 dom=3 vcpu=0 op=12 a0=0x51 a1=0x1000 on_insn=1 mem.nr_extents=64
"""


def run(tmp_path: Path, text: str, **options: Any) -> Result:
    path = tmp_path / "a.log"
    path.write_text(text)
    return analyze([path], Options(**options))


@pytest.mark.parametrize(("text", "target"), [(DOMCTL, "4.18.0"), (MODIFIED, "4.5.0")])
def test_a_way_that_is_advised_is_one(tmp_path: Path, text: str, target: str) -> None:
    """What the advice says is held against analyses of their own: the path through it breaks nothing but the whole jump."""
    result = run(tmp_path, text, targets=(target,))
    assert result.bits
    (one,) = [a for a in result.advice if a.kind == "through"]
    source = result.sources[0]
    assert one.through is not None
    assert release.index(source) < release.index(one.through) < release.index(target)
    path = run(tmp_path, text, path=(source, one.through, target)).path
    assert path is not None
    by = {(leg.left, leg.host): leg for leg in path.legs}
    bad = {"refused", "misdirected", "absent", "skips", "redoes", "wrong_result", "undecidable", "unknown"}
    for hop in ((source, one.through), (one.through, target)):
        assert not by[hop].surface
        assert not set(by[hop].outcomes) & bad
    whole = by[source, target]
    assert whole.surface or set(whole.outcomes) & bad


def test_no_way_where_the_encoding_is_never_read_again(tmp_path: Path) -> None:
    result = run(tmp_path, BALLOON, targets=("3.4.0", "4.17.7"))
    assert kinds(result.advice) == ["drain"]
    assert result.advice[0].targets == ("3.4.0", "4.17.7")


def test_a_path_counts_its_worst_leg(tmp_path: Path) -> None:
    result = run(tmp_path, BALLOON, path=("3.2.0", "3.3.0"))
    assert result.sources == ("3.2.0",)
    result = run(tmp_path, BALLOON, path=("3.3.0", "3.3.0", "3.4.0"))
    assert result.path is not None
    bits = {(leg.left, leg.host, leg.hop): leg.bits for leg in result.path.legs}
    assert bits["3.3.0", "3.3.0", True] & 8 == 0  # another host of the same release
    assert bits["3.3.0", "3.4.0", False] & 8  # what the first left, still in flight
    assert bits["3.3.0", "3.4.0", True] == 4  # what the second would leave: nobody saw it
    assert result.bits & 8
    assert set(result.store.frame().filter(evidence="inferred").get_column("args").list.get(0)) == {0x61}


def test_a_path_and_its_pairs_agree(tmp_path: Path) -> None:
    """Each leg from the first host is what an analysis with --to says."""
    path = run(tmp_path, BALLOON, path=("3.3.0", "3.4.0", "4.5.0", "4.17.7")).path
    assert path is not None
    assert len(path.legs) == 6
    for leg in path.legs[:3]:
        alone = run(tmp_path, BALLOON, targets=(leg.host,))
        assert alone.target_bits(leg.host) == leg.bits
        assert alone.tally.counts[leg.host] == leg.outcomes


@pytest.mark.parametrize(
    ("path", "error"),
    [(("4.4.4",), UsageError), (("4.4", "4.5.0"), UsageError), (("4.4.4", "9.9.9.9"), UnknownRelease), ((), UsageError)],
)
def test_bad_paths(path: tuple[str, ...], error: type[Exception]) -> None:
    with pytest.raises(error):
        fleet.hosts_of(path)


def test_a_path_excludes_targets_and_another_source(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="leave out --to"):
        run(tmp_path, BALLOON, path=("3.3.0", "3.4.0"), targets=("4.5.0",))
    with pytest.raises(UsageError, match=r"begins with 3\.3\.0"):
        run(tmp_path, BALLOON, path=("3.3.0", "3.4.0"), source="4.5.0")
    assert advice.drain_of("iret") is None
