"""What a run leaves for a resumed one, or for other programs, is whole at any time and whatever ends it."""

from __future__ import annotations

import json
import multiprocessing
import os
import resource
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from katds.core import lengths
from katds.core.lengths import StepLengths
from katds.evaluation.report import write
from katds.files import ABANDONED_SECONDS, append_text, replace_text, replacing, whole_name
from katds.train.samples import Sample
from katds.train.summary import write_summary
from katds.train.writers.base import Watched
from katds.train.writers.jsonl import JsonlWriter
from katds.train.writers.tracker_ids import remember_id

LONG = "x" * 10_000
SUMMARY: Any = dict.fromkeys(
    ("steps", "ranks", "rollout_tokens", "learned_tokens", "training_seconds", "rollout_tokens_per_second_and_rank",
     "peak_memory_bytes"), 1,
) | dict.fromkeys(
    ("before", "after", "saved_fraction", "saved_fraction_since_first_termination", "terminated_share", "threshold",
     "false_termination_share"),
)  # fmt: skip


def sampled(folder: Path, text: str) -> None:
    row = Sample(1, "p", "", text, [text], "eos", None, False, 1, 1, None, [0.0])
    JsonlWriter(Watched(folder, "one", 5, 9, "", {})).samples(3, [row])


WRITERS: dict[str, Callable[[Path, str], Any]] = {
    "trackers.json": lambda folder, text: remember_id(folder, "mlflow", text),
    "summary.json": lambda folder, text: write_summary(folder, SUMMARY | {"device": text}),
    "results.json": lambda folder, text: write(folder, {"weights": text}, "table"),
    "rollouts/step-000003.jsonl": sampled,
}


def limited(write: Callable[[], Any]) -> None:
    """Dies (SIGXFSZ) in the middle of the first file that is larger than 4 kB."""
    signal.signal(signal.SIGXFSZ, signal.SIG_DFL)
    resource.setrlimit(resource.RLIMIT_FSIZE, (4096, 4096))
    write()


@pytest.mark.parametrize("name", WRITERS)
def test_a_process_that_dies_while_it_writes_leaves_the_old_file(tmp_path: Path, name: str) -> None:
    write = WRITERS[name]
    write(tmp_path, "old")
    before = (tmp_path / name).read_text()
    child = multiprocessing.get_context("fork").Process(target=limited, args=(lambda: write(tmp_path, LONG),))
    child.start()
    child.join(60)
    assert child.exitcode == -signal.SIGXFSZ, "it was not killed: the test is idle"
    assert (tmp_path / name).read_text() == before
    write(tmp_path, LONG)
    assert LONG in (tmp_path / name).read_text()
    (left,) = tmp_path.rglob("*.partial")  # of the process that has died
    assert whole_name(left.name) == Path(name).name == whole_name(f"{Path(name).name}.partial")
    os.utime(left, (0, time.time() - ABANDONED_SECONDS - 9))
    write(tmp_path, "new")
    assert not list(tmp_path.rglob("*.partial")), "it would stay for ever"


def test_an_error_leaves_nothing(tmp_path: Path) -> None:
    file = tmp_path / "results.json"
    replace_text(file, "old")
    with pytest.raises(UnicodeEncodeError):
        replace_text(file, "x" * 100_000 + "\udc80")
    assert [path.name for path in tmp_path.iterdir()] == ["results.json"] and file.read_text() == "old"


def write_often(file: Path, letter: str) -> None:
    for _ in range(100):
        with replacing(file) as writing:
            for _ in range(20):
                writing.write(letter * 50_000)


def test_of_two_processes_that_write_a_file_at_once_one_is_read(tmp_path: Path) -> None:
    """As two evaluations of one model do: both succeed, and nobody ever reads a mixture."""
    file = tmp_path / "results.json"
    started = multiprocessing.get_context("fork")
    children = [started.Process(target=write_often, args=(file, letter)) for letter in "ab"]
    for child in children:
        child.start()
    seen = set()
    while any(child.is_alive() for child in children):
        if file.exists():
            text = file.read_text()
            assert text == text[0] * 1_000_000
            seen.add(text[0])
    assert [child.exitcode for child in children] == [0, 0] and seen == {"a", "b"}
    assert list(tmp_path.iterdir()) == [file]


def test_a_new_file_is_as_readable_as_any(tmp_path: Path) -> None:
    before = os.umask(0o027)
    try:
        replace_text(tmp_path / "results.json", "text")
    finally:
        os.umask(before)
    assert (tmp_path / "results.json").stat().st_mode & 0o777 == 0o640


def steps(folder: Path) -> None:
    writer = JsonlWriter(Watched(folder, "one", 0, 300, "", {}))
    for step in range(300):
        writer.lengths(step, StepLengths([step] * 9000, [step] * 9000, ["length"] * 9000))


def test_whoever_reads_meanwhile_meets_whole_lines(tmp_path: Path) -> None:
    """The record of a run that goes on, which stop.kind replay reads, and one with long lines."""
    child = multiprocessing.get_context("fork").Process(target=steps, args=(tmp_path,))
    child.start()
    seen = set()
    while child.is_alive():
        if (tmp_path / lengths.FILE).exists() and (tmp_path / lengths.FILE).stat().st_size:
            seen.add(len(lengths.read(tmp_path)))
    child.join()
    assert len(seen) > 3 and json.loads((tmp_path / lengths.FILE).read_text().splitlines()[-1])["step"] == 299


def full(file: Path) -> None:
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (10, 10))
    with pytest.raises(OSError, match="File too large"):
        append_text(file, '{"step": 1}\n')


def test_a_disk_that_takes_a_part_of_a_line_is_an_error(tmp_path: Path) -> None:
    child = multiprocessing.get_context("fork").Process(target=full, args=(tmp_path / "metrics.jsonl",))
    child.start()
    child.join(60)
    assert child.exitcode == 0
