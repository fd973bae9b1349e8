"""Selection of parameters of a model, by their place (embeddings, layers, head) or by name.

The places are found without knowledge of the architecture: the layers of a model are its largest `nn.ModuleList`, its
embeddings are the parameters that are registered before the layers, and its head is the parameters that are registered
after them. A matrix that is shared by embeddings and head, as in GPT-2, is an embedding.
"""

import re
from collections.abc import Collection, Iterable
from dataclasses import dataclass
from fnmatch import fnmatchcase
from itertools import takewhile

from torch import nn

from lightning_modules.common.messages import MOST_LISTED, listed
from lightning_modules.finetuning.adapters import name_for_patterns

Parameters = dict[str, nn.Parameter]


class ModelParts:
    """The parameters of a model by their place, each under its first name.

    Attributes:
        stack: Name of the `nn.ModuleList` of the layers, empty if there is none.
        embeddings: Parameters before the layers; none in a model without layers.
        head: Parameters after the layers; none in a model without layers.
    """

    def __init__(self, model: nn.Module) -> None:
        self.parameters: Parameters = dict(model.named_parameters())
        stacks = {name: stack for name, stack in model.named_modules() if isinstance(stack, nn.ModuleList)}
        # The largest, because attention may have lists of its own.
        self.stack = max(stacks, key=lambda name: sum(p.numel() for p in stacks[name].parameters()), default="")
        self.layers = [self._under(f"{self.stack}.{i}.") for i in range(len(stacks[self.stack]) if stacks else 0)]
        names = list(self.parameters)
        places = [i for i, name in enumerate(names) if any(name in layer for layer in self.layers)]
        first, last = (places[0], places[-1]) if places else (0, len(names))
        self.embeddings = {name: self.parameters[name] for name in names[:first]}
        self.head = {name: self.parameters[name] for name in names[last + 1 :]}

    def _under(self, prefix: str) -> Parameters:
        return {name: parameter for name, parameter in self.parameters.items() if name.startswith(prefix)}

    def require_layers(self, selection: str) -> None:
        """Raise `ValueError` if the model has no layers, and so neither embeddings nor a head that are known."""
        if not self.layers:
            raise ValueError(f"{selection}: the model has no stack of layers; name parameters by patterns")

    def layer_range(self, text: int | str) -> Parameters:
        """Return the parameters of a layer or of a range of layers: `3`, `-1`, `:6`, `2:-1`, `:50%`.

        Raises:
            ValueError: If the text is not a range, or there is no such layer.
        """
        self.require_layers(f"layers {text}")
        n = len(self.layers)
        try:
            start, *rest = (_bound(part, n) for part in str(text).split(":"))
            if len(rest) > 1 or (start is None and not rest):
                raise ValueError
        except ValueError:
            raise ValueError(
                f"layers {text!r} is no range: write one layer (3, or -1 for the last), or where to begin and to stop "
                "(':6', '2:-1', ':50%')"
            ) from None
        chosen = range(n)[start : rest[0]] if rest else [i for i in range(n) if start in (i, i - n)]
        if not chosen:
            raise ValueError(
                f"layers {text!r}: there is no such layer; there are {n}, {self.stack}.0 to {self.stack}.{n - 1}"
            )
        return {name: p for i in chosen for name, p in self.layers[i].items()}


def matching(names: Collection[str], pattern: str, kind: str) -> list[str]:
    """Return the names of parameters or modules that match a glob pattern, in which `*` matches dots too.

    Raises:
        ValueError: If no name matches. The message lists the names that resemble the pattern most, and says where all
            of them are.
    """
    found = [name for name in names if fnmatchcase(name, pattern)]
    if not found:
        known = of_all_layers(names)
        where = f"; all are in {listed(_parts(known))}" if len(known) > MOST_LISTED else ""
        raise ValueError(f"no {kind} is named {pattern!r}; there are {listed(known, like=pattern)}{where}")
    return found


def of_all_layers(names: Iterable[str]) -> list[str]:
    """Return names with a star in place of the number of a layer, each once."""
    return [*dict.fromkeys(re.sub(r"\.\d+(?=\.|$)", ".*", name) for name in names)]


def _parts(names: Iterable[str]) -> list[str]:
    """Return patterns of the parts of a model in which names are: one for each child of their last common parent."""
    paths = [name.split(".") for name in names]
    common = [*takewhile(lambda parts: len(set(parts)) == 1, zip(*paths, strict=False))]
    return [*dict.fromkeys(".".join([*path[: len(common) + 1], "*"][: len(path)]) for path in paths)]


def _bound(text: str, n: int) -> int | None:
    """Return one end of a range of `n` layers; raise `ValueError` if it is not a number."""
    if share := re.fullmatch(r"\s*(\d+(?:\.\d+)?)%\s*", text):
        return round(n * float(share[1]) / 100)
    return int(text) if text.strip() else None


@dataclass
class Selection:
    """Selection of parameters of a model: all that at least one field selects.

    Args:
        embeddings: Whether to select the parameters before the first layer, and with them an output matrix that is
            shared with the embeddings.
        layers: Layers to select, counted as in Python: `3`, `-1`, `":6"`, `"2:-1"`, `":50%"` for the first half.
        patterns: Parameters to select by name, as glob patterns: `"*.mlp.*"`, `"*bias"`. The names are those of the
            model without adapters; those of an adapter (see `LoRA`) are `query.lora_A.default` and
            `query.lora_B.default`, so `"*.weight"` selects none.
        all_but_head: Whether to select all parameters except those after the last layer.
    """

    embeddings: bool = False
    layers: int | str | None = None
    patterns: list[str] | None = None
    all_but_head: bool = False

    def of(self, model: nn.Module) -> Parameters:
        """Return the selected parameters in the order of the model.

        Raises:
            ValueError: If a range or a pattern matches nothing, nothing is selected, or the model has no layers and
                more than patterns are given.
        """
        parts, chosen = ModelParts(model), set[str]()
        if self.embeddings:
            parts.require_layers("embeddings")
            chosen |= parts.embeddings.keys()
        if self.layers is not None:
            chosen |= parts.layer_range(self.layers).keys()
        names = {name_for_patterns(name): name for name in parts.parameters}
        for pattern in self.patterns or []:
            chosen |= {names[name] for name in matching(names, pattern, "parameter")}
        if self.all_but_head:
            parts.require_layers("all_but_head")
            chosen |= parts.parameters.keys() - parts.head.keys()
        if not chosen:
            raise ValueError("nothing is named; set embeddings, layers, patterns or all_but_head")
        return {name: p for name, p in parts.parameters.items() if name in chosen}
