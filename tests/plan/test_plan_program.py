"""`launch/plan.py` from its command line to its text."""

from __future__ import annotations

import json
import shutil
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from messages import refused
from zoo import build_recipe

from katds.cli import dump_recipe, load_recipe, merge
from katds.config import Recipe
from katds.core.lengths import FILE
from katds.plan.hardware import GPUS, find, read_profile, write_profile
from katds.plan.items import LEARN, ROLLOUT
from katds.plan.lengths import longest
from katds.plan.memory import memory
from katds.plan.planning import Wishes, make_job, make_plan
from katds.plan.reach import _one, reach
from katds.plan.report import Plan, as_json
from katds.plan.report import text as text_of
from katds.plan.scaling import MOST
from launch import plan as program


@pytest.fixture
def recipe_file(small: Recipe, tmp_path: Path) -> Path:
    file = tmp_path / "recipe.yaml"
    file.write_text(dump_recipe(small))
    return file


def run(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], *argv: str) -> str:
    monkeypatch.setattr(sys, "argv", ["launch/plan.py", *argv])
    program.main()
    return capsys.readouterr().out


def test_text_and_json_say_the_same(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], recipe_file: Path
) -> None:
    argv = ("--config", str(recipe_file), "--gpus", "8", "--gpu", "h200", "--rollout.slots", "3")
    text, record = run(monkeypatch, capsys, *argv), json.loads(run(monkeypatch, capsys, *argv, "--json"))
    assert "predicted, not measured" in text and "not modelled" in text and "3 slots" in text
    assert record["fits"] and record["ranks"] == 8 and record["predicted"]
    for moment, places in record["peaks"].items():
        own = sum(i["bytes"] for i in record["items"] if moment in i["moments"] and i["place"] == "device")
        assert places["device"] == own
    step = record["step"]
    assert step["total"] == pytest.approx(sum(step["seconds"].values()))
    assert record["scenarios"] == []


def test_weights_are_not_needed(small: Recipe, tmp_path: Path) -> None:
    """The folders hold nothing but config.json, and the prompts are elsewhere."""
    raw = small.model_dump(mode="json")
    for role in ("student", "teacher"):
        (tmp_path / role).mkdir()
        shutil.copy(Path(raw[role]["path"]) / "config.json", tmp_path / role)
        raw[role]["path"] = str(tmp_path / role)
    raw["data"]["train"] = str(tmp_path / "elsewhere.jsonl")
    plan = make_plan(Recipe.model_validate(raw), GPUS["h100"], Wishes(4))
    assert plan.fits and any("data.max_prompt_tokens, 32" in source for source in plan.sources)


def test_what_does_not_fit_is_said_with_what_would(small: Recipe) -> None:
    plan = make_plan(small, GPUS["h100"], Wishes(2))
    tiny = find("h100", None, None)
    needed = make_plan(small, type(tiny)(**{**vars(tiny), "device": "cpu"}), Wishes(2)).memory
    less = max(needed.at("loss"), needed.at("backward")) - 1
    short = make_plan(small, type(tiny)(**{**vars(tiny), "device": "cpu", "memory": less}), Wishes(2))
    assert not short.fits
    assert any("train.micro_batch_tokens" in line and "activations" in line for line in short.shortfalls)
    advised = {a.setting: a.value for a in plan.advice}
    again = small.model_copy(update={"rollout": small.rollout.model_copy(update={"slots": advised["rollout.slots"]})})
    assert make_plan(again, GPUS["h100"], Wishes(2)).fits


@pytest.mark.parametrize(("section", "setting", "fits"), [("rollout", "slots", 4), ("train", "micro_batch_tokens", 90)])
def test_advice_is_the_most_that_fits(small: Recipe, section: str, setting: str, fits: int) -> None:
    """On a device that has just as much as the setting needs."""

    def plan_with(value: int, **device: Any) -> Plan:
        values = getattr(small, section).model_copy(update={setting: value})
        profile = type(GPUS["h100"])(**{**vars(GPUS["h100"]), "device": "cpu", **device})
        return make_plan(small.model_copy(update={section: values}), profile, Wishes(2))

    moments = ROLLOUT if section == "rollout" else LEARN
    (chunk,) = (a.value for a in plan_with(fits).advice if a.setting == "rollout.chunk_tokens")
    small = small.model_copy(update={"rollout": small.rollout.model_copy(update={"chunk_tokens": chunk})})
    room = plan_with(fits).memory.peak(moments)[0]
    advised = {a.setting: a.value for a in plan_with(fits, memory=room).advice}[f"{section}.{setting}"]
    assert advised is not None and advised >= 0.8 * fits
    assert plan_with(advised).memory.peak(moments)[0] <= room


