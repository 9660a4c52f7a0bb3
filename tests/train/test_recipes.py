"""The recipes of launch/recipes as they are, on small models and on data with the files and columns that they name."""

from __future__ import annotations

import json
import os
import random
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from ranks import run_ranks
from tokenizers import AddedToken, Tokenizer, models, pre_tokenizers
from transformers import AutoTokenizer, GenerationConfig, PreTrainedTokenizerFast, Qwen3Config, Qwen3ForCausalLM
from whole_runs import records
from zoo import deepspeed_json

from katds import evaluate as evaluation
from katds import run
from katds.assemble import about_rule
from katds.cli import load_recipe, read_recipe
from katds.config import Recipe
from katds.inputs import Inputs, read_inputs

ROOT = Path(__file__).parent.parent.parent
QWEN = {path.stem: path for path in sorted((ROOT / "launch/recipes").glob("qwen3_*.yaml"))}
MODELS = ("Qwen3-1.7B-Base", "Qwen3-4B-Base", "Qwen3-8B-Base", "Qwen3-8B", "Qwen3-32B")
END, CHAT_END = "<|endoftext|>", "<|im_end|>"
# As far as it matters here, Qwen3's own: turns, and an empty thought where thinking is off.
TEMPLATE = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n"
    "{% if enable_thinking is defined and enable_thinking is false %}<think>\n\n</think>\n\n{% endif %}{% endif %}"
)
SUFFIX = "Please reason step by step, and put your final answer within \\boxed{}."
WORDS = [*f"user assistant Find x y n {SUFFIX} \\boxed{{1}} \\boxed{{2}} \\boxed{{33}}".split(), *map(str, range(40))]


def tokenizer(end: str) -> PreTrainedTokenizerFast:
    specials = [END, "<|im_start|>", CHAT_END, "<think>", "</think>", "<unk>"]
    words = dict.fromkeys([*specials, *WORDS])
    inner = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<unk>"))
    inner.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    inner.add_special_tokens([AddedToken(word, special=True, normalized=False) for word in specials])
    return PreTrainedTokenizerFast(
        tokenizer_object=inner, eos_token=end, pad_token=END, unk_token="<unk>", chat_template=TEMPLATE
    )


def model(folder: Path, seed: int) -> None:
    base = folder.name.endswith("Base")
    words = tokenizer(END if base else CHAT_END)
    ids = words.convert_tokens_to_ids([END] if base else [CHAT_END, END])
    torch.manual_seed(seed)
    config = Qwen3Config(
        vocab_size=len(words), hidden_size=16, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2,
        num_key_value_heads=1, head_dim=8, max_position_embeddings=8192, eos_token_id=ids[0], bos_token_id=None,
    )  # fmt: skip
    made = Qwen3ForCausalLM(config)
    made.generation_config = GenerationConfig(eos_token_id=ids)
    made.save_pretrained(folder)
    words.save_pretrained(folder)


def rows(count: int, **columns: Any) -> list[dict[str, Any]]:
    draw = random.Random(count)
    return [
        {name: value(draw) if callable(value) else value for name, value in columns.items()} | {"id": i}
        for i in range(count)
    ]


def parquet(path: Path, content: list[dict[str, Any]]) -> None:
    path.parent.mkdir(parents=True)
    Dataset.from_list(content).to_parquet(str(path))


def jsonl(path: Path, content: list[dict[str, Any]]) -> None:
    path.parent.mkdir(parents=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in content))
    (path.parent / "README.md").write_text("of the set")


def question(draw: random.Random) -> str:
    return f"Find x {draw.randrange(40)} y {draw.randrange(40)} n"


def number(draw: random.Random) -> str:
    return str(draw.randrange(1, 3))


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A working directory with all that the recipes' relative paths name."""
    root = tmp_path_factory.mktemp("place")
    shutil.copytree(ROOT / "ds_configs", root / "ds_configs")
    for seed, name in enumerate(MODELS):
        model(root / "models" / name, seed)
    chat = {
        "source_prompt": [{"role": "user", "content": "Find x"}],
        "reward_model": {"ground_truth": "2", "style": "rule"},
    }
    dapo = rows(
        40, prompt=question, solution=number, data_source="math_dapo", **chat, ability="MATH", extra_info={"index": "a"}
    )
    parquet(root / "data/dapo-math-17k/all/train-00000-of-00001.parquet", dapo)
    jsonl(
        root / "data/math500/test.jsonl",
        rows(3, problem=question, solution="so 1", answer="\\text{1}", subject="Algebra", level=2),
    )
    parquet(root / "data/amc23/test-00000-of-00001.parquet", rows(3, question=question, answer="27.0", url="u"))
    jsonl(root / "data/minervamath/test.jsonl", rows(3, question=question, answer="4e33"))
    parquet(
        root / "data/aime24/data/train-00000-of-00001.parquet",
        rows(2, problem=question, solution="s", answer="033", url="u", year="2024"),
    )
    first = rows(5, prompt=[{"role": "user", "content": "Find x"}], reward_model={"ground_truth": "1", "style": "rule"})
    parquet(root / "data/first-form/dapo-math-17k.parquet", first)
    return root


