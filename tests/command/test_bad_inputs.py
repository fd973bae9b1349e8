"""Bad input of every topic and every command, through the real command: one line, the right exit code, no traceback."""

import json
import os
import pickle
import shutil
import sys
import types
import zipfile
from importlib.metadata import version
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from helpers import LAST, RUNS, TINY, contents
from lightning.pytorch.utilities.exceptions import MisconfigurationException

from datamodules.cache import cached_array
from experiments.cli import dropped_defaults
from experiments.run import run_folder
from experiments.run.run_folder import RunArguments, RunFolder
from lightning_modules.finetuning.bases import load_pretrained

ROOT = Path(__file__).parents[2]
FILES = {
    "empty.txt": b"",
    "latin1.txt": b"caf\xe9 " * 100,
    "broken.yaml": b"model: [\n",
    "list.yaml": b"- a\n- b\n",
    "beside.yaml": b"optimizer: {class_path: Adam, lr: 1e-3}\n",
    "unknown.yaml": b"modle: {n_layer: 1}\n",
    "review.csv": b"review,sentiment\nfine,1\n",
    "one_class.csv": b"text,label\nfine,1\ngood,1\nnice,1\n",
    "table.npy": b"no array",
    "rope/config.json": b'{"model_type": "llama"}',
    "nobody/config.json": b'{"model_type": "nobody"}',
    "tokenizer/tokenizer.json": b"{}",
    "lightning_modules/mine.py": b"",  # a package of the user with the name of one of this project
    "sweep.yaml": b"method: gird\nparameters: {optimizer.lr: {values: [1]}}\n",
    f"{RUNS}/half/config.yaml": yaml.safe_dump({"model": yaml.safe_load(TINY.read_text())["model"]}).encode(),
}
TWICE = "--trainer.callbacks+=lightning_modules.runtime.steps_to_loss.StepsToLoss"
EARLY = "lightning.pytorch.callbacks.EarlyStopping"
CURVE = "--trainer.callbacks+=lightning_modules.runtime.learning_curve.LearningCurve"
MUON = "--optimizer=lightning_modules.optim.Muon"
STEPS = "--lr_scheduler=torch.optim.lr_scheduler.MultiStepLR"
EPOCH_OF_3 = [
    *("--trainer.max_steps=-1", "--trainer.max_epochs=1", "--trainer.limit_train_batches=3"),
    *("--trainer.check_val_every_n_epoch=1", "--trainer.val_check_interval=5"),
]
PLATEAU = "--lr_scheduler=lightning_modules.optim.schedules.ReduceOnPlateau"
LOGGERS = "lightning.pytorch.loggers"
HUB = ["--data.source=datamodules.sources.HubText", "--data.source.dataset=no/such"]
# command, flags after `-c tiny.yaml` if the command is followed by `tiny`, exit code, parts of the line
COMMANDS = [
    ("fti", [], 2, ["no such command: 'fti' (did you mean 'fit'?)"]),
    ("train", [], 2, ["did you mean 'fit'?"]),
    ("fit", [], 2, ["give an experiment by -c NAME", "llm-train list experiments"]),
    ("fit", ["list.yaml"], 2, ["a file needs -c (did you mean 'llm-train fit -c list.yaml'?)"]),
    ("fit", ["empty.txt"], 2, ["give an experiment by -c NAME", "--data.source empty.txt"]),
    ("fit tiny", ["list.yaml"], 2, ["(did you mean '-c list.yaml'?)"]),
    (
        "fit tiny",
        ["trainer.max_steps=3"],
        2,
        ["error: unrecognized arguments", "(did you mean '--trainer.max_steps'?)"],
    ),
    ("fit tiny", ["-trainer.max_steps", "3"], 2, ["error: unrecognized", "(did you mean '--trainer.max_steps'?)"]),
    ("fit tiny", ["--max_steps=3"], 2, ["error: unrecognized arguments", "(did you mean 'trainer.max_steps'?)"]),
    ("fit tiny", ["--print-config"], 2, ["(did you mean '--print_config'?)"]),
    ("fit tiny", ["--lr=3"], 2, ["(did you mean 'optimizer.lr'?)"]),
    ("fit tiny", ["--learning_rate", "1e-3"], 2, ["(did you mean 'optimizer.lr'?)"]),
    ("fit tiny", ["--seed=3"], 2, ["(did you mean 'seed_everything'?)"]),
    ("fit tiny", ["--n_layer=3"], 2, ["(did you mean 'model.n_layer'?)"]),
    ("fit tiny", ["--optimiser.lr=3"], 2, ["(did you mean 'optimizer'?)"]),
    ("fit tiny", ["--optimizer.lrr=3"], 2, ["error: --optimizer: Option 'lrr'", "(did you mean 'lr'?)"]),
    ("fit tiny", ["--optimizer.learning_rate=1"], 2, ["'learning_rate' is not accepted (AdamW takes lr, betas, "]),
    ("fit tiny", ["--model.norm_eps=-1"], 2, ["error: --model.norm_eps: ", "; -1 does not conform to restriction v>0"]),
    ("fit tiny", [MUON, "--optimizer.matrices=[0.5]"], 2, ["error: --optimizer.matrices: expected str, got 0.5"]),
    ("fit tiny", [STEPS, "--lr_scheduler.milestones=3"], 2, ["expected list, got 3: write '[3]', in quotation marks"]),
    (
        "fit tiny",
        [CURVE, "--trainer.callbacks.val_metric=val/los"],
        1,
        ["Curve: val_metric is 'val/los'", "'val/loss'?"],
    ),
    ("fit tiny", ["--model.n_embd=1000000000000000"], 1, ["the memory is not enough (", "`llm-train estimate` counts"]),
    ("fit tiny", EPOCH_OF_3, 1, ["error: `val_check_interval` (5) must be less than or equal to the number of"]),
    ("fit tiny", ["--optimizer=SGD", "--optimizer.learning_rate=1"], 2, ["accepted (SGD takes lr, momentum, "]),
    (
        "fit tiny",
        ["-c", "beside.yaml"],
        2,
        ["beside.yaml, line 1: optimizer: lr belongs under init_args, below class_p"],
    ),
    (
        "fit tiny",
        ["--trainer.callbacks=[{class_path: lightning.pytorch.callbacks.Timer, duration: 1, interval: step}]"],
        2,
        ["--trainer.callbacks.0: duration, interval belong under init_args, below class_path"],
    ),
    ("fit tiny", ["--optimizer.lr=fast"], 2, ["error: --optimizer.lr: expected float, got fast"]),
    ("fit tiny", ["--optimizer=torch.optim.LBFGS"], 1, ["optimizer: LBFGS cannot train here", "Give AdamW"]),
    ("fit tiny", ["--optimizer=AdamV"], 2, ["(did you mean 'torch.optim.Adam'?)"]),
    ("fit tiny", ["--lr_scheduler=Cosin"], 2, ["(did you mean 'lightning_modules.optim.schedules.Cosine'?)"]),
    ("fit tiny", ["--lr_scheduler=torch.optim.lr_scheduler.StepLr"], 2, ["(did you mean 'StepLR'?)"]),
    ("fit tiny", ["--trainer.callbacks+=EarlyStoping"], 2, [f"(did you mean '{EARLY}'?)"]),
    ("fit tiny", ["--trainer.callbacks+=lightning.callbacks.EarlyStopping"], 2, [f"(did you mean '{EARLY}'?)"]),
    ("fit tiny", [f"--trainer.callbacks+={EARLY}", "--trainer.callbacks.monitr=val/loss"], 2, ["'monitor'"]),
    ("fit tiny", [f"--trainer.callbacks+={EARLY}", "--trainer.callbacks.monitor=val/los"], 1, ["'val/loss'"]),
    ("fit tiny", [f"--trainer.callbacks+={EARLY}", "--trainer.callbacks.monitor=loss"], 1, ["'val/loss'"]),
    ("fit tiny", [PLATEAU, "--lr_scheduler.monitor=val/perplexiti"], 1, ["lr_scheduler: monitor", "'val/perplexity'"]),
    (
        "fit tiny",
        [TWICE, "--trainer.callbacks.target=1", TWICE, "--trainer.callbacks.target=2"],
        1,
        ["trainer.callbacks: there are 2 of StepsToLoss, and a checkpoint keeps the state of one"],
    ),
    (
        "fit tiny",
        ["--trainer.callbacks+=lightning_modules.mine.Mine"],
        2,
        ["'lightning_modules' has no attribute 'mine'"],
    ),
    ("fit", ["-c", "lost.yaml"], 2, ["lost.yaml", "does not exist"]),
    ("fit", ["-c", "broken.yaml"], 2, ["broken.yaml, line 2: "]),
    ("fit", ["-c", "list.yaml"], 2, ["list.yaml"]),
    ("fit tiny", ["-c", "unknown.yaml"], 2, ["unknown.yaml, line 1: ", "modle", "did you mean 'model'"]),
    ("fit tiny", ["-cunknown.yaml"], 2, ["unknown.yaml, line 1: ", "modle", "did you mean 'model'"]),
    ("fit tiny", ["--config=beside.yaml"], 2, ["beside.yaml, line 1: optimizer: lr belongs under init_args"]),
    (
        "fit tiny",
        ["--trainer.max_epoch=3"],
        2,
        ["unrecognized arguments: --trainer.max_epoch=3", "'trainer.max_epochs'"],
    ),
    ("fit tiny", ["--trainer.max_steps=many"], 2, ["trainer.max_steps", "many"]),
    ("fit tiny", ["--trainer.devices=0"], 1, ["devices", "0"]),
    *(
        ("fit tiny", given, 1, [f"trainer.accelerator is {kind}, and PyTorch finds no GPU here: give -c trainer/cpu"])
        for kind, given in [
            ("cuda", ["--trainer.accelerator=cuda"]),
            ("gpu", ["--trainer.accelerator", "gpu"]),
            ("gpu", ["-c", "trainer/gpu"]),
        ]
    ),
    ("fit tiny", ["--trainer.strategy=dpd"], 1, ["strategy", "dpd"]),
    ("fit tiny", ["--trainer.precision=bf17"], 2, ["expected one of", "(did you mean 'bf16'?)"]),
    ("fit tiny", ["--trainer.default_root_dir=x"], 1, ["set run.root and run.name"]),
    ("fit tiny", ["--model.n_layerz=3"], 2, ["Option 'n_layerz' is not accepted", "'n_layer'"]),
    ("fit tiny", ["--model.n_layer=many"], 2, ["model.n_layer", "expected int, got many"]),
    ("fit tiny", ["--model=lightning_modules.base.Pretrain"], 2, ["has no attribute 'Pretrain'"]),
    ("fit tiny", ["--model.n_head=3"], 1, ["n_embd=16 is not divisible by n_head=3"]),
    ("fit tiny", ["--optimizer=torch.optim.AdamQ"], 2, ["AdamQ"]),
    ("fit tiny", ["--lr_scheduler=torch.optim.lr_scheduler.SequentialLR"], 2, ["take InSequence or Together"]),
    ("fit tiny", ["--lr_scheduler.warmup=-1"], 2, ["lr_scheduler.warmup: -1 does not conform to restriction v>=0"]),
    (
        "fit tiny",
        ["--lr_scheduler.final=2"],
        2,
        ["lr_scheduler.final: 2 does not conform to restriction v>=0 and v<=1"],
    ),
    ("fit tiny", ["--data.source=2024-02-30"], 1, ["2024-02-30", "not found"]),
    ("fit tiny", ["--data.source.paths=missing.txt"], 1, ["missing.txt", "not found"]),
    ("fit tiny", ["--data.source.paths=empty.txt"], 1, ["empty.txt", "is empty"]),
    ("fit tiny", ["--data.source.paths=latin1.txt"], 1, ["latin1.txt", "byte 3"]),
    ("fit tiny", HUB, 1, ["no/such", "offline.yaml"]),
    ("fit tiny", ["--ckpt_path=last"], 1, [f"no run {RUNS}/tiny to continue"]),
    ("fit tiny", ["--run.name=half", "--ckpt_path=last"], 1, ["this run has saved no checkpoint"]),
    ("fit tiny", ["--ckpt_path=lost.ckpt"], 1, ["lost.ckpt does not exist"]),
    ("fit tiny", ["--ckpt_path=best", "--auto_resume"], 1, ["leave ckpt_path out"]),
    ("fit tiny", ["--ckpt_path=empty.txt"], 1, ["empty.txt: the checkpoint is truncated"]),
    ("fit tiny", ["--run.root=empty.txt"], 1, ["empty.txt"]),
    ("predict tiny", [], 1, ["Give --ckpt_path best, last or a file"]),
    ("generate", [f"--run={RUNS}/lost", "--prompt=a"], 1, ["no config.yaml in it"]),
    ("generate", [f"--run={RUNS}/half", "--prompt=a"], 1, ["last.ckpt: no such checkpoint"]),
    ("generate", [f"--run={RUNS}/half", "--prompt="], 2, ["--prompt is empty"]),
    ("generate", [f"--run={RUNS}/half", "--prompt=a", "--references=empty.txt"], 2, ["--references are for --chat"]),
    ("study", ["sweep.yaml"], 1, ["sweep.yaml", "gird", "did you mean 'grid'"]),
    ("study", ["lost.yaml"], 2, ["lost.yaml"]),
    ("compare", ["runs/lost"], 1, ["runs/lost"]),
    ("generate", ["--run=runs/lost", "--prompt=a", "--temprature=1"], 2, ["(did you mean '--temperature'?)"]),
    ("generate", ["--run=runs/lost", "--prompt=a", "--temp", "0"], 2, ["(did you mean '--temperature'?)"]),
    ("generate", ["--run=runs/lost", "--prompt=a", "--max-new-tokens", "3"], 2, ["(did you mean '--max_new_tokens'?)"]),
    ("list", ["topcs"], 2, ["(did you mean 'topics'?)"]),
    ("copy", ["trainer/gpuu"], 2, ["(did you mean 'trainer/gpu'?)"]),
    ("schema", ["--fast"], 2, ["--fast"]),
    ("completion", ["fish"], 2, ["fish", "bash"]),
]
# The same of the experiments of each topic, from its bad_inputs.yaml: experiment, flags, exit code, parts of the line
TOPICS = [
    (f"{file.parent.name}/{bad.get('experiment', 'offline')}", bad["flags"], bad.get("code", 1), bad["says"])
    for file in sorted((ROOT / "tests").glob("*/bad_inputs.yaml"))
    for bad in yaml.safe_load(file.read_text())
]


