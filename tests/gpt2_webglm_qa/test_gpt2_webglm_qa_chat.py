"""Instruction tuning in the chat template of an instruct model."""

import copy
import io
import json
from pathlib import Path

import numpy as np
import pytest
import tiny_bases
import yaml
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from transformers import AutoTokenizer

from datamodules.gpt2_webglm_qa import GPT2WebGLMQADataModule, JSONLines, prompts
from datamodules.gpt2_webglm_qa.chat_format import as_chat_template
from datamodules.gpt2_webglm_qa.cited_answers import Record
from datamodules.gpt2_webglm_qa.prompts import PromptEncoder, in_chat_template
from datamodules.tokenizers import encode, load_tokenizer, without_prefix

CONVERSATION = [{"role": "user", "content": "Why?"}, {"role": "assistant", "content": "It is so."}]
TEMPLATE = "{references}\nQ: {question}\n{answer}"
CHAT = "<|im_start|>user\n[1] One.\n[2] Two.\n\nQ: Why?<|im_end|>\n<|im_start|>assistant\n"


@pytest.fixture
def base(tmp_path) -> Path:
    """A GPT-2 whose tokenizer has a chat template."""
    folder = tiny_bases.save_old_gpt2(tmp_path / "base")
    tokenizer = load_tokenizer(str(folder))
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|im_start|>", "<|im_end|>"]})
    tokenizer.chat_template = tiny_bases.CHAT_TEMPLATE
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture
def tokenizer(base):
    return load_tokenizer(str(base))


def test_a_record_is_a_conversation_in_the_chat_template(tokenizer):
    tokenizer.eos_token = "<|im_end|>"
    encoder = PromptEncoder(tokenizer, TEMPLATE, 200, chat_template=True)
    (example,) = encoder.examples([Record("Why?", "It is [2].", ("One.", "Two."))])
    assert tokenizer.decode(example.prompt_ids) == CHAT
    assert example.prompt_ids.tolist().count(1) == 2  # <|im_start|> is one token
    assert tokenizer.decode(example.answer_ids) == "It is [2].<|im_end|>"
    assert example.answer_ids[-1] == 2


def test_the_exported_chat_template_has_the_characters_of_the_template(tokenizer):
    tokenizer.chat_template = as_chat_template('\U0001f642 "Ünder" \\ {references}\U0001f914 {question}\n{answer}')
    chat = [{"role": "user", "content": "Why?"}, {"role": "assistant", "content": "So."}]
    text = tokenizer.apply_chat_template(chat, documents=[{"title": "", "text": "One."}], tokenize=False)
    assert text == f'\U0001f642 "Ünder" \\ [1] One.\n\U0001f914 Why?\nSo.{tokenizer.eos_token}'


@pytest.mark.parametrize("system_message", [None, "Be brief."])
@pytest.mark.parametrize("references", [(), ("One.", "Two.")])
def test_another_program_writes_the_prompts_and_records_of_the_training(base, tmp_path, system_message, references):
    given = {"template": "Read:\n" + TEMPLATE, "block_size": 400, "chat_template": True}
    given |= {"system_message": system_message, "tokenizer": str(base), "max_answer_tokens": 2, "batch_size": 1}
    data = GPT2WebGLMQADataModule(JSONLines("absent"), **given)
    (example,) = data.encoder(400).examples([Record("Why?", "It is so.", references)])
    exported = copy.deepcopy(data.tokenizer)
    exported.chat_template = data.exported_chat_template
    exported.save_pretrained(tmp_path / "model")
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "model")
    documents = [{"title": "", "text": text} for text in references]
    prompt, record = (
        tokenizer.apply_chat_template(messages, documents=documents, return_dict=False, add_generation_prompt=True)
        for messages in (CONVERSATION[:1], CONVERSATION)
    )
    assert prompt == example.prompt_ids.tolist()
    assert record == [*prompt, *example.answer_ids.tolist()]
    with pytest.raises(MisconfigurationException, match=r"is that of an exported model, .*; give the tokenizer of its"):
        in_chat_template(tokenizer, TEMPLATE)


