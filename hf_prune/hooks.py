"""What `import hf_prune` changes in transformers, so that it loads and saves condensed models; nothing heavy is imported for it."""

from __future__ import annotations

import functools
import os
import sys
from collections.abc import Callable, Sequence
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any


def install_reload_hook() -> None:
    """Teach transformers, for this process, to load and to save condensed models; calling it again changes nothing.

    Five methods are wrapped. `PreTrainedConfig.from_dict` and `PreTrainedModel.from_pretrained` pass over the refusal in the config
    of such a model (`condense/refusal.py`), and `PreTrainedModel.post_init` shrinks the model before its weights are loaded.
    `PreTrainedConfig.save_pretrained` writes the modelling file beside the config, and `to_json_file` the refusal into it: every
    way to save or push a model passes through these, and on one process only. Other models and configs pass through untouched.

    It happens when transformers imports the two classes, which takes seconds and is not done for this.
    """
    when_imported("transformers.modeling_utils", _wrap_models)
    when_imported("transformers.configuration_utils", _wrap_configs)


def _wrap_models(module: Any) -> None:
    _wrap(module.PreTrainedModel, "from_pretrained", first=_accept_config)
    _wrap(module.PreTrainedModel, "post_init", first=_shrink)


def _wrap_configs(module: Any) -> None:
    _wrap(module.PreTrainedConfig, "from_dict", first=_accept_fields)
    _wrap(module.PreTrainedConfig, "save_pretrained", first=_write_modeling_file)
    _wrap(module.PreTrainedConfig, "to_json_file", then=_refuse_others)


def _accept_config(cls: type, *args: Any, config: Any = None, **kwargs: Any) -> None:
    if hasattr(config, "transformers_weights"):
        _accept_fields(cls, vars(config))


def _accept_fields(cls: type, config_dict: dict[str, Any], **kwargs: Any) -> None:
    if config_dict.get("transformers_weights") is not None:
        from .condense.refusal import accept

        accept(config_dict)


def _shrink(model: Any) -> None:
    if getattr(model.config, "hf_prune", None) is not None:
        from .condense import shrink
        from .model import spec_for

        shrink(model, spec_for(model.config.model_type))


def _write_modeling_file(config: Any, save_directory: str | os.PathLike[str], *args: Any, **kwargs: Any) -> None:
    if getattr(config, "hf_prune", None) is not None:
        from .hub.reload import write_modeling_file

        write_modeling_file(config, save_directory)


def _refuse_others(config: Any, json_file_path: str | os.PathLike[str], use_diff: bool = True) -> None:
    if getattr(config, "hf_prune", None) is not None:
        from .hub.reload import refuse_others

        refuse_others(config, json_file_path)


def _nothing(*args: Any, **kwargs: Any) -> None: ...


def _wrap(owner: type, name: str, first: Callable[..., None] = _nothing, then: Callable[..., None] = _nothing) -> None:
    """Make the method `owner.name` call `first`, do what it always did, and call `then`, all with its arguments."""
    found = vars(owner)[name]
    stock = getattr(found, "__func__", found)  # the function of a class method
    if getattr(stock, "wrapped_with", None) == (first, then):
        return

    @functools.wraps(stock)
    def method(self: Any, *args: Any, **kwargs: Any) -> Any:
        first(self, *args, **kwargs)
        result = stock(self, *args, **kwargs)
        then(self, *args, **kwargs)
        return result

    method.wrapped_with = (first, then)  # type: ignore[attr-defined]
    setattr(owner, name, classmethod(method) if isinstance(found, classmethod) else method)


def when_imported(name: str, do: Callable[[ModuleType], None]) -> None:
    """Call `do` with the module `name`: now if it is imported already, else right after it is."""
    if name in sys.modules:
        do(sys.modules[name])
    else:
        sys.meta_path.insert(0, _Waiting(name, do))


class _Waiting:
    """A finder for `sys.meta_path`: it finds one module as the others do, and lets something be done with it once it has run."""

    def __init__(self, name: str, do: Callable[[ModuleType], None]) -> None:
        self.name, self.do = name, do

    def find_spec(self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None) -> ModuleSpec | None:
        if fullname != self.name:
            return None
        others = (finder for finder in sys.meta_path if finder is not self)
        spec = next((found for finder in others if (found := finder.find_spec(fullname, path, target)) is not None), None)
        if spec is None or spec.loader is None:
            return spec
        run = spec.loader.exec_module

        def exec_module(module: ModuleType) -> None:
            run(module)
            self.do(module)

        spec.loader.exec_module = exec_module  # type: ignore[method-assign]
        return spec
