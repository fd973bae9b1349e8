r"""Muon: steps of equal size in all directions of a matrix, and AdamW for the parameters that are not hidden matrices.

The gradient of a matrix is dominated by a few directions. Muon keeps the directions of the momentum and gives all of
them the same length: it replaces the momentum matrix by the orthogonal matrix that is closest to it.

    B ← μ B + (1 - μ) G                           momentum of the gradient G, a matrix
    U Σ Vᵀ = (1 - μ) G + μ B                      singular value decomposition (Nesterov's momentum)
    W ← (1 - η λ) W - η s U Vᵀ                    learning rate η, weight decay λ, scale s of the shape

`orthogonalized` computes U Vᵀ without a decomposition. The iteration X ← a X + b (X Xᵀ) X + c (X Xᵀ)² X applies the
polynomial p(σ) = a σ + b σ³ + c σ⁵ to each singular value σ, and leaves U and V as they are. Five iterations with the
coefficients below bring all σ that are not tiny between about 0.7 and 1.2, which is close enough to 1.

An orthogonal matrix of r rows and c columns has entries of size 1 / √max(r, c). The scale s corrects for it; r is the
number of outputs of the layer, and c that of its inputs:

| scale             | s                   | meaning                                                                |
|-------------------|---------------------|------------------------------------------------------------------------|
| `original`        | √max(1, r / c)      | a step changes the output of the layer equally whatever its shape      |
| `match_rms_adamw` | 0.2 √max(r, c)      | entries of a step are as large as AdamW's, whose learning rates fit    |

Papers: Jordan et al., "Muon: An optimizer for hidden layers in neural networks" (2024),
https://kellerjordan.github.io/posts/muon/; Liu et al., "Muon is Scalable for LLM Training" (2025),
https://arxiv.org/abs/2502.16982 (`match_rms_adamw`); Loshchilov and Hutter, "Decoupled Weight Decay Regularization"
(2019), https://arxiv.org/abs/1711.05101 (AdamW).
"""

import itertools
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, Literal

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.optim import AdamW, Optimizer

from lightning_modules.common.ranges import NonNegativeFloat, PositiveInt, Probability
from lightning_modules.finetuning.selection import matching
from lightning_modules.optim.groups import ParameterGroups
from lightning_modules.runtime.bfloat16 import has_matrix_units
from lightning_modules.runtime.private_names import foreach_add_, foreach_lerp_, foreach_mul, foreach_mul_
from lightning_modules.runtime.shards import sharded_as

COEFFICIENTS = (3.4445, -4.7750, 2.0315)  # a, b, c of Jordan et al. (2024)
SCALES: dict[str, Callable[[int, int], float]] = {
    "original": lambda r, c: math.sqrt(max(1.0, r / c)),
    "match_rms_adamw": lambda r, c: 0.2 * math.sqrt(max(r, c)),
}
_EPSILON = 1e-7  # of the norm, for a gradient of zeros
_MOST_GATHERED = 2**26  # entries of sharded matrices that a process has whole at a time, or one matrix if it has more


