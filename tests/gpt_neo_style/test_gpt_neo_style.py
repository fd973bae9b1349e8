"""Fine-tuning to a book: reading books, held-out passages, what a run measures and leaves, resuming."""

import http.server
import itertools
import json
import re
import shutil
import signal
import threading
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import forks
import pytest
import torch
import torch.nn.functional as F
import yaml
from helpers import assert_same_weights, text, weights, with_settings
from hypothesis import given, settings
from hypothesis import strategies as st
from jsonargparse import ArgumentError, ArgumentParser
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from shared_runs import own_world, run_command
from tiny_bases import CONTEXT, save_gpt_neo

from datamodules.base import ExperimentDataModule
from datamodules.gpt_neo_style.books import cut_into_passages, read_book, without_licence
from datamodules.gpt_neo_style.data import GPTNeoStyleDataModule
from datamodules.sources import ListText
from datamodules.splits import side_of
from lightning_modules.decoder_pretrain.module import PretrainModule
from lightning_modules.finetuning.bases import load_pretrained
from lightning_modules.gpt_neo_style.module import GPTNeoStyleModule
from lightning_modules.gpt_neo_style.report import StyleReport, whole_lines
from lightning_modules.gpt_neo_style.style import common_shapes, layout_share
from lightning_modules.runtime.checkpoint_io import AtomicCheckpointIO
from lightning_modules.runtime.learning_curve import read_metric
from lightning_modules.runtime.samples import side_by_side

STEPS = 12  # of a run, with a validation every 6
TOPIC = "lightning_modules.gpt_neo_style."


