"""Conversion of our decoder's weights to the names of Hugging Face's GPT-2 and back; tensors only, no files.

The two formats differ in names and in one layout: the linear layers of GPT-2 are "Conv1D", y = x W with W (in, out),
while torch's nn.Linear computes x Wᵀ with W (out, in). Four matrices of each block are therefore transposed.

    GPT-2                            our decoder
    transformer.wte                  token_embedding
    transformer.wpe                  position_embedding
    transformer.h.N.ln_1             blocks.N.attention_norm
    transformer.h.N.attn.c_attn      blocks.N.attention.qkv                transposed
    transformer.h.N.attn.c_proj      blocks.N.attention.projection         transposed
    transformer.h.N.ln_2             blocks.N.feed_forward_norm
    transformer.h.N.mlp.c_fc         blocks.N.feed_forward.expansion       transposed
    transformer.h.N.mlp.c_proj       blocks.N.feed_forward.projection      transposed
    transformer.ln_f                 final_norm
    lm_head                          output; with tied embeddings, token_embedding
"""

import re
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from lightning_modules.models.decoder import Decoder, DecoderConfig
from lightning_modules.models.norms import LAYER_NORM_EPSILON

_OURS_TO_GPT2 = {
    "token_embedding": "wte",
    "position_embedding": "wpe",
    "attention_norm": "ln_1",
    "attention.qkv": "attn.c_attn",
    "attention.projection": "attn.c_proj",
    "feed_forward_norm": "ln_2",
    "feed_forward.expansion": "mlp.c_fc",
    "feed_forward.projection": "mlp.c_proj",
    "final_norm": "ln_f",
    "output": "lm_head",
}
_CAUSAL_MASK_BUFFER = re.compile(r"h\.\d+\.attn\.(masked_)?bias")  # old checkpoints contain the causal mask


def gpt2_config(config: DecoderConfig) -> dict[str, Any]:
    """Return the fields of a `config.json` from which Transformers builds the same decoder.

    The special tokens are `None`: the tokenizer defines them.

    Args:
        config: Configuration of our decoder. GPT-2 always has biases; a decoder without is exported with zeros.
    """
    return {
        "architectures": ["GPT2LMHeadModel"],
        "model_type": "gpt2",
        "vocab_size": config.vocab_size,
        "n_positions": config.block_size,
        "n_embd": config.n_embd,
        "n_layer": config.n_layer,
        "n_head": config.n_head,
        "n_inner": None,
        "activation_function": "gelu_new",
        "embd_pdrop": config.embedding_dropout,
        "attn_pdrop": config.attention_dropout,
        "resid_pdrop": config.residual_dropout,
        "layer_norm_epsilon": LAYER_NORM_EPSILON if config.norm_eps is None else config.norm_eps,
        "scale_attn_weights": True,
        "scale_attn_by_inverse_layer_idx": False,
        "tie_word_embeddings": config.tied_embeddings,
        "bos_token_id": None,
        "eos_token_id": None,
        "pad_token_id": None,
    }


def decoder_config_from_gpt2(gpt2: Mapping[str, Any]) -> DecoderConfig:
    """Return the configuration of our decoder for a GPT-2; missing fields have the default of GPT-2.

    Raises:
        ValueError: If a field has a value that cannot be converted.
    """
    n_embd, epsilon = gpt2.get("n_embd", 768), gpt2.get("layer_norm_epsilon", LAYER_NORM_EPSILON)
    converted = {
        "model_type": ("gpt2",),
        "activation_function": ("gelu_new", "gelu_pytorch_tanh"),  # two names of the tanh formula
        "n_inner": (None, 4 * n_embd),
        "scale_attn_weights": (True,),
        "scale_attn_by_inverse_layer_idx": (False,),
        "add_cross_attention": (False,),
    }
    for field, values in converted.items():
        if field in gpt2 and gpt2[field] not in values:
            choices = " or ".join(repr(value) for value in values)
            raise ValueError(f"GPT-2 configuration has {field}={gpt2[field]!r}: only {choices} can be converted")
    return DecoderConfig(
        vocab_size=gpt2.get("vocab_size", 50257),
        block_size=gpt2.get("n_positions", 1024),
        n_layer=gpt2.get("n_layer", 12),
        n_head=gpt2.get("n_head", 12),
        n_embd=n_embd,
        embedding_dropout=gpt2.get("embd_pdrop", 0.1),
        attention_dropout=gpt2.get("attn_pdrop", 0.1),
        residual_dropout=gpt2.get("resid_pdrop", 0.1),
        tied_embeddings=gpt2.get("tie_word_embeddings", True),
        norm_eps=None if epsilon == LAYER_NORM_EPSILON else epsilon,
    )


