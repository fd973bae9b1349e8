"""The command line: what it accepts, links and records, and the line that a mistake gets."""

import json
import pickle
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
import torch
import yaml
from helpers import weights

from experiments.parser import one_line

ROOT = Path(__file__).parents[2]
RUN = Path("runs/decoder_pretrain/tiny")


def test_help_names_every_command_and_unknown_ones_get_a_hint(llm_train):
    assert all(name in llm_train("--help").out for name in ("fit", "validate", "test", "predict", "generate"))
    mistaken = llm_train("fti")
    assert (mistaken.code, mistaken.err) == (2, "error: no such command: 'fti' (did you mean 'fit'?)\n")


def test_every_argument_of_fit_has_a_help_text():
    from experiments.cli import ExperimentCLI

    class Parsers(ExperimentCLI):
        def __init__(self) -> None:
            super().__init__([])

        def parse_arguments(self, parser, args):
            raise InterruptedError(self._subcommand_parsers["fit"])

    with pytest.raises(InterruptedError) as caught:
        Parsers()
    unexplained = [a.dest for a in caught.value.args[0]._actions if not a.help]
    assert unexplained == []


def test_a_run_leaves_what_it_promises(llm_train, tiny):
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
    environment = json.loads((RUN / "environment.json").read_text())
    assert environment[0]["seed"] == 5
    assert environment[0]["packages"]["torch"] == torch.__version__


def test_flags_go_over_yaml_and_the_vocabulary_is_linked(llm_train, tiny):
    llm_train("fit", "-c", tiny(), "--optimizer.lr=0.5", "--model.n_layer", "1", "--trainer.max_steps=2")
    config = yaml.safe_load((RUN / "config.yaml").read_text())
    assert config["optimizer"]["init_args"]["lr"] == 0.5
    assert config["model"]["init_args"]["n_layer"] == 1
    assert config["trainer"]["max_steps"] == 2
    assert config["run"] == {"name": "tiny", "root": "runs", "topic": "decoder_pretrain", "study": None}
    model = weights(RUN / "checkpoints/last.ckpt")
    assert model["decoder.token_embedding.weight"].shape[0] == 257  # 256 bytes and the end of text
    assert model["decoder.position_embedding.weight"].shape[0] == 16


def test_the_schedule_knows_the_length_of_the_run_and_decay_spares_vectors(llm_train, tiny):
    llm_train("fit", "-c", tiny(trainer__max_steps=6), "--lr_scheduler.warmup", "2", "--lr_scheduler.final", "0.5")
    checkpoint = torch.load(RUN / "checkpoints/last.ckpt", weights_only=True)
    assert checkpoint["lr_schedulers"][0]["_last_lr"] == pytest.approx([0.005, 0.005])  # the end: half the peak
    assert [group["weight_decay"] for group in checkpoint["optimizer_states"][0]["param_groups"]] == [0.1, 0.0]


def test_a_trial_run_leaves_nothing(llm_train, tiny):
    assert llm_train("fit", "-c", tiny(), "--trainer.fast_dev_run", "true").code == 0
    assert not RUN.exists() or not any(RUN.iterdir())


def test_testing_a_checkpoint_writes_beside_the_run_and_keeps_its_configuration(llm_train, tiny):
    llm_train("fit", "-c", tiny())
    before = (RUN / "config.yaml").read_bytes()
    tested = llm_train(
        "test", "-c", RUN / "config.yaml", "--ckpt_path", "best", "--data.test_source", "datamodules.sources.TextFiles",
        "--data.test_source.paths", "text.txt",
    )  # fmt: skip
    assert tested.code == 0, tested.err
    assert "test/bits_per_byte" in tested.err
    assert (RUN / "config.yaml").read_bytes() == before
    assert (RUN / "config_test.yaml").is_file()
    assert set(json.loads((RUN / "summary_test.json").read_text())["metrics"]) == {
        "test/loss",
        "test/perplexity",
        "test/bits_per_byte",
    }


