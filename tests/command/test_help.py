"""The help and the completion of every command: complete, and without an import of PyTorch."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from helpers import TINY

from experiments.__main__ import COMMANDS
from experiments.help import completion, listing, options
from lightning_modules.runtime.private_names import option_names

ROOT = Path(__file__).parents[2]
NAME = f"{TINY.parent.name}/offline"
STUDY = next(
    f"{file.parts[-3]}/{file.stem}"
    for file in sorted(ROOT.glob("experiments/*/studies/*.yaml"))
    if (file.parents[1] / "claims.yaml").is_file()
)


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_has_a_help(llm_train, command):
    shown = llm_train(command, "--help")
    assert shown.code == 0, shown.err
    assert shown.out.startswith(f"usage: llm-train {command}")
    flags = {*re.findall(r"^  (?:-h, )?(--\w+)(?![\w.])", shown.out, re.MULTILINE)}
    completed = {*completion.complete(f"llm-train {command} --")}
    assert flags <= completed
    if command not in (*options.COMMANDS, "prepare", "estimate"):  # the others have those of classes too
        assert flags == completed


def test_the_help_of_fit_has_the_options_of_its_parser(fit_cli):
    parser = fit_cli.parser_of("fit")
    ours = {*options.own("fit"), *options.SECTIONS, "trainer", "run", "help"}
    ours |= {f"{name}.{option}" for name in ("run", "trainer") for option in options.section(name)}
    theirs = {name for name in option_names(parser) if not name.endswith(".help")}
    assert ours == theirs | {"print_config"}
    defaults = parser.get_defaults()
    for name, parameter in options.section("trainer").items():
        # The command itself sets the default of the second.
        if not isinstance(defaults[f"trainer.{name}"], list) and name != "enable_autolog_hparams":
            assert str(options.written(parameter.default)) == str(options.written(str(defaults[f"trainer.{name}"])))


def test_every_option_has_a_text_and_fit_alone_resumes_by_itself():
    for command in options.COMMANDS:
        known = options.own(command)
        assert [name for name, parameter in known.items() if not parameter.help] == []
        assert ("auto_resume" in known) == (command == "fit")
        assert "ckpt_path" in known


def test_with_an_experiment_the_help_has_the_arguments_of_its_classes(llm_train):
    shown = llm_train("fit", "-c", NAME, "--optimizer", "torch.optim.SGD", "--help").out
    assert all(
        text in shown for text in ("--model.n_layer\n", "--data.block_size\n", "--optimizer.momentum\n", "here 4")
    )
    assert shown.count("advances at every optimiser step") == 1
    assert "--model.vocab_size" not in shown  # linked from the data
    assert "--optimizer.params" not in shown
    assert "--model.n_layer\n" in llm_train("fit", "--help", f"-c{NAME}").out


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--model.help", "lightning_modules.base.ExperimentModule"], "--model.compile"),
        (["--lr_scheduler.help=OneCycle"], "--lr_scheduler.initial"),
        (["--lr_scheduler.help", "torch.optim.lr_scheduler.StepLR"], "--lr_scheduler.step_size"),
        (["--lr_scheduler.help", "StepLR"], "A schedule advances at every optimiser step"),
        (["--optimizer.help"], "torch.optim.AdamW"),
        (["--trainer.callbacks.help", "EarlyStopping"], "--trainer.callbacks.monitor"),
        (["--trainer.callbacks.help", "lightning_modules.finetuning.freeze.Freeze"], "--trainer.callbacks.patterns"),
        (["--trainer.profiler.help", "lightning.pytorch.profilers.SimpleProfiler"], "--trainer.profiler.dirpath"),
    ],
)
def test_the_help_of_a_class_has_its_arguments(llm_train, words, said):
    shown = llm_train("fit", *words)
    assert (shown.code, said in shown.out) == (0, True), shown.out


def test_help_and_lists_need_no_import_of_torch():
    program = """
import contextlib, io, sys
from experiments.__main__ import main
for arguments in (["fit", "--help"], ["generate", "--help"], ["list", "callbacks"], ["completion", "bash"]):
    with contextlib.redirect_stdout(io.StringIO()), contextlib.suppress(SystemExit):
        main(arguments)
