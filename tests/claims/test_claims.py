"""Claims: their files, the verdicts on synthetic records, the tables of READMEs, and the committed records."""

import json
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

import pytest
import yaml

from experiments.claims import command
from experiments.claims.claims_file import claims_files, read_claims
from experiments.claims.judge import judge
from experiments.claims.records import PROVENANCE, make_records, read_records
from experiments.comparison.arms import arms_of
from experiments.errors import UserError
from lightning_modules.common.files import csv_text

ROOT = Path(__file__).parents[2]
EXPERIMENTS = ROOT / "experiments"
TOPICS = sorted(claims_files(EXPERIMENTS))
FROM = ["finished", "100", "5", "7", "2030-01-01", "abc", "3.11", "2.13", "2.6", "2 cores"]

DEPTH = {
    "studies": {"depth": {"metrics": ["val/loss", "val/accuracy"], "best": ["val/loss"], "baseline": ["n_layer=1"]}},
    "claims": [
        {
            "name": "deeper_is_better",
            "sentence": "Two layers have a lower loss than one.",
            "source": {"paper": "Someone (2001)", "where": "table 1", "number": -0.9},
            "study": "depth",
            "metric": "val/loss",
            "holds_if": {"difference": {"arms": [{"n_layer": 2}], "against": {"n_layer": 1}, "below": 0}},
            "expected": "holds",
        }
    ],
}
LOSSES = {1: [3.0, 3.1, 3.2], 2: [2.0, 2.1, 2.15]}


def records(losses: Mapping[int, Sequence[float]] = LOSSES, accuracy: float = 0.5, validations: int = 5) -> str:
    """Return records of two depths; the best loss of a run is lower than the last by 0.5."""
    rows = [
        [n_layer, seed, loss, accuracy + loss / 100, loss - 0.5, *FROM[:2], validations, *FROM[3:]]
        for n_layer, values in losses.items()
        for seed, loss in enumerate(values)
    ]
    return csv_text(["model.n_layer", "seed", "val/loss", "val/accuracy", "val/loss, best", *PROVENANCE], rows)


def with_condition(condition: Mapping[str, object], **claim: object) -> dict:
    return {**DEPTH, "claims": [{**DEPTH["claims"][0], "holds_if": condition, **claim}]}


@pytest.fixture
def topic() -> Path:
    """Write a topic with a claim, its records, and a README with their table."""
    folder = Path("experiments/topic")
    (folder / "records").mkdir(parents=True)
    (folder / "studies").mkdir()
    (folder / "records/depth.csv").write_text(records())
    (folder / "claims.yaml").write_text(yaml.safe_dump(DEPTH, sort_keys=False))
    text = "Lower by <!-- claim: deeper_is_better -->1<!-- end -->."
    (folder / "README.md").write_text(f"# Topic\n\n<!-- claims: depth -->\n<!-- end -->\n\n{text}\n")
    sweep = {
        "method": "grid", "name": "depth", "metric": {"name": "val/loss", "goal": "minimize"},
        "parameters": {"model.n_layer": {"values": [1, 2]}, "seed_everything": {"values": [0, 1, 2]}},
        "command": ["${interpreter}", "-m", "experiments", "fit", "-c", "experiments/topic/offline.yaml", "${args}"],
    }  # fmt: skip
    (folder / "studies/depth.yaml").write_text(yaml.safe_dump(sweep, sort_keys=False))
    (folder / "offline.yaml").write_text("model: {class_path: lightning_modules.topic.TopicModule}\n")
    return folder


def verdict_on(condition: Mapping[str, object], text: str, **claim: object) -> tuple[str, str]:
    file = Path("claims.yaml")
    file.write_text(yaml.safe_dump(with_condition(condition, **claim)))
    found = judge("topic", read_claims(file).claims[0], read_records(text, "depth.csv").runs)
    return found.verdict, found.shown


# --- verdicts ---