def test_generate_streams_the_same_text_for_the_same_seed(llm_train, tiny):
    llm_train("fit", "-c", tiny())
    options = ("generate", "--run", RUN, "--prompt", "ae", "--max_new_tokens", "40", "--seed")
    first, again, other = (llm_train(*options, seed).out for seed in ("1", "1", "2"))
    assert first.startswith("ae")
    assert len(first) > 20
    assert first == again
    assert first != other


def test_schema_and_completion():
    # In processes of their own: they describe every class that is loaded, and tests load a great many.
    def printed(*arguments: str) -> str:
        command = [sys.executable, "-m", "experiments", *arguments]
        return subprocess.run(command, cwd=ROOT, capture_output=True, check=True, text=True).stdout

    assert {"model", "data", "optimizer", "trainer"} <= set(json.loads(printed("schema"))["properties"])
    assert "llm-train" in printed("completion", "bash")


def mistakes(tmp_path: Path) -> None:
    (tmp_path / "empty.txt").write_text("")
    (tmp_path / "short.txt").write_text("too short")
    (tmp_path / "latin1.txt").write_bytes(b"caf\xe9 " * 100)
    (tmp_path / "broken.yaml").write_text("model: [\n")


SOURCE = "--data.source.paths"
WRONG = {
    "unknown flag": (["--trainer.max_epoch", "3"], 2, "unrecognized arguments: --trainer.max_epoch", "max_epochs"),
    "unknown option of a class": (["--model.n_layerz", "3"], 2, "Option 'n_layerz' is not accepted", "'n_layer'"),
    "wrong type": (["--model.n_layer", "many"], 2, "model.n_layer", "expected int, got many"),
    "no such class": (["--model", "lightning_modules.decoder_pretrain.Pretrain"], 2, "has no attribute 'Pretrain'", ""),
    "no such file": (["-c", "missing.yaml"], 2, "missing.yaml", "does not exist"),
    "no YAML": (["-c", "broken.yaml"], 2, "broken.yaml: ", "line 2"),
    "heads do not divide": (["--model.n_head", "3"], 1, "n_embd=16 is not divisible by n_head=3", ""),
    "vocabulary disagrees": (["--model.vocab_size", "100"], 1, "model.vocab_size: the YAML says 100", "257"),
    "impossible schedule": (["--lr_scheduler.final", "2"], 1, "lr_scheduler: final must be between 0 and 1, got 2", ""),
    "no text": ([SOURCE, "missing.txt"], 1, "missing.txt", "not found"),
    "empty text": ([SOURCE, "empty.txt"], 1, "empty.txt", "is empty"),
    "text not UTF-8": ([SOURCE, "latin1.txt"], 1, "latin1.txt", "byte 3"),
    "text too short": ([SOURCE, "short.txt"], 1, "fewer than a block", "block_size 16"),
    "no such run": (["--ckpt_path", "last"], 1, "no run runs/decoder_pretrain/tiny to continue", ""),
    "no such checkpoint": (["--ckpt_path", "lost.ckpt"], 1, "lost.ckpt does not exist", ""),
    "no network": (
        ["--data.source", "datamodules.sources.HubText", "--data.source.dataset", "no/such"],
        1,
        "no/such",
        "offline.yaml",
    ),
}


@pytest.mark.parametrize(("flags", "code", "what", "hint"), WRONG.values(), ids=WRONG.keys())
def test_a_mistake_costs_one_line(llm_train, tiny, tmp_path, flags, code, what, hint):
    mistakes(tmp_path)
    done = llm_train("fit", "-c", tiny(), *flags)
    assert done.code == code
    error = done.err.strip().splitlines()[-1]
    assert error.startswith("error: ")
    assert what in error
    assert hint in error
    assert "Traceback" not in done.err
    assert not list(tmp_path.glob("runs/*/*/checkpoints/*"))


