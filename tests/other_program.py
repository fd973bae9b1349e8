"""A program that uses exported models through Transformers alone; `test_exported_models.py` starts it.

It reads a list of questions from standard input, and prints a list of answers, both in JSON.
"""

import json
import sys
import traceback
from typing import Any

import torch

LONG = "A long text that no tiny context holds. " * 20


def of_decoder(folder: str, prompts: list[str], **_: Any) -> dict[str, Any]:
    """Return what a decoder writes: alone, in a batch with padding, and in a pipeline."""
    from transformers import AutoModelForCausalLM, AutoTokenizer, pipeline

    model, tokenizer = AutoModelForCausalLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
    alone, lengths = [], []
    for prompt in prompts:
        ids = tokenizer(prompt, return_tensors="pt")
        alone.append(model.generate(**ids, do_sample=False)[0, ids["input_ids"].shape[1] :].tolist())
        lengths.append(ids["input_ids"].shape[1])
    batch = tokenizer(prompts, padding=True, return_tensors="pt")
    together = model.generate(**batch, do_sample=False)[:, batch["input_ids"].shape[1] :].tolist()
    writer = pipeline("text-generation", model=model, tokenizer=tokenizer, device="cpu")
    full = writer(prompts[1], do_sample=False, return_tensors=True, min_length=tokenizer.model_max_length)
    return {
        "class": type(model).__name__,
        "context": tokenizer.model_max_length,
        "truncated": len(tokenizer(LONG, truncation=True)["input_ids"]),
        "end": [tokenizer.eos_token_id, model.config.eos_token_id, model.generation_config.eos_token_id],
        "alone": alone,
        "together": together,
        "lengths": lengths,
        "written": writer(prompts[0], do_sample=False, return_full_text=False)[0]["generated_text"],
        "full": len(full[0]["generated_token_ids"]),
    }


def of_chat(folder: str, question: str, references: list[str], **_: Any) -> dict[str, Any]:
    """Return the prompts that the chat template writes, and an answer in a pipeline."""
    from transformers import AutoTokenizer, pipeline

    messages = [{"role": "user", "content": question}]
    documents = [{"title": "", "text": reference} for reference in references]
    tokenizer = AutoTokenizer.from_pretrained(folder)
    answered = [*messages, {"role": "assistant", "content": " So. "}]
    writer = pipeline("text-generation", model=folder, device="cpu")
    (answer,) = writer(messages, do_sample=False)
    return {
        "ids": tokenizer.apply_chat_template(
            messages, documents=documents, add_generation_prompt=True, return_dict=False
        ),
        "record": tokenizer.apply_chat_template(answered, documents=documents, tokenize=False),
        "answer": answer["generated_text"][-1]["content"],
    }


def of_classifier(folder: str, texts: list[str], trust: bool, **_: Any) -> dict[str, Any]:
    """Return the probabilities of the classes: of each text alone, and in a batch with padding."""
    from transformers import pipeline

    classify = pipeline("text-classification", model=folder, device="cpu", top_k=None, trust_remote_code=trust)
    together = classify(texts, truncation=True, padding=True, batch_size=len(texts))
    alone = [classify([text], truncation=True)[0] for text in texts]
    return {
        "class": type(classify.model).__name__,
        "context": classify.tokenizer.model_max_length,
        "alone": [{row["label"]: row["score"] for row in rows} for rows in alone],
        "together": [{row["label"]: row["score"] for row in rows} for rows in together],
    }


def of_masked(folder: str, text: str, **_: Any) -> dict[str, Any]:
    """Return the most probable tokens in the place of the mask."""
    from transformers import pipeline

    fill = pipeline("fill-mask", model=folder, device="cpu")
    long = fill(f"{text} {LONG}", tokenizer_kwargs={"truncation": True})
    return {
        "context": fill.tokenizer.model_max_length,
        "filled": [row["token"] for row in fill(text)],
        "long": len(long),
    }


def of_tokenizer(folder: str, text: str, **_: Any) -> dict[str, Any]:
    """Return the token ids of a text."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder)
    return {"ids": tokenizer(text)["input_ids"], "context": tokenizer.model_max_length, "end": tokenizer.eos_token}


def of_unknown(folder: str, **_: Any) -> dict[str, Any]:
    """Return the first line of the error for a model that Transformers has no class for."""
    from transformers import AutoModelForCausalLM

    try:
        AutoModelForCausalLM.from_pretrained(folder)
    except ValueError as error:
        return {"error": str(error).splitlines()[0]}
    return {"error": None}


def answer(question: dict[str, Any]) -> dict[str, Any]:
    """Return the answer to a question, or the error."""
    try:
        return globals()[f"of_{question['kind']}"](**question)
    except Exception:
        return {"failed": traceback.format_exc()}


if __name__ == "__main__":
    torch.set_num_threads(1)
    answers = [answer(question) for question in json.load(sys.stdin)]
    ours = [name for name in sys.modules if name.split(".")[0] in ("lightning_modules", "datamodules", "experiments")]
    json.dump({"answers": answers, "ours": ours}, sys.stdout)
