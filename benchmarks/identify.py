"""Print how many releases ``identify`` leaves for each recording under ``samples/``, and the mean.

python benchmarks/identify.py [FILE ...]
"""

from __future__ import annotations

import re
import statistics
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from xtrace import release  # noqa: E402
from xtrace.pipeline import Options, identify_trace  # noqa: E402

#: Folders of recordings; of one release each, or named SET-RELEASE.
FOLDERS = ("bare", "eras", "dom0-4.17.7")


def captures() -> list[tuple[Path, str]]:
    """Return each recording with the release that wrote it."""
    out = []
    for folder in FOLDERS:
        for path in sorted((ROOT / "samples" / folder).iterdir()):
            # bare-pdone-4.17.7.txt.zst, pv64-3.4.0-rc3.xentrace; j5_tiny_pv.xentrace is of the folder's release
            named = re.search(r"-(\d[\w.-]*?)\.(?:txt|xentrace)", path.name) or re.search(r"-(\d.*)", folder)
            assert named is not None
            out.append((path, release.parse(named[1]).releases[0].version))
    return out


def main() -> int:
    """Print one line for each recording."""
    chosen = {Path(a).resolve() for a in sys.argv[1:]}
    left: dict[str, list[int]] = {}
    wrong = 0
    for path, true in captures():
        if chosen and path not in chosen:
            continue
        start = time.perf_counter()
        _, found = identify_trace(path, Options())
        seconds = time.perf_counter() - start
        kind = "xentrace" if ".xentrace" in path.name else "text"
        left.setdefault(kind, []).append(len(found.left))
        wrong += true not in found.left
        mark = "" if true in found.left else f"  {true} IS RULED OUT"
        print(f"{path.name:34} {len(found.left):4}  {seconds:5.2f} s  {release.fold_text(found.left)}{mark}")
    for kind, counts in left.items():
        mean, median = statistics.mean(counts), statistics.median(counts)
        print(f"{kind}: {mean:.1f} of {len(found.known)} releases left on average, median {median}")
    total = [n for counts in left.values() for n in counts]
    print(f"all: {statistics.mean(total):.1f} left on average in {len(total)} recordings; the true one ruled out in {wrong}")
    return 1 if wrong else 0


if __name__ == "__main__":
    raise SystemExit(main())
