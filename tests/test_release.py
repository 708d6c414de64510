"""Releases: the list, what a text means, and sets of releases as text."""

from __future__ import annotations

import itertools
import subprocess
import sys
import tomllib
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from xtrace import release
from xtrace.errors import FactError, UnknownRelease

VERSIONS = [r.version for r in release.releases()]
SETS = st.sets(st.sampled_from(VERSIONS))
# Few long runs rather than many short ones.
RUNS = st.lists(st.tuples(st.integers(0, len(VERSIONS) - 1), st.integers(0, 25)), max_size=5).map(
    lambda runs: {v for i, n in runs for v in VERSIONS[i : i + n]}
)


# ── the list ─────────────────────────────────────────────────────────────────────────────────────────────────────────


def test_the_list_is_ordered_and_complete() -> None:
    known = release.releases()
    assert list(known) == sorted(known)
    assert known[0].version == "3.0.2"
    assert known[-2].version == "4.22.0" == release.newest().version
    # The development branch, pinned to one commit, comes last.
    assert known[-1].version == "4.23-unstable"
    assert [r for r in known if not r.released] == [known[-1]]
    assert known[-1].tag == known[-1].commit
    assert [v for v in VERSIONS if v.startswith("3.")] == [
        "3.0.2",
        "3.0.3",
        "3.0.4",
        "3.1.0",
        "3.2.0",
        "3.3.0",
        "3.4.0",
    ]
    assert "4.6.2" not in VERSIONS
    assert VERSIONS.index("4.1.6.1") == VERSIONS.index("4.1.6") + 1
    assert VERSIONS.index("4.10.0") > VERSIONS.index("4.9.4")


def test_a_release_has_its_tag_and_commit() -> None:
    got = release.get("4.4.1")
    assert (got.version, got.tag, got.series, got.key) == ("4.4.1", "RELEASE-4.4.1", "4.4", (4, 4, 1))
    assert len(got.commit) == 40
    assert got.date.year == 2014
    assert str(got) == "4.4.1"
    assert all(len(r.commit) == 40 for r in release.releases())


@pytest.mark.parametrize(
    ("name", "version"),
    [
        ("RELEASE-4.4.1", "4.4.1"),
        ("3.4.0-rc3", "3.4.0"),
        ("3.2.0-rc6", "3.2.0"),
        ("3.3.0-branched", "3.3.0"),
        ("xen-RELEASE-4.14.5", "4.14.5"),
        ("4.1.6.1", "4.1.6.1"),
    ],
)
def test_get_by_version_or_tag(name: str, version: str) -> None:
    assert release.get(name).version == version


@pytest.mark.parametrize("name", ["3.4", "4.6.2", "4.17.7-pre", "", " 4.4.1", "4.4.1 "])
def test_get_takes_nothing_else(name: str) -> None:
    with pytest.raises(UnknownRelease):
        release.get(name)


def test_get_says_what_a_series_is() -> None:
    with pytest.raises(UnknownRelease, match=r"'4\.13' is a series of releases, not one release; did you mean 4\.13\?"):
        release.get("4.13")


def test_series() -> None:
    assert [r.version for r in release.series("4.13")] == [f"4.13.{n}" for n in range(6)]
    assert {r.series for r in release.series("3.0")} == {"3.0"}
    with pytest.raises(UnknownRelease, match="did you mean"):
        release.series("4.31")


def test_index_agrees_with_order() -> None:
    assert [release.index(v) for v in VERSIONS] == list(range(len(VERSIONS)))
    with pytest.raises(UnknownRelease):
        release.index("4.13")


def test_releases_are_loaded_without_the_data_frames() -> None:
    code = "import sys, xtrace.release as r; r.releases(); print('polars' in sys.modules or 'numpy' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout.strip() == "False"


# ── what a text means ────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(
    ("text", "folded"),
    [
        ("4.4.1", "4.4.1"),
        ("RELEASE-4.4.1", "4.4.1"),
        ("3.4.0-rc3", "3.4.0"),
        ("  4.4.1\n", "4.4.1"),
        ("v4.4.1", "4.4.1"),
        ("xen-4.4.1", "4.4.1"),
        ("Xen version 4.4.1", "4.4.1"),
        ("4.13", "4.13"),
        ("4.13.x", "4.13"),
        ("3.4", "3.4.0"),
        ("4.13.2..4.13.4", "4.13.2–4.13.4"),
        ("4.13..4.15", "4.13–4.15"),
        ("4.13-4.15", "4.13–4.15"),
        ("4.13.2 – 4.15", "4.13.2–4.15.7"),
        ("4.20..", "4.20–4.22"),
    ],
)
def test_exact_texts_have_no_note(text: str, folded: str) -> None:
    got = release.parse(text)
    assert release.fold_text(got.versions) == folded
    assert got.note is None
    assert got.exact


