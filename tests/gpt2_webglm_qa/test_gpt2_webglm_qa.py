"""Instruction tuning end to end: the loss packed and unpacked, answers, what a run leaves, and the chat."""

import io
import json
import re
import shutil
import signal
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
import yaml
from helpers import assert_same_weights, kill_when, weights, with_settings
from lightning.pytorch.utilities.exceptions import MisconfigurationException

from datamodules.gpt2_webglm_qa.cited_answers import JSONLines
from datamodules.gpt2_webglm_qa.data import GPT2WebGLMQADataModule
from datamodules.tokenizers import byte_tokenizer
from experiments.generate import chat
from lightning_modules.gpt2_webglm_qa.answers import AnswerQuestions, as_markdown
from lightning_modules.gpt2_webglm_qa.module import GPT2WebGLMQAModule, keeps_records_apart
from lightning_modules.gpt2_webglm_qa.show_records import ShowRecords, as_ansi, as_html, spans
from lightning_modules.runtime.learning_curve import read_metric

RUN = Path("runs/gpt2_webglm_qa/tiny")
CONTEXT = 192
TEMPLATE = "{references}{question}\n{answer}"
NAMES = ["Ann", "Bob", "Cem", "Dan", "Eve"]


def architecture(model_type: str = "gpt2") -> dict:
    """A tiny model of some kind, without dropout."""
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
    return {"model_type": model_type} | sizes | own[model_type]


def module(model_type: str = "gpt2") -> GPT2WebGLMQAModule:
    torch.manual_seed(1)
    made = GPT2WebGLMQAModule("none", vocab_size=257, block_size=CONTEXT, architecture=architecture(model_type))
    for name, parameter in made.named_parameters():
        if "weight" in name and parameter.dim() == 2:
            torch.nn.init.normal_(parameter, std=0.3)
    return made


@pytest.fixture
def records(tmp_path: Path) -> Path:
    """Questions whose answers stand in one of two references."""
    rows = []
    for i in range(60):
        who, other = NAMES[i % 5], NAMES[(i + 1 + i // 5 % 4) % 5]
        cited, references = 1 + i % 2, [f"{who} did {i}.", f"{other} saw it."]
        answer = f"{who} did {i} [{cited}]." + " So." * (i % 4)
        rows.append({"question": f"Who did {i}?", "answer": answer, "references": references[:: -1 if i % 2 else 1]})
    file = tmp_path / "records.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return file


@pytest.fixture
def base(tmp_path: Path) -> Path:
    folder = tmp_path / "base"
    module().save_pretrained(folder)
    return folder


@pytest.fixture
def qa(tmp_path: Path, base: Path, records: Path) -> Callable[..., Path]:
    """Writes the YAML of a run of 24 steps; settings go over it by key path."""

    def write(name: str = "tiny", **settings: object) -> Path:
        callbacks = "lightning_modules.runtime."
        config = {
            "seed_everything": 5,
            "model": {
                "class_path": "lightning_modules.gpt2_webglm_qa.GPT2WebGLMQAModule",
                "init_args": {"base": str(base)},
            },
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
                    "max_answer_tokens": 24,
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
                    {"class_path": f"{callbacks}show_records.ShowRecords"},
                    {
                        "class_path": f"{callbacks}answers.AnswerQuestions",
                        "init_args": {"n_questions": 6, "batch_size": 4, "lead_sentences": 1, "n_shown": 2},
                    },
                    {"class_path": f"{callbacks}export.ExportModel"},
                ],
            },
        }
        file = tmp_path / f"{name}.yaml"
        file.write_text(yaml.safe_dump(with_settings(config, settings), sort_keys=False))
        return file

    return write


def datamodule(records: Path, **options: object) -> GPT2WebGLMQADataModule:
    options = {"block_size": CONTEXT, "batch_size": 4, "tokenizer": "byte", "max_answer_tokens": 24} | options
    options = {"template": TEMPLATE} | options
    data = GPT2WebGLMQADataModule(JSONLines(str(records), val_fraction=0.2), **options)
    data.setup("fit")
    return data


