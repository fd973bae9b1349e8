"""The rows of the benchmark: each is a function that measures its variants in turn, and yields a line for each."""

import csv
import gc
import importlib.util
import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from unittest import mock

import forks
import torch
import yaml
from gpu import workload
from gpu.clock import Clock, Times, n_graphs, timed
from helpers import LAST, weights
from torch import Tensor, nn

from experiments.__main__ import main as llm_train
from lightning_modules.base import ExperimentModule
from lightning_modules.optim import weight_decay_groups
from lightning_modules.runtime.peak_flops import peak_flops

ROOT = Path(__file__).parents[2]
EXPERIMENTS = ROOT / "experiments"


@dataclass(frozen=True)
class Settings:
    """Settings of all rows.

    Args:
        short: Whether to take tiny sizes, whose figures mean nothing.
        nanogpt: Folder of a clone of nanoGPT, or `None`.
    """

    short: bool = False
    nanogpt: Path | None = None

    def choose(self, real: Any, short: Any) -> Any:
        """Return the real value, or the one for the short form."""
        return short if self.short else real

    @property
    def device(self) -> str:
        """`cuda` where there is a GPU."""
        return "cuda" if torch.cuda.is_available() else "cpu"


@dataclass
class Line:
    """Line of a row: whose figures they are, and the figures by name."""

    who: str
    figures: dict[str, Any]
    device: str = field(default_factory=lambda: torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu")


@dataclass(frozen=True)
class Row:
    """Row of the benchmark: a title, and the function that measures it."""

    title: str
    measure: Callable[[Settings], Iterator[Line]]


# --- runs of the project ----------------------------------------------------------------------------------------------


def fit(settings: Settings, experiment: str, steps: int, every: int, **overlay: Any) -> Clock:
    """Run an experiment with the default loggers and callbacks and a clock; return the clock.

    Args:
        settings: Settings of the benchmark.
        experiment: YAML below `experiments/`.
        steps: Optimiser steps.
        every: Steps between two entries of the log, and in a window of the clock.
        **overlay: Sections of YAML to go over the experiment; `callbacks` are added to the default ones.
    """
    defaults = yaml.safe_load((EXPERIMENTS / "trainer/defaults.yaml").read_text())["trainer"]["callbacks"]
    clock = {"class_path": "gpu.clock.Clock", "init_args": {"every": every}}
    tf32 = {"class_path": "lightning_modules.runtime.tf32.TF32"}
    trainer = {
        "accelerator": "gpu" if settings.device == "cuda" else "cpu",
        "devices": 1,
        "precision": "bf16-mixed",
        "max_steps": steps,
        "max_epochs": -1,
        "check_val_every_n_epoch": None,
        "val_check_interval": steps,
        "limit_val_batches": 0,
        "accumulate_grad_batches": 1,
        "log_every_n_steps": every,
        "callbacks": [*defaults, tf32, *overlay.pop("callbacks", []), clock],
    }
    overlay["trainer"] = trainer | overlay.get("trainer", {})
    file = Path(f"overlay_{len(list(Path().glob('overlay_*')))}.yaml")
    file.write_text(yaml.safe_dump(overlay, sort_keys=False))
    llm_train(["fit", "-c", str(EXPERIMENTS / experiment), "-c", str(file), "--run.name", file.stem])
    return Clock.last


def logged(clock: Clock, **names: str) -> dict[str, float]:
    """Return the last values of the metrics `perf/...` of a run under new names, without those that it has not."""
    with (Path(clock.trainer.default_root_dir) / "metrics.csv").open() as file:
        last = {name: float(value) for row in csv.DictReader(file) for name, value in row.items() if value}
    return {new: last[f"perf/{name}"] for name, new in names.items() if f"perf/{name}" in last}


def bare_loop(clock: Clock, n_steps: int, every: int) -> Times:
    """Time a loop of plain PyTorch over the step of a finished run: its loss, clipping and optimiser.

    The compiled loss of the run is used again. The batches are those of its loader, moved to the device before.
    """
    module, trainer = clock.module, clock.trainer
    device = "cuda" if torch.cuda.is_available() else "cpu"
    module.to(device).train()
    loader = iter(trainer.datamodule.train_dataloader())
    batches = [_moved(next(loader), device) for _ in range(4)]
    optimizer = torch.optim.AdamW(weight_decay_groups(module, {}), lr=1e-4, betas=(0.9, 0.95), fused=True)
    parameters = [parameter for parameter in module.parameters() if parameter.requires_grad]

    def step(number: int) -> None:
        with torch.autocast(device, torch.bfloat16):
            loss = module.training_step(batches[number % len(batches)], number)
        loss.backward()
        nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    with mock.patch.object(ExperimentModule, "logging_is_due", False):
        return timed(step, n_steps, every)


def _moved(batch: dict[str, Any], device: str) -> dict[str, Any]:
    return {name: part.to(device) if isinstance(part, Tensor) else part for name, part in batch.items()}


def free(*clocks: Clock) -> None:
    """Free the memory of finished runs."""
    for clock in clocks:
        clock.__dict__.clear()
    gc.collect()
    torch._dynamo.reset()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def speed(times: Times, tokens_a_step: int, flops_per_token: float = 0.0) -> dict[str, Any]:
    """Return the figures of a decoder's training."""
    rate = tokens_a_step / times.seconds
    peak = peak_flops(torch.cuda.get_device_name(), "bfloat16") if torch.cuda.is_available() else None
    return {
        "tokens/s": rate,
        **({"MFU": rate * flops_per_token / peak} if peak else {}),
        "ms a step": times.seconds * 1e3,
        "peak GiB": times.peak,
        "s to the end of step 1": times.first,
    }


# --- what a user would take instead -----------------------------------------------------------------------------------


def nanogpt_loop(settings: Settings, sizes: dict[str, Any], batch_size: int, steps: int, every: int) -> Times:
    """Time the training loop of nanoGPT: its model, compiled, its optimiser and its way to get a batch."""
    assert settings.nanogpt is not None
    spec = importlib.util.spec_from_file_location("nanogpt_model", settings.nanogpt / "model.py")
    assert spec is not None
    assert spec.loader is not None
    theirs = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(theirs)
    device, block_size = settings.device, sizes["block_size"]
    torch.set_float32_matmul_precision("high")
    torch.manual_seed(0)
    model = theirs.GPT(theirs.GPTConfig(**sizes)).to(device)
    optimizer = model.configure_optimizers(0.1, 6e-4, (0.9, 0.95), device)
    compiled = model if settings.short else torch.compile(model)
    data = torch.randint(sizes["vocab_size"] - 1, (200_000,)).short().numpy().astype("uint16")

    def get_batch() -> tuple[Tensor, Tensor]:
        places = torch.randint(len(data) - block_size, (batch_size,))
        pair = [
            torch.stack([torch.from_numpy(data[i + k : i + k + block_size].astype("int64")) for i in places])
            for k in (0, 1)
        ]
        if device == "cpu":
            return pair[0], pair[1]
        return pair[0].pin_memory().to(device, non_blocking=True), pair[1].pin_memory().to(device, non_blocking=True)

    batch = get_batch()

    def step(number: int) -> None:
        nonlocal batch
        with torch.autocast(device, torch.bfloat16):
            _, loss = compiled(*batch)
        batch = get_batch()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    return timed(step, steps, every)


def hf_trainer(settings: Settings, model: Any, rows: list[dict], collator: Any, batch_size: int, steps: int) -> Times:
    """Time the steps of Hugging Face's Trainer."""
    from transformers import Trainer, TrainerCallback, TrainingArguments

    every = max(1, steps // 6)
    times = Times(every)

    class Timer(TrainerCallback):
        def on_train_begin(self, *_: Any, **__: Any) -> None:
            times.__init__(every)  # type: ignore[misc]

        def on_step_end(self, arguments: Any, state: Any, control: Any, **_: Any) -> None:
            times.step(state.global_step)

    arguments = TrainingArguments(
        output_dir="hf",
        per_device_train_batch_size=batch_size,
        max_steps=steps,
        bf16=settings.device == "cuda",
        optim="adamw_torch_fused",
        learning_rate=2e-5,
        max_grad_norm=1.0,
        dataloader_num_workers=settings.choose(4, 0),
        logging_steps=every,
        save_strategy="no",
        report_to=[],
        disable_tqdm=True,
        use_cpu=settings.device == "cpu",
    )
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
    Trainer(model, arguments, train_dataset=rows, data_collator=collator, callbacks=[Timer()]).train()
    return times


# --- the rows ---------------------------------------------------------------------------------------------------------


def _decoder_data(settings: Settings, n_words: int) -> tuple[dict[str, Any], int, int, int]:
    """Return the data of GPT-2's size, random words in place of web text; and vocabulary, block and batch size."""
    vocabulary, block_size, batch_size = settings.choose((50257, 1024, 64), (300, 32, 4))
    arguments = {
        "source": {
            "class_path": "datamodules.sources.TextFiles",
            "init_args": {"paths": str(workload.write_text(Path("words.txt").resolve(), n_words, vocabulary))},
        },
        "tokenizer": str(workload.word_tokenizer(Path("tokenizer").resolve(), vocabulary)),
        "block_size": block_size,
        "batch_size": batch_size,
        "split": "tail",
        "val_fraction": 0.01,
        "num_workers": settings.choose(4, 0),
    }
    data = {"class_path": "datamodules.decoder_pretrain.PretrainDataModule", "init_args": arguments}
    return data, vocabulary, block_size, batch_size


_TINY = {"n_layer": 2, "n_head": 2, "n_embd": 32}


def pretraining(settings: Settings) -> Iterator[Line]:
    """GPT-2 124M: the command, a bare loop over the same compiled step, and nanoGPT."""
    steps, every = settings.choose((80, 10), (6, 2))
    data, vocabulary, block_size, batch_size = _decoder_data(settings, settings.choose(1_400_000, 5_000))
    model = {"init_args": settings.choose({}, _TINY | {"compile": False})}
    clock = fit(settings, "decoder_pretrain/gpt2_124m.yaml", steps, every, model=model, data=data)
    tokens, flops = block_size * batch_size, clock.module.flops_per_token
    ours = speed(clock.times, tokens, flops)
    yield Line("`llm-train fit`", ours)
    yield Line("its own log", logged(clock, tokens_per_second="tokens/s", mfu="MFU"))
    bare = speed(bare_loop(clock, steps, every), tokens, flops)
    yield Line("bare loop, same step", bare | {"fit / this": ours["tokens/s"] / bare["tokens/s"]})
    free(clock)
    if settings.nanogpt:
        sizes = settings.choose({"n_layer": 12, "n_head": 12, "n_embd": 768}, _TINY)
        sizes |= {"block_size": block_size, "vocab_size": -(-vocabulary // 64) * 64, "bias": True, "dropout": 0.0}
        theirs = speed(nanogpt_loop(settings, sizes, batch_size, steps, every), tokens, flops)
        yield Line("nanoGPT", theirs | {"fit / this": ours["tokens/s"] / theirs["tokens/s"]})


def characters(settings: Settings) -> Iterator[Line]:
    """10.7 million weights on characters: the command with CUDA graphs, a bare loop, and nanoGPT."""
    steps, every = settings.choose((600, 100), (6, 2))
    text = workload.write_letters(Path("letters.txt").resolve(), settings.choose(1_100_000, 5_000))
    block_size, batch_size = settings.choose((256, 64), (32, 4))
    model = {"init_args": settings.choose({"compile": "reduce-overhead"}, _TINY | {"compile": False})}
    data = {"init_args": {"source": {"init_args": {"paths": str(text)}}}}
    data["init_args"] |= {"block_size": block_size, "batch_size": batch_size}
    clock = fit(settings, "decoder_pretrain/char_shakespeare.yaml", steps, every, model=model, data=data)
    tokens, flops = block_size * batch_size, clock.module.flops_per_token
    ours = speed(clock.times, tokens, flops)
    yield Line("`llm-train fit`, reduce-overhead", ours)
    bare = speed(bare_loop(clock, steps, every), tokens, flops)
    yield Line("bare loop, same step", bare | {"fit / this": ours["tokens/s"] / bare["tokens/s"]})
    free(clock)
    if settings.nanogpt:
        sizes = settings.choose({"n_layer": 6, "n_head": 6, "n_embd": 384}, _TINY)
        sizes |= {"block_size": block_size, "vocab_size": 65, "bias": False, "dropout": 0.2}
        theirs = speed(nanogpt_loop(settings, sizes, batch_size, steps // 2, every // 2), tokens, flops)
        yield Line("nanoGPT", theirs | {"fit / this": ours["tokens/s"] / theirs["tokens/s"]})


def reviews(settings: Settings) -> Iterator[Line]:
    """BERT-base on reviews of 512 tokens: all weights, and a frozen base with cached features; HF Trainer."""
    from transformers import AutoModelForSequenceClassification, AutoTokenizer, DataCollatorWithPadding

    vocabulary, longest, n_reviews = settings.choose((30522, 512, 1280), (300, 16, 24))
    small = {"num_hidden_layers": 2, "hidden_size": 32, "num_attention_heads": 2, "intermediate_size": 64}
    base = str(workload.save_bert(Path("bert").resolve(), vocabulary, **settings.choose({}, small)))
    tokenizer = str(workload.word_tokenizer(Path("tokenizer").resolve(), vocabulary))
    file = workload.write_reviews(Path("reviews.jsonl").resolve(), n_reviews, longest, vocabulary)
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

    batch_size, steps, every = settings.choose((32, 60, 10), (4, 4, 1))
    clock = fit(settings, "bert_imdb/full.yaml", steps, every, **overlay(batch_size))
    ours = batch_size / clock.times.seconds
    yield Line("all weights: `llm-train fit`", {"reviews/s": ours, "peak GiB": clock.times.peak})
    free(clock)
    rate = theirs(False, batch_size, settings.choose(48, 4))
    yield Line("all weights: HF Trainer", {"reviews/s": rate, "fit / this": ours / rate})

    batch_size, steps, every = settings.choose((64, 400, 50), (4, 8, 2))
    freeze = {
        "class_path": "lightning_modules.finetuning.freeze.Freeze",
        "init_args": {"patterns": ["model.encoder.*"]},
    }
    cached = {"class_path": "lightning_modules.bert_imdb.CachedFeatures"}
    clock = fit(settings, "bert_imdb/frozen_base.yaml", steps, every, callbacks=[freeze, cached], **overlay(batch_size))
    ours = batch_size / clock.times.seconds
    yield Line("frozen base: `llm-train fit`, cached features", {"reviews/s": ours, "peak GiB": clock.times.peak})
    free(clock)
    rate = theirs(True, batch_size, settings.choose(30, 4))
    yield Line("frozen base: HF Trainer", {"reviews/s": rate, "fit / this": ours / rate})


def cited_answers(settings: Settings) -> Iterator[Line]:
    """GPT-2 small on cited answers: packed rows, and HF Trainer with rows padded to the longest."""
    from transformers import AutoModelForCausalLM

    vocabulary, block_size, n_records = settings.choose((50257, 1024, 1200), (300, 128, 40))
    small = {"n_layer": 2, "n_head": 2, "n_embd": 32, "n_positions": 128}
    base = str(workload.save_gpt2(Path("gpt2").resolve(), vocabulary, **settings.choose({}, small)))
    file = workload.write_records(Path("records.jsonl").resolve(), n_records, block_size, vocabulary)
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
    steps, every = settings.choose((60, 10), (6, 2))
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
    times = hf_trainer(settings, model, rows, _PadToLongest(), batch_size, settings.choose(48, 6))
    rate = batch_size / times.seconds
    yield Line("HF Trainer, padded", {"records/s": rate, "fit / this": ours / rate, "peak GiB": times.peak})
    yield _same_loss(settings, base, vocabulary, block_size, packed, [rows[number] for number in of_packed])


def _same_loss(
    settings: Settings, base: str, vocabulary: int, block_size: int, packed: list[dict], rows: list[dict]
) -> Line:
    """Return the loss of packed rows by our module, and of the same records, one at a time, by Transformers."""
    from transformers import AutoModelForCausalLM

    from lightning_modules.gpt2_webglm_qa import GPT2WebGLMQAModule

    device = settings.device
    module = GPT2WebGLMQAModule(base, vocab_size=vocabulary, block_size=block_size).to(device).eval()
    theirs = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32).to(device).eval()
    with torch.no_grad(), torch.autocast(device, torch.bfloat16, enabled=device == "cuda"):
        for batch in packed:
            module.evaluation_step(_moved(batch, device), module.val_metrics)
        total = counted = 0.0
        for row in rows:
            n = sum(label != -100 for label in row["labels"])
            tensors = {name: torch.tensor([values], device=device) for name, values in row.items()}
            total, counted = total + float(theirs(**tensors).loss) * n, counted + n
    ours = float(module.val_metrics.compute()["loss"])
    return Line(f"loss of {len(rows)} records", {"packed": f"{ours:.5f}", "one at a time": f"{total / counted:.5f}"})


class _PadToLongest:
    """Collate records, padded to the longest of the batch."""

    def __call__(self, rows: list[dict[str, list[int]]]) -> dict[str, Tensor]:
        longest = max(len(row["input_ids"]) for row in rows)
        filled = {"input_ids": 0, "labels": -100}
        batch = {
            name: torch.tensor([row[name] + [filler] * (longest - len(row[name])) for row in rows])
            for name, filler in filled.items()
        }
        lengths = torch.tensor([[len(row["input_ids"])] for row in rows])
        return batch | {"attention_mask": (torch.arange(longest) < lengths).long()}


def generation(settings: Settings) -> Iterator[Line]:
    """124M weights in bfloat16: our generation and that of Transformers, at batch 1 and 64, greedy."""
    from transformers import AutoModelForCausalLM

    from lightning_modules.decoder_pretrain.module import PretrainModule

    vocabulary, length, n_prompt = settings.choose((50257, 256, 32), (300, 8, 4))
    small = {"n_layer": 2, "n_head": 2, "n_embd": 32, "n_positions": 64}
    folder = str(workload.save_gpt2(Path("gpt2").resolve(), vocabulary, **settings.choose({}, small)))
    block_size = settings.choose(1024, 64)
    module = PretrainModule(vocabulary, block_size, pretrained=folder).to(settings.device).eval()
    theirs = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).to(settings.device).eval()
    torch.manual_seed(0)
    prompts = torch.randint(vocabulary, (64, n_prompt), device=settings.device)

    def our_tokens(batch: int, n: int) -> Tensor:
        steps = module.generate(prompts[:batch], max_new_tokens=n, temperature=0.0)
        return torch.stack(list(steps), dim=1).cpu()

    def their_tokens(batch: int, n: int) -> Tensor:
        options = {"max_new_tokens": n, "min_new_tokens": n, "do_sample": False, "pad_token_id": 0}
        mask = torch.ones_like(prompts[:batch])
        return theirs.generate(prompts[:batch], attention_mask=mask, **options)[:, n_prompt:].cpu()

    same = [torch.equal(our_tokens(batch, length // 4), their_tokens(batch, length // 4)) for batch in (1, 4)]
    yield Line("greedy tokens in float32, batch 1 and 4", {"equal": f"{sum(same)} of 2"})
    if settings.device == "cuda":
        module.bfloat16()
        theirs.bfloat16()
    for batch in settings.choose((1, 64), (1, 2)):
        rates = {}
        for who, tokens in (("`generate`", our_tokens), ("HF `generate`", their_tokens)):
            tokens(batch, length)  # records graphs, loads kernels
            times = timed(lambda _, tokens=tokens, batch=batch: tokens(batch, length), settings.choose(4, 2), 1)
            rates[who] = batch * length / times.seconds
            figures = {"tokens/s": rates[who]}
            yield Line(f"batch {batch}: {who}", figures | {"ours / this": rates["`generate`"] / rates[who]})


def resuming(settings: Settings) -> Iterator[Line]:
    """Runs with `deterministic: true`: the same run twice, and a run that is killed and resumed."""
    text = workload.write_letters(Path("letters.txt").resolve(), settings.choose(300_000, 5_000))
    block_size, batch_size = settings.choose((256, 64), (32, 4))
    steps, killed_at = settings.choose((40, 20), (6, 3))
    trainer = {
        "accelerator": "gpu" if settings.device == "cuda" else "cpu",
        "deterministic": True,
        "max_steps": steps,
        "val_check_interval": killed_at,
        "limit_val_batches": 2,
    }
    overlay = {
        "data": {
            "init_args": {
                "source": {"init_args": {"paths": str(text)}},
                "block_size": block_size,
                "batch_size": batch_size,
            }
        },
        "trainer": trainer,
    }
    overlay |= settings.choose({}, {"model": {"init_args": _TINY}})
    Path("overlay.yaml").write_text(yaml.safe_dump(overlay))
    given = ("fit", "-c", str(EXPERIMENTS / "decoder_pretrain/char_shakespeare.yaml"), "-c", "overlay.yaml")
    modes = settings.choose({"eager": "false", "compiled": "true"}, {"eager": "false"})

    def start(mode: str, run: str, *flags: str, kill: bool = False) -> Any:
        def prepare() -> None:
            if kill:
                forks.die_after_step(killed_at)

        flags = (f"--model.compile={modes[mode]}", f"--run.name={mode}_{run}", *flags)
        return forks.start(*given, *flags, prepare=prepare, output=Path(f"{mode}_{run}.log"))

    running = {(mode, run): start(mode, run, kill=run == "killed") for mode in modes for run in ("a", "b", "killed")}
    for mode in modes:
        running[mode, "killed"].join()
        running[mode, "killed"] = start(mode, "killed", "--ckpt_path=last")
    codes = {name: (process.join(), process.exitcode)[1] for name, process in running.items()}
    equal = []
    for mode in modes:
        runs = [Path("runs/decoder_pretrain") / f"{mode}_{run}" / LAST for run in ("a", "b", "killed")]
        if any(codes[mode, run] for run in ("a", "b", "killed")) or not all(map(Path.is_file, runs)):
            logs = "".join(Path(f"{mode}_{run}.log").read_text()[-2000:] for run in ("a", "b", "killed"))
            raise RuntimeError(f"{mode}: exit codes {codes}\n{logs}")
        first, second, resumed = map(weights, runs)
        for what, other in (("run twice", second), ("killed and resumed", resumed)):
            largest = max(float((first[name].float() - other[name].float()).abs().max()) for name in first)
            equal.append(largest == 0)
            yield Line(f"{mode}, {what}", {"equal": str(equal[-1]), "largest difference of a weight": largest})
    yield Line("all", {"equal": f"{sum(equal)} of {len(equal)}"})


def compilations(settings: Settings) -> Iterator[Line]:
    """Graphs that torch.compile makes in 100 steps with a validation and samples every 20."""
    text = workload.write_letters(Path("letters.txt").resolve(), settings.choose(300_000, 5_000))
    block_size, batch_size = settings.choose((256, 64), (32, 4))
    sizes = {"n_layer": 2} if not settings.short else _TINY
    model = {"init_args": sizes | {"compile": not settings.short}}
    data = {"init_args": {"source": {"init_args": {"paths": str(text)}}}}
    data["init_args"] |= {"block_size": block_size, "batch_size": batch_size}
    samples = {
        "class_path": "lightning_modules.runtime.samples.SampleText",
        "init_args": {"prompts": ["ROMEO"], "max_new_tokens": 20},
    }
    steps, every = settings.choose((100, 20), (6, 2))
    before = n_graphs()
    trainer = {"val_check_interval": every, "limit_val_batches": 2}
    overlay = {"model": model, "data": data, "trainer": trainer, "callbacks": [samples]}
    clock = fit(settings, "decoder_pretrain/char_shakespeare.yaml", steps, every, **overlay)
    graphs = [n - before for n in clock.graphs]
    figures = {"after the first validation": graphs[0], "at the end": graphs[-1], "validations": len(graphs) - 1}
    yield Line(f"graphs in {steps} steps", figures)


def modern(settings: Settings) -> Iterator[Line]:
    """Decoders with equally many weights, classic and modern, compiled."""
    steps, every = settings.choose((60, 10), (6, 2))
    data, _, block_size, batch_size = _decoder_data(settings, settings.choose(1_400_000, 5_000))
    speeds: dict[str, float] = {}
    for name, experiment in (("classic", "gpt2_124m.yaml"), ("modern", "speedrun_124m.yaml")):
        model = {"init_args": settings.choose({"compile": True}, _TINY | {"compile": False})}
        adamw = {"class_path": "torch.optim.AdamW", "init_args": {"lr": 6e-4, "fused": True}}
        overlay = {"model": model, "data": data, "optimizer": adamw}
        clock = fit(settings, f"decoder_pretrain/{experiment}", steps, every, **overlay)
        figures = speed(clock.times, block_size * batch_size, clock.module.flops_per_token)
        speeds[name] = figures["tokens/s"]
        n = sum(parameter.numel() for parameter in clock.module.parameters())
        yield Line(name, figures | {"million weights": n / 1e6, "this / classic": speeds[name] / speeds["classic"]})
        free(clock)


ROWS = {
    "a": Row("GPT-2 124M, 64 x 1,024 tokens, bfloat16", pretraining),
    "b": Row("10.7 M weights, characters, 64 x 256, bfloat16", characters),
    "c": Row("BERT-base on reviews of at most 512 tokens, bfloat16", reviews),
    "d": Row("GPT-2 small on cited answers, bfloat16", cited_answers),
    "e": Row("generation, 124M, bfloat16, greedy", generation),
    "f": Row("deterministic runs: equal weights", resuming),
    "g": Row("graphs of torch.compile", compilations),
    "h": Row("modern decoder against the classic, compiled, AdamW", modern),
}