@pytest.fixture
def files(tmp_path: Path) -> None:
    """Write the files that the flags name."""
    for name, content in FILES.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_bytes(content)


def assert_one_line(done, code: int, said: list[str]) -> None:
    """Check that the last line says what is wrong, that no other line is an error, and that no run was trained."""
    errors = [line for line in done.err.splitlines() if line.startswith("error: ")]
    assert (done.code, errors, "Traceback" in done.err) == (code, done.err.splitlines()[-1:], False), done.err
    assert [part for part in said if part not in errors[0]] == [], errors[0]
    assert not list(Path().glob("runs/*/*/checkpoints"))


@pytest.mark.parametrize(("command", "flags", "code", "said"), COMMANDS, ids=lambda value: str(value)[:60])
def test_one_line_says_what_is_wrong_with_a_command(llm_train, files, tiny, monkeypatch, command, flags, code, said):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    command, *experiment = command.split()
    assert_one_line(llm_train(command, *(["-c", tiny()] if experiment else []), *flags), code, said)
    if any(flag.startswith("--trainer") for flag in flags):  # the run fails before it writes: its folder is removed
        assert not (RUNS / "tiny").exists()


def test_predict_without_anything_to_predict_names_another_command_and_writes_nothing(llm_train, whole):
    run = Path(shutil.copytree(whole(), RUNS / "whole"))
    before = contents(run)
    done = llm_train("predict", "-c", run / "config.yaml", "--ckpt_path", "best")
    said = f'has no predict_dataloader, and so nothing to predict; use `llm-train generate --run {run} --prompt "The"`'
    assert (done.code, len(done.err.splitlines()), said in done.err) == (1, 1, True), done.err
    assert contents(run) == before


