"""Options and suppressions from files and the environment: what is found, what goes first, what is refused."""

from __future__ import annotations

import datetime
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st

from xtrace import config
from xtrace.analyze import exposure
from xtrace.config import checks, settings
from xtrace.config.options import OPTIONS, by_name
from xtrace.errors import InputError, UsageError, XtraceError

FULL = """\
release = "4.17.7"            # of the traces below this folder

[options]
from = "4.13"
to = ["4.18",
      "4.19..4.20"]
caller = ["d0=pv64", "hvm64"]
migration = "live_update"
"tsc_khz" = 2596122
host_info = "info/xl.txt"
input_format = "xentrace"
format = "json"
fail_on = "break, review"

[[suppress]]                  # the first
code = ["XT005", "XT006"]
hypercall = "memory_op/XENMEM_exchange"
domain = [3, "unknown"]
caller = "pv64"
from = "4.13"
to = "4.18.0..4.18.2"
reason = "drained  before\\n it moves"
expires = 2027-01-31

[[ suppress ]]
domain = 0
reason = "stays"
"""


def load(folder: Path, text: str | None = None, name: str = "xtrace.toml", **kw: Any) -> settings.Settings:
    if text is not None:
        (folder / name).write_text(text, encoding="utf-8")
    return settings.load(kw.pop("config", None), environment=kw.pop("environment", {}), folder=folder, **kw)


def refused(folder: Path, text: str, name: str = "xtrace.toml") -> str:
    with pytest.raises(UsageError) as caught:
        load(folder, text, name)
    assert caught.value.exit_bits == 3
    assert str(folder / name) in str(caught.value)
    return str(caught.value)


# ── what is read ─────────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("name", ["xtrace.toml", "pyproject.toml"])
def test_everything(tmp_path: Path, name: str) -> None:
    text = FULL
    if name == "pyproject.toml":
        text = text.replace("release", "[tool.other]\nrelease").replace("[options]", "[tool.xtrace.options]")
        text = text.replace("[[suppress]]", "[[tool.xtrace.suppress]]").replace("[[ suppress ]]", "[[ tool.xtrace.suppress ]]")
    got = load(tmp_path, text, name)
    assert got.path == str(tmp_path / name)
    assert {k: s.value for k, s in got.options.items()} == {
        "from": "4.13",
        "to": ("4.18", "4.19..4.20"),
        "caller": ("d0=pv64", "hvm64"),
        "migration": ("live_update",),
        "tsc_khz": 2596122,
        "host_info": str(tmp_path / "info" / "xl.txt"),
        "input_format": "xentrace",
        "format": "json",
        "fail_on": "break,review",
    }
    lines = text.splitlines()
    for key, setting in got.options.items():
        assert setting.kind == "file"
        assert setting.line is not None
        assert lines[setting.line - 1].strip('"').startswith(key), key
        assert setting.origin == f"{tmp_path / name}, line {setting.line}"
    first, second = got.suppressions
    assert (first.codes, first.hypercalls, first.domains) == (("XT005", "XT006"), ("memory_op/XENMEM_exchange",), (3, None))
    assert (first.callers, first.targets) == (("pv64",), ("4.18.0", "4.18.1", "4.18.2"))
    assert "4.13.5" in first.sources
    assert first.reason == "drained before it moves"
    assert first.expires == datetime.date(2027, 1, 31)
    assert first.selectors == (
        "code XT005|XT006, hypercall memory_op/XENMEM_exchange, domain 3|unknown, caller pv64, from 4.13, to 4.18.0..4.18.2"
    )
    assert (second.domains, second.expires) == ((0,), None)
    assert [lines[s.line - 1].replace(" ", "")[:2] for s in (first, second) if s.line] == ["[[", "[["]


def test_nothing_is_written_down(tmp_path: Path) -> None:
    got = load(tmp_path)
    assert got.path is None
    assert all(s.kind == "default" and s.value == by_name()[k].default for k, s in got.options.items())


def test_no_data_frames_are_loaded() -> None:
    code = "import sys, xtrace.config.settings as s; s.load(); print('polars' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout.strip() == "False"


