"""The export of a run: by default, once, also after an interruption, and not where there is nothing to export."""

from helpers import LAST, RUNS, weights

from lightning_modules.runtime import export

EXPORT = {"class_path": "lightning_modules.runtime.export.ExportModel"}


def test_a_configuration_that_names_the_default_callback_again_exports_once(llm_train, tiny, monkeypatch):
    exported, export_model = [], export.export_model
    monkeypatch.setattr(export, "export_model", lambda *given: exported.append(given) or export_model(*given))
    licensed = EXPORT | {"init_args": {"licence": "mit"}}
    done = llm_train("fit", "-c", tiny(**{"trainer__callbacks+": [EXPORT, licensed]}))
    assert done.code == 0, done.err
    assert len(exported) == 1
    assert "license: mit\n" in (RUNS / "tiny/model/README.md").read_text()


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


def test_without_a_checkpoint_there_is_no_model(llm_train, tiny):
    done = llm_train("fit", "-c", tiny(trainer__callbacks=[EXPORT], trainer__enable_checkpointing=False))
    assert done.code == 0, done.err
    assert f"{RUNS}/tiny has no checkpoint, and so no model/" in done.err
    assert not (RUNS / "tiny/model").exists()
