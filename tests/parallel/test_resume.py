"""N steps = n steps + kill + resume + N-n steps, bit for bit; onto other numbers of ranks up to rounding (DESIGN section 8.4)."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from ranks import run_ranks
from test_whole_runs import assert_same_as_tensorboard
from whole_runs import full_run, rankless, records, timeless, train, weights
from zoo import build_model, build_recipe, once, shared_folder

from katds import run, startup
from katds.config import Recipe
from katds.core.collective import Solo
from katds.errors import CheckpointError
from katds.inputs import identity, read_inputs
from katds.parallel import checkpoint
from katds.parallel.checkpoint import CheckpointStore, find_newest


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return shared_folder(tmp_path_factory)


def sentences(message: str) -> int:
    return len(re.findall(r"[.!?](?=\s|$)", message))


def killed(base: Path, size: int, name: str) -> dict[str, Any]:
    """What a run that was killed while it wrote the record of its last step leaves behind; returns the recipe that resumes it."""
    full, _ = full_run(base, size)
    folder = base / "runs" / name
    shutil.copytree(full, folder)
    for gone in ("final", "checkpoints/step-4"):
        shutil.rmtree(folder / gone)
    (folder / "summary.json").unlink()
    (folder / "checkpoints" / "step-4.partial" / "student").mkdir(parents=True)
    (folder / "checkpoints" / "step-3").mkdir()  # no state.json: not complete
    text = (folder / "metrics.jsonl").read_text().splitlines()
    last = next(i for i, line in enumerate(text) if json.loads(line)["step"] == 3)
    (folder / "metrics.jsonl").write_text("\n".join([*text[:last], text[last][:40]]))
    drawn = (folder / "timeline.jsonl").read_text()
    (folder / "timeline.jsonl").write_text(drawn[:-30])  # torn as well
    recipe = json.loads((base / "recipe.json").read_text())
    recipe["run"] |= {"name": name, "resume": True}
    return recipe


def same(one: Any, two: Any) -> bool:
    """Bit-equality of nested containers of tensors."""
    if isinstance(one, torch.Tensor):
        return one.dtype == two.dtype and torch.equal(one, two)
    if isinstance(one, dict):
        return one.keys() == two.keys() and all(same(one[key], two[key]) for key in one)
    if isinstance(one, list | tuple):
        return len(one) == len(two) and all(map(same, one, two))
    return not isinstance(one, int | float | str) or one == two


def test_resumed_run_is_the_uninterrupted_one_bit_for_bit(base: Path, tmp_path: Path) -> None:
    full, seen = full_run(base, 2)
    resumed = base / "runs" / f"resumed-{tmp_path.name}"
    seen_again = train(2, killed(base, 2, resumed.name))
    for rank, rank_again in zip(seen, seen_again, strict=True):
        assert json.loads(json.dumps(rank_again)) == {step: rank[step] for step in ("2", "3")}
    assert [timeless(r) for r in records(resumed)] == [timeless(r) for r in records(full)]
    assert_same_as_tensorboard(resumed)
    assert (resumed / "lengths.jsonl").read_bytes() == (full / "lengths.jsonl").read_bytes()
    drawn = [[json.loads(line) for line in (f / "timeline.jsonl").read_text().splitlines()] for f in (resumed, full)]
    assert [line["step"] for line in drawn[0]] == [0, 1, 2, 3] and drawn[0][:2] == drawn[1][:2]
    assert [[p[0] for p in line["ranks"]["1"]] for line in drawn[0]] == [
        [p[0] for p in line["ranks"]["1"]] for line in drawn[1]
    ]
    assert same(weights(resumed), weights(full))
    for file in sorted((full / "rollouts").iterdir()):
        assert (resumed / "rollouts" / file.name).read_bytes() == file.read_bytes()
    assert sorted(
        p.name for p in (resumed / "checkpoints").iterdir() if "partial" not in p.name and p.name != "step-3"
    ) == ["step-2", "step-4"]
    for rank in (0, 1):  # master weights, moments, step counters
        for kind in ("optim", "model"):
            file = f"checkpoints/step-4/student/zero_pp_rank_{rank}_mp_rank_00_{kind}_states.pt"
            ours, theirs = (torch.load(folder / file, weights_only=False) for folder in (resumed, full))
            assert same(ours, theirs), file
    states = [json.loads((folder / "checkpoints/step-4/state.json").read_text()) for folder in (resumed, full)]
    for state in states:
        del state["monitor"]["seconds"]
        state["monitor"]["last"] = timeless(state["monitor"]["last"])
    assert states[0] == states[1]
    summaries = [json.loads((folder / "summary.json").read_text()) for folder in (resumed, full)]
    timed = {
        "seconds",
        "training_seconds",
        "rollout_tokens_per_second",
        "rollout_tokens_per_second_and_rank",
        "peak_memory_bytes",
    }
    ours, theirs = ({key: value for key, value in s.items() if key not in timed} for s in summaries)
    assert ours == theirs


def test_resume_of_a_finished_run_repeats_its_summary(base: Path, tmp_path: Path) -> None:
    full, _ = full_run(base, 1)
    recipe = json.loads((base / "recipe.json").read_text())
    recipe["run"] |= {"name": f"finished-{tmp_path.name}", "resume": True}
    folder = base / "runs" / recipe["run"]["name"]
    shutil.copytree(full, folder)
    shutil.rmtree(folder / "final")
    train(1, recipe)
    assert same(weights(folder), weights(full))
    assert [timeless(r) for r in records(folder)] == [timeless(r) for r in records(full)]
    ours, theirs = (json.loads((f / "summary.json").read_text()) for f in (folder, full))
    assert {k: ours[k] for k in ("before", "after", "rollouts", "threshold")} == {
        k: theirs[k] for k in ("before", "after", "rollouts", "threshold")
    }


@pytest.mark.parametrize(("old", "new"), [(2, 1), (2, 4), (1, 2)])
def test_resume_on_another_number_of_ranks(base: Path, tmp_path: Path, old: int, new: int) -> None:
    """Weights and the following updates agree; without the optimizer's state an update would be off by its rate, 1e-3."""
    full, _ = full_run(base, old)
    universal = Path(once(base, f"universal-{old}", lambda: convert(base, old)))
    recipe = killed(base, old, f"onto-{tmp_path.name}-{new}")
    resumed = base / "runs" / recipe["run"]["name"]
    shutil.copytree(universal, resumed / "checkpoints" / "step-2" / "universal")
    train(new, recipe)
    for name, value in weights(full).items():
        assert (weights(resumed)[name] - value).abs().max() < 1e-6, name
    for ours, theirs in zip(records(resumed), records(full), strict=True):
        assert rankless(ours) == pytest.approx(rankless(theirs), rel=1e-4)
    assert json.loads((resumed / "checkpoints/step-4/state.json").read_text())["world_size"] == new
    if new == 1:  # what the new number of ranks has saved, it can read
        trained = weights(resumed)
        shutil.rmtree(resumed / "final")
        train(new, recipe)
        assert same(weights(resumed), trained)