def verse(n_lines: int, seed: int = 0) -> str:
    """A text with the layout of a play."""
    n_words = iter(text(6 * n_lines, seed).split())
    return "\n\n".join(f"MOTH.\n{' '.join(next(n_words) for _ in range(6)).capitalize()}." for _ in range(n_lines))


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder for the runs, with two books and a base."""
    folder = tmp_path_factory.mktemp("world")
    for name, seed in (("play", 0), ("other", 1)):
        (folder / f"{name}.txt").write_text(f"*** START OF THIS BOOK ***\n{verse(100, seed)}\n*** END OF THIS BOOK ***")
    save_gpt_neo(folder / "base")
    return folder


def config(world: Path, name: str, **settings: object) -> Path:
    """Write the YAML of a short run; settings replace parts of it by key path."""
    runtime = "lightning_modules.runtime."
    sampling = {"prompts": ["MOTH.\n", "The"], "samples_per_prompt": 2, "max_new_tokens": 16}
    content = {
        "seed_everything": 5,
        "model": {"class_path": f"{TOPIC}GPTNeoStyleModule", "init_args": {"base": str(world / "base")}},
        "data": {
            "class_path": "datamodules.gpt_neo_style.GPTNeoStyleDataModule",
            "init_args": {
                "books": str(world / "play.txt"),
                "other_books": [str(world / "other.txt")],
                "base_source": {"class_path": "datamodules.sources.ListText", "init_args": {"texts": [text(60, 7)]}},
                "block_size": 16,
                "batch_size": 8,
                "test_fraction": 0.1,
            },
        },
        "optimizer": {"class_path": "torch.optim.AdamW", "init_args": {"lr": 2e-2}},
        "trainer": {
            "accelerator": "cpu",
            "max_steps": STEPS,
            "val_check_interval": 6,
            "log_every_n_steps": 4,
            "callbacks+": [
                {"class_path": f"{runtime}before_training.LossBeforeTraining"},
                {"class_path": f"{TOPIC}StyleSamples", "init_args": sampling},
                {"class_path": f"{TOPIC}StyleReport"},
                {"class_path": f"{runtime}export.ExportModel"},
            ],
        },
    }
    file = world / f"{name}.yaml"
    file.write_text(yaml.safe_dump(with_settings(content, settings), sort_keys=False))
    return file


@pytest.fixture(scope="module")
def whole(world: Path) -> SimpleNamespace:
    """A run to the end: its folder, and what it printed."""
    with own_world(world):
        done = run_command("fit", "-c", config(world, "whole"))
    assert done.code == 0, done.err
    return SimpleNamespace(run=world / "runs/gpt_neo_style/whole", err=done.err)


@pytest.mark.slow
def test_the_memory_of_a_fine_tuning_is_estimated(world, llm_train):
    done = llm_train("estimate", "-c", config(world, "estimated"))
    assert done.code == 0, done.err
    n_weights = sum(weight.numel() for weight in load_pretrained(str(world / "base")).parameters())
    assert f"model   GPTNeoStyleModule: {n_weights:,} weights, of which {n_weights:,} are trained\n" in done.out
    assert "memory  of a step with 8 x 16 tokens, 32-true, not compiled, in GiB:" in done.out


def test_one_line_says_what_is_held_out(whole):
    lines = [line for line in whole.err.splitlines() if line.startswith(("data ", "prepared"))]
    assert re.fullmatch(r"data    tokens: book train [\d,]+, val [\d,]+, test [\d,]+(; other .*)?", lines[-1]), lines
    assert len(lines) <= 2  # and where the base's own text is


# --- books -----------------------------------------------------------------------------------------------------------

BODY = "CHAPTER I\n\nIt was a dark\nand stormy night."
OPEN, CLOSE = (f"*** {side} OF THE PROJECT GUTENBERG EBOOK EMMA ***" for side in ("START", "END"))


@pytest.mark.parametrize(
    "file",
    [
        f"header\n{OPEN}\n\n{BODY}\n\n{CLOSE}\nlicence",
        f"header\n{OPEN}\n{BODY}\n{CLOSE}\nlicence".replace("*** ", "***")
        .replace(" ***", "***")
        .replace("THE", "THIS"),
        f"{OPEN.replace('EMMA', 'EMMA, OR')[:-4]}\nTHE VICAR ***\nProduced by A. B. and\nC. D.\n\n{BODY}\n\n{CLOSE}",
        f"{OPEN}\n{BODY}\n\n\nEnd of the Project Gutenberg EBook of Emma, by X\n\n{CLOSE}",
        f"x\n*END*THE SMALL PRINT! FOR PUBLIC DOMAIN ETEXTS*Ver.04.29.93*END*\n\n{BODY}\nEnd of Project Gutenberg\n",
        f"*** START OF THIS BOOK: EMMA ***\n{BODY}\n*** END OF THIS BOOK: EMMA ***\n",
        f"{OPEN}\n{BODY}",  # torn off
    ],
    ids=["today", "this", "two_lines_and_credits", "last_line", "nineties", "shipped", "torn_off"],
)
def test_header_and_licence_are_removed_in_all_their_forms(file, capsys):
    assert without_licence(file) == BODY
    assert not capsys.readouterr().err


def test_byte_order_mark_and_carriage_returns_do_not_hide_the_markers(tmp_path, capsys):
    file = f"\ufeff{OPEN}\n{BODY}\n{CLOSE}\nlicence"
    (tmp_path / "emma.txt").write_bytes(file.replace("\n", "\r\n").encode())
    assert read_book(str(tmp_path / "emma.txt")) == BODY
    assert not capsys.readouterr().err


def test_a_book_without_markers_is_used_whole_with_a_warning(tmp_path, capsys):
    (tmp_path / "plain.txt").write_text(f"\n{BODY}\n*** a row of stars ***\n")
    assert read_book(str(tmp_path / "plain.txt")) == f"{BODY}\n*** a row of stars ***"
    assert re.search(r"plain.txt has no line .*START OF THE PROJECT.*used whole", capsys.readouterr().err)


def test_a_number_is_a_book_of_project_gutenberg(tmp_path, monkeypatch):
    asked = []
    (tmp_path / "pg11.txt").write_text(f"*** START OF THE PROJECT GUTENBERG EBOOK X ***\n{BODY}")
    monkeypatch.setattr("datamodules.sources.download", lambda url: asked.append(url) or tmp_path / "pg11.txt")
    assert read_book(11) == read_book("11") == BODY
    assert asked == ["https://www.gutenberg.org/cache/epub/11/pg11.txt"] * 2


def test_a_url_is_downloaded_and_an_error_advises_to_give_a_path(tmp_path):
    (tmp_path / "served.txt").write_text(f"*** START OF THE PROJECT GUTENBERG EBOOK X ***\n{BODY}")
    handler = partial(http.server.SimpleHTTPRequestHandler, directory=tmp_path)
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
        url = f"http://127.0.0.1:{server.server_port}/served.txt"
        assert read_book(url) == BODY
        server.shutdown()
    with pytest.raises(
        MisconfigurationException, match=r"could not be downloaded .*give the path of the file"
    ) as caught:
        read_book(url.replace("served", "another"))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (f"{OPEN}\n \n{CLOSE}", "book .* is empty"),
        ("", "is empty: give a file that holds text"),
        ("*** START OF THIS BOOK ***\none\ntwo", "is too short: its 2 lines .* cannot be cut into 20 passages"),
        ("*** START OF THIS BOOK ***\n" + "\n" * 30 + "a\n" * 12, "book .* is too short"),
        ("*** START OF THIS BOOK ***\n" + "a\n" * 21, "the training text has 3. tokens, fewer than a block"),
        (b"caf\xe9", "is not UTF-8: byte 3"),
    ],
)  # fmt: skip
def test_an_empty_or_tiny_book_is_refused_in_one_line(tmp_path, content, message):
    (tmp_path / "book.txt").write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(MisconfigurationException, match=message) as caught:
        datamodule(tmp_path, books=str(tmp_path / "book.txt"), block_size=32, val_fraction=0.5)
    assert "\n" not in str(caught.value)


def test_an_unknown_name_lists_the_books_that_are_shipped():
    with pytest.raises(MisconfigurationException, match=r"no book emma: .*one of bell_of_orrow, mislaid_wednesday"):
        read_book("emma")
    with pytest.raises(MisconfigurationException, match=r"emma\.txt not found"):
        read_book("books/emma.txt")


def test_the_shipped_books_are_long_enough_and_of_different_styles(capsys):
    play, tale = (read_book(name) for name in ("bell_of_orrow", "mislaid_wednesday"))
    assert not capsys.readouterr().err
    for book in (play, tale):
        assert len(book.encode()) >= 30 * 1024
        assert "START OF" not in book
        lines = [line for line in book.split("\n") if len(line) > 20]
        assert len(set(lines)) > 0.98 * len(lines)
    parts = {name: cut_into_passages(book, 20, 0.15, 0.0) for name, book in (("play", play), ("tale", tale))}
    train, val = (
        {name: [p.text for p in ps if p.side == side] for name, ps in parts.items()} for side in ("train", "val")
    )
    for name, other in (("play", "tale"), ("tale", "play")):
        layout = common_shapes("\n".join(train[name]))
        shares = {book: [layout_share(passage, layout) for passage in val[book]] for book in val}
        assert sum(shares[name]) / len(shares[name]) > 0.8
        assert sum(shares[other]) / len(shares[other]) < 0.4


# --- passages --------------------------------------------------------------------------------------------------------


@given(st.integers(2, 30), st.floats(0, 0.5), st.floats(0, 0.4), st.integers(0, 5))
@settings(deadline=None, max_examples=40)
def test_passages_are_the_book_cut_at_blank_lines_each_character_once(n, val_fraction, test_fraction, seed):
    book = verse(150, seed)
    passages = cut_into_passages(book, n, val_fraction, test_fraction)
    assert "".join(passage.text for passage in passages) == book
    assert all(passage.text.endswith("\n\n") for passage in passages[:-1])
    assert all(one.side != other.side for one, other in itertools.pairwise(passages))
    for side, fraction in (("val", val_fraction), ("test", test_fraction)):
        share = sum(len(p.text) for p in passages if p.side == side) / len(book)
        assert share == pytest.approx(max(round(n * fraction), bool(fraction)) / n, abs=0.03)


def test_held_out_passages_are_spread_over_the_book():
    sides = [passage.side for passage in cut_into_passages(verse(400), 20, 0.15, 0.1)]
    assert sides == ["train", "val", "test", "train", "val", "train", "test", "train", "val", "train"]


def test_more_held_out_passages_than_there_are_are_refused_in_one_line():
    message = r"^data.val_fraction 0.8 and data.test_fraction 0.1 hold out 3 of 2 passages; set data.passages"
    with pytest.raises(MisconfigurationException, match=message):
        cut_into_passages(verse(40), 2, 0.8, 0.1)


def datamodule(tmp_path: Path, **arguments: object) -> GPTNeoStyleDataModule:
    (tmp_path / "play.txt").write_text("*** START OF THIS BOOK ***\n" + verse(100))
    (tmp_path / "other.txt").write_text("*** START OF THIS BOOK ***\n" + verse(100, seed=3))
    arguments = {"books": str(tmp_path / "play.txt"), "block_size": 16, "batch_size": 4} | arguments
    made = GPTNeoStyleDataModule(**arguments)
    made.prepare_data()
    made.setup("fit")
    return made


@pytest.mark.parametrize("model_type", ["gpt2", "gpt_neo"])
def test_the_loss_of_a_run_on_a_gpu_is_that_of_a_run_on_a_cpu(tmp_path, model_type):
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "num_layers": 2, "num_heads": 2, "attention_types": [[["global", "local"], 1]]}
    sizes = sizes if model_type == "gpt_neo" else {"n_embd": 16, "n_layer": 2, "n_head": 2}
    architecture = {"model_type": model_type, "vocab_size": 257, "max_position_embeddings": 16} | sizes
    module = GPTNeoStyleModule("none", 257, 16, architecture | {"bos_token_id": None, "eos_token_id": None}).eval()
    batch = next(iter(datamodule(tmp_path).train_dataloader()))
    losses = []
    for device in ("cpu", "cuda"):  # the set-up for a GPU; the model stays on the CPU
        module.trainer = SimpleNamespace(strategy=SimpleNamespace(root_device=torch.device(device)))
        module.setup("fit")
        losses.append(module.loss(batch))
    assert module.within_records == (model_type == "gpt2")
    torch.testing.assert_close(losses[1], losses[0])


def read_back(batches: object) -> str:
    """The text whose tokens are the targets of a loader's batches: bytes, and 256 between passages."""
    targets = torch.cat([batch["targets"].flatten() for batch in batches])
    return bytes(0 if token == 256 else token for token in targets.tolist() if token != -100).decode()


