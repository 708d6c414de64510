"""Events tables: what is written is what is read, and what is damaged or foreign is named."""

from __future__ import annotations

import csv
import io
import json
import re
import tempfile
from functools import cache
from pathlib import Path

import polars as pl
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from polars.testing import assert_frame_equal

from xtrace import pipeline, schema
from xtrace.errors import InputError
from xtrace.ingest import bare, carried, xentrace, xtrace_log
from xtrace.ingest.base import Domain, ReadOptions
from xtrace.ingest.events_table import READER
from xtrace.ingest.source import Source
from xtrace.report import json as report
from xtrace.report.tables import ENDINGS, writer

SAMPLES = Path(__file__).parents[2] / "samples"
BARE = SAMPLES / "bare" / "bare32-4.4.4.txt.zst"

LOG = (
    b"xtrace: header release=4.4.1 tsc_khz=2600000\nxtrace: domain id=3 caller=pv64 role=guest name=web1\n"
    b"xtrace: call tsc=2600000 pcpu=0 dom=3 vcpu=1 op=memory_op a0=1 a1=0xffffffff80208c60 mem.nr_extents=64 mem.a.b=0\n"
    b"xtrace: sample tsc=5200000 pcpu=0 dom=3 vcpu=1 op=12 a0=0x51 a1~=0x80208c60 rip=0xffffffff80102029 on_insn=1\n"
    b"xtrace: return tsc=7800000 pcpu=0 dom=3 vcpu=1 op=12 result=-22\n"
    b"xtrace: hypercall tsc=1 op=18446744073709551616\n"
    b"xtrace: call tsc=100 pcpu=1 op=13 caller=pv32 a0=0\nxtrace: lost n=5 pcpu=1 a0=7\nxtrace: suspend dom=3\n"
    b"xtrace: sample pcpu=0 tsc=3 dom=3 vcpu=1 op=26 mem.pdone=18446744073709551615 on_insn=0 ;\n"
)


class Bytes:
    """A Source over bytes in memory."""

    damage = None

    def __init__(self, data):
        self.file, self.size, self.path = io.BytesIO(data), len(data), "-"

    def head(self):
        self.file.seek(0)
        return self.file.read(1 << 16)


def read(data, batch_rows=1 << 20, tsc_khz=None):
    recording = READER.open(Bytes(data), ReadOptions(batch_rows=batch_rows, tsc_khz=tsc_khz))
    frame = pl.concat([schema.empty(schema.EVENTS), *recording.batches()])
    assert frame.schema == schema.EVENTS
    return frame, recording


def log():
    recording = xtrace_log.READER.open(Bytes(LOG), ReadOptions())
    return pl.concat(list(recording.batches())), recording


def table(tmp_path, ending, frame, recording=None, rows=3):
    path = tmp_path / f"events{ending}"
    closing = (lambda: {carried.KEY: carried.pack(recording)}) if recording else dict
    with writer(str(path), closing=closing) as put:
        for part in frame.iter_slices(rows):
            put(part)
    return path.read_bytes()


@cache
def tables():
    """A small table in every form, by ending; and as an Arrow stream."""
    frame, recording = log()
    with tempfile.TemporaryDirectory() as place:
        out = {ending: table(Path(place), ending, frame, recording) for ending in ENDINGS}
    return {**out, "stream": out[".arrow"][8 : out[".arrow"].rindex(b"\xff\xff\xff\xff\0\0\0\0") + 8]}


# -- what is written is what is read -----------------------------------------------------------------------------------


@pytest.mark.parametrize("ending", [*ENDINGS, "stream"])
def test_round_trip(ending):
    frame, first = log()
    data = tables()[ending]
    assert READER.sniff(data[: 1 << 16]) >= 90
    for batch_rows in (1, 4, 1 << 20):
        again, second = read(data, batch_rows)
        assert_frame_equal(again, frame)
        if ending in (".parquet", ".arrow"):
            assert (second.ledger, second.observed) == (first.ledger, first.observed)
            assert second.observed.domains == {3: Domain("pv64", "guest", "web1")}
            assert (second.ledger.skipped_lines, second.ledger.lost_records, len(second.ledger.problems)) == (1, 5, 1)
        else:
            assert not second.ledger.problems
            assert second.observed.release is None
            kinds = ("hypercalls", "samples", "lost_events", "lost_records", "unattributed", "records")
            assert all(getattr(second.ledger, k) == getattr(first.ledger, k) for k in kinds)


