"""W&B sweep files, checked against what `wandb sweep` accepts; an error is one line with the place in the file.

https://docs.wandb.ai/models/sweeps/sweep-config-keys lists the keys.
"""

import json
import os
import re
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, Self

import yaml
from pydantic import Discriminator, Field, PositiveInt, PrivateAttr, Tag, ValidationError, model_validator

from experiments.errors import UserError, did_you_mean
from experiments.study.distributions import NOT_GIVEN, Distribution, Number, Section, SectionError
from experiments.study.names import flag_value
from experiments.yaml_files import LOADER, RepeatedKey, describe, load_yaml

Key = tuple[str | int, ...]
_FOR_LAUNCH = ("job", "image_uri", "scheduler", "metrics")
_MACRO = re.compile(r"\$\{(.*)\}")
_ENVIRONMENT_MACRO = re.compile(r"\$\{envvar:([A-Z0-9_]*)\}")


class Metric(Section):
    """The metric that runs are judged by."""

    name: str
    goal: Literal["minimize", "maximize"] = "minimize"
    target: Number = NOT_GIVEN
    impute: Literal["latest", "best", "worst"] = NOT_GIVEN
    impute_while_running: Literal["latest", "best", "worst", "false"] = NOT_GIVEN


class Hyperband(Section):
    """The rule by which runs are stopped early."""

    type: Literal["hyperband"]
    min_iter: PositiveInt = NOT_GIVEN
    max_iter: int = NOT_GIVEN
    s: Number = NOT_GIVEN
    eta: Annotated[Number, Field(ge=2, multiple_of=1)] = 3
    strict: bool = False

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.min_iter is None and None in (self.max_iter, self.s):
            raise SectionError("needs min_iter:, or max_iter: and s:")
        return self

    @property
    def first(self) -> int:
        """The first rung: how many values of the metric a run logs before it can be stopped."""
        return self.min_iter or max(1, int(self.max_iter / int(self.eta) ** self.s))


class Nested(Section):
    """Parameters under a common key."""

    parameters: "Parameters"


Parameters = Annotated[
    dict[
        Annotated[str, Field(pattern=r"^[A-Za-z_][A-Za-z0-9_.-]*$")],
        Annotated[
            Annotated[Nested, Tag("<nested>")] | Annotated[Distribution, Tag("<one>")],
            Discriminator(lambda spec: "<nested>" if isinstance(spec, dict) and "parameters" in spec else "<one>"),
        ],
    ],
    Field(min_length=1),
]


