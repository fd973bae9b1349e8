"""The cross entropy of a linear layer over a large vocabulary, without the scores of a whole batch in memory.

For rows x_i, (C,), with target classes t_i and weights w_i, an output matrix W, (V, C), and a bias b,

    z_i = W x_i + b,    s_i = z_i  or  cap tanh(z_i / cap),    nats_i = log Σ_j exp(s_ij) - s_it,

the loss is Σ_i w_i nats_i. Its gradients are

    ∂/∂s_ij = w_i (softmax(s_i)_j - [j = t_i]),    ∂/∂z_ij = ∂/∂s_ij (1 - tanh²(z_ij / cap)) with a cap, else ∂/∂s_ij,
    ∂/∂x_i = ∂/∂z_i W,    ∂/∂W = Σ_i ∂/∂z_i x_iᵀ.

The scores (N, V) are the largest tensor of a training step: with 65,536 tokens and the vocabulary of GPT-2, 13 GB in
float32, and `F.cross_entropy` keeps two or three such tensors. But neither gradient needs the scores of other rows. So
the rows are processed in chunks, and the forward pass computes the gradients of a chunk while it has the scores; the
backward pass multiplies the sums by the gradient of the loss. Hsu et al., "Liger Kernel" (2024, arXiv:2410.10989,
https://arxiv.org/abs/2410.10989), section 3.2, do the same in Triton. Here `torch.compile` makes one kernel of the
operations on the scores of a chunk.

The matrix products are in the precision of autocast, or else of the inputs; everything else is at least in float32,
except the softmax of bfloat16 scores on a CPU. The softmax is computed from differences of scores, s_ij - max_k s_ik,
and the logarithm is not taken of a small probability: in float16, those below 6e-8 are 0.
"""

from collections.abc import Callable, Sequence
from functools import cache
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

# Target of a row without a loss: the default `ignore_index` of `F.cross_entropy`. The same number is in
# `common/targets.py`, which imports no torch, and which the models do not import.
IGNORED = -100

# Bytes or numbers of the scores in a chunk. On a CPU they stay in the cache, and the memory allocator keeps the memory
# from chunk to chunk. On a GPU, in one kernel, they are 0.5 GiB in bfloat16, with enough rows for its matrix units;
# otherwise there are several tensors of their size, in float32.
_BYTES_ON_CPU, _SCORES_ON_ACCELERATOR, _SCORES_IN_ONE_KERNEL = 2**24, 2**25, 2**28
_SCORES_COMPILED = 2**26  # at least, in a compiled function, which holds the code of each chunk
_FEW_SCORES = 2**19  # at most, on a CPU: torch's own functions take less time, as there is next to nothing to save
_MATRIX_UNIT = 32  # columns; the matrix units of a CPU run at half their speed if their number is not a multiple of it
_MIN_ROWS = 256  # in a chunk: with fewer, reading W and adding to its gradient take longer than the products