def convert(base: Path, size: int) -> str:
    """The universal form of the checkpoint in the middle of a full run, made as `run.train` makes it."""
    killed(base, size, f"universal-{size}")
    found = find_newest(base / "runs" / f"universal-{size}" / "checkpoints")
    assert (found.step, found.world_size) == (2, size)
    checkpoint.make_universal(found, Solo())
    return str(found.folder / "universal")


def test_another_seed_is_refused_on_all_ranks(base: Path, tmp_path: Path) -> None:
    recipe = killed(base, 2, f"seed-{tmp_path.name}")
    recipe["run"]["seed"] = 4
    before = sorted(str(p) for p in (base / "runs" / recipe["run"]["name"]).rglob("*"))
    for message in run_ranks(2, refusal, recipe):
        assert "run.seed is 4" in message and "step-2 was written with 3" in message
        assert sentences(message) <= 3
    assert sorted(str(p) for p in (base / "runs" / recipe["run"]["name"]).rglob("*")) == before


def refusal(recipe: dict[str, Any]) -> str:
    try:
        run.train(Recipe.model_validate(recipe))
    except CheckpointError as error:
        return str(error)
    raise AssertionError("the run was resumed")


CHANGES = [
    ("rollout", {"prompts_per_step": 7}, "rollout.prompts_per_step is 7"),
    ("rollout", {"max_new_tokens": 20}, "rollout.max_new_tokens is 20"),
    ("rollout", {"top_p": 0.5}, "rollout.top_p is 0.5"),
    ("train", {"minibatches": 2}, "train.minibatches is 2"),
    ("train", {"steps": 5}, "train.steps is 5"),
    ("stop", {"window": 3}, "stop.window is 3"),
    ("objective", {"kind": "jsd"}, "objective.* is .*"),
    ("run", {"seed": 4}, "run.seed is 4"),
    ("reward", {"function": "a:b"}, "reward.function is 'a:b'"),
    ("behaviour", {"kind": "trb"}, "behaviour.* is .*"),
    ("data", {"train": "eval.jsonl"}, r"data.train \(contents\)"),
    ("student", {"path": "other"}, r"student.path \(contents\)"),
    ("teacher", {"path": "other"}, r"teacher.path \(contents\)"),
]
FREE = [
    ("rollout", {"slots": 3, "chunk_tokens": 9}),
    ("rollout", {"weights": "copy", "fast_decode": False, "overlap": True}),
    ("train", {"micro_batch_tokens": 50, "activation_checkpointing": True}),
    ("run", {"rollout_samples": 0}),
    ("checkpoint", {"every": 1, "keep": 5}),
    ("evaluation", {"samples": 5}),
    ("data", {"train": "moved.jsonl"}),
]