@pytest.mark.parametrize(
    ("condition", "verdict"),
    [
        ({"every_run": {"at_least": 2.0}}, "holds"),
        ({"every_run": {"at_least": 2.05}}, "does not hold here"),
        ({"every_run": {"at_least": 2.0, "at_most": 2.1}}, "does not hold here"),
        ({"mean": {"above": 1.5, "below": 2.5}}, "holds"),
        ({"mean": {"above": 2.5}}, "does not hold here"),
        ({"mean": {"above": 2.08}}, "not clear"),
        ({"mean": {"of": 2.0, "within": 0.3}}, "holds"),
        ({"mean": {"within_percent": 5}}, "does not hold here"),  # of the paper's number, -0.9
        ({"mean": {"within_percent": 20, "of": 2.1}}, "holds"),
        ({"difference": {"arms": [{"n_layer": 2}], "against": {"n_layer": 1}, "below": 0}}, "holds"),
        ({"difference": {"arms": [{"n_layer": 2}], "against": {"n_layer": 1}, "above": 0}}, "does not hold here"),
        ({"difference": {"arms": [{"n_layer": 2}], "against": {"n_layer": 1}, "below": -1}}, "not clear"),
        ({"difference": {"arms": [{"n_layer": 2}], "against": {"n_layer": 1}, "within": 2}}, "holds"),
        ({"difference": {"arms": [{"n_layer": 2}], "against": {"n_layer": 1}, "within": 0.5}}, "does not hold here"),
        (
            {"difference": {"arms": [{"n_layer": 2}], "against": {"n_layer": 1}, "ratio": True, "below": 0.75}},
            "holds",
        ),
        (
            {"difference": {"arms": [{"n_layer": 2}], "against": {"n_layer": 1}, "ratio": True, "below": 0.5}},
            "does not hold here",
        ),
        ({"order": {"ascending": [{"n_layer": 2}, {"n_layer": 1}]}}, "holds"),
        ({"order": {"ascending": [{"n_layer": 1}, {"n_layer": 2}]}}, "does not hold here"),
        (
            {"order": {"ascending": [{"metric": "val/accuracy", "n_layer": 1}, {"n_layer": 2}, {"n_layer": 1}]}},
            "holds",
        ),
    ],
)
def test_a_condition_and_its_verdict(condition, verdict):
    where = {} if "difference" in condition or "order" in condition else {"n_layer": 2}
    assert verdict_on(condition, records(), where=where)[0] == verdict


def test_the_numbers_are_those_of_the_intervals():
    difference = {"arms": [{"n_layer": 2}], "against": {"n_layer": 1}, "below": 0}
    assert verdict_on({"difference": difference}, records()) == ("holds", "-1.02 ± 0.21")
    assert verdict_on({"difference": {**difference, "below": -0.5}}, records())[1] == "-1.02 ± 0.21"
    assert verdict_on({"difference": {**difference, "ratio": True, "below": 1}}, records())[1].startswith(
        "× 0.672 (0.6"
    )
    assert verdict_on({"every_run": {"at_least": 2}}, records(), where={"n_layer": 2})[1] == "2 to 2.15"


def test_several_differences_are_a_family_and_each_must_be_clear():
    difference = {"arms": [{"n_layer": 2}, {"n_layer": 3}], "against": {"n_layer": 1}}
    below, within = {"difference": {**difference, "below": 0}}, {"difference": {**difference, "within": 2}}
    assert verdict_on(below, records(LOSSES | {3: [1.8, 2.3, 2.7]})) == ("not clear", "-0.8 ± 1.1 (highest of 2)")
    clear = records(LOSSES | {3: [2.3, 2.45, 2.5]})
    assert verdict_on(below, clear) == ("holds", "-0.68 ± 0.23 (highest of 2)")
    lower = records(LOSSES | {3: [1.9, 1.95, 2.0]})
    assert verdict_on(below, lower) == ("holds", "-1.02 ± 0.26 (highest of 2)")  # ± 0.21 alone
    assert verdict_on(within, clear) == ("holds", "-1.02 ± 0.21 (lowest of 2)")


def test_one_run_and_equal_runs_decide_nothing():
    assert verdict_on({"every_run": {"at_least": 1}}, records({2: [2.0]}), where={"n_layer": 2})[0] == "not clear"
    assert verdict_on({"mean": {"above": 1}}, records({2: [2.0, 2.0]}), where={"n_layer": 2})[0] == "not clear"


