"""Reads rows of a data file or folder, each with the place that an error about it names."""

from __future__ import annotations

import csv
import json
from collections.abc import Iterator
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from katds.errors import ConfigError, first_sentence

Row = tuple[str, dict[str, Any]]
"""Where the row is ("train.jsonl:12"), and its columns."""


def read_rows(path: Path, field: str) -> Iterator[Row]:
    """Rows of a .jsonl, .json, .csv or .parquet file, a folder of such files, or a saved Hugging Face dataset.

    `field` is the setting that named the path. `datasets` streams the files. JSON lines it reads as text, each parsed
    here: its JSON reader fixes one type per column, so that an answer "x+1" after an answer 42 fails, and names no line.
    """
    if not path.exists():
        raise ConfigError(f"{field} is {path}, which does not exist (seen from {Path.cwd()}). Give a file or folder.")
    if (path / "dataset_info.json").exists() or (path / "dataset_dict.json").exists():
        yield from _saved_rows(path, field)
        return
    files = sorted(p for p in path.iterdir() if p.suffix in READERS) if path.is_dir() else [path]
    if not files or files[0].suffix not in READERS:
        seen = "a folder without such files" if path.is_dir() else f"of type {path.suffix or 'unknown'!r}"
        raise ConfigError(f"{field} is {path}, {seen}. Give {', '.join(READERS)} or a folder of them.")
    for file in files:
        try:
            yield from READERS[file.suffix](file)
        except (OSError, UnicodeDecodeError, csv.Error) as error:
            raise ConfigError(f"{field}: {file} cannot be read ({first_sentence(error)}). Repair the file.") from None


def _json_rows(path: Path) -> Iterator[Row]:
    with path.open(encoding="utf-8-sig") as file:
        first = next((line for line in file if line.strip()), "")
        file.seek(0)
        if path.suffix == ".json" and first.lstrip().startswith("["):
            rows = enumerate(_parse(file.read(), str(path)), 1)
            yield from ((f"{path} row {n}", _mapping(row, f"{path} row {n}")) for n, row in rows)
            return
    for n, row in enumerate(_stream("text", path, encoding="utf-8-sig"), 1):
        if row["text"].strip():
            yield f"{path}:{n}", _mapping(_parse(row["text"], f"{path}:{n}"), f"{path}:{n}")


def _stream(kind: str, path: Path, **options: Any) -> Iterator[dict[str, Any]]:
    """Rows as `datasets` reads them, with a cache folder of its own: ranks neither copy the data nor wait for each other's
    locks."""
    from datasets import load_dataset

    with TemporaryDirectory() as cache:
        yield from load_dataset(kind, data_files=str(path), split="train", streaming=True, cache_dir=cache, **options)


def _parse(text: str, place: str) -> Any:
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        line = f"line {error.lineno}, " if error.lineno > 1 else ""
        raise ConfigError(
            f"{place} is not valid JSON: {error.msg} at {line}character {error.colno}. Correct it or remove it."
        ) from None


def _mapping(row: Any, place: str) -> dict[str, Any]:
    if isinstance(row, dict):
        return row
    raise ConfigError(f"{place} holds a {type(row).__name__}. Every row must be a JSON object with named columns.")


def _csv_rows(path: Path) -> Iterator[Row]:
    with path.open(encoding="utf-8-sig", newline="") as file:
        reader = csv.DictReader(file)
        for row in reader:
            # The line on which the row ends: a quoted cell may hold line breaks.
            yield f"{path}:{reader.line_num}", {name: value or None for name, value in row.items() if name}


def _parquet_rows(path: Path) -> Iterator[Row]:
    try:
        yield from ((f"{path} row {n}", row) for n, row in enumerate(_stream("parquet", path), 1))
    except Exception as error:  # pyarrow's and datasets' own kinds
        raise ConfigError(f"{path} cannot be read as parquet ({first_sentence(error)}). Repair the file.") from None


def _saved_rows(path: Path, field: str) -> Iterator[Row]:
    from datasets import Dataset, DatasetDict, load_from_disk

    saved = load_from_disk(str(path))
    if isinstance(saved, DatasetDict):
        raise ConfigError(
            f"{field} is {path}, which holds the splits {', '.join(saved)}. Give the folder of one split."
        )
    assert isinstance(saved, Dataset), type(saved)
    yield from ((f"{path} row {n}", dict(row)) for n, row in enumerate(saved, 1))


READERS = {".jsonl": _json_rows, ".json": _json_rows, ".csv": _csv_rows, ".parquet": _parquet_rows}
