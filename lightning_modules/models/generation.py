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
from collections import deque
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.distributed.fsdp import FSDPModule

from lightning_modules.models.cache import CachedModel, KeyValueCache
from lightning_modules.models.recorded_step import RecordedStep

_ROUND = 64  # positions; the memory of a cache and the length of a read are multiples, for the alignment of the kernels


def next_token_distribution(
    logits: Tensor, temperature: float = 1.0, top_k: int | None = None, top_p: float | None = None
) -> Tensor:
    """Return the probabilities from which the next token is drawn.

    Args:
        logits: Scores of the next token, (B, V).
        temperature: Divisor of the logits, finite and at least 0; 0, or a number that float32 cannot hold, gives
            probability 1 to the most probable token.
        top_k: Number of the most probable tokens to keep, at least 1; `None` keeps all.
        top_p: Total probability of the most probable tokens to keep, in (0, 1], after `top_k`; `None` keeps all.

    Returns:
        (B, V) float32; each row sums to 1.

    Raises:
        ValueError: If an argument is out of range.
    """
    _check_sampling(temperature, top_k, top_p)
    if _is_greedy(temperature):
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
        mass_before = _cumulative(probabilities) - probabilities  # total probability of more probable tokens
        probabilities.masked_fill_(mass_before >= top_p, 0)
        probabilities /= probabilities.sum(dim=-1, keepdim=True)
    return torch.zeros_like(probabilities).scatter_(-1, order, probabilities)  # in the order of the vocabulary


def _cumulative(probabilities: Tensor) -> Tensor:
    """Return the cumulative sum over the last dimension, also if torch is to run deterministic algorithms only.

    On a GPU, the sum may differ by rounding errors between runs, and torch then refuses it.
    """
    is_strict = torch.are_deterministic_algorithms_enabled()
    only_warns = torch.is_deterministic_algorithms_warn_only_enabled()
    torch.use_deterministic_algorithms(False)
    try:
        return probabilities.cumsum(dim=-1)
    finally:
        torch.use_deterministic_algorithms(is_strict, warn_only=only_warns)


def sample_next(
    logits: Tensor,
    temperature: float = 1.0,
    top_k: int | None = None,
    top_p: float | None = None,
    generator: torch.Generator | None = None,
) -> Tensor:
    """Draw a token for each row from `next_token_distribution`: logits (B, V) -> tokens (B,)."""
    if _is_greedy(temperature):
        return logits.argmax(dim=-1)
    probabilities = next_token_distribution(logits, temperature, top_k, top_p)
    # The smallest of exponential variables with rates p is the i-th with probability p_i. `torch.multinomial` draws the
    # same tokens, but waits for the device to check its argument, which a CUDA graph must not.
    return (probabilities / torch.empty_like(probabilities).exponential_(generator=generator)).argmax(dim=-1)


