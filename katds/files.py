"""Files that a resumed run or another process reads: whole, or not there at all, whatever ends the process that writes them."""

from __future__ import annotations

import re
import secrets
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TextIO

PARTIAL = ".partial"  # the end of the name of what is not whole yet
ABANDONED_SECONDS = 3600.0  # nobody has written to it for so long: its process was killed
_OURS = re.compile(rf"(.+)\.[0-9a-f]{{8}}{re.escape(PARTIAL)}")


@contextmanager
def replacing(file: Path) -> Iterator[TextIO]:
    """A text file to write to, that takes the place of `file` when the context is left: until then, and where an error leaves it, `file`
    is what it was. Several processes write a file each; `file` is that of the last to end."""
    partial = file.with_name(f"{file.name}.{secrets.token_hex(4)}{PARTIAL}")
    try:
        with partial.open("x", encoding="utf-8") as writing:
            yield writing
        partial.replace(file)
    except BaseException:
        partial.unlink(missing_ok=True)
        raise
    _remove_abandoned(file)


def whole_name(name: str) -> str:
    """What a file in a folder is called once it is whole: `name` itself, or that which the rest of a killed process was for."""
    found = _OURS.fullmatch(name)
    return found[1] if found else name.removesuffix(PARTIAL)


def _remove_abandoned(file: Path) -> None:
    """Those beside `file`, which has been written just now, by the clock of its file system."""
    with suppress(OSError):  # another process removes them, too; the next one will
        for other in file.parent.iterdir():
            if _OURS.fullmatch(other.name) and file.stat().st_mtime - other.stat().st_mtime > ABANDONED_SECONDS:
                other.unlink()


def replace_text(file: Path, text: str) -> None:
    """Writes `text` to `file`, all at once."""
    with replacing(file) as writing:
        writing.write(text)


def append_text(file: Path, text: str) -> None:
    """Adds `text` in one system call: whoever reads meanwhile meets no half of it, and a killed process hardly leaves one."""
    with file.open("ab", buffering=0) as appending:
        left = memoryview(text.encode())
        while left:
            left = left[appending.write(left) :]  # a full disk takes a part, and refuses the rest
