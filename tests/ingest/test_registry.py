"""Which reader gets a file."""

from __future__ import annotations

from pathlib import Path

import pytest

from xtrace.errors import InputError, UsageError
from xtrace.ingest import registry
from xtrace.ingest.source import Source

SAMPLES = Path(__file__).parent.parent.parent / "samples"


def test_names_are_those_of_the_readers() -> None:
    assert registry.names() == tuple(registry.reader(name).name for name in registry.names())
    assert len(set(registry.names())) == len(registry.names())


def test_an_unknown_name() -> None:
    with pytest.raises(UsageError, match="did you mean 'xentrace'"):
        registry.reader("xen-trace")
    with pytest.raises(UsageError, match="there are xentrace, xentrace-fixed, xtrace-log"):
        registry.reader("pcap")


@pytest.mark.parametrize(
    ("pattern", "name"),
    [
        ("**/*.xentrace", "xentrace"),
        ("**/*.xentrace.zst", "xentrace"),
        ("bare/*.txt.zst", "bare"),
        ("dom0-4.17.7/*_parked.txt*", "linux-trace"),
        ("dom0-4.17.7/*_ftrace.txt*", "linux-trace"),
        ("linux/*.txt.zst", "linux-trace"),
    ],
)
def test_the_samples_are_recognised(pattern: str, name: str) -> None:
    paths = sorted(SAMPLES.glob(pattern))
    assert paths
    for path in paths:
        with Source(path) as source:
            assert registry.detect(source).name == name, path


def test_what_is_no_trace(tmp_path: Path) -> None:
    path = tmp_path / "ls"
    path.write_bytes(b"\x7fELF\x02\x01\x01\x00\x00\x00")
    with Source(path) as source, pytest.raises(InputError) as caught:
        registry.detect(source)
    assert caught.value.exit_bits == 16
    assert caught.value.offset == 0
    assert str(caught.value) == (f"{path}: byte 0: is not a trace that xtrace knows (it begins 7f 45 4c 46 02 01 01 00 …)")


def test_host_info_is_no_trace() -> None:
    with Source(SAMPLES / "host" / "xl_info.txt") as source, pytest.raises(InputError, match="it begins 68 6f 73 74"):
        registry.detect(source)


class _Fake:
    def __init__(self, name: str, score: int) -> None:
        self.name, self.score = name, score

    def sniff(self, head: bytes) -> int:
        return self.score


@pytest.mark.parametrize(("scores", "winner"), [((10, 90, 20), "b"), ((50, 50, 50), "a"), ((0, 0, 1), "c"), ((-5, 0, 3), "c")])
def test_the_surest_reader_wins_and_ties_go_to_the_earlier(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, scores: tuple[int, ...], winner: str
) -> None:
    fakes = {n: _Fake(n, s) for n, s in zip("abc", scores, strict=True)}
    monkeypatch.setattr(registry, "names", lambda: tuple(fakes))
    monkeypatch.setattr(registry, "reader", fakes.__getitem__)
    (tmp_path / "t").write_bytes(b"x")
    with Source(tmp_path / "t") as source:
        assert registry.detect(source).name == winner