def linear_cross_entropy(
    inputs: Tensor,
    weight: Tensor,
    targets: Tensor,
    bias: Tensor | None = None,
    *,
    row_weights: Tensor | None = None,
    soft_cap: float | None = None,
    reduction: Literal["mean", "sum", "none"] = "mean",
) -> Tensor:
    """Return the cross entropy of the scores `F.linear(inputs, weight, bias)` in nats, at least in float32.

    Args:
        inputs: Inputs of the linear layer, (..., C).
        weight: Output matrix W, (V, C).
        targets: True classes, (...) int64; `IGNORED` where a row has no loss. Another number that is no class is an
            error, but not in a function compiled for a GPU, where such a row has no loss.
        bias: Bias of the linear layer, (V,).
        row_weights: Weight of the loss of each row, (...), not negative; 1 by default. It gets no gradient.
        soft_cap: If given, the scores z become `soft_cap * tanh(z / soft_cap)` (Gemma 2, 2024, arXiv:2408.00118).
        reduction: `mean`, weighted, over the rows with a target; `sum`, weighted; or `none`, the loss of each row
            without its weight, (...), which cannot be differentiated and is 0 without a target.
    """
    few = targets.numel() * len(weight) <= _FEW_SCORES and weight.device.type == "cpu"
    if few and row_weights is None and soft_cap is None and reduction != "none" and not torch.compiler.is_compiling():
        scores = F.linear(inputs.flatten(0, -2), weight, bias)
        return F.cross_entropy(
            scores.to(_sum_dtype(scores)), targets.flatten(), ignore_index=IGNORED, reduction=reduction
        )
    weights = (targets != IGNORED).flatten().to(_sum_dtype(weight))
    if row_weights is not None:
        weights = weights * row_weights.detach().flatten()
    arguments = inputs.flatten(0, -2), weight, bias, targets.flatten(), weights, soft_cap
    if reduction == "none":
        with torch.no_grad():
            nats, _ = _nats_and_gradients(*arguments, (False, False, False))
        return nats.view(targets.shape)
    total = _WeightedSum.apply(*arguments)
    return total if reduction == "sum" else total / weights.sum()


class _WeightedSum(torch.autograd.Function):
    """The weighted sum of the loss over rows; its forward pass computes the gradients too."""

    @staticmethod
    def forward(
        ctx: Any,
        inputs: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        targets: Tensor,
        row_weights: Tensor,
        soft_cap: float | None,
    ) -> Tensor:
        wanted = ctx.needs_input_grad[:3]
        nats, gradients = _nats_and_gradients(inputs, weight, bias, targets, row_weights, soft_cap, wanted)
        ctx.save_for_backward(*gradients)
        ctx.dtypes = [tensor.dtype if tensor is not None else None for tensor in (inputs, weight, bias)]
        return (nats * row_weights).sum()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        scaled = [
            None if saved is None else (saved * gradient).to(dtype)
            for saved, dtype in zip(ctx.saved_tensors, ctx.dtypes, strict=True)
        ]
        return *scaled, None, None, None


def _nats_and_gradients(
    inputs: Tensor,  # (N, C)
    weight: Tensor,  # (V, C)
    bias: Tensor | None,  # (V,)
    targets: Tensor,  # (N,)
    row_weights: Tensor,  # (N,)
    soft_cap: float | None,
    wanted: Sequence[bool],
) -> tuple[Tensor, tuple[Tensor | None, ...]]:
    """Return the loss of each row, (N,), and the wanted gradients of its weighted sum by inputs, weight and bias."""
    dtype = _product_dtype(weight)
    x, w, b = inputs.to(dtype), weight.to(dtype), None if bias is None else bias.to(dtype)
    width = x.size(1)
    if _on_cpu_in_bfloat16(x):
        x, w = (F.pad(part, (0, -width % _MATRIX_UNIT)) for part in (x, w))
    arguments = x, w, b, targets, row_weights, soft_cap, wanted
    # In one graph with the model, the compiler would keep the scores of many chunks at once.
    opaque = torch.compiler.is_compiling() and x.device.type == "cuda"
    nats, by_inputs, by_weight, by_bias = _opaque_chunks(*arguments) if opaque else _chunks(*arguments)
    return nats, (
        by_inputs[:, :width] if wanted[0] else None,
        by_weight[:, :width] if wanted[1] else None,
        by_bias if wanted[2] else None,
    )


