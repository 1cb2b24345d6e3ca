"""Distributed training: parameters that are sharded over ranks, and what ranks have to agree on.

Under DDP every rank holds the whole model and the same gradients, so all ranks decide the same. Under FSDP2 (`fully_shard`) and
tensor parallelism parameters are DTensors: scores are computed from whole tensors, gathered one at a time, so a unit that crosses
shards is decided once, and each rank masks its own part.
"""

from __future__ import annotations

import zlib
from collections.abc import Mapping
from typing import TypeGuard

import torch
import torch.distributed as dist
from torch import Tensor, nn

if dist.is_available():
    from torch.distributed.fsdp import FSDPModule
    from torch.distributed.tensor import DTensor, distribute_tensor


def num_ranks() -> int:
    """The number of processes (world size)."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def rank() -> int:
    """The rank of this process, 0 for the first or only one."""
    return dist.get_rank() if dist.is_available() and dist.is_initialized() else 0


def wait_for_all() -> None:
    """Wait until all processes have reached this call."""
    if num_ranks() > 1:
        dist.barrier()


# ---------------------------------------------------------------------------------------------------------------------- models


def is_tensor_parallel(model: nn.Module) -> bool:
    """Whether layers see only a part of their inputs or outputs: weights are sharded, and not only by FSDP2."""
    places = [weight.placements for weight in model.parameters() if is_sharded(weight)]
    shardings = [sum(not place.is_replicate() for place in placements) for placements in places]
    return any(shardings) and (max(shardings) > 1 or not any(isinstance(module, FSDPModule) for module in model.modules()))


# --------------------------------------------------------------------------------------------------------------------- tensors


def is_sharded(tensor: Tensor) -> TypeGuard[DTensor]:
    """Whether this process may hold only a part of the tensor."""
    return dist.is_available() and isinstance(tensor, DTensor)


def whole(tensor: Tensor) -> Tensor:
    """A sharded tensor, gathered from all ranks (collective: all must call it); any other tensor itself."""
    return tensor.full_tensor() if is_sharded(tensor) else tensor


def local(tensor: Tensor) -> Tensor:
    """The part of a tensor on this rank."""
    return tensor.to_local() if is_sharded(tensor) else tensor


def placed_like(tensor: Tensor, other: Tensor) -> Tensor:
    """A whole tensor sharded like `other`: each rank keeps its own part, without communication."""
    if not is_sharded(other):
        return tensor
    return distribute_tensor(tensor, other.device_mesh, other.placements, src_data_rank=None)


def summed(tensor: Tensor) -> Tensor:
    """The sum of a tensor over ranks."""
    if num_ranks() > 1:
        tensor = tensor.clone()
        dist.all_reduce(tensor)
    return tensor


def differing(tensors: Mapping[str, Tensor]) -> list[str]:
    """Names of the tensors that differ between ranks, by their checksums, in one exchange."""
    if num_ranks() == 1:
        return []
    checksums = torch.tensor([zlib.crc32(tensor.cpu().numpy().data) for tensor in tensors.values()])
    extremes = torch.stack([checksums, -checksums]).to(next(iter(tensors.values())).device)
    dist.all_reduce(extremes, dist.ReduceOp.MAX)
    highest, lowest = extremes[0], -extremes[1]
    return [name for name, differs in zip(tensors, (highest != lowest).tolist()) if differs]
