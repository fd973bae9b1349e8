"""The cross entropy of a linear layer, in chunks, against the scores of the whole batch."""

import pytest
import torch
import torch.nn.functional as F
from torch._dynamo.testing import CompileCounterWithBackend

from lightning_modules.models import linear_cross_entropy as file
from lightning_modules.models.linear_cross_entropy import linear_cross_entropy

N, C, V = 50, 8, 37


@pytest.fixture(autouse=True)
def _as_with_many_scores(monkeypatch):
    monkeypatch.setattr(file, "_FEW_SCORES", 0)


@pytest.fixture(params=["one chunk", "many chunks"])
def _chunks(request, monkeypatch):
    if request.param == "many chunks":
        monkeypatch.setattr(file, "_BYTES_ON_CPU", 16 * V * 4)  # 13, 13, 13 and 11 rows
        monkeypatch.setattr(file, "_SCORES_COMPILED", 16 * V)
        monkeypatch.setattr(file, "_MIN_ROWS", 1)


def example(dtype=torch.float32):
    generator = torch.Generator().manual_seed(0)
    shapes = {"inputs": (N, C), "weight": (V, C), "bias": (V,)}
    tensors = {
        name: torch.randn(shape, generator=generator, dtype=dtype).requires_grad_() for name, shape in shapes.items()
    }
    targets = torch.randint(V, (N,), generator=generator)
    targets[::5] = -100
    return tensors, targets


def reference(tensors, targets, soft_cap=None, reduction="mean"):
    scores = F.linear(*(tensor.double() for tensor in tensors.values()))
    if soft_cap is not None:
        scores = soft_cap * torch.tanh(scores / soft_cap)
    return F.cross_entropy(scores, targets, reduction=reduction)


def gradients(loss, tensors):
    return torch.autograd.grad(3 * loss, list(tensors.values()))  # the loss is scaled, as by a float16 scaler


@pytest.mark.usefixtures("_chunks")
@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("soft_cap", [None, 2.0])
@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_loss_and_gradients_are_exact_in_float32(compiled, soft_cap, reduction):
    tensors, targets = example()
    function = linear_cross_entropy
    if compiled:
        torch._dynamo.reset()
        function = torch.compile(linear_cross_entropy, backend="aot_eager", fullgraph=True)
    options = {"soft_cap": soft_cap, "reduction": reduction}
    found = function(tensors["inputs"], tensors["weight"], targets, tensors["bias"], **options)
    expected = reference(tensors, targets, soft_cap, reduction)
    assert found.dtype == torch.float32
    torch.testing.assert_close(found, expected.float(), rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(gradients(found, tensors), gradients(expected, tensors), rtol=1e-5, atol=1e-6)


@pytest.mark.usefixtures("_chunks")
@pytest.mark.parametrize("soft_cap", [None, 2.0])
def test_the_form_that_a_gpu_compiles_computes_the_same(soft_cap):
    tensors, targets = example()
    arguments = (*(tensor.detach() for tensor in tensors.values()), targets, (targets != -100).float(), soft_cap)
    for wanted in ([True, True, True], [False, True, False], [False, False, False]):
        expected = file._chunks(*arguments, wanted)
        found = file._chunks(*arguments, wanted, file._of_scores_without_scatter)
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)
        with torch._subclasses.FakeTensorMode(allow_non_fake_inputs=True):
            described = file._opaque_chunks(*arguments, wanted)
        assert [(part.shape, part.dtype) for part in described] == [(part.shape, part.dtype) for part in found]


@pytest.mark.usefixtures("_chunks")
def test_the_loss_of_each_row():
    tensors, targets = example()
    shape = (5, 10)
    nats = linear_cross_entropy(
        tensors["inputs"].view(*shape, C), tensors["weight"], targets.view(shape), tensors["bias"], reduction="none"
    )
    assert not nats.requires_grad
    torch.testing.assert_close(nats, reference(tensors, targets, reduction="none").float().view(shape))
    none = linear_cross_entropy(tensors["inputs"][:0], tensors["weight"], targets[:0], reduction="none")
    assert none.shape == (0,)


@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_few_scores_are_left_to_torch(monkeypatch, reduction):
    monkeypatch.setattr(file, "_FEW_SCORES", N * V)
    monkeypatch.setattr(file, "_chunks", None)
    tensors, targets = example()
    found = linear_cross_entropy(tensors["inputs"], tensors["weight"], targets, tensors["bias"], reduction=reduction)
    torch.testing.assert_close(found, reference(tensors, targets, reduction=reduction).float())