def test_without_a_seed_one_run_decides():
    file = Path("claims.yaml")
    file.write_text(yaml.safe_dump(with_condition({"mean": {"above": 1}}, where={"n_layer": 2})))
    runs = read_records(records({2: [2.0]}), "depth.csv").runs
    assert judge("topic", read_claims(file).claims[0], runs, is_deterministic=True).verdict == "holds"


def test_best_values_are_judged_only_at_equal_numbers_of_validations():
    difference = {"difference": {"arms": [{"n_layer": 2}], "against": {"n_layer": 1}, "below": 0}}
    assert verdict_on(difference, records(), value="best")[1] == "-1.02 ± 0.21"
    longer = records({1: LOSSES[1]}) + "".join(records({2: LOSSES[2]}, validations=9).splitlines(True)[1:])
    assert verdict_on(difference, longer)[0] == "holds"
    with pytest.raises(UserError, match="unequal numbers of validations"):
        verdict_on(difference, longer, value="best")


def test_runs_that_failed_have_no_value_and_are_not_every_run():
    failed = records().replace("2,2,2.15,0.5215,1.65,finished", "2,2,99,0.5215,99,failed")
    assert verdict_on({"mean": {"below": 3}}, failed, where={"n_layer": 2})[0] == "holds"
    assert verdict_on({"every_run": {"at_most": 100}}, failed, where={"n_layer": 2})[0] == "does not hold here"


@pytest.mark.parametrize(
    ("claim", "message"),
    [
        ({"where": {"depth": 2}}, "the setting 'depth' is none of model.n_layer"),
        ({"where": {"n_layer": 7}}, "0 arms of the records have {'n_layer': 7}"),
        ({"where": {}}, "2 arms of the records have {}"),
        ({"where": {"n_layer": 2}, "metric": "val/f1"}, "no finished run has recorded val/f1 of n_layer=2"),
    ],
)
def test_a_claim_that_the_records_cannot_decide(claim, message):
    with pytest.raises(UserError, match=re.escape(f"topic, claim deeper_is_better: {message}")):
        verdict_on({"mean": {"above": 1}}, records(), **claim)


def test_a_ratio_of_a_value_that_is_not_positive_is_refused():
    ratio = {"arms": [{"n_layer": 2}], "against": {"n_layer": 1}, "ratio": True, "below": 1}
    with pytest.raises(UserError, match=r"val/loss of n_layer=1 is 0 with seed 1; a ratio needs positive values"):
        verdict_on({"difference": ratio}, records({1: [3.0, 0.0], 2: [2.0, 2.1]}))


# --- files ---


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"expected": "maybe"}, "line 26: claims.0.expected: must be 'holds', 'does not hold here' or 'not clear'"),
        ({"study": "width"}, "line 17: claims.0.study: there is no study 'width' in studies:"),
        ({"holds_if": {}}, "line 19: claims.0.holds_if: needs one of every_run, mean, difference, order"),
        (
            {"holds_if": {"mean": {"aboev": 1}}},
            "holds_if.mean.aboev: there is no such key (did you mean 'above'?)",
        ),
        ({"holds_if": {"mean": {"within": 1, "below": 2}}}, "needs above: or below: or both, or within: alone"),
        ({"holds_if": {"mean": {"within_percent": 5, "above": 2, "of": 3}}}, "needs above: or below: or both"),
        ({"holds_if": {"mean": {"above": 2, "of": 3}}}, "of: is the value for within: or within_percent:"),
        (
            {"holds_if": {"difference": {"arms": [{}], "against": {}, "ratio": True, "above": 0}}},
            "holds_if.difference.above: must be positive, as a ratio is",
        ),
        ({"name": "Has Spaces"}, "claims.0.name: "),
        (
            {"value": "best", "metric": "val/accuracy"},
            "claims.0.value: depth does not record the best val/accuracy",
        ),
        (
            {"holds_if": {"mean": {"within": 1}}, "source": {"paper": "A"}},
            "holds_if.mean: needs of:, or a number",
        ),
    ],
)
def test_a_mistake_in_the_file_is_one_line(topic, llm_train, change, message):
    (topic / "claims.yaml").write_text(
        yaml.safe_dump({**DEPTH, "claims": [{**DEPTH["claims"][0], **change}]}, sort_keys=False)
    )
    done = llm_train("claims", "--check")
    (line,) = done.err.splitlines()
    assert (done.code, line.startswith("error: experiments/topic/claims.yaml, line ")) == (1, True)
    assert message in line