print("torch" in sys.modules)
"""
    done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True)
    assert (done.stdout, done.stderr) == ("False\n", "")


CALLBACKS = "lightning.pytorch.callbacks"
# line, words that complete it, words that do not
LINES = [
    ("llm-train ", {*COMMANDS}, set()),
    ("llm-train va", {"validate"}, {"fit"}),
    ("llm-train fit -c trainer/g", {"trainer/gpu"}, {"trainer/ddp"}),
    (f"llm-train fit -c {NAME[:6]}", {NAME}, set()),
    ("llm-train fit -c te", {"text.yaml"}, {"text.txt"}),
    ("llm-train prepare --", {"--processes", "--trainer.max_steps", "--help"}, {"--devices"}),
    ("llm-train estimate --trainer.detect_anomaly ", {"true", "false"}, set()),
    ("llm-train fit --trainer.max_st", {"--trainer.max_steps"}, {"--trainer.max_epochs"}),
    ("llm-train fit --run", {"--run.name", "--run.root"}, {"--trainer.max_steps"}),
    (f"llm-train fit -c {NAME} --model.n_l", {"--model.n_layer"}, {"--model.n_head"}),
    (f"llm-train fit -c {NAME} --model.norm ", {"layer", "rms"}, {"rotary"}),
    (f"llm-train fit -c {NAME} --model.norm=r", {"--model.norm=rms"}, {"--model.norm=layer"}),
    ("llm-train fit --optimizer torch.optim.Ada", {"torch.optim.AdamW"}, {"torch.optim.SGD"}),
    (f"llm-train fit --trainer.callbacks+ {CALLBACKS}.E", {f"{CALLBACKS}.EarlyStopping"}, {f"{CALLBACKS}.Timer"}),
    ("llm-train fit --data.source datamodules.sources.T", {"datamodules.sources.TextFiles"}, set()),
    ("llm-train fit --trainer.detect_anomaly ", {"true", "false"}, set()),
    ("llm-train fit --ckpt_path ", {"last", "best", "folder/"}, set()),
    ("llm-train generate --pr", {"--prompt", "--precision"}, {"--run"}),
    ("llm-train generate --run fo", {"folder/"}, {"text.txt"}),
    ("llm-train compare fo", {"folder/"}, set()),
    (f"llm-train study {STUDY[:9]}", {STUDY}, {NAME}),
    ("llm-train claims ", {STUDY.split("/")[0]}, {"folder/"}),
    ("llm-train study --j", {"--jobs"}, set()),
    ("llm-train copy trainer/c", {"trainer/cpu"}, set()),
    ("llm-train list s", {"schedules", "sources", "studies"}, {"topics"}),
    ("llm-train completion ", {"bash", "zsh"}, set()),
    ("llm-train nothing --", set(), {"--trainer.max_steps"}),
    ("llm-train fit 'open", set(), set()),
]  # fmt: skip


@pytest.mark.parametrize(("line", "expected", "others"), LINES, ids=[line for line, _, _ in LINES])
def test_a_line_is_completed(line, expected, others):
    Path("text.txt").touch()
    Path("text.yaml").touch()
    Path("folder").mkdir()
    found = {*completion.complete(line)}
    assert expected <= found
    assert not others & found


def test_names_are_completed_without_what_they_are(monkeypatch):
    expected = {name for name, _ in [*listing.KINDS["experiments"].rows(), *listing.KINDS["presets"].rows()]}
    monkeypatch.delattr(listing, "comment")  # reads the files again
    assert {*completion.complete("llm-train fit -c ")} == expected


def test_bash_completes_with_the_script(llm_train):
    printed = llm_train("completion", "bash").out
    script = f"""
llm-train() {{ {sys.executable} -m experiments "$@"; }}
{printed}
COMP_LINE='llm-train list --kind=x; llm-train fit --trainer.callbacks+=lightning_modules.runtime.stop.G'
COMP_LINE=${{COMP_LINE#*; }} COMP_POINT=200
_llm_train
printf '%s\\n' "${{COMPREPLY[@]}}"
"""
    environment = os.environ | {"PYTHONPATH": str(ROOT), "PYTHONSAFEPATH": "1"}
    done = subprocess.run(["bash", "-c", script], capture_output=True, text=True, env=environment)
    assert done.stdout == "lightning_modules.runtime.stop.GracefulStop\n", done.stderr


def test_completion_needs_a_shell(llm_train):
    done = llm_train("completion")
    assert (done.code, "give a shell: bash" in done.err, len(done.err.splitlines())) == (2, True, 1)
