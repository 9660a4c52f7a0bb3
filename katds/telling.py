"""Which rank tells the user about an error: one line for what ranks have alike, and one from each rank that fails alone.

Errors that ranks have agreed on (`KatdsError.reported_by`) have one line in total. Without a process group, as for a wrong flag, ranks can
agree within their host only: the first of them to say a thing leaves a mark there.
"""

from __future__ import annotations

import hashlib
import os
import sys
import tempfile
import time
from contextlib import suppress
from pathlib import Path

from katds.errors import KatdsError

# DeepSpeed's launcher looks for failed ranks once a second and then ends the others.
GRACE_SECONDS = 3.0
MARKS_SECONDS = 3600.0  # after which the mark of an earlier run is removed


def tell(error: KatdsError) -> None:
    """Prints the error, or lets another rank do so. Whoever speaks does it at once: a launcher may end all when one has ended."""
    rank = this_rank()
    speaker = error.reported_by
    if rank != speaker and (rank if speaker is not None else _local_rank()) != 0:
        time.sleep(GRACE_SECONDS)
    if speaker is not None and rank != speaker:
        return
    if speaker is not None or _is_first(str(error)):
        where = f" on rank {rank}" if rank else ""
        print(f"{error.heading}{where}: {error}", file=sys.stderr, flush=True)


def this_rank() -> int:
    return int(os.environ.get("RANK") or 0)


def _local_rank() -> int:
    return int(os.environ.get("LOCAL_RANK") or this_rank())


def _is_first(message: str) -> bool:
    """Whether no other rank here of this start of the run has said the same."""
    if int(os.environ.get("WORLD_SIZE") or 1) == 1:
        return True
    # The ranks of a host are children of one process, the launcher; torchrun's starts them anew.
    start = [os.environ.get(name, "") for name in ("MASTER_ADDR", "MASTER_PORT", "TORCHELASTIC_RESTART_COUNT")]
    of = repr((os.getuid(), os.getppid(), _began(os.getppid()), *start, message))
    mark = Path(tempfile.gettempdir()) / f"katds-said-{hashlib.sha256(of.encode()).hexdigest()[:32]}"
    with suppress(OSError):  # another process may remove them as well
        for old in mark.parent.glob("katds-said-*"):
            if time.time() - old.stat().st_mtime > MARKS_SECONDS:
                old.unlink()
    try:
        mark.touch(exist_ok=False)
    except FileExistsError:
        return _is_of_an_earlier_start(mark)
    except OSError:
        return True
    return True


def _is_of_an_earlier_start(mark: Path) -> bool:
    """Whether the mark is older than this process: a shell may start the same command again. It is then this start's."""
    import psutil  # type: ignore[import-untyped]  # DeepSpeed brings it

    try:
        if mark.stat().st_mtime > psutil.Process().create_time() - 1.0:
            return False
        os.utime(mark)
    except OSError:
        pass
    return True


def _began(pid: int) -> str:
    """When a process began, which tells it from an earlier one of that number; empty where there is no /proc."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[19]
    except OSError:
        return ""