@pytest.mark.parametrize("space", ["normalizer", "first", "always"])
@pytest.mark.parametrize("in_chat", [False, True])
@pytest.mark.parametrize("references", [(), ("One.", "Two.")])
@pytest.mark.parametrize("template", [TEMPLATE, "Why?{references}{question} {answer}"])
def test_pieces_have_no_space_of_sentencepiece(space, in_chat, references, template):
    tokenizer = tiny_bases.sentence_pieces(space)
    tokenizer.chat_template = tiny_bases.CHAT_TEMPLATE.replace("<|im_start|>", "<s>").replace("<|im_end|>", "</s>")
    encoder = PromptEncoder(tokenizer, template, 200, chat_template=in_chat)
    (example,) = encoder.examples([Record("Why?", "One.", references)])
    exported = in_chat_template(tokenizer, template)[0] if in_chat else template
    tokenizer.chat_template = as_chat_template(exported, in_chat)
    conversation = [CONVERSATION[0], {"role": "assistant", "content": "One."}]
    documents = [{"title": "", "text": text} for text in references]
    prompt, record = (
        tokenizer.apply_chat_template(messages, documents=documents, return_dict=False)
        for messages in (conversation[:1], conversation)
    )
    assert example.prompt_ids.tolist() == prompt
    assert [*prompt, *example.answer_ids.tolist()] == record
    if not references:
        assert encoder.prompt("Why?", ["Two."], 200 - len(prompt)).ids.tolist() == prompt  # no room for the reference


def test_the_pieces_of_byte_level_prompts_are_encoded_alone(tokenizer):
    assert without_prefix(tokenizer) is tokenizer
    prompt = PromptEncoder(tokenizer, TEMPLATE, 200).prompt("the in?", ["the in", "an the"], 1)
    pieces = ["[1]", " the in", "\n", "[2]", " an the", "\n", "\nQ: the in?"]
    assert prompt.ids.tolist() == np.concatenate(encode(tokenizer, pieces)).tolist()


def test_special_tokens_in_a_record_are_text(tokenizer):
    encoder = PromptEncoder(tokenizer, TEMPLATE, 400, chat_template=True)
    prompt = encoder.prompt("Why?<|im_end|>", ["<|im_start|>system"], 1)
    plain = encoder.prompt("Why?", ["system"], 1)
    for token in (1, 2):
        assert prompt.ids.tolist().count(token) == plain.ids.tolist().count(token)
    assert "Why?<|im_end|><|im_end|>" in tokenizer.decode(prompt.ids)


def test_the_message_of_the_system_is_the_first(tokenizer):
    text, end = in_chat_template(tokenizer, TEMPLATE, "Be brief.")
    assert text.startswith("<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\n{references}")
    assert text.endswith("<|im_start|>assistant\n{answer}")
    assert end == "<|im_end|>"


@pytest.mark.parametrize(
    ("chat_template", "message"),
    [
        (None, "the tokenizer has no chat template; give that of an instruct model"),
        ("{{ messages[1]['content'] }}<|im_end|>", "has no place for {references}, {question};"),
        ("{{ messages[0]['content'] }}", "has no place for {answer};"),
        ("{{ raise_exception('no system') }}", "refuses the messages (TemplateError: no system)"),
        ("{% for m in messages %}{{ m['content'] }}\n{% endfor %}", "no special token follows an answer"),
    ],
)
def test_chat_templates_that_do_not_fit_are_refused(tokenizer, chat_template, message):
    tokenizer.chat_template = chat_template
    with pytest.raises(MisconfigurationException) as caught:
        in_chat_template(tokenizer, TEMPLATE)
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_template_without_a_place_for_references_and_a_message_without_a_chat_are_refused(tokenizer):
    with pytest.raises(MisconfigurationException, match=r"has {references} 0 times"):
        PromptEncoder(tokenizer, "{question}{answer}", chat_template=True)
    with pytest.raises(MisconfigurationException, match=r"set data.chat_template to true"):
        PromptEncoder(tokenizer, TEMPLATE, system_message="Be brief.")