@pytest.mark.parametrize(
    ("text", "version", "note"),
    [
        ("4.13.5-9.40.1", "4.13.5", "4.13.5-9.40.1 is judged as 4.13.5"),
        ("4.17.9", "4.17.7", "4.17.9 is not known; the nearest known is 4.17.7"),
        ("4.17.7+13-g2445b30a44-0+deb12u1", "4.17.7", "is judged as 4.17.7"),
        ("Xen version 4.17.7 (Debian 4.17.7+13-g2445b30a44-0+deb12u1)", "4.17.7", "is judged as 4.17.7"),
        ("4.17.7-pre", "4.17.7", "is a build from before 4.17.7"),
        ("4.2.2-rc1", "4.2.2", "is a build from before 4.2.2"),
        ("4.4.1-xs90192", "4.4.1", "is judged as 4.4.1"),
        ("4.13.1+XSA-344", "4.13.1+XSA-344", "is judged as 4.13.1 with XSA-344"),
        ("4.13.0-pre+xsa344", "4.13.0+XSA-344", "a build from before 4.13.0"),
        ("4.13.5+XSA-344", "4.13.5", "4.13.5 has XSA-344 already"),
        ("4.13.1_06-lp152.2", "4.13.1", "is judged as 4.13.1"),
        ("4.16.0-1~ubuntu2", "4.16.0", "is judged as 4.16.0"),
        ("3.4.2", "3.4.0", "no tag stands for other releases"),
        ("4.6.2", "4.6.3", "4.6.2 is not known; the nearest known is 4.6.3"),
        ("4.1.6.2", "4.1.6.1", "nearest known is 4.1.6.1"),
        ("4.18-unstable", "4.18.0", "from before 4.18.0"),
        ("stable-4.18", "4.18.6", "newest known release"),
        ("4.23.0", "4.23-unstable", "the development branch of 2026-08-20 (c447b7308b13)"),
        ("4.23", "4.23-unstable", "the development branch"),
        ("master", "4.23-unstable", "the development branch"),
        ("staging", "4.23-unstable", "the development branch"),
    ],
)
def test_the_nearest_release_with_a_note(text: str, version: str, note: str) -> None:
    got = release.parse(text)
    assert got.versions == (version,)
    assert got.note is not None
    assert note in got.note
    assert not got.exact


def test_a_host_that_names_only_its_series() -> None:
    got = release.parse("4.11.amazon")
    assert release.fold(got.versions) == ["4.11"]
    assert got.note == ("4.11.amazon does not say which point release of 4.11 it is; it is judged as all of 4.11.0–4.11.4")


@pytest.mark.parametrize("text", ["", "foo", "4", "5.0", "4.31", "2.0.7", "3.9", "99999999999.1", "4.13..4.99", "4..5"])
def test_what_is_no_release(text: str) -> None:
    with pytest.raises(UnknownRelease, match=r"did you mean|known are 3\.0\.2 to 4\.22\.0") as caught:
        release.parse(text)
    assert caught.value.exit_bits == 3


def test_a_range_that_runs_backwards() -> None:
    with pytest.raises(UnknownRelease, match="ends before it begins"):
        release.parse("4.15..4.13")


@given(st.text(max_size=30) | st.from_regex(r"\A(xen-)?[0-9]{1,2}\.[0-9.]{1,6}[-+.~a-z0-9]{0,8}\Z"))
def test_any_text_is_a_selection_or_unknown(text: str) -> None:
    try:
        got = release.parse(text)
    except UnknownRelease:
        return
    assert got.releases
    assert set(got.versions) <= set(VERSIONS)
    assert list(got.releases) == sorted(got.releases)
    assert got.note is None or got.text in got.note


# ── sets of releases ─────────────────────────────────────────────────────────────────────────────────────────────────


def test_expand() -> None:
    assert release.expand([]) == frozenset()
    assert release.expand(["3.3.0", "4.13.2..4.13.5"]) == {"3.3.0", "4.13.2", "4.13.3", "4.13.4", "4.13.5"}
    assert release.expand(["4.21.2.."]) == {"4.21.2", "4.22.0", "4.23-unstable"}
    assert release.expand(("4.9.4..4.10.0",)) == {"4.9.4", "4.10.0"}
    assert release.indices(["3.0.2", "4.22.0"]) == {0, len(VERSIONS) - 2}


@pytest.mark.parametrize(
    "spans", [["4.13"], ["4.6.2"], ["4.5.0..4.4.0"], ["..4.4.0"], [".."], [""], ["4.4.0 .. 4.4.1"], [4.4], "4.4.0.."]
)
def test_malformed_spans(spans: list[str]) -> None:
    with pytest.raises(FactError):
        release.expand(spans)


def test_fold() -> None:
    assert release.fold(release.expand(["4.18.0.."])) == ["4.18–4.22", "4.23-unstable"]
    assert release.fold(release.expand(["4.18.0.."]), whole_series=False) == ["4.18.0–4.22.0", "4.23-unstable"]
    assert release.fold(release.expand(["4.13.2..4.13.5"])) == ["4.13.2–4.13.5"]
    assert release.fold(release.expand(["4.13.0..4.13.5"])) == ["4.13"]
    assert release.fold(release.expand(["4.13.2..4.15.7"])) == ["4.13.2–4.15.7"]
    assert release.fold(["4.22.0", "3.3.0", "3.3.0"]) == ["3.3.0", "4.22.0"]
    assert release.fold(["4.6.3", "4.6.1"]) == ["4.6.1–4.6.3"]  # there is nothing between them
    assert release.fold([]) == []
    assert release.fold_text([]) == "none"
    assert release.fold_text(["3.3.0", "4.21.0"]) == "3.3.0, 4.21.0"
    with pytest.raises(UnknownRelease):
        release.fold(["4.13"])


