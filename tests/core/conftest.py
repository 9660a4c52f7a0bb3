"""Puts `local_ranks` on the path and turns off hypothesis' clock: on a shared CPU it measures the neighbours."""

from __future__ import annotations

import sys
from pathlib import Path

from hypothesis import settings

sys.path.insert(0, str(Path(__file__).parent))
settings.register_profile("core", deadline=None)
settings.load_profile("core")
