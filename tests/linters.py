"""Linters of other languages, as the extra `test` installs them."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path


def assert_clean(program: str, path: Path) -> None:
    """Runs a linter on a file."""
    found = Path(sys.executable).with_name(program)  # of the pinned version, not the machine's
    assert found.exists(), f"{program} is missing; run: pip install -e '.[test]'"
    done = subprocess.run([found, str(path)], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout
