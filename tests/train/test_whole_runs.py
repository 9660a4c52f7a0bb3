"""A whole run through `katds.run`: the same on every number of ranks, and written down as promised (DESIGN sections 6, 8)."""

from __future__ import annotations

import json
import math
import os
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from deepspeed.utils.zero_to_fp32 import get_fp32_state_dict_from_zero_checkpoint
from ranks import run_ranks
from safetensors.torch import load_file
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig
from watching import charts, pages
from whole_runs import full_run, rankless, records, train, weights
from zoo import build_recipe, deepspeed_json, shared_folder

from katds import evaluate as evaluation
from katds import run
from katds.config import Recipe
from katds.errors import ConfigError, KatdsError
from katds.parallel.agree import together
from katds.parallel.world import start_world

STEPS, PER_STEP, AUDITED = 4, 12, 3


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return shared_folder(tmp_path_factory)


def rollouts_of(ranks: list[dict[str, Any]], step: int) -> dict[str, Any]:
    """id -> tokens, kept, reason, over all ranks."""
    merged: dict[str, Any] = {}
    for rank in ranks:
        merged |= rank[str(step)]["rollouts"]
    return merged


def test_threshold_is_bit_equal_on_all_ranks_and_runs_agree(base: Path) -> None:
    folders, ranks = zip(*(full_run(base, size) for size in (1, 2, 4)), strict=True)
    for size, seen in zip((1, 2, 4), ranks, strict=True):
        assert len(seen) == size
        for rank in seen:
            assert [s["kat"] for s in rank.values()] == [s["kat"] for s in seen[0].values()]
        assert sum(len(rank["3"]["rollouts"]) > 0 for rank in seen) > size / 2, "the ranks did not share the work"
    for step in range(STEPS):
        alone = rollouts_of(ranks[0], step)
        assert len(alone) == PER_STEP
        assert all(rollouts_of(seen, step) == alone for seen in ranks[1:])
    assert any(reason == "kat" for _, _, reason in rollouts_of(ranks[0], 3).values()), (
        "nothing was cut: the test is idle"
    )
    for other in folders[1:]:
        for one, two in zip(records(folders[0]), records(other), strict=True):
            assert rankless(two) == pytest.approx(
                rankless(one), rel=1e-4
            )  # logits of other batches are rounded otherwise
        for name, value in weights(folders[0]).items():
            assert (weights(other)[name] - value).abs().max() < 1e-6, name


def test_threshold_by_hand(base: Path) -> None:
    """The last threshold is the upper quantile of the queue in the checkpoint, and every entry has its rollout."""
    folder, ranks = full_run(base, 2)
    state = json.loads((folder / "checkpoints" / "step-4" / "state.json").read_text())["rule"]
    ordered = sorted(state["minima"])
    at = (len(ordered) - 1) * 0.7
    below = ordered[int(at)] + (ordered[math.ceil(at)] - ordered[int(at)]) * (at % 1)
    assert float.fromhex(ranks[0]["3"]["kat"]["kat/threshold"]) == pytest.approx(below, rel=1e-12)
    written = [r for step in range(STEPS) for r in rollouts_of(ranks, step).values()]
    assert len(ordered) == min(32, sum(reason != "kat" and len(ids) >= 4 for ids, _, reason in written))


def test_records_agree_with_the_rollouts(base: Path) -> None:
    folder, ranks = full_run(base, 2)
    steps = [record for record in records(folder) if "loss/total" in record]
    assert [record["step"] for record in steps] == list(range(STEPS))
    for step, record in enumerate(steps):
        written = list(rollouts_of(ranks, step).values())
        reasons = Counter(reason for _, _, reason in written)
        assert record["train/tokens"] == sum(kept for _, kept, _ in written)
        assert record["rollout/length_mean"] == pytest.approx(sum(len(ids) for ids, _, _ in written) / PER_STEP)
        assert record["rollout/kept_mean"] == pytest.approx(sum(kept for _, kept, _ in written) / PER_STEP)
        assert record["rollout/terminated_fraction"] == pytest.approx(reasons["kat"] / PER_STEP)
        assert {k: v for k, v in record.items() if k.startswith("stop/")} == {
            f"stop/{reason}": pytest.approx(reasons[reason] / PER_STEP) for reason in ("eos", "length", "kat")
        }
    phases = ("rollout", "learn", "report")
    for record in steps:
        wall = sum(record[f"time/{phase}"] for phase in phases)
        rate = record["rollout/length_mean"] * PER_STEP / wall
        assert record["throughput/rollout_tokens_per_second"] == pytest.approx(rate)
    # Two warm-up steps, then half a cosine.
    assert [record["train/lr"] for record in steps] == pytest.approx([5e-4, 1e-3, 1e-3, 5e-4])


