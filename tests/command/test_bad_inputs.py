"""Bad input of every topic and every command, through the real command: one line, the right exit code, no traceback.

What is peculiar to a topic is tested more closely beside it; here is the promise that all keep.
"""

import json
import pickle
from pathlib import Path

import numpy as np
import pytest
from lightning.pytorch.utilities.exceptions import MisconfigurationException

from datamodules.cache import cached_array
from lightning_modules.finetuning.bases import load_pretrained

ROOT = Path(__file__).parents[2]
TEXTS = ("--data.source=datamodules.sources.ListText", "--data.source.texts=[one two three. four five six.]")
FILES = {
    "empty.txt": b"",
    "latin1.txt": b"caf\xe9 " * 100,
    "broken.yaml": b"model: [\n",
    "list.yaml": b"- a\n- b\n",
    "unknown.yaml": b"modle: {n_layer: 1}\n",
    "review.csv": b"review,sentiment\nfine,1\n",
    "one_class.csv": b"text,label\nfine,1\ngood,1\nnice,1\n",
    "table.npy": b"no array",
    "rope/config.json": b'{"model_type": "llama"}',
    "nobody/config.json": b'{"model_type": "nobody"}',
    "tokenizer/tokenizer.json": b"{}",
    "sweep.yaml": b"method: gird\nparameters: {optimizer.lr: {values: [1]}}\n",
    "runs/bpe/half/config.yaml": b"model: {class_path: lightning_modules.bpe.BPEModule}\n",
}
REVIEWS = "--data.reviews=datamodules.bert_imdb.ReviewFiles"
# command, flags, exit code, parts of the line
BAD = [
    ("fti", [], 2, ["no such command: 'fti'", "did you mean 'fit'"]),
    ("fit", ["-c", "lost.yaml"], 2, ["lost.yaml", "does not exist"]),
    ("fit", ["-c", "broken.yaml"], 2, ["broken.yaml: ", "line 2"]),
    ("fit", ["-c", "list.yaml"], 2, ["list.yaml"]),
    ("fit attention_recall", ["-c", "unknown.yaml"], 2, ["unknown.yaml, line 1: ", "modle", "did you mean 'model'"]),
    ("fit", [], 2, ["model"]),
    ("fit attention_recall", ["--trainer.max_stepz=3"], 2, ["--trainer.max_stepz", "max_steps"]),
    ("fit attention_recall", ["--trainer.max_steps=many"], 2, ["trainer.max_steps", "many"]),
    ("fit attention_recall", ["--trainer.devices=0"], 1, ["devices", "0"]),
    ("fit attention_recall", ["--trainer.accelerator=cuda"], 1, ["CUDA"]),
    ("fit attention_recall", ["--trainer.strategy=dpd"], 1, ["strategy", "dpd"]),
    ("fit attention_recall", ["--trainer.precision=8"], 2, ["trainer.precision"]),
    ("fit attention_recall", ["--optimizer=torch.optim.AdamQ"], 2, ["AdamQ"]),
    ("fit attention_recall", ["--lr_scheduler.warmup=-1"], 1, ["lr_scheduler: warmup"]),
    ("fit attention_recall", ["--model.n_head=5"], 1, ["n_embd=64 is not divisible by n_head=5"]),
    ("fit attention_recall", ["--data.n_pairs=[17]"], 1, ["17 pairs, more than the 16 of data.n_keys"]),
    ("fit attention_recall", ["--data.batch_size=0"], 1, ["data.batch_size is 0"]),
    ("fit attention_recall", ["--ckpt_path=last"], 1, ["no run runs/attention_recall/offline to continue"]),
    ("fit attention_recall", ["--ckpt_path=lost.ckpt"], 1, ["lost.ckpt does not exist"]),
    ("fit attention_recall", ["--ckpt_path=best", "--auto_resume"], 1, ["leave ckpt_path out"]),
    ("fit attention_recall", ["--ckpt_path=empty.txt"], 1, ["empty.txt: the checkpoint is truncated"]),
    ("fit attention_recall", ["--run.root=empty.txt"], 1, ["empty.txt"]),
    ("predict attention_recall", [], 1, ["Give --ckpt_path best, last or a file"]),
    ("fit bpe", ["--model.vocabulary_size=256"], 1, ["model.vocabulary_size is 256", "at least 257"]),
    ("fit bpe", ["--model.pattern=(?:"], 1, ["model.pattern: the pattern does not compile"]),
    ("fit bpe", ["--data.val_fraction=1"], 1, ["data.val_fraction 1.0", "leave something to train on"]),
    ("fit bpe", ["--trainer.max_epochs=2", *TEXTS, "--data.val_fraction=0"], 1, ["trainer.max_epochs is 2: give 1"]),
    ("fit decoder_pretrain", [], 1, ["runs/bpe/offline/tokenizer", "llm-train fit -c experiments/bpe/offline.yaml"]),
    ("fit decoder_pretrain", ["--data.tokenizer=tokenizer"], 1, ["tokenizer/tokenizer.json could not be read"]),
    ("fit decoder_pretrain", ["--data.tokenizer=byte", "--model.vocab_size=9"], 1, ["the YAML says 9", "257"]),
    ("fit decoder_pretrain", ["--data.tokenizer=byte", *TEXTS], 1, ["fewer than a block"]),
    ("fit position_probe", [], 1, ["llm-train fit -c experiments/decoder_pretrain/offline.yaml"]),
    ("fit position_probe", ["--data.source=table.npy"], 1, ["could not be read as an array of numbers"]),
    ("fit position_probe", ["--data.source=rope"], 1, ["has no table of absolute positions"]),
    ("fit bengio_nlm", ["--model.h=0", "--model.direct=false", *TEXTS, "--data.rare=1"], 1, ["nothing connects"]),
    ("fit bengio_nlm", [*TEXTS], 1, ["vocabulary"]),
    ("fit gpt_neo_style", ["--data.tokenizer=byte"], 1, ["model.base: runs/decoder_pretrain/offline does not exist"]),
    ("fit gpt_neo_style", ["--data.tokenizer=byte", "--model.base=nobody"], 1, ["AutoModelForCausalLM could not load"]),
    ("fit gpt_neo_style", ["--data.tokenizer=byte", "--data.passages=1"], 1, ["data.passages is 1"]),
    ("fit gpt_neo_style", ["--data.books=[]"], 1, ["data.books is empty"]),
    ("fit bert_imdb", [], 1, ["llm-train fit -c experiments/bert_imdb/offline_pretrain.yaml"]),
    ("fit bert_imdb", ["--model.dropout=1"], 2, ["model.dropout", "1 does not conform to restriction v>=0 and v<1"]),
    ("fit bert_imdb/offline_pretrain", [REVIEWS, "--data.reviews.train=lost.csv"], 1, ["lost.csv", "does not exist"]),
    ("fit bert_imdb/offline_pretrain", [REVIEWS, "--data.reviews.train=review.csv"], 1, ["line 2", "no 'text'"]),
    ("fit gpt2_webglm_qa", ["--data.tokenizer=byte"], 1, ["-c experiments/decoder_pretrain/offline.yaml"]),
    ("fit gpt2_webglm_qa", ["--data.tokenizer=byte", "--data.max_answer_tokens=128"], 1, ["max_answer_tokens is 128"]),
    ("generate", ["--run=runs/bpe/lost", "--prompt=a"], 1, ["no config.yaml in it"]),
    ("generate", ["--run=runs/bpe/half", "--prompt=a"], 1, ["last.ckpt: no such checkpoint"]),
    ("generate", ["--run=runs/bpe/half", "--prompt="], 1, ["--prompt is empty"]),
    ("study", ["sweep.yaml"], 1, ["sweep.yaml", "gird", "did you mean 'grid'"]),
    ("study", ["lost.yaml"], 1, ["lost.yaml"]),
    ("compare", ["runs/lost"], 1, ["runs/lost"]),
    ("schema", ["--fast"], 2, ["--fast"]),
    ("completion", ["fish"], 2, ["fish", "bash"]),
]