def test_held_out_passages_are_evaluated_in_full_and_never_trained_on(tmp_path):
    data = datamodule(tmp_path, test_fraction=0.1, base_windows=2, other_books=[str(tmp_path / "other.txt")])
    parts = data.book_passages
    assert {side: len(texts) for side, texts in parts.items()} == {"train": 5, "val": 3, "test": 2}
    book, other = data.val_dataloader()
    assert read_back(book) == "\0".join(parts["val"])[1:]
    assert read_back(data.test_dataloader()[0]) == "\0".join(parts["test"])[1:]
    assert {batch["text"] for batch in other} == {"other"}
    for epoch in range(3):
        loader = data.train_dataloader()
        loader.sampler.set_epoch(epoch)
        blocks = [read_back([{"targets": row}]) for batch in loader for row in batch["targets"]]
        assert sum(map(len, blocks)) > 0.9 * sum(map(len, parts["train"]))
        assert all(block in "\0".join(parts["train"]) for block in blocks)


def test_several_books_are_trained_on_together(tmp_path):
    one = datamodule(tmp_path)
    both = datamodule(tmp_path, books=[str(tmp_path / "play.txt"), str(tmp_path / "other.txt")])
    assert len(both.book_passages["val"]) == 2 * len(one.book_passages["val"])
    assert both.book_passages["train"][: len(one.book_passages["train"])] == one.book_passages["train"]
    (tmp_path / "shelf").mkdir()
    for name in ("play.txt", "other.txt"):
        shutil.copy(tmp_path / name, tmp_path / "shelf")
    (tmp_path / "shelf/titles.csv").write_text("text\n" + verse(100))  # is no book
    shelf = datamodule(tmp_path, books=str(tmp_path / "shelf"))
    assert sorted(shelf.book_passages["train"]) == sorted(both.book_passages["train"])