def test_what_is_suggested_fits_together(small: Recipe) -> None:
    """Where weights are slow to read a longer chunk is suggested, which takes memory from the slots."""
    toy = type(GPUS["h100"])(**{**vars(GPUS["h100"]), "device": "cpu", "bandwidth": 1e6})

    def plan_with(memory: int, **values: Any) -> Plan:
        rollout = small.rollout.model_copy(update={"chunk_tokens": 1, "slots": 4} | values)
        return make_plan(
            small.model_copy(update={"rollout": rollout}), type(toy)(**{**vars(toy), "memory": memory}), Wishes(2)
        )

    room = plan_with(toy.memory).memory.peak(ROLLOUT)[0] * 3 // 2
    advised = {a.setting.partition(".")[2]: a.value for a in plan_with(room).advice}
    assert advised["chunk_tokens"] is not None and advised["chunk_tokens"] > 16 and advised["slots"] is not None
    values = {key: advised[key] for key in ("chunk_tokens", "slots")}
    assert plan_with(room, **values).memory.peak(ROLLOUT)[0] <= room


@pytest.mark.parametrize(
    ("sections", "told"),
    [
        ({"behaviour": {"kind": "teacher_prefix"}}, "what the teacher writes itself is that of the first step"),
        ({"objective": {"kind": "topd"}}, "what the teacher writes itself is that of the first step"),
        ({"objective": {"kind": "cross_tokenizer"}}, "1.00 tokens of the teacher for one of the student"),  # they have one tokenizer
    ],
)  # fmt: skip
def test_what_is_taken_of_the_teacher_is_told(small: Recipe, sections: dict[str, Any], told: str) -> None:
    usual = {"teacher": {"gather": "once"}, "rollout": {"top_p": 1.0}}
    plain, other = (
        make_plan(Recipe.model_validate(merge(small.model_dump(mode="json"), each)), GPUS["h100"], Wishes(2))
        for each in (usual, usual | sections)
    )
    assert not any(told in source for source in plain.sources)
    assert any(told in source for source in other.sources)