# --- the loss --------------------------------------------------------------------------------------------------------


def nats_of_answers(model: torch.nn.Module, examples: list) -> torch.Tensor:
    """What each answer costs, by the plain model, one record at a time."""
    costs = []
    for example in examples:
        ids = torch.tensor([*example.prompt_ids.tolist(), *example.answer_ids.tolist()])[None]
        n = len(example.answer_ids)
        with torch.no_grad():
            logits = model(ids[:, :-1]).logits[0, -n:]
        costs.append(F.cross_entropy(logits, ids[0, -n:], reduction="sum"))
    return torch.stack(costs)


@pytest.mark.parametrize("model_type", ["gpt2", "gpt_neo", "llama"])
def test_a_packed_record_costs_what_it_costs_alone(records, model_type):
    tuned = module(model_type).eval()
    assert keeps_records_apart(tuned.model)
    packed = datamodule(records).rows["train"]
    assert len(packed) < len(packed.examples) / 1.5
    expected = nats_of_answers(tuned.model, packed.examples)
    with torch.no_grad():
        for row in range(len(packed)):
            batch = packed[torch.tensor([row])]
            counted = batch["targets"] >= 0
            nats = F.cross_entropy(tuned(batch), batch["targets"][counted], reduction="none")
            lengths = [len(packed.examples[number].answer_ids) for number in packed.rows[row]]
            found = torch.stack([part.sum() for part in nats.split(lengths)])
            torch.testing.assert_close(found, expected[packed.rows[row]], rtol=1e-5, atol=1e-5)
    examples = packed.examples
    given = tuned.answer_nats([e.prompt_ids for e in examples], [e.answer_ids for e in examples])
    torch.testing.assert_close(given, expected, rtol=1e-5, atol=1e-5)


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


def test_a_model_that_mixes_packed_records_is_refused(llm_train, qa, tmp_path):
    from transformers import AutoConfig, AutoModelForCausalLM

    AutoModelForCausalLM.from_config(AutoConfig.for_model(**architecture("bloom"))).save_pretrained(tmp_path / "bloom")
    config = qa(model__init_args__base=str(tmp_path / "bloom"), trainer__max_steps=2)
    refused = llm_train("fit", "-c", config)
    assert refused.code == 1
    assert "data.packing: a BloomForCausalLM does not keep the records of a row apart" in refused.err
    assert llm_train("fit", "-c", config, "--data.packing", "false").code == 0


# --- answers ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("model_type", ["gpt2", "gpt_neo", "llama"])
def test_answers_together_alone_without_a_cache_and_streamed_are_the_same(records, model_type):
    tuned = module(model_type)
    prompts = [example.prompt_ids for example in datamodule(records).questions("val", 5)]
    assert len({len(prompt) for prompt in prompts}) > 1
    longest = tuned.answer(prompts, 20, end=256)
    end = longest[0][7]  # a token that ends some of the answers before others
    together = tuned.answer(prompts, 20, end)
    assert [answer.index(end) + 1 for answer in together if end in answer] == [
        len(answer) for answer in together if end in answer
    ]
    assert len({len(answer) for answer in together}) > 1
    assert together == [tuned.answer([prompt], 20, end)[0] for prompt in prompts]
    assert together == tuned.answer(prompts, 20, end, use_cache=False)
    for prompt, answer in zip(prompts, together, strict=True):
        ids = torch.from_numpy(prompt.astype("int64"))[None]
        assert [int(t) for t in tuned.generate(ids, 20, temperature=0, stop_token=end)] == answer
    assert tuned.model.training


# --- runs ------------------------------------------------------------------------------------------------------------


