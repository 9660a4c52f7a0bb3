"""The folders of tests beside this one, whose runs are used here."""

from __future__ import annotations

import sys
from pathlib import Path

for folder in ("core", "train"):
    sys.path.insert(0, str(Path(__file__).parent.parent / folder))
