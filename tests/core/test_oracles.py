"""Divergences and gradients against code that this project did not write, and against brute force."""

from __future__ import annotations

import os

import pytest
import torch
from torch.nn.functional import kl_div, log_softmax

from katds.core.divergences import forward_kl, generalised_jsd, reverse_kl, top_k_tail_reverse_kl
from katds.core.objectives.policy_gradient import PolicyGradient
from katds.core.types import Field

torch.set_num_threads(1)
FP64 = {"rtol": 1e-12, "atol": 1e-13}  # two float64 evaluations of sums of 23 terms
BETAS = [0.0, 0.1, 0.5, 0.9, 1.0]


@pytest.fixture
def logits() -> tuple[torch.Tensor, torch.Tensor]:
    z, z_teacher = torch.randn(2, 2, 9, 23, dtype=torch.float64, generator=torch.Generator().manual_seed(5)) * 3
    return z.requires_grad_(), z_teacher


def assert_same(ours: torch.Tensor, theirs: torch.Tensor, z: torch.Tensor) -> None:
    """Equal sums and equal gradients by the student's logits."""
    torch.testing.assert_close(ours, theirs, **FP64)
    grads = [torch.autograd.grad(loss, z, retain_graph=True)[0] for loss in (ours, theirs)]
    torch.testing.assert_close(grads[0], grads[1], **FP64)


def test_kls_equal_torch(logits) -> None:
    z, z_teacher = logits
    p, q = log_softmax(z, -1), log_softmax(z_teacher, -1)
    assert_same(reverse_kl(p, q).sum(), kl_div(q, p, reduction="sum", log_target=True), z)
    assert_same(forward_kl(p, q).sum(), kl_div(p, q, reduction="sum", log_target=True), z)


def test_top_k_tail_equals_torch_on_the_merged_distribution(logits) -> None:
    """Merge the tail's probabilities by plain addition and hand K + 1 outcomes to torch."""
    z, z_teacher = logits
    ids = z.topk(6, -1).indices

    def merged(logits: torch.Tensor) -> torch.Tensor:
        probabilities = logits.softmax(-1)
        inside = probabilities.gather(-1, ids)
        outside = probabilities.scatter(-1, ids, 0.0).sum(-1, keepdim=True)
        return torch.cat([inside, outside], -1).log()

    p_top, q_top = (log_softmax(x, -1).gather(-1, ids) for x in (z, z_teacher))
    assert_same(
        top_k_tail_reverse_kl(p_top, q_top).sum(),
        kl_div(merged(z_teacher), merged(z), reduction="sum", log_target=True),
        z,
    )


@pytest.mark.parametrize("beta", BETAS)
def test_jsd_equals_deepspeed(logits, beta: float) -> None:
    opsd = pytest.importorskip("deepspeed.runtime.rollout.opsd", reason="this DeepSpeed has no OPSD losses")
    z, z_teacher = logits
    theirs = opsd.generalized_jsd_loss(z, z_teacher, torch.ones(z.shape[:2]), beta=beta, temperature=0.7).loss_sum
    ours = generalised_jsd(log_softmax(z / 0.7, -1), log_softmax(z_teacher / 0.7, -1), beta).sum()
    assert_same(ours, theirs, z)


@pytest.mark.parametrize("beta", BETAS)
def test_jsd_equals_trl(logits, beta: float, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(os.environ, "TRL_EXPERIMENTAL_SILENCE", "1")
    gkd = pytest.importorskip(
        "trl.experimental.gkd", reason="TRL is not installed (an optional oracle)", exc_type=ImportError
    )
    z, z_teacher = logits
    theirs = gkd.GKDTrainer.generalized_jsd_loss(z, z_teacher, beta=beta, temperature=0.7, reduction="sum")
    ours = generalised_jsd(log_softmax(z / 0.7, -1), log_softmax(z_teacher / 0.7, -1), beta).sum()
    assert_same(ours, theirs, z)


def _expected_gradient(z: torch.Tensor, q: torch.Tensor) -> torch.Tensor:
    """E_y~p[gradient of the policy-gradient loss at y], every action y of the vocabulary enumerated."""
    (vocabulary,) = z.shape
    total = torch.zeros_like(z)
    for action, probability in enumerate(z.detach().softmax(-1)):
        leaf = z.detach().clone().requires_grad_()
        actions = torch.tensor([action])
        loss = PolicyGradient().tile(leaf.log_softmax(-1)[None], actions, {Field.SAMPLED: q[actions]})["loss"]
        total += probability * torch.autograd.grad(loss, leaf)[0]
    assert vocabulary > 2
    return total


def test_policy_gradient_averages_to_the_exact_reverse_kl_gradient(logits) -> None:
    z, q = logits[0][0, 0].detach().requires_grad_(), log_softmax(logits[1][0, 0], -1)
    (exact,) = torch.autograd.grad(reverse_kl(log_softmax(z, -1), q), z)
    torch.testing.assert_close(_expected_gradient(z, q), exact, **FP64)
    assert exact.abs().max() > 0.01


def test_why_k1_is_not_differentiated_and_an_advantage_needs_its_action(logits) -> None:
    """The two refused variants (METHODS section 6) average to zero: they would train nothing."""
    z, q = logits[0][0, 0].detach().requires_grad_(), log_softmax(logits[1][0, 0], -1)
    logp = log_softmax(z, -1)
    probabilities = logp.detach().exp()
    k1_differentiated = (probabilities * (logp - q)).sum()
    kl_as_advantage = (probabilities * reverse_kl(logp, q).detach() * logp).sum()
    for loss in (k1_differentiated, kl_as_advantage):
        assert torch.autograd.grad(loss, z, retain_graph=True)[0].abs().max() < 1e-13