def test_recorded_lengths(small: Recipe, tmp_path: Path) -> None:
    """A run that halves every rollout, and what its audit rollouts say of those that it did not end."""
    ended, natural = tmp_path / "kat", tmp_path / "never"
    for folder, length, reason in ((ended, 12, "kat"), (natural, 24, "length")):
        (folder / "rollouts").mkdir(parents=True)
        line = {"step": 0, "lengths": [length] * 4, "kept": [length] * 4, "reasons": [reason] * 4}
        (folder / FILE).write_text(json.dumps(line) + "\n")
    wishes = Wishes(2, ended, natural, scales=(1, 2, 1024))
    plan = make_plan(small, GPUS["h100"], wishes)
    times = {(s.ranks, s.name): s.seconds for s in plan.scenarios}
    assert all(max(times[n, "with the rule"]) < min(times[n, "without"]) for n in (1, 2, 1024))
    assert {len(seconds) for (ranks, _), seconds in times.items() if ranks == 1} == {MOST}
    assert {s.rollouts for s in plan.scenarios if s.ranks == 1024} == {6 * 1024}
    long = small.rollout.max_new_tokens
    for factor, (rule, free) in {0.5: (6, 12), 1.0: (12, 24), 50.0: (long, long), 0.001: (1, 1)}.items():
        plan = make_plan(small, GPUS["h100"], Wishes(2, ended, natural, factor, scales=(1,)))
        written, kept = plan.job.drawn
        assert set(kept) == {rule} and set(written) == {rule, free}
        assert any(f"{factor:g} times as long, at most {long}" in source for source in plan.sources)
    refused(lambda: make_plan(small, GPUS["h100"], Wishes(2, stretch=2.0)), "--stretch", "--lengths")
    strong = make_plan(small, GPUS["h100"], Wishes(2, ended, natural, weak=False, scales=(1, 4)))
    assert {s.rollouts for s in strong.scenarios} == {12}
    unruled = make_plan(small, GPUS["h100"], Wishes(2, natural, scales=(1,)))
    assert [s.name for s in unruled.scenarios] == ["as recorded"]
    refused(lambda: make_plan(small, GPUS["h100"], Wishes(2, ended)), "--natural", "audit")
    sample: dict[str, Any] = {"audit": True, "tokens": 20}
    torn = json.dumps(sample)[:9]  # of a run that was killed
    (ended / "rollouts" / "step-000000.jsonl").write_text(json.dumps(sample) + "\n" + torn)
    plan = make_plan(small, GPUS["h100"], Wishes(2, ended, scales=(1,)))
    assert any("1 audit rollouts" in source for source in plan.sources)
    # A quarter of the twelve rollouts is in the audit group; the learner keeps what the rule would have kept.
    assert plan.job.drawn == ([20] * 3 + [12] * 9, [12] * 12)
    refused(lambda: make_plan(small, GPUS["h100"], Wishes(2, tmp_path / "none")), "--lengths", FILE)
    refused(lambda: make_plan(small, GPUS["h100"], Wishes(2, None, natural)), "--natural", "--lengths")
    refused(
        lambda: make_plan(small, GPUS["h100"], Wishes(2, natural, ended)), "--natural", str(ended), "stop.kind never"
    )
    late = make_plan(small, GPUS["h100"], Wishes(2, natural, natural, scales=(1,)))  # the rule has not ended any yet
    assert [s.name for s in late.scenarios] == ["with the rule", "without"]


def test_a_measured_profile_says_of_what_it_knows_nothing(small: Recipe, tmp_path: Path) -> None:
    measured = replace(GPUS["h100"], measured_ranks=8, measured_nodes=1)
    for profile, ranks, told in (
        (GPUS["h100"], 16, None), (measured, 8, None), (measured, 16, "measured on one node"),
        (replace(measured, measured_nodes=2), 16, None), (replace(measured, measured_ranks=1), 2, "measured on one rank"),
    ):  # fmt: skip
        warnings = [
            source for source in make_plan(small, profile, Wishes(ranks)).sources if source.startswith("warning")
        ]
        assert len(warnings) == (told is not None) and all(told in each for each in warnings)


