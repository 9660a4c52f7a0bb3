"""The contest with TRL: both do the same work, neither leaves a trace in the other's turn, and lengths are as promised."""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from messages import refused
from transformers import AutoModelForCausalLM, AutoTokenizer, Qwen3Config, Qwen3ForCausalLM

from katds.bench import demo, peers
from katds.bench.contest import Step, rotated
from katds.bench.report import Result
from katds.bench.workloads import QWEN, SPECIALS, WORKLOADS, Size, Workload, build
from katds.core.divergences import reverse_kl
from katds.core.stop.kat_settings import KatSettings

ROOT = Path(__file__).parent.parent


def options(*arguments: str) -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    peers.options(parser)
    return parser.parse_args(arguments)


@pytest.mark.parametrize("arguments", [["--help"], ["peers", "--help"]])
def test_help_is_quick(arguments: list[str]) -> None:
    code = """
import runpy, sys
try:
    runpy.run_path("launch/bench.py", run_name="__main__")
except SystemExit as end:
    heavy = {"torch", "numpy", "transformers", "deepspeed", "trl"} & set(sys.modules)
    sys.exit(end.code or (f"imported: {heavy}" if heavy else 0))
"""
    done = subprocess.run([sys.executable, "-c", code, *arguments], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "usage" in done.stdout


def lengths(folder: Path, workload: Workload) -> tuple[list[int], list[int]]:
    """Of one response to each prompt: those to short prompts, and those to long ones."""
    tokenizer = AutoTokenizer.from_pretrained(folder / "student")
    model = AutoModelForCausalLM.from_pretrained(folder / "student")
    prompts = [json.loads(line)["prompt"] for line in (folder / "prompts.jsonl").read_text().splitlines()]
    inputs = torch.tensor(tokenizer(prompts)["input_ids"])
    torch.manual_seed(0)
    written = model.generate(inputs, max_new_tokens=workload.new_tokens, top_k=0)[:, inputs.shape[1] :]
    ends = written == tokenizer.eos_token_id
    counts = torch.where(ends.any(1), ends.int().argmax(1) + 1, workload.new_tokens)
    long = inputs[:, -1] >= len(SPECIALS) + (workload.vocabulary - len(SPECIALS)) // 2
    return counts[~long].tolist(), counts[long].tolist()


def test_lengths_are_as_promised(tmp_path: Path) -> None:
    skewed = replace(WORKLOADS["smoke"], new_tokens=64, long_every=8, mean_short=8)
    short, long = lengths(build(skewed, tmp_path / "skewed", prompts=512), skewed)
    assert long == [64] * 64
    assert (
        abs(sum(short) / len(short) - 8) < 4 * 8 / len(short) ** 0.5
    )  # of a geometric distribution, deviation is mean
    fixed = WORKLOADS["smoke"]
    assert lengths(build(fixed, tmp_path / "fixed", prompts=64), fixed) == ([fixed.new_tokens] * 64, [])


WIDE = Workload("wide", Size(1024, 1, (16, 8, 128)), Size(2048, 1, (16, 8, 128), tied=False), 512, 4, 16)


@pytest.mark.parametrize(
    "workload",
    [WORKLOADS["tiny"], WORKLOADS["skewed"], WIDE, replace(WIDE, long_every=8, mean_short=8)],
    ids=["tiny", "skewed", "wide", "wide and skewed"],
)
def test_ends_come_where_they_are_due(workload: Workload, tmp_path: Path) -> None:
    build(workload, tmp_path, prompts=1)
    half = (workload.vocabulary - len(SPECIALS)) // 2
    for role in ("student", "teacher"):
        model = AutoModelForCausalLM.from_pretrained(tmp_path / role)
        for first in (len(SPECIALS), len(SPECIALS) + half):
            text = torch.randint(first, first + half, (8, 64))
            with torch.no_grad():
                shares = model(text).logits.double().softmax(-1)
            ends = shares[..., 1].mean().item()
            if workload.mean_short and first == len(SPECIALS):
                assert ends == pytest.approx(1 / workload.mean_short, rel=0.01)
            else:
                assert ends < 1e-9
            assert 1 - shares[..., first : first + half].sum(-1).min() - shares[..., 1].max() < 1e-9


def test_bf16_keeps_the_lengths(tmp_path: Path) -> None:
    build(WIDE, tmp_path, prompts=16, precision="bf16")
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "teacher").dtype == torch.bfloat16
    assert lengths(tmp_path, WIDE) == ([WIDE.new_tokens] * 16, [])


