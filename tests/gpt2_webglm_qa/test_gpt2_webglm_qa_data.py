"""Records, prompts, and rows: what is read, what is cut, and which tokens carry the loss."""

import json
import shlex
from pathlib import Path

import pytest
import torch
import yaml
from hypothesis import given
from hypothesis import strategies as st
from jsonargparse import ArgumentError, ArgumentParser
from lightning.pytorch.utilities.exceptions import MisconfigurationException

from datamodules.gpt2_webglm_qa.cited_answers import HubRecords, JSONLines, Record, RecordSource, arrange, records_of
from datamodules.gpt2_webglm_qa.data import GPT2WebGLMQADataModule
from datamodules.gpt2_webglm_qa.packing import best_fit
from datamodules.gpt2_webglm_qa.prompts import PromptEncoder
from datamodules.gpt2_webglm_qa.python_questions import PythonQuestions
from datamodules.tokenizers import byte_tokenizer
from lightning_modules.common.citation_marks import cited

END = 256  # of the byte tokenizer
LONG = Record("Why?", "As it is [2][1]. So [3].", ("one", "two", "three"))
SHORT = Record("Who?", "Ann [1].", ("Ann did.",))


class Given(RecordSource):
    """Records given in place."""

    def __init__(self, *found: Record, val: tuple[Record, ...] = ()) -> None:
        self.found = {"train": found, "val": val, "test": ()}

    def records(self, side):
        return iter(self.found[side])


def module(*records: Record, stage: str = "fit", **options) -> GPT2WebGLMQADataModule:
    options = {"block_size": 128, "batch_size": 1, "tokenizer": "byte", "max_answer_tokens": 16} | options
    data = GPT2WebGLMQADataModule(Given(*records), **options)
    data.setup(stage)
    return data


def text(ids) -> str:
    return byte_tokenizer().decode(list(ids))


# --- records ---------------------------------------------------------------------------------------------------------


def test_shuffled_references_take_their_marks_along():
    orders = set()
    for seed in range(20):
        record = arrange(LONG, "shuffled", "keep", seed)
        orders.add(record.references)
        assert sorted(record.references) == ["one", "three", "two"]
        assert [record.references[n - 1] for n in cited(record.answer)] == ["two", "one", "three"]
        assert record == arrange(LONG, "shuffled", "keep", seed)
    assert len(orders) == 6


def test_marks_are_renumbered_stripped_or_left_pointing_at_nothing():
    renumbered = arrange(Record("?", "It is [3], not [1]. Never [7].", ("a", "b", "c")), "given", "renumber")
    assert (renumbered.answer, renumbered.references) == ("It is [1], not [2]. Never [7].", ("c", "a", "b"))
    assert arrange(LONG, "given", "strip").answer == "As it is. So."
    assert arrange(LONG, "given", "keep") == LONG
    bare = arrange(LONG, "none", "keep")
    assert (bare.answer, bare.references) == (LONG.answer, ())


def write(path: Path, *rows: object) -> Path:
    path.write_text("".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows))
    return path


ROW = {"question": "Who?", "answer": "Ann [1].", "references": ["Ann did."], "more": 1}


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        ('{"question": "Who?",', "line 3: is no JSON object on one line"),
        ('["Who?"]', "line 3: a record must be an object"),
        ({"question": "Who?", "references": []}, "line 3: the record has no field 'answer', only 'question', 'ref"),
        ({"messages": []}, "line 3: the record has no field 'question', only 'messages'; give question, answer and"),
        (ROW | {"answer": None}, "line 3: 'answer' is NoneType, and must be text"),
        (ROW | {"references": {"1": "Ann did."}}, "line 3: 'references' must be a list of texts"),
        (ROW | {"references": ["Ann did.", 2]}, "line 3: 'references' must be a list of texts"),
    ],
)
def test_a_bad_line_is_named(tmp_path, bad, message):
    file = write(tmp_path / "bad.jsonl", ROW, "", bad)
    with pytest.raises(MisconfigurationException, match=message) as caught:
        list(JSONLines(str(file), val_fraction=0).records("train"))
    assert str(caught.value).startswith(f"{file}, line 3: ")
    assert "\n" not in str(caught.value)


