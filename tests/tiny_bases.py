"""Tiny models of Transformers that fine-tunings start from, in the forms in which real ones are found."""

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from safetensors.torch import load_file, save_file

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

CONTEXT = 32
END = "<|endoftext|>"
CHAT_TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n{% endfor %}"
)
MERGES = ["t h", "th e", "Ġ the", "i n", "Ġ i", "a n", "Ġ a"]


def save_gpt_neo(folder: Path, vocab_size: int = 257) -> Path:
    """Write a GPT-Neo over bytes whose second layer attends to four tokens, and return its folder."""
    from transformers import GPTNeoConfig, GPTNeoForCausalLM

    torch.manual_seed(2)
    config = GPTNeoConfig(
        vocab_size=vocab_size,
        max_position_embeddings=CONTEXT,
        hidden_size=16,
        num_layers=2,
        num_heads=2,
        attention_types=[[["global", "local"], 1]],
        window_size=4,
        resid_dropout=0.1,
        bos_token_id=None,
        eos_token_id=None,
    )
    GPTNeoForCausalLM(config).save_pretrained(folder)
    return folder


def save_old_gpt_neo(folder: Path) -> Path:
    """Write a GPT-Neo as the hub has it: its weights have masks of the attention, and its tokenizer is of two files."""
    save_gpt_neo(folder, len(byte_pairs()[0]))
    attentions = [f"transformer.h.{i}.attn.attention" for i in range(2)]
    masks = {f"{name}.bias": torch.ones(1, 1, CONTEXT, CONTEXT).tril() for name in attentions}
    masks |= {f"{name}.masked_bias": torch.tensor(-1e9) for name in attentions}
    _rename(folder, dict, masks)
    return save_byte_pairs(folder)


def save_old_gpt2(folder: Path) -> Path:
    """Write a GPT-2 as the hub has it: its weights have no prefix, and its tokenizer is of two files."""
    from transformers import GPT2Config, GPT2LMHeadModel

    torch.manual_seed(2)
    sizes: dict[str, Any] = {"vocab_size": len(byte_pairs()[0]), "n_positions": 128, "n_embd": 16}
    GPT2LMHeadModel(GPT2Config(**sizes, n_layer=2, n_head=2, initializer_range=0.2)).save_pretrained(folder)
    masks = {f"h.{i}.attn.bias": torch.ones(1, 1, 128, 128).tril() for i in range(2)}
    _rename(folder, lambda weights: {name.removeprefix("transformer."): weights[name] for name in weights}, masks)
    return save_byte_pairs(folder)


