"""Run folders with a file that is damaged, missing or of another kind: one line that names it. Found by the fuzz."""

import shutil

import pytest
from helpers import RUNS

NOT_UTF_8 = b"\xff\xfea\x00"
VALIDATE = ("validate", "--ckpt_path=best")
RESUME = ("fit", "--ckpt_path=last", "--trainer.max_steps=10")
AGAIN = ("fit", "--auto_resume")
GENERATE = ("generate", "--prompt=a")


@pytest.mark.parametrize(
    ("command", "file", "content", "said"),
    [
        (VALIDATE, "config.yaml", NOT_UTF_8, "is not UTF-8"),
        (VALIDATE, "config.yaml", b"a: [", "config.yaml"),
        (VALIDATE, "config.yaml", b"a: 2026-13-45", "month must be in 1..12"),
        (VALIDATE, "config.yaml", b"a: " + b"9" * 5000, "config.yaml: Exceeds the limit"),
        (VALIDATE, "environment.json", b"{", "environment.json is damaged"),
        (RESUME, "environment.json", NOT_UTF_8, "environment.json is damaged"),
        (RESUME, "environment.json", b"{}", "environment.json is damaged (it holds no list)"),
        (RESUME, "environment.json", b"[" * 100_000, "environment.json is damaged"),
        (AGAIN, "summary.json", b"{", "summary.json is damaged"),
        (AGAIN, "summary.json", b"[]", "summary.json is damaged (it holds no dict)"),
        (GENERATE, "tokenizer/tokenizer.json", b"{}", "tokenizer.json could not be read"),
        (GENERATE, "tokenizer/tokenizer_config.json", b"{", "could not be read"),
    ],
    ids=lambda value: str(value)[:40],
)
def test_a_damaged_file_of_a_run_is_named_in_one_line(llm_train, whole, command, file, content, said):
    run = RUNS / "tiny"
    shutil.copytree(whole(trainer__max_steps=8), run)
    (run / file).write_bytes(content)
    name, *flags = command
    done = llm_train(name, *(("--run", run) if name == "generate" else ("-c", run / "config.yaml")), *flags)
    errors = [line for line in done.err.splitlines() if line.startswith("error: ")]
    assert (done.code in (1, 2), "Traceback" in done.err) == (True, False), done.err
    assert errors == done.err.splitlines()[-1:]
    assert said in errors[0]


def test_a_summary_without_a_status_is_that_of_an_unfinished_run(llm_train, whole):
    run = RUNS / "tiny"
    shutil.copytree(whole(trainer__max_steps=8), run)
    (run / "summary.json").write_text("{}")
    done = llm_train("fit", "-c", run / "config.yaml", "--auto_resume")
    assert (done.code, "resuming from" in done.err) == (0, True), done.err