def test_a_file_that_is_not_utf_8_or_not_there_is_named(tmp_path):
    (tmp_path / "latin.jsonl").write_bytes(
        json.dumps(ROW, ensure_ascii=False).replace("Ann", "\xc5sa").encode("latin-1")
    )
    with pytest.raises(MisconfigurationException, match=r"latin.jsonl, line 1: is not UTF-8"):
        list(JSONLines(str(tmp_path / "latin.jsonl"), val_fraction=0).records("train"))
    with pytest.raises(MisconfigurationException, match=r"nowhere.jsonl does not exist"):
        list(JSONLines("nowhere.jsonl").records("train"))


@pytest.mark.parametrize("given", ["mine.csv", ["mine.csv"], "*.csv", Path("mine.csv")])
def test_a_file_of_questions_and_answers_is_a_source(tmp_path, given):
    rows = [(f"What is {i}?", f"{i}, or so", "") for i in range(40)] + [("Who?", "Ann [1].", "Ann did.")]
    lines = "".join(f'"{question}","{answer}",{reference}\n' for question, answer, reference in rows)
    Path("mine.csv").write_text(f"question,answer,references\n{lines}")
    found = {side: list(records_of(given).records(side)) for side in ("train", "val", "test")}
    assert found["val"]
    every = [(r.question, r.answer, r.references) for records in found.values() for r in records]
    assert sorted(every) == sorted((q, a, (reference,) if reference else ()) for q, a, reference in rows)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ("hub:", "data.records: 'hub:' names no dataset; give hub:OWNER/NAME"),
        ("https://x.org/a.csv", "data.records: https://x.org/a.csv is a URL; download it"),
        (["a.csv", "hub:nobody/nothing"], "data.records: hub:nobody/nothing is in a list"),
        ("", "data.records is empty"),
    ],
)
def test_a_setting_that_names_no_files_of_this_machine_is_refused(given, message):
    with pytest.raises(MisconfigurationException, match=f"^{message}"):
        records_of(given)


def test_records_need_no_references(tmp_path):
    file = write(tmp_path / "a.jsonl", {"question": "Who?", "answer": "Ann."})
    (record,) = JSONLines(str(file), val_fraction=0).records("train")
    assert record.references == ()


def test_json_lines_are_split_by_question_or_by_file(tmp_path):
    rows = [ROW | {"question": f"Who is {i % 150}?", "answer": f"{i}"} for i in range(200)]
    file = write(tmp_path / "all.jsonl", *rows)
    source = JSONLines(str(file), val_fraction=0.3, test_fraction=0.1)
    sides = {side: list(source.records(side)) for side in ("train", "val", "test")}
    assert sorted(int(r.answer) for found in sides.values() for r in found) == list(range(200))
    questions = {side: {r.question for r in found} for side, found in sides.items()}
    assert not questions["train"] & questions["val"]
    assert not questions["train"] & questions["test"]
    assert not questions["val"] & questions["test"]
    assert 20 < len(questions["val"]) < 70

    val = write(tmp_path / "val.jsonl", ROW)
    own = JSONLines([str(file)], val=str(val), val_fraction=0.3)
    assert len(list(own.records("train"))) == 200
    assert [r.question for r in own.records("val")] == ["Who?"]


def test_records_of_a_dataset_in_the_hubs_form(tmp_path):
    (tmp_path / "data").mkdir()
    for split, n in (("train", 3), ("validation", 2), ("test", 1)):
        write(tmp_path / "data" / f"{split}.jsonl", *[ROW | {"answer": f"{split} {i}"} for i in range(n)])
    source = HubRecords(str(tmp_path / "data"), max_records=2)
    assert [r.answer for r in source.records("train")] == ["train 0", "train 1"]
    assert [r.answer for r in source.records("val")] == ["validation 0", "validation 1"]
    assert next(source.records("test")).references == ("Ann did.",)


