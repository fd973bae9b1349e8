"""The formats in which a decoder is saved: three classes of Transformers, and our own for all other decoders.

| class                 | parts                                                                                       |
|-----------------------|---------------------------------------------------------------------------------------------|
| `GPT2LMHeadModel`     | the defaults of `DecoderConfig`; any ε of the norms                                         |
| `LlamaForCausalLM`    | rotary positions, RMSNorm, SwiGLU; any ε of the norms                                       |
| `NanoChatForCausalLM` | rotary positions, RMSNorm without weights, after the embedding too, ReLU², QK-norm, no bias |

All may have an output matrix of their own, Llama and NanoChat fewer heads of keys and values, NanoChat a soft cap.
"""

from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, fields, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from lightning_modules.models import gpt2_format, llama_format
from lightning_modules.models.decoder import Decoder, DecoderConfig
from lightning_modules.models.norms import RMS_NORM_EPSILON

OWN_MODEL_TYPE = "llm_train_decoder"

# Fields of a configuration that every class has. All others are parts, of which a class has some values only.
_COMMON = {
    *("vocab_size", "block_size", "n_layer", "n_head", "n_embd", "bias", "attention", "tied_embeddings"),
    *("embedding_dropout", "attention_dropout", "residual_dropout"),
    "rotary_base",  # has no effect on learned positions
}
_CLASSIC: dict[str, Any] = {field.name: field.default for field in fields(DecoderConfig) if field.name not in _COMMON}
_LLAMA = _CLASSIC | {"positions": "rotary", "norm": "rms", "feed_forward": "swiglu"}
_NANOCHAT = _CLASSIC | {
    "positions": "rotary",
    "norm": "rms_unweighted",
    "feed_forward": "relu2",
    "qk_norm": True,
    "embedding_norm": True,
    "bias": False,
}


@dataclass(frozen=True)
class Format:
    """A class of Transformers and the conversion of our decoder to it and back.

    Args:
        name: Name of the class.
        parts: Fields of `DecoderConfig` that a decoder must have for this class, with their values.
        config: Returns the fields of `config.json` for a configuration of ours.
        state: Returns the weights under the names of the class for a decoder of ours.
        decoder_config: Returns our configuration for the fields of a configuration of the class.
        decoder_state: Returns the weights under our names for weights of the class and our configuration.
    """

    name: str
    parts: Mapping[str, Any]
    config: Callable[[DecoderConfig], dict[str, Any]]
    state: Callable[[Decoder], dict[str, Tensor]]
    decoder_config: Callable[[Mapping[str, Any]], DecoderConfig]
    decoder_state: Callable[[Mapping[str, Tensor], DecoderConfig], dict[str, Tensor]]

    def misfits(self, config: DecoderConfig) -> list[str]:
        """Return the parts of a decoder that the class does not have, such as `qk_norm=True`."""
        if config.n_kv_head == config.n_head:  # the default, spelled out
            config = replace(config, n_kv_head=None)
        if config.norm != "layer" and config.norm_eps == RMS_NORM_EPSILON:
            config = replace(config, norm_eps=None)
        return [f"{name}={own}" for name, value in self.parts.items() if (own := getattr(config, name)) != value]


def _without(parts: Mapping[str, Any], *free: str) -> dict[str, Any]:
    return {part: value for part, value in parts.items() if part not in free}


def _of_llama(name: str, parts: Mapping[str, Any], model_type: llama_format.ModelType) -> Format:
    return Format(
        name,
        parts,
        partial(llama_format.hub_config, model_type=model_type),
        partial(llama_format.to_hub_state_dict, model_type=model_type),
        llama_format.decoder_config_from_hub,
        partial(llama_format.from_hub_state_dict, model_type=model_type),
    )


