"""Every command, in and on a folder with files of a stranger: none of them is run, and nothing outside is written."""

import json
import os
import pickle
import re
import shutil
import socket
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from helpers import with_settings
from lightning.pytorch.utilities.exceptions import MisconfigurationException

from experiments.__main__ import COMMANDS
from experiments.errors import UserError
from experiments.study.journal import Journal
from experiments.study.runs import Plan
from experiments.study.sweep_file import read_sweep_file
from lightning_modules.finetuning.bases import load_pretrained

CODE = "open('it_ran', 'w')\n"
RUNS_CODE = {"auto_map": dict.fromkeys(("AutoTokenizer", "AutoConfig", "AutoModelForCausalLM"), "hostile.Hostile")}
FORMULA = "=HYPERLINK(1)"
WRITES = os.O_WRONLY | os.O_RDWR | os.O_CREAT


class Watch:
    """What this process writes outside of a folder, which code of the folder it runs, and what else it starts."""

    def __init__(self) -> None:
        self.folders: tuple[Path, ...] = ()  # where files may be written; without one, nothing is watched
        self.seen: list[str] = []
        sys.addaudithook(self.see)  # for the rest of the process: a hook cannot be removed

    def see(self, event: str, arguments: tuple[Any, ...]) -> None:
        if not self.folders:
            return
        written: Any = None
        if event == "open" and isinstance(arguments[0], str | bytes):
            mode, flags = arguments[1] or "", arguments[2]
            written = arguments[0] if set(mode) & set("wax+") or flags & WRITES else None
        elif event in ("os.remove", "os.rmdir", "os.mkdir", "os.truncate", "shutil.rmtree"):
            written = arguments[0]
        elif event in ("os.rename", "os.link", "os.symlink"):
            written = arguments[1]
        elif event == "exec" and arguments[0].co_filename[0] != "<" and self._is_below(arguments[0].co_filename):
            self.seen.append(f"runs {arguments[0].co_filename}")
        elif (event == "subprocess.Popen" and arguments[0] != "git") or event in ("os.system", "os.exec"):
            self.seen.append(f"starts {arguments[0]}")
        elif event == "socket.connect" and isinstance(arguments[0], socket.socket) and arguments[0].family != 1:
            self.seen.append(f"connects to {arguments[1]}")
        if written is not None and not isinstance(written, int) and not self._is_below(written):
            self.seen.append(f"{event} {written}")

    def _is_below(self, path: str | bytes) -> bool:
        name = Path(os.path.realpath(os.fsdecode(path)))
        return any(name.is_relative_to(folder) for folder in (*self.folders, "/dev", "/proc"))

    def on(self, *folders: Path) -> None:
        """Watch from now on."""
        self.folders, self.seen = folders, []

    def off(self) -> list[str]:
        """Watch no more, and return what was seen."""
        self.folders = ()
        return self.seen


@pytest.fixture(scope="session")
def watch() -> Watch:
    return Watch()


def hostile_tokenizer(run: Path) -> None:
    """Code in the folder, a class of a library for another kind of file, and a template that calls a function."""
    template = "{{ cycler.__init__.__globals__.os.system('touch it_ran') }}"
    for folder in (run / "tokenizer", run / "model"):
        file = folder / "tokenizer_config.json"
        settings = {"tokenizer_class": "Hostile", "chat_template": template}
        file.write_text(json.dumps(json.loads(file.read_text()) | RUNS_CODE | settings))
        (folder / "hostile.py").write_text(CODE)


def hostile_model(run: Path) -> None:
    """Code in the folder of the model, and adapters that name a module."""
    file = run / "model/config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | RUNS_CODE))
    adapters = {"peft_type": "LORA", "megatron_config": {}, "megatron_core": "hostile", "target_modules": ["c_attn"]}
    (run / "model/adapter_config.json").write_text(json.dumps(adapters))


