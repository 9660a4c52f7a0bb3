"""Losses that are wrong by principle: whoever asks for one is told why, and what to take instead."""

from __future__ import annotations

import pytest
from messages import refused

from katds.cli import load_recipe
from katds.config import Recipe
from katds.core.objectives import OBJECTIVES
from katds.core.objectives.refused import _REFUSED, refusal
from katds.schema import members
from katds.sections import TrainConfig

REQUIRED = ["--run.name", "demo", "--student.path", "s", "--teacher.path", "t", "--data.train", "d.jsonl"]


def load(*flags: str) -> None:
    load_recipe([*REQUIRED, *flags], "launch/train.py", "Train.")


@pytest.mark.parametrize(
    ("flags", "pieces"),
    [
        (["--objective.kind", "k1"], ["objective.kind is 'k1'", "averages to zero", "Take objective.kind policy_gradient"]),
        (["--objective.kind", "k3"], ["objective.kind is 'k3'", "gradient is that of the forward KL", "forward_kl"]),
        (["--objective.kind", "topk_advantage"], ["same for every action", "policy gradient of zero", "reverse_kl"]),
        (["--objective.kind", "reverse_kl_topk"], ["biased and shrinks", "support student_top_k"]),
        (["--objective.support", "top_k"], ["objective.support is 'top_k'", "biased", "Take reverse_kl with support"]),
        (["--objective.kind", "forward_kl", "--objective.support", "top_k_no_tail"], ["'top_k_no_tail'", "biased"]),
        (["--objective.add_tail", "false"], ["objective.add_tail is False", "bucket is always there", "Remove"]),
        (["--objective.use_policy_gradient", "true"], ["objective.use_policy_gradient is True", "same for every action"]),
        (["--objective.loss_reduction", "microbatch_mean"], ["is 'microbatch_mean'", "global token count", "Remove"]),
        (["--train.loss_agg_mode", "seq-mean-token-mean"], ["train.loss_agg_mode is", "depends on how rollouts were split"]),
        (["--objective.missing_scores", "zero"], ["objective.missing_scores is 'zero'", "is an error", "Remove"]),
    ],
    ids=lambda value: " ".join(value)[:50],
)  # fmt: skip
def test_a_wrong_loss_is_refused_with_the_reason(flags: list[str], pieces: list[str]) -> None:
    refused(lambda: load(*flags), *pieces)


def test_a_blend_of_student_and_teacher_is_no_student() -> None:
    flags = ["--behaviour.kind", "trb", "--teacher.gather", "phase", "--rollout.top_p", "1", "--objective.kind"]
    refused(lambda: load(*flags, "tropd"), "objective.kind tropd", "set behaviour.kind to student")
    load(*flags, "eopd")


def test_other_mistakes_beside_it_still_fit_the_message() -> None:
    refused(lambda: load("--objective.kind", "k1", "--train.steps", "0"), "objective.kind is 'k1'", "1 more setting")


def test_other_unknown_names_are_explained_as_ever() -> None:
    refused(lambda: load("--objective.kind", "k4"), "objective.kind is 'k4'. Choose one of reverse_kl")
    refused(
        lambda: load("--objective.support", "some"),
        "objective.support is 'some'. Allowed: student_top_k | teacher_top_k | full",
    )
    assert refusal("evaluation.reduction", "mean") is None and refusal("objective.kind", "reverse_kl") is None


def test_nothing_that_exists_is_refused() -> None:
    assert all(refusal("objective.kind", kind) is None for kind in OBJECTIVES)
    names = {name for refused_names, values, *_ in _REFUSED if values is None for name in refused_names}
    for section in (*members(Recipe.model_fields["objective"]).values(), TrainConfig):
        assert not names & section.model_fields.keys()