def _chunks(
    x: Tensor,  # (N, C)
    w: Tensor,  # (V, C)
    b: Tensor | None,  # (V,)
    targets: Tensor,  # (N,)
    row_weights: Tensor,  # (N,)
    soft_cap: float | None,
    wanted: Sequence[bool],
    of_scores: Callable[..., tuple[Tensor, Tensor]] | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return the loss of each row and the three gradients, or a tensor without elements for one that is not wanted.

    `of_scores` returns the loss of the rows of a chunk, and the gradient by its scores; `None` means `_of_scores`.
    """
    n_chunks = max(1, _number_of_chunks(x, len(w), in_one_kernel=of_scores is not None))
    n_rows = -(-len(x) // n_chunks)
    nats, by_inputs = [], []
    by_weight = by_bias = None
    with torch.autocast(x.device.type, enabled=False):
        for chunk in range(n_chunks):
            rows = slice(chunk * n_rows, (chunk + 1) * n_rows)
            scores = F.linear(x[rows], w, b)  # (n, V)
            found, error = (of_scores or _of_scores)(scores, targets[rows, None], any(wanted), soft_cap)
            nats.append(found)
            weights = row_weights[rows, None].to(x.dtype)  # (n, 1)
            if wanted[0]:
                by_inputs.append((error @ w).mul_(weights))
            if wanted[1]:
                by_weight = _add_product(by_weight, error.T, x[rows] * weights)
            if wanted[2]:
                by_bias = _add_product(by_bias, error.T, weights)
    nothing = [x.new_empty(0) for _ in range(3)]
    return (
        torch.cat(nats),
        torch.cat(by_inputs) if wanted[0] else nothing[0],
        nothing[1] if by_weight is None else by_weight,
        nothing[2] if by_bias is None else by_bias[:, 0],
    )


def _of_scores(scores: Tensor, targets: Tensor, differentiate: bool, soft_cap: float | None) -> tuple[Tensor, Tensor]:
    """Return the loss of each row, (n,), and its gradient by the scores, (n, V), which is meaningless without a target.

    Args:
        scores: z, (n, V).
        targets: True classes, (n, 1).
        differentiate: Whether the gradient is needed.
        soft_cap: As above.
    """
    dtype = _sum_dtype(scores)
    if _on_cpu_in_bfloat16(scores) and differentiate and soft_cap is None:
        return _of_scores_in_bfloat16(scores, targets)
    if soft_cap is not None:
        slope = torch.tanh(scores.to(dtype) / soft_cap)
    log_p = torch.log_softmax(scores if soft_cap is None else soft_cap * slope, dim=1, dtype=dtype)
    target = targets.masked_fill(targets == IGNORED, 0)  # any class where there is none
    log_p_target = log_p.gather(1, target)  # (n, 1)
    nats = torch.where(targets == IGNORED, 0.0, -log_p_target)[:, 0]
    if not differentiate:
        return nats, scores
    error = _with_targets(log_p.exp_(), target, log_p_target.expm1())  # softmax - one_hot(target)
    if soft_cap is not None:
        error = error * (1 - slope.square())
    return nats, error.to(scores.dtype)


def _of_scores_in_bfloat16(scores: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    """Return what `_of_scores` does, with the softmax rounded to bfloat16, so that a loss is up to 0.004 nats off.

    The matrix units of a CPU are so fast that passes over the scores in float32 would take most of the time. The
    rounding of the scores themselves changes the loss more.
    """
    target = targets.masked_fill(targets == IGNORED, 0)
    p = torch.softmax(scores, dim=1)
    # log p = s - max s + log max p: the smallest p that is not 0 has a logarithm of -92.
    below = scores.gather(1, target).float() - scores.amax(1, keepdim=True).float()  # (n, 1)
    log_p_target = below + p.amax(1, keepdim=True).float().log()
    nats = torch.where(targets == IGNORED, 0.0, -log_p_target)[:, 0]
    return nats, _with_targets(p, target, log_p_target.expm1())


def _with_targets(scores: Tensor, targets: Tensor, values: Tensor) -> Tensor:
    """Set the value of each row, (n, 1), at its target; `scatter_` would copy bfloat16 twice."""
    scores[torch.arange(len(scores), device=scores.device), targets[:, 0]] = values[:, 0].to(scores.dtype)
    return scores


def _on_cpu_in_bfloat16(tensor: Tensor) -> bool:
    return tensor.device.type == "cpu" and tensor.dtype == torch.bfloat16 and not torch.compiler.is_compiling()


def _of_scores_without_scatter(
    scores: Tensor, targets: Tensor, differentiate: bool, soft_cap: float | None
) -> tuple[Tensor, Tensor]:
    """Return what `_of_scores` does, in a form of which a compiler makes one kernel."""
    s = scores.to(_sum_dtype(scores))
    if soft_cap is not None:
        slope = torch.tanh(s / soft_cap)
        s = soft_cap * slope
    is_target = torch.arange(s.size(1), device=s.device) == targets  # (n, V)
    log_p = s - s.logsumexp(1, keepdim=True)
    nats = -torch.where(is_target, log_p, 0.0).sum(1)
    if not differentiate:
        return nats, scores
    error = torch.where(is_target, log_p.expm1(), log_p.exp())
    if soft_cap is not None:
        error = error * (1 - slope.square())
    return nats, error.to(scores.dtype)


@cache
def _compiled_of_scores() -> Callable[..., tuple[Tensor, Tensor]]:
    return torch.compile(_of_scores_without_scatter)


@torch.library.custom_op("llm_train::cross_entropy_chunks", mutates_args=())
def _opaque_chunks(
    x: Tensor,
    w: Tensor,
    b: Tensor | None,
    targets: Tensor,
    row_weights: Tensor,
    soft_cap: float | None,
    wanted: Sequence[bool],
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return what `_chunks` does, as one operation that a compiler does not look into."""
    return _chunks(x, w, b, targets, row_weights, soft_cap, wanted, _compiled_of_scores())


@_opaque_chunks.register_fake
def _(
    x: Tensor,
    w: Tensor,
    b: Tensor | None,
    targets: Tensor,
    row_weights: Tensor,
    soft_cap: float | None,
    wanted: Sequence[bool],
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    dtype = _sum_dtype(w)
    return (
        x.new_empty(len(x), dtype=dtype),
        torch.empty_like(x) if wanted[0] else x.new_empty(0),
        w.new_empty(w.shape, dtype=dtype) if wanted[1] else x.new_empty(0),
        w.new_empty(len(w), dtype=dtype) if wanted[2] else x.new_empty(0),
    )


def _add_product(total: Tensor | None, a: Tensor, b: Tensor) -> Tensor:
    """Return `total + a @ b`, where the total is at least in float32."""
    if a.dtype == _sum_dtype(a):
        return a @ b if total is None else total.addmm_(a, b)
    product = torch.mm(a, b, out_dtype=_sum_dtype(a)) if a.device.type == "cuda" else (a @ b).to(_sum_dtype(a))
    return product if total is None else total.add_(product)


def _product_dtype(weight: Tensor) -> torch.dtype:
    """Return the precision of the matrix products: that of autocast, or else of the weight."""
    device, dtype = weight.device.type, weight.dtype
    if torch.is_autocast_enabled(device) and dtype != torch.float64:
        dtype = torch.get_autocast_dtype(device)
    # On a CPU, float16 is slower than float32, and a sum over rows may exceed its largest number.
    return torch.float32 if device == "cpu" and dtype == torch.float16 else dtype


def _sum_dtype(tensor: Tensor) -> torch.dtype:
    """Return the precision of losses and of sums over rows."""
    return torch.promote_types(tensor.dtype, torch.float32)


def _number_of_chunks(x: Tensor, n_classes: int, in_one_kernel: bool) -> int:
    """Return the number of chunks of rows; in a compiled function it is constant for a range of numbers of rows."""
    if x.device.type == "cpu":
        n_scores = _BYTES_ON_CPU // x.itemsize
        if _on_cpu_in_bfloat16(x):
            n_scores *= 2  # adding to the gradient of W takes as long as a product, so that fewer chunks are better
    else:
        n_scores = _SCORES_IN_ONE_KERNEL if in_one_kernel else _SCORES_ON_ACCELERATOR
    if torch.compiler.is_compiling():
        n_scores = max(n_scores, _SCORES_COMPILED)
    return -(-len(x) // max(n_scores // n_classes, _MIN_ROWS))