def test_without_a_network_the_hub_is_one_line_that_names_the_offline_experiment():
    with pytest.raises(MisconfigurationException, match=r"THUDM/webglm-qa.*offline.yaml need no network") as caught:
        HubRecords().prepare()
    assert "\n" not in str(caught.value)


# --- prompts ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("template", "message"),
    [
        ("{question} {answer}", r"has \{references\} 0 times"),
        ("{references} {answer}", r"has \{question\} 0 times"),
        ("{references} {question}", r"has \{answer\} 0 times"),
        ("{references} {question} {question} {answer}", r"has \{question\} 2 times"),
        ("{references} {question} {answer} Thanks.", r"has text after \{answer\}"),
    ],
)
def test_a_template_without_its_placeholders(template, message):
    with pytest.raises(MisconfigurationException, match=message):
        module(SHORT, template=template)


TEMPLATES = {
    "{references}\nQuestion: {question}\nAnswer: {answer}": ("[1] Ann did.\n\nQuestion: Who?\nAnswer:", " Ann [1]."),
    "Ask {question}\n{references}{answer}": ("Ask Who?\n[1] Ann did.\n", "Ann [1]."),
    "<{references}|{question}|{answer}": ("<[1] Ann did.\n|Who?|", "Ann [1]."),
    "{references}{question}\n\n{answer}": ("[1] Ann did.\nWho?", "\n\nAnn [1]."),
}


@pytest.mark.parametrize("template", TEMPLATES)
@pytest.mark.parametrize("packing", [True, False])
@pytest.mark.parametrize("weight", [0.0, 0.25])
def test_exactly_the_answer_and_the_end_carry_the_loss(template, packing, weight):
    data = module(SHORT, SHORT, template=template, packing=packing, prompt_loss_weight=weight)
    rows = data.rows["train"]
    assert len(rows) == (1 if packing else 2)
    batch = rows[torch.arange(len(rows))]
    prompt, answer = TEMPLATES[template]
    n_prompt, n_answer = len(prompt), len(answer) + 1
    n = n_prompt + n_answer - 1  # places of a record
    for k in range(2):
        place = (0, slice(k * n, (k + 1) * n)) if packing else (k, slice(0, n))
        inputs, targets, weights = (batch[name][place].tolist() for name in ("input_ids", "targets", "loss_weights"))
        assert text(inputs) == prompt + answer
        said = [target for target, w in zip(targets, weights, strict=True) if w == 1]
        assert (text(said[:-1]), said[-1]) == (answer, END)
        read = [(target, w) for target, w in zip(targets, weights, strict=True) if w != 1]
        if weight:
            assert (text(target for target, _ in read), {w for _, w in read}) == (prompt[1:], {weight})
        else:
            assert set(read) == {(-100, 0.0)}
        assert batch["position_ids"][place].tolist() == list(range(n))
    filled = torch.zeros(batch["targets"].shape, dtype=torch.bool)
    filled[:, : 2 * n if packing else n] = True
    assert (batch["targets"][~filled] == -100).all()
    assert (batch["loss_weights"][~filled] == 0).all()
    assert batch["n_tokens"] == 2 * n
    assert batch["target_bytes"] == 2 * (len(answer) + (len(prompt) - 1 if weight else 0))
    assert batch["mean_weight"] == pytest.approx(2 * (n_answer + weight * (n_prompt - 1)))


def test_validation_never_weighs_the_prompt():
    options = {"block_size": 64, "batch_size": 1, "tokenizer": "byte", "max_answer_tokens": 9}
    data = GPT2WebGLMQADataModule(Given(SHORT, val=(SHORT,)), **options, prompt_loss_weight=0.5)
    data.setup("fit")
    assert (data.rows["train"][torch.tensor([0])]["loss_weights"] == 0.5).any()
    (batch,) = list(data.val_dataloader())
    assert set(batch["loss_weights"].flatten().tolist()) == {0.0, 1.0}
    assert (batch["targets"] >= 0).sum() == len(" Ann [1].") + 1


