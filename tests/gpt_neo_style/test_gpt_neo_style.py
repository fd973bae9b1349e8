"""Fine-tuning to a book: where books come from, what is held out, what is measured, and any base there is."""

import http.server
import itertools
import json
import re
import shutil
import signal
import threading
from functools import partial
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
import yaml
from helpers import assert_same_weights, kill_when, text, weights, with_settings
from hypothesis import given, settings
from hypothesis import strategies as st
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch import nn

from datamodules.gpt_neo_style.books import cut_into_passages, read_book, without_licence
from datamodules.gpt_neo_style.data import GPTNeoStyleDataModule
from datamodules.sources import ListText
from lightning_modules.decoder_pretrain.module import PretrainModule
from lightning_modules.finetuning.bases import load_pretrained
from lightning_modules.finetuning.causal_lm import CachedHubModel
from lightning_modules.gpt_neo_style.module import GPTNeoStyleModule
from lightning_modules.gpt_neo_style.report import whole_lines
from lightning_modules.gpt_neo_style.style import BookStyle
from lightning_modules.models.generation import generate
from lightning_modules.runtime.checkpoint_io import AtomicCheckpointIO
from lightning_modules.runtime.learning_curve import read_metric
from lightning_modules.runtime.samples import side_by_side

RUN = Path("runs/gpt_neo_style/tiny")
CONTEXT = 32


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A GPT-Neo whose second layer sees four tokens back."""
    from transformers import GPTNeoConfig, GPTNeoForCausalLM

    torch.manual_seed(2)
    config = GPTNeoConfig(
        vocab_size=257,
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
    folder = tmp_path_factory.mktemp("base")
    GPTNeoForCausalLM(config).save_pretrained(folder)
    return folder


def verse(n_lines: int, seed: int = 0) -> str:
    """A play, as far as one can see."""
    n_words = iter(text(6 * n_lines, seed).split())
    return "\n\n".join(f"MOTH.\n{' '.join(next(n_words) for _ in range(6)).capitalize()}." for _ in range(n_lines))


@pytest.fixture
def style(tmp_path: Path, base: Path):
    """Writes the YAML of a run that takes a second: 24 steps, a validation every 8; settings go over it by key path."""
    for name, seed in (("play", 0), ("other", 1)):
        (tmp_path / f"{name}.txt").write_text(
            f"*** START OF THIS BOOK ***\n{verse(100, seed)}\n*** END OF THIS BOOK ***"
        )

    def write(name: str = "tiny", **settings: object) -> Path:
        callbacks = "lightning_modules.runtime."
        config = {
            "seed_everything": 5,
            "model": {
                "class_path": "lightning_modules.gpt_neo_style.GPTNeoStyleModule",
                "init_args": {"base": str(base)},
            },
            "data": {
                "class_path": "datamodules.gpt_neo_style.GPTNeoStyleDataModule",
                "init_args": {
                    "books": str(tmp_path / "play.txt"),
                    "other_books": [str(tmp_path / "other.txt")],
                    "base_source": {
                        "class_path": "datamodules.sources.ListText",
                        "init_args": {"texts": [text(60, 7)]},
                    },
                    "block_size": 16,
                    "batch_size": 4,
                },
            },
            "optimizer": {"class_path": "torch.optim.AdamW", "init_args": {"lr": 1e-2}},
            "trainer": {
                "accelerator": "cpu",
                "max_steps": 24,
                "max_epochs": -1,
                "val_check_interval": 8,
                "check_val_every_n_epoch": None,
                "log_every_n_steps": 4,
                "callbacks+": [
                    {"class_path": f"{callbacks}before_training.LossBeforeTraining"},
                    {
                        "class_path": f"{callbacks}style_report.StyleSamples",
                        "init_args": {"prompts": ["MOTH.\n", "The"], "samples_per_prompt": 2, "max_new_tokens": 24},
                    },
                    {"class_path": f"{callbacks}style_report.StyleReport"},
                    {"class_path": f"{callbacks}export.ExportModel"},
                ],
            },
        }
        file = tmp_path / f"{name}.yaml"
        file.write_text(yaml.safe_dump(with_settings(config, settings), sort_keys=False))
        return file

    return write


# --- books -----------------------------------------------------------------------------------------------------------

BODY = "CHAPTER I\n\nIt was a dark\nand stormy night."


OPEN, CLOSE = (f"*** {side} OF THE PROJECT GUTENBERG EBOOK EMMA ***" for side in ("START", "END"))


@pytest.mark.parametrize(
    "whole",
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
def test_header_and_licence_are_removed_whatever_their_form(whole, recwarn):
    assert without_licence(whole) == BODY
    assert not recwarn


def test_byte_order_mark_and_carriage_returns_do_not_hide_the_markers(tmp_path, recwarn):
    whole = f"\ufeff{OPEN}\n{BODY}\n{CLOSE}\nlicence"
    (tmp_path / "emma.txt").write_bytes(whole.replace("\n", "\r\n").encode())
    assert read_book(str(tmp_path / "emma.txt")) == BODY
    assert not recwarn


def test_a_book_without_markers_is_used_whole_with_a_warning(tmp_path):
    (tmp_path / "plain.txt").write_text(f"\n{BODY}\n*** a row of stars ***\n")
    with pytest.warns(UserWarning, match=r"plain.txt has no line .*START OF THE PROJECT.*used whole"):
        assert read_book(str(tmp_path / "plain.txt")) == f"{BODY}\n*** a row of stars ***"


def test_a_number_is_a_book_of_project_gutenberg(tmp_path, monkeypatch):
    asked = []
    (tmp_path / "pg11.txt").write_text(f"*** START OF THE PROJECT GUTENBERG EBOOK X ***\n{BODY}")
    monkeypatch.setattr("datamodules.sources.download", lambda url: asked.append(url) or tmp_path / "pg11.txt")
    assert read_book(11) == read_book("11") == BODY
    assert asked == ["https://www.gutenberg.org/cache/epub/11/pg11.txt"] * 2


def test_a_url_is_downloaded_and_one_that_cannot_be_reached_says_how_to_give_a_path(tmp_path, recwarn):
    (tmp_path / "served.txt").write_text(f"*** START OF THE PROJECT GUTENBERG EBOOK X ***\n{BODY}")
    handler = partial(http.server.SimpleHTTPRequestHandler, directory=tmp_path)
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
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
        ("*** START OF THIS BOOK ***\n" + "a\n" * 21, "there are 3. tokens to train on, fewer than a block"),
        (b"caf\xe9", "is not UTF-8: byte 3"),
    ],
)  # fmt: skip
def test_an_empty_or_tiny_book_is_one_line(tmp_path, content, message):
    (tmp_path / "book.txt").write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(MisconfigurationException, match=message) as caught:
        datamodule(tmp_path, books=str(tmp_path / "book.txt"), block_size=32, val_fraction=0.5)
    assert "\n" not in str(caught.value)


def test_a_name_that_is_no_book_lists_those_that_are_shipped():
    with pytest.raises(MisconfigurationException, match=r"no book emma: .*one of bell_of_orrow, mislaid_wednesday"):
        read_book("emma")
    with pytest.raises(MisconfigurationException, match=r"emma\.txt not found"):
        read_book("books/emma.txt")


def test_the_shipped_books_are_long_enough_and_of_different_styles(recwarn):
    play, tale = (read_book(name) for name in ("bell_of_orrow", "mislaid_wednesday"))
    assert not recwarn
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
        yardstick = BookStyle.of("\n".join(train[name]))
        assert yardstick.measure(val[name])["layout"] > 0.8
        assert yardstick.measure(val[other])["layout"] < 0.4


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


def datamodule(tmp_path: Path, **arguments: object) -> GPTNeoStyleDataModule:
    (tmp_path / "play.txt").write_text("*** START OF THIS BOOK ***\n" + verse(100))
    (tmp_path / "other.txt").write_text("*** START OF THIS BOOK ***\n" + verse(100, seed=3))
    arguments = {"books": str(tmp_path / "play.txt"), "block_size": 16, "batch_size": 4} | arguments
    made = GPTNeoStyleDataModule(**arguments)
    made.prepare_data()
    made.setup("fit")
    return made


def read_back(batches: object) -> str:
    """The text of which a loader's batches are the next tokens: bytes, and 256 between passages."""
    targets = torch.cat([batch["targets"].flatten() for batch in batches])
    return bytes(0 if token == 256 else token for token in targets.tolist() if token != -100).decode()


