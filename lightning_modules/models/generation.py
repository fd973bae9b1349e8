"""Generation: draw the next token, append it, and repeat.

    p = softmax(logits / temperature)

A temperature below 1 sharpens the distribution, one above 1 flattens it, and 0 takes the most probable token (greedy).
top_k keeps the k most probable tokens. top_p keeps the smallest set of the most probable tokens whose probabilities sum
to at least p. The kept probabilities are rescaled to sum to 1. Both remove the tail of the distribution: each of its
tokens is improbable, but together they would be drawn often.

Papers: Fan et al., "Hierarchical Neural Story Generation" (top-k, 2018), https://arxiv.org/abs/1805.04833; Holtzman et
al., "The Curious Case of Neural Text Degeneration" (top-p, 2020), https://arxiv.org/abs/1904.09751.
"""

import math
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor


class CachedModel(Protocol):
    """Interface of a model that `generate` accepts, such as `models.decoder.Decoder`."""

    config: Any  # with the `vocab_size` and the `block_size` of the model
    training: bool

    def new_cache(self) -> list[Any]:
        """Return an empty cache: a list of objects with a `length` and a method `clear()`."""

    def __call__(self, input_ids: Tensor, *, cache: list[Any], last_only: bool) -> Tensor:
        """Return the scores of the next token, (B, 1, V), after tokens (B, T) that follow the cached ones."""


def next_token_distribution(
    logits: Tensor, temperature: float = 1.0, top_k: int | None = None, top_p: float | None = None
) -> Tensor:
    """Return the probabilities from which the next token is drawn.

    Args:
        logits: Scores of the next token, (B, V).
        temperature: Divisor of the logits, finite and at least 0; 0 gives probability 1 to the most probable token.
        top_k: Number of the most probable tokens to keep, at least 1; `None` keeps all.
        top_p: Total probability of the most probable tokens to keep, in (0, 1], after `top_k`; `None` keeps all.

    Returns:
        (B, V) float32; each row sums to 1.

    Raises:
        ValueError: If an argument is out of range.
    """
    _check_sampling(temperature, top_k, top_p)
    if temperature == 0:
        return F.one_hot(logits.argmax(dim=-1), logits.size(-1)).float()
    logits = logits.float()
    logits = logits - logits.amax(dim=-1, keepdim=True)  # so that division by a small temperature cannot overflow
    probabilities = (logits / temperature).softmax(dim=-1)
    if top_k is None and top_p is None:
        return probabilities
    probabilities, order = probabilities.sort(dim=-1, descending=True, stable=True)
    if top_k is not None:
        probabilities[:, top_k:] = 0
        probabilities /= probabilities.sum(dim=-1, keepdim=True)
    if top_p is not None and top_p < 1:
        mass_before = probabilities.cumsum(dim=-1) - probabilities  # total probability of more probable tokens
        probabilities[mass_before >= top_p] = 0
        probabilities /= probabilities.sum(dim=-1, keepdim=True)
    return torch.zeros_like(probabilities).scatter_(-1, order, probabilities)  # in the order of the vocabulary


def sample_next(
    logits: Tensor,
    temperature: float = 1.0,
    top_k: int | None = None,
    top_p: float | None = None,
    generator: torch.Generator | None = None,
) -> Tensor:
    """Draw a token for each row from `next_token_distribution`: logits (B, V) -> tokens (B,)."""
    probabilities = next_token_distribution(logits, temperature, top_k, top_p)
    return torch.multinomial(probabilities, num_samples=1, generator=generator).squeeze(-1)


def generate(
    decoder: CachedModel,
    input_ids: Tensor,
    max_new_tokens: int,
    temperature: float = 1.0,
    top_k: int | None = None,
    top_p: float | None = None,
    generator: torch.Generator | None = None,
    stop_token: int | None = None,
) -> Iterator[Tensor]:
    """Continue each row of `input_ids`, and yield the new tokens one step at a time.

    The keys and values of earlier tokens are cached, so each step reads a single token. Positions are absolute: the
    embedding of its position is part of each cached key. A full cache can therefore not be shifted; it is cleared, and
    the last half of the context is read again from position 0.

    Args:
        decoder: A model with a cache, in evaluation mode.
        input_ids: Token ids, (B, T) int64, T at least 1, without padding, on the device of the decoder. If T is larger
            than the context, only the end is read.
        max_new_tokens: Largest number of tokens to generate, at least 0.
        temperature: As in `next_token_distribution`.
        top_k: As in `next_token_distribution`.
        top_p: As in `next_token_distribution`.
        generator: Generator of random numbers on the device of the decoder; `None` means torch's global one.
        stop_token: Token that ends a row. The row then repeats it, and the iteration stops when all rows have ended.

    Returns:
        An iterator over the new tokens of each step, (B,) int64, stop tokens included.

    Raises:
        ValueError: If an argument is out of range, or the decoder is in training mode; raised by the call itself, not
            by the first step.
    """
    _check_sampling(temperature, top_k, top_p)
    if input_ids.dim() != 2 or input_ids.size(1) < 1:
        raise ValueError(f"input_ids has shape {tuple(input_ids.shape)}: generation needs (B, T) with T at least 1")
    if max_new_tokens < 0:
        raise ValueError(f"max_new_tokens={max_new_tokens}: must be at least 0")
    if stop_token is not None and not 0 <= stop_token < decoder.config.vocab_size:
        raise ValueError(f"stop_token={stop_token}: must be in [0, vocab_size={decoder.config.vocab_size})")
    if decoder.training:
        raise ValueError("the decoder is in training mode, in which dropout is active: call decoder.eval() first")
    sample = partial(sample_next, temperature=temperature, top_k=top_k, top_p=top_p, generator=generator)
    return _generate(decoder, input_ids, max_new_tokens, sample, stop_token)


# As a decorator, no_grad covers only the steps of the generator; the caller's code between two tokens keeps its mode.
# inference_mode would yield tensors that cannot be used in training.
@torch.no_grad()
def _generate(
    decoder: CachedModel,
    input_ids: Tensor,
    max_new_tokens: int,
    sample: Callable[[Tensor], Tensor],
    stop_token: int | None,
) -> Iterator[Tensor]:
    block_size = decoder.config.block_size
    context = unread = input_ids[:, -block_size:]  # (B, <= block_size)
    cache = decoder.new_cache()
    ended = torch.zeros(len(input_ids), dtype=torch.bool, device=input_ids.device)  # (B,)
    for _ in range(max_new_tokens):
        if cache[0].length + unread.size(1) > block_size:
            unread = context[:, -max(1, block_size // 2) :]
            for layer_cache in cache:
                layer_cache.clear()
        logits = decoder(unread, cache=cache, last_only=True).squeeze(1)  # (B, V)
        tokens = sample(logits)  # (B,)
        if stop_token is not None:
            tokens = tokens.masked_fill(ended, stop_token)
            ended |= tokens == stop_token
        yield tokens
        if stop_token is not None and ended.all():
            return
        unread = tokens[:, None]
        context = torch.cat([context, unread], dim=1)[:, -block_size:]


def _check_sampling(temperature: float, top_k: int | None, top_p: float | None) -> None:
    if not (temperature >= 0 and math.isfinite(temperature)):
        raise ValueError(f"temperature={temperature}: must be finite and at least 0 (0 is greedy)")
    if top_k is not None and top_k < 1:
        raise ValueError(f"top_k={top_k}: must be at least 1, or None to keep every token")
    if top_p is not None and not 0 < top_p <= 1:
        raise ValueError(f"top_p={top_p}: must be in (0, 1], or None to keep every token")
