"""Puts the whole runs of tests/train and the in-process ranks of tests/core on the path."""

from __future__ import annotations

import sys
from pathlib import Path

for folder in ("train", "core"):
    sys.path.insert(0, str(Path(__file__).parent.parent / folder))