def test_what_is_held_out_is_measured_whole_and_never_trained_on(tmp_path):
    data = datamodule(tmp_path, test_fraction=0.1, other_books=[str(tmp_path / "other.txt")])
    parts = data.book_passages
    assert {side: len(texts) for side, texts in parts.items()} == {"train": 5, "val": 3, "test": 2}
    book, other = data.val_dataloader()
    assert read_back(book) == "\0".join(parts["val"])[1:]
    assert read_back(data.test_dataloader()[0]) == "\0".join(parts["test"])[1:]
    assert {batch["text"] for batch in other} == {"other"}
    held_out = {
        line for side in ("val", "test") for text in parts[side] for line in text.split("\n") if line != "MOTH."
    }
    for epoch in range(3):
        loader = data.train_dataloader()
        loader.sampler.set_epoch(epoch)
        seen = read_back(loader)
        assert len(seen) > 0.9 * sum(map(len, parts["train"]))
        assert not [line for line in held_out if len(line) > 12 and line in seen]


def test_several_books_are_trained_on_together(tmp_path):
    one = datamodule(tmp_path)
    both = datamodule(tmp_path, books=[str(tmp_path / "play.txt"), str(tmp_path / "other.txt")])
    assert len(both.book_passages["val"]) == 2 * len(one.book_passages["val"])
    assert both.book_passages["train"][: len(one.book_passages["train"])] == one.book_passages["train"]