@pytest.mark.parametrize("ending", ENDINGS)
def test_an_empty_table(tmp_path, ending):
    data = table(tmp_path, ending, schema.empty(schema.EVENTS))
    if ending in (".ndjson", ".jsonl"):
        assert data == b""
        return
    frame, recording = read(data)
    assert len(frame) == 0
    assert not recording.ledger.problems


@pytest.mark.parametrize(
    ("sample", "source", "ending"),
    [
        *((BARE, "4.4.4", ending) for ending in (".parquet", ".arrow", ".csv", ".ndjson")),
        *((SAMPLES / "eras" / "pv32-3.4.0-rc3.xentrace", "3.4.0-rc3", ending) for ending in (".arrow", ".csv")),
        (SAMPLES / "dom0-4.17.7" / "j5_tiny_pv.xentrace", "4.17.7", ".ndjson"),
    ],
    ids=lambda x: x.name if isinstance(x, Path) else x,
)
def test_the_same_findings(tmp_path, sample, source, ending):
    reader = bare.READER if sample == BARE else xentrace.READER
    with Source(sample) as opened:
        recording = reader.open(opened, ReadOptions())
        batches = list(recording.batches())
    path = tmp_path / f"events{ending}"
    with writer(str(path), closing=lambda: {carried.KEY: carried.pack(recording)}) as put:
        for batch in batches:
            put(batch)
    told = () if ending in (".parquet", ".arrow") else ("--from",)

    def analyzed(trace, form):
        # What neither a CSV table nor anything else says: the release, and whose domains these are.
        callers = {0: "pv64"} if told and sample != BARE else {}
        result = pipeline.analyze(
            [trace],
            pipeline.Options(source=source if told else None, input_format=form, callers=callers, targets=("4.4.4", "4.22.0")),
        )
        out = io.StringIO()
        report.write_json(result, out)
        whole = json.loads(out.getvalue().replace(str(trace), "TRACE"))
        (item,) = whole.pop("inputs")
        whole["assumptions"] = (
            [re.sub(r"(?<=record layout )\S+", "", a) for a in whole["assumptions"]] if told else whole["assumptions"]
        )
        return whole, item

    (was, item), (now, again) = analyzed(sample, reader.name), analyzed(path, "events")
    assert was.keys() == now.keys()
    assert {k: v for k, v in was.items() if v != now[k]} == {}
    assert item["sources"] == again["sources"]
    assert {k: v for k, v in item.items() if v != again[k]}.keys() <= {
        "format", "tsc_khz", *(("lines", "records", "noise_lines", "losses", "source_from", "domains", "problems") if told else ()),
    }  # fmt: skip


# -- tables of others --------------------------------------------------------------------------------------------------


FIELDS = pa.list_(pa.struct([("field", pa.string()), ("value", pa.uint64())]))


def arrow(columns):
    columns = {"kind": ["hypercall"] * len(next(iter(columns.values()))), **columns}
    batch = pa.table({k: v if isinstance(v, pa.Array) else pa.array(v) for k, v in columns.items()})
    sink = io.BytesIO()
    with pa.ipc.new_stream(sink, batch.schema) as out:
        out.write_table(batch)
    return sink.getvalue()


def test_other_types_that_fit():
    data = arrow(
        {
            "op": pa.array([1, 2], pa.int8()),
            "arg0": pa.array([1, None], pa.int64()),
            "caller": pa.array(["pv64", None]).dictionary_encode(),
            "memory": pa.array(
                [[{"value": 3, "field": "pdone"}], None],
                pa.large_list(pa.struct([("value", pa.int32()), ("field", pa.string())])),
            ),
            "rip": pa.nulls(2),
        }
    )  # fmt: skip
    frame, recording = read(data)
    assert frame.select("seq", "op", "arg0", "caller", "rip", "cut", "segment").rows() == [
        (0, 1, 1, "pv64", None, 0, 0),
        (1, 2, None, None, None, 0, 0),
    ]
    assert frame["memory"].to_list() == [[{"field": "pdone", "value": 3}], None]
    assert not recording.ledger.problems