FORMATS: dict[str, Format] = {
    "gpt2": Format(
        "GPT2LMHeadModel",
        _without(_CLASSIC, "norm_eps"),
        gpt2_format.gpt2_config,
        gpt2_format.to_gpt2_state_dict,
        gpt2_format.decoder_config_from_gpt2,
        gpt2_format.from_gpt2_state_dict,
    ),
    "llama": _of_llama("LlamaForCausalLM", _without(_LLAMA, "n_kv_head", "norm_eps"), "llama"),
    "nanochat": _of_llama("NanoChatForCausalLM", _without(_NANOCHAT, "n_kv_head", "logit_soft_cap"), "nanochat"),
}


def exported(decoder: Decoder) -> tuple[dict[str, Any], dict[str, Tensor], str | None]:
    """Return what a folder of a decoder holds.

    Returns:
        The fields of `config.json`, the weights of `model.safetensors`, and `None`; or, if Transformers has no class
        for the decoder, both in our own format, and a sentence that says which parts are missing there.

    Raises:
        ValueError: If a module has been put into the decoder that its configuration does not name, or one of other
            sizes or settings: a decoder that is built from the files would be another one, or not take the weights.
    """
    if (foreign := _foreign_part(decoder)) is not None:
        raise ValueError(f"{foreign}, which no format of a decoder has")
    nearest = min(FORMATS.values(), key=lambda format: len(format.misfits(decoder.config)))
    if misfits := nearest.misfits(decoder.config):
        config = {"model_type": OWN_MODEL_TYPE, **asdict(decoder.config)}
        reason = f"Transformers has no class for this decoder: {nearest.name} has no {', '.join(misfits)}"
        return config, decoder.state_dict(), reason
    state = nearest.state(decoder)
    if decoder.config.tied_embeddings:
        del state["lm_head.weight"]  # the token embedding again; a safetensors file holds each tensor once
    return nearest.config(decoder.config), state, None


def _foreign_part(decoder: Decoder) -> str | None:
    """Return the first module of a decoder that is not what its configuration says, in words, or `None`."""
    if type(decoder) is not Decoder:
        return f"the decoder is a {type(decoder).__name__}"
    with torch.device("meta"):
        named = dict(Decoder(decoder.config).named_modules())
    own = dict(decoder.named_modules())
    for name in own | named:
        module, expected = own.get(name), named.get(name)
        if module is None:
            return f"there is no {name}"
        if expected is None or type(module) is not type(expected):
            return f"{name} is a {type(module).__name__}"
        if module.extra_repr() != expected.extra_repr() and not isinstance(module, nn.Dropout):
            return f"{name} is a {type(module).__name__}({module.extra_repr()})"
    return None


def imported(config: Mapping[str, Any], state: Mapping[str, Tensor], block_size: int, **changes: Any) -> Decoder:
    """Return the decoder of a saved configuration and saved weights.

    Args:
        config: Fields of `config.json`, all of them if the class is one of Transformers.
        state: Weights under the names of that class.
        block_size: Context length, in tokens, at most the saved one; learned positions after it are dropped.
        **changes: Further fields of `DecoderConfig` to set, such as `attention`.

    Raises:
        ValueError: If the configuration cannot be converted.
        KeyError: If weights are missing.
        RuntimeError: If the weights do not fit.
    """
    model_type = config.get("model_type")
    changes["block_size"] = block_size
    if model_type == OWN_MODEL_TYPE:
        known = {field.name for field in fields(DecoderConfig)}
        own = replace(DecoderConfig(**{name: value for name, value in config.items() if name in known}), **changes)
        weights = dict(state)
        if "position_embedding.weight" in weights:
            weights["position_embedding.weight"] = weights["position_embedding.weight"][:block_size]
    elif model_type in FORMATS:
        own = replace(FORMATS[model_type].decoder_config(config), **changes)
        weights = FORMATS[model_type].decoder_state(state, own)
    else:
        raise ValueError(f"a {model_type} model: our decoder reads {', '.join(FORMATS)} and {OWN_MODEL_TYPE}")
    decoder = Decoder(own)
    decoder.load_state_dict(weights)
    return decoder
