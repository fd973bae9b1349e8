"""Conversion of our decoder's weights to the names of Transformers' Llama and NanoChat and back; no files.

Both models store queries, keys and values apart, where our decoder has one matrix. N is the number of a block.

    Llama                                      NanoChat      our decoder
    model.embed_tokens                         the same      token_embedding
    model.layers.N.input_layernorm             no weights    blocks.N.attention_norm
    model.layers.N.self_attn.{q,k,v}_proj      the same      blocks.N.attention.qkv, in three parts
    model.layers.N.self_attn.o_proj            the same      blocks.N.attention.projection
    model.layers.N.post_attention_layernorm    no weights    blocks.N.feed_forward_norm
    model.layers.N.mlp.{gate,up}_proj          mlp.fc1       blocks.N.feed_forward.expansion, of Llama in two parts
    model.layers.N.mlp.down_proj               mlp.fc2       blocks.N.feed_forward.projection
    model.norm                                 no weights    final_norm
    lm_head                                    the same      output; with tied embeddings, token_embedding

NanoChat turns the pairs of a rotary position the other way round, by -tω in place of tω. That is our rotation of the
two halves of a head in exchanged order, so the rows of its queries and keys are exchanged in halves, head by head.
"""

import re
from collections.abc import Iterator, Mapping
from typing import Any, Literal

import torch
from torch import Tensor

from lightning_modules.models.decoder import Decoder, DecoderConfig
from lightning_modules.models.feed_forward import swiglu_width
from lightning_modules.models.norms import RMS_NORM_EPSILON
from lightning_modules.models.positions import ROTARY_BASE

ModelType = Literal["llama", "nanochat"]

_CLASSES = {"llama": "LlamaForCausalLM", "nanochat": "NanoChatForCausalLM"}
_EXPANSION = {"llama": ("mlp.gate_proj", "mlp.up_proj"), "nanochat": ("mlp.fc1",)}
_FIXED = ("intermediate_size", "hidden_act", "mlp_bias", "rope_parameters", "head_dim")
_PROJECTION = {"llama": "mlp.down_proj", "nanochat": "mlp.fc2"}


def hub_config(config: DecoderConfig, model_type: ModelType) -> dict[str, Any]:
    """Return the fields of a `config.json` from which Transformers builds the same decoder.

    The special tokens are `None`: the tokenizer defines them. Only attention weights have a dropout there.
    """
    fields = {
        "architectures": [_CLASSES[model_type]],
        "model_type": model_type,
        "vocab_size": config.vocab_size,
        "max_position_embeddings": config.block_size,
        "hidden_size": config.n_embd,
        "num_hidden_layers": config.n_layer,
        "num_attention_heads": config.n_head,
        "num_key_value_heads": config.n_kv_head or config.n_head,
        "rms_norm_eps": RMS_NORM_EPSILON if config.norm_eps is None else config.norm_eps,
        "rope_parameters": {"rope_type": "default", "rope_theta": config.rotary_base},
        "attention_bias": config.bias,
        "attention_dropout": config.attention_dropout,
        "tie_word_embeddings": config.tied_embeddings,
        "bos_token_id": None,
        "eos_token_id": None,
        "pad_token_id": None,
    }
    if model_type == "llama":
        own = {"intermediate_size": swiglu_width(config.n_embd), "hidden_act": "silu", "mlp_bias": config.bias}
    else:
        own = {"intermediate_size": 4 * config.n_embd, "hidden_act": "relu2"}
        own["final_logit_softcapping"] = config.logit_soft_cap
    return fields | own


def decoder_config_from_hub(hub: Mapping[str, Any]) -> DecoderConfig:
    """Return the configuration of our decoder for a Llama or a NanoChat with all fields of its class.

    Raises:
        ValueError: If a field has a value that cannot be converted.
    """
    model_type = hub["model_type"]
    if model_type == "nanochat" and hub["attention_bias"]:
        raise ValueError("nanochat configuration has attention_bias=True: our decoder has biases everywhere or nowhere")
    epsilon, rope = hub["rms_norm_eps"], hub.get("rope_parameters") or {}
    if model_type == "nanochat" and epsilon != RMS_NORM_EPSILON:  # QK-norm has the same one there
        raise ValueError(f"nanochat configuration has rms_norm_eps={epsilon}: our QK-norm has only {RMS_NORM_EPSILON}")
    parts: dict[str, Any] = {"norm": "rms", "feed_forward": "swiglu"}
    if model_type == "nanochat":
        parts = {
            "norm": "rms_unweighted",
            "feed_forward": "relu2",
            "qk_norm": True,
            "embedding_norm": True,
            "logit_soft_cap": hub["final_logit_softcapping"],
        }
    config = DecoderConfig(
        vocab_size=hub["vocab_size"],
        block_size=hub["max_position_embeddings"],
        n_layer=hub["num_hidden_layers"],
        n_head=hub["num_attention_heads"],
        n_embd=hub["hidden_size"],
        attention_dropout=hub["attention_dropout"] or 0.0,
        bias=hub["attention_bias"],
        n_kv_head=hub["num_key_value_heads"],
        positions="rotary",
        tied_embeddings=hub["tie_word_embeddings"],
        norm_eps=None if epsilon == RMS_NORM_EPSILON else epsilon,
        rotary_base=rope.get("rope_theta", ROTARY_BASE),
        **parts,
    )
    for name, value in (hub_config(config, model_type) | {"head_dim": config.head_dim}).items():
        theirs = hub.get(name, value)
        if name in _FIXED and theirs not in (None, value):
            raise ValueError(f"{model_type} configuration has {name}={theirs!r}: only {value!r} can be converted")
    return config


