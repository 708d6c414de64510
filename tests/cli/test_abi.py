"""``xtrace abi``: the table shown, compared, chained and exported, from the command line."""

from __future__ import annotations

import csv
import io
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from xtrace.cli.app import run

ROOT = Path(__file__).parents[2]


@pytest.fixture
def abi(capsys: pytest.CaptureFixture[str]) -> Any:
    def call(*words: str) -> tuple[int, str, str]:
        status = run(["abi", *words])
        out, err = capsys.readouterr()
        return status, out, err

    return call


def test_versions(abi: Any) -> None:
    status, out, _ = abi("versions")
    assert status == 0
    lines = out.splitlines()
    assert lines[0].startswith("3.0.2 ")
    assert lines[-1].startswith("4.23-unstable")
    assert "(unreleased)" in lines[-1]


def test_show(abi: Any) -> None:
    status, out, _ = abi("show", "memory_op", "--at", "3.3.0")
    assert status == 0
    assert "arg0 & 0xf, progress from bit 4" in out
    status, out, _ = abi("show", "memory_op", "--at", "4.22.0", "--format", "json")
    table = {o["operation"]: o for o in json.loads(out)["operations"]}
    assert table["XENMEM_exchange"]["home"] == "guest_memory"
    assert table["XENMEM_maximum_ram_page"]["codec"] == "none"


def test_diff_of_the_mask_of_2009(abi: Any) -> None:
    """DESIGN's worked example, without a trace, both directions."""
    status, out, _ = abi("diff", "3.3.0", "3.4.0", "--caller", "pv64", "--hypercall", "memory_op", "--format", "json")
    assert status == 12  # breaks forth (8) and back (4)
    changes = {c["operation"]: c for c in json.loads(out)["changes"]}
    change = changes["XENMEM_decrease_reservation"]
    assert "36e30441326a" in change["commits"][0]
    forth = {f["outcome"]: f for f in change["forth"]}
    assert forth["misdirected"]["errno"] == "-EINVAL"
    assert {"misdirected", "refused", "redoes"} <= set(forth)
    assert [f["outcome"] for f in change["back"] if f["outcome"] != "resumes"] == ["skips"]
    assert any(d["what"] == "encoding" and "from 4 up" in d["before"] and "from 6 up" in d["after"] for d in change["differences"])
    # What never continues is no news.
    assert "XENMEM_maximum_ram_page" not in changes


def test_diff_of_the_mask_of_2014(abi: Any) -> None:
    status, out, _ = abi("diff", "4.4.4", "4.5.0", "--caller", "hvm64", "--hypercall", "hvm_op")
    assert status & 8 == 0  # only device models issue them
    assert status & 4
    assert "HVMOP_modified_memory" in out
    assert "home: guest_memory  ->  command_bits" in out
    assert "above 0xff, in steps of 256" in " ".join(out.split())


def test_no_difference(abi: Any) -> None:
    status, out, _ = abi("diff", "4.4.3", "4.4.4", "--caller", "pv64", "--hypercall", "console_io")
    assert status == 0
    assert out == "No continuation differs between 4.4.3 and 4.4.4.\n"


def test_matrix(abi: Any) -> None:
    status, out, _ = abi("matrix", "3.3.0", "3.4.0", "4.5.0", "--caller", "pv64", "--exposure", "guest", "--hypercall", "memory_op")
    assert status == 0
    rows = {line.split()[0]: line.split()[1:] for line in out.splitlines() if line[:1].isdigit()}
    assert rows["3.3.0"] == [".", "M", "M"]
    assert rows["3.4.0"] == ["S", ".", "."]
    _, out, _ = abi("matrix", "4.4.4", "4.5.0", "--caller", "hvm64", "--format", "json")
    cells = {(c["exposure"], c["source"], c["target"]): c for c in json.loads(out)}
    assert cells["device_model", "4.4.4", "4.5.0"]["outcome"] in ("absent", "refused")
    assert len(cells) == 3 * 4