def test_tensorboard_holds_metrics_jsonl(base: Path) -> None:
    folder, _ = full_run(base, 2)
    assert_same_as_tensorboard(folder)
    evaluated = [record for record in records(folder) if "eval/avg@2" in record]
    assert [record["step"] for record in evaluated] == [0, 2, 4]
    drawn = [tag for category in charts(folder).values() for tags in category.values() for tag in tags]
    assert sorted(drawn) == sorted({tag for record in records(folder) for tag in record} - {"step"})
    samples = (json.loads(line) for line in (folder / "rollouts" / "step-000003.jsonl").read_text().splitlines())
    text = pages(folder)[STEPS - 1]
    assert (
        all(f"rollout {row['id']} (audit)" in text or not row["audit"] for row in samples) and text.count("<h4>") == 4
    )


def assert_same_as_tensorboard(folder: Path) -> None:
    events = EventAccumulator(str(folder), size_guidance={"scalars": 0})
    events.Reload()
    shown = {(tag, e.step): e.value for tag in events.Tags()["scalars"] for e in events.Scalars(tag)}
    count = sum(len(events.Scalars(tag)) for tag in events.Tags()["scalars"])
    written = {(tag, r["step"]): v for r in records(folder) for tag, v in r.items() if tag != "step"}
    assert count == len(shown), "TensorBoard shows a step twice"
    assert shown == pytest.approx(written, rel=1e-6)


def test_rollout_samples(base: Path) -> None:
    folder, ranks = full_run(base, 2)
    files = sorted((folder / "rollouts").iterdir())
    assert [file.name for file in files] == [f"step-{step:06d}.jsonl" for step in range(STEPS)]
    cuts = 0
    for step, file in enumerate(files):
        rows = [json.loads(line) for line in file.read_text().splitlines()]
        assert len(rows) == 4  # run.rollout_samples
        for row in rows:
            ids, kept, reason = ranks[0][str(step)]["rollouts"][str(row["id"])]
            assert (row["tokens"], row["kept"], row["reason"]) == (len(ids), kept, reason)
            assert len(row["response"].split()) == row["tokens"] == len(row["kl"]) and min(row["kl"]) > -1e-4
            assert (
                "".join(row["pieces"]) == row["response"]
                and [p.strip() for p in row["pieces"]] == row["response"].split()
            )
            assert row["right"] is None if row["reason"] == "kat" else row["right"] in (True, False)
            assert row["prompt"].startswith("<user>") and row["prompt"].endswith("<assistant>")
            assert row["audit"] is False or row["reason"] != "kat"
            assert row["cut_at"] is None or row["kept"] == row["cut_at"] - 5  # window 4, persistence 2, stride 1
            cuts += row["cut_at"] is not None
    assert cuts > 0


