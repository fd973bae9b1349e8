"""W&B sweep files: read, and checked against what `wandb sweep` takes; every mistake costs one line.

https://docs.wandb.ai/models/sweeps/sweep-config-keys lists the keys; the tables below are W&B's schema in short.
"""

import difflib
import hashlib
import json
import math
import os
import re
import sys
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

import yaml

from experiments.errors import UserError

REQUIRED = object()  # in place of a default
_KEYS = {
    "name": str, "description": str, "method": ("grid", "random", "bayes"), "metric": dict, "parameters": dict,
    "run_cap": int, "early_terminate": dict, "command": list, "program": str, "project": str, "entity": str,
    "kind": ("sweep",), "apiVersion": str, "controller": dict,
}  # fmt: skip
_FOR_LAUNCH = ("job", "image_uri", "scheduler", "metrics")  # of W&B's servers: nothing that a folder could repeat
_METRIC_KEYS = {
    "name": str, "goal": ("minimize", "maximize"), "target": float,
    "impute": ("latest", "best", "worst"), "impute_while_running": ("latest", "best", "worst", "false"),
}  # fmt: skip
_HYPERBAND_KEYS = {"type": ("hyperband",), "min_iter": int, "max_iter": int, "s": float, "eta": float, "strict": bool}
_RANGE = {"min": REQUIRED, "max": REQUIRED}
_BELL = {"mu": 0.0, "sigma": 1.0}
_DISTRIBUTIONS: dict[str, dict[str, Any]] = {
    "constant": {"value": REQUIRED},
    "categorical": {"values": REQUIRED},
    "categorical_w_probabilities": {"values": REQUIRED, "probabilities": REQUIRED},
    "int_uniform": _RANGE,
    "uniform": _RANGE,
    "log_uniform_values": _RANGE,
    "inv_log_uniform_values": _RANGE,
    "normal": _BELL,
    "log_normal": _BELL,
    "beta": {"a": 1.0, "b": 1.0},
}
for _name in ("uniform", "log_uniform_values", "normal", "log_normal", "beta"):  # rounded to multiples of q
    _DISTRIBUTIONS[f"q_{_name}"] = _DISTRIBUTIONS[_name] | {"q": 1}
_WITHDRAWN = ("log_uniform", "inv_log_uniform", "q_log_uniform")  # by W&B: their bounds were exponents
_ENUMERABLE = ("constant", "categorical", "int_uniform", "q_uniform")
_MACRO = re.compile(r"\$\{(.*)\}")
_MACROS = (
    "env", "interpreter", "program", "args", "args_no_hyphens", "args_no_equals", "args_no_boolean_flags",
    "args_append_hydra", "args_override_hydra", "args_json", "args_json_file",
)  # fmt: skip
_ENVIRONMENT_MACRO = re.compile(r"\$\{envvar:([A-Z0-9_]*)\}")
_SAYS = {
    str: "a text",
    int: "a whole number",
    float: "a number",
    bool: "true or false",
    dict: "a section",
    list: "a list",
}
_LONGEST_NAME = 100  # of an arm: folders take 255 bytes, W&B's tables much less

Key = tuple[str | int, ...]


@dataclass(frozen=True)
class Parameter:
    """One setting that a sweep chooses.

    Args:
        key: Its place among the settings; more than one part where the file nests `parameters:`.
        distribution: Name of W&B's.
        spec: The distribution's own keys, complete.
    """

    key: tuple[str, ...]
    distribution: str
    spec: dict[str, Any]

    @property
    def name(self) -> str:
        """The key as a flag has it."""
        return ".".join(self.key)

    @property
    def is_swept(self) -> bool:
        """Whether it can differ from run to run."""
        return self.distribution != "constant" and len(self.spec.get("values", (0, 1))) > 1

    def grid(self) -> list[Any]:
        """Its values in a grid, each once: as W&B counts them, `max` is the last `int_uniform` and no `q_uniform`."""
        if self.distribution == "int_uniform":
            return list(range(self.spec["min"], self.spec["max"] + 1))
        if self.distribution == "q_uniform":
            low, high, q = (self.spec[key] for key in ("min", "max", "q"))
            return [_tidy(low + i * q) for i in range(math.ceil((high - low) / q))]
        values = self.spec["values"] if self.distribution == "categorical" else [self.spec["value"]]
        return [json.loads(text) for text in dict.fromkeys(map(json.dumps, values))]


