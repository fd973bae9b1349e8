"""A cache of keys and values of this project as the cache of a model of Transformers, for generation."""

from typing import TYPE_CHECKING

from torch import Tensor
from transformers.cache_utils import Cache, CacheLayerMixin, DynamicCache, DynamicLayer

from lightning_modules.finetuning.packed_attention import NAME
from lightning_modules.models.cache import KeyValueCache
from lightning_modules.runtime.private_names import attention_implementation, takes_static_caches

if TYPE_CHECKING:
    from transformers import PreTrainedModel


class HubLayerCache(CacheLayerMixin):
    """A `KeyValueCache` with the interface of Transformers.

    Args:
        cache: Cache of one layer.
    """

    def __init__(self, cache: KeyValueCache) -> None:
        super().__init__()
        self.cache = cache
        self.is_initialized = True

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Do nothing: the first update allocates the memory."""

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: object, **kwargs: object
    ) -> tuple[Tensor, Tensor]:
        """Write keys and values, (B, H, T, D), and return those that attention reads, (B, H, S, D)."""
        return self.cache.update(key_states, value_states)

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """Return the number of keys that T new queries attend to, and the position of the first key."""
        return self.cache.length + query_length, 0

    def get_seq_length(self) -> int:
        """Return the number of positions processed."""
        return self.cache.length

    def get_max_length(self) -> int:
        """Return the number of positions that there is memory for."""
        return self.cache.max_length


class GrowingHubCache:
    """The cache of Transformers itself, which copies all keys and values at each token.

    It serves the models that a `KeyValueCache` does not fit: those with sliding windows, states instead of keys, or an
    attention of their own.

    Args:
        model: Model of Transformers.
    """

    def __init__(self, model: "PreTrainedModel") -> None:
        self.config = model.config
        self.clear()

    @property
    def length(self) -> int:
        """Number of positions processed."""
        return self.past.get_seq_length()

    def clear(self) -> None:
        """Remove all positions."""
        self.past = DynamicCache(config=self.config)


class NoCache:
    """The cache of a model that keeps no keys, such as Mamba: each token reads the whole context again."""

    length = 0

    def clear(self) -> None:
        """Do nothing."""


def new_hub_cache(
    model: "PreTrainedModel", max_length: int
) -> list[KeyValueCache] | list[GrowingHubCache] | list[NoCache]:
    """Return an empty cache of each layer of a model, or one cache for all layers that only grows or is none."""
    past = DynamicCache(config=model.config)
    try:
        past.get_seq_length()
    except ValueError:  # all layers have states instead of keys
        return [NoCache()]
    layers = past.layers
    plain = bool(layers) and all(type(layer) is DynamicLayer for layer in layers)  # attend to all earlier positions
    if plain and takes_static_caches(model) and attention_implementation(model) in ("sdpa", NAME):
        return [KeyValueCache(max_length) for _ in layers]
    return [GrowingHubCache(model)]


def hub_cache(cache: list[KeyValueCache] | list[GrowingHubCache] | list[NoCache]) -> Cache | None:
    """Return the cache that a model of Transformers accepts, or `None` if it accepts none."""
    if isinstance(cache[0], NoCache):
        return None
    if isinstance(cache[0], GrowingHubCache):
        return cache[0].past
    return Cache(layers=[HubLayerCache(layer_cache) for layer_cache in cache])
