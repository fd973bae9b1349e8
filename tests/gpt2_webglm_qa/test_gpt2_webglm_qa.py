"""Instruction tuning end to end: the loss of packed and unpacked rows, answers, the files of a run, and the chat."""

import io
import json
import re
import shutil
import signal
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import forks
import lightning as L
import pytest
import torch
import torch.nn.functional as F
import yaml
from helpers import assert_same_weights, with_settings
from jsonargparse import ArgumentError, ArgumentParser
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from shared_runs import own_world, run_command

from datamodules.gpt2_webglm_qa.cited_answers import JSONLines
from datamodules.gpt2_webglm_qa.data import GPT2WebGLMQADataModule, Rows
from datamodules.tokenizers import byte_tokenizer
from experiments.errors import UserError
from experiments.generate import chat, read_references
from lightning_modules.decoder_pretrain.module import PretrainModule
from lightning_modules.finetuning.freeze import Freeze
from lightning_modules.finetuning.lora import LoRA
from lightning_modules.gpt2_webglm_qa import show_records
from lightning_modules.gpt2_webglm_qa.answers import AnswerQuestions, as_markdown
from lightning_modules.gpt2_webglm_qa.module import GPT2WebGLMQAModule, keeps_records_apart
from lightning_modules.gpt2_webglm_qa.show_records import as_ansi, as_html, spans
from lightning_modules.runtime.learning_curve import read_metric

RUN = Path("runs/gpt2_webglm_qa/tiny")
CONTEXT, N_ANSWER = 192, 8
TEMPLATE = "{references}{question}\n{answer}"
NAMES = ["Ann", "Bob", "Cem", "Dan", "Eve"]


def architecture(model_type: str = "gpt2") -> dict:
    """Return the configuration of a tiny model without dropout."""
    sizes = {"vocab_size": 257, "bos_token_id": 256, "eos_token_id": 256, "pad_token_id": 256}
    own = {
        "gpt2": {"n_positions": CONTEXT, "n_embd": 16, "n_layer": 2, "n_head": 2}
        | dict.fromkeys(("embd_pdrop", "resid_pdrop", "attn_pdrop"), 0.0),
        "gpt_neo": {"max_position_embeddings": CONTEXT, "hidden_size": 16, "num_layers": 2, "num_heads": 2}
        | {"attention_types": [[["global", "local"], 1]], "window_size": 8},
        "llama": {"max_position_embeddings": CONTEXT, "hidden_size": 16, "intermediate_size": 32}
        | {"num_hidden_layers": 2, "num_attention_heads": 2},
        "bloom": {"hidden_size": 16, "n_layer": 2, "n_head": 2},
    }
    if model_type == "gemma3":  # its configuration has one for text and one for images
        text = own["llama"] | {"num_key_value_heads": 2, "head_dim": 8, "sliding_window": 8}
        vision = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
        vision |= {"image_size": 28, "patch_size": 14}
        return {"model_type": model_type, "text_config": sizes | text, "vision_config": vision}
    return {"model_type": model_type} | sizes | own[model_type]


def module(model_type: str = "gpt2") -> GPT2WebGLMQAModule:
    torch.manual_seed(1)
    made = GPT2WebGLMQAModule("none", vocab_size=257, block_size=CONTEXT, architecture=architecture(model_type))
    for name, parameter in made.named_parameters():
        if "weight" in name and parameter.dim() == 2:
            torch.nn.init.normal_(parameter, std=0.3)
    return made


