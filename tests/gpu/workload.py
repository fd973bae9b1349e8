"""Random texts, records, reviews, tokenizers and models of real sizes, which need no network."""

import random
from pathlib import Path
from typing import Any

import torch

LETTERS = "abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ .,;:!?'-&$\n3"  # 65, as many as Shakespeare has


def words(n: int, vocabulary: int, draw: random.Random) -> str:
    """Return random words of the vocabulary of `word_tokenizer`."""
    return " ".join(f"w{number}" for number in draw.choices(range(vocabulary), k=n))


def word_tokenizer(folder: Path, vocabulary: int) -> Path:
    """Write a tokenizer whose tokens are the words w0, w1, ... and its special tokens, and return its folder."""
    from tokenizers import Tokenizer, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    special = ["[UNK]", "[PAD]", "[CLS]", "[SEP]", "[MASK]", "<|endoftext|>"]
    entries = {token: number for number, token in enumerate(special)}
    entries |= {f"w{number}": len(special) + number for number in range(vocabulary - len(special))}
    tokenizer = Tokenizer(models.WordLevel(entries, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.post_processor = processors.BertProcessing(("[SEP]", entries["[SEP]"]), ("[CLS]", entries["[CLS]"]))
    names = {"unk_token": "[UNK]", "pad_token": "[PAD]", "cls_token": "[CLS]", "sep_token": "[SEP]"}
    names |= {"mask_token": "[MASK]", "eos_token": "<|endoftext|>"}
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, **names).save_pretrained(folder)
    return folder


def write_text(file: Path, n_words: int, vocabulary: int) -> Path:
    """Write random words, and return the file."""
    draw = random.Random(1)
    file.write_text("\n".join(words(1000, vocabulary - 6, draw) for _ in range(max(1, n_words // 1000))))
    return file


def write_letters(file: Path, n: int) -> Path:
    """Write random characters, and return the file."""
    file.write_text("".join(random.Random(2).choices(LETTERS, k=n)))
    return file


def save_gpt2(folder: Path, vocabulary: int, **sizes: Any) -> Path:
    """Write a GPT-2 with random weights, by default of the sizes of GPT-2 small, and return its folder."""
    from transformers import GPT2Config, GPT2LMHeadModel

    torch.manual_seed(0)
    sizes = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0} | sizes
    GPT2LMHeadModel(GPT2Config(vocab_size=vocabulary, **sizes)).save_pretrained(folder)
    return folder