def test_the_held_out_documents_of_the_base_text_are_evaluated_on(tmp_path):
    documents = [text(40, seed) for seed in range(60)]
    data = datamodule(tmp_path, base_source=ListText(documents), base_val_fraction=0.2, base_windows=5)

    held_out = [document for document in documents if side_of(document, 0.2, 0.0) == "val"]
    assert 0 < len(held_out) < 60
    (loader,) = data.val_dataloader()[1:]
    windows = torch.cat([batch["input_ids"] for batch in loader])
    assert len(windows) == 5
    joined = "\0".join(held_out)
    for window in windows.tolist():
        assert bytes(0 if token == 256 else token for token in window).decode().rstrip("\0") in joined


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"val_fraction": 0.6, "test_fraction": 0.4}, "leave something to train on"),
        ({"books": []}, "data.books is empty"),
    ],
)
def test_impossible_arguments_are_refused(arguments, message):
    with pytest.raises(MisconfigurationException, match=message):
        GPTNeoStyleDataModule(**{"books": 11, "block_size": 8, "batch_size": 1} | arguments)


def test_a_test_without_test_passages_is_refused(tmp_path):
    with pytest.raises(MisconfigurationException, match=r"no test text: set data\.test_fraction above 0"):
        datamodule(tmp_path).setup("test")