def test_a_checkpoint_that_is_not_there_and_what_is_there_in_its_place(llm_train, tiny, whole):
    run = Path(shutil.copytree(whole(), RUNS / "whole"))
    folder = llm_train("fit", "-c", tiny(), "--ckpt_path", run)
    said = f"error: ckpt_path: {run} is a folder; those of a run are in its checkpoints/: last.ckpt and best.ckpt\n"
    assert folder.err.endswith(said)
    file = run / "checkpoints/last.ckpt"
    assert (
        f"last.ckpt is a file: give a folder with config.json and model.safetensors, the folder of a finished run, a "
        f".gguf file, or a hub name; did you mean {run}?"
        in llm_train("fit", "-c", tiny(), f"--model.pretrained={file}").err
    )
    (run / "checkpoints/best.ckpt").unlink()
    validated = llm_train("validate", "-c", run / "config.yaml", "--ckpt_path=best")
    assert "best.ckpt does not exist; this run has the checkpoint last" in validated.err
    generated = llm_train("generate", "--run", run, "--prompt=a", "--max_new_tokens=1")
    assert f"{run}: there is no best.ckpt; these are the weights of last.ckpt" in generated.err
    assert generated.code == 0


def test_a_seed_of_the_data_is_refused_beside_another_of_the_run(llm_train, tiny, parse):
    done = llm_train("fit", "-c", tiny(), "--data.seed=6")
    assert (done.code, done.err.count("\n")) == (1, 1)
    assert "--data.seed: is 6, and seed_everything, which is the seed of the data too, is 5" in done.err
    done = llm_train("fit", "-c", tiny(data__init_args__seed=6))
    assert "tiny.yaml: data.seed: is 6, and seed_everything" in done.err
    parse("fit", "-c", tiny(data__init_args__seed=5))