def test_a_mistake_in_a_file_is_found_by_its_line(llm_train, tiny):
    config = tiny()
    config.write_text(config.read_text().replace("n_embd: 16", "n_emdb: 16"))
    line = next(n for n, row in enumerate(config.read_text().splitlines(), start=1) if "n_emdb" in row)
    error = llm_train("fit", "-c", config).err
    assert f"{config}, line {line}: " in error
    assert "did you mean 'n_embd'?" in error


def test_messages_of_the_parser_are_cut_down_to_the_reason():
    message = "Parser key \"trainer.max_steps\":\n  Expected a <class 'int'>. Got value: many\n  Given value type: str"
    assert one_line(message, [], []) == "trainer.max_steps: expected int, got many"


class Malicious:
    def __reduce__(self):
        return Path.touch, (Path("it_ran"),)


def damage(checkpoint: Path, how: str) -> str:
    """Makes a bad checkpoint in place of a good one; returns what the error must say."""
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
        pickled = pickle.dumps({"state_dict": Malicious()}, protocol=2)
        with zipfile.ZipFile(checkpoint) as whole:
            parts = {name: whole.read(name) for name in whole.namelist()}
        with zipfile.ZipFile(checkpoint, "w") as archive:
            for name, part in parts.items():
                archive.writestr(name, pickled if name.endswith("data.pkl") else part)
        return "pickled code"
    if how == "a bare pickle":
        checkpoint.write_bytes(pickle.dumps(Malicious()))
        return "not a checkpoint"
    saved = torch.load(checkpoint, weights_only=True)
    if how == "another topic":
        saved["module_class"] = "lightning_modules.bpe.BPEModule"
    else:
        saved["state_dict"]["decoder.final_norm.weight"] = torch.ones(7)
    torch.save(saved, checkpoint)
    return "is of lightning_modules.bpe.BPEModule" if how == "another topic" else "does not fit the model"


@pytest.mark.parametrize(
    "how", ["truncated", "flipped", "pickled code in a zip", "a bare pickle", "another topic", "another size"]
)
def test_a_bad_checkpoint_is_refused_and_runs_nothing(llm_train, tiny, how):
    config = tiny(trainer__max_steps=8)
    llm_train("fit", "-c", config)
    last = RUN / "checkpoints/last.ckpt"
    reason = damage(last, how)
    done = llm_train("fit", "-c", config, "--ckpt_path", "last")
    assert done.code == 1
    assert reason in done.err.splitlines()[-1]
    assert not Path("it_ran").exists()
    if how not in ("another topic", "another size"):
        generated = llm_train("generate", "--run", RUN, "--prompt", "a", "--checkpoint", "last")
        assert generated.code == 1
        assert reason in generated.err.splitlines()[-1]


def test_a_full_disk_keeps_the_earlier_checkpoint(llm_train, tiny, monkeypatch):
    from lightning_modules.runtime import checkpoint_io

    writes = []
    sync = checkpoint_io.os.fsync

    def full(descriptor: int) -> None:
        writes.append(1)
        if len(writes) > 2:  # the first validation's best and last fit on the disk
            raise OSError(28, "No space left on device")
        sync(descriptor)

    monkeypatch.setattr(checkpoint_io.os, "fsync", full)
    done = llm_train("fit", "-c", tiny())
    assert done.code == 1
    error = done.err.strip().splitlines()[-1]
    assert "No space left on device" in error
    assert "the earlier one is whole" in error
    saved = checkpoint_io.AtomicCheckpointIO().load_checkpoint(RUN / "checkpoints/last.ckpt")
    assert saved["global_step"] == 8
    assert sorted(path.name for path in (RUN / "checkpoints").iterdir()) == ["best.ckpt", "last.ckpt"]


def test_a_run_folder_that_fails_before_it_writes_is_removed(llm_train, tiny, monkeypatch):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    done = llm_train("fit", "-c", tiny(), "--trainer.accelerator", "cuda")
    assert done.code == 1
    assert not RUN.exists()
