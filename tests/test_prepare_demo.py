"""The command that makes the demo's models: whole folders that load, made once, never replaced by accident."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from katds.data import orbit

ROOT = Path(__file__).parent.parent


def prepare(*arguments: object) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(ROOT / "launch" / "prepare_demo.py"), *map(str, arguments)]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=120)


def contents(folder: Path) -> dict[str, tuple[int, bytes]]:
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    return {str(path.relative_to(folder)): (path.stat().st_mtime_ns, path.read_bytes()) for path in files}


@pytest.fixture(scope="module")
def demo(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("prepare") / "demo"
    done = prepare("--out", out, "--quick")
    assert done.returncode == 0, done.stderr
    return out


@pytest.mark.parametrize("role", ["teacher", "student"])
def test_models_load_with_the_shared_tokenizer(demo: Path, role: str) -> None:
    model = AutoModelForCausalLM.from_pretrained(demo / role)
    tokenizer = AutoTokenizer.from_pretrained(demo / role)
    assert model.dtype == torch.float32
    assert model.config.vocab_size == len(tokenizer) == len(orbit.WORDS)
    assert model.config.tie_word_embeddings == (role == "student")
    assert model.config.max_position_embeddings >= 512
    assert model.generation_config.eos_token_id == tokenizer.eos_token_id == orbit.WORD_ID[orbit.EOS]
    assert model.generation_config.pad_token_id == tokenizer.pad_token_id == orbit.WORD_ID[orbit.PAD]
    assert (demo / role / "tokenizer.json").read_bytes() == (demo / "teacher" / "tokenizer.json").read_bytes()
    problem = json.loads((demo / "eval.jsonl").read_text().splitlines()[0])
    message = {"role": "user", "content": problem["prompt"]}
    prompt = tokenizer.apply_chat_template([message], add_generation_prompt=True, return_tensors="pt")
    assert orbit.WORD_ID[orbit.UNKNOWN] not in prompt["input_ids"]
    assert model.generate(**prompt, max_new_tokens=4, min_new_tokens=4).shape == (1, prompt["input_ids"].shape[1] + 4)


def test_problems_are_split_and_answered(demo: Path) -> None:
    rows = {
        name: [json.loads(line) for line in (demo / f"{name}.jsonl").read_text().splitlines()]
        for name in ("train", "eval")
    }
    answers = {problem.prompt: problem.answer for problem in orbit.all_problems()}
    for row in rows["train"] + rows["eval"]:
        assert row == {"prompt": row["prompt"], "answer": answers[row["prompt"]]}
    prompts = [row["prompt"] for row in rows["train"] + rows["eval"]]
    assert sorted(prompts) == sorted(answers)


def test_manifest_tells_how_it_was_made(demo: Path) -> None:
    manifest = json.loads((demo / "manifest.json").read_text())
    assert manifest["settings"]["seed"] == 0
    assert manifest["settings"]["quick"]
    assert manifest["answer_pattern"] == orbit.ANSWER_PATTERN
    for role, parameters in manifest["parameters"].items():
        assert parameters == sum(p.numel() for p in AutoModelForCausalLM.from_pretrained(demo / role).parameters())
    assert 0 <= manifest["measured"]["student_accuracy"] <= 1
    assert manifest["versions"]["torch"] == torch.__version__
    assert [path.name for path in demo.parent.iterdir()] == ["demo"], "a temporary folder was left behind"


def test_the_same_command_again_changes_nothing(demo: Path) -> None:
    before = contents(demo)
    done = prepare("--out", demo, "--quick")
    assert done.returncode == 0
    assert "already" in done.stdout
    assert contents(demo) == before


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--quick", "--seed", 1), r"--out is \S+, which holds .* other settings \(seed 0, --quick\). Add --force\."),
        ((), r"--out is \S+, which holds .* other settings"),
        (("--seed", -1), r"--seed is -1\. Give 0 or more\."),
        (("--seed", "x"), r"argument --seed: invalid int value: 'x'"),
    ],
)
def test_wrong_calls_say_so_and_leave_the_folder_alone(demo: Path, arguments: tuple[object, ...], message: str) -> None:
    before = contents(demo)
    done = prepare("--out", demo, *arguments)
    assert done.returncode == 2
    assert re.search(r"error: " + message, done.stderr)
    assert "Traceback" not in done.stderr
    assert contents(demo) == before


@pytest.mark.parametrize("force", [(), ("--force",)])
def test_a_folder_of_something_else_is_never_replaced(tmp_path: Path, force: tuple[str, ...]) -> None:
    (tmp_path / "thesis.tex").write_text("years of work")
    done = prepare("--out", tmp_path, *force)
    assert done.returncode == 2
    assert "something else than demo models" in done.stderr
    assert (tmp_path / "thesis.tex").read_text() == "years of work"


def test_help_teaches() -> None:
    done = prepare("--help")
    assert done.returncode == 0
    for word in ("--out", "--seed", "--quick", "--force", "launch/train.py"):
        assert word in done.stdout