@dataclass(frozen=True)
class Sweep:
    """A sweep file that has passed the check.

    Args:
        path: The file.
        content: All that it says.
        parameters: Its parameters, in the file's order.
    """

    path: Path
    content: dict[str, Any]
    parameters: list[Parameter]

    @property
    def name(self) -> str:
        """What the study is called, fit for a folder: the file's `name:`, or its own."""
        return folder_name(self.content.get("name") or self.path.stem)

    @property
    def method(self) -> str:
        """`grid`, `random` or `bayes`."""
        return self.content["method"]

    @property
    def metric(self) -> str | None:
        """Name of the metric that runs are judged by, if it has one."""
        return self.content.get("metric", {}).get("name")

    @property
    def maximize(self) -> bool:
        """Whether a large value of the metric is good."""
        return self.content.get("metric", {}).get("goal") == "maximize"

    @property
    def command(self) -> list[str]:
        """The command of a run, with W&B's macros."""
        return [
            str(word) for word in self.content.get("command") or ("${env}", "${interpreter}", "${program}", "${args}")
        ]

    def settings(self, values: Sequence[Any]) -> dict[str, Any]:
        """The settings of one run, nested as the file nests them, from one value for each parameter."""
        settings: dict[str, Any] = {}
        for parameter, value in zip(self.parameters, values, strict=True):
            *parents, last = parameter.key
            section = settings
            for parent in parents:
                section = section.setdefault(parent, {})
            section[last] = value
        return settings

    def words(self, settings: Mapping[str, Any], json_file: Path) -> list[str]:
        """The command of the run with these settings, word for word what `wandb agent` makes of it.

        Args:
            settings: The run's settings.
            json_file: Where `${args_json_file}` is to find them.
        """
        pairs = [f"{key}={value}" for key, value in settings.items()]
        meaning = {
            "env": ["/usr/bin/env"],
            "interpreter": [sys.executable],
            "program": [self.content.get("program", "")],
            "args": [f"--{pair}" for pair in pairs],
            "args_no_hyphens": pairs,
            "args_no_equals": [word for key, value in settings.items() for word in (f"--{key}", str(value))],
            "args_no_boolean_flags": [
                f"--{key}" if value is True else f"--{key}={value}"
                for key, value in settings.items()
                if value is not False
            ],
            "args_append_hydra": [f"+{pair}" for pair in pairs],
            "args_override_hydra": [f"++{pair}" for pair in pairs],
            "args_json": [json.dumps(settings)],
            "args_json_file": [str(json_file)],
        }
        words: list[str] = []
        for word in self.command:
            word = _ENVIRONMENT_MACRO.sub(lambda found: os.environ.get(found[1], found[1]), word)
            macro = _MACRO.fullmatch(word)
            words += meaning[macro[1]] if macro else [word]
        return words


def arm_name(settings: Mapping[str, Any]) -> str:
    """A name for the run with these settings, fit for a folder: `initialization=xavier,seed=2`.

    Args:
        settings: The settings that differ between the runs; of each key the last part, or more where that is no
            longer one key's alone.
    """
    flat = dict(_flatten(settings))
    name = ",".join(f"{_short_key(key, flat)}={_short_value(value)}" for key, value in flat.items())
    if len(name) > _LONGEST_NAME:
        name = f"{name[: _LONGEST_NAME - 9]}-{hashlib.sha256(name.encode()).hexdigest()[:8]}"
    return name


def arm_of_agent() -> str | None:
    """The name of the run that a `wandb agent` has started this process for, if one has."""
    file = os.environ.get("WANDB_SWEEP_PARAM_PATH")
    if file is None or "WANDB_SWEEP_ID" not in os.environ or not Path(file).is_file():
        return None
    given = yaml.safe_load(Path(file).read_text(encoding="utf-8"))
    return arm_name({key: item["value"] for key, item in given.items() if key != "wandb_version"}) or None


def folder_name(text: str) -> str:
    """The text with nothing in it that a folder, a shell or W&B could take amiss."""
    return re.sub(r"[^A-Za-z0-9._=,-]+", "-", text).strip(".-")


def _flatten(settings: Mapping[str, Any], *parents: str) -> Iterator[tuple[str, Any]]:
    for key, value in settings.items():
        if isinstance(value, Mapping) and value:
            yield from _flatten(value, *parents, key)
        else:
            yield ".".join((*parents, key)), value


