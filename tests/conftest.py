"""Shared fixtures: small models and tokenizers made on the spot, one thread per process."""

from __future__ import annotations

import os
import sys
from pathlib import Path

os.environ.setdefault("DS_ACCELERATOR", "cpu")
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
sys.path.insert(0, str(Path(__file__).parent))

import pytest
import torch

torch.set_num_threads(1)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Tests marked `gpu` need a CUDA device."""
    if torch.cuda.is_available():
        return
    skip = pytest.mark.skip(reason="needs a CUDA device")
    for item in items:
        if "gpu" in item.keywords:
            item.add_marker(skip)


@pytest.fixture(autouse=True)
def keep_pytest(monkeypatch: pytest.MonkeyPatch) -> None:
    """A program's end must not be that of the tests; tests/parallel/test_world.py looks at how programs end."""
    monkeypatch.setattr("katds.cli.end_process", sys.exit)


@pytest.fixture(scope="session")
def zoo(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with `student` and `teacher`: tiny Qwen3 models that share a tokenizer."""
    from zoo import build_pair

    return build_pair(tmp_path_factory.mktemp("zoo"))