@given(SETS | RUNS)
def test_spans_and_expand_are_inverse(versions: set[str]) -> None:
    spans = release.spans(versions)
    assert release.expand(spans) == versions
    assert len(release.expand(spans)) == sum(len(release.expand([s])) for s in spans)


@given(SETS | RUNS, st.booleans())
def test_folded_text_reads_back(versions: set[str], whole: bool) -> None:
    folded = release.fold(versions, whole_series=whole)
    back = [v for text in folded for v in release.parse(text).versions]
    assert back == sorted(versions, key=release.index)
    assert all(release.parse(text).exact for text in folded)


# ── the generated tables ─────────────────────────────────────────────────────────────────────────────────────────────

ABI = Path(release.__file__).parent / "replay" / "abi"


def table(name: str) -> dict[str, list[dict[str, Any]]]:
    return tomllib.loads((ABI / name).read_text(encoding="utf-8"))


@pytest.mark.parametrize(
    ("name", "keys"), [("tables.toml", ("hypercall", "present", "table")), ("numbers.toml", ("constant", "interface"))]
)
def test_generated_tables_hold_only_known_releases_in_their_shortest_form(name: str, keys: tuple[str, ...]) -> None:
    doc = table(name)
    assert doc["unknown"] == []
    for row in (row for key in keys for row in doc[key]):
        assert release.spans(release.expand(row["releases"])) == row["releases"], row


def test_a_number_is_present_at_most_once_for_a_caller_and_release() -> None:
    doc = table("tables.toml")
    read = {(t["caller"], v) for t in doc["table"] for v in release.expand(t["releases"])}
    seen: set[tuple[str, str, int]] = set()
    for row in doc["present"]:
        for caller, version in itertools.product(row["callers"], release.expand(row["releases"])):
            assert (caller, version, row["number"]) not in seen
            assert (caller, version) in read
            seen.add((caller, version, row["number"]))
    # facts that were looked up in Xen by hand
    for caller, version, number, there in [
        ("pv32", "4.7.6", 25, False),  # compat_ni_hypercall; one table for both from 4.8
        ("pv32", "4.8.0", 25, True),
        ("hvm64", "4.15.0", 13, False),
        ("hvm64", "4.15.1", 13, True),
        ("hvm64", "4.13.0", 21, False),
        ("hvm64", "4.12.3", 21, True),
        ("pv64", "4.3.3", 49, False),
        ("pv64", "4.3.4", 49, True),
        ("pv64", "4.4.1", 49, False),
        ("hvm32", "3.3.0", 24, False),
        ("hvm32", "3.4.0", 24, True),
        ("pvh64", "4.4.0", 26, True),
        ("pv64", "4.22.0", 31, False),
        ("hvm64", "4.17.0", 40, True),
        ("pv64", "4.9.0", 41, True),
    ]:
        assert ((caller, version, number) in seen) == there, (caller, version, number)


def test_a_constant_has_one_number_in_a_release() -> None:
    seen: dict[tuple[str, str], int] = {}
    for row in table("numbers.toml")["constant"]:
        for version in release.expand(row["releases"]):
            assert seen.setdefault((row["name"], version), row["number"]) == row["number"]
    assert seen["KEXEC_CMD_kexec_load", "4.3.4"] == 1
    assert seen["KEXEC_CMD_kexec_load", "4.4.0"] == 4
    assert seen["XENMEM_exchange", "3.3.0"] == 11
    assert ("XENMEM_get_pod_target", "3.3.0") not in seen
    assert seen["XENMEM_get_pod_target", "3.4.0"] == 17


def test_named_fixes() -> None:
    """A fix gives one hypercall the facts of the release that has it first in the series, and nothing else."""
    (fixed,) = release.parse("4.13.1+XSA-344").releases
    assert release.get("4.13.1") < fixed < release.get("4.13.2")
    assert release.base(fixed.version) == "4.13.1"
    assert release.facts_of(fixed.version, "event_channel_op") == "4.13.2"
    assert release.facts_of(fixed.version, "memory_op") == "4.13.1"
    assert release.fold(["4.13.1", "4.13.2", fixed.version]) == ["4.13.1–4.13.2", "4.13.1+XSA-344"]
    for text, words in (
        ("4.13.1+XSA-1", "no fix called XSA-1"),
        ("4.5.0+XSA-344", "no release of 4.5 is known to have XSA-344"),
        ("4.13+XSA-344", "is a series"),
    ):
        with pytest.raises(UnknownRelease, match=words):
            release.parse(text)
