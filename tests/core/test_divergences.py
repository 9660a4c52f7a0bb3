"""Divergences against sums written out by hand in float64, and at the edges where floating point breaks."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from katds.core.divergences import (
    entropy,
    forward_kl,
    generalised_jsd,
    reverse_kl,
    sampled_reverse_kl,
    tail_logprob,
    top_k_tail_forward_kl,
    top_k_tail_reverse_kl,
)

torch.set_num_threads(1)
INF = math.inf
FP64 = {"rtol": 1e-12, "atol": 1e-13}  # a few hundred float64 roundings


def random_pair(seed: int, rows: int = 5, vocabulary: int = 11, scale: float = 3.0, dtype: torch.dtype = torch.float64):
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(2, rows, vocabulary, generator=generator, dtype=torch.float64) * scale
    p, q = logits.log_softmax(-1).to(dtype)
    return p, q


def top(logprobs: torch.Tensor, other: torch.Tensor, k: int) -> tuple[torch.Tensor, torch.Tensor]:
    ids = logprobs.topk(k, -1).indices
    return logprobs.gather(-1, ids), other.gather(-1, ids)


def kl_by_hand(p: list[float], q: list[float]) -> float:
    return sum(a * math.log(a / b) for a, b in zip(p, q, strict=True) if a > 0)


P, Q = [0.5, 0.3, 0.15, 0.05], [0.1, 0.2, 0.3, 0.4]
LOG_P, LOG_Q = torch.tensor(P, dtype=torch.float64).log(), torch.tensor(Q, dtype=torch.float64).log()
MIX = [0.25 * b + 0.75 * a for a, b in zip(P, Q, strict=True)]


@pytest.mark.parametrize(
    ("value", "by_hand"),
    [
        (reverse_kl(LOG_P, LOG_Q), kl_by_hand(P, Q)),
        (forward_kl(LOG_P, LOG_Q), kl_by_hand(Q, P)),
        (generalised_jsd(LOG_P, LOG_Q, 0.25), 0.25 * kl_by_hand(Q, MIX) + 0.75 * kl_by_hand(P, MIX)),
        (top_k_tail_reverse_kl(LOG_P[:2], LOG_Q[:2]), kl_by_hand([0.5, 0.3, 0.2], [0.1, 0.2, 0.7])),
        (top_k_tail_forward_kl(LOG_P[:2], LOG_Q[:2]), kl_by_hand([0.1, 0.2, 0.7], [0.5, 0.3, 0.2])),
        (tail_logprob(LOG_P[:2]), math.log(0.2)),
        (tail_logprob(LOG_Q[:2]), math.log(0.7)),
        (entropy(LOG_P), -sum(a * math.log(a) for a in P)),
        (sampled_reverse_kl(LOG_P, LOG_Q)[0], math.log(5)),
    ],
)
def test_closed_forms(value: torch.Tensor, by_hand: float) -> None:
    assert value.item() == pytest.approx(by_hand, rel=1e-13)


DIVERGENCES = {
    "reverse": reverse_kl,
    "forward": forward_kl,
    "jsd": lambda p, q: generalised_jsd(p, q, 0.3),
    "tail_reverse": lambda p, q: top_k_tail_reverse_kl(*top(p, q, 4)),
    "tail_forward": lambda p, q: top_k_tail_forward_kl(*reversed(top(q, p, 4))),
}


@pytest.mark.parametrize("divergence", DIVERGENCES.values(), ids=DIVERGENCES.keys())
class TestEveryDivergence:
    @given(seed=st.integers(0, 2**31 - 1), scale=st.floats(0.01, 20))
    @settings(max_examples=40, deadline=None)
    def test_is_non_negative_and_zero_only_at_equality(self, divergence, seed: int, scale: float) -> None:
        p, q = random_pair(seed, scale=scale)
        # sum p log p of numbers of size <= 100: float64 rounding stays below 1e-12.
        assert (divergence(p, q) > -1e-12).all()
        assert divergence(p, p).abs().max() < 1e-12
        assert divergence(p, q).max() > 1e-7

    def test_gradient_reaches_the_student_s_logits_correctly(self, divergence) -> None:
        z, z_teacher = torch.randn(2, 3, 7, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
        q = z_teacher.log_softmax(-1)
        assert torch.autograd.gradcheck(lambda z: divergence(z.log_softmax(-1), q), z.requires_grad_())

    def test_gradient_is_zero_at_equality(self, divergence) -> None:
        p, _ = random_pair(1)
        z = p.clone().requires_grad_()
        (grad,) = torch.autograd.grad(divergence(z.log_softmax(-1), p).sum(), z)
        assert grad.abs().max() < 1e-14  # exact zero up to float64 rounding of probabilities

    @pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
    def test_keeps_type_and_leading_shape(self, divergence, dtype: torch.dtype) -> None:
        p, q = random_pair(2, rows=6, dtype=dtype)
        result = divergence(p.view(2, 3, -1), q.view(2, 3, -1))
        assert result.dtype == dtype and result.shape == (2, 3)

    def test_no_rows(self, divergence) -> None:
        assert divergence(torch.zeros(0, 9), torch.zeros(0, 9)).shape == (0,)

    @pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
    @pytest.mark.parametrize("sharpness", [30.0, 1e3, 1e30])
    def test_is_finite_when_few_tokens_hold_all_mass(self, divergence, dtype: torch.dtype, sharpness: float) -> None:
        z = (torch.tensor([[2.0, 1.9, 0, 0, -1, -2, 0]], dtype=dtype) * sharpness).requires_grad_()
        q = (torch.tensor([[2.0, 2.1, 0, 1, -1, -2, 0]], dtype=dtype)).log_softmax(-1)
        value = divergence(z.log_softmax(-1), q)
        (grad,) = torch.autograd.grad(value.sum(), z)
        # Forward KL of a student without mass where the teacher has some is as large as the logits: finite, if huge.
        assert value.isfinite().all() and grad.isfinite().all()

    def test_zero_probabilities_in_both_add_nothing(self, divergence) -> None:
        """Tokens that neither knows (masked vocabulary) leave value and gradients as they are without them."""
        p, q = random_pair(3, vocabulary=8)
        nothing = torch.full((5, 2), -INF, dtype=torch.float64)
        short, long = p.clone().requires_grad_(), torch.cat([p, nothing], -1).requires_grad_()
        expected, value = divergence(short, q), divergence(long, torch.cat([q, nothing], -1))
        torch.testing.assert_close(value, expected, **FP64)
        (expected_grad,) = torch.autograd.grad(expected.sum(), short)
        (grad,) = torch.autograd.grad(value.sum(), long)
        torch.testing.assert_close(grad[:, :8], expected_grad, **FP64)
        assert (grad[:, 8:] == 0).all()


def test_zero_student_probability_is_free_and_zero_teacher_probability_is_infinite() -> None:
    p, q = torch.tensor([0.0, -INF]), torch.tensor([math.log(0.25), math.log(0.75)])
    assert reverse_kl(p, q).item() == pytest.approx(math.log(4))
    assert reverse_kl(q, p).item() == INF
    assert forward_kl(p, q).item() == INF
    assert generalised_jsd(p, q, 0.5).item() <= math.log(2)  # the mixture covers both: bounded


def test_underflowing_student_against_zero_teacher_is_no_nan() -> None:
    p = torch.tensor([0.0, -200.0], requires_grad=True)  # exp(-200) is 0 in float32
    value = reverse_kl(p, torch.tensor([0.0, -INF]))
    value.backward()
    assert value.item() == 0 and p.grad is not None and p.grad.isfinite().all()


@pytest.mark.parametrize("beta", [-0.1, 1.1, math.nan])
def test_beta_outside_the_interval_is_refused(beta: float) -> None:
    with pytest.raises(ValueError, match="beta"):
        generalised_jsd(LOG_P, LOG_Q, beta)


@pytest.mark.parametrize("swap", [False, True])
def test_jsd_over_its_vanishing_weight_tends_to_the_kl(swap: bool) -> None:
    """Fixes the convention: small beta belongs to the forward KL. JSD/beta = KL + O(beta)."""
    beta = 1e-5
    near = generalised_jsd(LOG_P, LOG_Q, 1 - beta if swap else beta) / beta
    exact = (reverse_kl if swap else forward_kl)(LOG_P, LOG_Q)
    other = (forward_kl if swap else reverse_kl)(LOG_P, LOG_Q)
    assert abs(near - exact) < 20 * beta < abs(near - other)


@given(seed=st.integers(0, 2**31 - 1), k=st.integers(1, 10))
@settings(max_examples=40, deadline=None)
def test_more_top_tokens_approach_the_full_divergence_from_below(seed: int, k: int) -> None:
    p, q = random_pair(seed)
    coarse, finer = (top_k_tail_reverse_kl(*top(p, q, n)) for n in (k, k + 1))
    full = reverse_kl(p, q)
    # Sums of 11 terms in float64; with K = V the bucket holds the clamped epsilon: 2e-16 times a log-ratio below 60.
    assert (coarse <= finer + 1e-12).all() and (finer <= full + 1e-12).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("k", [10, 11])
def test_the_whole_vocabulary_as_top_k_is_the_full_divergence(dtype: torch.dtype, k: int) -> None:
    """K = V leaves an empty tail, K = V - 1 a tail of one token."""
    p, q = random_pair(4, dtype=dtype)
    z = p.clone().requires_grad_()
    value = top_k_tail_reverse_kl(*top(z.log_softmax(-1), q, k))
    full = reverse_kl(z.log_softmax(-1), q)
    # The tail mass is known to a few epsilon; its log-ratio is at most log(1/epsilon) = 16 (36 in float64).
    tolerance = 200 * torch.finfo(dtype).eps
    torch.testing.assert_close(value, full, rtol=0, atol=tolerance)
    grads = [torch.autograd.grad(x.sum(), z, retain_graph=True)[0] for x in (value, full)]
    torch.testing.assert_close(grads[0], grads[1], rtol=0, atol=tolerance)


def test_tail_of_nothing_and_of_everything() -> None:
    eps = torch.finfo(torch.float32).eps
    top_logprobs = torch.tensor([[0.0, -INF], [-INF, -INF], [1e-6, -20.0]], requires_grad=True)
    tail = tail_logprob(top_logprobs)
    tail.sum().backward()
    torch.testing.assert_close(tail.exp(), torch.tensor([eps, 1.0, eps]))
    assert top_logprobs.grad is not None and (top_logprobs.grad == 0).all()


@pytest.mark.parametrize("scale", [1.0, 4.0, 8.0, 12.0, 30.0])
def test_float32_accuracy_is_what_the_docstrings_say(scale: float) -> None:
    """Tails from 0.97 to 1e-32, V = 32768: nothing is off by more than the log-probabilities are, which depends on the processor."""
    generator = torch.Generator().manual_seed(0)
    student = torch.randn(64, 32768, generator=generator) * scale
    teacher = student + 0.5 * torch.randn(64, 32768, generator=generator)
    p, q = student.log_softmax(-1), teacher.log_softmax(-1)
    p64, q64 = student.double().log_softmax(-1), teacher.double().log_softmax(-1)
    ids = p.topk(64, -1).indices
    tail64 = p64.scatter(-1, ids, -INF).logsumexp(-1).exp()
    p_top, q_top, p_top64, q_top64 = (x.gather(-1, ids) for x in (p, q, p64, q64))
    of_p, of_q = ((x - x64).abs().max() for x, x64 in ((p, p64), (q, q64)))  # of log_softmax itself
    assert of_p + of_q < 1e-4
    assert (tail_logprob(p_top).exp() - tail64).abs().max() <= of_p
    assert (top_k_tail_reverse_kl(p_top, q_top) - top_k_tail_reverse_kl(p_top64, q_top64)).abs().max() <= of_p + of_q
    assert (reverse_kl(p, q) - reverse_kl(p64, q64)).abs().max() <= of_p + of_q


def test_the_sampled_estimate_cannot_be_differentiated() -> None:
    p = LOG_P.clone().requires_grad_()
    assert not sampled_reverse_kl(p, LOG_Q).requires_grad


def test_the_sampled_estimate_averages_to_the_reverse_kl() -> None:
    mean = (LOG_P.exp() * sampled_reverse_kl(LOG_P, LOG_Q)).sum()
    assert mean.item() == pytest.approx(kl_by_hand(P, Q), rel=1e-13)