def test_a_run_answers_before_and_after_and_leaves_a_model_that_others_load(llm_train, qa, base, records):
    from transformers import AutoModelForCausalLM

    done = llm_train("fit", "-c", qa())
    assert done.code == 0, done.err
    assert f"llm-train generate --run {RUN} --chat" in done.err
    data = datamodule(records)
    data.source = JSONLines(str(records), val_fraction=0.2, test_fraction=0.1)
    data.rows.clear()
    data.setup("fit")
    examples = data.rows["val"].examples
    n_tokens = sum(len(example.answer_ids) for example in examples)

    def perplexity(folder: Path) -> float:
        costs = nats_of_answers(AutoModelForCausalLM.from_pretrained(folder).eval(), examples)
        return (costs.sum() / n_tokens).exp().item()

    metrics = RUN / "metrics.csv"
    steps, values = read_metric(metrics, "val/perplexity")
    assert steps == [8, 16, 24]
    assert min(values) == pytest.approx(perplexity(RUN / "model"), rel=1e-4)
    assert read_metric(metrics, "val/untuned/perplexity") == ([0], [pytest.approx(perplexity(base), rel=1e-4)])
    assert min(values) < 0.2 * perplexity(base)

    saved = json.loads((RUN / "answers.json").read_text())
    assert saved["step"] == 24
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
    page = (RUN / "answers.md").read_text()
    assert page.startswith("# Answers at step 24")
    assert page.count("\n## ") == 2
    assert "- its base, untuned: " in page

    html = (RUN / "records.html").read_text()
    assert html.count("<pre>") == 5
    assert '" title="weight 1">A</span>' in html or '" title="weight 1">B</span>' in html
    counts = data.counts["train"]
    assert f"<td>data/train/records</td><td>{counts['records']}</td>" in html
    assert read_metric(metrics, "data/train/fill")[1] == [pytest.approx(counts["fill"])]


def test_a_saved_run_is_measured_again_beside_its_base(llm_train, qa):
    config = qa()
    llm_train("fit", "-c", config, "--trainer.max_steps", "8")
    fitted = json.loads((RUN / "answers.json").read_text())
    again = llm_train("validate", "-c", RUN / "config.yaml", "--ckpt_path", "best")
    assert again.code == 0, again.err
    validated = json.loads((RUN / "answers_validate.json").read_text())
    assert validated["measures"] == fitted["measures"]
    assert json.loads((RUN / "summary_validate.json").read_text())["metrics"]["val/untuned/rougeL"] == pytest.approx(
        fitted["measures"]["untuned"]["rougeL"][0]
    )
    # Other references, so that what the base answered then is no answer to these questions.
    llm_train("validate", "-c", RUN / "config.yaml", "--ckpt_path", "best", "--data.references", "none")
    assert "untuned" not in json.loads((RUN / "answers_validate.json").read_text())["measures"]
    tested = llm_train("test", "-c", RUN / "config.yaml", "--ckpt_path", "best")
    assert tested.code == 0, tested.err
    assert (RUN / "answers_test.md").read_text().startswith("# Answers\n")
    metrics = json.loads((RUN / "summary_test.json").read_text())["metrics"]
    assert {"test/loss", "test/perplexity", "test/rougeL", "test/lead/rougeL"} <= set(metrics)


def test_a_killed_run_resumes_to_the_same_weights_and_answers(llm_train, forked, qa):
    config = qa()
    runs = RUN.parent
    llm_train("fit", "-c", config, "--run.name", "whole")
    metrics = runs / "killed/metrics.csv"
    status = forked(
        "fit", "-c", config, "--run.name", "killed",
        meanwhile=kill_when(lambda: metrics.is_file() and any(read_metric(metrics, "val/loss")[0])),
    )  # fmt: skip
    assert status == -signal.SIGKILL
    resumed = llm_train("fit", "-c", config, "--run.name", "killed", "--ckpt_path", "last")
    assert resumed.code == 0, resumed.err
    assert_same_weights(runs / "whole/checkpoints/last.ckpt", runs / "killed/checkpoints/last.ckpt")
    for name in ("val/perplexity", "val/rougeL", "val/untuned/perplexity", "train/grad_norm"):
        assert read_metric(runs / "whole/metrics.csv", name) == read_metric(metrics, name)
    assert (runs / "whole/answers.json").read_text() == (runs / "killed/answers.json").read_text()