@pytest.mark.parametrize(
    ("argument", "value", "restriction"),
    [
        ("passages", 1, "v>=2"),
        ("block_size", 0, "v>0"),
        ("base_windows", 0, "v>0"),
        ("base_val_fraction", 0.0, "v>0 and v<=1"),
    ],
)
def test_the_parser_refuses_numbers_out_of_range(argument, value, restriction):
    parser = ArgumentParser(exit_on_error=False)
    parser.add_subclass_arguments(ExperimentDataModule, "data")
    arguments = {"books": 11, "block_size": 8, "batch_size": 1} | {argument: value}
    data = {"class_path": "datamodules.gpt_neo_style.GPTNeoStyleDataModule", "init_args": arguments}
    with pytest.raises(ArgumentError, match=f"(?s){argument}.*{value} does not conform to restriction {restriction}"):
        parser.parse_object({"data": data})


# --- runs ------------------------------------------------------------------------------------------------------------


def test_a_run_evaluates_before_and_after_training(world, whole):
    with own_world(world):
        data = GPTNeoStyleDataModule(
            **yaml.safe_load((whole.run / "config.yaml").read_text())["data"]["init_args"] | {"base_source": None}
        )
        data.prepare_data()
        data.setup("fit")

    def perplexity(folder: Path) -> float:
        model, nats, tokens = load_pretrained(str(folder)).eval(), 0.0, 0
        for batch in data.val_dataloader()[0]:
            with torch.no_grad():
                logits = model(batch["input_ids"]).logits
            nats += F.cross_entropy(logits.flatten(0, 1), batch["targets"].flatten(), reduction="sum").item()
            tokens += int((batch["targets"] >= 0).sum())
        return torch.tensor(nats / tokens).exp().item()

    steps, values = read_metric(whole.run / "metrics.csv", "val/perplexity")
    assert steps == [0, 6, STEPS]
    assert values[0] == pytest.approx(perplexity(world / "base"), rel=1e-4)
    assert min(values) == pytest.approx(perplexity(whole.run / "model"), rel=1e-4)
    assert min(values) < 0.6 * values[0]
    for name in ("val/other/perplexity", "val/base/perplexity", "val/base/bits_per_byte"):
        assert read_metric(whole.run / "metrics.csv", name)[0] == steps

    samples = (whole.run / "samples.md").read_text()
    assert samples.startswith(f"## 'MOTH.\\n'\n\n```text\nstep 0, val/loss {torch.tensor(values[0]).log():.3f}")
    assert f"step {STEPS}" in samples
    assert samples.count("MOTH.") >= 3 + 1  # each column begins with the prompt
    assert "stands in the training text: " in samples
    table = (whole.run / "style.md").read_text()
    assert f"| perplexity, held-out passages of the book | {values[0]:.1f} | {min(values):.1f} |" in table
    assert (whole.run / "style.csv").read_text().count("\n") == 1 + 3 + 6
    assert (whole.run / "figures/style.png").is_file()
    assert "llm-train generate --run runs/gpt_neo_style/whole" in whole.err