@pytest.mark.parametrize(("command", "flags", "code", "said"), BAD, ids=lambda value: str(value)[:60])
def test_one_line_says_what_is_wrong(llm_train, tmp_path, command, flags, code, said):
    for name, content in FILES.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_bytes(content)
    command, *experiment = command.split()
    if experiment:
        topic, _, name = experiment[0].partition("/")
        flags = ["-c", ROOT / f"experiments/{topic}/{name or 'offline'}.yaml", *flags]
    done = llm_train(command, *flags)
    errors = [line for line in done.err.splitlines() if line.startswith("error: ")]
    assert (done.code, errors, "Traceback" in done.err) == (code, done.err.splitlines()[-1:], False), done.err
    assert [part for part in said if part not in errors[0]] == [], errors[0]
    assert not list(tmp_path.glob("runs/*/*/checkpoints"))


class Malicious:
    """A pickle that touches a file when it is loaded."""

    def __reduce__(self):
        return Path.touch, (Path("it_ran"),)


PICKLED = pickle.dumps({"state_dict": Malicious(), "a": 1}, protocol=2)
CUSTOM_CODE = {"tokenizer_class": "Own", "auto_map": {"AutoTokenizer": ["own.Own", None]}}


def test_the_pickle_would_have_run():
    pickle.loads(PICKLED)
    assert Path("it_ran").is_file()


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (["--ckpt_path=pickled"], "truncated, or not a checkpoint"),
        (["--data.tokenizer=tokenizer"], "tokenizer/tokenizer.json could not be read"),
        (["--data.tokenizer=pickled.json"], "pickled.json could not be read"),
        (["--data.tokenizer=./custom"], "custom"),
        (["--model.pretrained=model"], "model.pretrained: 'model' could not be loaded"),
        (["--data.source.paths=pickled"], "is not UTF-8"),
    ],
)
def test_a_pickle_in_place_of_a_file_is_refused_and_not_run(llm_train, tiny, flags, said):
    for name in ("pickled", "pickled.json", "tokenizer/tokenizer.json", "model/pytorch_model.bin"):
        Path(name).parent.mkdir(exist_ok=True)
        Path(name).write_bytes(PICKLED)
    Path("model/config.json").write_text('{"model_type": "gpt2", "n_layer": 1, "n_head": 1, "n_embd": 8}')
    Path("custom").mkdir()
    Path("custom/tokenizer_config.json").write_text(json.dumps(CUSTOM_CODE))
    Path("custom/own.py").write_text("open('it_ran', 'w')")
    done = llm_train("fit", "-c", tiny(), *flags)
    errors = [line for line in done.err.splitlines() if line.startswith("error: ")]
    assert (done.code, len(errors), "Traceback" in done.err) == (1, 1, False), done.err
    assert said in errors[0]
    assert not Path("it_ran").exists()


def test_a_pickle_in_place_of_a_pretrained_model_is_refused_and_not_run():
    Path("base").mkdir()
    Path("base/config.json").write_text('{"model_type": "gpt2", "n_layer": 1, "n_head": 1, "n_embd": 8}')
    Path("base/pytorch_model.bin").write_bytes(PICKLED)
    with pytest.raises(MisconfigurationException, match=r"model\.base: AutoModelForCausalLM could not load base"):
        load_pretrained("base")
    assert not Path("it_ran").exists()


@pytest.mark.parametrize("content", [PICKLED, b"", None])
def test_a_cached_array_that_cannot_be_read_is_made_anew_and_not_unpickled(content):
    file = Path("cache/array.npy")
    file.parent.mkdir()
    if content is None:
        np.save(file, np.array([Malicious()], dtype=object))
    else:
        file.write_bytes(content)
    assert cached_array(file, lambda: np.arange(3), mmap_mode="r").tolist() == [0, 1, 2]
    assert cached_array(file, lambda: 1 / 0).tolist() == [0, 1, 2]  # it is there now
    assert not Path("it_ran").exists()