def _short_key(key: str, keys: Collection[str]) -> str:
    if key == "seed_everything":
        return "seed"
    parts = key.split(".")
    endings = (".".join(parts[-n:]) for n in range(1, len(parts)))
    alone = (end for end in endings if not any(other != key and f".{other}".endswith(f".{end}") for other in keys))
    return next(alone, key)


def _short_value(value: Any) -> str:
    if isinstance(value, int):
        return json.dumps(value)  # true, -1
    if isinstance(value, float):
        return min(repr(value), f"{value:.4g}", key=len).replace("e+", "e")
    if not isinstance(value, str):
        value = json.dumps(value, separators=(",", ":"))
    if re.fullmatch(r"([A-Za-z_]\w*\.)+[A-Za-z_]\w*", value):  # a class
        value = value.rsplit(".", 1)[-1]
    elif value.endswith(".yaml"):
        value = Path(value).stem
    return re.sub(r"[,=-]+", "-", folder_name(value)) or "none"


def _tidy(number: float) -> float:
    """Without the dust of binary fractions: 0.3, not 0.30000000000000004."""
    return number if isinstance(number, int) else float(f"{number:.12g}")


def quantized(number: float, q: float) -> float:
    """The multiple of `q` that is nearest, whole where `q` is."""
    return _tidy(round(number / q) * q)


def read_sweep_file(path: str | Path) -> Sweep:
    """Reads a sweep file.

    Args:
        path: The file.

    Raises:
        UserError: If `wandb sweep` or `llm-train study` could not take it as it is.
        OSError: If it cannot be read.
    """
    path = Path(path)
    try:
        text = path.read_text(encoding="utf-8")
        node = yaml.compose(text, yaml.SafeLoader)
        content = yaml.safe_load(text)
        json.dumps(content)
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: is not UTF-8 text (byte {error.start})") from error
    except yaml.MarkedYAMLError as error:
        line = f", line {error.problem_mark.line + 1}" if error.problem_mark else ""
        raise UserError(f"{path}{line}: is no YAML: {error.problem}") from error
    except (yaml.YAMLError, TypeError, ValueError) as error:
        raise UserError(f"{path}: holds something that a sweep cannot: {error}") from error
    lines: dict[Key, int] = {}
    for key, line in _lines(node) if node else ():
        if lines.setdefault(key, line) != line:
            raise UserError(f"{path}, line {line}: {key[-1]!r} is there twice, first in line {lines[key]}")
    return _Reader(path, lines).read(content)


def _lines(node: yaml.Node, *key: str | int) -> Iterator[tuple[Key, int]]:
    """The line on which each key and each item of a list stands."""
    if isinstance(node, yaml.MappingNode):
        for name, value in node.value:
            yield (*key, name.value), name.start_mark.line + 1
            yield from _lines(value, *key, name.value)
    elif isinstance(node, yaml.SequenceNode):
        for i, value in enumerate(node.value):
            yield (*key, i), value.start_mark.line + 1
            yield from _lines(value, *key, i)