def to_gpt2_state_dict(decoder: Decoder) -> dict[str, Tensor]:
    """Return the weights of a decoder for `GPT2LMHeadModel.load_state_dict`.

    Args:
        decoder: Our decoder. Weights that are not transposed share its memory.
    """
    ours = decoder.state_dict()
    state = {}
    for name in _parameter_shapes(replace(decoder.config, bias=True)):
        if name in ours:
            tensor = ours[name].t().contiguous() if _is_transposed(name) else ours[name]
        else:  # our decoder has no biases
            weight = ours[name.removesuffix("bias") + "weight"]
            tensor = weight.new_zeros(len(weight))  # (out,)
        state[f"transformer.{_gpt2_name(name)}"] = tensor
    state["lm_head.weight"] = state.pop("transformer.lm_head.weight", state["transformer.wte.weight"])
    return state


def from_gpt2_state_dict(state: Mapping[str, Tensor], config: DecoderConfig) -> dict[str, Tensor]:
    """Return the weights of a GPT-2 for `Decoder(config).load_state_dict`.

    The prefix `transformer.`, a tied output matrix and the mask buffers of old checkpoints may be present or absent.

    Args:
        state: Weights of GPT-2; they are not changed.
        config: Configuration of our decoder. If its `block_size` is smaller than that of the checkpoint, the first
            positions are kept. Its `bias` may be false if all biases of the checkpoint are zero.

    Raises:
        ValueError: If a weight is missing, unknown or of another shape, or a tied output matrix is not the embedding.
    """
    theirs = {name.removeprefix("transformer."): tensor for name, tensor in state.items()}
    theirs = {name: tensor for name, tensor in theirs.items() if not _CAUSAL_MASK_BUFFER.fullmatch(name)}
    head = theirs.pop("lm_head.weight", None) if config.tied_embeddings else None
    ours = {}
    for name, shape in _parameter_shapes(config).items():
        gpt2_name = _gpt2_name(name)
        if gpt2_name not in theirs:
            raise ValueError(f"the GPT-2 checkpoint has no {gpt2_name}: it is damaged or of another architecture")
        tensor = theirs.pop(gpt2_name)
        if _is_transposed(name):
            tensor = tensor.t().contiguous()
        elif name == "position_embedding.weight":
            tensor = tensor[: config.block_size]
        if tensor.shape != shape:
            raise ValueError(
                f"{gpt2_name} becomes {name} of shape {tuple(tensor.shape)}: the decoder has {tuple(shape)}"
            )
        ours[name] = tensor
    for gpt2_name, tensor in theirs.items():
        if config.bias or not gpt2_name.endswith(".bias") or tensor.any():
            raise ValueError(f"the GPT-2 checkpoint has {gpt2_name}, for which the decoder has no place")
    if head is not None and not torch.equal(head, ours["token_embedding.weight"]):
        raise ValueError("lm_head.weight is not wte.weight, although tie_word_embeddings is true")
    return ours


def _parameter_shapes(config: DecoderConfig) -> dict[str, torch.Size]:
    with torch.device("meta"):  # allocates no memory
        return {name: tensor.shape for name, tensor in Decoder(config).state_dict().items()}


def _gpt2_name(name: str) -> str:
    """Return `h.3.attn.c_attn.weight` for `blocks.3.attention.qkv.weight`."""
    module, parameter = name.rsplit(".", 1)
    prefix = ""
    if module.startswith("blocks."):
        _, number, module = module.split(".", 2)
        prefix = f"h.{number}."
    return f"{prefix}{_OURS_TO_GPT2[module]}.{parameter}"


def _is_transposed(name: str) -> bool:
    """Return whether the weight is the matrix of a linear layer: ours (out, in), GPT-2's (in, out)."""
    return name.endswith((".qkv.weight", ".projection.weight", ".expansion.weight"))
