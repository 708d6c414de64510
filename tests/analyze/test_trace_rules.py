"""What is wrong with a trace itself: losses, damage, contradictions, states in the wrong order or that nothing leaves."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from xtrace.analyze import rules
from xtrace.analyze.trace_rules import TraceFinding
from xtrace.pipeline import Options, analyze, follow
from xtrace.replay.account import Account
from xtrace.replay.callers import CallerFill
from xtrace.replay.stitch import Stitcher

SAMPLES = Path(__file__).parents[2] / "samples"
HEAD = "xtrace: header release=4.17.7 arch=x86_64\nxtrace: domain id=3 caller=hvm64 role=guest\nxtrace: domain id=4 caller=hvm64\n"


def write(folder: Path, lines: list[str], head: str = HEAD) -> Path:
    path = folder / "trace.log"
    path.write_text(head + "".join(f"xtrace: {line} ;\n" for line in lines))
    return path


def judged(path: Path, **options: Any) -> list[TraceFinding]:
    return analyze([path], Options(targets=("4.18.0",), **options)).trace


def found(path: Path, **options: Any) -> dict[str, tuple[int | None, int | None]]:
    return {f.code: (f.line, f.count) for f in judged(path, **options)}


def call(a0: int, who: str = "dom=3 vcpu=0", kind: str = "call", a1: str = "0x7000", more: str = "") -> str:
    insn = " on_insn=1" if kind == "sample" else ""
    return f"{kind} pcpu=0 {who} op=memory_op a0={a0:#x} a1={a1} mem.nr_extents=64 mem.domid=0x7ff0{insn}{more}"


def done(n: int) -> int:
    return n << 6 | 6


END = "return pcpu=0 dom=3 vcpu=0 op=memory_op result=64"


@pytest.mark.parametrize(
    ("lines", "line"),
    [
        ([call(6), call(done(9)), call(done(5)), END], 6),
        ([call(6), call(done(9), kind="sample"), call(done(5)), END], 6),
        ([call(6), call(done(9)), call(done(5), kind="sample"), END], 6),
        ([call(6), call(done(9)), call(done(5)), call(done(3)), END], 6),
        # The end of a call, or the beginning of the next one, lies between.
        ([call(6), call(done(9)), END, call(done(5))], None),
        ([call(6), call(done(9)), call(6), call(done(5))], None),
        ([call(6), call(done(9)), "lost n=3", call(done(5))], None),
        # Another call: another structure, vCPU, domain or operation.
        ([call(6), call(done(9)), call(done(5), a1="0x8000")], None),
        ([call(6), call(done(9)), call(done(5), who="dom=3 vcpu=1")], None),
        ([call(6), call(done(9)), call(done(5), who="dom=4 vcpu=0")], None),
        ([call(6), call(done(9)), call(5 << 6)], None),
        # Samples alone: nothing says that no call ended between them.
        ([call(done(9), kind="sample"), call(done(5), kind="sample")], None),
        # A vCPU that stands elsewhere.
        ([call(6), call(done(9)), call(done(5), kind="sample").replace("on_insn=1", "on_insn=0")], None),
        ([call(6), call(done(5)), call(done(9)), END], None),
    ],
)
def test_backwards(tmp_path: Path, lines: list[str], line: int | None) -> None:
    got = found(write(tmp_path, lines))
    assert got.get("XT033", (None, None))[0] == line
    assert ("XT033" in got) == (line is not None)


def test_counts_are_not_compared(tmp_path: Path) -> None:
    """Two tasks that take turns leave counts in any order; only an index of its own is compared."""
    head = HEAD.replace("hvm64", "pv64")
    flag = 0x80000000
    states = [(0x7000, 90), (0x7000 + 16 * 58, 32 | flag), (0x7000 + 16 * 42, 48 | flag)]
    lines = [f"call pcpu=0 dom=3 vcpu=0 op=mmu_update a0={a:#x} a1={n:#x} a2=0 a3=0x7ff0" for a, n in states]
    assert not found(write(tmp_path, lines, head))


def slow_backwards(lines: list[str]) -> tuple[int, int] | None:
    """The obvious version, for logs as ``call`` writes them: (line of the first, how many)."""
    last: dict[tuple[str, str], tuple[int, int, str, bool]] = {}
    hits = []
    for number, line in enumerate(lines, 4):
        kind, fields = line.split()[0], dict(w.split("=") for w in line.split()[1:])
        who = f"{fields.get('dom')} {fields.get('vcpu')}"
        if kind == "lost":
            last.clear()
            continue
        if kind == "return":
            last = {k: v for k, v in last.items() if k[0] != who}
            continue
        if fields.get("on_insn") == "0":
            continue
        a0 = int(fields["a0"], 16)
        now = (a0 >> 6, a0 & 63, fields["a1"], kind != "sample")
        before = last.get((who, fields["op"]))
        if before and before[3] and now[0] and now[0] < before[0] and now[1:3] == before[1:3]:
            hits.append(number)
        last[who, fields["op"]] = (*now[:3], now[3] or bool(before and before[3]))
    return (hits[0], len(hits)) if hits else None


@st.composite
def logs(draw: st.DrawFn) -> list[str]:
    line = st.one_of(
        st.builds(
            call,
            st.builds(lambda n, op: n << 6 | op, st.sampled_from([0, 0, 3, 5, 9]), st.sampled_from([6, 6, 6, 1])),
            st.sampled_from(["dom=3 vcpu=0", "dom=3 vcpu=0", "dom=3 vcpu=1", "dom=4 vcpu=0"]),
            st.sampled_from(["call", "call", "sample"]),
            st.sampled_from(["0x7000", "0x7000", "0x8000"]),
        ),
        st.sampled_from([END, END.replace("vcpu=0", "vcpu=1"), "lost n=3"]),
    )
    return draw(st.lists(line, min_size=2, max_size=12))


@settings(max_examples=40, deadline=None, suppress_health_check=list(HealthCheck))
@given(logs(), st.integers(1, 5))
def test_backwards_twin(tmp_path_factory: pytest.TempPathFactory, lines: list[str], rows: int) -> None:
    """The vectorised check is the obvious one, wherever batches end."""
    path = write(tmp_path_factory.mktemp("log"), lines)
    whole = judged(path)
    assert judged(path, batch_rows=rows) == whole
    got = {f.code: (f.line, f.count) for f in whole}
    assert got.get("XT033") == slow_backwards(lines)


def test_diverges(tmp_path: Path) -> None:
    lines = [call(6), call(done(65), kind="sample"), call(done(66), kind="sample"), END]
    path = write(tmp_path, lines)
    assert found(path)["XT034"] == (5, 2)
    # A release that nothing else knows is not needed: each of the possible ones must fail to explain it.
    assert "XT034" not in found(write(tmp_path, [call(6), call(done(63), kind="sample"), END]))


def test_one_reason_is_enough(tmp_path: Path) -> None:
    """Under the wrong name nothing fits: that is said once."""
    path = SAMPLES / "bare" / "bare-4.4.4.txt.zst"
    got = found(path, source="3.3.0")
    assert "XT032" in got
    assert "XT034" not in got
    assert "XT032" not in found(path)


@pytest.mark.parametrize("source", ["4.4", "4.4.4"])
def test_a_series_needs_one_that_fits(source: str) -> None:
    assert not found(SAMPLES / "bare" / "bare-4.4.4.txt.zst", source=source)


def test_what_names_the_release_is_said(tmp_path: Path) -> None:
    path = tmp_path / "trace.log"
    path.write_text(rules.get("XT032").cases[0].log())

    def text(**options: Any) -> str:
        return next(f.text for f in judged(path, **options) if f.code == "XT032")

    assert text().startswith("3.3.0, named by the trace's own header, cannot have written")
    (tmp_path / "trace.log.xtrace.toml").write_text('release = "3.2.0"\n')
    assert "the sidecar" in text()
    assert "--from" in text(source="3.1.0")
    assert "XT032" not in found(path, source="4.17.7")


def test_followed_as_read(tmp_path: Path) -> None:
    path = write(tmp_path, [call(6), call(done(9)), call(done(5)), "lost n=3", END])
    result = follow(path, Options(targets=("4.18.0",)), found=lambda _: None, idle=0.0)
    assert result.trace == judged(path)


@pytest.mark.parametrize(
    ("name", "source"),
    [
        ("bare/bare-3.4.0-rc3.txt.zst", None),
        ("bare/bare32-4.4.4.txt.zst", None),
        ("bare/barehvm64-4.17.7.txt.zst", None),
        ("dom0-4.17.7/j5_linux_aligned_ftrace.txt.zst", "4.17.7"),
        ("dom0-4.17.7/j3_save_all.xentrace.zst", "4.17.7"),
        ("eras/mv64-4.22.0.xentrace.zst", "4.22.0"),
        ("eras/smp64-4.4.4.xentrace.zst", "4.4.4"),
    ],
)
def test_no_false_alarm(name: str, source: str | None) -> None:
    """Real recordings under their right name."""
    assert not analyze([SAMPLES / name], Options(source=source)).trace


def test_losses_and_their_place() -> None:
    (only,) = analyze([SAMPLES / "eras" / "lost64-4.22.0.xentrace.zst"], Options(source="4.22.0")).trace
    assert (only.code, only.count, only.bits) == ("XT030", 36, 16)
    assert only.offset is not None


def test_several_inputs(tmp_path: Path) -> None:
    (tmp_path / "b").mkdir()
    good = write(tmp_path, [call(6), END])
    bad = write(tmp_path / "b", [call(6), call(done(9)), call(done(5)), END])
    result = analyze([good, bad], Options(targets=("4.18.0",)))
    assert [(f.code, f.input) for f in result.trace] == [("XT033", 1)]
    assert result.bits == 4


def test_the_first_divergence_is_the_replay_s(tmp_path: Path) -> None:
    """``analyze`` and ``replay`` stand on the same comparison."""
    from xtrace.pipeline import events

    path = write(tmp_path, [call(6), call(done(5), kind="sample"), call(done(70), kind="sample"), END])
    account, stitcher, fill = Account("4.17.7"), Stitcher("4.17.7"), CallerFill(None, {3: "hvm64"})
    for batch in events(path):
        account.take(stitcher.feed(fill.fill(batch)))
    assert account.divergence is not None
    assert [(f.line, f.seq) for f in judged(path)] == [(account.divergence.line, account.divergence.seq)]


@pytest.mark.parametrize("name", ["bare/bare-4.4.4.txt.zst", "eras/pv32-3.3.0.xentrace", "dom0-4.17.7/j5_tiny_pv.xentrace"])
def test_suspects_alone_are_judged_alike(name: str) -> None:
    """What counts against one release is the same whether or not the others are looked at."""
    from xtrace.pipeline import open_input
    from xtrace.replay.identify import Identifier

    suspects = ["3.3.0", "4.1.6.1", "4.4.4", "4.17.7", "4.22.0"]
    readers = {"": Identifier(), **{v: Identifier(suspects=frozenset({v})) for v in suspects}}
    source, recording = open_input(SAMPLES / name, Options())
    with source:
        for batch in recording.batches():
            for reader in readers.values():
                reader.feed(batch)
    seen = recording.observed
    ends = {v: r.conclude(seen.event_ids, seen.forms, seen.peaks) for v, r in readers.items()}
    for v in suspects:
        assert (v in ends[v].left) == (v in ends[""].left)
        one, all_ = ends[v].against(v), ends[""].against(v)
        assert (one and (one.what, one.why, one.seq)) == (all_ and (all_.what, all_.why, all_.seq))