def test_adapters_and_freezing_work_as_in_the_other_fine_tunings(llm_train, qa, base, monkeypatch):
    short = ("--trainer.max_steps", "2", "--trainer.limit_val_batches", "0", "--trainer.callbacks+")
    freeze = ("lightning_modules.finetuning.freeze.Freeze", "--trainer.callbacks.embeddings", "true", "--run.name", "frozen")
    done = llm_train("fit", "-c", qa(), *short, *freeze)
    assert done.code == 0, done.err
    before, after = module().state_dict(), weights(RUN.with_name("frozen") / "checkpoints/last.ckpt")
    same = {name for name, weight in before.items() if torch.equal(weight, after[name])}
    assert same == {f"model.{name}.weight" for name in ("transformer.wte", "transformer.wpe", "lm_head")}

    done = llm_train("fit", "-c", qa(), *short, "lightning_modules.finetuning.lora.LoRA", "--run.name", "lora")
    assert done.code == 0, done.err
    shutil.rmtree(base)  # a checkpoint needs no base
    monkeypatch.setattr("sys.stdin", io.StringIO("Ann did 7.\n\nWho did 7?\n"))
    asked = llm_train("generate", "--run", RUN.with_name("lora"), "--chat")
    assert asked.code == 0, asked.err
    assert "[1] Ann did 7." in asked.out
    trained = {name for name in weights(RUN.with_name("lora") / "checkpoints/last.ckpt") if "lora_" in name}
    assert len(trained) == 2 * 2 * 4  # two matrices for each of the four linear layers of each block


def test_a_run_of_decoder_pretrain_is_a_base(llm_train, tiny, qa):
    llm_train("fit", "-c", tiny(data__init_args__block_size=CONTEXT), "--trainer.max_steps", "8")
    flags = ("--model.base", "runs/decoder_pretrain/tiny", "--trainer.max_steps", "8", "--data.prompt_loss_weight", "1")
    done = llm_train("fit", "-c", qa(), *flags)
    assert done.code == 0, done.err
    assert read_metric(RUN / "metrics.csv", "val/perplexity")[1][-1] < 200


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--data.block_size", "193"], "data.block_size: 193 is longer than the context of .*, 192 tokens"),
        (["--data.block_size", "16", "--data.max_answer_tokens", "8"], "there are no train records that can be used"),
        (["--data.template", "{question} {answer}"], r"data.template '{question} {answer}' has {references} 0 times"),
        (["--data.records.train", "bad.jsonl"], r"bad.jsonl, line 2: is no JSON object on one line"),
        (["--data.records.train", "less.jsonl"], r"less.jsonl, line 1: the record has no field 'answer'"),
        (["--data.records.train", "void.jsonl"], "there are no train records that can be used"),
        (["--model.base", "runs/decoder_pretrain/offline"], "`llm-train fit -c experiments/decoder_pretrain/offline"),
    ],
)
def test_a_mistake_is_one_line(llm_train, qa, flags, message):
    row = {"question": "Who?", "answer": "", "references": []}
    Path("bad.jsonl").write_text(json.dumps(row | {"answer": "Ann."}) + '\n{"question": \n')
    Path("less.jsonl").write_text(json.dumps({"question": "Who?", "references": []}))
    Path("void.jsonl").write_text(json.dumps(row))
    done = llm_train("fit", "-c", qa(), *flags)
    assert done.code == 1
    last = done.err.splitlines()[-1]
    assert last.startswith("error: ")
    assert re.search(message, last), done.err


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: AnswerQuestions(n_questions=0), "n_questions, batch_size and lead_sentences must be at least 1"),
        (lambda: AnswerQuestions(n_shown=-1), "n_shown at least 0"),
        (lambda: ShowRecords(n_records=0), "n_records is 0"),
        (lambda: GPT2WebGLMQAModule("none"), "vocab_size and block_size are needed"),
    ],
)
def test_arguments_out_of_range(make, message):
    with pytest.raises(MisconfigurationException, match=message):
        make()


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


