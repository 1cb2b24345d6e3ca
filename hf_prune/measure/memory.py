"""Memory of a model: its weights, and the peak of one forward pass beyond them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import nn
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


def megabytes(count: int) -> str:
    """A number of bytes in megabytes, as text; a megabyte is 10⁶ bytes."""
    return f"{count / 1e6:,.2f} MB"


def weight_bytes(model: nn.Module) -> int:
    tensors = {id(tensor): tensor for tensor in (*model.parameters(), *model.buffers())}
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors.values())


_weak: Any = StorageWeakRef


class _Held(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Counts the bytes of the tensors that operations made and that are still there; `most` is the maximum so far."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.sizes: dict[Any, int] = {}
        self.most = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        made = func(*args, **(kwargs or {}))
        before = {_weak(part.untyped_storage()) for part in tree_leaves((args, kwargs)) if isinstance(part, torch.Tensor)}
        self.sizes = {storage: size for storage, size in self.sizes.items() if not storage.expired()}
        for part in tree_leaves(made):
            if isinstance(part, torch.Tensor) and (storage := _weak(part.untyped_storage())) not in before:
                self.sizes[storage] = part.untyped_storage().nbytes()
        self.most = max(self.most, sum(self.sizes.values()))
        return made


def activation_bytes(model: nn.Module, inputs: Mapping[str, torch.Tensor]) -> int:
    """The most bytes of tensors that one forward holds at once, besides weights and inputs."""
    training, held = model.training, _Held()
    with torch.no_grad(), held:
        model.eval()(**inputs)
    model.train(training)
    return held.most