def test_a_run_whose_configuration_says_only_its_root_has_the_topic_of_its_folder(tmp_path):
    config = tmp_path / "runs/topic/name/config.yaml"
    config.parent.mkdir(parents=True)
    config.write_text("run: {root: runs}\n")
    (config.parent / "metrics.csv").touch()  # so that the folder is a run's
    found = RunFolder(config.parent, "topic", is_new=False)
    assert run_folder.of_config(config, RunArguments()) == found
    config.write_text("run: {root: runs, topic: null}\n")
    assert run_folder.of_checkpoint(config.parent / LAST) == found
    config.write_text("- run\n")
    assert run_folder.recorded(config, "trainer") == {}


def test_an_error_about_a_class_of_ones_own_has_no_needless_words(llm_train, tiny):
    Path("mine.py").write_text("import lightning as L\nclass Mine(L.Callback):\n    def __init__(self, n: int): ...\n")
    error = llm_train("fit", "-c", tiny(), "--trainer.callbacks+=mine.Mine", "--trainer.callbacks.m=3").err
    assert error == "error: --trainer.callbacks: mine.Mine; Option 'm' is not accepted (Mine takes n)\n"
    config = tiny(trainer__callbacks=[{"class_path": "mine.Mine", "init_args": {"n": 1}}])
    run = RUNS / "own"
    run.mkdir(parents=True)
    config.rename(run / "config.yaml")
    (run / "metrics.csv").touch()  # so that the folder is a run's
    assert llm_train("fit", "-c", run / "config.yaml").err.endswith("if you trust its code, add --allow mine\n")


