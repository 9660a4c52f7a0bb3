"""What a benchmark leaves behind: a table to read, and a JSON file that says how it came about."""

from __future__ import annotations

import json
import os
import platform
import sys
import time
from dataclasses import asdict, dataclass, field
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

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


def show(result: Result) -> str:
    """The result as text; the table is Markdown."""
    from tabulate import tabulate

    table = tabulate([{k: _short(v) for k, v in row.items()} for row in result.rows], headers="keys", tablefmt="github")
    return "\n".join([f"{result.name}: {result.question}", "", table, "", *(f"- {note}" for note in result.notes)])


def save(result: Result, folder: Path) -> Path:
    """Writes FOLDER/NAME.json as a whole or not at all; an older file of the name is replaced."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{result.name}.json"
    record = {
        "command": " ".join(["python", *sys.argv]),
        "date": time.strftime("%Y-%m-%d %H:%M:%S"),
        "machine": machine(),
        "versions": versions(),
        **asdict(result),
    }
    partial = path.with_suffix(".partial")
    partial.write_text(json.dumps(record, indent=1) + "\n")
    partial.replace(path)
    return path


def machine() -> dict[str, Any]:
    """The hardware, as far as it decides a figure."""
    import torch

    facts: dict[str, Any] = {
        "processor": _processor(), "cores": len(os.sched_getaffinity(0)), "system": platform.platform(),
        "memory_gib": round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30, 1),
        "threads_per_rank": torch.get_num_threads(),
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


def _processor() -> str:
    for line in Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else ():
        if line.startswith("model name"):
            return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def _short(value: Any) -> Any:
    return f"{value:.3g}" if isinstance(value, float) and abs(value) < 1000 else value