def test_lines_that_cannot_be_told_are_not_told(tmp_path: Path) -> None:
    text = '[options]\nhost_info = """\n[options]\nto = "4.18"\n"""\nto = "4.19"\n[x]\n'.replace("[x]\n", "")
    assert load(tmp_path, text).options["to"].line == 6
    assert load(tmp_path, 'options.to = "4.19"').options["to"].line is None
    text = '[[suppress]]\nreason = """\n[[suppress]]\n"""\ncode = "XT001"'
    assert load(tmp_path, text).suppressions[0].line is None


# ── where it is found, and what goes first ───────────────────────────────────────────────────────────────────────────


def test_the_nearest_folder_wins(tmp_path: Path) -> None:
    inner = tmp_path / "a" / "b"
    inner.mkdir(parents=True)
    (tmp_path / "pyproject.toml").write_text('[tool.xtrace.options]\nto = "4.18"')
    assert load(inner).options["to"].value == ("4.18",)
    (tmp_path / "a" / "xtrace.toml").write_text('[options]\nto = "4.19"')
    assert load(inner).options["to"].value == ("4.19",)
    assert load(tmp_path).options["to"].value == ("4.18",)


def test_both_files(tmp_path: Path) -> None:
    (tmp_path / "pyproject.toml").write_text('[tool.xtrace.options]\nto = "4.18"\nfrom = "4.17"')
    got = load(tmp_path, '[options]\nto = "4.19"')
    assert (got.path, got.passed) == (str(tmp_path / "xtrace.toml"), str(tmp_path / "pyproject.toml"))
    assert got.options["to"].value == ("4.19",)
    assert got.options["from"].kind == "default"


@pytest.mark.parametrize("text", ["", 'release = "4.17.7"\n[domains.0]\nrole = "control"'])
def test_a_sidecar_is_passed_by(tmp_path: Path, text: str) -> None:
    inner = tmp_path / "traces"
    inner.mkdir()
    (tmp_path / "xtrace.toml").write_text('[options]\nto = "4.19"')
    got = load(inner, text)
    assert got.path == str(tmp_path / "xtrace.toml")
    (tmp_path / "xtrace.toml").unlink()
    (inner / "pyproject.toml").write_text('[tool.xtrace.options]\nto = "4.18"')
    got = load(inner)
    assert (got.options["to"].value, got.passed) == (("4.18",), None)


@pytest.mark.parametrize("text", ["[tool.other]\n", "not toml [", "[tool]\nx = 1\n"])
def test_a_project_of_others_is_passed_by(tmp_path: Path, text: str) -> None:
    assert load(tmp_path, text, "pyproject.toml").path is None


def test_one_file_serves_both(tmp_path: Path) -> None:
    inner = tmp_path / "traces"
    inner.mkdir()
    (tmp_path / "xtrace.toml").write_text(FULL)
    sidecar = config.load_sidecar(inner / "t.xentrace")
    assert sidecar is not None
    assert sidecar.release == "4.17.7"
    # What holds nothing but settings is no sidecar, and hides none.
    (inner / "xtrace.toml").write_text('[options]\nto = "4.19"')
    assert config.find_sidecar(inner / "t.xentrace") == tmp_path / "xtrace.toml"
    assert settings.unused(inner / "t.xentrace", None) == str(inner / "xtrace.toml")
    assert settings.unused(inner / "t.xentrace", str(inner / "xtrace.toml")) is None
    (inner / "t.xentrace.xtrace.toml").write_text('[options]\nto = "4.19"')
    with pytest.raises(UsageError, match="does not belong to one trace"):
        config.load_sidecar(inner / "t.xentrace")


def test_environment_goes_before_the_file(tmp_path: Path) -> None:
    environment = {"XTRACE_TO": "4.17, 4.18", "XTRACE_TSC_KHZ": "2500000", "XTRACE_FAIL_ON": "never", "XTRACE_FORMAT": " "}
    got = load(tmp_path, FULL, environment=environment)
    assert [got.options[k].value for k in ("to", "tsc_khz", "fail_on")] == [("4.17", "4.18"), 2500000, "never"]
    assert got.options["to"].origin == "XTRACE_TO"
    assert got.options["format"].value == "json"  # an empty variable says nothing