@pytest.mark.parametrize(
    ("best", "message"),
    [
        ("val/f1", "val/f1 is not in metrics:"),
        ("val/gap", "the name of val/gap does not say whether small or large values are good"),
    ],
)
def test_the_best_value_is_of_a_recorded_metric_whose_direction_is_known(best, message):
    study = DEPTH["studies"]["depth"] | {"metrics": ["val/loss", "val/gap"], "best": [best]}
    Path("claims.yaml").write_text(yaml.safe_dump(DEPTH | {"studies": {"depth": study}}))
    with pytest.raises(UserError, match=re.escape(f"studies.depth.best: {message}")):
        read_claims(Path("claims.yaml"))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a,b\n1,2\n", "depth.csv: lacks columns of records"),
        (records() + "1,2\n", "depth.csv, line 8: has not as many cells as the header"),
        (records().replace("3.1,", "x,", 1), "depth.csv, line 3: could not convert string to float: 'x'"),
    ],
)
def test_damaged_records(text, message):
    with pytest.raises(UserError, match=re.escape(message)):
        read_records(text, "depth.csv")


def study_of(topic: Path) -> command.ClaimedStudy:
    return command.ClaimedStudy(topic, "depth", read_claims(topic / "claims.yaml").studies["depth"])


def write_runs(root: Path, losses: Mapping[int, Sequence[float]] = LOSSES) -> Path:
    """Write the folder of a study: a journal, and a folder for each run."""
    folder = root / "topic/depth"
    folder.mkdir(parents=True)
    lines = []
    for n_layer, values in losses.items():
        for seed, loss in enumerate(values):
            run = folder / f"n_layer={n_layer},seed={seed}"
            run.mkdir()
            config = {"seed_everything": seed, "model": {"class_path": "a.B", "init_args": {"n_layer": n_layer}}}
            (run / "config.yaml").write_text(yaml.safe_dump(config))
            (run / "metrics.csv").write_text(
                csv_text(["step", "epoch", "val/loss", "val/accuracy"], [[50, 0, loss - 0.5, 0.4], [100, 0, loss, 0.5]])
            )
            summary = {"status": "finished", "error": None, "step": 100, "seconds": 6.7}
            (run / "summary.json").write_text(json.dumps(summary))
            packages = {"torch": "2.13", "lightning": "2.6"}
            session = {"started": "2030-01-01T00:00:00+00:00", "commit": "abc", "python": "3.11", "packages": packages}
            hardware = {"devices": [], "cpu_count": 2, "processor": "x86_64", "threads": 1}
            (run / "environment.json").write_text(json.dumps([session | hardware]))
            settings = {"model.n_layer": n_layer, "seed_everything": seed}
            for attribute in ({"settings": settings}, {"arm": run.name}):
                lines.append(json.dumps({"op_code": 8, "trial_id": len(lines) // 2, "user_attr": attribute}))
    (folder / "journal.log").write_text("\n".join(lines) + "\n")
    return folder


def test_records_are_made_of_run_folders(topic, llm_train):
    shutil.rmtree(write_runs(Path("elsewhere")) / "n_layer=2,seed=2")
    done = llm_train("claims", "topic", "--record", "--runs", "elsewhere")
    assert done.out == "experiments/topic/records/depth.csv: 5 runs\n"
    header, first, *_ = (topic / "records/depth.csv").read_text().splitlines()
    assert header == ",".join(["model.n_layer,seed,val/loss,val/accuracy", '"val/loss, best"', *PROVENANCE])
    assert done.err == "left out elsewhere/topic/depth/n_layer=2,seed=2: it has not ended, or its folder was removed\n"
    assert first == '1,0,3,0.5,2.5,finished,100,2,7,2030-01-01,abc,3.11,2.13,2.6,"2 cores of x86_64, 1 in use"'


def test_records_show_values_that_look_alike_in_names_of_arms(topic):
    values = ["torch.optim.SGD", "mine.SGD", "torch.optim.Adam", {"class_path": "mine.Own", "lr": 0.1}, None]
    parameters = {"optimizer": {"parameters": {"of": {"values": values}}}, "seed_everything": {"values": [0]}}
    file = topic / "studies/depth.yaml"
    file.write_text(yaml.safe_dump(yaml.safe_load(file.read_text()) | {"parameters": parameters}))
    folder = write_runs(Path("runs"), {i: [3.0 + i] for i in range(5)})
    settings = [{"optimizer": {"of": value}, "seed_everything": 0} for value in values]
    lines = [{"trial_id": i, "user_attr": {"settings": each}} for i, each in enumerate(settings)]
    lines += [{"trial_id": i, "user_attr": {"arm": f"n_layer={i},seed=0"}} for i in range(5)]
    (folder / "journal.log").write_text("".join(f"{json.dumps(line)}\n" for line in lines))
    found = read_records(make_records(folder, study_of(topic).spec, study_of(topic).sweep), "depth")
    shown = {row["optimizer.of"]: row["val/loss"] for row in found.rows}
    whole = json.dumps(values[3])
    assert shown == {"torch.optim.SGD": "3", "mine.SGD": "4", "Adam": "5", whole: "6", "null": "7"}


@pytest.mark.parametrize(
    ("key", "value"), [("command", ["${args}", "--run.topic=topic"]), ("parameters", {"lr": {"values": [1]}})]
)
def test_a_sweep_file_that_has_changed_since_its_study_began_gets_no_records(topic, llm_train, key, value):
    folder, file = write_runs(Path("runs")), topic / "studies/depth.yaml"
    sweep = yaml.safe_load(file.read_text())
    with (folder / "journal.log").open("a") as journal:
        journal.write(json.dumps({"op_code": 2, "user_attr": {"asked": sweep}}) + "\n")
    assert llm_train("claims", "topic", "--record").code == 0
    file.write_text(yaml.safe_dump(sweep | {key: value}))
    done = llm_train("claims", "topic", "--record")
    assert (done.code, done.err.count("\n")) == (1, 1)
    assert f"runs/topic/depth was begun with other {key} than experiments/topic/studies/depth.yaml has now" in done.err


def test_records_need_finished_runs_with_the_metrics(topic):
    study = study_of(topic)
    folder = write_runs(Path("runs"))
    file = folder / "n_layer=1,seed=0/metrics.csv"
    file.write_text(file.read_text().replace("val/accuracy", "val/f1"))
    with pytest.raises(UserError, match=r"n_layer=1,seed=0: has logged no val/accuracy"):
        make_records(folder, study.spec, study.sweep)
    for summary in folder.glob("*/summary.json"):
        summary.unlink()
    with pytest.raises(UserError, match="no run of this study has finished"):
        make_records(folder, study.spec, study.sweep)


def test_a_run_that_was_resumed_with_another_setting_has_no_record(topic, llm_train):
    run = write_runs(Path("runs")) / "n_layer=1,seed=0"
    sessions = json.loads((run / "environment.json").read_text())
    resumed = {"checkpoint": "last.ckpt", "step": 50, "changed": {"optimizer.lr": [0.1, 0.2]}}
    (run / "environment.json").write_text(json.dumps([*sessions, {"resumed": resumed}]))
    done = llm_train("claims", "topic", "--record")
    assert (done.code, done.err) == (
        1,
        f"error: {run}: was resumed with other settings (optimizer.lr 0.1 until step 50 then 0.2), so it is a run of "
        "none of them; remove the folder, and run the study again\n",
    )


# --- the command ---


def test_check_judges_the_committed_records(topic, llm_train):
    done = llm_train("claims", "--check")
    assert (done.code, done.err) == (0, "")
    assert "deeper_is_better                 holds      -1.02 ± 0.21           -0.9\n" in done.out
    assert done.out.endswith("1 claims: the verdicts are as expected\n")
    assert not Path("runs").exists()
    assert llm_train("claims", "topic/depth", "--check").out == done.out


def test_the_command_runs_what_is_missing_and_leaves_a_page(topic, llm_train, monkeypatch):
    asked = []
    monkeypatch.setattr(command.study_command, "main", asked.append)
    write_runs(Path("runs"))
    shutil.rmtree(topic / "records")
    done = llm_train("claims", "topic", "--jobs", "2")
    assert (done.code, done.err) == (0, "")
    assert asked == [["study", "experiments/topic/studies/depth.yaml", "--jobs", "2"]]
    (claim,) = json.loads(Path("runs/claims/claims.json").read_text())
    assert (claim["verdict"], claim["as_expected"], len(claim["runs"])) == ("holds", True, 6)
    assert claim["effects"][0]["value"] == pytest.approx(-1.0167, abs=1e-4)
    page = Path("runs/claims/index.html").read_text()
    assert not re.search(r"(src|href)=\"(?!data:image/png;base64,)|https?://|@import|url\(", page)
    assert "Two layers have a lower loss than one." in page
    assert page.count("data:image/png;base64,") == 1


def test_without_a_name_the_command_lists_the_studies_and_runs_nothing(topic, llm_train, monkeypatch):
    monkeypatch.setattr(command.study_command, "main", lambda _: pytest.fail("it runs"))
    shutil.rmtree(write_runs(Path("runs")) / "n_layer=2,seed=1")
    done = llm_train("claims")
    assert (done.code, done.err) == (0, "")
    assert done.out.splitlines()[2].split() == ["topic/depth", "6", "6", "5", "1"]  # runs, recorded, here, minutes
    assert "llm-train claims --all" in done.out
    assert "leave out the names" in llm_train("claims", "topic", "--all").err
    assert "run nothing: leave it out" in llm_train("claims", "--all", "--check").err
    for options in (("--jobs", "2"), ("--", "--seed_everything=1")):
        assert "give the topics or studies to run, or --all" in llm_train("claims", *options).err


def test_words_after_two_dashes_go_to_the_runs(topic, llm_train, monkeypatch):
    asked = []
    monkeypatch.setattr(command.study_command, "main", asked.append)
    monkeypatch.setattr(command, "write_page", lambda *_: None)
    write_runs(Path("elsewhere"))
    words = ["--data.source.path", "my texts"]
    assert llm_train("claims", "topic", "--runs", "elsewhere", "--", *words).code == 0
    study = ["study", "experiments/topic/studies/depth.yaml"]
    assert asked == [[*study, "--jobs", "1", "--run.root=elsewhere", "--", *words]]
    refused = llm_train("claims", "--check", "--", *words)
    assert refused.code == 2
    assert "--data.source.path my texts: is for runs" in refused.err


def test_what_a_study_starts_from_runs_first_and_its_runs_are_tested(topic, llm_train, tiny, monkeypatch):
    asked = []
    monkeypatch.setattr(command.study_command, "main", lambda words: asked.append(words[0]))
    monkeypatch.setattr(command, "_run", asked.append)
    claims = {**DEPTH, "studies": {"depth": {**DEPTH["studies"]["depth"], "first": ["topic/offline"], "test": True}}}
    (topic / "claims.yaml").write_text(yaml.safe_dump(claims))
    folder = write_runs(Path("runs"), {1: LOSSES[1], 2: LOSSES[2][:2]})
    for seed, status in ((0, "finished"), (1, "failed"), (2, "stopped")):
        (folder / f"n_layer=1,seed={seed}/summary_test.json").write_text(json.dumps({"status": status, "metrics": {}}))
    llm_train("claims", "--all")
    runs = [f"runs/topic/depth/n_layer={n},seed={seed}/config.yaml" for n, seed in ((1, 1), (1, 2), (2, 0), (2, 1))]
    tests = [["test", "-c", config, "--ckpt_path", "best"] for config in runs]
    assert asked == [["fit", "-c", "topic/offline", "--auto_resume"], "study", *tests]
    assert llm_train("fit", "-c", tiny(), *asked[0][3:], "--print_config").code == 0


@pytest.mark.parametrize(("ends_with", "code"), [("exit 130", 130), ("exit 0", 130), ("kill -KILL $$", 137)])
def test_ctrl_c_leaves_a_run_the_time_to_save(tmp_path, monkeypatch, ends_with, code):
    class Interrupted(subprocess.Popen):
        n_waits = 0

        def wait(self, timeout: float | None = None) -> int:
            self.n_waits += 1
            if self.n_waits == 1:
                raise KeyboardInterrupt
            return super().wait(timeout)

    program = tmp_path / "python"
    program.write_text(f"#!/bin/sh\ntouch {tmp_path}/saved\n{ends_with}\n")
    program.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(program))
    monkeypatch.setattr(subprocess, "Popen", Interrupted)
    with pytest.raises(BaseException) as ended:  # noqa: PT011 (KeyboardInterrupt would end the tests)
        command._run(["fit"])
    assert ended.type is SystemExit
    assert ended.value.code == code
    assert (tmp_path / "saved").is_file()


def test_a_study_with_needs_runs_only_by_name_and_is_judged_by_its_records(topic, llm_train, monkeypatch):
    asked = []
    monkeypatch.setattr(command.study_command, "main", lambda words: asked.append(words[0]))
    monkeypatch.setattr(command, "write_page", lambda *_: None)
    claims = {**DEPTH, "studies": {"depth": {**DEPTH["studies"]["depth"], "needs": "the hub"}}}
    (topic / "claims.yaml").write_text(yaml.safe_dump(claims))
    write_runs(Path("runs"))
    for names in (("--all",), ("topic",)):
        left_out = "left out: topic/depth needs the hub; it runs if its own name is given"
        assert left_out in llm_train("claims", *names).err
    assert asked == []
    assert "holds" in llm_train("claims", "topic/depth").out
    assert asked == ["study"]
    assert "holds" in llm_train("claims", "--check").out


@pytest.mark.parametrize(("code", "out"), [(1, "holds"), (143, "")])
def test_a_run_that_fails_is_judged_and_a_signal_ends_the_command(topic, llm_train, monkeypatch, code, out):
    monkeypatch.setattr(command.study_command, "main", lambda _: exit(code))
    monkeypatch.setattr(command, "write_page", lambda *_: None)
    write_runs(Path("runs"))
    done = llm_train("claims", "--all")
    assert (done.code, out in done.out) == (0 if code == 1 else code, True)
    assert Path("runs/claims/claims.json").exists() == (code == 1)


def test_a_verdict_that_is_not_expected_exits_with_1(topic, llm_train):
    (topic / "records/depth.csv").write_text(records({1: LOSSES[2], 2: LOSSES[1]}))
    done = llm_train("claims", "--check")
    assert done.code == 1
    assert done.out.splitlines()[2].startswith("✗ deeper_is_better")
    assert done.err == (
        "error: 1 of 1 verdicts are not the expected ones: "
        "topic, deeper_is_better: does not hold here, expected holds\n"
    )


def test_records_are_required_unless_they_are_pending(topic, llm_train):
    pending = with_condition(DEPTH["claims"][0]["holds_if"], records="pending")
    (topic / "claims.yaml").write_text(yaml.safe_dump(pending))
    assert llm_train("claims", "--check").err == (
        "error: these claims have records; remove `records: pending`: topic, deeper_is_better\n"
    )
    (topic / "records/depth.csv").unlink()
    assert llm_train("claims", "--check").out.endswith("1 claims: the verdicts are as expected, 1 without records\n")
    (topic / "claims.yaml").write_text(yaml.safe_dump(DEPTH))
    assert "no records, expected holds" in llm_train("claims", "--check").err


def test_a_topic_in_the_working_folder_has_claims_too(topic, llm_train):
    Path("mine").mkdir()
    for name in ("claims.yaml", "README.md", "records", "studies"):
        (topic / name).rename(Path("mine", name))
    assert llm_train("claims", "mine", "--write").out == "mine/README.md\n"
    done = llm_train("claims", "mine", "--check")
    assert done.out.endswith("1 claims: the verdicts are as expected\n"), done.err
    assert "mine/depth" in llm_train("claims").out


def test_a_name_that_has_no_claims(topic, llm_train):
    done = llm_train("claims", "topic/width", "--check")
    message = "error: claims topic/width: no topic and no study has claims of this name; there is topic, topic/depth\n"
    assert (done.code, done.err) == (1, message)


def test_arms_that_differ_in_their_file_alone_keep_its_name():
    text = records().replace("model.n_layer", "config", 1)
    arms = arms_of(read_records(text, "depth.csv").runs)
    assert [arm.label for arm in arms] == ["config=1", "config=2"]


# --- the tables of a README ---


def test_tables_are_written_between_their_comments(topic, llm_train):
    assert llm_train("claims", "--write").out == "experiments/topic/README.md\n"
    text = (topic / "README.md").read_text()
    assert text.startswith("# Topic\n\n<!-- claims: depth -->\n\n| n_layer | n | val/loss, last |")
    assert "| n_layer=2 | n_layer=1 | val/loss, last | -1.02 ± 0.21 | better | Welch, 3 and 3 runs |\n" in text
    assert "| Two layers have a lower loss than one. | holds | -1.02 ± 0.21 | -0.9 | Someone (2001), table 1 |" in text
    assert "6 runs, 2030-01-01, commit abc, Python 3.11, torch 2.13, Lightning 2.6, 2 cores; " in text
    assert text.endswith(".\n\n<!-- end -->\n\nLower by <!-- claim: deeper_is_better -->-1.02 ± 0.21<!-- end -->.\n")
    assert llm_train("claims", "--write").out == ""  # it is up to date


@pytest.mark.parametrize(
    ("file", "old", "new"),
    [
        ("README.md", "-1.02 ± 0.21 | better", "-1.03 ± 0.21 | better"),
        ("README.md", "-1.02 ± 0.21<", "-1.03 ± 0.21<"),
        ("records/depth.csv", "2.15,", "2.151,"),
        ("records/depth.csv", "abc", "abd"),
        ("claims.yaml", "number: -0.9", "number: -1.0"),
        ("claims.yaml", "below: 0", "below: -2"),
    ],
)
def test_a_figure_that_is_falsified_by_hand_is_found(topic, llm_train, file, old, new):
    llm_train("claims", "--write")
    assert up_to_date(Path("experiments"), "topic")
    text = (topic / file).read_text()
    assert old in text
    (topic / file).write_text(text.replace(old, new, 1))
    assert not up_to_date(Path("experiments"), "topic")


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("claim: deeper", "claim: wider", "README.md: there is no claim wider_is_better in claims.yaml"),
        ("<!-- end -->", "", "README.md, line 3: the table of depth has no <!-- end -->"),
        ("claims: depth", "claims: width", "README.md: width has no records in records/width.csv"),
    ],
)
def test_a_table_that_cannot_be_written(topic, llm_train, old, new, message):
    file = topic / "README.md"
    file.write_text(file.read_text().replace(old, new))
    done = llm_train("claims", "--write")
    assert (done.code, done.err) == (1, f"error: experiments/topic/{message}\n")