def test_a_trial_run_prints_the_records_to_the_terminal(llm_train, qa):
    done = llm_train("fit", "-c", qa(), "--trainer.fast_dev_run", "true")
    assert done.code == 0, done.err
    assert re.search(r"Who did \d+\?", re.sub(r"\x1b\[[\d;]*m", "", done.out))
    assert "\x1b[30;42mA\x1b[0m" in done.out or "\x1b[30;42mB\x1b[0m" in done.out
    assert not RUN.exists() or not any(RUN.iterdir())


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
def asked(llm_train, qa, monkeypatch) -> Callable:
    """Answers to what is typed, by a run of the command."""
    llm_train("fit", "-c", qa(), "--trainer.max_steps", "2", "--trainer.limit_val_batches", "0")

    def ask(typed: str, *flags: object) -> object:
        monkeypatch.setattr("sys.stdin", io.StringIO(typed))
        return llm_train("generate", "--run", RUN, "--chat", *flags)

    return ask


def test_the_chat_asks_as_the_run_was_trained(asked, llm_train, tmp_path):
    (tmp_path / "facts.txt").write_text("Ann did\n7.\n\n\nBob saw it.\n")
    from_file = asked("Who did 7?\nWho saw it?\n\n", "--references", tmp_path / "facts.txt")
    assert from_file.code == 0, from_file.err
    assert from_file.out.startswith("[1] Ann did 7.\n[2] Bob saw it.\n")
    assert from_file.out.count("Question: ") == 3
    pasted = asked("Ann did 7.\nBob saw it.\n\nWho did 7?\nWho saw it?\n")
    answers = re.findall(r"Question: (.*)\n", from_file.out)
    assert answers[:2] == re.findall(r"Question: (.*)\n", pasted.out)[:2]
    # The prompt is that of the run's own template; greedy, so that the answer is that of `answer`.
    plain = llm_train(
        "generate", "--run", RUN, "--temperature", "0", "--max_new_tokens", "24",
        "--prompt", "[1] Ann did 7.\n[2] Bob saw it.\nWho did 7?",
    )  # fmt: skip
    continuation = plain.out.removeprefix("[1] Ann did 7.\n[2] Bob saw it.\nWho did 7?").strip()
    assert f"Question: {continuation}\n\nQuestion: " in from_file.out


def test_the_chat_says_what_does_not_fit(asked, tmp_path):
    cut = asked(f"{'long ' * 50}\n\nWho did 7?\n{'Who ' * 60}?\n")
    assert "(read 1 of 1 references, the last one in part)" in cut.out
    assert "(too long: with an answer of 24 tokens, a prompt may have 168)" in cut.out
    (tmp_path / "empty.txt").write_text(" \n")
    (tmp_path / "latin.txt").write_bytes(b"caf\xe9")
    for file, message in (("empty", "is empty"), ("latin", "is not UTF-8"), ("nowhere", "No such file")):
        wrong = asked("", "--references", tmp_path / f"{file}.txt")
        assert (wrong.code, message in wrong.err) == (1, True)


def test_only_a_run_that_learned_to_answer_is_asked(llm_train, tiny):
    llm_train("fit", "-c", tiny(), "--trainer.max_steps", "1", "--trainer.limit_val_batches", "0")
    run = ("generate", "--run", "runs/decoder_pretrain/tiny")
    assert "has not learned to answer (PretrainDataModule has no prompts)" in llm_train(*run, "--chat").err
    assert "--references are for --chat" in llm_train(*run, "--prompt", "a", "--references", "a.txt").err
    assert "--prompt is empty" in llm_train(*run, "--prompt", "").err
    assert llm_train(*run).code == 2


def test_an_empty_question_asks_for_other_references(monkeypatch, capsys):
    heard = []
    monkeypatch.setattr("sys.stdin", io.StringIO("one\ntwo\n\nQ1?\n\n\nQ2?\n"))
    chat(lambda question, references: heard.append((question, list(references))), [])
    assert heard == [("Q1?", ["one", "two"]), ("Q2?", [])]
