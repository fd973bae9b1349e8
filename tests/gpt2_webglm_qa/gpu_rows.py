"""Row of `make bench-gpu`: instruction tuning of GPT-2 small on cited answers."""

import json
import random
from collections.abc import Iterator
from pathlib import Path

import torch
from gpu import workload
from gpu.runs import Line, Row, Settings, fit, free, hf_trainer, moved
from torch import Tensor

from lightning_modules.gpt2_webglm_qa import GPT2WebGLMQAModule

_MULTIPLE = 16  # of the lengths of padded rows


def write_records(file: Path, n: int, block_size: int, vocabulary: int) -> Path:
    """Write questions with five references and an answer that cites them; most take a third of a row."""
    draw, unit = random.Random(4), block_size // 128
    with file.open("w") as lines:
        for number in range(n):
            references = [workload.words(draw.randint(3 * unit, 15 * unit), vocabulary - 6, draw) for _ in range(5)]
            question = f"q{number} {workload.words(draw.randint(unit, 2 * unit), vocabulary - 6, draw)}"
            answer = f"{workload.words(draw.randint(2 * unit, 12 * unit), vocabulary - 6, draw)} [1] w7 [3]"
            lines.write(json.dumps({"question": question, "answer": answer, "references": references}) + "\n")
    return file


def cited_answers(settings: Settings) -> Iterator[Line]:
    """GPT-2 small on cited answers: packed rows, and HF Trainer with rows padded to the longest."""
    from transformers import AutoModelForCausalLM

    vocabulary, block_size, n_records = settings.choose((50257, 1024, 1200), (300, 128, 40))
    small = {"n_layer": 2, "n_head": 2, "n_embd": 32, "n_positions": 128}
    base = str(workload.save_gpt2(Path("gpt2").resolve(), vocabulary, **settings.choose({}, small)))
    file = write_records(Path("records.jsonl").resolve(), n_records, block_size, vocabulary)
    data = {
        "records": {
            "class_path": "datamodules.gpt2_webglm_qa.JSONLines",
            "init_args": {"train": str(file), "val_fraction": 0.02},
        },
        "tokenizer": str(workload.word_tokenizer(Path("tokenizer").resolve(), vocabulary)),
        "block_size": block_size,
        "max_answer_tokens": block_size // 4,
        "batch_size": settings.choose(16, 2),
        "num_workers": settings.choose(4, 0),
    }
    steps, every = settings.choose((50, 10), (6, 2))
    overlay = {"model": {"init_args": {"base": base}}, "data": {"init_args": data}}
    clock = fit(settings, "gpt2_webglm_qa/full.yaml", steps, every, **overlay)
    counts = clock.trainer.datamodule.counts["train"]
    records_a_row = counts["records"] / counts["rows"]
    ours = data["batch_size"] * records_a_row / clock.times.seconds
    figures = {"records/s": ours, "records a row": records_a_row, "peak GiB": clock.times.peak}
    yield Line("`llm-train fit`, packed", figures)
    examples = clock.trainer.datamodule.rows["train"].examples
    rows = [
        {
            "input_ids": [*map(int, example.prompt_ids), *map(int, example.answer_ids)],
            "labels": [-100] * len(example.prompt_ids) + list(map(int, example.answer_ids)),
        }
        for example in examples
    ]
    in_rows = clock.trainer.datamodule.rows["train"]
    packed = [in_rows[torch.tensor([row])] for row in range(min(8, len(in_rows)))]
    of_packed = [number for row in range(len(packed)) for number in in_rows.rows[row]]
    free(clock)
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    batch_size = max(1, round(data["batch_size"] * records_a_row))
    times = hf_trainer(settings, model, rows, PadToLongest(), batch_size, settings.choose(36, 6))
    rate = batch_size / times.seconds
    yield Line("HF Trainer, padded", {"records/s": rate, "fit / this": ours / rate, "peak GiB": times.peak})
    yield _same_loss(settings, base, vocabulary, block_size, packed, [rows[number] for number in of_packed])


def _same_loss(
    settings: Settings, base: str, vocabulary: int, block_size: int, packed: list[dict], rows: list[dict]
) -> Line:
    """Return the loss of packed rows by our module, and of the same records, one at a time, by Transformers."""
    from transformers import AutoModelForCausalLM

    device = settings.device
    module = GPT2WebGLMQAModule(base, vocab_size=vocabulary, block_size=block_size).to(device).eval()
    theirs = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32).to(device).eval()
    with torch.no_grad(), torch.autocast(device, torch.bfloat16, enabled=device == "cuda"):
        for batch in packed:
            module.evaluation_step(moved(batch, device), module.val_metrics)
        total = counted = 0.0
        for row in rows:
            n = sum(label != -100 for label in row["labels"])
            tensors = {name: torch.tensor([values], device=device) for name, values in row.items()}
            total, counted = total + float(theirs(**tensors).loss) * n, counted + n
    ours = float(module.val_metrics.compute()["loss"])
    return Line(f"loss of {len(rows)} records", {"packed": f"{ours:.5f}", "one at a time": f"{total / counted:.5f}"})


class PadToLongest:
    """Collate records, padded to the longest of the batch, up to a multiple of 16.

    The multiple suits matrix units. Without it, nearly each of the few timed steps has a new length, for which the
    attention of cuDNN, if torch takes it, first makes a plan; in a long run, most lengths are known.
    """

    def __call__(self, rows: list[dict[str, list[int]]]) -> dict[str, Tensor]:
        longest = -(-max(len(row["input_ids"]) for row in rows) // _MULTIPLE) * _MULTIPLE
        filled = {"input_ids": 0, "labels": -100}
        batch = {
            name: torch.tensor([row[name] + [filler] * (longest - len(row[name])) for row in rows])
            for name, filler in filled.items()
        }
        lengths = torch.tensor([[len(row["input_ids"])] for row in rows])
        return batch | {"attention_mask": (torch.arange(longest) < lengths).long()}


ROWS = {"d": Row("GPT-2 small on cited answers, bfloat16", cited_answers)}
