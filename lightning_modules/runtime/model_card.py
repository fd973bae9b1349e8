"""The model card of an exported model: what it is, its data and its results, and the command that trains it again.

A model leaves the machine, so the card has neither paths of the machine nor names of its users: of a path from the root
or the home folder, only the last part is kept.
"""

import math
import re
import shlex
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import yaml

from lightning_modules.common import run_files
from lightning_modules.common.files import read_json
from lightning_modules.common.hub import is_path

_HUB_NAME = re.compile(r"[\w-][\w.-]*/[\w.-]+")
_SECTIONS = ("seed_everything", "model", "data", "optimizer", "lr_scheduler", "trainer")
_TASKS = {  # of `pipeline`, by what the class of a model ends in
    "LMHeadModel": "text-generation",
    "ForCausalLM": "text-generation",
    "ForSequenceClassification": "text-classification",
    "ForMaskedLM": "fill-mask",
}
_CHAT = 'print(pipe([{"role": "user", "content": "What is a tuple?"}])[0]["generated_text"][-1]["content"])'
_EXAMPLES = {
    "text-generation": 'print(pipe("The")[0]["generated_text"])',
    "text-classification": 'print(pipe("I would see it again.", truncation=True))',
    "fill-mask": 'print(pipe(f"It is a {pipe.tokenizer.mask_token} film."))',
}


def model_card(
    run: Path, model: Path, base: str | None, context: int | None, step: int, results: Mapping[str, float],
    n_rows: Mapping[str, int], licence: str | None,
) -> str:  # fmt: skip
    """Return the text of the `README.md` of an exported model, with the fields that the Hugging Face hub reads.

    Args:
        run: Folder of the run; its `config.yaml` and `environment.json` are read if they are there.
        model: Folder of the model in Transformers' format.
        base: Model that the training started from: a name on the hub, or a folder.
        context: Length of the longest sequence that the model takes, in tokens, or `None` if there is no limit.
        step: Optimiser steps that the weights were trained for.
        results: Validation metrics of these weights, by name.
        n_rows: Number of rows of each split.
        licence: Name of the licence, or `None` if it is not known.
    """
    config, sessions = _config(run), read_json(run / run_files.ENVIRONMENT, [])
    session = sessions[-1] if sessions else {}
    architecture = read_json(model / "config.json", {})
    task = _task(architecture)
    section = config.get("run") or {"name": run.name}
    name = "/".join(str(section[key]) for key in ("topic", "study", "name") if section.get(key))
    versions = {"python": session.get("python")} | session.get("packages", {})
    header = {
        "library_name": "transformers" if task else None,
        "pipeline_tag": task,
        "license": licence or "unknown",
        "base_model": base if base and _is_hub_name(base) else None,
        "datasets": sorted(set(_hub_datasets(config.get("data")))) or None,
        "tags": ["llm-train"],
    }
    facts = {
        "class": f"`{architecture.get('architectures', [architecture.get('model_type')])[0]}`",
        "weights": f"{_n_weights(model):,}",
        "context": f"{context} tokens" if context else None,
        "trained from": f"`{_public(base)}`" if base else "a random initialisation",
        "training": f"{step:,} steps of `{config['model']['class_path']}`" if config else f"{step:,} steps",
        "licence": licence or "unknown",
        "made": str(session.get("started", ""))[:10],
        "versions": ", ".join(f"{package} {version}" for package, version in versions.items() if version),
    }
    parts = [
        "---\n" + _dump({key: value for key, value in header.items() if value}) + "---",
        f"# {name}\n\nA model that was trained with llm-train.",
        _table(("", ""), {key: value for key, value in facts.items() if value}),
        *_use(task, architecture, model),
    ]
    if config:
        parts += ["## Data", _fenced(_dump(_public(config["data"])))]
    if n_rows:
        parts.append(_table(("split", "rows"), {split: f"{n:,}" for split, n in n_rows.items()}))
    if results:
        shown = {f"`{metric}`": f"{value:.4g}" for metric, value in sorted(results.items()) if math.isfinite(value)}
        parts += ["## Results on the validation data", _table(("metric", "value"), shown)]
    if commands := [_public_command(session["command"]) for session in sessions]:
        parts += ["## Training", "\n".join(f"    {command}" for command in dict.fromkeys(commands))]
        settings = _dump(_public({key: config[key] for key in _SECTIONS if key in config}))
        parts.append(f"<details><summary>The resolved configuration</summary>\n\n{_fenced(settings)}\n\n</details>")
    return "\n\n".join(parts) + "\n"