@pytest.mark.parametrize(
    ("columns", "why"),
    [
        ({"op": [1.0]}, "its column op holds double, where an events table has integers (UInt32)"),
        ({"op": ["1"]}, "its column op holds string, where an events table has integers (UInt32)"),
        ({"kind": [1]}, "its column kind holds int64, where an events table has strings"),
        ({"on_insn": [1]}, "its column on_insn holds int64, where an events table has booleans"),
        ({"memory": [[1]]}, "its column memory holds list<item: int64>, where an events table has lists of {field"),
        ({"kind": pa.nulls(1)}, "its column kind holds null"),
    ],
)
def test_types_that_do_not_fit(columns, why):
    with pytest.raises(InputError) as caught:
        read(arrow(columns))
    assert why in str(caught.value)
    assert caught.value.exit_bits == 16


@pytest.mark.parametrize(
    ("columns", "why"),
    [
        ({"op": [1, 1 << 40]}, "row 2: column op holds `1099511627776`, which is no UInt32"),
        ({"op": [1, -1]}, "row 2: column op holds `-1`, which is no UInt32"),
        ({"kind": ["sample", "call"]}, "row 2: column kind holds `call`, which is no kind of event"),
        ({"kind": ["sample", None]}, "row 2: column kind is empty"),
        ({"caller": ["pv64", "pv63"]}, "row 2: column caller holds `pv63`, which is no caller (pv64, "),
        ({"seq": [1, None]}, "row 2: column seq is empty"),
        ({"segment": [1, None]}, "row 2: column segment is empty"),
        ({"memory": [None, [{"field": "x", "value": -1}]]}, "row 2: column memory holds "),
        ({"memory": pa.array([None, [{"field": "x", "value": None}]], FIELDS)}, "row 2: column memory holds "),
        ({"memory": [None, '{"x": 18446744073709551616}']}, "row 2: column memory holds "),
    ],
)
def test_values_that_do_not_fit_cost_their_row(columns, why):
    frame, recording = read(arrow(columns))
    assert len(frame) == 1
    assert recording.ledger.skipped_lines == 1
    assert recording.ledger.problems[0].text.startswith(why)


def test_unknown_columns_are_named():
    frame, recording = read(arrow({"op": [1], "cookie": [5], "jar": ["x"]}))
    assert len(frame) == 1
    assert [p.text for p in recording.ledger.problems] == [
        f"the column `{name}` is none of an events table and was ignored" for name in ("cookie", "jar")
    ]


def test_no_events_table():
    sink = io.BytesIO()
    pq.write_table(pa.table({"a": [1]}), sink)
    assert READER.sniff(sink.getvalue()) == 90  # its columns stand at its end
    with pytest.raises(InputError, match="is a Parquet file without the column kind: no events table"):
        read(sink.getvalue())


def test_a_later_version():
    data = arrow({"op": [1]})
    whole = pa.ipc.open_stream(data).read_all().replace_schema_metadata({carried.VERSION_KEY: "2"})
    sink = io.BytesIO()
    with pa.ipc.new_stream(sink, whole.schema) as out:
        out.write_table(whole)
    with pytest.raises(InputError, match="is of a later version of the tables than 1"):
        read(sink.getvalue())


@pytest.mark.parametrize("batch_rows", [1, 100])
def test_rows_out_of_order(batch_rows):
    text = b"seq,kind,op\n0,hypercall,1\n4,hypercall,1\n4,hypercall,1\n"
    with pytest.raises(InputError, match="line 4 has seq 4 after 4; the rows of an events table must stand"):
        read(text, batch_rows)
    frame, _ = read(text.replace(b"\n4,", b"\n2,", 1), batch_rows)
    assert frame["seq"].to_list() == [0, 2, 4]  # gaps are rows that were taken out


def test_without_seq_and_segment():
    text = b"kind,pcpu,tsc,op\n" + b"".join(
        b"hypercall,%d,%d,1\n" % row for row in ((0, 5), (1, 3), (0, 6), (0, 2), (1, 4), (0, 3))
    )
    for batch_rows in (1, 100):
        frame, _ = read(text, batch_rows, tsc_khz=1000)
        assert frame["seq"].to_list() == list(range(6))
        assert frame["segment"].to_list() == [0, 0, 0, 1, 0, 1]
        assert frame["time_ns"].to_list() == [5000, 3000, 6000, 2000, 4000, 3000]