def hostile_records(run: Path) -> None:
    """Markup, formulas, control characters and places in what the run says about itself."""
    script = "<script>alert(1)</script>"
    for name in ("records.html", "samples.md", "figures/a.html", "comparison/index.html"):
        (run / name).parent.mkdir(exist_ok=True)
        (run / name).write_text(script)
    metrics = (run / "metrics.csv").read_text()
    (run / "metrics.csv").write_text(metrics.replace("train/loss", FORMULA, 1))
    summary = json.loads((run / "summary.json").read_text())
    (run / "summary.json").write_text(json.dumps(summary | {"error": f"{script}\x1b[31m", "extra": "../../outside"}))
    session = {"command": f"touch it_ran; {FORMULA}", "packages": {FORMULA: FORMULA}, "commit": "$(touch it_ran)"}
    (run / "environment.json").write_text(json.dumps([session]))
    (run / ".lock").write_text("process 1 on $(touch it_ran)\n")
    (run / "journal.log").write_text('{"op_code": 0, "study_name": "../../outside", "directions": [1]}\n')
    (run / "wandb/run-1/files").mkdir(parents=True)
    (run / "wandb/run-1/files/requirements.txt").write_text("hostile @ file:///outside")
    (run / "wandb/settings").write_text("[default]\nbase_url = http://outside.example\n")


def hostile_modules(run: Path) -> None:
    """Files of Python that a process in the folder could import by accident."""
    for name in ("hostile", "conftest", "sitecustomize", "usercustomize", "yaml", "peft", "wandb", "experiments"):
        (run / f"{name}.py").write_text(CODE)


def hostile_settings(run: Path) -> None:
    """A class of the stranger."""
    config = yaml.safe_load((run / "config.yaml").read_text())
    (run / "config.yaml").write_text(yaml.safe_dump(with_settings(config, {"model__class_path": "hostile.Hostile"})))


def hostile_checkpoints(run: Path) -> None:
    """Pickled code."""
    for name in ("last", "best"):
        (run / f"checkpoints/{name}.ckpt").write_bytes(pickle.dumps({"state_dict": Malicious()}, protocol=2))


class Malicious:
    def __reduce__(self):
        return Path.touch, (Path("it_ran"),)


# Parts that a command reads or ignores, and parts for which it is refused.
READ = (hostile_tokenizer, hostile_model, hostile_records, hostile_modules)
REFUSED = (hostile_settings, hostile_checkpoints)
ON_THE_RUN = {
    "fit": [["-c", "config.yaml", "--ckpt_path", "last", "--trainer.max_steps", "10"]],
    "validate": [["-c", "config.yaml", "--ckpt_path", "best"]],
    "test": [["-c", "config.yaml", "--ckpt_path", "checkpoints/last.ckpt"]],
    "predict": [["-c", "config.yaml", "--ckpt_path", "best"]],
    "prepare": [["-c", "config.yaml", "--processes", "1"]],
    "estimate": [["-c", "config.yaml"]],
    "generate": [["--run", ".", "--prompt", "a", "--max_new_tokens", "2"]],
    "compare": [[".", "--metrics", FORMULA, "val/loss"]],
    "study": [["journal.log"], ["config.yaml", "--dry_run"]],
    "list": [["topics"], ["studies"]],
    "copy": [["config.yaml", "copied.yaml"]],
    "convert": [["."]],
    "new": [["a/b"]],
    "claims": [["lost"]],
    "new-topic": [["a/b"]],
    "schema": [["--help"]],
    "completion": [["--help"]],
}


@pytest.fixture
def stranger(
    whole: Callable[..., Path],
    tiny: Callable[..., Path],
    tmp_path: Path,
    watch: Watch,
    monkeypatch: pytest.MonkeyPatch,
) -> Iterator[Path]:
    """Return the folder of a run that came from elsewhere; its code could be imported if a command tried to."""
    tiny()
    run = tmp_path / "downloads/run"
    shutil.copytree(whole(trainer__max_steps=8), run)
    config = yaml.safe_load((run / "config.yaml").read_text())
    text = str(tmp_path / "text.txt")
    settings = {"source__init_args__paths": text, "tokenizer": "tokenizer"}
    settings = {f"data__init_args__{name}": value for name, value in settings.items()}
    (run / "config.yaml").write_text(yaml.safe_dump(with_settings(config, settings)))
    monkeypatch.setattr(sys, "path", [*sys.path, str(run)])
    yield run
    watch.off()
    sys.modules.pop("hostile", None)


