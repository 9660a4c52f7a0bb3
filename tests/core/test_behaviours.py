"""Blending stays within its budget, and reaches it: against a root finder that we did not write."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from scipy.optimize import brentq
from scipy.stats import chisquare

from katds.core.behaviours import BEHAVIOURS
from katds.core.behaviours.blend import Blend, BlendSettings, blend
from katds.core.behaviours.student import Student
from katds.core.behaviours.teacher_prefix import TeacherPrefix, TeacherPrefixSettings
from katds.core.counter import key, uniform
from katds.core.types import Prompt, RolloutRequest


def pair(rows: int = 40, vocabulary: int = 50, spread: float = 3.0) -> tuple[torch.Tensor, torch.Tensor]:
    torch.manual_seed(0)
    logits = torch.randn(2, rows, vocabulary, dtype=torch.float64) * spread
    p, q = logits.log_softmax(-1)
    return p, q


def kl(p: torch.Tensor, q: torch.Tensor) -> torch.Tensor:
    return torch.nn.functional.kl_div(q, p, log_target=True, reduction="none").sum(-1)


def mixture(p: torch.Tensor, q: torch.Tensor, b: float) -> torch.Tensor:
    return ((1 - b) * p + b * q).log_softmax(-1)


@pytest.mark.parametrize("budget", [1e-4, 0.05, 0.5, 2.0])
def test_the_blend_is_the_one_of_the_budget(budget: float) -> None:
    p, q = pair()
    found = blend(p, q, budget)
    for row in range(len(p)):
        if kl(q[row], p[row]) <= budget:
            expected = q[row]
        else:
            b = brentq(lambda b, row=row: float(kl(mixture(p[row], q[row], b), p[row])) - budget, 0.0, 1.0, xtol=1e-14)
            expected = mixture(p[row], q[row], b)
        torch.testing.assert_close(found[row], expected, rtol=0, atol=1e-4)
    assert (kl(found, p) <= budget * (1 + 1e-9)).all(), "the trust region is left"
    assert torch.allclose(found.exp().sum(-1), torch.ones(len(p), dtype=torch.float64))


def test_a_large_budget_lets_the_teacher_write_and_float32_suffices() -> None:
    p, q = pair()
    torch.testing.assert_close(blend(p, q, 1e3), q)
    single = blend(p.float(), q.float(), 0.1)
    assert single.dtype == torch.float32
    assert (kl(single.double(), p) - 0.1).abs().max() < 1e-4


def test_a_token_that_either_model_rules_out_is_never_written() -> None:
    p, q = pair(rows=4)
    p[:, 3], q[:, 7] = -math.inf, -math.inf
    p, q = p.log_softmax(-1), q.log_softmax(-1)
    for budget in (0.01, 1e3):
        mixed = blend(p, q, budget)
        assert (mixed[:, [3, 7]] == -math.inf).all() and mixed[:, :3].isfinite().all()


def test_the_budget_falls_to_nothing_and_then_the_student_writes_alone() -> None:
    policy = Blend.from_settings(BlendSettings(budget=0.4, anneal=0.5), 20)
    assert [policy.budget(step) for step in (0, 5, 10, 15)] == pytest.approx([0.4, 0.2, 0.0, 0.0])
    p, q = pair(rows=8)
    mix = policy.at(5)
    assert mix is not None and (kl(mix(p, q), p) <= 0.2 + 1e-9).all() and kl(mix(p, q), p).max() > 0.199
    assert policy.at(10) is None and Student().at(0) is None
    assert Blend.from_settings(BlendSettings(anneal=0.0), 20).at(0) is None


def test_the_budget_may_fall_along_a_cosine() -> None:
    policy = Blend.from_settings(BlendSettings(budget=0.4, anneal=0.6, schedule="cosine"), 20)
    assert [policy.budget(step) for step in (0, 3, 4, 6, 12, 13)] == pytest.approx(
        [0.4, 0.2 + 0.2 * 0.5**0.5, 0.3, 0.2, 0.0, 0.0]
    )
    assert policy.at(11) is not None and policy.at(12) is None


def asked(id: int, tokens: int = 400) -> RolloutRequest:
    return RolloutRequest(id, Prompt(0, (1,)), tokens)


def test_the_longest_prefix_falls_from_the_whole_response_to_nothing_along_a_cosine() -> None:
    policy = TeacherPrefix("longest", 200)
    assert [policy.longest(400, step) for step in (0, 50, 100, 150, 199, 200)] == [
        399, int(200 * (1 + math.sqrt(0.5))), 200, int(200 * (1 - math.sqrt(0.5))), 0, 0,
    ]  # fmt: skip
    assert [policy.longest(tokens, 0) for tokens in (1, 2, 7)] == [0, 1, 6], "the student has a token left to write"
    longest = [policy.longest(400, step) for step in range(201)]
    assert longest == sorted(longest, reverse=True)
    assert [policy.prefix(asked(i), 50, 3) for i in range(5)] == [policy.longest(400, 50)] * 5


def test_a_rollout_s_own_prefix_is_uniform_up_to_the_longest() -> None:
    """Chi-square over ten bins; a hash of seed, step and id, and of nothing else."""
    policy = TeacherPrefix.from_settings(TeacherPrefixSettings(), 200)
    longest = policy.longest(400, 40)
    drawn = [policy.prefix(asked(i), 40, 7) for i in range(8000)]
    assert min(drawn) == 0 and max(drawn) == longest
    assert chisquare(np.histogram(drawn, bins=10, range=(0, longest + 1))[0]).pvalue > 1e-3
    assert drawn == [policy.prefix(asked(i), 40, 7) for i in range(8000)]
    for step, seed in ((41, 7), (40, 8)):
        others = [policy.prefix(asked(i), step, seed) for i in range(8000)]
        assert abs(np.corrcoef(drawn, others)[0, 1]) < 0.05
    tokens = [uniform(key(7, 40, i), 0) for i in range(8000)]  # the first token's random number
    assert abs(np.corrcoef(drawn, tokens)[0, 1]) < 0.05


def test_who_writes_alone_and_who_blends() -> None:
    assert [kind for kind, policy in BEHAVIOURS.items() if policy.teacher_writes] == ["teacher_prefix"]
    assert [kind for kind, policy in BEHAVIOURS.items() if policy.Settings.blends] == ["trb"]
    assert TeacherPrefix("uniform", 5).at(0) is None and Student().prefix(asked(1), 0, 0) == 0


@pytest.mark.parametrize("kind", BEHAVIOURS)
@pytest.mark.parametrize("step", [0, 3, 7])
def test_every_policy_keeps_the_contract(kind: str, step: int) -> None:
    """With its defaults: a mixture is a distribution, row by row, without what the student rules out; a prefix leaves the student a token;
    both are functions of what they are given; and what the policy declares is what it does."""
    behaviour, again = (BEHAVIOURS[kind].from_settings(BEHAVIOURS[kind].Settings(), 8) for _ in range(2))
    mix, (p, q) = behaviour.at(step), pair()
    assert BEHAVIOURS[kind].Settings.blends or mix is None
    if mix is not None:
        p[:, 7] = -math.inf
        p = p.log_softmax(-1)
        mu = mix(p, q)
        assert mu.shape == p.shape and (mu[:, 7] == -math.inf).all()
        torch.testing.assert_close(mu.exp().sum(-1), torch.ones(len(p), dtype=p.dtype))
        torch.testing.assert_close(mix(p[5:6], q[5:6]), mu[5:6], rtol=0, atol=0)
        assert torch.equal(again.at(step)(p, q), mu)  # type: ignore[misc]
    lengths = []
    for name in range(200):
        request = RolloutRequest(name, Prompt(0, (1, 2)), 9)
        lengths.append(behaviour.prefix(request, step, 5))
        assert again.prefix(request, step, 5) == lengths[-1] and 0 <= lengths[-1] < 9
    assert any(lengths) <= behaviour.teacher_writes
    assert any(lengths) or step or not behaviour.teacher_writes
