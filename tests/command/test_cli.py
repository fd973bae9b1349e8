"""The command line: what it accepts, links and records."""

import json
import shutil
import tempfile
from importlib.metadata import version
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import yaml
from helpers import RUNS, weights
from lightning.pytorch.utilities.rank_zero import rank_zero_only

from experiments import api, generate
from experiments.__main__ import COMMANDS
from experiments.api import Run
from experiments.cli import ExperimentCLI
from experiments.parser import one_line
from experiments.run import run_folder
from lightning_modules.base import ExperimentModule
from lightning_modules.runtime.bfloat16 import has_matrix_units
from lightning_modules.runtime.private_names import option_names

ROOT = Path(__file__).parents[2]
RUN = RUNS / "tiny"


def test_help_names_every_command(llm_train):
    shown = llm_train("--help")
    assert shown.code == 0
    assert all(f"\n  {name} " in shown.out for name in COMMANDS)
    assert llm_train().out == shown.out


@pytest.mark.parametrize("subcommand", ["fit", "validate", "test", "predict"])
def test_each_subcommand_has_its_own_help(llm_train, subcommand):
    shown = llm_train(subcommand, "--help")
    assert shown.code == 0
    assert f"usage: llm-train {subcommand} -c NAME" in shown.out
    assert "--ckpt_path" in shown.out
    assert ("--auto_resume" in shown.out) == (subcommand == "fit")


def test_a_command_builds_the_parser_of_its_subcommand_only(fit_cli):
    assert list(fit_cli.subcommands()) == ["fit"]
    with pytest.raises(KeyError):
        fit_cli.parser_of("validate")


def test_every_argument_of_fit_has_a_help_text(fit_cli):
    parser = fit_cli.parser_of("fit")
    texts = {action.dest: action.help for action in parser._actions}
    assert {"optimizer", "auto_resume", "ckpt_path"} <= set(option_names(parser))
    assert [name for name, text in texts.items() if not text] == []


def test_a_run_writes_its_files_and_closing_lines(llm_train, tiny):
    done = llm_train("fit", "-c", tiny())
    assert done.code == 0, done.err
    files = {str(path.relative_to(RUN)) for path in RUN.rglob("*") if path.is_file()}
    assert files >= {
        "config.yaml",
        "environment.json",
        "metrics.csv",
        "summary.json",
        "checkpoints/best.ckpt",
        "checkpoints/last.ckpt",
        "figures/learning_curve.png",
        "tokenizer/tokenizer.json",
        "model/config.json",
        "model/model.safetensors",
        "model/tokenizer.json",
    }
    summary = json.loads((RUN / "summary.json").read_text())
    assert summary["status"] == "finished"
    assert summary["step"] == 24
    assert summary["best"]["value"] == pytest.approx(summary["metrics"]["val/loss"], rel=0.2)
    assert str(RUN) in done.err
    assert f"best    val/loss {summary['best']['value']:.4f}" in done.err
    assert f"llm-train generate --run {RUN}" in done.err
    (session,) = json.loads((RUN / "environment.json").read_text())
    assert session["seed"] == 5
    assert session["packages"]["torch"] == version("torch")
    assert torch.backends.cpu.get_cpu_capability() in session["processor"]  # such as AVX2
    assert ("AMX" in session["processor"]) == has_matrix_units(torch.device("cpu"))


def test_flags_go_over_yaml_the_vocabulary_is_linked_and_the_schedule_ends_with_the_run(llm_train, tiny):
    flags = ("--optimizer.lr=0.5", "--model.n_layer", "1", "--lr_scheduler.warmup", "2", "--lr_scheduler.final=0.5")
    llm_train("fit", "-c", tiny(trainer__max_steps=24), *flags, "--trainer.max_steps=6")
    config = yaml.safe_load((RUN / "config.yaml").read_text())
    assert config["optimizer"]["init_args"]["lr"] == 0.5
    assert config["model"]["init_args"]["n_layer"] == 1
    assert config["trainer"]["max_steps"] == 6
    assert config["run"] == {"name": "tiny", "root": "runs", "topic": RUNS.name, "study": None}
    model = weights(RUN / "checkpoints/last.ckpt")
    assert model["decoder.token_embedding.weight"].shape[0] == 257  # 256 bytes and the end of text
    assert model["decoder.position_embedding.weight"].shape[0] == 16
    checkpoint = torch.load(RUN / "checkpoints/last.ckpt", weights_only=True)
    assert checkpoint["lr_schedulers"][0]["_last_lr"] == pytest.approx([0.25, 0.25])  # half the peak at the end
    # Weight decay skips vectors.
    assert [group["weight_decay"] for group in checkpoint["optimizer_states"][0]["param_groups"]] == [0.1, 0.0]


@pytest.fixture
def temporary(tmp_path, monkeypatch) -> Path:
    """Return the folder, empty, in which temporary folders are made."""
    folder = tmp_path / "temporary"
    folder.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(folder))
    return folder


def test_a_trial_run_leaves_no_folder_and_shows_its_profile(llm_train, tiny, temporary, caplog):
    done = llm_train("fit", "-c", tiny(), "--trainer.fast_dev_run", "true", "--trainer.profiler", "simple")
    assert done.code == 0, done.err
    assert "FIT Profiler Report" in caplog.text
    assert not RUN.exists() or not any(RUN.iterdir())
    assert not any(temporary.iterdir())


def test_each_process_of_a_trial_run_removes_its_folder(temporary, monkeypatch):
    monkeypatch.setattr(rank_zero_only, "rank", 1)
    cli = ExperimentCLI.__new__(ExperimentCLI)
    cli.config, cli.subcommand = {"fit": {"trainer": {"fast_dev_run": 1}}}, "fit"
    cli.run = run_folder.temporary("topic")
    assert any(temporary.iterdir())
    cli.close()
    assert not any(temporary.iterdir())


