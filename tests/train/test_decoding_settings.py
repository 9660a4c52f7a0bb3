"""How the student decodes is a matter of speed and memory: `rollout.weights` and `rollout.fast_decode` change no result."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from test_whole_runs import STEPS, rollouts_of
from whole_runs import full_run, records, timeless, train, weights
from zoo import build_recipe, shared_folder

from katds import assemble, run
from katds.config import Recipe
from katds.core.collective import Solo
from katds.rollout.sampling import Sampling


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return shared_folder(tmp_path_factory)


def test_a_run_that_decodes_from_a_copy_is_the_same_run(base: Path, tmp_path: Path) -> None:
    """Bit for bit: two updates a step, evaluations in between, cache and step kept from phase to phase."""
    folder, seen = full_run(base, 2)
    again = json.loads(json.dumps(train(2, build_recipe(tmp_path, "copy", rollout={"weights": "copy"}))))
    assert again == seen
    for one, two in zip(records(folder), records(tmp_path / "runs" / "copy"), strict=True):
        assert timeless(one) == timeless(two)
    own, other = weights(folder), weights(tmp_path / "runs" / "copy")
    assert all(torch.equal(own[name], other[name]) for name in own)


def test_a_run_without_fast_decoding_writes_the_same(base: Path, tmp_path: Path) -> None:
    """The C code sums in another order, so no more than the same tokens can be asked for."""
    _, seen = full_run(base, 2)
    plain = json.loads(json.dumps(train(2, build_recipe(tmp_path, "plain", rollout={"fast_decode": False}))))
    for step in range(STEPS):
        assert rollouts_of(plain, step) == rollouts_of(seen, step)


def test_a_run_whose_teacher_reads_beside_writes_the_same(base: Path, tmp_path: Path) -> None:
    """The prompts are read in other forwards, so no more than the same tokens and cuts can be asked for."""
    _, seen = full_run(base, 2)
    beside = json.loads(json.dumps(train(2, build_recipe(tmp_path, "beside", rollout={"overlap": True}))))
    for step in range(STEPS):
        assert rollouts_of(beside, step) == rollouts_of(seen, step)


@pytest.mark.parametrize(("fast", "kept"), [(True, "view"), (False, "copy")])
def test_the_engine_gets_what_the_recipe_says(fast: bool, kept: str) -> None:
    models: dict[str, Any] = {"student": {"path": "s"}, "teacher": {"path": "t"}, "data": {"train": "d"}}
    recipe = Recipe.model_validate(
        {"run": {"name": "r"}, "rollout": {"fast_decode": fast, "weights": kept, "overlap": fast}, **models}
    )
    world, facts = SimpleNamespace(device=torch.device("cpu")), SimpleNamespace(eos_ids=(1,))
    settings = assemble.engine_settings(recipe, facts, world, Sampling())  # type: ignore[arg-type]
    assert (settings.fast_decode, settings.keep_decoder, settings.overlap) == (fast, kept == "copy", fast)


def test_every_node_says_why_it_decodes_slowly(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    said: list[str] = []
    for rank, local in ((0, 0), (1, 1), (2, 0), (3, 1)):
        monkeypatch.setenv("LOCAL_RANK", str(local))
        world = SimpleNamespace(rank=rank, is_main=rank == 0)
        assemble.speaker(world, said.append)("no compiler")  # type: ignore[arg-type]
    assert said == ["no compiler"] and capsys.readouterr().err == "rank 2: no compiler\n"


@pytest.mark.parametrize("gather", ["layer", "phase", "once"])
def test_the_teacher_is_gathered_as_the_recipe_says(gather: str, monkeypatch: pytest.MonkeyPatch) -> None:
    models: dict[str, Any] = {"student": {"path": "s"}, "data": {"train": "d"}}
    recipe = Recipe.model_validate({"run": {"name": "r"}, "teacher": {"path": "t", "gather": gather}, **models})
    facts = SimpleNamespace(tokenizer_size=9)
    zero = {"zero_optimization": {"stage": 3}}
    inputs = SimpleNamespace(facts=facts, teacher_vocabulary=11, student_json=zero, teacher_jsons=[zero])
    world = SimpleNamespace(collective=Solo(), block=lambda ranks: SimpleNamespace(group=f"blocks of {ranks}"))
    monkeypatch.setattr(run, "load_student", lambda *_: "student")
    monkeypatch.setattr(run, "load_frozen", lambda *given: given)
    _, (given,) = run._load_models(recipe, inputs, world, [2], False)  # type: ignore[arg-type]
    path, settings, *others = given
    assert path == Path("t") and settings["zero_optimization"]["stage"] == 3 and others == [11, gather, "blocks of 2"]
