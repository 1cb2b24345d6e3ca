"""Models inside wrappers: the object that is trained and saved is often more than the transformers model that is pruned.

Wrappers come in three kinds, nested in any way. Containers that only forward calls (DDP, `torch.compile`, `PeftModel`) are
transparent: modules have the same names as without them. Modules that hold a transformers model among others (a
SentenceTransformer, a custom module) are kept: the transformers model is their body, as under a task head, and names start at the
wrapper. Objects with such a module as an attribute (a SetFitModel, a `pipeline`) stand for it. No library is referred to by name.
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

#: What containers call the module to which they forward calls: DDP and its like, and `torch.compile`.
_HELD = ("module", "_orig_mod")


def bare_model(model: Any) -> nn.Module:
    """The module that is trained: the one inside DDP and `torch.compile`, or the one that an object holds if it is not a module.
    Shards are put back in place; adapters stay.

    Raises:
        ConfigError: an object that is not a module holds no transformers model, or several; or the model is in a wrapper that hides
            weights or gradients.
    """
    if type(model).__name__ == "DeepSpeedEngine":
        raise ConfigError("model", "DeepSpeedEngine", "is trained by DeepSpeed, which does not expose gradients; use DDP or FSDP2.")
    held = model if isinstance(model, nn.Module) else _held(model)
    if dist.is_available() and any(isinstance(module, FullyShardedDataParallel) for module in held.modules()):
        allowed = "holds weights as flat parameters without rows and columns (FSDP1); use FSDP2 (`fully_shard`, `fsdp_version=2`)."
        raise ConfigError("model", "FullyShardedDataParallel", allowed)
    bare: nn.Module = extract_model_from_parallel(held, keep_torch_compile=False)
    for module in bare.modules():
        if dist.is_available() and isinstance(module, FSDPModule):
            module.reshard()  # after an evaluation the root's parameters are still gathered
    return bare


def contents(module: nn.Module) -> nn.Module:
    """The module inside a container that only forwards calls: DDP, `torch.compile`, `PeftModel`; any other module itself."""
    inner: nn.Module = without_peft(module)
    # accelerate looks for DeepSpeed on disk and through all submodules, which is too much for each module of a model.
    if any(name in held for name in _HELD for held in (module._modules, vars(module))):
        inner = without_peft(extract_model_from_parallel(module, keep_torch_compile=False))
    return module if inner is module else contents(inner)


def transformers_models(model: Any) -> dict[str, PreTrainedModel]:
    """The outermost transformers models in a model, by their names in it: `{"": model}` if it is one itself."""
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
    """The transformers model in a model; a module without one itself.

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
    """The names and classes of transformers models, for an error message."""
    return ", ".join(f"{name!r} ({type(one).__name__})" for name, one in models.items())


def _held(holder: Any) -> nn.Module:
    """The module with a transformers model among an object's attributes.

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
