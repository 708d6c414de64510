"""The fact files: complete, consistent, cited; and no code that knows a release."""

from __future__ import annotations

import re
import tomllib
from pathlib import Path

import pytest

from xtrace import release
from xtrace.replay import factfiles, facts
from xtrace.replay.codecs import CODECS

ROOT = Path(__file__).parents[2]
ABI = ROOT / "xtrace" / "replay" / "abi"
FULL = sorted(ABI / name for names in facts.files().values() for name in names)


@pytest.mark.parametrize("path", FULL, ids=lambda p: p.stem)
def test_every_release_and_caller_is_answered(path: Path) -> None:
    doc = tomllib.loads(path.read_text())
    number = doc["hypercall"]["number"]
    assert path.name in facts.files()[number]
    assert facts.hypercall_names()[number] == doc["hypercall"]["name"] == path.stem.partition("-")[0]
    command = doc["hypercall"].get("command", False)
    assert facts.command_at(number) == (command if isinstance(command, str) else "arg0" if command else None)
    for version in release.expand(tuple(doc["model"]["releases"])):
        for caller in doc["model"]["callers"]:
            call = facts.lookup(version, caller, number)
            # Outside its model a file says that it does not know.
            assert call.status in ("modelled", "absent")
            for b in call.by_number.values():
                assert b.codec in CODECS
                assert b.cites
                assert b.guard in ("any", "device_model", "control")
                assert set(b.caveats) <= {"machine_frames", "domids"}
                if b.codec == "unknown":
                    assert b.note, f"{b.operation}: what is not known, and why"


@pytest.mark.parametrize("path", [*FULL, ABI / "never.toml"], ids=lambda p: p.stem)
def test_cites(path: Path) -> None:
    """Each cite that is used exists, names a real tag, and has what proves the fact."""
    text = path.read_text()
    doc = tomllib.loads(text)
    cites = doc["cite"]
    tags = {t for r in release.releases() for t in (r.tag, *r.also)}
    used: set[str] = set()

    def walk(node: object) -> None:
        if isinstance(node, dict):
            for key, value in node.items():
                if key == "cite" and isinstance(value, list):
                    used.update(value)
                elif key == "inner_operations":
                    used.update(set(value.values()) & set(cites))  # the cite of an inner number bears its name
                elif key != "cite":
                    walk(value)
        elif isinstance(node, list):
            for value in node:
                walk(value)

    walk({k: v for k, v in doc.items() if k != "cite"})
    assert used <= set(cites)
    assert set(cites) <= used, "cites that nothing uses"
    for name, cite in cites.items():
        assert {cite["tag"], *cite.get("also", [])} <= tags, name
        assert cite["path"].startswith(("xen/", "tools/")), name
        assert cite["symbol"], name
        assert cite.get("expect") or cite.get("lacks"), name
        assert re.fullmatch(r"[0-9a-f]{10,40}", cite.get("commit", "0" * 12)), name


def test_every_hypercall_is_spoken_about_once() -> None:
    """A full file, never, maybe or undefined: "not in the table" never has two meanings."""
    doc = tomllib.loads((ABI / "never.toml").read_text())
    never, maybe, undefined = doc["never"], doc["maybe"], doc["undefined"]

    def rows(table: list[dict[str, object]], number: int, version: str, caller: str) -> list[dict[str, object]]:
        return [
            row
            for row in table
            if row["number"] == number
            and caller in row.get("callers", ("pv64", "hvm64"))  # type: ignore[operator]
            and version in release.expand(tuple(row["releases"]))  # type: ignore[arg-type]
        ]

    for r in (r for r in release.releases() if r.version in facts.modelled_releases()):
        for caller in ("pv64", "hvm64"):
            for number in range(64):
                if number in facts.files():
                    continue
                found = [rows(t, number, r.version, caller) for t in (never, maybe, undefined)]
                whole = [row for part in found for row in part if "operations" not in row]
                split = [row for part in found for row in part if "operations" in row]
                assert len(whole) + bool(split) == 1, (number, r.version, caller)


def test_never_and_absent() -> None:
    assert facts.lookup("4.17.7", "pv64", 29).status == "never"  # sched_op
    assert facts.lookup("4.17.7", "pv64", 50).status == "absent"
    assert facts.lookup("4.17.7", "hvm64", 1).status == "absent"  # mmu_update is for PV
    evtchn = facts.lookup("4.17.7", "pv64", 32)
    assert evtchn.behaviour("EVTCHNOP_send").codec == "none"  # type: ignore[union-attr]
    assert evtchn.behaviour("EVTCHNOP_reset").codec == "redirect"  # type: ignore[union-attr]


def test_point_releases_matter() -> None:
    """EVTCHNOP_reset is preemptible from XSA-344 on, backported to 4.12.4, 4.13.2 and 4.14.1."""
    for version, never in (("4.12.3", True), ("4.12.4", False), ("4.13.1", True), ("4.13.2", False), ("4.14.0", True)):
        b = facts.lookup(version, "pv64", 32).behaviour("EVTCHNOP_reset")
        assert b is not None
        assert (b.codec == "none") == never, version
    # A host may carry the fix without the release.
    fixed = facts.lookup("4.13.1+XSA-344", "pv64", 32)
    assert fixed.release == "4.13.1+XSA-344"
    assert fixed.behaviour("EVTCHNOP_reset_cont") is not None
    assert facts.lookup("4.13.1", "pv64", 32).behaviour("EVTCHNOP_reset_cont") is None
    # What the fix does not touch stays as it is.
    assert facts.lookup("4.13.1+XSA-344", "pv64", 12).by_number == facts.lookup("4.13.1", "pv64", 12).by_number


def test_no_code_compares_releases() -> None:
    """Whatever differs between releases is looked up (DESIGN §4)."""
    literal = re.compile(r"""["'][34]\.\d{1,2}(\.\d+)?["']""")
    allowed = {"release.py"}  # the spelling of versions is its subject
    for path in sorted((ROOT / "xtrace").rglob("*.py")):
        if path.name in allowed or path.parent.name == "config":  # examples in error messages
            continue
        code = re.sub(r'""".*?"""', "", path.read_text(), flags=re.S)
        code = re.sub(r"#.*", "", code)
        assert not literal.search(code), (path, literal.search(code))


@pytest.mark.parametrize("path", FULL, ids=lambda p: p.stem)
def test_tables_agree_with_the_files(path: Path) -> None:
    """The hypercall tables extracted by script say the same about who has a hypercall as the curated files."""
    doc = tomllib.loads(path.read_text())
    number = doc["hypercall"]["number"]
    for caller in doc["model"]["callers"]:
        for version in release.expand(tuple(doc["model"]["releases"])):
            status = facts.lookup(version, caller, number).status
            # None: this release has no hypercall table for that caller, so that it has no hypercalls.
            assert (status == "modelled") == bool(factfiles.in_table(version, caller, number)), (caller, version)
