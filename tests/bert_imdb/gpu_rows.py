"""Row of `make bench-gpu`: fine-tuning of BERT-base on reviews."""

import json
import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from gpu import workload
from gpu.runs import Line, Row, Settings, fit, free, hf_trainer


def write_reviews(file: Path, n: int, longest: int, vocabulary: int) -> Path:
    """Write reviews of random words with random labels; most are as long as a row, as those of IMDB at 512 tokens."""
    draw = random.Random(3)
    with file.open("w") as lines:
        for number in range(n):
            text = workload.words(draw.randint(longest // 2, 2 * longest), vocabulary - 6, draw)
            lines.write(json.dumps({"text": text, "label": number % 2, "film": f"film {number}"}) + "\n")
    return file


def save_bert(folder: Path, vocabulary: int, **sizes: int) -> Path:
    """Write a BERT with random weights, by default of the sizes of BERT-base, and return its folder."""
    from transformers import BertConfig, BertModel

    torch.manual_seed(0)
    BertModel(BertConfig(vocab_size=vocabulary, **sizes)).save_pretrained(folder)
    return folder


def reviews(settings: Settings) -> Iterator[Line]:
    """BERT-base on reviews of 512 tokens: all weights, and a frozen base with cached features; HF Trainer."""
    from transformers import AutoModelForSequenceClassification, AutoTokenizer, DataCollatorWithPadding

    vocabulary, longest, n_reviews = settings.choose((30522, 512, 1280), (300, 16, 24))
    small = {"num_hidden_layers": 2, "hidden_size": 32, "num_attention_heads": 2, "intermediate_size": 64}
    base = str(save_bert(Path("bert").resolve(), vocabulary, **settings.choose({}, small)))
    tokenizer = str(workload.word_tokenizer(Path("tokenizer").resolve(), vocabulary))
    file = write_reviews(Path("reviews.jsonl").resolve(), n_reviews, longest, vocabulary)
    source = {
        "class_path": "datamodules.bert_imdb.ReviewFiles",
        "init_args": {"train": str(file), "val": str(file), "test_fraction": 0.0},
    }

    def overlay(batch_size: int) -> dict[str, Any]:
        data = {"reviews": source, "tokenizer": tokenizer, "max_tokens": longest, "batch_size": batch_size}
        return {"model": {"init_args": {"base": base}}, "data": {"init_args": data}}

    def rows() -> list[dict[str, Any]]:
        encode = AutoTokenizer.from_pretrained(tokenizer)
        encode.model_max_length = longest
        lines = [json.loads(line) for line in file.read_text().splitlines()]
        coded = encode([line["text"] for line in lines], truncation=True)
        keys = ("input_ids", "attention_mask")
        return [{k: coded[k][i] for k in keys} | {"labels": line["label"]} for i, line in enumerate(lines)]

    def theirs(frozen: bool, batch_size: int, steps: int) -> float:
        torch.manual_seed(0)
        model = AutoModelForSequenceClassification.from_pretrained(base)
        if frozen:
            model.bert.requires_grad_(False)
        collator = DataCollatorWithPadding(AutoTokenizer.from_pretrained(tokenizer))
        return batch_size / hf_trainer(settings, model, rows(), collator, batch_size, steps).seconds

    batch_size, steps, every = settings.choose((32, 50, 10), (4, 4, 1))
    clock = fit(settings, "bert_imdb/full.yaml", steps, every, **overlay(batch_size))
    ours = batch_size / clock.times.seconds
    yield Line("all weights: `llm-train fit`", {"reviews/s": ours, "peak GiB": clock.times.peak})
    free(clock)
    rate = theirs(False, batch_size, settings.choose(36, 4))
    yield Line("all weights: HF Trainer", {"reviews/s": rate, "fit / this": ours / rate})

    batch_size, steps, every = settings.choose((64, 200, 25), (4, 8, 2))
    freeze = {
        "class_path": "lightning_modules.finetuning.freeze.Freeze",
        "init_args": {"patterns": ["model.encoder.*"]},
    }
    cached = {"class_path": "lightning_modules.bert_imdb.CachedFeatures"}
    clock = fit(settings, "bert_imdb/frozen_base.yaml", steps, every, callbacks=[freeze, cached], **overlay(batch_size))
    ours = batch_size / clock.times.seconds
    yield Line("frozen base: `llm-train fit`, cached features", {"reviews/s": ours, "peak GiB": clock.times.peak})
    free(clock)
    rate = theirs(True, batch_size, settings.choose(24, 4))
    yield Line("frozen base: HF Trainer", {"reviews/s": rate, "fit / this": ours / rate})


ROWS = {"c": Row("BERT-base on reviews of at most 512 tokens, bfloat16", reviews)}
