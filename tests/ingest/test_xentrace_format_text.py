"""xentrace_format's text: real ones against the binaries they were made from, a twin in plain Python, damage."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Any, cast

import polars as pl
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from text_against_binary import BINARY, DATA, ROOT, pairs, read, unexplained

from xtrace import schema
from xtrace.ingest import registry
from xtrace.ingest.base import ReadOptions
from xtrace.ingest.source import Source
from xtrace.ingest.xentrace_format_text import READER, XentraceFormatRecording

if TYPE_CHECKING:
    from pathlib import Path

PAIRS = pairs("xentrace_format.txt")


def no_argument(name: str) -> Any:
    """Arguments are not printed, of no call; nor is the TSC at which a loss began."""
    return lambda b: b[f"{name}_text"].is_null()


#: Why the text may say less than the binary.
FACTS = {
    **{name: no_argument(name) for name in schema.ARGS},
    "cut": lambda b: (b["cut_text"] == 0) & (b["cut"] > 0),
    # lost_records prints its count only, not the vCPU that runs next: unknown until a scheduling line.
    "domid": lambda b: b["domid_text"].is_null() & _after_loss(b),
    "vcpu": lambda b: b["vcpu_text"].is_null() & _after_loss(b),
    # The 64-bit lines of 3.3 and 3.4 do not hold the number; it is taken from rip where that is in a hypercall page.
    "op": lambda b: b["op_text"].is_null() & (b["caller"] == "pv64"),
}


def _after_loss(b: pl.DataFrame) -> pl.Series:
    """Say which rows have a loss before them on their pCPU."""
    return b.select((pl.col("kind") == "lost").cum_sum().over("pcpu") > 0).to_series()


class _Memory(Source):
    """A text in an unnamed file as a source."""

    def __init__(self, data: bytes) -> None:
        import tempfile

        self.path, self.damage, self.size = "memory", None, len(data)
        self.file = tempfile.TemporaryFile()  # noqa: SIM115 (closed with the source)
        self.file.write(data)
        self.file.flush()
        self.file.seek(0)


def events(data: bytes, rows: int = 1 << 20, chunk: int = 1 << 22) -> tuple[pl.DataFrame, Any]:
    with _Memory(data) as source:
        recording = XentraceFormatRecording(source, ReadOptions(batch_rows=rows), chunk=chunk)
        frames = list(recording.batches())
    return (pl.concat(frames) if frames else schema.empty(schema.EVENTS)), recording.ledger


def text_of(path: Path) -> bytes:
    with Source(path) as source:
        return cast("bytes", source.file.read())


@pytest.mark.parametrize(("text", "binary"), PAIRS, ids=[t.name for t, _ in PAIRS])
def test_the_binary_and_the_text_give_the_same_events(text: Path, binary: Path) -> None:
    a, of_binary = read(BINARY, binary)
    b, ledger = read(READER, text)
    assert unexplained(a, b, FACTS) == {}
    # The same order over all pCPUs, and the same times.
    for name in ("pcpu", "tsc", "segment", "kind"):
        assert a[name].equals(b[name]), name
    assert ledger.records == of_binary.records  # window headers have lines too
    assert (ledger.hypercalls, ledger.subcalls, ledger.vmmcalls) == (of_binary.hypercalls, of_binary.subcalls, of_binary.vmmcalls)
    assert (ledger.lost_records, ledger.lost_events) == (of_binary.lost_records, of_binary.lost_events)
    assert (ledger.skipped_lines, ledger.noise_lines, ledger.truncated, ledger.problems) == (0, 0, False, [])


def test_there_are_real_pairs_of_every_sort() -> None:
    names = {text.name.split(".xentrace_")[0] for text, _ in PAIRS}
    assert {"pv32-3.3.0", "pv64-3.4.0-rc3", "mv64-3.4.0-rc3", "pv64-4.1.6.1", "lost64-4.4.4", "j5_tiny_pv", "j4_pvh_hvm"} <= names


def test_numbers_are_only_taken_from_hypercall_pages() -> None:
    text, binary = next(p for p in PAIRS if p[0].name.startswith("mv64-3.4.0"))
    (a, _), (b, ledger) = read(BINARY, binary), read(READER, text)
    told = b["op"].is_not_null()
    assert ledger.nameless == (~told).sum()
    assert 0.3 < told.mean() < 0.9  # type: ignore[operator]
    assert b["op"].filter(told).equals(a["op"].filter(told))
    # One of the guest's own call sites looks like the stub of number 2, and was used for mmuext_op and multicall.
    assert ((a["rip"] & 0xFFF) == 2 * 32 + 10).any()


# --- a twin ------------------------------------------------------------------------------------------------------------

HEAD = re.compile(r"^CPU(\d{1,5})  (\d{1,20}) \(\+ *-?\d+\)(  (.*)|)$", re.ASCII)
H8 = "0x([0-9a-f]{8})"
SCHEDULER = b"__enter_scheduler\t[ prev<domid:edomid> = 0x00007fff : 0x00000000, next<domid:edomid> = 0x00000003 : 0x00000001 ]"
GOOD = (
    rf"(?:  |    )hypercall  \[ op = {H8} \]|  hypercall  \[ eip = {H8}, eax = {H8} \]"
    rf"|  hypercall  \[ rip = 0x[0-9a-f]{{16}}, eax = {H8} \]|\s+lost_records\s+{H8}"
)


def twin(text: str) -> list[dict[str, Any]]:
    """Read the PV calls of one text of 4.0 and later in the slow way: sort the lines, follow who runs on each pCPU."""
    last: dict[int, int] = {}
    segment: dict[int, int] = {}
    keyed = []
    for number, line in enumerate(text.split("\n")[:-1], 1):
        m = HEAD.match(line)
        if not m or int(m[1]) >= 16384:
            continue
        cpu, tsc, rest = int(m[1]), int(m[2]), m[3]
        if any(word in rest for word in ("hypercall  [", "lost_records")) and not re.fullmatch(GOOD, rest):
            continue
        if tsc:
            if cpu in last and tsc < last[cpu]:
                segment[cpu] = segment.get(cpu, 0) + 1
            last[cpu] = tsc
        keyed.append((segment.get(cpu, 0), last.get(cpu, 0), cpu, len(keyed), number, rest, cpu in last))
    keyed.sort(key=lambda k: k[:4])
    who: dict[int, tuple[int, int] | None] = {}
    out = []
    for seg, tsc, cpu, _, number, rest, timed in keyed:
        if m := re.fullmatch(rf"  (?:(?:runnable|blocked|offline)_to_running|continue_running) +\[ dom:vcpu = {H8} \]", rest):
            who[cpu] = divmod(int(m[1], 16), 1 << 16)
        elif re.fullmatch(rf"  running_to_(?:runnable|blocked|offline) +\[ dom:vcpu = {H8} \]", rest) or re.fullmatch(
            rf"\s+lost_records\s+{H8}", rest
        ):
            who[cpu] = None
        elif m := re.fullmatch(
            rf"\s+__enter_scheduler\s+\[ prev<domid:edomid> = {H8} : {H8}, next<domid:edomid> = {H8} : {H8} \]", rest
        ):
            who[cpu] = (int(m[3], 16) & 0xFFFF, int(m[4], 16) & 0xFFFF)
        row: dict[str, Any] = {"line": number, "pcpu": cpu, "tsc": tsc if timed else None, "segment": seg}
        row["domid"], row["vcpu"] = who.get(cpu) or (None, None)
        if m := re.fullmatch(rf"(  |    )hypercall  \[ op = {H8} \]", rest):
            out.append({**row, "kind": "hypercall" if len(m[1]) == 2 else "subcall", "op": int(m[2], 16) & 0xFFFFF})
        elif m := re.fullmatch(rf"  hypercall  \[ eip = {H8}, eax = {H8} \]", rest):
            out.append({**row, "kind": "hypercall", "op": int(m[2], 16), "rip": int(m[1], 16)})
        elif m := re.fullmatch(r"  hypercall  \[ rip = 0x([0-9a-f]{16}), eax = 0x([0-9a-f]{8}) \]", rest):
            rip, eax = int(m[1], 16), int(m[2], 16)
            wrong = rip < 1 << 32 and (eax >= 64 or eax == 0)
            out.append({**row, "kind": "hypercall", "op": None if wrong else eax, "rip": (eax << 32 | rip) if wrong else rip})
    return out


def check(data: bytes) -> None:
    frame, _ = events(data)
    calls = frame.filter(pl.col("kind").is_in(["hypercall", "subcall"]))
    want = twin(data.decode("utf-8", "replace"))
    for name in ("line", "pcpu", "tsc", "segment", "domid", "vcpu", "kind", "op", "rip"):
        assert calls[name].to_list() == [row.get(name) for row in want], name


@pytest.mark.parametrize("name", ["pv32-4.4.4", "pv64-4.1.6.1", "lost64-4.4.4", "pv32-3.3.0"])
def test_real_texts_against_the_twin(name: str) -> None:
    check(text_of(ROOT / f"samples/eras/{name}.xentrace_format.txt.zst"))


LINES = [
    b"CPU0  0 (+       0)  cpu_change        0x00000000",
    b"CPU0  1000002400 (+       0)  runnable_to_running [ dom:vcpu = 0x00030001 ]",
    b"CPU0  1000004800 (+    2400)  hypercall  [ rip = 0xffffffff8100102a, eax = 0x00000001 ]",
    b"CPU1  1000009600 (+    2400)  hypercall  [ eip = 0xc010118a, eax = 0x0000000c ]",
    b"CPU0  1000007200 (+    2400)  hypercall  [ op = 0x00000001 ]",
    b"CPU1  1000014400 (+    2400)    hypercall  [ op = 0x00400001 ]",
    b"CPU0  1000043200 (+    2400)  continue_running    [ dom:vcpu = 0x00040000 ]",
    b"CPU10  1000043300 (+    2400)  hypercall  [ op = 0x0000001d ]",
    b"CPU1  1000009700 (+    2400)  blocked_to_runnable [ dom:vcpu = 0x00050000 ]",
    b"CPU0  1000028900 (+    2400)  lost_records      0x00000011",
    b"CPU0  1000009650 (+    2400)  running_to_blocked  [ dom:vcpu = 0x00030001 ]",
    b"CPU0  900 (+     100)  " + SCHEDULER,
    b"CPU0  1000004900 (+    2400)  hypercall  [ rip = 0x000000008100102a, eax = 0xffffffff ]",
    b"TSC stepped backward cpu 0 !  1 2",
    b"",
]


@settings(max_examples=120, deadline=None)
@given(st.lists(st.sampled_from(LINES), max_size=14), st.data())
def test_mutated_lines_against_the_twin(lines: list[bytes], data: st.DataObject) -> None:
    text = bytearray(b"\n".join([*lines, b""]))
    for _ in range(data.draw(st.integers(0, 4))):
        if text:
            at = data.draw(st.integers(0, len(text) - 1))
            text[at] = data.draw(st.sampled_from(b" x(10CU\n\0\xff]p)"))
    if text and not text.endswith(b"\n"):
        text += b"\n"
    check(bytes(text))


# --- eras ----------------------------------------------------------------------------------------------------------------


def rows(text: bytes) -> list[dict[str, Any]]:
    frame, ledger = events(text)
    assert ledger.skipped_lines == 0
    names = ("seq", "line", "offset", "segment", "tsc", "cut")
    return [{k: v for k, v in row.items() if v is not None and k not in names} for row in frame.iter_rows(named=True)]


def test_3_0_has_tabs_and_no_calls() -> None:
    text = b"CPU0\t1200\t\t" + SCHEDULER + b"\n" + b"CPU0\t1500\t\tlost_records        0x00000007\n"
    assert READER.sniff(text) == 90
    assert rows(text) == [{"pcpu": 0, "kind": "lost", "op": 0x1F001, "result": 7}]
    assert events(text)[0]["tsc"].to_list() == [1500]


def test_3_1_names_the_caller_domain_first() -> None:
    text = (
        b"CPU0  1300 (+     100)  VMMCALL     [ dom:vcpu = 0x00040001, func = 0x0000000c ]\n"
        b"CPU0  1400 (+     100)  VMEXIT      [ dom:vcpu = 0x00040001, rIP  = 0xffffffff81234567, exitcode = 0x00000012 ]\n"
        b"CPU0  1500 (+     100)  VMMCALL     [ dom:vcpu = 0x00040001, func = 0x0000000c ]\n"
    )
    first = {"pcpu": 0, "domid": 4, "vcpu": 1, "kind": "vmmcall", "op": 12}
    assert rows(text) == [first, {**first, "caller": "hvm64", "rip": 0xFFFFFFFF81234567}]


def test_3_2_prints_calls_as_unknown_and_names_the_vcpu_first() -> None:
    text = (
        b"CPU0  0 (+       0)  cpu_change          0x00000000\n"
        b"CPU0  1000004800 (+    2400)  unknown (0x000000000020f101)  [ 0x8100102a 0xffffffff 0x00000001 0x00000000 0x00000000 ]\n"
        b"CPU0  1000007200 (+    2400)  unknown (0x000000000020f001)  [ 0xc010118a 0x0000000c 0x00000000 0x00000000 0x00000000 ]\n"
        b"CPU0  1000007300 (+    2400)  unknown (0x0000000000081003)  [ 0x00010004 0x00000012 0x81234567 0xffffffff 0x00000000 ]\n"
        b"CPU0  0 (+       0)  VMMCALL     [ dom:vcpu = 0x00010004, func = 0x0000000c ]\n"
    )
    assert rows(text) == [
        {"pcpu": 0, "caller": "pv64", "kind": "hypercall", "op": 1, "rip": 0xFFFFFFFF8100102A},
        {"pcpu": 0, "caller": "pv32", "kind": "hypercall", "op": 12, "rip": 0xC010118A},
        {"pcpu": 0, "domid": 4, "vcpu": 1, "caller": "hvm64", "kind": "vmmcall", "op": 12, "rip": 0xFFFFFFFF81234567},
    ]


def test_calls_without_a_number_are_never_clean() -> None:
    from xtrace import pipeline

    result = pipeline.analyze([ROOT / "samples/eras/pv64-3.3.0.xentrace_format.txt.zst"], pipeline.Options(source="3.3.0"))
    assert "476 hypercalls' numbers are not in it" in result.inputs[0].incomplete


def test_who_made_an_hvm_call_is_not_guessed() -> None:
    assert rows(b"CPU0  1300 (+     100)  VMMCALL     [ dom:vcpu = 0x00010004, func = 0x0000000c ]\n") == [
        {"pcpu": 0, "kind": "vmmcall", "op": 12}
    ]


@pytest.mark.parametrize("places", [(0x2A, 0x4A), (0x2A, 0x4A, 0x12B)])
def test_too_little_of_a_page_shows_no_number(places: tuple[int, ...]) -> None:
    text = b"".join(
        b"CPU0  1000 (+       0)  hypercall  [ rip = 0x00000000%08x, eax = 0xffffffff ]\n" % (0x81001000 + p) for p in places
    )
    assert [row.get("op") for row in rows(text)] == [None] * len(places)
    more = text + text.replace(b"2a,", b"ea,").replace(b"4a,", b"ca,")
    want = [1, 2, 7, 6] if len(places) == 2 else [None] * 6
    assert [row.get("op") for row in rows(more)] == want


def test_half_an_instruction_pointer_is_none() -> None:
    exit_ = b"CPU1  1000 (+    2400)  VMEXIT      [ exitcode = 0x00000012, rIP  = 0x%s81234567 ]\n"
    call = b"CPU1  0 (+       0)  VMMCALL     [ func = 0x0000000c ]\n"
    base = {"pcpu": 1, "kind": "vmmcall", "op": 12, "caller": "hvm64"}
    assert rows(exit_ % b"00000000" + call) == [base]
    assert rows(exit_ % b"ffffffff" + call) == [{**base, "rip": 0xFFFFFFFF81234567}]
    assert rows(exit_ % b"" + call) == [{**base, "rip": 0x81234567, "caller": "hvm32"}]


def test_words_of_unknown_calls_are_used() -> None:
    text = b"CPU0  9 (+       0)  unknown (0x000000000020100d)  [ 0x0040001a 0x80000004 0x00000000 0x00000000 0x00000000 ]\n"
    frame, _ = events(text)
    assert frame.select("op", "arg1", "cut").row(0) == (26, 0x80000004, 2)


@pytest.mark.parametrize(("line", "op"), [
    (b"domain_shutdown\t  [ dom:vcpu = 0x00030001, reason = 0x00000002 ]", 0x28007),
    (b"domain_shutdown_code [ dom:vcpu = 0x00030001, reason = 0x00000002 ]", 0x28010),
    (b"domain_shutdown\t  [ domid = 0x00000003, edomid = 0x00000001, reason = 0x00000002 ]", 0x28007),
])  # fmt: skip
def test_a_suspend(line: bytes, op: int) -> None:
    assert rows(b"CPU1  1000 (+       0)  " + line + b"\n") == [{"pcpu": 1, "domid": 3, "vcpu": 1, "kind": "suspend", "op": op}]


def test_seconds_are_no_times() -> None:
    text = b"CPU0  3 (+       0)  hypercall  [ op = 0x00000001 ]\nCPU0  3 (+   12345)  hypercall  [ op = 0x00000002 ]\n"
    frame, ledger = events(text)
    assert frame["op"].to_list() == [1, 2]
    assert frame["tsc"].to_list() == [None, None]
    assert "whole seconds" in ledger.problems[0].text


# --- blocks and damage -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "path",
    [ROOT / "samples/eras/lost64-4.4.4.xentrace_format.txt.zst", DATA / "j4_pvh_hvm.xentrace_format.txt.zst"],
    ids=lambda p: p.name,
)
def test_where_a_round_ends_never_shows(path: Path) -> None:
    data = text_of(path)[:400_000]
    data = data[: data.rfind(b"\n") + 1]
    whole, ledger = events(data)
    for size, chunk in ((1, 1 << 22), (100, 20_000), (1 << 20, 3000)):
        part, other = events(data, size, chunk)
        assert part.equals(whole)
        assert other == ledger


@settings(max_examples=50, deadline=None)
@given(st.data())
def test_damage_never_raises_and_every_line_is_accounted_for(data: st.DataObject) -> None:
    text = bytearray(SAMPLE)
    for _ in range(data.draw(st.integers(0, 6))):
        at = data.draw(st.integers(0, len(text) - 1))
        kind = data.draw(st.sampled_from(["flip", "cut", "insert"]))
        if kind == "flip":
            text[at] = data.draw(st.integers(0, 255))
        elif kind == "cut":
            del text[at : at + data.draw(st.integers(1, 300))]
        else:
            text[at:at] = data.draw(
                st.sampled_from([b"\n", b"\0" * 50, b"\xff\xfe", b"x" * 70_000, b"CPU7  1 (+ 0)  hypercall  [ op"])
            )
    if data.draw(st.booleans()):
        lines = bytes(text).split(b"\n")
        data.draw(st.randoms()).shuffle(lines)
        text = bytearray(b"\n".join(lines))
    frame, ledger = events(bytes(text))
    assert ledger.records + ledger.noise_lines + ledger.skipped_lines + int(ledger.truncated) == ledger.lines
    assert len(frame) <= ledger.records


SAMPLE = text_of(ROOT / "samples/eras/lost64-4.4.4.xentrace_format.txt.zst")[300_000:330_000]


def test_damaged_and_cut_lines_are_skipped() -> None:
    data = b"CPU0  3 (+       0)  hypercall  [ op = 0x0000000g ]\nnoise\nCPU0  3 (+       0)  hypercall  [ op = 0x00000001 ]"
    frame, ledger = events(data)
    assert len(frame) == 0
    assert (ledger.skipped_lines, ledger.noise_lines, ledger.truncated, ledger.lines) == (1, 1, True, 3)
    assert [p.line for p in ledger.problems] == [1, 3]


def test_a_pcpu_of_which_nothing_comes_for_long_does_not_hold_the_order_up() -> None:
    line = b"CPU%d  %d (+       0)  hypercall  [ op = 0x0000000c ]\n"
    text = [line % (1, 5)] + [line % (0, t) for t in range(10, 4000)] + [line % (1, 20)] + [line % (0, 4000)]
    frame, _ = events(b"".join(text), chunk=3000)
    assert frame["tsc"].to_list() == sorted([5, *range(10, 4000), 20, 4000])


# --- which file --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("text", [t for t, _ in PAIRS], ids=lambda t: t.name)
def test_texts_are_recognised(text: Path) -> None:
    with Source(text) as source:
        assert registry.detect(source).name == "xentrace-format"


def test_other_samples_are_not_taken() -> None:
    for path in sorted((ROOT / "samples").rglob("*")):
        if path.is_file() and "xentrace_format" not in path.name and path.suffix != ".md":
            with Source(path) as source:
                assert READER.sniff(source.head()) == 0, path