class Sweep(Section):
    """A sweep file."""

    method: Literal["grid", "random", "bayes"]
    parameters: Parameters
    name: str = NOT_GIVEN
    description: str = NOT_GIVEN
    metric: Metric = NOT_GIVEN
    run_cap: PositiveInt = NOT_GIVEN
    early_terminate: Hyperband = NOT_GIVEN
    command: list[Any] = Field(["${env}", "${interpreter}", "${program}", "${args}"])
    program: str = NOT_GIVEN
    project: str = NOT_GIVEN
    entity: str = NOT_GIVEN
    kind: Literal["sweep"] = NOT_GIVEN
    apiVersion: str = NOT_GIVEN  # noqa: N815
    controller: dict[Literal["type"], Literal["local", "cloud"]] = NOT_GIVEN  # without effect on this machine
    _path: Path = PrivateAttr()

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.metric is None and self.method == "bayes":
            raise SectionError("bayes needs a metric:", "method")
        if self.metric is None and self.early_terminate:
            raise SectionError("needs a metric: to tell good runs from bad ones", "early_terminate")
        for key, distribution in self.distributions.items():
            if self.method == "grid" and distribution.grid() is None:
                message = f"a grid cannot enumerate {distribution.name}; give values, or another method"
                raise SectionError(message, *(part for name in key for part in ("parameters", name)))
        known, macros = _macros({}, Path(), ""), []
        for i, word in enumerate(map(str, self.command)):
            macro = _MACRO.fullmatch(word)
            if macro and not _ENVIRONMENT_MACRO.search(word):
                macros.append(macro[1])
                if macro[1] not in known:
                    raise SectionError(f"there is no {word}{did_you_mean(macro[1], known)}", "command", i)
        if "program" in macros and self.program is None:
            raise SectionError("runs ${program}, and program: is missing", "command")
        if not any(macro.startswith("args") for macro in macros):
            raise SectionError("has no ${args}: the settings would not reach the runs", "command")
        return self

    @property
    def path(self) -> Path:
        """The file."""
        return self._path

    @property
    def maximize(self) -> bool:
        """Whether a large value of the metric is good."""
        return self.metric is not None and self.metric.goal == "maximize"

    @property
    def uses_results(self) -> bool:
        """Whether it depends on the results of earlier runs which run is next, or whether there is one."""
        return self.method == "bayes" or (self.metric is not None and self.metric.target is not None)

    @property
    def distributions(self) -> dict[tuple[str, ...], Distribution]:
        """The distribution of each parameter; a key has more than one part if `parameters:` are nested."""
        return dict(_flatten(self.parameters))

    def settings(self, values: Sequence[Any]) -> dict[str, Any]:
        """Return the settings of one run, nested as in the file, from one value for each parameter."""
        settings: dict[str, Any] = {}
        for (*parents, last), value in zip(self.distributions, values, strict=True):
            section = settings
            for parent in parents:
                section = section.setdefault(parent, {})
            section[last] = value
        return settings

    def words(self, settings: Mapping[str, Any], json_file: Path) -> list[str]:
        """Return the command of the run with these settings, word for word that of `wandb agent`."""
        meaning = _macros(settings, json_file, self.program)
        words: list[str] = []
        for word in map(str, self.command):
            word = _ENVIRONMENT_MACRO.sub(lambda found: os.environ.get(found[1], found[1]), word)
            macro = _MACRO.fullmatch(word)
            words += meaning[macro[1]] if macro else [word]
        return words


def _macros(settings: Mapping[str, Any], json_file: Path, program: str) -> dict[str, list[str]]:
    pairs = {key: f"{key}={flag_value(value)}" for key, value in settings.items()}
    return {
        "env": ["/usr/bin/env"],
        "interpreter": [sys.executable],
        "program": [program],
        "args": [f"--{pair}" for pair in pairs.values()],
        "args_no_hyphens": list(pairs.values()),
        "args_no_equals": [word for key, value in settings.items() for word in (f"--{key}", flag_value(value))],
        "args_no_boolean_flags": [
            f"--{key if settings[key] is True else pair}" for key, pair in pairs.items() if settings[key] is not False
        ],
        "args_append_hydra": [f"+{pair}" for pair in pairs.values()],
        "args_override_hydra": [f"++{pair}" for pair in pairs.values()],
        "args_json": [json.dumps(settings)],
        "args_json_file": [str(json_file)],
    }


def _flatten(
    section: Mapping[str, Nested | Distribution], *parents: str
) -> Iterator[tuple[tuple[str, ...], Distribution]]:
    for name, spec in section.items():
        if isinstance(spec, Nested):
            yield from _flatten(spec.parameters, *parents, name)
        else:
            yield (*parents, name), spec