def shown(example) -> str:
    return text(example.prompt_ids)


def test_references_are_cut_last_first_and_the_rest_stays_whole():
    whole = "[1] one\n[2] two\n[3] three\n\nQuestion: Why?\nAnswer:"
    n = len(whole) + len(" As it is [2][1]. So [3].")
    expected = {
        n: ("[1] one\n[2] two\n[3] three\n", " As it is [2][1]. So [3].", 0, 0),
        n - 1: ("[1] one\n[2] two\n[3] thre\n", " As it is [2][1]. So [3].", 1, 0),
        n - 4: ("[1] one\n[2] two\n[3] t\n", " As it is [2][1]. So [3].", 1, 0),
        n - 5: ("[1] one\n[2] two\n", " As it is [2][1]. So.", 0, 1),
        n - 10: ("[1] one\n[2] two\n", " As it is [2][1]. So.", 0, 1),
        n - 11: ("[1] one\n[2] tw\n", " As it is [2][1]. So.", 1, 1),
        n - 18: ("[1] one\n", " As it is [1]. So.", 0, 2),
        n - 26: ("", " As it is. So.", 0, 3),
    }
    for places, (references, answer, n_shortened, n_removed) in expected.items():
        encoder = PromptEncoder(byte_tokenizer(), block_size=places)
        (example,) = encoder.examples([LONG])
        assert shown(example) == f"{references}\nQuestion: Why?\nAnswer:"
        assert (text(example.answer_ids[:-1]), example.answer_ids[-1]) == (answer, END)
        assert example.n_places <= places
        assert encoder.counts["references_shortened"] == n_shortened
        assert encoder.counts["references_removed"] == n_removed
        assert encoder.counts["records_cut"] == (places < n)
        assert len(example.record.references) == 3 - n_removed


def test_what_is_too_long_without_any_reference_or_empty_is_skipped_and_said(capsys):
    long = Record("Why " * 40 + "?", "So.", ("one",), "file, line 7")
    empty = Record("Who?", " ", ("one",), "file, line 8")
    data = module(SHORT, long, empty, Record("Why?", "So " * 60, (), "file, line 9"))
    assert len(data.rows["train"].examples) == 1
    said = capsys.readouterr().err.splitlines()
    assert "train: skipped file, line 7 and 1 more, whose question and answer are longer than 128 tokens" in said
    assert "train: skipped file, line 8, without a question or an answer" in said
    assert data.counts["train"]["records_left_out"] == 3
    with pytest.raises(MisconfigurationException, match="there are no train records that can be used"):
        module(long)


def test_without_a_test_part_the_flags_that_hold_one_out_are_said(llm_train, monkeypatch):
    write(Path("my qa.jsonl"), *[ROW | {"question": f"Who is {i}?"} for i in range(60)])
    options = {"block_size": 128, "batch_size": 1, "tokenizer": "byte", "max_answer_tokens": 16}
    with pytest.raises(MisconfigurationException, match="there are no test records that can be used; hold ") as caught:
        GPT2WebGLMQADataModule("my qa.jsonl", **options).setup("test")
    flags = shlex.split(str(caught.value).rpartition(": ")[2])
    assert "my qa.jsonl" in flags
    done = llm_train("fit", "-c", "gpt2_webglm_qa/offline", *flags, "--print_config")
    assert done.code == 0, done.err
    given = yaml.safe_load(done.out)["data"]["init_args"]["records"]["init_args"]
    GPT2WebGLMQADataModule(JSONLines(**given), **options).setup("test")
    assert '--data.records.train \'["a", "b"]\'' in JSONLines(["a", "b"]).flags_to_hold_out("test")
    assert JSONLines("a", test="b").flags_to_hold_out("test") is None