def test_a_run_leaves_a_model_that_others_load(world, whole):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    exported = AutoModelForCausalLM.from_pretrained(whole.run / "model")
    best = AtomicCheckpointIO().load_checkpoint(whole.run / "checkpoints/best.ckpt")
    module = GPTNeoStyleModule(str(world / "base"), 257, 16).eval()
    module.load_state_dict(best["state_dict"])
    ids = torch.randint(0, 257, (2, CONTEXT), generator=torch.Generator().manual_seed(1))
    assert exported.config.attention_layers == ["global", "local"]
    with torch.no_grad():
        assert torch.equal(exported.eval()(ids).logits, module(ids))
    assert AutoTokenizer.from_pretrained(whole.run / "model").encode("ab") == [97, 98]


def test_the_test_passages_are_evaluated_too(world, whole):
    with own_world(world):
        tested = run_command("test", "-c", whole.run / "config.yaml", "--ckpt_path", "best")
    assert tested.code == 0, tested.err
    results = json.loads((whole.run / "summary_test.json").read_text())["metrics"]
    assert {"test/loss", "test/other/loss", "test/base/loss"} <= set(results)


def test_generation_from_a_run_needs_no_base(llm_train, world, whole):
    (world / "base").rename(world / "elsewhere")
    try:
        written = llm_train("generate", "--run", whole.run, "--prompt", "MOTH.\n", "--max_new_tokens", "40")
    finally:
        (world / "elsewhere").rename(world / "base")
    assert written.code == 0, written.err
    assert written.out.startswith("MOTH.\n")
    assert len(written.out) > 20


@pytest.mark.slow
def test_a_killed_run_resumes_to_the_same_weights_metrics_and_samples(world, whole):
    command = ("fit", "-c", config(world, "killed"))
    run = whole.run.with_name("killed")
    with own_world(world):
        process = forks.start(*command, prepare=lambda: forks.die_after_step(6))
        process.join()
        assert process.exitcode == -signal.SIGKILL
        assert read_metric(run / "metrics.csv", "val/perplexity")[0][-1] < STEPS
        resumed = run_command(*command, "--ckpt_path", "last")
    assert resumed.code == 0, resumed.err
    assert_same_weights(whole.run / "checkpoints/last.ckpt", run / "checkpoints/last.ckpt")
    for name in ("val/perplexity", "samples/layout", "book/layout", "train/grad_norm"):
        assert read_metric(whole.run / "metrics.csv", name) == read_metric(run / "metrics.csv", name)
    assert (whole.run / "samples.md").read_text() == (run / "samples.md").read_text()


