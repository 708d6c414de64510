"""The structures behind a call: the layouts agree with those of the bare recordings, and with the facts of the model."""

from __future__ import annotations

import tomllib
from pathlib import Path

from xtrace.image.behind import _structs
from xtrace.replay import facts

ROOT = Path(__file__).resolve().parents[2]


def bare() -> list[tuple[int, tuple[int, ...], int, dict[str, tuple[int, int]]]]:
    out = []
    text = (ROOT / "xtrace/ingest/layouts/bare_structs.toml").read_text()
    for table in tomllib.loads(text).values():
        for width in (8, 4):
            fields = {}
            for index, word in enumerate(table.get(f"words{width}", ())):
                at = index * width
                for item in word.split():
                    name, bits = item.split(":")
                    fields[name] = (at, int(bits) // 8)
                    at += int(bits) // 8
            if fields:
                out.append((table["op"], tuple(table.get("commands", ())), width, fields))
    return out


def test_same_as_the_words_of_bare_recordings() -> None:
    compared = 0
    for op, commands, width, fields in bare():
        for command in commands or (None,):
            mine = [s for s in _structs() if s.op == op and (s.commands is None or command in s.commands) and s.select is None]
            assert len(mine) == 1
            assert dict(mine[0].fields[width]) == fields
            compared += 1
    assert compared >= 12


def test_fields_end_inside_the_structure() -> None:
    for s in _structs():
        for width in (8, 4):
            assert s.fields[width]
            assert max(at + n for at, n in s.fields[width].values()) <= s.size[width]


def test_fields_are_those_that_the_facts_name() -> None:
    """What the facts read of a structure (`total`, `index` …) is what the layout calls it."""
    for s in _structs():
        if s.op in (13, 1, 26) or s.via is not None:
            continue
        for command in s.commands or ():
            for release in ("4.4.4", "4.6.6", "4.17.7"):
                b = facts.lookup(release, "pv64", s.op).by_number.get(command)
                if b is None or b.total is None or not b.total.startswith("mem.") or s.select is not None:
                    continue
                assert b.total.removeprefix("mem.") in s.fields[8] or b.inner is not None, (s.op, command, b.total)