@pytest.mark.parametrize(
    ("size", "parameters"),
    [(QWEN["qwen-0.6b"].student, 596_049_920), (QWEN["qwen-1.7b"].student, 1_720_574_976), (QWEN["qwen-0.6b"].teacher, 8_190_735_360)],
    ids=["0.6B", "1.7B", "8B"],
)  # fmt: skip
def test_qwen_shapes_have_the_parameters_of_the_models(size: Size, parameters: int) -> None:
    with torch.device("meta"):
        model = Qwen3ForCausalLM(Qwen3Config(**size.config(QWEN["qwen-0.6b"].vocabulary)))
    assert model.num_parameters() == parameters


def test_qwen_shapes_have_one_variant_and_are_asked_for_by_name(tmp_path: Path) -> None:
    asked = options("--shapes", "qwen-1.7b", "--precision", "bf16", "--ranks", "1")
    (recipe,) = peers._random(QWEN["qwen-1.7b"], asked, tmp_path).recipes.values()
    assert recipe["objective"]["support"] == "full" and recipe["teacher"]["gather"] == "layer"
    assert {Path(recipe[role]["deepspeed"]).name for role in ("student", "teacher")} == {"zero3_bf16.json"}
    assert not set(WORKLOADS) & set(QWEN)


@pytest.mark.parametrize("name", WORKLOADS)
def test_random_shapes_have_kat_in_windows_that_fit(name: str, tmp_path: Path) -> None:
    workload = WORKLOADS[name]
    recipes = peers._random(workload, options("--gather", "layer", "once", "--ranks", "2"), tmp_path).recipes
    assert list(recipes) == ["never-full-layer", "never-full-once", "never-student_top_k-layer", "kat-full-layer"]
    settings = KatSettings.model_validate(recipes["kat-full-layer"]["stop"])
    settings.check(workload.new_tokens, temperature=1.0, audit_fraction=0.0625)
    if workload.new_tokens == 512:
        assert settings == KatSettings(window=KatSettings().window), "the default"
    assert settings.threshold == KatSettings().threshold


@pytest.mark.parametrize("seed", [0, 1])
def test_every_block_of_prompts_has_one_long_rollout(seed: int, tmp_path: Path) -> None:
    workload = replace(WORKLOADS["smoke"], long_every=4, mean_short=4)
    build(workload, tmp_path, prompts=64, seed=seed)
    half = (workload.vocabulary - len(SPECIALS)) // 2
    rows = [json.loads(line)["prompt"].split() for line in (tmp_path / "prompts.jsonl").read_text().splitlines()]
    long = [int(words[-1][1:]) >= half for words in rows]
    assert [sum(long[i : i + 4]) for i in range(0, 64, 4)] == [1] * 16
    assert len({i % 4 for i, is_long in enumerate(long) if is_long}) > 1, (
        "a rank that takes every second prompt gets its share"
    )


def test_each_turn_has_its_own_linear(monkeypatch: pytest.MonkeyPatch) -> None:
    from katds.bench.trl_peer import Turns

    ours, seen = torch.nn.functional.linear, []

    def between(step: int) -> None:
        seen.append((step, torch.nn.functional.linear))
        if step == 1:
            raise RuntimeError

    turns = Turns(lambda: None, between)
    theirs = lambda *arguments: ours(*arguments)  # noqa: E731
    monkeypatch.setattr(torch.nn.functional, "linear", theirs)
    turns.on_step_begin()
    turns.on_step_end()
    assert torch.nn.functional.linear is theirs
    with pytest.raises(RuntimeError):
        turns.on_step_end()
    assert torch.nn.functional.linear is theirs
    assert seen == [(0, ours), (1, ours)]


