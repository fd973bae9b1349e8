"""Pretrained models of Transformers: loading, saving, and checking them against the data."""

import json
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from pathlib import Path
from typing import TYPE_CHECKING, Any

import lightning as L
import torch
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch import Tensor, nn

from lightning_modules.common.files import read_json
from lightning_modules.common.hub import hub_answers
from lightning_modules.common.messages import first_line, listed, say
from lightning_modules.common.pretrained import model_folder, quietly, vocabulary_of
from lightning_modules.finetuning.selection import of_all_layers
from lightning_modules.runtime.private_names import configured_attention, has_data

if TYPE_CHECKING:  # imported where used: transformers is slow to import
    from transformers import PreTrainedModel

_weights_follow: ContextVar[bool] = ContextVar("weights_follow", default=False)
ENCODER_CLASSIFIER = "encoder_classifier"  # type of an exported model that has an encoder, a pooling and a head
_SAME = 1e-3  # largest difference of scores that are the same but for rounding, in standard deviations of them


def load_pretrained(
    base: str,
    auto_class: str = "AutoModelForCausalLM",
    architecture: dict[str, Any] | None = None,
    argument: str = "model.base",
    **changes: Any,
) -> "PreTrainedModel":
    """Return a model in float32 and in training mode.

    Where tensors have no data, as for an estimate, no weights are read, and the model has the default dtype of torch.

    Args:
        base: A folder with `config.json` and weights, a run folder with such a folder `model/` in it, a `.gguf` file,
            `package:NAME` for a model that an installed package carries, or a hub name.
        auto_class: Auto class of Transformers, which chooses the head.
        architecture: Result of `architecture_of`. The model is then built with random weights and without reading
            `base`; the weights of a checkpoint are loaded afterwards.
        argument: Argument of the YAML that gives `base`, for error messages.
        **changes: Fields of the model's configuration to set, such as `num_labels`.

    Raises:
        MisconfigurationException: If there is no such model, it does not fit the auto class, or an encoder is to be a
            causal language model.
    """
    import transformers

    auto = getattr(transformers, auto_class)
    if architecture is not None:
        try:
            config = transformers.AutoConfig.for_model(**architecture | changes)
            _check_kernels(config, argument)
            return _without_weights(auto, config)
        except (MisconfigurationException, RuntimeError, MemoryError):
            raise
        except Exception as error:  # the configuration can be a damaged file's
            raise MisconfigurationException(
                f"model.architecture is none of Transformers ({first_line(error)}): leave it out; a checkpoint holds it"
            ) from error
    folder = local_folder(base, argument)
    on_disk = folder is not None or not hub_answers()
    try:
        with quietly():
            encoder = _encoder_within(folder) if auto_class == "AutoModel" else None
            if encoder:
                config = transformers.AutoConfig.for_model(**encoder | changes)
            else:
                config = transformers.AutoConfig.from_pretrained(
                    folder or base, local_files_only=on_disk, trust_remote_code=False, **changes
                )
            _check_kernels(config, argument)
            if folder is not None:
                _check_adapters(folder, argument)
            if not has_data(torch.empty(0)):
                return _without_weights(auto, config)
            model, found = auto.from_pretrained(
                folder or base,
                config=config,
                dtype=torch.float32,
                output_loading_info=True,
                local_files_only=on_disk,
                trust_remote_code=False,
                key_mapping={r"^encoder\.": ""} if encoder else None,
                adapter_kwargs={"local_files_only": on_disk},  # without it, adapters are looked up on the hub
            )
    except MisconfigurationException:
        raise
    # A missing file, an unknown architecture, pickled weights that would run code, or a damaged file: the readers check
    # little, and so it fails anywhere in them.
    except Exception as error:
        where = "" if folder else ", which is no local folder, from the Hugging Face hub: check the name and network"
        raise MisconfigurationException(
            f"{argument}: {auto_class} could not load {base}{where} ({first_line(error)})"
        ) from error
    if auto_class == "AutoModelForCausalLM" and not _weights_follow.get():  # an old run stays readable
        _check_causality(model, base, argument)
    mark_as_new(parameter for name, parameter in model.named_parameters() if name in found["missing_keys"])
    if (missing := of_all_layers(sorted(found["missing_keys"]))) and not _weights_follow.get():
        say(f"{base} has no {listed(missing)}: initialised at random")
    return model.train()  # from_pretrained returns it in evaluation mode, and Lightning keeps the mode


def _encoder_within(folder: Path | None) -> dict[str, Any] | None:
    """Return the configuration of the encoder of a classifier that a run has exported with its code, which is not run.

    Its weights are `encoder.*`. The result is `None` for a model of another kind.
    """
    settings = read_json(folder / "config.json", {}) if folder is not None else {}
    return settings["encoder"] if settings.get("model_type") == ENCODER_CLASSIFIER else None


