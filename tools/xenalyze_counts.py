"""Count what ``xenalyze --dump-all`` says about hypercalls, as the figures that the xentrace reader's tests expect.

    python tools/xenalyze_counts.py TRACE ... > tests/ingest/xentrace_expected.json

Per trace: hypercalls by kind, domain, vCPU and number: ``{"hypercall": {"d0v1": {"1a": 12}}}``, numbers in hex, ``?`` for a
vCPU that xenalyze does not know (``d?v?``, or its default domain 32768). xenalyze prints a record generically (event, words)
where it thinks that the vCPU is of the other kind, such as HVM records of a vCPU that it has seen PV records of; those lines
are counted, too.
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
import tempfile
from collections import Counter
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from xtrace.ingest.source import Source

_WHO = r"(d(?:\d+|\?)v(?:\d+|\?))"
_NAMED = re.compile(rf"^[ !\]].*? {_WHO}( ?) (hypercall|vmcall) +([0-9a-f]+)(?: |$)")
_GENERIC = re.compile(rf"^\].*? {_WHO} +(82012|20100d|20200e)\([0-9a-f:]+\) \d+ \[ ([0-9a-f]+)")
_GENERIC_KIND = {"82012": "vmmcall", "20100d": "hypercall", "20200e": "subcall"}


def count(lines: list[str]) -> dict[str, dict[str, dict[str, int]]]:
    """Count the hypercall lines of a dump: kind, vCPU, number (hex)."""
    seen: Counter[tuple[str, str, str]] = Counter()
    for line in lines:
        if named := _NAMED.match(line):
            who, blank, word, number = named.groups()
            kind = "vmmcall" if word == "vmcall" else "subcall" if blank else "hypercall"
        elif generic := _GENERIC.match(line):
            who, event, first = generic.groups()
            kind = _GENERIC_KIND[event]
            number = f"{int(first, 16) & (0xFFFFFFFF if kind == 'vmmcall' else 0xFFFFF):x}"
        else:
            continue
        seen[kind, "?" if "?" in who or who.startswith("d32768v") else who, number] += 1
    out: dict[str, dict[str, dict[str, int]]] = {}
    for (kind, who, number), n in sorted(seen.items()):
        out.setdefault(kind, {}).setdefault(who, {})[number] = n
    return out


def run(trace: Path, xenalyze: str = "xenalyze") -> dict[str, dict[str, dict[str, int]]]:
    """Run xenalyze over ``trace`` (which may be compressed) and count."""
    with Source(trace) as source, tempfile.NamedTemporaryFile(suffix=".xentrace") as plain:
        plain.write(source.file.read())
        plain.flush()
        done = subprocess.run([xenalyze, "--dump-all", plain.name], capture_output=True, check=False)
    return count(done.stdout.decode("utf-8", "replace").splitlines())


def main() -> None:
    """Print the counts of all traces named as JSON."""
    traces = [Path(name) for name in sys.argv[1:]]
    print(json.dumps({trace.name.removesuffix(".zst"): run(trace) for trace in traces}, indent=1, sort_keys=True))


if __name__ == "__main__":
    main()