def test_chain_shows_what_pairs_do_not(abi: Any) -> None:
    status, out, _ = abi("chain", "4.4.4", "4.5.0", "4.9.0", "--caller", "hvm64", "--hypercall", "hvm_op", "--format", "json")
    assert status & 4
    steps = {(s["operation"], s["last"], s["host"]): s for s in json.loads(out)["steps"]}
    # set_mem_type of 4.4 resumes at 4.5, which drives it on in its own encoding; 4.9 knows neither.
    assert ("HVMOP_set_mem_type", "4.4.4", "4.5.0") not in steps
    assert "refused" in steps["HVMOP_set_mem_type", "4.5.0", "4.9.0"]["outcomes"]
    assert "absent" in steps["HVMOP_set_mem_type", "4.4.4", "4.9.0"]["outcomes"]
    assert abi("chain", "4.4.4")[0] == 3


@pytest.mark.parametrize("form", ["json", "jsonl", "csv"])
def test_export(abi: Any, form: str) -> None:
    status, out, _ = abi("export", "--hypercall", "memory_op", "--hypercall", "sched_op", "--caller", "pv64", "--format", form)
    assert status == 0
    if form == "json":
        rows = json.loads(out)
    elif form == "jsonl":
        rows = [json.loads(line) for line in out.splitlines()]
    else:
        rows = list(csv.DictReader(io.StringIO(out)))
    decrease = [r for r in rows if r["operation"] == "XENMEM_decrease_reservation"]
    assert any("from 4 up" in (r["encoding"] or "") for r in decrease)
    assert any("from 6 up" in (r["encoding"] or "") for r in decrease)
    assert {r["status"] for r in rows if r["hypercall"] == "sched_op"} == {"never"}


def test_docs_page_is_current() -> None:
    """docs/abi.md is what the data say. After a change: xtrace abi export --format markdown > docs/abi.md."""
    done = subprocess.run(
        [sys.executable, "-m", "xtrace", "abi", "export", "--format", "markdown"], capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr
    assert (ROOT / "docs" / "abi.md").read_text() == done.stdout


@pytest.mark.parametrize(
    ("words", "status", "says"),
    [
        (["diff", "4.99", "4.4.4"], 3, "not a Xen release"),
        (["diff", "4.4", "4.5.0"], 3, "is a series"),
        (["diff", "4.4.4", "4.5.0", "--caller", "pv46"], 3, "no caller is called 'pv46'"),
        (["diff", "4.4.4", "4.5.0", "--hypercall", "memory_0p"], 3, "did you mean memory_op?"),
        (["show", "memory_op", "--format", "yaml"], 3, "there are text and json"),
        (["matrix", "--exposure", "nobody"], 3, "there are all, guest"),
        (["verify", "--xen-git", "/nowhere"], 1, "no such folder"),
        (["verify", "--xen-git", str(ROOT)], 1, "none of Xen's release tags"),
        (["verify", "--xen-git", str(ROOT), "--tag", "nowhere"], 1, "has no revision nowhere"),
    ],
)
def test_wrong_use_is_one_sentence(abi: Any, words: list[str], status: int, says: str) -> None:
    got, out, err = abi(*words)
    assert got == status
    assert out == ""
    assert says in err
    assert len(err.splitlines()) == 1


def test_text_fits_a_terminal(abi: Any) -> None:
    for words in (
        ["diff", "4.4.4", "4.5.0"],
        ["chain", "3.3.0", "3.4.0", "4.5.0", "--caller", "pv64"],
        ["show", "grant_table_op", "--at", "4.17.7"],
        ["matrix", "--caller", "pv64", "--hypercall", "grant_table_op"],
    ):
        _, out, _ = abi(*words)
        long = [line for line in out.splitlines() if len(line) > 80 and " " in line.strip()]
        assert not long, (words, long[:2])