def save_old_bert(folder: Path) -> Path:
    """Write a BERT as the hub has it: with old names of the norms, the head of pretraining, and `vocab.txt`."""
    from transformers import BertConfig, BertForPreTraining

    torch.manual_seed(2)
    words = list("abcdefghijklmnopqrstuvwxyz0123456789.,'!?-")
    vocabulary = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *words, *(f"##{word}" for word in words)]
    sizes: dict[str, Any] = {"vocab_size": len(vocabulary), "max_position_embeddings": 64, "hidden_size": 16}
    layers: dict[str, Any] = {"num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 16}
    BertForPreTraining(BertConfig(**sizes, **layers)).save_pretrained(folder)
    old = {"LayerNorm.weight": "LayerNorm.gamma", "LayerNorm.bias": "LayerNorm.beta"}

    def renamed(weights: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        for new, name in old.items():
            weights = {key.replace(new, name): value for key, value in weights.items()}
        return weights

    _rename(folder, renamed, {})
    (folder / "vocab.txt").write_text("\n".join(vocabulary) + "\n")
    (folder / "tokenizer_config.json").write_text(json.dumps({"do_lower_case": True, "model_max_length": 64}))
    return folder


def _rename(folder: Path, renamed: Any, others: dict[str, torch.Tensor]) -> None:
    """Change the names of the weights in a folder, and add others."""
    file = folder / "model.safetensors"
    save_file(renamed(load_file(file)) | others, file, metadata={"format": "pt"})


def byte_pairs() -> tuple[dict[str, int], list[str]]:
    """Return the vocabulary and the merges of a small byte-level tokenizer."""
    from transformers.convert_slow_tokenizer import bytes_to_unicode

    tokens = [END, "<|im_start|>", "<|im_end|>", *bytes_to_unicode().values()]
    tokens += [merge.replace(" ", "") for merge in MERGES]
    return {token: i for i, token in enumerate(tokens)}, MERGES


def save_byte_pairs(folder: Path) -> Path:
    """Write the tokenizer `byte_pairs` in the form of GPT-2's, `vocab.json` and `merges.txt`."""
    folder.mkdir(exist_ok=True)
    vocabulary, merges = byte_pairs()
    (folder / "vocab.json").write_text(json.dumps(vocabulary))
    (folder / "merges.txt").write_text("\n".join(["#version: 0.2", *merges]) + "\n")
    return folder


def sentence_pieces(space: str) -> "PreTrainedTokenizerFast":
    """Return a tokenizer that puts a space before a text as those of SentencePiece do.

    Args:
        space: `normalizer` is the form of Llama 2; `first` and `always` are schemes of the pre-tokenizer `Metaspace`.
    """
    from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    tokens = [
        "<unk>",
        "<s>",
        "</s>",
        *(f"<0x{byte:02X}>" for byte in range(256)),
        *"▁[]12:?.OneTwoWhyI",
        "▁O",
        "▁[",
        "▁W",
    ]
    vocabulary = {token: i for i, token in enumerate(dict.fromkeys(tokens))}
    merges = [("▁", "O"), ("▁", "["), ("▁", "W")]
    backend = Tokenizer(models.BPE(vocab=vocabulary, merges=merges, byte_fallback=True, unk_token="<unk>"))
    if space == "normalizer":
        backend.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    else:
        backend.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme=space, split=False)
    parts = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    backend.decoder = decoders.Sequence(parts)
    return PreTrainedTokenizerFast(tokenizer_object=backend, unk_token="<unk>", bos_token="<s>", eos_token="</s>")


def llama() -> Any:
    """Return a Llama over `byte_pairs` with tied embeddings and two heads of queries for each of keys."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(3)
    sizes: dict[str, Any] = {"vocab_size": len(byte_pairs()[0]), "hidden_size": 32, "intermediate_size": 32}
    heads: dict[str, Any] = {"num_attention_heads": 4, "num_key_value_heads": 2, "num_hidden_layers": 2}
    config = LlamaConfig(**sizes, **heads, max_position_embeddings=256, tie_word_embeddings=True, initializer_range=0.3)
    return LlamaForCausalLM(config).eval()


def save_gguf(file: Path, model: Any, architecture: str = "llama") -> Path:
    """Write a Llama and the tokenizer `byte_pairs` with a chat template as a GGUF file, in float32."""
    import gguf

    config, state = model.config, {name: tensor.numpy() for name, tensor in model.state_dict().items()}
    writer = gguf.GGUFWriter(file, architecture)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    writer.add_vocab_size(config.vocab_size)
    vocabulary, merges = byte_pairs()
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list(list(vocabulary))
    special = (gguf.TokenType.CONTROL, gguf.TokenType.NORMAL)
    writer.add_token_types([special[not token.startswith("<|")] for token in vocabulary])
    writer.add_token_merges(merges)
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_chat_template(CHAT_TEMPLATE)
    names = {"self_attn.q_proj": "attn_q", "self_attn.k_proj": "attn_k", "self_attn.v_proj": "attn_v"}
    names |= {"self_attn.o_proj": "attn_output", "input_layernorm": "attn_norm", "post_attention_layernorm": "ffn_norm"}
    names |= {f"mlp.{part}_proj": f"ffn_{part}" for part in ("gate", "up", "down")}
    writer.add_tensor("token_embd.weight", state["model.embed_tokens.weight"])
    writer.add_tensor("output_norm.weight", state["model.norm.weight"])
    for i in range(config.num_hidden_layers):
        for ours, theirs in names.items():
            matrix = state[f"model.layers.{i}.{ours}.weight"]
            if theirs in ("attn_q", "attn_k"):  # the format pairs neighbouring components of a rotary embedding
                heads = config.num_attention_heads if theirs == "attn_q" else config.num_key_value_heads
                matrix = matrix.reshape(heads, 2, -1, matrix.shape[1]).swapaxes(1, 2).reshape(matrix.shape)
            writer.add_tensor(f"blk.{i}.{theirs}.weight", np.ascontiguousarray(matrix))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return file


def install(site: Path, package: str, *files: Path) -> None:
    """Put files into a folder of packages as those of an installed package, whose code must not be imported."""
    folder, record = site / package.replace("-", "_"), []
    folder.mkdir(parents=True)
    (folder / "__init__.py").write_text("raise SystemExit('the code of the package is imported')\n")
    for file in files:
        for path in [file] if file.is_file() else sorted(file.iterdir()):
            target = folder / (path.name if file.is_file() else f"{file.name}/{path.name}")
            target.parent.mkdir(exist_ok=True)
            target.write_bytes(path.read_bytes())
            record.append(f"{target.relative_to(site)},,")
    information = site / f"{folder.name}-1.0.dist-info"
    information.mkdir()
    (information / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {package}\nVersion: 1.0\n")
    (information / "RECORD").write_text("\n".join([*record, f"{folder.name}/__init__.py,,"]) + "\n")
