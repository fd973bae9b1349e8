"""Changes to the compiled step of a run that could make it faster, to time one at a time and together."""

import contextlib
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from typing import Any
from unittest import mock

import torch
from gpu.clock import Clock
from gpu.runs import Line, Settings, bare_loop, free
from torch import Tensor, nn

from lightning_modules.models import feed_forward, linear_cross_entropy
from lightning_modules.models.attention import MultiHeadAttention

Variant = Callable[[Clock], AbstractContextManager[Any]]


def flash_attention(clock: Clock) -> AbstractContextManager[Any]:
    """The flash kernels of torch, before cuDNN's, which torch 2.11 prefers on an H100, an H200 and a B200."""
    backends = nn.attention.SDPBackend
    order = [backends.FLASH_ATTENTION, backends.CUDNN_ATTENTION, backends.EFFICIENT_ATTENTION, backends.MATH]
    return nn.attention.sdpa_kernel(order, set_priority=True)


def kept_activations(clock: Clock) -> AbstractContextManager[Any]:
    """φ(h) kept for the backward pass, instead of computed again."""
    return mock.patch.object(feed_forward, "checkpoint", lambda activation, h, **_: activation(h))


def added_in_the_product(clock: Clock) -> AbstractContextManager[Any]:
    """The gradient of the output matrix added up within the matrix product."""

    def add_product(total: Tensor | None, a: Tensor, b: Tensor) -> Tensor:
        if total is None or total.device.type != "cuda":
            return usual(total, a, b)
        return torch.addmm(total, a, b, out_dtype=total.dtype, out=total)  # type: ignore[call-overload, no-any-return]

    usual = linear_cross_entropy._add_product
    return mock.patch.object(linear_cross_entropy, "_add_product", add_product)


def larger_chunks(clock: Clock) -> AbstractContextManager[Any]:
    """Twice as many rows in a chunk of the loss."""
    return mock.patch.object(linear_cross_entropy, "_SCORES_IN_ONE_KERNEL", 2**29)


def loss_in_the_graph(clock: Clock) -> AbstractContextManager[Any]:
    """The loss in the same graph as the model."""
    return mock.patch.object(linear_cross_entropy, "_opaque_chunks", linear_cross_entropy._chunks)


def coordinate_descent(clock: Clock) -> AbstractContextManager[Any]:
    """The compiler's search for better block sizes."""
    return torch._inductor.config.patch(coordinate_descent_tuning=True)


def fused_products(clock: Clock) -> AbstractContextManager[Any]:
    """Matrix products chosen by a search, also kernels of the compiler that fuse what follows them."""
    return torch._inductor.config.patch(max_autotune_gemm=True)


@contextlib.contextmanager
def no_dropout(clock: Clock) -> Iterator[None]:
    """No dropout: not a choice, but what it costs."""
    layers = [layer for layer in clock.module.modules() if isinstance(layer, nn.Dropout)]
    attentions = [layer for layer in clock.module.modules() if isinstance(layer, MultiHeadAttention)]
    before = [layer.p for layer in layers], [attention.dropout for attention in attentions]
    for layer in layers:
        layer.p = 0.0
    for attention in attentions:
        attention.dropout = 0.0
    try:
        yield
    finally:
        for layer, p in zip(layers, before[0], strict=True):
            layer.p = p
        for attention, p in zip(attentions, before[1], strict=True):
            attention.dropout = p


LARGE: tuple[Variant, ...] = (
    flash_attention, added_in_the_product, larger_chunks, kept_activations, coordinate_descent, fused_products
)  # fmt: skip
SMALL: tuple[Variant, ...] = (
    flash_attention, loss_in_the_graph, kept_activations, coordinate_descent, no_dropout, fused_products
)  # fmt: skip


def variants(settings: Settings, clock: Clock, chosen: tuple[Variant, ...], steps: int, every: int) -> Iterator[Line]:
    """Yield a line for the bare loop with each variant, and with all together that make it faster."""

    def line(who: str, *changes: Variant) -> Line:
        with contextlib.ExitStack() as stack:
            for change in changes:
                stack.enter_context(change(clock))
            stack.enter_context(settings.compiler())
            stack.enter_context(mock.patch.object(clock.module, "_compiled_loss", None))
            free()
            linear_cross_entropy._compiled_of_scores.cache_clear()
            try:
                times = bare_loop(clock, steps, every)
            except (RuntimeError, TypeError) as error:  # this version of torch cannot
                return Line(who, {"failed": str(error).splitlines()[0][:80]})
        return Line(who, {"ms a step": times.seconds * 1e3, "peak GiB": times.peak})

    usual = line("as it is")
    yield usual
    faster = []
    for change in chosen:
        found = line(change.__name__.replace("_", " "), change)
        if "failed" not in found.figures:
            found.figures["as it is / this"] = usual.figures["ms a step"] / found.figures["ms a step"]
            if change is not no_dropout and found.figures["as it is / this"] > 1.002:
                faster.append(change)
        yield found
    yield line("all that are faster", *faster)
    yield line("as it is, again")
    free()