def to_hub_state_dict(decoder: Decoder, model_type: ModelType) -> dict[str, Tensor]:
    """Return the weights of a decoder for `load_state_dict` of the class of Transformers.

    Args:
        decoder: Our decoder, of the parts of the class.
        model_type: `llama` or `nanochat`.
    """
    config = decoder.config
    state = {}
    for name, tensor in decoder.state_dict().items():
        hub_names, rows = zip(*_parts(name, config, model_type), strict=True)
        for hub_name, part in zip(hub_names, tensor.split(rows), strict=True):
            state[hub_name] = _in_order_of(model_type, hub_name, part, config).contiguous()
    if config.tied_embeddings:
        state["lm_head.weight"] = state["model.embed_tokens.weight"]
    return state


def from_hub_state_dict(state: Mapping[str, Tensor], config: DecoderConfig, model_type: ModelType) -> dict[str, Tensor]:
    """Return the weights of a Llama or a NanoChat for `Decoder(config).load_state_dict`.

    Raises:
        ValueError: If a weight is missing or unknown.
    """
    theirs = dict(state)
    if config.tied_embeddings:
        theirs.pop("lm_head.weight", None)
    with torch.device("meta"):  # allocates no memory
        names = list(Decoder(config).state_dict())
    ours = {}
    for name in names:
        hub_names = [hub_name for hub_name, _ in _parts(name, config, model_type)]
        if missing := [hub_name for hub_name in hub_names if hub_name not in theirs]:
            raise ValueError(
                f"the {model_type} checkpoint has no {missing[0]}: it is damaged or of another architecture"
            )
        ours[name] = torch.cat([_in_order_of(model_type, n, theirs.pop(n), config) for n in hub_names])
    if theirs:
        raise ValueError(f"the {model_type} checkpoint has {min(theirs)}, for which the decoder has no place")
    return ours


def _parts(name: str, config: DecoderConfig, model_type: ModelType) -> list[tuple[str, int]]:
    """Return the names that Transformers has for a parameter of ours, each with its number of rows."""
    module, _, parameter = name.rpartition(".")
    return [(f"{part}.{parameter}", rows) for part, rows in _modules(module, config, model_type)]


def _modules(module: str, config: DecoderConfig, model_type: ModelType) -> Iterator[tuple[str, int]]:
    n_embd, hidden = config.n_embd, swiglu_width(config.n_embd) if model_type == "llama" else 4 * config.n_embd
    outer = {"token_embedding": "model.embed_tokens", "final_norm": "model.norm", "output": "lm_head"}
    if module in outer:
        yield outer[module], n_embd if module == "final_norm" else config.vocab_size
        return
    match = re.fullmatch(r"blocks\.(\d+)\.(.+)", module)
    assert match, module
    prefix, part = f"model.layers.{match[1]}.", match[2]
    parts = {
        "attention_norm": [("input_layernorm", n_embd)],
        "attention.qkv": [
            ("self_attn.q_proj", n_embd),
            ("self_attn.k_proj", config.kv_width),
            ("self_attn.v_proj", config.kv_width),
        ],
        "attention.projection": [("self_attn.o_proj", n_embd)],
        "feed_forward_norm": [("post_attention_layernorm", n_embd)],
        "feed_forward.expansion": [(expansion, hidden) for expansion in _EXPANSION[model_type]],
        "feed_forward.projection": [(_PROJECTION[model_type], n_embd)],
    }
    yield from ((prefix + hub_name, rows) for hub_name, rows in parts[part])


def _in_order_of(model_type: ModelType, hub_name: str, tensor: Tensor, config: DecoderConfig) -> Tensor:
    """Exchange the halves of each head of NanoChat's queries and keys; the exchange is its own inverse."""
    if model_type == "llama" or not hub_name.endswith(("q_proj.weight", "k_proj.weight")):
        return tensor
    return tensor.unflatten(0, (-1, 2, config.head_dim // 2)).flip(1).flatten(0, 2)  # (H, 2, D/2, C) and back
