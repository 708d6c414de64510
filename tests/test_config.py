"""The sidecar and what a host says about itself."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from xtrace import config, schema
from xtrace.errors import InputError, UnknownRelease, UsageError

HOST = Path(__file__).parent.parent / "samples" / "host"


def sidecar(folder: Path, text: str) -> config.Sidecar:
    path = folder / "xtrace.toml"
    path.write_text(text, encoding="utf-8")
    return config.read_sidecar(path)


# ── the sidecar ──────────────────────────────────────────────────────────────────────────────────────────────────────


def test_callers_are_those_of_the_schema() -> None:
    assert config.CALLERS == schema.CALLERS


def test_no_data_frames_are_loaded() -> None:
    code = "import sys, xtrace.config; print('polars' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout.strip() == "False"


def test_every_key(tmp_path: Path) -> None:
    got = sidecar(
        tmp_path,
        """
        release = "4.13.5-9.40.1"
        tsc_khz = 2596122
        [domains.0]
        role = "control"
        caller = "pv64"
        name = "Domain-0"
        [domains.7]
        role = "stub"
        """,
    )
    assert got == config.Sidecar(
        path=str(tmp_path / "xtrace.toml"),
        release="4.13.5-9.40.1",
        tsc_khz=2596122,
        domains={0: config.DomainInfo("pv64", "control", "Domain-0"), 7: config.DomainInfo(role="stub")},
    )


def test_every_key_may_be_left_out(tmp_path: Path) -> None:
    assert sidecar(tmp_path, "") == config.Sidecar(path=str(tmp_path / "xtrace.toml"))


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ('relase = "4.17.7"', "no key is called 'relase'; did you mean 'release'?"),
        ("tsc_mhz = 2596", "no key is called 'tsc_mhz'; did you mean 'tsc_khz'?"),
        ("zzz = 1", "no key is called 'zzz'; there are release, tsc_khz, domains"),
        ('[domains.1]\nroles = "guest"', "no key is called 'domains.1.roles'; did you mean 'role'?"),
        ('[domains.1]\nrole = "device-model"', "domains.1.role cannot be 'device-model'; did you mean 'device_model'?"),
        ('[domains.1]\nrole = "Guest"', "did you mean 'guest'?"),
        ('[domains.1]\ncaller = "pv-64"', "domains.1.caller cannot be 'pv-64'; did you mean 'pv64'?"),
        ('[domains.1]\ncaller = "x"', "there are pv64, pv32"),
        ("[domains.1]\nname = 3", "domains.1.name must be text"),
        ('[domains.1]\nname = " "', "domains.1.name must be text"),
        ('[domains.all]\nrole = "guest"', "'all' is not a domain number"),
        ('[domains.-1]\nrole = "guest"', "'-1' is not a domain number"),
        ('[domains.70000]\nrole = "guest"', "is not a domain number (0 to 32767)"),
        ("domains = 1", "domains must be a table"),
        ('[domains]\n1 = "guest"', "domains.1 must be a table"),
        ("release = 4.17", 'release must be text in quotes, such as "4.17.7", not 4.17'),
        ('tsc_khz = "2596122"', "tsc_khz must be a whole number of kHz"),
        ("tsc_khz = 2596.1", "tsc_khz must be a whole number of kHz"),
        ("tsc_khz = true", "tsc_khz must be a whole number of kHz"),
        ("tsc_khz = 2596", "did you mean 2596000?"),
        ("tsc_khz = 2596122000", "did you mean 2596122?"),
        ("tsc_khz = -1", "cannot be the frequency of a TSC"),
        ('release = "4.31"', "release: '4.31' is not a Xen release"),
    ],
)
def test_what_is_wrong_is_said_with_the_file(tmp_path: Path, text: str, says: str) -> None:
    with pytest.raises(UsageError) as caught:
        sidecar(tmp_path, text)
    assert says in str(caught.value)
    assert str(tmp_path / "xtrace.toml") in str(caught.value)
    assert caught.value.exit_bits == 3


def test_an_unknown_release_keeps_its_kind(tmp_path: Path) -> None:
    with pytest.raises(UnknownRelease, match="did you mean"):
        sidecar(tmp_path, 'release = "4.31"')


def test_what_is_not_toml(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"is not TOML: .*line 1"):
        sidecar(tmp_path, "release: 4.17.7")
    (tmp_path / "xtrace.toml").write_bytes(b"\xff\xfe")
    with pytest.raises(InputError, match="byte 0: is not UTF-8"):
        config.read_sidecar(tmp_path / "xtrace.toml")
    with pytest.raises(InputError, match="no such file"):
        config.read_sidecar(tmp_path / "none.toml")


def test_the_nearest_sidecar_wins(tmp_path: Path) -> None:
    trace = tmp_path / "a" / "b" / "t.xentrace.zst"
    trace.parent.mkdir(parents=True)
    assert config.load_sidecar(trace) is None or not str(config.find_sidecar(trace)).startswith(str(tmp_path))
    places = [
        tmp_path / "xtrace.toml",
        tmp_path / "a" / "xtrace.toml",
        trace.parent / "xtrace.toml",
        trace.parent / "t.xentrace.xtrace.toml",
        trace.parent / "t.xentrace.zst.xtrace.toml",
    ]
    for khz, place in enumerate(places, 1_000_001):
        place.write_text(f"tsc_khz = {khz}")
        got = config.load_sidecar(trace)
        assert got is not None
        assert (got.path, got.tsc_khz) == (str(place), khz)


def test_a_relative_path_looks_above_the_working_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "xtrace.toml").write_text("tsc_khz = 1000000")
    (tmp_path / "a").mkdir()
    monkeypatch.chdir(tmp_path / "a")
    assert config.find_sidecar("t.xentrace") == tmp_path / "xtrace.toml"
    assert config.find_sidecar("-") is None
    assert config.load_sidecar("-") is None


# ── host info ────────────────────────────────────────────────────────────────────────────────────────────────────────


def test_xl_info() -> None:
    got = config.read_host_info(HOST / "xl_info.txt")
    assert (got.release, got.tsc_khz, got.pcpus, got.build) == ("4.17.7", 2596122, 2, None)
    assert got.lines["release"] == config.HostLine(22, "xen_version            : 4.17.7")
    assert got.lines["tsc_khz"] == config.HostLine(10, "cpu_mhz                : 2596.122")
    assert got.lines["pcpus"].number == 5


def test_xl_dmesg() -> None:
    got = config.read_host_info(HOST / "xl_dmesg.txt")
    assert (got.release, got.tsc_khz, got.pcpus) == ("4.17.7", 2596122, 2)
    assert got.build == "Debian 4.17.7+13-g2445b30a44-0+deb12u1"
    assert got.lines["release"].number == 1
    assert got.lines["tsc_khz"] == config.HostLine(89, "(XEN) Detected 2596.122 MHz processor.")
    assert got.lines["pcpus"] == config.HostLine(107, "(XEN) Brought up 2 CPUs")


def host(folder: Path, text: str) -> config.HostInfo:
    (folder / "host.txt").write_text(text)
    return config.read_host_info(folder / "host.txt")


def test_both_texts_in_one_file(tmp_path: Path) -> None:
    got = host(tmp_path, (HOST / "xl_info.txt").read_text() + (HOST / "xl_dmesg.txt").read_text())
    assert (got.release, got.tsc_khz, got.pcpus) == ("4.17.7", 2596122, 2)
    assert got.build == "Debian 4.17.7+13-g2445b30a44-0+deb12u1"


@pytest.mark.parametrize(
    ("text", "release"),
    [
        ("(XEN) [    0.000000] Xen version 4.13.5-9.40.1 (mockbuild@[unknown]) (gcc (GCC) 4.8.5)", "4.13.5-9.40.1"),
        (" Xen version 3.4.0-rc3 (root@host) (gcc version 4.3.2) Thu Apr 30", "3.4.0-rc3"),
        ("[    0.000000] Xen version: 4.17.7 (preserve-AD)", "4.17.7"),
        ("xen_version : 4.11.amazon", "4.11.amazon"),
        ("xen_major : 4\nxen_minor : 13\nxen_extra : .5-9.40.1\n", "4.13.5-9.40.1"),
    ],
)
def test_how_hosts_write_their_version(tmp_path: Path, text: str, release: str) -> None:
    got = host(tmp_path, text)
    assert got.release == release
    assert got.build is None
    assert got.tsc_khz is None
    assert got.pcpus is None


def test_linux_own_release_is_not_xen(tmp_path: Path) -> None:
    got = host(tmp_path, "release : 6.1.0-50-amd64\nversion : #1 SMP\ncpu_mhz : 2400\n")
    assert (got.release, got.tsc_khz) == (None, 2400000)


def test_nonsense_frequencies_are_passed_over(tmp_path: Path) -> None:
    got = host(tmp_path, "xen_version : 4.17.7\ncpu_mhz : 0\nnr_cpus : many\ncpu_mhz : nan\ncpu_mhz : fast\n")
    assert (got.tsc_khz, got.pcpus) == (None, None)


def test_two_hosts_in_one_file(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"line 2: says Xen 4\.18\.0, but line 1 says Xen 4\.17\.7"):
        host(tmp_path, "xen_version : 4.17.7\nxen_version : 4.18.0\n")


def test_host_info_that_is_none(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="neither a Xen version nor a processor frequency"):
        host(tmp_path, "hello\n")
    with pytest.raises(InputError, match="no such file"):
        config.read_host_info(tmp_path / "none.txt")
    with pytest.raises(InputError, match="is a directory"):
        config.read_host_info(tmp_path)
    with pytest.raises(UnknownRelease, match=r"host\.txt: line 1: '9\.9\.9' is not a Xen release"):
        host(tmp_path, "xen_version : 9.9.9\n")