class _Reader:
    """Checks what a sweep file says.

    Args:
        path: The file.
        lines: The line of each key.
    """

    def __init__(self, path: Path, lines: dict[Key, int]) -> None:
        self.path = path
        self.lines = lines

    def read(self, content: Any) -> Sweep:
        """Goes through the file from above."""
        if not isinstance(content, dict):
            self._fail((), "is no sweep file: it has no `method:` and no `parameters:`")
        for key in _FOR_LAUNCH:
            if key in content:
                self._fail((key,), "is for W&B's own servers, and cannot run on this machine; take it out")
        if content.get("method") == "custom":
            self._fail(("method",), "custom runs on W&B's servers only; a study is grid, random or bayes")
        self._section((), content, _KEYS, required=("method", "parameters"))
        self._section(("metric",), content.get("metric"), _METRIC_KEYS, required=("name",))
        self._section(("controller",), content.get("controller"), {"type": ("local", "cloud")}, required=("type",))
        if content.get("run_cap", 1) < 1:
            self._fail(("run_cap",), f"must be at least 1, got {content['run_cap']}")
        if content["method"] == "bayes" and "metric" not in content:
            self._fail(("method",), "bayes needs a metric: to get better at")
        self._check_hyperband(content)
        parameters = list(self._parameters(("parameters",), content["parameters"]))
        if content["method"] == "grid":
            for parameter in parameters:
                if parameter.distribution not in _ENUMERABLE:
                    self._fail(
                        _key_of(parameter),
                        f"a grid cannot go through {parameter.distribution}; give values, or another method",
                    )
        sweep = Sweep(self.path, content, parameters)
        self._check_command(sweep)
        return sweep

    def _fail(self, key: Key, message: str) -> NoReturn:
        line = next((self.lines[key[:n]] for n in range(len(key), 0, -1) if key[:n] in self.lines), None)
        where = ".".join(str(part) for part in key)
        raise UserError(f"{self.path}{f', line {line}' if line else ''}: {where}{': ' if where else ''}{message}")

    def _section(self, key: Key, section: Any, allowed: Mapping[str, Any], required: Collection[str] = ()) -> None:
        """Checks the keys of a section, and what kind of value each has; a section that is not there is right."""
        if section is None and key not in self.lines:
            return
        if not isinstance(section, dict):
            self._fail(key, f"must be a section with {', '.join(allowed)}, got {_shown(section)}")
        for name, value in section.items():
            if name not in allowed:
                self._fail((*key, name), f"there is no such key{_did_you_mean(name, allowed)}")
            expected = allowed[name]
            if isinstance(expected, tuple):
                if value not in expected:
                    self._fail(
                        (*key, name), f"must be {_or(expected)}, got {_shown(value)}{_did_you_mean(value, expected)}"
                    )
            elif not _is_a(value, expected):
                self._fail(
                    (*key, name), f"must be {_SAYS[expected]}, got {_shown(value)}{_number_hint(value, expected)}"
                )
        for name in required:
            if name not in section:
                self._fail(key, f"{name}: is missing" if not key else f"has no {name}:")

    def _check_hyperband(self, content: Mapping[str, Any]) -> None:
        rule = content.get("early_terminate")
        key = ("early_terminate",)
        self._section(key, rule, _HYPERBAND_KEYS, required=("type",))
        if rule is None:
            return
        if "min_iter" not in rule and not {"max_iter", "s"} <= rule.keys():
            self._fail(key, "needs min_iter:, or max_iter: and s:")
        if rule.get("min_iter", 1) < 1:
            self._fail((*key, "min_iter"), f"must be at least 1, got {rule['min_iter']}")
        eta = rule.get("eta", 3)
        if eta < 2 or eta != int(eta):
            self._fail((*key, "eta"), f"must be a whole number of at least 2 to run on this machine, got {eta}")
        if "metric" not in content:
            self._fail(key, "needs a metric: to tell good runs from bad ones")

    def _parameters(self, key: Key, section: Any, *parents: str) -> Iterator[Parameter]:
        if not isinstance(section, dict) or not section:
            self._fail(key, "is empty: there is nothing to sweep")
        for name, spec in section.items():
            here = (*key, name)
            if not isinstance(name, str) or not re.fullmatch(r"[A-Za-z_][A-Za-z0-9_.-]*", name):
                self._fail(here, "is no name of a parameter: letters, digits and _ . - only")
            if not isinstance(spec, dict):
                self._fail(here, f"must say `value:`, `values:`, or `min:` and `max:`, got {_shown(spec)}")
            if "parameters" in spec:
                self._section(here, spec, {"parameters": dict})
                yield from self._parameters((*here, "parameters"), spec["parameters"], *parents, name)
            else:
                yield self._parameter(here, (*parents, name), spec)

    def _parameter(self, key: Key, name: tuple[str, ...], spec: dict[str, Any]) -> Parameter:
        distribution = spec.get("distribution") or _implied(spec)
        if distribution is None:
            known = ("distribution", "parameters", *{part for keys in _DISTRIBUTIONS.values() for part in keys})
            unknown = next((part for part in spec if part not in known), None)
            if unknown is not None:
                self._fail((*key, unknown), f"there is no such key{_did_you_mean(unknown, known)}")
            self._fail(key, "must say `value:`, `values:`, or `min:` and `max:`")
        if distribution not in _DISTRIBUTIONS:
            instead = [f"{distribution}_values"] if distribution in _WITHDRAWN else _DISTRIBUTIONS
            self._fail(
                (*key, "distribution"), f"there is no {_shown(distribution)}{_did_you_mean(distribution, instead)}"
            )
        keys = _DISTRIBUTIONS[distribution]
        kinds = dict.fromkeys(keys, float) | {"values": list, "probabilities": list, "distribution": str}
        if distribution == "int_uniform":
            kinds |= {"min": int, "max": int}
        plain = {part: value for part, value in spec.items() if part != "value" or "value" not in keys}
        self._section(key, plain, {part: kinds[part] for part in (*keys, "distribution") if part != "value"})
        for part, default in keys.items():
            if default is REQUIRED and part not in spec:
                self._fail(key, f"{distribution} needs {part}:")
        complete = {part: spec.get(part, default) for part, default in keys.items()}
        self._check_numbers(key, distribution, complete)
        return Parameter(name, distribution, complete)

    def _check_numbers(self, key: Key, distribution: str, spec: Mapping[str, Any]) -> None:
        if "min" in spec and spec["min"] >= spec["max"]:
            self._fail(key, f"min {spec['min']} is not less than max {spec['max']}")
        if "log_uniform" in distribution and spec["min"] <= 0:
            self._fail((*key, "min"), f"must be greater than 0 for {distribution}, got {spec['min']}")
        for part in ("q", "a", "b"):
            if spec.get(part, 1) <= 0:
                self._fail((*key, part), f"must be greater than 0, got {spec[part]}")
        if spec.get("sigma", 1) < 0:
            self._fail((*key, "sigma"), f"must not be negative, got {spec['sigma']}")
        if "values" in spec and not spec["values"]:
            self._fail((*key, "values"), "is empty: there is nothing to sweep")
        if "probabilities" in spec:
            shares = spec["probabilities"]
            if not all(_is_a(share, float) and share >= 0 for share in shares):
                self._fail((*key, "probabilities"), f"must be numbers from 0 to 1, got {_shown(shares)}")
            if len(shares) != len(spec["values"]):
                self._fail(key, f"there are {len(spec['values'])} values and {len(shares)} probabilities")
            if not math.isclose(sum(shares), 1.0, rel_tol=1e-5):
                self._fail((*key, "probabilities"), f"must add up to 1, got {sum(shares):g}")

    def _check_command(self, sweep: Sweep) -> None:
        macros = []
        for i, word in enumerate(sweep.command):
            macro = _MACRO.fullmatch(word)
            if macro and not _ENVIRONMENT_MACRO.search(word):
                macros.append(macro[1])
                if macro[1] not in _MACROS:
                    self._fail(("command", i), f"there is no {word}{_did_you_mean(macro[1], _MACROS)}")
        if "program" in macros and "program" not in sweep.content:
            self._fail(("command",), "runs ${program}, and program: is missing")
        if not any(macro.startswith("args") for macro in macros):
            self._fail(("command",), "has no ${args}: the settings would not reach the runs")