def test_few_held_out_records_are_said(monkeypatch, capsys):
    monkeypatch.setattr(Given, "records", lambda self, side: iter([SHORT]))
    module(stage="test")
    assert "test: only 1 record; scores of so few vary much by chance" in capsys.readouterr().err.splitlines()


NEVER = Record("Who?", "Ann [1], in [2019].", ("Ann did.",))


@pytest.mark.parametrize("what", ["keep", "strip", "drop"])
def test_a_number_that_no_reference_had_is_counted_and_stays(what, capsys):
    data = module(SHORT, NEVER, missing_citations=what)
    assert [example.record.answer for example in data.rows["train"].examples] == [SHORT.answer, NEVER.answer]
    assert data.counts["train"]["answers_citing_missing"] == 1
    assert data.counts["train"]["answers_citing_cut"] == 0
    assert "that was cut 0 (" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("what", "answer"), [("keep", "Ann [1], in [2019]."), ("strip", "Ann, in [2019]."), ("drop", None)]
)
def test_a_mark_whose_reference_was_removed_is_kept_stripped_or_skipped(what, answer):
    bare = Record("Who?", "Ann.", ("Ann did.",))
    data = module(bare, NEVER, references="none", missing_citations=what)
    assert [example.record.answer for example in data.rows["train"].examples] == ["Ann."] + [answer] * bool(answer)
    stripped = module(NEVER, references="none", citations="strip")
    assert stripped.rows["train"].examples[0].record.answer == "Ann, in [2019]."


@pytest.mark.parametrize(("what", "answer"), [("keep", LONG.answer), ("strip", "As it is [1]. So."), ("drop", None)])
def test_a_mark_whose_reference_was_cut_is_counted_and_kept_stripped_or_skipped(what, answer):
    cut = PromptEncoder(byte_tokenizer(), block_size=60, missing_citations=what)
    examples = cut.examples([LONG])
    assert cut.counts["answers_citing_cut"] == 1
    assert cut.counts["answers_citing_missing"] == 0
    assert [example.record.answer for example in examples] == [answer] * bool(answer)


def test_questions_leave_room_for_the_answer_that_is_to_come():
    data = module(LONG, SHORT, stage="none", block_size=64, max_answer_tokens=30)
    long, short = data.questions("train", 5)
    assert len(long.prompt_ids) <= 64 - 30
    assert long.record.references == ("one",)
    assert shown(short).startswith("[1] Ann")
    assert [example.record.question for example in data.questions("train", 1)] == ["Why?"]
    # The gold answer is measured too, and may be longer.
    (long,) = module(LONG, stage="none", block_size=64, max_answer_tokens=2).questions("train", 5)
    assert long.n_places <= 64


def test_questions_are_spread_over_the_split():
    data = module(*(Record(f"Q{i}", "Ann.", ()) for i in range(10)), stage="none")
    for n, expected in ((3, [0, 3, 6]), (6, [0, 1, 3, 5, 6, 8]), (20, range(10))):
        assert [example.record.question for example in data.questions("train", n)] == [f"Q{i}" for i in expected]


def test_held_out_records_are_the_same_for_all_seeds():
    records = tuple(Record(f"Why {i}?", LONG.answer, LONG.references) for i in range(10))

    def prompts(side, seed):
        options = {"block_size": 128, "batch_size": 1, "tokenizer": "byte", "max_answer_tokens": 16, "seed": seed}
        data = GPT2WebGLMQADataModule(Given(*records, val=records), references="shuffled", **options)
        return [shown(example) for example in data.questions(side, 10)]

    assert prompts("val", 1) == prompts("val", 2) != prompts("train", 1) != prompts("train", 2)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"max_record_tokens": 129}, "max_record_tokens is 129: it must be at most data.block_size 128"),
        ({"max_answer_tokens": 128}, "max_answer_tokens is 128: it must be less than data.block_size 128"),
    ],
)
def test_arguments_that_do_not_fit_the_block(options, message):
    with pytest.raises(MisconfigurationException, match=message):
        module(SHORT, **options)