def test_a_wrong_template_is_not_blamed_on_the_chat_template(base, tokenizer):
    with pytest.raises(MisconfigurationException, match=r"^data.template .* has {references} 0 times"):
        in_chat_template(tokenizer, "{question}{answer}")
    given = {"tokenizer": str(base), "template": "{references}{answer}", "chat_template": True}
    with pytest.raises(MisconfigurationException, match=r"^data.template .* has {question} 0 times"):
        GPT2WebGLMQADataModule(JSONLines("absent"), block_size=200, batch_size=1, max_answer_tokens=2, **given)


def test_only_the_piece_with_the_question_is_encoded_for_each_record(tokenizer, monkeypatch):
    encoder = PromptEncoder(tokenizer, f"Read:\n{TEMPLATE}", 400, chat_template=True, system_message="Be brief.")
    encoded: list[str] = []
    monkeypatch.setattr(prompts, "encode", lambda of, texts: encoded.extend(texts) or encode(of, texts))
    prompt = encoder.prompt("Why?", ["One."], 1)
    assert encoded == ["\nQ: Why?", "[1]", " One."]
    assert "system\nBe brief.<|im_end|>\n<|im_start|>user\nRead:\n[1] One.\n" in tokenizer.decode(prompt.ids)


def test_the_prompts_of_a_run_are_those_of_its_data_and_of_older_runs_plain(base):
    given = {"template": TEMPLATE, "block_size": 200, "chat_template": True, "system_message": "Be brief."}
    data = GPT2WebGLMQADataModule(JSONLines("absent"), batch_size=1, tokenizer=str(base), max_answer_tokens=2, **given)
    assert data.tokenizer.eos_token == "<|im_end|>"
    mine, of_run = (
        encoder.prompt("Why?", ["One."], 2) for encoder in (data.encoder(200), data.prompts(data.tokenizer, given))
    )
    assert mine.ids.tolist() == of_run.ids.tolist()
    older = data.prompts(data.tokenizer, {"template": TEMPLATE, "block_size": 200}).prompt("Why?", ["One."], 2)
    assert data.tokenizer.decode(older.ids) == "[1] One.\n\nQ: Why?"


@pytest.mark.slow
def test_a_run_with_a_chat_template_learns_to_end_messages_and_answers_in_a_chat(base, llm_train, monkeypatch):
    rows = [{"question": f"Why {i}?", "answer": "[1]", "references": ["A."]} for i in range(12)]
    Path("records.jsonl").write_text("\n".join(map(json.dumps, rows)))
    data = {"records": "records.jsonl", "tokenizer": str(base), "template": TEMPLATE, "chat_template": True}
    data |= {"block_size": 100, "batch_size": 4, "max_answer_tokens": 8}
    topic = "gpt2_webglm_qa"
    config = {
        "model": {"class_path": f"lightning_modules.{topic}.GPT2WebGLMQAModule", "init_args": {"base": str(base)}},
        "data": {"class_path": f"datamodules.{topic}.GPT2WebGLMQADataModule", "init_args": data},
        "optimizer": {"class_path": "torch.optim.AdamW", "init_args": {"lr": 0.03}},
        "trainer": {"accelerator": "cpu", "max_steps": 40},
    }
    Path("chat.yaml").write_text(yaml.safe_dump(config))
    done = llm_train("fit", "-c", "chat.yaml")
    assert done.code == 0, done.err
    run = Path("runs/gpt2_webglm_qa/chat")
    assert json.loads((run / "model/generation_config.json").read_text())["eos_token_id"] == 2
    exported = AutoTokenizer.from_pretrained(run / "model")
    prompt = PromptEncoder(load_tokenizer(str(run)), TEMPLATE, 100, chat_template=True).prompt("Why?", [], 8)
    assert exported.apply_chat_template(CONVERSATION[:1], return_dict=False) == prompt.ids.tolist()
    Path("notes.txt").write_text("A.")
    monkeypatch.setattr("sys.stdin", io.StringIO("Why 3?\n"))
    answered = llm_train("generate", "--run", run, "--chat", "--references", "notes.txt")
    assert answered.code == 0, answered.err
    assert "Question: [1]\n" in answered.out  # and not the eight tokens that an answer may have
