"""Checkpoints in shards, for models that are too large for the memory of one machine.

Such a checkpoint is a small file of the usual name, with all but the tensors, and a folder beside it. In the folder,
file i has what process i of n holds: its share of each sharded tensor, a range of rows, and the first process also has
the tensors that are not sharded. The files are those of other checkpoints: plain tensors with checksums, which are
read without running code. (The index of PyTorch's own format, `torch.distributed.checkpoint`, is a pickle.)
"""

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch import Tensor
from torch.distributed.tensor import DTensor, distribute_tensor

SHARDS = "shards"  # in a checkpoint: `folder`, beside its file, and `n`, the number of files in it
_WEIGHTS, _OPTIMIZERS = "state_dict", "optimizer_states"
_FOLDER = re.compile(r"shards_[0-9]+_[0-9a-f]+")

Tensors = dict[str, Tensor]  # by their place in a checkpoint: `state_dict/NAME`, `optimizer_states/0/3/exp_avg`


def taken_apart(checkpoint: Mapping[str, Any]) -> tuple[dict[str, Any], Tensors]:
    """Return a checkpoint without the tensors of the model and of the optimisers, and these tensors."""
    tensors = {f"{_WEIGHTS}/{name}": tensor for name, tensor in checkpoint[_WEIGHTS].items()}
    optimizers = []
    for number, optimizer in enumerate(checkpoint.get(_OPTIMIZERS, [])):
        rest: dict[Any, dict[str, Any]] = {}
        for parameter, state in optimizer["state"].items():
            rest[parameter] = {name: value for name, value in state.items() if not isinstance(value, Tensor)}
            places = {name: f"{_OPTIMIZERS}/{number}/{parameter}/{name}" for name in state.keys() - rest[parameter]}
            tensors |= {place: state[name] for name, place in places.items()}
        optimizers.append(optimizer | {"state": rest})
    return {**checkpoint, _WEIGHTS: {}, _OPTIMIZERS: optimizers}, tensors


def put_together(rest: Mapping[str, Any], tensors: Tensors) -> dict[str, Any]:
    """Return the checkpoint that was taken apart, with these tensors; it needs not have those of the optimisers."""
    checkpoint = {name: value for name, value in rest.items() if name != SHARDS}
    checkpoint[_WEIGHTS] = {}
    for place, tensor in tensors.items():
        kind, _, name = place.partition("/")
        if kind == _WEIGHTS:
            checkpoint[_WEIGHTS][name] = tensor
        else:
            number, parameter, key = name.split("/")
            checkpoint[_OPTIMIZERS][int(number)]["state"][int(parameter)][key] = tensor
    return checkpoint


def share(tensors: Tensors, rank: int) -> Tensors:
    """Return what a process writes: its rows of sharded tensors, and on rank 0 the others."""
    return {
        place: tensor.to_local() if isinstance(tensor, DTensor) else tensor
        for place, tensor in tensors.items()
        if isinstance(tensor, DTensor) or rank == 0
    }


def whole(shares: Sequence[Tensors]) -> Tensors:
    """Return the whole tensors of the shares of all processes."""
    return {place: _joined([some[place] for some in shares if place in some]) for place in shares[0]}


def rows_like(shares: Sequence[Tensors], place: str, like: Tensor) -> Tensor:
    """Return a tensor of the shares, sharded over the processes of today as another tensor is; only its rows are read.

    Args:
        shares: Shares of all processes that wrote the checkpoint.
        place: Place of the tensor in the checkpoint.
        like: The other tensor, such as the parameter that a state of the optimiser belongs to.
    """
    parts = [some[place] for some in shares if place in some]
    was_sharded = len(parts) == len(shares) and (len(parts) > 1 or parts[0].shape == like.shape)
    if not was_sharded or not isinstance(like, DTensor):
        return _joined(parts)
    shape = torch.Size([sum(map(len, parts)), *parts[0].shape[1:]])
    size = -(-shape[0] // like.device_mesh.size())  # rows of a process, as `torch.chunk` has them
    first = like.device_mesh.get_local_rank() * size
    mine = []
    for part in parts:
        mine.append(part[max(first, 0) : max(first + size, 0)])
        first -= len(part)
    local = torch.cat(mine).to(like.to_local().device)
    stride = torch.empty(shape, device="meta").stride()
    return DTensor.from_local(local, like.device_mesh, like.placements, shape=shape, stride=stride)


def sharded_as(other: Tensor, tensor: Tensor) -> Tensor:
    """Return the rows of a tensor that this process has of another one, if that is sharded, or the tensor itself.

    Args:
        other: A tensor, or its shard.
        tensor: Whole tensor of the same shape, with the same values on each process.
    """
    if not isinstance(other, DTensor):
        return tensor
    sharded = distribute_tensor(tensor, other.device_mesh, other.placements, src_data_rank=None)
    return sharded.to(other.device)  # shards that are kept on the host have a mesh of GPUs, to which it was moved


def folder_of(file: Path, checkpoint: Mapping[str, Any]) -> Path:
    """Return the folder of the shards of a checkpoint; the file can be a stranger's, and name no folder elsewhere.

    Raises:
        MisconfigurationException: If the name is not that of a folder of shards.
    """
    name = str(checkpoint[SHARDS]["folder"])
    if not _FOLDER.fullmatch(name):
        raise MisconfigurationException(f"{file}: the checkpoint names {name!r} as the folder of its shards; refused")
    return file.parent / name


def new_folder(file: Path, step: int, tag: str) -> Path:
    """Return a folder for the shards of a checkpoint."""
    return file.parent / f"shards_{step}_{tag}"


def folders_in(folder: Path) -> set[Path]:
    """Return all folders of shards in a folder of checkpoints."""
    return {path for path in folder.iterdir() if path.is_dir() and _FOLDER.fullmatch(path.name)}


def _joined(parts: Sequence[Tensor]) -> Tensor:
    return parts[0] if len(parts) == 1 else torch.cat(list(parts))
