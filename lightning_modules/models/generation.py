"""Generation: draw the next token, append it, repeat.

    p = softmax(logits / temperature)

Temperature sharpens (below 1) or flattens (above 1) the distribution; at 0 the most probable token is taken (greedy).
top_k keeps the k most probable tokens, top_p the fewest of the most probable ones that hold a mass of at least p; what
is left is scaled to sum to 1. Both cut off the long tail, where each token is improbable but one of them comes often.

Papers: Fan et al., "Hierarchical Neural Story Generation" (top-k, 2018), https://arxiv.org/abs/1805.04833; Holtzman et
al., "The Curious Case of Neural Text Degeneration" (top-p, 2020), https://arxiv.org/abs/1904.09751.
"""

import math
from collections.abc import Iterator
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor


class CachedModel(Protocol):
    """What generation needs of a model; `models.decoder.Decoder` has it.

    Attributes:
        config: Has the `vocab_size` and the `block_size` of the model.
        training: Whether the model is in training mode.
    """

    config: Any
    training: bool

    def new_cache(self) -> list[Any]:
        """An empty cache, in parts that have a `length` and can `clear()`."""

    def __call__(self, input_ids: Tensor, *, cache: list[Any], last_only: bool) -> Tensor:
        """Scores of the token after the last: (B, T) that the cache has not seen, to (B, 1, V)."""


def next_token_distribution(
    logits: Tensor, temperature: float = 1.0, top_k: int | None = None, top_p: float | None = None
) -> Tensor:
    """The probabilities from which the next token is drawn.

    Args:
        logits: (B, V).
        temperature: Finite, at least 0; 0 puts everything on the most probable token.
        top_k: Keep the k most probable tokens, at least 1; None: all.
        top_p: Keep the fewest most probable tokens that hold this mass, in (0, 1]; applied after top_k. None: all.

    Returns:
        (B, V) float32, each row sums to 1.

    Raises:
        ValueError: An argument outside its range.
    """
    _check_sampling(temperature, top_k, top_p)
    if temperature == 0:
        return F.one_hot(logits.argmax(dim=-1), logits.size(-1)).float()
    logits = logits.float()
    logits = logits - logits.amax(dim=-1, keepdim=True)  # no overflow however small the temperature
    probabilities = (logits / temperature).softmax(dim=-1)
    if top_k is None and top_p is None:
        return probabilities
    probabilities, order = probabilities.sort(dim=-1, descending=True, stable=True)
    if top_k is not None:
        probabilities[:, top_k:] = 0
        probabilities /= probabilities.sum(dim=-1, keepdim=True)
    if top_p is not None and top_p < 1:
        mass_before = probabilities.cumsum(dim=-1) - probabilities  # of all the more probable tokens
        probabilities[mass_before >= top_p] = 0
        probabilities /= probabilities.sum(dim=-1, keepdim=True)
    return torch.zeros_like(probabilities).scatter_(-1, order, probabilities)  # back in the vocabulary's order


def sample_next(
    logits: Tensor,
    temperature: float = 1.0,
    top_k: int | None = None,
    top_p: float | None = None,
    generator: torch.Generator | None = None,
) -> Tensor:
    """Draw one token a row from `next_token_distribution`: logits (B, V) -> tokens (B,)."""
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
    """Continue each row of `input_ids`, one token at a time, as they come.

    The keys and values of what has been read are cached, so each step reads one token. Positions are absolute (the
    embedding of position 7 is baked into what is cached for it), so a full cache cannot slide along: the decoder then
    forgets it, reads the last half of the context again from position 0, and goes on.

    Args:
        decoder: A model with a cache, in evaluation mode.
        input_ids: (B, T) int64, T at least 1, no padding, on the decoder's device. Where T is more than the context,
            its end is read.
        max_new_tokens: How many tokens at most, at least 0.
        temperature: Finite, at least 0; 0 is greedy.
        top_k: Keep the k most probable tokens, at least 1; None: all.
        top_p: Keep the fewest most probable tokens that hold this mass, in (0, 1]; None: all.
        generator: Source of the random numbers, on the decoder's device; None: torch's global one.
        stop_token: Ends a row, which then repeats it; when all rows have ended, so does the iteration.

    Returns:
        An iterator over the new tokens, (B,) int64 a step; the stop token is among them.

    Raises:
        ValueError: An argument outside its range, or a decoder in training mode; at the call, not at the first token.
    """
    _check_sampling(temperature, top_k, top_p)
    if input_ids.dim() != 2 or input_ids.size(1) < 1:
        raise ValueError(f"input_ids has shape {tuple(input_ids.shape)}: generation needs (B, T) with T at least 1")
    if max_new_tokens < 0:
        raise ValueError(f"max_new_tokens={max_new_tokens}: must be at least 0")
    if stop_token is not None and not 0 <= stop_token < decoder.config.vocab_size:
        raise ValueError(f"stop_token={stop_token}: must be in [0, vocab_size={decoder.config.vocab_size})")
    if decoder.training:
        raise ValueError("the decoder is in training mode, where dropout spoils its text: call decoder.eval() first")
    return _generate(decoder, input_ids, max_new_tokens, temperature, top_k, top_p, generator, stop_token)


# As a decorator no_grad covers a generator's own steps only, so the caller's code between two tokens keeps its mode.
# inference_mode would hand out tensors that the caller could not train on.
@torch.no_grad()
def _generate(
    decoder: CachedModel,
    input_ids: Tensor,
    max_new_tokens: int,
    temperature: float,
    top_k: int | None,
    top_p: float | None,
    generator: torch.Generator | None,
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
        tokens = sample_next(logits, temperature, top_k, top_p, generator)  # (B,)
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
