"""Parameters of a model by their place in it: embeddings, layers, head, or name.

The places follow from what PyTorch says of a model: its parameters by name, and its layers, the largest `nn.ModuleList`
in it. What a model registers before its layers are its embeddings, what it registers after them is its head. A matrix
that both share, such as the tied embeddings of GPT-2, counts as an embedding.
"""

import re
from collections.abc import Iterable
from dataclasses import dataclass
from fnmatch import fnmatchcase

from torch import nn

Parameters = dict[str, nn.Parameter]


class Anatomy:
    """A model's parameters, each under its first name, by where they stand.

    Args:
        model: Any module.
    """

    def __init__(self, model: nn.Module) -> None:
        self.parameters: Parameters = dict(model.named_parameters())
        stacks = {name: stack for name, stack in model.named_modules() if isinstance(stack, nn.ModuleList)}
        # The one with most in it: attention may have lists of its own.
        self.stack = max(stacks, key=lambda name: sum(p.numel() for p in stacks[name].parameters()), default="")
        n_layer = len(stacks[self.stack]) if stacks else 0
        self.layers: list[Parameters] = [self._under(f"{self.stack}.{i}.") for i in range(n_layer)]
        names = list(self.parameters)
        in_layers = [i for i, name in enumerate(names) if any(name in layer for layer in self.layers)] or [0]
        self.embeddings = {name: self.parameters[name] for name in names[: in_layers[0]]}
        self.head = {name: self.parameters[name] for name in names[in_layers[-1] + 1 :]}

    def _under(self, prefix: str) -> Parameters:
        return {name: parameter for name, parameter in self.parameters.items() if name.startswith(prefix)}

    def matching(self, pattern: str) -> Parameters:
        """The parameters whose name a glob pattern matches; `*` stands for dots too.

        Raises:
            ValueError: If there are none, with the names there are.
        """
        found = {name: p for name, p in self.parameters.items() if fnmatchcase(name, pattern)}
        if not found:
            raise ValueError(f"no parameter is named {pattern!r}; there are {in_short(self.parameters)}")
        return found

    def layer_range(self, text: int | str) -> Parameters:
        """The parameters of some layers: `3`, `-1`, `:6`, `2:-1`, `:50%`, counted as Python does.

        Raises:
            ValueError: If it is no range, or no layer is in it, with the layers there are.
        """
        n = len(self.layers)
        if not n:
            raise ValueError(f"layers {text}: the model has no stack of layers; name them by patterns")
        bounds = [_bound(part, n) for part in str(text).split(":")]
        if "bad" in bounds or len(bounds) > 2:
            raise ValueError(
                f"layers {text!r} is no range: write one layer (3, or -1 for the last), or where to begin and to stop "
                "(':6', '2:-1', ':50%')"
            )
        chosen = range(n)[slice(*bounds)] if len(bounds) == 2 else [i for i in range(n) if i == bounds[0] % n]
        if not chosen or (len(bounds) == 1 and not -n <= bounds[0] < n):
            raise ValueError(
                f"layers {text!r}: there is no such layer; there are {n}, {self.stack}.0 to {self.stack}.{n - 1}"
            )
        return {name: p for i in chosen for name, p in self.layers[i].items()}


def in_short(names: Iterable[str]) -> str:
    """Names with a star for the number of the layer, each once."""
    return ", ".join(dict.fromkeys(re.sub(r"\.\d+(?=\.|$)", ".*", name) for name in names))


def _bound(text: str, n: int) -> int | str | None:
    text = text.strip()
    if not text:
        return None
    if share := re.fullmatch(r"(\d+(?:\.\d+)?)%", text):
        return round(n * float(share[1]) / 100)
    return int(text) if re.fullmatch(r"-?\d+", text) else "bad"


@dataclass
class Selection:
    """Parameters of a model: all that one of these names.

    Args:
        embeddings: Whether what stands before the first layer is meant.
        layers: Which layers are meant, counted as in Python: `3`, `-1`, `":6"`, `"2:-1"`, `":50%"` for the first half.
        patterns: Which parameters are meant by name, as glob patterns: `"*.mlp.*"`, `"*bias"`.
        all_but_head: Whether everything is meant but what stands after the last layer.
    """

    embeddings: bool = False
    layers: int | str | None = None
    patterns: list[str] | None = None
    all_but_head: bool = False

    def of(self, model: nn.Module) -> Parameters:
        """The parameters that are meant, in the model's order.

        Raises:
            ValueError: If a range or a pattern names nothing that is there, or nothing is named.
        """
        anatomy = Anatomy(model)
        chosen: Parameters = {}
        if self.embeddings:
            chosen |= anatomy.embeddings
        if self.layers is not None:
            chosen |= anatomy.layer_range(self.layers)
        for pattern in self.patterns or []:
            chosen |= anatomy.matching(pattern)
        if self.all_but_head:
            chosen |= {name: p for name, p in anatomy.parameters.items() if name not in anatomy.head}
        if not chosen:
            raise ValueError("nothing is named; set embeddings, layers, patterns or all_but_head")
        return {name: p for name, p in anatomy.parameters.items() if name in chosen}
