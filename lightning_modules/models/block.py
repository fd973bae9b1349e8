"""The pre-norm block: attention mixes positions, a feed-forward network transforms each position.

    x = x + Dropout(Attention(Norm(x)))
    x = x + Dropout(FeedForward(Norm(x)))

Each half reads a normalised copy of x and adds its result to x. The sum itself, the residual stream, is not normalised
between blocks, so the gradient of the last block reaches the first one unchanged. The original transformer normalises
after each sum; a network that normalises before each half trains without a long warm-up.

A block is assembled from parts that have names: the norms of `norms.py` and the networks of `feed_forward.py`. Those of
GPT-2 are LayerNorm and GELU.

Papers: Vaswani et al., "Attention Is All You Need" (2017), sections 3.1 and 3.3; Radford et al., "Language Models are
Unsupervised Multitask Learners" (GPT-2, 2019), section 2.3; Xiong et al., "On Layer Normalization in the Transformer
Architecture" (2020), https://arxiv.org/abs/2002.04745.
"""

from functools import partial
from typing import TYPE_CHECKING

from torch import Tensor, nn

from lightning_modules.models.attention import MultiHeadAttention
from lightning_modules.models.cache import KeyValueCache
from lightning_modules.models.feed_forward import FeedForward
from lightning_modules.models.norms import NORMS
from lightning_modules.models.positions import Rotation

if TYPE_CHECKING:  # the decoder imports this file
    from lightning_modules.models.decoder import DecoderConfig


class Block(nn.Module):
    """Attention and a feed-forward network, each preceded by a norm and added to the residual stream.

    Args:
        config: Sizes and options of the decoder that it is a block of.
    """

    def __init__(self, config: "DecoderConfig") -> None:
        super().__init__()
        norm = partial(NORMS[config.norm], config.n_embd, config.bias, config.norm_eps)
        self.attention_norm = norm()
        self.attention = MultiHeadAttention(
            config.n_embd,
            config.n_head,
            dropout=config.attention_dropout,
            bias=config.bias,
            implementation=config.attention,
            n_kv_head=config.n_kv_head,
            qk_norm=config.qk_norm,
            value_embeddings=config.value_embeddings,
        )
        self.feed_forward_norm = norm()
        self.feed_forward = FeedForward(config.n_embd, config.bias, config.feed_forward)
        self.residual_dropout = nn.Dropout(config.residual_dropout)

    def forward(
        self,
        x: Tensor,
        mask: Tensor | None = None,
        cache: KeyValueCache | None = None,
        rotation: Rotation | None = None,
        token_values: Tensor | None = None,
    ) -> Tensor:
        """Apply the block: (B, T, C) -> (B, T, C); for the other arguments see `MultiHeadAttention.forward`."""
        normed = self.attention_norm(x)
        x = x + self.residual_dropout(self.attention(normed, mask, cache, rotation, token_values))
        return x + self.residual_dropout(self.feed_forward(self.feed_forward_norm(x)))
