"""The softmax cross entropy of a linear layer over a large vocabulary, for models that spend most of their time in it.

`F.linear` and `F.cross_entropy` pass over the scores (B, V) about ten times, in float32. This implementation makes four
passes: one product for all terms of the layer, the softmax, and the two products of its gradient, p - one_hot(target),
which overwrites the softmax. Under autocast all four run in low precision, whose matrix units are several times as
fast, with sums in float32. Two further savings are in memory: rows are padded to a round number of columns, and the
large tensors are reused from step to step, because new memory from the system costs a page fault for every 4 KiB.
"""

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

Terms = list[tuple[Tensor, Tensor]]  # inputs (B, k) and weights (V, k); the scores are the sum of inputs @ weights.T

_ROUND = 32  # columns; matrix units run at less than half their speed unless their number is a multiple of this


class LinearCrossEntropy:
    """Mean cross entropy of the scores `sum of inputs @ weights.T`; it reuses its memory from call to call."""

    def __init__(self) -> None:
        self._kept: dict[str, Tensor] = {}

    def __call__(self, terms: Terms, targets: Tensor) -> Tensor:
        """Return the mean loss in nats, a scalar; it can be differentiated once, before the next call.

        Args:
            terms: Pairs of inputs (B, k) and weights (V, k), whose products are summed to the scores (B, V).
            targets: True classes, (B,) int64.
        """
        device = targets.device.type
        dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else terms[0][1].dtype
        return _LinearCrossEntropy.apply(self, dtype, targets, *(tensor for term in terms for tensor in term))

    def __deepcopy__(self, memo: dict[int, Any]) -> "LinearCrossEntropy":
        return LinearCrossEntropy()

    def __getstate__(self) -> dict[str, Any]:
        return {"_kept": {}}

    def empty(self, name: str, shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
        """Return a tensor to write to: the one of that name from an earlier call, if it fits."""
        kept = self._kept.get(name)
        if kept is None or kept.shape != shape or kept.dtype != dtype or kept.device != device:
            kept = self._kept[name] = torch.zeros(shape, dtype=dtype, device=device)
        return kept

    def side_by_side(self, name: str, parts: tuple[Tensor, ...], dtype: torch.dtype) -> Tensor:
        """Return the columns of several tensors in one, followed by columns of zeros up to a round number."""
        width = sum(part.shape[1] for part in parts)
        shape = (len(parts[0]), -(-width // _ROUND) * _ROUND)
        joined = self.empty(name, shape, dtype, parts[0].device)
        start = 0
        for part in parts:
            joined[:, start : start + part.shape[1]] = part
            start += part.shape[1]
        joined[:, start:] = 0
        return joined


class _LinearCrossEntropy(torch.autograd.Function):
    """The forward and backward pass of `LinearCrossEntropy`."""

    @staticmethod
    def forward(ctx: Any, memory: LinearCrossEntropy, dtype: torch.dtype, targets: Tensor, *parts: Tensor) -> Tensor:
        inputs = memory.side_by_side("inputs", parts[0::2], dtype)  # (B, K)
        weights = memory.side_by_side("weights", parts[1::2], dtype)  # (V, K)
        shape = (len(inputs), len(weights))
        scores = memory.empty("scores", shape, dtype, inputs.device)
        softmax = memory.empty("softmax", shape, dtype, inputs.device)
        torch.mm(inputs, weights.T, out=scores)
        torch.softmax(scores, dim=1, out=softmax)
        ctx.inputs, ctx.weights, ctx.softmax, ctx.targets = inputs, weights, softmax, targets
        ctx.columns = [(part.shape[1], part.dtype) for part in parts[0::2]]
        return -softmax.gather(1, targets[:, None]).float().clamp_min(1e-30).log().mean()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        scale = gradient / len(ctx.targets)
        error = ctx.softmax  # (B, V); becomes p - one_hot(target), the gradient of the summed loss by the scores
        error[torch.arange(len(error), device=error.device), ctx.targets] -= 1
        by_inputs = (error @ ctx.weights) * scale  # (B, K)
        by_weights = error.T @ (ctx.inputs * scale).to(error.dtype)  # (V, K)
        gradients: list[Tensor] = []
        start = 0
        for width, dtype in ctx.columns:
            columns = slice(start, start + width)
            gradients += [by_inputs[:, columns].to(dtype), by_weights[:, columns].float()]
            start += width
        return None, None, None, *gradients