def test_rank_0_alone_removes_a_run_without_files(tmp_path, monkeypatch):
    cli = ExperimentCLI.__new__(ExperimentCLI)
    cli.config, cli.subcommand = {"fit": {"trainer": {}}}, "fit"
    cli.run = run_folder.claim(tmp_path, "topic", "name")
    for rank, is_left in ((1, True), (0, False)):
        monkeypatch.setattr(rank_zero_only, "rank", rank)
        cli.close()
        assert cli.run.path.exists() == is_left


def test_a_test_writes_into_the_run_folder_and_keeps_its_configuration(llm_train, tiny, whole):
    tiny()
    shutil.copytree(whole(), RUN)
    before = (RUN / "config.yaml").read_bytes()
    source = ("--data.test_source", "datamodules.sources.TextFiles", "--data.test_source.paths", "text.txt")
    saved = ("-c", RUN / "config.yaml", "--run.name", "tiny", "--ckpt_path", "best")
    tested = llm_train("test", *saved, *source)
    assert tested.code == 0, tested.err
    assert "test/bits_per_byte" in tested.err
    assert (RUN / "config.yaml").read_bytes() == before
    assert (RUN / "config_test.yaml").is_file()
    assert set(json.loads((RUN / "summary_test.json").read_text())["metrics"]) == {
        "test/loss",
        "test/perplexity",
        "test/bits_per_byte",
    }


def test_generate_refuses_its_arguments_before_it_prints(llm_train, whole):
    done = llm_train("generate", "--run", whole(), "--prompt", "ae", "--temperature", "-1")
    assert (done.code, done.out) == (1, "")
    assert done.err.startswith("error: generate: temperature=-1.0: must be")


def test_generate_prints_the_same_text_for_the_same_seed(llm_train, whole):
    options = ("generate", "--run", whole(), "--prompt", "ae", "--max_new_tokens", "40", "--seed")
    first, again, other = (llm_train(*options, seed).out for seed in ("1", "1", "2"))
    assert first.startswith("ae")
    assert len(first) > 20
    assert first == again
    assert first != other


@pytest.mark.parametrize(
    ("asked", "trained", "device", "expected"),
    [
        (None, "bf16-mixed", "cuda", torch.bfloat16),
        (None, "bf16-mixed", "cpu", torch.float32),
        (None, "16-mixed", "cuda", torch.float32),
        (None, None, "cuda", torch.float32),
        ("32", "bf16-mixed", "cuda", torch.float32),
        ("bf16", None, "cpu", torch.bfloat16),
    ],
)
def test_generate_takes_the_precision_of_the_run_on_a_gpu(tmp_path, asked, trained, device, expected):
    module = SimpleNamespace(device=torch.device(device))
    run = Run(tmp_path, {"trainer": {"precision": trained}}, module)
    assert generate.dtype_of_weights(asked, run) == expected


def test_generate_in_bfloat16(llm_train, whole, monkeypatch):
    runs, load_run = [], api.load_run
    monkeypatch.setattr(api, "load_run", lambda *a, **kw: runs.append(load_run(*a, **kw)) or runs[-1])
    done = llm_train("generate", "--run", whole(), "--prompt", "ae", "--precision", "bf16")
    assert len(done.out) > 20
    assert {parameter.dtype for parameter in runs[0].module.parameters()} == {torch.bfloat16}


def test_messages_of_the_parser_are_shortened_to_the_reason():
    message = "Parser key \"trainer.max_steps\":\n  Expected a <class 'int'>. Got value: many\n  Given value type: str"
    assert one_line(message, [], []) == "trainer.max_steps: expected int, got many"


@pytest.mark.parametrize("raised", [KeyboardInterrupt, "by Lightning"])
def test_ctrl_c_before_the_training_is_one_line(llm_train, tiny, monkeypatch, raised):
    def setup(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    if raised == "by Lightning":  # it exits with code 1
        monkeypatch.setattr(ExperimentModule, "setup", setup)
    else:
        monkeypatch.setattr(ExperimentCLI, "parse_arguments", setup)
    done = llm_train("fit", "-c", tiny())
    assert (done.code, done.err.splitlines()[-1]) == (130, "error: stopped by Ctrl-C")
    assert "Traceback" not in done.err


@pytest.mark.slow
def test_the_time_of_a_run_is_no_early_end_unless_it_has_a_number_of_steps(llm_train, tiny):
    limit = "--trainer.max_time=00:00:00:01"
    assert "early   " not in llm_train("fit", "-c", tiny(trainer__max_steps=-1), limit).err
    done = llm_train("fit", "-c", tiny(trainer__max_steps=100_000), limit)
    assert "early   before the end of 100000 steps: its time is over" in done.err


@pytest.mark.slow
def test_a_run_that_a_callback_ends_early_says_so(llm_train, tiny):
    early = ["--trainer.callbacks+=lightning.pytorch.callbacks.EarlyStopping", "--trainer.callbacks.monitor=val/loss"]
    early += ["--trainer.callbacks.patience=1", "--trainer.callbacks.min_delta=9"]
    done = llm_train("fit", "-c", tiny(trainer__val_check_interval=2), *early)
    assert "(finished at step 4, " in done.err
    assert "\nearly   before the end of 24 steps: EarlyStopping: Monitored metric val/loss did not improve" in done.err
    assert (
        "early   " not in llm_train("fit", "-c", tiny(trainer__val_check_interval=2, trainer__max_steps=4), *early).err
    )
