"""What a benchmark leaves behind: a table to read, and a JSON file that says how it came about."""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import platform
import subprocess
import sys
import tempfile
import time
from dataclasses import asdict, dataclass, field
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from katds.errors import ConfigError
from katds.files import replace_text

REPOSITORY = Path(__file__).parents[2]
PACKAGES = ("katds", "torch", "deepspeed", "transformers", "trl", "liger-kernel", "flash-attn")


@dataclass
class Result:
    """The outcome of one sub-benchmark.

    Args:
        rows: the table; keys are column names.
        samples: every repetition as measured, seconds or bytes, so that others can summarise them in their own way.
        settings: sizes, ranks, seeds: all that the figures depend on besides machine and versions.
        notes: what a reader must know to read the table rightly.
    """

    name: str
    question: str
    rows: list[dict[str, Any]]
    samples: list[dict[str, Any]] = field(default_factory=list)
    settings: dict[str, Any] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)


def told(options: argparse.Namespace) -> dict[str, Any]:
    """The options as JSON-compatible settings."""
    settings = {key: value for key, value in vars(options).items() if key not in ("out", "sub")}
    return {key: str(value) if isinstance(value, Path) else value for key, value in settings.items()}


def show(result: Result) -> str:
    """The result as text; the table is Markdown."""
    from tabulate import tabulate

    table = tabulate([{k: _short(v) for k, v in row.items()} for row in result.rows], headers="keys", tablefmt="github")
    return "\n".join([f"{result.name}: {result.question}", "", table, "", *(f"- {note}" for note in result.notes)])


def claim(folder: Path) -> None:
    """Makes the folder and tries it out: a measurement of an hour must not end in a place that cannot be written to."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=folder).close()
    except OSError as error:
        raise ConfigError(
            f"--out: {folder} cannot be written to ({error.strerror}). Name a folder that can be, or one to be made."
        ) from None


def save(result: Result, folder: Path) -> Path:
    """Writes FOLDER/NAME.json as a whole or not at all; an older file of the name is replaced, but not by an empty table."""
    if not result.rows:
        raise ConfigError(
            f"bench {result.name} measured nothing with these options, and nothing is written. Ask for more."
        )
    claim(folder)
    path = folder / f"{result.name}.json"
    record = {
        "command": " ".join(["python", *sys.argv]),
        "date": time.strftime("%Y-%m-%d %H:%M:%S"),
        "commit": commit(),
        "machine": machine(),
        "versions": versions(),
        **asdict(result),
    }
    replace_text(path, json.dumps(record, indent=1) + "\n")
    return path


def commit() -> str:
    """Of the code that was measured, "-dirty-" and a digest of the difference where it differs; results, which every benchmark changes, do
    not count."""
    git = ["git", "-C", str(REPOSITORY)]
    try:
        head = subprocess.run([*git, "rev-parse", "HEAD"], capture_output=True, text=True, check=True).stdout.strip()
        changed = subprocess.run(
            [*git, "diff", "HEAD", "--", "katds", "ds_configs"], capture_output=True, check=True
        ).stdout
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
    return f"{head}-dirty-{hashlib.sha256(changed).hexdigest()[:8]}" if changed else head


def machine() -> dict[str, Any]:
    """The hardware, as far as it decides a figure."""
    import torch

    # Of the ranks, not of this process, which only starts them (`katds.bench.ranks`, `katds.compare.running`).
    threads = int(os.environ.get("OMP_NUM_THREADS", "1"))
    facts: dict[str, Any] = {
        "processor": processor(), "cores": len(os.sched_getaffinity(0)), "system": platform.platform(),
        "memory_gib": round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30, 1),
        "threads_per_rank": threads,
    }  # fmt: skip
    if torch.cuda.is_available():
        properties = torch.cuda.get_device_properties(0)
        facts |= {
            "gpu": properties.name, "gpus": torch.cuda.device_count(), "cuda": torch.version.cuda,
            "gpu_memory_gib": round(properties.total_memory / 2**30, 1),
        }  # fmt: skip
    return facts


def versions() -> dict[str, str]:
    found = {"python": platform.python_version()}
    for name in PACKAGES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found


def processor() -> str:
    """Name, family and model: of a virtual machine the name alone says little."""
    cpuinfo = Path("/proc/cpuinfo")
    lines = (line.partition(":") for line in (cpuinfo.read_text().splitlines() if cpuinfo.exists() else ()))
    facts = {key.strip(): value.strip() for key, _, value in lines}
    if "model name" not in facts:
        return platform.processor() or platform.machine()
    return ", ".join([facts["model name"], *(f"{key} {facts[key]}" for key in ("cpu family", "model") if key in facts)])


def _short(value: Any) -> Any:
    return f"{value:.3g}" if isinstance(value, float) and abs(value) < 1000 else value