def test_of_the_base_text_what_it_was_not_trained_on_is_measured(tmp_path):
    documents = [text(40, seed) for seed in range(60)]
    data = datamodule(tmp_path, base_source=ListText(documents), base_val_fraction=0.2, base_windows=5)
    from datamodules.splits import side_of

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
        ({"passages": 1}, "data.passages is 1: it must be at least 2"),
        ({"block_size": 0}, "data.block_size is 0"),
        ({"val_fraction": 0.6, "test_fraction": 0.4}, "leave something to train on"),
        ({"base_val_fraction": 0.0}, r"data.base_val_fraction is 0.0: it must be in \(0, 1\]"),
        ({"books": []}, "data.books is empty"),
    ],
)
def test_impossible_arguments_are_one_line(arguments, message):
    with pytest.raises(MisconfigurationException, match=message):
        GPTNeoStyleDataModule(**{"books": 11, "block_size": 8, "batch_size": 1} | arguments)


# --- bases -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("runs/decoder_pretrain/offline", "does not exist: .*`llm-train fit -c experiments/decoder_pretrain/offline"),
        (".", "holds no config.json, nor a model/ that does"),
        ("nobody/nothing", "nobody/nothing, which is no local folder, from the Hugging"),
        ("broken", "model.base: AutoModelForCausalLM could not load broken"),
    ],
)
def test_a_base_that_cannot_be_loaded_is_one_line(name, message):
    Path("broken").mkdir()
    Path("broken/config.json").write_text('{"model_type": "gpt_neon"}')
    with pytest.raises(MisconfigurationException, match=message) as caught:
        GPTNeoStyleModule(name, vocab_size=257, block_size=8)
    assert "\n" not in str(caught.value)


def test_a_base_whose_context_is_shorter_than_the_block_is_refused(llm_train, style):
    done = llm_train("fit", "-c", style(data__init_args__block_size=33))
    assert done.code == 1
    assert re.search("data.block_size: 33 is longer than the context of .*, 32 tokens", done.err.splitlines()[-1])
    assert not RUN.exists()


def test_a_tokenizer_that_the_base_does_not_know_is_refused(base):
    with pytest.raises(MisconfigurationException, match="it has 300 tokens, more than the 257"):
        GPTNeoStyleModule(str(base), vocab_size=300, block_size=8)


def test_a_run_of_decoder_pretrain_is_a_base():
    decoder = PretrainModule(vocab_size=257, block_size=16, n_layer=2, n_head=2, n_embd=16).eval()
    decoder.save_pretrained(Path("runs/decoder_pretrain/tiny/model"))
    module = GPTNeoStyleModule("runs/decoder_pretrain/tiny", vocab_size=257, block_size=16).eval()
    ids = torch.arange(16)[None]
    torch.testing.assert_close(module(ids), decoder(ids), rtol=1e-4, atol=1e-5)
    with pytest.raises(MisconfigurationException, match="17 is longer than the context of runs/decoder_pretrain/tiny"):
        GPTNeoStyleModule("runs/decoder_pretrain/tiny", vocab_size=257, block_size=17)


def test_any_model_is_in_training_mode_when_it_is_loaded(base):
    module = GPTNeoStyleModule(str(base), 257, 8)
    assert all(part.training for part in module.modules())  # Transformers gives it in evaluation mode