@pytest.mark.parametrize("has_module", [False, True])
def test_a_setting_of_a_path_is_refused_as_such(llm_train, tiny, monkeypatch, has_module):
    if has_module:
        monkeypatch.setitem(sys.modules, "mine", types.ModuleType("mine"))
    error = llm_train("fit", "-c", tiny(), "--data.source", "mine.csv", "--data.source.text_field", "words").err
    advice = "give a class that has it in its place, as --data.source CLASS --data.source.text_field VALUE"
    said = f"mine.csv is a path, which has no setting text_field: {advice}"
    assert error == f"error: --data.source: {said}\n"


@pytest.mark.parametrize(("experiment", "flags", "code", "said"), TOPICS, ids=lambda value: str(value)[:60])
def test_one_line_says_what_is_wrong_with_an_experiment(llm_train, files, experiment, flags, code, said):
    assert_one_line(llm_train("fit", "-c", ROOT / f"experiments/{experiment}.yaml", *flags), code, said)


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (["--trainer.callbacks=lightning.pytorch.callbacks.Timer"], ("callbacks", "Timer", "ReproducibleSteps")),
        (
            ["--trainer.logger=lightning.pytorch.loggers.CSVLogger", "--trainer.logger.save_dir=."],
            ("logger", "CSVLogger"),
        ),
        (["--trainer.callbacks+=lightning.pytorch.callbacks.Timer"], None),
        (["--trainer.callbacks=lightning_modules.runtime.stop.GracefulStop"], None),  # one of the defaults is kept
        (["--trainer.logger=false"], None),
    ],
)
def test_flags_and_files_that_replace_all_defaults_say_so(parse, tiny, flags, said):
    lines = [*dropped_defaults(parse("fit", "-c", tiny(), *flags)["trainer"])]
    if said is None:
        assert lines == []
    else:
        (line,) = lines
        assert line.startswith(f"trainer.{said[0]}: {said[1]} in place of the defaults, ")
        assert all(part in line for part in (*said, f"--trainer.{said[0]}+"))