def generate(
    decoder: CachedModel,
    input_ids: Tensor,
    max_new_tokens: int,
    temperature: float = 1.0,
    top_k: int | None = None,
    top_p: float | None = None,
    generator: torch.Generator | None = None,
    stop_token: int | None = None,
    attention_mask: Tensor | None = None,
) -> Iterator[Tensor]:
    """Continue each row of `input_ids`, and yield the new tokens one step at a time.

    The keys and values of earlier tokens are cached, so each step reads a single token. Each cached key was computed
    for its position, by the embedding of a learned position or the rotation of a rotary one. A full cache is therefore
    not shifted; it is cleared, and the last half of the context is read again from position 0.

    On a GPU, a step is recorded (see `models.recorded_step`), and the next one runs while the caller uses its tokens.

    Args:
        decoder: A model with a cache, in evaluation mode.
        input_ids: Token ids, (B, T) int64, T at least 1, on the device of the decoder. If T is larger than the context,
            only the end is read.
        max_new_tokens: Largest number of tokens to generate, at least 0.
        temperature: As in `next_token_distribution`.
        top_k: As in `next_token_distribution`.
        top_p: As in `next_token_distribution`.
        generator: Generator of random numbers on the device of the decoder; `None` means torch's global one.
        stop_token: Token that ends a row. The row then repeats it, and the iteration stops when all rows have ended.
        attention_mask: (B, T), 0 at padding and 1 at tokens; the padding of a row precedes its tokens, and takes up
            places of its context. `None` means no padding.

    Returns:
        An iterator over the new tokens of each step, (B,) int64 on the CPU, stop tokens included.

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
    n_padding = None if attention_mask is None else _left_padding(attention_mask, input_ids)
    cache = decoder.new_cache(_memory(min(decoder.config.block_size, input_ids.size(1) + max_new_tokens)))
    choose = _Choice(sample, stop_token, len(input_ids), input_ids.device)
    step = None
    if _is_recorded(decoder, cache, input_ids.device):
        step = RecordedStep(decoder, cache, choose, generator, len(input_ids), input_ids.device)
    return _read_behind(_generate(decoder, cache, input_ids, n_padding, max_new_tokens, choose, step), stop_token)


class _Choice:
    """Choice of the tokens of a step from the logits; rows that have ended repeat the stop token."""

    def __init__(
        self, sample: Callable[[Tensor], Tensor], stop_token: int | None, n_rows: int, device: torch.device
    ) -> None:
        self._sample, self._stop_token = sample, stop_token
        self._ended = torch.zeros(n_rows, dtype=torch.bool, device=device)  # (B,)

    def __call__(self, logits: Tensor) -> Tensor:
        """Return the next tokens, (B,), from the scores (B, 1, V)."""
        tokens = self._sample(logits[:, -1])
        if self._stop_token is not None:
            tokens = tokens.masked_fill(self._ended, self._stop_token)
            self._ended |= tokens == self._stop_token  # in place, as a CUDA graph needs
        return tokens


# As a decorator, no_grad covers only the steps of the generator; the caller's code between two tokens keeps its mode.
# inference_mode would yield tensors that cannot be used in training.
@torch.no_grad()
def _generate(
    decoder: CachedModel,
    cache: list[Any],
    input_ids: Tensor,
    n_padding: Tensor | None,
    max_new_tokens: int,
    choose: Callable[[Tensor], Tensor],
    step: RecordedStep | None,
) -> Iterator[Tensor]:
    """Yield the new tokens of each step, (B,), on the device; the next step may overwrite them."""
    block_size = decoder.config.block_size
    context = input_ids[:, -block_size:]  # (B, <= block_size)
    known = input_ids.size(1)  # tokens of a row, with padding
    first = known - context.size(1)  # number of the first token in the cache
    for _ in range(max_new_tokens):
        if known - first > block_size:
            first = known - max(1, block_size // 2)
            for layer_cache in cache:
                layer_cache.clear()
        read = cache[0].length
        unread = context[:, first + read - known :]  # (B, T)
        padding = None if n_padding is None else (n_padding - first).clamp_min(0)  # (B,), of the cached tokens
        if step is not None and read:
            tokens = step(unread, padding)
        else:
            mask, position_ids = _padded(padding, read, unread.size(1)) if padding is not None else (None, None)
            tokens = choose(
                decoder(unread, cache=cache, last_only=True, attention_mask=mask, position_ids=position_ids)
            )
        yield tokens
        context = torch.cat([context, tokens[:, None]], dim=1)[:, -block_size:]
        known += 1


def _padded(padding: Tensor, read: int, n_new: int) -> tuple[Tensor, Tensor]:
    """Return the mask (B, read + n_new) and the positions of the new tokens (B, n_new) of rows with padding (B,)."""
    places = torch.arange(read + n_new, device=padding.device)
    positions = places[read:] - padding[:, None]
    return (places >= padding[:, None]).long(), positions.clamp_min(0)


def _read_behind(steps: Iterator[Tensor], stop_token: int | None) -> Iterator[Tensor]:
    """Yield the tokens of each step on the CPU until all are stop tokens.

    A GPU is one step ahead, so that it works while the caller uses the tokens.
    """
    waiting: deque[tuple[Tensor, torch.cuda.Event | None]] = deque()

    def arrived() -> Tensor:
        tokens, event = waiting.popleft()
        if event is not None:
            event.synchronize()
        return tokens

    for tokens in steps:
        event = None
        copied = tokens.to("cpu", non_blocking=True)
        if tokens.is_cuda:
            event = torch.cuda.Event()
            event.record(torch.cuda.current_stream(tokens.device))  # not that of the current device
        waiting.append((copied, event))
        if event is None or len(waiting) > 1:
            yield (ready := arrived())
            if stop_token is not None and bool((ready == stop_token).all()):
                return
    while waiting:
        yield arrived()


def _memory(n_positions: int) -> int:
    """Return the number of positions to allocate memory for."""
    return -(-n_positions // _ROUND) * _ROUND


def _is_recorded(decoder: CachedModel, cache: list[Any], device: torch.device) -> bool:
    """Return whether to record steps; FSDP's hooks may do different things in each."""
    if device.type != "cuda" or not isinstance(cache[0], KeyValueCache):
        return False
    return not any(isinstance(part, FSDPModule) for part in decoder.modules())


def _left_padding(attention_mask: Tensor, input_ids: Tensor) -> Tensor:
    """Return the number of padding positions in each row, (B,) int64, which must precede the tokens."""
    shape = tuple(attention_mask.shape)
    if shape != tuple(input_ids.shape):
        raise ValueError(f"attention_mask has shape {shape}: must have that of input_ids, {tuple(input_ids.shape)}")
    mask = attention_mask.long()
    if not bool((mask.diff(dim=1) >= 0).all() & (mask[:, -1] == 1).all()):
        raise ValueError("attention_mask: the padding of a row must precede its tokens, of which there is at least one")
    return mask.size(1) - mask.sum(dim=1)


def _is_greedy(temperature: float) -> bool:
    return temperature < torch.finfo(torch.float32).tiny


def _check_sampling(temperature: float, top_k: int | None, top_p: float | None) -> None:
    if not (temperature >= 0 and math.isfinite(temperature)):
        raise ValueError(f"temperature={temperature}: must be finite and at least 0 (0 is greedy)")
    if top_k is not None and top_k < 1:
        raise ValueError(f"top_k={top_k}: must be at least 1, or None to keep every token")
    if top_p is not None and not 0 < top_p <= 1:
        raise ValueError(f"top_p={top_p}: must be in (0, 1], or None to keep every token")