def _key_of(parameter: Parameter) -> Key:
    """Where the file has a parameter."""
    return tuple(part for name in parameter.key for part in ("parameters", name))


def _implied(spec: Mapping[str, Any]) -> str | None:
    """The distribution of a parameter that names none."""
    if "value" in spec:
        return "constant"
    if "values" in spec:
        return "categorical_w_probabilities" if "probabilities" in spec else "categorical"
    if "min" in spec and "max" in spec:
        return "int_uniform" if _is_a(spec["min"], int) and _is_a(spec["max"], int) else "uniform"
    return None


def _is_a(value: Any, expected: type) -> bool:
    if expected in (int, float):
        kinds = int if expected is int else (int, float)
        return isinstance(value, kinds) and not isinstance(value, bool) and math.isfinite(value)
    return isinstance(value, expected)


def _shown(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) <= 60 else f"{text[:57]}..."


def _or(words: Sequence[str]) -> str:
    return " or ".join((", ".join(words[:-1]), words[-1])) if len(words) > 1 else words[0]


def _did_you_mean(word: Any, candidates: Collection[str]) -> str:
    close = difflib.get_close_matches(str(word), candidates, n=1)
    return f" (did you mean {close[0]!r}?)" if close else ""


def _number_hint(value: Any, expected: type) -> str:
    """YAML 1.1 takes 1e-3 for a text."""
    try:
        number = float(value) if expected in (int, float) and isinstance(value, str) else None
    except ValueError:
        number = None
    if number is None:
        return ""
    mantissa, e, exponent = value.lower().partition("e")
    return f" (YAML wants {mantissa}.0e{exponent if exponent[:1] in '+-' else '+' + exponent})" if e else ""