@pytest.mark.slow
def test_a_killed_run_with_stages_adapters_and_accumulation_resumes_to_the_same_weights(world):
    """It is killed in an epoch in which the blocks, and so their dropout, are frozen."""
    freezing = "lightning_modules.finetuning."
    stage = {"all_but_head": True, "epoch": 2, "rate": 0.5}
    adapters = {"rank": 2, "dropout": 0.1, "also_trained": ["*ln_f*"]}
    settings = {
        "data__init_args__batch_size": 40,  # 4 batches, 2 steps an epoch
        "trainer__max_steps": 6,
        "trainer__val_check_interval": 2,
        "trainer__accumulate_grad_batches": 2,
        "trainer__callbacks+": [
            {"class_path": f"{freezing}freeze.GradualUnfreezing", "init_args": {"stages": [stage]}},
            {"class_path": f"{freezing}lora.LoRA", "init_args": adapters},
        ],
    }
    command = ("fit", "-c", config(world, "staged", **settings), "--run.name")
    with own_world(world):
        whole = run_command(*command, "staged")
        assert whole.code == 0, whole.err
        process = forks.start(*command, "staged_killed", prepare=lambda: forks.die_after_step(3))
        process.join()
        assert process.exitcode == -signal.SIGKILL
        resumed = run_command(*command, "staged_killed", "--ckpt_path", "last")
        assert resumed.code == 0, resumed.err
    runs = world / "runs/gpt_neo_style"
    assert_same_weights(*(runs / name / "checkpoints/last.ckpt" for name in ("staged", "staged_killed")))


@pytest.mark.slow
def test_the_gradient_norm_is_that_of_the_mean_over_accumulation_and_processes_before_clipping(
    llm_train, world, tmp_path
):
    """And gradual unfreezing on two processes trains what it trains on one."""
    calm = shutil.copytree(world / "base", tmp_path / "calm")
    architecture = json.loads((calm / "config.json").read_text())
    (calm / "config.json").write_text(json.dumps(architecture | {"resid_dropout": 0.0}))
    stages = [{"epoch": 1, "layers": ":"}]
    file = config(
        world,
        "calm",
        model__init_args__base=str(calm),
        data__init_args={"books": str(world / "play.txt"), "block_size": 16, "batch_size": 40},
        trainer={  # 4 batches, 2 steps an epoch
            "accelerator": "cpu",
            "max_steps": 4,
            "limit_val_batches": 0,
            "accumulate_grad_batches": 2,
            "gradient_clip_val": 0.05,
            "log_every_n_steps": 1,
            "callbacks": [
                {"class_path": "lightning_modules.runtime.reproducible.ReproducibleSteps"},
                {"class_path": "lightning_modules.runtime.checkpoint.RunCheckpoint"},
                {
                    "class_path": "lightning_modules.finetuning.freeze.GradualUnfreezing",
                    "init_args": {"stages": stages},
                },
            ],
        },
    )
    find_unused = "--trainer.strategy=ddp_find_unused_parameters_true"
    two = forks.start_ranks(2, "fit", "-c", file, *forks.TWO_PROCESSES, find_unused, "--run.name", "two")
    assert forks.wait(two) == [0, 0]
    assert llm_train("fit", "-c", file, "--run.name", "one").code == 0

    data = GPTNeoStyleDataModule(str(world / "play.txt"), block_size=16, batch_size=40, seed=5)
    data.prepare_data()
    data.setup("fit")
    model = load_pretrained(str(calm)).eval()
    batches = iter(data.train_dataloader())
    losses = [
        F.cross_entropy(model(batch["input_ids"]).logits.flatten(0, 1), batch["targets"].flatten())
        for batch in (next(batches), next(batches))
    ]
    (sum(losses) / 2).backward()
    # In the first epoch the layers are frozen.
    squares = [p.grad.double().square().sum() for name, p in model.named_parameters() if ".h." not in name]
    by_hand = torch.stack(squares).sum().sqrt().item()

    runs = Path("runs/gpt_neo_style")
    for run in ("one", "two"):
        norms = read_metric(runs / run / "metrics.csv", "train/grad_norm")[1]
        assert norms[0] == pytest.approx(by_hand, rel=1e-5)
        assert norms[0] > 0.05
        clipped = read_metric(runs / run / "metrics.csv", "train/grad_norm_clipped")[1]
        assert clipped == pytest.approx([0.05] * 4, rel=1e-3)
    one, two = (weights(runs / run / "checkpoints/last.ckpt") for run in ("one", "two"))
    start = load_pretrained(str(calm)).state_dict()
    assert any(not torch.equal(one[f"model.{name}"], weight) for name, weight in start.items() if ".h." in name)
    for name, weight in one.items():
        torch.testing.assert_close(two[name], weight, rtol=1e-3, atol=1e-4)


