"""Programs as a user starts them: under DeepSpeed's launcher and without one."""

from __future__ import annotations

import json
import os
import re
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml
from transformers import AutoModelForCausalLM
from zoo import build_recipe

ROOT = Path(__file__).parent.parent
LAUNCHED_BY = re.compile(r"^\[.*\] \[(INFO|WARNING|ERROR)\] ")  # lines of DeepSpeed's launcher


def start(
    *arguments: str, launcher: bool = False, program: str = "launch/train.py"
) -> subprocess.CompletedProcess[str]:
    """A program from the repository's root, as documented; two ranks with the launcher."""
    command = [sys.executable]
    if launcher:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = str(free.getsockname()[1])
        command += ["-m", "deepspeed.launcher.runner", "--num_gpus", "2", "--master_port", port]
    # What test ranks or a launcher around the tests have set is not the user's.
    ours = {"RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT", "PYTHONPATH"}
    environment = {key: value for key, value in os.environ.items() if key not in ours} | {"OMP_NUM_THREADS": "1"}
    return subprocess.run(
        [*command, program, *arguments],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
        timeout=240,
    )


def recipe_file(root: Path, **changes: dict[str, Any]) -> Path:
    recipe = build_recipe(root, "run", **{"train": {"steps": 2}, **changes})
    file = root / "recipe.yaml"
    file.write_text(yaml.safe_dump(recipe))
    return file


def refused(done: subprocess.CompletedProcess[str], *pieces: str) -> None:
    """One error line of at most three sentences, exit code 2, and no traceback."""
    lines = [line for line in done.stderr.splitlines() if not LAUNCHED_BY.match(line) and "Warning" not in line]
    errors = [line for line in lines if line.startswith("error")]
    assert len(errors) == 1 and errors[0].startswith("error: "), done.stderr
    assert len(re.findall(r"[.!?](?=\s|$)", errors[0])) <= 3, errors[0]
    assert "Traceback" not in done.stdout + done.stderr
    assert done.returncode == 2
    for piece in pieces:
        assert piece in errors[0], errors[0]


def contents(folder: Path) -> list[tuple[str, float]]:
    return sorted((str(path), path.stat().st_mtime) for path in folder.rglob("*"))


def steps_in(text: str) -> list[str]:
    return re.findall(r"^step (\d)/2  loss ", text, re.MULTILINE)


def test_two_ranks_under_the_launcher(tmp_path: Path) -> None:
    file = recipe_file(tmp_path)
    done = start("--config", str(file), "--run.rollout_samples", "1", launcher=True)
    assert done.returncode == 0, done.stderr
    assert "Traceback" not in done.stderr
    assert steps_in(done.stdout) == ["1", "2"], "one line per step, from rank 0"
    assert done.stdout.count("evaluation after 2 steps") == 1 and done.stdout.count("2 steps on 2 ranks") == 1
    folder = tmp_path / "runs" / "run"
    names = sorted("events" if path.name.startswith("events.out.tfevents") else path.name for path in folder.iterdir())
    assert names == [
        "checkpoints",
        "config.yaml",
        "events",
        "final",
        "lengths.jsonl",
        "metrics.jsonl",
        "rollouts",
        "summary.json",
        "timeline.jsonl",
    ]
    assert [path.name for path in (folder / "checkpoints").iterdir()] == ["step-2"]
    assert sorted(path.name for path in (folder / "rollouts").iterdir()) == ["step-000000.jsonl", "step-000001.jsonl"]
    assert json.loads((folder / "summary.json").read_text())["ranks"] == 2
    assert yaml.safe_load((folder / "config.yaml").read_text())["run"]["rollout_samples"] == 1
    AutoModelForCausalLM.from_pretrained(folder / "final")

    before = contents(tmp_path)
    refused(start("--config", str(file), launcher=True), str(folder), "already holds a run", "run.resume")
    assert contents(tmp_path) == before


def test_without_a_launcher_there_is_one_rank(tmp_path: Path) -> None:
    file = recipe_file(tmp_path, train={"steps": 1}, evaluation={"data": None}, checkpoint={"export": False})
    done = start("--config", str(file))
    assert done.returncode == 0, done.stderr
    folder = tmp_path / "runs" / "run"
    assert json.loads((folder / "summary.json").read_text())["ranks"] == 1
    assert not (folder / "final").exists() and len((folder / "metrics.jsonl").read_text().splitlines()) == 1


@pytest.mark.parametrize(
    ("flags", "pieces"),
    [
        (["--stop.windw", "8"], ["stop.windw", "stop.window"]),
        (["--data.train", "none.jsonl"], ["data.train", "none.jsonl"]),
        (["--run.resume"], ["run.resume", "no complete checkpoint"]),
        (["--student.path", "none"], ["student.path", "none"]),
    ],
    ids=["misspelt", "no_data", "no_checkpoint", "no_model"],
)
def test_user_errors(tmp_path: Path, flags: list[str], pieces: list[str]) -> None:
    file = recipe_file(tmp_path)
    before = contents(tmp_path)
    refused(start("--config", str(file), *flags), *pieces)
    assert contents(tmp_path) == before


def test_evaluate_under_the_launcher_and_once_more_without(tmp_path: Path) -> None:
    """The second time all samples are there: nothing is made again, and the scores are the same."""
    file, found = recipe_file(tmp_path), list[tuple[str, list[tuple[str, int]]]]()
    for launcher in (True, False):
        done = start("--config", str(file), launcher=launcher, program="launch/evaluate.py")
        assert done.returncode == 0, done.stderr
        assert "Traceback" not in done.stderr and done.stdout.count("written to ") == 1
        (folder,) = (tmp_path / "runs" / "run" / "evaluations").iterdir()
        samples = [(path.name, path.stat().st_mtime_ns) for path in sorted(folder.glob("*.jsonl"))]
        found.append(((folder / "results.json").read_text(), samples))
    assert found[0] == found[1] and found[0][1]
    refused(start("--config", str(file), "--evaluation.data", "gone.jsonl", program="launch/evaluate.py"), "gone.jsonl")