def read(name: str, *flags: str) -> tuple[Recipe, Inputs]:
    recipe = load_recipe(["--config", str(QWEN[name]), *flags], "launch/train.py", "Train.")
    return recipe, read_inputs(recipe)


@pytest.mark.parametrize("name", QWEN)
def test_a_recipe_loads_as_it_is(place: Path, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    monkeypatch.chdir(place)
    recipe, inputs = read(name)
    assert (recipe.rollout.temperature, recipe.rollout.top_p, recipe.rollout.max_new_tokens) == (1.0, 0.95, 4096)
    assert recipe.stop.kind == "kat" and (recipe.stop.window, recipe.stop.persistence) == (64, 4)
    threshold, train, optimizer = recipe.stop.threshold, recipe.train, recipe.train.optimizer
    assert (threshold.eta, threshold.capacity, threshold.min_entries, threshold.min_steps) == (0.3, 4096, 512, 50)
    assert (recipe.rollout.samples_per_prompt, recipe.rollout.divergence_top_k) == (1, 64)
    # Of a batch of 128, minibatches of 32; eight nodes take four times as many.
    assert (recipe.rollout.prompts_per_step, train.minibatches) == (512 if "32b" in name else 128, 4)
    assert (optimizer.lr, optimizer.warmup_fraction, optimizer.weight_decay, optimizer.gradient_clip) == (
        1e-6,
        0.03,
        0.0,
        1.0,
    )
    assert optimizer.final_lr_fraction == 0.0 and train.epochs == (3 if "1.7b" in name else 2)
    assert recipe.objective.kind == "reverse_kl" and recipe.objective.support == "student_top_k"
    assert {b.name: (len(b.prompts), b.samples, b.k) for b in inputs.benchmarks} == {
        "aime24": (2, 32, 32), "math500": (3, 8, 8), "amc": (3, 8, 8), "minerva": (3, 8, 8),
    }  # fmt: skip
    answers = {b.name: b.prompts[0].answer for b in inputs.benchmarks}
    assert answers == {"aime24": "033", "math500": "\\text{1}", "amc": "27.0", "minerva": "4e33"}
    assert inputs.prompts[0].answer in ("1", "2")
    for prompts in (inputs.prompts, *(b.prompts for b in inputs.benchmarks)):
        text = inputs.tokenizer.decode(prompts[0].token_ids)
        assert text.startswith("<|im_start|> user Find x") and f"n {SUFFIX}" in text
        assert text.endswith("<|im_start|> assistant <think> </think>"), "thinking is off"
    # A base model ends otherwise than the chat model that teaches it: the recipe names the template's own end.
    assert inputs.facts.eos_ids == tuple(sorted(inputs.tokenizer.convert_tokens_to_ids([END, CHAT_END])))
    assert inputs.facts.warnings == ()


def test_the_demo_s_rule_says_what_it_does() -> None:
    """ "completed" is a cell of the comparison because `auto` is that here."""
    recipe = load_recipe(["--config", str(ROOT / "launch/recipes/demo.yaml")], "launch/train.py", "Train.")
    (choice,) = about_rule(recipe, 45)
    assert choice.startswith("stop.threshold.source auto is completed in this run")
    choice, doubt = about_rule(recipe, 1)
    assert choice and doubt.startswith("warning: stop.kind kat will end no rollout")


def test_every_recipe_for_a_base_model_ends_as_its_chat_template_does() -> None:
    """Else a response that ends as the teacher ends goes on to its maximum length."""
    files = [path for path in (ROOT / "launch/recipes").glob("*.yaml") if not path.name.startswith("compare_")]
    based = [recipe for recipe in map(read_recipe, files) if recipe["student"]["path"].endswith("-Base")]
    assert len(based) == len(QWEN) + 1
    for recipe in based:
        assert recipe["rollout"]["end_tokens"] == [CHAT_END] and recipe["data"]["template_options"] == {
            "enable_thinking": False
        }


def test_the_recipe_in_the_project_s_readme_loads(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With what launch/recipes/README.md downloads."""
    monkeypatch.chdir(place)
    (text,) = re.findall(r"^```yaml\n(run: .*?)^```", (ROOT / "README.md").read_text(), re.MULTILINE | re.DOTALL)
    Path("my.yaml").write_text(text)
    recipe = load_recipe(["--config", "my.yaml"], "launch/train.py", "Train.")
    inputs = read_inputs(recipe)
    assert inputs.prompts[0].answer in ("1", "2") and inputs.benchmarks[0].prompts[0].answer == "\\text{1}"
    assert inputs.tokenizer.decode(inputs.prompts[0].token_ids).endswith("<|im_start|> assistant <think> </think>")
    assert inputs.facts.eos_ids == tuple(sorted(inputs.tokenizer.convert_tokens_to_ids([END, CHAT_END])))
    assert inputs.facts.warnings == ()


def test_dapo_in_its_first_form(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(place)
    flags = {
        "data.train": "data/first-form",
        "data.answer_column": "reward_model.ground_truth",
        "data.prompt_suffix": "",
    }
    _, inputs = read("qwen3_8b_to_1.7b_math", *(word for name, value in flags.items() for word in (f"--{name}", value)))
    assert [prompt.answer for prompt in inputs.prompts] == ["1"] * 5
    assert inputs.tokenizer.decode(inputs.prompts[0].token_ids).startswith("<|im_start|> user Find x <|im_end|>")


SMALL = {
    "rollout.prompts_per_step": 8, "rollout.max_new_tokens": 32, "rollout.slots": 4, "rollout.chunk_tokens": 8,
    "stop.window": 4, "stop.persistence": 2, "stop.threshold.min_entries": 2, "stop.threshold.min_steps": 1, "train.steps": 2,
    "evaluation.benchmarks.aime24.samples": 2, "evaluation.samples": 2, "train.optimizer.lr": 0.01, "data.max_prompt_tokens": 64,
    "student.deepspeed": "zero3.json", "teacher.deepspeed": "zero3.json",
}  # fmt: skip


def train_and_score(folder: Path, name: str) -> tuple[dict[str, float], dict[str, float]]:
    os.chdir(folder)
    flags = [word for key, value in SMALL.items() for word in (f"--{key}", str(value))]
    recipe = load_recipe(["--config", str(QWEN[name]), "--run.name", name, *flags], "p", "d")
    run.train(recipe)
    after = json.loads(Path(f"runs/{name}/summary.json").read_text())["after"]
    student = recipe.student.model_copy(update={"path": Path(f"runs/{name}/final")})
    return after, evaluation.evaluate(recipe.model_copy(update={"student": student})).metrics()


@pytest.mark.parametrize("name", QWEN)
def test_a_recipe_trains_and_scores(place: Path, name: str) -> None:
    (place / "zero3.json").write_text(json.dumps(deepspeed_json()))
    for after, scored in run_ranks(2, train_and_score, place, name):
        assert {"aime24/avg@2", "math500/pass@2", "amc/avg@2", "minerva/avg@2", "average/avg@k"} <= after.keys()
        assert scored == after
    steps = [record for record in records(place / "runs" / name) if "loss/total" in record]
    assert len(steps) == 2 and all(record["stop/eos"] > 0 for record in steps)
    final = place / "runs" / name / "final"
    ends = GenerationConfig.from_pretrained(final).eos_token_id
    assert ends == sorted(AutoTokenizer.from_pretrained(final).convert_tokens_to_ids([END, CHAT_END]))


@pytest.mark.parametrize("name", QWEN)
def test_the_readme_has_the_columns_that_a_recipe_reads(name: str) -> None:
    text = (ROOT / "launch/recipes/README.md").read_text()
    folders = re.findall(r"--local-dir (data/\S+)", text)
    table = text.partition("| set | rows |")[2].partition("\n\n")[0].splitlines()[2:]
    rows = dict(zip(folders, table, strict=True))  # in the order of the downloads
    recipe = read_recipe(QWEN[name])
    read = [recipe["data"] | {"data": recipe["data"]["train"]}, *recipe["evaluation"]["benchmarks"].values()]
    assert len(read) == len(rows)
    for each in read:
        (row,) = (row for folder, row in rows.items() if f"{each['data']}/".startswith(f"{folder}/"))
        _, _, _, _, prompt, answer, *_ = row.split("|")
        assert f"`{each['prompt_column']}`" in prompt and f"`{each['answer_column']}`" in answer, row


def test_every_recipe_is_in_the_readme() -> None:
    text = (ROOT / "launch/recipes/README.md").read_text()
    for path in (ROOT / "launch/recipes").glob("*.yaml"):
        assert path.name in text or (path.name.startswith("compare_demo") and "compare_demo*" in text), path
    for name, recipe in ((name, path.read_text()) for name, path in QWEN.items()):
        for line in recipe.splitlines():
            key, _, value = line.strip().partition(": ")
            if key == "path":
                assert value.split()[0].removeprefix("models/") in text, f"{name} reads {value}"
