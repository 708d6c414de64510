"""Every real image answers as its expected.json says; XTRACE_CAPTURES=DIR adds the ones that are too large to keep here."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest

from xtrace.inspection import inspect
from xtrace.report.inspect_json import document

SAMPLES = Path(__file__).resolve().parents[2] / "samples" / "images"
GUESTS = {"bare PV 64": ("pv64",), "Linux PV 64": ("pv64",), "bare PVH 64": ("pvh", "hvm"), "bare PVH 32": ("pvh", "hvm")}
FORMATS = {"xl header + libxl v2 + libxc v3": ("xl-save", 3), "libxc v3": ("libxc", 3), "Xen core ELF": ("core", 1)}


def expected() -> list[tuple[Path, dict[str, Any]]]:
    folders = [SAMPLES]
    if os.environ.get("XTRACE_CAPTURES"):
        folders.append(Path(os.environ["XTRACE_CAPTURES"]) / "images")
    out = {}
    for folder in folders:
        for row in json.loads((folder / "expected.json").read_text()):
            if (folder / row["file"]).exists():
                out[row["file"]] = (folder / row["file"], row)
    return list(out.values())


def whole(path: Path, tmp_path: Path) -> Path:
    """Return the image itself: a patch is applied to the image that it is against (zstd --patch-from)."""
    if not path.name.endswith(".patch.zst"):
        return path
    if shutil.which("zstd") is None:
        pytest.skip("no zstd to apply the patch with")
    base, image = tmp_path / "base", tmp_path / path.name.removesuffix(".patch.zst")
    subprocess.run(["zstd", "-dq", path.parent / "lin.save.zst", "-o", base], check=True)
    subprocess.run(["zstd", "-dq", "--long=27", f"--patch-from={base}", path, "-o", image], check=True)
    return image


def test_there_are_samples() -> None:
    assert len(expected()) >= 10


@pytest.mark.parametrize(("path", "row"), expected(), ids=lambda x: x.name if isinstance(x, Path) else "")
def test_as_expected(path: Path, row: dict[str, Any], tmp_path: Path) -> None:
    found = inspect(whole(path, tmp_path))
    doc = document(found)
    image = doc["image"]
    assert (image["format"], image["version"]) == FORMATS[row["format"]]
    assert image["guest"] in GUESTS[row["guest"]]
    assert image["xen"] in (row["xen"], row["xen"].rpartition(".")[0])
    assert image["vcpus"] == len(row["vcpus"])
    assert image["problems"] == []
    if row.get("pfns_with_data"):
        assert image["pages"] == row["pfns_with_data"]
    assert any(v["parked"] for v in doc["vcpus"]) is row["any_parked"]
    for got, want in zip(doc["vcpus"], row["vcpus"], strict=True):
        meaning = want["meaning"]
        assert got["vcpu"] == want["vcpu"]
        assert got["registers"].items() >= {
            k: v for k, v in want["regs"].items() if k in got["registers"]
        }.items()  # fmt: skip
        assert {"rip", "rax", "rdi", "rsi", "rdx", "rbx", "rcx", "cr3", "rflags", "rsp", "rbp"} <= set(got["registers"])
        assert got["rip"] == want["regs"]["rip"]
        assert got["code"] == want["bytes_at_rip"]
        assert got["on_hypercall"] is meaning["at_insn"]
        assert got["parked"] is meaning["parked"]
        assert got["op"] == meaning.get("op")
        if meaning["parked"]:
            assert (got["progress"], got["total"]) == (meaning["done"], meaning["total"])
            name, _, subop = meaning["name"].partition(".")
            assert got["hypercall"] == name
            assert got["subop"] == (f"XENMEM_{subop}" if subop else None)
            inner = meaning.get("subcall")
            if inner is None:
                assert got["inner"] is None
            else:
                assert got["inner"]["hypercall"] == "memory_op"
                assert got["inner"]["progress"] == inner["done"]
        elif not meaning["at_insn"]:
            assert got["hypercall"] is got["progress"] is got["inner"] is None
        if got["parked"] is not True:
            assert not [f for f in doc["findings"] if f["vcpu"] == got["vcpu"]]


def test_one_moment_in_three_formats() -> None:
    """The stream, the bare libxc stream and the core of one moment agree, machine frames aside."""
    docs = [document(inspect(SAMPLES / f"pv-populate.{kind}.zst"))["vcpus"][0] for kind in ("save", "libxc", "core")]
    for doc in docs:
        for name in ("rdx", "cr3"):
            del doc["registers"][name]
        del doc["offset"]
    assert docs[0] == docs[1] == docs[2]


def test_evidence() -> None:
    def of(name: str) -> tuple[object, object]:
        state = inspect(SAMPLES / f"{name}.zst").vcpus[0]
        return state.parked, state.evidence

    assert of("pv-populate.save") == (True, "proved")
    assert of("pv-mc-mem.save") == (True, "proved")
    assert of("pvh-mc-ver.save") == (True, "inferred")
    assert of("pv-fresh.save") == (False, "proved")
    assert of("pv-done.save") == (False, "proved")