@pytest.mark.parametrize(
    ("made", "arguments"),
    [
        (GPT2WebGLMQADataModule, {"block_size": 0}),
        (GPT2WebGLMQADataModule, {"batch_size": 0}),
        (GPT2WebGLMQADataModule, {"prompt_loss_weight": 1.5}),
        (GPT2WebGLMQADataModule, {"max_record_tokens": 0}),
        (GPT2WebGLMQADataModule, {"max_answer_tokens": 0}),
        (GPT2WebGLMQADataModule, {"num_workers": -1}),
        (GPT2WebGLMQADataModule, {"seed": -1}),
        (HubRecords, {"max_records": 0}),
        (JSONLines, {"val_fraction": 1.0}),
        (JSONLines, {"test_fraction": -0.1}),
        (PythonQuestions, {"n_references": 0}),
        (PythonQuestions, {"val_fraction": 1.0}),
        (PythonQuestions, {"test_fraction": -0.1}),
        (PythonQuestions, {"max_modules": 0}),
    ],
)
def test_the_parser_refuses_numbers_out_of_range(made, arguments):
    parser = ArgumentParser(exit_on_error=False)
    parser.add_class_arguments(made, "made")
    with pytest.raises(ArgumentError, match="does not conform to restriction"):
        parser.parse_object({"made": arguments})


# --- packing ---------------------------------------------------------------------------------------------------------


@given(st.lists(st.integers(1, 20), max_size=60))
def test_best_fit_puts_each_thing_into_one_bin_and_leaves_no_two_bins_that_fit_together(sizes):
    bins = best_fit(sizes, 20)
    assert sorted(thing for one in bins for thing in one) == list(range(len(sizes)))
    filled = sorted(sum(sizes[thing] for thing in one) for one in bins)
    assert all(content <= 20 for content in filled)
    assert len(filled) < 2 or filled[0] + filled[1] > 20
    assert bins == best_fit(sizes, 20)


def test_best_fit_by_hand():
    assert best_fit([4, 3, 8, 5, 2], 10) == [[2, 4], [3, 0], [1]]  # 8 + 2, 5 + 4 (not beside 8), then 3
    assert best_fit([], 10) == []


@pytest.mark.parametrize("packing", [True, False])
def test_the_ends_of_the_records_are_where_their_positions_start_again(packing):
    records = [Record(f"Who is {i}?", "Ann " * (1 + i % 7), ()) for i in range(60)]
    rows = module(*records, packing=packing).rows["train"]
    shapes = set()
    for positions in torch.arange(len(rows) // 4 * 4).view(-1, 4):
        batch = rows[positions]
        found = set(batch["cu_seqlens"].tolist())
        starts = {place for place, position in enumerate(batch["position_ids"].flatten()) if position == 0}
        lengths = [sum(rows.examples[number].n_places for number in rows.rows[row]) for row in positions]
        padding = {row * rows.block_size + length for row, length in enumerate(lengths)}
        assert found == starts | padding | {4 * rows.block_size}
        assert batch["cu_seqlens"].diff().min() >= 0
        shapes.add(batch["cu_seqlens"].shape)
    assert len(shapes) == 1


def test_rows_are_shuffled_anew_in_each_epoch_and_always_hold_the_same_records():
    records = [Record(f"Who is {i}?", "Ann " * (1 + i % 7), ()) for i in range(60)]
    data = module(*records, batch_size=4, seed=3)

    def epoch(number):
        loader = data.train_dataloader()
        loader.sampler.set_epoch(number)
        return torch.cat([batch["input_ids"] for batch in loader])

    first, second = epoch(0), epoch(1)
    assert torch.equal(first, epoch(0))
    assert not torch.equal(first, second)
    alone = module(*records, packing=False)
    assert (len(data.rows["train"]), len(alone.rows["train"])) == (24, 60)
    assert data.counts["train"]["fill"] == pytest.approx(60 / 24 * alone.counts["train"]["fill"])
