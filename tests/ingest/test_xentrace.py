"""The xentrace reader against the READMEs' figures, xenalyze, and what is known of single records."""

from __future__ import annotations

import io
import json
import shutil
import struct
import sys
from pathlib import Path

import polars as pl
import pytest
from ingest_xentrace_common import recording, recording_of, window

from xtrace import schema
from xtrace.ingest.base import ReadOptions
from xtrace.ingest.source import Source
from xtrace.ingest.xentrace import READER

ROOT = Path(__file__).parents[2]
SAMPLES = ROOT / "samples"
sys.path.insert(0, str(ROOT / "tools"))