def test_lines_that_are_no_rows():
    text = (
        b'kind,op,memory,zz\r\nsample,1,"{""a"": 5, ""b"": 6}",\r\n\r\nsample,x,,\nsample,1\nsample,"1,,\nsample,+1,,\n'
        b'"sample","2","{""a"": {}}",\nsample,3,"{}",1\nsample,4,,\nsample,5'
    )
    for batch_rows in (1, 100):
        frame, recording = read(text, batch_rows)
        assert frame.select("op", "line").rows() == [(1, None), (3, None), (4, None)]
        assert frame["memory"].to_list() == [[{"field": "a", "value": 5}, {"field": "b", "value": 6}], [], None]
        ledger = recording.ledger
        assert (ledger.lines, ledger.noise_lines, ledger.skipped_lines, ledger.truncated) == (11, 1, 5, True)
        assert [(p.line, p.text[:45]) for p in ledger.problems if p.line not in (1, 11)] == [
            (4, "column op holds `x`, which is no UInt32"),
            (5, "no row of the table: 2 values, where the head"),
            (6, "no row of the table: quotes that do not match"),
            (7, "column op holds `+1`, which is no UInt32"),
            (8, 'column memory holds `{"a": {}}`, which is no '),
        ]
        assert all(text[p.offset :].startswith(b"sample,5" if p.line == 11 else b"") for p in ledger.problems if p.offset)


def test_objects_that_are_no_rows():
    good = '{"kind":"sample","op":%s,"x":[1.5]}'
    lines = [
        *(good % value for value in (0, '"1"', 1.0, -1, 1 << 64, "9" * 5000, '1,"op":2')),
        *(good[:-1] % 3, "[1]", good % 4 + good % 5, good % "null", '{"kind":"sample"}', '{"op":1}', "[" * 9000),
        '{"kind":"\\ud800"}',
    ]
    text = "\n".join(lines).encode() + b"\n"
    for batch_rows in (1, 2, 100):
        frame, recording = read(text, batch_rows)
        assert frame["op"].to_list() == [0, None, None]
        assert recording.ledger.skipped_lines == len(lines) - 3
        assert [p.line for p in recording.ledger.problems[1:]] == [2, 3, 4, 5, 6, 7, 8, 9, 10, 13, 14, 15]
    assert len(read(text + b'{"kind":"sample"}')[0]) == 4  # a closed object has lost nothing
    assert read(text + b'{"kind":"sample"')[1].ledger.truncated