def test_a_file_that_is_named(tmp_path: Path) -> None:
    other = tmp_path / "other.toml"
    other.write_text('[options]\nto = "4.22"')
    for kw in ({"config": str(other)}, {"environment": {"XTRACE_CONFIG": str(other)}}):
        assert load(tmp_path, FULL, **kw).options["to"].value == ("4.22",)
    assert load(tmp_path, FULL, config="none").path is None
    assert load(tmp_path, FULL, config=str(other), environment={"XTRACE_CONFIG": "none"}).path == str(other)
    with pytest.raises(InputError, match="no such file"):
        load(tmp_path, FULL, config=str(tmp_path / "missing.toml"))
    (tmp_path / "pyproject.toml").write_text("[tool.other]")
    with pytest.raises(UsageError, match=r"there is no \[tool.xtrace\] in it"):
        load(tmp_path, config=str(tmp_path / "pyproject.toml"))


# ── what is refused ──────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ('[option]\nto = "4.18"', "no key is called 'option'; did you mean 'options'?"),
        ("[supress]", "no key is called 'supress'; did you mean 'suppress'?"),
        ('to = "4.18"', "'to' is an option and belongs under [options]"),
        ("options = 1", "options must be a table"),
        ('[options]\ntoo = "4.18"', "no key is called 'options.too'; did you mean 'to'?"),
        ('[options]\nfail-on = "break"', "no key is called 'options.fail-on'; did you mean 'fail_on'?"),
        ("[options]\nto = 4.18", "line 2: options.to must be text or a list of texts"),
        ("[options]\nto = []", "options.to must be text or a list"),
        ("[options]\nto = [4.18]", "options.to must be text or a list"),
        ('[options]\n\nto = "4.99"', "line 3: options.to: "),
        ('[options]\nfrom = ["4.17"]', "options.from must be text in quotes"),
        ('[options]\ntsc_khz = "2596122"', "options.tsc_khz must be a whole number of kHz"),
        ("[options]\ntsc_khz = 2596", "did you mean 2596000?"),
        ("[options]\ntsc_khz = true", "options.tsc_khz must be a whole number"),
        ('[options]\ncaller = "pv63"', "options.caller cannot be 'pv63'; did you mean 'pv64'?"),
        ('[options]\ncaller = "dx=pv64"', "options.caller: 'dx' is no domain"),
        ('[options]\nfail_on = "breaks"', "options.fail_on cannot be 'breaks'; did you mean 'break'?"),
        ('[options]\nmigration = "live"', "options.migration cannot be 'live'; did you mean 'live_update'?"),
        ('[options]\nformat = "xml"', "options.format cannot be 'xml'"),
        ("[options]\nhost_info = 1", "options.host_info must be text"),
        ('[suppress]\ncode = "XT005"\nreason = "x"', "suppress must be tables with two brackets: [[suppress]]"),
        ("suppress = 1", "suppress must be tables"),
        ('[[suppress]]\ncode = "XT005"', "line 1: suppress has no reason"),
        ('[[suppress]]\ncode = "XT005"\nreason = " "', "suppress.reason must be text"),
        ('[[suppress]]\nreason = "x"', "suppress chooses nothing; give at least one of code, hypercall"),
        ('[[suppress]]\nreason = "x"\nexpires = 2027-01-31', "suppress chooses nothing"),
        ('[[suppress]]\ncodes = "XT005"\nreason = "x"', "no key is called 'suppress.codes'; did you mean 'code'?"),
        ('[[suppress]]\ncode = 5\nreason = "x"', "suppress.code must be text"),
        ('[[suppress]]\ncode = []\nreason = "x"', "suppress.code is an empty list"),
        ('[[suppress]]\ndomain = "3"\nreason = "x"', "suppress.domain must be a domain number"),
        ('[[suppress]]\ndomain = true\nreason = "x"', "suppress.domain must be a domain number"),
        ('[[suppress]]\ndomain = 40000\nreason = "x"', "suppress.domain must be a domain number"),
        ('[[suppress]]\ncaller = "pv46"\nreason = "x"', "suppress.caller cannot be 'pv46'; did you mean 'pv64'?"),
        ('[[suppress]]\nto = "4.99"\nreason = "x"', "suppress.to: "),
        ('[[suppress]]\nto = "4.13.1-xyz"\nreason = "x"', "suppress.to must name known releases exactly"),
        ('[[suppress]]\nfrom = 4.17\nreason = "x"', "suppress.from must be text"),
        ('[[suppress]]\ncode = "XT005"\nreason = "x"\nexpires = "2027-01-31"', "suppress.expires must be a date without quotes"),
        ('[[suppress]]\ncode = "XT005"\nreason = "x"\nexpires = 2027-01-31T00:00:00', "suppress.expires must be a date"),
    ],
)
def test_refused(tmp_path: Path, text: str, says: str) -> None:
    assert says in refused(tmp_path, text)


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ('[tool.xtrace]\nto = "4.18"', "'tool.xtrace.to' is an option and belongs under [tool.xtrace.options]"),
        ('[tool.xtrace]\nrelease = "4.17.7"', "'tool.xtrace.release' tells of a trace and belongs into xtrace.toml"),
        ("[tool.xtrace.option]", "no key is called 'tool.xtrace.option'; did you mean 'options'?"),
        ("[tool]\nxtrace = 1", "tool.xtrace must be a table"),
        ('[tool.xtrace.options]\ntoo = "4.18"', "no key is called 'tool.xtrace.options.too'; did you mean 'to'?"),
        ("[tool.xtrace.suppress]", "tool.xtrace.suppress must be tables with two brackets: [[tool.xtrace.suppress]]"),
    ],
)
def test_refused_in_a_project(tmp_path: Path, text: str, says: str) -> None:
    assert says in refused(tmp_path, text, "pyproject.toml")


