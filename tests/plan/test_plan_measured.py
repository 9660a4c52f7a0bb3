"""The memory that a plan predicts, against real runs on two CPU ranks."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import operators
import pytest
from measured import peak_bytes, recipe_of

from katds.bench.workloads import Size, Workload
from katds.config import Recipe
from katds.plan.items import ALWAYS, LEARN, ROLLOUT, Memory
from katds.plan.job import Job
from katds.plan.lengths import Lengths, longest
from katds.plan.memory import memory
from katds.plan.recorded import prompts

TOLERANCE = 0.15
# On a CPU memory is taken when it is first written to.
MADE_BY_THE_FIRST_UPDATE = ("student: AdamW moments", "student: reduce bucket")
STUDENT, TEACHER = Size(384, 8), Size(640, 10)  # 20 M and 60 M parameters with 16384 words
NOTHING = Workload("nothing", Size(32, 1), Size(32, 1), 128, rollouts=2, new_tokens=8)
# A few tokens in long slots: caches and the whole teacher.
ROLLING = Workload(
    "rolling", STUDENT, TEACHER, 16384, rollouts=8, new_tokens=4000, long_every=10**6, mean_short=12, prompt_tokens=8
)
# Many tokens in one micro-batch: activations and the loss.
LEARNING = Workload("learning", STUDENT, STUDENT, 16384, rollouts=16, new_tokens=48)
SHARED = Size(384, 8, heads=(6, 2, 64))  # two ranks have three query heads and a key head each
SHARING = replace(LEARNING, name="sharing", student=SHARED, teacher=SHARED)
HOLDING = Workload("holding", STUDENT, STUDENT, 16384, rollouts=2, new_tokens=16)


@pytest.fixture(scope="module")
def base_bytes(tmp_path_factory: pytest.TempPathFactory) -> int:
    """Of a process that has trained, on next to nothing."""
    recipe = recipe_of(tmp_path_factory.mktemp("nothing"), NOTHING, 1)
    return peak_bytes(recipe) - predicted(recipe, longest(recipe)).peak(ALWAYS)[0]


def predicted(recipe: Recipe, lengths: Lengths) -> Memory:
    return memory(Job.of(recipe, 2, "cpu", prompts(recipe), lengths, 2))


def compared(name: str, size: int, measured: int) -> float:
    """Predicted / measured; told with -s."""
    print(f"{name}: predicted {size / 2**20:.0f} MiB, measured {measured / 2**20:.0f}, ratio {size / measured:.3f}")
    return size / measured


@pytest.fixture(scope="module")
def base_loading(tmp_path_factory: pytest.TempPathFactory) -> int:
    """Of a process that is about to train, on next to nothing."""
    recipe = recipe_of(tmp_path_factory.mktemp("nothing"), NOTHING, 1)
    return peak_bytes(recipe, trained=False) - predicted(recipe, longest(recipe)).at("load")


@pytest.mark.slow
def test_a_rollout_phase_with_large_caches(tmp_path: Path, base_bytes: int) -> None:
    changes = {"train": {"steps": 1, "micro_batch_tokens": 512}, "rollout": {"chunk_tokens": 16}}
    recipe = recipe_of(tmp_path, ROLLING, 1, **changes)
    found = predicted(recipe, Lengths([16], [16], "as the models are built"))
    first = found.peak(ROLLOUT)[0] - sum(i.bytes for i in found.items if i.name in MADE_BY_THE_FIRST_UPDATE)
    # No response is as long as it may be, and no micro-batch as large: the phase of rollouts has the peak.
    assert abs(compared("rollout", first, peak_bytes(recipe) - base_bytes) - 1) < TOLERANCE


@pytest.mark.slow
def test_a_large_micro_batch(tmp_path: Path, base_bytes: int) -> None:
    recipe = recipe_of(tmp_path, LEARNING, 2)
    found = predicted(recipe, longest(recipe))
    assert found.peak(LEARN) == found.peak(ALWAYS)
    assert abs(compared("learning", found.peak(LEARN)[0], peak_bytes(recipe) - base_bytes) - 1) < TOLERANCE


@pytest.mark.slow
@pytest.mark.parametrize("ranks", [1, 2])
def test_a_micro_batch_that_ranks_share(tmp_path: Path, base_bytes: int, ranks: int) -> None:
    """Ulysses: a rank has half of the tokens, and in attention all of them with half of the heads."""
    recipe = recipe_of(
        tmp_path, SHARING, 2, train={"sequence_parallel": ranks, "micro_batch_tokens": 1024 // ranks * 2}
    )
    found = predicted(recipe, longest(recipe))
    assert found.peak(LEARN) == found.peak(ALWAYS)
    assert abs(compared(f"shared by {ranks}", found.peak(LEARN)[0], peak_bytes(recipe) - base_bytes) - 1) < TOLERANCE


@pytest.mark.slow
def test_an_optimizer_on_the_host(tmp_path: Path, base_bytes: int) -> None:
    """On a CPU it lies in the same memory, with one more copy of the gradients."""
    operators.need("CPUAdamBuilder")
    file = tmp_path / "offload.json"
    zero = {"stage": 3, "offload_optimizer": {"device": "cpu"}, "offload_param": {"device": "cpu"}}
    file.write_text(json.dumps({"zero_optimization": zero}))
    recipe = recipe_of(tmp_path, HOLDING, 2)
    recipe = recipe.model_copy(update={"student": recipe.student.model_copy(update={"deepspeed": file})})
    found = predicted(recipe, longest(recipe))
    assert any(item.name == "student: gradients for the optimizer" for item in found.items)
    assert abs(compared("offload", found.peak(ALWAYS)[0], peak_bytes(recipe) - base_bytes) - 1) < TOLERANCE


@pytest.mark.slow
def test_reading_the_models(tmp_path: Path, base_loading: int) -> None:
    """Before the first step, of the rank that reads the files."""
    recipe = recipe_of(tmp_path, replace(ROLLING, name="reading"), 1, gather="layer")
    size = predicted(recipe, longest(recipe)).at("load")
    assert abs(compared("reading", size, peak_bytes(recipe, trained=False) - base_loading) - 1) < TOLERANCE