def read_sweep_file(path: str | Path) -> Sweep:
    """Read a sweep file; raise a `UserError` if `wandb sweep` or `llm-train study` cannot run it as it is."""
    path = Path(path)
    try:
        text = path.read_text(encoding="utf-8")
        content = json.loads(json.dumps(load_yaml(text)))  # as W&B and a journal have it: all keys are text
        if not isinstance(content, dict):
            raise UserError(f"{path}: is not a sweep file: it has no `method:` and no `parameters:`")
        if "model" in content and "parameters" not in content:
            raise UserError(f"{path}: is an experiment and not a sweep file: `llm-train fit -c {path}` runs it")
        sweep = Sweep.model_validate(content)
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: is not UTF-8 text (byte {error.start})") from error
    except RepeatedKey as error:
        raise UserError(f"{path}{describe(error)}") from error
    except yaml.MarkedYAMLError as error:
        place = f", line {error.problem_mark.line + 1}" if error.problem_mark else ""
        raise UserError(f"{path}{place}: is not YAML: {error.problem}") from error
    except ValidationError as found:
        raise mistake(path, text, found) from found
    except (yaml.YAMLError, TypeError, ValueError) as error:
        raise UserError(f"{path}: holds a value that a sweep cannot have: {error}") from error
    sweep._path = path
    return sweep


def mistake(path: Path, text: str, found: ValidationError) -> UserError:
    """Return the first mistake in the text of a file as one line: the line of its key, the key, and what is wrong."""
    lines: dict[Key, int] = dict(_lines_of(yaml.compose(text, LOADER)))
    errors = sorted(found.errors(), key=lambda error: error["type"] != "extra_forbidden")  # misspelt, then missing
    key, message = _explain(errors[0])
    place = next((f", line {lines[key[:n]]}" for n in range(len(key), 0, -1) if key[:n] in lines), "")
    return UserError(": ".join(filter(None, [f"{path}{place}", ".".join(map(str, key)), message])))


def _explain(error: Any) -> tuple[Key, str]:
    """Return the key of an error that Pydantic has found, and what is wrong."""
    key = tuple(part for part in error["loc"] if not re.fullmatch(r"\[key\]|<.*>", str(part)))  # without Pydantic's own
    kind, value, hint = error["type"], error["input"], ""
    shown = json.dumps(value)
    shown = shown if len(shown) <= 60 else f"{shown[:57]}..."
    match kind:
        case "missing":
            return key, "is missing"
        case "extra_forbidden" if key[0] in _FOR_LAUNCH:
            return key, "is for W&B's own servers and cannot run on this machine; remove it"
        case "extra_forbidden":
            known = {name for section in Section.__subclasses__() for name in section.model_fields}
            return key, f"there is no such key{did_you_mean(key[-1], sorted(known))}"
        case "model_type":
            advice = "{values: [...]}" if isinstance(value, list) else "{value: ...}"
            hint = f"; write {advice}" if key[0] == "parameters" else ""
            return key, f"must be a section, got {shown}{hint}"
        case "value_error":
            return (*key, *error["ctx"]["error"].key), str(error["ctx"]["error"])
        case "too_short":
            return key, "is empty: there is nothing to sweep"
        case "string_pattern_mismatch":
            return key, "is not a name of a parameter: use letters, digits and _ . - only"
        case "literal_error" if (*key, value) == ("method", "custom"):
            hint = " (custom runs on W&B's servers only)"
        case "literal_error":
            hint = did_you_mean(value, re.findall(r"'([^']+)'", error["ctx"]["expected"]))
        case "float_type" | "int_type":  # YAML 1.1 reads 1e-3 as text
            if found := re.fullmatch(r"([+-]?\d+)e([+-]?)(\d+)", str(value).lower()):
                hint = f" (YAML wants {found[1]}.0e{found[2] or '+'}{found[3]})"
    return key, f"{error['msg'].replace('Input should be', 'must be')}, got {shown}{hint}"


def _lines_of(node: yaml.Node | None, *key: str | int) -> Iterator[tuple[Key, int]]:
    """Yield the line of each key and of each item of a list."""
    items: list[tuple[str | int, yaml.Node, yaml.Node]] = []
    if isinstance(node, yaml.MappingNode):
        items = [(name.value, name, value) for name, value in node.value]
    elif isinstance(node, yaml.SequenceNode):
        items = [(i, value, value) for i, value in enumerate(node.value)]
    for name, start, value in items:
        yield (*key, name), start.start_mark.line + 1
        yield from _lines_of(value, *key, name)
