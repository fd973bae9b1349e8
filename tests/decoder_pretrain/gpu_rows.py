"""Rows of `make bench-gpu`: pretraining, generation, exactness and compilation of the decoder."""

import importlib.util
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import forks
import torch
import yaml
from gpu import workload
from gpu.clock import Clock, Times, n_graphs, timed
from gpu.runs import (
    EXPERIMENTS,
    Line,
    Row,
    Settings,
    bare_loop,
    fit,
    free,
    kernels,
    logged,
    speed,
)
from gpu.variants import LARGE, SMALL, Variant, variants
from helpers import LAST, weights
from torch import Tensor, nn

from lightning_modules.decoder_pretrain import PretrainModule


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


def _bare_loops(
    settings: Settings,
    clock: Clock,
    steps: int,
    every: int,
    tokens: int,
    ours: dict[str, Any],
    changes: tuple[Variant, ...],
) -> Iterator[Line]:
    """Loops over the step of a finished run, its kernels and its variants, beside the figures of the run."""
    flops = clock.module.flops_per_token
    bare = speed(bare_loop(clock, steps, every), tokens, flops)
    yield Line("bare loop, same step", bare | {"fit / this": ours["tokens/s"] / bare["tokens/s"]})
    if settings.kernels:
        yield from kernels(clock, every)
    if settings.variants:
        yield from variants(settings, clock, changes, steps, every)


def pretraining(settings: Settings) -> Iterator[Line]:
    """GPT-2 124M: the command, a bare loop over the same compiled step, and nanoGPT."""
    steps, every = settings.choose((50, 10), (6, 2))
    data, vocabulary, block_size, batch_size = _decoder_data(settings, settings.choose(1_400_000, 5_000))
    model = {"init_args": settings.choose({}, _TINY)}
    clock = fit(settings, "decoder_pretrain/gpt2_124m.yaml", steps, every, model=model, data=data)
    tokens, flops = block_size * batch_size, clock.module.flops_per_token
    ours = speed(clock.times, tokens, flops)
    yield Line("`llm-train fit`", ours)
    yield Line("its own log", logged(clock, tokens_per_second="tokens/s", mfu="MFU"))
    yield from _bare_loops(settings, clock, steps, every, tokens, ours, LARGE)
    free(clock)
    if settings.nanogpt:
        sizes = settings.choose({"n_layer": 12, "n_head": 12, "n_embd": 768}, _TINY)
        sizes |= {"block_size": block_size, "vocab_size": -(-vocabulary // 64) * 64, "bias": True, "dropout": 0.0}
        theirs = speed(nanogpt_loop(settings, sizes, batch_size, steps, every), tokens, flops)
        yield Line("nanoGPT", theirs | {"fit / this": ours["tokens/s"] / theirs["tokens/s"]})


def characters(settings: Settings) -> Iterator[Line]:
    """10.7 million weights on characters: the command with CUDA graphs, a bare loop, and nanoGPT."""
    steps, every = settings.choose((300, 50), (6, 2))
    text = workload.write_letters(Path("letters.txt").resolve(), settings.choose(1_100_000, 5_000))
    block_size, batch_size = settings.choose((256, 64), (32, 4))
    model = {"init_args": settings.choose({}, _TINY) | {"compile": "reduce-overhead"}}
    data = {"init_args": {"source": {"init_args": {"paths": str(text)}}}}
    data["init_args"] |= {"block_size": block_size, "batch_size": batch_size}
    clock = fit(settings, "decoder_pretrain/char_shakespeare.yaml", steps, every, model=model, data=data)
    tokens, flops = block_size * batch_size, clock.module.flops_per_token
    ours = speed(clock.times, tokens, flops)
    yield Line("`llm-train fit`, reduce-overhead", ours)
    yield from _bare_loops(settings, clock, steps, every, tokens, ours, SMALL)
    free(clock)
    if settings.nanogpt:
        sizes = settings.choose({"n_layer": 6, "n_head": 6, "n_embd": 384}, _TINY)
        sizes |= {"block_size": block_size, "vocab_size": 65, "bias": False, "dropout": 0.2}
        theirs = speed(nanogpt_loop(settings, sizes, batch_size, steps // 2, every // 2), tokens, flops)
        yield Line("nanoGPT", theirs | {"fit / this": ours["tokens/s"] / theirs["tokens/s"]})


def generation(settings: Settings) -> Iterator[Line]:
    """124M weights in bfloat16: our generation and that of Transformers, at batch 1 and 64, greedy."""
    from transformers import AutoModelForCausalLM

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
    model = {"init_args": sizes | {"compile": True}}
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
    steps, every = settings.choose((40, 10), (6, 2))
    data, _, block_size, batch_size = _decoder_data(settings, settings.choose(1_400_000, 5_000))
    speeds: dict[str, float] = {}
    for name, experiment in (("classic", "gpt2_124m.yaml"), ("modern", "speedrun_124m.yaml")):
        model = {"init_args": settings.choose({}, _TINY) | {"compile": True}}
        if name == "modern":
            model["init_args"] |= {"tied_embeddings": True}  # as in the classic decoder
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
    "e": Row("generation, 124M, bfloat16, greedy", generation),
    "f": Row("deterministic runs: equal weights", resuming),
    "g": Row("graphs of torch.compile", compilations),
    "h": Row("modern decoder against the classic, compiled, AdamW", modern),
}
