"""The export of a run: by default, once, also after an interruption, and not where there is nothing to export."""

import pytest
from helpers import LAST, RUNS, weights

from datamodules.tokenizers import byte_tokenizer
from lightning_modules.base import ExperimentModule
from lightning_modules.common.files import read_json
from lightning_modules.runtime import export
from lightning_modules.runtime.learning_curve import read_metric

EXPORT = {"class_path": "lightning_modules.runtime.export.ExportModel"}


@pytest.mark.slow
def test_a_configuration_that_names_default_callbacks_again_sets_their_arguments(llm_train, tiny, monkeypatch):
    exported, export_model = [], export.export_model
    monkeypatch.setattr(export, "export_model", lambda *given: exported.append(given) or export_model(*given))
    licensed = EXPORT | {"init_args": {"licence": "mit"}}
    worst = {
        "class_path": "lightning_modules.runtime.checkpoint.RunCheckpoint",
        "init_args": {"monitor": "val/loss", "mode": "max"},
    }
    done = llm_train("fit", "-c", tiny(**{"trainer__callbacks+": [EXPORT, worst, licensed]}))
    assert done.code == 0, done.err
    assert len(exported) == 1
    _, losses = read_metric(RUNS / "tiny/metrics.csv", "val/loss")
    assert read_json(RUNS / "tiny/summary.json", {})["best"]["value"] == pytest.approx(max(losses))
    card = (RUNS / "tiny/model/README.md").read_text()
    assert "license: mit\n" in card
    assert "| context | 16 tokens |" in card


@pytest.mark.slow
def test_a_run_that_was_killed_is_generated_from_and_exported_when_it_is_resumed(llm_train, forked, tiny):
    from forks import die_after_step

    config = tiny()
    assert forked("fit", "-c", config, prepare=lambda: die_after_step(16)) < 0
    run = RUNS / "tiny"
    assert not (run / "model").exists()
    generated = llm_train("generate", "--run", run, "--prompt", "a", "--max_new_tokens", "2")
    assert generated.code == 0, generated.err
    assert llm_train("fit", "-c", config, "--ckpt_path", "last").code == 0
    (run / "model/model.safetensors").unlink()
    assert llm_train("fit", "-c", config, "--ckpt_path", "last").code == 0  # nothing is left to train
    assert not (run / "model/model.safetensors").exists()
    (run / "model").rename("away")
    assert llm_train("fit", "-c", config, "--ckpt_path", "last").code == 0
    assert weights(run / "model/model.safetensors")
    assert (run / LAST).is_file()


@pytest.mark.slow
def test_without_a_checkpoint_there_is_no_model(llm_train, tiny):
    done = llm_train("fit", "-c", tiny(trainer__callbacks=[EXPORT], trainer__enable_checkpointing=False))
    assert done.code == 0, done.err
    assert f"{RUNS}/tiny has no checkpoint, and so no model/" in done.err
    assert not (RUNS / "tiny/model").exists()


@pytest.mark.parametrize(
    ("model_type", "sizes", "context"),
    [
        ("bert", {"max_position_embeddings": 20}, 20),
        ("roberta", {"max_position_embeddings": 20, "pad_token_id": 1}, 18),  # positions begin after the padding's
        ("xlnet", {"d_model": 8, "n_layer": 1, "n_head": 2, "d_inner": 8}, None),
    ],
)
def test_the_context_of_an_exported_model_is_that_of_its_tokenizer(tmp_path, model_type, sizes, context):
    from transformers import AutoConfig, AutoModel, AutoTokenizer

    small = {"vocab_size": 257, "hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2}
    module, tokenizer = ExperimentModule(), byte_tokenizer()
    module.model = AutoModel.from_config(AutoConfig.for_model(model_type, **small | sizes))
    module.save_pretrained = module.model.save_pretrained
    assert export.export_model(module, tokenizer, tmp_path / "model") == context
    exported = AutoTokenizer.from_pretrained(tmp_path / "model")
    assert exported.model_max_length == (context or tokenizer.model_max_length)
