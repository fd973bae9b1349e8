"""Attention within the records of packed rows, as an attention implementation of Transformers.

Records that share a row must not attend to each other, nor a text to its padding. A mask says so, but excludes
torch's flash kernels (Dao et al., "FlashAttention", 2022, https://arxiv.org/abs/2205.14135), and most of the products
that it leaves are masked. Those kernels also take the records of a batch one after another, with the places where they
end: cu_seqlens, the cumulative sum of their lengths.

Transformers passes a mask of four dimensions on to the attention unchanged, and makes none itself. So cu_seqlens
travels in the place of the mask; the attention tells it from a mask by its dtype.
"""

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from lightning_modules.runtime.private_names import attention_implementation, flash_attention

if TYPE_CHECKING:
    from transformers import PreTrainedModel

NAME = "within_records"
_WIDEST_HEAD = 256  # of the flash kernels


def attend_within_records(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    sliding_window: int | None = None,
    **others: Any,
) -> tuple[Tensor, None]:
    """Attend from each position to its record: to the earlier positions, or in an encoder to all.

    Args:
        module: Attention layer of a model; its `is_causal` is false in an encoder.
        query: (B, H, T, D).
        key: (B, H or a divisor of it, T, D).
        value: As `key`.
        attention_mask: cu_seqlens, (1, 1, 1, N + 1) int32, over the B T positions of the batch: 0, the end of each
            record in turn, and at last B T. Anything else is a mask of Transformers, for its own implementation.
        dropout: Probability of dropping an attention weight, in [0, 1).
        scaling: Factor on the dot products; `None` means 1 / √D.
        sliding_window: Number of positions that each attends to, itself included; `None` means all.
        **others: Arguments that Transformers passes to every implementation.

    Returns:
        The output, (B, T, H, D), and nothing in the place of the weights.

    Raises:
        ValueError: If an encoder has a sliding window, which has two sides.
    """
    if attention_mask is None or attention_mask.dtype != torch.int32:
        return sdpa_attention_forward(
            module, query, key, value, attention_mask, dropout, scaling, sliding_window=sliding_window, **others
        )
    cu_seqlens = attention_mask.flatten()  # (N + 1,)
    is_causal = getattr(module, "is_causal", True)
    if sliding_window is not None and not is_causal:
        raise ValueError("an encoder with a sliding window does not take cu_seqlens")
    B, H, T, D = query.shape  # noqa: N806
    if len(cu_seqlens) == B + 1 and sliding_window is None:  # each row is one record
        return sdpa_attention_forward(module, query, key, value, None, dropout, scaling, **others)
    device = query.device.type
    dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else query.dtype
    if device == "cuda" and dtype in (torch.float16, torch.bfloat16) and D <= _WIDEST_HEAD and D % 8 == 0:
        if (n_queries := H // key.size(1)) > 1:  # of each key
            key, value = key.repeat_interleave(n_queries, dim=1), value.repeat_interleave(n_queries, dim=1)
        # (B, H, T, D) -> (B T, H, D)
        query, key, value = (part.to(dtype).transpose(1, 2).reshape(B * T, H, D) for part in (query, key, value))
        output = flash_attention(query, key, value, cu_seqlens, T, dropout, is_causal, scaling, sliding_window)
        return output.view(B, T, H, D), None
    mask = records_mask(cu_seqlens, B, T, is_causal, sliding_window)
    return sdpa_attention_forward(module, query, key, value, mask, dropout, scaling, **others)


def records_mask(
    cu_seqlens: Tensor, n_rows: int, length: int, is_causal: bool = True, sliding_window: int | None = None
) -> Tensor:
    """Return the mask of attention within records, (B, 1, T, T) bool, from their ends in the batch, (N + 1,)."""
    places = torch.arange(n_rows * length, dtype=torch.int32, device=cu_seqlens.device).view(n_rows, length)
    records = torch.bucketize(places, cu_seqlens, right=True)  # number of the record at each place
    same = records[:, :, None] == records[:, None, :]
    if not is_causal:
        return same[:, None]
    causal = torch.ones(length, length, dtype=torch.bool, device=cu_seqlens.device).tril()
    if sliding_window is not None:
        causal = causal.triu(1 - sliding_window)
    return (same & causal)[:, None]


def use_attention_within_records(model: "PreTrainedModel") -> bool:
    """Make a model take cu_seqlens in the place of a mask, and return whether it does.

    Models with an attention of their own, such as GPT-Neo, do not, nor encoders whose layers differ, such as
    ModernBERT.
    """
    kinds = set(getattr(model.config, "layer_types", None) or ["full_attention"])
    is_causal = all(getattr(module, "is_causal", True) for module in model.modules())
    if attention_implementation(model) == "sdpa" and (is_causal or kinds == {"full_attention"}):
        AttentionInterface.register(NAME, attend_within_records)
        AttentionMaskInterface.register(NAME, sdpa_mask)
        model.set_attn_implementation(NAME)
    return attention_implementation(model) == NAME
