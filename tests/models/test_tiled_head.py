"""The tiled head equals the plain computation, for any tile height, any scale, and without its memory."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn.functional import embedding, linear
from torch.utils._python_dispatch import TorchDispatchMode

from katds.models import tiled_head
from katds.models.tiled_head import head_logprobs, score_head, tiled_loss

torch.set_num_threads(1)
T, H, V = 11, 6, 9
FP64 = {"rtol": 1e-12, "atol": 1e-13}  # sums of some 10 float64 terms in another order
TileFn = Callable[[torch.Tensor, slice], dict[str, torch.Tensor]]


def inputs(dtype: torch.dtype = torch.float64, rows: int = T, hidden: int = H, vocabulary: int = V):
    generator = torch.Generator().manual_seed(0)
    shapes = ((rows, hidden), (vocabulary, hidden), (vocabulary,))
    return [torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype).requires_grad_() for shape in shapes]


def curved_loss(rows: int, vocabulary: int = V) -> TileFn:
    """A loss with a different, non-linear gradient at every element, so that a misplaced row or column shows."""
    weights = torch.rand(rows, vocabulary, dtype=torch.float64, generator=torch.Generator().manual_seed(1))

    def tile(logprobs: torch.Tensor, where: slice) -> dict[str, torch.Tensor]:
        loss = (weights[where].to(logprobs.dtype) * logprobs.square()).sum()
        return {"loss": loss, "rows": torch.tensor(float(logprobs.shape[0])), "top": logprobs.amax(-1).sum()}

    return tile


def plain(hidden, weight, bias, temperature: float, tile_fn: TileFn) -> torch.Tensor:
    logits = linear(hidden, weight, bias)
    wide = logits if logits.dtype == torch.float64 else logits.float()
    return tile_fn((wide / temperature).log_softmax(-1), slice(0, hidden.shape[0]))["loss"]


@given(
    height=st.integers(1, T + 3),
    temperature=st.sampled_from([1.0, 0.6, 1.7]),
    biased=st.booleans(),
    factor=st.floats(-3, 3),
)
@settings(max_examples=60, deadline=None)
def test_equals_plain_autograd(height: int, temperature: float, biased: bool, factor: float) -> None:
    leaves = inputs()[: 3 if biased else 2]
    hidden, weight, bias = (*leaves, None)[:3]
    expected = plain(hidden, weight, bias, temperature, curved_loss(T))
    loss, metrics = tiled_loss(hidden, weight, bias, temperature, curved_loss(T), tile_elements=height * V)
    torch.testing.assert_close(loss, expected, **FP64)
    assert metrics["rows"] == T and not metrics["top"].requires_grad and set(metrics) == {"rows", "top"}
    for ours, theirs in zip(
        torch.autograd.grad(factor * loss, leaves), torch.autograd.grad(factor * expected, leaves), strict=True
    ):
        torch.testing.assert_close(ours, theirs, **FP64)


@pytest.fixture
def tiles_of_two_in_slabs_of_five(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tiled_head, "CPU_TILE_ELEMENTS", 2 * V)
    monkeypatch.setattr(tiled_head, "CPU_SLAB_TILES", 1)
    monkeypatch.setattr(tiled_head, "CPU_SLAB_ROWS", 5)


@pytest.mark.usefixtures("tiles_of_two_in_slabs_of_five")
@pytest.mark.parametrize("temperature", [1.0, 0.6])
def test_tiles_within_slabs_equal_plain_autograd(temperature: float) -> None:
    """Slabs of 5, 5 and 1 rows whose last tile is short: neither rows nor memory that is used again get mixed up."""
    leaves = inputs()
    seen: list[slice] = []

    def tile_fn(logprobs: torch.Tensor, rows: slice) -> dict[str, torch.Tensor]:
        seen.append(rows)
        return curved_loss(T)(logprobs, rows)

    loss, _ = tiled_loss(*leaves, temperature, tile_fn)
    expected = plain(*leaves, temperature, curved_loss(T))
    torch.testing.assert_close(loss, expected, **FP64)
    for ours, theirs in zip(torch.autograd.grad(loss, leaves), torch.autograd.grad(expected, leaves), strict=True):
        torch.testing.assert_close(ours, theirs, **FP64)
    assert [(rows.start, rows.stop) for rows in seen] == [(0, 2), (2, 4), (4, 5), (5, 7), (7, 9), (9, 10), (10, 11)]
    scores = score_head(*leaves, temperature, lambda p, rows: {"all": p})["all"]
    torch.testing.assert_close(scores, head_logprobs(*leaves, temperature).detach(), **FP64)


@pytest.mark.usefixtures("tiles_of_two_in_slabs_of_five")
@pytest.mark.parametrize("rows", [0, T])
def test_the_teacher_s_head_is_read_at_the_same_rows(rows: int) -> None:
    leaves, (hidden, weight, bias) = inputs(rows=rows), inputs(rows=rows, hidden=H + 1)
    teacher = (hidden, weight, bias)
    whole = head_logprobs(*teacher, 0.7).detach()

    def tile_fn(logprobs: torch.Tensor, at: slice, others: torch.Tensor) -> dict[str, torch.Tensor]:
        assert not others.requires_grad
        torch.testing.assert_close(others, whole[at], **FP64)
        return {"loss": (others.exp() * logprobs).sum()}

    loss, _ = tiled_loss(*leaves, 0.7, tile_fn, teacher=teacher)
    expected = plain(*leaves, 0.7, lambda p, at: {"loss": (whole.exp() * p).sum()})
    for ours, theirs in zip(torch.autograd.grad(loss, leaves), torch.autograd.grad(expected, leaves), strict=True):
        torch.testing.assert_close(ours, theirs, **FP64)
    with pytest.raises(ValueError, match="they must agree"):
        tiled_loss(*leaves, 0.7, tile_fn, teacher=(hidden, weight[1:], None))


def test_gradcheck() -> None:
    hidden, weight, bias = inputs()
    tile_fn = curved_loss(T)
    assert torch.autograd.gradcheck(lambda h, w, b: tiled_loss(h, w, b, 0.8, tile_fn, 4 * V)[0], (hidden, weight, bias))


def test_scale_in_front_of_two_losses_and_a_second_backward() -> None:
    """The backward pass only scales, so it must scale each loss by its own factor, every time."""
    hidden, weight, _ = inputs()
    both = [f(hidden, weight, None, 1.0, curved_loss(T)) for f in (lambda *a: tiled_loss(*a, 2 * V)[0], plain)]
    for factor in (1e-3, 7.0):
        ours, theirs = (torch.autograd.grad((factor * x) ** 2 + x, (hidden, weight), retain_graph=True) for x in both)
        for a, b in zip(ours, theirs, strict=True):
            torch.testing.assert_close(a, b, **FP64)


def test_tied_embedding_gets_both_gradients() -> None:
    _, weight, _ = inputs()
    tokens = torch.arange(T) % V
    grads = []
    for head in (lambda *a: tiled_loss(*a, 3 * V)[0], plain):
        weight.grad = None
        head(embedding(tokens, weight).tanh(), weight, None, 1.0, curved_loss(T)).backward()
        grads.append(weight.grad)
    torch.testing.assert_close(*grads, **FP64)


@pytest.mark.parametrize("frozen", [(0,), (1,), (2,), (0, 1), (1, 2)])
def test_frozen_inputs_cost_nothing_and_change_nothing(frozen: tuple[int, ...]) -> None:
    leaves, reference = inputs(), inputs()
    for index in frozen:
        leaves[index].requires_grad_(False)
    tiled_loss(*leaves, 1.0, curved_loss(T), 2 * V)[0].backward()
    plain(*reference, 1.0, curved_loss(T)).backward()
    for index, (ours, theirs) in enumerate(zip(leaves, reference, strict=True)):
        assert (ours.grad is None) == (index in frozen)
        if ours.grad is not None:
            torch.testing.assert_close(ours.grad, theirs.grad, **FP64)


def test_without_gradients_the_tiles_build_no_graph() -> None:
    hidden, weight, bias = inputs()
    seen = []

    def tile_fn(logprobs: torch.Tensor, rows: slice) -> dict[str, torch.Tensor]:
        seen.append(logprobs.requires_grad)
        return curved_loss(T)(logprobs, rows)

    with torch.no_grad():
        loss, _ = tiled_loss(hidden, weight, bias, 1.0, tile_fn, 4 * V)
    detached, _ = tiled_loss(hidden.detach(), weight.detach(), None, 1.0, tile_fn, 4 * V)
    assert seen == [False] * 6 and not loss.requires_grad and not detached.requires_grad
    torch.testing.assert_close(loss, plain(hidden, weight, bias, 1.0, curved_loss(T)).detach(), **FP64)


def test_no_rows_give_a_connected_zero_and_all_keys() -> None:
    """A rank without tokens must still take part in the backward pass and report the same metrics."""
    hidden, weight, bias = inputs(rows=0)
    loss, metrics = tiled_loss(hidden, weight, bias, 1.0, curved_loss(0))
    assert loss.item() == 0 and {key: value.item() for key, value in metrics.items()} == {"rows": 0.0, "top": 0.0}
    loss.backward()
    assert hidden.grad is not None and hidden.grad.shape == (0, H)
    for tensor in (weight, bias):
        assert tensor.grad is not None and (tensor.grad == 0).all()


def test_differentiating_twice_is_refused() -> None:
    hidden, weight, _ = inputs()
    loss, _ = tiled_loss(hidden, weight, None, 1.0, curved_loss(T))
    with pytest.raises(RuntimeError, match="differentiated twice"):
        torch.autograd.grad(loss, hidden, create_graph=True)


def test_a_scalar_may_be_a_view_of_the_tile() -> None:
    """The tile's memory is used again for the gradient, after the scalars were taken out of it."""
    hidden, weight, _ = inputs()
    _, metrics = tiled_loss(hidden, weight, None, 1.0, lambda p, rows: {"loss": p.square().sum(), "first": p[0, 0]})
    torch.testing.assert_close(metrics["first"], head_logprobs(hidden, weight, None, 1.0)[0, 0].detach(), **FP64)


