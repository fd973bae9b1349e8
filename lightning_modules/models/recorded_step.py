"""A step of generation, recorded on a GPU as a CUDA graph and then repeated.

A GPU computes a step of a small model in less time than Python needs to start its kernels one by one. A CUDA graph
starts all of them at once, on the same memory each time: so the inputs are copied into tensors that stay, and the cache
has fixed shapes, see `KeyValueCache.fix`.
"""

import math
from collections.abc import Callable
from functools import lru_cache

import torch
from torch import Tensor

from lightning_modules.models.cache import CachedModel, KeyValueCache

_SHORTEST_READ = 512  # positions of the cache that the first graph reads; each further graph reads twice as many


class RecordedStep:
    """A step of generation with constant shapes, recorded as a CUDA graph for each number of positions that it reads.

    On other devices it runs without a graph.

    Args:
        decoder: Model of the `cache`.
        cache: Cache of all layers, in which the prompt is read before the first step.
        choose: Function from scores, (B, 1, V), to the next tokens, (B,), on the device alone.
        generator: Generator that `choose` draws from, if it is not torch's global one.
        n_rows: Number of rows B.
        device: Device of the decoder.
    """

    def __init__(
        self,
        decoder: CachedModel,
        cache: list[KeyValueCache],
        choose: Callable[[Tensor], Tensor],
        generator: torch.Generator | None,
        n_rows: int,
        device: torch.device,
    ) -> None:
        self._decoder, self._cache, self._choose, self._generator = decoder, cache, choose, generator
        # The inputs of a step, in memory that the graphs read.
        self._tokens = torch.zeros(n_rows, 1, dtype=torch.long, device=device)
        self._padding = torch.zeros(n_rows, dtype=torch.long, device=device)
        self._place = torch.zeros(1, dtype=torch.long, device=device)  # position of the tokens in the cache
        self._graphs: dict[int, tuple[torch.cuda.CUDAGraph, Tensor]] = {}  # by the number of positions read
        self._is_loaded: set[int] = set()  # numbers of positions that a step without a graph has read

    def __call__(self, tokens: Tensor, padding: Tensor | None) -> Tensor:
        """Read the last tokens, (B, 1), of rows with padding, (B,), and return the next, (B,)."""
        read = self._cache[0].length
        self._tokens.copy_(tokens)
        self._place.fill_(read)
        if padding is not None:
            self._padding.copy_(padding)
        n_read = self._n_read(read + 1)
        for layer_cache in self._cache:
            layer_cache.fix(self._place, n_read)
        chosen = self._run(n_read)
        for layer_cache in self._cache:
            layer_cache.release(read + 1)
        return chosen

    def _n_read(self, needed: int) -> int:
        """Return the number of positions to read: a power of two times the shortest, or the whole cache."""
        n_read = _SHORTEST_READ
        while n_read < needed:
            n_read *= 2
        return min(n_read, self._cache[0].max_length)

    def _run(self, n_read: int) -> Tensor:
        if n_read not in self._is_loaded or self._tokens.device.type != "cuda":
            self._is_loaded.add(n_read)  # kernels must be loaded before they are recorded
            return self._step(n_read)
        if n_read not in self._graphs:
            self._graphs[n_read] = self._record(n_read)
        graph, chosen = self._graphs[n_read]
        graph.replay()
        return chosen

    def _step(self, n_read: int) -> Tensor:
        keys = torch.arange(n_read, device=self._place.device)
        hidden = (keys > self._place) | (keys < self._padding[:, None])  # (B, n_read)
        # Added to the scores; torch would convert a mask of booleans once in each layer.
        mask = torch.zeros(hidden.shape, dtype=self._cache[0].dtype, device=self._place.device)
        mask = mask.masked_fill_(hidden, -math.inf)
        logits = self._decoder(
            self._tokens,
            cache=self._cache,
            last_only=True,
            attention_mask=mask[:, None, None],
            position_ids=self._place - self._padding[:, None],
        )
        return self._choose(logits)

    def _record(self, n_read: int) -> tuple[torch.cuda.CUDAGraph, Tensor]:
        graph = torch.cuda.CUDAGraph()
        if self._generator is not None:
            graph.register_generator_state(self._generator)
        # Weights that autocast has converted are not kept, because they would be memory of the first graph.
        precision = torch.autocast(
            "cuda", torch.get_autocast_dtype("cuda"), torch.is_autocast_enabled("cuda"), cache_enabled=False
        )
        # Not with `torch.cuda.graph`, which first returns all unused memory to the device.
        with precision, torch.cuda.stream(_recording_stream(self._tokens.device)):
            graph.capture_begin(capture_error_mode="thread_local")  # others, such as a loader's, may use the device
            try:
                chosen = self._step(n_read)
            finally:
                graph.capture_end()
        return graph, chosen


@lru_cache
def _recording_stream(device: torch.device) -> torch.cuda.Stream:
    """Return the stream on which graphs are recorded: one, because cuBLAS keeps memory for each stream."""
    return torch.cuda.Stream(device)
