"""Models inside other things: what is trained and saved as one is often more than the transformers model that is pruned.

Wrappers come in three kinds, in any nesting. Containers that only pass calls on (DDP, `torch.compile`, `PeftModel`) are seen
through: modules have the names that they have without. Modules that hold a transformers model beside others (a SentenceTransformer,
a module of one's own) stay: the transformers model is their body, as it is under a task head, and names begin at the wrapper.
Objects that hold such a module as an attribute (a SetFitModel, a `pipeline`) stand for it. Nothing here knows a library by name.
"""

from __future__ import annotations

from typing import Any

import torch.distributed as dist
from accelerate.utils import extract_model_from_parallel
from torch import nn
from transformers import PreTrainedModel

from ..compat import without_peft
from ..settings.errors import ConfigError

if dist.is_available():
    from torch.distributed.fsdp import FSDPModule, FullyShardedDataParallel


def bare_model(model: Any) -> nn.Module:
    """The module that is trained: of an object that is none, the one it holds; inside DDP and `torch.compile`, where modules have
    their own names. Shards are put back in place, and adapters stay.

    Raises:
        ConfigError: there is no transformers model, or several, in an object that is no module; or the model is in a wrapper
            that hides weights or gradients.
    """
    if type(model).__name__ == "DeepSpeedEngine":
        raise ConfigError("model", "DeepSpeedEngine", "is trained by DeepSpeed, which shows gradients to no one; use DDP or FSDP2.")
    held = model if isinstance(model, nn.Module) else _held(model)
    if dist.is_available() and any(isinstance(module, FullyShardedDataParallel) for module in held.modules()):
        allowed = "holds weights as flat pieces without rows and columns (FSDP1); use FSDP2 (`fully_shard`, `fsdp_version=2`)."
        raise ConfigError("model", "FullyShardedDataParallel", allowed)
    bare: nn.Module = extract_model_from_parallel(held, keep_torch_compile=False)
    for module in bare.modules():
        if dist.is_available() and isinstance(module, FSDPModule):
            module.reshard()  # after an evaluation the root's parameters are still gathered
    return bare


def contents(module: nn.Module) -> nn.Module:
    """What a container that only passes calls on holds: the module in DDP, `torch.compile` or a `PeftModel`. Others as they are."""
    inner: nn.Module = without_peft(extract_model_from_parallel(module, keep_torch_compile=False))
    return module if inner is module else contents(inner)


def transformers_models(model: Any) -> dict[str, PreTrainedModel]:
    """The outermost transformers models in a model, by the names they have there: `{"": model}` if it is one itself."""
    found: dict[str, PreTrainedModel] = {}

    def walk(module: nn.Module, name: str) -> None:
        module = contents(module)
        if not isinstance(module, PreTrainedModel):
            for key, child in module.named_children():
                walk(child, f"{name}.{key}" if name else key)
        elif not any(module is other for other in found.values()):
            found[name] = module

    walk(model if isinstance(model, nn.Module) else _held(model), "")
    return found


def transformers_model(model: Any) -> Any:
    """The one transformers model in a model; a module that holds none as it is.

    Raises:
        ConfigError: there are several; says how to choose.
    """
    found = transformers_models(model)
    if len(found) > 1:
        first = next(iter(found))
        allowed = f"holds several transformers models, {listed(found)}; pass one of them, such as `model.get_submodule({first!r})`."
        raise ConfigError("model", type(model).__name__, allowed)
    return next(iter(found.values()), None) or contents(bare_model(model))


def listed(models: dict[str, PreTrainedModel]) -> str:
    """Transformers models for an error: their names with their classes."""
    return ", ".join(f"{name!r} ({type(one).__name__})" for name, one in models.items())


def _held(holder: Any) -> nn.Module:
    """The module with a transformers model that an object has as an attribute.

    Raises:
        ConfigError: there is none, or there are several.
    """
    modules = {name: value for name, value in getattr(holder, "__dict__", {}).items() if isinstance(value, nn.Module)}
    found = {name: module for name, module in modules.items() if transformers_models(module)}
    if len(found) == 1:
        return next(iter(found.values()))
    kind = type(holder).__name__
    if found:
        attributes = ", ".join(f"`.{name}` ({type(module).__name__})" for name, module in found.items())
        raise ConfigError("model", kind, f"holds several modules with transformers models, {attributes}; pass one of them.")
    raise ConfigError("model", kind, "must be a torch module, or an object that has a transformers model as an attribute.")