def _without_weights(auto: Any, config: Any) -> "PreTrainedModel":
    """Return a model with random weights; `.float()` would not do, as tensors without data cannot be converted."""
    return auto.from_config(config, dtype=torch.get_default_dtype(), trust_remote_code=False).train()


def mark_as_new(parameters: Iterable[Any]) -> None:
    """Note that parameters are none of the base, or those of a new head: `LoRA` trains them too."""
    for parameter in parameters:
        parameter.is_new = True


def is_new(parameter: nn.Parameter) -> bool:
    """Return whether a parameter was marked as new."""
    return getattr(parameter, "is_new", False)


def set_dropout(model: nn.Module, p: float) -> None:
    """Set the probability of each dropout layer of a model; its configuration, which is exported, stays as it is."""
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = p
        for name, value in vars(module).items():
            if "dropout" in name and isinstance(value, float):  # of an attention that calls a function
                setattr(module, name, p)


@contextmanager
def weights_follow() -> Iterator[None]:
    """Do not check or name the weights of bases within the context, because those of a checkpoint replace them."""
    token = _weights_follow.set(True)
    try:
        yield
    finally:
        _weights_follow.reset(token)


@torch.no_grad()
def _check_causality(model: "PreTrainedModel", base: str, argument: str) -> None:
    """Refuse a model whose scores depend on later tokens, such as an encoder that is loaded as a language model.

    The configuration does not say it for all: `is_decoder` is false in that of GPT-NeoX too.
    """
    last = model.get_input_embeddings().weight.shape[0] - 1
    ids = torch.full((2, 4), last)
    ids[1, -1] = last - 1
    try:
        one, other = model.eval()(ids, use_cache=False).logits[:, :-1]  # (T - 1, V) each
    except (RuntimeError, ValueError, TypeError, ImportError):  # it has an interface of its own, or needs a GPU
        return
    if (one - other).abs().max() > _SAME * one.std():
        raise MisconfigurationException(
            f"{argument}: the scores of {base} for a token depend on later tokens, so it is no language model but an "
            f"encoder ({type(model).__name__}); give the base of a causal language model"
        )


def _check_kernels(config: Any, argument: str) -> None:
    """Refuse a configuration whose attention is a name on the hub: Transformers would run the code of that name."""
    if "/" in str(configured_attention(config)):
        raise MisconfigurationException(
            f"{argument}: the configuration of the model asks for {configured_attention(config)}, which is code of the "
            "hub and is not run; remove attn_implementation from its config.json"
        )


def _check_adapters(folder: Path, argument: str) -> None:
    """Refuse adapters that name a Python module: the library of adapters would import it."""
    try:
        settings = read_json(folder / "adapter_config.json", {})
    except OSError as error:
        raise MisconfigurationException(f"{argument}: {error}") from error
    if settings.get("megatron_config") is not None:
        raise MisconfigurationException(
            f"{argument}: {folder / 'adapter_config.json'} names a module to import (megatron_core), which "
            "is not done; remove megatron_config from it"
        )


def save_pretrained(model: "PreTrainedModel", folder: Path) -> None:
    """Write a model in Transformers' format: `config.json` and `model.safetensors`."""
    with quietly():
        model.save_pretrained(folder)


def local_folder(base: str, argument: str) -> Path | None:
    """Return the folder with `config.json`, or `None` if `base` is a name on the hub; see `common.pretrained`.

    Raises:
        MisconfigurationException: If `base` is a local path or a package, and there is no such model.
    """
    try:
        return model_folder(base)
    except ValueError as error:
        raise MisconfigurationException(f"{argument}: {error}") from error


def architecture_of(model: "PreTrainedModel") -> dict[str, Any]:
    """Return the configuration of a model in plain types; `load_pretrained` builds the same model from it."""
    return json.loads(model.config.to_json_string(use_diff=False))


def check_fit(
    model: "PreTrainedModel", base: str, vocab_size: int, block_size: int, argument: str = "data.block_size"
) -> None:
    """Refuse data with token ids or lengths that the model has no embeddings for.

    Args:
        model: Model to check.
        base: Folder or name of the model, for the message.
        vocab_size: Number of tokens of the tokenizer.
        block_size: Length of the longest sequence, in tokens.
        argument: Argument that sets this length, for the message.

    Raises:
        MisconfigurationException: If the vocabulary is larger than the model's, or a sequence longer than its context.
    """
    check_sizes(model.get_input_embeddings().weight.shape[0], context_of(model), base, vocab_size, block_size, argument)


