"""Which models may have their weights changed in place, or cut."""

from __future__ import annotations

import torch
from transformers import PreTrainedModel

from ..settings.errors import ConfigError
from .attached import is_attached
from .blocks import is_adapted
from .sharding import is_sharded

#: What weights can be computed with; others are read and written by kernels of their own.
_FLOATS = frozenset({torch.float64, torch.float32, torch.bfloat16, torch.float16})


def check_changeable(model: PreTrainedModel) -> None:
    """Raise unless the weights of a model can be changed in place.

    Raises:
        ConfigError: it is quantized, has adapters, is sharded, without weights, or attached to a pruner; says what to do.
    """
    name = type(model).__name__
    if any(parameter.dtype not in _FLOATS for parameter in model.parameters()):  # a GGUF file, once read, is as good as any
        raise ConfigError("model", name, "is quantized; prune first and quantize what comes out.")
    if any(is_adapted(module) for module in model.modules()):
        raise ConfigError("model", name, "has adapters; merge them first (`merge_and_unload()`).")
    if any(is_sharded(parameter) for parameter in model.parameters()):
        raise ConfigError("model", name, "is sharded over ranks; prune it in one process.")
    if any(parameter.is_meta for parameter in model.parameters()):
        raise ConfigError("model", name, "is on the meta device; load its weights into memory.")
    if is_attached(model):
        raise ConfigError("model", name, "is attached to a Pruner; call its finish() or release() first.")