def test_a_gradient_that_belongs_to_the_closure_is_not_written_to() -> None:
    """The gradient of a sum is one expanded number; that of a product with a constant may be the constant itself."""

    class Given(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, logprobs: torch.Tensor, gradient: torch.Tensor) -> torch.Tensor:
            ctx.gradient = gradient
            return logprobs.sum() * 0

        @staticmethod
        def backward(ctx: Any, _: torch.Tensor) -> tuple[torch.Tensor, None]:
            return ctx.gradient, None

    hidden, weight, _ = inputs()
    kept = torch.rand(T, V, dtype=torch.float64)
    before = kept.clone()
    tiled_loss(hidden, weight, None, 1.0, lambda p, rows: {"loss": Given.apply(p, kept[rows])}, 4 * V)
    assert torch.equal(kept, before)
    loss, _ = tiled_loss(hidden, weight, None, 1.0, lambda p, rows: {"loss": p.sum()}, 4 * V)
    expected = plain(hidden, weight, None, 1.0, lambda p, rows: {"loss": p.sum()})
    torch.testing.assert_close(torch.autograd.grad(loss, weight), torch.autograd.grad(expected, weight), **FP64)


@pytest.mark.parametrize("block", [7, 300])
@pytest.mark.parametrize("height", [1, 16, 512])
def test_bfloat16_error_is_at_most_twice_that_of_the_plain_computation(
    height: int, block: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Both against float64 from the same bfloat16 inputs, with a factor that is no power of two; Frobenius norms. The weight's gradient
    is made in blocks of some words, the last of them smaller."""
    rows, hidden_size, vocabulary = 512, 32, 300
    monkeypatch.setattr(tiled_head, "PRODUCT_ELEMENTS", block * hidden_size)
    low = inputs(torch.bfloat16, rows, hidden_size, vocabulary)[:2]
    exact = [tensor.detach().double().requires_grad_() for tensor in low]
    tile_fn = curved_loss(rows, vocabulary)
    (plain(*exact, None, 0.9, tile_fn) / 77).backward()

    def errors(loss: torch.Tensor) -> list[float]:
        grads = torch.autograd.grad(loss / 77, low)
        return [float((g.double() - e.grad).norm() / e.grad.norm()) for g, e in zip(grads, exact, strict=True)]

    ours = errors(tiled_loss(*low, None, 0.9, tile_fn, height * vocabulary)[0])
    theirs = errors(plain(*low, None, 0.9, tile_fn))
    assert all(a <= 2 * b for a, b in zip(ours, theirs, strict=True)), (ours, theirs)
    assert min(theirs) > 1e-4  # it is bfloat16 that is measured


class LargestTensor(TorchDispatchMode):
    """The number of elements of the largest tensor that any operation returned."""

    def __init__(self) -> None:
        super().__init__()
        self.elements = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        for tensor in result if isinstance(result, tuple | list) else (result,):
            if isinstance(tensor, torch.Tensor):
                self.elements = max(self.elements, tensor.untyped_storage().nbytes() // tensor.element_size())
        return result


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_no_tensor_grows_with_tokens_times_vocabulary(dtype: torch.dtype) -> None:
    hidden_size, vocabulary, elements = 16, 512, 8192

    def largest(rows: int, head: Callable[..., torch.Tensor]) -> int:
        hidden, weight, _ = inputs(dtype, rows, hidden_size, vocabulary)
        tile_fn = curved_loss(rows, vocabulary)
        with LargestTensor() as seen:
            head(hidden, weight, None, 0.9, tile_fn).backward()
        return seen.elements

    def tiled(*args: Any) -> torch.Tensor:
        # The closure's own weights are given, not made: sliced views of [T, V] show up with their whole storage.
        *rest, _ = args
        return tiled_loss(*rest, lambda p, rows: {"loss": p.square().sum()}, elements)[0]

    assert largest(100, plain) >= 100 * vocabulary
    assert largest(100, tiled) == largest(400, tiled) == elements


def test_score_head_equals_the_whole_computation() -> None:
    hidden, weight, bias = inputs()
    actions = torch.arange(T) % V

    def tile_fn(logprobs: torch.Tensor, rows: slice) -> dict[str, torch.Tensor]:
        assert not logprobs.requires_grad
        return {
            "sampled": logprobs.gather(-1, actions[rows, None]).squeeze(-1),
            "top": logprobs.topk(2, -1).indices.int(),
        }

    whole = tile_fn((linear(hidden, weight, bias) / 0.7).log_softmax(-1).detach(), slice(0, T))
    for height in (1, 4, T, T + 1):
        results = score_head(hidden, weight, bias, 0.7, tile_fn, height * V)
        torch.testing.assert_close(results["sampled"], whole["sampled"], **FP64)
        assert torch.equal(results["top"], whole["top"]) and results["top"].dtype == torch.int32


def test_score_head_without_rows_keeps_keys_shapes_and_types() -> None:
    hidden, weight, _ = inputs(torch.bfloat16, rows=0)
    result = score_head(hidden, weight, None, 1.0, lambda p, rows: {"top": p.topk(2, -1).values})["top"]
    assert result.shape == (0, 2) and result.dtype == torch.float32


def test_low_precision_logits_are_divided_in_float32() -> None:
    hidden, weight, _ = (tensor.detach() for tensor in inputs(torch.bfloat16))
    expected = (linear(hidden, weight).double() / 0.7).log_softmax(-1)
    # float32 rounding of numbers below 16; dividing in bfloat16 would be off by 1e-2.
    torch.testing.assert_close(head_logprobs(hidden, weight, None, 0.7).double(), expected, rtol=0, atol=2e-6)


@pytest.mark.parametrize("run", [tiled_loss, score_head])
def test_inputs_that_do_not_fit_are_refused(run) -> None:
    hidden, weight, bias = inputs()
    tile_fn = curved_loss(T)
    for arguments, message in [
        ((hidden[None], weight, None, 1.0), "hidden"),
        ((hidden, weight.t(), None, 1.0), "hidden"),
        ((hidden, weight.float(), None, 1.0), "float32"),
        ((hidden, weight, bias[:1], 1.0), "bias"),
        ((hidden, weight, None, 0.0), "temperature"),
        ((hidden, weight, None, float("nan")), "temperature"),
    ]:
        with pytest.raises(ValueError, match=message):
            run(*arguments, tile_fn)


def test_a_closure_without_a_loss_is_an_error() -> None:
    hidden, weight, _ = inputs()
    with pytest.raises(KeyError, match="loss"):
        tiled_loss(hidden, weight, None, 1.0, lambda p, rows: {"kl": p.sum()})
