"""What `import hf_prune` patches in transformers so that it loads and saves condensed models, without importing it."""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any

from .compat import when_imported, wrap

_Path = str | os.PathLike[str]


def install_reload_hook() -> None:
    """Let transformers load and save condensed models in this process; idempotent.

    Five methods are wrapped. `PreTrainedConfig.from_dict` and `PreTrainedModel.from_pretrained` ignore the refusal in the config
    of such a model (`condense/refusal.py`), and `PreTrainedModel.post_init` shrinks the model before its weights are loaded.
    `PreTrainedConfig.save_pretrained` writes the modelling file beside the config, and `to_json_file` writes the refusal into it:
    every way to save or push a model calls these, on one process only. Other models and configs are not affected.

    The patches are applied when transformers imports the two classes, which takes seconds; this function does not import them.
    """
    when_imported("transformers.modeling_utils", _wrap_models)
    when_imported("transformers.configuration_utils", _wrap_configs)


def _wrap_models(module: Any) -> None:
    wrap(module.PreTrainedModel, "from_pretrained", _accepting_config)
    wrap(module.PreTrainedModel, "post_init", _shrinking)


def _wrap_configs(module: Any) -> None:
    wrap(module.PreTrainedConfig, "from_dict", _accepting_fields)
    wrap(module.PreTrainedConfig, "save_pretrained", _writing_modeling_file)
    wrap(module.PreTrainedConfig, "to_json_file", _refusing_others)


def _accepting_config(stock: Callable[..., Any], cls: type, *args: Any, **kwargs: Any) -> Any:
    if hasattr(config := kwargs.get("config"), "transformers_weights"):
        _accept(vars(config))
    return stock(cls, *args, **kwargs)


def _accepting_fields(stock: Callable[..., Any], cls: type, config_dict: dict[str, Any], **kwargs: Any) -> Any:
    _accept(config_dict)
    if config_dict.get("hf_prune") is not None:  # says more than this, which `hf-prune export` wrote for other readers
        for name in ("per_layer_config", "allow_global_per_layer_attribute_access"):
            config_dict.pop(name, None)
    return stock(cls, config_dict, **kwargs)


def _accept(fields: dict[str, Any]) -> None:
    if fields.get("transformers_weights") is not None:
        from .condense.refusal import accept

        accept(fields)


def _shrinking(stock: Callable[..., None], model: Any) -> None:
    if getattr(model.config, "hf_prune", None) is not None:
        from .condense import needs_hf_prune, shrink
        from .model import SPECS, spec_for
        from .model.families import recall

        recall(model.config)
        if needs_hf_prune(model.config) or model.config.model_type in SPECS:  # of others it says how many tokens there were
            shrink(model, spec_for(model.config.model_type))
    stock(model)


def _writing_modeling_file(
    stock: Callable[..., Any], config: Any, save_directory: str | os.PathLike[str], *args: Any, **kwargs: Any
) -> Any:
    if getattr(config, "hf_prune", None) is not None:
        from .hub.reload import write_modeling_file

        write_modeling_file(config, save_directory)
    return stock(config, save_directory, *args, **kwargs)


def _refusing_others(
    stock: Callable[..., None], config: Any, json_file_path: str | os.PathLike[str], *args: Any, **kwargs: Any
) -> None:
    stock(config, json_file_path, *args, **kwargs)
    if getattr(config, "hf_prune", None) is not None:
        from .hub.reload import refuse_others

        refuse_others(config, json_file_path)