def test_a_callback_without_the_plus_runs_alone_and_the_command_says_so(llm_train, tiny):
    done = llm_train("fit", "-c", tiny(trainer__max_steps=1), "--trainer.callbacks=lightning.pytorch.callbacks.Timer")
    assert done.code == 0, done.err
    assert done.err.startswith("trainer.callbacks: Timer in place of the defaults, ReproducibleSteps, ")


def test_the_versions_are_printed(llm_train):
    for words in (["--version"], ["fit", "--version"], ["version"]):
        shown = llm_train(*words)
        assert (shown.code, shown.out.startswith("llm-train "), version("torch") in shown.out) == (0, True, True)


def test_a_mistake_in_a_file_is_found_by_its_line(llm_train, tiny):
    config = tiny()
    config.write_text(config.read_text().replace("n_embd: 16", "n_emdb: 16"))
    line = next(n for n, row in enumerate(config.read_text().splitlines(), start=1) if "n_emdb" in row)
    error = llm_train("fit", "-c", config).err
    assert f"{config}, line {line}: " in error
    assert "did you mean 'n_embd'?" in error


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
        (["--model.pretrained=model"], "model.pretrained: AutoModelForCausalLM could not load model"),
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


def damage(checkpoint: Path, how: str) -> str:
    """Replace a good checkpoint by a bad one, and return a part of the error."""
    if how == "truncated":
        checkpoint.write_bytes(checkpoint.read_bytes()[:-1000])
        return "truncated"
    if how == "flipped":
        content = bytearray(checkpoint.read_bytes())
        middle = len(content) // 2
        content[middle] ^= 0xFF
        checkpoint.write_bytes(content)
        return "damaged"
    if how == "pickled code in a zip":
        with zipfile.ZipFile(checkpoint) as whole:
            parts = {name: whole.read(name) for name in whole.namelist()}
        with zipfile.ZipFile(checkpoint, "w") as archive:
            for name, part in parts.items():
                archive.writestr(name, PICKLED if name.endswith("data.pkl") else part)
        return "pickled code"
    if how == "a bare pickle":
        checkpoint.write_bytes(PICKLED)
        return "not a checkpoint"
    saved = torch.load(checkpoint, weights_only=True)
    if how == "another topic":
        saved["module_class"] = "lightning_modules.other.OtherModule"
    else:
        saved["state_dict"]["decoder.final_norm.weight"] = torch.ones(7)
    torch.save(saved, checkpoint)
    return "is of lightning_modules.other.OtherModule" if how == "another topic" else "does not fit the model"