@pytest.mark.parametrize(
    ("variable", "value", "says"),
    [
        ("XTRACE_TO", "4.99", "environment: XTRACE_TO: "),
        ("XTRACE_TSC_KHZ", "fast", "environment: XTRACE_TSC_KHZ must be a whole number"),
        ("XTRACE_TSC_KHZ", "2596", "did you mean 2596000?"),
        ("XTRACE_FAIL_ON", "sometimes", "XTRACE_FAIL_ON cannot be 'sometimes'"),
        ("XTRACE_CALLER", "d3=pv46", "XTRACE_CALLER cannot be 'pv46'; did you mean 'pv64'?"),
    ],
)
def test_refused_in_the_environment(tmp_path: Path, variable: str, value: str, says: str) -> None:
    with pytest.raises(UsageError) as caught:
        load(tmp_path, environment={variable: value})
    assert says in str(caught.value)


def test_variables_that_are_almost_one() -> None:
    environment = {"XTRACE_TOO": "1", "XTRACE_PLUGINS": "0", "XTRACE_TO": "4.18", "XTRACE_FAILON": "", "HOME": "/"}
    assert settings.strangers(environment) == [
        "the variable XTRACE_FAILON is no setting and does nothing; did you mean XTRACE_FAIL_ON?",
        "the variable XTRACE_TOO is no setting and does nothing; did you mean XTRACE_TO?",
    ]


@pytest.mark.parametrize("data", [b"[options", b"\xff\xfe", b"[options]\nto = " + b"[" * 100_000, b"x" * (5 << 20)])
def test_not_toml(tmp_path: Path, data: bytes) -> None:
    (tmp_path / "xtrace.toml").write_bytes(data)
    with pytest.raises(InputError) as caught:
        load(tmp_path)
    assert str(tmp_path / "xtrace.toml") in str(caught.value)
    assert len(str(caught.value)) < 500


TOML = st.recursive(
    st.sampled_from(
        ['"4.18"', "1", "-1", "true", "2027-01-31", "2027-01-31T00:00:00Z", "0.5", '""', '"pv64"', '"unknown"', "[]", "{}"]
    ),
    lambda inner: st.lists(inner, max_size=2).map(lambda xs: f"[{', '.join(xs)}]"),
    max_leaves=3,
)
KEYS = st.sampled_from([*by_name(), "code", "hypercall", "domain", "reason", "expires", "x"])


@hypothesis_settings(max_examples=200, deadline=None)
@given(st.sampled_from(["", "[options]", "[[suppress]]", "[domains.0]"]), st.dictionaries(KEYS, TOML, max_size=4))
def test_any_content_is_taken_or_refused_in_a_sentence(head: str, rows: dict[str, str]) -> None:
    import tempfile

    text = "\n".join([head, *(f"{k} = {v}" for k, v in rows.items())])
    with tempfile.TemporaryDirectory() as name:
        try:
            load(Path(name), text)
        except XtraceError as exc:
            assert name in str(exc)


def test_options_are_named_once() -> None:
    assert checks.MIGRATIONS == exposure.KINDS
    assert len({o.name for o in OPTIONS}) == len(OPTIONS)
    for option in OPTIONS:
        assert option.name == option.name.lower()
        assert option.variable.removeprefix("XTRACE_") == option.name.upper()