def test_every_command_is_in_the_table():
    assert set(ON_THE_RUN) >= set(COMMANDS)


@pytest.mark.slow
@pytest.mark.parametrize("command", COMMANDS)
def test_files_of_a_stranger_run_no_code(llm_train, stranger, watch, monkeypatch, command):
    for part in READ:
        part(stranger)
    monkeypatch.chdir(stranger)
    watch.on(stranger, stranger.parents[1] / "cache")
    for arguments in ON_THE_RUN[command]:
        done = llm_train(command, *arguments)
        errors = [line for line in done.err.splitlines() if line.startswith("error: ")]
        assert "Traceback" not in done.err
        assert errors == done.err.splitlines()[-1:] if done.code else not errors, done.err
    assert watch.off() == []
    assert not any(stranger.parent.rglob("it_ran"))
    if command == "compare":
        assert done.code == 0, done.err
        tables = "".join((stranger / "comparison" / name).read_text() for name in ("table.csv", "runs.csv"))
        assert f"'{FORMULA}" in tables
        assert not re.search(rf'(^|[,"]){re.escape(FORMULA)}', tables, re.MULTILINE)


@pytest.mark.parametrize("command", ["fit", "validate", "test", "predict", "generate"])
@pytest.mark.parametrize("part", REFUSED)
def test_a_configuration_or_checkpoint_with_code_is_refused(llm_train, stranger, watch, monkeypatch, command, part):
    hostile_modules(stranger)
    part(stranger)
    monkeypatch.chdir(stranger)
    watch.on(stranger, stranger.parents[1] / "cache")
    (arguments,) = ON_THE_RUN[command]
    done = llm_train(command, *arguments)
    assert watch.off() == []
    assert (done.code > 0, done.err.splitlines()[-1][:7]) == (True, "error: "), done.err
    assert not any(stranger.parent.rglob("it_ran"))


def test_the_watch_sees_code_and_files(watch, tmp_path):
    file = tmp_path / "inside/hostile.py"
    file.parent.mkdir()
    file.write_text("import os\nos.system('true')\nopen('written', 'w').close()\n")
    watch.on(tmp_path / "inside")
    exec(compile(file.read_text(), file, "exec"))
    assert [seen.split()[0] for seen in watch.off()] == ["runs", "starts", "open"]


@pytest.mark.parametrize("method", ["grid", "random"])
def test_settings_in_a_journal_that_are_not_those_of_the_sweep_are_not_used(tmp_path, method):
    parameters = {"optimizer.lr": {"values": [0.1, 0.1]}, "trainer": {"parameters": {"max_steps": {"value": 2}}}}
    (tmp_path / "sweep.yaml").write_text(
        yaml.safe_dump({"method": method, "parameters": parameters, "program": "a.py"})
    )
    plan = Plan(read_sweep_file(tmp_path / "sweep.yaml"), tmp_path, [], n_runs=2, jobs=1, seed=0)
    journal = Journal(plan)
    journal.record(journal.next(), None, "it failed")
    again = Journal(plan).next()
    assert again.settings == {"optimizer.lr": 0.1, "trainer": {"max_steps": 2}}
    file = tmp_path / "journal.log"
    hostile = '"settings": {"trainer.callbacks": "hostile.Hostile", '
    file.write_text(file.read_text().replace('"settings": {', hostile).replace('"settings":{', hostile))
    if method == "grid":
        assert Journal(plan).next().settings == again.settings
        return
    with pytest.raises(UserError, match=r"journal\.log: the settings of .*lr=0\.1.* are not the sweep's"):
        Journal(plan).next()


def test_adapters_that_name_a_module_are_refused(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "gpt2", "n_layer": 1, "n_head": 1, "n_embd": 8}))
    (tmp_path / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA", "megatron_config": {}}))
    with pytest.raises(MisconfigurationException, match=r"model\.base: .*adapter_config.json names a module to import"):
        load_pretrained(str(tmp_path))