@pytest.mark.parametrize(
    "how", ["truncated", "flipped", "pickled code in a zip", "a bare pickle", "another topic", "another size"]
)
def test_a_bad_checkpoint_is_refused_and_runs_nothing(llm_train, tiny, whole, how):
    run = RUNS / "tiny"
    shutil.copytree(whole(), run)
    reason = damage(run / LAST, how)
    commands = [("fit", "-c", tiny(), "--ckpt_path", "last", "--trainer.max_steps", "28")]
    if how not in ("another topic", "another size"):
        commands.append(("generate", "--run", run, "--prompt", "a", "--checkpoint", "last"))
    for command in commands:
        done = llm_train(*command)
        assert done.code == 1
        assert reason in done.err.splitlines()[-1]
        assert not Path("it_ran").exists()


def test_a_full_disk_keeps_the_earlier_checkpoint(llm_train, tiny, monkeypatch):
    writes = []
    sync = os.fsync

    def full(descriptor: int) -> None:
        writes.append(1)
        if len(writes) > 1:  # the checkpoint of the first validation fits on the disk
            raise OSError(28, "No space left on device")
        sync(descriptor)

    monkeypatch.setattr(os, "fsync", full)
    done = llm_train("fit", "-c", tiny())
    assert done.code == 1
    error = done.err.strip().splitlines()[-1]
    assert "No space left on device" in error
    assert "the earlier one is whole" in error
    last = RUNS / "tiny" / LAST
    assert torch.load(last, weights_only=True)["global_step"] == 8
    assert sorted(path.name for path in last.parent.iterdir()) == ["best.ckpt", "last.ckpt"]


def test_a_pickle_in_place_of_a_pretrained_model_is_refused_and_not_run():
    Path("base").mkdir()
    Path("base/config.json").write_text('{"model_type": "gpt2", "n_layer": 1, "n_head": 1, "n_embd": 8}')
    Path("base/pytorch_model.bin").write_bytes(PICKLED)
    with pytest.raises(MisconfigurationException, match=r"model\.base: AutoModelForCausalLM could not load base"):
        load_pretrained("base")
    assert not Path("it_ran").exists()


@pytest.mark.parametrize("content", [PICKLED, b"", None])
def test_a_cached_array_that_cannot_be_read_is_computed_again_and_not_unpickled(content):
    file = Path("cache/array.npy")
    file.parent.mkdir()
    if content is None:
        np.save(file, np.array([Malicious()], dtype=object))
    else:
        file.write_bytes(content)
    assert cached_array(file, lambda: np.arange(3), mmap_mode="r").tolist() == [0, 1, 2]
    assert cached_array(file, lambda: 1 / 0).tolist() == [0, 1, 2]  # it is cached now
    assert not Path("it_ran").exists()