def test_cached_generation_says_what_uncached_would_also_past_the_context(base):
    model = load_pretrained(str(base)).eval()
    for seed, (name, parameter) in enumerate(model.named_parameters()):  # where a token stands decides what follows
        std = 2.0 if "wpe" in name else 0.4
        nn.init.normal_(parameter, std=std, generator=torch.Generator().manual_seed(seed))
    read = ids = torch.tensor([[3, 1, 4, 1, 5], [9, 2, 6, 5, 3]])
    found = torch.stack(list(generate(CachedHubModel(model), ids, 60, temperature=0)), dim=1)
    expected = []
    with torch.no_grad():
        for _ in range(60):
            if read.size(1) > CONTEXT:  # the cache is full: the last half of the context is read anew
                read = read[:, -CONTEXT // 2 :]
            expected.append(model(read, use_cache=False).logits[:, -1].argmax(-1))
            read = torch.cat([read, expected[-1][:, None]], dim=1)
    assert found.tolist() == torch.stack(expected, dim=1).tolist()
    assert len(set(found[0].tolist())) > 5


# --- runs ------------------------------------------------------------------------------------------------------------


def test_a_run_measures_before_and_after_and_leaves_a_model_that_others_load(llm_train, style, base):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    done = llm_train("fit", "-c", style())
    assert done.code == 0, done.err
    data = GPTNeoStyleDataModule(
        **yaml.safe_load((RUN / "config.yaml").read_text())["data"]["init_args"] | {"base_source": None}
    )
    data.prepare_data()
    data.setup("fit")

    def perplexity(model: nn.Module) -> float:
        nats, tokens = 0.0, 0
        for batch in data.val_dataloader()[0]:
            with torch.no_grad():
                logits = model.eval()(batch["input_ids"]).logits
            nats += F.cross_entropy(logits.flatten(0, 1), batch["targets"].flatten(), reduction="sum").item()
            tokens += int((batch["targets"] >= 0).sum())
        return torch.tensor(nats / tokens).exp().item()

    steps, values = read_metric(RUN / "metrics.csv", "val/perplexity")
    exported = AutoModelForCausalLM.from_pretrained(RUN / "model")
    assert steps == [0, 8, 16, 24]
    assert values[0] == pytest.approx(perplexity(AutoModelForCausalLM.from_pretrained(base)), rel=1e-4)
    assert min(values) == pytest.approx(perplexity(exported), rel=1e-4)
    assert min(values) < 0.6 * values[0]
    for name in ("val/other/perplexity", "val/base/perplexity", "val/base/bits_per_byte"):
        assert read_metric(RUN / "metrics.csv", name)[0] == steps

    best = AtomicCheckpointIO().load_checkpoint(RUN / "checkpoints/best.ckpt")
    module = GPTNeoStyleModule(str(base), 257, 16).eval()
    module.load_state_dict(best["state_dict"])
    ids = torch.randint(0, 257, (2, CONTEXT), generator=torch.Generator().manual_seed(1))
    assert exported.config.attention_layers == ["global", "local"]
    with torch.no_grad():
        assert torch.equal(exported.eval()(ids).logits, module(ids))
    assert AutoTokenizer.from_pretrained(RUN / "model").encode("ab") == [97, 98]

    samples = (RUN / "samples.md").read_text()
    assert samples.startswith(f"## 'MOTH.\\n'\n\n```text\nstep 0, val/loss {torch.tensor(values[0]).log():.3f}")
    assert "step 24" in samples
    assert samples.count("MOTH.") >= 4 + 1  # what it continues stands in each column
    assert "stands in the training text: " in samples
    report = (RUN / "style.md").read_text()
    assert f"| perplexity, held-out passages of the book | {values[0]:.1f} | {min(values):.1f} |" in report
    assert (RUN / "style.csv").read_text().count("\n") == 1 + 3 + 6
    assert (RUN / "figures/style.png").is_file()
    assert f"llm-train generate --run {RUN}" in done.err


def test_the_test_passages_are_measured_too_and_generate_needs_no_base(llm_train, style, base, tmp_path):
    moved = shutil.copytree(base, tmp_path / "moved")
    config = style(model__init_args__base=str(moved), data__init_args__test_fraction=0.1)
    llm_train("fit", "-c", config, "--trainer.max_steps", "8")
    tested = llm_train("test", "-c", RUN / "config.yaml", "--ckpt_path", "best")
    assert tested.code == 0, tested.err
    measured = json.loads((RUN / "summary_test.json").read_text())["metrics"]
    assert {"test/loss", "test/other/loss", "test/base/loss"} <= set(measured)

    shutil.rmtree(moved)
    written = llm_train("generate", "--run", RUN, "--prompt", "MOTH.\n", "--max_new_tokens", "40")
    assert written.code == 0, written.err
    assert written.out.startswith("MOTH.\n")
    assert len(written.out) > 20


def test_a_killed_run_resumes_to_the_same_weights_metrics_and_samples(llm_train, forked, style):
    config = style()
    runs = RUN.parent
    llm_train("fit", "-c", config, "--run.name", "whole")
    metrics = runs / "killed/metrics.csv"
    status = forked(
        "fit", "-c", config, "--run.name", "killed",
        meanwhile=kill_when(lambda: metrics.is_file() and len(metrics.read_text().splitlines()) > 4),
    )  # fmt: skip
    assert status == -signal.SIGKILL
    resumed = llm_train("fit", "-c", config, "--run.name", "killed", "--ckpt_path", "last")
    assert resumed.code == 0, resumed.err
    assert_same_weights(runs / "whole/checkpoints/last.ckpt", runs / "killed/checkpoints/last.ckpt")
    for name in ("val/perplexity", "samples/layout", "book/layout", "train/grad_norm"):
        assert read_metric(runs / "whole/metrics.csv", name) == read_metric(metrics, name)
    assert (runs / "whole/samples.md").read_text() == (runs / "killed/samples.md").read_text()


def test_the_gradient_norm_is_that_of_the_mean_over_accumulation_and_processes_before_clipping(
    llm_train, forked, style, base, tmp_path
):
    """Beside it, gradual unfreezing with two processes trains what it does with one."""
    shutil.copytree(base, tmp_path / "calm")
    config = json.loads((base / "config.json").read_text())
    (tmp_path / "calm/config.json").write_text(json.dumps(config | {"resid_dropout": 0.0}))
    stages = [{"epoch": 1, "layers": ":"}]
    config = style(
        model__init_args__base=str(tmp_path / "calm"),
        data__init_args__batch_size=40,  # 4 batches, 2 steps an epoch
        trainer={
            "accelerator": "cpu",
            "max_steps": 6,
            "max_epochs": -1,
            "limit_val_batches": 0,
            "accumulate_grad_batches": 2,
            "gradient_clip_val": 0.05,
            "log_every_n_steps": 1,
            "plugins": [],  # ddp_fork hands the weights back in a file without a checksum
            "callbacks+": [
                {"class_path": "lightning_modules.finetuning.freeze.GradualUnfreezing", "init_args": {"stages": stages}}
            ],
        },
    )
    two_processes = ("--trainer.devices=2", "--trainer.strategy=ddp_fork_find_unused_parameters_true")
    assert forked("fit", "-c", config, *two_processes, "--run.name", "two") == 0
    assert llm_train("fit", "-c", config, "--run.name", "one").code == 0

    data = GPTNeoStyleDataModule(str(tmp_path / "play.txt"), block_size=16, batch_size=40, seed=5)
    data.prepare_data()
    data.setup("fit")
    model = load_pretrained(str(tmp_path / "calm")).eval()
    batches = iter(data.train_dataloader())
    losses = [
        F.cross_entropy(model(batch["input_ids"]).logits.flatten(0, 1), batch["targets"].flatten())
        for batch in (next(batches), next(batches))
    ]
    (sum(losses) / 2).backward()
    # In the first epoch the layers are frozen.
    squares = [p.grad.double().square().sum() for name, p in model.named_parameters() if ".h." not in name]
    by_hand = torch.stack(squares).sum().sqrt().item()

    runs = RUN.parent
    for run in ("one", "two"):
        norms = read_metric(runs / run / "metrics.csv", "train/grad_norm")[1]
        assert norms[0] == pytest.approx(by_hand, rel=1e-5)
        assert norms[0] > 0.05
        clipped = read_metric(runs / run / "metrics.csv", "train/grad_norm_clipped")[1]
        assert clipped == pytest.approx([0.05] * 6, rel=1e-3)
    one, two = (weights(runs / run / "checkpoints/last.ckpt") for run in ("one", "two"))
    start_of = load_pretrained(str(tmp_path / "calm")).state_dict()
    assert any(not torch.equal(one[f"model.{name}"], weight) for name, weight in start_of.items() if ".h." in name)
    for name, weight in one.items():
        torch.testing.assert_close(two[name], weight, rtol=1e-3, atol=1e-4)


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


def test_lines_that_the_model_did_not_write_whole_are_not_measured():
    assert whole_lines("rest of it\nA whole line.\nand one that", "The") == "A whole line."
    assert whole_lines("A first line.\nA whole line.\nand one that", "MOTH.\n") == "A first line.\nA whole line."
    assert whole_lines("a single line", "The") == "a single line"