def context_of(model: "PreTrainedModel") -> int | None:
    """Return the length of the longest sequence that a model takes, or `None` if there is no limit."""
    context = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    if table := _positions_after_padding(model):
        return table.num_embeddings - table.padding_idx - 1
    return context if context is not None and context > 0 else None  # XLNet says -1


def _positions_after_padding(model: "PreTrainedModel") -> Any:
    """Return the table of positions of RoBERTa and its relatives, or `None` for another model.

    They count the positions of the tokens that are not the padding token, and begin after its id.
    """
    tables = (table for name, table in model.named_modules() if name.endswith("position_embeddings"))
    return next((table for table in tables if getattr(table, "padding_idx", None) is not None), None)


def check_tokenizer(model: "PreTrainedModel", base: str | None, data: Any) -> None:
    """Refuse data whose tokenizer does not fit a model; see `check_vocabulary` and `check_padding`.

    Args:
        model: Model to check.
        base: Folder or name of the model that it starts from, or `None`.
        data: Data module, which may have no tokenizer.

    Raises:
        MisconfigurationException: If its tokens have other ids, or its padding token is another one.
    """
    tokenizer = getattr(data, "tokenizer", None)
    check_vocabulary(base, tokenizer)
    check_padding(model, str(base), tokenizer)


def check_padding(model: "PreTrainedModel", base: str, tokenizer: Any) -> None:
    """Refuse a tokenizer whose padding token is not the one from which a model counts its positions.

    Args:
        model: Model to check.
        base: Folder or name of the model, for the message.
        tokenizer: Tokenizer of the data, or `None`.

    Raises:
        MisconfigurationException: If the model would take another token of a text for padding.
    """
    table, given = _positions_after_padding(model), getattr(tokenizer, "pad_token_id", None)
    if table is not None and given not in (None, table.padding_idx):
        raise MisconfigurationException(
            f"data.tokenizer: its padding token has the id {given}, and {base} counts positions from tokens other than "
            f"{table.padding_idx}; give the tokenizer that this model was trained with"
        )


def check_sizes(
    n_rows: int, context: int | None, base: str, vocab_size: int, block_size: int, argument: str = "data.block_size"
) -> None:
    """Refuse data with token ids or lengths beyond `n_rows` or `context`, the sizes of a model; see `check_fit`."""
    if vocab_size > n_rows:
        raise MisconfigurationException(
            f"data.tokenizer: it has {vocab_size} tokens, more than the {n_rows} of {base}; give the "
            "tokenizer that this model was trained with"
        )
    if context is not None and block_size > context:
        raise MisconfigurationException(
            f"{argument}: {block_size} is longer than the context of {base}, {context} tokens"
        )


def check_vocabulary(base: str | None, tokenizer: Any) -> None:
    """Refuse a tokenizer whose tokens have other ids than in the tokenizer that the base comes with.

    Args:
        base: Folder or name of the model; nothing is checked without one, nor without its files on this machine.
        tokenizer: Tokenizer of the data, or `None`.

    Raises:
        MisconfigurationException: If more than a tenth of the ids differ; a few may be tokens that were renamed.
    """
    try:
        folder = model_folder(base) if base and tokenizer is not None else None
    except ValueError:  # a resumed run does not need its base
        return
    of_base = {i: token for token, i in vocabulary_of(folder).items()} if folder else {}
    given = tokenizer.get_vocab() if of_base else {}
    others = [token for token, i in given.items() if of_base.get(i, token) != token]
    if len(others) > len(given) / 10:
        example = others[0]
        raise MisconfigurationException(
            f"data.tokenizer: {len(others):,} of its {len(given):,} tokens have another id than in the tokenizer of "
            f"{base}, where {given[example]} is {of_base[given[example]]!r} and not {example!r}: give that of the "
            f"base, --data.tokenizer {base}"
        )


def attends_within_records(trainer: L.Trainer, model: "PreTrainedModel") -> bool:
    """Let a model take `cu_seqlens` in the place of a mask if the run is on a GPU, and return whether it does.

    See `packed_attention`.
    """
    if trainer.strategy.root_device.type != "cuda":
        return False
    from lightning_modules.finetuning.packed_attention import use_attention_within_records

    return use_attention_within_records(model)


def as_mask(cu_seqlens: Tensor) -> Tensor:
    """Return the ends of records, (N,), in the form that passes for a mask, (1, 1, 1, N)."""
    return cu_seqlens[None, None, None]


@contextmanager
def in_evaluation_mode(model: nn.Module) -> Iterator[None]:
    """Put a model into evaluation mode within the context; each module then has the mode that it had before."""
    training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        yield
    finally:
        for module in training:
            module.training = True