def _task(architecture: Mapping[str, Any]) -> str | None:
    classes = [*architecture.get("architectures", []), *architecture.get("auto_map", [])]
    return next((task for name in classes for end, task in _TASKS.items() if name.endswith(end)), None)


def _use(task: str | None, architecture: Mapping[str, Any], model: Path) -> list[str]:
    if task is None:
        text = "Transformers has no class of these parts; `llm-train fit` reads the folder with `--model.pretrained`."
        return ["## Use", text]
    code = ", trust_remote_code=True" if "auto_map" in architecture else ""
    is_chat = (model / "chat_template.jinja").is_file()
    lines = [
        "from transformers import pipeline\n",
        f'pipe = pipeline("{task}", model="FOLDER"{code})',
        _CHAT if is_chat and task == "text-generation" else _EXAMPLES[task],
    ]
    return ["## Use", _fenced("\n".join(lines), "python")]


def _config(run: Path) -> dict[str, Any]:
    file = run / run_files.CONFIG
    return yaml.safe_load(file.read_text(encoding="utf-8")) if file.is_file() else {}


def _is_hub_name(text: str) -> bool:
    """Return whether a text is a name on the hub with an owner."""
    return not is_path(text) and _HUB_NAME.fullmatch(text) is not None


def _hub_datasets(config: Any, key: str = "") -> Iterator[str]:
    """Yield the names of data sets on the hub in a configuration of the data."""
    if isinstance(config, str):
        if key == "dataset" or config.startswith("hub:"):
            dataset, _, _ = config.removeprefix("hub:").partition(":")  # a column may follow
            if _is_hub_name(dataset):
                yield dataset
    elif isinstance(config, dict | list):
        for name, value in config.items() if isinstance(config, dict) else enumerate(config):
            yield from _hub_datasets(value, str(name))


def _n_weights(model: Path) -> int:
    from safetensors import safe_open

    total = 0
    for file in model.glob("*.safetensors"):
        with safe_open(file, "pt") as opened:
            total += sum(math.prod(opened.get_slice(name).get_shape()) for name in opened.keys())  # noqa: SIM118
    return total


def _public(value: Any) -> Any:
    """Return a configuration without settings that are `null`, and with the last part of each path of the machine."""
    if isinstance(value, dict):
        return {key: _public(item) for key, item in value.items() if item is not None}
    if isinstance(value, list):
        return [_public(item) for item in value]
    if isinstance(value, str) and (value.startswith(("/", "~", "file:")) or ".." in Path(value).parts):
        return Path(value).name
    return value


def _public_command(command: str) -> str:
    words = []
    for word in shlex.split(command):
        flag, equals, text = word.partition("=") if word.startswith("-") else ("", "", word)
        try:
            value = yaml.safe_load(text)
        except yaml.YAMLError:
            value = text
        public = _public(value)
        words.append(flag + equals + (text if public == value else public if isinstance(public, str) else str(public)))
    return shlex.join(words)


def _dump(value: Any) -> str:
    return yaml.safe_dump(value, sort_keys=False, allow_unicode=True)


def _fenced(text: str, language: str = "yaml") -> str:
    fence = "`" * (1 + max(map(len, re.findall("`{3,}", text)), default=2))
    return f"{fence}{language}\n{text.rstrip()}\n{fence}"


def _table(columns: tuple[str, str], rows: Mapping[str, str]) -> str:
    lines = [columns, ("---", "---"), *rows.items()]
    return "\n".join(f"| {name} | {value} |" for name, value in lines)
