"""The recipes of launch/recipes fit, by plan, on the machines that they are said to be for."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from transformers import Qwen3Config

from katds.cli import load_recipe
from katds.plan.hardware import GPUS
from katds.plan.items import LEARN, ROLLOUT
from katds.plan.job import Job
from katds.plan.lengths import Prompts, longest
from katds.plan.memory import memory
from katds.plan.planning import Wishes, make_plan
from katds.plan.scaling import ratios

ROOT = Path(__file__).parent.parent.parent
# Of the published configurations: hidden size, inner size, layers, heads, and whether the head is the embedding.
SHAPES = {
    "Qwen3-1.7B-Base": (2048, 6144, 28, 16, True),
    "Qwen3-4B-Base": (2560, 9728, 36, 32, True),
    "Qwen3-8B-Base": (4096, 12288, 36, 32, False),
    "Qwen3-8B": (4096, 12288, 36, 32, False),
    "Qwen3-32B": (5120, 25600, 64, 64, False),
}
MACHINES = {
    "qwen3_8b_to_1.7b_math": ("a100-80", 4),
    "qwen3_8b_to_4b_math": ("a100-80", 4),
    "qwen3_32b_to_8b_math": ("a100-80", 64),
}


def test_every_qwen_recipe_has_its_machine() -> None:
    assert {path.stem for path in (ROOT / "launch/recipes").glob("qwen3_*.yaml")} == MACHINES.keys()


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working directory with what `hf download ... config.json` leaves there."""
    for model, (hidden, inner, layers, heads, tied) in SHAPES.items():
        Qwen3Config(
            vocab_size=151936, hidden_size=hidden, intermediate_size=inner, num_hidden_layers=layers, num_attention_heads=heads,
            num_key_value_heads=8, head_dim=128, tie_word_embeddings=tied, max_position_embeddings=40960,
        ).save_pretrained(tmp_path / "models" / model)  # fmt: skip
    (tmp_path / "ds_configs").symlink_to(ROOT / "ds_configs")
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.slow
@pytest.mark.parametrize("name", MACHINES)
def test_a_recipe_fits_with_the_longest_prompts_and_responses(place: Path, name: str) -> None:
    gpu, ranks = MACHINES[name]
    recipe = load_recipe(["--config", str(ROOT / f"launch/recipes/{name}.yaml")], "p", "d")
    limit = recipe.data.max_prompt_tokens
    job = Job.of(recipe, ranks, "cuda", Prompts(limit, limit, "a test"), longest(recipe), 1)
    found = memory(job)
    assert 0.3 * GPUS[gpu].usable < found.peak((*ROLLOUT, *LEARN))[0] <= GPUS[gpu].usable


@pytest.mark.slow
@pytest.mark.parametrize(("prompts", "column"), [(128, 1), (512, 4)])
def test_the_published_steps_are_those_of_today(place: Path, prompts: int, column: int) -> None:
    """launch/bench_results/README.md: rows of 4 and of 64 GPUs, from the lengths that lie beside it."""
    results = ROOT / "launch/bench_results"
    words = ["--config", str(ROOT / "launch/recipes/qwen3_8b_to_1.7b_math.yaml"), "--data.max_prompt_tokens", "256"]
    recipe = load_recipe([*words, "--rollout.prompts_per_step", str(prompts)], "p", "d")
    recorded = [results / "demo_lengths" / name for name in ("kat", "never")]
    plan = make_plan(recipe, GPUS["a100-80"], Wishes(4, *recorded, stretch=7.6, scales=(4, 64)))
    text = (results / "README.md").read_text()
    for ranks, (with_rule, without) in zip((4, 64), zip(*[iter(plan.scenarios)] * 2, strict=True), strict=True):
        (row,) = re.findall(rf"^\| {ranks} \|(.*)\|$", text.partition("## Steps on 1 to 1024")[2], re.MULTILINE)
        cells = [cell.strip() for cell in row.split("|")][column - 1 : column + 2]
        spread = ratios(without, with_rule)
        ratio = f"{without.total / with_rule.total:.2f} ({min(spread):.2f} .. {max(spread):.2f})"
        assert cells == [f"{with_rule.total:.3g} s", f"{without.total:.3g} s", ratio]