@pytest.mark.usefixtures("_chunks")
def test_rows_have_weights_and_only_what_is_trained_gets_a_gradient():
    tensors, targets = example()
    weights = torch.rand(N, generator=torch.Generator().manual_seed(1), requires_grad=True)
    tensors["weight"].requires_grad_(False)
    arguments = tensors["inputs"], tensors["weight"], targets, tensors["bias"]
    nats = reference(tensors, targets, reduction="none").float()
    expected = (nats * weights.detach()).sum() / weights[targets >= 0].sum().detach()
    found = linear_cross_entropy(*arguments, row_weights=weights)
    torch.testing.assert_close(found, expected)
    found.backward()
    assert tensors["weight"].grad is None
    assert weights.grad is None
    (by_inputs,) = torch.autograd.grad(expected, [tensors["inputs"]])
    torch.testing.assert_close(tensors["inputs"].grad, by_inputs, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(("dtype", "near"), [(torch.bfloat16, 0.02), (torch.float16, 0.003)])
def test_under_autocast_the_loss_and_the_gradients_are_close(dtype, near):
    tensors, targets = example()
    with torch.autocast("cpu", dtype):
        found = linear_cross_entropy(tensors["inputs"], tensors["weight"], targets, tensors["bias"])
    assert found.dtype == torch.float32
    expected = reference(tensors, targets).float()
    torch.testing.assert_close(found, expected, rtol=near, atol=near)
    for one, other in zip(gradients(found, tensors), gradients(expected, tensors), strict=True):
        assert one.dtype == torch.float32
        torch.testing.assert_close(one, other, rtol=near, atol=near)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
@pytest.mark.parametrize("nats", [0.0, 18.0, 60.0, 500.0])
def test_a_small_probability_keeps_its_logarithm(dtype, nats):
    """In float16, exp(-18) rounds to 0."""
    inputs, weight = torch.ones(1, 1), torch.tensor([[nats], [0.0]]).requires_grad_()
    with torch.autocast("cpu", dtype, enabled=dtype != torch.float32):
        loss = linear_cross_entropy(inputs, weight, torch.tensor([1]))
        exact = linear_cross_entropy(inputs, weight, torch.tensor([1]), reduction="none")
    expected = torch.nn.functional.softplus(torch.tensor(nats)).item()
    assert exact.item() == pytest.approx(expected, rel=1e-6)
    assert loss.item() == pytest.approx(expected, abs=4e-3 if dtype == torch.bfloat16 else 1e-5)


@pytest.mark.parametrize("target", [-1, 7])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_a_target_that_is_no_class_is_an_error(dtype, target):
    inputs, weight = torch.ones(3, 2, dtype=dtype), torch.ones(7, 2, dtype=dtype).requires_grad_()
    with pytest.raises((IndexError, RuntimeError)):
        linear_cross_entropy(inputs, weight, torch.tensor([0, target, -100]))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_other_precisions_of_the_model(dtype):
    tensors, targets = example(dtype)
    found = linear_cross_entropy(tensors["inputs"], tensors["weight"], targets, tensors["bias"])
    assert found.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    tolerance = 0.02 if dtype == torch.bfloat16 else 1e-12
    torch.testing.assert_close(found.double(), reference(tensors, targets), rtol=tolerance, atol=tolerance)
    assert {gradient.dtype for gradient in gradients(found, tensors)} == {dtype}


@pytest.mark.slow
def test_a_number_of_rows_that_varies_is_compiled_once():
    torch._dynamo.reset()
    counter = CompileCounterWithBackend("aot_eager")
    function = torch.compile(linear_cross_entropy, backend=counter, fullgraph=True, dynamic=True)
    tensors, targets = example()
    for n in (50, 24, 12):
        rows = tensors["inputs"].detach()[:n].clone().requires_grad_()
        function(rows, tensors["weight"], targets[:n].clone()).backward()
    assert counter.frame_count == 1


def test_the_scores_of_a_batch_are_never_whole(monkeypatch):
    monkeypatch.setattr(file, "_BYTES_ON_CPU", 10 * V * 4)
    monkeypatch.setattr(file, "_MIN_ROWS", 1)
    sizes = []

    class Sizes(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            result = function(*args, **(kwargs or {}))
            parts = result if isinstance(result, tuple) else (result,)
            sizes.extend(part.numel() for part in parts if isinstance(part, torch.Tensor))
            return result

    tensors, targets = example()
    with Sizes():
        linear_cross_entropy(tensors["inputs"], tensors["weight"], targets, tensors["bias"]).backward()
    assert max(sizes) == max(10 * V, N * C)