def test_sizes_that_do_not_fit_are_marked(small: Recipe, tmp_path: Path) -> None:
    """A device that has room for a share of the states, and not for the whole of them."""
    line = {"step": 0, "lengths": [12] * 4, "kept": [12] * 4, "reasons": ["length"] * 4}
    (tmp_path / FILE).write_text(json.dumps(line) + "\n")
    roomy = replace(GPUS["h100"], device="cpu")
    job, samples = make_plan(small, roomy, Wishes(4, tmp_path, scales=(4,))).job, small.rollout.samples_per_prompt
    sizes = (job.on(n).with_settings("rollout", prompts_per_step=job.rollouts * n // samples) for n in (1, 4))
    whole, part = (memory(each).peak((*ROLLOUT, *LEARN))[0] for each in sizes)
    assert part < whole
    plan = make_plan(small, replace(roomy, memory=(whole + part) // 2), Wishes(4, tmp_path, scales=(1, 4)))
    assert [(s.ranks, s.fits) for s in plan.scenarios] == [(1, False), (4, True)]
    assert [s["fits"] for s in as_json(plan)["scenarios"]] == [False, True]
    assert [
        line.endswith("does not fit") for line in text_of(plan).splitlines() if line.lstrip()[:2] in ("1 ", "4 ")
    ] == [True, False]


def test_what_a_run_would_refuse_is_refused(small: Recipe) -> None:
    def with_ranks(ranks: int, gpus_per_node: int = 8, **sections: Any) -> Plan:
        recipe = Recipe.model_validate(merge(small.model_dump(mode="json"), sections))
        return make_plan(recipe, find("h100", None, gpus_per_node), Wishes(ranks))

    refused(lambda: with_ranks(3, train={"sequence_parallel": 2}), "train.sequence_parallel is 2", "3 ranks")
    refused(lambda: with_ranks(4, train={"sequence_parallel": 4}), "train.sequence_parallel is 4", "2 key heads")
    refused(lambda: with_ranks(6, teacher={"shard": 4}), "teacher.shard is 4", "6 ranks")
    refused(lambda: with_ranks(6, 4, teacher={"shard": "node"}), "teacher.shard is node", "blocks of 4")
    assert with_ranks(6, 4).fits and with_ranks(8, 4, teacher={"shard": "node"}).fits


def test_sizes_that_a_recipe_cannot_run_on_are_left_out(small: Recipe, tmp_path: Path) -> None:
    line = {"step": 0, "lengths": [9] * 4, "kept": [9] * 4, "reasons": ["length"] * 4}
    (tmp_path / FILE).write_text(json.dumps(line) + "\n")
    recipe = Recipe.model_validate(merge(small.model_dump(mode="json"), {"train": {"sequence_parallel": 2}}))
    plan = make_plan(recipe, GPUS["h100"], Wishes(2, tmp_path, scales=(1, 2, 4)))
    assert [s.ranks for s in plan.scenarios] == [2, 4]


def test_several_draws_say_how_far_one_may_be_off(small: Recipe, tmp_path: Path) -> None:
    """Of lengths that vary; the same each time that it is asked."""
    lengths = [2, 3, 24, 24]
    line = {"step": 0, "lengths": lengths, "kept": lengths, "reasons": ["length"] * 4}
    (tmp_path / FILE).write_text(json.dumps(line) + "\n")
    plans = [make_plan(small, GPUS["h100"], Wishes(2, tmp_path, scales=(1, 16))) for _ in range(2)]
    (few, many), (again, _) = (plan.scenarios for plan in plans)
    assert few.seconds == again.seconds and len(set(few.seconds)) > 1
    spread = [(max(s.seconds) - min(s.seconds)) / min(s.seconds) for s in (few, many)]
    assert spread[1] < spread[0]
    assert as_json(plans[0])["scenarios"][0]["draws"] == few.seconds


def test_a_sweep_has_a_row_for_every_combination(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], recipe_file: Path
) -> None:
    argv = ["--config", str(recipe_file), "--gpus", "2", "--gpu", "h100", "--sweep", "train.sequence_parallel=1,2,4"]
    argv += ["--sweep", "train.activation_checkpointing=false,true"]
    rows = json.loads(run(monkeypatch, capsys, *argv, "--json"))
    values = [tuple(row["values"].values()) for row in rows]
    assert values == [(size, checkpointing) for size in ("1", "2", "4") for checkpointing in ("false", "true")]
    plain, checkpointed, shared = rows[0], rows[1], rows[2]
    assert "4" in rows[4]["refused"] and not plain["refused"]
    assert plain["reach"]["per_token"] > checkpointed["reach"]["per_token"] > 0
    assert (
        plain["reach"]["learnt"] < checkpointed["reach"]["learnt"]
        and plain["reach"]["learnt"] < shared["reach"]["learnt"]
    )
    alone = make_plan(load_recipe(["--config", str(recipe_file)], "p", "d"), GPUS["h100"], Wishes(2))
    assert plain["learning"] == alone.memory.peak(LEARN)[0] and plain["step"]["seconds"] == alone.step.seconds
    text = run(monkeypatch, capsys, *argv)
    assert "refused" in text and f"{plain['reach']['learnt']:,}" in text
    refused(lambda: run(monkeypatch, capsys, *argv[:6], "--sweep", "rollout.slots"), "--sweep", "rollout.slots")


def test_a_sweep_says_what_it_does_not_count(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path, small: Recipe
) -> None:
    """Once below the table, as a plan does; what is so of some rows alone, with them."""
    files = [tmp_path / name for name in ("one.json", "two.json")]
    for file, more in zip(files, ({}, {"reduce_scatter": False}), strict=True):
        file.write_text(json.dumps({"zero_optimization": {"stage": 3, "memory_efficient_linear": False, **more}}))
    recipe, student = tmp_path / "recipe.yaml", small.student.model_copy(update={"deepspeed": files[0]})
    recipe.write_text(dump_recipe(small.model_copy(update={"student": student})))
    argv = ["--config", str(recipe), "--gpus", "2", "--gpu", "h100"]
    plain = [line for line in run(monkeypatch, capsys, *argv).splitlines() if line.startswith("not ")]
    assert len(plain) == 2 and "memory_efficient_linear" in plain[0] and plain[1].startswith("not modelled")
    slots = run(monkeypatch, capsys, *argv, "--sweep", "rollout.slots=1,2").splitlines()
    assert slots[-2:] == plain and not any("not counted" in line for line in slots[:-2])
    argv += ["--sweep", f"student.deepspeed={','.join(map(str, files))}"]
    *_, counted, other, last = run(monkeypatch, capsys, *argv).splitlines()
    assert [counted, last] == plain and other.startswith(f"{files[1]}: not counted: reduce_scatter")
    rows = json.loads(run(monkeypatch, capsys, *argv, "--json"))
    assert [len(row["left_out"]) for row in rows] == [1, 2]


def test_the_longest_rollout_just_fits(small: Recipe) -> None:
    """By the plan of a rank that has one rollout; one twice as long does not."""
    profile = type(GPUS["h100"])(**{**vars(GPUS["h100"]), "device": "cpu", "memory": 40_000_000})
    job = make_job(small, profile, 2, longest(small))
    found = reach(job, profile)
    assert found.learnt is not None and found.written is not None
    for tokens, phase, moments in ((found.learnt, "learn", LEARN), (found.written, "rollout", ROLLOUT)):
        sizes = [memory(_one(job, round(share * tokens)), (phase,)).peak(moments)[0] for share in (0.95, 1.05)]
        assert sizes[0] <= profile.usable < sizes[1]
    nothing = reach(job, replace(profile, memory=1000))
    assert nothing.learnt is None and nothing.written is None


def test_profiles(tmp_path: Path) -> None:
    file = tmp_path / "here.json"
    write_profile(GPUS["l40s"], file)
    assert read_profile(file) == GPUS["l40s"] and find(None, file, 4).devices == 4
    file.write_text(json.dumps({"name": "x"}))
    refused(lambda: read_profile(file), "--profile", "bandwidth")
    mistakes: list[tuple[dict[str, Any], str]] = [
        ({"memory": "80GB"}, "must be numbers"),
        ({"flops": float("nan")}, "must be numbers"),
        ({"device": "tpu"}, "'tpu'"),
        ({"host_link": 0}, "above 0"),
    ]
    for change, said in mistakes:
        file.write_text(json.dumps(vars(GPUS["l40s"]) | change))
        refused(lambda: read_profile(file), "--profile", said)
    refused(lambda: find("h300", None, None), "--gpu", "h300", "h200")
    refused(lambda: find(None, None, None), "--gpu", "--profile")


def test_a_folder_that_is_no_model(small: Recipe, tmp_path: Path) -> None:
    raw = build_recipe(tmp_path, "x")
    raw["student"]["path"] = str(tmp_path)
    refused(lambda: make_plan(Recipe.model_validate(raw), GPUS["h100"], Wishes(1)), "student.path", str(tmp_path))


def test_measures_this_machine(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path, recipe_file: Path
) -> None:
    from ranks import run_ranks

    file = tmp_path / "machine.json"
    run_ranks(2, _measured, file)
    profile = read_profile(file)
    assert profile.device == "cpu" and profile.devices == profile.measured_ranks == 2 and profile.measured_nodes == 1
    assert 1e8 < profile.flops < 1e13 and 1e8 < profile.bandwidth < 1e12 and 1e6 < profile.inside < 1e12
    text = run(monkeypatch, capsys, "--config", str(recipe_file), "--gpus", "2", "--profile", str(file))
    assert "measured on 2 ranks" in text


def _measured(file: Path) -> None:
    from katds.plan.measure import measure

    profile = measure()
    if profile is not None and _is_main():
        write_profile(profile, file)


def _is_main() -> bool:
    import os

    return os.environ["RANK"] == "0"