def up_to_date(folder: Path, name: str) -> bool:
    """Return whether the tables of a README are those of the records and claims."""
    return command.filled(folder / name, read_claims(folder / name / "claims.yaml")) == (
        folder / name / "README.md"
    ).read_text(encoding="utf-8")


# --- what is committed ---


def test_the_committed_records_give_the_expected_verdicts(llm_train, monkeypatch):
    monkeypatch.chdir(ROOT)
    began = time.perf_counter()
    done = llm_train("claims", "--check")
    assert (done.code, done.err) == (0, "")
    assert time.perf_counter() - began < 20
    assert max(map(len, done.out.splitlines())) <= 80


@pytest.mark.parametrize("name", TOPICS)
def test_the_tables_of_a_readme_are_those_of_its_records(name):
    assert up_to_date(EXPERIMENTS, name), f"run `llm-train claims {name} --write`"


@pytest.mark.parametrize("name", TOPICS)
def test_every_record_decides_a_claim_and_every_study_exists(name):
    topic = read_claims(EXPERIMENTS / name / "claims.yaml")
    recorded = {file.stem for file in (EXPERIMENTS / name / "records").glob("*")}
    assert recorded <= {claim.study for claim in topic.claims} == set(topic.studies)
    for key, study in topic.studies.items():
        assert (EXPERIMENTS / name / "studies" / f"{study.file or key}.yaml").is_file()
        assert {claim.metric for claim in topic.claims if claim.study == key} <= set(study.metrics)