def test_trl_computes_the_loss_that_katds_calls_full() -> None:
    from trl.kernels.chunked_divergence import ChunkedDivergenceFunction

    generator = torch.Generator().manual_seed(0)
    hidden, read, head, other = (
        torch.randn(*shape, generator=generator) for shape in ((5, 8), (5, 6), (40, 8), (40, 6))
    )
    hidden.requires_grad_()
    theirs, _ = ChunkedDivergenceFunction.apply(hidden, head, None, read, other, None, 1.0)
    ours = reverse_kl((hidden @ head.T).log_softmax(-1), (read @ other.T).log_softmax(-1))
    torch.testing.assert_close(theirs, ours)
    slopes = [torch.autograd.grad(loss.sum(), hidden)[0] for loss in (theirs, ours)]
    torch.testing.assert_close(*slopes)


@pytest.mark.parametrize("present", [[], ["train.jsonl"], ["train.jsonl", "student/config.json"]])
def test_missing_demo_is_named(present: list[str], tmp_path: Path) -> None:
    for name in present:
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("")
    refused(
        lambda: peers.run(options("--shapes", "demo", "--demo-models", str(tmp_path))),
        "--demo-models",
        demo.PARTS[len(present)],
        "launch/prepare_demo.py",
    )


def test_the_demo_has_kat_with_the_loss_of_trl(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(demo, "train_student", lambda *arguments: {"the": "rule"})
    monkeypatch.setattr(demo, "write_prompts", lambda *arguments: None)
    contest = peers._demo(options("--ranks", "2"), tmp_path)
    names = ["never-full-once", "never-student_top_k-once", "kat-full-once", "kat-student_top_k-once"]
    assert list(contest.recipes) == names and contest.rules == {name: {"the": "rule"} for name in names[2:]}


def test_a_shape_that_fails_leaves_those_before_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    taken = [Step(1.0, 16.0, 0.5)] * 2
    outcomes = iter([[{"trl": taken, "never-full-once": taken}]])
    monkeypatch.setattr(peers, "on_ranks", lambda *arguments: next(outcomes))
    asked = options("--shapes", "smoke", "tiny", "--steps", "1")
    asked.out = tmp_path
    with pytest.raises(StopIteration):
        peers.run(asked)
    assert [row["shape"] for row in json.loads((tmp_path / "peers.json").read_text())["rows"]] == ["smoke"]


def test_variants_take_turns_in_coming_first() -> None:
    assert [rotated(list("abc"), step) for step in range(4)] == [list("abc"), list("bca"), list("cab"), list("abc")]


def test_a_row_by_hand() -> None:
    warmup = [Step(99.0, 1.0, 0.0)]
    steps = {
        "trl": [*warmup, Step(8.0, 10.0, 1.0), Step(4.0, 20.0, 1.0), Step(6.0, 30.0, 1.0)],
        "ours": [*warmup, Step(2.0, 10.0, 1.0), Step(2.0, 10.0, 1.0), Step(1.0, 10.0, 1.0)],
    }
    result = Result("peers", "?", [])
    peers._add(result, "tiny", 6, steps)
    (row,) = result.rows
    assert row["ratio"] == "4.00 (2.00 .. 6.00)"
    assert row["TRL s/step"] == 6.0 and row["katds s/step"] == pytest.approx(5 / 3)
    assert row["TRL tok/s"] == 6 * 60 / 18 and row["katds tok/s"] == 6 * 30 / 5
    assert row["TRL length"] == 20.0 and row["katds length"] == 10.0
    assert len(result.samples) == 8 and [s["step"] for s in result.samples if s["system"] == "trl"] == [0, 1, 2, 3]


@pytest.mark.slow
def test_smoke() -> None:
    result = peers.run(options(*peers.SMOKE))
    assert [row["katds"] for row in result.rows] == ["never-full-once", "never-student_top_k-once", "kat-full-once"]
    for row in result.rows:
        assert row["TRL length"] == row["katds length"] == WORKLOADS["smoke"].new_tokens
    assert len(result.samples) == 2 * 4
    assert result.settings["ranks"] == 2 and result.settings["shapes"] == ["smoke"]
    json.dumps(result.settings)
