"""Random texts, records, reviews, tokenizers and models of real sizes, which need no network."""

import json
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


def write_reviews(file: Path, n: int, longest: int, vocabulary: int) -> Path:
    """Write reviews of random words with random labels; most are as long as a row, as those of IMDB at 512 tokens."""
    draw = random.Random(3)
    with file.open("w") as lines:
        for number in range(n):
            text = words(draw.randint(longest // 2, 2 * longest), vocabulary - 6, draw)
            lines.write(json.dumps({"text": text, "label": number % 2, "film": f"film {number}"}) + "\n")
    return file


def write_records(file: Path, n: int, block_size: int, vocabulary: int) -> Path:
    """Write questions with five references and an answer that cites them; most take a third of a row."""
    draw, unit = random.Random(4), block_size // 128
    with file.open("w") as lines:
        for number in range(n):
            references = [words(draw.randint(3 * unit, 15 * unit), vocabulary - 6, draw) for _ in range(5)]
            question = f"q{number} {words(draw.randint(unit, 2 * unit), vocabulary - 6, draw)}"
            answer = f"{words(draw.randint(2 * unit, 12 * unit), vocabulary - 6, draw)} [1] w7 [3]"
            lines.write(json.dumps({"question": question, "answer": answer, "references": references}) + "\n")
    return file


def save_bert(folder: Path, vocabulary: int, **sizes: int) -> Path:
    """Write a BERT with random weights, by default of the sizes of BERT-base, and return its folder."""
    from transformers import BertConfig, BertModel

    torch.manual_seed(0)
    BertModel(BertConfig(vocab_size=vocabulary, **sizes)).save_pretrained(folder)
    return folder


def save_gpt2(folder: Path, vocabulary: int, **sizes: Any) -> Path:
    """Write a GPT-2 with random weights, by default of the sizes of GPT-2 small, and return its folder."""
    from transformers import GPT2Config, GPT2LMHeadModel

    torch.manual_seed(0)
    sizes = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0} | sizes
    GPT2LMHeadModel(GPT2Config(vocab_size=vocabulary, **sizes)).save_pretrained(folder)
    return folder