def test_a_run_of_decoder_pretrain_is_a_base():
    decoder = PretrainModule(vocab_size=257, block_size=16, n_layer=2, n_head=2, n_embd=16).eval()
    decoder.save_pretrained(Path("runs/decoder_pretrain/tiny/model"))
    module = GPTNeoStyleModule("runs/decoder_pretrain/tiny", vocab_size=257, block_size=16).eval()
    ids = torch.arange(16)[None]
    torch.testing.assert_close(module(ids), decoder(ids), rtol=1e-4, atol=1e-5)
    with pytest.raises(MisconfigurationException, match="17 is longer than the context of runs/decoder_pretrain/tiny"):
        GPTNeoStyleModule("runs/decoder_pretrain/tiny", vocab_size=257, block_size=17)


# --- the report ------------------------------------------------------------------------------------------------------


def test_the_report_compares_step_0_with_the_best_validation():
    Path("metrics.csv").write_text(
        "step,val/loss,val/perplexity,samples/layout,book/layout\n"
        "0,6.0,1400.0,0.1,0.9\n4,3.0,20.5,0.5,\n8,4.0,55.0,0.6,\n"
    )
    assert StyleReport().draw(Path()) == [Path("figures/style.png")]
    assert Path("figures/style.png").is_file()
    assert Path("style.csv").read_text() == (
        "measure,before,after,the book\n"
        '"perplexity, held-out passages of the book",1400.0,20.5,\n'
        "lines in the book's layout,0.1,0.5,0.9\n"
    )
    assert Path("style.md").read_text() == (
        "| measure | before | after | the book |\n|---|---|---|---|\n"
        "| perplexity, held-out passages of the book | 1,400.0 | 20.5 |  |\n"
        "| lines in the book's layout | 0.100 | 0.500 | 0.900 |\n"
    )


def test_a_run_without_a_validation_after_training_has_no_report():
    Path("metrics.csv").write_text("step,val/loss\n0,6.0\n")
    StyleReport().on_train_end(SimpleNamespace(default_root_dir=".", loggers=[]), None)
    assert not [path for path in Path().iterdir() if path.name != "metrics.csv"]


# --- samples ---------------------------------------------------------------------------------------------------------


def test_samples_stand_side_by_side():
    page = side_by_side("A\n", [("step 0", "b\n\n" + "word " * 12), ("step 9", "```")])
    lines = page.split("\n")
    assert lines[0] == "## 'A\\n'"
    assert lines[2] == lines[-2].replace("````````", "````````text") == "````````text"  # a fence longer than any inside
    assert lines[3].split(" | ") == ["step 0".ljust(44), "step 9"]
    assert lines[5].split(" | ") == ["A".ljust(44), "A"]
    assert lines[6].split(" | ") == ["b".ljust(44), "```"]
    assert lines[8] == "word " * 8 + "word |"
    assert lines[9] == "    word word word" + " " * 27 + "|"


def test_lines_that_the_model_did_not_write_whole_are_left_out():
    assert whole_lines("rest of it\nA whole line.\nand one that", "The") == "A whole line."
    assert whole_lines("A first line.\nA whole line.\nand one that", "MOTH.\n") == "A first line.\nA whole line."
    assert whole_lines("a single line", "The") == "a single line"