@pytest.fixture(scope="module")
def records(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Questions whose answer is in one of two references."""
    rows = []
    for i in range(60):
        who, other = NAMES[i % 5], NAMES[(i + 1 + i // 5 % 4) % 5]
        cited, references = 1 + i % 2, [f"{who} did {i}.", f"{other} saw it."]
        answer = f"{who} did {i} [{cited}]." + " So." * (i % 4)
        rows.append({"question": f"Who did {i}?", "answer": answer, "references": references[:: -1 if i % 2 else 1]})
    file = tmp_path_factory.mktemp("records") / "records.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return file


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("base")
    module().save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def qa(tmp_path_factory: pytest.TempPathFactory, base: Path, records: Path) -> Callable[..., Path]:
    """Return a function that writes the YAML of a run of 8 steps; settings replace values by their key path."""

    def write(**settings: object) -> Path:
        topic, runtime = "lightning_modules.gpt2_webglm_qa.", "lightning_modules.runtime."
        config = {
            "seed_everything": 5,
            "model": {"class_path": f"{topic}GPT2WebGLMQAModule", "init_args": {"base": str(base)}},
            "data": {
                "class_path": "datamodules.gpt2_webglm_qa.GPT2WebGLMQADataModule",
                "init_args": {
                    "records": {
                        "class_path": "datamodules.gpt2_webglm_qa.JSONLines",
                        "init_args": {"train": str(records), "val_fraction": 0.2, "test_fraction": 0.1},
                    },
                    "tokenizer": "byte",
                    "template": TEMPLATE,
                    "block_size": CONTEXT,
                    "max_answer_tokens": N_ANSWER,
                    "batch_size": 4,
                },
            },
            "optimizer": {"class_path": "torch.optim.AdamW", "init_args": {"lr": 3e-2}},
            "trainer": {
                "accelerator": "cpu",
                "max_steps": 8,
                "max_epochs": -1,
                "val_check_interval": 4,
                "check_val_every_n_epoch": None,
                "log_every_n_steps": 4,
                "callbacks+": [
                    {"class_path": f"{topic}ShowRecords"},
                    {
                        "class_path": f"{topic}AnswerQuestions",
                        "init_args": {"n_questions": 6, "batch_size": 4, "lead_sentences": 1, "n_shown": 2},
                    },
                    {"class_path": f"{runtime}export.ExportModel"},
                ],
            },
        }
        file = tmp_path_factory.mktemp("config") / "tiny.yaml"
        file.write_text(yaml.safe_dump(with_settings(config, settings), sort_keys=False))
        return file

    return write


@pytest.fixture(scope="module")
def fitted(tmp_path_factory: pytest.TempPathFactory, qa: Callable[..., Path]) -> SimpleNamespace:
    """An uninterrupted run, made once: its folder, and what it printed to the terminal."""
    folder = tmp_path_factory.mktemp("fitted")
    with own_world(folder):
        done = run_command("fit", "-c", qa())
    assert done.code == 0, done.err
    return SimpleNamespace(run=folder / RUN, err=done.err)


def datamodule(records: Path, **options: object) -> GPT2WebGLMQADataModule:
    options = {"block_size": CONTEXT, "batch_size": 4, "tokenizer": "byte", "max_answer_tokens": N_ANSWER} | options
    options = {"template": TEMPLATE} | options
    data = GPT2WebGLMQADataModule(JSONLines(str(records), val_fraction=0.2, test_fraction=0.1), **options)
    data.setup("fit")
    return data


# --- the loss --------------------------------------------------------------------------------------------------------


def nats_of_answers(model: torch.nn.Module, examples: list) -> torch.Tensor:
    """Return the cross entropy of each answer in nats, by the plain model, one record at a time."""
    costs = []
    for example in examples:
        ids = torch.tensor([*example.prompt_ids.tolist(), *example.answer_ids.tolist()])[None]
        n = len(example.answer_ids)
        with torch.no_grad():
            logits = model(ids[:, :-1]).logits[0, -n:]
        costs.append(F.cross_entropy(logits, ids[0, -n:], reduction="sum"))
    return torch.stack(costs)


def assert_costs_of_rows(tuned: GPT2WebGLMQAModule, rows: object) -> None:
    """Compare the loss of each record in each row with its loss alone."""
    expected = nats_of_answers(tuned.model, rows.examples)
    with torch.no_grad():
        for row in range(len(rows)):
            batch = rows[torch.tensor([row])]
            lengths = [len(rows.examples[number].answer_ids) for number in rows.rows[row]]
            nats = tuned.nats(batch)  # followed by zeros, to a round number
            assert nats[sum(lengths) :].count_nonzero() == 0
            found = torch.stack([part.sum() for part in nats[: sum(lengths)].split(lengths)])
            torch.testing.assert_close(found, expected[rows.rows[row]], rtol=1e-5, atol=1e-5)
    given = tuned.answer_nats([e.prompt_ids for e in rows.examples], [e.answer_ids for e in rows.examples])
    torch.testing.assert_close(given, expected, rtol=1e-5, atol=1e-5)


def run_on(device: str) -> SimpleNamespace:
    """Return what `setup` reads of a trainer."""
    return SimpleNamespace(strategy=SimpleNamespace(root_device=torch.device(device)))


@pytest.mark.parametrize("device", ["cpu", "cuda"])  # the set-up for a GPU; the model stays on the CPU
@pytest.mark.parametrize("model_type", ["gpt2", "gpt_neo", "llama", "gemma3"])
def test_a_packed_record_has_the_loss_that_it_has_alone(records, model_type, device):
    tuned = module(model_type).eval()
    assert keeps_records_apart(tuned.model)
    tuned.trainer, tuned.data = run_on(device), datamodule(records)
    tuned.setup("fit")
    assert tuned.within_records == (device == "cuda" and model_type != "gpt_neo")
    packed = datamodule(records).rows["train"]
    assert len(packed) < len(packed.examples) / 1.5
    assert_costs_of_rows(tuned, packed)


def test_a_model_that_mixes_packed_records_is_refused_and_trains_without_packing(records):
    tuned = module("bloom").eval()
    tuned.trainer, tuned.data = run_on("cpu"), SimpleNamespace(packing=True)
    with pytest.raises(MisconfigurationException, match=r"data.packing: a BloomForCausalLM does not keep the records"):
        tuned.setup("fit")
    tuned.data = datamodule(records, packing=False)
    tuned.setup("fit")
    assert_costs_of_rows(tuned, tuned.data.rows["train"])


@pytest.mark.parametrize("weight", [0.0, 0.3])
def test_packed_or_not_the_records_give_the_same_gradient(records, weight):
    gradients, losses = [], []
    for packing in (True, False):
        rows = datamodule(records, packing=packing, prompt_loss_weight=weight).rows["train"]
        tuned, logged = module(), []
        tuned.log_train_loss = lambda loss, weight, logged=logged: logged.append(loss)
        loss = tuned.training_step(rows[torch.arange(len(rows))], 0)
        loss.backward()
        torch.testing.assert_close(loss, logged[0])  # all rows together weigh what they weigh on average
        losses.append(loss.item())
        gradients.append([parameter.grad for parameter in tuned.parameters()])
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)
    torch.testing.assert_close(*gradients, rtol=1e-4, atol=1e-6)


def test_a_token_weighs_the_same_in_a_full_batch_and_in_an_empty_one(records):
    rows = datamodule(records, packing=False).rows["train"]
    tuned = module()
    tuned.log_train_loss = lambda *_: None
    whole = tuned.training_step(rows[torch.arange(len(rows))], 0)
    parts = [tuned.training_step(rows[torch.tensor([i])], 0) for i in range(len(rows))]
    torch.testing.assert_close(torch.stack(parts).mean(), whole)


def test_an_empty_share_of_a_batch_adds_nothing_to_the_metrics(records):
    rows = datamodule(records).rows["val"]
    tuned = module()
    for positions in (torch.arange(len(rows)), torch.arange(0)):
        tuned.evaluation_step(rows[positions], tuned.val_metrics)
    expected = nats_of_answers(tuned.model, rows.examples).sum() / sum(len(e.answer_ids) for e in rows.examples)
    torch.testing.assert_close(tuned.val_metrics.compute()["loss"], expected)


# --- answers ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("model_type", ["gpt2", "gpt_neo", "llama"])
def test_answers_together_alone_streamed_and_of_transformers_are_the_same(records, model_type):
    tuned = module(model_type)
    prompts = [example.prompt_ids for example in datamodule(records).questions("val", 4)]
    assert len({len(prompt) for prompt in prompts}) > 1
    longest = tuned.answer(prompts, 12, end=256)
    end = longest[0][7]  # a token that ends some of the answers before others
    together = tuned.answer(prompts, 12, end)
    assert [answer.index(end) + 1 for answer in together if end in answer] == [
        len(answer) for answer in together if end in answer
    ]
    assert len({len(answer) for answer in together}) > 1
    assert together == [tuned.answer([prompt], 12, end)[0] for prompt in prompts]
    for prompt, answer in zip(prompts, together, strict=True):
        ids = torch.from_numpy(prompt.astype("int64"))[None]
        tuned.model.eval()
        alone = tuned.model.generate(
            ids, max_new_tokens=12, do_sample=False, use_cache=False, eos_token_id=end, pad_token_id=end
        )
        tuned.model.train()
        assert alone[0, len(prompt) :].tolist() == answer
        assert [int(t) for t in tuned.generate(ids, 12, temperature=0, stop_token=end)] == answer
    assert tuned.model.training


# --- runs ------------------------------------------------------------------------------------------------------------


def test_a_run_answers_before_and_after_training_and_exports_a_model(fitted, base, records):
    from transformers import AutoModelForCausalLM

    run = fitted.run
    assert f"llm-train generate --run {RUN} --chat" in fitted.err
    data = datamodule(records)
    examples = data.rows["val"].examples
    n_tokens = sum(len(example.answer_ids) for example in examples)

    def perplexity(folder: Path) -> float:
        costs = nats_of_answers(AutoModelForCausalLM.from_pretrained(folder).eval(), examples)
        return (costs.sum() / n_tokens).exp().item()

    metrics = run / "metrics.csv"
    steps, values = read_metric(metrics, "val/perplexity")
    assert steps == [4, 8]
    assert min(values) == pytest.approx(perplexity(run / "model"), rel=1e-4)
    assert read_metric(metrics, "val/untuned/perplexity") == ([0], [pytest.approx(perplexity(base), rel=1e-4)])
    assert min(values) < 0.2 * perplexity(base)

    saved = json.loads((run / "answers.json").read_text())
    assert saved["step"] == 8
    assert len(saved["questions"]) == 6
    assert list(saved["measures"]) == ["tuned", "untuned", "lead", "best_reference"]
    for system, prefix in (("tuned", "val/"), ("lead", "val/lead/"), ("untuned", "val/untuned/")):
        for name, (mean, low, high) in saved["measures"][system].items():
            assert low <= mean <= high
            assert read_metric(metrics, prefix + name)[1][-1] == pytest.approx(mean, abs=1e-6)
    gold = saved["questions"][0]
    assert gold["answers"]["best_reference"]["text"] == gold["gold"][: len("Ann did 1 [1].")].strip()
    nats = sum(row["answers"]["tuned"]["nats"] for row in saved["questions"])
    n = sum(row["answers"]["tuned"]["n_tokens"] for row in saved["questions"])
    assert saved["measures"]["tuned"]["gold_perplexity"][0] == pytest.approx(torch.tensor(nats / n).exp().item())
    page = (run / "answers.md").read_text()
    assert page.startswith("# Answers at step 8")
    assert page.count("\n## ") == 2
    assert "- its base, untuned: " in page

    html = (run / "records.html").read_text()
    assert html.count("<pre>") == 5
    assert '" title="weight 1">A</span>' in html or '" title="weight 1">B</span>' in html
    counts = data.counts["train"]
    assert f"<td>data/train/records</td><td>{counts['records']}</td>" in html
    assert read_metric(metrics, "data/train/fill")[1] == [pytest.approx(counts["fill"])]


@pytest.mark.slow
def test_a_saved_run_is_evaluated_again_with_the_saved_answers_of_its_base(llm_train, fitted):
    shutil.copytree(fitted.run, RUN)
    fit = json.loads((RUN / "answers.json").read_text())
    again = llm_train("validate", "-c", RUN / "config.yaml", "--ckpt_path", "last")
    assert again.code == 0, again.err
    assert json.loads((RUN / "answers_validate.json").read_text())["measures"] == fit["measures"]
    assert json.loads((RUN / "summary_validate.json").read_text())["metrics"]["val/untuned/rougeL"] == pytest.approx(
        fit["measures"]["untuned"]["rougeL"][0]
    )
    tested = llm_train("test", "-c", RUN / "config.yaml", "--ckpt_path", "best")
    assert tested.code == 0, tested.err
    assert (RUN / "answers_test.md").read_text().startswith("# Answers\n")
    metrics = json.loads((RUN / "summary_test.json").read_text())["metrics"]
    assert {"test/loss", "test/perplexity", "test/rougeL", "test/lead/rougeL"} <= set(metrics)
    # The questions of the test split are others than those that the base answered.
    assert "test/untuned/rougeL" not in metrics


def test_saved_answers_of_the_base_are_used_for_the_same_questions_only(fitted, records, tmp_path):
    saved = json.loads((fitted.run / "answers.json").read_text())["questions"]
    trainer = SimpleNamespace(sanity_checking=False, default_root_dir=fitted.run)
    callback = AnswerQuestions()
    callback._examples = datamodule(records).questions("val", 6)
    remembered = callback._remembered(trainer)["untuned"]
    assert [answer.text for answer in remembered] == [row["answers"]["untuned"]["text"] for row in saved]
    callback._examples = datamodule(records, references="none").questions("val", 6)
    assert callback._remembered(trainer) == {}
    assert callback._remembered(SimpleNamespace(sanity_checking=False, default_root_dir=tmp_path)) == {}


def test_each_stage_of_a_process_asks_its_own_questions(records, tmp_path):
    callback, tuned, data = AnswerQuestions(n_questions=3), module(), datamodule(records)
    tuned.data = data
    quiet = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False}
    trainer = L.Trainer(accelerator="cpu", default_root_dir=tmp_path, callbacks=[callback], **quiet)
    for run, side in ((trainer.validate, "val"), (trainer.test, "test")):
        run(tuned, data, verbose=False)
        asked = [
            row["question"] for row in json.loads((tmp_path / f"answers_{run.__name__}.json").read_text())["questions"]
        ]
        assert asked == [example.record.question for example in data.questions(side, 3)]


@pytest.mark.slow
def test_a_killed_run_resumes_to_the_same_weights_and_answers(llm_train, forked, fitted, qa):
    config = qa()
    assert forked("fit", "-c", config, prepare=lambda: forks.die_after_step(4)) == -signal.SIGKILL
    resumed = llm_train("fit", "-c", config, "--ckpt_path", "last")
    assert resumed.code == 0, resumed.err
    assert_same_weights(fitted.run / "checkpoints/last.ckpt", RUN / "checkpoints/last.ckpt")
    for name in ("val/perplexity", "val/rougeL", "val/untuned/perplexity", "train/grad_norm"):
        assert read_metric(fitted.run / "metrics.csv", name) == read_metric(RUN / "metrics.csv", name)
    assert (fitted.run / "answers.json").read_text() == (RUN / "answers.json").read_text()


def test_frozen_embeddings_are_those_of_the_base():
    tuned = module()
    Freeze(embeddings=True).setup(None, tuned, "fit")
    frozen = {name for name, parameter in tuned.named_parameters() if not parameter.requires_grad}
    assert frozen == {f"model.transformer.{name}.weight" for name in ("wte", "wpe")}  # lm_head shares those of wte


def test_a_checkpoint_with_adapters_needs_no_base(base, records, tmp_path):
    shutil.copytree(base, tmp_path / "base")
    tuned = GPT2WebGLMQAModule(str(tmp_path / "base"), vocab_size=257, block_size=CONTEXT)
    LoRA().setup(None, tuned, "fit")
    adapters = {name: parameter for name, parameter in tuned.named_parameters() if parameter.requires_grad}
    assert len(adapters) == 2 * 2 * 4  # two matrices for each of the four linear layers of each block
    for parameter in adapters.values():
        torch.nn.init.normal_(parameter)
    checkpoint = {"state_dict": tuned.state_dict(), "hyper_parameters": dict(tuned.hparams)}
    tuned.on_save_checkpoint(checkpoint)
    shutil.rmtree(tmp_path / "base")
    again = GPT2WebGLMQAModule.of_checkpoint(checkpoint)
    prompts = [example.prompt_ids for example in datamodule(records).questions("val", 4)]
    assert again.answer(prompts, 12, end=256) == tuned.answer(prompts, 12, end=256)
    assert again.answer(prompts, 12, end=256) != module().answer(prompts, 12, end=256)


def test_a_run_of_decoder_pretrain_is_a_base(records, tmp_path):
    torch.manual_seed(3)
    decoder = PretrainModule(vocab_size=257, block_size=CONTEXT, n_layer=2, n_head=2, n_embd=16, dropout=0.0)
    decoder.save_pretrained(tmp_path / "model")
    tuned = GPT2WebGLMQAModule(str(tmp_path), vocab_size=257, block_size=CONTEXT).eval()
    ids = torch.arange(40)[None]
    with torch.no_grad():
        torch.testing.assert_close(tuned.model(ids).logits, decoder.eval()(ids), rtol=1e-4, atol=1e-5)
    assert_costs_of_rows(tuned, datamodule(records).rows["train"])


def test_a_mistake_in_the_records_is_one_line(llm_train, qa):
    Path("bad.jsonl").write_text('{"question": "Who?", "answer": "Ann.", "references": []}\n{"question": \n')
    done = llm_train("fit", "-c", qa(), "--data.records.train", "bad.jsonl")
    assert done.code == 1
    assert re.match(r"error: .*bad.jsonl, line 2: is no JSON object on one line", done.err.splitlines()[-1]), done.err


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda base: GPT2WebGLMQAModule("none"), "model: vocab_size, block_size must be set"),
        (
            lambda base: GPT2WebGLMQAModule(str(base), vocab_size=257, block_size=CONTEXT + 1),
            "data.block_size: 193 is longer than the context of .*, 192 tokens",
        ),
        (
            lambda base: GPT2WebGLMQAModule("runs/decoder_pretrain/offline", vocab_size=257, block_size=CONTEXT),
            "`llm-train fit -c decoder_pretrain/offline",
        ),
    ],
    ids=["not linked", "too long", "no base"],
)
def test_a_base_that_does_not_fit(base, make, message):
    with pytest.raises(MisconfigurationException, match=message):
        make(base)


@pytest.mark.parametrize(
    ("callback", "arguments"),
    [
        ("AnswerQuestions", {"n_questions": 0}),
        ("AnswerQuestions", {"batch_size": 0}),
        ("AnswerQuestions", {"lead_sentences": 0}),
        ("AnswerQuestions", {"n_shown": -1}),
        ("ShowRecords", {"n_records": 0}),
    ],
)
def test_the_parser_refuses_numbers_out_of_range(callback, arguments):
    parser = ArgumentParser(exit_on_error=False)
    parser.add_subclass_arguments(L.Callback, "callback")
    ((name, value),) = arguments.items()
    given = {"class_path": f"lightning_modules.gpt2_webglm_qa.{callback}", "init_args": arguments}
    with pytest.raises(ArgumentError, match=rf"(?s){name}.*{value} does not conform to restriction"):
        parser.parse_object({"callback": given})


# --- views -----------------------------------------------------------------------------------------------------------


def test_the_tokens_of_a_record_are_coloured_by_their_weight(records):
    rows = datamodule(records, prompt_loss_weight=0.25).rows["train"]
    example = rows.examples[0]
    record = spans(byte_tokenizer(), rows, example)
    text = "".join(token for token, _ in record)
    prompt = f"[1] {example.record.references[0]}\n[2] {example.record.references[1]}\n{example.record.question}"
    assert text == f"{prompt}\n{example.record.answer}<|endoftext|>"
    assert {weight for _, weight in record[1 : len(prompt)]} == {0.25}
    assert [weight for _, weight in record[len(prompt) :]] == [1.0] * (
        len(text) - len(prompt) - len("<|endoftext|>") + 1
    )
    assert record[0] == ("[", 0.0)
    assert as_ansi([("<", 0.0), ("?", 0.25), ("A", 1.0)]) == "<\x1b[30;43m?\x1b[0m\x1b[30;42mA\x1b[0m"
    page = as_html([[("<", 0.0), ("A", 1.0)]], {"data/train/rows": 1234.0})
    assert '<span style="background: rgba(46, 160, 67, 0.00)" title="weight 0">&lt;</span>' in page
    assert '<span style="background: rgba(46, 160, 67, 0.75)" title="weight 1">A</span>' in page
    assert "<td>data/train/rows</td><td>1,234</td>" in page


@pytest.mark.parametrize(("n", "expected"), [(3, [0, 3, 6]), (6, [0, 1, 3, 5, 6, 8]), (20, range(10))])
def test_the_records_shown_are_spread_over_the_training_split(monkeypatch, capsys, n, expected):
    monkeypatch.setattr(show_records, "spans", lambda tokenizer, rows, example: [(f"Q{example}", 0.0)])
    rows = object.__new__(Rows)
    rows.examples = range(10)
    data = SimpleNamespace(tokenizer=None, rows={"train": rows})
    trainer = SimpleNamespace(global_step=0, fast_dev_run=True)
    show_records.ShowRecords(n).on_train_start(trainer, SimpleNamespace(data=data))
    assert capsys.readouterr().out.split() == [f"Q{number}" for number in expected]


def test_a_trial_run_prints_the_records_to_the_terminal(llm_train, qa):
    done = llm_train("fit", "-c", qa(), "--trainer.fast_dev_run", "true")
    assert done.code == 0, done.err
    assert re.search(r"Who did \d+\?", re.sub(r"\x1b\[[\d;]*m", "", done.out))
    assert "\x1b[30;42mA\x1b[0m" in done.out or "\x1b[30;42mB\x1b[0m" in done.out
    assert not RUN.exists() or not any(RUN.iterdir())


def test_a_base_that_nothing_is_known_of_leaves_no_row_of_metrics():
    trainer = SimpleNamespace(callback_metrics={}, loggers=[None], is_global_zero=True)
    AnswerQuestions().on_sanity_check_end(trainer, None)  # of no held-out records


def test_answers_as_a_table_and_what_was_said():
    table = {
        "tuned": {"rougeL": (0.5, 0.4, 0.6), "gold_perplexity": (9.0, 8.0, 10.0)},
        "lead": {"rougeL": (0.2, 0, 0.3)},
    }
    answers = {"tuned": {"text": "# A\n\nB"}, "lead": {"text": "C"}}
    page = as_markdown(7, table, [{"question": "Q?", "references": ["r\ns"], "gold": "G", "answers": answers}])
    assert "| rougeL | 0.500 (0.400 to 0.600) | 0.200 (0.000 to 0.300) |" in page
    assert "| gold_perplexity | 9.000 (8.000 to 10.000) |  |" in page
    assert page.endswith("## Q?\n\n[1] r s\n\n- gold: G\n- this model: # A B\n- lead of the first reference: C\n")


# --- the chat --------------------------------------------------------------------------------------------------------


@pytest.fixture
def asked(llm_train, fitted, monkeypatch) -> Callable:
    """Return a function that types lines into a chat with the shared run."""

    def ask(typed: str, *flags: object) -> object:
        monkeypatch.setattr("sys.stdin", io.StringIO(typed))
        return llm_train("generate", "--run", fitted.run, "--chat", *flags)

    return ask


def test_the_chat_asks_as_the_run_was_trained(asked, llm_train, fitted, tmp_path):
    (tmp_path / "facts.txt").write_text("Ann did\n7.\n\n\nBob saw it.\n")
    from_file = asked("Who did 7?\nWho saw it?\n\n", "--references", tmp_path / "facts.txt")
    assert from_file.code == 0, from_file.err
    assert from_file.out.startswith("[1] Ann did 7.\n[2] Bob saw it.\n")
    assert from_file.out.count("Question: ") == 3
    pasted = asked("Ann did 7.\nBob saw it.\n\nWho did 7?\nWho saw it?\n")
    answers = re.findall(r"Question: (.*)\n", from_file.out)
    assert answers[:2] == re.findall(r"Question: (.*)\n", pasted.out)[:2]
    # The prompt is that of the template of the run, and the answer is decoded greedily.
    plain = llm_train(
        "generate", "--run", fitted.run, "--temperature", "0", "--max_new_tokens", str(N_ANSWER),
        "--prompt", "[1] Ann did 7.\n[2] Bob saw it.\nWho did 7?",
    )  # fmt: skip
    continuation = plain.out.removeprefix("[1] Ann did 7.\n[2] Bob saw it.\nWho did 7?").strip()
    assert f"Question: {continuation}\n\nQuestion: " in from_file.out
    assert "with --chat, the prompt is a question" in plain.err
    once = asked("", "--references", tmp_path / "facts.txt", "--prompt", "Who did 7?")
    assert (once.code, once.out.strip()) == (0, continuation)


def test_the_chat_says_what_does_not_fit(asked):
    cut = asked(f"{'long ' * 50}\n\nWho did 7?\n{'Who ' * 60}?\n")
    assert "(read 1 of 1 references, the last one in part)" in cut.out
    assert f"(too long: with an answer of {N_ANSWER} tokens, a prompt may have {CONTEXT - N_ANSWER})" in cut.out
    alone = asked("", "--prompt", "Who " * 60)
    assert (alone.code, alone.out) == (1, "")
    assert "--prompt is too long: with an answer of" in alone.err
    long = asked("", "--prompt", "Who?", "--max_new_tokens", CONTEXT)
    assert (long.code, long.out) == (1, "")
    assert f"--max_new_tokens {CONTEXT}: question and answer have {CONTEXT} tokens together; give fewer" in long.err


def test_references_of_a_chat_that_cannot_be_read(asked, tmp_path):
    missing = asked("", "--references", tmp_path / "missing.txt")
    assert missing.code == 1
    assert "missing.txt: cannot be read (No such file or directory)" in missing.err
    (tmp_path / "empty.txt").write_text(" \n")
    (tmp_path / "latin.txt").write_bytes(b"caf\xe9")
    for file, message in (("empty", "is empty"), ("latin", "is not UTF-8"), ("nowhere", "No such file")):
        with pytest.raises((UserError, OSError), match=message):
            read_references([tmp_path / f"{file}.txt"])
    wrong = asked("", "--references", tmp_path / "empty.txt")
    assert (wrong.code, "is empty" in wrong.err) == (1, True)


def test_a_chat_whose_input_has_no_question_fails(asked):
    wrong = asked("Who did 7?\n")
    assert (wrong.code, wrong.err.count("\n")) == (1, 1)
    assert "the input ended without a question" in wrong.err


def test_only_a_run_that_learned_to_answer_is_asked(llm_train, whole):
    run = ("generate", "--run", whole())
    assert "has not learned to answer (PretrainDataModule has no prompts)" in llm_train(*run, "--chat").err
    assert "--references are for --chat" in llm_train(*run, "--prompt", "a", "--references", "a.txt").err
    assert "--prompt is empty" in llm_train(*run, "--prompt", "").err
    assert llm_train(*run).code == 2


def test_an_empty_question_asks_for_other_references(monkeypatch, capsys):
    heard = []
    monkeypatch.setattr("sys.stdin", io.StringIO("one\ntwo\n\nQ1?\n\n\nQ2?\n"))
    chat(lambda question, references: heard.append((question, list(references))), [])
    assert heard == [("Q1?", ["one", "two"]), ("Q2?", [])]
