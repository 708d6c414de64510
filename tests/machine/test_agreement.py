"""A verdict derived twice, by the table and by execution, is the same: every family, adjacent releases, and far ones."""

from __future__ import annotations

import random
import sys
from itertools import pairwise
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from xtrace import release, schema
from xtrace.replay import facts

sys.path.insert(0, str(Path(__file__).parent))

from agreement import both, continuing  # noqa: E402

RELEASES = [r.version for r in release.releases()]
TOTALS = (2, 3, 5, 64, 300)


@pytest.mark.parametrize("caller", schema.CALLERS)
def test_adjacent_releases(caller: str) -> None:
    """Every pair of neighbours, both ways, every family: one operation drawn each time (the same ones on every run)."""
    draw = random.Random(caller)
    compared = 0
    for a, b in pairwise(RELEASES):
        for source, target in ((a, b), (b, a)):
            for number in facts.files():
                operations = continuing(source, caller, number)
                if not operations:
                    continue
                total = draw.choice(TOTALS)
                got = both(
                    source,
                    target,
                    caller,
                    number,
                    draw.choice(operations),
                    total,
                    draw.randrange(total),
                    swapped=draw.random() < 0.5,
                )
                if got is not None:
                    assert got.agree, got
                    compared += 1
    assert compared > 100


@st.composite
def cases(draw: st.DrawFn) -> tuple[str, str, str, int, int, int, int, bool]:
    caller = draw(st.sampled_from(schema.CALLERS))
    number = draw(
        st.sampled_from([n for n in facts.files() if any(continuing(r, caller, n) for r in ("4.1.6.1", "4.4.4", "4.22.0"))])
    )
    a, b = draw(st.sampled_from(RELEASES)), draw(st.sampled_from(RELEASES))
    total = draw(st.integers(2, 70))
    return a, b, caller, number, draw(st.integers(0, 40)), total, draw(st.integers(0, total - 1)), draw(st.booleans())


@settings(max_examples=400, deadline=None)
@given(cases())
def test_far_releases(case: tuple[str, str, str, int, int, int, int, bool]) -> None:
    """Any two releases; a disagreement is shrunk to a small call."""
    a, b, caller, number, k, total, stop, swapped = case
    operations = continuing(a, caller, number)
    if operations:
        got = both(a, b, caller, number, operations[k % len(operations)], total, stop, swapped=swapped)
        assert got is None or got.agree, got


def test_a_wrong_fact_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    """The two roads do not share what reads the facts: a fault in one of them shows."""
    from xtrace.replay import codecs

    operation = next(b for b in continuing("3.3.0", "pv64", 12) if b.operation == "XENMEM_decrease_reservation")
    assert both("3.4.0", "3.3.0", "pv64", 12, operation, 64, 5, swapped=False).agree  # type: ignore[union-attr]

    def wrong(self, b, s):  # type: ignore[no-untyped-def]
        return codecs.Column.full(len(s), 0)

    monkeypatch.setattr(codecs.ShiftedIndex, "_read", wrong)
    assert not both("3.4.0", "3.3.0", "pv64", 12, operation, 64, 5, swapped=False).agree  # type: ignore[union-attr]