@pytest.mark.parametrize("size", [1, 2])
def test_timeline_agrees_with_the_times_of_metrics(base: Path, size: int) -> None:
    """Evaluations follow the steps 2 and 4, checkpoints as well; the phases of a rank neither overlap nor leave its step."""
    folder, _ = full_run(base, size)
    lines = [json.loads(line) for line in (folder / "timeline.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == list(range(STEPS))
    begins = [line["began"] for line in lines]
    steps = [record for record in records(folder) if "loss/total" in record]
    for line, following, record in zip(lines, [*begins[1:], math.inf], steps, strict=True):
        assert list(line["ranks"]) == list(line["parts"]) == [str(rank) for rank in range(size)]
        for phases in line["ranks"].values():
            after = ["evaluation", "checkpoint"] if line["step"] % 2 else []
            assert [name for name, _, _ in phases] == ["rollout", "learn", "report", *after]
            times = [time for _, begin, end in phases for time in (begin, end)]
            assert times == sorted(times) and times[0] >= 0
        assert line["began"] + line["ranks"]["0"][-1][-1] <= following + 0.001  # both are rounded
        for name, begin, end in line["ranks"]["0"][:3]:
            assert end - begin == pytest.approx(record[f"time/{name}"], abs=2e-4)
        nested = {
            f"time/{path}": seconds
            for path, seconds in line["parts"]["0"].items()
            if path.startswith(("rollout", "learn"))
        }
        assert nested == pytest.approx({k: v for k, v in record.items() if k.count("/") > 1}, abs=2e-4)


def test_run_folder_and_summary(base: Path) -> None:
    folder, ranks = full_run(base, 2)
    names = sorted(path.name for path in folder.iterdir() if not path.name.startswith("events.out.tfevents"))
    assert names == [
        "checkpoints",
        "config.yaml",
        "final",
        "lengths.jsonl",
        "metrics.jsonl",
        "rollouts",
        "summary.json",
        "timeline.jsonl",
    ]
    assert sorted(path.name for path in (folder / "checkpoints").iterdir()) == ["step-2", "step-4"]
    recipe = yaml.safe_load((folder / "config.yaml").read_text())
    assert recipe["train"]["steps"] == 4 and recipe == yaml.safe_load(
        (folder / "checkpoints/step-4/config.yaml").read_text()
    )

    summary = json.loads((folder / "summary.json").read_text())
    assert summary.keys() == {
        "steps", "ranks", "before", "after", "rollouts", "rollout_tokens", "prefix_tokens", "kept_tokens", "learned_tokens", "length_mean",
        "saved_fraction",
        "saved_fraction_since_first_termination", "saved_fraction_paired", "terminated_share",
        "terminated_share_since_first_termination", "false_termination_share", "audit_rollouts", "audit_cut_graded", "threshold", "seconds",
        "training_seconds", "decoded_tokens", "rollout_tokens_per_second", "rollout_tokens_per_second_and_rank", "peak_memory_bytes",
        "device", "versions",
    }  # fmt: skip
    written = [r for step in range(STEPS) for r in rollouts_of(ranks, step).values()]
    tokens, cut = sum(len(ids) for ids, _, _ in written), sum(reason == "kat" for _, _, reason in written)
    assert (summary["steps"], summary["ranks"], summary["rollouts"]) == (STEPS, 2, STEPS * PER_STEP)
    assert (summary["rollout_tokens"], summary["kept_tokens"]) == (tokens, sum(kept for _, kept, _ in written))
    assert summary["learned_tokens"] == summary["kept_tokens"]  # no holes, and an objective that leaves nothing out
    assert summary["audit_rollouts"] == STEPS * AUDITED
    assert summary["terminated_share"] == pytest.approx(cut / len(written))
    later = [r for step in range(1, STEPS) for r in rollouts_of(ranks, step).values()]  # the first step cannot cut
    assert summary["terminated_share_since_first_termination"] == pytest.approx(cut / len(later))
    last = [record for record in records(folder) if "loss/total" in record][-1]
    assert summary["threshold"] == last["kat/threshold"]
    assert summary["saved_fraction"] == pytest.approx(last["rollout/saved_fraction_total"])
    evaluated = [record for record in records(folder) if "eval/avg@2" in record]
    for scores, record in ((summary["before"], evaluated[0]), (summary["after"], evaluated[-1])):
        assert {f"eval/{key}": value for key, value in scores.items()} | {"step": record["step"]} == record
    loop = sum(summary["seconds"][phase] for phase in ("rollout", "learn", "report"))
    assert summary["training_seconds"] == pytest.approx(loop, abs=0.002)
    assert summary["rollout_tokens_per_second_and_rank"] == pytest.approx(tokens / summary["training_seconds"] / 2)


def test_final_model_is_the_trained_student(base: Path) -> None:
    """Against DeepSpeed's own reading of the last checkpoint. That it gives the student's logits is proved in test_view."""
    folder, _ = full_run(base, 2)
    recipe = json.loads((base / "recipe.json").read_text())
    final, loading = AutoModelForCausalLM.from_pretrained(
        folder / "final", dtype=torch.float32, output_loading_info=True
    )
    assert not any(loading.values()), loading
    checkpoint = get_fp32_state_dict_from_zero_checkpoint(str(folder / "checkpoints" / "step-4"), tag="student")
    trained = {name.removeprefix("model."): value for name, value in checkpoint.items()}
    start = AutoModelForCausalLM.from_pretrained(recipe["student"]["path"], dtype=torch.float32)
    for name, _ in start.named_parameters():
        assert torch.equal(final.get_parameter(name), trained[name]), name
    assert any((trained[name] - value).abs().max() > 1e-4 for name, value in start.named_parameters())
    assert "lm_head.weight" not in load_file(folder / "final" / "model.safetensors"), "tied weights are stored once"
    assert final.lm_head.weight is final.model.embed_tokens.weight
    assert final.config.to_diff_dict() | {"_name_or_path": ""} == start.config.to_diff_dict() | {"_name_or_path": ""}
    ours, theirs = (AutoTokenizer.from_pretrained(path) for path in (folder / "final", recipe["student"]["path"]))
    assert ours.get_vocab() == theirs.get_vocab() and ours.chat_template == theirs.chat_template
    assert GenerationConfig.from_pretrained(folder / "final").eos_token_id == theirs.eos_token_id


def test_a_run_with_other_options(tmp_path: Path) -> None:
    """bf16, full-vocabulary loss, prefix cuts, two updates a step, recomputed activations, no answers, no samples."""
    recipe = build_recipe(
        tmp_path, "other",
        stop={}, objective={"kind": "jsd"},
        data={"answer_column": None}, evaluation={"data": None}, run={"rollout_samples": 0},
        checkpoint={"every": 1, "keep": 1},
    )  # fmt: skip
    recipe["stop"] = {"kind": "prefix", "tokens": 9}
    recipe["train"] |= {"steps": 2, "minibatches": 2, "activation_checkpointing": True}
    recipe["train"]["optimizer"] = {"lr": 1e-2, "warmup_fraction": 0.0, "gradient_clip": None}
    (tmp_path / "zero3.json").write_text(json.dumps(deepspeed_json() | {"bf16": {"enabled": True}}))
    train(2, recipe)
    folder = tmp_path / "runs" / "other"
    steps = records(folder)
    assert [record["step"] for record in steps] == [0, 1]
    for record in steps:
        assert 0.5 < record["stop/prefix"] <= 9 / 12 and "stop/kat" not in record
        assert record["stop/prefix"] + record["stop/eos"] + record["stop/length"] == pytest.approx(1)
        assert record["rollout/kept_mean"] <= 9 < record["rollout/length_mean"]  # the audit group is written out
        assert math.isfinite(record["loss/total"]) and record["train/gradient_norm"] > 0
        assert "kat/threshold" not in record and "kat/false_terminations" not in record
    assert [record["train/lr"] for record in steps] == pytest.approx(
        [1e-2 * (1 + math.cos(math.pi * t)) / 2 for t in (0.25, 0.75)]
    )
    assert [path.name for path in (folder / "checkpoints").iterdir()] == ["step-2"]
    assert list((folder / "rollouts").iterdir()) == []
    assert {value.dtype for value in weights(folder).values()} == {torch.bfloat16}
    summary = json.loads((folder / "summary.json").read_text())
    assert summary["before"] is summary["after"] is summary["threshold"] is summary["false_termination_share"] is None


def evaluate(recipe: dict[str, Any]) -> dict[str, float]:
    return evaluation.evaluate(Recipe.model_validate(recipe)).metrics()


@pytest.mark.parametrize("size", [1, 3])
def test_evaluating_the_final_model_repeats_the_run_s_own_score(base: Path, tmp_path: Path, size: int) -> None:
    """Exported weights, common random numbers, any number of ranks."""
    folder, _ = full_run(base, 2)
    recipe = json.loads((base / "recipe.json").read_text())
    recipe["student"]["path"], recipe["run"] = (
        str(folder / "final"),
        {"name": "scores", "folder": str(tmp_path), "seed": 3},
    )
    after = json.loads((folder / "summary.json").read_text())["after"]
    assert 0 < after["avg@2"] < 1 and after["pass@2"] > after["avg@2"], "the score says nothing"
    assert run_ranks(size, evaluate, recipe) == [after] * size
    (model,) = (tmp_path / "scores" / "evaluations").iterdir()
    assert json.loads((model / "results.json").read_text())["metrics"] == after


@pytest.mark.parametrize("gather", ["phase", "once"])
def test_a_teacher_that_is_lent_whole_scores_the_same(base: Path, tmp_path: Path, gather: str) -> None:
    full, seen = full_run(base, 2)
    recipe = build_recipe(tmp_path, "whole", teacher={"gather": gather})
    seen_again = json.loads(json.dumps(train(2, recipe)))
    for step in range(STEPS):
        assert rollouts_of(seen_again, step) == rollouts_of(seen, step)
    for one, two in zip(records(full), records(tmp_path / "runs" / "whole"), strict=True):
        assert rankless(two) == pytest.approx(rankless(one), rel=1e-4)
    for name, value in weights(full).items():
        assert (weights(tmp_path / "runs" / "whole")[name] - value).abs().max() < 1e-6, name


def refusal(recipe: dict[str, Any]) -> tuple[str, str]:
    try:
        run.train(Recipe.model_validate(recipe))
    except KatdsError as error:
        return type(error).__name__, str(error)
    raise AssertionError("the run came to its end")


def test_a_run_that_diverges_ends_on_all_ranks(tmp_path: Path) -> None:
    """Not with a hang or silently skipped updates; and a model that cannot be read leaves the run's folder free."""
    recipe = build_recipe(tmp_path, "diverged")
    recipe["train"]["optimizer"] = {"lr": 1e30, "warmup_fraction": 0.0}
    kinds, messages = zip(*run_ranks(2, refusal, recipe), strict=True)
    assert set(kinds) == {"TrainingError"} and len(set(messages)) == 1 and "divergence" in messages[0]

    weights_file = tmp_path / "teacher" / "model.safetensors"
    weights_file.write_bytes(weights_file.read_bytes()[:-4000])
    recipe["run"]["name"] = "unread"
    for _ in range(2):
        for kind, message in run_ranks(2, refusal, recipe):
            assert kind == "ConfigError" and message.startswith(
                f"teacher.path: {tmp_path / 'teacher'} cannot be loaded"
            )


def refusal_of_one_host(recipe: dict[str, Any]) -> list[tuple[str, int | None]]:
    """Rank 1 has no data where the recipe says it lies; both begin to train, and then to evaluate."""
    if os.environ["RANK"] == "1":
        recipe["data"]["train"] = str(Path(recipe["data"]["train"]).with_name("gone.jsonl"))
        recipe["evaluation"]["data"] = recipe["data"]["train"]
    said = []
    for program in (run.train, evaluation.evaluate):
        with pytest.raises(ConfigError) as refused:
            program(Recipe.model_validate(recipe))
        said.append((str(refused.value), refused.value.reported_by))
    return said


def test_what_one_host_cannot_read_ends_the_program_on_all(tmp_path: Path) -> None:
    """At once: others would wait for it for half an hour."""
    for said in run_ranks(2, refusal_of_one_host, build_recipe(tmp_path, "run")):
        assert [rank for _, rank in said] == [1, 1]
        assert [message.split()[0] for message, _ in said] == ["data.train", "evaluation.data"], said


def failing(problem: Exception) -> str:
    """Rank 1 of two fails in what both do."""
    world = start_world()

    def act() -> None:
        if world.rank == 1:
            raise problem

    with pytest.raises(Exception, match="no such thing") as failed:
        together(world.collective, act)
    return f"{type(failed.value).__name__}: {failed.value}"


def test_a_bug_on_one_rank_keeps_its_traceback_and_ends_the_others() -> None:
    assert run_ranks(2, failing, ValueError("no such thing. Or so")) == [
        "KatdsError: ValueError: no such thing",
        "ValueError: no such thing. Or so",
    ]
    assert run_ranks(2, failing, ConfigError("no such thing. Or so")) == ["ConfigError: no such thing. Or so"] * 2
