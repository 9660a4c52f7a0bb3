"""Every way to end rollouts in a whole run on two ranks: what it promises shows in the records, which agree with the rollouts."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
from outside import Likelihood, TokenRule
from ranks import run_ranks
from test_whole_runs import refusal, rollouts_of
from whole_runs import full_run, records, train
from zoo import build_recipe, shared_folder

from katds.cli import load_recipe
from katds.config import Recipe
from katds.core import lengths
from katds.core.objectives import OBJECTIVES
from katds.core.stop import STOP_RULES
from katds.inputs import identity, read_inputs

STEPS = 3
LOOPS = {"kind": "repetition", "max_period": 4, "repeats": 2, "min_tokens": 2}
# The stop section, of which `kat` is laid on that of `build_recipe`; and the reasons that must be seen.
WAYS: dict[str, tuple[dict[str, Any], set[str]]] = {
    "agreement": ({"kind": "kat", "supervise": "agreement"}, {"kat"}),
    "after": ({"kind": "kat", "supervise": "after"}, set()),
    "growing": ({"kind": "prefix", "tokens": 14, "grow_from": 4}, {"prefix"}),
    "random": ({"kind": "random", "max_tokens": 20}, {"random"}),
    "repetition": (LOOPS, {"repetition"}),
    "replay": ({"kind": "replay"}, {"replay"}),
    "first_of": ({"kind": "first_of", "rules": [{"kind": "kat"}, {"kind": "prefix", "tokens": 20}]}, {"kat", "prefix"}),
}


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return shared_folder(tmp_path_factory)


def short_run(base: Path, root: Path, stop: dict[str, Any], **changes: Any) -> tuple[Path, list[dict[str, Any]]]:
    """Folder and rollouts of a run with this rule, without evaluations and checkpoints on the way."""
    full_run(base, 2)  # makes the models
    recipe = build_recipe(
        base, "short", evaluation={"data": None}, checkpoint={"every": 0, "export": False}, run={"folder": str(root)},
        **changes,
    )  # fmt: skip
    recipe["train"]["steps"] = STEPS
    recipe["stop"] = filled(stop, recipe["stop"])
    return root / "short", json.loads(json.dumps(train(2, recipe)))


def filled(stop: dict[str, Any], kat: dict[str, Any]) -> dict[str, Any]:
    if "rules" in stop:
        return stop | {"rules": [filled(rule, kat) for rule in stop["rules"]]}
    return kat | stop if stop["kind"] == "kat" else stop


@pytest.mark.parametrize("way", WAYS)
def test_a_whole_run(base: Path, tmp_path: Path, way: str) -> None:
    stop, expected = WAYS[way]
    recorded, _ = full_run(base, 2)
    stop = stop | ({"run": str(recorded)} if way == "replay" else {})
    folder, ranks = short_run(base, tmp_path, stop)
    steps = [record for record in records(folder) if "loss/total" in record]
    assert len(steps) == STEPS and all(math.isfinite(record["loss/total"]) for record in steps)
    assert_recorded(folder, ranks, steps)
    seen = {reason for step in range(STEPS) for _, _, reason in rollouts_of(ranks, step).values()}
    assert seen - {"eos", "length"} == expected
    for name in ("kat/threshold", "kat/min_window"):
        assert (name in steps[-1]) == (way in ("agreement", "after", "first_of"))
    SPECIAL.get(way, lambda *_: None)(ranks, steps, recorded)


def test_a_run_whose_rule_and_loss_read_the_teacher_s_top_k(base: Path, tmp_path: Path) -> None:
    folder, ranks = short_run(
        base, tmp_path, {"kind": "kat", "support": "teacher_top_k"},
        objective={"kind": "reverse_kl", "support": "teacher_top_k"},
    )  # fmt: skip
    steps = [record for record in records(folder) if "loss/total" in record]
    assert_recorded(folder, ranks, steps)
    assert steps[-1]["stop/kat"] > 0 and all(record["loss/total"] > 0 for record in steps)


def assert_recorded(folder: Path, ranks: list[dict[str, Any]], steps: list[dict[str, Any]]) -> None:
    """metrics.jsonl and lengths.jsonl against the rollouts themselves."""
    for step, (record, line) in enumerate(zip(steps, lengths.read(folder), strict=True)):
        written = {int(id): facts for id, facts in rollouts_of(ranks, step).items()}
        shares = {key: value for key, value in record.items() if key.startswith("stop/")}
        reasons = [reason for _, _, reason in written.values()]
        assert shares == {key: pytest.approx(reasons.count(key.removeprefix("stop/")) / len(reasons)) for key in shares}
        assert sum(shares.values()) == pytest.approx(1), "a reason has no metric"
        ruled = [written[id] for id in sorted(written) if id % 4 != 3]  # zoo's audit group
        assert line.lengths == [len(ids) for ids, _, _ in ruled]
        assert (line.kept, line.reasons) == ([kept for _, kept, _ in ruled], [reason for *_, reason in ruled])


def check_growing(ranks: list[dict[str, Any]], steps: list[dict[str, Any]], recorded: Path) -> None:
    for step, tokens in enumerate((4, 9, 14)):
        written = rollouts_of(ranks, step).values()
        assert {len(ids) for ids, _, reason in written if reason == "prefix"} == {tokens}
        assert max(kept for _, kept, _ in written) == tokens


def check_after(ranks: list[dict[str, Any]], steps: list[dict[str, Any]], recorded: Path) -> None:
    """Nothing is ended, and the loss leaves something out."""
    kept = [sum(kept for _, kept, _ in rollouts_of(ranks, step).values()) for step in range(STEPS)]
    assert all(record["rollout/kept_mean"] == record["rollout/length_mean"] for record in steps)
    assert steps[0]["train/tokens"] == kept[0] and sum(record["train/tokens"] for record in steps) < sum(kept)


def check_replay(ranks: list[dict[str, Any]], steps: list[dict[str, Any]], recorded: Path) -> None:
    """Three steps in a record of four: the first, the third and the last."""
    record = lengths.read(recorded)
    for step, source in enumerate((0, 2, 3)):
        fates = set(zip(record[source].lengths, record[source].kept, record[source].reasons, strict=True))
        for ids, kept, reason in rollouts_of(ranks, step).values():
            assert reason != "replay" or (len(ids), kept, "kat") in fates


SPECIAL = {"growing": check_growing, "after": check_after, "replay": check_replay}


def test_a_missing_record_ends_the_run_before_it_begins(base: Path, tmp_path: Path) -> None:
    full_run(base, 2)
    recipe = build_recipe(base, "none", run={"folder": str(tmp_path)})
    recipe["stop"] = {"kind": "first_of", "rules": [LOOPS, {"kind": "replay", "run": str(tmp_path)}]}
    ((kind, message),) = run_ranks(1, refusal, recipe)
    assert kind == "ConfigError" and message.startswith(f"stop.rules[1].run: {tmp_path / lengths.FILE} cannot be read.")
    assert not (tmp_path / "none").exists()


@pytest.mark.parametrize("among_others", [False, True])
def test_a_record_may_move_but_not_change_when_a_run_is_resumed(base: Path, tmp_path: Path, among_others: bool) -> None:
    full_run(base, 2)
    known = []
    for name, length in (("a", 5), ("b", 5), ("c", 6)):
        (tmp_path / name).mkdir()
        (tmp_path / name / lengths.FILE).write_text(lengths.StepLengths([length], [3], ["kat"]).line(0))
        recipe = build_recipe(base, "any")
        replay = {"kind": "replay", "run": str(tmp_path / name)}
        recipe["stop"] = {"kind": "first_of", "rules": [LOOPS, replay]} if among_others else replay
        made = Recipe.model_validate(recipe)
        known.append(identity(made, read_inputs(made)))
    assert known[0] == known[1]
    assert {key for key in known[0] if known[0][key] != known[2][key]} == {"stop (contents)"}
    if among_others:
        assert known[0]["stop.rules[1].kind"] == "replay" and known[0]["stop.rules[0].repeats"] == 2


def test_methods_from_outside_the_package(
    base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """A file and a line each: recipes, flags, help and the run know them, also inside of first_of."""
    monkeypatch.setitem(STOP_RULES, "token", TokenRule)
    monkeypatch.setitem(OBJECTIVES, "likelihood", Likelihood)
    with pytest.raises(SystemExit):
        load_recipe(["--help"], "p", "d")
    assert "--stop.modulus" in (text := capsys.readouterr().out) and "objective.kind likelihood" in text

    objective = {"objective": {"kind": "likelihood"}, "rollout": {"top_p": 1.0}}
    rules = [{"kind": "token", "modulus": 9}, {"kind": "prefix", "tokens": 6}]
    folder, ranks = short_run(base, tmp_path, {"kind": "first_of", "rules": rules}, **objective)
    steps = [record for record in records(folder) if "loss/total" in record]
    assert_recorded(folder, ranks, steps)
    seen = [rollout for step in range(STEPS) for rollout in rollouts_of(ranks, step).values()]
    assert {reason for *_, reason in seen} >= {"token", "prefix"}
    for ids, kept, reason in seen:
        assert reason != "token" or (ids[-1] % 9 == 0 and kept == len(ids) - 1)
    assert all(record["loss/total"] > 0 for record in steps)
