"""The xentrace reader against the READMEs' figures, xenalyze, and what is known of single records."""

from __future__ import annotations

import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]
SAMPLES = ROOT / "samples"
sys.path.insert(0, str(ROOT / "tools"))
