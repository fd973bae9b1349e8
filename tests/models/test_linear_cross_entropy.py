"""Tests of the cross entropy over a large vocabulary, against `F.cross_entropy` in float64."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from lightning_modules.common.targets import IGNORED
from lightning_modules.models import linear_cross_entropy as module
from lightning_modules.models.linear_cross_entropy import linear_cross_entropy

N, C, V = 40, 16, 300


@pytest.fixture
def problem(monkeypatch):
    """Inputs, weight, bias, targets of which some are ignored, and row weights, 0 there; seven chunks of rows."""
    monkeypatch.setattr(module, "_SCORES_ON_CPU", 6 * V)
    monkeypatch.setattr(module, "_MIN_ROWS", 1)
    generator = torch.Generator().manual_seed(0)
    inputs, weight, bias = (torch.randn(shape, generator=generator) for shape in ((N, C), (V, C), (V,)))
    targets = torch.randint(V, (N,), generator=generator)
    targets[::5] = IGNORED
    return inputs, weight, bias, targets, torch.rand(N, generator=generator) * (targets != IGNORED)


def expected(inputs: Tensor, weight: Tensor, bias: Tensor, targets: Tensor, cap: float | None) -> Tensor:
    """Return the loss of each row in float64."""
    scores = F.linear(inputs.double(), weight.double(), bias.double())
    if cap is not None:
        scores = cap * torch.tanh(scores / cap)
    return F.cross_entropy(scores, targets, ignore_index=IGNORED, reduction="none")


@pytest.mark.parametrize("cap", [None, 5.0])
@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_loss_and_gradients_are_those_of_all_scores_at_once(problem, cap, reduction):
    *tensors, targets, row_weights = problem
    for tensor in tensors:
        tensor.requires_grad_()
    loss = linear_cross_entropy(
        tensors[0], tensors[1], targets, tensors[2], row_weights=row_weights, soft_cap=cap, reduction=reduction
    )
    found = torch.autograd.grad(3 * loss, tensors)
    rows = expected(*tensors, targets, cap) * row_weights
    whole = rows.sum() / (row_weights.sum() if reduction == "mean" else 1)
    torch.testing.assert_close(loss.double(), whole, rtol=1e-5, atol=1e-6)
    for mine, true in zip(found, torch.autograd.grad(3 * whole, tensors), strict=True):
        torch.testing.assert_close(mine, true.float(), rtol=1e-4, atol=1e-5)


def test_the_loss_of_each_row_is_zero_without_a_target(problem):
    inputs, weight, bias, targets, _ = problem
    rows = linear_cross_entropy(inputs, weight, targets, bias, reduction="none")
    torch.testing.assert_close(rows.double(), expected(inputs, weight, bias, targets, None), rtol=1e-5, atol=1e-6)
    assert (rows[::5] == 0).all()


def test_a_probability_below_the_smallest_float16_has_its_logarithm(problem):
    inputs, weight, *_ = problem
    inputs, weight = torch.ones(1, C), torch.cat([torch.full((1, C), 2.5), torch.zeros(V - 1, C)])
    with torch.autocast("cpu", torch.float16):
        loss = linear_cross_entropy(inputs, weight, torch.tensor([1]))
    assert loss.item() == pytest.approx(2.5 * C, rel=1e-3)  # e^-40 is far below 6e-8


@pytest.mark.parametrize("cap", [None, 5.0])
def test_the_form_that_is_compiled_to_one_kernel_is_equal(problem, cap):
    inputs, weight, bias, targets, row_weights = problem
    scores = F.linear(inputs, weight, bias)
    arguments = scores, targets[:, None], row_weights[:, None], cap
    for mine, other in zip(module._of_scores(*arguments), module._of_scores_without_scatter(*arguments), strict=True):
        torch.testing.assert_close(mine, other, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("wanted", [(True, True, True), (False, True, False)])
def test_the_operation_that_is_opaque_to_the_compiler_is_equal(problem, wanted):
    inputs, weight, bias, targets, row_weights = problem
    arguments = inputs, weight, bias, targets, row_weights, None, wanted
    with torch.compiler.set_stance("force_eager"):
        found = module._opaque_chunks(*arguments)
    for mine, other in zip(found, module._chunks(*arguments), strict=True):
        torch.testing.assert_close(mine, other, rtol=1e-4, atol=1e-6)
    torch.library.opcheck(module._opaque_chunks, arguments, test_utils=("test_schema", "test_faketensor"))


def test_it_is_one_graph(problem):
    inputs, weight, bias, targets, _ = problem
    compiled = torch.compile(linear_cross_entropy, backend="eager", fullgraph=True)
    loss = compiled(inputs, weight, targets, bias)
    torch.testing.assert_close(loss, linear_cross_entropy(inputs, weight, targets, bias))