# -- damage ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("ending", [".parquet", ".arrow", ".csv", ".ndjson", "stream"])
def test_cuts(ending):
    data = tables()[ending]
    whole, _ = read(data)
    step = max(1, len(data) // 60)
    seen = set()
    for end in range(1, len(data), step):
        if not READER.sniff(data[:end][: 1 << 16]):
            continue
        try:
            frame, recording = read(data[:end])
        except InputError as exc:
            assert exc.exit_bits == 16
            continue
        assert ending != ".parquet"  # nothing without its footer
        assert_frame_equal(frame, whole[: len(frame)])
        seen.add(len(frame))
        ends = data[:end].endswith((b"\n", b"}")) or ending == "stream"
        assert recording.ledger.truncated or ends or data[end : end + 1] == b"\n"
    if ending != ".parquet":
        assert len(seen) > 1


flips = st.lists(st.tuples(st.floats(0, 1, exclude_max=True), st.integers(0, 255)), min_size=1, max_size=6)
quiet = settings(deadline=None, suppress_health_check=[HealthCheck.too_slow])


def flipped(data, where):
    out = bytearray(data)
    for place, byte in where:
        out[int(place * len(out))] = byte
    return bytes(out)


@pytest.mark.parametrize("ending", [".parquet", ".arrow", ".csv", ".ndjson", "stream"])
@settings(quiet, max_examples=50)
@given(where=flips)
def test_flipped_bytes(ending, where):
    data = flipped(tables()[ending], where)
    try:
        frame, _ = read(data)
    except InputError as exc:
        assert "\n" not in str(exc)
    else:
        assert frame.null_count()["kind"][0] == 0


@settings(quiet, max_examples=80)
@given(where=flips, ending=st.sampled_from([".csv", ".ndjson"]), batch_rows=st.integers(1, 12))
def test_batches_do_not_matter(ending, where, batch_rows):
    data = flipped(tables()[ending], where)

    def told(rows):
        try:
            frame, recording = read(data, rows)
        except InputError as exc:
            return str(exc), None
        return frame.to_dicts(), recording.ledger

    assert told(1 << 20) == told(batch_rows)


# -- the slow reference ------------------------------------------------------------------------------------------------


def slow(data, ending):
    """Read row by row; return the values of each row that fits."""
    rows = []
    lines = data.decode("utf-8", "replace").split("\n")[:-1]
    header = None
    for line in lines:
        line = line.removesuffix("\r")
        if ending == ".csv":
            try:
                cells = next(csv.reader([line], strict=True))
            except (csv.Error, StopIteration):
                continue
            if header is None:
                header = cells
                continue
            if len(cells) != len(header):
                continue
            row = {k: v for k, v in zip(header, cells, strict=True) if v}
            for name, value in row.items():
                dtype = schema.EVENTS.get(name)
                if dtype is not None and dtype.is_integer():
                    row[name] = int(value) if re.fullmatch(r"-?[0-9]+", value) else "bad"
                elif dtype == pl.Boolean:
                    row[name] = {"true": True, "false": False}.get(value, "bad")
                elif name == "memory":
                    try:
                        pairs = json.loads(value, object_pairs_hook=lambda pairs: pairs)
                        row[name] = [{"field": k, "value": v} for k, v in pairs]
                    except ValueError:
                        row[name] = "bad"
        else:
            try:
                row = json.loads(line, object_pairs_hook=once)
            except ValueError:
                continue
            if not isinstance(row, dict):
                continue
            row = {k: v for k, v in row.items() if v is not None}
        row = {name: row.get(name) for name in schema.EVENTS}
        if row["kind"] is not None and row["seq"] is not None and row["segment"] is not None and fits(row):
            rows.append(row | {"cut": row["cut"] or 0})
    return rows


def once(pairs):
    if len(dict(pairs)) != len(pairs):
        raise ValueError
    return dict(pairs)


def fits(row):
    for name, dtype in schema.EVENTS.items():
        value = row[name]
        if value is None:
            continue
        if isinstance(dtype, pl.Enum):
            good = value in list(dtype.categories)
        elif dtype == pl.Boolean:
            good = type(value) is bool
        elif name == "memory":
            good = isinstance(value, list) and all(
                set(v) == {"field", "value"} and type(v["field"]) is str and type(v["value"]) is int and 0 <= v["value"] < 1 << 64
                for v in value
            )
        else:
            low, high = dtype.min(), dtype.max()
            good = type(value) is int and pl.select(low).item() <= value <= pl.select(high).item()
        if not good:
            return False
    return True


# Letters and digits only: quotes and commas have tests of their own, and two columns of one name are for JSON's parser.
@settings(quiet, max_examples=80)
@given(
    where=st.lists(st.tuples(st.floats(0, 1, exclude_max=True), st.sampled_from(b"0123456789abxt-{}")), max_size=8),
    ending=st.sampled_from([".csv", ".ndjson"]),
)
def test_agrees_with_the_slow_reader(ending, where):
    head, rest = tables()[ending].split(b"\n", 1)
    data = head + b"\n" + flipped(rest, where)
    if not data.endswith(b"\n"):
        return
    expected = slow(data, ending)
    if sorted({row["seq"] for row in expected}) != [row["seq"] for row in expected] or not expected or expected[0]["line"] != 3:
        return
    try:
        frame, _ = read(data)
    except InputError:
        pytest.fail("in order and refused")
    got = [{k: v for k, v in row.items() if v is not None} for row in frame.to_dicts()]
    assert got == [{k: v for k, v in row.items() if v is not None} for row in expected]


def test_sniff():
    assert READER.sniff(b"seq,offset,kind,op\r\n") == 95
    assert READER.sniff(b'{"seq":0,"op":1,"kind":"sample"}\n') == 95
    for other in (
        b"", b"kind,of,thing\n", b'{"kind":"call","op":1,"seq":0}\n', b"{" * 60000, b'{"type":"finding","seq":1,"op":2}\n',
        b"\xff" * 64, b"\xff\xff\xff\xff\x10\0\0\0" + b"\0" * 64, b"seq kind op\n", bytes(range(256)),
    ):  # fmt: skip
        assert READER.sniff(other) == 0


def test_no_sample_is_taken_for_a_table():
    for path in SAMPLES.rglob("*"):
        if path.is_file() and path.suffix != ".md":
            with Source(path) as source:
                assert READER.sniff(source.head()) == 0, path
