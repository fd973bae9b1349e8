"""What the one line of a wrong value or a wrong YAML says."""

from pathlib import Path

import pytest
from helpers import TINY

FREEZE, LORA = "lightning_modules.finetuning.freeze.GradualUnfreezing", "lightning_modules.finetuning.lora.LoRA"
MODULE = f"lightning_modules.{TINY.parent.name}.PretrainModule"
ADAMW = "optimizer:\n  class_path: torch.optim.AdamW\n"


@pytest.mark.parametrize(
    ("yaml", "said"),
    [
        (
            "data:\n  tokenizer: no\n",
            "line 2: data.tokenizer: {data}; expected str, got False, as YAML reads yes, no, ",
        ),
        (
            f"model:\n  class_path: {MODULE}\n  args: {{n_layer: 2}}\n",
            "line 3: model: args is no key beside class_path ",
        ),
        (
            f"{ADAMW}  init_arg: {{lr: 1}}\n",
            "line 3: optimizer: init_arg is no key beside class_path (did you mean 'init",
        ),
        (f"{ADAMW}  init_args:\n    lr: 0,003\n", "line 4: optimizer.lr: expected float, got 0,003\n"),
        (f"{ADAMW}  init_args:\n\tlr: 1\n", "line 4: found a tab; use spaces\n"),
        ("trainer:\n  max_steps: 3\n\tmax_epochs: 1\n", "line 3: found a tab; use spaces\n"),
    ],
)
def test_a_wrong_yaml(llm_train, tiny, yaml, said):
    Path("wrong.yaml").write_text(yaml)
    data = f"datamodules.{TINY.parent.name}.PretrainDataModule"
    error = llm_train("fit", "-c", tiny(), "-c", "wrong.yaml").err
    assert error.startswith(f"error: wrong.yaml, {said.replace('{data}', data)}")
    assert error.count("\n") == 1


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (["--optimizer.lr="], "--optimizer.lr: expected float, got nothing\n"),
        (["--optimizer.lr"], "--optimizer.lr: needs a value\n"),
        (["--run.name", "--trainer.max_steps", "3"], "--run.name: needs a value\n"),
        (["--optimizer.betas", "0.9", "0.95"], "got 0.9: write '[0.9, 0.95]', in quotation marks\n"),
        (
            [f"--trainer.callbacks+={LORA}", "--trainer.callbacks.targets", "*"],
            f"{LORA}; expected list, got *: write '[\"",
        ),
        (
            [f"--trainer.callbacks+={LORA}", "--trainer.callbacks.targets", "[*attn*]"],
            "write '[\"*attn*\"]', in quotation",
        ),
        ([f"--trainer.callbacks+={LORA}", "--trainer.callbacks.rank", "[many]"], "expected int, got a list\n"),
        (
            [f"--trainer.callbacks+={FREEZE}", "--trainer.callbacks.stages", "[{all_but_head:true,epoch:1}]"],
            "'all_but_head:true' is not accepted: a space is missing, write 'all_but_head: true', in quotation marks\n",
        ),
        (  # bash expands the braces
            [f"--trainer.callbacks+={FREEZE}", "--trainer.callbacks.stages", "[all_but_head:true]", "[epoch:1]"],
            "a space is missing, write 'all_but_head: true', in quotation marks\n",
        ),
        (["--seed_everything", "-5"], "error: --seed_everything: -5 does not conform to restriction v>=0\n"),
        (
            ["--model=mine.Plain"],
            "derive it from lightning_modules.base.ExperimentModule, see experiments/guides/your_mod",
        ),
    ],
)
def test_a_wrong_flag(llm_train, tiny, flags, said):
    Path("mine.py").write_text("import lightning as L\nclass Plain(L.LightningModule): ...\n")
    done = llm_train("fit", "-c", tiny(), *flags)
    assert (done.code, said in done.err, done.err.count("\n")) == (2, True, 1), done.err


def test_flags_follow_the_command(llm_train):
    done = llm_train("--trainer.max_steps", "3", "fit", "-c", "first.yaml")
    said = "error: --trainer.max_steps: flags follow the command, llm-train fit --trainer.max_steps ...\n"
    assert (done.code, done.err) == (2, said)