@pytest.fixture(scope="module")
def begun(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """The recipe that resumes a run with one checkpoint."""
    root = tmp_path_factory.mktemp("begun")
    recipe = build_recipe(root, "a", teacher={"gather": "once"})
    build_model(root / "other", seed=9, hidden=48)
    shutil.copy(root / "train.jsonl", root / "moved.jsonl")
    claim(recipe)
    made = Recipe.model_validate(recipe)
    # As an older katds would have written it, for which other settings were not free, and which knew neither rewards nor behaviour.
    known = {
        key: value
        for key, value in identity(made, read_inputs(made)).items()
        if not key.startswith(("reward.", "behaviour."))
    }
    mine = known | {"rollout.weights": "view", "rollout.slots": 1, "evaluation.samples": 77}
    store(root / "runs" / "a" / "checkpoints", lambda: {"identity": mine}).save(2)
    return recipe | {"run": recipe["run"] | {"resume": True}}


def claim(recipe: dict[str, Any]) -> checkpoint.Found | None:
    made = Recipe.model_validate(recipe)
    return startup.claim(made.run.folder / made.run.name, made, identity(made, read_inputs(made)))


def with_change(recipe: dict[str, Any], section: str, change: dict[str, Any]) -> dict[str, Any]:
    root = Path(recipe["data"]["train"]).parent
    files = {key: str(root / value) for key, value in change.items() if key in ("train", "path")}
    return recipe | {section: recipe.get(section, {}) | change | files}


@pytest.mark.parametrize(("section", "change", "message"), CHANGES, ids=lambda value: str(value)[:30])
def test_what_is_computed_must_not_change(begun: dict[str, Any], section: str, change: Any, message: str) -> None:
    with pytest.raises(CheckpointError, match=message + ".*step-2 was written with") as caught:
        claim(with_change(begun, section, change))
    assert sentences(str(caught.value)) <= 3


RULES = [{"kind": "kat", "window": 4, "min_kept": 3}, {"kind": "prefix", "tokens": 20}]


@pytest.mark.parametrize("older", [False, True])
def test_an_older_run_did_what_today_s_defaults_do(begun: dict[str, Any], tmp_path: Path, older: bool) -> None:
    """Of kinds that are not the default, too, and of a list of sections, once saved as one setting; what was given stays given."""
    recipe = begun | {"objective": {"kind": "tropd"}, "stop": {"kind": "first_of", "rules": RULES}}
    recipe["rollout"] = begun["rollout"] | {"top_p": 1.0}
    recipe["run"] = begun["run"] | {"folder": str(tmp_path)}
    made = Recipe.model_validate(recipe)
    mine = identity(made, read_inputs(made))
    del mine["objective.guidance"], mine["stop.rules[0].threshold.eta"]
    if older:
        mine = {key: value for key, value in mine.items() if not key.startswith("stop.rules")}
        mine["stop.rules"] = [rule.model_dump(mode="json") for rule in made.stop.rules]
    store(tmp_path / "a" / "checkpoints", lambda: {"identity": mine}).save(2)
    assert claim(recipe) is not None
    changes = (
        ("objective", {"guidance": 0.5}, "objective.guidance is 0.5"),
        (
            "stop",
            {"rules": [RULES[0] | {"threshold": {"eta": 0.5}}, RULES[1]]},
            r"stop.rules\[0\].threshold.eta is 0.5",
        ),
        ("stop", {"rules": [RULES[0], {"kind": "prefix", "tokens": 21}]}, r"stop.rules\[1\].tokens is 21"),
        ("stop", {"rules": RULES[::-1]}, r"stop.rules\[0\].kind"),
        ("stop", {"rules": RULES[:1]}, r"stop.rules\[1\].kind"),
    )
    for section, change, message in changes:
        with pytest.raises(CheckpointError, match=message if "kind" not in message else r"stop.rules\[\d\]"):
            claim(recipe | {section: recipe[section] | change})


@pytest.mark.parametrize(("section", "change"), FREE, ids=lambda value: str(value)[:30])
def test_the_rest_may_change(begun: dict[str, Any], section: str, change: dict[str, Any]) -> None:
    found = claim(with_change(begun, section, change))
    assert found is not None and found.step == 2


def test_a_broken_shard_is_one_error_on_all_ranks(base: Path, tmp_path: Path) -> None:
    """The other ranks must not wait for the one that could not read its part."""
    recipe = killed(base, 2, f"broken-{tmp_path.name}")
    folder = base / "runs" / recipe["run"]["name"]
    shard = folder / "checkpoints/step-2/student/zero_pp_rank_1_mp_rank_00_optim_states.pt"
    shard.write_bytes(shard.read_bytes()[:1000])
    before = (folder / "metrics.jsonl").read_bytes()
    for message in run_ranks(2, refusal, recipe):
        assert "run.resume" in message and "step-2" in message
        assert sentences(message) <= 3, message
    assert (folder / "metrics.jsonl").read_bytes() == before


class Engine:
    """Writes a file instead of shards."""

    def save_checkpoint(self, folder: str, tag: str, save_latest: bool) -> None:
        (Path(folder) / tag).mkdir()
        (Path(folder) / tag / "shard").write_text(tag)


def store(folder: Path, state: Any = dict, engine: Any = None, keep: int = 2) -> CheckpointStore:
    recipe = Recipe.model_validate(build_recipe(folder.parent / "zoo", "a"))
    return CheckpointStore(folder, engine or Engine(), Solo(), keep, recipe, state)


def test_newest_checkpoints_are_kept(tmp_path: Path) -> None:
    checkpoints = store(tmp_path / "c")
    for step in (2, 8, 10, 9):  # 9 and 10: by number, not by name
        checkpoints.save(step)
    assert sorted(p.name for p in (tmp_path / "c").iterdir()) == ["step-10", "step-9"]
    assert find_newest(tmp_path / "c").step == 10
    checkpoints.save(10)  # again, over the old one
    assert find_newest(tmp_path / "c").state == {"step": 10, "world_size": 1}


def test_a_torn_save_leaves_the_older_checkpoint(tmp_path: Path) -> None:
    class Killed(Engine):
        def save_checkpoint(self, folder: str, tag: str, save_latest: bool) -> None:
            super().save_checkpoint(folder, tag, save_latest)
            raise KeyboardInterrupt

    checkpoints = store(tmp_path / "c")
    checkpoints.save(2)
    with pytest.raises(KeyboardInterrupt):
        store(tmp_path / "c", engine=Killed()).save(4)
    assert find_newest(tmp_path / "c").step == 2
    checkpoints.save(4)  # goes over what is left of the torn one
    assert sorted(p.name for p in (tmp_path / "c").iterdir()) == ["step-2", "step-4"]


@pytest.mark.parametrize("text", [None, "", '{"step": 4, "wor', '{"step": 4}', "[]"])
def test_unreadable_checkpoints_are_named(tmp_path: Path, text: str | None) -> None:
    (tmp_path / "step-4").mkdir()
    if text is not None:
        (tmp_path / "step-4" / "state.json").write_text(text)
    with pytest.raises(CheckpointError, match=r"run\.resume") as caught:
        find_newest(tmp_path)
    assert sentences(str(caught.value)) <= 3
    assert str(tmp_path) in str(caught.value)


def test_a_failed_conversion_says_what_to_do(tmp_path: Path) -> None:
    (tmp_path / "student").mkdir()
    with pytest.raises(CheckpointError, match="written by 2 ranks and could not be converted for 1") as caught:
        checkpoint.make_universal(checkpoint.Found(tmp_path, 2, 2, {}), Solo())
    assert sentences(str(caught.value)) <= 3 and "\n" not in str(caught.value)
    assert not (tmp_path / "universal").exists()