class Muon(Optimizer):
    """Muon for the matrices of the hidden layers, and AdamW for embeddings, output matrices, biases and norms.

    Muon updates the two-dimensional parameters within the layers of a model (its stack of blocks), other than
    embeddings; see `lightning_modules.optim.groups`. Matrices of one shape are orthogonalised together. A schedule
    scales both learning rates. Matrices that are sharded over processes are gathered for their step, a few at a time.

    Args:
        params: Filled in by the framework: groups of named parameters.
        lr: Learning rate of Muon; with `scale: match_rms_adamw`, one that suits AdamW.
        weight_decay: Decoupled weight decay of the matrices: a step shrinks them by `lr * weight_decay`.
        momentum: Share of the momentum that a step keeps (0 to less than 1).
        nesterov: Whether to orthogonalise the mean of gradient and momentum, in place of the momentum alone.
        ns_steps: Iterations of the orthogonalisation.
        scale: Factor of the steps by the shape of the matrix: `original` or `match_rms_adamw`.
        adamw_lr: Learning rate of AdamW; `null` means `lr`.
        adamw_weight_decay: Weight decay of AdamW on embeddings and output matrices; `null` means `weight_decay`.
        betas: Shares of the two running means that a step of AdamW keeps (0 to less than 1).
        eps: Number that AdamW adds to its denominator.
        matrices: Glob patterns of the names of the parameters that Muon updates, in adapted layers with `base_layer` or
            `lora_A.default`; `null` means the rule above.
        split_stacked: Whether the matrices that a parameter stacks, such as those of queries, keys and values in `qkv`,
            are orthogonalised and scaled each by itself, as in a decoder that stores them apart. Otherwise they count
            as one matrix, and the part with the largest gradient, often the values, takes most of its step. Our
            decoder says what it stacks, and models of Transformers do not.
        fused: Whether AdamW updates all its parameters in one kernel.
        dtype: Number type of the orthogonalisation, which needs little precision; `null` means `bfloat16` on a GPU and
            on a CPU with matrix units for it (AMX), and `float32` on other CPUs, where `bfloat16` is far slower.

    Raises:
        ValueError: If there is no matrix to update or a pattern matches none, or with `split_stacked`, if no parameter
            is known to stack several.
    """

    def __init__(
        self,
        params: ParameterGroups,
        lr: NonNegativeFloat = 1e-3,
        weight_decay: NonNegativeFloat = 0.01,
        momentum: Probability = 0.95,
        nesterov: bool = True,
        ns_steps: PositiveInt = 5,
        scale: Literal["original", "match_rms_adamw"] = "match_rms_adamw",
        adamw_lr: NonNegativeFloat | None = None,
        adamw_weight_decay: NonNegativeFloat | None = None,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: NonNegativeFloat = 1e-8,
        matrices: list[str] | None = None,
        split_stacked: bool = False,
        fused: bool = True,
        dtype: Literal["float32", "bfloat16"] | None = None,
    ) -> None:
        of_muon = {
            "lr": lr,
            "weight_decay": weight_decay,
            "momentum": momentum,
            "nesterov": nesterov,
            "ns_steps": ns_steps,
            "scale": scale,
            "dtype": dtype,
            "split_stacked": split_stacked,
        }
        of_adamw = {
            "lr": lr if adamw_lr is None else adamw_lr,
            "weight_decay": weight_decay if adamw_weight_decay is None else adamw_weight_decay,
        }
        # AdamW gets its groups at each step. Its defaults hold what it looks up in a group.
        self._adamw = AdamW([torch.empty(0)], betas=betas, eps=eps, fused=fused)
        of_adamw = self._adamw.defaults | of_adamw
        chosen = params.hidden_matrices if matrices is None else _matching(params, matrices)
        split = []
        for group in params:
            for algorithm, defaults in (("muon", of_muon), ("adamw", of_adamw)):
                own = [(name, p) for name, p in group["params"] if (name in chosen) == (algorithm == "muon")]
                if own:
                    split.append(defaults | group | {"params": own, "algorithm": algorithm})
        if all(group["algorithm"] == "adamw" for group in split):
            raise ValueError(
                "Muon finds no trained matrix in a stack of layers, and would leave all parameters to AdamW; name "
                "matrices by patterns (optimizer.matrices), or take torch.optim.AdamW"
            )
        super().__init__(split, {})
        named = {name: p for group in params for name, p in group["params"]}
        self._rows = {named[name]: rows for name, rows in params.stacked.items() if name in named}
        self._transposed = {named[name] for name in params.transposed if name in named}
        if split_stacked and not self._rows:
            raise ValueError("split_stacked: this model does not say which parameters stack matrices; leave it out")

    @torch.no_grad()
    def step(self, closure: Callable[[], Tensor] | None = None) -> Tensor | None:  # type: ignore[override]
        """Update all parameters that have a gradient; return the loss of the closure, if there is one."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            if group["algorithm"] == "muon":
                # A group of an earlier version does not have the setting.
                rows = self._rows if group.get("split_stacked") else {}
                _step_of_muon(group, self.state, rows, self._transposed)
        # AdamW works on the state and the groups of this optimiser, which schedules and checkpoints replace.
        self._adamw.state = self.state
        self._adamw.param_groups = [group for group in self.param_groups if group["algorithm"] == "adamw"]
        self._adamw.step()
        return loss


def _step_of_muon(
    group: dict[str, Any], state: dict[Tensor, Any], rows: Mapping[Tensor, Sequence[int]], transposed: set[Tensor]
) -> None:
    """Update the matrices of a group by the formula at the top; each call of a `foreach` function is one kernel.

    Args:
        group: Group of the optimiser.
        state: State of the optimiser.
        rows: Numbers of rows of the matrices that a parameter stacks; a parameter that is not here is one matrix.
        transposed: Parameters whose columns are the outputs of their layer.
    """
    params = [p for p in group["params"] if p.grad is not None]
    if not params:
        return
    gradients: list[Tensor] = [p.grad for p in params]
    for p in params:
        if not state[p]:
            state[p]["momentum_buffer"] = torch.zeros_like(p)
    momenta = [state[p]["momentum_buffer"] for p in params]
    foreach_lerp_(momenta, gradients, 1 - group["momentum"])
    updates = momenta
    if group["nesterov"]:
        updates = list(foreach_mul(gradients, 1.0))  # copies: torch 2.11 cannot shard the `lerp` that makes new tensors
        foreach_lerp_(updates, momenta, group["momentum"])
    default = "bfloat16" if has_matrix_units(updates[0].device) else "float32"
    stacked = [rows.get(p, [p.size(0)]) for p in params]
    scale, dtype = SCALES[group["scale"]], getattr(torch, group["dtype"] or default)
    scales: list[Sequence[float]] = [
        [scale(p.size(1), n) if p in transposed else scale(n, p.size(1)) for n in rows_of_p]
        for p, rows_of_p in zip(params, stacked, strict=True)
    ]
    steps = _steps(updates, stacked, scales, group["ns_steps"], dtype)
    foreach_mul_(params, 1 - group["lr"] * group["weight_decay"])
    foreach_add_(params, steps, alpha=-group["lr"])


def _steps(
    updates: list[Tensor],
    rows: list[Sequence[int]],
    scales: list[Sequence[float]],
    ns_steps: int,
    dtype: torch.dtype,
) -> list[Tensor]:
    """Return s U Vᵀ of each update, or of each matrix that it stacks, below each other.

    Args:
        updates: Matrices, or shards of them.
        rows: Numbers of rows of the matrices in each update.
        scales: s of each of these matrices.
        ns_steps: Iterations.
        dtype: Number type of the iterations.
    """
    steps = list(updates)
    for some in _gathered_together(updates):
        matrices = [matrix for i in some for matrix in _whole(updates[i]).split(rows[i])]
        factors = _orthogonal_factors(matrices, ns_steps, dtype)
        foreach_mul_(factors, [s for i in some for s in scales[i]])
        following = iter(factors)  # of one update after the other
        for i in some:
            own = [*itertools.islice(following, len(rows[i]))]
            steps[i] = sharded_as(updates[i], torch.cat(own) if len(own) > 1 else own[0])
    return steps


def _gathered_together(updates: list[Tensor]) -> Iterator[list[int]]:
    """Yield the numbers of updates that are orthogonalised together: all, or so many shards as fit into memory."""
    if not any(isinstance(update, DTensor) for update in updates):
        yield [*range(len(updates))]
        return
    some: list[int] = []
    for i in range(len(updates)):
        if some and sum(updates[j].numel() for j in [*some, i]) > _MOST_GATHERED:
            yield some
            some = []
        some.append(i)
    yield some


def _orthogonal_factors(matrices: list[Tensor], ns_steps: int, dtype: torch.dtype) -> list[Tensor]:
    """Return U Vᵀ of each matrix; those of one shape, and those of the transposed shape, are computed together."""
    by_shape: dict[tuple[int, ...], list[int]] = {}
    for i, matrix in enumerate(matrices):
        by_shape.setdefault(tuple(sorted(matrix.shape)), []).append(i)
    factors = list(matrices)
    for some in by_shape.values():
        wide = torch.stack([m if m.size(0) <= m.size(1) else m.mT for m in (matrices[i] for i in some)])
        found = orthogonalized(wide.to(dtype), ns_steps).to(wide.dtype).unbind()
        for i, factor in zip(some, found, strict=True):
            factors[i] = factor if factor.shape == matrices[i].shape else factor.mT.contiguous()
    return factors


def _whole(matrix: Tensor) -> Tensor:
    return matrix.full_tensor() if isinstance(matrix, DTensor) else matrix


def orthogonalized(matrices: Tensor, steps: int = 5) -> Tensor:
    """Return the orthogonal factor U Vᵀ of each matrix, approximately: singular values between about 0.7 and 1.2.

    Args:
        matrices: (N, r, c) with r ≤ c.
        steps: Number of iterations.

    Returns:
        (N, r, c), of the dtype of `matrices`.
    """
    a, b, c = COEFFICIENTS
    # The iteration converges if all singular values are at most 1; their largest is at most the Frobenius norm.
    X = matrices / matrices.norm(dim=(-2, -1), keepdim=True).clamp(min=_EPSILON)  # noqa: N806
    for _ in range(steps):
        A = X @ X.mT  # noqa: N806  # (N, r, r)
        B = torch.baddbmm(A, A, A, beta=b, alpha=c)  # noqa: N806  # b A + c A²
        X = torch.baddbmm(X, B, X, beta=a)  # noqa: N806  # a X + B X
    return X


def _matching(groups: ParameterGroups, patterns: list[str]) -> set[str]:
    """Return the names of the two-dimensional parameters that match one of the patterns; raise `ValueError` if none."""
    names = [name for group in groups for name, p in group["params"] if p.ndim == 2]
    return {name for pattern in patterns for name in matching(names, pattern, "matrix")}
